"""The report: one HTML file, which holds all it shows, on an evaluation."""

from t3jax.report.page import write_report

__all__ = ["write_report"]
