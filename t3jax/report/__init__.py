"""Results for people: an evaluation as one HTML file, a choice, an experiment."""

from t3jax.report.choice import write_calibration, write_sweep
from t3jax.report.diagnosis import describe_diagnoses, diagnose_heads
from t3jax.report.page import write_report
from t3jax.report.results import write_experiment

__all__ = [
    "describe_diagnoses",
    "diagnose_heads",
    "write_calibration",
    "write_experiment",
    "write_report",
    "write_sweep",
]
