"""Layers with a memory in the place of attention in a `config.json`, in both directions."""

from typing import Any

from t3jax.json_files import show_json
from t3jax.lm.config import ConvConfig, DeltaConfig, LMConfig
from t3jax.lm.family import Json, take_section

_KINDS = ("full_attention", "linear_attention")
_KINDS_OF_CONV = ("full_attention", "conv")


def read_remembering(config: Json, values: dict[str, Any]) -> dict[str, DeltaConfig | ConvConfig]:
    """The gated delta nets of a model, or its short convolutions.

    Args:
        config: The `config.json` with the family's defaults.
        values: Fields of `LMConfig` so far; those of such layers, `delta.NAME` or `conv.NAME`, are
            taken out.

    Returns:
        `delta` or `conv`, or nothing in families without.

    Raises:
        ValueError: If the numbers do not fit together.
    """
    count = values["num_layers"]
    if found := take_section(values, "conv."):
        attending = config["full_attn_idxs"]
        attends = range(count) if attending is None else attending
        layers = _read_layers(config, _KINDS_OF_CONV, tuple(i not in attends for i in range(count)))
        return {"conv": ConvConfig(channels=values["hidden_size"], layers=layers, **found)}
    if not (found := take_section(values, "delta.")):
        return {}
    interval = config["full_attention_interval"]
    by_interval = tuple((layer + 1) % interval != 0 for layer in range(count))
    layers = _read_layers(config, _KINDS, by_interval)
    delta = DeltaConfig(layers=layers, **found)
    if delta.value_heads % delta.key_heads:
        raise ValueError(
            f"linear_num_value_heads {delta.value_heads} do not divide among "
            f"linear_num_key_heads {delta.key_heads}"
        )
    return {"delta": delta}


def _read_layers(
    config: Json, kinds: tuple[str, str], silent: tuple[bool, ...]
) -> tuple[bool, ...]:
    """Which layers are of the second kind; `silent` where `layer_types` is."""
    types = config["layer_types"]
    if types is None:
        return silent
    if len(types) != len(silent) or set(types) - set(kinds):
        raise ValueError(
            f"layer_types {show_json(types)}: expected {len(silent)}, each one of {kinds}"
        )
    return tuple(each == kinds[1] for each in types)


def write_remembering(config: LMConfig) -> dict[str, Any]:
    """The fields of `config.json` that read back as these, but for those of the table."""
    if config.conv is not None:
        return {"layer_types": [_KINDS_OF_CONV[each] for each in config.conv.layers]}
    if config.delta is None:
        return {}
    return {"layer_types": [_KINDS[each] for each in config.delta.layers]}
