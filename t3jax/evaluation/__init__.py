"""Evaluation: scores of texts under settings, TOFU's metrics, leaks, the choice of T and s.

The path of a number: `score_texts` (kept by a `Store`) -> columns of a `Log` -> its aggregates ->
the choice of a setting. `recompute` checks the log of a file.
"""

from t3jax.evaluation.aggregates import forget_quality
from t3jax.evaluation.calibration import calibrate
from t3jax.evaluation.log_files import read_log, write_log
from t3jax.evaluation.logs import Log, Metric, MissingMetricError
from t3jax.evaluation.metrics import Interval
from t3jax.evaluation.questions import QuestionSet, encode_set, load_sets
from t3jax.evaluation.recall import leak_recall
from t3jax.evaluation.scoring import TextScores, score_texts
from t3jax.evaluation.settings import BASE, Setting, settings_grid
from t3jax.evaluation.store import Store

__all__ = [
    "BASE",
    "Interval",
    "Log",
    "Metric",
    "MissingMetricError",
    "QuestionSet",
    "Setting",
    "Store",
    "TextScores",
    "calibrate",
    "encode_set",
    "forget_quality",
    "leak_recall",
    "load_sets",
    "read_log",
    "score_texts",
    "settings_grid",
    "write_log",
]
