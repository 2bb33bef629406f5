"""Mixtures of experts: the choice, the products, their files, and what is refused.

`test_parity.py` and `test_golden.py` compare whole models of every family.
"""

import dataclasses
import functools
import json
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny

from t3jax import make_mesh, sharding
from t3jax.finetuning import init_lora
from t3jax.lm import ExpertsConfig, experts, places, save_hf
from t3jax.lm import __main__ as describe
from t3jax.lm.quantized import quantize
from t3jax.lm.weights import load_params

E, D, F = 6, 8, 5
CONFIG = tiny.MIXTURE


def draw(tokens, chosen, seed=0):
    """Inputs, choices and weights, and the matrices of experts."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((tokens, D)).astype(np.float32)
    order = np.argsort(generator.random((tokens, E)), axis=1)[:, :chosen].astype(np.int32)
    weighed = generator.random((tokens, chosen)).astype(np.float32)
    shapes = {"gate": (E, F, D), "up": (E, F, D), "down": (E, D, F)}
    matrices = {
        name: {
            "weight": generator.standard_normal(shape).astype(np.float32),
            "bias": generator.standard_normal(shape[:2]).astype(np.float32),
        }
        for name, shape in shapes.items()
    }
    return x, order, weighed, matrices


def opened(gate, up):
    return jnp.tanh(gate) * up


def mixed(x, chosen, weighed, matrices):
    """Token by token, expert by expert."""
    gate, up, down = (matrices[name]["weight"] for name in ("gate", "up", "down"))
    added = [matrices[name]["bias"] for name in ("gate", "up", "down")]
    y = np.zeros_like(x)
    for token, (own, by) in enumerate(zip(chosen, weighed, strict=True)):
        for expert, weight in zip(own, by, strict=True):
            if 0 <= expert < len(gate):
                before, beside, after = (bias[expert] for bias in added)
                inner = np.tanh(gate[expert] @ x[token] + before)
                inner = inner * (up[expert] @ x[token] + beside)
                y[token] += weight * (down[expert] @ inner + after)
    return y


@pytest.mark.parametrize("way", ["_in_tiles", "_on_accelerator"])
@pytest.mark.parametrize(("tokens", "chosen"), [(1, 2), (2, 3), (9, 2), (40, 3)])
def test_a_token_s_output_is_the_sum_over_its_experts(monkeypatch, way, tokens, chosen):
    """One token and many, so that an expert has a part of a tile, and several."""
    monkeypatch.setattr(experts, "_TILE", 4)
    monkeypatch.setattr(experts, "_in_tiles", getattr(experts, way))
    jax.clear_caches()
    x, own, weighed, matrices = draw(tokens, chosen)
    own[0, 0] = -1  # of another device
    found = experts.mix_experts(x, own, weighed, matrices, opened)
    np.testing.assert_allclose(found, mixed(x, own, weighed, matrices), atol=2e-5)
    jax.clear_caches()


@pytest.mark.parametrize("chosen", [2, 3])  # few tokens gather matrices, more are sorted
def test_an_accelerator_s_numbers_and_gradients_are_those_of_a_cpu(chosen):
    """Both ways on the CPU, float32 and int8."""
    x, own, _, matrices = draw(1 if chosen == 2 else 9, chosen)
    own[-1, 0] = -1
    own = jnp.asarray(own)
    rounded = {
        name: m | dict(zip(("weight", "scale"), quantize(m["weight"], np.float32), strict=True))
        for name, m in matrices.items()
    }

    def loss(x, matrices, way):
        y = jnp.where(known, way(x, own, matrices, opened), 0.0)
        return jnp.mean(jnp.sin(y)), y

    known = jnp.broadcast_to(own[:, :, None] >= 0, (*own.shape, D))
    gradient = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
    expected, found = (
        gradient(x, matrices, way) for way in (experts._in_tiles, experts._on_accelerator)
    )
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(found, expected, atol=2e-5)
    (_, expected), (_, found) = (
        jax.jit(loss, static_argnums=2)(x, rounded, way)
        for way in (experts._in_tiles, experts._on_accelerator)
    )
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_softmax_is_taken_over_all_experts_or_over_the_chosen():
    logits = np.log(np.array([[1, 5, 2, 2.5], [4, 1, 3, 2]], np.float32))
    chosen, found = experts.choose_experts(ExpertsConfig(4, 2, F), logits)
    np.testing.assert_array_equal(chosen, [[1, 3], [0, 2]])
    np.testing.assert_allclose(found, [[5 / 10.5, 2.5 / 10.5], [0.4, 0.3]], rtol=1e-6)
    _, found = experts.choose_experts(ExpertsConfig(4, 2, F, normed=True, scale=3.0), logits)
    np.testing.assert_allclose(found, [[2, 1], [12 / 7, 9 / 7]], rtol=1e-6)


def test_a_correction_and_groups_change_the_choice_and_no_weight():
    config = ExpertsConfig(6, 2, F, router="sigmoid", groups=3, chosen_groups=1)
    scores = np.array([[0.9, 0.1, 0.6, 0.5, 0.2, 0.3]], np.float32)
    logits = np.log(scores / (1 - scores))
    nothing = np.zeros(6, np.float32)
    chosen, found = experts.choose_experts(config, logits, nothing)
    np.testing.assert_array_equal(chosen, [[2, 3]])  # 0.6 + 0.5 > 0.9 + 0.1
    np.testing.assert_allclose(found, [[0.6, 0.5]], rtol=1e-5)
    corrected = np.array([0, 0, 0, 0, 0.9, 0.9], np.float32)
    chosen, found = experts.choose_experts(config, logits, corrected)
    np.testing.assert_array_equal(chosen, [[5, 4]])
    np.testing.assert_allclose(found, [[0.3, 0.2]], rtol=1e-5)


def test_a_softmax_is_corrected_for_the_choice_and_may_have_chosen_nothing():
    config = ExpertsConfig(4, 2, F, router="softmax_corrected", normed=True)
    logits = np.log(np.array([[4, 3, 2, 1]], np.float32))
    correction = np.array([0, 0, 1, 1], np.float32)
    chosen, found = experts.choose_experts(config, logits, correction)
    np.testing.assert_array_equal(chosen, [[2, 3]])
    np.testing.assert_allclose(found, [[2 / 3, 1 / 3]], rtol=1e-6)
    far = np.array([[500, 400, 0, 0]], np.float32)
    _, found = experts.choose_experts(config, far, 2 * correction)
    np.testing.assert_array_equal(found, [[0, 0]])


def test_what_is_added_to_the_sum_counts_where_the_sum_is_small():
    config = ExpertsConfig(4, 2, F, router="sigmoid", normed=True, smoothing=1e-6, scale=3.0)
    logits = np.log(np.array([[1e-9, 1e-6, 2e-6, 1e-9]], np.float32))
    chosen, found = experts.choose_experts(config, logits, np.zeros(4, np.float32))
    np.testing.assert_array_equal(chosen, [[2, 1]])
    np.testing.assert_allclose(found, [[3 * 2 / 4, 3 * 1 / 4]], rtol=1e-5)


def test_sparsemixer_weighs_an_expert_among_those_nearly_as_good():
    config = ExpertsConfig(4, 2, F, router="sparsemixer", jitter=0.1)
    chosen, found = experts.choose_experts(config, np.array([[1.0, 4.0, 3.5, 2.9]], np.float32))
    np.testing.assert_array_equal(chosen, [[1, 2]])
    # (4 - 3.5) / 4 and (3.5 - 2.9) / 3.5 are below 0.2, (4 - 2.9) / 4 is not.
    expected = 1 / (1 + np.exp([3.5 - 4, 2.9 - 3.5]))
    np.testing.assert_allclose(found, [expected], rtol=1e-6)


@pytest.mark.parametrize(("shape", "own"), [((2, 2, 2), 3), ((2, 1, 4), 6)])
def test_gradients_on_eight_devices_are_those_of_one(shape, own):
    """Also where `model` does not divide the experts, which are then kept whole."""
    x, chosen, weighed, matrices = draw(16, 2)
    rows = [jnp.asarray(part.reshape(4, 4, -1)) for part in (x, chosen, weighed)]
    matrices = jax.tree.map(jnp.asarray, matrices)

    def loss(x, weighed, matrices, mesh):
        out = experts._mix_on_mesh(x, rows[1], weighed, matrices, opened, mesh)
        return jnp.mean(jnp.sin(out))

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)
    mesh = make_mesh(shape)
    rules = sharding.param_shardings(mesh, {"layers": {"0": {"experts": matrices}}})
    placed = jax.device_put(matrices, rules["layers"]["0"]["experts"])
    held = placed["gate"]["weight"].sharding.shard_shape((E, F, D))
    assert held == (own, F, D // shape[1])
    expected = gradient(rows[0], rows[2], matrices, None)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected))
    found = gradient(rows[0], rows[2], placed, mesh)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), atol=1e-5)


@pytest.fixture
def folder(tmp_path):
    save_hf(tmp_path, CONFIG, tiny.make_params(CONFIG), [263])
    return tmp_path


def change(folder, changed):
    """Writes the tensors of a folder anew after a change of them."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    changed(tensors)
    safetensors.numpy.save_file(tensors, path)


