"""The model families with gated delta nets or short convolutions, a row each."""

from typing import Any

from t3jax.lm.expert_families import OF_EXPERTS, QWEN_NAMES, is_dense_in_qwen, shared_expert
from t3jax.lm.family import EXPERTS, QK_NORMS, WEIGHTS, Family, Json

_FIXED = {"norm": "rms_offset", "qk_norm": "head", "output_gate": True}
_FIELDS = {
    "attention_bias": "attention_bias",
    "delta.key_heads": "linear_num_key_heads",
    "delta.value_heads": "linear_num_value_heads",
    "delta.key_dim": "linear_key_head_dim",
    "delta.value_dim": "linear_value_head_dim",
    "delta.taps": "linear_conv_kernel_dim",
}
_MIXED = {
    **OF_EXPERTS,
    "experts.size": "moe_intermediate_size",
    "experts.shared": "shared_expert_intermediate_size",
}
_DEFAULTS = {
    "head_dim": 256,
    "layer_types": None,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "partial_rotary_factor": 0.25,
}
_SIZES = {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}
_MODULE = "model.layers.{i}.linear_attn"
_DELTA_WEIGHTS = {
    "layers.{i}.delta.q_conv": f"{_MODULE}.conv1d",
    "layers.{i}.delta.k_conv": f"{_MODULE}.conv1d",
    "layers.{i}.delta.v_conv": f"{_MODULE}.conv1d",
    "layers.{i}.delta.fading_bias": f"{_MODULE}.dt_bias",
    "layers.{i}.delta.log_rate": f"{_MODULE}.A_log",
    "layers.{i}.delta.norm": f"{_MODULE}.norm",
    "layers.{i}.delta.o": f"{_MODULE}.out_proj",
}
_WEIGHTS = {
    **WEIGHTS,
    **QK_NORMS,
    "layers.{i}.attention.gate": "model.layers.{i}.self_attn.q_proj",
    **_DELTA_WEIGHTS,
}
_FUSED = {  # Qwen3-Next's
    **{f"layers.{{i}}.delta.{name}": f"{_MODULE}.in_proj_qkvz" for name in ("q", "k", "v", "gate")},
    **{f"layers.{{i}}.delta.{name}": f"{_MODULE}.in_proj_ba" for name in ("strength", "fading")},
}
_SPLIT = {  # Qwen3.5's
    **{f"layers.{{i}}.delta.{name}": f"{_MODULE}.in_proj_qkv" for name in ("q", "k", "v")},
    "layers.{i}.delta.gate": f"{_MODULE}.in_proj_z",
    "layers.{i}.delta.strength": f"{_MODULE}.in_proj_b",
    "layers.{i}.delta.fading": f"{_MODULE}.in_proj_a",
}
_MIXTURE = {
    **EXPERTS,
    **shared_expert("shared_expert"),
    "layers.{i}.experts.shared_gate": "model.layers.{i}.mlp.shared_expert_gate",
}
_COMMON: dict[str, Any] = {
    "expected": {"attn_output_gate": (True,)},
    "channelwise": ("conv1d",),
    "renamed": ((r"^mtp\..*", None),),  # layers that predict further tokens
}


_LFM2 = {
    "embed": "model.embed_tokens",
    "final_norm": "model.embedding_norm",
    "lm_head": "lm_head",
    "layers.{i}.attention_norm": "model.layers.{i}.operator_norm",
    "layers.{i}.attention.q": "model.layers.{i}.self_attn.q_proj",
    "layers.{i}.attention.k": "model.layers.{i}.self_attn.k_proj",
    "layers.{i}.attention.v": "model.layers.{i}.self_attn.v_proj",
    "layers.{i}.attention.o": "model.layers.{i}.self_attn.out_proj",
    "layers.{i}.attention.q_norm": "model.layers.{i}.self_attn.q_layernorm",
    "layers.{i}.attention.k_norm": "model.layers.{i}.self_attn.k_layernorm",
    "layers.{i}.conv.gate": "model.layers.{i}.conv.in_proj",
    "layers.{i}.conv.out_gate": "model.layers.{i}.conv.in_proj",
    "layers.{i}.conv.v": "model.layers.{i}.conv.in_proj",
    "layers.{i}.conv.taps": "model.layers.{i}.conv.conv",
    "layers.{i}.conv.o": "model.layers.{i}.conv.out_proj",
    "layers.{i}.mlp_norm": "model.layers.{i}.ffn_norm",
    "layers.{i}.mlp.gate": "model.layers.{i}.feed_forward.w1",
    "layers.{i}.mlp.up": "model.layers.{i}.feed_forward.w3",
    "layers.{i}.mlp.down": "model.layers.{i}.feed_forward.w2",
}


