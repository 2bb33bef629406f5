"""The sets that a head is trained on: the paper's two, or those of a distilled head.

The paper has a forget and a retain set. Beyond it, each switched on by an option of
`SyntheticOptions`: the base model's own samples as a second retain source; counterfactual rows,
retain rows for the classifier and texts to forget for distillation; paraphrases of the forget
questions; soft targets. See `t3jax.synthetic` for what they are.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

from t3jax import data, digests
from t3jax.data.chat import Example, PromptFormat
from t3jax.data.records import Record
from t3jax.features import Features, load_or_compute_features
from t3jax.lm.model import LM
from t3jax.ranges import COUNT, RATE, SEED, SHARE, check_ranges, whole
from t3jax.synthetic import counterfactual, names, targets, turns, writing
from t3jax.synthetic.counterfactual import Counterfactual
from t3jax.synthetic.store import load_or_write
from t3jax.training.recipe import TrainConfig

# A head is distilled where made-up names hide at least this share of the forget rows: targets of
# the others do not see the question.
LEAST_HIDDEN = 0.5


@dataclasses.dataclass(frozen=True)
class SyntheticOptions:
    """What the base model writes for the training of its head.

    Attributes:
        own_samples: Chats of its own that it writes, a second retain source; 0: none.
        openings: Questions that it answers in the place of its own; None: it asks by itself.
        made_up_names: Made-up people for each forget row; 0: no counterfactuals.
        names: Names of the request; empty: those that `find_names` finds.
        paraphrases: Paraphrases of each forget question that it writes; 0: none.
        earlier_turns: Share of the questions, of forget and of retain rows alike, that are trained
            behind an earlier turn of a conversation, see `turns.put_behind_turns`.
        overcorrection: How far a distilled head's targets are moved, see
            `distillation.overcorrect`.
        max_new_tokens: Longest text that it writes, tokens.
        batch_size: Texts that it writes together.
        seed: Of all draws.
    """

    own_samples: int = 0
    openings: tuple[str, ...] | None = None
    made_up_names: int = 0
    names: tuple[str, ...] = ()
    paraphrases: int = 0
    earlier_turns: float = 0.0
    overcorrection: float = 1.25
    max_new_tokens: int = 128
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self):
        check_ranges(
            self,
            own_samples=whole(0, 10**7),
            made_up_names=whole(0, 10**4),
            paraphrases=whole(0, 10**4),
            earlier_turns=SHARE,
            overcorrection=RATE,
            max_new_tokens=COUNT,
            batch_size=COUNT,
            seed=SEED,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingSets:
    """What `train_heads` takes, and what it was made of.

    Attributes:
        retain: Features of each retain source.
        forget: Features of the forget set.
        rows: The forget rows, paraphrases included.
        retained: The retain rows; where there are none, the base model's own samples.
        counterfactuals: Their counterfactuals; empty without made-up names.
        names: The names of the request.
        written: Number of rows by kind that the base model wrote.
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


