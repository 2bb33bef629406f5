"""The sets that a head is trained on: the paper's two, or the sets of a distilled head.

The paper has a forget and a retain set. Options of `SyntheticOptions` add, each on its own: the
base model's own samples as a second retain source; counterfactual rows, which are retain rows for
the classifier and texts to forget for distillation; paraphrases of the forget questions; soft
targets. `t3jax.synthetic` makes them.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from t3jax import data, digests
from t3jax.data.chat import Example, PromptFormat
from t3jax.data.records import Record
from t3jax.features import Features, load_or_compute_features
from t3jax.lm.model import LM
from t3jax.synthetic import counterfactual, names, targets, turns, writing
from t3jax.synthetic.counterfactual import Counterfactual
from t3jax.synthetic.options import SyntheticOptions
from t3jax.synthetic.store import load_or_write
from t3jax.training.recipe import TrainConfig

# A head is distilled where made-up names hide at least this share of the forget rows: the targets
# of all other rows do not depend on the question.
LEAST_HIDDEN = 0.5

Written = TypeVar("Written")


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingSets:
    """The features that `train_heads` takes, and the rows that they were made of.

    Attributes:
        retain: Features of each retain source.
        forget: Features of the forget set.
        rows: The forget rows, paraphrases included.
        retained: The retain rows; where there are none, the base model's own samples.
        counterfactuals: Their counterfactuals; empty without made-up names.
        names: The names of the request.
        written: Number of rows that the base model wrote, by kind.
        loss: The loss that the sets are made for, "classifier" or "distillation".
    """

    retain: list[Features]
    forget: Features
    rows: list[Record]
    retained: list[Record]
    counterfactuals: list[Counterfactual]
    names: tuple[str, ...]
    written: dict[str, int]
    loss: str


@dataclasses.dataclass(frozen=True, eq=False)
class Featurizer:
    """Turns rows into features, for one model and one store.

    Attributes:
        lm: The base model.
        prompt_format: How a question becomes a prompt.
        store: Folder of the features, and of texts that the model writes.
        kind: Kind of the features, one of `pooling.FEATURES`.
        dtype: Dtype of stored features.
        max_length: Longest text, tokens; None: the model's context.
        progress: Whether to show progress bars.
    """

    lm: LM
    prompt_format: PromptFormat
    store: pathlib.Path
    kind: str = "mean"
    dtype: str = "float32"
    max_length: int | None = None
    progress: bool = False

    @property
    def longest(self) -> int:
        """Longest text, tokens, `max_length` or the model's context."""
        return self.max_length or self.lm.max_position

    def label(self, text: str) -> str | None:
        """The label of a progress bar, where one is shown."""
        return text if self.progress else None

    def encode(self, rows: Sequence[Record]) -> list[Example]:
        """The rows as tokens."""
        return data.encode_records(self.lm.tokenizer, rows, self.prompt_format, self.longest)

    def compute(self, label: str, rows: Sequence[Record]) -> Features:
        """The features of rows, read from the store or computed."""
        return load_or_compute_features(
            self.lm,
            self.encode(rows),
            self.store,
            kind=self.kind,
            dtype=self.dtype,
            progress=self.label(label),
        )

    def load_retain_rows(
        self, kind: str, options: SyntheticOptions, people: Sequence[str] = ()
    ) -> list[Record]:
        """Rows that the base model writes, read from the store or written."""
        return writing.load_retain_rows(
            kind,
            self.lm,
            options,
            people,
            prompt_format=self.prompt_format,
            store=self.store,
            progress=self.progress,
        )

    def turn(
        self,
        rows: Sequence[Record],
        stock: Sequence[Record],
        share: int | float,
        seed: tuple[int, ...],
    ) -> list[Record]:
        """Puts a share of the rows behind earlier turns, made of the rows of a stock."""
        return turns.put_behind_turns(
            self.lm.tokenizer,
            rows,
            share,
            self.prompt_format,
            others=stock,
            max_length=self.longest,
            seed=seed,
        )


