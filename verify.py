"""The verdict on a head: does what was forgotten come back, and is the rest as before?

The same as `t3jax verify`; `python verify.py --help` lists its fields.
"""

from t3jax import commands

if __name__ == "__main__":
    commands.main("verify")
