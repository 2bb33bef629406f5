"""LoRA-ML where the answer is known: linear maps, and a shallow network.

python -m examples.lora_ml            # at most two minutes on a CPU
python -m examples.lora_ml --full     # every sweep of the shallow network too

Prints medians and ranges over seeds: the errors of standard retraining (SR) and LoRA-ML after the
adaptation to one more task, the rank of that adaptation, and slopes with 95 % intervals.
"""

import argparse
import dataclasses
import time

import numpy as np

from t3jax import cli
from t3jax.lora_ml import linear, shallow
from t3jax.lora_ml.linear import LinearConfig
from t3jax.lora_ml.shallow import ShallowConfig

SEEDS = range(20)
COUNTS = (100, 1000, 10_000)
EXACT = {"samples": None, "test_samples": None, "noise": 0.0}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all sweeps of the shallow network")
    args = parser.parse_args()
    cli.enable_compilation_cache()
    start = time.perf_counter()
    show_recovery()
    show_sweeps()
    show_shallow(args.full)
    print(f"{time.perf_counter() - start:.0f} s")


def show_recovery() -> None:
    """Infinitely many samples without noise: the error of the updates, and the missing rank."""
    print("exact tasks: relative error of U U^T, seeds below 1e-3, missing rank of SR and LoRA-ML")
    for tasks in (2, 3, 5):
        result = linear.run(LinearConfig(tasks=tasks, **EXACT), SEEDS)
        errors = linear.relative_error(result.updates, result.true_updates)
        ranks = [
            f"{np.median(linear.numerical_rank(result.test_task - base)):.0f}"
            for base in (result.sr, result.lora_ml)
        ]
        share = f"{int((errors < 1e-3).sum())}/{len(errors)}"
        print(
            f"  T = {tasks}  {spread(errors):32} {share:>6}  ranks {', '.join(ranks)}", flush=True
        )


def show_sweeps() -> None:
    """The published sweeps around d = 10, T = 3, N = 5000, n = 100, k = 1."""
    print("\nlinear maps: squared error after adaptation: SR, LoRA-ML")
    sweeps = {
        "width": (5, 10, 20),
        "tasks": (2, 3, 5),
        "samples": COUNTS,
        "test_samples": COUNTS,
        "rank": (1, 2, 3),
        "test_rank": (1, 2, 3, 4, 5),
    }
    for field, values in sweeps.items():
        ml = [line(LinearConfig(**{field: value}), f"{field} = {value}") for value in values]
        if values is COUNTS:
            print(f"  slope in {field}: {interval(ml)}", flush=True)
    line(LinearConfig(tasks=2, test_rank=3), "T = 2, test_rank = 3")
    ml = [line(LinearConfig(samples=None, test_samples=n), f"N infinite, n = {n}") for n in COUNTS]
    print(f"  slope in n, N infinite: {interval(ml)}", flush=True)


def line(config: LinearConfig, name: str) -> np.ndarray:
    """Prints the errors of one setting; returns LoRA-ML's error of each seed."""
    result = linear.run(config, SEEDS)
    print(f"  {name:24} {spread(result.sr_error):32} {spread(result.lora_ml_error)}", flush=True)
    return np.asarray(result.lora_ml_error)


def show_shallow(full: bool) -> None:
    """The shallow network: mean squared errors of the fits and after adaptation."""
    print("\nshallow network: LoRA-ML's training loss (noise .01), error of SR, of LoRA-ML")
    cases = [ShallowConfig(width=5)]
    if full:
        plain = ShallowConfig()
        cases = [dataclasses.replace(plain, tasks=t) for t in (2, 3, 5, 10)]
        cases.append(dataclasses.replace(plain, tasks=2, test_rank=3))
        cases += [dataclasses.replace(plain, width=d) for d in (5, 20)]
    for config in cases:
        result = shallow.run(config, range(10 if full else 3))
        name = f"d = {config.width}, T = {config.tasks}, test rank {config.test_rank or 1}"
        cells = [result.lora_ml_loss, result.sr_error, result.lora_ml_error]
        print(f"  {name:24} {'  '.join(f'{spread(x):30}' for x in cells)}", flush=True)


def spread(values: np.ndarray) -> str:
    """The median and the range."""
    values = np.asarray(values)
    return f"{np.median(values):.2g} ({values.min():.2g}, {values.max():.2g})"


def interval(errors: list[np.ndarray]) -> str:
    """The slope in COUNTS and its 95 % interval."""
    mean, low, high = linear.slope(COUNTS, np.stack(errors, axis=1))
    return f"{mean:.2f} ({low:.2f}, {high:.2f})"


if __name__ == "__main__":
    main()
