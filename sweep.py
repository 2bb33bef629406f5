"""Chooses the head, T and s: trains a grid of heads, scores all, and cross-fits the choice.

The same as `t3jax sweep`; `python sweep.py --help` lists its fields.
"""

from t3jax import commands

if __name__ == "__main__":
    commands.main("sweep")
