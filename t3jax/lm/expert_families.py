"""The model families with experts, a row each: how their folders differ from Llama's."""

from t3jax.lm.family import EXPERTS, GRANITE_SCALES, QK_NORMS, WEIGHTS, Family, Json

QWEN_NAMES = ("gate_proj", "up_proj", "down_proj")
MIXTRAL_NAMES = ("w1", "w3", "w2")
MIXTRAL = {
    key: name.replace(".mlp.", ".block_sparse_moe.") for key, name in EXPERTS.items()
}  # in folders; transformers 5 calls the module mlp
OF_EXPERTS = {
    "experts.count": "num_experts",
    "experts.chosen": "num_experts_per_tok",
}
_NORMED = {"experts.normed": "norm_topk_prob"}
OF_MLPS = {  # whose width is the experts'
    "experts.count": "num_local_experts",
    "experts.chosen": "num_experts_per_tok",
    "experts.size": "intermediate_size",
}
_QWEN_DEFAULTS = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
}


def shared_expert(module: str) -> dict[str, str]:
    """The weights of a shared expert, a module of the MLP."""
    return {
        f"layers.{{i}}.experts.shared.{name}": f"model.layers.{{i}}.mlp.{module}.{name}_proj"
        for name in ("gate", "up", "down")
    }


def is_dense_in_qwen(config: Json, layer: int) -> bool:
    """Whether a layer has an MLP and no experts."""
    step = config["decoder_sparse_step"]
    return layer in (config["mlp_only_layers"] or ()) or (layer + 1) % step != 0


