"""A verdict without a retain-only model: does forgotten text come back, and is the rest unchanged?

The input is a model, a head, the rows to forget and rows to retain. The forget rows are asked in
many ways, and each answer is searched for the true one. A high recall alone may be wording that
other rows share, or a guess. An answer therefore leaks only if it holds more of the true answer
than similar texts about others do, and the success of an attack is the excess of its leaks over
those of such texts. The retain rows are asked once, and compared with the base's answers.

Attacks are prompts. The base's weights are unchanged: whoever has them can leave the head out.
"""

from t3jax.synthetic import Counterfactual
from t3jax.verification.asking import VerifyOptions
from t3jax.verification.attacks import Attack, attacks
from t3jax.verification.run import verify
from t3jax.verification.verdict import Verdict

__all__ = ["Attack", "Counterfactual", "Verdict", "VerifyOptions", "attacks", "verify"]
