"""What the benchmarks share: alternating measurements, medians with their spread, the report."""

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
from typing import Any

import jax
import scipy.stats

import t3jax
from benchmarks.peer import Peer, peak_memory_gib, thread_counts
from t3jax import files

_PAUSE = 0.05  # seconds; libgomp's idle threads spin for 6 ms before they sleep, see `peer.py`


def seconds(work: Callable[[], Any]) -> float:
    """Seconds that a piece of work takes; it must wait for its own results."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def announce(what: str) -> None:
    """Says what is measured next: a benchmark takes minutes."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def alternate(
    works: Mapping[str, Callable[[int], Any]],
    repeats: int,
    prepare: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, list[float]]:
    """Runs pieces of work in turn, again and again, so that a slow minute slows all of them.

    Args:
        works: By name, what to run; it takes the number of the repeat.
        repeats: How often.
        prepare: By name, what to run before each time, not counted.

    Returns:
        Seconds by name, one for each repeat.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats):
        for name, work in works.items():
            if prepare is not None:
                prepare[name]()
            time.sleep(_PAUSE)
            times[name].append(seconds(functools.partial(work, repeat)))
    return times


def fastest(works: Mapping[Any, Callable[[], Any]]) -> tuple[Any, dict[Any, float]]:
    """The key of the fastest of several ways to do the same, and the seconds of all.

    Each runs twice, and the faster counts: the first may have to compile.
    """
    times = {key: min(seconds(work), seconds(work)) for key, work in works.items()}
    return min(times, key=lambda key: times[key]), times


def tune(peer: Peer, works: Mapping[str, Callable[[], Any]]) -> tuple[str, dict[str, float]]:
    """The fastest way for the peer to do something, which then has the thread count for it.

    Args:
        peer: Whose thread count is tried.
        works: By name, ways to do the same.

    Returns:
        The name of the fastest, and the seconds of all at all thread counts.
    """

    def at(threads: int, work: Callable[[], Any]) -> None:
        peer.set_threads(threads)
        work()

    every = {
        (name, threads): functools.partial(at, threads, work)
        for threads in thread_counts()
        for name, work in works.items()
    }
    (name, threads), times = fastest(every)
    peer.set_threads(threads)
    return name, {f"{name}, threads: {threads}": time for (name, threads), time in times.items()}


def ratio(slow: Iterable[float], fast: Iterable[float]) -> dict[str, float]:
    """The median of paired ratios, with the smallest and the largest."""
    ratios = sorted(s / f for s, f in zip(slow, fast, strict=True))
    return {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}


def overhead(times: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """The median of paired `time / base - 1`, a fraction, with its 95 % interval.

    The interval of a median that the signs of the pairs give: it assumes no distribution.
    """
    found = sorted(t / b - 1 for t, b in zip(times, base, strict=True))
    # Few pairs have no such interval, only their range.
    outside = max(int(scipy.stats.binom.ppf(0.025, len(found), 0.5)) - 1, 0)
    return {
        "median": statistics.median(found),
        "low": found[outside],
        "high": found[-1 - outside],
    }


def random_head(lm: t3jax.LM) -> t3jax.Head:
    """A head of the paper's shape: what it says does not matter for time."""
    config = t3jax.HeadConfig(lm.hidden_size, lm.vocab_size, rank=20)
    params = t3jax.init_head(jax.random.key(0), config)
    return t3jax.Head(config, params, base_temperature=2.5, guidance_scale=1.0, model=lm.name)


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
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
    """Prints the figures as a table and writes all to `out/benchmarks/NAME.json`.

    Args:
        name: The benchmark's.
        figures: By name, numbers; or what `ratio` and `overhead` give, whose median becomes the
            number, and whose bounds stand under `bounds`.
        details: What else the file shall hold.
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
        "machine": machine(),
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
