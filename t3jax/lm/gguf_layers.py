"""The metadata of GGUF files whose layers are of several kinds, as fields of a `config.json`."""

from typing import Any

import numpy as np

from t3jax.lm.gguf_file import GGUFFile

_NOT_ROTATED = 1e20  # a pair is stretched by so much, or more, if it is not to be rotated
_KINDS = ("full_attention", "sliding_attention")
_WORDS = {int: "a whole number", bool: "true or false"}


def describe_gemma4(file: GGUFFile) -> dict[str, Any]:
    """What differs between local layers and those that attend to the whole text.

    Raises:
        ValueError: If a value is missing, or one is not implemented.
    """
    pattern = _by_layer(file, "attention.sliding_window_pattern", bool)
    if all(pattern):
        raise ValueError(
            f"{file.architecture}.attention.sliding_window_pattern: every layer has a window; "
            "expected some that attend to the whole text"
        )
    heads = _by_layer(file, "attention.head_count_kv", int)
    whole = pattern.index(False)
    own_heads = {each for each, local in zip(heads, pattern, strict=True) if local} or {
        heads[whole]
    }
    whole_heads = {each for each, local in zip(heads, pattern, strict=True) if not local}
    if len(own_heads) > 1 or len(whole_heads) > 1:
        raise ValueError(
            f"{file.architecture}.attention.head_count_kv {heads}: expected one number for the "
            "layers with a window, and one for the others"
        )
    values_are_keys = f"blk.{whole}.attn_v.weight" not in file.tensors
    widths = _by_layer(file, "feed_forward_length", int)
    local_width = _needed(file, "attention.key_length_swa")
    rotated = _count(file, "rope.dimension_count_swa") or local_width
    return {
        "layer_types": [_KINDS[each] for each in pattern],
        "num_key_value_heads": own_heads.pop(),
        "num_global_key_value_heads": whole_heads.pop() if values_are_keys else None,
        "attention_k_eq_v": values_are_keys,
        "head_dim": local_width,
        "global_head_dim": _needed(file, "attention.key_length"),
        "num_kv_shared_layers": _count(file, "attention.shared_kv_layers"),
        "intermediate_size": widths[0],
        "use_double_wide_mlp": widths[-1] == 2 * widths[0],
        "hidden_size_per_layer_input": _count(file, "embedding_length_per_layer_input"),
        "enable_moe_block": bool(file.get("expert_count")),
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": file.get("rope.freq_base", 1e6),
                "partial_rotary_factor": _rotated_share(file),
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": file.get("rope.freq_base_swa", 1e4),
                "partial_rotary_factor": rotated / local_width,
            },
        },
    }


def describe_lfm2(file: GGUFFile) -> dict[str, Any]:
    """Which layers are short convolutions: those without heads of keys.

    Raises:
        ValueError: If a value is missing, or one is not implemented.
    """
    heads = _by_layer(file, "attention.head_count_kv", int)
    if len(set(heads) - {0}) != 1:
        raise ValueError(
            f"{file.architecture}.attention.head_count_kv {heads}: expected 0 for convolutions, "
            "and the same number for all other layers"
        )
    return {
        "layer_types": ["full_attention" if each else "conv" for each in heads],
        "num_key_value_heads": max(heads),
        "conv_L_cache": _needed(file, "shortconv.l_cache"),
        "block_auto_adjust_ff_dim": False,
        "num_dense_layers": _count(file, "leading_dense_block_count"),
    }


def describe_qwen35(file: GGUFFile) -> dict[str, Any]:
    """The gated delta nets, and how many layers there are but for those that are not read.

    Raises:
        ValueError: If a value is missing, or one is not implemented.
    """
    heads = _by_layer(file, "attention.head_count_kv", int)  # 0, or the same, without attention
    value_heads = _needed(file, "ssm.time_step_rank")
    key_heads, width = _needed(file, "ssm.group_count"), _needed(file, "ssm.inner_size")
    if width % value_heads or value_heads % key_heads:
        raise ValueError(
            f"{file.architecture}.ssm.time_step_rank {value_heads}: expected a divisor of "
            f"ssm.inner_size {width} and a multiple of ssm.group_count {key_heads}"
        )
    return {
        "num_hidden_layers": _count(file, "block_count") - _count(file, "nextn_predict_layers"),
        "num_key_value_heads": max(heads),
        "full_attention_interval": _needed(file, "full_attention_interval"),
        "linear_conv_kernel_dim": _needed(file, "ssm.conv_kernel"),
        "linear_key_head_dim": _needed(file, "ssm.state_size"),
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": width // value_heads,
    }


def describe_glm4_moe(file: GGUFFile) -> dict[str, Any]:
    """Which layers have no experts, and which predict further tokens and are not read.

    Raises:
        ValueError: If a value is absurd.
    """
    return {
        "num_hidden_layers": _count(file, "block_count") - _count(file, "nextn_predict_layers"),
        "first_k_dense_replace": _count(file, "leading_dense_block_count"),
        "n_shared_experts": _count(file, "expert_shared_count"),
    }


def describe_ernie4_5_moe(file: GGUFFile) -> dict[str, Any]:
    """Which layers have no experts.

    Raises:
        ValueError: If a value is absurd.
    """
    return {
        "moe_layer_start_index": _count(file, "leading_dense_block_count"),
        "moe_layer_interval": _count(file, "interleave_moe_layer_step") or 1,
        "moe_num_shared_experts": _count(file, "expert_shared_count"),
    }


def _count(file: GGUFFile, key: str) -> int:
    value = file.get(key, 0)
    if type(value) is not int or value < 0:
        raise ValueError(f"{file.architecture}.{key} is {value!r}, expected an integer >= 0")
    return value


def _needed(file: GGUFFile, key: str) -> int:
    value = file.get(key)
    if type(value) is not int or value < 1:
        raise ValueError(f"{file.architecture}.{key} is {value!r}, expected an integer >= 1")
    return value


def _by_layer(file: GGUFFile, key: str, kind: type[int]) -> list[Any]:
    """A value for each layer; files say one number where all have the same."""
    count = file.get("block_count")
    value = file.get(key)
    values = value if isinstance(value, list) else [value] * count
    if len(values) != count or not all(type(each) is kind and each >= 0 for each in values):
        raise ValueError(
            f"{file.architecture}.{key} is {value!r}, expected {_WORDS[kind]} for each of the "
            f"{count} layers"
        )
    return values


def _rotated_share(file: GGUFFile) -> float:
    """How many pairs of a head are rotated; the others are stretched beyond any text."""
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
