"""The model families with layer norms, a row each: how their folders differ from Llama's."""

from typing import Any

from t3jax.lm.family import WEIGHTS, Family, slides_but_every_last

_COHERE: dict[str, Any] = {
    "fixed": {"norm": "layer", "norm_bias": False, "norms": "shared", "parallel": True},
    "fields": {
        "norm_eps": "layer_norm_eps",
        "attention_bias": "attention_bias",
        "logit_scale": "logit_scale",
        "head_dim": None,
    },
    "defaults": {
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "tie_word_embeddings": True,
    },
    "interleaved": True,
}

LAYER_NORM_FAMILIES: dict[str, Family] = {
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
            **WEIGHTS,
            "final_norm": "model.final_layernorm",
            "layers.{i}.attention.o": "model.layers.{i}.self_attn.dense",
            "layers.{i}.mlp.up": "model.layers.{i}.mlp.fc1",
            "layers.{i}.mlp.down": "model.layers.{i}.mlp.fc2",
        },
    ),
    "stablelm": Family(
        "StableLmForCausalLM",
        fixed={"norm": "layer"},
        fields={"norm_eps": "layer_norm_eps", "qkv_bias": "use_qkv_bias"},
        defaults={
            "num_key_value_heads": 32,
            "layer_norm_eps": 1e-5,
            "use_qkv_bias": False,
            "partial_rotary_factor": 0.25,
        },
        expected={"qk_layernorm": (False,), "use_parallel_residual": (False,)},
    ),
    "starcoder2": Family(
        "Starcoder2ForCausalLM",
        fixed={"norm": "layer", "gated": False},
        fields={
            "norm_eps": "norm_epsilon",
            "attention_bias": "use_bias",
            "mlp_bias": "use_bias",
        },
        defaults={
            "num_key_value_heads": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "norm_epsilon": 1e-5,
            "use_bias": True,
            "tie_word_embeddings": True,
            "sliding_window": None,
        },
        slides=lambda config, layer: True,
        weights={
            **WEIGHTS,
            "layers.{i}.mlp.up": "model.layers.{i}.mlp.c_fc",
            "layers.{i}.mlp.down": "model.layers.{i}.mlp.c_proj",
        },
    ),
    "cohere": Family(
        "CohereForCausalLM",
        **{**_COHERE, "defaults": {**_COHERE["defaults"], "rope_theta": 5e5}},
        expected={"use_qk_norm": (False,)},
    ),
    "cohere2": Family(
        "Cohere2ForCausalLM",
        **{
            **_COHERE,
            "defaults": {
                **_COHERE["defaults"],
                "sliding_window": 4096,
                "sliding_window_pattern": 4,
            },
        },
        slides=slides_but_every_last,
        layer_types=True,
        unrotated=lambda config, layer, local: not local,
    ),
}
