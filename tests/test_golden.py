"""Equality with PyTorch where it is not installed: arrays that `golden/make_golden.py` made."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny

import t3jax
from t3jax.lm import attention, families, from_params, read_config
from t3jax.lm.weights import load_params
from t3jax.sampling import Sampler

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = ("llama3_untied", "gqa_tied", "biases")
FAMILIES = sorted(set(families.FAMILIES) - {"llama"})
TEMPERATURE, SCALE = 2.5, 1.0


def load(name, folder):
    """The arrays of a file and its model, loaded from a folder."""
    golden = dict(np.load(GOLDEN / f"{name}.npz"))
    (folder / "config.json").write_text(str(golden["config"]))
    prefix = "weights/"
    weights = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    config = read_config(folder)
    params = load_params(folder, config, jnp.float32)
    eos = json.loads(str(golden["config"]))["eos_token_id"]
    return golden, from_params(config, params, None, (eos,), name)


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    """The arrays of a file, its model, and its head."""
    golden, lm = load(request.param, tmp_path_factory.mktemp(request.param))
    head = t3jax.Head(
        t3jax.HeadConfig(lm.hidden_size, lm.vocab_size, rank=len(golden["head/hidden"])),
        {
            "hidden": ({"weight": jnp.asarray(golden["head/hidden"])},),
            "output": jnp.asarray(golden["head/output"]),
        },
        TEMPERATURE,
        SCALE,
        model=request.param,
    )
    return golden, lm, head


def close(found, expected, atol):
    np.testing.assert_allclose(np.asarray(found), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("queries", [128, 3])  # that attend at a time: all, or one part of several
@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states_and_logits(monkeypatch, case, side, queries):
    golden, lm, _ = case
    monkeypatch.setitem(attention._QUERIES, "cpu", queries)
    tokens, mask = golden[f"{side}/tokens"], golden[f"{side}/mask"]
    hidden, logits, _ = tiny.read(lm.apply, lm.unembed, lm.params, tokens, mask)
    close(np.asarray(hidden)[mask], golden[f"{side}/hidden"], 1e-4)
    close(np.asarray(logits)[mask][::4], golden[f"{side}/logits"], 1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, tmp_path, monkeypatch):
    """Hidden states and logits, padded on either side, and greedy text after the left one."""
    monkeypatch.setitem(attention._QUERIES, "cpu", 3)
    golden, lm = load(name, tmp_path)
    rows, length = golden["left/tokens"].shape
    steps = golden["greedy"].shape[1]
    apply = jax.jit(lm.apply)
    for side in ("right", "left"):
        tokens, mask = golden[f"{side}/tokens"], golden[f"{side}/mask"]
        cache = lm.init_cache(rows, length + steps)
        hidden, logits, cache = tiny.read(lm.apply, lm.unembed, lm.params, tokens, mask, cache)
        close(np.asarray(hidden)[mask], golden[f"{side}/hidden"], 1e-4)
        close(np.asarray(logits)[mask][::4], golden[f"{side}/logits"], 1e-4)
        in_parts, _ = apply(lm.params, tokens, None, mask, None)
        close(np.asarray(in_parts)[mask], golden[f"{side}/hidden"], 1e-4)
    found = tiny.continue_batch(lm, logits, cache, steps)
    np.testing.assert_array_equal(found, golden["greedy"])
    assert steps == 32
    assert min(len(set(row)) for row in found.tolist()) > 3  # the text keeps changing


def test_the_method(case):
    """From the model's own hidden states to guided log-probabilities, the loss and its gradient."""
    golden, _, head = case
    mask, tokens = golden["right/mask"], golden["right/tokens"]
    states = np.zeros((*mask.shape, head.config.hidden_size), np.float32)
    states[mask] = golden["right/hidden"]

    @jax.jit
    def method(params, logits):
        pooled = t3jax.causal_mean(jnp.asarray(states), jnp.asarray(mask))

        def loss(params):
            targets = jnp.asarray(tokens[:, 1:])
            labels = jnp.broadcast_to(jnp.asarray(golden["retain"])[:, None], targets.shape)
            scores = t3jax.target_scores(params, pooled[:, :-1], targets)
            return t3jax.classifier_loss(scores, labels, jnp.asarray(golden["answer"][:, 1:]))

        scores = t3jax.head_scores(params, pooled)[mask][::4]
        tempered = t3jax.tempered_logprobs(logits, TEMPERATURE)
        guided = t3jax.tilt(tempered, scores, SCALE)
        return pooled[mask], scores, guided, *jax.value_and_grad(loss)(params)

    pooled, scores, guided, loss, grads = method(head.params, golden["right/logits"])
    close(pooled, golden["pooled"], 1e-5)
    close(scores, golden["scores"], 1e-5)
    close(guided, golden["guided"], 1e-5)
    close(loss, golden["loss"], 1e-5)
    close(grads["hidden"][0]["weight"], golden["gradient/hidden"], 1e-5)
    close(grads["output"], golden["gradient/output"], 1e-5)


@pytest.mark.parametrize("case", NAMES[:1], indirect=True)
def test_greedy_text(case):
    golden, lm, head = case
    prompts = [golden[f"prompt/{i}"].tolist() for i in range(3)]
    steps = max(len(golden[f"greedy/{i}"]) for i in range(3))
    sampler = Sampler(lm, head)
    base = sampler.generate(prompts, max_new_tokens=steps, base_temperature=1.0, guidance_scale=0.0)
    guided = sampler.generate(prompts, max_new_tokens=steps)
    for i in range(3):
        assert base[i].tokens == golden[f"greedy/{i}"].tolist()
        assert guided[i].tokens == golden[f"guided_greedy/{i}"].tolist()
        assert base[i].tokens != guided[i].tokens  # the head decides
