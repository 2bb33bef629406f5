"""What a model family's Hugging Face folders say, and how they differ from Llama's."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from t3jax.lm.config import LMConfig

Json = Mapping[str, Any]

# What to do with a model of a known type that differs in something.
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
        fixed: Fields of `LMConfig` that hold for the whole family; those of its experts are
            `experts.NAME`, those of its delta nets `delta.NAME`.
        fields: Further fields of `LMConfig`, or the same under other names of `config.json`; None
            removes one.
        defaults: What `config.json` means where it is silent.
        expected: Fields of `config.json` that must have one of these values, if they are there.
        aliases: Other names of fields of `config.json`.
        slides: `(config.json, layer) -> bool`: which layers have the sliding window where
            `layer_types` is silent; None where the family has no windows.
        window: The field with the width of the window.
        layer_types: Whether `config.json` may say of each layer if it has the window.
        local_theta: Base of the rotary positions of local layers where `config.json` is silent, and
            has no field for it; None where it has one, or these layers have no rotation of their
            own.
        unrotated: `(config.json, layer, local) -> bool`: which layers leave queries and keys as
            they are; None where all rotate them.
        dense: `(config.json, layer) -> bool`: which layers have an MLP and no experts; None where
            none has.
        interleaved: Rotary pairs are neighbours in a head.
        reciprocal: Fields of `config.json` whose reciprocal is the field of `LMConfig`.
        ropes: Kinds of rotary positions that transformers knows in the family.
        qk_norm: What norms queries and keys have where `use_qk_norm` is true.
        prepare: `config.json -> config.json`: fields that only this family has, as those of the
            table; None where there are none.
        restore: `LMConfig -> config.json`: fields beside those of the table; None likewise.
        mscales: "longrope" has its factors of cosine and sine stated, `short_mscale` and
            `long_mscale`, and its own original context counts before that at the top.
        weights: The decoder's parameters, and their modules in a checkpoint; {i} is the layer.
            Parameters of one module are stacked in it, in this order. A parameter that is there by
            its whole name stands in a tensor of just that name.
        constants: Numbers that folders hold beside the weights, the same in every model; they are
            written and not read.
        expert_names: The gate, up and down matrix of an expert, where folders have a tensor of
            each; None where they have those of a layer in one tensor, or no experts.
        more_layers: Folders may hold layers after the last one, which predict further tokens and
            are not read.
        grouped: Modules, by the end of their name, that are stacked group by group, such as head by
            head, and the field of `LMConfig` with the number of groups.
        by_row: The gate and up matrices of experts are stacked row by row, in turn.
        channelwise: Modules, by the end of their name, that are stored [out, 1, in].
        in_row: Vectors, by the end of their name, that are stored [1, out].
        transposed: Modules, or tensors of that whole name, by its end, that are stored [in, out].
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
        both = {**FIELDS, **self.fields}
        return {field: name for field, name in both.items() if name is not None}

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
    """Takes the fields whose names begin with a prefix out of `values`, and names them without."""
    names = [name for name in values if name.startswith(prefix)]
    return {name.removeprefix(prefix): values.pop(name) for name in names}
