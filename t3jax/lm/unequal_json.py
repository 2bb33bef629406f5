"""Layers of unequal shape in a `config.json`, in both directions.

Layers that attend to the whole text may have other heads than local ones, and the last layers may
attend to the keys and values of earlier ones.
"""

import re
from collections.abc import Mapping
from typing import Any

from t3jax.json_files import show_json
from t3jax.lm.config import HeadsConfig, LMConfig
from t3jax.lm.family import Family, Json

_BY_LAYER = "per_layer_config"  # as transformers 5 writes it
_OF_HEADS = ("head_dim", "num_key_value_heads")


def read_unequal(family: Family, config: Json, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields `whole_heads`, `borrows` and `borrowing_size`, if the family's layers differ.

    Raises:
        ValueError: If the numbers do not fit together.
    """
    if "global_head_dim" not in family.defaults:
        if config.get(_BY_LAYER) not in (None, {}):
            raise ValueError(
                f"{_BY_LAYER} {show_json(config[_BY_LAYER])} is not supported in this family, "
                "whose layers are of one shape; expected None"
            )
        return {}
    local = values.get("local") or (False,) * values["num_layers"]
    heads = _read_heads(config, values, local)
    if values["num_heads"] % heads.num_kv_heads:
        raise ValueError(
            f"{values['num_heads']} query heads do not divide among {heads.num_kv_heads} key heads"
        )
    borrowing = config["num_kv_shared_layers"]
    borrows = tuple(layer >= len(local) - borrowing for layer in range(len(local)))
    for layer in range(len(local)):
        lenders = [i for i in range(layer) if not borrows[i] and local[i] == local[layer]]
        if borrows[layer] and not lenders:
            raise ValueError(
                f"num_kv_shared_layers {borrowing}: layer {layer} has no keys and values of its "
                "own, and no layer of its type before it has"
            )
    wide = config["use_double_wide_mlp"] and borrowing > 0
    return {
        "whole_heads": heads,
        "borrows": borrows if borrowing else (),
        "borrowing_size": 2 * values["intermediate_size"] if wide else 0,
    }


def _read_heads(config: Json, values: Mapping[str, Any], local: tuple[bool, ...]) -> HeadsConfig:
    """The heads of the layers that are not local."""
    same = config["attention_k_eq_v"]
    kv_heads, head_dim = values["num_kv_heads"], values["head_dim"]
    if _BY_LAYER not in config:
        whole_kv_heads = config["num_global_key_value_heads"] if same else None
        return HeadsConfig(whole_kv_heads or kv_heads, config["global_head_dim"], same)
    content = config[_BY_LAYER]
    if not isinstance(content, Mapping) or not all(
        re.fullmatch("[0-9]{1,9}", str(name))
        and isinstance(fields, Mapping)
        and set(fields) <= set(_OF_HEADS)
        for name, fields in content.items()
    ):
        raise ValueError(
            f"{_BY_LAYER} is {show_json(content)}, expected for the numbers of some layers "
            f"{_OF_HEADS}, and nothing else"
        )
    by_layer = {int(name): fields for name, fields in content.items()}  # "05" if there are ten
    heads: dict[bool, set[tuple[int, int]]] = {False: set(), True: set()}
    for layer, is_local in enumerate(local):
        fields = by_layer.get(layer, {})
        pair = fields.get("head_dim", head_dim), fields.get("num_key_value_heads", kv_heads)
        if not all(type(n) is int and 1 <= n <= 1 << 16 for n in pair):
            raise ValueError(f"{_BY_LAYER}.{layer} is {show_json(fields)}, expected numbers >= 1")
        heads[is_local].add(pair)
    unknown = set(by_layer) - set(range(len(local)))
    if unknown or len(heads[False]) > 1 or heads[True] - {(head_dim, kv_heads)}:
        raise ValueError(
            f"{_BY_LAYER} is {show_json(content)}, expected the same for all layers of "
            "full_attention, and nothing for others"
        )
    ((head_dim, kv_heads),) = heads[False]
    return HeadsConfig(kv_heads, head_dim, same)


def write_unequal(config: LMConfig, family: Family) -> dict[str, Any]:
    """The fields of `config.json` for unequal layers that are not in the family's table."""
    heads = config.whole_heads
    if "global_head_dim" not in family.defaults or heads is None:
        return {}
    content: dict[str, Any] = {
        "global_head_dim": heads.head_dim,
        "num_global_key_value_heads": heads.num_kv_heads if heads.values_are_keys else None,
        "attention_k_eq_v": heads.values_are_keys,
        "num_kv_shared_layers": sum(config.borrows),
        "use_double_wide_mlp": config.borrowing_size > 0,
    }
    if not heads.values_are_keys and heads.num_kv_heads != config.num_kv_heads:
        fields = {"head_dim": heads.head_dim, "num_key_value_heads": heads.num_kv_heads}
        whole = [i for i in range(config.num_layers) if not config.is_local(i)]
        content[_BY_LAYER] = {str(layer): fields for layer in whole}
    return content
