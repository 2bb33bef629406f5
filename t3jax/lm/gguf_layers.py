"""The metadata of GGUF files whose layers are of several kinds, as fields of a `config.json`."""

from typing import Any

import numpy as np

from t3jax.lm.gguf_file import GGUFFile

_NOT_ROTATED = 1e20  # least stretch of a pair that is not rotated
_KINDS = ("full_attention", "sliding_attention")
_WORDS = {int: "a whole number", bool: "true or false"}


def describe_gemma4(file: GGUFFile) -> dict[str, Any]:
    """The differences between local layers and those that attend to the whole text.

    Raises:
        ValueError: If a value is missing, or one is not implemented.
    """
    pattern = _read_by_layer(file, "attention.sliding_window_pattern", bool)
    if all(pattern):
        raise ValueError(
            f"{file.architecture}.attention.sliding_window_pattern: every layer has a window; "
            "expected some that attend to the whole text"
        )
    heads = _read_by_layer(file, "attention.head_count_kv", int)
    whole = pattern.index(False)
    local_heads = {n for n, local in zip(heads, pattern, strict=True) if local} or {heads[whole]}
    whole_heads = {n for n, local in zip(heads, pattern, strict=True) if not local}
    if len(local_heads) > 1 or len(whole_heads) > 1:
        raise ValueError(
            f"{file.architecture}.attention.head_count_kv {heads}: expected one number for the "
            "layers with a window, and one for the others"
        )
    values_are_keys = f"blk.{whole}.attn_v.weight" not in file.tensors
    widths = _read_by_layer(file, "feed_forward_length", int)
    local_width = _read_count(file, "attention.key_length_swa", 1)
    rotated = _read_count(file, "rope.dimension_count_swa") or local_width
    return {
        "layer_types": [_KINDS[local] for local in pattern],
        "num_key_value_heads": local_heads.pop(),
        "num_global_key_value_heads": whole_heads.pop() if values_are_keys else None,
        "attention_k_eq_v": values_are_keys,
        "head_dim": local_width,
        "global_head_dim": _read_count(file, "attention.key_length", 1),
        "num_kv_shared_layers": _read_count(file, "attention.shared_kv_layers"),
        "intermediate_size": widths[0],
        "use_double_wide_mlp": widths[-1] == 2 * widths[0],
        "hidden_size_per_layer_input": _read_count(file, "embedding_length_per_layer_input"),
        "enable_moe_block": bool(file.get("expert_count")),
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": file.get("rope.freq_base", 1e6),
                "partial_rotary_factor": _read_rotated_share(file),
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": file.get("rope.freq_base_swa", 1e4),
                "partial_rotary_factor": rotated / local_width,
            },
        },
    }


def describe_lfm2(file: GGUFFile) -> dict[str, Any]:
    """The layers that are short convolutions: those without key heads.

    Raises:
        ValueError: If a value is missing, or one is not implemented.
    """
    heads = _read_by_layer(file, "attention.head_count_kv", int)
    if len(set(heads) - {0}) != 1:
        raise ValueError(
            f"{file.architecture}.attention.head_count_kv {heads}: expected 0 for convolutions, "
            "and the same number for all other layers"
        )
    return {
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "num_key_value_heads": max(heads),
        "conv_L_cache": _read_count(file, "shortconv.l_cache", 1),
        "block_auto_adjust_ff_dim": False,
        "num_dense_layers": _read_count(file, "leading_dense_block_count"),
    }


def describe_qwen35(file: GGUFFile) -> dict[str, Any]:
    """The gated delta nets, and the number of layers that are read.

    Raises:
        ValueError: If a value is missing, or one is not implemented.
    """
    heads = _read_by_layer(file, "attention.head_count_kv", int)  # a delta net has 0, or the same
    value_heads = _read_count(file, "ssm.time_step_rank", 1)
    key_heads = _read_count(file, "ssm.group_count", 1)
    width = _read_count(file, "ssm.inner_size", 1)
    if width % value_heads or value_heads % key_heads:
        raise ValueError(
            f"{file.architecture}.ssm.time_step_rank {value_heads}: expected a divisor of "
            f"ssm.inner_size {width} and a multiple of ssm.group_count {key_heads}"
        )
    return {
        "num_hidden_layers": _count_layers(file),
        "num_key_value_heads": max(heads),
        "full_attention_interval": _read_count(file, "full_attention_interval", 1),
        "linear_conv_kernel_dim": _read_count(file, "ssm.conv_kernel", 1),
        "linear_key_head_dim": _read_count(file, "ssm.state_size", 1),
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": width // value_heads,
    }


def describe_glm4_moe(file: GGUFFile) -> dict[str, Any]:
    """The layers without experts, and the number of layers that are read.

    Raises:
        ValueError: If a value is no integer in its range.
    """
    return {
        "num_hidden_layers": _count_layers(file),
        "first_k_dense_replace": _read_count(file, "leading_dense_block_count"),
        "n_shared_experts": _read_count(file, "expert_shared_count"),
    }


def describe_ernie4_5_moe(file: GGUFFile) -> dict[str, Any]:
    """The layers without experts.

    Raises:
        ValueError: If a value is no integer in its range.
    """
    return {
        "moe_layer_start_index": _read_count(file, "leading_dense_block_count"),
        "moe_layer_interval": _read_count(file, "interleave_moe_layer_step") or 1,
        "moe_num_shared_experts": _read_count(file, "expert_shared_count"),
    }


def _read_count(file: GGUFFile, key: str, least: int = 0) -> int:
    value = file.get(key, None if least else 0)
    if type(value) is not int or value < least:
        raise ValueError(f"{file.architecture}.{key} is {value!r}, expected an integer >= {least}")
    return value


def _count_layers(file: GGUFFile) -> int:
    """The number of layers, except those that predict further tokens."""
    return _read_count(file, "block_count") - _read_count(file, "nextn_predict_layers")


def _read_by_layer(file: GGUFFile, key: str, kind: type[int]) -> list[int]:
    """A value for each layer; files state one number if all layers have the same."""
    count = file.get("block_count")
    value = file.get(key)
    values = value if isinstance(value, list) else [value] * count
    if len(values) != count or not all(type(n) is kind and n >= 0 for n in values):
        raise ValueError(
            f"{file.architecture}.{key} is {value!r}, expected {_WORDS[kind]} for each of the "
            f"{count} layers"
        )
    return values


def _read_rotated_share(file: GGUFFile) -> float:
    """The share of the pairs of a head that are rotated; the others are stretched without limit."""
    if (stored := file.tensors.get("rope_freqs.weight")) is None:
        return 1.0
    stretch = np.asarray(stored.data)
    rotated = int(np.sum(stretch == 1))
    if not np.all(stretch[:rotated] == 1) or not np.all(stretch[rotated:] >= _NOT_ROTATED):
        raise ValueError(
            "rope_freqs.weight: expected 1 for the first pairs of a head, which are rotated, and "
            "1e30 for the others"
        )
    return rotated / len(stretch)
