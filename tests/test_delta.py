"""Gated delta nets and short convolutions: the rule, states, and all that reads a text."""

import dataclasses
import queue

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import t3jax
from t3jax import pooling
from t3jax.data import Example
from t3jax.head import head_scores
from t3jax.lm.delta import apply_delta_rule
from t3jax.sampling import Sampler, SamplingOptions
from t3jax.serving.engine import Engine
from t3jax.serving.messages import EngineOptions, Request
from t3jax.training import TrainConfig, train_heads

CONFIG = tiny.DELTA
LM = tiny.make_lm(CONFIG)
CONVOLVED = tiny.make_lm(tiny.CONV)
HEAD = tiny.make_head(LM)
T, S = HEAD.base_temperature, HEAD.guidance_scale


def draw_text(length, alike):
    """Queries, keys and values of 2 rows, 2 heads with 2 of values; how far each token corrects."""
    random = np.random.default_rng(0)
    q, k = random.standard_normal((2, 2, length, 2, 4))
    v = random.standard_normal((2, length, 2, 2, 3))
    k = np.where(random.random((2, length, 1, 1)) < alike, k[:, :1], k)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    strengths, decays = random.uniform(0.5, 1.0, (2, 2, length, 2, 2))
    unreal = random.random((2, length, 1, 1)) < 0.2
    memory = random.standard_normal((2, 2, 2, 4, 3))
    log_decays = np.where(unreal, 0.0, np.log(decays))
    return q, k, v, np.where(unreal, 0.0, strengths), log_decays, memory


@pytest.mark.parametrize(("length", "alike"), [(150, 0.9), (1, 0.0)])
def test_chunks_do_what_the_rule_does_token_by_token(length, alike):
    """Also where most keys are the same, so that each token corrects nearly all before it."""
    q, k, v, strengths, log_decays, memory = text = draw_text(length, alike)
    expected = []
    for t in range(length):
        memory = memory * np.exp(log_decays[:, t])[..., None, None]
        error = v[:, t] - np.einsum("bkd,bkgde->bkge", k[:, t], memory)
        corrected = strengths[:, t, ..., None] * error
        memory = memory + np.einsum("bkd,bkge->bkgde", k[:, t], corrected)
        expected.append(np.einsum("bkd,bkgde->bkge", q[:, t], memory))
    found, last = apply_delta_rule(*(jnp.asarray(x, jnp.float32) for x in text))
    np.testing.assert_allclose(found, np.stack(expected, axis=1), atol=1e-5)
    np.testing.assert_allclose(last, memory, atol=1e-5)


def read(lm, tokens, mask, cache=None):
    hidden, _, cache = tiny.read(lm.apply, lm.unembed, lm.params, tokens, mask, cache)
    return np.asarray(hidden), cache


@pytest.mark.parametrize("lm", [LM, CONVOLVED], ids=["delta net", "convolution"])
def test_padding_is_not_there_wherever_it_stands(lm):
    tokens = np.random.default_rng(1).integers(0, 264, (4, 24)).astype(np.int32)
    whole, _ = read(lm, tokens, np.ones((4, 24), bool))
    mask = np.zeros((4, 40), bool)
    mask[0, 16:] = mask[1, :24] = mask[2, 5:29] = True
    mask[3, np.random.default_rng(2).choice(40, 24, replace=False)] = True
    padded = np.zeros((4, 40), np.int32)
    padded[mask] = tokens.reshape(-1)
    found, _ = read(lm, padded, mask)
    np.testing.assert_allclose(found[mask].reshape(whole.shape), whole, atol=2e-5)


@pytest.mark.parametrize("lm", [LM, CONVOLVED], ids=["delta net", "convolution"])
def test_pieces_and_single_tokens_leave_what_the_whole_text_leaves(lm):
    """Each row at its own pace, as prompts are read that are padded on the right."""
    tokens = np.random.default_rng(1).integers(0, 264, (4, 24)).astype(np.int32)
    whole, _ = read(lm, tokens, np.ones((4, 24), bool))
    cache, count = lm.init_cache(4, 48), np.zeros(4, int)
    cache = cache._replace(cursor=jnp.zeros(4, jnp.int32))
    for lengths in ([8, 3, 0, 1], [8, 8, 8, 2], [7, 6, 8, 0], *[[1, 1, 1, 1]] * 8):
        lengths = np.minimum(lengths, 24 - count)
        mask = np.arange(max(lengths.max(), 1)) < lengths[:, None]
        if mask.shape[1] > 1:
            mask = np.pad(mask, ((0, 0), (0, 8 - mask.shape[1])))
        piece = np.zeros(mask.shape, np.int32)
        rows, places = np.nonzero(mask)
        piece[mask] = tokens[rows, count[rows] + places]
        hidden, cache = read(lm, piece, mask, cache)
        np.testing.assert_allclose(hidden[mask], whole[rows, count[rows] + places], atol=2e-5)
        count += lengths
    assert count.tolist() == [24, 24, 24, 11]


