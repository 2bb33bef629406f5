"""The model families with experts whose router has a correction for the choice, a row each."""

from t3jax.lm.config import LMConfig
from t3jax.lm.expert_families import MIXTRAL, MIXTRAL_NAMES, OF_MLPS, QWEN_NAMES, shared_expert
from t3jax.lm.family import EXPERTS, QK_NORMS, WEIGHTS, Family, Json


def _is_dense_in_ernie(config: Json, layer: int) -> bool:
    first, last = config["moe_layer_start_index"], config["moe_layer_end_index"]
    last = config["num_hidden_layers"] - 1 if last == -1 else last
    return not first <= layer <= last or (layer + 1) % config["moe_layer_interval"] != 0


def _restore_ernie(config: LMConfig) -> Json:
    mixed = [layer for layer in range(config.num_layers) if config.has_experts(layer)]
    first, last = (mixed[0], mixed[-1]) if mixed else (config.num_layers, config.num_layers - 1)
    return {
        "moe_layer_start_index": first,
        "moe_layer_end_index": last,
        "moe_layer_interval": mixed[1] - first if len(mixed) > 1 else 1,
    }


def _prepare_minimax(config: Json) -> Json:
    if config["rotary_dim"] is None:
        return config
    return {**config, "partial_rotary_factor": config["rotary_dim"] / (config["head_dim"] or 128)}


_OF_DEEPSEEK = {
    "experts.count": "n_routed_experts",
    "experts.chosen": "num_experts_per_tok",
    "experts.normed": "norm_topk_prob",
    "experts.size": "moe_intermediate_size",
    "experts.scale": "routed_scaling_factor",
    "experts.groups": "n_group",
    "experts.chosen_groups": "topk_group",
}
_DEEPSEEK_WEIGHTS = {
    **WEIGHTS,
    **QK_NORMS,
    **EXPERTS,
    **shared_expert("shared_experts"),
    "layers.{i}.experts.router.correction": "model.layers.{i}.mlp.gate.e_score_correction_bias",
}

CORRECTED_FAMILIES: dict[str, Family] = {
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        fixed={"experts.router": "sigmoid"},
        fields={
            "qkv_bias": "attention_bias",
            "qk_norm": "use_qk_norm",
            **_OF_DEEPSEEK,
        },
        defaults={
            "num_key_value_heads": 8,
            "partial_rotary_factor": 0.5,
            "use_qk_norm": False,
            "n_routed_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "moe_intermediate_size": 1408,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
        aliases={"num_local_experts": "n_routed_experts"},
        dense=lambda config, layer: layer < config["first_k_dense_replace"],
        weights=_DEEPSEEK_WEIGHTS,
        expert_names=QWEN_NAMES,
        more_layers=True,
    ),
    "dots1": Family(
        "Dots1ForCausalLM",
        fixed={"experts.router": "sigmoid", "qk_norm": "head"},
        fields={"attention_bias": "attention_bias", **_OF_DEEPSEEK},
        defaults={
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "max_window_layers": 62,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 1408,
            "first_k_dense_replace": 0,
            "n_shared_experts": None,
        },
        aliases={"num_local_experts": "n_routed_experts"},
        slides=lambda config, layer: (
            config["sliding_window"] is not None and layer >= config["max_window_layers"]
        ),
        layer_types=True,
        dense=lambda config, layer: layer < config["first_k_dense_replace"],
        weights=_DEEPSEEK_WEIGHTS,
        expert_names=QWEN_NAMES,
    ),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeForCausalLM",
        fixed={"experts.router": "softmax_corrected", "experts.normed": True},
        fields={
            "experts.count": "moe_num_experts",
            "experts.chosen": "moe_k",
            "experts.size": "moe_intermediate_size",
        },
        defaults={
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "rope_theta": 5e5,
            "moe_intermediate_size": 1536,
            "moe_k": 6,
            "moe_num_experts": 64,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": -1,
            "moe_layer_interval": 1,
        },
        expected={"moe_norm_min": (1e-12,), "use_bias": (False,)},
        aliases={"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"},
        dense=_is_dense_in_ernie,
        restore=_restore_ernie,
        interleaved=True,
        weights={
            **WEIGHTS,
            **EXPERTS,
            **shared_expert("shared_experts"),
            "layers.{i}.experts.router.correction": (
                "model.layers.{i}.mlp.moe_statics.e_score_correction_bias"
            ),
        },
        expert_names=QWEN_NAMES,
        in_row=("moe_statics.e_score_correction_bias",),
        renamed=(
            (r"\.gate\.moe_statics\.", ".moe_statics."),
            (r"^model\.mtp_.*", None),  # what predicts further tokens
        ),
    ),
    "minimax_m2": Family(
        "MiniMaxM2ForCausalLM",
        fixed={"qk_norm": "width", "experts.router": "sigmoid", "experts.normed": True},
        fields=OF_MLPS,
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_theta": 5e6,
            "rotary_dim": None,
            "partial_rotary_factor": 1.0,
            "num_experts_per_tok": 8,
            "num_local_experts": 256,
        },
        expected={"use_qk_norm": (True,), "shared_intermediate_size": (0,)},
        aliases={"num_experts": "num_local_experts"},
        prepare=_prepare_minimax,
        weights={
            **WEIGHTS,
            **QK_NORMS,
            **MIXTRAL,
            "layers.{i}.experts.router.correction": (
                "model.layers.{i}.block_sparse_moe.e_score_correction_bias"
            ),
        },
        expert_names=MIXTRAL_NAMES,
        more_layers=True,
        renamed=((r"\.mlp\.(?=gate\.|experts\.|e_score)", ".block_sparse_moe."),),
    ),
}
