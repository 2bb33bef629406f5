"""Recurrent layers (delta nets, convolutions) in a `config.json`, in both directions."""

from typing import Any

from t3jax.json_files import show_json
from t3jax.lm.config import ConvConfig, DeltaConfig, LMConfig
from t3jax.lm.family import Json, take_section

_KINDS = ("full_attention", "linear_attention")
_KINDS_OF_CONV = ("full_attention", "conv")


def read_recurrent(config: Json, values: dict[str, Any]) -> dict[str, DeltaConfig | ConvConfig]:
    """The field `delta` or `conv` of `LMConfig`, if the family has such layers.

    Its parts, `delta.NAME` or `conv.NAME`, are taken out of `values`.

    Raises:
        ValueError: If the numbers do not fit together.
    """
    count = values["num_layers"]
    if fields := take_section(values, "conv."):
        indices = config["full_attn_idxs"]  # of layers with attention
        by_index = tuple(indices is not None and i not in indices for i in range(count))
        layers = _read_layers(config, _KINDS_OF_CONV, by_index)
        return {"conv": ConvConfig(channels=values["hidden_size"], layers=layers, **fields)}
    if not (fields := take_section(values, "delta.")):
        return {}
    interval = config["full_attention_interval"]
    by_interval = tuple((layer + 1) % interval != 0 for layer in range(count))
    layers = _read_layers(config, _KINDS, by_interval)
    delta = DeltaConfig(layers=layers, **fields)
    if delta.value_heads % delta.key_heads:
        raise ValueError(
            f"linear_num_value_heads {delta.value_heads} do not divide among "
            f"linear_num_key_heads {delta.key_heads}"
        )
    return {"delta": delta}


def _read_layers(
    config: Json, kinds: tuple[str, str], default: tuple[bool, ...]
) -> tuple[bool, ...]:
    """For each layer whether it is of the second kind."""
    types = config["layer_types"]
    if types is None:
        return default
    if len(types) != len(default) or set(types) - set(kinds):
        raise ValueError(
            f"layer_types {show_json(types)}: expected {len(default)}, each one of {kinds}"
        )
    return tuple(kind == kinds[1] for kind in types)


def write_recurrent(config: LMConfig) -> dict[str, Any]:
    """The fields of `config.json` for recurrent layers that are not in the family's table."""
    if config.conv is not None:
        return {"layer_types": [_KINDS_OF_CONV[flag] for flag in config.conv.layers]}
    if config.delta is None:
        return {}
    return {"layer_types": [_KINDS[flag] for flag in config.delta.layers]}
