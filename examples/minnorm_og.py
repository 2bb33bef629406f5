"""MinNorm-OG where the answer is known: its theorems, and the sine wave with poisoned points.

python -m examples.minnorm_og            # few seeds, a short first fit; under two minutes on a CPU
python -m examples.minnorm_og --full     # ten seeds, the whole first fit of 100,000 epochs

Prints the largest deviation from each theorem, and medians and ranges beside the published medians.
A stopped first fit is resumed from `--out`.
"""

import argparse
import pathlib
import time

import jax
import numpy as np

from t3jax import checkpoint
from t3jax.minnorm import exactness, sine

# Published medians, in the order of sine.METHODS.
PUBLISHED = {
    10: (1.50, 1.50, 2.27, 3.28, 3.23, 2.73, 2.50, 2.56),
    100: (1.08, 1.36, 2.13, 1.79, 2.76, 2.85, 2.62, 23.8),
    1000: (0.63, 1.17, 1.96, 1.37, 2.61, 2.45, 2.75, 1400),
}


def main() -> None:
    """Prints the theorems and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="ten seeds and the whole first fit")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/minnorm"))
    args = parser.parse_args()
    start = time.perf_counter()
    for theorem in exactness.THEOREMS:
        deviation = exactness.largest_deviation(theorem, 300)
        print(f"theorem {theorem}: 300 instances, largest deviation {deviation:.1e}", flush=True)
    seeds = range(1, 11) if args.full else range(1, 4)
    epochs = 100_000 if args.full else 2_000
    params, x, y = first_fit(list(seeds), epochs, args.out / f"fit-{epochs}")
    show(params, x, y, list(seeds), (10, 100, 1000) if args.full else (10, 100))
    print(f"{time.perf_counter() - start:.0f} s")


def first_fit(
    seeds: list[int], epochs: int, folder: pathlib.Path
) -> tuple[sine.Params, jax.Array, jax.Array]:
    """Fits all points, 1,000 epochs at a time; resumes from its folder."""
    state, x, y = sine.init_fit(seeds)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )
    settings = {"seeds": seeds, "epochs": epochs}
    with checkpoint.RunFolder(folder, settings, abstract, unit="step") as run:
        state = state if run.state is None else run.state
        for done in range(run.done + 1000, epochs + 1, 1000):
            state, losses = sine.fit(state, x, y, 1000)
            line = {"step": done, "loss": float(np.max(losses))}
            run.finish(done, [line], state, save=done % 10_000 == 0 or done == epochs)
    error = float(np.max(jax.vmap(sine.squared_error)(state[0], x, y)))
    print(f"first fit: {epochs} epochs, largest mean squared error of a seed {error:.1e}")
    return state[0], x, y


def show(
    params: sine.Params, x: jax.Array, y: jax.Array, seeds: list[int], budgets: tuple[int, ...]
) -> None:
    """Prints median and range of each method; of ten seeds without the two best and worst."""
    trim = 2 if len(seeds) >= 10 else 0
    for epochs in budgets:
        rows = [*sine.published(epochs), sine.published(epochs, stale=True)[0]]
        published = [*PUBLISHED[epochs], PUBLISHED[epochs][0]]
        print(f"\n{epochs} epochs: largest error, median (range)    published median")
        for config, paper in zip(rows, published, strict=True):
            unlearned = sine.unlearn(config, params, x, y, seeds)
            errors = np.sort(np.asarray(jax.vmap(sine.largest_error)(unlearned)))
            name = config.method + " (stale)" * config.stale
            spread = f"({errors[trim]:.2f}, {errors[-1 - trim]:.2f})"
            print(f"{name:16} {np.median(errors):8.2f} {spread:18} {paper:8.2f}", flush=True)


if __name__ == "__main__":
    main()
