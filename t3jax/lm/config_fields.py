"""The fields of a `config.json` that are read, with their types and ranges."""

import functools
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta

from t3jax.json_files import check_json, show_json
from t3jax.lm.families import FAMILIES
from t3jax.lm.family import Family, Json
from t3jax.lm.rope_json import Positive, Share, Theta, Tokens

Width = Annotated[int, Meta(ge=1, le=1 << 22)]
Count = Annotated[int, Meta(ge=1, le=1 << 16)]
Layers = Annotated[int, Meta(ge=1, le=1024)]
Epsilon = Annotated[float, Meta(ge=1e-20, le=0.1)]

# Null counts as absent if the family's default is null or the field is one of `_NULLABLE`.
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
    **dict.fromkeys(("global_head_dim", "num_global_key_value_heads", "top_k_experts"), Count),
    **dict.fromkeys(("attention_k_eq_v", "use_double_wide_mlp", "enable_moe_block"), bool),
    "num_kv_shared_layers": Annotated[int, Meta(ge=0, le=1024)],
    "hidden_size_per_layer_input": Annotated[int, Meta(ge=0, le=1 << 22)],
    "vocab_size_per_layer_input": Annotated[int, Meta(ge=1, le=1 << 24)],
    "conv_L_cache": Annotated[int, Meta(ge=1, le=64)],
    "full_attn_idxs": list[int],
    "num_dense_layers": Annotated[int, Meta(ge=0, le=1024)],
    "block_auto_adjust_ff_dim": bool,
    "block_ffn_dim_multiplier": Positive,
    "block_multiple_of": Width,
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


def rename_aliases(family: Family, config: Json) -> dict[str, Any]:
    """The config with aliases replaced by the family's names."""
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
def _make_schema(model_type: str) -> type[msgspec.Struct]:
    """A type with the fields that are read, all of them optional."""
    defaults = FAMILIES[model_type].all_defaults
    fields: list[tuple[str, Any, Any]] = []
    for name, kind in _TYPES.items():
        nullable = name in _NULLABLE or (name in defaults and defaults[name] is None)
        if name == "head_dim":  # null counts as absent, unless the default is a number
            nullable = defaults.get(name) is None
        if name == "hidden_activation":  # transformers ignores Gemma 1's
            nullable = name not in FAMILIES[model_type].all_fields.values()
        fields.append((name, kind | None if nullable else kind, UNSET))
    return msgspec.defstruct(model_type, fields)


def check_fields(model_type: str, config: Json) -> dict[str, Any]:
    """Checks types and ranges; returns the config with its numbers in the expected types."""
    fields = {name: config[name] for name in _TYPES if name in config}
    try:
        checked = check_json(fields, model_type, _make_schema(model_type))
    except ValueError as error:
        raise ValueError(str(error).removeprefix(f"{model_type}: ")) from None
    return {**config, **{name: getattr(checked, name) for name in fields}}
