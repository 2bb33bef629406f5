"""Loading: single and split files, casts, padding, ties, and every fault named in one error."""

import dataclasses
import functools
import json
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny

from t3jax import load_lm, make_mesh, sharding
from t3jax.lm import families, lm_config, places, save_hf
from t3jax.lm.decoder import abstract_params
from t3jax.lm.weights import load_params

TIED = dataclasses.replace(tiny.CONFIG, hidden_size=16, head_dim=4, intermediate_size=24)
UNTIED = dataclasses.replace(TIED, tied=False)
BIASED = dataclasses.replace(UNTIED, attention_bias=True, mlp_bias=True)
EMBED, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def numpy_params(config, seed=0):
    """Random values everywhere, norms and biases included."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: generator.standard_normal(leaf.shape).astype(np.float32),
        jax.eval_shape(lambda: tiny.make_params(config)),
    )


def save(folder, config, dtype=np.float32):
    """Writes a whole folder, and gives the parameters and the tensors as they stand in the file."""
    params = numpy_params(config)
    save_hf(folder, config, params, eos_ids=[263], dtype=dtype)
    return params, safetensors.numpy.load_file(folder / "model.safetensors")


def rewrite(folder, tensors):
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def split(folder, tensors, files=3):
    """Replaces the one file by several and their index."""
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for part in range(files):
        name = f"model-{part + 1:05d}-of-{files:05d}.safetensors"
        names = sorted(tensors)[part::files]
        safetensors.numpy.save_file({n: tensors[n] for n in names}, folder / name)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def equal(found, expected):
    chex.assert_trees_all_equal(found, expected)


@pytest.mark.parametrize("config", [TIED, UNTIED, BIASED], ids=["tied", "untied", "biased"])
def test_what_is_saved_loads(tmp_path, config):
    params, tensors = save(tmp_path, config)
    assert (LM_HEAD in tensors) == (not config.tied)
    assert tensors[DOWN].shape == (config.hidden_size, config.intermediate_size)
    loaded = load_params(tmp_path, config, jnp.float32)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    equal(loaded, params)


FAMILIES = sorted(set(families.FAMILIES) - {"llama"})


def family_config(name):
    golden = np.load(pathlib.Path(__file__).parent / "golden" / f"{name}.npz")
    return lm_config(json.loads(str(golden["config"])))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_saved_loads_in_every_family(tmp_path, name, monkeypatch):
    """In parts: fused, interleaved and transposed tensors are cut across heads and stacks."""
    config = family_config(name)
    params, _ = save(tmp_path, config)
    read, sizes = places.Place.read, []

    def recorded(place, view, index):
        part = read(place, view, index)
        sizes.append(part.size)
        return part

    monkeypatch.setattr(places.Place, "read", recorded)
    shardings = functools.partial(sharding.param_shardings, make_mesh((2, 2, 2)))
    loaded = load_params(tmp_path, config, jnp.float32, shardings)
    equal(loaded, params)
    first = loaded["layers"][0]
    q = first["conv"]["v"] if "conv" in first else first.get("delta", first.get("attention"))["q"]
    q = q["weight"]
    assert {s.data.shape for s in q.addressable_shards} == {(q.shape[0] // 2, q.shape[1] // 2)}
    # By halves and quarters, each once, however many devices hold them.
    assert sum(sizes) == sum(leaf.size for leaf in jax.tree.leaves(params))


class Recorder:
    """A tensor of a checkpoint that counts what is read of it."""

    def __init__(self, array):
        self.array = array
        self.read = 0

    def __getitem__(self, index):
        part = self.array[index]
        self.read += part.size
        return part


@pytest.mark.parametrize("name", ["phi3", "gpt_neox", "gpt2"])
def test_no_more_is_read_than_is_wanted(name):
    config = family_config(name)
    abstract = abstract_params(config, jnp.float32)
    leaves = jax.tree.leaves_with_path(abstract)
    found = places.find_places(config, families.FAMILIES[name], abstract)
    for (path, leaf), place in zip(leaves, found, strict=True):
        view = Recorder(np.zeros(place.stored_shape, np.float32))
        third = slice(leaf.shape[0] // 3, 2 * leaf.shape[0] // 3)
        index = (third, *(slice(0, size) for size in leaf.shape[1:]))
        part = place.read(view, index)
        assert part.shape == (third.stop - third.start, *leaf.shape[1:]), path
        assert view.read == part.size


def renamed(tensors, pairs):
    for old, new in pairs:
        tensors = {re.sub(old, new, name): value for name, value in tensors.items()}
    return tensors


@pytest.mark.parametrize(
    ("name", "pairs", "more"),
    [
        ("gpt2", [(r"^transformer\.", "")], ["h.0.attn.bias", "h.1.attn.masked_bias"]),
        (
            "gpt_neox",
            [(r"^embed_out", "lm_head")],
            [
                "gpt_neox.layers.0.attention.bias",
                "gpt_neox.layers.1.attention.masked_bias",
                "gpt_neox.layers.1.attention.rotary_emb.inv_freq",
            ],
        ),
        (
            "gemma3_text",
            [("^", "language_model.")],
            ["vision_tower.vision_model.head.bias", "multi_modal_projector.x"],
        ),
        (
            "gemma3_text",
            [(r"^model\.", "model.language_model.")],
            ["model.vision_tower.vision_model.head.bias"],
        ),
    ],
)
def test_other_names_and_what_is_no_part_of_the_decoder(tmp_path, name, pairs, more):
    config = family_config(name)
    params, tensors = save(tmp_path, config)
    tensors = renamed(tensors, pairs)
    rewrite(tmp_path, tensors | {each: np.zeros((1, 1), np.float32) for each in more})
    equal(load_params(tmp_path, config, jnp.float32), params)


def test_faults_in_a_fused_tensor_are_named_as_it_is_stored(tmp_path):
    config = family_config("gpt2")
    _, tensors = save(tmp_path, config)
    tensors = renamed(tensors, [(r"^transformer\.", "")])
    tensors["h.0.attn.c_attn.weight"] = tensors["h.0.attn.c_attn.weight"].T.copy()
    tensors["h.0.attn.c_attn.scale"] = np.zeros(1, np.float32)
    rewrite(tmp_path, tensors)
    with pytest.raises(ValueError, match="do not fit") as raised:
        load_params(tmp_path, config, jnp.float32)
    message = str(raised.value)
    assert "\n  h.0.attn.c_attn.weight: shape (48, 16), expected (16, 48)" in message
    assert "\n  h.0.attn.c_attn.scale: not a weight of this gpt2 model" in message


def test_several_files_with_an_index(tmp_path):
    params, tensors = save(tmp_path, UNTIED)
    split(tmp_path, tensors)
    equal(load_params(tmp_path, UNTIED, jnp.float32), params)


def test_rows_of_a_padded_vocabulary_are_not_read(tmp_path):
    params, tensors = save(tmp_path, UNTIED)
    for name in (EMBED, LM_HEAD):
        padding = np.full((5, UNTIED.hidden_size), np.nan, np.float32)
        tensors[name] = np.concatenate([tensors[name], padding])
    rewrite(tmp_path, tensors)
    equal(load_params(tmp_path, UNTIED, jnp.float32), params)


def test_a_tied_model_ignores_a_stray_head_and_old_buffers(tmp_path):
    params, tensors = save(tmp_path, TIED)
    tensors[LM_HEAD] = tensors[EMBED].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    rewrite(tmp_path, tensors)
    equal(load_params(tmp_path, TIED, jnp.float32), params)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_casts(tmp_path, stored, wanted):
    params, tensors = save(tmp_path, TIED, stored)
    assert tensors[EMBED].dtype == stored
    loaded = load_params(tmp_path, TIED, wanted)
    equal(loaded, jax.tree.map(lambda leaf: leaf.astype(stored).astype(wanted), params))
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(wanted)}


def test_everything_wrong_is_in_one_error(tmp_path):
    _, tensors = save(tmp_path, UNTIED)
    tensors[EMBED] = tensors[EMBED][:-1]
    tensors[DOWN] = tensors[DOWN].T.copy()
    del tensors["model.norm.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    rewrite(tmp_path, tensors)
    with pytest.raises(ValueError, match="do not fit") as raised:
        load_params(tmp_path, UNTIED, jnp.float32)
    message = str(raised.value)
    assert str(tmp_path) in message
    for expected in (
        f"{EMBED}: shape (263, 16), expected (264, 16)",
        f"{DOWN}: shape (24, 16), expected (16, 24)",
        "model.norm.weight: missing, expected shape (16,)",
        "model.layers.2.mlp.up_proj.weight: not a weight of this llama model",
    ):
        assert expected in message


def test_an_untied_model_needs_its_head(tmp_path):
    save(tmp_path, TIED)
    with pytest.raises(ValueError, match=r"lm_head\.weight: missing"):
        load_params(tmp_path, UNTIED, jnp.float32)


def test_a_long_list_of_faults_is_cut(tmp_path):
    save(tmp_path, TIED)
    rewrite(tmp_path, {"other": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=r"and \d+ more"):
        load_params(tmp_path, TIED, jnp.float32)


def test_weights_that_are_not_floating_are_refused(tmp_path):
    _, tensors = save(tmp_path, TIED)
    tensors[EMBED] = tensors[EMBED].astype(np.int8)
    rewrite(tmp_path, tensors)
    for config in (TIED, dataclasses.replace(TIED, quantized=True)):
        with pytest.raises(ValueError, match=r"dtype I8, expected one of F32, F16, BF16"):
            load_params(tmp_path, config, jnp.float32)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    save(tmp_path, TIED)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a whole safetensors file") as raised:
        load_params(tmp_path, TIED, jnp.float32)
    assert str(path) in str(raised.value)


def test_missing_files_and_a_broken_index_are_named(tmp_path):
    _, tensors = save(tmp_path, UNTIED)
    split(tmp_path, tensors)
    for part in (1, 3):
        (tmp_path / f"model-{part:05d}-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"00001-of-00003.*00003-of-00003") as raised:
        load_params(tmp_path, UNTIED, jnp.float32)
    assert "00002-of-00003" not in str(raised.value)
    index = tmp_path / "model.safetensors.index.json"
    for broken in ('{"weight_map": {"a"', "{}"):
        index.write_text(broken)
        with pytest.raises(ValueError, match=r"index\.json: (not valid JSON|field weight_map)"):
            load_params(tmp_path, UNTIED, jnp.float32)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json: missing, beside 1 files"):
        load_params(tmp_path, UNTIED, jnp.float32)


def model_folder(folder, config=TIED):
    save(folder, config)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


def test_load_lm(tmp_path):
    """End-of-text ids are of all files; the template may be a file of its own."""
    model_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [263, 7]}')
    assert (tmp_path / "chat_template.jinja").is_file()  # the form transformers 5 writes
    lm = load_lm(tmp_path, dtype="float32")
    assert lm.eos_ids == (263, 7)
    assert (lm.vocab_size, lm.hidden_size, lm.max_position) == (264, 16, 256)
    assert lm.name == str(tmp_path)
    assert lm.tokenizer.chat_template == tiny.CHATML
    # The other forms: the template in tokenizer_config.json, no generation_config.json.
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "generation_config.json").unlink()
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ 'x' }}"}))
    lm = load_lm(str(tmp_path), dtype="bfloat16", mesh=make_mesh((1, 2, 4)))
    assert lm.eos_ids == (263,)
    assert lm.tokenizer.chat_template == "{{ 'x' }}"
    assert lm.params["embed"]["weight"].dtype == jnp.bfloat16
    assert lm.params["embed"]["weight"].sharding.shard_shape((264, 16)) == (66, 8)


def test_load_lm_names_what_is_wrong_with_the_folder(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_lm(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_lm("./absent")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="no such folder or file, and it could not be had"):
        load_lm("absent/model")
    model_folder(tmp_path)
    with pytest.raises(ValueError, match=r"dtype 'int4' is not supported; known: .*bfloat16.*int8"):
        load_lm(tmp_path, dtype="int4")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "generation_config.json").unlink()
    small = config | {"vocab_size": 200, "eos_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps(small))
    with pytest.raises(ValueError, match=r"64 of .* 264 tokens, up to id 263, .* vocab_size 200"):
        load_lm(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="tokenizer could not be read"):
        load_lm(tmp_path)