def make_training_sets(
    lm: LM,
    forget: Sequence[Record],
    retain: Sequence[Record],
    train_config: TrainConfig,
    options: SyntheticOptions = SyntheticOptions(),
    *,
    prompt_format: PromptFormat,
    features: str = "mean",
    feature_dtype: str = "float32",
    feature_store: pathlib.Path | str,
    max_length: int | None = None,
    retained: Sequence[Features] = (),
    progress: bool = False,
) -> TrainingSets:
    """Lets the base model write what the options ask for, and computes features and targets.

    Features and texts are kept in the store; a second call reads them.

    Args:
        lm: The base model.
        forget: Forget rows.
        retain: Retain rows; may be empty where there are own samples.
        train_config: The recipe: its loss decides whether there are soft targets. "auto" distils
            where made-up names hide whom at least half of the forget rows are about, and trains a
            classifier on the same texts elsewhere.
        options: What the base model writes.
        prompt_format: How a question becomes a prompt.
        features: What the head reads, one of `pooling.FEATURES`.
        feature_dtype: Of stored features.
        feature_store: Folder of the store.
        max_length: Longest text, tokens; None: the model's context.
        retained: Features of retain sources, with targets where the
            loss is distillation, that stand for the features of the retain
            rows, which then are only looked at for their names.
        progress: Whether to show progress bars.

    Returns:
        The sets.

    Raises:
        ValueError: If rows are bad, no name was found in documents, whose counterfactuals need one,
            distillation is asked for without counterfactuals or without the last hidden state, or
            there is nothing to retain.
    """
    loss = train_config.loss
    if loss == "auto" and not (options.made_up_names and "last" in features):
        loss = "classifier"
    if loss == "distillation" and not options.made_up_names:
        raise ValueError("loss = 'distillation' needs counterfactuals: made_up_names of at least 1")
    if loss == "distillation" and "last" not in features:
        raise ValueError(
            f"loss = 'distillation' needs features that hold the last hidden state, got "
            f"{features!r}: 'mean+last' or 'last'"
        )
    if not retain and not options.own_samples and not retained:
        raise ValueError("there is nothing to retain: give retain rows, or own_samples above 0")
    max_length = max_length or lm.max_position
    encode = functools.partial(
        data.encode_records, lm.tokenizer, prompt_format=prompt_format, max_length=max_length
    )

    def compute(label: str, examples: Sequence[Example]) -> Features:
        return load_or_compute_features(
            lm,
            examples,
            feature_store,
            kind=features,
            dtype=feature_dtype,
            progress=label if progress else None,
        )

    def retain_sources() -> list[Features]:
        sources = [compute("retain", encode(turned(rows, 1))) for rows in retain_rows]
        if loss != "distillation":
            return sources
        return [targets.add_base_targets(lm, source, **keeping) for source in sources]

    def turned(rows: Sequence[Record], kind: int) -> list[Record]:
        return turns.put_behind_turns(
            lm.tokenizer,
            rows,
            options.earlier_turns,
            prompt_format,
            others=[row for rows in retain_rows for row in rows],
            max_length=max_length,
            seed=(options.seed, kind),
        )

    def write(name: str, depends_on: Sequence[Any], make: Any) -> Any:
        folder = pathlib.Path(feature_store) / "written"
        return load_or_write(folder, name, lm, [*depends_on, prompt_format, options.seed], make)

    drawing: dict[str, Any] = {"batch_size": options.batch_size, "seed": options.seed}
    keeping: dict[str, Any] = {
        "temperature": train_config.distilled_temperature,
        "seed": options.seed,
    }
    people = options.names
    if not people and (options.made_up_names or options.own_samples or options.paraphrases):
        people = tuple(names.find_names(forget, retain))
    if options.made_up_names and not people and any("text" in row for row in forget):
        raise ValueError(
            "no name was found that the forget documents are about; give names = ('...',), or "
            "train with made_up_names = 0 and loss = 'classifier'"
        )

    written: dict[str, int] = {}
    forget = list(forget)
    if options.paraphrases:
        asked = [row for row in forget if "question" in row]
        reworded = write(
            "paraphrases",
            [digests.rows_digest(asked), people, options.paraphrases],
            lambda: writing.reword_questions(
                lm,
                [row["question"] for row in asked],
                options.paraphrases,
                prompt_format,
                names=people,
                progress="paraphrases" if progress else None,
                **drawing,
            ),
        )
        more = [
            {**row, "question": text}
            for row, texts in zip(asked, reworded, strict=True)
            for text in texts
        ]
        written["paraphrases"] = len(more)
        forget += more

    retain_rows = [list(retain)] if retain else []
    if options.own_samples:
        own = load_own_samples(
            lm, options, people, prompt_format=prompt_format, store=feature_store, progress=progress
        )
        written["own samples"] = len(own)
        retain_rows.append(own)

    counterfactuals: list[Counterfactual] = []
    other_answers: list[Record] = []
    if options.made_up_names:
        made = counterfactual.make_counterfactuals(
            forget,
            people,
            options.made_up_names,
            known=names.find_names(retain) if retain else (),
            tokenizer=lm.tokenizer,
            seed=options.seed,
        )
        unique = names.unique_wordings(forget, people, retain)
        drawn = write(
            "counterfactuals",
            [
                sorted(unique),
                digests.rows_digest(forget),
                [dataclasses.astuple(each) for each in made],
                options.max_new_tokens,
            ],
            lambda: _as_json(
                counterfactual.counterfactual_rows(
                    lm,
                    forget,
                    made,
                    prompt_format,
                    unique=unique,
                    max_new_tokens=options.max_new_tokens,
                    progress="counterfactuals" if progress else None,
                    **drawing,
                )
            ),
        )
        other_answers = drawn["rows"]
        counterfactuals = [Counterfactual(**each) for each in drawn["counterfactuals"]]
        written["counterfactual rows"] = len(other_answers)

    if loss == "auto":
        hidden = counterfactual.share_hidden(counterfactuals) >= LEAST_HIDDEN
        loss = "distillation" if hidden else "classifier"
    kept = list(retained) or retain_sources()
    if loss == "classifier":
        if other_answers:
            kept.append(compute("retain", encode(turned(other_answers, 2))))
        return TrainingSets(
            kept,
            compute("forget", encode(turned(forget, 0))),
            forget,
            retain_rows[0] if retain_rows else [],
            counterfactuals,
            people,
            written,
            loss,
        )

    # Both the true answer and other ones are prefixes that the served model may come to.
    texts = [(forget, counterfactuals)]
    if other_answers:
        texts.append((other_answers, _counterfactuals_of(other_answers, forget, counterfactuals)))
    forgotten = []
    for (rows, theirs), kind in zip(texts, (0, 2), strict=False):
        rows = turned(rows, kind)
        examples = encode(rows)
        forgotten.append(
            targets.add_counterfactual_targets(
                lm,
                compute("forget", examples),
                examples,
                theirs,
                encode([_put_behind(each.record, rows[each.row]) for each in theirs]),
                feature_store,
                overcorrection=options.overcorrection,
                progress="counterfactuals" if progress else None,
                **keeping,
            )
        )
    return TrainingSets(
        kept,
        Features.concatenate(forgotten),
        forget,
        retain_rows[0],
        counterfactuals,
        people,
        written,
        loss,
    )