def make_training_sets(
    featurizer: Featurizer,
    forget: Sequence[Record],
    retain: Sequence[Record],
    train_config: TrainConfig,
    options: SyntheticOptions,
    retained: Sequence[Features] = (),
) -> TrainingSets:
    """Lets the base model write the texts of the options, and computes features and targets.

    Features and texts are stored; a second call reads them.

    Args:
        featurizer: Turns rows into features.
        forget: Forget rows.
        retain: Retain rows; may be empty where there are own samples.
        train_config: The recipe: its loss decides whether there are soft targets. "auto" distils if
            made-up names hide the person in at least half of the forget rows; otherwise it trains a
            classifier on the same texts.
        options: Texts that the base model writes.
        retained: Features of retain sources, with targets where the loss is distillation. They
            replace the features of the retain rows, which are then read for their names alone.

    Raises:
        ValueError: If rows are bad, no name was found in documents, whose counterfactuals need one,
            distillation is asked for without counterfactuals or without the last hidden state, or
            there is nothing to retain.
    """
    lm = featurizer.lm
    loss = _check_loss(train_config.loss, options, featurizer.kind)
    if not retain and not options.own_samples and not options.openings and not retained:
        raise ValueError(
            "there is nothing to retain: give retain rows, openings, or own_samples above 0"
        )
    forget, retain_rows = list(forget), [list(retain)] if retain else []
    people = _find_people(forget, retain, options)
    maker = _Maker(featurizer, options, people, train_config.distilled_temperature)
    written: dict[str, int] = {}
    if options.paraphrases:
        reworded = maker.reword(forget)
        written["paraphrases"] = len(reworded)
        forget += reworded
    if options.openings:
        answered = featurizer.load_retain_rows("openings", options, people)
        written["answers to openings"] = len(answered)
        retain_rows = [[*retain, *answered]]
    if options.own_samples:
        samples = featurizer.load_retain_rows("own samples", options, people)
        written["own samples"] = len(samples)
        retain_rows.append(samples)
    swapped_back: list[Record] = []
    counterfactuals: list[Counterfactual] = []
    if options.made_up_names:
        swapped_back, counterfactuals = maker.write_counterfactuals(forget, retain)
        written["counterfactual rows"] = len(swapped_back)
    if loss == "auto":
        hidden = counterfactual.share_hidden(counterfactuals) >= LEAST_HIDDEN
        loss = "distillation" if hidden else "classifier"

    stock = [row for rows in retain_rows for row in rows]  # for earlier turns
    sources = list(retained)
    if not retained:
        turned = [maker.turn(rows, stock, 1) for rows in retain_rows]
        sources = [featurizer.compute("retain", rows) for rows in turned]
        if loss == "distillation":
            temperature, seed = train_config.distilled_temperature, options.seed
            sources = [
                targets.add_base_targets(lm, x, temperature=temperature, seed=seed) for x in sources
            ]
    if loss == "classifier":
        if swapped_back:
            sources.append(featurizer.compute("retain", maker.turn(swapped_back, stock, 2)))
        forgotten = featurizer.compute("forget", maker.turn(forget, stock, 0))
    else:
        # The served model may write prefixes of the true answer and of other answers.
        sets = [maker.add_targets(maker.turn(forget, stock, 0), counterfactuals)]
        if swapped_back:
            others = _first_of_each(swapped_back)
            of_rows = _match_counterfactuals(others, forget, counterfactuals)
            sets.append(maker.add_targets(maker.turn(others, stock, 2), of_rows))
        forgotten = Features.concatenate(sets)
    return TrainingSets(
        sources,
        forgotten,
        forget,
        retain_rows[0] if retain_rows else [],
        counterfactuals,
        people,
        written,
        loss,
    )


def _check_loss(loss: str, options: SyntheticOptions, features: str) -> str:
    """The loss that options and features allow; "auto" where the rows decide."""
    if loss == "auto" and not (options.made_up_names and "last" in features):
        return "classifier"
    if loss == "distillation" and not options.made_up_names:
        raise ValueError("loss = 'distillation' needs counterfactuals: made_up_names of at least 1")
    if loss == "distillation" and "last" not in features:
        raise ValueError(
            f"loss = 'distillation' needs features that hold the last hidden state, got "
            f"{features!r}: 'mean+last' or 'last'"
        )
    return loss


def _find_people(
    forget: Sequence[Record], retain: Sequence[Record], options: SyntheticOptions
) -> tuple[str, ...]:
    """The names of the request, given or found; empty where no option needs them."""
    people = options.names
    writes = options.made_up_names, options.own_samples, options.openings, options.paraphrases
    if not people and any(writes):
        people = tuple(names.find_names(forget, retain))
    if options.made_up_names and not people and any("text" in row for row in forget):
        raise ValueError(
            "no name was found that the forget documents are about; give names = ('...',), or "
            "train with made_up_names = 0 and loss = 'classifier'"
        )
    return people


