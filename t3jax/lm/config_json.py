"""`config.json` and the decoder's shape, in both directions, by the rows of `families.py`.

`config.json` is read in the forms of transformers 4 and 5 and written in that of 5. What a config
asks for and the decoder does not implement is refused by name.
"""

import functools
import operator
import pathlib
import re
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta

from t3jax.json_files import check_json, read_json, show_json
from t3jax.lm.config import LMConfig
from t3jax.lm.delta_json import read_delta, write_delta
from t3jax.lm.experts_json import read_experts, write_experts
from t3jax.lm.families import FAMILIES
from t3jax.lm.family import Family, Json
from t3jax.lm.quantization_json import read_quantization
from t3jax.lm.refusals import explain_unknown
from t3jax.lm.rope_json import Positive, Share, Theta, Tokens, read_ropes, share_field, write_rope
from t3jax.lm.wrappers import WRAPPERS, text_config

# What every family expects of these fields, if they are there: transformers obeys them.
_EXPECTED: dict[str, tuple] = {
    "is_causal": (True,),
    "is_encoder_decoder": (False, None),
    "per_layer_config": (None, {}),
    "attention_chunk_size": (None,),
    "kv_sharing_modes": (None,),
    "transformers_weights": (None,),
}

Width = Annotated[int, Meta(ge=1, le=1 << 22)]
Count = Annotated[int, Meta(ge=1, le=1 << 16)]
Layers = Annotated[int, Meta(ge=1, le=1024)]
Epsilon = Annotated[float, Meta(ge=1e-20, le=0.1)]

