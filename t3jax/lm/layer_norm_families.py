"""The model families with layer norms, a row each: how their folders differ from Llama's."""

from typing import Any

from t3jax.lm.family import QK_NORMS, WEIGHTS, Family, slides_but_every_last

_COHERE: dict[str, Any] = {
    "fixed": {"norm": "layer", "norm_bias": False, "norms": "shared", "parallel": True},
    "fields": {
        "norm_eps": "layer_norm_eps",
        "attention_bias": "attention_bias",
        "logit_scale": "logit_scale",
        "head_dim": None,
    },
    "defaults": {
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "tie_word_embeddings": True,
    },
    "interleaved": True,
}


LAYER_NORM_FAMILIES: dict[str, Family] = {
    "phi": Family(
        "PhiForCausalLM",
        fixed={
            "norm": "layer",
            "norms": "shared",
            "parallel": True,
            "gated": False,
            "attention_bias": True,
            "mlp_bias": True,
            "head_bias": True,
        },
        fields={"norm_eps": "layer_norm_eps"},
        defaults={
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
        },
        expected={"qk_layernorm": (False,), "tie_word_embeddings": (False,)},
        weights={
            **WEIGHTS,
            "final_norm": "model.final_layernorm",
            "layers.{i}.attention.o": "model.layers.{i}.self_attn.dense",
            "layers.{i}.mlp.up": "model.layers.{i}.mlp.fc1",
            "layers.{i}.mlp.down": "model.layers.{i}.mlp.fc2",
        },
    ),
    "stablelm": Family(
        "StableLmForCausalLM",
        fixed={"norm": "layer"},
        fields={"norm_eps": "layer_norm_eps", "qkv_bias": "use_qkv_bias"},
        defaults={
            "num_key_value_heads": 32,
            "layer_norm_eps": 1e-5,
            "use_qkv_bias": False,
            "partial_rotary_factor": 0.25,
        },
        expected={"qk_layernorm": (False,), "use_parallel_residual": (False,)},
    ),
    "starcoder2": Family(
        "Starcoder2ForCausalLM",
        fixed={"norm": "layer", "gated": False},
        fields={
            "norm_eps": "norm_epsilon",
            "attention_bias": "use_bias",
            "mlp_bias": "use_bias",
        },
        defaults={
            "num_key_value_heads": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "norm_epsilon": 1e-5,
            "use_bias": True,
            "tie_word_embeddings": True,
            "sliding_window": None,
        },
        slides=lambda config, layer: True,
        weights={
            **WEIGHTS,
            "layers.{i}.mlp.up": "model.layers.{i}.mlp.c_fc",
            "layers.{i}.mlp.down": "model.layers.{i}.mlp.c_proj",
        },
    ),
    "nemotron": Family(
        "NemotronForCausalLM",
        fixed={"norm": "layer_offset", "gated": False},
        fields={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias", "norm_eps": "norm_eps"},
        defaults={"hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    ),
    "olmo": Family(
        "OlmoForCausalLM",
        fixed={"norm": "layer", "norm_weight": False, "norm_bias": False, "norm_eps": 1e-5},
        fields={"norm_eps": None, "attention_bias": "attention_bias", "qkv_clip": "clip_qkv"},
        defaults={"clip_qkv": None},
    ),
    "jais2": Family(
        "Jais2ForCausalLM",
        fixed={"norm": "layer", "gated": False},
        fields={
            "norm_eps": "layer_norm_eps",
            "attention_bias": "attention_bias",
            "mlp_bias": "mlp_bias",
        },
        defaults={
            "hidden_act": "relu2",
            "layer_norm_eps": 1e-5,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "cohere": Family(
        "CohereForCausalLM",
        **{
            **_COHERE,
            "fields": {**_COHERE["fields"], "qk_norm": "use_qk_norm"},
            "defaults": {**_COHERE["defaults"], "rope_theta": 5e5, "use_qk_norm": False},
        },
        qk_norm="each",
        weights={**WEIGHTS, **QK_NORMS},
    ),
    "cohere2": Family(
        "Cohere2ForCausalLM",
        **{
            **_COHERE,
            "defaults": {
                **_COHERE["defaults"],
                "sliding_window": 4096,
                "sliding_window_pattern": 4,
            },
        },
        slides=slides_but_every_last,
        layer_types=True,
        unrotated=lambda config, layer, local: not local,
    ),
}
