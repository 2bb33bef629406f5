"""The TOFU experiment: makes a model that knows, unlearns, and measures what that is worth.

The same as `t3jax experiment`; `python experiment.py --help` lists its fields.
"""

from t3jax import commands

if __name__ == "__main__":
    commands.main("experiment")