LAYER = "model.layers.1.mlp.experts."


def fuse(tensors):
    """As the modules of transformers 5 have them."""
    parts = {
        name: np.stack([tensors.pop(f"{LAYER}{i}.{name}_proj.weight") for i in range(8)])
        for name in ("gate", "up", "down")
    }
    tensors[LAYER + "gate_up_proj"] = np.concatenate([parts["gate"], parts["up"]], axis=1)
    tensors[LAYER + "down_proj"] = parts["down"]


def test_both_forms_of_a_checkpoint_are_read_in_parts(folder):
    expected = load_params(folder, CONFIG, jnp.float32)
    names = safetensors.numpy.load_file(folder / "model.safetensors")
    assert names[LAYER + "7.down_proj.weight"].shape == (32, 16)
    change(folder, fuse)
    shardings = functools.partial(sharding.param_shardings, make_mesh((2, 2, 2)))
    found = load_params(folder, CONFIG, jnp.float32, shardings)
    chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(expected))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda t: t.pop(LAYER + "3.up_proj.weight"), r"experts\.3\.up_proj\.weight: missing"),
        (
            lambda t: t.update({LAYER + "3.up_proj.weight": np.zeros((15, 32), np.float32)}),
            r"experts\.3\.up_proj\.weight: shape \(15, 32\), expected \(16, 32\)",
        ),
        (
            lambda t: [t.pop(f"{LAYER}7.{name}_proj.weight") for name in ("gate", "up", "down")],
            r"experts\.\*\.down_proj\.weight: shape \(7, 32, 16\), expected \(8, 32, 16\)",
        ),
        (
            lambda t: t.update({LAYER + "3.extra_proj.weight": np.zeros((1, 1), np.float32)}),
            r"experts\.3\.extra_proj\.weight: not a weight of this qwen2_moe model",
        ),
        (
            lambda t: t.update({LAYER + "down_proj": np.zeros((8, 32, 16), np.float32)}),
            r"experts\.down_proj and .*experts\.0\.down_proj\.weight are the same",
        ),
    ],
)
def test_what_is_wrong_with_an_expert_is_named(folder, changed, message):
    change(folder, changed)
    with pytest.raises(ValueError, match=message) as raised:
        load_params(folder, CONFIG, jnp.float32)
    assert str(folder) in str(raised.value)


