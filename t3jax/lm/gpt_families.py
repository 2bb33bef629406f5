"""The model families of GPT's kind, a row each: layer norms, and MLPs without a gate."""

from typing import Any

from t3jax.lm.config import LMConfig
from t3jax.lm.family import Family, Json


def _slides_in_gpt_neo(config: Json, layer: int) -> bool:
    """An entry of `attention_types` is a list of kinds of layers, and how often it repeats."""
    entries = config["attention_types"] or [(["global", "local"], 12)]
    kinds = [kind for group, times in entries for _ in range(times) for kind in group]
    if len(kinds) != config["num_layers"] or set(kinds) - {"global", "local"}:
        raise ValueError(
            f"attention_types {entries}: expected {config['num_layers']} layers, each of them "
            "global or local"
        )
    return kinds[layer] == "local"


def _prepare_gptj(config: Json) -> dict[str, Any]:
    head_dim, rotated = config["n_embd"] // config["n_head"], config["rotary_dim"]
    if rotated > head_dim:
        raise ValueError(
            f"rotary_dim {rotated} is not supported, since a head has {head_dim} numbers"
        )
    return {**config, "partial_rotary_factor": rotated / head_dim}


def _restore_gptj(config: LMConfig) -> dict[str, Any]:
    assert config.rope is not None
    return {"rotary_dim": int(config.head_dim * config.rope.rotated)}


_OF_GPT2: dict[str, str | None] = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "num_kv_heads": None,
    "head_dim": None,
    "max_position": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "activation": "activation_function",
}
_GPT2_WEIGHTS = {
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
}
_ALIASES_OF_GPT2 = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


