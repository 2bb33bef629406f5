"""Answers in the report: those of the models, and the effect of head and tilt on right answers.

`answer_tokens` alone runs the model, on the few answers whose tokens are shown.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from t3jax.data.records import evenly_spread
from t3jax.evaluation import aggregates, logs
from t3jax.evaluation.logs import Log, MissingMetricError
from t3jax.evaluation.questions import SETS, QuestionSet
from t3jax.evaluation.scoring import TextScores
from t3jax.evaluation.settings import Setting
from t3jax.evaluation.store import Store

if TYPE_CHECKING:  # slow to import: only who loads a tokenizer waits
    from transformers import PreTrainedTokenizerBase

TOKEN_ROWS = 2  # answers of forget and of retain, each, whose tokens are shown


class Answer(NamedTuple):
    """An answer of a model."""

    model: str
    kind: str
    text: str
    recall: float


class Sample(NamedTuple):
    """A question with the right answer and the answers of models."""

    set_name: str
    question: str
    truth: str
    answers: list[Answer]


class Token(NamedTuple):
    """A token of a right answer.

    Attributes:
        text: The token as text.
        retain_prob: The head's P(retain).
        change: The change of its log-probability by the tilt, nats.
    """

    text: str
    retain_prob: float
    change: float


class TokenRow(NamedTuple):
    """An answer in the token view."""

    set_name: str
    question: str
    tokens: list[Token]


def samples(
    sets: Mapping[str, QuestionSet], models: Sequence[tuple[str, str, Log]], count: int
) -> list[Sample]:
    """Questions of forget and retain, evenly spread, with the answers of each model.

    Models are label, kind and log; a model without generated answers is left out.
    """
    rows = []
    for name in ("forget", "retain"):
        if name not in sets:
            continue
        metric = f"{name}_Q_A_ROUGE"
        answers = []
        for model, kind, log in models:
            with contextlib.suppress(MissingMetricError):
                texts = logs.texts(log, metric, "generation")
                answers.append((model, kind, texts, aggregates.rows(log, metric)))
        rows += [
            Sample(
                SETS[name],
                sets[name].questions[row],
                sets[name].ground_truths[row],
                [Answer(m, kind, texts[row], recall[row]) for m, kind, texts, recall in answers],
            )
            for row in evenly_spread(range(sets[name].num_rows), count)
        ]
    return rows


def answer_tokens(
    store: Store, sets: Mapping[str, QuestionSet], featured: Setting | None
) -> list[TokenRow]:
    """Scores a few right answers under the featured setting and without its tilt."""
    if featured is None:
        return []
    chosen = [
        (sets[name], row)
        for name in ("forget", "retain")
        if name in sets
        for row in evenly_spread(range(sets[name].num_rows), TOKEN_ROWS)
    ]
    examples = [questions.answers[row] for questions, row in chosen]
    without_tilt = dataclasses.replace(
        featured,
        name=f"{featured.name}-untilted",
        guidance_scale=0.0,
        refinements=dataclasses.replace(featured.refinements, protected=()),
    )
    tilted, tempered = store.scores("report", examples, [featured, without_tilt])
    return [
        TokenRow(
            SETS[questions.name],
            questions.questions[row],
            _show_tokens(
                _split_text(store.lm.tokenizer, example.tokens[example.answer_start :].tolist()),
                tilted.select(i, i + 1),
                tempered.select(i, i + 1),
            ),
        )
        for i, ((questions, row), example) in enumerate(zip(chosen, examples, strict=True))
    ]


def _show_tokens(texts: Sequence[str], scores: TextScores, without_tilt: TextScores) -> list[Token]:
    """The tokens of one answer with the head's probabilities and the effect of the tilt."""
    change = scores.logprobs - without_tilt.logprobs
    return [
        Token(text, float(prob), float(nats))
        for text, prob, nats in zip(texts, scores.retain_prob, change, strict=True)
    ]


def _split_text(tokenizer: "PreTrainedTokenizerBase", tokens: list[int]) -> list[str]:
    """The text that each token adds, special tokens included."""
    texts = [str(tokenizer.decode(tokens[:i])) for i in range(len(tokens) + 1)]
    return [
        (after[len(before) :] if after.startswith(before) else after[-1:]).replace("\n", "⏎")
        for before, after in itertools.pairwise(texts)
    ]
