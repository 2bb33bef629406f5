"""Gated delta nets in a `config.json`, in both directions."""

from typing import Any

from t3jax.json_files import show_json
from t3jax.lm.config import DeltaConfig, LMConfig
from t3jax.lm.family import Json, take_section

_KINDS = ("full_attention", "linear_attention")


def read_delta(config: Json, values: dict[str, Any]) -> dict[str, DeltaConfig]:
    """The gated delta nets of a model.

    Args:
        config: The `config.json` with the family's defaults.
        values: Fields of `LMConfig` so far; those of the delta nets, `delta.NAME`, are taken out.

    Returns:
        `delta`, or nothing in families without.

    Raises:
        ValueError: If the numbers do not fit together.
    """
    if not (found := take_section(values, "delta.")):
        return {}
    types, num_layers = config["layer_types"], values["num_layers"]
    if types is None:
        interval = config["full_attention_interval"]
        layers = tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    elif len(types) != num_layers or set(types) - set(_KINDS):
        raise ValueError(
            f"layer_types {show_json(types)}: expected {num_layers}, each one of {_KINDS}"
        )
    else:
        layers = tuple(each == "linear_attention" for each in types)
    delta = DeltaConfig(layers=layers, **found)
    if delta.value_heads % delta.key_heads:
        raise ValueError(
            f"linear_num_value_heads {delta.value_heads} do not divide among "
            f"linear_num_key_heads {delta.key_heads}"
        )
    return {"delta": delta}


def write_delta(config: LMConfig) -> dict[str, Any]:
    """The fields of `config.json` that read back as the delta nets, but for those of the table."""
    if config.delta is None:
        return {}
    return {"layer_types": [_KINDS[each] for each in config.delta.layers]}
