"""Checks a TOFU log: recomputes every aggregate from its per-example values.

    python evaluate.py --recompute LOG [--retain_log LOG]

LOG is a `TOFU_EVAL.json`, of this project or of the reference evaluator, or its folder. Exit
status: 0 all stored numbers agree, 1 one differs by more than 1e-9 relative to the larger, 2 a log
cannot be read or does not fit.
"""

import pathlib
import re
import sys

from absl import app, flags

from t3jax.evaluation import recompute

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
        comparison, differs = recompute.compare_files(
            pathlib.Path(_RECOMPUTE.value),
            None if _RETAIN_LOG.value is None else pathlib.Path(_RETAIN_LOG.value),
        )
    except (FileNotFoundError, ValueError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    print(comparison)
    return 1 if differs else 0


if __name__ == "__main__":
    # absl knows flags with underscores only.
    app.run(main, [re.sub("^--?retain-log(?==|$)", "--retain_log", arg) for arg in sys.argv])
