"""The metadata of GGUF files as the `config.json` of a Hugging Face folder."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from t3jax.lm.families import FAMILIES
from t3jax.lm.family import Family
from t3jax.lm.gguf_file import GGUFFile, tensor_shape
from t3jax.lm.gguf_layers import (
    describe_ernie4_5_moe,
    describe_gemma4,
    describe_glm4_moe,
    describe_lfm2,
    describe_qwen35,
)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A family in llama.cpp's files.

    Attributes:
        model_type: The family.
        permuted: The two rows of a rotary pair, of queries and keys, are stored as neighbours.
        meant: Fields of `config.json` that hold for all its files, which do not state them.
        describe: Makes fields of `config.json` from metadata of this architecture alone, instead of
            the usual ones; None if it has no such metadata.
        ramp: "yarn" stretches from whole pairs to whole pairs, which files do not state.
    """

    model_type: str
    permuted: bool = False
    meant: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    describe: Callable[[GGUFFile], dict[str, Any]] | None = None
    ramp: bool = True


ARCHITECTURES = {  # by llama.cpp's names
    "arcee": Architecture("arcee", permuted=True),
    "bloom": Architecture("bloom"),
    "cohere2": Architecture("cohere2"),
    "command-r": Architecture("cohere"),
    "ernie4_5": Architecture("ernie4_5"),
    "ernie4_5-moe": Architecture("ernie4_5_moe", describe=describe_ernie4_5_moe),
    "exaone4": Architecture("exaone4"),
    "falcon": Architecture(
        "falcon", meant={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}
    ),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"),
    "gemma3": Architecture("gemma3_text"),
    "gemma4": Architecture("gemma4_text", describe=describe_gemma4),
    "glm4": Architecture("glm4"),
    "glm4moe": Architecture("glm4_moe", describe=describe_glm4_moe),
    "gpt-oss": Architecture("gpt_oss", ramp=False),
    "gpt2": Architecture("gpt2"),
    "gptneox": Architecture("gpt_neox"),
    "granite": Architecture("granite", permuted=True),
    "granitemoe": Architecture("granitemoe", permuted=True),
    "hunyuan-dense": Architecture("hunyuan_v1_dense"),
    "lfm2": Architecture("lfm2", describe=describe_lfm2),
    "lfm2moe": Architecture("lfm2_moe", meant={"norm_topk_prob": True}, describe=describe_lfm2),
    "llama": Architecture("llama", permuted=True),  # Mistral too
    "minimax-m2": Architecture("minimax_m2"),
    "mistral3": Architecture("ministral3", permuted=True),
    "mpt": Architecture("mpt"),
    "nemotron": Architecture("nemotron"),
    "olmo": Architecture("olmo", permuted=True),
    "olmo2": Architecture("olmo2"),
    "olmoe": Architecture("olmoe", meant={"norm_topk_prob": False}),
    "phi2": Architecture("phi"),
    "phi3": Architecture("phi3"),
    "qwen2": Architecture("qwen2"),
    "qwen2moe": Architecture("qwen2_moe", meant={"norm_topk_prob": False}),
    "qwen3": Architecture("qwen3"),
    "qwen35": Architecture("qwen3_5_text", describe=describe_qwen35),
    "qwen35moe": Architecture("qwen3_5_moe_text", describe=describe_qwen35),
    "qwen3moe": Architecture("qwen3_moe", meant={"norm_topk_prob": True}),
    "seed_oss": Architecture("seed_oss"),
    "smollm3": Architecture("smollm3", permuted=True),
    "stablelm": Architecture("stablelm"),
    "starcoder": Architecture("gpt_bigcode"),
    "starcoder2": Architecture("starcoder2"),
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
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logit_scale": "logit_scale",
    "qkv_clip": "attention.clamp_kqv",
    "experts.count": "expert_count",
    "experts.chosen": "expert_used_count",
    "experts.size": "expert_feed_forward_length",
    "experts.normed": "expert_weights_norm",
    "experts.scale": "expert_weights_scale",
    "experts.groups": "expert_group_count",
    "experts.chosen_groups": "expert_group_used_count",
    "experts.shared": "expert_shared_feed_forward_length",
}
# Values without which the logits would differ.
_OBEYED = (
    *("embedding_multiplier", "residual_multiplier", "logit_scale", "qkv_clip", "experts.scale"),
)
_KEYS_OF_SIZES = ("embedding_length", "attention.head_count", "block_count")
_SHOWN_BY_TENSORS = {  # fields that are true if a tensor exists
    "attention_bias": "blk.{i}.attn_output.bias",
    "qkv_bias": "blk.{i}.attn_q.bias",
    "o_bias": "blk.{i}.attn_output.bias",
    "mlp_bias": "blk.{i}.ffn_down.bias",
    "qk_norm": "blk.{i}.attn_q_norm.weight",
}
_MOST_LAYERS = 1024
_SIGMOID = 2  # of `expert_gating_func`
# The largest models of two families divide attention scores by another width than the head's. Files
# do not state it, and llama.cpp knows them by their number of layers.
_SCALED_BY_HIDDEN_SIZE = {("gemma2", 46), ("gemma3", 62)}


