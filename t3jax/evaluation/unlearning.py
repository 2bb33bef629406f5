"""Metrics of unlearning at inference time beyond those of the reference evaluator.

Does the forget set leak when many answers are drawn? Are answers still language? Does the head
separate the two sets? How far is the served distribution from the retain model's? `measure` runs
the model for these questions and writes the metrics as a log; `answers.py` computes them from
answers and scores.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, TypeVar

import numpy as np

from t3jax.data import Example, evenly_spread
from t3jax.evaluation import log_files, logs, membership, metrics
from t3jax.evaluation.answers import distinct_n, leak_metric, log_ratios, repetition, retain_logits
from t3jax.evaluation.logs import Log, Metric, MissingMetricError
from t3jax.evaluation.questions import QuestionSet, append_answers, prompts
from t3jax.evaluation.recall import leak_recall
from t3jax.evaluation.scoring import TextScores
from t3jax.evaluation.settings import BASE, Setting
from t3jax.evaluation.store import Store
from t3jax.ranges import COUNT, SEED, TOP_P, TRUNCATE_ON, Numbers, Ranged, whole
from t3jax.sampling import Sample

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class UnlearningOptions(Ranged):
    """Options of the metrics beyond TOFU's: the sampled answers.

    Attributes:
        leak_samples: Samples for each forget question, and for each paraphrased one; 0 draws none.
        leak_rows: Questions that are sampled, evenly spread over the set; None: all.
        leak_threshold: ROUGE-L recall from which an answer leaks.
        leak_temperature: Sampling temperature of these samples.
        leak_top_k: Samples draw from the k likeliest tokens; 0 draws from all.
        leak_top_p: Samples draw from the likeliest tokens whose probability reaches p; 1 draws from
            all.
        leak_truncate_on: The distribution that the last two truncate, see `SamplingOptions`. "base"
            measures the leaks of a nucleus of the base model.
        kl_rows: Questions of each of the forget and the retain set, evenly spread over it, for the
            Monte-Carlo KL, which draws from the whole distribution; 0 leaves it out.
        kl_samples: Samples for each of these questions.
        max_new_tokens: Longest answer, tokens.
        seed: Seed of the samples.
    """

    leak_samples: Annotated[int, whole(0, 2**16)] = 0
    leak_rows: Annotated[int | None, whole(1)] = None
    leak_threshold: Annotated[float, TOP_P] = 0.7
    leak_temperature: Annotated[float, Numbers(0, 1000)] = 1.0
    leak_top_k: Annotated[int, whole(0)] = 0
    leak_top_p: Annotated[float, TOP_P] = 1.0
    leak_truncate_on: Annotated[str, TRUNCATE_ON] = "guided"
    kl_rows: Annotated[int, whole(0)] = 0
    kl_samples: Annotated[int, whole(1, 2**16)] = 1
    max_new_tokens: Annotated[int, COUNT] = 200
    seed: Annotated[int, SEED] = 0

    def __post_init__(self):
        super().__post_init__()
        if self.leak_samples and not self.leak_temperature > 0:
            raise ValueError("best of several samples needs a sampling temperature above 0")


def check_same_vocabulary(store: Store, retain_store: Store) -> None:
    """Checks that two models have the same tokenizer."""
    ours, theirs = store.lm, retain_store.lm
    if ours.tokenizer.get_vocab() != theirs.tokenizer.get_vocab():
        raise ValueError(
            f"the retain model {theirs.name} has another tokenizer than {ours.name}: their "
            "probabilities of the same tokens cannot be compared"
        )


def measure(
    store: Store,
    sets: Mapping[str, QuestionSet],
    settings: Sequence[Setting],
    folder: pathlib.Path | str,
    options: UnlearningOptions = UnlearningOptions(),
    *,
    retain_store: Store | None = None,
    judge: Store | None = None,
) -> dict[str, Log]:
    """Runs the model under every setting, computes the metrics and writes them.

    Returns the logs by setting's name; the folder of that name gets an `UNLEARNING.json`. A missing
    metric is noted with the reason. Attention is masked correctly here, whatever `reference_mask`
    is elsewhere. The retain model is for the Monte-Carlo KL; the base model of `judge`, or of
    `store`, measures the fluency of answers.
    """
    shared: dict[str, list[TextScores]] = {}
    written = {}
    for index, setting in enumerate(settings):
        measuring = _Measuring(
            store, sets, settings, index, options, retain_store, judge or store, shared
        )
        makers = measuring.makers()
        log = logs.collect(makers)
        log_files.write_unlearning(pathlib.Path(folder) / setting.name, log, list(makers))
        written[setting.name] = log
    return written


@dataclasses.dataclass(frozen=True, eq=False)
class _Measuring:
    """Makes each metric from the arguments of `measure`, for one of the settings.

    `shared` caches scores of texts that all settings share, by label.
    """

    store: Store
    sets: Mapping[str, QuestionSet]
    settings: Sequence[Setting]
    index: int
    options: UnlearningOptions
    retain_store: Store | None
    judge: Store
    shared: dict[str, list[TextScores]]

    @property
    def setting(self) -> Setting:
        return self.settings[self.index]

    def makers(self) -> dict[str, Callable[[Log], Mapping[str, Metric]]]:
        numbers: dict[str, Callable[[], Metric]] = {
            "forget_leak_rate": lambda: self.leak_rate(
                "forget-samples", self.questions("forget").answers
            ),
            "forget_paraphrased_leak_rate": lambda: self.leak_rate(
                "forget-paraphrased-samples", self.reworded("forget")
            ),
        }
        for name in ("forget", "retain"):
            for metric, make in (
                ("paraphrased_Q_A_Prob", self.reworded_prob),
                ("paraphrased_Q_A_ROUGE", self.reworded_rouge),
                ("greedy_fluency", self.greedy_fluency),
                ("classifier_accuracy", self.classifier_accuracy),
                ("KL_guided_retain", self.kl_guided_retain),
                ("KL_retain_guided", self.kl_retain_guided),
            ):
                numbers[f"{name}_{metric}"] = functools.partial(make, name)
        numbers["forget_sample_fluency"] = self.sample_fluency
        numbers["classifier_auc"] = self.classifier_auc
        return {
            metric: functools.partial(_make_metric, metric, make)
            for metric, make in numbers.items()
        }

    def leak_rate(self, label: str, questions: Sequence[Example]) -> Metric:
        n = self.options.leak_samples
        samples = self.leak_samples(label, questions)
        truths = [
            truth for truth in self.leak_rows(self.sets["forget"].ground_truths) for _ in range(n)
        ]
        recall = leak_recall(truths, [sample.text for sample in samples]).reshape(-1, n)
        metric = leak_metric(recall, self.options.leak_threshold)
        largest = [
            samples[row * n + int(best)].text for row, best in enumerate(recall.argmax(axis=1))
        ]
        columns = {**metric.columns, "generation_of_largest": largest}
        return dataclasses.replace(metric, columns=columns)

    def reworded_prob(self, name: str) -> Metric:
        losses = self.scores(f"{name}-paraphrased", self.reworded(name)).avg_loss
        prob = metrics.probability(losses)
        return Metric(float(prob.mean()), {"prob": prob, "avg_loss": losses})

    def reworded_rouge(self, name: str) -> Metric:
        samples = self.greedy(f"{name}-paraphrased", self.reworded(name))
        texts = [sample.text.strip() for sample in samples]
        truths = self.sets[name].ground_truths
        scores = metrics.rouge_scores(truths, texts)
        return Metric(
            float(scores["rougeL_recall"].mean()),
            {**scores, "ground_truth": truths, "generation": texts},
        )

    def greedy_fluency(self, name: str) -> Metric:
        answers = self.questions(name).answers
        return self.fluency(f"{name}-greedy", answers, self.greedy(name, answers))

    def sample_fluency(self) -> Metric:
        answers = self.questions("forget").answers
        samples = self.leak_samples("forget-samples", answers)
        n = self.options.leak_samples
        drawn = [example for example in self.leak_rows(answers) for _ in range(n)]
        return self.fluency("forget-samples", drawn, samples)

    def fluency(self, label: str, answers: Sequence[Example], samples: Sequence[Sample]) -> Metric:
        """Perplexity of texts under the base model, and their repetition."""
        texts = [sample.text for sample in samples]
        label = f"{label}-{self.setting.name}"
        (scores,) = self.judge.scores(label, append_answers(prompts(answers), samples), [BASE])
        tokens = int(scores.num_tokens.sum())
        distinct: dict[str, float | None] = {}
        for n in (1, 2, 3):
            try:
                distinct[f"distinct_{n}"] = distinct_n(texts, n)
            except MissingMetricError:
                distinct[f"distinct_{n}"] = None
        repeated = repetition(texts)
        return Metric(
            math.exp(-float(scores.logprobs.sum(dtype=np.float64)) / tokens),
            {"avg_loss": scores.avg_loss, "repetition": repeated},
            details={**distinct, "repetition": float(repeated.mean()), "tokens": tokens},
        )

    def classifier_accuracy(self, name: str) -> Metric:
        logits = self.verdicts(name)
        correct = (logits > 0) if name == "retain" else (logits <= 0)
        return Metric(float(correct.mean()), {"score": logits})

    def classifier_auc(self) -> Metric:
        # The second argument of `membership_auc` is the side that should score higher.
        return Metric(membership.membership_auc(self.verdicts("forget"), self.verdicts("retain")))

    def verdicts(self, name: str) -> np.ndarray:
        answers = self.questions(name).answers
        return retain_logits(self.scores(f"{name}-answers", answers))

    def kl_guided_retain(self, name: str) -> Metric:
        """KL(guided || retain), estimated from answers of the guided model."""
        retain_store = self.retain_model()
        answers = self.kl_prompts(name)
        texts = append_answers(
            prompts(answers), self.draw(self.store, f"{name}-kl", answers, self.setting)
        )
        label = f"{name}-kl-{self.setting.name}"
        (guided,) = self.store.scores(label, texts, [self.setting])
        (retain,) = retain_store.scores(f"{label}-retain_model", texts, [BASE])
        return _estimate_divergence(guided, retain)

    def kl_retain_guided(self, name: str) -> Metric:
        """KL(retain || guided), estimated from answers of the retain model."""
        retain_store = self.retain_model()
        answers = self.kl_prompts(name)
        label = f"{name}-kl-retain_model"
        texts = append_answers(prompts(answers), self.draw(retain_store, label, answers, BASE))
        (retain,) = retain_store.scores(label, texts, [BASE])
        return _estimate_divergence(retain, self.scores(label, texts))

    def kl_prompts(self, name: str) -> list[Example]:
        """Questions evenly spread over a set, each repeated for its samples."""
        if not self.options.kl_rows:
            raise MissingMetricError("no questions were asked for (kl_rows = 0)")
        rows = evenly_spread(self.questions(name).answers, self.options.kl_rows)
        return [example for example in rows for _ in range(self.options.kl_samples)]

    def draw(
        self, store: Store, label: str, answers: Sequence[Example], setting: Setting
    ) -> list[Sample]:
        """Draws from the whole of a distribution: no truncation, temperature 1."""
        return store.answers(
            label,
            prompts(answers[:: self.options.kl_samples]),
            setting,
            temperature=1.0,
            num_samples=self.options.kl_samples,
            max_new_tokens=self.options.max_new_tokens,
            seed=self.options.seed,
        )

    def greedy(self, label: str, answers: Sequence[Example]) -> list[Sample]:
        return self.store.answers(
            label, prompts(answers), self.setting, max_new_tokens=self.options.max_new_tokens
        )

    def leak_rows(self, rows: Sequence[T]) -> list[T]:
        return evenly_spread(rows, self.options.leak_rows or len(rows))

    def leak_samples(self, label: str, questions: Sequence[Example]) -> list[Sample]:
        if not self.options.leak_samples:
            raise MissingMetricError("no samples were asked for (leak_samples = 0)")
        return self.store.answers(
            label,
            prompts(self.leak_rows(questions)),
            self.setting,
            num_samples=self.options.leak_samples,
            temperature=self.options.leak_temperature,
            top_k=self.options.leak_top_k,
            top_p=self.options.leak_top_p,
            truncate_on=self.options.leak_truncate_on,
            max_new_tokens=self.options.max_new_tokens,
            seed=self.options.seed,
        )

    def scores(self, label: str, examples: Sequence[Example]) -> TextScores:
        """Scores of texts that all settings share, from one pass and one look-up in the store."""
        if label not in self.shared:
            self.shared[label] = self.store.scores(label, examples, self.settings)
        return self.shared[label][self.index]

    def reworded(self, name: str) -> list[Example]:
        reworded = self.questions(name).reworded
        if reworded is None:
            raise MissingMetricError(f"the {name} set has no paraphrased questions")
        return reworded

    def retain_model(self) -> Store:
        if self.retain_store is None:
            raise MissingMetricError("it needs the retain model itself")
        check_same_vocabulary(self.store, self.retain_store)
        return self.retain_store

    def questions(self, name: str) -> QuestionSet:
        if name not in self.sets:
            raise MissingMetricError(f"no {name} set was given")
        return self.sets[name]


def _make_metric(metric: str, make: Callable[[], Metric], log: Log) -> dict[str, Metric]:
    return {metric: make()}


def _estimate_divergence(scores: TextScores, other: TextScores) -> Metric:
    ratios = log_ratios(scores, other)
    error = float(ratios.std(ddof=1) / math.sqrt(len(ratios))) if len(ratios) > 1 else None
    return Metric(
        float(ratios.mean()),
        {"log_ratio": ratios, "tokens": scores.num_tokens},
        details={
            "per_token": float(ratios.sum() / scores.num_tokens.sum()),
            "standard_error": error,
        },
    )
