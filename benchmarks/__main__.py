"""Runs one benchmark: python -m benchmarks NAME [options]."""

import importlib
import pathlib
import sys

_SHARED = ("__init__", "__main__", "ceilings", "peer", "pytorch", "side_by_side")
NAMES = sorted(
    path.stem for path in pathlib.Path(__file__).parent.glob("*.py") if path.stem not in _SHARED
)


def main() -> None:
    """Hands the options to the benchmark's own command line."""
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        sys.exit(f"usage: python -m benchmarks NAME [options]; NAME is one of {', '.join(NAMES)}")
    name = sys.argv.pop(1)
    sys.argv[0] = f"python -m benchmarks {name}"
    importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
