"""T3's theorems: integrals, slopes, bounds, sequences, the diagnosis of a head."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.special import expit

from configs import default
from examples import theory
from t3jax import data
from t3jax.evaluation.scoring import BASE, Setting, score_texts
from t3jax.evaluation.store import Store
from t3jax.head_io import save_head
from t3jax.settings import replace
from t3jax.theory import bounds, classifiers, diagnose, errors, mixtures, sequences
from t3jax.theory.errors import Shape

SCALAR = jnp.float32


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def integrals(dimensions, spikes, log_peak, nodes):
    """Of p_r, p_f, p, p_f² and p_f^(3/2)."""
    world = mixtures.make_world(
        jax.random.key(1), SCALAR(log_peak), SCALAR(0.2), dimensions, 2, spikes
    )
    if nodes:
        rule = mixtures.importance_rule(jax.random.key(2), world, SCALAR(2.0), nodes)
    else:
        rule = mixtures.quadrature_rule(world, np.exp(-log_peak / dimensions) / spikes)
    parts = mixtures.log_parts(world, rule.z)
    square, power = 2 * parts[1] - log_peak, 1.5 * parts[1] - log_peak / 2
    return jnp.exp(
        jax.nn.logsumexp(jnp.stack([*parts, square, power]) + rule.log_weight[None], axis=1)
    )


@pytest.mark.parametrize(("dimensions", "spikes"), [(1, 1), (1, 3), (2, 2)])
def test_quadrature_resolves_narrow_spikes(dimensions, spikes):
    found = integrals(dimensions, spikes, float(np.log(1e3)), 0)
    # Powers of a Gaussian have integrals that are known; spikes do not overlap.
    expected = [1, 1, 1, 2 ** (-dimensions / 2), 1.5 ** (-dimensions / 2)]
    np.testing.assert_allclose(found, expected, rtol=3e-3)


def test_importance_sampling_integrates_in_100_dimensions():
    *parts, _, power = integrals(100, 1, 60.0, 4000)
    np.testing.assert_allclose(parts, 1, atol=0.03)
    assert power * 1.5**50 == pytest.approx(1, abs=0.03)


def test_importance_sampling_agrees_with_quadrature():
    exact, sampled = (
        errors.run_grid(
            Shape(1, "leaky", nodes=nodes, narrowest=1e-2),
            log_peaks=np.log([10.0, 100.0]),
            temperatures=(2.0,),
            seeds=(3,),
        )
        for nodes in (0, 2000)
    )
    for name, tolerance in (("log_forget", 0.05), ("retain", 0.02), ("excess_risk", 1e-4)):
        found, expected = getattr(sampled, name), getattr(exact, name)
        np.testing.assert_allclose(found, expected, atol=tolerance, err_msg=name)


def test_quadrature_is_refused_in_many_dimensions():
    world = mixtures.make_world(jax.random.key(0), SCALAR(5.0), SCALAR(0.2), 3)
    with pytest.raises(ValueError, match="1 or 2 dimensions, got 3; use importance_rule"):
        mixtures.quadrature_rule(world, 0.1)


@jax.jit
def fit_two_gaussians():
    """Share of retain, forget samples' spread over p_f's, excess risk of a fit and of none."""
    world = mixtures.make_world(jax.random.key(5), SCALAR(1.0), SCALAR(0.4), 2)
    z, labels = mixtures.draw_labelled(jax.random.key(1), world, 8000)
    spread = jnp.std(z, where=labels[:, None] == 0) / jnp.exp(world.forget.log_std[0])
    w = classifiers.fit_logistic(classifiers.quadratic_features(z), labels, jnp.ones(len(z)))
    exact = mixtures.bayes_logit(world, z)
    fits = (classifiers.quadratic_features(z) @ w, jnp.zeros(len(z)))
    risks = [classifiers.bernoulli_kl(exact, fit).mean() for fit in fits]
    return labels.mean(), spread, *risks


def test_logistic_regression_finds_the_bayes_classifier_of_two_gaussians():
    retained, spread, risk, constant = map(float, fit_two_gaussians())
    assert retained == pytest.approx(0.6, abs=0.02)
    assert spread == pytest.approx(1, abs=0.03)
    assert 0 < risk < 2e-3  # about 4 weights / (2 · 8000)
    assert constant > 0.05


def test_a_leaky_classifier_passes_a_share_of_what_is_to_be_forgotten():
    logits = jnp.linspace(-9, 9, 7)
    found = jax.nn.sigmoid(classifiers.leak(logits, jnp.log(SCALAR(0.2))))
    np.testing.assert_allclose(found, 0.2 + 0.8 * jax.nn.sigmoid(logits), atol=1e-6)


def test_a_trained_perceptron_gets_better_with_samples(monkeypatch):
    monkeypatch.setattr(classifiers, "_STEPS", 100)
    found = errors.run_grid(
        Shape(2, "perceptron", most_samples=400, nodes=100),
        log_peaks=(2.0,),
        temperatures=(1.0,),
        samples=(20, 400),
    )
    few, many = found.excess_risk[0, 0, :, 0, 0, 0, 0]
    assert many < 0.5 * few


# Errors.


def test_the_exact_classifier_without_tempering_gives_p_r():
    found = errors.run_grid(
        Shape(1, "exact", nodes=0), log_peaks=(5.0,), temperatures=(1.0, 2.0), seeds=(0, 1)
    )
    np.testing.assert_allclose(found.retain[..., 0, 0], 0, atol=1e-4)
    assert found.log_forget[..., 0, 0].max() < -8
    # Tempering a unit Gaussian costs (log T - 1 + 1 / T) / 2 nats, beside a small share of p_f.
    np.testing.assert_allclose(found.retain[..., 1, 0], 0.5 * (np.log(2) - 0.5), atol=0.01)
    np.testing.assert_array_equal(found.log_forget, found.log_bias)


def test_the_classifiers_part_grows_with_the_peak_to_the_power_1_over_t():
    peaks = np.log([1e20, 1e35])
    found = errors.run_grid(
        Shape(100, "leaky", retain_components=2, nodes=150),
        log_peaks=peaks,
        temperatures=(1.0, 2.0, 4.0),
    )
    np.testing.assert_allclose(found.excess_risk, 0.01, rtol=1e-3)
    for k, power in enumerate((1, 1 / 2, 1 / 4)):
        slopes = errors.fit_slopes(peaks, found.log_from_classifier[:, 0, 0, 0, :, k, 0])
        np.testing.assert_allclose(slopes, power, atol=0.02)
    # What leaks in mass stays at T = 1 and vanishes above.
    leak = found.leak[:, 0, 0, 0, 0, :, 0]
    assert leak[-1, 0] == pytest.approx(leak[0, 0], rel=0.2)
    assert np.all(leak[-1, 1:] < 0.2 * leak[0, 1:])


def test_the_best_temperature_is_the_predicted_one():
    temperatures = np.arange(1, 4, 0.1)
    found = errors.run_grid(
        Shape(10, "leaky", nodes=150), log_peaks=np.log([1e4, 1e8]), temperatures=temperatures
    )
    total = (np.exp(found.log_forget) + found.retain)[:, 0, 0, 0, 0, :, 0]
    best = temperatures[total.argmin(axis=1)]
    predicted = [
        temperatures[errors.predict_total(log_peak, 0.1, 0.01, 10, temperatures).argmin()]
        for log_peak in np.log([1e4, 1e8])
    ]
    np.testing.assert_allclose(best, predicted, atol=0.11)
    assert best[1] > best[0] + 0.5


def test_bad_grids_are_refused():
    with pytest.raises(ValueError, match="classifier must be one of"):
        Shape(1, "tree")
    grid = {"log_peaks": (1.0,), "temperatures": (1.0,)}
    with pytest.raises(ValueError, match="n = 9 is more than most_samples = 1"):
        errors.run_grid(Shape(1, "logistic"), **grid, samples=(9,))
    with pytest.raises(ValueError, match=r"T must be at least 1, got 0\.5"):
        errors.run_grid(Shape(1, "leaky"), log_peaks=(1.0,), temperatures=(0.5,))
    with pytest.raises(ValueError, match=r"gammas must lie in \(0, 1\)"):
        errors.run_grid(Shape(1, "leaky"), **grid, gammas=(1.0,))


# Statements.


@pytest.mark.parametrize("statement", bounds.STATEMENTS)
def test_statements_hold_on_random_mixtures(statement):
    found = bounds.check(statement, 3000, seed=1)
    assert (found.instances, found.violations) == (3000, 0)


@pytest.mark.parametrize("statement", sequences.STATEMENTS)
def test_statements_hold_on_random_chains(statement):
    found = sequences.check(statement, 200, seed=1)
    assert (found.instances, found.violations) == (200, 0)


def test_the_instances_reach_the_bounds():
    # A constant a little smaller would be wrong: the check would find it.
    for statement in ("1: retain", "3: class", "4:", "5:", "6: bias is b", "7:", "11:"):
        (name,) = (each for each in bounds.STATEMENTS if each.startswith(statement))
        left, right = bounds.STATEMENTS[name](
            bounds.draw_instances(np.random.default_rng(0), 10_000)
        )
        assert np.any(left > 0.85 * right), name


def test_the_spikes_powers_are_exact():
    for temperature in (1.0, 1.5, 4.0):
        (low, _, less), (high, _, more) = (
            bounds.spike_errors(peak, 0.1, 0.2, temperature) for peak in (1e9, 1e12)
        )
        assert np.log(high / low) / np.log(1e3) == pytest.approx(1 / temperature, abs=0.01)
        assert more / less == pytest.approx(1e3 ** (1 / temperature - 1), rel=0.01)
    # The same from its two atoms.
    atoms = bounds.Instances(
        measure=np.array([[1.0, 1e-3]]),
        retain=np.array([[1.0, 0.0]]),
        forget=np.array([[0.0, 1e3]]),
        gamma=np.array([0.1]),
        learned=np.array([[1.0, 0.2]]),
        temperature=np.array([2.0]),
        scale=np.ones(1),
    )
    estimate = atoms.estimate(atoms.learned)
    forget, retain, mass = bounds.spike_errors(1e3, 0.1, 0.2, 2.0)
    assert atoms.integral(atoms.forget * np.abs(estimate - atoms.retain)) == pytest.approx(forget)
    assert atoms.kl(atoms.retain, estimate) == pytest.approx(retain)
    assert estimate[0, 1] * 1e-3 == pytest.approx(mass)


# Sequences.


def test_tokens_and_whole_sequences_differ_once_tempered():
    rng = np.random.default_rng(0)
    retain, forget = (sequences.draw_chain(rng, 3, 4, 0.5) for _ in range(2))
    chain = 0.8 * retain + 0.2 * forget
    exact = sequences.exact_classifier(retain, forget, 0.2)
    gaps = []
    for temperature in (1.0, 1.5, 3.0):
        tokens = sequences.tilt_tokens(chain, exact, temperature)
        whole = sequences.tilt_whole(chain, exact[-1], temperature)
        assert tokens.sum() == pytest.approx(1)
        gaps.append(sequences.kl(tokens, whole))
    assert gaps[0] < 1e-12 < 1e-3 < gaps[1] < gaps[2]


def test_a_sequence_of_one_token_is_both():
    rng = np.random.default_rng(0)
    chain, last = sequences.draw_chain(rng, 5, 1, 1.0), rng.random(5)
    np.testing.assert_allclose(
        sequences.tilt_tokens(chain, [last], 2.0, 0.7), sequences.tilt_whole(chain, last, 2.0, 0.7)
    )


# The diagnosis.


def made_tokens(seed, retained, temperatures, rows=40, tokens=5, vocabulary=30):
    """Tokens of a world in which p_r, p and f* of every prefix are known."""
    rng = np.random.default_rng(seed)
    count = rows * tokens
    p_r, p_f = (rng.dirichlet(np.full(vocabulary, 0.3), count) + 1e-6 for _ in range(2))
    p_r, p_f = (p / p.sum(axis=1, keepdims=True) for p in (p_r, p_f))
    p = (p_r + p_f) / 2
    logit = np.log(p_r / p_f) + 0.5 * rng.normal(size=p.shape)
    drawn = np.array([rng.choice(vocabulary, p=each) for each in (p_r if retained else p_f)])
    at = np.arange(count), drawn

    def serve(temperature, scale=1.0):
        q = p ** (1 / temperature) * expit(logit) ** scale
        return np.log(q / q.sum(axis=1, keepdims=True))

    return diagnose.Tokens(
        starts=np.arange(rows + 1) * tokens,
        logits=logit[at],
        base=np.log(p[at]),
        plain=serve(1.0)[at],
        served=np.stack([serve(t)[at] for t in temperatures]),
        twin=np.log(p_r[at]),
    )


def test_a_diagnosis_bounds_what_is_measured():
    temperatures = (1.0, 1.5, 2.5)
    forget, retain = (made_tokens(seed, seed == 1, temperatures) for seed in (0, 1))
    found = diagnose.diagnose(forget, retain, temperatures)
    low, high = found.interval
    assert 0 < low < found.loss < high < np.log(2)
    assert found.gamma == 0.5
    amplified = np.exp(forget.served) / expit(forget.logits)
    bound = np.sqrt(np.mean(amplified**2, axis=1) * high / (2 * 0.5))  # statement 11
    np.testing.assert_allclose(found.bound, np.minimum(bound, 1))
    assert np.any(found.bound < 1)
    assert found.price[0] == 0 < found.price[1] < found.price[2]
    np.testing.assert_allclose(  # statement 6: the same rows, so that it is exact
        found.measured.retain - found.measured.retain[0], found.price, atol=1e-12
    )
    assert np.all(found.measured.retain < found.retain)
    rare = forget.twin < np.log(0.1)
    gap = np.abs(np.exp(forget.served[2]) - np.exp(forget.twin))[rare].mean()
    assert found.measured.secret[2] == pytest.approx(gap)
    text = str(found)
    assert "an upper bound of its excess risk" in text
    assert text.count("\n") == 7
    assert "measured, secret tokens" in text
    alone = diagnose.diagnose(forget._replace(twin=None), retain._replace(twin=None), temperatures)
    assert alone.measured is None
    assert "measured" not in str(alone)


def test_the_interval_takes_a_row_as_one():
    forget, retain = (made_tokens(seed, seed == 1, (1.0,), rows=400) for seed in (0, 1))
    alike = forget._replace(logits=np.sort(forget.logits))  # rows of like tokens
    few = alike._replace(starts=np.arange(0, 2001, 100))
    widths = [np.ptp(diagnose.held_out_loss(each, retain, 0.5)[1]) for each in (forget, few)]
    assert widths[0] < 0.5 * widths[1]
    signed = (forget.logits, -retain.logits)
    rows = [np.logaddexp(0, logits).reshape(400, 5).mean(axis=1) for logits in signed]
    error = 0.5 * np.sqrt(sum(row.var() for row in rows) / 400)
    assert widths[0] == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert diagnose.held_out_loss(few, retain, 0.5)[0] == pytest.approx(
        diagnose.held_out_loss(forget, retain, 0.5)[0]
    )


def test_a_bad_diagnosis_is_refused():
    tokens = made_tokens(0, True, (1.0, 2.0))
    with pytest.raises(ValueError, match=r"temperatures must be at least 1, got \(0.5,\)"):
        diagnose.diagnose(tokens, tokens, (0.5,))
    with pytest.raises(
        ValueError, match=r"forget: served has shape \(2, 200\), expected \(1, 200\)"
    ):
        diagnose.diagnose(tokens, tokens, (1.0,))
    with pytest.raises(ValueError, match="there are no retain tokens"):
        diagnose.diagnose(tokens, tokens._replace(starts=np.zeros(1, int)), (1.0, 2.0))


def test_a_model_with_a_head_is_scored(tiny_lm, tmp_path):
    head = tiny.make_head(tiny_lm, scale=1.0)
    rows = [{"question": f"Who is {i}?", "answer": f"Number {i * i}."} for i in range(3)]
    examples = data.encode_records(tiny_lm.tokenizer, rows, data.PromptFormat(), 128)
    store = Store(tiny_lm, [head], tmp_path)
    tokens = diagnose.score_tokens(store, "rows", examples, (1.0, 2.0), 0.5, twin=store)
    found = diagnose.diagnose(tokens, tokens, (1.0, 2.0), 0.5)
    settings = [Setting("mine", 2.0, 0.5, (0,)), Setting("plain", 1.0, 1.0, (0,))]
    mine, plain = score_texts(tiny_lm, examples, settings, [head])
    assert found.leak[1] == pytest.approx(np.exp(mine.logprobs).mean(), rel=1e-5)
    price = np.mean(plain.logprobs - mine.logprobs)
    assert found.price[1] == pytest.approx(price, abs=1e-5)
    # Retain tokens are the forget tokens here: the loss is that of calling each both.
    logits = mine.retain_scores
    losses = np.logaddexp(0, logits) / 2 + np.logaddexp(0, -logits) / 2
    assert found.loss == pytest.approx(losses.mean(), rel=1e-5)
    base = np.exp(score_texts(tiny_lm, examples, [BASE])[0].logprobs)
    gap = np.abs(np.exp(mine.logprobs) - base).mean()
    assert found.measured.forget[1] == pytest.approx(gap, rel=1e-4)


def test_a_diagnosis_needs_both_kinds_of_rows_and_one_classifier(tiny_lm, tmp_path):
    folder = str(tmp_path / "head")
    fields = dict.fromkeys(("model", "eval.forget", "eval.dir"), "x") | {"head": folder}
    config = tiny.make_settings(default, fields)
    with pytest.raises(ValueError, match=r"not in the config: \['eval\.retain'\]"):
        diagnose.diagnose_head(config)
    config = tiny.make_settings(default, fields | {"eval.retain": "x"})
    head = tiny.make_head(tiny_lm)
    save_head(folder, dataclasses.replace(head, record={"training": {"loss": "distillation"}}))
    with pytest.raises(ValueError, match="head was distilled: its scores are no P"):
        diagnose.diagnose_head(config)
    save_head(tmp_path / "other", head)
    config = replace(config, head=f"{folder},{tmp_path / 'other'}")
    with pytest.raises(ValueError, match="one head is diagnosed at a time"):
        diagnose.diagnose_head(config)


def test_the_example_prints_and_draws(tmp_path, capsys):
    theory.check_statements(20, 3)
    theory.show_slopes()
    apart = theory.show_sequences(1)
    printed = capsys.readouterr().out
    assert "2: forget error, T = 1: 20, 0," in printed
    assert "uniform spike, T = 2: power 0.500" in printed
    assert printed.count("\n  L = ") == apart.shape[1] == 6
    np.testing.assert_allclose(apart[1], 0, atol=1e-12)  # T = 1
    drawn = errors.Errors(*np.ones((6, 4, 1, 3, 1, 2, 4, 1)))
    best = {"peaks": (1e4, 1e6), "best": np.ones((2, 3, 2)), "predicted": np.ones((2, 3, 2))}
    theory.draw(tmp_path / "theory.svg", drawn, drawn, best, apart)
    assert "best, risk 0.01" in (tmp_path / "theory.svg").read_text()
