"""Shared by the benchmarks: alternating measurements, medians with their spread, the report."""

import argparse
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import scipy.stats

import t3jax
from benchmarks.peer import Peer, peak_memory_gib, thread_counts
from t3jax import files

_PAUSE = 0.05  # seconds; libgomp's idle threads spin for 6 ms before they sleep, see `peer.py`

Key = TypeVar("Key")
Measured = tuple[dict[str, Any], dict[str, Any]]  # figures and details, as `write` takes them


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A benchmark's command line, with its docstring as help."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )


def seconds(work: Callable[[], object]) -> float:
    """Seconds that a piece of work takes; it must wait for its own results."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def announce(text: str) -> None:
    """Prints a line of progress: a benchmark takes minutes."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def alternate(
    works: Mapping[str, Callable[[int], object]],
    repeats: int,
    prepare: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Runs pieces of work in turn, so that a slow minute of the machine slows all of them.

    A work takes the number of the repeat. `prepare` runs before a work and is not counted. Returned
    are the seconds of every repeat, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats):
        for name, work in works.items():
            if prepare is not None:
                prepare[name]()
            time.sleep(_PAUSE)
            times[name].append(seconds(functools.partial(work, repeat)))
    return times


def fastest(works: Mapping[Key, Callable[[], object]]) -> tuple[Key, dict[Key, float]]:
    """The key of the fastest of several ways to do the same, and the seconds of all.

    Each runs twice, and the faster counts: the first may have to compile.
    """
    times = {key: min(seconds(work), seconds(work)) for key, work in works.items()}
    return min(times, key=lambda key: times[key]), times


def tune(peer: Peer, works: Mapping[str, Callable[[], object]]) -> tuple[str, dict[str, float]]:
    """Finds the peer's fastest way to do the same work, and sets the thread count for it.

    The name of the fastest is returned, and the seconds of all at all thread counts.
    """

    def run(threads: int, work: Callable[[], object]) -> None:
        peer.set_threads(threads)
        work()

    trials = {
        (name, threads): functools.partial(run, threads, work)
        for threads in thread_counts()
        for name, work in works.items()
    }
    (name, threads), times = fastest(trials)
    peer.set_threads(threads)
    return name, {f"{name}, threads: {threads}": time for (name, threads), time in times.items()}


def ratio(slow: Iterable[float], fast: Iterable[float]) -> dict[str, float]:
    """The median of paired ratios, with the smallest and the largest."""
    ratios = sorted(s / f for s, f in zip(slow, fast, strict=True))
    return {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}


def overhead(times: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """The median of paired `time / base - 1`, a fraction, with its 95 % interval.

    The interval is the one of the sign test, which assumes no distribution.
    """
    overheads = sorted(t / b - 1 for t, b in zip(times, base, strict=True))
    # Few pairs have no such interval, only their range.
    outside = max(int(scipy.stats.binom.ppf(0.025, len(overheads), 0.5)) - 1, 0)
    return {
        "median": statistics.median(overheads),
        "low": overheads[outside],
        "high": overheads[-1 - outside],
    }


def random_head(lm: t3jax.LM) -> t3jax.Head:
    """A head of the paper's shape; its scores do not matter for time."""
    config = t3jax.HeadConfig(lm.hidden_size, lm.vocab_size, rank=20)
    params = t3jax.init_head(jax.random.key(0), config)
    return t3jax.Head(config, params, base_temperature=2.5, guidance_scale=1.0, model=lm.name)


def describe_machine() -> dict[str, Any]:
    """The hardware and the versions, for the file."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    versions = {"python": platform.python_version()}
    for package in ("jax", "torch", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "load_average": os.getloadavg()[0],
        "versions": versions,
    }


def write(name: str, figures: Mapping[str, Any], details: Mapping[str, Any]) -> None:
    """Prints the figures as a table and writes them with the details to `out/benchmarks/NAME.json`.

    Figures are numbers, or results of `ratio` and `overhead`: their median becomes the number, and
    their bounds are written under `bounds`.
    """
    spread = {
        key: value
        for key, value in figures.items()
        if isinstance(value, Mapping) and "median" in value
    }
    medians = {key: value["median"] for key, value in spread.items()}
    bounds = {key: [value["low"], value["high"]] for key, value in spread.items()}
    content = {
        "figures": {**figures, **medians},
        "bounds": bounds,
        "peak_memory_gib": peak_memory_gib(),
        **details,
        "machine": describe_machine(),
    }
    path = pathlib.Path("out/benchmarks") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, content)
    print(json.dumps({key: value for key, value in content.items() if key != "figures"}, indent=2))
    numbers = {
        key: value for key, value in content["figures"].items() if not isinstance(value, Mapping)
    }
    width = max(map(len, numbers), default=0)
    for key, value in numbers.items():
        interval = " ".join(f"{bound:10.4g}" for bound in bounds.get(key, ()))
        print(f"{key:{width}} {value:10.4g} {interval}")
    print(f"written: {path}")
