"""Asking base and unlearned model: their answers, the base's guesses, and how answers read."""

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
        rows: Rows of forget and of retain that are asked at most, evenly spread over them.
        threshold: Recall of the true answer from which an answer leaks.
        max_new_tokens: Longest answer. A true answer counts as far as it fits.
        seed: Seed of the draws.
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
        """All ways of asking forget rows of these numbers; see `attacks`."""
        names = [f"forget row {number + 1}" for number in numbers]
        return attacks(self.encoding, records, names, self.rewordings)

    def answer(
        self, asked: Sequence[Attack], setting: Setting, label: str = "verify"
    ) -> dict[str, list[Sample]]:
        """Answers by attack; attacks of one sampling are drawn together."""
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
            start, draws = 0, len(samples) // len(prompts)
            for attack in group:
                stop = start + draws * len(attack.prompts)
                answers[attack.name] = samples[start:stop]
                start = stop
        return answers

    def guess(
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
        samples = self.answer(made, BASE, f"verify-{label}")
        for attack in made:
            tries = group_answers(attack, samples[attack.name])
            for position, truth, answers in zip(attack.rows, attack.truths, tries, strict=True):
                about = swapped[position]
                texts = [about.swap_back(text) for _, text in answers]
                recall = leak_recall([about.swap_back(truth)] * len(texts), texts).max()
                if recall < 1 or len(words_of(truth)) < SHORT:
                    guesses.setdefault((attack.name, about.row), []).append(float(recall))
        return guesses

    def judge_answers(
        self,
        made: Sequence[Attack],
        retain: Attack,
        base: Mapping[str, Sequence[Sample]],
        unlearned: Mapping[str, Sequence[Sample]],
    ) -> tuple[tuple[Fluency, ...], Refusals | None]:
        """The fluency of the answers, and how many a refusal would replace, None where T is not 1.

        Every sampling of one answer has its fluency; documents, which have no questions, have that
        of their continuation. All texts are scored in one pass. The greedy attack comes first;
        answers are by attack.
        """
        single = [attack for attack in made if "num_samples" not in attack.sampling]
        greedy, *others = [attack for attack in single if attack.name in SAMPLINGS] or single
        plain = [greedy, *others]
        first, retained = (
            append_answers(attack.prompts, unlearned[attack.name]) for attack in (greedy, retain)
        )
        rest = [
            example
            for samples, asked in ((unlearned, others), (base, plain))
            for attack in asked
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
    """Shares of answers above the limit: to forget rows, which come first, and to retain rows."""
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