# Types and ranges of the fields that are read. Null is as if the field was not there, where the
# family's default is null or the field is one of `_NULLABLE`.
_TYPES: dict[str, Any] = {
    "vocab_size": Annotated[int, Meta(ge=1, le=1 << 24)],
    **dict.fromkeys(("hidden_size", "n_embd", "intermediate_size", "n_inner"), Width),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), Layers),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "head_dim"), Count),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), Tokens),
    **dict.fromkeys(("original_max_position_embeddings", "sliding_window"), Tokens),
    "sliding_window_pattern": Annotated[int, Meta(ge=0, le=1 << 16)] | str,
    **dict.fromkeys(("no_rope_layers", "mlp_only_layers"), list[int]),
    "max_window_layers": Annotated[int, Meta(ge=0)],
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"), Epsilon),
    "norm_epsilon": Epsilon,
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), bool),
    **dict.fromkeys(("use_parallel_residual", "use_sliding_window"), bool),
    **dict.fromkeys(("use_bias", "use_qkv_bias", "attention_out_bias"), bool),
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), str),
    "activation": str,
    "query_pre_attn_scalar": Width,
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), Positive),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier"), Positive),
    **dict.fromkeys(("attention_multiplier", "logits_scaling", "logit_scale"), Positive),
    **dict.fromkeys(("rope_theta", "rotary_emb_base", "rope_local_base_freq"), Theta),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), Share),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), dict[str, Any]),
    "layer_types": list[str],
    "attention_types": list[tuple[list[str], Annotated[int, Meta(ge=1, le=1024)]]],
    "window_size": Tokens,
    "num_heads": Count,
    **dict.fromkeys(("ffn_dim", "moe_intermediate_size"), Width),
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok"), Count),
    "norm_topk_prob": bool,
    **dict.fromkeys(("clip_qkv", "routed_scaling_factor", "swiglu_limit"), Positive),
    "router_jitter_noise": Annotated[float, Meta(ge=0, le=1)],
    **dict.fromkeys(("n_routed_experts", "n_shared_experts", "n_group", "topk_group"), Count),
    "shared_expert_intermediate_size": Width,
    **dict.fromkeys(("moe_k", "moe_num_experts", "decoder_sparse_step"), Count),
    "moe_num_shared_experts": Annotated[int, Meta(ge=0, le=1 << 16)],
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index"), Annotated[int, Meta(ge=0)]),
    "moe_layer_end_index": Annotated[int, Meta(ge=-1)],
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), Count),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), Count),
    "linear_conv_kernel_dim": Annotated[int, Meta(ge=1, le=64)],
    **dict.fromkeys(("full_attention_interval", "moe_layer_interval"), Layers),
    **dict.fromkeys(("qkv_bias", "lm_head_bias", "use_qk_norm"), bool),
    **dict.fromkeys(("d_model", "ffn_hidden_size"), Width),
    **dict.fromkeys(("n_heads", "num_kv_heads", "rotary_dim", "no_rope_layer_interval"), Count),
    **dict.fromkeys(("max_seq_len", "seq_length"), Tokens),
    "softmax_scale": Positive,
    **dict.fromkeys(("bias", "multi_query", "new_decoder_architecture"), bool),
    "attn_config": dict[str, Any],
}
_NULLABLE = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "head_dim",
    "layer_types",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "sliding_window_pattern",
)


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
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; expected a Hugging Face model folder")
    content = read_json(path, dict[str, Any])
    try:
        return lm_config(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def wrapper_of(folder: pathlib.Path) -> str | None:
    """The type of a multimodal folder, of which the text model is read; None for other folders."""
    model_type = read_json(folder / "config.json", dict[str, Any]).get("model_type")
    return model_type if model_type in WRAPPERS else None


def lm_config(config: Json) -> LMConfig:
    """The decoder's shape from the content of a `config.json`; see `read_config`."""
    model_type = config.get("model_type")
    if model_type not in [*FAMILIES, *WRAPPERS]:
        raise ValueError(explain_unknown(config, WRAPPERS))
    read_quantization(config)  # refuses by name what is not read
    try:
        if model_type in WRAPPERS:
            config = text_config(config)
        return _read(config["model_type"], config)
    except KeyError as error:
        raise ValueError(f"field {error} is missing") from error


def hf_config(config: LMConfig) -> dict[str, Any]:
    """The `config.json` content, in transformers 5's form, that reads back as `config`."""
    family = FAMILIES[config.model_type]
    content: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.model_type,
    }
    content |= {
        name: operator.attrgetter(field)(config) for field, name in family.all_fields.items()
    }
    content |= {name: 1 / content[name] for name in family.reciprocal}
    content |= {name: values[0] for name, values in family.expected.items()}
    # Where no layer has a window, null also says that all layers are rotated.
    nullable = family.window == "sliding_window" and (
        not family.layer_types or family.unrotated is not None
    )
    if family.slides is not None and (config.window or nullable):
        content[family.window] = config.window or None
    local = config.local or (False,) * config.num_layers
    if "attention_types" in family.defaults:
        content["attention_types"] = [[["local" if each else "global"], 1] for each in local]
    if "use_sliding_window" in family.defaults:
        content["use_sliding_window"] = bool(config.window)
    if family.layer_types:
        content["layer_types"] = [
            "sliding_attention" if each else "full_attention" for each in local
        ]
    if "no_rope_layers" in family.defaults:
        unrotated = config.unrotated or (False,) * config.num_layers
        content["no_rope_layers"] = [int(not each) for each in unrotated]
    content |= write_experts(config, family) | write_delta(config)
    if "use_qk_norm" in family.defaults:
        content["use_qk_norm"] = config.qk_norm is not None
    if family.restore is not None:
        content |= family.restore(config)
    if config.rope is not None:
        content["rope_parameters"] = write_rope(config.rope)
        if share_field(family) is not None:  # transformers knows a share here
            content["rope_parameters"]["partial_rotary_factor"] = config.rope.rotated
        if config.rope.kind == "longrope":
            original = config.rope.original_max_position
            content["original_max_position_embeddings"] = original
            content["max_position_embeddings"] = round(original * config.rope.factor)
    if config.local_rope is not None:
        content["rope_parameters"] = {
            "full_attention": content["rope_parameters"],
            "sliding_attention": write_rope(config.local_rope),
        }
    return content


# The names that checkpoints of multimodal models have for their text models.
_WRAPPED = (
    (r"^language_model\.(?=model\.|lm_head\.)", ""),
    (r"^model\.(language_model|text_model)\.", "model."),
    (r"^(model\.)?(vision_tower|vision_model|visual|multi_modal_projector|connector)\..*", None),
    (r"^(model\.)?image_newline$", None),
)


def checkpoint_name(family: Family, name: str) -> str | None:
    """What a stored weight is called in the family's table; None if the decoder has no use for it.

    Buffers of old checkpoints are of no use either: they follow from the config.
    """
    buffer = (r".*\.rotary_emb\.inv_freq$", None)
    for pattern, replacement in (*_WRAPPED, *family.renamed, buffer):
        if re.search(pattern, name):
            if replacement is None:
                return None
            name = re.sub(pattern, replacement, name, count=1)
    return name


