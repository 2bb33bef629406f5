"""A row of the table of families, and what rows share."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from t3jax.lm.config import LMConfig

Json = Mapping[str, Any]

# The advice for a model of a known type with an unsupported value.
WAY_OUT = (
    "Take a model without it, or give this one as functions (t3jax.make_lm, docs/your_model.md)"
)

FIELDS = {  # of LMConfig, and of config.json
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
DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 10000.0,
}
ROPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")

WEIGHTS = {
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
QK_NORMS = {
    "layers.{i}.attention.q_norm": "model.layers.{i}.self_attn.q_norm",
    "layers.{i}.attention.k_norm": "model.layers.{i}.self_attn.k_norm",
}
GRANITE_SCALES = {  # of LMConfig, and of config.json
    "embedding_multiplier": "embedding_multiplier",
    "residual_multiplier": "residual_multiplier",
    "attention_multiplier": "attention_multiplier",
    "logit_scale": "logits_scaling",
}
EXPERTS = {
    "layers.{i}.experts.router": "model.layers.{i}.mlp.gate",
    "layers.{i}.experts.gate.weight": "model.layers.{i}.mlp.experts.gate_up_proj",
    "layers.{i}.experts.up.weight": "model.layers.{i}.mlp.experts.gate_up_proj",
    "layers.{i}.experts.down.weight": "model.layers.{i}.mlp.experts.down_proj",
}
FUSED_MLP = {
    "layers.{i}.mlp.gate": "model.layers.{i}.mlp.gate_up_proj",
    "layers.{i}.mlp.up": "model.layers.{i}.mlp.gate_up_proj",
}
POST_NORMS = {
    "layers.{i}.attention_post_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A family's Hugging Face folders; the defaults are Llama's.

    Attributes:
        architecture: The class of transformers.
        fixed: Fields of `LMConfig` with the same value in the whole family; `experts.NAME` and
            `delta.NAME` are fields of its experts and delta nets.
        fields: Further fields of `LMConfig` by name, with their names in `config.json`; None
            removes one of Llama's.
        defaults: Values of fields that `config.json` lacks.
        expected: Fields of `config.json` and their supported values.
        aliases: Other names of fields of `config.json`.
        slides: `(config.json, layer) -> bool`: which layers have the sliding window if there are no
            `layer_types`; None if the family has no windows.
        window: The field with the width of the window.
        layer_types: Whether `config.json` may list which layers have the window.
        local_theta: Base of the rotary positions of local layers, if no field of `config.json` has
            it; None if one has, or if these layers have the rotation of the others.
        unrotated: `(config.json, layer, local) -> bool`: which layers do not rotate queries and
            keys; None if all do.
        dense: `(config.json, layer) -> bool`: which layers have an MLP and no experts; None if
            none has.
        interleaved: Rotary pairs are neighbours in a head.
        reciprocal: Fields of `config.json` whose reciprocal is the field of `LMConfig`.
        ropes: Kinds of rotary positions that transformers knows in the family.
        qk_norm: The kind of norm of queries and keys if `use_qk_norm` is true.
        prepare: `config.json -> config.json`: converts fields that only this family has to those of
            the table; None if it has none.
        restore: `LMConfig -> config.json`: fields beside those of the table; None if it has none.
        mscales: "longrope" states its factors of cosine and sine, `short_mscale` and `long_mscale`,
            and its own original context takes precedence over the one at the top.
        weights: The decoder's parameters, and their modules in a checkpoint; {i} is the layer.
            Parameters of one module are stacked in it, in this order. A parameter with its whole
            name as the key is in the tensor of the given name.
        constants: Numbers beside the weights, the same in every model; written and not read.
        expert_names: The gate, up and down matrix of an expert, if folders have a tensor for each;
            None if a layer's are in one tensor, or if there are no experts.
        more_layers: Folders may hold layers after the last one, which predict further tokens and
            are not read.
        grouped: Modules, by the end of their name, that are stacked group by group, such as head by
            head, and the field of `LMConfig` with the number of groups.
        by_row: The gate and up matrices of experts are stacked row by row, in turn.
        channelwise: Modules, by the end of their name, that are stored [out, 1, in].
        in_row: Vectors, by the end of their name, that are stored [1, out].
        transposed: Modules or tensors, by the end of their name, that are stored [in, out].
        renamed: Patterns of other names in checkpoints, and their replacements; None: a weight of
            that name is no part of the decoder.
    """

    architecture: str
    fixed: Json = dataclasses.field(default_factory=dict)
    fields: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    defaults: Json = dataclasses.field(default_factory=dict)
    expected: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    slides: Callable[[Json, int], bool] | None = None
    window: str = "sliding_window"
    layer_types: bool = False
    local_theta: float | None = None
    unrotated: Callable[[Json, int, bool], bool] | None = None
    dense: Callable[[Json, int], bool] | None = None
    interleaved: bool = False
    reciprocal: tuple[str, ...] = ()
    ropes: tuple[str, ...] = ROPES
    qk_norm: str = "head"
    prepare: Callable[[Json], Json] | None = None
    restore: Callable[[LMConfig], Json] | None = None
    mscales: bool = False
    weights: Mapping[str, str] = dataclasses.field(default_factory=lambda: WEIGHTS)
    constants: Mapping[str, float] = dataclasses.field(default_factory=dict)
    expert_names: tuple[str, str, str] | None = None
    more_layers: bool = False
    grouped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    by_row: bool = False
    channelwise: tuple[str, ...] = ()
    in_row: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str | None], ...] = ()

    @property
    def all_fields(self) -> dict[str, str]:
        """Fields of `LMConfig` and their names in `config.json`, Llama's and the family's own."""
        fields = {**FIELDS, **self.fields}
        return {field: name for field, name in fields.items() if name is not None}

    @property
    def all_defaults(self) -> dict[str, Any]:
        """Llama's and the family's own."""
        return {**DEFAULTS, **self.defaults}


def slides_but_every_last(config: Json, layer: int) -> bool:
    """All layers but the last of each `sliding_window_pattern` have the window."""
    pattern = config["sliding_window_pattern"]
    if not isinstance(pattern, int) or not pattern:
        raise ValueError(
            f"sliding_window_pattern is {pattern!r}, expected a number >= 1, or layer_types"
        )
    return (layer + 1) % pattern != 0


def take_section(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Removes the fields with a prefix from `values`, and returns them without the prefix."""
    names = [name for name in values if name.startswith(prefix)]
    return {name.removeprefix(prefix): values.pop(name) for name in names}