GPT_FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        fixed={
            "rope": None,
            "norm": "layer",
            "gated": False,
            "attention_bias": True,
            "mlp_bias": True,
        },
        fields=_OF_GPT2,
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
        aliases=_ALIASES_OF_GPT2,
        weights=_GPT2_WEIGHTS,
        transposed=(".c_attn", ".c_proj", ".c_fc"),
        renamed=(
            (r"^(?=(wte|wpe|ln_f|h)\.)", "transformer."),
            (r".*\.attn\.(masked_)?bias$", None),
        ),
    ),
    "gpt_neo": Family(
        "GPTNeoForCausalLM",
        fixed={
            "rope": None,
            "norm": "layer",
            "gated": False,
            "o_bias": True,
            "mlp_bias": True,
            "attention_multiplier": 1.0,
        },
        fields={
            "num_layers": "num_layers",
            "num_heads": "num_heads",
            "num_kv_heads": None,
            "head_dim": None,
            "norm_eps": "layer_norm_epsilon",
            "activation": "activation_function",
        },
        defaults={
            "intermediate_size": None,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
            "window_size": 256,
            "attention_types": None,
        },
        aliases={"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"},
        slides=_slides_in_gpt_neo,
        window="window_size",
        weights={
            "embed": "transformer.wte",
            "positions": "transformer.wpe",
            "final_norm": "transformer.ln_f",
            "lm_head": "lm_head",
            "layers.{i}.attention_norm": "transformer.h.{i}.ln_1",
            "layers.{i}.attention.q": "transformer.h.{i}.attn.attention.q_proj",
            "layers.{i}.attention.k": "transformer.h.{i}.attn.attention.k_proj",
            "layers.{i}.attention.v": "transformer.h.{i}.attn.attention.v_proj",
            "layers.{i}.attention.o": "transformer.h.{i}.attn.attention.out_proj",
            "layers.{i}.mlp_norm": "transformer.h.{i}.ln_2",
            "layers.{i}.mlp.up": "transformer.h.{i}.mlp.c_fc",
            "layers.{i}.mlp.down": "transformer.h.{i}.mlp.c_proj",
        },
        renamed=((r".*\.attn\.attention\.(masked_)?bias$", None),),
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
        grouped={"query_key_value": "num_heads"},
        renamed=((r"^lm_head\.", "embed_out."), (r".*\.attention\.(masked_)?bias$", None)),
    ),
    "opt": Family(
        "OPTForCausalLM",
        fixed={
            "rope": None,
            "first_position": 2,
            "norm": "layer",
            "norm_eps": 1e-5,
            "gated": False,
            "attention_bias": True,
            "mlp_bias": True,
        },
        fields={
            "intermediate_size": "ffn_dim",
            "num_kv_heads": None,
            "head_dim": None,
            "norm_eps": None,
            "activation": "activation_function",
        },
        defaults={"activation_function": "relu", "tie_word_embeddings": True},
        expected={
            "do_layer_norm_before": (True,),  # OPT 350M norms after, and projects its embeddings
            "_remove_final_layer_norm": (False,),
            "enable_bias": (True,),
            "layer_norm_elementwise_affine": (True,),
        },
        weights={
            "embed": "model.decoder.embed_tokens",
            "positions": "model.decoder.embed_positions",
            "final_norm": "model.decoder.final_layer_norm",
            "lm_head": "lm_head",
            "layers.{i}.attention_norm": "model.decoder.layers.{i}.self_attn_layer_norm",
            "layers.{i}.attention.q": "model.decoder.layers.{i}.self_attn.q_proj",
            "layers.{i}.attention.k": "model.decoder.layers.{i}.self_attn.k_proj",
            "layers.{i}.attention.v": "model.decoder.layers.{i}.self_attn.v_proj",
            "layers.{i}.attention.o": "model.decoder.layers.{i}.self_attn.out_proj",
            "layers.{i}.mlp_norm": "model.decoder.layers.{i}.final_layer_norm",
            "layers.{i}.mlp.up": "model.decoder.layers.{i}.fc1",
            "layers.{i}.mlp.down": "model.decoder.layers.{i}.fc2",
        },
        renamed=((r"^decoder\.", "model.decoder."),),
    ),
    "gptj": Family(
        "GPTJForCausalLM",
        fixed={
            "norm": "layer",
            "norms": "shared",
            "parallel": True,
            "gated": False,
            "mlp_bias": True,
            "head_bias": True,
        },
        fields=_OF_GPT2,
        defaults={
            "n_inner": None,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "rotary_dim": 64,
            "partial_rotary_factor": 1.0,
        },
        expected={"rope_theta": (10000.0,), "tie_word_embeddings": (False,)},
        aliases=_ALIASES_OF_GPT2,
        prepare=_prepare_gptj,
        restore=_restore_gptj,
        interleaved=True,
        ropes=("default",),
        weights={
            "embed": "transformer.wte",
            "final_norm": "transformer.ln_f",
            "lm_head": "lm_head",
            "layers.{i}.attention_norm": "transformer.h.{i}.ln_1",
            "layers.{i}.attention.q": "transformer.h.{i}.attn.q_proj",
            "layers.{i}.attention.k": "transformer.h.{i}.attn.k_proj",
            "layers.{i}.attention.v": "transformer.h.{i}.attn.v_proj",
            "layers.{i}.attention.o": "transformer.h.{i}.attn.out_proj",
            "layers.{i}.mlp.up": "transformer.h.{i}.mlp.fc_in",
            "layers.{i}.mlp.down": "transformer.h.{i}.mlp.fc_out",
        },
        renamed=((r".*\.attn\.(masked_)?bias$", None),),
    ),
    "gpt_bigcode": Family(
        "GPTBigCodeForCausalLM",
        fixed={
            "rope": None,
            "norm": "layer",
            "gated": False,
            "num_kv_heads": 1,
            "attention_bias": True,
            "mlp_bias": True,
        },
        fields=_OF_GPT2,
        defaults={
            "n_inner": None,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
        },
        expected={
            "multi_query": (True,),
            "scale_attn_weights": (True,),
            "add_cross_attention": (False,),
        },
        aliases=_ALIASES_OF_GPT2,
        weights=_GPT2_WEIGHTS,
        renamed=((r".*\.attn\.bias$", None),),
    ),
}
