"""The model families whose layers are of unequal shape, a row each."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from t3jax.json_files import show_json
from t3jax.lm.family import EXPERTS, POST_NORMS, QK_NORMS, WEIGHTS, Family, Json

_KINDS = ("full_attention", "sliding_attention")
_ROPES = {
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1e6,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_LAYER = "model.layers.{i}"


def _slides_in_gemma4(config: Json, layer: int) -> bool:
    return (layer + 1) % 6 != 0


def _prepare_gemma4(config: Json) -> dict[str, Any]:
    """Lets the last layer attend to the whole text, as transformers does, and checks the ropes."""
    config = dict(config)
    count, types = config["num_hidden_layers"], config["layer_types"]
    if types is None:
        types = [_KINDS[_slides_in_gemma4(config, layer)] for layer in range(count)]
    if types[-1:] == ["sliding_attention"]:
        types = [*types[:-1], "full_attention"]
    if config.get("rope_scaling") not in (None, {}):
        raise ValueError(
            f"rope_scaling {show_json(config['rope_scaling'])} is not supported in the gemma4_text "
            "family; expected rope_parameters, for each type of layer"
        )
    ropes = config["rope_parameters"]
    ropes = _ROPES if ropes is None else ropes
    for kind in sorted(set(types) & set(_KINDS)):
        rope = ropes.get(kind)
        if not isinstance(rope, Mapping) or "rope_theta" not in rope:
            raise ValueError(
                f"rope_parameters.{kind} is {show_json(rope)}, expected an object with rope_theta"
            )
        share = rope.get("partial_rotary_factor")
        if rope.get("rope_type") != "proportional" and share not in (None, 1):
            raise ValueError(
                f"rope_parameters.{kind}: partial_rotary_factor {show_json(share)} is obeyed with "
                'rope_type "proportional" alone; expected none'
            )
    rows, known = config["vocab_size_per_layer_input"], config["vocab_size"]
    if config["hidden_size_per_layer_input"] and rows < known:
        raise ValueError(
            f"vocab_size_per_layer_input {rows} is less than vocab_size {known}; expected a row "
            "for each token"
        )
    for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
        if config["enable_moe_block"] and config[name] is None:
            raise ValueError(f"{name} is null, expected a number, since enable_moe_block is true")
    # A share at the top of the config does not count here.
    return {**config, "layer_types": types, "rope_parameters": ropes, "partial_rotary_factor": 1.0}


_GEMMA4 = Family(
    "Gemma4ForCausalLM",
    fixed={
        "norm": "rms_float32",
        "norms": "both",
        "qk_norm": "head",
        "value_norm": True,
        "scaled_embedding": True,
        "attention_multiplier": 1.0,
        "layer_multiplier": True,
        "experts.beside": True,
        "experts.scaled": True,
        "experts.normed": True,
    },
    fields={
        "activation": "hidden_activation",
        "attention_bias": "attention_bias",
        "logit_softcap": "final_logit_softcapping",
        "layer_inputs": "hidden_size_per_layer_input",
        "experts.count": "num_experts",
        "experts.chosen": "top_k_experts",
        "experts.size": "moe_intermediate_size",
    },
    defaults={
        "vocab_size": 262144,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "sliding_window": 512,
        "layer_types": None,
        "final_logit_softcapping": None,
        "rope_parameters": None,
        "partial_rotary_factor": 1.0,
        "vocab_size_per_layer_input": 262144,
        "hidden_size_per_layer_input": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": None,
        "attention_k_eq_v": False,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "enable_moe_block": False,
        "num_experts": None,
        "top_k_experts": None,
        "moe_intermediate_size": None,
    },
    expected={
        # For texts "vision" is the same as none.
        "use_bidirectional_attention": (None, "vision"),
    },
    slides=_slides_in_gemma4,
    layer_types=True,
    local_theta=1e4,
    ropes=("default", "proportional"),
    prepare=_prepare_gemma4,
    restore=lambda config: {"vocab_size_per_layer_input": config.vocab_size},
    weights={
        **WEIGHTS,
        **POST_NORMS,
        **QK_NORMS,
        "layer_embed": "model.embed_tokens_per_layer",
        "layer_projection": "model.per_layer_model_projection",
        "layer_projection_norm": "model.per_layer_projection_norm",
        "layers.{i}.mlp_norm": f"{_LAYER}.pre_feedforward_layernorm",
        "layers.{i}.input.opening": f"{_LAYER}.per_layer_input_gate",
        "layers.{i}.input.out": f"{_LAYER}.per_layer_projection",
        "layers.{i}.input.norm": f"{_LAYER}.post_per_layer_input_norm",
        "layers.{i}.multiplier": f"{_LAYER}.layer_scalar",
        **{key: name.replace(".mlp.", ".") for key, name in EXPERTS.items()},
        "layers.{i}.experts.router": f"{_LAYER}.router.proj",
        "layers.{i}.experts.router.input_scale": f"{_LAYER}.router.scale",
        "layers.{i}.experts.router.expert_scale": f"{_LAYER}.router.per_expert_scale",
        "layers.{i}.experts_norm": f"{_LAYER}.pre_feedforward_layernorm_2",
        "layers.{i}.experts_post_norm": f"{_LAYER}.post_feedforward_layernorm_2",
        "layers.{i}.beside_post_norm": f"{_LAYER}.post_feedforward_layernorm_1",
    },
)

UNEQUAL_FAMILIES: dict[str, Family] = {
    "gemma4_text": _GEMMA4,
    # Its models have neither experts nor inputs of each layer.
    "gemma4_unified_text": dataclasses.replace(
        _GEMMA4,
        architecture="Gemma4UnifiedForCausalLM",
        defaults={
            **_GEMMA4.defaults,
            "max_position_embeddings": 262144,
            "sliding_window": 1024,
            "hidden_size_per_layer_input": 0,
        },
        expected={
            **_GEMMA4.expected,
            "hidden_size_per_layer_input": (0,),
            "enable_moe_block": (False,),
        },
    ),
}
