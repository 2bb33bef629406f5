"""The requests to forget of a server that does not run: python -m t3jax.serving FOLDER [ACTION].

    python -m t3jax.serving FOLDER               # lists them
    python -m t3jax.serving FOLDER --audit       # who did what and when
    python -m t3jax.serving FOLDER --on ID       # also approves one that is held
    python -m t3jax.serving FOLDER --off ID
    python -m t3jax.serving FOLDER --revoke ID   # deletes its head and rows

No model is loaded. A server that is started with the folder serves the heads that are on. A running
server locks the folder: use its `/v1/forget_requests` then.
"""

import argparse
import getpass
import pathlib
import sys

from t3jax.head_io import Head
from t3jax.serving.requests import RequestBook


def main() -> None:
    """Runs the command line; an error is one line and status 1."""
    parser = argparse.ArgumentParser(
        prog="python -m t3jax.serving",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("folder", type=pathlib.Path)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--audit", action="store_true")
    for name in ("on", "off", "revoke"):
        action.add_argument(f"--{name}", metavar="ID")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"t3jax.serving: {error}")


def run(arguments: argparse.Namespace) -> None:
    """Runs the action of the command line.

    A ValueError means that there is no such request, or no head to turn on or off; an OSError, that
    there is no such folder, or that a server runs on it.
    """
    if not arguments.folder.is_dir():
        raise FileNotFoundError(f"{arguments.folder}: no such folder")
    book = RequestBook(arguments.folder, _NoServer(), None)
    try:
        who = f"{getpass.getuser()}, offline"
        id = arguments.on or arguments.off or arguments.revoke
        if id is not None and book.show(id) is None:
            known = ", ".join(str(entry["id"]) for entry in book.entries()) or "none"
            raise ValueError(f"no request {id!r} in {arguments.folder}; there are: {known}")
        if arguments.revoke:
            book.revoke(id, who)
        elif id is not None:
            book.activate(id, arguments.on is not None, who)
        if arguments.audit:
            for line in book.audit():
                print(line["when"], line["what"], line.get("request", ""), line["who"], sep="  ")
            return
        for entry in book.entries():
            print(entry["id"], entry["state"], f"{entry['rows']} rows", entry["name"], sep="  ")
    finally:
        book.close()


class _NoServer:
    """A switchboard without heads."""

    def install(self, name: str, head: Head, active: bool = True) -> None:
        """Does nothing."""

    def activate(self, name: str, active: bool) -> None:
        """Does nothing."""

    def remove(self, name: str) -> None:
        """Does nothing."""


if __name__ == "__main__":
    main()
