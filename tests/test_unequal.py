"""Layers of unequal shape: heads by kind of layer, borrowed keys, inputs of each layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
from jax.sharding import PartitionSpec as P

from t3jax.finetuning import init_lora, merge_lora
from t3jax.lm import ExpertsConfig, from_params, save_hf
from t3jax.lm import __main__ as describe
from t3jax.lm.cache import Borrowed, cache_shardings
from t3jax.lm.decoder import apply
from t3jax.lm.weights import load_params
from t3jax.sampling import Sampler
from t3jax.sharding import make_mesh, param_shardings

CONFIG = tiny.UNEQUAL
BESIDE = dataclasses.replace(
    CONFIG, experts=ExpertsConfig(8, 2, 16, normed=True, scaled=True, beside=True)
)
PROMPTS = [[5, 9, 200, 31], [77], list(range(40, 65)), [3, 3, 3], [250, 1]]


def test_rows_that_take_new_prompts_answer_as_if_alone():
    """The states of layers that borrow are empty and move along."""
    lm = tiny.make_lm(CONFIG)
    assert [type(state) is Borrowed for state in lm.init_cache(1, 1).layers] == [False] * 2 + [
        True
    ] * 2
    alone = [Sampler(lm).generate([prompt], max_new_tokens=9)[0].tokens for prompt in PROMPTS]
    few = Sampler(lm, batch_size=2, chunk=2).generate(PROMPTS, max_new_tokens=9)
    assert [sample.tokens for sample in few] == alone


def on_a_mesh_and_on_one_device(config):
    """The model on the mesh; what both give is the same."""
    params = tiny.make_params(config)
    tokens = np.random.default_rng(0).integers(0, 264, (8, 16)).astype(np.int32)
    mask = np.arange(16) >= np.arange(8)[:, None]
    found = {}
    for shape in (None, (2, 2, 2)):
        mesh = None if shape is None else make_mesh(shape)
        placed = params if mesh is None else jax.device_put(params, param_shardings(mesh, params))
        lm = from_params(config, placed, None, (0,), "unequal", mesh)
        cache = lm.init_cache(8, 17)
        hidden, _, cache = tiny.read(lm.apply, lm.unembed, placed, tokens, mask, cache)
        _, logits, _ = tiny.read(lm.apply, lm.unembed, placed, tokens[:, :1], mask[:, -1:], cache)
        found[shape] = np.asarray(hidden)[mask], np.asarray(logits)
    for ours, expected in zip(found[2, 2, 2], found[None], strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5 * np.abs(expected).max())
    return lm


def test_a_mesh_gives_what_one_device_gives():
    """With key heads that `model` divides in some layers and not in others."""
    lm = on_a_mesh_and_on_one_device(BESIDE)
    placed = lm.params
    assert placed["layer_embed"]["weight"].sharding.spec == P("model", "fsdp")
    assert placed["layers"][0]["input"]["opening"]["weight"].sharding.spec == P(None, "fsdp")
    states = cache_shardings(lm.mesh, lm.init_cache(8, 8)).layers
    assert states[0].keys.spec == P(("data", "fsdp"), "model")
    assert states[1].keys.spec == P(("data", "fsdp"), None, "model")


def test_a_mesh_splits_the_channels_of_a_short_convolution():
    lm = on_a_mesh_and_on_one_device(tiny.CONV)
    own = lm.params["layers"][0]["conv"]
    split = [own[name]["weight"].sharding.spec for name in ("gate", "out_gate", "v", "taps", "o")]
    assert split == [P("model", "fsdp")] * 3 + [P("model"), P("fsdp", "model")]
    state = cache_shardings(lm.mesh, lm.init_cache(8, 8)).layers[0]
    assert state.tail.spec == P(("data", "fsdp"), None, "model")


def test_low_rank_updates_and_what_is_not_trained():
    params = tiny.make_params(CONFIG)
    lora = init_lora(params, 2, ("q", "k", "v", "o", "gate", "up", "down"), jax.random.key(0))
    assert "layers/0/attention/k" in lora
    assert not {"layers/2/attention/k", "layers/1/attention/v", "layers/0/input/opening"} & {*lora}
    lora = jax.tree.map(lambda x: x + 0.1, lora)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 264, (2, 9)).astype(np.int32))

    @jax.jit
    def loss(params, lora):
        return jnp.sum(jnp.sin(apply(CONFIG, params, tokens, lora=lora, remat=True)[0]))

    merged = merge_lora(params, lora, 1.0)
    np.testing.assert_allclose(loss(params, lora), loss(merged, {}), atol=1e-3)
    gradient = jax.grad(loss)(params, lora)
    for layer in jax.tree.leaves(gradient["layers"], is_leaf=lambda x: "mlp" in x):
        assert np.all(layer["multiplier"] == 0)
        assert np.any(layer["mlp"]["up"]["weight"] != 0)
    with pytest.raises(ValueError, match="gate is a matrix of each expert"):
        init_lora(tiny.make_params(BESIDE), 2, ("gate",), jax.random.key(0))


def test_folders_hold_keys_that_no_layer_reads(tmp_path, monkeypatch, capsys):
    """Published ones do, in layers that borrow."""
    save_hf(tmp_path, CONFIG, tiny.make_params(CONFIG), [263])
    path = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    unread = np.ones((32, 32), np.float32)
    tensors |= {f"model.layers.2.self_attn.{name}_proj.weight": unread for name in "kv"}
    safetensors.numpy.save_file(tensors, path)
    load_params(tmp_path, CONFIG, jnp.float32)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr("sys.argv", ["t3jax.lm", str(tmp_path)])
    assert describe.main() == 0
    said = capsys.readouterr().out
    assert "8 query heads over 4 key heads of width 8 (1 of 16 in other layers)" in said
    assert "2 of them with the keys and values of others" in said
    assert "cache: 0.2 KiB a token" in said  # 2 (4 x 8 + 16) numbers of 2 bytes
    tensors["model.layers.1.self_attn.v_proj.weight"] = unread
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj\.weight: not a weight"):
        load_params(tmp_path, CONFIG, jnp.float32)
