"""The TOFU evaluation of a model under many settings.

Question sets are scored and answered (`store.py`), and the log is assembled with the definitions of
`metrics.py` and `aggregates.py`. A metric whose data are missing is noted in the log with the
reason. Each setting's log is written once it is whole; a run that was killed resumes from its
store.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import numpy as np

from t3jax.evaluation import aggregates, log_files, logs, membership, metrics
from t3jax.evaluation.logs import Column, Log, Metric, MissingMetricError
from t3jax.evaluation.questions import SETS, QuestionSet
from t3jax.evaluation.scoring import TextScores
from t3jax.evaluation.settings import BASE, Setting
from t3jax.evaluation.store import Store
from t3jax.ranges import COUNT, Ranged

_ANSWERED = ("forget", "retain", "ra", "wf")
_NORMALISED = ("ra", "wf")
MEMBERSHIP = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus", "mia_reference")


@dataclasses.dataclass(frozen=True)
class TofuOptions(Ranged):
    """Options of the TOFU evaluation.

    Attributes:
        max_new_tokens: Longest generated answer, tokens.
        reference_mask: Mask attention as the reference evaluator does; see `score_texts`.
        answers: Whether to generate answers, for ROUGE; without them a setting costs seconds.
    """

    max_new_tokens: Annotated[int, COUNT] = 200
    reference_mask: bool = False
    answers: bool = True


def evaluate(
    store: Store,
    sets: Mapping[str, QuestionSet],
    settings: Sequence[Setting],
    folder: pathlib.Path | str,
    options: TofuOptions = TofuOptions(),
    *,
    retain_log: Log | None = None,
    retain_store: Store | None = None,
) -> dict[str, Log]:
    """Evaluates a model under every setting, writes the logs and returns them by name.

    The folder of each setting, by its name, holds `TOFU_EVAL.json` and `TOFU_SUMMARY.json`. The
    retain model's log is for forget_quality and privleak, the model itself for mia_reference.

    Raises:
        ValueError: If there is no forget set, names are equal, the retain log is of another split,
            or the model's scores are not finite.
    """
    if "forget" not in sets:
        raise ValueError("the evaluation needs a forget set")
    if len({setting.name for setting in settings}) < len(settings):
        raise ValueError(f"settings must have different names, got {[s.name for s in settings]}")
    scores = {
        name: store.scores(
            name,
            questions.texts,
            settings,
            options.reference_mask,
            moments="holdout" in sets and name in ("forget", "holdout"),
        )
        for name, questions in sets.items()
    }
    reference_losses = None
    if retain_store is not None and "holdout" in sets:
        reference_losses = {
            name: retain_store.scores(
                f"retain_model-{name}", sets[name].answers, [BASE], options.reference_mask
            )[0].avg_loss
            for name in ("forget", "holdout")
        }
    written = {}
    for k, setting in enumerate(settings):
        log = assemble_log(
            sets,
            {name: by_setting[k] for name, by_setting in scores.items()},
            _answer(store, sets, setting, options) if options.answers else {},
            retain_log,
            reference_losses,
        )
        log_files.write_log(pathlib.Path(folder) / setting.name, log)
        written[setting.name] = log
    return written


def _answer(
    store: Store, sets: Mapping[str, QuestionSet], setting: Setting, options: TofuOptions
) -> dict[str, list[str]]:
    """Greedy answers to the questions of each set."""
    return {
        name: [
            sample.text.strip()
            for sample in store.answers(
                name,
                sets[name].prompts,
                setting,
                options.reference_mask,
                max_new_tokens=options.max_new_tokens,
            )
        ]
        for name in _ANSWERED
        if name in sets
    }


def assemble_log(
    sets: Mapping[str, QuestionSet],
    scores: Mapping[str, TextScores],
    generations: Mapping[str, Sequence[str]],
    retain_log: Log | None = None,
    reference_losses: Mapping[str, np.ndarray] | None = None,
) -> Log:
    """Makes a log of scores and generated answers, with reasons for missing metrics.

    `reference_losses` are the retain model's on the answers of forget and holdout.
    """
    makers = _Columns(sets, scores, generations, reference_losses).makers()
    return logs.collect(makers, lambda log, metric: aggregates.aggregate(log, metric, retain_log))


@dataclasses.dataclass(frozen=True, eq=False)
class _Columns:
    """Makes the columns of each metric from the arguments of `assemble_log`."""

    sets: Mapping[str, QuestionSet]
    scores: Mapping[str, TextScores]
    generations: Mapping[str, Sequence[str]]
    reference_losses: Mapping[str, np.ndarray] | None

    def makers(self) -> dict[str, Callable[[Log], Mapping[str, Metric]]]:
        """A function for each metric; a metric comes after the metrics that it is made of."""
        columns: dict[str, Callable[[Log], Mapping[str, Column]]] = {}
        for name in _ANSWERED:
            columns[f"{name}_Q_A_Prob"] = functools.partial(self.score_right, name)
            if name not in _NORMALISED:
                columns[f"{name}_Q_A_PARA_Prob"] = functools.partial(self.score_paraphrased, name)
            columns[f"{name}_Q_A_PERT_Prob"] = functools.partial(self.score_wrong, name)
            if name in _NORMALISED:
                metric = f"{name}_Q_A_Prob_normalised"
                columns[metric] = functools.partial(_normalise, metric)
            columns[f"{name}_Q_A_ROUGE"] = functools.partial(self.compare_answers, name)
            metric = "forget_truth_ratio" if name == "forget" else f"{name}_Truth_Ratio"
            columns[metric] = functools.partial(_take_ratios, metric)
        for definition in (metrics.exact_memorization, metrics.extraction_strength):
            columns[definition.__name__] = functools.partial(self.score_tokens, definition)
        makers: dict[str, Callable[[Log], Mapping[str, Metric]]] = {
            metric: functools.partial(_make_metric, metric, make)
            for metric, make in columns.items()
        }
        for metric in MEMBERSHIP:
            makers[metric] = functools.partial(self.infer_membership, metric)
        makers["mia_gradnorm"] = _refuse_gradients
        for metric in ("forget_quality", "privleak", "model_utility"):
            makers[metric] = functools.partial(_make_metric, metric, lambda log: {})
        return makers

    def score_right(self, name: str, log: Log) -> dict[str, np.ndarray]:
        return _probabilities(self.answer_scores(name).avg_loss)

    def score_paraphrased(self, name: str, log: Log) -> dict[str, np.ndarray]:
        questions = self.questions(name)
        if questions.paraphrased is None:
            raise MissingMetricError(f"the {SETS[name]} set has no paraphrased answers")
        scores = self.scores[name].select(questions.num_rows, 2 * questions.num_rows)
        return _probabilities(scores.avg_loss)

    def score_wrong(self, name: str, log: Log) -> dict[str, np.ndarray]:
        questions = self.questions(name)
        wrong = len(questions.wrong)
        if not wrong:
            raise MissingMetricError(f"the {SETS[name]} set has no wrong answers")
        first = len(questions.texts) - wrong * questions.num_rows
        return _probabilities(self.scores[name].avg_loss[first:].reshape(wrong, -1).T)

    def compare_answers(self, name: str, log: Log) -> dict[str, Column]:
        questions = self.questions(name)
        if name not in self.generations:
            raise MissingMetricError("no answers were generated")
        generations = list(self.generations[name])
        return {
            **metrics.rouge_scores(questions.ground_truths, generations),
            "input": questions.inputs,
            "ground_truth": questions.ground_truths,
            "generation": generations,
        }

    def score_tokens(
        self, definition: Callable[..., np.ndarray], log: Log
    ) -> dict[str, np.ndarray]:
        scores = self.answer_scores("forget")
        return {"score": definition(scores.padded(scores.correct), scores.mask_without_last())}

    def infer_membership(self, metric: str, log: Log) -> dict[str, Metric]:
        self.questions("holdout")  # named first where scores are missing too
        return aggregates.membership_metric(
            metric, *(self.membership_scores(metric, name) for name in ("forget", "holdout"))
        )

    def membership_scores(self, metric: str, name: str) -> np.ndarray:
        scores = self.answer_scores(name)
        if metric == "mia_loss":
            return scores.avg_loss
        if metric == "mia_zlib":
            return membership.zlib_score(scores.avg_loss, self.sets[name].answer_texts)
        if metric == "mia_reference":
            if self.reference_losses is None:
                raise MissingMetricError("it needs the retain model itself")
            return scores.avg_loss - self.reference_losses[name]
        mask, logprobs = scores.mask_without_last(), scores.padded(scores.logprobs)
        if metric == "mia_min_k":
            return membership.min_k_score(logprobs, mask)
        if scores.mean is None or scores.variance is None:
            raise MissingMetricError("mean and variance of the log-probabilities were not computed")
        moments = (scores.padded(scores.mean), scores.padded(scores.variance))
        return membership.min_k_plus_plus_score(logprobs, *moments, mask)

    def answer_scores(self, name: str) -> TextScores:
        """Scores of the right answers of a set."""
        rows = self.questions(name).num_rows  # first: it names a missing set
        return self.scores[name].select(0, rows)

    def questions(self, name: str) -> QuestionSet:
        if name not in self.sets:
            raise MissingMetricError(f"no {SETS[name]} set was given")
        return self.sets[name]


def _probabilities(losses: np.ndarray) -> dict[str, np.ndarray]:
    return {"prob": metrics.probability(losses), "avg_loss": losses}


def _normalise(metric: str, log: Log) -> dict[str, np.ndarray]:
    return {"prob": aggregates.normalised_probabilities(log, metric)}


def _take_ratios(metric: str, log: Log) -> dict[str, np.ndarray]:
    return {"score": aggregates.truth_ratios(log, metric)}


def _make_metric(
    metric: str, make: Callable[[Log], Mapping[str, Column]], log: Log
) -> dict[str, Metric]:
    """A metric whose aggregate comes from its columns or from other metrics."""
    return {metric: Metric(None, make(log))}


def _refuse_gradients(log: Log) -> dict[str, Metric]:
    raise MissingMetricError("gradients of the model's weights are not computed here")
