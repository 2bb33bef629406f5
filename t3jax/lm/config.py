"""Shape of a decoder, read from a Hugging Face `config.json` of transformers 4 or 5.

`LMConfig` says all that the decoder needs to know; `FAMILIES` maps a `model_type` to the function
that reads its config. A new family is an entry here, a table of weight names in
`t3jax.lm.weights`, and whatever new field of `LMConfig` the decoder must learn to obey.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        theta: Base of the geometric series of wavelengths.
        kind: "default"; "linear" (all wavelengths stretched by `factor`); or "llama3" (long
            wavelengths stretched by `factor`, short ones kept, a ramp between).
        factor: The stretch; 1 for "default".
        low_freq_factor: "llama3": wavelengths above original / low are stretched.
        high_freq_factor: "llama3": wavelengths below original / high are kept.
        original_max_position: "llama3": context length before the stretch, tokens.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """Shape of a decoder-only language model.

    Attributes:
        model_type: The family, in Hugging Face's words.
        vocab_size: V, tokens the model scores; the tokenizer may know fewer.
        hidden_size: D, width of the residual stream.
        intermediate_size: F, width of the gated MLP.
        num_layers: Number of blocks.
        num_heads: H, query heads.
        num_kv_heads: K, key-value heads; H / K queries share one.
        head_dim: Width of a head.
        max_position: Longest text the model was made for, tokens.
        norm_eps: Added to the mean square in RMS norms.
        rope: Rotary positions.
        tied: The LM head is the embedding table.
        attention_bias: Query, key, value and output projections have biases.
        mlp_bias: The MLP's projections have biases.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    rope: RopeConfig
    tied: bool
    attention_bias: bool = False
    mlp_bias: bool = False


def read_config(folder: pathlib.Path) -> LMConfig:
    """Reads `config.json` of a Hugging Face folder.

    Args:
        folder: The model's folder.

    Returns:
        The decoder's shape.

    Raises:
        FileNotFoundError: If there is no `config.json`.
        ValueError: If the family is unknown, a field is missing, or a value is one that the
            decoder does not implement.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; expected a Hugging Face model folder")
    try:
        return lm_config(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def lm_config(config: Mapping[str, Any]) -> LMConfig:
    """The decoder's shape from the content of a `config.json`; see `read_config`."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported; known: {sorted(FAMILIES)}")
    try:
        return FAMILIES[model_type](config)
    except KeyError as error:
        raise ValueError(f"field {error} is missing") from error


def hf_config(config: LMConfig) -> dict[str, Any]:
    """The `config.json` content, in transformers 5's form, that reads back as `config`."""
    rope: dict[str, Any] = {"rope_type": config.rope.kind, "rope_theta": config.rope.theta}
    if config.rope.kind != "default":
        rope["factor"] = config.rope.factor
    if config.rope.kind == "llama3":
        rope["low_freq_factor"] = config.rope.low_freq_factor
        rope["high_freq_factor"] = config.rope.high_freq_factor
        rope["original_max_position_embeddings"] = config.rope.original_max_position
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tied,
    }


def _llama(config: Mapping[str, Any]) -> LMConfig:
    if (act := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ValueError(f"hidden_act {act!r} is not supported in the llama family; expected silu")
    num_heads = config["num_attention_heads"]
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide among {num_kv_heads} key heads")
    return LMConfig(
        model_type="llama",
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
        max_position=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
        rope=_rope(config),
        tied=config.get("tie_word_embeddings", False),
        attention_bias=config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
    )


def _rope(config: Mapping[str, Any]) -> RopeConfig:
    # transformers 5 keeps everything in `rope_parameters`; 4 has `rope_theta` at the top and the
    # rest in `rope_scaling`, where `rope_type` was once called `type`.
    rope = {
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_scaling") or {}),
        **(config.get("rope_parameters") or {}),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = float(rope["rope_theta"])
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, kind, float(rope["factor"]))
    if kind == "llama3":
        return RopeConfig(
            theta,
            kind,
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    raise ValueError(f"rope_type {kind!r} is not supported; known: default, linear, llama3")


FAMILIES: dict[str, Callable[[Mapping[str, Any]], LMConfig]] = {"llama": _llama}