def find_architecture(file: GGUFFile) -> Architecture:
    """The architecture of a file.

    Raises:
        ValueError: If it is unknown, or has experts where none are known.
    """
    name = file.architecture
    if name not in ARCHITECTURES:
        nearest = difflib.get_close_matches(name, ARCHITECTURES, 1, 0.7)
        near = f"the nearest supported one is {nearest[0]!r}; " if nearest else ""
        known = ", ".join(sorted(ARCHITECTURES))
        raise ValueError(
            f"architecture {name!r} is not supported; {near}known: {known}. The model's Hugging "
            "Face folder may load where its GGUF file does not"
        )
    architecture = ARCHITECTURES[name]
    if name == "llama" and file.get("expert_count"):
        architecture = dataclasses.replace(architecture, model_type="mixtral")
    if name == "olmo2" and file.get("attention.sliding_window"):
        architecture = dataclasses.replace(architecture, model_type="olmo3")
    if file.get("expert_count"):
        family = FAMILIES[architecture.model_type]
        if "experts.count" not in family.all_fields:
            raise ValueError(f"mixtures of experts are not supported in architecture {name!r}")
        gate = file.get("expert_gating_func")
        sigmoid = family.fixed.get("experts.router") == "sigmoid"
        if gate is not None and (gate == _SIGMOID) != sigmoid:
            raise ValueError(
                f"{name}.expert_gating_func {gate} is not supported in this architecture"
            )
        if not file.get("expert_used_count"):
            raise ValueError(f"{name}.expert_used_count is missing, beside expert_count")
    return architecture


