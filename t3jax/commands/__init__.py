"""The commands: `t3jax NAME`, and the scripts at the top of the checkout, which call them.

Importing JAX takes seconds, so it is imported only when a command runs.
"""

import contextlib
import difflib
import importlib
import os
import pathlib
import sys
from typing import NoReturn

from t3jax import interrupts
from t3jax.commands import usage

_DATA = "model head forget retain tofu_dir workdir"
_MODEL = "rows max_length mesh dtype"
_KNOBS = "base_temperature guidance_scale forget_fraction refinements"
# The fields and sections that each command reads.
FIELDS = {
    "train": f"{_DATA} request feature_store seeds {_KNOBS} {_MODEL} classifier train synthetic "
    "sampling.max_new_tokens prompt_format",
    "sample": f"model head prompt prompts output base_only {_KNOBS} rows mesh dtype sampling "
    "prompt_format",
    "evaluate": f"model head tofu_dir {_KNOBS} {_MODEL} eval leaks sampling.max_new_tokens "
    "sampling.seed prompt_format",
    "sweep": f"{_DATA} feature_store seeds {_KNOBS} {_MODEL} sweep classifier train synthetic eval "
    "leaks sampling.max_new_tokens sampling.seed prompt_format",
    "finetune": "model tofu_dir max_length mesh dtype finetune minnorm prompt_format",
    "experiment": f"model forget retain tofu_dir seeds {_KNOBS} {_MODEL} experiment finetune "
    "minnorm sweep classifier train synthetic eval leaks sampling.max_new_tokens sampling.seed "
    "prompt_format",
    "plan": "model head seeds rows max_length mesh dtype classifier train sweep finetune "
    "sampling.max_new_tokens",
    "check": "",
    "verify": f"model head forget retain tofu_dir request {_KNOBS} rows mesh dtype verify "
    "leaks.threshold sampling.max_new_tokens sampling.seed prompt_format",
    "serve": f"model head retain tofu_dir feature_store seeds base_only {_KNOBS} {_MODEL} serve "
    "sampling.max_new_tokens sampling.truncate_on classifier train synthetic prompt_format",
}


def main(name: str | None = None) -> None:
    """Runs a command, by default the one that the command line names first."""
    help_flags = {"-h", "-help", "--help", "--helpshort", "--helpfull"}
    if name is None:
        name = sys.argv[1] if len(sys.argv) > 1 else ""
        if name not in FIELDS:
            if name in help_flags:
                _print_and_exit(usage.overview(FIELDS))
            print(usage.overview(FIELDS), file=sys.stderr)
            if name:
                near = difflib.get_close_matches(name, FIELDS, 1)
                end = f"; did you mean {near[0]}?" if near else ""
                print(f"t3jax: unknown command {name!r}{end}", file=sys.stderr)
            sys.exit(2)
        sys.argv = [f"t3jax {name}", *sys.argv[2:]]
    if FIELDS[name] and help_flags & set(sys.argv[1:]):
        _print_and_exit(usage.describe(name, pathlib.Path(sys.argv[0]).name, FIELDS[name].split()))
    interrupts.end_at_once()
    command = importlib.import_module(f"t3jax.commands.{name}")
    if hasattr(command, "run"):
        command.run()
    else:
        importlib.import_module("t3jax.cli").run(command.main)


def _print_and_exit(text: str) -> NoReturn:
    with contextlib.suppress(BrokenPipeError):  # a pager was closed
        print(text, flush=True)
    os._exit(0)
