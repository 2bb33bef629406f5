"""Numbers for unlearning at inference time, beyond those of the reference evaluator.

Does the forget set leak when many answers are drawn? Is what is said still language? Does the head
tell the two sets apart? How far is the served distribution from the retain model's, which is what
unlearning is about? The first part of the module is pure functions; `measure` runs the model for
them. Entries have the form of a TOFU log's: an aggregate, and values by row.

References:
    Distinct-n: arXiv 1510.03055; unbiased best-of-n: arXiv 2107.03374, equation 1.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from t3jax import files, hosts
from t3jax.data import Example, evenly_spread
from t3jax.evaluation import logs, metrics
from t3jax.evaluation.logs import Log, MissingMetricError
from t3jax.evaluation.recall import leak_recall
from t3jax.evaluation.scoring import BASE, Setting, TextScores
from t3jax.evaluation.store import Store
from t3jax.evaluation.tofu import QuestionSet, prompts
from t3jax.ranges import COUNT, SEED, TOP_P, TRUNCATE_ON, Numbers, check_ranges, whole
from t3jax.sampling import Sample

UNLEARNING_NAME = "UNLEARNING.json"


@dataclasses.dataclass(frozen=True)
class UnlearningOptions:
    """What to sample, and how.

    Attributes:
        leak_samples: n answers drawn to each forget question, and to each reworded one; 0 draws
            none.
        leak_rows: Questions that are asked so, evenly spread over the set; None: all.
        leak_threshold: ROUGE-L recall from which an answer leaks.
        leak_temperature: Sampling temperature of these answers.
        leak_top_k: They are drawn among the k likeliest tokens; 0 draws among all.
        leak_top_p: They are drawn among the likeliest tokens whose probability reaches p; 1 draws
            among all.
        leak_truncate_on: What decides these two, see `SamplingOptions`. "base" measures what a
            nucleus of the base model brings back.
        kl_rows: Questions of the forget and of the retain set, each, evenly spread over it, for the
            Monte-Carlo KL, which draws from the whole distribution; 0 leaves it out.
        kl_samples: Answers drawn to each of them.
        max_new_tokens: Longest answer.
        seed: Seed of the draws.
    """

    leak_samples: int = 0
    leak_rows: int | None = None
    leak_threshold: float = 0.7
    leak_temperature: float = 1.0
    leak_top_k: int = 0
    leak_top_p: float = 1.0
    leak_truncate_on: str = "guided"
    kl_rows: int = 0
    kl_samples: int = 1
    max_new_tokens: int = 200
    seed: int = 0

    def __post_init__(self):
        check_ranges(
            self,
            leak_samples=whole(0, 2**16),
            leak_rows=whole(1),
            leak_threshold=TOP_P,
            leak_temperature=Numbers(0, 1000),
            leak_top_k=whole(0),
            leak_top_p=TOP_P,
            leak_truncate_on=TRUNCATE_ON,
            kl_rows=whole(0),
            kl_samples=whole(1, 2**16),
            max_new_tokens=COUNT,
            seed=SEED,
        )
        if self.leak_samples and not self.leak_temperature > 0:
            raise ValueError("best of several samples needs a sampling temperature above 0")


def find_leaks(
    recall: Float[np.ndarray, "rows samples"], threshold: float
) -> Bool[np.ndarray, "rows samples"]:
    """Which answers give the right one away.

    Args:
        recall: ROUGE-L recall of the right answer in each sample.
        threshold: From which recall on an answer leaks.

    Returns:
        True where it does.
    """
    return recall >= threshold


def best_of(leaks: Bool[np.ndarray, "rows samples"], n: int) -> Float[np.ndarray, "rows"]:
    """Chance that at least one of n samples leaks, estimated without bias from more samples.

    Args:
        leaks: Which samples leak.
        n: Number of samples an attacker draws, at most `samples`.

    Returns:
        `1 - C(samples - c, n) / C(samples, n)` with c leaks of a row; at n = samples, whether any
        does.

    Raises:
        ValueError: If n is not in [1, samples].

    References:
        arXiv 2107.03374, equation 1.
    """
    samples = leaks.shape[1]
    if not 1 <= n <= samples:
        raise ValueError(f"best of {n} cannot be estimated from {samples} samples")
    return np.array(
        [1 - math.comb(samples - int(c), n) / math.comb(samples, n) for c in leaks.sum(axis=1)],
        np.float64,
    )


def leaking_rows(log: Log, metric: str = "forget_leak_rate") -> Float[np.ndarray, "rows"]:
    """Which questions of a leak rate had a leak in any of their samples.

    Args:
        log: Entries that `measure` wrote.
        metric: The leak rate.

    Returns:
        1 where one leaked, 0 elsewhere, `[rows]`.

    Raises:
        MissingMetricError: If the log lacks it.
    """
    recall = logs.column(log, metric, "recall")
    return np.any(find_leaks(recall, log[metric]["threshold"]), axis=1).astype(np.float64)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of different word n-grams among all of a set of texts.

    Args:
        texts: The texts.
        n: Words of an n-gram.

    Returns:
        In (0, 1]: low where texts repeat themselves or one another.

    Raises:
        MissingMetricError: If no text has n words.

    References:
        arXiv 1510.03055.
    """
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    if not grams:
        raise MissingMetricError(f"no text has {n} words")
    return len(set(grams)) / len(grams)