def test_an_adapter_of_a_single_expert_is_merged(folder, tmp_path):
    a, b = np.ones((2, 32), np.float32), np.ones((16, 2), np.float32)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "x", "r": 2, "lora_alpha": 1}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    module = f"base_model.model.{LAYER}3.up_proj"
    factors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    safetensors.numpy.save_file(factors, adapter / "adapter_model.safetensors")
    (base, found) = (
        load_params(folder, CONFIG, jnp.float32, adapter=each)["layers"][1]["experts"]
        for each in (None, adapter)
    )
    update = np.asarray(found["up"]["weight"] - base["up"]["weight"])
    np.testing.assert_allclose(update[3], 1.0, atol=1e-5)  # 1 / 2 of 2
    assert not np.delete(update, 3, axis=0).any()
    np.testing.assert_array_equal(found["gate"]["weight"], base["gate"]["weight"])


def test_layers_that_predict_further_tokens_are_not_read(tmp_path):
    config = dataclasses.replace(
        CONFIG,
        model_type="glm4_moe",
        experts=dataclasses.replace(CONFIG.experts, router="sigmoid", shared=32, shared_gate=False),
    )
    params = tiny.make_params(config)
    save_hf(tmp_path, config, params, [263])
    extra = {
        "model.layers.2.eh_proj.weight": np.zeros((32, 64), np.float32),
        **{
            f"model.layers.2.mlp.experts.0.{name}_proj.weight": np.zeros((16, 32), np.float32)
            for name in ("gate", "up", "down")
        },
    }
    change(tmp_path, lambda tensors: tensors.update(extra))
    chex.assert_trees_all_equal(load_params(tmp_path, config, jnp.float32), params)


def test_what_corrects_the_choice_is_never_rounded(tmp_path):
    """Nor when the folder is written in bfloat16: transformers keeps it in float32 too."""
    experts = dataclasses.replace(CONFIG.experts, router="sigmoid", shared=32, shared_gate=False)
    config = dataclasses.replace(CONFIG, model_type="glm4_moe", experts=experts)
    params = tiny.make_params(config)
    correction = jnp.linspace(0, 1, 8)
    params["layers"][1]["experts"]["router"]["correction"] = correction
    for dtype in (jnp.float32, jnp.bfloat16):
        save_hf(tmp_path, config, params, [263], dtype)
        params = load_params(tmp_path, config, jnp.bfloat16)
        router = params["layers"][1]["experts"]["router"]
        assert router["weight"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(router["correction"], correction, strict=True)


def test_low_rank_updates_of_experts_are_refused():
    params, key = tiny.make_params(CONFIG), jax.random.key(0)
    assert len(init_lora(params, 2, ("q", "o"), key)) == 4
    with pytest.raises(ValueError, match=r"down is a matrix of each expert.*expected .*q, k, v, o"):
        init_lora(params, 2, ("q", "down"), key)


def test_a_description_says_what_a_token_meets(folder, monkeypatch, capsys):
    tiny.make_tokenizer().save_pretrained(folder)
    monkeypatch.setattr(sys, "argv", ["t3jax.lm", str(folder)])
    monkeypatch.setattr(places.Place, "read", None)  # a weight that is read ends the test
    assert describe.main() == 0
    said = capsys.readouterr().out
    assert "a qwen2_moe model; it loads" in said
    assert (
        "8 experts of width 16, 2 for a token and one of width 24 for all in 1 layers, else MLPs "
        "of width 64"
    ) in said
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    count = sum(tensor.size for tensor in tensors.values())
    spared = sum(tensor.size for name, tensor in tensors.items() if ".experts." in name) * 6 // 8
    assert f"{count:,} weights, {count - spared:,} of them for a token: 0.00 GiB" in said
