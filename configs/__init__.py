"""The configs of the package, Python files: `--config=configs/NAME.py`, or `--config=NAME`."""
