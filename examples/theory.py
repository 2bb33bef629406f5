"""T3's theorems: bounds on random instances, slopes against the peak, the best T, sequences.

python -m examples.theory            # few mixtures; under two minutes on a CPU
python -m examples.theory --full     # the tables of docs/theory.md; about ten minutes

Prints the numbers of docs/theory.md and draws its figure to `--out`.
"""

import argparse
import pathlib
import time

import numpy as np

from t3jax.report import figures
from t3jax.theory import bounds, errors, sequences
from t3jax.theory.errors import Shape

TEMPERATURES = (1.0, 1.5, 2.0, 4.0)
PEAKS = {
    1: (1e4, 1e5, 1e6, 1e7),
    2: (1e4, 1e5, 1e6, 1e7),
    10: (1e4, 1e6, 1e8, 1e10),
    100: (1e10, 1e20, 1e30, 1e35),
}
GAMMAS, RISKS = (0.01, 0.1, 0.5), (0.001, 0.01)
FINE = np.concatenate([np.arange(1, 3, 0.1), np.arange(3, 8.1, 0.5)])
COLOURS = (figures.BLUE, figures.ORANGE, figures.GREEN, figures.PURPLE)


def main() -> None:
    """Prints the numbers and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all dimensions, classifiers and seeds")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/theory"))
    args = parser.parse_args()
    start = time.perf_counter()
    check_statements(*(100_000, 5_000) if args.full else (10_000, 2_000))
    show_slopes()
    leaky = show_leaky(10, range(10 if args.full else 4))
    if args.full:
        for dimensions in (1, 2, 100):
            show_leaky(dimensions, range(10))
    show_controls(range(10 if args.full else 2))
    trained = show_trained("logistic", 10, range(10 if args.full else 3))
    if args.full:
        for classifier, dimensions in (
            ("logistic", 2),
            ("logistic", 100),
            ("perceptron", 2),
            ("perceptron", 10),
        ):
            show_trained(classifier, dimensions, range(10))
    best = show_best(range(3 if args.full else 1))
    apart = show_sequences(100 if args.full else 20)
    args.out.mkdir(parents=True, exist_ok=True)
    draw(args.out / "theory.svg", leaky, trained, best, apart)
    print(f"{args.out}/theory.svg, {time.perf_counter() - start:.0f} s")


def check_statements(mixtures: int, chains: int) -> None:
    """Counts violations of every statement."""
    print("statement: instances, violations, largest left side over right side")
    for module, number in ((bounds, mixtures), (sequences, chains)):
        for statement in module.STATEMENTS:
            check = module.check(statement, number)
            print(f"  {statement}: {check.instances}, {check.violations}, {check.tightest:.2g}")


def show_slopes() -> None:
    """The example in which both powers are exact."""
    for temperature in TEMPERATURES:
        low, high = (bounds.spike_errors(peak, 0.1, 0.1, temperature)[0] for peak in (1e6, 1e8))
        print(f"uniform spike, T = {temperature:g}: power {np.log(high / low) / np.log(100):.3f}")


def show_leaky(dimensions: int, seeds: range) -> errors.Errors:
    """Slopes at a fixed excess risk."""
    peaks = PEAKS[dimensions]
    shape = Shape(
        dimensions,
        "leaky",
        retain_components=3,
        nodes=0 if dimensions == 1 else 1000,
        narrowest=1 / max(peaks),
    )
    grid = errors.run_grid(shape, log_peaks=np.log(peaks), temperatures=TEMPERATURES, seeds=seeds)
    print(f"\nexcess risk .01, D = {dimensions}, peaks {peaks[0]:.0e} to {peaks[-1]:.0e}")
    print_table(peaks, grid, 0)
    return grid


def show_controls(seeds: range) -> None:
    """T = 2 beside a stronger tilt without tempering, at a fixed excess risk, D = 10."""
    peaks = PEAKS[10]
    grid = errors.run_grid(
        Shape(10, "leaky", nodes=500),
        log_peaks=np.log(peaks),
        temperatures=(1.0, 2.0),
        scales=(1.0, 2.0),
        seeds=seeds,
    )
    print(
        f"\nwith a stronger tilt, D = 10, excess risk .01, peaks {peaks[0]:.0e} to {peaks[-1]:.0e}"
    )
    for k, temperature in enumerate((1, 2)):
        for j, scale in enumerate((1, 2)):
            at = (slice(None), 0, 0, 0, slice(None), k, j)
            slope = errors.fit_slopes(np.log(peaks), grid.log_forget[at])
            forget = np.exp(np.median(grid.log_forget[at], axis=1))
            retain = np.median(grid.retain[at])
            print(
                f"  T = {temperature}, s = {scale}: slope {interval(slope)}, forget error "
                f"{forget[0]:.2e} to {forget[-1]:.2e}, retain {retain:.3f}"
            )


def show_trained(classifier: str, dimensions: int, seeds: range) -> errors.Errors:
    """Slopes of classifiers that are trained on n samples; their excess risk varies."""
    peaks, samples = PEAKS[dimensions], (250, 1000, 4000)
    shape = Shape(dimensions, classifier, most_samples=max(samples))
    grid = errors.run_grid(
        shape,
        log_peaks=np.log(peaks),
        temperatures=TEMPERATURES,
        samples=samples,
        seeds=seeds,
    )
    for i, n in enumerate(samples):
        print(f"\n{classifier}, n = {n}, D = {dimensions}, {peaks[0]:.0e} to {peaks[-1]:.0e}")
        print_table(peaks, grid, i)
    return grid


def print_table(peaks: tuple[float, ...], grid: errors.Errors, of_n: int) -> None:
    """Slopes by T, with the errors at the lowest and the highest peak."""
    risk = np.median(grid.excess_risk[:, 0, of_n, 0, :, 0, 0], axis=1)
    print(f"  excess risk {risk[0]:.4f} at the lowest peak, {risk[-1]:.4f} at the highest")
    for k, temperature in enumerate(TEMPERATURES):
        at = (slice(None), 0, of_n, 0, slice(None), k, 0)
        part, whole = (
            errors.fit_slopes(np.log(peaks), values[at])
            for values in (grid.log_from_classifier, grid.log_forget)
        )
        retain, leak = (np.median(values[at], axis=1) for values in (grid.retain, grid.leak))
        print(
            f"  T = {temperature:g}: classifier's part {interval(part)}, whole {interval(whole)}, "
            f"retain {retain[-1]:.3f}, leak {leak[0]:.1e} to {leak[-1]:.1e}"
        )


def interval(slope: tuple[float, float, float]) -> str:
    """Median and percentiles of a slope."""
    return f"{slope[0]:.3f} ({slope[1]:.3f}, {slope[2]:.3f})"


def show_best(seeds: range) -> dict[str, np.ndarray]:
    """The T of the smallest sum of both errors, measured and predicted, D = 10."""
    peaks = (1e4, 1e6, 1e8, 1e10, 1e12)
    grid = errors.run_grid(
        Shape(10, "leaky", nodes=500),
        log_peaks=np.log(peaks),
        temperatures=FINE,
        gammas=GAMMAS,
        excess_risks=RISKS,
        seeds=seeds,
    )
    total = np.exp(grid.log_forget) + grid.retain  # peaks, gammas, 1, risks, seeds, T, 1
    best = np.median(FINE[total[..., 0].argmin(axis=-1)], axis=-1)[:, :, 0]  # peaks, gammas, risks
    predicted = np.array(
        [
            [
                [
                    FINE[errors.predict_total(np.log(peak), gamma, risk, 10, FINE).argmin()]
                    for risk in RISKS
                ]
                for gamma in GAMMAS
            ]
            for peak in peaks
        ]
    )
    print(
        "\nbest T, D = 10: measured (predicted) at forget share, excess risk; peaks",
        *(f"{p:.0e}" for p in peaks),
    )
    for g, gamma in enumerate(GAMMAS):
        for e, risk in enumerate(RISKS):
            cells = [
                f"{m:.1f} ({p:.1f})" for m, p in zip(best[:, g, e], predicted[:, g, e], strict=True)
            ]
            print(f"  {gamma:g}, {risk:g}: " + ", ".join(cells))
    return {"peaks": np.array(peaks), "best": best, "predicted": predicted}


def show_sequences(chains: int) -> np.ndarray:
    """KL between tokens and whole sequences, with the exact classifier, nats.

    Returned are the lengths, and at each T the medians of KL(tokens || whole), `[1 + K, lengths]`.
    """
    lengths = (1, 2, 3, 4, 6, 8)
    divergences = np.zeros((len(lengths), len(TEMPERATURES), chains, 3))
    for i, length in enumerate(lengths):
        for seed in range(chains):
            rng = np.random.default_rng([seed, length])
            retain = sequences.draw_chain(rng, 3, length, 1.0)
            forget = sequences.draw_chain(rng, 3, length, 0.1)
            chain = 0.9 * retain + 0.1 * forget
            exact = sequences.exact_classifier(retain, forget, 0.1)
            for k, temperature in enumerate(TEMPERATURES):
                tokens = sequences.tilt_tokens(chain, exact, temperature)
                whole = sequences.tilt_whole(chain, exact[-1], temperature)
                pairs = ((tokens, whole), (retain, tokens), (retain, whole))
                divergences[i, k, seed] = [sequences.kl(*pair) for pair in pairs]
    medians = np.median(divergences, axis=2)
    print("\nsequences, 3 tokens: KL(tokens || whole), KL(p_r || tokens), KL(p_r || whole)")
    for i, length in enumerate(lengths):
        cells = [
            f"T = {t:g}: " + " ".join(f"{value:.4f}" for value in medians[i, k])
            for k, t in enumerate(TEMPERATURES)
        ]
        print(f"  L = {length}: " + "; ".join(cells))
    return np.stack([np.array(lengths), *medians[..., 0].T])


def draw(
    path: pathlib.Path,
    leaky: errors.Errors,
    trained: errors.Errors,
    best: dict[str, np.ndarray],
    apart: np.ndarray,
) -> None:
    """Draws four panels."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(
        {"svg.hashsalt": "t3jax", "svg.fonttype": "none", "axes.spines.top": False, "font.size": 9}
    ):
        figure, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
        for k, (temperature, colour) in enumerate(zip(TEMPERATURES, COLOURS, strict=True)):
            label = f"T = {temperature:g}"
            for axes, grid, of_n in ((a, leaky, 0), (b, trained, 2)):
                values = grid.log_forget[:, 0, of_n, 0, :, k, 0] / np.log(10)
                middle, low, high = np.percentile(values, [50, 0, 100], axis=1)
                axes.fill_between(np.log10(PEAKS[10]), low, high, color=colour, alpha=0.15, lw=0)
                axes.plot(np.log10(PEAKS[10]), middle, "o-", color=colour, label=label)
            d.plot(apart[0], apart[1 + k], "o-", color=colour, label=label)
        a.set(title="forget error, excess risk .01, D = 10", ylabel="log10 forget error")
        b.set(title="forget error, logistic regression, n = 4000, D = 10")
        for e, (risk, colour) in enumerate(zip(RISKS, COLOURS, strict=False)):
            at = np.log10(best["peaks"])
            c.plot(at, best["best"][:, 1, e], "o-", color=colour, label=f"best, risk {risk:g}")
            c.plot(at, best["predicted"][:, 1, e], "kx:", label="predicted" if e == 0 else None)
        c.set(title="T of the smallest sum of both errors, forget share .1, D = 10", ylabel="T")
        d.set(title="KL(token by token || whole sequences)", xlabel="length, tokens", ylabel="nats")
        for axes in (a, b, c):
            axes.set_xlabel("log10 peak of p_f")
        for axes in (a, b, c, d):
            axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
