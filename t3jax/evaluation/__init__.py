"""Evaluation of unlearning on TOFU: metrics, logs in the reference's format, recomputation."""