EXPERT_FAMILIES: dict[str, Family] = {
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        fixed={"qk_norm": "head"},
        fields={
            "attention_bias": "attention_bias",
            "experts.size": "moe_intermediate_size",
            **OF_EXPERTS,
            **_NORMED,
        },
        defaults={
            **_QWEN_DEFAULTS,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "num_experts": 128,
        },
        aliases={"num_local_experts": "num_experts"},
        slides=lambda config, layer: True,
        dense=is_dense_in_qwen,
        weights={**WEIGHTS, **QK_NORMS, **EXPERTS},
        expert_names=QWEN_NAMES,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        fixed={"experts.normed": True},
        fields=OF_MLPS,
        defaults={
            "num_key_value_heads": 8,
            "sliding_window": None,
            "rope_theta": 1e6,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
        },
        aliases={"num_experts": "num_local_experts"},
        slides=lambda config, layer: True,
        weights={**WEIGHTS, **MIXTRAL},
        expert_names=MIXTRAL_NAMES,
        renamed=((r"\.mlp\.(?=gate\.|experts\.)", ".block_sparse_moe."),),
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        fixed={"qk_norm": "width"},
        fields={
            "attention_bias": "attention_bias",
            "qkv_clip": "clip_qkv",
            "experts.size": "intermediate_size",
            **OF_EXPERTS,
            **_NORMED,
        },
        defaults={
            "clip_qkv": None,
            "num_experts_per_tok": 8,
            "num_experts": 64,
            "norm_topk_prob": False,
        },
        aliases={"num_local_experts": "num_experts"},
        weights={**WEIGHTS, **QK_NORMS, **EXPERTS},
        expert_names=QWEN_NAMES,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        fixed={"experts.shared_gate": True},
        fields={
            "qkv_bias": "qkv_bias",
            "experts.size": "moe_intermediate_size",
            "experts.shared": "shared_expert_intermediate_size",
            **OF_EXPERTS,
            **_NORMED,
        },
        defaults={
            **_QWEN_DEFAULTS,
            "num_key_value_heads": 16,
            "max_window_layers": 28,
            "qkv_bias": True,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts_per_tok": 4,
            "num_experts": 60,
        },
        slides=lambda config, layer: layer % 2 == 0 and layer < config["max_window_layers"],
        layer_types=True,
        dense=is_dense_in_qwen,
        weights={
            **WEIGHTS,
            **EXPERTS,
            **shared_expert("shared_expert"),
            "layers.{i}.experts.shared_gate": "model.layers.{i}.mlp.shared_expert_gate",
        },
        expert_names=QWEN_NAMES,
    ),
    "granitemoe": Family(
        "GraniteMoeForCausalLM",
        fixed={"experts.normed": True},
        fields={
            "attention_bias": "attention_bias",
            **GRANITE_SCALES,
            **OF_MLPS,
        },
        defaults={
            **dict.fromkeys(GRANITE_SCALES.values(), 1.0),
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
        },
        reciprocal=("logits_scaling",),
        weights={
            **WEIGHTS,
            "layers.{i}.experts.router": "model.layers.{i}.block_sparse_moe.router.layer",
            "layers.{i}.experts.gate": "model.layers.{i}.block_sparse_moe.input_linear",
            "layers.{i}.experts.up": "model.layers.{i}.block_sparse_moe.input_linear",
            "layers.{i}.experts.down": "model.layers.{i}.block_sparse_moe.output_linear",
        },
        renamed=(
            (r"\.experts\.gate_up_proj$", ".input_linear.weight"),
            (r"\.experts\.down_proj$", ".output_linear.weight"),
            (r"\.router\.weight$", ".router.layer.weight"),
        ),
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        fixed={
            "sinks": True,
            "activation": "quick_gelu",
            "experts.normed": True,
            "experts.bias": True,
        },
        fields={
            "attention_bias": "attention_bias",
            "activation": None,
            "experts.clamp": "swiglu_limit",
            **OF_MLPS,
        },
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 64,
            "attention_bias": True,
            "sliding_window": 128,
            "rope_theta": 150000.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 32.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            "swiglu_limit": 7.0,
            "num_experts_per_tok": 4,
            "num_local_experts": 128,
        },
        aliases={"num_experts": "num_local_experts"},
        expected={"swiglu_alpha": (1.702,)},
        slides=lambda config, layer: layer % 2 == 0,
        layer_types=True,
        weights={
            **WEIGHTS,
            "layers.{i}.attention.sinks": "model.layers.{i}.self_attn.sinks",
            **EXPERTS,
            "layers.{i}.experts.router": "model.layers.{i}.mlp.router",
            "layers.{i}.experts.gate.bias": "model.layers.{i}.mlp.experts.gate_up_proj_bias",
            "layers.{i}.experts.up.bias": "model.layers.{i}.mlp.experts.gate_up_proj_bias",
            "layers.{i}.experts.down.bias": "model.layers.{i}.mlp.experts.down_proj_bias",
        },
        transposed=("experts.gate_up_proj", "experts.down_proj"),
        by_row=True,
    ),
    "phimoe": Family(
        "PhimoeForCausalLM",
        fixed={"norm": "layer", "experts.router": "sparsemixer"},
        fields={
            "attention_bias": "attention_bias",
            "head_bias": "lm_head_bias",
            "experts.jitter": "router_jitter_noise",
            **OF_MLPS,
        },
        defaults={
            "num_key_value_heads": 8,
            "sliding_window": None,
            "rope_theta": 1e6,
            "lm_head_bias": False,
            "router_jitter_noise": 0.01,
            "num_experts_per_tok": 2,
            "num_local_experts": 16,
        },
        # transformers' SparseMixer takes two, whatever the config says.
        expected={"num_experts_per_tok": (2,), "tie_word_embeddings": (False,)},
        slides=lambda config, layer: True,
        ropes=("default", "longrope"),
        mscales=True,
        weights={**WEIGHTS, **MIXTRAL},
        expert_names=MIXTRAL_NAMES,
        renamed=(
            (r"\.mlp\.router\.", ".block_sparse_moe.gate."),
            (r"\.mlp\.experts\.", ".block_sparse_moe.experts."),
        ),
    ),
}
