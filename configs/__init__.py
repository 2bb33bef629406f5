"""The configs that ship, as files of Python: `--config=configs/NAME.py`, or `--config=NAME`."""
