"""Answers prompts with a frozen model, tempered and tilted by a head; the base model beside it.

The same as `t3jax sample`; `python sample.py --help` lists its fields.
"""

from t3jax import commands

if __name__ == "__main__":
    commands.main("sample")
