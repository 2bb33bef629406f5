"""Asks base and unlearned model: their answers, the base's guesses, and the answers' fluency."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from t3jax.data.chat import PromptFormat
from t3jax.data.records import Record
from t3jax.evaluation.answers import repetition
from t3jax.evaluation.questions import append_answers
from t3jax.evaluation.recall import leak_recall
from t3jax.evaluation.settings import BASE, Setting
from t3jax.evaluation.store import Store
from t3jax.ranges import COUNT, SEED, TOP_P, Ranged, whole
from t3jax.sampling import Sample
from t3jax.sampling.options import REFUSAL_THRESHOLD
from t3jax.synthetic.counterfactual import Counterfactual
from t3jax.verification.attacks import SAMPLINGS, Attack, Encoding, attacks, words_of
from t3jax.verification.leaks import group_answers
from t3jax.verification.verdict import SHORT, Fluency, Refusals, wilson


@dataclasses.dataclass(frozen=True)
class VerifyOptions(Ranged):
    """How many rows are asked, and how.

    Attributes:
        rows: Most rows of forget and of retain to ask, evenly spread over them.
        threshold: Recall of the true answer from which an answer leaks.
        max_new_tokens: Longest answer, tokens. True answers are cut there too.
        seed: Seed of the samples.
    """

    rows: Annotated[int, whole(1)] = 60
    threshold: Annotated[float, TOP_P] = 0.7
    max_new_tokens: Annotated[int, COUNT] = 200
    seed: Annotated[int, SEED] = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Asking:
    """Runs the models for `verify`."""

    store: Store
    setting: Setting
    options: VerifyOptions
    prompt_format: PromptFormat
    rewordings: Mapping[str, Sequence[str]]

    @property
    def encoding(self) -> Encoding:
        """How rows become prompts."""
        lm = self.store.lm
        return Encoding(
            lm.tokenizer, self.prompt_format, self.options.max_new_tokens, lm.max_position
        )

    def attacks(
        self, records: Sequence[Record], numbers: Sequence[int]
    ) -> tuple[list[Attack], dict[str, str]]:
        """All attacks on forget rows with their numbers; see `attacks`."""
        names = [f"forget row {number + 1}" for number in numbers]
        return attacks(self.encoding, records, names, self.rewordings)

    def answer(
        self, asked: Sequence[Attack], setting: Setting, label: str = "verify"
    ) -> dict[str, list[Sample]]:
        """Answers by attack; attacks of equal sampling share a batch."""
        groups: dict[str, list[Attack]] = {}
        for attack in asked:
            groups.setdefault(repr(attack.sampling), []).append(attack)
        answers: dict[str, list[Sample]] = {}
        for group in groups.values():
            prompts = [prompt for attack in group for prompt in attack.prompts]
            options, sampling = self.options, group[0].sampling
            drawing: dict[str, Any] = {"seed": options.seed, **sampling}
            samples = self.store.answers(
                f"{label}-{group[0].name}",
                prompts,
                setting,
                max_new_tokens=options.max_new_tokens,
                **drawing,
            )
            draws, remaining = len(samples) // len(prompts), iter(samples)
            for attack in group:
                count = draws * len(attack.prompts)
                answers[attack.name] = list(itertools.islice(remaining, count))
        return answers

    def guess(
        self, swapped: Sequence[Counterfactual], label: str, only: str | None = None
    ) -> dict[tuple[str, int], list[float]]:
        """Recall of true answers in the base's about other names, by attack and forget row.

        An answer that holds all of a long true one is no guess, and is left out: the base knows the
        row by more than its name.
        """
        guesses: dict[tuple[str, int], list[float]] = {}
        if not swapped:
            return guesses
        all_attacks, _ = self.attacks(
            [swap.record for swap in swapped], [swap.row for swap in swapped]
        )
        asked = [attack for attack in all_attacks if only in (None, attack.name)]
        samples = self.answer(asked, BASE, f"verify-{label}")
        for attack in asked:
            tries = group_answers(attack, samples[attack.name])
            for position, truth, answers in zip(attack.rows, attack.truths, tries, strict=True):
                swap = swapped[position]
                texts = [swap.swap_back(text) for _, text in answers]
                recall = leak_recall([swap.swap_back(truth)] * len(texts), texts).max()
                if recall < 1 or len(words_of(truth)) < SHORT:
                    guesses.setdefault((attack.name, swap.row), []).append(float(recall))
        return guesses

    def judge_answers(
        self,
        asked: Sequence[Attack],
        retain: Attack,
        base: Mapping[str, Sequence[Sample]],
        unlearned: Mapping[str, Sequence[Sample]],
    ) -> tuple[tuple[Fluency, ...], Refusals | None]:
        """The fluency of the answers, and the share that a refusal would replace (None if T != 1).

        Fluency is measured for every sampling of one answer, and for documents, which have no
        questions, for their continuation. Answers are by attack; the greedy attack comes first.
        """
        single = [attack for attack in asked if "num_samples" not in attack.sampling]
        plain = [attack for attack in single if attack.name in SAMPLINGS] or single
        greedy, *drawn = plain
        first, retained = (
            append_answers(attack.prompts, unlearned[attack.name]) for attack in (greedy, retain)
        )
        rest = [
            example
            for samples, answered in ((unlearned, drawn), (base, plain))
            for attack in answered
            for example in append_answers(attack.prompts, samples[attack.name])
        ]
        (of_rest,) = self.store.scores("verify-answers", rest, [BASE])
        refusals = None
        if self.setting.base_temperature == 1:
            of_first, served = self.store.scores(
                "verify-refusals", [*first, *retained], [BASE, self.setting]
            )
            change = np.add.reduceat(served.logprobs - of_first.logprobs, served.starts[:-1])
            refusals = _count_refusals(change, len(first))
        else:
            (of_first,) = self.store.scores("verify-greedy", first, [BASE])
        losses = np.concatenate([of_first.avg_loss[: len(first)], of_rest.avg_loss])
        perplexity, base_perplexity = np.split(np.exp(losses), 2)
        starts = np.cumsum([0, *(len(attack.prompts) for attack in plain)])
        stops = self.store.lm.eos_ids
        fluency = tuple(
            Fluency(
                attack.name,
                float(np.median(perplexity[start:stop])),
                share_ended(unlearned[attack.name], stops),
                _repetition(unlearned[attack.name]),
                float(np.median(base_perplexity[start:stop])),
                share_ended(base[attack.name], stops),
                _repetition(base[attack.name]),
            )
            for attack, (start, stop) in zip(plain, itertools.pairwise(starts), strict=True)
        )
        return fluency, refusals


def _count_refusals(log_ratios: np.ndarray, forget: int) -> Refusals:
    """Shares of answers above the limit; the first `forget` answers are to forget rows."""
    shares = [
        wilson(float((ratios > REFUSAL_THRESHOLD).mean()), len(ratios))
        for ratios in np.split(log_ratios, [forget])
    ]
    return Refusals(REFUSAL_THRESHOLD, *shares)


def share_ended(samples: Sequence[Sample], stops: Sequence[int]) -> float:
    """The share of answers that end in a stop token, and not because they are too long."""
    return float(np.mean([sample.tokens[-1] in stops for sample in samples]))


def _repetition(samples: Sequence[Sample]) -> float:
    return float(repetition([sample.text for sample in samples]).mean())
