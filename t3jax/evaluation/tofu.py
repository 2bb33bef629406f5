"""The TOFU evaluation of a model under many settings, as logs in the reference's format.

Question sets are encoded, scored and answered (`store.py`), and what comes out is put together with
the definitions of `metrics.py` and `recompute.py`. Sets go by the prefixes of their metrics:
forget, retain, ra (real authors), wf (world facts); holdout is for membership inference. What a
metric needs and does not have is noted in the log with the reason. Each setting's log is written
once it is whole; a run that was killed goes on from what its store holds.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from t3jax.data import Example, PromptFormat, encode_records, evenly_spread, load_dataset
from t3jax.data.records import Record
from t3jax.evaluation import logs, metrics, recompute
from t3jax.evaluation.logs import Log, MissingMetricError
from t3jax.evaluation.scoring import Setting, TextScores
from t3jax.evaluation.store import Store
from t3jax.ranges import COUNT, check_ranges

if TYPE_CHECKING:  # slow to import: only who loads a tokenizer waits
    from transformers import PreTrainedTokenizerBase

SETS = {
    "forget": "forget",
    "retain": "retain",
    "ra": "real authors",
    "wf": "world facts",
    "holdout": "holdout",
}
_ANSWERED = ("forget", "retain", "ra", "wf")
_NORMALISED = ("ra", "wf")
MEMBERSHIP = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus", "mia_reference")


@dataclasses.dataclass(frozen=True)
class TofuOptions:
    """How to evaluate.

    Attributes:
        max_new_tokens: Longest generated answer, tokens.
        reference_mask: Mask attention as the reference evaluator does; see `score_texts`.
        answers: Whether to generate answers, for ROUGE; without them a setting costs seconds.
    """

    max_new_tokens: int = 200
    reference_mask: bool = False
    answers: bool = True

    def __post_init__(self):
        check_ranges(self, max_new_tokens=COUNT)


@dataclasses.dataclass(frozen=True, eq=False)
class QuestionSet:
    """A set of questions with all their answers, encoded; lists of one example for each row.

    Attributes:
        name: A key of `SETS`.
        answers: Each question with its right answer.
        paraphrased: Each question with the reworded right answer; None where the set has none.
        wrong: For each j, each question with its j-th wrong answer; empty where there are none.
        reworded: Each reworded question with the right answer; None where the set has none.
        questions: The questions.
        inputs: The prompts as text, special tokens left out.
        answer_texts: The right answers as text, as the tokenizer gives their tokens back.
    """

    name: str
    answers: list[Example]
    paraphrased: list[Example] | None
    wrong: list[list[Example]]
    reworded: list[Example] | None
    questions: list[str]
    inputs: list[str]
    answer_texts: list[str]

    @property
    def num_rows(self) -> int:
        """Number of questions."""
        return len(self.answers)

    @property
    def ground_truths(self) -> list[str]:
        """The right answers that generated ones are compared with."""
        return [text.strip() for text in self.answer_texts]

    @property
    def prompts(self) -> list[np.ndarray]:
        """Token ids of each question, up to where the answer begins."""
        return prompts(self.answers)

    @property
    def texts(self) -> list[Example]:
        """All that the teacher-forced metrics need: answers, paraphrased answers, wrong answers."""
        return [*self.answers, *(self.paraphrased or []), *(e for each in self.wrong for e in each)]


def prompts(examples: Sequence[Example]) -> list[np.ndarray]:
    """The tokens of each example before its answer."""
    return [example.tokens[: example.answer_start] for example in examples]


def load_sets(
    sources: Mapping[str, str | os.PathLike[str] | None],
    tokenizer: "PreTrainedTokenizerBase",
    prompt_format: PromptFormat,
    max_length: int,
    tofu_dir: str | os.PathLike[str] | None = None,
    max_rows: int | None = None,
) -> dict[str, QuestionSet]:
    """Loads and encodes question sets.

    Args:
        sources: By key of `SETS`, "tofu:SPLIT" or a file of question-answer rows, as for
            `load_dataset`; None leaves the set out.
        tokenizer: A Hugging Face tokenizer.
        prompt_format: How a question becomes a prompt.
        max_length: Longest text, tokens.
        tofu_dir: Folder with TOFU's files; None: the hub.
        max_rows: Rows of each set at most, evenly spread over it; None: all.

    Returns:
        The sets that have a source.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A broken file, or rows as in `encode_set`.
    """
    sets = {}
    for name, source in sources.items():
        if source is not None:
            records = load_dataset(source, tofu_dir)
            records = records if max_rows is None else evenly_spread(records, max_rows)
            sets[name] = encode_set(name, records, tokenizer, prompt_format, max_length)
    return sets


def encode_set(
    name: str,
    records: Sequence[Record],
    tokenizer: "PreTrainedTokenizerBase",
    prompt_format: PromptFormat,
    max_length: int,
) -> QuestionSet:
    """Encodes a question set with all the answers that its rows have.

    Args:
        name: A key of `SETS`.
        records: Rows with question and answer; paraphrased_answer, perturbed_answer (a list of
            wrong answers) and paraphrased_question in every row or in none.
        tokenizer: A Hugging Face tokenizer.
        prompt_format: How a question becomes a prompt.
        max_length: Longest text, tokens.

    Returns:
        The set.

    Raises:
        ValueError: An unknown set, a plain document among the rows, a field that only some rows
            have, unequal numbers of wrong answers, or a text that is too long; names the row.
    """
    if name not in SETS:
        raise ValueError(f"unknown set {name!r}; expected one of {sorted(SETS)}")
    for number, record in enumerate(records, start=1):
        if "text" in record:
            raise ValueError(f"{SETS[name]} row {number}: expected a question and an answer")

    def encode(what: str, questions: Sequence[str], answers: Sequence[str]) -> list[Example]:
        rows = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)]
        try:
            return encode_records(tokenizer, rows, prompt_format, max_length)
        except ValueError as error:
            raise ValueError(f"{SETS[name]} set, {what}: {error}") from error

    questions = [record["question"] for record in records]
    answers = [record["answer"] for record in records]
    paraphrases = _field(name, records, "paraphrased_answer")
    reworded = _field(name, records, "paraphrased_question")
    wrong = _field(name, records, "perturbed_answer") or [[] for _ in records]
    for number, each in enumerate(wrong, start=1):
        if isinstance(each, str) or len(each) != len(wrong[0]):
            raise ValueError(
                f"{SETS[name]} row {number} has {len(each)} wrong answers, row 1 has "
                f"{len(wrong[0])}: perturbed_answer must be a list of equally many in every row"
            )
    encoded = encode("answers", questions, answers)
    return QuestionSet(
        name=name,
        answers=encoded,
        paraphrased=paraphrases and encode("paraphrased answers", questions, paraphrases),
        wrong=[
            encode(f"wrong answers {j + 1}", questions, [each[j] for each in wrong])
            for j in range(len(wrong[0]))
        ],
        reworded=reworded and encode("paraphrased questions", reworded, answers),
        questions=questions,
        inputs=[_decode(tokenizer, prompt) for prompt in prompts(encoded)],
        answer_texts=[_decode(tokenizer, each.tokens[each.answer_start :]) for each in encoded],
    )


def evaluate(
    store: Store,
    sets: Mapping[str, QuestionSet],
    settings: Sequence[Setting],
    folder: pathlib.Path | str,
    options: TofuOptions = TofuOptions(),
    *,
    retain_log: Log | None = None,
    retain_store: Store | None = None,
    done: Callable[[Setting, Log], None] = lambda setting, log: None,
) -> dict[str, Log]:
    """Evaluates a model under every setting and writes the logs.

    Args:
        store: Scores and answers of the model.
        sets: Question sets by key of `SETS`; forget at least.
        settings: What to evaluate; names must differ.
        folder: Where to; `TOFU_EVAL.json` and `TOFU_SUMMARY.json` go to a folder by setting's name.
        options: How to evaluate.
        retain_log: The retain model's log, for forget_quality and privleak.
        retain_store: The retain model itself, for mia_reference.
        done: Called with each setting when its log is written.

    Returns:
        The logs, by setting's name.

    Raises:
        ValueError: If there is no forget set, names are equal, the retain log is of another split,
            or the model's scores are not finite.
    """
    if "forget" not in sets:
        raise ValueError("the evaluation needs a forget set")
    if len({setting.name for setting in settings}) < len(settings):
        raise ValueError(f"settings must have different names, got {[s.name for s in settings]}")
    scores: dict[str, list[TextScores]] = {
        name: store.scores(
            name,
            each.texts,
            settings,
            options.reference_mask,
            moments="holdout" in sets and name in ("forget", "holdout"),
        )
        for name, each in sets.items()
    }
    reference_losses = None
    if retain_store is not None and "holdout" in sets:
        reference_losses = {
            name: retain_store.scores(
                f"retain_model-{name}",
                sets[name].answers,
                [Setting("base")],
                options.reference_mask,
            )[0].avg_loss
            for name in ("forget", "holdout")
        }
    written = {}
    for k, setting in enumerate(settings):
        generations = {
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
            if name in sets and options.answers
        }
        found = {name: each[k] for name, each in scores.items()}
        log = assemble_log(sets, found, generations, retain_log, reference_losses)
        logs.write_log(pathlib.Path(folder) / setting.name, log)
        written[setting.name] = log
        done(setting, log)
    return written


def assemble_log(
    sets: Mapping[str, QuestionSet],
    scores: Mapping[str, TextScores],
    generations: Mapping[str, Sequence[str]],
    retain_log: Log | None = None,
    reference_losses: Mapping[str, np.ndarray] | None = None,
) -> Log:
    """Puts scores and generated answers together as a log.

    Args:
        sets: Question sets by key of `SETS`.
        scores: Scores of the `texts` of each set.
        generations: Greedy answers to the questions of each set; a set may be missing.
        retain_log: The retain model's log.
        reference_losses: Losses of the retain model on the answers of forget and holdout.

    Returns:
        The log; what is missing is noted in it, with the reason.

    Raises:
        ValueError: If the retain log is of another split or a score is not finite.
    """
    builder = _Builder(sets, scores, generations, reference_losses)
    log: Log = {}
    for metric, build in builder.entries(log).items():
        try:
            log[metric] = build()
            log[metric]["agg_value"] = recompute.aggregate(log, metric, retain_log)
        except MissingMetricError as error:
            logs.mark_missing(log, metric, str(error))
        except ValueError as error:
            raise ValueError(f"{metric}: {error}") from error
    return log


@dataclasses.dataclass(frozen=True, eq=False)
class _Builder:
    """Makes the entry of each metric from the arguments of `assemble_log`."""

    sets: Mapping[str, QuestionSet]
    all_scores: Mapping[str, TextScores]
    generations: Mapping[str, Sequence[str]]
    reference_losses: Mapping[str, np.ndarray] | None

    def entries(self, log: Log) -> dict[str, Callable[[], dict[str, Any]]]:
        """A function for each metric, in an order in which what is needed comes before."""
        makers: dict[str, Callable[[], dict[str, Any]]] = {}
        for name in _ANSWERED:
            makers[f"{name}_Q_A_Prob"] = functools.partial(self.right, name)
            if name not in _NORMALISED:
                makers[f"{name}_Q_A_PARA_Prob"] = functools.partial(self.paraphrased, name)
            makers[f"{name}_Q_A_PERT_Prob"] = functools.partial(self.wrong, name)
            if name in _NORMALISED:
                metric = f"{name}_Q_A_Prob_normalised"
                makers[metric] = functools.partial(
                    _single, "prob", recompute.normalised_probabilities, log, metric
                )
            makers[f"{name}_Q_A_ROUGE"] = functools.partial(self.rouge, name)
            metric = "forget_truth_ratio" if name == "forget" else f"{name}_Truth_Ratio"
            makers[metric] = functools.partial(
                _single, "score", recompute.truth_ratios, log, metric
            )
        makers["exact_memorization"] = functools.partial(
            self.memorization, metrics.exact_memorization
        )
        makers["extraction_strength"] = functools.partial(
            self.memorization, metrics.extraction_strength
        )
        for metric in MEMBERSHIP:
            makers[metric] = functools.partial(self.membership, metric)
        makers["mia_gradnorm"] = _no_gradients
        for metric in ("forget_quality", "privleak", "model_utility"):
            makers[metric] = dict
        return makers

    def right(self, name: str) -> dict[str, Any]:
        return _probabilities(self.answer_scores(name).avg_loss)

    def paraphrased(self, name: str) -> dict[str, Any]:
        each = self.the_set(name)
        if each.paraphrased is None:
            raise MissingMetricError(f"the {SETS[name]} set has no paraphrased answers")
        scores = self.all_scores[name].select(each.num_rows, 2 * each.num_rows)
        return _probabilities(scores.avg_loss)

    def wrong(self, name: str) -> dict[str, Any]:
        each = self.the_set(name)
        if not each.wrong:
            raise MissingMetricError(f"the {SETS[name]} set has no wrong answers")
        first = len(each.texts) - len(each.wrong) * each.num_rows
        losses = self.all_scores[name].avg_loss[first:].reshape(len(each.wrong), -1).T
        return _probabilities(losses)

    def rouge(self, name: str) -> dict[str, Any]:
        each = self.the_set(name)
        if name not in self.generations:
            raise MissingMetricError("no answers were generated")
        scores = metrics.rouge_scores(each.ground_truths, self.generations[name])
        return _entry(
            **scores,
            input=each.inputs,
            ground_truth=each.ground_truths,
            generation=self.generations[name],
        )

    def memorization(self, definition: Callable[..., np.ndarray]) -> dict[str, Any]:
        scores = self.answer_scores("forget")
        return _entry(score=definition(scores.padded(scores.correct), scores.mask_without_last()))

    def membership(self, metric: str) -> dict[str, Any]:
        self.the_set("holdout")  # what is missing first of all
        return recompute.membership_entry(
            metric, *(self.membership_scores(metric, name) for name in ("forget", "holdout"))
        )

    def membership_scores(self, metric: str, name: str) -> np.ndarray:
        scores = self.answer_scores(name)
        if metric == "mia_loss":
            return scores.avg_loss
        if metric == "mia_zlib":
            return metrics.zlib_score(scores.avg_loss, self.sets[name].answer_texts)
        if metric == "mia_reference":
            if self.reference_losses is None:
                raise MissingMetricError("it needs the retain model itself")
            return scores.avg_loss - self.reference_losses[name]
        mask, logprobs = scores.mask_without_last(), scores.padded(scores.logprobs)
        if metric == "mia_min_k":
            return metrics.min_k_score(logprobs, mask)
        if scores.mean is None or scores.variance is None:
            raise MissingMetricError("mean and variance of the log-probabilities were not computed")
        moments = (scores.padded(scores.mean), scores.padded(scores.variance))
        return metrics.min_k_plus_plus_score(logprobs, *moments, mask)

    def answer_scores(self, name: str) -> TextScores:
        """Scores of the right answers of a set."""
        rows = self.the_set(name).num_rows
        return self.all_scores[name].select(0, rows)

    def the_set(self, name: str) -> QuestionSet:
        if name not in self.sets:
            raise MissingMetricError(f"no {SETS[name]} set was given")
        return self.sets[name]


def _entry(**fields: Any) -> dict[str, Any]:
    """An entry whose aggregate is computed from its rows afterwards."""
    return logs.per_example(np.nan, **fields)


def _probabilities(losses: np.ndarray) -> dict[str, Any]:
    return _entry(prob=metrics.probability(losses), avg_loss=losses)


def _single(
    field: str, definition: Callable[[Log, str], np.ndarray], log: Log, metric: str
) -> dict[str, Any]:
    """An entry that other entries of the log determine."""
    return _entry(**{field: definition(log, metric)})


def _no_gradients() -> dict[str, Any]:
    raise MissingMetricError("gradients of the model's weights are not computed here")


def _field(name: str, records: Sequence[Record], field: str) -> list[Any] | None:
    """A field of all rows; None where no row has it."""
    values = [record.get(field) or None for record in records]
    missing = [number for number, value in enumerate(values, start=1) if value is None]
    if missing and len(missing) < len(values):
        raise ValueError(
            f"{SETS[name]} row {missing[0]} has no {field}, but other rows have; give it in every "
            "row or in none"
        )
    return None if missing else values


def _decode(tokenizer: "PreTrainedTokenizerBase", tokens: np.ndarray) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))
