"""Head folders: both layouts, and everything that can be wrong with one."""

import dataclasses
import errno
import json
import os
import pathlib

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import PartitionSpec as P

from t3jax import files, reference_head, sharding
from t3jax.head import ACTIVATIONS, HeadConfig, init_head
from t3jax.head_io import Head, check_head_fits, load_head, save_head, save_reference_head

D, R, V = 6, 4, 16
BASE = {"model_type": "llama", "hidden_size": D, "vocab_size": V}


def make_head(activation="identity", layers=1, bias=False, **fields) -> Head:
    config = HeadConfig(D, V, R, activation, layers, bias)
    params = init_head(jax.random.key(0), config)
    return Head(config, params, 2.5, 1.5, "models/base", **fields)


def assert_same(head: Head, other: Head) -> None:
    chex.assert_trees_all_equal(head.params, other.params)
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


def test_a_head_of_version_1_reads_the_paper_s_features(tmp_path):
    save_head(tmp_path, make_head())
    description = json.loads((tmp_path / "head.json").read_text())
    assert (description["version"], description.pop("features")) == (2, "mean")
    (tmp_path / "head.json").write_text(json.dumps(description | {"version": 1}))
    assert load_head(tmp_path).config == make_head().config


def test_a_head_of_other_features_round_trips_and_is_no_head_of_the_reference(tmp_path):
    config = HeadConfig(D, V, rank=4, activation="gelu", bias=True, features="mean+last")
    head = Head(config, init_head(jax.random.key(0), config), 1.0, 1.0, "m")
    assert head.params["hidden"][0]["weight"].shape == (4, 2 * D)
    save_head(tmp_path / "own", head)
    assert load_head(tmp_path / "own").config == config
    with pytest.raises(ValueError, match=r"features 'mean\+last'"):
        save_reference_head(tmp_path / "theirs", head, BASE)
    with pytest.raises(ValueError, match="features = 'first': expected one of"):
        HeadConfig(D, V, features="first")


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
    assert reference_head.ACTIVATIONS.keys() == ACTIVATIONS.keys()


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
        ({"version": 3}, "version 3, but this program reads versions 1 and 2"),
        ({"format": "other"}, "format 'other', expected 't3jax-head'"),
        ({"activation": "silu"}, "activation = 'silu': expected one of identity"),
        ({"rank": 5}, r"hidden.0.weight: shape \(4, 6\), expected \(5, 6\)\n.*output.weight"),
        ({"vocab_size": 17}, r"output.weight: shape \(16, 4\), expected \(17, 4\)"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2, but the weights are 2 tensors"),
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
    with pytest.raises(ValueError, match=r"head\.json: field rank is missing"):
        load_head(tmp_path)


def test_integer_weights_are_refused(tmp_path):
    head = make_head()
    save_head(tmp_path, head)
    tensors = safetensors.numpy.load_file(tmp_path / "head.safetensors")
    tensors["output.weight"] = tensors["output.weight"].astype(np.int8)
    safetensors.numpy.save_file(tensors, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"output.weight: dtype int8"):
        load_head(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 4.5}, "rank is 4.5, expected an integer"),
        ({"rank": True}, "rank is true, expected an integer"),
        ({"rank": 0}, "rank is 0, expected an integer >= 1"),
        ({"hidden_size": 10**40}, "hidden_size is 10{40}, expected an integer <= 2147483647"),
        ({"num_hidden_layers": 99}, "num_hidden_layers is 99, but the weights are 2 tensors"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers = 10{9}: expected .* in \[1, 100\]"),
        ({"bias": 0}, "bias is 0, expected true or false"),
        ({"activation": None}, "activation is null, expected a text"),
        ({"version": True}, "version is true, expected an integer"),
        ({"base_temperature": 0}, "base_temperature is 0, expected a number >= 0.001"),
        ({"base_temperature": "2.5"}, 'base_temperature is "2.5", expected a number'),
        ({"base_temperature": 1e300}, r"base_temperature is 1e\+300, expected a number <= 1000000"),
        ({"base_temperature": float("nan")}, "base_temperature: NaN, expected a finite number"),
        ({"guidance_scale": -1}, "guidance_scale is -1, expected a number >= 0"),
        ({"guidance_scale": float("inf")}, "guidance_scale: infinite"),
        ({"prior_shift": None}, "prior_shift is null, expected a number"),
        ({"prior_shift": -1e9}, "prior_shift is -1000000000.0, expected a number >= -1000000"),
        ({"record": []}, "record is a list of 0, expected an object"),
        ({"model": {"a": 1}}, "model is an object of 1 fields, expected a text"),
        ({"guidance_sclae": 1.0}, "field guidance_sclae is unknown"),
    ],
)  # fmt: skip
def test_own_fields_have_types_and_ranges(tmp_path, changes, message):
    save_head(tmp_path, make_head())
    edit_json(tmp_path / "head.json", **changes)
    with pytest.raises(ValueError, match=rf"head\.json: {message}"):
        load_head(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": None}, "guidance is null, expected an object"),
        ({"guidance": {"hidden_size": "4"}}, 'guidance.hidden_size is "4", expected an integer'),
        ({"guidance": {"hidden_size": R, "bias": None}}, "guidance.bias is null"),
        ({"guidance": {"hidden_size": R, "dropout": 0.1}}, "field guidance.dropout is unknown"),
        ({"guidance": {"hidden_size": R, "num_hidden_layers": 10**9}}, "proj.2000000000.weight is"),
        ({"base_temp": -2.5}, "base_temp is -2.5, expected a number >= 0.001"),
        ({"base_temp": None}, "base_temp is null, expected a number"),
        ({"guidance_scale": float("nan")}, "guidance_scale: NaN"),
        ({"base_config_dict": []}, "base_config_dict is a list of 0, expected an object or null"),
        ({"base_config_dict": BASE | {"vocab_size": "16"}}, 'vocab_size is "16", expected an int'),
    ],
)  # fmt: skip
def test_reference_fields_have_types_and_ranges(tmp_path, changes, message):
    save_reference_head(tmp_path, make_head(), BASE)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_head(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("reference", [False, True])
def test_weights_that_are_not_finite_are_refused_and_not_written(tmp_path, value, reference):
    def save(folder, head):
        save_reference_head(folder, head, BASE) if reference else save_head(folder, head)

    head = make_head()
    head.params["output"] = head.params["output"].at[3, 1].set(value)
    with pytest.raises(ValueError, match=r"not written:\n  .*weight: 1 of 64 values are NaN, infi"):
        save(tmp_path / "new", head)
    assert not (tmp_path / "new").exists()
    save(tmp_path / "old", make_head())
    rewrite(tmp_path / "old", lambda tensors: tensors[max(tensors)].__setitem__((3, 1), value))
    with pytest.raises(ValueError, match=r"cannot be used:\n  .*weight: 1 of 64 values are NaN"):
        load_head(tmp_path / "old")


def rewrite(folder: pathlib.Path, change) -> None:
    """Changes the tensors of a head folder in place, `change` taking them as writable arrays."""
    (path,) = folder.glob("*.safetensors")
    tensors = {k: v.copy() for k, v in safetensors.numpy.load_file(path).items()}
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def test_float64_weights_beyond_float32_are_refused(tmp_path):
    save_reference_head(tmp_path, make_head(), BASE)
    rewrite(tmp_path, lambda t: t.update({k: v.astype(np.float64) * 1e200 for k, v in t.items()}))
    with pytest.raises(ValueError, match="24 of 24 values are NaN, infinite"):
        load_head(tmp_path)


def test_settings_that_cannot_be_loaded_are_not_written(tmp_path):
    for changes in (
        {"base_temperature": np.nan},
        {"guidance_scale": -1.0},
        {"prior_shift": np.inf},
    ):
        (name,) = changes
        with pytest.raises(ValueError, match=name):
            save_head(tmp_path / "a", dataclasses.replace(make_head(), **changes))
        if name != "prior_shift":
            with pytest.raises(ValueError, match=f"{name[:9]}.*(NaN|-1)"):
                save_reference_head(
                    tmp_path / "a", dataclasses.replace(make_head(), **changes), BASE
                )
    assert not any(tmp_path.iterdir())


def test_a_record_of_numbers_that_json_lacks_is_null_there(tmp_path):
    record = {"loss": [1.0, float("nan")], "best": {"loss": float("inf")}, "epochs": (1, 2)}
    save_head(tmp_path, make_head(record=record))
    assert load_head(tmp_path).record == {
        "loss": [1.0, None],
        "best": {"loss": None},
        "epochs": [1, 2],
    }


def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path):
    save_head(tmp_path, make_head())
    path = tmp_path / "head.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"head\.safetensors: damaged: .* weights_sha256 in head"):
        load_head(tmp_path)
    description = json.loads((tmp_path / "head.json").read_text())
    del description["weights_sha256"]  # as a head has none that was written before it
    (tmp_path / "head.json").write_text(json.dumps(description))
    load_head(tmp_path)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            "../out.safetensors",
            r'proj.0.weight is in "../out.safetensors", expected the name of a f',
        ),
        ("/etc/passwd", "expected the name of a file in the same folder"),
        ("..", "expected the name of a file"),
        ("", "expected the name of a file"),
        ("link.safetensors", "leads out of the model folder"),
        ("pipe.safetensors", "pipe.safetensors: a pipe, expected a regular file"),
        ("folder", "folder: a folder, expected a regular file"),
        (3, r'weight_map\["guidance_head.proj.0.weight"\] is 3, expected a text'),
    ],
)
def test_an_index_names_files_of_its_folder_alone(tmp_path, place, message):
    folder = tmp_path / "head"
    save_reference_head(folder, make_head(), BASE)
    (folder / "model.safetensors").rename(tmp_path / "out.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "out.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "folder").mkdir()
    names = [f"guidance_head.proj.{i}.weight" for i in (0, 2)]
    index = {"weight_map": dict.fromkeys(names, place)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        load_head(folder)


def test_a_tensor_in_two_shards_is_refused_and_a_whole_file_goes_before_an_index(tmp_path):
    save_reference_head(tmp_path, make_head(), BASE)
    data = (tmp_path / "model.safetensors").read_bytes()
    for name in "ab":
        (tmp_path / name).write_bytes(data)
    weight_map = {"guidance_head.proj.0.weight": "a", "guidance_head.proj.2.weight": "b"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(load_head(tmp_path), make_head())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"b: guidance_head.proj.0.weight is in another file too"):
        load_head(tmp_path)


@pytest.mark.parametrize("name", ["head.json", "head.safetensors"])
def test_what_is_no_regular_file_is_refused(tmp_path, name):
    save_head(tmp_path, make_head())
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: a pipe, expected a regular file"):
        load_head(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{name}: a folder, expected a regular file"):
        load_head(tmp_path)


@pytest.mark.parametrize("shape", [(), (24,), (0, 6), (4, 6, 1)])
def test_a_reference_tensor_of_another_rank_is_refused(tmp_path, shape):
    save_reference_head(tmp_path, make_head(), BASE)
    name = "guidance_head.proj.0.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({name: np.zeros(shape, np.float32)}))
    with pytest.raises(ValueError, match=r"proj.0.weight has shape \(.*\), expected a matrix"):
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
