"""Ends a script at once at Ctrl-C or SIGTERM while it still imports; `t3jax.cli.run` does it later.

Imports take seconds, and an interrupted one prints a page of traceback.
"""

import os
import pathlib
import signal
import sys


def end_at_once() -> None:
    """Lets Ctrl-C and SIGTERM end the process with a line and a status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)


def _end(number: int, _: object) -> None:
    name = pathlib.Path(sys.argv[0]).name
    os.write(2, f"{name}: stopped ({signal.Signals(number).name})\n".encode())
    os._exit(128 + number)