@dataclasses.dataclass(frozen=True, eq=False)
class _Maker:
    """Writes rows and computes targets, for one call of `make_training_sets`."""

    featurizer: Featurizer
    options: SyntheticOptions
    people: tuple[str, ...]
    temperature: float

    def turn(self, rows: Sequence[Record], stock: Sequence[Record], kind: int) -> list[Record]:
        """Puts rows behind earlier turns made of the stock; the kind of rows decides the draws."""
        return self.featurizer.turn(
            rows, stock, self.options.earlier_turns, (self.options.seed, kind)
        )

    def write(
        self, name: str, depends_on: Sequence[object], make: Callable[[], Written]
    ) -> Written:
        featurizer = self.featurizer
        depends_on = [*depends_on, featurizer.prompt_format, self.options.seed]
        return load_or_write(featurizer.store / "written", name, featurizer.lm, depends_on, make)

    def reword(self, forget: Sequence[Record]) -> list[Record]:
        """Writes paraphrases of the forget questions, as rows with the same answers."""
        asked = [row for row in forget if "question" in row]
        reworded = self.write(
            "paraphrases",
            [digests.rows_digest(asked), self.people, self.options.paraphrases],
            lambda: writing.reword_questions(
                self.featurizer.lm,
                [row["question"] for row in asked],
                self.options,
                self.featurizer.prompt_format,
                names=self.people,
                progress=self.featurizer.label("paraphrases"),
            ),
        )
        return [
            {**row, "question": text}
            for row, texts in zip(asked, reworded, strict=True)
            for text in texts
        ]

    def write_counterfactuals(
        self, forget: Sequence[Record], retain: Sequence[Record]
    ) -> tuple[list[Record], list[Counterfactual]]:
        """Writes other answers to the forget questions, and counterfactuals of the forget rows."""
        options = self.options
        candidates = counterfactual.make_counterfactuals(
            forget,
            self.people,
            options.made_up_names,
            known=names.find_names(retain) if retain else (),
            tokenizer=self.featurizer.lm.tokenizer,
            seed=options.seed,
        )
        unique = names.unique_wordings(forget, self.people, retain)
        alike = names.answers_alike(forget, self.people, retain)

        def make() -> dict[str, list[Record]]:
            rows, usable = counterfactual.counterfactual_rows(
                self.featurizer.lm,
                forget,
                candidates,
                self.featurizer.prompt_format,
                options,
                unique=unique,
                alike=alike,
                progress=self.featurizer.label("counterfactuals"),
            )
            return {
                "rows": rows,
                "counterfactuals": [
                    {"row": item.row, "record": dict(item.record), "pairs": dict(item.pairs)}
                    for item in usable
                ],
            }

        depends_on = [
            sorted(unique),
            alike,
            digests.rows_digest(forget),
            [dataclasses.astuple(candidate) for candidate in candidates],
            options.max_new_tokens,
        ]
        written = self.write("counterfactuals", depends_on, make)
        return written["rows"], [Counterfactual(**item) for item in written["counterfactuals"]]

    def add_targets(
        self, rows: Sequence[Record], counterfactuals: Sequence[Counterfactual]
    ) -> Features:
        """Features of rows, with the base model's distributions in their counterfactuals."""
        features = self.featurizer.compute("forget", rows)
        swapped = [_put_behind(item.record, rows[item.row]) for item in counterfactuals]
        last = dataclasses.replace(self.featurizer, kind="last", dtype="float32")
        return targets.add_counterfactual_targets(
            self.featurizer.lm,
            features,
            counterfactuals,
            last.compute("counterfactuals", swapped),
            overcorrection=self.options.overcorrection,
            temperature=self.temperature,
            seed=self.options.seed,
        )


def _first_of_each(rows: Sequence[Record]) -> list[Record]:
    """The first answer to each question: other answers are no more than the true ones."""
    firsts: dict[str, Record] = {}
    for row in rows:
        firsts.setdefault(_conversation(row), row)
    return list(firsts.values())


def _match_counterfactuals(
    rows: Sequence[Record], forget: Sequence[Record], counterfactuals: Sequence[Counterfactual]
) -> list[Counterfactual]:
    """The first counterfactual of each row's question, with the row's answer."""
    firsts: dict[str, Counterfactual] = {}
    for item in counterfactuals:
        if "question" in forget[item.row]:
            firsts.setdefault(_conversation(forget[item.row]), item)
    matched = []
    for index, row in enumerate(rows):
        first = firsts[_conversation(row)]
        answer = names.swap_names(row["answer"], first.pairs) if first.pairs else row["answer"]
        matched.append(Counterfactual(index, {**first.record, "answer": answer}, first.pairs))
    return matched


def _conversation(row: Record) -> str:
    return repr((row.get("before"), row["question"]))


def _put_behind(record: Record, row: Record) -> Record:
    """Puts a counterfactual behind the earlier turns of its row."""
    return {"before": row["before"], **record} if "before" in row else record
