"""Serves a frozen model, tempered and tilted by heads, to clients of the OpenAI API.

The same as `t3jax serve`; `python serve.py --help` lists its fields.
"""

from t3jax import commands

if __name__ == "__main__":
    commands.main("serve")
