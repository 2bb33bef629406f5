"""The decoder's shape from a `config.json`, by the rows of `families.py`.

`config.json` is read in the forms of transformers 4 and 5; `config_writing.py` writes the latter.
Values that the decoder does not implement are refused by name.
"""

import dataclasses
import pathlib
from typing import Any

from t3jax.json_files import read_json
from t3jax.lm.config import LMConfig
from t3jax.lm.config_fields import check_fields, rename_aliases
from t3jax.lm.delta_json import read_recurrent
from t3jax.lm.experts_json import read_experts
from t3jax.lm.families import FAMILIES
from t3jax.lm.family import WAY_OUT, Family, Json
from t3jax.lm.places import Tensors
from t3jax.lm.quantization_json import read_quantization
from t3jax.lm.refusals import explain_unknown
from t3jax.lm.rope_json import read_ropes
from t3jax.lm.unequal_json import read_unequal
from t3jax.lm.wrappers import WRAPPERS, text_config

# Values of fields that transformers obeys in every family.
_EXPECTED: dict[str, tuple] = {
    "is_causal": (True,),
    "is_encoder_decoder": (False, None),
    "attention_chunk_size": (None,),
    "kv_sharing_modes": (None,),
    "transformers_weights": (None,),
}

_ACTIVATIONS = {  # names of config.json, and those of LMConfig
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


def read_config(folder: pathlib.Path) -> LMConfig:
    """Reads the decoder's shape from the `config.json` of a Hugging Face folder.

    Raises:
        FileNotFoundError: If there is no `config.json`.
        ValueError: If the family is unknown, a field is missing, or a value is one that the
            decoder does not implement.
    """
    path = folder / "config.json"
    if not path.exists():
        files = sorted(folder.glob("*.gguf"))
        more = f", or a GGUF file, such as {files[0]}" if files else ""
        raise FileNotFoundError(f"{path}: not found; expected a Hugging Face model folder{more}")
    content = read_json(path, dict[str, Any])
    try:
        return lm_config(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def wrapper_of(folder: pathlib.Path) -> str | None:
    """The model type of a multimodal folder; None for other folders."""
    model_type = read_json(folder / "config.json", dict[str, Any]).get("model_type")
    return model_type if model_type in WRAPPERS else None


def family_in(folder: pathlib.Path, config: LMConfig, tensors: Tensors) -> Family:
    """The row of a model's family, adapted to the layout in which its folder stores the weights."""
    family = FAMILIES[config.model_type]
    wrapper = wrapper_of(folder) if (folder / "config.json").exists() else None
    transposed = () if wrapper is None else WRAPPERS[wrapper].transposed
    if not transposed or config.experts is None:
        return family
    shapes = (v.get_shape() for name, (v, _) in tensors.items() if name.endswith(transposed[0]))
    if {tuple(shape[1:]) for shape in shapes} == {(2 * config.experts.size, config.hidden_size)}:
        return family
    return dataclasses.replace(family, transposed=(*family.transposed, *transposed))


def lm_config(config: Json) -> LMConfig:
    """The decoder's shape from the content of a `config.json`; see `read_config`."""
    model_type = config.get("model_type")
    if model_type not in [*FAMILIES, *WRAPPERS]:
        raise ValueError(explain_unknown(config, WRAPPERS))
    read_quantization(config)  # refuses unknown methods
    try:
        if model_type in WRAPPERS:
            config = text_config(config)
        return _read(config["model_type"], config)
    except KeyError as error:
        raise ValueError(f"field {error} is missing") from error


def _read(model_type: str, config: Json) -> LMConfig:
    family = FAMILIES[model_type]
    config = rename_aliases(family, config)
    if "use_sliding_window" in family.defaults and config.get("sliding_window") == 0:
        config["sliding_window"] = None  # transformers writes 0 if no layer has a window
    config = {**family.all_defaults, **check_fields(model_type, config)}
    if family.prepare is not None:
        config |= check_fields(model_type, family.prepare(config))
    for name, known in {**_EXPECTED, **family.expected}.items():
        if name in config and config[name] not in known:
            raise ValueError(
                f"{name} {config[name]!r} is not supported in the {model_type} family; expected "
                f"{known[0]!r}. {WAY_OUT}"
            )
    values: dict[str, Any] = {
        field: 1 / config[name] if name in family.reciprocal else config[name]
        for field, name in family.all_fields.items()
    }
    if "use_qk_norm" in family.defaults:
        values["qk_norm"] = family.qk_norm if values["qk_norm"] else None
    num_heads, hidden_size = values["num_heads"], values["hidden_size"]
    num_kv_heads = values.get("num_kv_heads") or num_heads
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide among {num_kv_heads} key heads")
    values["num_kv_heads"] = num_kv_heads
    values["head_dim"] = _read_head_dim(family, config, hidden_size, num_heads)
    values["intermediate_size"] = values.get("intermediate_size") or 4 * hidden_size
    if (activation := values.get("activation")) is not None:
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"{family.all_fields['activation']} {activation!r} is not supported; known: "
                f"{', '.join(_ACTIVATIONS)}"
            )
        values["activation"] = _ACTIVATIONS[activation]
    values |= read_recurrent(config, values)
    if "delta" in values or "conv" in values:
        config["layer_types"] = None  # their kinds are not those of windows
    values |= _read_windows(family, config, values["num_layers"], values["max_position"])
    values |= _read_unrotated(family, config, values["num_layers"], values.get("local", ()))
    values |= read_unequal(family, config, values)
    if "rope" not in family.fixed:
        heads = values.get("whole_heads")
        values |= read_ropes(
            family, config, heads.head_dim if heads else values["head_dim"], values["head_dim"]
        )
        if values["rope"].kind == "longrope":
            values["max_position"] = values["rope"].original_max_position
    values |= family.fixed
    values |= read_experts(family, config, values, values["num_layers"])
    return LMConfig(model_type=model_type, **values)


def _read_head_dim(family: Family, config: Json, hidden_size: int, num_heads: int) -> int:
    """Width of a head: `head_dim`, or an equal part of the hidden size."""
    head_dim = config.get("head_dim")
    if head_dim is not None and "head_dim" in family.all_fields.values():
        return head_dim
    if hidden_size % num_heads:
        raise ValueError(f"a hidden size of {hidden_size} does not divide among {num_heads} heads")
    if head_dim not in (None, hidden_size // num_heads):
        raise ValueError(
            f"head_dim {head_dim} is not supported in this family; expected "
            f"{hidden_size // num_heads}, the hidden size divided among the heads"
        )
    return hidden_size // num_heads


def _read_windows(
    family: Family, config: Json, num_layers: int, max_position: int
) -> dict[str, Any]:
    """The layers that have the sliding window, and its width.

    transformers' caches obey `layer_types` and the window in all families, its models in some only.
    A config is refused if the two would differ.
    """
    types = config.get("layer_types")
    window = config.get(family.window)
    if "use_sliding_window" in family.defaults and not config["use_sliding_window"]:
        window = None
    kinds = ("full_attention", "sliding_attention")
    if types is not None and (len(types) != num_layers or set(types) - set(kinds)):
        raise ValueError(f"layer_types {types}: expected {num_layers}, each one of {kinds}")
    if family.slides is None:
        if window is not None and window < max_position:
            raise ValueError(
                f"sliding_window {window} is not supported in this family, whose layers attend to "
                "the whole text; expected null"
            )
        local = (False,) * num_layers
    elif family.layer_types and types is not None:
        local = tuple(kind == "sliding_attention" for kind in types)
    elif window is None and "use_sliding_window" not in family.defaults and family.layer_types:
        local = tuple(family.slides(config, layer) for layer in range(num_layers))
    else:
        local = tuple(
            window is not None and family.slides(config, layer) for layer in range(num_layers)
        )
    expected = [kinds[is_local] for is_local in local]
    if types not in (None, expected):
        raise ValueError(
            f"layer_types {types} is not supported in this family; expected {expected}, or none"
        )
    if not any(local):
        return {}
    if window is None:
        raise ValueError(
            "there are layers of sliding_attention, but no window (sliding_window, "
            "use_sliding_window); expected its width"
        )
    return {"window": window, "local": local}


def _read_unrotated(
    family: Family, config: Json, num_layers: int, local: tuple[bool, ...]
) -> dict[str, tuple[bool, ...]]:
    if family.unrotated is None:
        return {}
    by_layer = local or (False,) * num_layers
    unrotated = tuple(family.unrotated(config, i, by_layer[i]) for i in range(num_layers))
    if all(unrotated) and config.get("sliding_window") is not None:
        raise ValueError(
            f"layer_types {config['layer_types']}: no layer has the sliding window "
            f"{config['sliding_window']}; expected one, or null as the window"
        )
    return {"unrotated": unrotated} if any(unrotated) else {}
