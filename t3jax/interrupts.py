"""Ends a script at Ctrl-C or SIGTERM while it imports; later `t3jax.cli.run` handles them.

Imports take seconds, and an interrupted import prints a page of traceback.
"""

import os
import pathlib
import signal
import sys


def end_at_once() -> None:
    """Makes Ctrl-C and SIGTERM end the process with a line and a status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)


def _end(number: int, _: object) -> None:
    name = pathlib.Path(sys.argv[0]).name
    os.write(2, f"{name}: stopped ({signal.Signals(number).name})\n".encode())
    os._exit(128 + number)
