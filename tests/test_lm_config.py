"""`config.json` in the forms of transformers 4 and 5, and everything that is refused."""

import copy
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest
import transformers

from t3jax.lm import (
    ConvConfig,
    ExpertsConfig,
    HeadsConfig,
    LMConfig,
    RopeConfig,
    lm_config,
    read_config,
)
from t3jax.lm.cache import init_cache
from t3jax.lm.config_writing import hf_config
from t3jax.lm.decoder import abstract_params
from t3jax.lm.families import FAMILIES
from t3jax.lm.wrappers import checkpoint_name

SHAPE = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
EXPECTED = LMConfig(
    model_type="llama",
    vocab_size=100,
    hidden_size=32,
    intermediate_size=64,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=4,
    max_position=512,
    norm_eps=1e-6,
    rope=RopeConfig(theta=10000.0),
    tied=True,
)
LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3_READ = RopeConfig(500000.0, "llama3", 32.0, 1.0, 4.0, 8192)
LINEAR_READ = RopeConfig(10000.0, "linear", 4.0)


def without(*names):
    return {name: value for name, value in SHAPE.items() if name not in names}


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        # transformers 4
        ({"rope_theta": 500000.0, "rope_scaling": None}, RopeConfig(500000.0)),
        ({"rope_theta": 500000, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, LLAMA3_READ),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, LINEAR_READ),
        ({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}}, LINEAR_READ),
        ({}, RopeConfig(10000.0)),
        # transformers 5
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, RopeConfig(500000.0)),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
            LLAMA3_READ,
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
            LINEAR_READ,
        ),
        ({"rope_parameters": None, "rope_theta": 7.0}, RopeConfig(7.0)),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            RopeConfig(1e4, "dynamic", 2.0),
        ),
        # Both: what stands in `rope_parameters` is forgotten, its base too.
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            },
            LINEAR_READ,
        ),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {}}, RopeConfig(5e5)),
        # Fields of other families.
        ({"rotary_pct": 0.25, "rotary_emb_base": 7.0, "rope_local_base_freq": 9.0}, RopeConfig()),
    ],
)
def test_rotary_settings(rope, expected):
    assert lm_config(SHAPE | rope) == dataclasses.replace(EXPECTED, rope=expected)


