"""Rotary settings of a `config.json`, in both directions."""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from t3jax.json_files import check_json, show_json
from t3jax.lm.config import RopeConfig
from t3jax.lm.family import Family, Json

_REQUIRED = {  # fields of each kind of rotary positions
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "proportional": (),
}

Tokens = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
Theta = Annotated[float, Meta(gt=1, le=1e15)]
Share = Annotated[float, Meta(gt=0, le=1)]
Stretch = Annotated[float, Meta(gt=0, le=1e6)]
Positive = Annotated[float, Meta(gt=0, le=1e6)]


class _Rope(msgspec.Struct):
    """Types and ranges of rotary settings, whatever their kind."""

    rope_theta: Theta
    partial_rotary_factor: Share | None
    rope_type: str = "default"
    factor: Annotated[float, Meta(ge=1, le=1e6)] | None = None
    low_freq_factor: Stretch | None = None
    high_freq_factor: Stretch | None = None
    original_max_position_embeddings: Annotated[int, Meta(ge=2, le=(1 << 31) - 1)] | None = None
    attention_factor: Annotated[float, Meta(gt=0, le=1000)] | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    llama_4_scaling_beta: Annotated[float, Meta(ge=0, le=1000)] | None = None
    short_mscale: Annotated[float, Meta(gt=0, le=1000)] | None = None
    long_mscale: Annotated[float, Meta(gt=0, le=1000)] | None = None
    short_factor: list[Stretch] | None = None
    long_factor: list[Stretch] | None = None


def read_ropes(
    family: Family, config: Json, head_dim: int, local_head_dim: int
) -> dict[str, RopeConfig]:
    """The field `rope` of `LMConfig`, and `local_rope` in families whose local layers have another.

    Raises:
        ValueError: If a setting is missing, out of range or not implemented.
    """
    # transformers 5 keeps everything in `rope_parameters`, for each type of layer if they differ; 4
    # has the base and the share at the top and the rest in `rope_scaling`. If both exist,
    # `rope_scaling` counts, as in transformers.
    new, scaling = (config.get(name) for name in ("rope_parameters", "rope_scaling"))
    new = family.defaults.get("rope_parameters", {}) if new is None else new
    scaling = scaling or {}
    base = "rotary_emb_base" if "rotary_emb_base" in family.defaults else "rope_theta"
    share = share_field(family)
    top = {
        "rope_theta": config[base],
        "partial_rotary_factor": config.get(share or "partial_rotary_factor", 1.0),
    }
    if family.local_theta is None and "rope_local_base_freq" not in family.defaults:
        if nested := [name for name, value in new.items() if isinstance(value, Mapping)]:
            raise ValueError(
                f"rope_parameters.{nested[0]} is an object, but this family has the same rotary "
                "settings in all layers"
            )
        return {"rope": _read_rope(family, {**top, **(scaling or new)}, config, head_dim)}
    kinds = ("full_attention", "sliding_attention")
    if unknown := [name for name in new if name not in kinds]:
        raise ValueError(
            f"rope_parameters.{unknown[0]} is outside of a type of layer; expected {kinds}"
        )
    full, sliding = (_read_section(new, kind) for kind in kinds)
    if "type" in scaling and "rope_type" not in scaling:
        raise ValueError(
            f"rope_scaling has type {scaling['type']!r} but no rope_type, which transformers takes "
            "for none in this family; expected rope_type"
        )
    local = {"rope_theta": family.local_theta or config["rope_local_base_freq"]}
    return {
        "rope": _read_rope(family, {**top, **full, **scaling}, config, head_dim),
        "local_rope": _read_rope(family, {**top, **local, **sliding}, config, local_head_dim),
    }


def _read_section(ropes: Json, kind: str) -> Json:
    rope = ropes.get(kind) or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters.{kind} is {show_json(rope)}, expected an object")
    return rope


def share_field(family: Family) -> str | None:
    """The field with the share of a head that is rotated; None if it is always the whole."""
    names = ("rotary_pct", "partial_rotary_factor")
    return next((name for name in names if name in family.defaults), None)


