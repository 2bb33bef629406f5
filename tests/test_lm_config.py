"""`config.json` in the forms of transformers 4 and 5, and everything that is refused."""

import dataclasses
import json
import math

import pytest
import transformers

from t3jax.lm import LMConfig, RopeConfig, lm_config, read_config
from t3jax.lm.families import hf_config

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
    "olmo2": ({"attention_bias": False}, {"norms": "post", "qk_norm": "width", "num_kv_heads": 4}),
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


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_a_family_is_read_and_written_back(tmp_path, name):
    said, expected = FAMILY_CONFIGS[name]
    model_type = name.split()[0]
    content = {"model_type": model_type, **({} if said is GPT2 else COMMON), **said}
    config = lm_config(content)
    for field, value in expected.items():
        assert getattr(config, field) == value, field
    assert (config.hidden_size, config.num_layers, config.num_heads) == (32, 6, 4)
    assert lm_config(hf_config(config)) == config
    # By way of transformers: what it makes of the old form, and of the one written here.
    for form in (content, hf_config(config)):
        form = {key: value for key, value in form.items() if key != "model_type"}
        form |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
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
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window True is not supported in the"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm True is not supported in the phi family"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types .*: expected 6, each one of"),
        ("gemma3_text", {"layer_types": ["linear_attention"] * 6}, "layer_types .*: expected 6"),
        (
            "phi3",
            {"rope_scaling": LONGROPE | {"long_factor": [1.0]}},
            "short_factor and long_factor have 4 and 1 values; a head has 4 rotary pairs",
        ),
    ],
)
def test_what_a_family_does_not_implement_is_refused(model_type, changed, message):
    with pytest.raises(ValueError, match=message):
        lm_config({"model_type": model_type, **COMMON, **changed})
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx True is not supported"):
        lm_config({"model_type": "gpt2", **GPT2, "scale_attn_by_inverse_layer_idx": True})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"model_type": "mamba"},
            "model_type 'mamba' is not supported; known: .*gemma3.*llama.*phi",
        ),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_act": "relu2"}, "hidden_act 'relu2' is not supported; known: silu, .*gelu_new"),
        ({"quantization_config": {"bits": 4}}, "quantized weights are not supported"),
        ({"num_key_value_heads": 3}, "8 query heads do not divide among 3 key heads"),
        (
            {"rope_scaling": {"rope_type": "ntk", "factor": 2.0}},
            "rope_type 'ntk' is not supported; known: default, linear, llama3, yarn, longrope",
        ),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "'dynamic'"),
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


@pytest.mark.parametrize("name", ["vocab_size", "rms_norm_eps", "max_position_embeddings"])
def test_a_missing_field_is_named(name):
    with pytest.raises(ValueError, match=f"field '{name}' is missing"):
        lm_config(without(name))


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: not found.*model folder"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        read_config(tmp_path)
