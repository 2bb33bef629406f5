"""`config.json` in the forms of transformers 4 and 5, and everything that is refused."""

import dataclasses
import json

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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; known: .*llama"),
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
