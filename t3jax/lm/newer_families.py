"""Families since 2025 whose layers are much as Llama's, a row each: how their folders differ."""

from collections.abc import Mapping
from typing import Any

from t3jax.lm.family import GRANITE_SCALES, QK_NORMS, WEIGHTS, Family, Json


def _prepare_hunyuan(config: Json) -> dict[str, Any]:
    """Converts a "dynamic" rotation with `alpha` to a default one with another base."""
    config = dict(config)
    head_dim = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name)
        if not isinstance(rope, Mapping) or not rope.get("alpha"):
            continue
        if rope.get("rope_type", rope.get("type")) != "dynamic" or head_dim < 4:
            continue
        theta, alpha = rope.get("rope_theta", config["rope_theta"]), rope["alpha"]
        if not all(isinstance(n, int | float) and 1 <= n <= 1e9 for n in (theta, alpha)):
            raise ValueError(
                f"{name}: rope_theta {theta!r:.60} and alpha {alpha!r:.60}, expected numbers >= 1"
            )
        theta = float(theta * alpha ** (head_dim / (head_dim - 2)))
        config |= {name: {"rope_type": "default", "rope_theta": theta}, "rope_theta": theta}
    return config


def _prepare_hyperclovax(config: Json) -> Json:
    if config["attention_multiplier"] is not None:
        return config
    head_dim = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    return {**config, "attention_multiplier": max(head_dim, 1) ** -0.5}


NEWER_FAMILIES: dict[str, Family] = {
    "apertus": Family(
        "ApertusForCausalLM",
        fixed={"qk_norm": "head", "gated": False, "activation": "xielu"},
        fields={"activation": None, "attention_bias": "attention_bias"},
        defaults={
            "hidden_act": "xielu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 12e6,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 12e6,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        expected={"hidden_act": ("xielu",), "mlp_bias": (False,), "post_norm": (False,)},
        weights={
            **WEIGHTS,
            **QK_NORMS,
            "layers.{i}.attention_norm": "model.layers.{i}.attention_layernorm",
            "layers.{i}.mlp_norm": "model.layers.{i}.feedforward_layernorm",
            "layers.{i}.mlp.alpha_p": "model.layers.{i}.mlp.act_fn.alpha_p",
            "layers.{i}.mlp.alpha_n": "model.layers.{i}.mlp.act_fn.alpha_n",
        },
        renamed=((r".*\.act_fn\.(beta|eps)$", None),),
        constants={
            "model.layers.{i}.mlp.act_fn.beta": 0.5,
            "model.layers.{i}.mlp.act_fn.eps": -1e-6,
        },
    ),
    "hunyuan_v1_dense": Family(
        "HunYuanDenseV1ForCausalLM",
        fixed={"qk_norm": "head", "qk_norm_after": True},
        fields={"attention_bias": "attention_bias"},
        expected={"use_qk_norm": (True,), "mlp_bias": (False,)},
        prepare=_prepare_hunyuan,
        weights={
            **WEIGHTS,
            "layers.{i}.attention.q_norm": "model.layers.{i}.self_attn.query_layernorm",
            "layers.{i}.attention.k_norm": "model.layers.{i}.self_attn.key_layernorm",
        },
    ),
    "hyperclovax": Family(
        "HyperCLOVAXForCausalLM",
        fixed={"norms": "both"},
        fields={
            "attention_bias": "attention_bias",
            "mlp_bias": "mlp_bias",
            **GRANITE_SCALES,
        },
        defaults={
            **dict.fromkeys(GRANITE_SCALES.values(), 1.0),
            "attention_multiplier": None,
        },
        expected={"use_post_norm": (True,)},
        prepare=_prepare_hyperclovax,
        weights={
            **WEIGHTS,
            "layers.{i}.attention_post_norm": "model.layers.{i}.post_norm1",
            "layers.{i}.mlp_post_norm": "model.layers.{i}.post_norm2",
        },
    ),
}
