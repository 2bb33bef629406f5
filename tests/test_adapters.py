"""Folders of PEFT: LoRA adapters that are read as part of their base, and written."""

import dataclasses
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny

from t3jax import make_mesh
from t3jax.data import Example
from t3jax.finetuning import (
    FinetuneConfig,
    init_lora,
    merge_lora,
    merge_weights,
    train_weights,
)
from t3jax.lm import from_params, load_config, load_lm, save_hf
from t3jax.lm.adapter import CONFIG, save_adapter
from t3jax.lm.model import check_lm
from t3jax.lm.weights import load_params

RANK, ALPHA = 3, 12.0
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    tokenizer = tiny.make_tokenizer()
    save_hf(tmp_path / "base", tiny.CONFIG, tiny.make_params(), [tokenizer.eos_token_id])
    tokenizer.save_pretrained(tmp_path / "base")
    save_adapter(
        tmp_path / "adapter", tiny.CONFIG, make_lora(), RANK, ALPHA, str(tmp_path / "base")
    )
    return tmp_path


def make_lora():
    lora = init_lora(tiny.make_params(), RANK, ("q", "v", "down"), jax.random.key(0))
    return jax.tree.map(lambda x: np.asarray(x) + np.float32(0.01), lora)


def merged(scale):
    return merge_lora(tiny.make_params(), jax.tree.map(jnp.asarray, make_lora()), scale)


def change(folder, **fields):
    path = folder / "adapter" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "scale"), [({}, ALPHA / RANK), ({"use_rslora": True}, ALPHA / RANK**0.5)]
)
def test_an_adapter_is_merged_into_its_base(folder, fields, scale):
    change(folder, **fields)
    lm = load_lm(folder / "adapter", "float32")
    chex.assert_trees_all_close(lm.params, merged(scale), atol=1e-6)
    plain = load_lm(folder / "base", "float32")
    assert not np.array_equal(
        lm.params["layers"][0]["attention"]["q"]["weight"],
        plain.params["layers"][0]["attention"]["q"]["weight"],
    )
    assert load_config(folder / "adapter") == load_config(folder / "base")
    assert lm.eos_ids == plain.eos_ids
    check_lm(folder / "adapter")


def test_a_base_may_be_named_by_a_path_from_the_adapter(folder):
    change(folder, base_model_name_or_path="../base")
    chex.assert_trees_all_close(
        load_lm(folder / "adapter", "float32").params, merged(ALPHA / RANK), atol=1e-6
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, 'peft_type "IA3" is not supported; expected "LORA"'),
        ({"use_dora": True}, "use_dora true is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save a list of 1 is not supported"),
        ({"bias": "all"}, 'bias "all" is not supported'),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights "pissa" is not supported'),
        ({"rank_pattern": {".*q_proj": 2}}, r'the pattern "\.\*q_proj" is not supported'),
        ({"rank_pattern": {"q_proj": 2}}, r"factors of shape \(3, .* expected \(2, "),
        ({"r": 4}, r"factors of shape \(3, .* expected \(4, "),
        ({"r": "many"}, "adapter_config.json.*r"),
        ({"base_model_name_or_path": "/no/where"}, "/no/where: no such folder or file"),
    ],
)
def test_other_adapters_are_refused_by_name(folder, fields, message):
    change(folder, **fields)
    with pytest.raises((ValueError, OSError), match=message):
        load_lm(folder / "adapter", "float32")


def test_a_folder_that_peft_wrote(tmp_path):
    """Rank-stabilised, and of two ranks."""
    golden = pathlib.Path(__file__).parent / "golden"
    base, made = (dict(np.load(golden / f"{name}.npz")) for name in ("qwen2", "adapter"))
    folders = [tmp_path / name for name in ("base", "adapter")]
    for folder, arrays, part, file in zip(
        folders, (base, made), ("weights/", "tensors/"), ("model.safetensors", WEIGHTS), strict=True
    ):
        folder.mkdir()
        tensors = {k.removeprefix(part): v for k, v in arrays.items() if k.startswith(part)}
        safetensors.numpy.save_file(tensors, folder / file)
    (tmp_path / "base" / "config.json").write_text(str(base["config"]))
    (tmp_path / "adapter" / CONFIG).write_text(str(made["config"]))
    change(tmp_path, base_model_name_or_path=str(tmp_path / "base"))
    config = load_config(tmp_path / "adapter")
    params = load_params(tmp_path / "base", config, jnp.float32, adapter=tmp_path / "adapter")
    lm = from_params(config, params, None, (), "adapted")
    tokens, mask = base["left/tokens"], base["left/mask"]
    _, logits, _ = tiny.read(lm.apply, lm.unembed, lm.params, tokens, mask)
    np.testing.assert_allclose(np.asarray(logits)[mask], made["logits"], atol=1e-4)
    assert np.abs(made["logits"][::4] - base["left/logits"]).max() > 0.1  # the adapter counts


def rename(tensors, old, new):
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: rename(t, "q_proj", "x_proj"), "x_proj is no linear layer of the base model"),
        (lambda t: rename(t, "lora_A", "lora_C"), "is no factor of a linear layer"),
        (lambda t: {k: v for k, v in t.items() if "_A" in k}, "has lora_A alone"),
        (lambda t: {k: v * np.float32("nan") for k, v in t.items()}, "NaN or Inf in the factors"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(folder, edit, message):
    path = folder / "adapter" / WEIGHTS
    safetensors.numpy.save_file(edit(safetensors.numpy.load_file(path)), path)
    with pytest.raises(ValueError, match=message):
        load_lm(folder / "adapter", "float32")


def test_an_adapter_without_weights_is_an_error(folder):
    (folder / "adapter" / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        load_lm(folder / "adapter", "float32")


def test_what_fine_tuning_learns_is_an_adapter(folder):
    rng = np.random.default_rng(0)
    rows = [Example(rng.integers(0, 264, 20).astype(np.int32), answer_start=8) for _ in range(8)]
    recipe = FinetuneConfig(
        epochs=1, batch_size=8, learning_rate=0.1, warmup_steps=0, lora_rank=2, lora_layers=("q",)
    )
    params = load_lm(folder / "base", "float32").params
    mesh = make_mesh(devices=jax.devices()[:1])
    options = {"validation": (), "workdir": None, "mesh": mesh, "progress": None}
    lora = train_weights(tiny.CONFIG, params, rows, recipe, **options)
    trained = merge_weights(params, lora, recipe, mesh)
    factors, base = jax.device_get(lora), str(folder / "base")
    save_adapter(folder / "adapter", tiny.CONFIG, factors, 2, recipe.lora_alpha, base)
    chex.assert_trees_all_close(load_lm(folder / "adapter", "float32").params, trained, atol=1e-6)
    moved = trained["layers"][0]["attention"]["q"]["weight"]
    assert np.abs(moved - params["layers"][0]["attention"]["q"]["weight"]).max() > 1e-4


def test_layers_of_one_tensor_cannot_be_an_adapter(tmp_path):
    config = dataclasses.replace(tiny.CONFIG, model_type="phi3")
    with pytest.raises(ValueError, match="phi3 family keeps several of the layers"):
        save_adapter(tmp_path, config, make_lora(), RANK, ALPHA, "base")
    assert not any(tmp_path.iterdir())