def _read_rope(family: Family, content: Json, config: Json, head_dim: int) -> RopeConfig:
    kind = content.get("rope_type", content.get("type", "default"))  # `type` in old configs
    if not content.keys() & {"rope_type", "type"} and content.get("factor") not in (None, 1):
        warnings.warn(
            f"rotary settings have a factor of {show_json(content['factor'])} and no rope_type, "
            "which transformers takes for none; expected rope_type, or no factor",
            stacklevel=2,
        )
    if kind == "su" and "llama3" not in family.ropes:  # Phi-3's first name for it
        kind = "longrope"
    if kind not in family.ropes:
        raise ValueError(
            f"rope_type {kind!r:.60} is not supported in this family; known: "
            f"{', '.join(family.ropes)}"
        )
    try:
        rope = check_json({**content, "rope_type": kind}, "rope", _Rope)
    except ValueError as error:
        raise ValueError(f"rotary settings: {str(error).removeprefix('rope: ')}") from None
    rotated = rope.partial_rotary_factor
    if share_field(family) is None and rotated not in (None, 1):
        raise ValueError(
            f"partial_rotary_factor {rotated} is not supported in this family; expected 1.0, since "
            "the whole of a head is rotated"
        )
    if rotated is None and share_field(family) is not None:
        raise ValueError("partial_rotary_factor is null, expected a number")
    base = RopeConfig(
        theta=rope.rope_theta, kind=kind, rotated=rotated or 1.0, interleaved=family.interleaved
    )
    if (width := int(head_dim * base.rotated)) % 2 or not width:
        raise ValueError(
            f"{width} of a head's {head_dim} numbers are rotated; expected an even number of them"
        )
    if kind == "default":
        return base
    at_top = config.get("original_max_position_embeddings")
    inside = rope.original_max_position_embeddings
    original = inside or at_top if family.mscales else at_top or inside
    original = original or config["max_position_embeddings"]
    factor = rope.factor
    if factor is None and (kind == "longrope" or (kind == "yarn" and "factor" in content)):
        factor = config["max_position_embeddings"] / original
    for name in _REQUIRED[kind]:
        if getattr(rope, name) is None and not (name == "factor" and factor):
            raise _make_error(name, kind)
    base = dataclasses.replace(base, factor=float(factor or 1.0))
    if kind in ("linear", "dynamic", "proportional"):
        return base
    base = dataclasses.replace(base, original_max_position=original)
    if kind == "llama3":
        return _add_llama3(rope, base)
    if kind == "yarn":
        return _add_yarn(rope, base)
    base = _add_longrope(rope, base, width // 2)
    return _add_mscales(rope, base) if family.mscales else base


def _make_error(name: str, kind: str) -> ValueError:
    return ValueError(f"rotary settings: field {name!r} is missing, which rope_type {kind!r} needs")


def _add_llama3(rope: _Rope, base: RopeConfig) -> RopeConfig:
    low, high = rope.low_freq_factor, rope.high_freq_factor
    assert low is not None
    assert high is not None
    if high <= low:
        raise ValueError(f"high_freq_factor {high} is not above low_freq_factor {low}")
    return dataclasses.replace(base, low_freq_factor=low, high_freq_factor=high)


def _add_yarn(rope: _Rope, base: RopeConfig) -> RopeConfig:
    return dataclasses.replace(
        base,
        attention_factor=_yarn_attention_factor(rope, base.factor),
        beta_fast=rope.beta_fast or 32.0,
        beta_slow=rope.beta_slow or 1.0,
        truncate=rope.truncate,
        query_growth=rope.llama_4_scaling_beta or 0.0,
    )


def _add_longrope(rope: _Rope, base: RopeConfig, pairs: int) -> RopeConfig:
    factor, original = base.factor, base.original_max_position
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = tuple(rope.short_factor or ()), tuple(rope.long_factor or ())
    if {len(short), len(long)} != {pairs}:
        raise ValueError(
            f"short_factor and long_factor have {len(short)} and {len(long)} values; a head "
            f"has {pairs} rotary pairs"
        )
    return dataclasses.replace(
        base,
        attention_factor=rope.attention_factor or default,
        short_factors=short,
        long_factors=long,
    )


def _add_mscales(rope: _Rope, base: RopeConfig) -> RopeConfig:
    short, long = rope.short_mscale, rope.long_mscale
    if short is None or long is None:
        raise _make_error("short_mscale" if short is None else "long_mscale", rope.rope_type)
    return dataclasses.replace(base, attention_factor=short, long_attention_factor=long)


def _yarn_attention_factor(rope: _Rope, factor: float) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """The `rope_parameters` that read back as these settings."""
    content: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        content["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn", "longrope"):
        content["original_max_position_embeddings"] = rope.original_max_position
    if rope.kind in ("yarn", "longrope"):
        content["attention_factor"] = rope.attention_factor
    names = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "truncate"),
    }
    content |= {name: getattr(rope, name) for name in names.get(rope.kind, ())}
    if rope.query_growth:
        content["llama_4_scaling_beta"] = rope.query_growth
    if rope.kind == "longrope":
        if rope.long_attention_factor is not None:
            content["short_mscale"] = rope.attention_factor
            content["long_mscale"] = rope.long_attention_factor
        content["short_factor"] = list(rope.short_factors)
        content["long_factor"] = list(rope.long_factors)
    return content
