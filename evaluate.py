"""Checks a TOFU log: recomputes every aggregate from its per-example values.

    python evaluate.py --recompute LOG [--retain_log LOG]

LOG is a `TOFU_EVAL.json`, of this project or of the reference evaluator, or its folder. Exit
status: 0 all stored numbers agree, 1 one differs by more than 1e-9 relative to the larger, 2 a log
cannot be read or does not fit.
"""

import pathlib
import sys

from absl import app, flags

from t3jax.evaluation import logs, recompute

_RECOMPUTE = flags.DEFINE_string("recompute", None, "The log (or its folder) to recompute.")
_RETAIN_LOG = flags.DEFINE_string(
    "retain_log", None, "The retain model's log (or its folder), for forget_quality and privleak."
)


def main(argv: list[str]) -> int:
    """Runs what the flags ask for and returns the exit status."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if _RECOMPUTE.value is None:
        raise app.UsageError("name a log: --recompute LOG")
    try:
        return _recompute(_RECOMPUTE.value, _RETAIN_LOG.value)
    except (FileNotFoundError, ValueError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2


def _recompute(log_path: str, retain_path: str | None) -> int:
    log = logs.read_log(pathlib.Path(log_path))
    retain_log = None if retain_path is None else logs.read_log(pathlib.Path(retain_path))
    comparisons = recompute.recompute(log, retain_log)
    print(recompute.table(comparisons))
    if retain_log is not None and "forget_truth_ratio" in log:
        test = recompute.forget_quality(log, retain_log)
        print(
            f"truth ratios of the forget rows against the retain model's: D = {test.statistic:.4f}"
            f" (p < 0.05 from D = {test.critical:.4f})"
        )
    return 1 if any(comparison.differs for comparison in comparisons) else 0


if __name__ == "__main__":
    # absl knows flags with underscores only.
    app.run(main, [arg.replace("--retain-log", "--retain_log", 1) for arg in sys.argv])
