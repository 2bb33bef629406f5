"""Model families: what each one's Hugging Face folder says, as a table of differences.

A `Family` says where the fields of `LMConfig` stand in `config.json`, which of them hold for the
whole family, and under which names the decoder's weights are stored. One table serves reading and
writing. `config.json` is read in the forms of transformers 4 and 5 and written in that of 5. What a
config asks for and the decoder does not implement is refused by name.
"""

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta

from t3jax.json_files import check_json, read_json, show_json
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
# What every family expects of these fields, if they are there: transformers obeys them.
_EXPECTED: dict[str, tuple] = {
    "is_causal": (True,),
    "is_encoder_decoder": (False, None),
    "per_layer_config": (None, {}),
    "attention_chunk_size": (None,),
    "kv_sharing_modes": (None,),
    "transformers_weights": (None,),
}
_NEEDED = {  # by each kind of rotary positions
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
_ROPES = ("default", *_NEEDED)

Width = Annotated[int, Meta(ge=1, le=1 << 22)]
Count = Annotated[int, Meta(ge=1, le=1 << 16)]
Tokens = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
Epsilon = Annotated[float, Meta(ge=1e-20, le=0.1)]
Theta = Annotated[float, Meta(gt=1, le=1e15)]
Share = Annotated[float, Meta(gt=0, le=1)]
Stretch = Annotated[float, Meta(gt=0, le=1e6)]
Positive = Annotated[float, Meta(gt=0, le=1e6)]

# Types and ranges of the fields that are read. Null is as if the field was not there, where the
# family's default is null or the field is one of `_NULLABLE`.
_TYPES: dict[str, Any] = {
    "vocab_size": Annotated[int, Meta(ge=1, le=1 << 24)],
    **dict.fromkeys(("hidden_size", "n_embd", "intermediate_size", "n_inner"), Width),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), Annotated[int, Meta(ge=1, le=1024)]),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "head_dim"), Count),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), Tokens),
    **dict.fromkeys(("original_max_position_embeddings", "sliding_window"), Tokens),
    "sliding_window_pattern": Count,
    "max_window_layers": Annotated[int, Meta(ge=0)],
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), Epsilon),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), bool),
    **dict.fromkeys(("use_parallel_residual", "use_sliding_window"), bool),
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), str),
    "query_pre_attn_scalar": Width,
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), Positive),
    **dict.fromkeys(("rope_theta", "rotary_emb_base", "rope_local_base_freq"), Theta),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), Share),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), dict[str, Any]),
    "layer_types": list[str],
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
)


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
    short_factor: list[Stretch] | None = None
    long_factor: list[Stretch] | None = None


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
        aliases: Other names of fields of `config.json`.
        slides: `(config.json, layer) -> bool`: which layers have the sliding window where
            `layer_types` is silent; None where the family has no windows.
        layer_types: Whether `config.json` may say of each layer if it has the window.
        ropes: Kinds of rotary positions that transformers knows in the family.
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
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    slides: Callable[[Json, int], bool] | None = None
    layer_types: bool = False
    ropes: tuple[str, ...] = _ROPES
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


def _slides_in_qwen(config: Json, layer: int) -> bool:
    return layer >= config["max_window_layers"]


_QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
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
        defaults={"num_key_value_heads": 32, **_QWEN_WINDOWS},
        slides=_slides_in_qwen,
        layer_types=True,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        fixed={"qk_norm": "head"},
        fields={"attention_bias": "attention_bias"},
        defaults={"num_key_value_heads": 32, "head_dim": 128, **_QWEN_WINDOWS},
        slides=_slides_in_qwen,
        layer_types=True,
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
        ropes=("default", "longrope"),
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
        aliases={
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
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
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; expected a Hugging Face model folder")
    content = read_json(path, dict[str, Any])
    try:
        return lm_config(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def lm_config(config: Json) -> LMConfig:
    """The decoder's shape from the content of a `config.json`; see `read_config`."""
    model_type = config.get("model_type")
    if model_type not in [*FAMILIES, *_MULTIMODAL]:
        known = sorted([*FAMILIES, *_MULTIMODAL])
        raise ValueError(f"model_type {model_type!r} is not supported; known: {known}")
    if config.get("quantization_config"):
        raise ValueError("quantization_config: quantized weights are not supported")
    try:
        if model_type in _MULTIMODAL:
            model_type = _MULTIMODAL[model_type]
            config = _text_config(config, model_type)
        return _read(model_type, config)
    except KeyError as error:
        raise ValueError(f"field {error} is missing") from error


def _text_config(config: Json, model_type: str) -> Json:
    """The part of a multimodal config for the text model, as transformers' class uses it."""
    text = config["text_config"]
    if not isinstance(text, Mapping) or text.get("model_type", model_type) != model_type:
        raise ValueError(f"text_config is {show_json(text)}, expected an object for {model_type}")
    if text.get("final_logit_softcapping") is not None:
        raise ValueError(
            "text_config.final_logit_softcapping is "
            f"{show_json(text['final_logit_softcapping'])}, expected null: the multimodal class of "
            "transformers leaves the cap out"
        )
    return {**text, "tie_word_embeddings": config.get("tie_word_embeddings", True)}


def hf_config(config: LMConfig) -> dict[str, Any]:
    """The `config.json` content, in transformers 5's form, that reads back as `config`."""
    family = FAMILIES[config.model_type]
    content: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.model_type,
    }
    content |= {name: getattr(config, field) for field, name in family.all_fields.items()}
    content |= {name: values[0] for name, values in family.expected.items()}
    if family.slides is not None and (config.window or not family.layer_types):
        content["sliding_window"] = config.window or None
    if "use_sliding_window" in family.defaults:
        content["use_sliding_window"] = bool(config.window)
    if family.layer_types:
        local = config.local or (False,) * config.num_layers
        content["layer_types"] = [
            "sliding_attention" if each else "full_attention" for each in local
        ]
    if config.rope is not None:
        content["rope_parameters"] = _rope_parameters(config.rope)
        if _partial(family) is not None:  # transformers knows a share here
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
    config = {**family.all_defaults, **_checked(model_type, _without_aliases(family, config))}
    for name, known in {**_EXPECTED, **family.expected}.items():
        if name in config and config[name] not in known:
            raise ValueError(
                f"{name} {config[name]!r} is not supported in the {model_type} family; expected "
                f"{known[0]!r}"
            )
    values: dict[str, Any] = {field: config[name] for field, name in family.all_fields.items()}
    num_heads, hidden_size = values["num_heads"], values["hidden_size"]
    num_kv_heads = values.get("num_kv_heads") or num_heads
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide among {num_kv_heads} key heads")
    values["num_kv_heads"] = num_kv_heads
    values["head_dim"] = _head_dim(family, config, hidden_size, num_heads)
    values["intermediate_size"] = values["intermediate_size"] or 4 * hidden_size
    if (activation := values.get("activation")) is not None:
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"{family.all_fields['activation']} {activation!r} is not supported; known: "
                f"{', '.join(_ACTIVATIONS)}"
            )
        values["activation"] = _ACTIVATIONS[activation]
    values |= _windows(family, config, values["num_layers"], values["max_position"])
    if "rope" not in family.fixed:
        values |= _ropes(family, config, values["head_dim"])
        if values["rope"].kind == "longrope":
            values["max_position"] = values["rope"].original_max_position
    return LMConfig(model_type=model_type, **{**values, **family.fixed})


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
    window = config.get("sliding_window")
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


