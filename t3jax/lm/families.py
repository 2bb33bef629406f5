"""Model families: what each one's Hugging Face folder says, as a table of differences.

A `Family` says where the fields of `LMConfig` stand in `config.json`, which of them hold for the
whole family, and under which names the decoder's weights are stored. One table serves reading and
writing. `config.json` is read in the forms of transformers 4 and 5 and written in that of 5. What a
config asks for and the decoder does not implement is refused by name.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from t3jax.lm.config import LMConfig, RopeConfig

Json = Mapping[str, Any]

_FIELDS = {  # of LMConfig, and of config.json
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_position": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
    "activation": "hidden_act",
}
_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 10000.0,
}
_WEIGHTS = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    "layers.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "layers.{i}.attention.q": "model.layers.{i}.self_attn.q_proj",
    "layers.{i}.attention.k": "model.layers.{i}.self_attn.k_proj",
    "layers.{i}.attention.v": "model.layers.{i}.self_attn.v_proj",
    "layers.{i}.attention.o": "model.layers.{i}.self_attn.o_proj",
    "layers.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.mlp.gate": "model.layers.{i}.mlp.gate_proj",
    "layers.{i}.mlp.up": "model.layers.{i}.mlp.up_proj",
    "layers.{i}.mlp.down": "model.layers.{i}.mlp.down_proj",
}
_QK_NORMS = {
    "layers.{i}.attention.q_norm": "model.layers.{i}.self_attn.q_norm",
    "layers.{i}.attention.k_norm": "model.layers.{i}.self_attn.k_norm",
}
_POST_NORMS = {
    "layers.{i}.attention_post_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A family's Hugging Face folders; the defaults are Llama's.

    Attributes:
        architecture: The class of transformers.
        fixed: Fields of `LMConfig` that hold for the whole family.
        fields: Further fields of `LMConfig`, or the same under other names of `config.json`; None
            removes one.
        defaults: What `config.json` means where it is silent.
        expected: Fields of `config.json` that must have one of these values, if they are there.
        slides: `(config.json, layer) -> bool`: which layers have the sliding window where
            `layer_types` is silent; None where the family has no windows.
        layer_types: Whether `config.json` may say of each layer if it has the window.
        weights: The decoder's parameters, and their modules in a checkpoint; {i} is the layer.
            Parameters of one module are stacked in it, in this order.
        by_head: What is stacked is stacked head by head.
        transposed: Modules, by the end of their name, that are stored [in, out].
        renamed: Patterns of other names that checkpoints use for the same, and what to put for
            them; None: a weight of that name is no part of the decoder.
    """

    architecture: str
    fixed: Json = dataclasses.field(default_factory=dict)
    fields: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    defaults: Json = dataclasses.field(default_factory=dict)
    expected: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    slides: Callable[[Json, int], bool] | None = None
    layer_types: bool = False
    weights: Mapping[str, str] = dataclasses.field(default_factory=lambda: _WEIGHTS)
    by_head: bool = False
    transposed: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str | None], ...] = ()

    @property
    def all_fields(self) -> dict[str, str]:
        """Fields of `LMConfig` and their names in `config.json`, Llama's and the family's own."""
        both = {**_FIELDS, **self.fields}
        return {field: name for field, name in both.items() if name is not None}

    @property
    def all_defaults(self) -> dict[str, Any]:
        """Llama's and the family's own."""
        return {**_DEFAULTS, **self.defaults}