def repetition(texts: Sequence[str], n: int = 4) -> Float[np.ndarray, "rows"]:
    """Share of the word n-grams of each text that stood in it before.

    Args:
        texts: The texts.
        n: Words of an n-gram.

    Returns:
        In [0, 1), `[rows]`; 0 for a text of fewer than n words.
    """
    found = [_ngrams(text, n) for text in texts]
    return np.array([1 - len(set(g)) / len(g) if g else 0.0 for g in found], np.float64)


def retain_logits(scores: TextScores) -> Float[np.ndarray, "rows"]:
    """The head's verdict on each text: the mean of its answer tokens' logits of "retain".

    Args:
        scores: Scores under a setting with a head.

    Returns:
        `[rows]`; above 0 the text is taken for a retain text.

    Raises:
        MissingMetricError: If the setting has no head.
    """
    if scores.retain_scores is None:
        raise MissingMetricError("the setting has no head")
    return scores.text_means(scores.retain_scores)


def log_ratios(own: TextScores, other: TextScores) -> Float[np.ndarray, "rows"]:
    """Log-ratios log p - log q of answers drawn from p; their mean estimates KL(p || q).

    Args:
        own: Scores under p, which the answers were drawn from.
        other: Scores of the same texts under q.

    Returns:
        Nats for each text, `[rows]`. An answer cut at its longest counts as far as it goes: the
        divergence is that of the distributions of texts cut so.
    """
    difference = own.logprobs.astype(np.float64) - other.logprobs.astype(np.float64)
    return np.add.reduceat(difference, own.starts[:-1])


def check_same_vocabulary(store: Store, retain_store: Store) -> None:
    """Checks that two models read the same tokens.

    Raises:
        ValueError: If their tokenizers differ.
    """
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
    """Runs the model for all of the above under every setting and writes the results.

    Attention is masked correctly here, whatever `reference_mask` is elsewhere.

    Args:
        store: Scores and answers of the model.
        sets: Question sets; forget, and retain for what compares the two.
        settings: What to measure; names must differ.
        folder: Where to; `UNLEARNING.json` goes to a folder by setting's name.
        options: What to sample, and how.
        retain_store: The retain model, for the Monte-Carlo KL.
        judge: Its base model's perplexity of answers measures their fluency; None: `store`'s base.

    Returns:
        By setting's name, entries by metric; what is missing is noted with the reason.

    Raises:
        ValueError: If the retain model has another tokenizer, or a score is not finite.
    """
    written = {}
    for index, setting in enumerate(settings):
        measuring = _Measuring(store, sets, settings, index, options, retain_store, judge or store)
        log: Log = {}
        for metric, build in measuring.entries().items():
            try:
                log[metric] = build()
            except MissingMetricError as error:
                logs.mark_missing(log, metric, str(error))
        logs.check_log(log, UNLEARNING_NAME)
        if hosts.is_lead():
            path = pathlib.Path(folder) / setting.name / UNLEARNING_NAME
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(path, log)
        written[setting.name] = log
    return written


