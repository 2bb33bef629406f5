"""Head folders: both layouts, and everything that can be wrong with one."""

import dataclasses
import errno
import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import PartitionSpec as P

from t3jax import files, head_io, sharding
from t3jax.head import ACTIVATIONS, HeadConfig, init_head
from t3jax.head_io import Head, check_head_fits, load_head, save_head, save_reference_head

D, R, V = 6, 4, 16
BASE = {"model_type": "llama", "hidden_size": D, "vocab_size": V}


def make_head(activation="identity", layers=1, bias=False, **fields) -> Head:
    config = HeadConfig(D, V, R, activation, layers, bias)
    params = init_head(jax.random.key(0), config)
    return Head(config, params, 2.5, 1.5, "models/base", **fields)


def assert_same(head: Head, other: Head) -> None:
    jax.tree.map(np.testing.assert_array_equal, head.params, other.params)
    for field in dataclasses.fields(Head):
        if field.name != "params":
            assert getattr(head, field.name) == getattr(other, field.name)


SHAPES = [("identity", 1, False), ("relu", 2, True), ("gelu", 3, False), ("tanh", 1, True)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_own_layout_round_trips(tmp_path, shape):
    head = make_head(*shape, prior_shift=0.25, record={"seed": 3, "final": {"loss": 0.5}})
    save_head(tmp_path / "head", head)
    assert_same(load_head(tmp_path / "head"), head)
    assert sorted(p.name for p in (tmp_path / "head").iterdir()) == [
        "head.json",
        "head.safetensors",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["head"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_layout_round_trips(tmp_path, shape):
    head = make_head(*shape)
    save_reference_head(tmp_path / "head", head, BASE)
    assert_same(load_head(tmp_path / "head"), head)


def test_reference_layout_is_the_documented_one(tmp_path):
    head = make_head("gelu", 2, True)
    save_reference_head(tmp_path, head, BASE)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert {name: t.shape for name, t in tensors.items()} == {
        "guidance_head.proj.0.weight": (R, D),
        "guidance_head.proj.0.bias": (R,),
        "guidance_head.proj.2.weight": (R, R),
        "guidance_head.proj.2.bias": (R,),
        "guidance_head.proj.4.weight": (V, R),
    }
    np.testing.assert_array_equal(tensors["guidance_head.proj.4.weight"], head.params["output"])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {
        "architectures": ["T3CausalLM"],
        "model_type": "t3_causal_lm",
        "guidance": {
            "hidden_size": R,
            "num_hidden_layers": 2,
            "activation_str": "gelu",
            "bias": True,
        },
        "pooling": "mean",
        "pool_temp": None,
        "extraction_layer": -1,
        "base_temp": 2.5,
        "guidance_scale": 1.5,
        "base_config_dict": {**BASE, "_name_or_path": "models/base"},
    }


def test_every_activation_has_a_name_in_the_reference():
    assert head_io._REFERENCE_ACTIVATIONS.keys() == ACTIVATIONS.keys()


def test_reference_checkpoint_in_shards_beside_base_weights_in_bfloat16(tmp_path):
    head = make_head()
    save_reference_head(tmp_path, head, BASE)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    half = {name: t.astype(ml_dtypes.bfloat16) for name, t in tensors.items()}
    weight_map = {}
    for i, (name, tensor) in enumerate(half.items()):
        base = {f"base_lm.model.layers.{i}.weight": np.zeros((2, 2), np.float32)}
        file = f"model-{i:05}-of-00002.safetensors"
        safetensors.numpy.save_file({name: tensor, **base}, tmp_path / file)
        weight_map |= dict.fromkeys([name, *base], file)
    # A shard without tensors of the head need not be there.
    weight_map["base_lm.lm_head.weight"] = "model-00003.safetensors"
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load_head(tmp_path)
    assert loaded.params["output"].dtype == np.float32
    np.testing.assert_array_equal(
        loaded.params["output"], half["guidance_head.proj.2.weight"].astype(np.float32)
    )


def test_reference_defaults_where_its_config_is_short(tmp_path):
    save_reference_head(tmp_path, make_head(), BASE)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    short = {"model_type": "t3_causal_lm", "guidance": {"hidden_size": R}}
    short["base_config_dict"] = {"model_type": "llama", "_name_or_path": "b"}
    path.write_text(json.dumps(short))
    head = load_head(tmp_path)
    assert (head.base_temperature, head.guidance_scale, head.model) == (1.0, 1.0, "b")
    assert config["guidance"].items() >= short["guidance"].items()


def edit_json(path: pathlib.Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extraction_layer": -2}, "extraction_layer -2 is not supported; expected -1"),
        ({"pooling": "attn"}, "pooling 'attn' is not supported; expected 'mean'"),
        ({"pool_temp": 0.5}, "pool_temp 0.5 is not supported; expected None"),
        ({"model_type": "llama"}, "model_type 'llama' is not a head"),
        ({"guidance": {"hidden_size": R, "activation_str": "silu"}}, "activation_str 'silu'"),
        ({"guidance": {"hidden_size": 9}}, r"shape \(4, 6\), expected \(9, 6\)"),
        ({"guidance": {"hidden_size": R, "bias": True}}, "proj.0.bias: missing, expected shape"),
        ({"guidance": {"hidden_size": R, "num_hidden_layers": 2}}, "proj.4.weight is missing"),
        ({"base_config_dict": BASE | {"vocab_size": 17}}, "vocab_size 17, but .* have 16"),
    ],
)
def test_reference_config_refused_by_name(tmp_path, changes, message):
    save_reference_head(tmp_path, make_head(), BASE)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_head(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("guidance_head.proj.2.bias", "a bias on the output layer is not supported"),
        ("guidance_head.proj.0.bias", "proj.0.bias: unexpected"),
        ("guidance_head.norm.weight", "norm.weight: unexpected"),
    ],
)
def test_reference_tensors_refused_by_name(tmp_path, name, message):
    save_reference_head(tmp_path, make_head(), BASE)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({**tensors, name: np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match=message):
        load_head(tmp_path)


def test_what_the_reference_layout_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="prior_shift is 1"):
        save_reference_head(tmp_path / "a", make_head(prior_shift=1.0), BASE)
    with pytest.raises(ValueError, match="lacks model_type"):
        save_reference_head(tmp_path / "a", make_head(), {"hidden_size": D})
    with pytest.raises(ValueError, match="hidden_size 7, but the head's matrices have 6"):
        save_reference_head(tmp_path / "a", make_head(), BASE | {"hidden_size": 7})
    assert not any(tmp_path.iterdir())


def test_missing_folder_and_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_head(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"neither head.json nor config.json"):
        load_head(tmp_path)
    save_head(tmp_path / "own", make_head())
    (tmp_path / "own" / "head.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"head.safetensors: no such file"):
        load_head(tmp_path / "own")
    save_reference_head(tmp_path / "theirs", make_head(), BASE)
    (tmp_path / "theirs" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: no such file"):
        load_head(tmp_path / "theirs")


@pytest.mark.parametrize("size", [0, 5, 60, -1])
@pytest.mark.parametrize("reference", [False, True])
def test_truncated_weights(tmp_path, size, reference):
    if reference:
        save_reference_head(tmp_path, make_head(), BASE)
    else:
        save_head(tmp_path, make_head())
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_head(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2, but this program reads version 1"),
        ({"format": "other"}, "format 'other', expected 't3jax-head'"),
        ({"activation": "silu"}, "unknown activation 'silu'"),
        ({"rank": 5}, r"hidden.0.weight: shape \(4, 6\), expected \(5, 6\)\n.*output.weight"),
        ({"vocab_size": 17}, r"output.weight: shape \(16, 4\), expected \(17, 4\)"),
        ({"num_hidden_layers": 2}, r"hidden.1.weight: missing, expected shape \(4, 4\)"),
        ({"bias": True}, r"hidden.0.bias: missing"),
    ],
)
def test_own_description_refused_by_name(tmp_path, changes, message):
    save_head(tmp_path, make_head())
    edit_json(tmp_path / "head.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_head(tmp_path)


def test_own_description_damaged(tmp_path):
    save_head(tmp_path, make_head())
    path = tmp_path / "head.json"
    whole = path.read_text()
    path.write_text(whole[:40])
    with pytest.raises(ValueError, match="not valid JSON"):
        load_head(tmp_path)
    description = json.loads(whole)
    del description["rank"]
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match="field 'rank' is missing"):
        load_head(tmp_path)


def test_integer_weights_are_refused(tmp_path):
    head = make_head()
    save_head(tmp_path, head)
    tensors = safetensors.numpy.load_file(tmp_path / "head.safetensors")
    tensors["output.weight"] = tensors["output.weight"].astype(np.int8)
    safetensors.numpy.save_file(tensors, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"output.weight: dtype int8"):
        load_head(tmp_path)


@pytest.mark.parametrize("failing", ["weights", "description"])
def test_full_disk_leaves_the_former_head(tmp_path, monkeypatch, failing):
    def full(path, *_):
        pathlib.Path(path).touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    former = make_head()
    save_head(tmp_path / "head", former)
    if failing == "weights":
        monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    else:
        monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        save_head(tmp_path / "head", make_head("relu"))
    monkeypatch.undo()
    assert_same(load_head(tmp_path / "head"), former)
    assert [p.name for p in tmp_path.iterdir()] == ["head"]


def test_placed_on_a_mesh(tmp_path):
    head = make_head()
    save_head(tmp_path, head)
    loaded = load_head(tmp_path, sharding.make_mesh((2, 1, 4)))
    assert loaded.params["output"].sharding.spec == P("model")
    assert loaded.params["hidden"][0]["weight"].sharding.spec == P()
    assert {s.data.shape for s in loaded.params["output"].addressable_shards} == {(V // 4, R)}
    assert_same(loaded, head)


def test_check_head_fits(tiny_lm):
    model = dataclasses.replace(tiny_lm, vocab_size=V, hidden_size=D, name="models/other")
    check_head_fits(make_head(), model)
    for field, what in (("vocab_size", "vocabulary 16"), ("hidden_size", "hidden states 6")):
        wrong = dataclasses.replace(model, **{field: 99})
        message = f"{what} in the head, trained on models/base, but 99 in models/other"
        with pytest.raises(ValueError, match=message):
            check_head_fits(make_head(), wrong)
