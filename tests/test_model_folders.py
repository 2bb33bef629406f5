"""Model folders as they come: nothing of one is run, nothing outside of it is read, and what does
not add up is refused by name."""

import dataclasses
import json
import os
import pathlib
import shutil
import socket
import sys
import warnings

import chex
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny

from t3jax import batching, load_lm, make_lm
from t3jax.data.chat import Example
from t3jax.lm import __main__ as describe
from t3jax.lm import load_config, places, save_hf
from t3jax.lm.weights import load_params

CONFIG = dataclasses.replace(
    tiny.CONFIG, hidden_size=16, head_dim=4, num_heads=4, num_kv_heads=2, num_layers=1
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MODULE = """
import pathlib
pathlib.Path({marker!r}).write_text("run")
from transformers import PreTrainedTokenizerFast as Own
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A tied model's folder, to be copied."""
    folder = tmp_path_factory.mktemp("whole")
    save_hf(folder, CONFIG, tiny.make_params(CONFIG), eos_ids=[263])
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def change(path, **fields):
    """Sets fields of a JSON file; None is null, `...` takes the field out."""
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def tensors(folder):
    return safetensors.numpy.load_file(folder / WEIGHTS)


def shard(folder, parts):
    """Replaces the whole file by files of a name and their tensors, with an index."""
    (folder / WEIGHTS).unlink(missing_ok=True)
    for name, held in parts.items():
        safetensors.numpy.save_file(held, folder / name)
    weight_map = {tensor: name for name, held in parts.items() for tensor in held}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# ---- code ----


@pytest.mark.parametrize("class_name", ["Own", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("where", ["tokenizer_config.json", "config.json"])
def test_code_of_a_folder_is_neither_run_nor_asked_about(
    folder, tmp_path, monkeypatch, class_name, where
):
    """`auto_map` made transformers ask on stdin, where sample.py reads questions."""
    marker, asked = tmp_path / "marker", []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    (folder / "own.py").write_text(MODULE.format(marker=str(marker)))
    names = {"AutoTokenizer": ["own.Own", "own.Own"], "AutoConfig": "own.Own"}
    change(folder / where, auto_map=names)
    change(folder / "tokenizer_config.json", tokenizer_class=class_name or ...)
    try:
        lm = load_lm(folder)
    except ValueError as error:
        assert "auto_map" in str(error)  # noqa: PT017
    else:
        assert type(lm.tokenizer).__module__.startswith("transformers.")
    assert not asked
    assert not marker.exists()


def test_a_folder_needs_no_network(folder, monkeypatch):
    tried = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: tried.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: tried.append(address))
    load_lm(folder)
    assert not tried


def test_another_tokenizer_file_is_not_read(folder, tmp_path):
    """Not the one that a setting names."""
    other = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    other["model"]["vocab"] = {token: 255 - i if i < 256 else i for token, i in vocabulary.items()}
    (tmp_path / "other.json").write_text(json.dumps(other))
    expected = tiny.make_tokenizer()("abc")["input_ids"]
    for name in ("tokenizer_file", "vocab_file"):
        change(folder / "tokenizer_config.json", **{name: str(tmp_path / "other.json")})
        assert load_lm(folder).tokenizer("abc")["input_ids"] == expected


# ---- files ----


@pytest.mark.parametrize("name", ["../out.safetensors", "/out.safetensors", "a/b.safetensors", ""])
def test_an_index_names_files_of_its_folder_only(folder, name):
    held = tensors(folder)
    shard(folder, {"part.safetensors": held})
    safetensors.numpy.save_file(held, folder.parent / "out.safetensors")
    change(folder / INDEX, weight_map=dict.fromkeys(held, name))
    with pytest.raises(ValueError, match=r"index\.json: weight_map names .*in the same folder"):
        load_lm(folder)


@pytest.mark.parametrize(
    "text", ['{"weight_map": {"a": 1}}', '{"weight_map": []}', "[]", '{"weight_map": {}}', "{}"]
)
def test_a_broken_index_is_named(folder, text):
    shard(folder, {"part.safetensors": tensors(folder)})
    (folder / INDEX).write_text(text)
    with pytest.raises(ValueError, match=r"index\.json: .*expected|index\.json: .*missing"):
        load_lm(folder)


@pytest.mark.parametrize(
    "name", [WEIGHTS, "config.json", "tokenizer.json", "generation_config.json", "own.jinja"]
)
def test_a_link_out_of_the_folder_is_refused(folder, tmp_path, name):
    outside = tmp_path / "outside"
    if (folder / name).exists():
        (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    for load in (load_lm, load_config):
        with pytest.raises(ValueError, match=f"{name} leads out of the model folder, to .*outside"):
            load(folder)


def test_a_link_within_the_folder_and_one_to_it_are_followed(folder, tmp_path):
    (folder / WEIGHTS).rename(folder / "step-7.safetensors")
    (folder / WEIGHTS).symlink_to("step-7.safetensors")
    (tmp_path / "latest").symlink_to(folder)
    assert load_lm(tmp_path / "latest").vocab_size == 264


@pytest.mark.parametrize("shared", [False, True])
def test_a_snapshot_of_the_hub_cache_is_all_links(folder, tmp_path, shared):
    """Into blobs of its repository, which may be links into those of the whole cache."""
    cache = tmp_path / "hub"
    repository = cache / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        if shared:
            (cache / "blobs" / "ab").mkdir(parents=True, exist_ok=True)
            path.rename(cache / "blobs" / "ab" / str(i))
            (blobs / str(i)).symlink_to(f"../../blobs/ab/{i}")
        else:
            path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    assert load_lm(snapshot).vocab_size == 264
    (blobs / "secret").symlink_to(tmp_path / "secret")
    (snapshot / "more.json").symlink_to("../../blobs/secret")
    with pytest.raises(ValueError, match=r"more\.json leads out"):
        load_lm(snapshot)


def test_a_pipe_is_not_waited_for(folder):
    for name in ("config.json", "tokenizer.json", WEIGHTS):
        (folder / name).rename(folder / "aside")
        os.mkfifo(folder / name)
        with pytest.raises(ValueError, match=f"{name}: a pipe"):
            load_lm(folder)
        (folder / name).unlink()
        (folder / "aside").rename(folder / name)


def test_a_whole_file_beside_a_left_over_index_is_what_counts(folder):
    """As in transformers."""
    held = tensors(folder)
    shard(folder, {"old.safetensors": {name: value + 1 for name, value in held.items()}})
    safetensors.numpy.save_file(held, folder / WEIGHTS)
    found = load_params(folder, CONFIG, jnp.float32)["embed"]["weight"]
    np.testing.assert_array_equal(found, held[EMBED])


def test_a_tensor_in_two_files_is_refused(folder):
    held = tensors(folder)
    shard(folder, {"a.safetensors": held, "b.safetensors": {EMBED: held[EMBED] + 1}})
    with pytest.raises(ValueError, match=rf"b\.safetensors: {EMBED} is also in a\.safetensors"):
        load_lm(folder)


def test_a_tensor_under_two_names_is_refused(folder, tmp_path):
    gpt2 = dataclasses.replace(
        CONFIG, model_type="gpt2", rope=None, norm="layer", gated=False, attention_bias=True,
        mlp_bias=True, num_kv_heads=4, activation="gelu_pytorch_tanh",
    )  # fmt: skip
    save_hf(tmp_path, gpt2, tiny.make_params(gpt2), eos_ids=[263])
    held = tensors(tmp_path)
    held["wte.weight"] = held["transformer.wte.weight"] + 1
    safetensors.numpy.save_file(held, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight|wte\.weight is also in"):
        load_params(tmp_path, gpt2, jnp.float32)


def test_an_adapter_is_not_passed_over(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json: .*merge the adapter"):
        load_lm(folder)


# ---- head and embedding ----


def test_a_head_of_its_own_is_kept_whatever_the_config_says(folder):
    held = tensors(folder)
    held[HEAD] = held[EMBED].copy()
    held[HEAD][-1, -1] += 1
    safetensors.numpy.save_file(held, folder / WEIGHTS)
    with pytest.warns(UserWarning, match="the head is kept, as transformers does"):
        lm = load_lm(folder, "float32")
    np.testing.assert_array_equal(lm.params["lm_head"]["weight"], held[HEAD])
    hidden = jnp.ones((1, 1, 16))
    np.testing.assert_allclose(
        lm.unembed(lm.params, hidden)[0, 0], held[HEAD].sum(axis=1), rtol=1e-4, atol=1e-4
    )
    with pytest.warns(UserWarning, match="the head is kept"):
        config = load_config(folder)
    assert config == lm.config == dataclasses.replace(CONFIG, tied=False)


def test_a_head_that_is_the_embedding_stays_tied(folder):
    held = tensors(folder)
    padding = np.ones((3, 16), np.float32)  # rows beyond the vocabulary are no part of either
    held[HEAD] = np.concatenate([held[EMBED], padding])
    safetensors.numpy.save_file(held, folder / WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_lm(folder).config == load_config(folder) == CONFIG


def test_a_tied_file_may_hold_the_head_only(folder):
    held = tensors(folder)
    held[HEAD] = held.pop(EMBED)
    safetensors.numpy.save_file(held, folder / WEIGHTS)
    lm = load_lm(folder, "float32")
    np.testing.assert_array_equal(lm.params["embed"]["weight"], held[HEAD])
    assert lm.config == CONFIG


# ---- numbers ----


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_weights_that_are_no_numbers_are_refused(folder, value, stored, dtype):
    held = {name: tensor.astype(stored) for name, tensor in tensors(folder).items()}
    names = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    for name in names:
        held[name][..., -1] = value
    safetensors.numpy.save_file(held, folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"NaN or Inf in {names[0]}, {names[1]}, expected finite"):
        load_lm(folder, dtype)


def test_what_float16_cannot_hold_is_refused(folder):
    held = tensors(folder)
    held[EMBED][7, 3] = 1e5
    safetensors.numpy.save_file(held, folder / WEIGHTS)
    load_lm(folder, "float32")
    load_lm(folder, "bfloat16")
    with pytest.raises(ValueError, match=f"in {EMBED}, or numbers too large for float16"):
        load_lm(folder, "float16")
    params = load_params(folder, CONFIG, jnp.float32)
    with pytest.raises(ValueError, match=f"not written: NaN or Inf in {EMBED}"):
        save_hf(folder, CONFIG, params, eos_ids=[263], dtype=jnp.float16)


# ---- vocabulary and eos ----


def test_a_tokenizer_may_have_tokens_beyond_the_embedding(folder):
    """Gemma 3's of images, CodeLlama's, a [PAD] that was added; texts with one are refused."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    lm = load_lm(folder)
    assert lm.tokenizer.pad_token_id == 264 == lm.vocab_size
    batching.check_examples(lm, [Example(np.array([5, 263], np.int32), 1)])
    for wrong in (264, -1):
        examples = [Example(np.array([5, token], np.int32), 1) for token in (7, wrong)]
        with pytest.raises(ValueError, match=f"example 1 holds token id {wrong}, .* 264 tokens"):
            batching.check_examples(lm, examples)


def test_a_tokenizer_of_another_model_is_refused(folder):
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(40)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"40 of the tokenizer's 304 .*belongs to another model"):
        load_lm(folder)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ([7, 9], 11, (7, 9, 11, 263)),
        (9, [9, 7], (9, 7, 263)),
        (None, None, (263,)),
        (..., 12, (12, 263)),
        ([263], ..., (263,)),
        ([], [], (263,)),
    ],
)
def test_texts_end_at_what_any_of_the_files_names(folder, generation, config, expected):
    """Those of generation_config.json first, then config.json's, then the tokenizer's."""
    change(folder / "generation_config.json", eos_token_id=generation)
    change(folder / "config.json", eos_token_id=config)
    assert load_lm(folder).eos_ids == expected


def test_the_end_of_a_multimodal_models_texts(folder):
    content = json.loads((folder / "config.json").read_text())
    change(folder / "config.json", eos_token_id=..., text_config=content | {"eos_token_id": [9]})
    change(folder / "generation_config.json", eos_token_id=...)
    assert load_lm(folder).eos_ids == (9, 263)


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", [264, -1, [3, 264], "</s>", True, 2.5, [[1]], {"a": 1}, 1e30])
def test_ends_that_are_no_tokens_are_refused(folder, name, value):
    change(folder / name, eos_token_id=value)
    with pytest.raises(ValueError, match=rf"{name}: eos_token_id.*expected"):
        load_lm(folder)


def test_ends_of_a_model_of_ones_own():
    lm = tiny.make_lm()
    tokenizer = tiny.make_tokenizer()

    def own(**options):
        return make_lm(lm.apply, lm.unembed, lm.params, max_position=9, name="own", **options)

    tokenizer.eos_token = None
    assert own(tokenizer=tokenizer).eos_ids == ()  # it was (None,)
    with pytest.raises(ValueError, match="own: eos_token_id 264, expected a token id from 0"):
        own(eos_ids=(264,))


@pytest.mark.parametrize("value", ["many", [2048], True])
def test_a_longest_text_that_is_no_number_is_named(folder, value):
    """A tokenizer would fail at its first text."""
    change(folder / "tokenizer_config.json", model_max_length=int(1e30))
    load_lm(folder)
    change(folder / "tokenizer_config.json", model_max_length=value)
    with pytest.raises(ValueError, match=r"tokenizer_config.json: model_max_length.*a number"):
        load_lm(folder)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("text", ["[]", "", '{"a": 1, "a": 2}', '{"a": NaN}', "\x00", '"x"'])
def test_broken_json_is_named(folder, name, text):
    pathlib.Path(folder / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        load_lm(folder)


def test_of_a_multimodal_folder_the_text_model_is_read_and_a_warning_says_so(folder):
    plain = load_lm(folder, "float32")
    path = folder / "config.json"
    text = json.loads(path.read_text())
    path.write_text(
        json.dumps({"model_type": "llava", "text_config": text, "tie_word_embeddings": True})
    )
    wrapped = {f"language_model.{name}": tensor for name, tensor in tensors(folder).items()}
    wrapped["vision_tower.embeddings.weight"] = np.ones((2, 2), np.float32)
    safetensors.numpy.save_file(wrapped, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="of this llava the text model is read, a llama"):
        lm = load_lm(folder, "float32")
    chex.assert_trees_all_equal(lm.params, plain.params)


def test_a_folder_is_described_without_its_weights(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["t3jax.lm", str(folder)])
    monkeypatch.setattr(places.Place, "read", None)  # a weight that is read ends the test
    assert describe.main() == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{folder}: a llama model; it loads\n1 layers, width 16, 4 query heads ")
    count = sum(tensor.size for tensor in tensors(folder).values())
    assert f"{count:,} weights: 0.00 GiB in float32" in said
    assert "cache: 0.0 KiB a token" in said
    change(folder / "config.json", intermediate_size=7)
    assert describe.main() == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{folder}: does not load\n")
    assert "mlp.down_proj.weight" in said or "mlp.up_proj.weight" in said


def lose_the_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def end_beyond_the_vocabulary(folder):
    change(folder / "generation_config.json", eos_token_id=9999)


def store_other_numbers(folder):
    wrong = tensors(folder)
    wrong["model.norm.weight"] = wrong["model.norm.weight"].astype(np.float64)
    safetensors.numpy.save_file(wrong, folder / WEIGHTS)


def untie(folder):
    change(folder / "config.json", tie_word_embeddings=False)


def leave_a_pointer(folder):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\nsize 12\n")


def lose_the_index(folder):
    (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")


def leave_the_type_out(folder):
    change(folder / "config.json", model_type=...)


def wrap_twice(folder):
    text = json.loads((folder / "config.json").read_text())
    text = {"model_type": "llava", "text_config": text}
    content = {"model_type": "llava", "text_config": text}
    (folder / "config.json").write_text(json.dumps(content))


def wrap_the_names(folder):
    wrapped = {f"module.{name}": tensor for name, tensor in tensors(folder).items()}
    safetensors.numpy.save_file(wrapped, folder / WEIGHTS)


def leave_a_gguf_file(folder):
    (folder / "config.json").rename(folder / "model.gguf")


FAULTS = {
    wrap_the_names: f"model: module.{EMBED} is there, {EMBED} was expected. Write the folder anew",
    leave_a_gguf_file: "expected a Hugging Face model folder, or a GGUF file, such as ",
    lose_the_tokenizer: "the tokenizer could not be read (there is none of tokenizer.json",
    end_beyond_the_vocabulary: "eos_token_id 9999, expected a token id from 0 to 263",
    store_other_numbers: "model.norm.weight: dtype F64, expected one of F32, F16, BF16",
    untie: f"{HEAD}: missing, expected shape (264, 16), or tie_word_embeddings true",
    leave_a_pointer: "it is a pointer of Git LFS, which `git lfs pull` replaces",
    lose_the_index: f"{INDEX}: missing, beside 1 files as model-00001-of-00001.safetensors",
    leave_the_type_out: "of the architectures named there it is llama. Known types",
    wrap_twice: 'text_config: model_type "llava" is a whole multimodal model, expected the type',
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_load_is_described_so_for_the_same_reason(fault, folder, monkeypatch, capsys):
    fault(folder)
    monkeypatch.setattr(sys, "argv", ["t3jax.lm", str(folder)])
    assert describe.main() == 1
    assert FAULTS[fault] in capsys.readouterr().err
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        load_lm(folder)
    assert FAULTS[fault] in str(raised.value)
