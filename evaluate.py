"""Evaluates unlearning on TOFU, or checks the log of an evaluation.

The same as `t3jax evaluate`; `python evaluate.py --help` lists its fields.
"""

from t3jax import commands

if __name__ == "__main__":
    commands.main("evaluate")
