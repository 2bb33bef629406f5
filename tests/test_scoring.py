import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import t3jax
from benchmarks.aot import collectives, dimensions
from t3jax.data import Example, PromptFormat, encode_records
from t3jax.evaluation import scoring
from t3jax.evaluation.scoring import score_texts, token_statistics
from t3jax.evaluation.settings import BASE, Setting
from t3jax.refinements import Refinements

LENGTHS = [(36, 33), (40, 17), (47, 46), (33, 30), (38, 37), (48, 32)]  # one compiled shape
SETTINGS = (
    Setting("tilted", 2.5, 1.0, (1,)),
    BASE,
    Setting("strong", 1.0, 4.0, (0,)),
    Setting("off", 1.0, 0.0, (1,)),
    Setting("flat", 2.5),
    Setting("weak", 2.5, 0.5, (1,)),
    Setting("both", 2.5, 1.0, (0, 1)),
    Setting("refined", 2.5, 1.5, (1, 0), Refinements(gated=True, protected=(7, 101))),
)


@functools.cache
def hidden_states(lm):
    """Of random texts; their last tokens are chosen later, which changes nothing before."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (len(LENGTHS), 48)).astype(np.int32)
    hidden, _ = jax.jit(lm.apply)(lm.params, jnp.asarray(tokens))
    return tokens, np.asarray(hidden, np.float64)


@pytest.fixture(scope="module")
def examples(tiny_lm):
    tokens, hidden = hidden_states(tiny_lm)
    table = np.asarray(tiny_lm.params["embed"]["weight"], np.float64)
    found = []
    for row, (n, start) in enumerate(LENGTHS):
        text = tokens[row, :n].copy()
        if row % 2:
            text[-1] = np.argmax(table @ hidden[row, n - 2])  # what the base model would say
        found.append(Example(text, start))
    return found


@pytest.fixture(scope="module")
def heads(tiny_lm):
    second = tiny.make_head(tiny_lm, rank=5, seed=2)
    config = dataclasses.replace(second.config, activation="tanh")
    return [tiny.make_head(tiny_lm), dataclasses.replace(second, config=config, prior_shift=0.7)]


def score(lm, examples, heads, settings=SETTINGS):
    # Several batches, and chunks that end within a text.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "POSITIONS_PER_CHUNK", 16)
        return score_texts(lm, examples, settings, heads, moments=True, tokens_per_batch=96)


@pytest.fixture(scope="module")
def found(tiny_lm, examples, heads):
    return score(tiny_lm, examples, heads)


@pytest.fixture(scope="module")
def stated(tiny_lm, examples, heads):
    """The definition, text by text, in float64 over the whole vocabulary."""
    _, hidden = hidden_states(tiny_lm)
    table = np.asarray(tiny_lm.params["embed"]["weight"], np.float64)
    results = []
    for setting in SETTINGS:
        fields = {name: [] for name in ("logprobs", "correct", "mean", "variance", "scores")}
        for row, example in enumerate(examples):
            for t in range(example.answer_start, len(example.tokens)):
                logits = table @ hidden[row, t - 1]
                temperature, f = setting.base_temperature, 1.0
                if setting.heads:
                    g = [g_scores(heads[i], hidden[row, :t].mean(axis=0)) for i in setting.heads]
                    f = 1 / (1 + np.exp(-np.array(g)).sum(axis=0))
                    fields["scores"].append(np.log(f / (1 - f))[example.tokens[t]])
                if setting.refinements.gated:
                    temperature = 1 + (temperature - 1) * (1 - np.sum(softmax(logits) * f))
                tempered = softmax(logits / temperature)
                p = tempered * f**setting.guidance_scale
                p /= p.sum()
                if stop := list(setting.refinements.protected):
                    p[stop] = 0
                    p *= (1 - tempered[stop].sum()) / p.sum()
                    p[stop] = tempered[stop]
                fields["logprobs"].append(np.log(p[example.tokens[t]]))
                fields["correct"].append(np.argmax(p) == example.tokens[t])
                fields["mean"].append(np.sum(p * np.log(p)))
                fields["variance"].append(np.sum(p * np.log(p) ** 2) - np.sum(p * np.log(p)) ** 2)
        results.append({name: np.array(values) for name, values in fields.items()})
    return results


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def g_scores(head, pooled):
    hidden = np.asarray(head.params["hidden"][0]["weight"], np.float64) @ pooled
    hidden = np.tanh(hidden) if head.config.activation == "tanh" else hidden
    return np.asarray(head.params["output"], np.float64) @ hidden + head.prior_shift


@pytest.mark.parametrize("k", range(len(SETTINGS)), ids=[setting.name for setting in SETTINGS])
def test_every_field_is_the_full_softmax_s(found, stated, k):
    for name in ("logprobs", "correct", "mean", "variance"):
        np.testing.assert_allclose(getattr(found[k], name), stated[k][name], atol=1e-4, rtol=1e-4)
    if not SETTINGS[k].heads:
        assert stated[k]["correct"].sum() == 3
        assert found[k].retain_scores is None
    else:
        np.testing.assert_allclose(found[k].retain_scores, stated[k]["scores"], atol=1e-4)
        np.testing.assert_allclose(
            found[k].retain_prob, 1 / (1 + np.exp(-stated[k]["scores"])), atol=1e-5
        )


def test_losses_are_means_over_each_answer(found, stated, examples):
    ends = np.cumsum([n - start for n, start in LENGTHS])
    expected = [-part.mean() for part in np.split(stated[0]["logprobs"], ends[:-1])]
    np.testing.assert_allclose(found[0].avg_loss, expected, atol=1e-4)
    np.testing.assert_allclose(found[0].select(2, 5).avg_loss, expected[2:5], atol=1e-4)


def test_rows_of_tokens_end_before_the_closing_one(found):
    mask = found[1].mask_without_last()
    rows = found[1].padded(found[1].logprobs)
    assert mask.sum(axis=1).tolist() == [n - start - 1 for n, start in LENGTHS]
    np.testing.assert_array_equal(rows[0][mask[0]], found[1].logprobs[:2])


def test_a_head_at_strength_0_and_temperature_1_is_the_base(found):
    np.testing.assert_array_equal(found[1].logprobs, found[3].logprobs)


def test_a_mesh_gives_the_same_and_exchanges_no_vocabulary(examples, heads, found, monkeypatch):
    of_vocabulary = set()
    score_chunk = scoring._score

    def recorded(*args):
        if not of_vocabulary:
            text = score_chunk.lower(*args).compile().as_text()
            shapes = {each.shape for each in collectives(text)}
            of_vocabulary.update(s for s in shapes if {264, 132} & set(dimensions(s)))
        return score_chunk(*args)

    monkeypatch.setattr(scoring, "_score", recorded)
    sharded = tiny.make_lm(mesh=t3jax.make_mesh((2, 2, 2)))
    chosen = (1, 0, 7)  # plain and refined
    for k, many in zip(
        chosen, score(sharded, examples, heads, [SETTINGS[k] for k in chosen]), strict=True
    ):
        np.testing.assert_allclose(many.logprobs, found[k].logprobs, atol=1e-4)
        np.testing.assert_array_equal(many.correct, found[k].correct)
    assert of_vocabulary == {"f32[132,32]"}  # the LM head's rows, gathered along `fsdp`


def test_statistics_of_extreme_distributions():
    logits = jnp.asarray([[0.0, -jnp.inf, 0.0, 200.0], [3.0, 3.0, -jnp.inf, 3.0]])
    logprob, correct, mean, variance = token_statistics(logits, jnp.asarray([3, 1]), moments=True)
    np.testing.assert_allclose(logprob, [0.0, -np.log(3)], atol=1e-6)
    assert correct.tolist() == [True, False]  # of equals the first is the argmax
    np.testing.assert_allclose(mean, [0.0, -np.log(3)], atol=1e-6)
    np.testing.assert_allclose(variance, [0.0, 0.0], atol=1e-6)


def test_bad_requests_are_named(tiny_lm, examples):
    with pytest.raises(ValueError, match="there is no head 0, only 0 heads"):
        score_texts(tiny_lm, examples, [Setting("x", 1.0, 1.0, (0,))])
    with pytest.raises(ValueError, match="needs a head"):
        Setting("x", 1.0, 1.0)
    with pytest.raises(ValueError, match="needs a head, and so do refinements"):
        Setting("x", 2.0, refinements=Refinements(gated=True))
    with pytest.raises(ValueError, match="base_temperature must be positive"):
        Setting("x", 0.0)
    with pytest.raises(ValueError, match="becomes a folder's"):
        Setting("../x")
    with pytest.raises(ValueError, match="no settings"):
        score_texts(tiny_lm, examples, [])
    with pytest.raises(ValueError, match="example 1 has no answer"):
        score_texts(tiny_lm, [examples[0], Example(examples[1].tokens, 40)], [BASE])


def test_the_sampler_draws_from_what_is_scored(tiny_lm, heads, monkeypatch):
    """Log-probabilities that the sampler returns, of drawn answers, are the scorer's."""
    refinements = Refinements(gated=True, protected=tiny_lm.eos_ids, combine="product")
    setting = Setting("refined", 2.5, 0.8, (0, 1), refinements)
    sampler = t3jax.Sampler(
        tiny_lm, heads, base_temperature=2.5, guidance_scale=0.8, refinements=refinements
    )
    prompts = [list(range(9)), [77, 3, 5]]
    samples = sampler.generate(prompts, temperature=1.0, max_new_tokens=20, logprobs=True)
    texts = [
        Example(np.array(prompt + sample.tokens, np.int32), len(prompt))
        for prompt, sample in zip(prompts, samples, strict=True)
    ]
    monkeypatch.setattr(scoring, "POSITIONS_PER_CHUNK", 16)
    refined, base = score_texts(tiny_lm, texts, [setting, BASE], heads)
    assert base.mean is None  # nobody asked for moments
    guided = np.concatenate([sample.guided_logprobs for sample in samples])
    assert np.abs(guided - base.logprobs).max() > 1  # the test would be idle otherwise
    np.testing.assert_allclose(guided, refined.logprobs, atol=5e-5)
    np.testing.assert_allclose(
        np.concatenate([sample.base_logprobs for sample in samples]), base.logprobs, atol=5e-5
    )