@pytest.mark.parametrize("dtype", [{"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}])
def test_the_dtype_on_disk_is_no_part_of_the_shape(dtype):
    assert lm_config(SHAPE | dtype) == EXPECTED


def test_fields_that_may_be_left_out():
    plain = lm_config(without("num_key_value_heads", "hidden_act", "tie_word_embeddings"))
    assert plain == dataclasses.replace(EXPECTED, num_kv_heads=8, tied=False)
    assert lm_config(SHAPE | {"num_key_value_heads": None}).num_kv_heads == 8
    assert lm_config(SHAPE | {"head_dim": None}).head_dim == 4
    assert lm_config(SHAPE | {"head_dim": 16}).head_dim == 16
    biased = lm_config(SHAPE | {"attention_bias": True, "mlp_bias": True})
    assert biased.attention_bias
    assert biased.mlp_bias


@pytest.mark.parametrize("rope", [RopeConfig(5e5), LINEAR_READ, LLAMA3_READ])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_reads_back(tmp_path, rope, tied):
    config = dataclasses.replace(EXPECTED, rope=rope, tied=tied, attention_bias=True, head_dim=6)
    assert lm_config(hf_config(config)) == config
    # By way of transformers, which fills in and rearranges what it likes.
    transformers.LlamaConfig(**hf_config(config)).save_pretrained(tmp_path)
    assert read_config(tmp_path) == config


# As folders of these models say it, in the form of transformers 4, cut down to size.
COMMON = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e5,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5, 2, 3], "long_factor": [2, 4, 6, 8]}
GPT2 = {
    "vocab_size": 100,
    "n_embd": 32,
    "n_layer": 6,
    "n_head": 4,
    "n_positions": 512,
    "n_ctx": 512,
}
SLIDING = {"window": 16, "local": (True,) * 6}
EVERY_SECOND = {"window": 16, "local": (True, False) * 3}
FAMILY_CONFIGS = {
    "mistral": (
        {"num_key_value_heads": 2, "hidden_act": "silu", "sliding_window": 16},
        {"num_kv_heads": 2, **SLIDING},
    ),
    "mistral without a window": (
        {"num_key_value_heads": 4, "sliding_window": None},
        {"window": 0, "local": ()},
    ),
    "qwen2": (
        {
            "num_key_value_heads": 4,
            "use_sliding_window": False,
            "sliding_window": 16,
            "max_window_layers": 2,
        },
        {"qkv_bias": True, "attention_bias": False, "tied": False},
    ),
    "qwen3": (
        {"num_key_value_heads": 2},
        {"head_dim": 128, "qk_norm": "head", "attention_bias": False},
    ),
    "phi3": (
        {"sliding_window": 16, "num_key_value_heads": 4, "rope_scaling": None},
        {"rope": RopeConfig(5e5), **SLIDING},
    ),
    "phi3 with longrope": (
        {"rope_scaling": LONGROPE, "original_max_position_embeddings": 64},
        {
            "max_position": 64,
            "window": 0,
            "rope": RopeConfig(
                5e5,
                "longrope",
                8.0,
                original_max_position=64,
                attention_factor=math.sqrt(1.5),  # log 8 / log 64 = 1 / 2
                short_factors=(1.0, 1.5, 2.0, 3.0),
                long_factors=(2.0, 4.0, 6.0, 8.0),
            ),
        },
    ),
    "phi3 with a share rotated": (
        {"partial_rotary_factor": 0.5},
        {"rope": RopeConfig(5e5, rotated=0.5)},
    ),
    "gemma": (
        {"num_key_value_heads": 1, "hidden_act": "gelu", "hidden_activation": None},
        {"activation": "gelu_pytorch_tanh", "head_dim": 256, "tied": True, "norm": "rms_offset"},
    ),
    "gemma2": (
        {"num_key_value_heads": 2, "query_pre_attn_scalar": 224, "sliding_window": 16},
        {
            "query_pre_attn_scalar": 224,
            "attention_softcap": 50.0,
            "logit_softcap": 30.0,
            **EVERY_SECOND,
        },
    ),
    "gemma3_text": (
        {
            "num_key_value_heads": 1,
            "sliding_window": 16,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "attn_logit_softcapping": None,
            "cache_implementation": "hybrid",
        },
        {
            "rope": RopeConfig(5e5, "linear", 8.0),
            "local_rope": RopeConfig(1e4),
            "window": 16,
            "local": (True,) * 5 + (False,),
            "attention_softcap": None,
            "logit_softcap": None,
        },
    ),
    "gemma4_text": (  # as in 26B-A4B, but for the keys of the last layers
        {
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "final_logit_softcapping": 30.0,
            "global_head_dim": 16,
            "head_dim": 8,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size_per_layer_input": 0,
            "layer_types": ["sliding_attention"] * 2 + ["full_attention", "sliding_attention"] * 2,
            "moe_intermediate_size": 24,
            "num_experts": 8,
            "num_global_key_value_heads": 1,
            "num_key_value_heads": 2,
            "num_kv_shared_layers": 2,
            "rope_parameters": {
                "full_attention": {
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 1000000.0,
                    "rope_type": "proportional",
                },
                "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
            },
            "sliding_window": 16,
            "top_k_experts": 2,
            "use_bidirectional_attention": "vision",
            "use_double_wide_mlp": True,
            "vocab_size_per_layer_input": 262144,
        },
        {
            "whole_heads": HeadsConfig(1, 16, values_are_keys=True),
            "borrows": (False,) * 4 + (True,) * 2,
            "borrowing_size": 128,
            "local": (True, True, False, True, False, False),  # the last one never is
            "rope": RopeConfig(1e6, "proportional", rotated=0.25),
            "local_rope": RopeConfig(1e4),
            "layer_inputs": 0,
            "logit_softcap": 30.0,
            "experts": ExpertsConfig(8, 2, 24, normed=True, scaled=True, beside=True),
        },
    ),
    "gemma4_text without what it may leave out": (  # as in E2B
        {
            "hidden_size_per_layer_input": 4,
            "num_key_value_heads": 1,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": 100,
        },
        {
            "head_dim": 256,
            "whole_heads": HeadsConfig(1, 512),
            "borrows": (),
            "local": (True,) * 5 + (False,),
            "window": 512,
            "rope": RopeConfig(1e6, "proportional", rotated=0.25),
            "layer_inputs": 4,
            "experts": None,
            "tied": True,
        },
    ),
    "olmo2": ({"attention_bias": False}, {"norms": "post", "qk_norm": "width", "num_kv_heads": 4}),
    "olmo3": (
        {
            "num_key_value_heads": 4,
            "sliding_window": 16,
            "rope_scaling": {**YARN, "attention_factor": 1.25, "beta_fast": 32, "beta_slow": 1},
        },
        {
            "norms": "post",
            "rope": RopeConfig(5e5, "yarn", 4.0, original_max_position=128, attention_factor=1.25),
            "local_rope": RopeConfig(5e5),
            "window": 16,
            "local": (True, True, True, False, True, True),
        },
    ),
    "smollm3": (
        {
            "num_key_value_heads": 2,
            "no_rope_layers": [1, 1, 1, 0, 1, 1],
            "no_rope_layer_interval": 4,
            "layer_types": ["full_attention"] * 6,
            "use_sliding_window": False,
            "sliding_window": None,
            "attention_bias": False,
            "mlp_bias": False,
        },
        {"unrotated": (False, False, False, True, False, False), "window": 0, "tied": True},
    ),
    "smollm3 by its interval": (
        {"no_rope_layer_interval": 3},
        {"unrotated": (False, False, True) * 2, "num_kv_heads": 4},
    ),
    "granite": (
        {
            "num_key_value_heads": 2,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.015625,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.015625,
            "logit_scale": 0.125,
        },
    ),
    "glm": (
        {"head_dim": 16, "attention_bias": True, "partial_rotary_factor": 0.5},
        {
            "num_kv_heads": 2,
            "qkv_bias": True,
            "attention_bias": False,
            "rope": RopeConfig(5e5, rotated=0.5, interleaved=True),
        },
    ),
    "glm4": (
        {"partial_rotary_factor": 0.5, "head_dim": 128},
        {"norms": "both", "rope": RopeConfig(5e5, rotated=0.5, interleaved=True)},
    ),
    "ernie4_5": (
        {"head_dim": 128, "use_bias": False, "num_key_value_heads": 2},
        {"tied": True, "mlp_bias": False, "rope": RopeConfig(5e5, interleaved=True)},
    ),
    "helium": (
        {"head_dim": 8, "num_key_value_heads": 4},
        {"qkv_bias": False, "rope": RopeConfig(5e5, interleaved=True)},
    ),
    "exaone4": (
        {
            "num_key_value_heads": 2,
            "sliding_window": 16,
            "sliding_window_pattern": "LLG",
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        },
        {
            "local": (True, True, False) * 2,
            "unrotated": (False, False, True) * 2,
            "qk_norm": "head",
            "norms": "post",
        },
    ),
    "exaone4 without a window": (
        {
            "num_key_value_heads": 2,
            "sliding_window": None,
            "sliding_window_pattern": None,
            "layer_types": ["full_attention"] * 6,
        },
        {"local": (), "unrotated": ()},
    ),
    "seed_oss": (
        {"num_key_value_heads": 2, "attention_bias": True, "attention_out_bias": False},
        {"qkv_bias": True, "attention_bias": False, "o_bias": False, "head_dim": 128},
    ),
    "arcee": (
        {"num_key_value_heads": 2, "hidden_act": "relu2"},
        {"gated": False, "activation": "relu2"},
    ),
    "cwm": (
        {"num_key_value_heads": 2, "sliding_window": 16, "rope_scaling": YARN},
        {
            "rope": RopeConfig(
                5e5, "yarn", 4.0, original_max_position=128, attention_factor=0.1 * math.log(4) + 1
            ),
            "local": (False, True, True, True, False, True),
        },
    ),
    "ministral": (
        {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16},
        {"window": 16, "local": (True,) * 6},
    ),
    "ministral3": (
        {
            "num_key_value_heads": 2,
            "rope_parameters": {
                **YARN,
                "rope_theta": 1e6,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        {
            "max_position": 512,
            "rope": RopeConfig(1e6, "yarn", 4.0, original_max_position=128, query_growth=0.1),
        },
    ),
    "nemotron": (
        {"num_key_value_heads": 2, "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
        {"norm": "layer_offset", "gated": False, "activation": "relu2"},
    ),
    "opt": (
        {"ffn_dim": 64, "do_layer_norm_before": True, "word_embed_proj_dim": 32},
        {"rope": None, "first_position": 2, "norm_eps": 1e-5, "activation": "relu", "tied": True},
    ),
    "stablelm": (
        {"num_key_value_heads": 4, "layer_norm_eps": 1e-5, "use_qkv_bias": True},
        {"norm": "layer", "gated": True, "qkv_bias": True, "rope": RopeConfig(5e5, rotated=0.25)},
    ),
    "starcoder2": (
        {"norm_epsilon": 1e-5, "use_bias": True, "sliding_window": 16, "norm_type": "layer_norm"},
        {"norm": "layer", "gated": False, "attention_bias": True, "tied": True, **SLIDING},
    ),
    "cohere": (
        {"num_key_value_heads": 4, "logit_scale": 0.25, "use_qk_norm": False},
        {
            "norm_bias": False,
            "logit_scale": 0.25,
            "parallel": True,
            "rope": RopeConfig(5e5, interleaved=True),
        },
    ),
    "cohere2": (
        {"num_key_value_heads": 2, "logit_scale": 0.25, "sliding_window": 16},
        {
            "local": (True, True, True, False, True, True),
            "unrotated": (False, False, False, True, False, False),
        },
    ),
    "qwen3_moe": (
        {
            "head_dim": 128,
            "num_key_value_heads": 2,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": 48,
        },
        {
            "qk_norm": "head",
            "head_dim": 128,
            "experts": ExpertsConfig(8, 2, 24, normed=True),
            "local": (),
        },
    ),
    "qwen3_moe with MLPs in some layers": (
        {
            "num_key_value_heads": 4,
            "num_local_experts": 8,  # as transformers 5 writes it
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
        },
        {"experts": ExpertsConfig(8, 2, 768, dense=(True, True, True, False, True, False))},
    ),
    "mixtral": (
        {
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "router_aux_loss_coef": 0.02,
            "output_router_logits": False,
        },
        {"experts": ExpertsConfig(8, 2, 64, normed=True), "num_kv_heads": 2, "local": ()},
    ),
    "olmoe": (
        {
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "clip_qkv": 8.0,
            "attention_bias": False,
        },
        {"experts": ExpertsConfig(8, 4, 64), "qkv_clip": 8.0, "qk_norm": "width"},
    ),
    "qwen2_moe": (
        {
            "num_key_value_heads": 4,
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 96,
            "norm_topk_prob": False,
            "use_sliding_window": False,
            "sliding_window": 16,
            "max_window_layers": 21,
        },
        {
            "experts": ExpertsConfig(8, 4, 24, shared=96, shared_gate=True),
            "qkv_bias": True,
            "local": (),
        },
    ),
    "granitemoe": (
        {
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 4,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.015625,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
        {
            "experts": ExpertsConfig(8, 4, 64, normed=True),
            "attention_multiplier": 0.015625,
            "logit_scale": 0.125,
        },
    ),
    "gpt_oss": (
        {
            "attention_bias": True,
            "experts_per_token": 4,
            "head_dim": 64,
            "hidden_act": "silu",
            "initial_context_length": 4096,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_experts_per_tok": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 32,
            "quantization_config": {
                "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
                "quant_method": "mxfp4",
            },
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "truncate": False,
            },
            "sliding_window": 16,
            "swiglu_limit": 7.0,
            "tie_word_embeddings": False,
        },
        {
            "activation": "quick_gelu",
            "attention_bias": True,
            "sinks": True,
            "rope": RopeConfig(
                5e5,
                "yarn",
                32.0,
                original_max_position=4096,
                attention_factor=0.1 * math.log(32) + 1,
                truncate=False,
            ),
            "experts": ExpertsConfig(32, 4, 64, normed=True, bias=True, clamp=7.0),
            **EVERY_SECOND,
        },
    ),
    "gpt_oss without what it may leave out": (
        {"num_key_value_heads": 2},
        {
            "tied": False,
            "head_dim": 64,
            "window": 128,
            "local": (True, False) * 3,
            "experts": ExpertsConfig(128, 4, 64, normed=True, bias=True, clamp=7.0),
        },
    ),
    "dots1": (
        {
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 24,
            "n_group": 1,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "norm_topk_prob": True,
            "num_experts_per_tok": 4,
            "routed_scaling_factor": 2.5,
            "scoring_func": "noaux_tc",
            "sliding_window": None,
            "topk_group": 1,
        },
        {
            "qk_norm": "head",
            "local": (),
            "experts": ExpertsConfig(
                8,
                4,
                24,
                router="sigmoid",
                normed=True,
                scale=2.5,
                shared=48,
                dense=(True, *[False] * 5),
            ),
        },
    ),
    "ernie4_5_moe": (
        {
            "num_key_value_heads": 2,
            "moe_capacity": [8, 8, 8],
            "moe_gate": "topk",
            "moe_intermediate_size": 24,
            "moe_k": 6,
            "moe_layer_end_index": 5,
            "moe_layer_interval": 1,
            "moe_layer_start_index": 1,
            "moe_num_experts": 8,
            "moe_num_shared_experts": 2,
            "moe_use_aux_free": True,
            "num_nextn_predict_layers": 1,
            "tie_word_embeddings": True,
            "use_bias": False,
        },
        {
            "tied": True,
            "rope": RopeConfig(5e5, interleaved=True),
            "experts": ExpertsConfig(
                8,
                6,
                24,
                router="softmax_corrected",
                normed=True,
                shared=48,
                dense=(True, *[False] * 5),
            ),
        },
    ),
    "ernie4_5_moe with experts in every second layer and none shared": (
        {
            "num_key_value_heads": 2,
            "moe_layer_interval": 2,
            "moe_layer_end_index": 4,
            "moe_num_shared_experts": 0,
        },
        {
            "tied": True,
            "experts": ExpertsConfig(
                64,
                6,
                1536,
                router="softmax_corrected",
                normed=True,
                dense=(True, False, True, False, True, True),
            ),
        },
    ),
    "minimax_m2": (
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 4,
            "qk_norm_type": "per_layer",
            "rotary_dim": 8,
            "scoring_func": "sigmoid",
            "shared_intermediate_size": 0,
            "use_mtp": True,
            "use_qk_norm": True,
            "use_routing_bias": True,
        },
        {
            "qk_norm": "width",
            "rope": RopeConfig(5e5, rotated=0.5),
            "experts": ExpertsConfig(8, 4, 64, router="sigmoid", normed=True),
        },
    ),
    "vaultgemma": (
        {"num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 16},
        {"norms": "pre", "attention_softcap": 50.0, "scaled_embedding": True, **EVERY_SECOND},
    ),
    "apertus": (
        {
            "num_key_value_heads": 2,
            "hidden_act": "xielu",
            "mlp_bias": False,
            "post_norm": False,
            "qk_norm": True,
            "rope_theta": 12000000,
            "rope_scaling": LLAMA3 | {"rope_type": "llama3"},
        },
        {
            "activation": "xielu",
            "gated": False,
            "qk_norm": "head",
            "rope": RopeConfig(12e6, "llama3", 32.0, 1.0, 4.0, 8192),
        },
    ),
    "hunyuan_v1_dense": (
        {
            "num_key_value_heads": 2,
            "head_dim": 6,
            "use_qk_norm": True,
            "rope_theta": 10000.0,
            "rope_scaling": {
                "alpha": 16.0,
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "type": "dynamic",
            },
        },
        {"qk_norm": "head", "qk_norm_after": True, "rope": RopeConfig(1e4 * 64)},  # 16^(6/4)
    ),
    "hyperclovax": (
        {
            "num_key_value_heads": 2,
            "embedding_multiplier": 10.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 0.0078125,
            "logits_scaling": 0.125,
            "use_post_norm": True,
        },
        {"norms": "both", "logit_scale": 0.125, "attention_multiplier": 0.0078125},
    ),
    "olmo": (
        {"num_key_value_heads": 4, "clip_qkv": 8.0, "attention_bias": False},
        {"norm": "layer", "norm_weight": False, "norm_bias": False, "qkv_clip": 8.0},
    ),
    "jais2": (
        {"hidden_act": "relu2", "layer_norm_eps": 1e-5, "attention_bias": True, "mlp_bias": True},
        {"norm": "layer", "activation": "relu2", "gated": False, "attention_bias": True},
    ),
    "gptj": (
        GPT2 | {"n_inner": None, "rotary_dim": 4, "activation_function": "gelu_new"},
        {
            "rope": RopeConfig(1e4, rotated=0.5, interleaved=True),
            "head_bias": True,
            "intermediate_size": 128,
        },
    ),
    "gpt_bigcode": (
        GPT2 | {"n_inner": 128, "multi_query": True, "activation_function": "gelu_pytorch_tanh"},
        {"rope": None, "num_kv_heads": 1, "tied": True, "attention_bias": True},
    ),
    "falcon": (
        {
            "alibi": False,
            "bias": False,
            "multi_query": True,
            "new_decoder_architecture": False,
            "num_kv_heads": 4,
            "parallel_attn": True,
        },
        {"num_kv_heads": 1, "intermediate_size": 128, "norms": "shared", "tied": True},
    ),
    "falcon 11B": (
        {
            "bias": False,
            "ffn_hidden_size": 96,
            "multi_query": True,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "tie_word_embeddings": False,
        },
        {"num_kv_heads": 2, "intermediate_size": 96, "tied": False, "parallel": True},
    ),
    "bloom": (
        {
            "vocab_size": 100,
            "hidden_size": 32,
            "n_layer": 6,
            "n_head": 4,
            "seq_length": 512,
            "apply_residual_connection_post_layernorm": False,
            "pretraining_tp": 4,
        },
        {"alibi": True, "rope": None, "embedding_norm": True, "max_position": 512, "tied": True},
    ),
    "mpt": (
        {
            "vocab_size": 100,
            "d_model": 32,
            "n_layers": 6,
            "n_heads": 4,
            "max_seq_len": 512,
            "expansion_ratio": 4,
            "no_bias": True,
            "learned_pos_emb": True,
            "attn_config": {
                "alibi": True,
                "alibi_bias_max": 8,
                "attn_type": "multihead_attention",
                "clip_qkv": 6.0,
                "prefix_lm": False,
                "qk_ln": False,
                "softmax_scale": None,
            },
        },
        {"alibi": True, "qkv_clip": 6.0, "norm_bias": False, "activation": "gelu"},
    ),
    "lfm2": (
        {
            "block_auto_adjust_ff_dim": True,
            "block_ff_dim": 64,
            "block_ffn_dim_multiplier": 1.5,
            "block_multiple_of": 16,
            "conv_L_cache": 3,
            "conv_bias": False,
            "conv_dim": 32,
            "conv_dim_out": 32,
            "conv_use_xavier_init": True,
            "full_attn_idxs": [2, 5],
            "norm_eps": 1e-5,
            "num_key_value_heads": 2,
            "tie_embedding": False,
            "use_pos_enc": True,
        },
        {
            "conv": ConvConfig(32, 3, (True, True, False) * 2),
            "intermediate_size": 64,  # 42 x 1.5 = 63
            "qk_norm": "head",
            "tied": False,
            "norm_eps": 1e-5,
        },
    ),
    "lfm2_moe": (  # as in 8B-A1B
        {
            "conv_L_cache": 3,
            "conv_bias": False,
            "layer_types": ["conv", "conv", "full_attention"] * 2,
            "moe_intermediate_size": 48,
            "norm_eps": 1e-5,
            "norm_topk_prob": True,
            "num_dense_layers": 2,
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "num_key_value_heads": 2,
            "routed_scaling_factor": 1.0,
            "tie_embedding": True,
            "use_expert_bias": True,
        },
        {
            "conv": ConvConfig(32, 3, (True, True, False) * 2),
            "experts": ExpertsConfig(
                8, 4, 48, "sigmoid", normed=True, smoothing=1e-6, dense=(True,) * 2 + (False,) * 4
            ),
            "tied": True,
        },
    ),
    "gemma4_unified_text": (  # as in 12B
        {
            "attention_k_eq_v": True,
            "final_logit_softcapping": 30.0,
            "global_head_dim": 16,
            "head_dim": 8,
            "hidden_size_per_layer_input": 0,
            "num_global_key_value_heads": 1,
            "num_key_value_heads": 2,
            "num_kv_shared_layers": 0,
            "use_bidirectional_attention": "vision",
        },
        {
            "layer_inputs": 0,
            "local": (True,) * 5 + (False,),
            "max_position": 512,
            "whole_heads": HeadsConfig(1, 16, values_are_keys=True),
            "window": 1024,
        },
    ),
    "phimoe": (
        {
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_jitter_noise": 0.02,
            "input_jitter_noise": 0.01,
            "attention_bias": True,
            "lm_head_bias": True,
            "sliding_window": 512,
            "original_max_position_embeddings": 64,
            "rope_scaling": LONGROPE
            | {"short_mscale": 1.25, "long_mscale": 1.5, "original_max_position_embeddings": 64},
        },
        {
            "experts": ExpertsConfig(8, 2, 64, router="sparsemixer", jitter=0.02),
            "norm": "layer",
            "head_bias": True,
            "max_position": 64,
            "rope": RopeConfig(
                5e5,
                "longrope",
                8.0,
                original_max_position=64,
                attention_factor=1.25,
                short_factors=(1.0, 1.5, 2.0, 3.0),
                long_factors=(2.0, 4.0, 6.0, 8.0),
                long_attention_factor=1.5,
            ),
        },
    ),
    "glm4_moe": (
        {
            "head_dim": 16,
            "num_key_value_heads": 2,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 24,
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "first_k_dense_replace": 3,
            "use_qk_norm": True,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
            "num_nextn_predict_layers": 1,
        },
        {
            "experts": ExpertsConfig(
                8,
                4,
                24,
                router="sigmoid",
                normed=True,
                scale=2.5,
                groups=2,
                chosen_groups=1,
                shared=48,
                dense=(True,) * 3 + (False,) * 3,
            ),
            "qk_norm": "head",
            "qkv_bias": True,
            "attention_bias": False,
            "rope": RopeConfig(5e5, rotated=0.5),
        },
    ),
    "gpt_neox": (
        {
            "layer_norm_eps": 1e-5,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000,
            "hidden_act": "gelu",
        },
        {
            "rope": RopeConfig(1e4, rotated=0.25),
            "parallel": True,
            "attention_bias": True,
            "activation": "gelu",
            "tied": False,
            "norm_eps": 1e-5,
        },
    ),
    "gpt_neox in sequence": (
        {"use_parallel_residual": False, "rotary_pct": 1.0},
        {"parallel": False, "rope": RopeConfig(1e4)},
    ),
    "gpt2": (GPT2, {"rope": None, "intermediate_size": 128, "tied": True, "num_kv_heads": 4}),
    "phi": (
        {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "num_key_value_heads": None},
        {
            "rope": RopeConfig(5e5, rotated=0.5),
            "norms": "shared",
            "head_bias": True,
            "activation": "gelu_pytorch_tanh",
        },
    ),
}


def common(said):
    """The fields that a config has besides, unless it has names of its own for them."""
    return {} if {"n_embd", "n_layer", "d_model"} & set(said) else COMMON


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_a_family_is_read_and_written_back(tmp_path, name):
    said, expected = FAMILY_CONFIGS[name]
    model_type = name.split()[0]
    content = {"model_type": model_type, **common(said), **said}
    config = lm_config(content)
    for field, value in expected.items():
        assert getattr(config, field) == value, field
    assert (config.hidden_size, config.num_layers, config.num_heads) == (32, 6, 4)
    assert lm_config(hf_config(config)) == config
    # By way of transformers: what it makes of the old form, and of the one written here.
    for form in (content, hf_config(config)):
        form = {key: value for key, value in form.items() if key != "model_type"}
        bos = 0 if model_type == "cwm" else None  # its class wants a number
        form |= {"pad_token_id": None, "bos_token_id": bos, "eos_token_id": None}
        transformers.AutoConfig.for_model(model_type, **form).save_pretrained(tmp_path)
        assert read_config(tmp_path) == config


def test_a_published_gemma3_config_leaves_out_what_is_as_in_the_4b_model():
    """The text part of a multimodal folder."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = lm_config({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    assert (config.model_type, config.vocab_size, config.head_dim) == ("gemma3_text", 262208, 256)
    assert (config.num_heads, config.num_kv_heads, config.max_position) == (8, 4, 131072)
    assert config.rope == RopeConfig(1e6, "linear", 8.0)
    assert config.local_rope == RopeConfig(1e4)
    assert [i for i, local in enumerate(config.local) if not local] == [5, 11, 17, 23, 29]


def test_a_published_gemma4_config():
    """The text part of E2B, of "effectively" 2.3 billion weights: the table counts for nothing."""
    text = {
        "model_type": "gemma4_text",
        "final_logit_softcapping": 30.0,
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
        "num_hidden_layers": 35,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
    }
    config = lm_config({"model_type": "gemma4", "text_config": text, "vision_config": {}})
    assert config.tied
    assert [config.lender(layer) for layer in (13, 14, 15, 19, 34)] == [None, None, 13, 14, 14]
    assert [config.mlp_size(layer) for layer in (14, 15)] == [6144, 12288]
    assert [config.heads(layer).head_dim for layer in (3, 4)] == [256, 512]
    params = abstract_params(config, jnp.bfloat16)
    assert params.pop("layer_embed")["weight"].shape == (262144, 35 * 256)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == pytest.approx(2.3e9, rel=0.01)
    states = init_cache(dataclasses.replace(config, vocab_size=8), 1, 1, jnp.bfloat16).layers
    assert sum(leaf.size for leaf in jax.tree.leaves(states)) == 2 * (12 * 256 + 3 * 512)


def test_yarn():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    expected = RopeConfig(
        1e4, "yarn", 4.0, original_max_position=128, attention_factor=0.1 * math.log(4) + 1
    )
    assert lm_config(SHAPE | {"rope_scaling": yarn}).rope == expected
    known = yarn | {"attention_factor": 2.0, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}
    config = lm_config(SHAPE | {"rope_scaling": known})
    assert config.rope == dataclasses.replace(
        expected, attention_factor=2.0, beta_fast=16.0, beta_slow=2.0, truncate=False
    )
    assert lm_config(hf_config(config)) == config
    both = lm_config(SHAPE | {"rope_scaling": yarn | {"mscale": 2.0, "mscale_all_dim": 1.0}}).rope
    assert both.attention_factor == (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)


@pytest.mark.parametrize(
    ("model_type", "changed", "message"),
    [
        ("qwen2", {"is_causal": False}, "is_causal False is not supported in the qwen2 family"),
        ("llama", {"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config .*expected None"),
        (
            "llama",
            {"transformers_weights": "x.safetensors"},
            "transformers_weights 'x.safetensors'",
        ),
        ("mistral", {"layer_types": ["full_attention"] * 6}, "layer_types .*not supported"),
        ("llama", {"layer_types": ["sliding_attention"] * 6}, "layer_types .*not supported"),
        ("llama", {"sliding_window": 64}, "sliding_window 64 is not supported in this family"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 6}, "no window .sliding_window, use_"),
        ("gemma2", {"sliding_window": None}, "no window .sliding_window"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "rope_parameters.full_attention is an object",
        ),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear' is not"),
        ("gemma2", {"hidden_activation": None}, "hidden_activation is null, expected a text"),
        ("gemma3_text", {"head_dim": None}, "head_dim is null, expected an integer"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 7.0}}, "outside of a type of layer"),
        ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "expected rope_type"),
        ("gpt_neox", {"head_dim": 16}, "head_dim 16 is not supported in this family; expected 8"),
        ("llama", {"num_attention_heads": 5}, "hidden size of 32 does not divide among 5 heads"),
        ("llama", {"head_dim": 7}, "7 of a head's 7 numbers are rotated; expected an even number"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm True is not supported in the phi family"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types .*: expected 6, each one of"),
        ("gemma3_text", {"layer_types": ["linear_attention"] * 6}, "layer_types .*: expected 6"),
        (
            "gemma4_text",
            {"use_bidirectional_attention": "all"},
            "use_bidirectional_attention 'all'",
        ),
        ("gemma4_text", {"num_kv_shared_layers": 6}, "layer 0 has no keys and values of its own"),
        ("gemma4_text", {"num_kv_shared_layers": 1}, "layer 5 has no keys and values of its own"),
        ("gemma4_text", {"num_kv_shared_layers": -1}, "num_kv_shared_layers is -1, expected"),
        ("gemma4_text", {"per_layer_config": {"0": {"head_dim": 4}}}, "the same for all layers of"),
        ("gemma4_text", {"per_layer_config": {"5": {"skip": ["mlp"]}}}, "and nothing else"),
        ("gemma4_text", {"per_layer_config": {"x": {"head_dim": 4}}}, "and nothing else"),
        ("gemma4_text", {"per_layer_config": {"5": {"head_dim": 0}}}, "expected numbers >= 1"),
        (
            "gemma4_text",
            {"attention_k_eq_v": True, "num_global_key_value_heads": 3},
            "4 query heads do not divide among 3 key heads",
        ),
        (
            "gemma4_text",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "rope_parameters.full_attention is null, expected an object with rope_theta",
        ),
        (
            "gemma4_text",
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e6},
                    "sliding_attention": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
                }
            },
            "rope_parameters.sliding_attention: partial_rotary_factor 0.5 is obeyed with",
        ),
        ("gemma4_text", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        ("gemma4_text", {"vocab_size_per_layer_input": 99}, "99 is less than vocab_size 100"),
        ("gemma4_text", {"enable_moe_block": True}, "num_experts is null, expected a number"),
        ("lfm2", {"conv_bias": True}, "conv_bias True is not supported in the lfm2 family"),
        ("lfm2_moe", {"use_expert_bias": False}, "use_expert_bias False is not supported"),
        (
            "gemma4_unified_text",
            {"hidden_size_per_layer_input": 8},
            "hidden_size_per_layer_input 8 is not supported in the gemma4_unified_text family",
        ),
        ("lfm2", {"layer_types": ["linear_attention"] * 6}, "layer_types .*: expected 6, each"),
        ("mixtral", {"num_local_experts": 1}, "sent to 2 experts, but there are 1"),
        ("mixtral", {"num_experts": 4, "num_local_experts": 8}, "two names of one field"),
        ("qwen3_moe", {"num_experts": 0}, "num_experts is 0, expected an integer >= 1"),
        ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha 1.0 is not supported .* expected 1.702"),
        ("phimoe", {"num_experts_per_tok": 4}, "num_experts_per_tok 4 is not .*; expected 2"),
        (
            "phimoe",
            {"rope_scaling": LONGROPE, "original_max_position_embeddings": 64},
            "field 'short_mscale' is missing",
        ),
        (
            "falcon",
            {"new_decoder_architecture": True},
            "num_ln_in_parallel_attn 2 .*expected 1",
        ),
        ("falcon", {"alibi": True}, "alibi True is not supported in the falcon family"),
        ("falcon", {"parallel_attn": False}, "parallel_attn False is not supported"),
        (
            "gptj",
            {**GPT2, "rotary_dim": 16},
            "rotary_dim 16 is not .*8 numbers",
        ),
        (
            "hunyuan_v1_dense",
            {"rope_scaling": {"type": "dynamic", "alpha": "x", "factor": 1.0}},
            "alpha 'x', expected numbers >= 1",
        ),
        ("glm4_moe", {"n_group": 3}, "128 experts in 3 groups of which 1 are chosen: expected eq"),
        (
            "glm4_moe",
            {"n_group": 32, "topk_group": 1},
            "128 experts in 32 groups, 8 chosen from 1: expected two experts in a group or more",
        ),
        (
            "phi3",
            {"rope_scaling": LONGROPE | {"long_factor": [1.0]}},
            "short_factor and long_factor have 4 and 1 values; a head has 4 rotary pairs",
        ),
    ],
)
def test_what_a_family_does_not_implement_is_refused(model_type, changed, message):
    with pytest.raises(ValueError, match=message):
        lm_config({"model_type": model_type, **COMMON, "num_key_value_heads": None, **changed})
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx True is not supported"):
        lm_config({"model_type": "gpt2", **GPT2, "scale_attn_by_inverse_layer_idx": True})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"model_type": "mamba"},
            'model_type "mamba" is not supported: .* recurrent.*Known types: .*gemma3.*llama.*phi',
        ),
        ({"model_type": None}, "model_type is null, expected the name of a family"),
        ({"hidden_act": "xielu"}, "hidden_act 'xielu' is not supported; known: silu, .*gelu_new"),
        (
            {"quantization_config": {"bits": 4}},
            "weights quantised by .* are not supported; .* dtype=int8",
        ),
        ({"num_key_value_heads": 3}, "8 query heads do not divide among 3 key heads"),
        (
            {"rope_scaling": {"rope_type": "ntk", "factor": 2.0}},
            "rope_type 'ntk' is not supported .*: default, linear, dynamic, llama3, yarn, longrope",
        ),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "'factor' is missing"),
        ({"rope_scaling": LLAMA3 | {"rope_type": "llama3", "high_freq_factor": 1}}, "not above"),
        ({"rope_scaling": {"rope_type": "linear"}}, "field 'factor' is missing"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "field 'low_freq_factor' is missing",
        ),
    ],
)
def test_what_the_decoder_does_not_implement_is_refused(tmp_path, changed, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SHAPE | changed))
    with pytest.raises(ValueError, match=message) as raised:
        read_config(tmp_path)
    assert str(path) in str(raised.value)


ODD_VALUES = [None, 0, -1, 1e30, 10**30, 0.5, 3, True, "x", [], ["x"], {}, {"x": 1}, [[]]]
OTHER_FIELDS = [  # besides the class's own, those of old configs, other families and hybrids
    "rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_emb_base",
    "rope_local_base_freq", "sliding_window", "use_sliding_window", "max_window_layers",
    "layer_types", "sliding_window_pattern", "is_causal", "head_dim", "num_key_value_heads",
    "hidden_activation", "original_max_position_embeddings", "query_pre_attn_scalar",
    "hidden_size", "num_hidden_layers", "num_attention_heads", "attention_bias", "mlp_bias",
]  # fmt: skip
ODD_FIELDS = {
    "rope_scaling": [
        {"type": "linear", "factor": 4},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "llama3", **LLAMA3},
        YARN,
        YARN | {"factor": None, "mscale": 0.7, "mscale_all_dim": 1.0},
        {"rope_type": "default", "rope_theta": 100.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "linear", "factor": "2"},
        {"rope_type": None},
    ],
    "rope_parameters": [
        {"rope_type": "linear", "factor": 4, "rope_theta": 50.0, "partial_rotary_factor": 0.5},
        {"rope_type": "default", "rope_theta": None},
        {"full_attention": {"rope_type": "default", "rope_theta": 100.0}},
        {"sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}},
    ],
    "layer_types": [
        ["full_attention"] * 6,
        ["sliding_attention"] * 6,
        ["full_attention", "sliding_attention"] * 3,
        ["full_attention"] * 5,
    ],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 3],
    "tie_word_embeddings": [True, False],
}


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_every_field_is_read_as_transformers_reads_it(name):
    """Each absent, null and odd: what transformers makes of it, or an error that names it."""
    said, _ = FAMILY_CONFIGS[name]
    model_type = name.split()[0]
    base = {**common(said), **said}
    known = transformers.AutoConfig.for_model(model_type).to_dict()
    read, compared = set(), 0
    unchanged = lm_config({"model_type": model_type, **base})
    for field in sorted({*known, *base, *OTHER_FIELDS} - {"model_type", "transformers_version"}):
        absent = {key: value for key, value in base.items() if key != field}
        changed = [base | {field: v} for v in [*ODD_VALUES, *ODD_FIELDS.get(field, [])]]
        for content in [absent, *changed]:
            try:
                ours = lm_config({"model_type": model_type, **copy.deepcopy(content)})
            except ValueError:
                continue
            try:
                theirs = transformers.AutoConfig.for_model(model_type, **copy.deepcopy(content))
                theirs = json.loads(theirs.to_json_string(use_diff=False))
            except Exception:  # it may refuse what is read here
                continue
            assert lm_config(theirs) == ours, (field, content.get(field, "absent"))
            compared += 1
            read |= {field} if ours != unchanged else set()
    assert compared > 100
    assert len(read) >= 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rms_norm_eps": 0}, r"rms_norm_eps is 0, expected a number >= 1e-20"),
        ({"rms_norm_eps": -1e-6}, r"rms_norm_eps is -1e-06, expected a number >="),
        ({"rms_norm_eps": 1e30}, r"rms_norm_eps is 1e\+30, expected a number <= 0.1"),
        ({"rms_norm_eps": None}, r"rms_norm_eps is null, expected a number"),
        ({"rope_theta": 0.0}, r"rope_theta is 0.0, expected a number > 1"),
        ({"rope_theta": 1e30}, r"rope_theta is 1e\+30, expected a number <= 1"),
        ({"rope_theta": "1e4"}, r'rope_theta is "1e4", expected a number'),
        ({"rope_theta": None}, r"rotary settings: rope_theta is null, expected a number"),
        ({"rope_parameters": {"rope_theta": -5}}, r"rotary settings: rope_theta is -5, expected"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, r"rotary settings: factor is 0, expec"),
        ({"vocab_size": 10**30}, r"vocab_size is \d+, expected an integer <= 16777216"),
        ({"vocab_size": 100.0}, r"vocab_size is 100.0, expected an integer"),
        ({"hidden_size": 0}, r"hidden_size is 0, expected an integer >= 1"),
        ({"num_hidden_layers": -1}, r"num_hidden_layers is -1, expected an integer >= 1"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers is 1000000000, expected"),
        ({"num_attention_heads": True}, r"num_attention_heads is true, expected an integer"),
        ({"head_dim": 0}, r"head_dim is 0, expected an integer >= 1"),
        ({"max_position_embeddings": 0}, r"max_position_embeddings is 0, expected"),
        ({"tie_word_embeddings": "no"}, r'tie_word_embeddings is "no", expected true or false'),
        ({"attention_bias": 1}, r"attention_bias is 1, expected true or false"),
        ({"hidden_act": ["silu"]}, r"hidden_act is a list of 1, expected a text"),
        ({"rope_scaling": "linear"}, r'rope_scaling is "linear", expected an object'),
        ({"model_type": ["llama"]}, "model_type is a list of 1, expected the name"),
    ],
)
def test_absurd_values_are_refused_by_name(tmp_path, changed, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SHAPE | changed))
    with pytest.raises(ValueError, match=message) as raised:
        read_config(tmp_path)
    assert str(raised.value).startswith(f"{path}: ")


@pytest.mark.parametrize("text", ['"llama"', "[]", "3", "null"])
def test_a_config_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: .*expected an object"):
        read_config(tmp_path)


def test_windows_of_some_qwen_layers():
    base = {"model_type": "qwen2", **COMMON, "num_key_value_heads": 4, "sliding_window": 16}
    windowed = base | {"use_sliding_window": True}
    assert lm_config(windowed | {"max_window_layers": 6}) == lm_config(base)  # no layer has one
    config = lm_config(windowed | {"max_window_layers": 4})
    assert (config.window, config.local) == (16, (False,) * 4 + (True,) * 2)
    assert lm_config(hf_config(config)) == config


def test_the_head_of_a_multimodal_model_is_tied_where_its_own_config_says_so():
    text = {"model_type": "gemma3_text", "num_hidden_layers": 2, "tie_word_embeddings": True}
    whole = {"model_type": "gemma3", "text_config": text}
    assert lm_config(whole).tied
    assert not lm_config(whole | {"tie_word_embeddings": False}).tied
    with pytest.raises(ValueError, match=r"text_config\.final_logit_softcapping is 30.0"):
        lm_config({"model_type": "gemma3", "text_config": text | {"final_logit_softcapping": 30.0}})
    for wrong in (None, [], {"model_type": "llama"}):
        with pytest.raises(ValueError, match="text_config is"):
            lm_config({"model_type": "gemma3", "text_config": wrong})


def test_the_text_models_of_published_multimodal_folders():
    llama = {"model_type": "llama", "vocab_size": 32064}
    llava = lm_config({"model_type": "llava", "text_config": llama})
    assert (llava.model_type, llava.hidden_size, llava.vocab_size) == ("llama", 4096, 32064)
    assert not llava.tied
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "rope_theta": 1e6}
    flat = COMMON | {"model_type": "qwen2_vl", "vision_config": {}, "num_key_value_heads": 2} | rope
    qwen = lm_config(flat | {"tie_word_embeddings": True})
    assert (qwen.model_type, qwen.rope, qwen.tied) == ("qwen2", RopeConfig(1e6), True)
    with pytest.raises(
        ValueError, match=r'text_config: model_type "mamba" is not supported: .*recur'
    ):
        lm_config({"model_type": "llava", "text_config": {"model_type": "mamba"}})
    with pytest.raises(ValueError, match="text_config: model_type is a list of 1, expected"):
        lm_config({"model_type": "llava", "text_config": {"model_type": ["llama"]}})
    with pytest.raises(ValueError, match='"newvl" is not supported'):
        lm_config({"model_type": "newvl", "text_config": {"model_type": ["llama"]}})


def test_what_is_unknown_is_refused_with_what_to_do():
    def refusal(**config):
        with pytest.raises(ValueError) as raised:  # noqa: PT011 (what it says is returned)
            lm_config(config)
        return str(raised.value)

    said = refusal(model_type="deepseek_v3")
    assert '"deepseek_v3" is not supported: its mixture of experts is of another kind; the' in said
    assert "the nearest supported type is glm4_moe. Take a model of a known type, or" in said
    assert "the nearest supported type is smollm3" in refusal(model_type="smollm33")
    assert "expected the name of a family. Known types: apertus" in refusal()
    said = refusal(**SHAPE | {"model_type": "stablelm", "qk_layernorm": True})
    assert "qk_layernorm True is not supported in the stablelm family; expected False" in said
    assert "give this one as functions (t3jax.make_lm, docs/your_model.md)" in said
    said = refusal(model_type="newvl", text_config={"model_type": "qwen3"})
    assert "its text model is a qwen3, which is: save that alone" in said
    bits = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    said = refusal(**SHAPE, quantization_config=bits)
    assert "quantised by bitsandbytes are not supported; known: awq, compressed" in said
    assert "Load the unquantised folder, with dtype=int8" in said


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("model.text_model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("visual.blocks.0.attn.qkv.weight", None),
        ("model.vision_tower.embeddings.weight", None),
        ("multi_modal_projector.linear_1.weight", None),
        ("model.connector.proj.weight", None),
        ("model.embed_audio.embedding_projection.weight", None),
        (
            "model.language_model.embed_tokens_per_layer.weight",
            "model.embed_tokens_per_layer.weight",
        ),
        ("image_newline", None),
    ],
)
def test_names_of_weights_in_multimodal_folders(name, expected):
    assert checkpoint_name(FAMILIES["llama"], name) == expected


def test_both_names_of_a_gpt2_field():
    """transformers knows the common names too."""
    config = lm_config({"model_type": "gpt2", **GPT2})
    renamed = {key: value for key, value in GPT2.items() if key != "n_embd"}
    assert lm_config({"model_type": "gpt2", **renamed, "hidden_size": 32}) == config
    with pytest.raises(ValueError, match="hidden_size is 64 and n_embd is 32, two names"):
        lm_config({"model_type": "gpt2", **GPT2, "hidden_size": 64})


@pytest.mark.parametrize("name", ["vocab_size", "rms_norm_eps", "max_position_embeddings"])
def test_a_missing_field_is_named(name):
    with pytest.raises(ValueError, match=f"field '{name}' is missing"):
        lm_config(without(name))


def test_a_factor_of_no_kind_is_not_obeyed_in_silence():
    with pytest.warns(UserWarning, match=r"a factor of 2\.0 and no rope_type"):
        config = lm_config(SHAPE | {"rope_scaling": {"factor": 2.0}})
    assert config == lm_config(SHAPE)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: not found.*model folder"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        read_config(tmp_path)
