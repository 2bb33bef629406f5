"""The model families with gated delta nets, a row each: how their folders differ from Llama's."""

from typing import Any

from t3jax.lm.expert_families import OF_EXPERTS, QWEN_NAMES, is_dense_in_qwen, shared_expert
from t3jax.lm.family import EXPERTS, QK_NORMS, WEIGHTS, Family

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
_OWN = {
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
    **_OWN,
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
    "renamed": ((r"^mtp\..*", None),),  # what predicts further tokens
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
}
