"""A process of test_distributed.py: runs scripts, one after the other, with others as one."""

import importlib
import os
import signal
import sys

import jax
from absl import flags

from t3jax import cli
from t3jax.checkpoint import RunFolder

_SCRIPTS = flags.DEFINE_list("scripts", [], "Names of scripts.")
_SIGNAL = flags.DEFINE_list(
    "signal", [], "NAME,UNIT,NUMBER: what process 1 sends itself in that epoch or step."
)


def send_signal(name: str, unit: str, number: str) -> None:
    finish = RunFolder.finish

    def finish_or_die(self, done, lines, state, save):
        if jax.process_index() == 1 and unit in lines[0] and done == int(number):
            os.kill(os.getpid(), getattr(signal, name))
        finish(self, done, lines, state, save)

    RunFolder.finish = finish_or_die


def main(config) -> None:
    if _SIGNAL.value:
        send_signal(*_SIGNAL.value)
    for name in _SCRIPTS.value:
        importlib.import_module(f"t3jax.commands.{name}").main(config)


if __name__ == "__main__":
    # Gloo's threads write to the process's stdout, into one another's lines: it goes to stderr, and
    # what Python prints stays alone.
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    cli.run(main)
