"""Warnings of absurd answers, of empty ones, and of a truncation that restores forgotten text."""

import functools
import math
import warnings
from collections.abc import Sequence

import jax
import numpy as np

from t3jax.sampling.next_token import Logprobs

ABSURD_PERPLEXITY = 30.0  # under the base: answers above it are no language

# Where the base is not sure, its own draws are unlikely too. Measured with SmolLM2-135M, H the mean
# of its entropy along the answers: the perplexity of its own answers is .3 to 1.1 times exp(H), and
# that of broken ones above the limit 2.2 times and more. Answers that loop stay below both.
_TIMES_ITS_OWN = 2.0

# A base whose perplexity exceeds a quarter of the vocabulary is no language model.
_FLAT = 0.25


def warn_of_absurd_answers(
    answers: Sequence[Logprobs],
    base_temperature: float,
    guidance_scale: float,
    model: str,
    vocab_size: int,
) -> None:
    """Warns if the base finds answers absurd, by the rule in `Sampler.generate`."""
    if not answers:
        return
    median = float(np.median([perplexity(answer.base) for answer in answers]))
    entropies = np.concatenate([np.asarray(answer.base_entropy) for answer in answers])
    usual = perplexity(-entropies)
    if usual > _FLAT * vocab_size or median <= max(ABSURD_PERPLEXITY, _TIMES_ITS_OWN * usual):
        return
    warnings.warn(
        f"the answers are no language to {model}: their median perplexity under it is "
        f"{median:.0f}, its own draws have about {usual:.0f}, and T·s is "
        f"{base_temperature * guidance_scale:g} (T = {base_temperature:g}, s = "
        f"{guidance_scale:g}); take a smaller guidance_scale, base_temperature = 1, a head trained "
        "by distillation, or a top_p below 1",
        stacklevel=4,
    )


def warn_of_empty_answers(count: int, answers: int) -> None:
    """Warns of answers without contents: nothing leaks from them, and nothing is forgotten."""
    warnings.warn(
        f"{count} of {answers} answers are empty: they end before any word. That is no "
        "forgetting; look at stop, at stop_ids, and at what the base model answers",
        stacklevel=4,
    )


@functools.cache  # once a process
def warn_of_the_base() -> None:
    """Warns of truncation that the base's distribution decides."""
    warnings.warn(
        'truncate_on="base" can bring the forgotten text back: where the base is sure, its nucleus '
        "is the token to forget, and a tight top_p or min_p keeps that token alone; use "
        'truncate_on="guided"',
        stacklevel=4,
    )


def perplexity(logprobs: jax.typing.ArrayLike) -> float:
    """Perplexity of tokens with these log-probabilities, bounded by e^700."""
    return math.exp(min(-float(np.mean(logprobs, dtype=np.float64)), 700.0))
