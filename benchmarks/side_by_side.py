"""What the benchmarks share: alternating measurements, medians with their spread, the report."""

import functools
import json
import pathlib
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from t3jax import files


def seconds(work: Callable[[], Any]) -> float:
    """Seconds that a piece of work takes; it must wait for its own results."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(works: Mapping[str, Callable[[int], Any]], repeats: int) -> dict[str, list[float]]:
    """Runs pieces of work in turn, again and again, so that a slow minute slows all of them.

    Args:
        works: By name, what to run; it is told the number of the repeat.
        repeats: How often.

    Returns:
        Seconds by name, one for each repeat.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(functools.partial(work, repeat)))
    return times


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """The median of paired ratios, with the smallest and the largest."""
    ratios = sorted(s / f for s, f in zip(slow, fast, strict=True))
    return {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}


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
    device = jax.devices()[0]
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    try:
        import torch
        import transformers

        versions |= {"torch": torch.__version__, "transformers": transformers.__version__}
    except ImportError:
        pass
    return {"cpu": cpu, "device": device.device_kind, "versions": versions}


def write(name: str, figures: Mapping[str, Any], details: Mapping[str, Any]) -> None:
    """Prints the figures and writes them, with the details, to `out/benchmarks/NAME.json`."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    content = {
        "figures": dict(figures),
        "peak_memory_gib": peak,
        **details,
        "machine": machine(),
    }
    path = pathlib.Path("out/benchmarks") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, content)
    print(json.dumps(content, indent=2))
    print(f"written: {path}")