def guided(prompt, steps):
    """Greedy guided tokens, the text read anew for each."""
    tokens, mask = np.zeros((1, 64), np.int32), np.arange(64)[None] < len(prompt)
    tokens[0, : len(prompt)] = prompt
    for at in range(len(prompt), len(prompt) + steps):
        hidden, logits, _ = tiny.read(LM.apply, LM.unembed, LM.params, tokens, mask)
        mean = pooling.causal_mean(hidden, jnp.asarray(mask))[:, at - 1]
        scores = head_scores(HEAD.params, mean, HEAD.config.activation)
        served = logits[:, at - 1] / T + S * jax.nn.log_sigmoid(scores)
        tokens[0, at], mask[0, at] = np.argmax(served), True
    return tokens[0, len(prompt) : len(prompt) + steps].tolist()


PROMPTS = [[5, 9, 200, 31], [77], list(range(40, 65)), [3, 3, 3], [250, 1], [7] * 12]


def test_guided_text_whoever_is_beside_it_and_whichever_row_it_takes():
    lengths = [20, 20, 20, 20, 20, 20]
    expected = [guided(prompt, n) for prompt, n in zip(PROMPTS[:3], lengths, strict=False)]
    # The third token of two answers ends all that have it: rows become free at different times.
    ends = (expected[0][2], expected[1][6])
    lm = dataclasses.replace(LM, eos_ids=ends)
    alone = [
        Sampler(lm, HEAD).generate([prompt], max_new_tokens=20)[0].tokens for prompt in PROMPTS
    ]
    few = Sampler(lm, HEAD, batch_size=2, chunk=2).generate(PROMPTS, max_new_tokens=20)
    assert [sample.tokens for sample in few] == alone
    assert len({len(tokens) for tokens in alone}) > 1
    for found, whole in zip(alone, expected, strict=False):
        assert found == whole[: len(found)]
    assert alone != [sample.tokens for sample in Sampler(lm).generate(PROMPTS, max_new_tokens=20)]


def answer(engine, prompt):
    """Tokens of a greedy answer."""
    tokens, events = [], queue.Queue()
    request = Request(np.array(prompt, np.int32), SamplingOptions(max_new_tokens=9))
    engine.submit([request], lambda _, event: events.put(event))
    while True:
        event = events.get(timeout=120)
        tokens += event.tokens
        if event.finish is not None:
            return tokens


def test_a_head_trained_on_its_features_is_served(tmp_path):
    """Also where an answer goes on from a beginning that is kept: its memory is kept with it."""
    random = np.random.default_rng(3)
    texts = [random.integers(0, 264, n).astype(np.int32) for n in (20, 31, 9, 26)]
    features = t3jax.load_or_compute_features(LM, [Example(text, 4) for text in texts], tmp_path)
    for i, text in enumerate(texts):
        tokens, mask = np.zeros((1, 64), np.int32), np.arange(64)[None] < len(text)
        tokens[0, : len(text)] = text
        hidden, _, _ = tiny.read(LM.apply, LM.unembed, LM.params, tokens, mask)
        mean = np.asarray(pooling.causal_mean(hidden, jnp.asarray(mask)))[0, 3 : len(text) - 1]
        np.testing.assert_allclose(features.select([i]).pooled, mean, atol=2e-5)
    recipe = TrainConfig(epochs=30, batch_size=2, learning_rate=0.3)
    halves = features.select([0, 1]), features.select([2, 3])
    (head,) = train_heads(*halves, HEAD.config, recipe)

    options = EngineOptions(rows=2, chunk=4, piece=32, max_length=96, queue=4, heads=1, rank=8)
    engine = Engine(LM, options, base_temperature=T, guidance_scale=S)
    engine.install("head", head)
    engine.start()
    prompts = [[7] * 32 + rest for rest in ([5], [77, 3, 250], [40, 41])]
    found = [answer(engine, prompt) for prompt in prompts]
    shared = engine.stats.shared_tokens
    engine.stop()
    assert shared == 32  # of the third prompt: what comes twice is kept
    served = Sampler(LM, head, base_temperature=T, guidance_scale=S)
    assert found == [sample.tokens for sample in served.generate(prompts, max_new_tokens=9)]
    base = served.generate(prompts, max_new_tokens=9, base_temperature=1.0, guidance_scale=0.0)
    assert found != [sample.tokens for sample in base]
