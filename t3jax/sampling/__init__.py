"""Sampling: truncation, the next token, the decoding loop, the `Sampler`."""

from t3jax.sampling.next_token import Controls, next_token
from t3jax.sampling.options import SamplingOptions
from t3jax.sampling.sampler import Sample, Sampler
from t3jax.sampling.truncation import support

__all__ = ["Controls", "Sample", "Sampler", "SamplingOptions", "next_token", "support"]
