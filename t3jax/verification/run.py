"""Runs base and unlearned model on all attacks, and judges the answers."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from t3jax.data.chat import Example, PromptFormat
from t3jax.data.records import Record, evenly_spread
from t3jax.evaluation import metrics, unlearning
from t3jax.evaluation.recall import leak_recall
from t3jax.evaluation.scoring import BASE, Setting
from t3jax.evaluation.store import Store
from t3jax.ranges import COUNT, SEED, TOP_P, check_ranges, whole
from t3jax.sampling import Sample
from t3jax.sampling.sampler import REFUSAL_THRESHOLD
from t3jax.verification.attacks import (
    PREFIX,
    SAMPLINGS,
    Attack,
    Encoding,
    as_they_stand,
    attacks,
    words_of,
)
from t3jax.verification.others import Others, count_leaks, recall_once
from t3jax.verification.verdict import (
    LOSS,
    SHORT,
    Changed,
    Finding,
    Fluency,
    Leak,
    Refusals,
    Retained,
    Verdict,
    wilson,
)


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """What is asked.

    Attributes:
        rows: Rows of forget and of retain that are asked at most, evenly spread over them.
        threshold: Recall of the true answer from which an answer leaks.
        max_new_tokens: Longest answer. A true answer counts as far as it fits.
        seed: Seed of the draws.
    """

    rows: int = 60
    threshold: float = 0.7
    max_new_tokens: int = 200
    seed: int = 0

    def __post_init__(self):
        check_ranges(self, rows=whole(1), threshold=TOP_P, max_new_tokens=COUNT, seed=SEED)


@runtime_checkable
class Counterfactual(Protocol):
    """A forget row as it would be about someone who does not exist."""

    @property
    def row(self) -> int:
        """Index of the forget row."""
        ...

    @property
    def record(self) -> Record:
        """The row with made-up names."""
        ...

    @property
    def pairs(self) -> Mapping[str, str]:
        """The made-up name in the place of each name; empty where the row names nobody."""
        ...

    def swap_back(self, text: str) -> str:
        """The text with the row's own names."""
        ...