def _read(model_type: str, config: Json) -> LMConfig:
    family = FAMILIES[model_type]
    config = _without_aliases(family, config)
    if "use_sliding_window" in family.defaults and config.get("sliding_window") == 0:
        config["sliding_window"] = None  # transformers writes so where no layer has a window
    config = {**family.all_defaults, **_checked(model_type, config)}
    if family.prepare is not None:
        config |= _checked(model_type, family.prepare(config))
    for name, known in {**_EXPECTED, **family.expected}.items():
        if name in config and config[name] not in known:
            raise ValueError(
                f"{name} {config[name]!r} is not supported in the {model_type} family; expected "
                f"{known[0]!r}"
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
    values["head_dim"] = _head_dim(family, config, hidden_size, num_heads)
    values["intermediate_size"] = values.get("intermediate_size") or 4 * hidden_size
    if (activation := values.get("activation")) is not None:
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"{family.all_fields['activation']} {activation!r} is not supported; known: "
                f"{', '.join(_ACTIVATIONS)}"
            )
        values["activation"] = _ACTIVATIONS[activation]
    values |= read_delta(config, values)
    if "delta" in values:
        config["layer_types"] = None  # says nothing about windows there
    values |= _windows(family, config, values["num_layers"], values["max_position"])
    values |= _unrotated(family, config, values["num_layers"], values.get("local", ()))
    if "rope" not in family.fixed:
        values |= read_ropes(family, config, values["head_dim"])
        if values["rope"].kind == "longrope":
            values["max_position"] = values["rope"].original_max_position
    values |= family.fixed
    values |= read_experts(family, config, values, values["num_layers"])
    return LMConfig(model_type=model_type, **values)


def _without_aliases(family: Family, config: Json) -> dict[str, Any]:
    """The config with every field under its one name."""
    config = dict(config)
    for alias, name in family.aliases.items():
        if alias in config:
            value = config.pop(alias)
            if config.setdefault(name, value) != value:
                raise ValueError(
                    f"{alias} is {show_json(value)} and {name} is {show_json(config[name])}, two "
                    "names of one field; expected the same value"
                )
    return config


@functools.cache
def _schema(model_type: str) -> Any:
    """A type with the fields that are read, none of them needed."""
    defaults = FAMILIES[model_type].all_defaults
    fields: list[tuple[str, Any, Any]] = []
    for name, kind in _TYPES.items():
        nullable = name in _NULLABLE or (name in defaults and defaults[name] is None)
        if name == "head_dim":  # null is as if it was not there, unless that is a number
            nullable = defaults.get(name) is None
        if name == "hidden_activation":  # Gemma 1's is not obeyed
            nullable = name not in FAMILIES[model_type].all_fields.values()
        fields.append((name, kind | None if nullable else kind, UNSET))
    return msgspec.defstruct(model_type, fields)


def _checked(model_type: str, config: Json) -> dict[str, Any]:
    """The config after a check of types and ranges, its numbers as what they are meant to be."""
    fields = {name: config[name] for name in _TYPES if name in config}
    try:
        checked = check_json(fields, model_type, _schema(model_type))
    except ValueError as error:
        raise ValueError(str(error).removeprefix(f"{model_type}: ")) from None
    return {**config, **{name: getattr(checked, name) for name in fields}}


def _head_dim(family: Family, config: Json, hidden_size: int, num_heads: int) -> int:
    """Width of a head: given, or an equal part of the hidden size."""
    given = config.get("head_dim")
    if given is None or "head_dim" not in family.all_fields.values():
        if hidden_size % num_heads:
            raise ValueError(
                f"a hidden size of {hidden_size} does not divide among {num_heads} heads"
            )
        if given not in (None, hidden_size // num_heads):
            raise ValueError(
                f"head_dim {given} is not supported in this family; expected "
                f"{hidden_size // num_heads}, the hidden size divided among the heads"
            )
        return hidden_size // num_heads
    return given


def _windows(family: Family, config: Json, num_layers: int, max_position: int) -> dict[str, Any]:
    """Which layers have the sliding window, and its width.

    transformers' models obey `layer_types` in some families only, but its caches in all, and those
    obey a window too where the model has none; what would differ between the two is refused.
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
        local = tuple(each == "sliding_attention" for each in types)
    elif window is None and "use_sliding_window" not in family.defaults and family.layer_types:
        local = tuple(family.slides(config, layer) for layer in range(num_layers))
    else:
        local = tuple(
            window is not None and family.slides(config, layer) for layer in range(num_layers)
        )
    if types is not None and [kinds[each] for each in local] != types:
        raise ValueError(
            f"layer_types {types} is not supported in this family; expected "
            f"{[kinds[each] for each in local]}, or none"
        )
    if not any(local):
        return {}
    if window is None:
        raise ValueError(
            "there are layers of sliding_attention, but no window (sliding_window, "
            "use_sliding_window); expected its width"
        )
    return {"window": window, "local": local}


def _unrotated(
    family: Family, config: Json, num_layers: int, local: tuple[bool, ...]
) -> dict[str, tuple[bool, ...]]:
    """Which layers are not rotated."""
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
