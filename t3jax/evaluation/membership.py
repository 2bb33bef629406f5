"""Membership inference on forget rows against holdout rows: scores, their AUC, and privleak.

A low score means that the model was likely trained on the row. Arrays and axes are as in
`metrics.py`.

References:
    OpenUnlearning, arXiv 2506.12618.
"""

import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from t3jax.evaluation.metrics import EPS, AnyArray, finite


def zlib_score(
    avg_loss: Float[AnyArray, "rows"], answers: Sequence[str]
) -> Float[np.ndarray, "rows"]:
    """Membership score `mia_zlib`, nats per byte: `avg_loss / len(zlib.compress(answer))`."""
    avg_loss = finite("avg_loss", avg_loss)
    if len(answers) != len(avg_loss):
        raise ValueError(f"zlib_score got {len(avg_loss)} losses but {len(answers)} answers")
    return avg_loss / np.array([len(zlib.compress(a.encode("utf-8"))) for a in answers], np.float64)


def min_k_score(
    log_probs: Float[AnyArray, "rows tokens"],
    mask: Bool[AnyArray, "rows tokens"],
    fraction: float = 0.4,
) -> Float[np.ndarray, "rows"]:
    """Membership score `mia_min_k`: minus the mean of the lowest token log-probabilities, nats.

    `mask` is true on answer tokens except the closing end-of-turn token. `fraction` is the share of
    a row's tokens to average, at least one token. Unlikely text scores high; a row without answer
    tokens scores 0, as in the reference.

    References:
        Min-K% Prob, arXiv 2310.16789.
    """
    mask = np.asarray(mask)
    log_probs = finite("log_probs", np.where(mask, np.asarray(log_probs, np.float64), 0.0))
    tokens = mask.sum(axis=1)
    taken = np.minimum(np.maximum(1, (fraction * tokens).astype(np.int64)), tokens)
    ascending = np.sort(np.where(mask, log_probs, np.inf), axis=1)
    lowest = np.arange(mask.shape[1]) < taken[:, None]
    total = np.where(lowest, ascending, 0.0).sum(axis=1)
    return np.where(tokens > 0, -total / np.maximum(taken, 1), 0.0)


def min_k_plus_plus_score(
    log_probs: Float[AnyArray, "rows tokens"],
    mean: Float[AnyArray, "rows tokens"],
    variance: Float[AnyArray, "rows tokens"],
    mask: Bool[AnyArray, "rows tokens"],
) -> Float[np.ndarray, "rows"]:
    """Membership score `mia_min_k_plus_plus`: `min_k_score` of standardised log-probabilities.

    `mean` and `variance` are moments of the log-probability under the model's own next-token
    distribution; a variance below 1e-6 counts as 1e-6.

    References:
        Min-K%++, arXiv 2404.02936.
    """
    mask = np.asarray(mask)
    log_probs, mean, variance = (
        finite(name, np.where(mask, np.asarray(values, np.float64), 0.0))
        for name, values in (("log_probs", log_probs), ("mean", mean), ("variance", variance))
    )
    return min_k_score((log_probs - mean) / np.sqrt(np.maximum(variance, 1e-6)), mask)


def membership_auc(
    forget_scores: Float[AnyArray, "forget"], holdout_scores: Float[AnyArray, "holdout"]
) -> float:
    """ROC-AUC of a score as a classifier of holdout rows (label 1) and forget rows (label 0).

    0.5 is chance; it is 1 if all forget rows score lower.
    """
    forget_scores = finite("forget_scores", forget_scores)
    holdout_scores = finite("holdout_scores", holdout_scores)
    if min(len(forget_scores), len(holdout_scores)) == 0:
        raise ValueError(
            "membership_auc needs scores of forget and of holdout rows, "
            f"got {len(forget_scores)} and {len(holdout_scores)}"
        )
    from sklearn.metrics import roc_auc_score  # takes a second to import

    labels = np.repeat([0, 1], [len(forget_scores), len(holdout_scores)])
    return float(roc_auc_score(labels, np.concatenate([forget_scores, holdout_scores])))


def privleak(auc: float, retain_auc: float = 0.5) -> float:
    """How far membership inference is from its success on the retain model, in percent.

    `100 · ((1 - auc) - (1 - retain_auc)) / ((1 - retain_auc) + 1e-10)` of the AUC of `mia_min_k`: 0
    is ideal, below 0 under-unlearned, above 0 over-unlearned. Without a retain model its AUC is
    0.5.
    """
    # The order of operations is the reference's: the last bit depends on it.
    score, reference = 1 - auc, 1 - retain_auc
    return (score - reference) / (reference + EPS) * 100