def _prepare_lfm2(config: Json) -> dict[str, Any]:
    """Computes the width of the MLPs as transformers does."""
    width = config["intermediate_size"]
    if config["block_auto_adjust_ff_dim"]:
        width, multiple = int(2 * width / 3), config["block_multiple_of"]
        if config["block_ffn_dim_multiplier"] is not None:
            width = int(config["block_ffn_dim_multiplier"] * width)
            width = multiple * -(-width // multiple)
    return {**config, "intermediate_size": width, "block_auto_adjust_ff_dim": False}


_LFM2_FIELDS = {"activation": None, "norm_eps": "norm_eps", "conv.taps": "conv_L_cache"}
_LFM2_DEFAULTS = {
    "vocab_size": 65536,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128000,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "conv_L_cache": 3,
    "layer_types": None,
    "full_attn_idxs": None,
}

DELTA_FAMILIES: dict[str, Family] = {
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        fixed={**_FIXED, "experts.shared_gate": True},
        fields={**_FIELDS, **_MIXED, "experts.normed": "norm_topk_prob"},
        defaults={
            **_DEFAULTS,
            **_SIZES,
            "num_key_value_heads": 2,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
            "num_experts_per_tok": 10,
            "num_experts": 512,
            "norm_topk_prob": True,
        },
        dense=is_dense_in_qwen,
        weights={**_WEIGHTS, **_FUSED, **_MIXTURE},
        expert_names=QWEN_NAMES,
        grouped={
            "q_proj": "num_heads",
            "in_proj_qkvz": "delta.key_heads",
            "in_proj_ba": "delta.key_heads",
        },
        **_COMMON,
    ),
    "qwen3_5_text": Family(
        "Qwen3_5ForCausalLM",
        fixed=_FIXED,
        fields=_FIELDS,
        defaults={**_DEFAULTS, "num_key_value_heads": 4},
        weights={**_WEIGHTS, **_SPLIT},
        grouped={"q_proj": "num_heads"},
        **_COMMON,
    ),
    "qwen3_5_moe_text": Family(
        "Qwen3_5MoeForCausalLM",
        fixed={**_FIXED, "experts.shared_gate": True, "experts.normed": True},
        # Every layer has experts.
        fields={**_FIELDS, **_MIXED, "intermediate_size": "moe_intermediate_size"},
        defaults={
            **_DEFAULTS,
            **_SIZES,
            "num_key_value_heads": 2,
            "num_experts_per_tok": 8,
            "num_experts": 256,
        },
        weights={**_WEIGHTS, **_SPLIT, **_MIXTURE},
        expert_names=QWEN_NAMES,
        grouped={"q_proj": "num_heads"},
        **_COMMON,
    ),
    "lfm2": Family(
        "Lfm2ForCausalLM",
        fixed={"qk_norm": "head"},
        fields=_LFM2_FIELDS,
        defaults={
            **_LFM2_DEFAULTS,
            "hidden_size": 2560,
            "intermediate_size": 12288,
            "block_auto_adjust_ff_dim": True,
            "block_ffn_dim_multiplier": 1.0,
            "block_multiple_of": 256,
        },
        expected={"conv_bias": (False,)},
        aliases={"block_ff_dim": "intermediate_size", "tie_embedding": "tie_word_embeddings"},
        prepare=_prepare_lfm2,
        restore=lambda config: {"block_auto_adjust_ff_dim": False},
        weights=_LFM2,
        channelwise=("conv.conv",),
    ),
    "lfm2_moe": Family(
        "Lfm2MoeForCausalLM",
        fixed={"qk_norm": "head", "experts.router": "sigmoid", "experts.smoothing": 1e-6},
        fields={
            **_LFM2_FIELDS,
            **OF_EXPERTS,
            "experts.size": "moe_intermediate_size",
            "experts.normed": "norm_topk_prob",
            "experts.scale": "routed_scaling_factor",
        },
        defaults={
            **_LFM2_DEFAULTS,
            "hidden_size": 2048,
            "intermediate_size": 7168,
            "moe_intermediate_size": 1792,
            "num_dense_layers": 2,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
        },
        expected={"conv_bias": (False,), "use_expert_bias": (True,)},
        aliases={"tie_embedding": "tie_word_embeddings"},
        dense=lambda config, layer: layer < config["num_dense_layers"],
        restore=lambda config: {
            "num_dense_layers": sum(config.experts.dense) if config.experts else 0
        },
        weights={
            **_LFM2,
            **{key: name.replace(".mlp.", ".feed_forward.") for key, name in EXPERTS.items()},
            "layers.{i}.experts.router.correction": "model.layers.{i}.feed_forward.expert_bias",
        },
        expert_names=("w1", "w3", "w2"),
        channelwise=("conv.conv",),
    ),
}