def describe_config(file: GGUFFile) -> dict[str, Any]:
    """Converts the metadata to a `config.json`.

    Raises:
        ValueError: If the architecture is unknown, a value is missing, or one is not implemented.
    """
    architecture = find_architecture(file)
    if "token_embd.weight" not in file.tensors:
        raise ValueError("token_embd.weight is missing; expected the weights of a language model")
    family = FAMILIES[architecture.model_type]
    names = family.all_fields
    values = {field: file.get(key) for field, key in _KEYS.items()}
    values = {field: value for field, value in values.items() if value is not None}
    for field in ("experts.scale", "experts.groups", "experts.chosen_groups"):
        if values.get(field) == 0:  # llama.cpp's value for none
            del values[field]
    for field in ("hidden_size", "num_heads", "num_layers"):
        if field not in values:
            raise ValueError(f"{file.architecture}.{_KEYS[field]} is missing")
    for key in (*_KEYS_OF_SIZES, "attention.key_length", "rope.dimension_count"):
        if (size := file.get(key)) is not None and (type(size) is not int or size < 1):
            raise ValueError(f"{file.architecture}.{key} is {size!r}, expected an integer >= 1")
    if (layers := file.get("block_count")) > _MOST_LAYERS:
        raise ValueError(
            f"{file.architecture}.block_count {layers}: expected {_MOST_LAYERS} at most"
        )
    described = {} if architecture.describe is None else architecture.describe(file)
    values = {field: value for field, value in values.items() if names.get(field) not in described}
    if lists := [_KEYS[field] for field, value in values.items() if isinstance(value, list)]:
        raise ValueError(f"layers of different sizes are not supported: {', '.join(lists)}")
    by_hidden_size = values["hidden_size"] // values["num_heads"]
    head_dim = file.get("attention.key_length", by_hidden_size)
    scaled_otherwise = (file.architecture, file.get("block_count")) in _SCALED_BY_HIDDEN_SIZE
    for field in _OBEYED:
        if field not in names and values.get(field) not in (None, 0, 1):
            raise ValueError(
                f"{file.architecture}.{_KEYS[field]} {values[field]} is not supported in this "
                "architecture"
            )
    norm = "layer_norm" if family.fixed.get("norm", "").startswith("layer") else "layer_norm_rms"
    values |= {
        "vocab_size": tensor_shape(file.tensors["token_embd.weight"])[0],
        "norm_eps": file.get(f"attention.{norm}_epsilon"),
        "head_dim": head_dim,
        "query_pre_attn_scalar": by_hidden_size if scaled_otherwise else head_dim,
        "tied": "output.weight" not in file.tensors,
        **{field: _has_tensor(file, tensor) for field, tensor in _SHOWN_BY_TENSORS.items()},
    }
    config = {names[field]: value for field, value in values.items() if field in names}
    config |= {"model_type": architecture.model_type, **architecture.meant, **described}
    if "use_parallel_residual" in family.expected and "parallel" in values:
        config["use_parallel_residual"] = values["parallel"]
    ropes = {} if "rope_parameters" in described else _describe_ropes(file, family, head_dim)
    return config | _describe_windows(file, family) | ropes


def _has_tensor(file: GGUFFile, tensor: str) -> bool:
    """Whether any layer has a tensor; layers may be of several kinds."""
    return any(tensor.format(i=layer) in file.tensors for layer in range(file.get("block_count")))


def _describe_windows(file: GGUFFile, family: Family) -> dict[str, Any]:
    window = file.get("attention.sliding_window")
    pattern = file.get("attention.sliding_window_pattern")
    if not window:
        return {} if window is None else {"sliding_window": None}
    if family.slides is None or "use_sliding_window" in family.defaults:
        raise ValueError("attention.sliding_window is not supported in this architecture")
    config: dict[str, Any] = {"sliding_window": window}
    if isinstance(pattern, list):
        config["layer_types"] = [f"{'sliding' if flag else 'full'}_attention" for flag in pattern]
    elif pattern is not None:
        config["sliding_window_pattern"] = pattern
    return config


def _describe_ropes(file: GGUFFile, family: Family, head_dim: int) -> dict[str, Any]:
    if "rope" in family.fixed:
        return {}
    rope = {
        "rope_theta": file.get("rope.freq_base", 1e4),
        "partial_rotary_factor": file.get("rope.dimension_count", head_dim) / head_dim,
    }
    full = rope | _describe_scaling(file)
    if full.get("rope_type") == "yarn":
        full["truncate"] = ARCHITECTURES[file.architecture].ramp
    has_local_base = "rope_local_base_freq" in family.defaults
    if has_local_base or family.local_theta is not None:
        base = 1e4 if has_local_base else rope["rope_theta"]
        local = rope | {"rope_theta": file.get("rope.freq_base_swa", base)}
        return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}
    config: dict[str, Any] = {"rope_parameters": full}
    if "original_max_position_embeddings" in family.defaults:
        config["original_max_position_embeddings"] = full.get("original_max_position_embeddings")
    return config


def _describe_scaling(file: GGUFFile) -> dict[str, Any]:
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
        # Llama 3's stretch, computed for each pair, is the same for texts of any length.
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
        "mscale": file.get("rope.scaling.yarn_log_multiplier"),
        "mscale_all_dim": file.get("rope.scaling.yarn_log_multiplier"),
        "llama_4_scaling_beta": file.get("attention.temperature_scale"),
    }
    return {"rope_type": kind, "factor": factor, **optional}