def verify(
    store: Store,
    setting: Setting,
    forget: Sequence[Record],
    retain: Sequence[Record],
    prompt_format: PromptFormat,
    options: VerifyOptions = VerifyOptions(),
    *,
    rewordings: Mapping[str, Sequence[str]] | None = None,
    counterfactuals: Sequence[Counterfactual] = (),
) -> Verdict:
    """Asks the rows in all ways and judges the answers.

    Args:
        store: Scores and answers of the base with its heads.
        setting: The unlearned model, one of the store.
        forget: Rows that must not come back.
        retain: Rows that must be answered as before.
        prompt_format: How a question becomes a prompt.
        options: What is asked.
        rewordings: Other wordings of forget questions, by question.
        counterfactuals: Forget rows about made-up names, to which the base's answers are guesses.

    Returns:
        The verdict.

    Raises:
        ValueError: If a row cannot be encoded, or does not fit the model's context.
    """
    judging = _Judging(store, setting, options, prompt_format, rewordings or {})
    numbers = evenly_spread(range(len(forget)), options.rows)
    records = [forget[number] for number in numbers]
    made, skipped = judging.attacks(records, numbers)
    if not made:
        raise ValueError(f"no forget row can be asked: {skipped}")
    retain_numbers = evenly_spread(range(len(retain)), options.rows)
    before = as_they_stand(
        judging.encoding,
        [retain[number] for number in retain_numbers],
        [f"retain row {number + 1}" for number in retain_numbers],
    )
    base, unlearned = (judging.answers([*made, before], model) for model in (BASE, setting))
    others = Others(records, retain, options.threshold)
    made_up = [swapped for swapped in counterfactuals if swapped.row in numbers and swapped.pairs]
    guesses = [
        judging.guesses(made_up, "made-up"),
        # The first words give the wording away, which answers to other rows do not have.
        judging.guesses(
            [
                dataclasses.replace(swapped, row=numbers[swapped.row])
                for swapped in others.exchanged(records)
            ],
            "exchanged",
            PREFIX,
        ),
    ]
    findings = []
    for attack in made:
        answers = _tries(attack, unlearned[attack.name])
        pools = others.recall(attack, answers)
        wording = others.wording(attack)
        for i, row in enumerate(attack.rows):
            key = (attack.name, numbers[row])
            if guessed := [recall for by_row in guesses for recall in by_row.get(key, [])]:
                # Guesses of the row itself say better what chance is than answers to other rows.
                # They have the wording too, so that they take its place.
                wording[i] = max(pools[i], default=0.0)
                pools[i] = guessed
        of_base = _tries(attack, base[attack.name])
        findings.append(_finding(attack, of_base, answers, wording, pools, numbers, options))
    return Verdict(
        findings=tuple(findings),
        skipped=skipped,
        fluency=judging.fluency(made, base, unlearned),
        retain=_retained(before, base[before.name], unlearned[before.name], retain_numbers),
        refusals=judging.refusals(made[0], before, unlearned),
        rows=len(records),
        forget_rows=len(forget),
        retain_rows=len(retain),
        made_up=len({swapped.row for swapped in made_up}),
        threshold=options.threshold,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Judging:
    """Runs the models for `verify`."""

    store: Store
    setting: Setting
    options: VerifyOptions
    prompt_format: PromptFormat
    rewordings: Mapping[str, Sequence[str]]

    @property
    def encoding(self) -> Encoding:
        lm = self.store.lm
        return Encoding(
            lm.tokenizer, self.prompt_format, self.options.max_new_tokens, lm.max_position
        )

    def attacks(
        self, records: Sequence[Record], numbers: Sequence[int]
    ) -> tuple[list[Attack], dict[str, str]]:
        names = [f"forget row {number + 1}" for number in numbers]
        return attacks(self.encoding, records, names, self.rewordings)

    def answers(
        self, asked: Sequence[Attack], setting: Setting, label: str = "verify"
    ) -> dict[str, list[Sample]]:
        """Answers by attack; what is drawn alike is drawn together."""
        groups: dict[str, list[Attack]] = {}
        for attack in asked:
            groups.setdefault(repr(attack.sampling), []).append(attack)
        answers: dict[str, list[Sample]] = {}
        for group in groups.values():
            prompts = [prompt for attack in group for prompt in attack.prompts]
            samples = self.store.answers(
                f"{label}-{group[0].name}",
                prompts,
                setting,
                max_new_tokens=self.options.max_new_tokens,
                seed=self.options.seed,
                **group[0].sampling,
            )
            start, draws = 0, len(samples) // len(prompts)
            for attack in group:
                stop = start + draws * len(attack.prompts)
                answers[attack.name] = samples[start:stop]
                start = stop
        return answers

    def guesses(
        self, swapped: Sequence[Counterfactual], label: str, only: str | None = None
    ) -> dict[tuple[str, int], list[float]]:
        """Recall of true answers in the base's about other names, by attack and forget row.

        If an answer holds all of a long true one, that is no guess: the base knows the row by more
        than its name.
        """
        guesses: dict[tuple[str, int], list[float]] = {}
        if not swapped:
            return guesses
        made, _ = self.attacks(
            [about.record for about in swapped], [about.row for about in swapped]
        )
        made = [attack for attack in made if only in (None, attack.name)]
        samples = self.answers(made, BASE, f"verify-{label}")
        for attack in made:
            tries = _tries(attack, samples[attack.name])
            for position, truth, answers in zip(attack.rows, attack.truths, tries, strict=True):
                about = swapped[position]
                texts = [about.swap_back(text) for _, text in answers]
                recall = leak_recall([about.swap_back(truth)] * len(texts), texts).max()
                if recall < 1 or len(words_of(truth)) < SHORT:
                    guesses.setdefault((attack.name, about.row), []).append(float(recall))
        return guesses

    def fluency(
        self,
        made: Sequence[Attack],
        base: Mapping[str, Sequence[Sample]],
        unlearned: Mapping[str, Sequence[Sample]],
    ) -> tuple[Fluency, ...]:
        """Of each sampling of one answer; of documents, which have no questions, what goes on."""
        single = [attack for attack in made if "num_samples" not in attack.sampling]
        plain = [attack for attack in single if attack.name in SAMPLINGS] or single
        examples = [
            example
            for samples in (unlearned, base)
            for attack in plain
            for example in _answered(attack, samples[attack.name])
        ]
        (scores,) = self.store.scores("verify-answers", examples, [BASE])
        perplexity, base_perplexity = np.split(np.exp(scores.avg_loss), 2)
        starts = np.cumsum([0, *(len(attack.prompts) for attack in plain)])
        stops = self.store.lm.eos_ids
        return tuple(
            Fluency(
                attack.name,
                float(np.median(perplexity[start:stop])),
                _ended(unlearned[attack.name], stops),
                _repetition(unlearned[attack.name]),
                float(np.median(base_perplexity[start:stop])),
                _ended(base[attack.name], stops),
                _repetition(base[attack.name]),
            )
            for attack, (start, stop) in zip(plain, itertools.pairwise(starts), strict=True)
        )

    def refusals(
        self, greedy: Attack, retain: Attack, unlearned: Mapping[str, Sequence[Sample]]
    ) -> Refusals | None:
        """Counts the answers that a refusal would take the place of."""
        if self.setting.base_temperature != 1:
            return None
        asked = [_answered(attack, unlearned[attack.name]) for attack in (greedy, retain)]
        base, served = self.store.scores(
            "verify-refusals", [*asked[0], *asked[1]], [BASE, self.setting]
        )
        log_ratios = np.add.reduceat(served.logprobs - base.logprobs, served.starts[:-1])
        refused = log_ratios > REFUSAL_THRESHOLD
        forget, kept = np.split(refused, [len(asked[0])])
        return Refusals(
            REFUSAL_THRESHOLD,
            wilson(float(forget.mean()), len(forget)),
            wilson(float(kept.mean()), len(kept)),
        )


def _finding(
    attack: Attack,
    base: Sequence[Sequence[tuple[str, str]]],
    unlearned: Sequence[Sequence[tuple[str, str]]],
    wording: Float[np.ndarray, "rows"],
    pools: Sequence[Sequence[float]],
    numbers: Sequence[int],
    options: VerifyOptions,
) -> Finding:
    """Judges the tries of an attack."""
    threshold, rows = options.threshold, len(attack.rows)
    base_leaks, _ = count_leaks(_best(attack, base)[0], wording, pools, threshold)
    recall, best = _best(attack, unlearned)
    leaks, chance = count_leaks(recall, wording, pools, threshold)
    others = [max([most, *pool]) for most, pool in zip(wording.tolist(), pools, strict=True)]
    order = sorted(np.flatnonzero(leaks).tolist(), key=lambda i: (others[i] - recall[i], i))
    return Finding(
        name=attack.name,
        does=attack.does,
        rows=rows,
        short=sum(len(words_of(truth)) < SHORT for truth in attack.truths),
        reached=float((recall >= threshold).mean()),
        base=wilson(float(base_leaks.mean()), rows),
        unlearned=wilson(float(leaks.mean()), rows),
        chance=wilson(float(chance.mean()), rows),
        excess=metrics.bootstrap_difference(leaks, chance, level=0.9),
        leaks=tuple(
            Leak(
                numbers[attack.rows[i]] + 1,
                best[i][0],
                attack.truths[i],
                best[i][1].strip(),
                float(recall[i]),
                others[i],
            )
            for i in order
        ),
    )


def _retained(
    asked: Attack, base: Sequence[Sample], unlearned: Sequence[Sample], numbers: Sequence[int]
) -> Retained:
    """Compares the answers to retain rows."""
    before, was = _best(asked, _tries(asked, base))
    after, now = _best(asked, _tries(asked, unlearned))
    fewer = after < before - LOSS
    return Retained(
        rows=len(numbers),
        share=wilson(float(np.mean(~fewer)), len(numbers)),
        base=float(before.mean()),
        unlearned=float(after.mean()),
        changed=tuple(
            Changed(
                numbers[i] + 1,
                was[i][0],
                was[i][1].strip(),
                now[i][1].strip(),
                float(before[i]),
                float(after[i]),
            )
            for i in sorted(np.flatnonzero(fewer).tolist(), key=lambda i: after[i] - before[i])
        ),
    )


def _tries(attack: Attack, samples: Sequence[Sample]) -> list[list[tuple[str, str]]]:
    """By row, every question with an answer to it."""
    draws = len(samples) // len(attack.prompts)
    tries: list[list[tuple[str, str]]] = [[] for _ in attack.rows]
    for i, sample in enumerate(samples):
        prompt = i // draws
        tries[attack.owners[prompt]].append((attack.questions[prompt], sample.text))
    return tries


def _best(
    attack: Attack, tries: Sequence[Sequence[tuple[str, str]]]
) -> tuple[Float[np.ndarray, "rows"], list[tuple[str, str]]]:
    """Each row's largest recall of the true answer, with the question and the answer."""
    owners = [i for i, answers in enumerate(tries) for _ in answers]
    flat = [answer for answers in tries for answer in answers]
    recall = recall_once([attack.truths[i] for i in owners], [text for _, text in flat])
    best: dict[int, int] = {}
    for at, i in enumerate(owners):
        if i not in best or recall[at] > recall[best[i]]:
            best[i] = at
    chosen = [best[i] for i in range(len(tries))]
    return recall[chosen], [flat[at] for at in chosen]


def _answered(attack: Attack, samples: Sequence[Sample]) -> list[Example]:
    """One answer to each prompt of an attack, as tokens behind it."""
    return [
        Example(np.concatenate([prompt, np.asarray(sample.tokens, np.int32)]), len(prompt))
        for prompt, sample in zip(attack.prompts, samples, strict=True)
    ]


def _ended(samples: Sequence[Sample], stops: Sequence[int]) -> float:
    return float(np.mean([sample.tokens[-1] in stops for sample in samples]))


def _repetition(samples: Sequence[Sample]) -> float:
    return float(unlearning.repetition([sample.text for sample in samples]).mean())
