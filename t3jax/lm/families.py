"""The model families, a row each: how their folders differ from Llama's.

Further rows are in `newer_families.py`, those with layer norms in `layer_norm_families.py`,
`gpt_families.py` and `bloom_families.py`, those with experts in `expert_families.py` and
`corrected_families.py`, those with gated delta nets in `delta_families.py`, those whose layers are
of unequal shape in `unequal_families.py`. `config_json.py` and `config_writing.py` use a row to
read and write a `config.json`, `places.py` for the names of the weights.
"""

from typing import Any

from t3jax.lm.bloom_families import BLOOM_FAMILIES
from t3jax.lm.corrected_families import CORRECTED_FAMILIES
from t3jax.lm.delta_families import DELTA_FAMILIES
from t3jax.lm.expert_families import EXPERT_FAMILIES
from t3jax.lm.family import (
    FUSED_MLP,
    GRANITE_SCALES,
    POST_NORMS,
    QK_NORMS,
    WEIGHTS,
    Family,
    Json,
    slides_but_every_last,
)
from t3jax.lm.gpt_families import GPT_FAMILIES
from t3jax.lm.layer_norm_families import LAYER_NORM_FAMILIES
from t3jax.lm.newer_families import NEWER_FAMILIES
from t3jax.lm.unequal_families import UNEQUAL_FAMILIES


def _slides_in_qwen(config: Json, layer: int) -> bool:
    return layer >= config["max_window_layers"]


def _is_unrotated_in_smollm3(config: Json, layer: int, local: bool) -> bool:
    flags = config["no_rope_layers"]  # 1 for a layer that is rotated
    if flags is None:
        return (layer + 1) % config["no_rope_layer_interval"] == 0
    if len(flags) != config["num_hidden_layers"]:
        raise ValueError(
            f"no_rope_layers has {len(flags)} values, expected {config['num_hidden_layers']}"
        )
    return not flags[layer]


def _is_unrotated_beside_windows(config: Json, layer: int, local: bool) -> bool:
    return config["sliding_window"] is not None and not local


_QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA = {"norm": "rms_offset", "scaled_embedding": True}
_GEMMA_DEFAULTS = {
    "tie_word_embeddings": True,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
}
_GEMMA2_FIELDS = {
    "activation": "hidden_activation",
    "attention_bias": "attention_bias",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "logit_softcap": "final_logit_softcapping",
}
_GEMMA2_DEFAULTS = {
    **_GEMMA_DEFAULTS,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA2_WEIGHTS = {
    **WEIGHTS,
    **POST_NORMS,
    "layers.{i}.mlp_norm": "model.layers.{i}.pre_feedforward_layernorm",
}

_GLM: dict[str, Any] = {
    "fields": {"qkv_bias": "attention_bias"},
    "defaults": {
        "num_key_value_heads": 2,
        "head_dim": 128,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
    },
    "interleaved": True,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        fields={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
        slides=lambda config, layer: True,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        fixed={"qkv_bias": True},
        defaults={"num_key_value_heads": 32, **_QWEN_WINDOWS},
        slides=_slides_in_qwen,
        layer_types=True,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        fixed={"qk_norm": "head"},
        fields={"attention_bias": "attention_bias"},
        defaults={"num_key_value_heads": 32, "head_dim": 128, **_QWEN_WINDOWS},
        slides=_slides_in_qwen,
        layer_types=True,
        weights={**WEIGHTS, **QK_NORMS},
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        defaults={
            "sliding_window": None,
            "partial_rotary_factor": 1.0,
            "original_max_position_embeddings": 4096,
        },
        slides=lambda config, layer: True,
        ropes=("default", "longrope"),
        weights={
            **WEIGHTS,
            "layers.{i}.attention.q": "model.layers.{i}.self_attn.qkv_proj",
            "layers.{i}.attention.k": "model.layers.{i}.self_attn.qkv_proj",
            "layers.{i}.attention.v": "model.layers.{i}.self_attn.qkv_proj",
            **FUSED_MLP,
        },
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        # Configs say "gelu" in `hidden_act` and mean the approximation.
        fixed={**_GEMMA, "activation": "gelu_pytorch_tanh"},
        fields={"activation": None, "attention_bias": "attention_bias"},
        defaults={**_GEMMA_DEFAULTS, "num_key_value_heads": 16},
        expected={
            "hidden_act": ("gelu_pytorch_tanh", "gelu"),
            "hidden_activation": ("gelu_pytorch_tanh", None),
            "use_bidirectional_attention": (False, None),
        },
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        fixed={**_GEMMA, "norms": "both"},
        fields={**_GEMMA2_FIELDS, "attention_softcap": "attn_logit_softcapping"},
        defaults=_GEMMA2_DEFAULTS,
        expected={"use_bidirectional_attention": (False, None)},
        slides=lambda config, layer: layer % 2 == 0,
        layer_types=True,
        weights=_GEMMA2_WEIGHTS,
    ),
    "vaultgemma": Family(
        "VaultGemmaForCausalLM",
        fixed=_GEMMA,
        fields={**_GEMMA2_FIELDS, "attention_softcap": "attn_logit_softcapping"},
        defaults=_GEMMA2_DEFAULTS,
        expected={"use_bidirectional_attention": (False, None)},
        slides=lambda config, layer: layer % 2 == 0,
        layer_types=True,
        weights={
            **WEIGHTS,
            "layers.{i}.mlp_norm": "model.layers.{i}.pre_feedforward_layernorm",
        },
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        fixed={**_GEMMA, "norms": "both", "qk_norm": "head"},
        fields=_GEMMA2_FIELDS,
        defaults={
            **_GEMMA_DEFAULTS,
            # Published configs leave out values of the 4B model.
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "final_logit_softcapping": None,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        expected={
            "attn_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
        },
        slides=slides_but_every_last,
        layer_types=True,
        weights={**_GEMMA2_WEIGHTS, **QK_NORMS},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        fixed={"norms": "post", "qk_norm": "width"},
        fields={"attention_bias": "attention_bias"},
        weights={**WEIGHTS, **QK_NORMS, **POST_NORMS},
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        fixed={"norms": "post", "qk_norm": "width"},
        fields={"attention_bias": "attention_bias"},
        defaults={
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "rope_theta": 5e5,
        },
        local_theta=5e5,  # fixed in transformers
        slides=lambda config, layer: (layer + 1) % 4 != 0,
        layer_types=True,
        weights={**WEIGHTS, **QK_NORMS, **POST_NORMS},
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        fields={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        defaults={
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "rope_theta": 2e6,
            "use_sliding_window": False,
            "sliding_window": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
        slides=lambda config, layer: _is_unrotated_in_smollm3(config, layer, False),
        layer_types=True,
        unrotated=_is_unrotated_in_smollm3,
    ),
    "granite": Family(
        "GraniteForCausalLM",
        fields={
            "attention_bias": "attention_bias",
            "mlp_bias": "mlp_bias",
            **GRANITE_SCALES,
        },
        defaults=dict.fromkeys(GRANITE_SCALES.values(), 1.0),
        reciprocal=("logits_scaling",),
    ),
    "glm": Family("GlmForCausalLM", **_GLM, weights={**WEIGHTS, **FUSED_MLP}),
    "glm4": Family(
        "Glm4ForCausalLM",
        **{**_GLM, "fixed": {"norms": "both"}},
        weights={
            **WEIGHTS,
            **FUSED_MLP,
            "layers.{i}.attention_post_norm": "model.layers.{i}.post_self_attn_layernorm",
            "layers.{i}.mlp_post_norm": "model.layers.{i}.post_mlp_layernorm",
        },
    ),
    "ernie4_5": Family(
        "Ernie4_5ForCausalLM",
        fields={"attention_bias": "use_bias", "mlp_bias": "use_bias"},
        defaults={
            "num_key_value_heads": 2,
            "head_dim": 128,
            "tie_word_embeddings": True,
            "use_bias": False,
            "rope_theta": 5e5,
        },
        interleaved=True,
    ),
    "helium": Family(
        "HeliumForCausalLM",
        fields={"qkv_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        defaults={"num_key_value_heads": 20, "head_dim": 128, "rope_theta": 1e5},
        interleaved=True,
    ),
    "exaone4": Family(
        "Exaone4ForCausalLM",
        fixed={"norms": "post", "qk_norm": "head"},
        defaults={
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        slides=slides_but_every_last,
        layer_types=True,
        unrotated=_is_unrotated_beside_windows,
        weights={**WEIGHTS, **QK_NORMS, **POST_NORMS},
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        fields={
            "qkv_bias": "attention_bias",
            "o_bias": "attention_out_bias",
            "mlp_bias": "mlp_bias",
        },
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
            "attention_out_bias": False,
        },
    ),
    "arcee": Family(
        "ArceeForCausalLM",
        fixed={"gated": False},
        fields={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        defaults={"hidden_act": "relu2"},
    ),
    "cwm": Family(
        "CwmForCausalLM",
        fields={"mlp_bias": "mlp_bias"},
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "sliding_window": 8192,
            "rope_theta": 1e6,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e6,
                "factor": 16.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        slides=lambda config, layer: layer % 4 != 0,
        layer_types=True,
    ),
    "ministral": Family(
        "MinistralForCausalLM",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        slides=lambda config, layer: config["sliding_window"] is not None,
        layer_types=True,
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "sliding_window": None,
            "rope_theta": 1e6,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        slides=lambda config, layer: True,
    ),
    "internlm3": Family(
        "InternLM3ForCausalLM",
        fields={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        defaults={"num_key_value_heads": 2, "head_dim": 128},
        aliases={"qkv_bias": "attention_bias", "bias": "mlp_bias"},
    ),
    "iquestcoder": Family(
        "IQuestCoderForCausalLM",
        fields={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        defaults={"num_key_value_heads": 8, "head_dim": 128},
    ),
    **NEWER_FAMILIES,
    **GPT_FAMILIES,
    **BLOOM_FAMILIES,
    **LAYER_NORM_FAMILIES,
    **EXPERT_FAMILIES,
    **CORRECTED_FAMILIES,
    **DELTA_FAMILIES,
    **UNEQUAL_FAMILIES,
}
