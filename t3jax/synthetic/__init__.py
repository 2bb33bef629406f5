"""Texts that the base model writes itself, and targets made from them (beyond the paper).

A request to forget comes without a model that never saw the forget rows. The base model can replace
it: asked about a made-up person, it answers as a model that does not know; asked anything else, it
gives an answer to retain. `names` finds the people of a request and makes up others; `writing` has
the base model write; `counterfactual` swaps names in rows and back in answers; `targets` turns the
base model's distributions under made-up names into the targets that a head is distilled to.
"""

from t3jax.synthetic.counterfactual import Counterfactual, counterfactual_rows, make_counterfactuals
from t3jax.synthetic.names import find_names, make_names, swap_names
from t3jax.synthetic.targets import add_base_targets, add_counterfactual_targets
from t3jax.synthetic.writing import reword_questions, write_own_samples

__all__ = [
    "Counterfactual",
    "add_base_targets",
    "add_counterfactual_targets",
    "counterfactual_rows",
    "find_names",
    "make_counterfactuals",
    "make_names",
    "reword_questions",
    "swap_names",
    "write_own_samples",
]
