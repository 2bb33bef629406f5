"""LoRA-ML: the linear maps, the shallow network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import lora_ml as example
from t3jax.lora_ml import linear, shallow
from t3jax.lora_ml.least_squares import minimize_squares
from t3jax.lora_ml.linear import LinearConfig, Task

EXACT = {"width": 7, "samples": None, "test_samples": None, "noise": 0.0, "steps": 40}
SEEDS = range(6)


def test_squares_are_minimized_and_no_step_makes_them_larger():
    def residuals(x):
        return jnp.stack([1 - x["a"], 10 * (x["b"] - x["a"] ** 2)])  # Rosenbrock's valley

    start = {"a": jnp.float32(-1.2), "b": jnp.float32(1)}
    sums = [float(minimize_squares(residuals, start, steps)[1]) for steps in (0, 5, 60)]
    assert sums[0] > sums[1] > sums[2]
    found, _ = minimize_squares(residuals, start, 60)
    np.testing.assert_allclose([found["a"], found["b"]], 1, atol=1e-3)


@pytest.mark.parametrize("tasks", [3, 5])
def test_three_tasks_or_more_are_recovered(tasks):
    found = linear.run(LinearConfig(tasks=tasks, **EXACT), SEEDS)
    assert linear.relative_error(found.updates, found.true_updates).max() < 1e-3
    assert linear.relative_error(found.lora_ml, found.base).max() < 1e-3
    # What is missing of the test task: k for LoRA-ML, k (T + 1) for SR.
    assert set(linear.numerical_rank(found.test_task - found.lora_ml)) == {1}
    assert set(linear.numerical_rank(found.test_task - found.sr)) == {tasks + 1}
    assert np.asarray(found.lora_ml_error).max() < 1e-6
    assert np.asarray(found.sr_error).min() > 0.1


def test_two_tasks_are_fitted_and_not_recovered():
    found, wider = (
        linear.run(LinearConfig(tasks=2, test_rank=rank, **EXACT), SEEDS) for rank in (1, 3)
    )
    assert np.asarray(found.loss).max() < 1e-8  # every start ends in a global minimum
    assert linear.relative_error(found.updates, found.true_updates).min() > 1e-3
    assert np.median(found.lora_ml_error) > 0.1
    assert linear.numerical_rank(found.base - found.lora_ml).max() <= 2
    assert np.asarray(wider.lora_ml_error).max() < 1e-6  # 3 k are enough


def test_the_error_falls_as_one_over_the_test_samples():
    counts = (100, 1000, 10_000)
    config = {"width": 7, "samples": None, "steps": 40}
    errors = [
        linear.run(LinearConfig(test_samples=n, **config), SEEDS).lora_ml_error for n in counts
    ]
    mean, low, high = linear.slope(counts, np.stack(errors, axis=1))
    assert low < mean < high
    assert abs(mean + 1) < 0.15


def test_the_loss_of_samples_is_that_of_their_moment_and_least_squares_map():
    """Against sums over the samples themselves."""
    task = jax.random.normal(jax.random.key(0), (4, 4), jnp.float32)
    key, drawn, count = jax.random.key(1), 50, 20
    found = linear.draw_task(key, task, jnp.float32(count), jnp.float32(0.5), drawn)
    x, noise = np.split(np.asarray(jax.random.normal(key, (drawn, 8), jnp.float32))[:count], 2, 1)
    noise = 0.5 * noise
    y = x @ np.asarray(task).T + noise
    others = np.random.default_rng(0).normal(size=(2, 4, 4))
    sums = [((x @ m.T - y) ** 2).sum() / count for m in others]
    parts = [(((m - found.least) @ found.root) ** 2).sum() for m in others]
    np.testing.assert_allclose(parts[0] - parts[1], sums[0] - sums[1], rtol=1e-4)
    (least, *_) = np.linalg.lstsq(x, y, rcond=None)
    np.testing.assert_allclose(found.least, least.T, atol=1e-4)


def test_the_adaptation_is_the_best_of_its_rank():
    rng = np.random.default_rng(0)
    root, least, base = (jnp.asarray(rng.normal(size=(5, 5)), jnp.float32) for _ in range(3))
    task = Task(root @ root.T + jnp.eye(5, dtype=jnp.float32), least)
    best = linear.adapt(base, task, 2)
    assert np.linalg.matrix_rank(best - base, tol=1e-4) == 2

    def residuals(update):
        return ((base + update[0] @ update[1].T - least) @ task.root).reshape(-1)

    start = jnp.asarray(rng.normal(size=(2, 5, 2)), jnp.float32)
    _, reached = minimize_squares(residuals, (start[0], start[1]), 60)
    loss = float((((best - least) @ task.root) ** 2).sum()) / 2
    np.testing.assert_allclose(loss, reached, rtol=1e-3)


def test_the_example_prints_a_line_of_its_table(monkeypatch, capsys):
    monkeypatch.setattr(example, "SEEDS", SEEDS)
    errors = example.line(LinearConfig(width=7, steps=40), "d = 7")
    assert errors.shape == (len(SEEDS),)
    name, sr, _, _, ml, *_ = capsys.readouterr().out.strip().rsplit(maxsplit=6)
    assert name == "d = 7"
    assert float(ml) < 1e-3 < float(sr)
    assert example.spread(np.array([3.0, 1.0, 2.0])) == "2 (1, 3)"
    falling = [np.array([1.0, 2.0]) / n for n in example.COUNTS]
    assert example.interval(falling) == "-1.00 (-1.00, -1.00)"


def test_a_setting_that_determines_nothing_is_refused():
    with pytest.raises(ValueError, match="samples = 9 determines no map of 10 inputs"):
        LinearConfig(samples=9)
    with pytest.raises(ValueError, match="tasks must be at least 1, got 0"):
        LinearConfig(tasks=0)


def test_the_shallow_network_is_adapted_from_a_better_base():
    config = shallow.ShallowConfig(width=5, samples=300, starts=2, steps=30)
    found = shallow.run(config, range(3))
    assert np.median(found.lora_ml_loss) < 0.1 * np.median(found.sr_loss)
    assert np.median(found.lora_ml_error) < 0.1 * np.median(found.sr_error)