def _ropes(family: Family, config: Json, head_dim: int) -> dict[str, RopeConfig]:
    # transformers 5 keeps everything in `rope_parameters`, for each type of layer where they
    # differ; 4 has the base and the share at the top and the rest in `rope_scaling`. Where both are
    # there, `rope_scaling` counts, as in transformers.
    new, scaling = (config.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    base = "rotary_emb_base" if "rotary_emb_base" in family.defaults else "rope_theta"
    share = _partial(family)
    top = {
        "rope_theta": config[base],
        "partial_rotary_factor": config.get(share or "partial_rotary_factor", 1.0),
    }
    if "rope_local_base_freq" not in family.defaults:
        if nested := [name for name, value in new.items() if isinstance(value, Mapping)]:
            raise ValueError(
                f"rope_parameters.{nested[0]} is an object, but this family has the same rotary "
                "settings in all layers"
            )
        return {"rope": _rope(family, {**top, **(scaling or new)}, config, head_dim)}
    kinds = ("full_attention", "sliding_attention")
    if other := [name for name in new if name not in kinds]:
        raise ValueError(
            f"rope_parameters.{other[0]} stands outside of a type of layer; expected {kinds}"
        )
    full, sliding = (_layer_rope(new, kind) for kind in kinds)
    if "type" in scaling and "rope_type" not in scaling:
        raise ValueError(
            f"rope_scaling has type {scaling['type']!r} but no rope_type, which transformers takes "
            "for none in this family; expected rope_type"
        )
    local = {"rope_theta": config["rope_local_base_freq"]}
    return {
        "rope": _rope(family, {**top, **full, **scaling}, config, head_dim),
        "local_rope": _rope(family, {**top, **local, **sliding}, config, head_dim),
    }


def _layer_rope(ropes: Json, kind: str) -> Json:
    rope = ropes.get(kind) or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters.{kind} is {show_json(rope)}, expected an object")
    return rope


def _partial(family: Family) -> str | None:
    """The field with the share of a head that is rotated; None where it is always the whole."""
    names = ("rotary_pct", "partial_rotary_factor")
    return next((name for name in names if name in family.defaults), None)


def _rope(family: Family, stated: Json, config: Json, head_dim: int) -> RopeConfig:
    kind = stated.get("rope_type", stated.get("type", "default"))  # `type` in old configs
    if kind == "su" and "llama3" not in family.ropes:  # Phi-3's first name for it
        kind = "longrope"
    if kind not in family.ropes:
        raise ValueError(
            f"rope_type {kind!r} is not supported in this family; known: {', '.join(family.ropes)}"
        )
    try:
        rope = check_json({**stated, "rope_type": kind}, "rope", _Rope)
    except ValueError as error:
        raise ValueError(f"rotary settings: {str(error).removeprefix('rope: ')}") from None
    rotated = rope.partial_rotary_factor
    if _partial(family) is None and rotated not in (None, 1):
        raise ValueError(
            f"partial_rotary_factor {rotated} is not supported in this family; expected 1.0, since "
            "the whole of a head is rotated"
        )
    if rotated is None and _partial(family) is not None:
        raise ValueError("partial_rotary_factor is null, expected a number")
    base = RopeConfig(theta=rope.rope_theta, kind=kind, rotated=rotated or 1.0)
    if (width := int(head_dim * base.rotated)) % 2 or not width:
        raise ValueError(
            f"{width} of a head's {head_dim} numbers are rotated; expected an even number of them"
        )
    if kind == "default":
        return base
    original = (
        config.get("original_max_position_embeddings")
        or rope.original_max_position_embeddings
        or config["max_position_embeddings"]
    )
    factor = rope.factor
    if factor is None and (kind == "longrope" or (kind == "yarn" and "factor" in stated)):
        factor = config["max_position_embeddings"] / original
    for name in _NEEDED[kind]:
        if getattr(rope, name) is None and not (name == "factor" and factor):
            raise KeyError(name)
    base = dataclasses.replace(base, factor=float(factor or 1.0))
    if kind in ("linear", "dynamic"):
        return base
    base = dataclasses.replace(base, original_max_position=original)
    if kind == "llama3":
        return _llama3(rope, base)
    return _yarn(rope, base) if kind == "yarn" else _longrope(rope, base, width // 2)


def _llama3(rope: _Rope, base: RopeConfig) -> RopeConfig:
    low, high = rope.low_freq_factor, rope.high_freq_factor
    assert low is not None
    assert high is not None
    if high <= low:
        raise ValueError(f"high_freq_factor {high} is not above low_freq_factor {low}")
    return dataclasses.replace(base, low_freq_factor=low, high_freq_factor=high)


def _yarn(rope: _Rope, base: RopeConfig) -> RopeConfig:
    fast, slow = rope.beta_fast or 32.0, rope.beta_slow or 1.0
    return dataclasses.replace(
        base,
        attention_factor=_yarn_attention_factor(rope, base.factor),
        beta_fast=fast,
        beta_slow=slow,
        truncate=rope.truncate,
    )


def _longrope(rope: _Rope, base: RopeConfig, pairs: int) -> RopeConfig:
    factor, original = base.factor, base.original_max_position
    grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (tuple(each or ()) for each in (rope.short_factor, rope.long_factor))
    if {len(short), len(long)} != {pairs}:
        raise ValueError(
            f"short_factor and long_factor have {len(short)} and {len(long)} values; a head "
            f"has {pairs} rotary pairs"
        )
    return dataclasses.replace(
        base,
        attention_factor=rope.attention_factor or grown,
        short_factors=short,
        long_factors=long,
    )


def _yarn_attention_factor(rope: _Rope, factor: float) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
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