_GEMMA = {"norm": "rms_offset", "scaled_embedding": True}
_GEMMA_DEFAULTS = {
    "tie_word_embeddings": True,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
}
_GEMMA2_FIELDS = {
    "activation": "hidden_activation",
    "attention_bias": "attention_bias",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "logit_softcap": "final_logit_softcapping",
}
_GEMMA2_WEIGHTS = {
    **_WEIGHTS,
    **_POST_NORMS,
    "layers.{i}.mlp_norm": "model.layers.{i}.pre_feedforward_layernorm",
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        fields={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
        slides=lambda config, layer: True,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        fixed={"qkv_bias": True},
        defaults={"num_key_value_heads": 32},
        expected={"use_sliding_window": (False,)},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        fixed={"qk_norm": "head"},
        fields={"attention_bias": "attention_bias"},
        defaults={"num_key_value_heads": 32, "head_dim": 128},
        expected={"use_sliding_window": (False,)},
        weights={**_WEIGHTS, **_QK_NORMS},
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        defaults={
            "sliding_window": None,
            "partial_rotary_factor": 1.0,
            "original_max_position_embeddings": 4096,
        },
        slides=lambda config, layer: True,
        weights={
            **_WEIGHTS,
            "layers.{i}.attention.q": "model.layers.{i}.self_attn.qkv_proj",
            "layers.{i}.attention.k": "model.layers.{i}.self_attn.qkv_proj",
            "layers.{i}.attention.v": "model.layers.{i}.self_attn.qkv_proj",
            "layers.{i}.mlp.gate": "model.layers.{i}.mlp.gate_up_proj",
            "layers.{i}.mlp.up": "model.layers.{i}.mlp.gate_up_proj",
        },
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        # Configs say "gelu" in `hidden_act` and mean the approximation.
        fixed={**_GEMMA, "activation": "gelu_pytorch_tanh"},
        fields={"activation": None, "attention_bias": "attention_bias"},
        defaults={**_GEMMA_DEFAULTS, "num_key_value_heads": 16},
        expected={
            "hidden_act": ("gelu_pytorch_tanh", "gelu"),
            "hidden_activation": ("gelu_pytorch_tanh", None),
            "use_bidirectional_attention": (False, None),
        },
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        fixed={**_GEMMA, "norms": "both"},
        fields={**_GEMMA2_FIELDS, "attention_softcap": "attn_logit_softcapping"},
        defaults={
            **_GEMMA_DEFAULTS,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        expected={"use_bidirectional_attention": (False, None)},
        slides=lambda config, layer: layer % 2 == 0,
        layer_types=True,
        weights=_GEMMA2_WEIGHTS,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        fixed={**_GEMMA, "norms": "both", "qk_norm": "head"},
        fields=_GEMMA2_FIELDS,
        defaults={
            **_GEMMA_DEFAULTS,
            # Published configs leave out whatever is as in the 4B model.
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "final_logit_softcapping": None,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        expected={
            "attn_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
        },
        slides=lambda config, layer: (layer + 1) % config["sliding_window_pattern"] != 0,
        layer_types=True,
        weights={**_GEMMA2_WEIGHTS, **_QK_NORMS},
        # The multimodal folder's text model, as published and as transformers 5 has it.
        renamed=(
            (r"^language_model\.(?=model\.|lm_head\.)", ""),
            (r"^model\.language_model\.", "model."),
            (r"^(model\.)?(vision_tower|multi_modal_projector)\..*", None),
        ),
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        fixed={"norms": "post", "qk_norm": "width"},
        fields={"attention_bias": "attention_bias"},
        weights={**_WEIGHTS, **_QK_NORMS, **_POST_NORMS},
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        fixed={"norm": "layer", "gated": False, "mlp_bias": True},
        fields={
            "num_kv_heads": None,
            "head_dim": None,
            "norm_eps": "layer_norm_eps",
            "attention_bias": "attention_bias",
            "parallel": "use_parallel_residual",
        },
        defaults={
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "attention_bias": True,
            "use_parallel_residual": True,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000.0,
        },
        weights={
            "embed": "gpt_neox.embed_in",
            "final_norm": "gpt_neox.final_layer_norm",
            "lm_head": "embed_out",
            "layers.{i}.attention_norm": "gpt_neox.layers.{i}.input_layernorm",
            "layers.{i}.attention.q": "gpt_neox.layers.{i}.attention.query_key_value",
            "layers.{i}.attention.k": "gpt_neox.layers.{i}.attention.query_key_value",
            "layers.{i}.attention.v": "gpt_neox.layers.{i}.attention.query_key_value",
            "layers.{i}.attention.o": "gpt_neox.layers.{i}.attention.dense",
            "layers.{i}.mlp_norm": "gpt_neox.layers.{i}.post_attention_layernorm",
            "layers.{i}.mlp.up": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
            "layers.{i}.mlp.down": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
        },
        by_head=True,
        renamed=((r"^lm_head\.", "embed_out."), (r".*\.attention\.(masked_)?bias$", None)),
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        fixed={
            "rope": None,
            "norm": "layer",
            "gated": False,
            "attention_bias": True,
            "mlp_bias": True,
        },
        fields={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_layers": "n_layer",
            "num_heads": "n_head",
            "num_kv_heads": None,
            "head_dim": None,
            "max_position": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "activation": "activation_function",
        },
        defaults={
            "n_inner": None,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
        },
        expected={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        weights={
            "embed": "transformer.wte",
            "positions": "transformer.wpe",
            "final_norm": "transformer.ln_f",
            "lm_head": "lm_head",
            "layers.{i}.attention_norm": "transformer.h.{i}.ln_1",
            "layers.{i}.attention.q": "transformer.h.{i}.attn.c_attn",
            "layers.{i}.attention.k": "transformer.h.{i}.attn.c_attn",
            "layers.{i}.attention.v": "transformer.h.{i}.attn.c_attn",
            "layers.{i}.attention.o": "transformer.h.{i}.attn.c_proj",
            "layers.{i}.mlp_norm": "transformer.h.{i}.ln_2",
            "layers.{i}.mlp.up": "transformer.h.{i}.mlp.c_fc",
            "layers.{i}.mlp.down": "transformer.h.{i}.mlp.c_proj",
        },
        transposed=(".c_attn", ".c_proj", ".c_fc"),
        renamed=(
            (r"^(?=(wte|wpe|ln_f|h)\.)", "transformer."),
            (r".*\.attn\.(masked_)?bias$", None),
        ),
    ),
    "phi": Family(
        "PhiForCausalLM",
        fixed={
            "norm": "layer",
            "norms": "shared",
            "parallel": True,
            "gated": False,
            "attention_bias": True,
            "mlp_bias": True,
            "head_bias": True,
        },
        fields={"norm_eps": "layer_norm_eps"},
        defaults={
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
        },
        expected={"qk_layernorm": (False,), "tie_word_embeddings": (False,)},
        weights={
            **_WEIGHTS,
            "final_norm": "model.final_layernorm",
            "layers.{i}.attention.o": "model.layers.{i}.self_attn.dense",
            "layers.{i}.mlp.up": "model.layers.{i}.mlp.fc1",
            "layers.{i}.mlp.down": "model.layers.{i}.mlp.fc2",
        },
    ),
}
_MULTIMODAL = {"gemma3": "gemma3_text"}  # of these the text model is read

_ACTIVATIONS = {  # names of config.json, and those of LMConfig
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
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
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; expected a Hugging Face model folder")
    try:
        return lm_config(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def lm_config(config: Json) -> LMConfig:
    """The decoder's shape from the content of a `config.json`; see `read_config`."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES and model_type not in _MULTIMODAL:
        known = sorted([*FAMILIES, *_MULTIMODAL])
        raise ValueError(f"model_type {model_type!r} is not supported; known: {known}")
    if config.get("quantization_config"):
        raise ValueError("quantization_config: quantized weights are not supported")
    try:
        if model_type in _MULTIMODAL:
            config, model_type = config["text_config"], _MULTIMODAL[model_type]
        return _read(model_type, config)
    except KeyError as error:
        raise ValueError(f"field {error} is missing") from error


def hf_config(config: LMConfig) -> dict[str, Any]:
    """The `config.json` content, in transformers 5's form, that reads back as `config`."""
    family = FAMILIES[config.model_type]
    content: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.model_type,
    }
    content |= {name: getattr(config, field) for field, name in family.all_fields.items()}
    content |= {name: values[0] for name, values in family.expected.items()}
    if family.slides is not None:
        content["sliding_window"] = config.window or None
    if family.layer_types:
        local = config.local or (False,) * config.num_layers
        content["layer_types"] = [
            "sliding_attention" if each else "full_attention" for each in local
        ]
    if config.rope is not None:
        content["rope_parameters"] = _rope_parameters(config.rope)
        if _partial(family.defaults) in family.defaults:  # transformers knows a share here
            content["rope_parameters"]["partial_rotary_factor"] = config.rope.rotated
        if config.rope.kind == "longrope":
            original = config.rope.original_max_position
            content["original_max_position_embeddings"] = original
            content["max_position_embeddings"] = round(original * config.rope.factor)
    if config.local_rope is not None:
        content["rope_parameters"] = {
            "full_attention": content["rope_parameters"],
            "sliding_attention": _rope_parameters(config.local_rope),
        }
    return content


def checkpoint_name(family: Family, name: str) -> str | None:
    """What a stored weight is called in the family's table; None if the decoder has no use for it.

    Buffers of old checkpoints are of no use either: they follow from the config.
    """
    for pattern, replacement in (*family.renamed, (r".*\.rotary_emb\.inv_freq$", None)):
        if re.search(pattern, name):
            if replacement is None:
                return None
            name = re.sub(pattern, replacement, name, count=1)
    return name


def _read(model_type: str, config: Json) -> LMConfig:
    family = FAMILIES[model_type]
    config = {**family.all_defaults, **config}
    for name, known in family.expected.items():
        if name in config and config[name] not in known:
            raise ValueError(
                f"{name} {config[name]!r} is not supported in the {model_type} family; expected "
                f"{known[0]!r}"
            )
    values: dict[str, Any] = {field: config[name] for field, name in family.all_fields.items()}
    num_heads = values["num_heads"]
    num_kv_heads = values.get("num_kv_heads") or num_heads
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide among {num_kv_heads} key heads")
    values["num_kv_heads"] = num_kv_heads
    values["head_dim"] = values.get("head_dim") or values["hidden_size"] // num_heads
    values["intermediate_size"] = values["intermediate_size"] or 4 * values["hidden_size"]
    if (activation := values.get("activation")) is not None:
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"{family.all_fields['activation']} {activation!r} is not supported; known: "
                f"{', '.join(_ACTIVATIONS)}"
            )
        values["activation"] = _ACTIVATIONS[activation]
    values |= _windows(family, config, values["num_layers"])
    if "rope" not in family.fixed:
        values |= _ropes(config, values["head_dim"])
        if values["rope"].kind == "longrope":
            values["max_position"] = values["rope"].original_max_position
    return LMConfig(model_type=model_type, **{**values, **family.fixed})


def _windows(family: Family, config: Json, num_layers: int) -> dict[str, Any]:
    if family.slides is None or config["sliding_window"] is None:
        return {}
    types = config.get("layer_types") if family.layer_types else None
    if types is None:
        local = tuple(family.slides(config, layer) for layer in range(num_layers))
    else:
        kinds = ("full_attention", "sliding_attention")
        if len(types) != num_layers or set(types) - set(kinds):
            raise ValueError(f"layer_types {types}: expected {num_layers}, each one of {kinds}")
        local = tuple(each == "sliding_attention" for each in types)
    return {"window": config["sliding_window"], "local": local} if any(local) else {}


def _ropes(config: Json, head_dim: int) -> dict[str, RopeConfig]:
    # transformers 5 keeps everything in `rope_parameters`, for each type of layer where they
    # differ; 4 has the base and the share at the top and the rest in `rope_scaling`.
    new, scaling = (config.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    top = {
        "rope_theta": config.get("rotary_emb_base", config["rope_theta"]),
        "partial_rotary_factor": config.get(_partial(config), 1.0),
    }
    if "rope_local_base_freq" not in config:
        return {"rope": _rope({**top, **scaling, **new}, config, head_dim)}
    full, sliding = (new.get(kind) or {} for kind in ("full_attention", "sliding_attention"))
    local = {"rope_theta": config["rope_local_base_freq"]}
    return {
        "rope": _rope({**top, **scaling, **full}, config, head_dim),
        "local_rope": _rope({**top, **local, **sliding}, config, head_dim),
    }


def _partial(config: Json) -> str:
    """The field with the share of a head that is rotated, in families where it can be a part."""
    return "rotary_pct" if "rotary_pct" in config else "partial_rotary_factor"


def _rope(rope: Json, config: Json, head_dim: int) -> RopeConfig:
    kind = rope.get("rope_type", rope.get("type", "default"))  # `type` in old configs
    kind = "longrope" if kind == "su" else kind
    base = RopeConfig(
        theta=float(rope["rope_theta"]), kind=kind, rotated=float(rope["partial_rotary_factor"])
    )
    if kind == "default":
        return base
    if kind == "linear":
        return dataclasses.replace(base, factor=float(rope["factor"]))
    if kind == "llama3":
        return dataclasses.replace(
            base,
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_position=int(rope["original_max_position_embeddings"]),
        )
    if kind == "yarn":
        factor = float(rope["factor"])
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        return dataclasses.replace(
            base,
            factor=factor,
            original_max_position=int(original),
            attention_factor=_yarn_attention_factor(rope, factor),
            beta_fast=float(rope.get("beta_fast") or 32),
            beta_slow=float(rope.get("beta_slow") or 1),
            truncate=bool(rope.get("truncate", True)),
        )
    if kind == "longrope":
        original = int(
            config.get("original_max_position_embeddings")
            or rope["original_max_position_embeddings"]
        )
        factor = float(rope.get("factor") or config["max_position_embeddings"] / original)
        grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        short, long = (tuple(map(float, rope[f"{n}_factor"])) for n in ("short", "long"))
        pairs = int(head_dim * base.rotated) // 2
        if {len(short), len(long)} != {pairs}:
            raise ValueError(
                f"short_factor and long_factor have {len(short)} and {len(long)} values; a head "
                f"has {pairs} rotary pairs"
            )
        return dataclasses.replace(
            base,
            factor=factor,
            original_max_position=original,
            attention_factor=float(rope.get("attention_factor") or grown),
            short_factors=short,
            long_factors=long,
        )
    raise ValueError(
        f"rope_type {kind!r} is not supported; known: default, linear, llama3, yarn, longrope"
    )


def _yarn_attention_factor(rope: Json, factor: float) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1.0)


def _rope_parameters(rope: RopeConfig) -> dict[str, Any]:
    content: dict[str, Any] = {
        "rope_type": rope.kind,
        "rope_theta": rope.theta,
    }
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
    if rope.kind == "longrope":
        content["short_factor"] = list(rope.short_factors)
        content["long_factor"] = list(rope.long_factors)
    return content