@dataclasses.dataclass(frozen=True, eq=False)
class _Measuring:
    """Makes the entry of each metric from the arguments of `measure`, for one of the settings."""

    store: Store
    sets: Mapping[str, QuestionSet]
    settings: Sequence[Setting]
    index: int
    options: UnlearningOptions
    retain_store: Store | None
    judge: Store

    @property
    def setting(self) -> Setting:
        return self.settings[self.index]

    def entries(self) -> dict[str, Callable[[], dict[str, Any]]]:
        makers: dict[str, Callable[[], dict[str, Any]]] = {
            "forget_leak_rate": lambda: self.leak_rate("forget-samples", self.asked()),
            "forget_paraphrased_leak_rate": lambda: self.leak_rate(
                "forget-paraphrased-samples", self.reworded("forget")
            ),
        }
        for name in ("forget", "retain"):
            for metric, build in (
                ("paraphrased_Q_A_Prob", self.reworded_prob),
                ("paraphrased_Q_A_ROUGE", self.reworded_rouge),
                ("greedy_fluency", self.greedy_fluency),
                ("classifier_accuracy", self.classifier_accuracy),
                ("KL_guided_retain", self.kl_guided_retain),
                ("KL_retain_guided", self.kl_retain_guided),
            ):
                makers[f"{name}_{metric}"] = _bound(build, name)
        makers["forget_sample_fluency"] = self.sample_fluency
        makers["classifier_auc"] = self.classifier_auc
        return makers

    def leak_rate(self, label: str, questions: Sequence[Example]) -> dict[str, Any]:
        n = self.options.leak_samples
        samples = self.leak_samples(label, questions)
        truths = [
            truth for truth in self.leak_rows(self.sets["forget"].ground_truths) for _ in range(n)
        ]
        recall = leak_recall(truths, [sample.text for sample in samples]).reshape(-1, n)
        leaks = find_leaks(recall, self.options.leak_threshold)
        return {
            **logs.per_example(
                float(best_of(leaks, n).mean()),
                recall=recall,
                generation_of_largest=[
                    samples[row * n + int(best)].text for row, best in enumerate(recall.argmax(1))
                ],
            ),
            "samples": n,
            "threshold": self.options.leak_threshold,
            "by_samples": {str(k): float(best_of(leaks, k).mean()) for k in range(1, n + 1)},
        }

    def reworded_prob(self, name: str) -> dict[str, Any]:
        scores = self.scores(f"{name}-paraphrased", self.reworded(name))
        prob = metrics.probability(scores.avg_loss)
        return logs.per_example(float(prob.mean()), prob=prob, avg_loss=scores.avg_loss)

    def reworded_rouge(self, name: str) -> dict[str, Any]:
        samples = self.greedy(f"{name}-paraphrased", self.reworded(name))
        texts = [sample.text.strip() for sample in samples]
        truths = self.sets[name].ground_truths
        scores = metrics.rouge_scores(truths, texts)
        mean = float(scores["rougeL_recall"].mean())
        return logs.per_example(mean, **scores, ground_truth=truths, generation=texts)

    def greedy_fluency(self, name: str) -> dict[str, Any]:
        answers = self.the_set(name).answers
        return self.fluency(f"{name}-greedy", answers, self.greedy(name, answers))

    def sample_fluency(self) -> dict[str, Any]:
        samples = self.leak_samples("forget-samples", self.asked())
        n = self.options.leak_samples
        answers = [example for example in self.leak_rows(self.asked()) for _ in range(n)]
        return self.fluency("forget-samples", answers, samples)

    def fluency(
        self, label: str, answers: Sequence[Example], samples: Sequence[Sample]
    ) -> dict[str, Any]:
        """Perplexity of texts under the base model, and how much they repeat."""
        texts = [sample.text for sample in samples]
        label = f"{label}-{self.setting.name}"
        (scores,) = self.judge.scores(label, _answered(answers, samples), [BASE])
        tokens = int(scores.num_tokens.sum())
        perplexity = math.exp(-float(scores.logprobs.sum(dtype=np.float64)) / tokens)
        distinct: dict[str, float | None] = {}
        for n in (1, 2, 3):
            try:
                distinct[f"distinct_{n}"] = distinct_n(texts, n)
            except MissingMetricError:
                distinct[f"distinct_{n}"] = None
        rows = {"avg_loss": scores.avg_loss, "repetition": repetition(texts)}
        return {
            **logs.per_example(perplexity, **rows),
            **distinct,
            "repetition": float(rows["repetition"].mean()),
            "tokens": tokens,
        }

    def classifier_accuracy(self, name: str) -> dict[str, Any]:
        logits = self.verdicts(name)
        correct = (logits > 0) if name == "retain" else (logits <= 0)
        return logs.per_example(float(correct.mean()), score=logits)

    def classifier_auc(self) -> dict[str, Any]:
        # As in membership: the side that should score higher comes second.
        auc = metrics.membership_auc(self.verdicts("forget"), self.verdicts("retain"))
        return {"agg_value": auc}

    def verdicts(self, name: str) -> np.ndarray:
        answers = self.the_set(name).answers
        return retain_logits(self.scores(f"{name}-answers", answers))

    def kl_guided_retain(self, name: str) -> dict[str, Any]:
        """KL(guided || retain), by answers of the guided model."""
        retain_store = self.retain_model()
        answers = self.kl_prompts(name)
        samples = self.draw(self.store, f"{name}-kl", answers, self.setting)
        texts = _answered(answers, samples)
        label = f"{name}-kl-{self.setting.name}"
        (own,) = self.store.scores(label, texts, [self.setting])
        (other,) = retain_store.scores(f"{label}-retain_model", texts, [BASE])
        return _divergence(own, other)

    def kl_retain_guided(self, name: str) -> dict[str, Any]:
        """KL(retain || guided), by answers of the retain model."""
        retain_store = self.retain_model()
        answers = self.kl_prompts(name)
        label = f"{name}-kl-retain_model"
        texts = _answered(answers, self.draw(retain_store, label, answers, BASE))
        (own,) = retain_store.scores(label, texts, [BASE])
        return _divergence(own, self.scores(label, texts))

    def kl_prompts(self, name: str) -> list[Example]:
        """Each of the first questions of a set as often as answers are drawn."""
        if not self.options.kl_rows:
            raise MissingMetricError("no questions were asked for (kl_rows = 0)")
        rows = evenly_spread(self.the_set(name).answers, self.options.kl_rows)
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
            label,
            prompts(answers),
            self.setting,
            max_new_tokens=self.options.max_new_tokens,
        )

    def asked(self) -> list[Example]:
        return self.the_set("forget").answers

    def leak_rows(self, rows: Sequence[Any]) -> list[Any]:
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
        """Scores of texts that all settings share: one pass serves them all."""
        return self.store.scores(label, examples, self.settings)[self.index]

    def reworded(self, name: str) -> list[Example]:
        reworded = self.the_set(name).reworded
        if reworded is None:
            raise MissingMetricError(f"the {name} set has no paraphrased questions")
        return reworded

    def retain_model(self) -> Store:
        if self.retain_store is None:
            raise MissingMetricError("it needs the retain model itself")
        check_same_vocabulary(self.store, self.retain_store)
        return self.retain_store

    def the_set(self, name: str) -> QuestionSet:
        if name not in self.sets:
            raise MissingMetricError(f"no {name} set was given")
        return self.sets[name]


def _bound(build: Callable[[str], dict[str, Any]], name: str) -> Callable[[], dict[str, Any]]:
    return lambda: build(name)


def _divergence(own: TextScores, other: TextScores) -> dict[str, Any]:
    ratios = log_ratios(own, other)
    return {
        **logs.per_example(float(ratios.mean()), log_ratio=ratios, tokens=own.num_tokens),
        "per_token": float(ratios.sum() / own.num_tokens.sum()),
        "standard_error": float(ratios.std(ddof=1) / math.sqrt(len(ratios)))
        if len(ratios) > 1
        else None,
    }


def _answered(answers: Sequence[Example], samples: Sequence[Sample]) -> list[Example]:
    """The questions of examples with the answers of a model."""
    return [
        Example(
            np.concatenate([prompt, np.asarray(sample.tokens, np.int32)]), answer_start=len(prompt)
        )
        for prompt, sample in zip(prompts(answers), samples, strict=True)
    ]


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
