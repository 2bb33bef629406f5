"""The metadata of GGUF files as the `config.json` of a Hugging Face folder."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from t3jax.lm.families import FAMILIES
from t3jax.lm.family import Family
from t3jax.lm.gguf_file import GGUFFile, tensor_shape

_ARCHITECTURES = {  # llama.cpp's names of the families; "llama" is Mistral too
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gpt2": "gpt2",
    "gptneox": "gpt_neox",
    "llama": "llama",
    "olmo2": "olmo2",
    "phi2": "phi",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
_KEYS = {  # fields of LMConfig, and where the metadata of an architecture has them
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "max_position": "context_length",
    "parallel": "use_parallel_residual",
    "attention_softcap": "attn_logit_softcapping",
    "logit_softcap": "final_logit_softcapping",
}
_KEYS_OF_SIZES = ("embedding_length", "attention.head_count", "block_count")
_BIASES = {"attention_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_down.bias"}
# Of these Gemmas the largest alone divides attention scores by another width than the head's;
# files do not say it, and llama.cpp knows them by their layers.
_SCALED_BY_HIDDEN_SIZE = {("gemma2", 46), ("gemma3", 62)}


def _hf_config(file: GGUFFile) -> dict[str, Any]:
    """The `config.json` that the metadata amounts to."""
    if file.architecture not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise ValueError(f"architecture {file.architecture!r} is not supported; known: {known}")
    if file.get("expert_count"):
        raise ValueError("mixtures of experts are not supported")
    if "token_embd.weight" not in file.tensors:
        raise ValueError("token_embd.weight is missing; expected the weights of a language model")
    model_type = _ARCHITECTURES[file.architecture]
    family = FAMILIES[model_type]
    values = {field: file.get(key) for field, key in _KEYS.items()}
    values = {field: value for field, value in values.items() if value is not None}
    if lists := [_KEYS[field] for field, value in values.items() if isinstance(value, list)]:
        raise ValueError(f"layers of different sizes are not supported: {', '.join(lists)}")
    for field in ("hidden_size", "num_heads", "num_layers"):
        if field not in values:
            raise ValueError(f"{file.architecture}.{_KEYS[field]} is missing")
    for key in (*_KEYS_OF_SIZES, "attention.key_length", "rope.dimension_count"):
        if (size := file.get(key)) is not None and (type(size) is not int or size < 1):
            raise ValueError(f"{file.architecture}.{key} is {size!r}, expected an integer >= 1")
    by_hidden_size = values["hidden_size"] // values["num_heads"]
    head_dim = file.get("attention.key_length", by_hidden_size)
    scaled_otherwise = (file.architecture, values["num_layers"]) in _SCALED_BY_HIDDEN_SIZE
    norm = "layer_norm" if family.fixed.get("norm") == "layer" else "layer_norm_rms"
    values |= {
        "vocab_size": tensor_shape(file.tensors["token_embd.weight"])[0],
        "norm_eps": file.get(f"attention.{norm}_epsilon"),
        "head_dim": head_dim,
        "query_pre_attn_scalar": by_hidden_size if scaled_otherwise else head_dim,
        "tied": "output.weight" not in file.tensors,
        **{field: bias in file.tensors for field, bias in _BIASES.items()},
    }
    names = family.all_fields
    config = {names[field]: value for field, value in values.items() if field in names}
    config["model_type"] = model_type
    return config | _windows(file, family) | _ropes(file, family, head_dim)


def _windows(file: GGUFFile, family: Family) -> dict[str, Any]:
    window = file.get("attention.sliding_window")
    pattern = file.get("attention.sliding_window_pattern")
    if not window:
        return {} if window is None else {"sliding_window": None}
    if family.slides is None or "use_sliding_window" in family.defaults:
        raise ValueError("attention.sliding_window is not supported in this architecture")
    config: dict[str, Any] = {"sliding_window": window}
    if isinstance(pattern, list):
        config["layer_types"] = [f"{'sliding' if each else 'full'}_attention" for each in pattern]
    elif pattern is not None:
        config["sliding_window_pattern"] = pattern
    return config


def _ropes(file: GGUFFile, family: Family, head_dim: int) -> dict[str, Any]:
    if "rope" in family.fixed:
        return {}
    rope = {
        "rope_theta": file.get("rope.freq_base", 1e4),
        "partial_rotary_factor": file.get("rope.dimension_count", head_dim) / head_dim,
    }
    full = rope | _rope_scaling(file)
    if "rope_local_base_freq" in family.defaults:
        local = rope | {"rope_theta": file.get("rope.freq_base_swa", 1e4)}
        return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}
    config: dict[str, Any] = {"rope_parameters": full}
    if "original_max_position_embeddings" in family.defaults:
        config["original_max_position_embeddings"] = full.get("original_max_position_embeddings")
    return config


def _rope_scaling(file: GGUFFile) -> dict[str, Any]:
    original = file.get("rope.scaling.original_context_length")
    if (short := file.tensors.get("rope_factors_short.weight")) is not None:
        return {
            "rope_type": "longrope",
            "short_factor": short.data.tolist(),
            "long_factor": file.tensors["rope_factors_long.weight"].data.tolist(),
            "attention_factor": file.get("rope.scaling.attn_factor"),
            "original_max_position_embeddings": original,
        }
    if (stretch := file.tensors.get("rope_freqs.weight")) is not None:
        # Llama 3's, worked out for each pair: the same stretch whatever the length of the text.
        return {
            "rope_type": "longrope",
            "short_factor": stretch.data.tolist(),
            "long_factor": stretch.data.tolist(),
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": file.get("context_length"),
        }
    factor = file.get("rope.scaling.factor", file.get("rope.scale_linear")) or 1.0
    kind = file.get("rope.scaling.type", "linear")
    if kind == "none" or factor == 1.0:
        return {}
    optional = {
        "attention_factor": file.get("rope.scaling.yarn_attn_factor"),
        "beta_fast": file.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": file.get("rope.scaling.yarn_beta_slow"),
        "original_max_position_embeddings": original,
    }
    return {"rope_type": kind, "factor": factor, **optional}
