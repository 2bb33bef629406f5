"""Recomputes every aggregate of an evaluation's log from its per-example values.

    t3jax check LOG [--retain-log LOG]
    python evaluate.py --recompute LOG [--retain-log LOG]

The log is a `TOFU_EVAL.json`, of this project or of the reference evaluator, or its folder.

Exit status: 0 all stored numbers agree, 1 one differs by more than 1e-9 relative to the larger, 2 a
log cannot be read or does not fit.
"""

import argparse
import pathlib
import sys
from typing import NoReturn

from t3jax.evaluation import recompute


def run() -> NoReturn:
    """Recomputes the log that the command line names, and exits with the status."""
    name = pathlib.Path(sys.argv[0]).name
    parser = argparse.ArgumentParser(prog=name, description=__doc__, allow_abbrev=False)
    parser.add_argument("log", nargs="?", type=pathlib.Path, help="the log, or its folder")
    parser.add_argument("--recompute", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--retain-log",
        "--retain_log",
        type=pathlib.Path,
        help="the retain model's, for forget_quality and privleak",
    )
    arguments = parser.parse_args()
    log = arguments.log or arguments.recompute
    if log is None or (arguments.log and arguments.recompute):
        parser.error("name one log")
    try:
        comparison, differs = recompute.compare_files(log, arguments.retain_log)
    except (OSError, ValueError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    print(comparison)
    sys.exit(1 if differs else 0)
