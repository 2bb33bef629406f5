"""LoRA adapters in the layout of PEFT: read as part of a checkpoint, and written.

A folder with `adapter_config.json` and `adapter_model.safetensors` describes its base model with
the weights W + s B A, where s is alpha / R, or alpha / sqrt(R) for rsLoRA. The sum is taken in
float32 slice by slice as weights are read; the base's folder is not changed. Other kinds of
adapters are refused by name.

Axes: R rank.

References:
    LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685, section 4.1.
    A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, arXiv 2312.03732.
"""

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import safetensors
import safetensors.numpy
from msgspec import Meta

from t3jax import files
from t3jax.json_files import check_json, read_json, show_json
from t3jax.lm.config import LMConfig
from t3jax.lm.families import FAMILIES
from t3jax.lm.folder import check_inside
from t3jax.lm.places import Computed, Tensors, View

Factors = Mapping[str, Mapping[str, Any]]  # path of a linear layer: "a" [R, in], "b" [out, R]
_Number = TypeVar("_Number", int, float)

CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_NAME = re.compile(r"^base_model\.model\.(.+)\.lora_([AB])\.weight$")
# Fields that ask for more than low-rank updates of linear layers, with the values that do not.
_PLAIN: dict[str, tuple] = {
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
}


class _Config(msgspec.Struct):
    """The fields of `adapter_config.json` that are read."""

    peft_type: str
    base_model_name_or_path: str
    r: Annotated[int, Meta(ge=1, le=1 << 16)]
    lora_alpha: Annotated[float, Meta(gt=0, le=1e6)]
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: dict[str, Annotated[int, Meta(ge=1, le=1 << 16)]] | None = None
    alpha_pattern: dict[str, Annotated[float, Meta(gt=0, le=1e6)]] | None = None

    def rank(self, module: str) -> int:
        """Rank of a linear layer's factors."""
        return _look_up(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """Factor s of a linear layer's update."""
        rank = self.rank(module)
        alpha = _look_up(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _look_up(pattern: Mapping[str, _Number] | None, module: str, default: _Number) -> _Number:
    """The value of the first name in a pattern that the layer's name ends with."""
    pattern = pattern or {}
    names = (name for name in pattern if f".{module}".endswith(f".{name}"))
    return next((pattern[name] for name in names), default)


def is_adapter(folder: pathlib.Path) -> bool:
    """Whether a folder holds an adapter and no weights of a whole model."""
    whole = ("model.safetensors", "model.safetensors.index.json")
    return (folder / CONFIG).is_file() and not any((folder / name).exists() for name in whole)


def read_base(folder: pathlib.Path) -> str:
    """The name of an adapter's base model: a folder or a hub id.

    A relative path that does not exist is looked up beside the adapter's files.

    Raises:
        ValueError: If the adapter is of a kind that is not supported.
    """
    name = _read_config(folder).base_model_name_or_path
    beside = folder / name
    return str(beside) if not pathlib.Path(name).exists() and beside.is_dir() else name


def merge_adapter(folder: pathlib.Path, tensors: Tensors) -> Tensors:
    """The tensors of a base model, by its family's names, with an adapter's updates.

    An updated tensor is a view that adds s B A to each part that is read.

    Raises:
        FileNotFoundError: If the adapter has no weights.
        ValueError: If its weights do not fit its config or the base model.
    """
    config = _read_config(folder)
    path = folder / _WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; expected the adapter's weights")
    check_inside(folder, path)
    try:
        stored = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: broken safetensors file ({error})") from error
    factors: dict[str, dict[str, np.ndarray]] = {}
    for name, array in stored.items():
        match = _NAME.match(name)
        if match is None:
            raise ValueError(
                f"{path}: {name} is no factor of a linear layer; expected names such as "
                "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
            )
        factors.setdefault(match[1], {})[match[2]] = array.astype(np.float32)
    merged = dict(tensors)
    for module, pair in factors.items():
        name = f"{module}.weight"
        if set(pair) != {"A", "B"}:
            raise ValueError(f"{path}: {module} has lora_{min(pair)} alone, expected both factors")
        if name not in tensors:
            raise ValueError(f"{path}: {module} is no linear layer of the base model")
        a, b = pair["A"], pair["B"]
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ValueError(f"{path}: NaN or Inf in the factors of {module}")
        view, stored_name = tensors[name]
        shape = tuple(view.get_shape())
        fan_out, fan_in = shape[::-1] if config.fan_in_fan_out else shape
        rank = config.rank(module)
        if (a.shape, b.shape) != ((rank, fan_in), (fan_out, rank)):
            raise ValueError(
                f"{path}: {module} has factors of shape {a.shape} and {b.shape}, expected "
                f"{(rank, fan_in)} and {(fan_out, rank)}"
            )
        b = b * np.float32(config.scale(module))
        left, right = (a.T, b.T) if config.fan_in_fan_out else (b, a)
        merged[name] = (_Updated(view, left, right), stored_name)
    return merged


class _Updated(Computed):
    """A stored matrix with a low-rank update, which is added to each part that is read."""

    def __init__(self, view: View, left: np.ndarray, right: np.ndarray):
        self._view, self._left, self._right = view, left, right

    def get_shape(self) -> list[int]:
        return list(self._view.get_shape())

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = index
        update = self._left[rows] @ self._right[:, columns]
        return np.asarray(self._view[index]).astype(np.float32) + update


def save_adapter(
    folder: pathlib.Path, config: LMConfig, lora: Factors, rank: int, alpha: float, base: str
) -> None:
    """Writes LoRA's factors, without alpha / R, as a folder that PEFT opens; files are replaced.

    Raises:
        ValueError: If a family stacks layers in one tensor, for which PEFT has one pair of factors.
    """
    family = FAMILIES[config.model_type]
    modules, stacked = {}, False
    for path in lora:
        *_, index, block, layer = path.split("/")
        module = family.weights[f"layers.{{i}}.{block}.{layer}"]
        modules[path] = module.replace("{i}", index)
        stacked = stacked or list(family.weights.values()).count(module) > 1
    if stacked:
        raise ValueError(
            f"the {config.model_type} family keeps several of the layers {sorted(lora)[:2]}... in "
            "one tensor, so that their factors cannot be saved as an adapter; use the merged model"
        )
    transposed = any(module.endswith(family.transposed) for module in modules.values())
    tensors = {
        f"base_model.model.{modules[path]}.lora_{name.upper()}.weight": np.ascontiguousarray(factor)
        for path, factors in lora.items()
        for name, factor in factors.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    with files.replacing(folder / _WEIGHTS) as temporary:
        safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
    files.write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": sorted({module.split(".")[-1] for module in modules.values()}),
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": transposed,
            "inference_mode": True,
        },
    )


def _read_config(folder: pathlib.Path) -> _Config:
    path = folder / CONFIG
    content = read_json(path, dict[str, Any])
    if content.get("peft_type") != "LORA":
        raise ValueError(
            f"{path}: peft_type {show_json(content.get('peft_type'))} is not supported; expected "
            '"LORA". Merge the adapter into the base with merge_and_unload of PEFT'
        )
    for name, values in _PLAIN.items():
        if name in content and content[name] not in values:
            raise ValueError(
                f"{path}: {name} {show_json(content[name])} is not supported; expected "
                f"{show_json(values[0])}. Merge the adapter into the base with merge_and_unload of "
                "PEFT"
            )
    config = check_json(content, str(path), _Config)
    names = [*(config.rank_pattern or {}), *(config.alpha_pattern or {})]
    if patterns := [name for name in names if not re.fullmatch(r"[\w.]+", name)]:
        raise ValueError(
            f"{path}: the pattern {show_json(patterns[0])} is not supported; expected names of "
            "layers, such as q_proj or layers.0.mlp.up_proj"
        )
    return config
