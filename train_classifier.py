"""Trains the classifier: text -> tokens -> frozen features -> head.

The same as `t3jax train`; `python train_classifier.py --help` lists its fields.
"""

from t3jax import commands

if __name__ == "__main__":
    commands.main("train")