def load_own_samples(
    lm: LM,
    options: SyntheticOptions,
    people: Sequence[str] = (),
    *,
    prompt_format: PromptFormat,
    store: pathlib.Path | str,
    progress: bool = False,
) -> list[Record]:
    """Lets the base model write chats of its own, or reads those that it wrote before.

    Args:
        lm: The base model.
        options: How many and how.
        people: Names that none of them may hold.
        prompt_format: How a question becomes a prompt.
        store: Folder of the store.
        progress: Whether to show a progress bar.

    Returns:
        Rows with question and answer.
    """
    drawing: dict[str, Any] = {
        "openings": options.openings,
        "max_new_tokens": options.max_new_tokens,
    }
    samples: list[Record] = load_or_write(
        pathlib.Path(store) / "written",
        "own-samples",
        lm,
        [tuple(people), options.own_samples, *drawing.values(), prompt_format, options.seed],
        lambda: writing.write_own_samples(
            lm,
            options.own_samples,
            prompt_format,
            names=people,
            batch_size=options.batch_size,
            seed=options.seed,
            progress="own samples" if progress else None,
            **drawing,
        ),
    )
    return samples


def _counterfactuals_of(
    answered: Sequence[Record], forget: Sequence[Record], counterfactuals: Sequence[Counterfactual]
) -> list[Counterfactual]:
    """A counterfactual for each other answer, of its question's first one."""
    first: dict[str, Counterfactual] = {}
    for each in counterfactuals:
        if "question" in forget[each.row]:
            first.setdefault(_conversation(forget[each.row]), each)
    swapped = []
    for row, record in enumerate(answered):
        each = first[_conversation(record)]
        answer = names.swap_names(record["answer"], each.pairs) if each.pairs else record["answer"]
        swapped.append(Counterfactual(row, {**each.record, "answer": answer}, each.pairs))
    return swapped


def _conversation(row: Record) -> str:
    return repr((row.get("before"), row["question"]))


def _put_behind(record: Record, row: Record) -> Record:
    """A counterfactual behind the earlier turns that its row was given."""
    return {"before": row["before"], **record} if "before" in row else record


def _as_json(drawn: tuple[list[Record], list[Counterfactual]]) -> dict[str, Any]:
    rows, counterfactuals = drawn
    return {
        "rows": rows,
        "counterfactuals": [
            {"row": each.row, "record": dict(each.record), "pairs": dict(each.pairs)}
            for each in counterfactuals
        ],
    }
