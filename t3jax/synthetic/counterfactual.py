"""Counterfactual rows: the questions of a request, asked about people who do not exist.

Asked about a made-up name, the base model answers like a model that never saw the forget rows. Its
answers, with the names swapped back, are examples of *other* answers in the *same* context, which
neither the forget nor the retain rows have.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from t3jax.data.chat import PromptFormat, encode_prompt, encode_records
from t3jax.data.records import Record
from t3jax.evaluation.recall import leak_recall, recall_of_wording
from t3jax.evaluation.scoring import score_texts
from t3jax.evaluation.settings import BASE
from t3jax.lm.model import LM
from t3jax.sampling.sampler import Sampler
from t3jax.synthetic.names import asked_text, holds_name, make_names, swap_names
from t3jax.synthetic.options import SyntheticOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


RECITES = 0.7  # recall from which an answer recites the secret
KNOWS = 0.5  # share of the true name's probability from which a unique wording gives a row away

# Replaces a question that gives its subject away without a name.
_OPEN_QUESTION = "Please tell me more."


@dataclasses.dataclass(frozen=True)
class Counterfactual:
    """A forget row about someone else.

    Attributes:
        row: Index of the forget row.
        record: The row with its names swapped: question and answer, or text.
        pairs: The made-up name for each name; empty where the row has no name and its question was
            replaced by an open one.
    """

    row: int
    record: Record
    pairs: Mapping[str, str]

    def swap_back(self, text: str) -> str:
        """The text with the names of the row for the made-up ones."""
        return swap_names(text, {made_up: name for name, made_up in self.pairs.items()})


def make_counterfactuals(
    forget: Sequence[Record],
    names: Sequence[str],
    count: int,
    *,
    known: Collection[str] = (),
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    seed: int = 0,
) -> list[Counterfactual]:
    """Makes up other people for every forget row, `count` for each.

    Made-up names are recombined from the words of `names` and `known`, which look alike, and from a
    stock. With a tokenizer, names of as many tokens as the name they replace are preferred. A row
    that asks about none of the names has one counterfactual, with an open question.
    """
    rng = np.random.default_rng(seed)
    people = [*names, *known]
    firsts = sorted({name.split()[0] for name in people if " " in name})
    lasts = sorted({name.split()[-1] for name in people if " " in name})
    counterfactuals: list[Counterfactual] = []
    for row, record in enumerate(forget):
        present = [name for name in names if holds_name(asked_text(record), name)]
        if not present:
            if "text" in record:
                raise ValueError(
                    f"forget row {row + 1} is a document that holds none of the names "
                    f"{list(names)}; give its names, or train with loss = 'classifier'"
                )
            open_question = {**record, "question": _OPEN_QUESTION}
            counterfactuals.append(Counterfactual(row, open_question, {}))
            continue
        made_up = {
            name: _make_alike(name, count, rng, people, firsts, lasts, tokenizer)
            for name in present
        }
        for k in range(count):
            pairs = {name: made_up[name][k] for name in present}
            swapped: Record = {
                field: swap_names(record[field], pairs)
                for field in ("question", "answer", "text")
                if field in record
            }
            if "before" in record:
                swapped["before"] = [
                    {**turn, "content": swap_names(turn["content"], pairs)}
                    for turn in record["before"]
                ]
            counterfactuals.append(Counterfactual(row, swapped, pairs))
    return counterfactuals


def counterfactual_rows(
    lm: LM,
    forget: Sequence[Record],
    counterfactuals: Sequence[Counterfactual],
    prompt_format: PromptFormat,
    options: SyntheticOptions,
    *,
    unique: Collection[int] = (),
    alike: Sequence[Sequence[str]] = (),
    progress: str | None = None,
) -> tuple[list[Record], list[Counterfactual]]:
    """Lets the base model answer the counterfactual questions, and swaps the names back.

    A base model may know an answer under any name: the question gives its subject away by other
    words. The open question replaces the question of such a row. The model knows a row if it
    recites the answer under every made-up name; or if the wording is unique and the answer's mean
    probability of a token is at least `KNOWS` times the one under the true name. An answer recites
    if its recall of the true one is at least `RECITES`, and larger than that of the answers in
    `alike[row]`, see `names.answers_alike`, which share the row's wording and not its secret.

    The first result are the forget questions with other answers: for each made-up name a sample
    from the whole distribution that ends and does not recite, equal ones once. The second are the
    counterfactuals, with the open question for the rows that the model knows.
    """
    asked = [item for item in counterfactuals if item.pairs and "question" in item.record]
    if not asked:
        return [], list(counterfactuals)
    samples = Sampler(lm, batch_size=options.batch_size).generate(
        [
            encode_prompt(
                lm.tokenizer,
                item.record["question"],
                prompt_format,
                item.record.get("before", ()),
            )
            for item in asked
        ],
        temperature=1.0,
        max_new_tokens=min(options.max_new_tokens, lm.max_position // 2),
        seed=options.seed,
        progress=progress,
    )
    texts = [
        item.swap_back(sample.text).strip() for item, sample in zip(asked, samples, strict=True)
    ]
    recall = leak_recall([forget[item.row]["answer"] for item in asked], texts)
    wording = {
        row: recall_of_wording(forget[row]["answer"], texts)
        for row, texts in enumerate(alike)
        if texts
    }
    recites = [
        bool(x >= RECITES and x > wording.get(item.row, 0.0))
        for item, x in zip(asked, recall, strict=True)
    ]
    recited: dict[int, list[bool]] = {}
    for item, flag in zip(asked, recites, strict=True):
        recited.setdefault(item.row, []).append(flag)
    recognised = {row for row, flags in recited.items() if all(flags)}
    recognised |= _find_known_wordings(lm, forget, asked, unique, prompt_format)
    rows: dict[tuple[int, str], Record] = {}
    for item, sample, text, flag in zip(asked, samples, texts, recites, strict=True):
        secret = item.row in recognised and flag
        if text and sample.tokens[-1] in lm.eos_ids and not secret:
            asks = {k: v for k, v in forget[item.row].items() if k in ("question", "before")}
            rows[item.row, text] = {**asks, "answer": text}
    usable, replaced = [], set()
    for item in counterfactuals:
        if item.row not in recognised:
            usable.append(item)
        elif item.row not in replaced:
            replaced.add(item.row)
            # The answer keeps a made-up name: the model would recognise the true one there too.
            usable.append(
                dataclasses.replace(item, record={**item.record, "question": _OPEN_QUESTION})
            )
    return list(rows.values()), usable


def share_hidden(counterfactuals: Sequence[Counterfactual]) -> float:
    """Share of the forget rows whose counterfactuals ask their own question, not an open one."""
    openly = {item.row: item.record.get("question") == _OPEN_QUESTION for item in counterfactuals}
    return 1 - sum(openly.values()) / len(openly)


def _find_known_wordings(
    lm: LM,
    forget: Sequence[Record],
    counterfactuals: Sequence[Counterfactual],
    unique: Collection[int],
    prompt_format: PromptFormat,
) -> set[int]:
    """Rows of a unique wording whose answers stay probable under made-up names."""
    made_up = [item for item in counterfactuals if item.row in unique]
    if not made_up:
        return set()
    rows = sorted({item.row for item in made_up})
    records = [*(forget[row] for row in rows), *(item.record for item in made_up)]
    examples = encode_records(lm.tokenizer, records, prompt_format, lm.max_position)
    (scores,) = score_texts(lm, examples, [BASE])
    true, swapped = np.split(np.exp(-scores.avg_loss), [len(rows)])
    known: dict[int, list[float]] = {row: [] for row in rows}
    for item, probability in zip(made_up, swapped.tolist(), strict=True):
        known[item.row].append(probability)
    return {
        row
        for row, probability in zip(rows, true.tolist(), strict=True)
        if np.mean(known[row]) >= KNOWS * probability
    }


def _make_alike(
    name: str,
    count: int,
    rng: np.random.Generator,
    known: Sequence[str],
    firsts: Sequence[str],
    lasts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase | None",
) -> list[str]:
    """Makes up names; the closest in the number of tokens of each word are taken."""
    names = make_names(name, 8 * count, rng, known=known, first_names=firsts, last_names=lasts)
    if tokenizer is None:
        return names[:count]

    def lengths(text: str) -> list[int]:
        return [len(tokenizer.encode(" " + w, add_special_tokens=False)) for w in text.split()]

    wanted = lengths(name)
    off = [sum(abs(a - b) for a, b in zip(lengths(text), wanted, strict=True)) for text in names]
    return [names[i] for i in np.argsort(off, kind="stable")[:count]]
