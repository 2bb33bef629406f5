"""The `config.json` of a decoder's shape, in transformers 5's form."""

import operator
from typing import Any

from t3jax.lm.config import LMConfig
from t3jax.lm.delta_json import write_recurrent
from t3jax.lm.experts_json import write_experts
from t3jax.lm.families import FAMILIES
from t3jax.lm.rope_json import share_field, write_rope
from t3jax.lm.unequal_json import write_unequal


def hf_config(config: LMConfig) -> dict[str, Any]:
    """The `config.json` content, in transformers 5's form, that reads back as `config`."""
    family = FAMILIES[config.model_type]
    content: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.model_type,
    }
    content |= {
        name: operator.attrgetter(field)(config)
        for field, name in family.all_fields.items()
        if config.experts is not None or not field.startswith("experts.")
    }
    content |= {name: 1 / content[name] for name in family.reciprocal}
    content |= {name: values[0] for name, values in family.expected.items()}
    # If no layer has a window, null also says that all layers are rotated.
    nullable = family.window == "sliding_window" and (
        not family.layer_types or family.unrotated is not None
    )
    if family.slides is not None and (config.window or nullable):
        content[family.window] = config.window or None
    local = config.local or (False,) * config.num_layers
    if "attention_types" in family.defaults:
        content["attention_types"] = [[["local" if flag else "global"], 1] for flag in local]
    if "use_sliding_window" in family.defaults:
        content["use_sliding_window"] = bool(config.window)
    if family.layer_types:
        content["layer_types"] = [
            "sliding_attention" if flag else "full_attention" for flag in local
        ]
    if "no_rope_layers" in family.defaults:
        unrotated = config.unrotated or (False,) * config.num_layers
        content["no_rope_layers"] = [int(not flag) for flag in unrotated]
    content |= write_experts(config, family) | write_recurrent(config)
    content |= write_unequal(config, family)
    if "use_qk_norm" in family.defaults:
        content["use_qk_norm"] = config.qk_norm is not None
    if family.restore is not None:
        content |= family.restore(config)
    if config.rope is not None:
        content["rope_parameters"] = write_rope(config.rope)
        if share_field(family) is not None:  # transformers knows a share here
            content["rope_parameters"]["partial_rotary_factor"] = config.rope.rotated
        if config.rope.kind == "longrope":
            original = config.rope.original_max_position
            content["original_max_position_embeddings"] = original
            content["max_position_embeddings"] = round(original * config.rope.factor)
    if config.local_rope is not None:
        content["rope_parameters"] = {
            "full_attention": content["rope_parameters"],
            "sliding_attention": write_rope(config.local_rope),
        }
    return content
