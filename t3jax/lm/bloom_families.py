"""The model families of 2022 and 2023 with ALiBi, a row each, and Falcon, made like Bloom."""

from typing import Any

from t3jax.lm.config import LMConfig
from t3jax.lm.family import WAY_OUT, Family, Json


def _prepare_falcon(config: Json) -> dict[str, Any]:
    """In both older forms of a layer one norm serves attention and MLP; 40B and 180B have two."""
    norms = config["num_ln_in_parallel_attn"]
    if config["new_decoder_architecture"]:
        norms = 2 if norms is None else norms
        heads = config["num_kv_heads"]
    else:
        norms = 1
        heads = 1 if config["multi_query"] else config["num_attention_heads"]
    if norms != 1:
        raise ValueError(
            f"num_ln_in_parallel_attn {norms!r} is not supported in the falcon family; expected 1, "
            f"as in Falcon 7B and 11B. {WAY_OUT}"
        )
    return {**config, "num_kv_heads": heads, "num_ln_in_parallel_attn": norms}


def _restore_falcon(config: LMConfig) -> dict[str, Any]:
    return {"new_decoder_architecture": True, "multi_query": False}


_IN_MPT_ATTENTION = (
    *("alibi", "alibi_bias_max", "attn_type", "clip_qkv", "prefix_lm", "qk_ln", "softmax_scale"),
)


def _prepare_mpt(config: Json) -> dict[str, Any]:
    attention = config["attn_config"] or {}
    return {**config, **{k: v for k, v in attention.items() if k in _IN_MPT_ATTENTION}}


def _restore_mpt(config: LMConfig) -> dict[str, Any]:
    scale = config.attention_multiplier
    return {"attn_config": {"clip_qkv": config.qkv_clip, "softmax_scale": scale}}


_LAYER = "transformer.h.{i}"
_BLOOM_WEIGHTS = {
    "embed": "transformer.word_embeddings",
    "embedding_norm": "transformer.word_embeddings_layernorm",
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "layers.{i}.attention_norm": f"{_LAYER}.input_layernorm",
    "layers.{i}.attention.q": f"{_LAYER}.self_attention.query_key_value",
    "layers.{i}.attention.k": f"{_LAYER}.self_attention.query_key_value",
    "layers.{i}.attention.v": f"{_LAYER}.self_attention.query_key_value",
    "layers.{i}.attention.o": f"{_LAYER}.self_attention.dense",
    "layers.{i}.mlp_norm": f"{_LAYER}.post_attention_layernorm",
    "layers.{i}.mlp.up": f"{_LAYER}.mlp.dense_h_to_4h",
    "layers.{i}.mlp.down": f"{_LAYER}.mlp.dense_4h_to_h",
}


BLOOM_FAMILIES: dict[str, Family] = {
    "falcon": Family(
        "FalconForCausalLM",
        fixed={"norm": "layer", "norms": "shared", "parallel": True, "gated": False},
        fields={
            "intermediate_size": "ffn_hidden_size",
            "num_kv_heads": "num_kv_heads",
            "head_dim": None,
            "norm_eps": "layer_norm_epsilon",
            "activation": "activation",
            "attention_bias": "bias",
            "mlp_bias": "bias",
        },
        defaults={
            "num_kv_heads": None,
            "max_position_embeddings": 2048,
            "layer_norm_epsilon": 1e-5,
            "ffn_hidden_size": None,
            "activation": "gelu",
            "bias": False,
            "tie_word_embeddings": True,
            "new_decoder_architecture": False,
            "multi_query": True,
            "num_ln_in_parallel_attn": None,
        },
        expected={
            "alibi": (False,),
            "parallel_attn": (True,),
            "num_ln_in_parallel_attn": (1,),
        },
        aliases={"n_embed": "hidden_size"},
        prepare=_prepare_falcon,
        restore=_restore_falcon,
        weights=_BLOOM_WEIGHTS,
        grouped={"query_key_value": "num_kv_heads"},
    ),
    "bloom": Family(
        "BloomForCausalLM",
        fixed={
            "rope": None,
            "alibi": True,
            "norm": "layer",
            "embedding_norm": True,
            "gated": False,
            "activation": "gelu_pytorch_tanh",
            "attention_bias": True,
            "mlp_bias": True,
        },
        fields={
            "intermediate_size": None,
            "num_layers": "n_layer",
            "num_heads": "n_head",
            "num_kv_heads": None,
            "head_dim": None,
            "max_position": "seq_length",
            "norm_eps": "layer_norm_epsilon",
            "activation": None,
        },
        defaults={"seq_length": 2048, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        expected={"apply_residual_connection_post_layernorm": (False,)},
        aliases={
            "n_embed": "hidden_size",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
        },
        weights=_BLOOM_WEIGHTS,
        grouped={"query_key_value": "num_kv_heads"},
        renamed=((r"^(?=(word_embeddings(_layernorm)?|ln_f|h)\.)", "transformer."),),
    ),
    "mpt": Family(
        "MptForCausalLM",
        fixed={
            "rope": None,
            "alibi": True,
            "norm": "layer",
            "norm_bias": False,
            "gated": False,
            "activation": "gelu",
        },
        fields={
            "hidden_size": "d_model",
            "intermediate_size": None,
            "num_layers": "n_layers",
            "num_heads": "n_heads",
            "num_kv_heads": None,
            "head_dim": None,
            "max_position": "max_seq_len",
            "norm_eps": "layer_norm_epsilon",
            "activation": None,
            "qkv_clip": "clip_qkv",
            "attention_multiplier": "softmax_scale",
        },
        defaults={
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "attn_config": None,
            "clip_qkv": None,
            "logit_scale": None,
            "softmax_scale": None,
        },
        expected={
            "alibi": (True,),
            "alibi_bias_max": (8,),  # transformers' class takes 8 whatever it is told
            "attn_type": ("multihead_attention",),
            "prefix_lm": (False,),
            "qk_ln": (False,),
            "expansion_ratio": (4,),
            "no_bias": (True,),
            "logit_scale": (None,),
        },
        aliases={
            "hidden_size": "d_model",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
        },
        prepare=_prepare_mpt,
        restore=_restore_mpt,
        weights={
            "embed": "transformer.wte",
            "final_norm": "transformer.norm_f",
            "lm_head": "lm_head",
            "layers.{i}.attention_norm": "transformer.blocks.{i}.norm_1",
            "layers.{i}.attention.q": "transformer.blocks.{i}.attn.Wqkv",
            "layers.{i}.attention.k": "transformer.blocks.{i}.attn.Wqkv",
            "layers.{i}.attention.v": "transformer.blocks.{i}.attn.Wqkv",
            "layers.{i}.attention.o": "transformer.blocks.{i}.attn.out_proj",
            "layers.{i}.mlp_norm": "transformer.blocks.{i}.norm_2",
            "layers.{i}.mlp.up": "transformer.blocks.{i}.ffn.up_proj",
            "layers.{i}.mlp.down": "transformer.blocks.{i}.ffn.down_proj",
        },
    ),
}