def head_of_features(lm, kind, seed=3):
    """A random head that reads features of a kind."""
    config = t3jax.HeadConfig(lm.hidden_size, lm.vocab_size, 4, "gelu", bias=True, features=kind)
    params = t3jax.init_head(jax.random.key(seed), config)
    return t3jax.Head(config, params, 1.0, 1.0, lm.name)


@pytest.mark.parametrize("kind", ["last", "mean+last"])
def test_heads_read_the_last_state_when_scoring_and_when_sampling(tiny_lm, kind):
    head = head_of_features(tiny_lm, kind)
    prompt = np.arange(40, 60, dtype=np.int32)
    sampler = t3jax.Sampler(tiny_lm, head, guidance_scale=3.0)
    (sample,) = sampler.generate([prompt], temperature=1.0, max_new_tokens=12, logprobs=True)
    text = Example(np.concatenate([prompt, np.array(sample.tokens, np.int32)]), len(prompt))
    (scores,) = score_texts(tiny_lm, [text], [Setting("s", 1.0, 3.0, (0,))], [head])
    np.testing.assert_allclose(scores.logprobs, sample.guided_logprobs, atol=1e-4)
    # And they are those of the head's definition on the hidden states.
    hidden, _ = jax.jit(tiny_lm.apply)(tiny_lm.params, jnp.asarray(text.tokens[None]))
    mean = t3jax.causal_mean(hidden, jnp.ones((1, len(text.tokens)), bool))
    features = jnp.concatenate([mean, hidden], -1) if kind == "mean+last" else hidden
    expected = t3jax.target_scores(
        head.params, features[0, len(prompt) - 1 : -1], jnp.asarray(sample.tokens), "gelu"
    )
    np.testing.assert_allclose(scores.retain_scores, expected, atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("reference_mask", [False, True])
def test_losses_equal_pytorch_s(tmp_path, reference_mask):
    """Base and guided, with correct masking and with the reference evaluator's: pad is eos here."""
    torch = pytest.importorskip("torch")
    import reference

    model = reference.make_llama("gqa_tied")
    lm = t3jax.load_lm(reference.save_model(model, tmp_path / "model"), dtype="float32")
    head = tiny.make_head(lm)
    theirs = reference.GuidanceHead(head.config.hidden_size, head.config.vocab_size, 8)
    *_, last = layers = [layer for layer in theirs.proj if hasattr(layer, "weight")]
    with torch.no_grad():
        layers[0].weight[:] = torch.tensor(np.asarray(head.params["hidden"][0]["weight"]))
        last.weight[:] = torch.tensor(np.asarray(head.params["output"]))
    records = [
        {"question": "Who?", "answer": "Ada, of course."},
        {"question": "Where was she born?", "answer": "By a river."},
    ]
    texts = encode_records(lm.tokenizer, records, PromptFormat())
    settings = [BASE, Setting("guided", 2.5, 1.0, (0,))]
    found = score_texts(lm, texts, settings, [head], reference_mask=reference_mask, moments=True)

    pad = lm.tokenizer.eos_token_id
    tokens = torch.full((2, max(len(text.tokens) for text in texts)), pad)
    for row, text in enumerate(texts):
        tokens[row, : len(text.tokens)] = torch.tensor(text.tokens)
    mask = torch.arange(tokens.shape[1]) < torch.tensor([[len(text.tokens)] for text in texts])
    if reference_mask:
        mask = tokens != pad
    with torch.no_grad():
        out = model(input_ids=tokens, attention_mask=mask.long(), output_hidden_states=True)
        scores = theirs(reference.causal_mean(out.hidden_states[-1], mask))
    for ours, (temperature, scale) in zip(found, [(1.0, 0.0), (2.5, 1.0)], strict=True):
        logprobs = reference.guided(out.logits, scores, temperature, scale)
        expected = [
            -logprobs[row, text.answer_start - 1 : len(text.tokens) - 1]
            .gather(-1, tokens[row, text.answer_start : len(text.tokens), None])
            .mean()
            for row, text in enumerate(texts)
        ]
        np.testing.assert_allclose(ours.avg_loss, expected, atol=5e-5, rtol=0)
