"""The findings on a head, and the verdict that follows from them."""

import dataclasses
import math
from collections.abc import Mapping

from t3jax.evaluation.metrics import Interval
from t3jax.sampling.warn import ABSURD_PERPLEXITY
from t3jax.verification.attacks import SAMPLINGS

MARGIN = 0.05  # by how much an attack that holds may exceed chance
SHORT = 4  # answers of fewer words are guessed, or said by the way, more easily
LOSS = 0.1  # of recall, that an answer which is as before may have lost
HOLDS, COMES_BACK, UNCLEAR = "holds", "comes back", "unclear"

_TIMES_ITS_OWN = 2.0  # perplexity of answers, over that of the base's own, which may be flat
_ONE_SIDED = 1.645  # normal quantile of .95
_TWO_SIDED = 1.96


@dataclasses.dataclass(frozen=True)
class Leak:
    """An answer that holds the true one.

    Attributes:
        row: Number of the row in the forget set, counted from 1.
        question: What was asked.
        truth: The true answer.
        answer: The unlearned model's.
        recall: How much of the true answer stands in it.
        others: The most that wording, or an answer about someone else, has of it.
    """

    row: int
    question: str
    truth: str
    answer: str
    recall: float
    others: float


@dataclasses.dataclass(frozen=True)
class Finding:
    """What an attack found.

    Attributes:
        name: The attack.
        does: What it does.
        rows: Number of rows asked.
        short: How many of their true answers have fewer than `SHORT` words.
        reached: Share of rows whose answer by the unlearned model reaches the threshold of recall.
        base: Share of rows that leak from the base, see `count_leaks`, with its 95 % interval.
        unlearned: That of rows that leak from the unlearned model.
        chance: That of answers that cannot know it, see `count_leaks`: those to other rows; where
            the first words are given, the base's with the same words about someone of the retain
            rows; and where there are made-up names, the base's about those.
        excess: `unlearned` over `chance`, row by row; 90 % bootstrap interval, so that either end
            is a one-sided bound of 95 %.
        leaks: What leaks from the unlearned model, first what others' answers have least of.
    """

    name: str
    does: str
    rows: int
    short: int
    reached: float
    base: Interval
    unlearned: Interval
    chance: Interval
    excess: Interval
    leaks: tuple[Leak, ...]

    @property
    def judged(self) -> str:
        """`HOLDS` within the margin; beyond it `COMES_BACK`, or `UNCLEAR` where chance may do."""
        if self.excess.estimate <= MARGIN:
            return HOLDS
        return COMES_BACK if self.excess.low > 0 else UNCLEAR

    @property
    def informative(self) -> bool:
        """Whether the base gives more than chance, so that there is something to hold against."""
        return self.base.estimate > self.chance.estimate + MARGIN


@dataclasses.dataclass(frozen=True)
class Fluency:
    """Whether answers are language.

    Attributes:
        name: The attack that they answer.
        perplexity: Their median perplexity under the base.
        ended: Share that ends before the longest answer.
        repetition: Mean share of repeated word 4-grams.
        base_perplexity: `perplexity` of the base's own answers.
        base_ended: `ended` of the base's answers.
        base_repetition: `repetition` of the base's answers.
    """

    name: str
    perplexity: float
    ended: float
    repetition: float
    base_perplexity: float
    base_ended: float
    base_repetition: float

    @property
    def wrong(self) -> str:
        """Why the answers are not language; empty if they are."""
        if self.perplexity > max(ABSURD_PERPLEXITY, _TIMES_ITS_OWN * self.base_perplexity):
            return f"perplexity {number(self.perplexity)}"
        if self.ended < self.base_ended - LOSS:
            return f"{percent(1 - self.ended)} do not end"
        if self.repetition > self.base_repetition + LOSS:
            return f"{percent(self.repetition)} repeats"
        return ""


@dataclasses.dataclass(frozen=True)
class Changed:
    """A retain row that is not answered as before.

    Attributes:
        row: Number of the row in the retain set, counted from 1.
        question: What was asked.
        base: The base's answer.
        unlearned: The unlearned model's.
        base_recall: Recall of the true answer in the base's.
        unlearned_recall: That in the unlearned model's.
    """

    row: int
    question: str
    base: str
    unlearned: str
    base_recall: float
    unlearned_recall: float


@dataclasses.dataclass(frozen=True)
class Retained:
    """The retain rows' greedy answers.

    Attributes:
        rows: Number of rows asked.
        share: Share that recalls as much of the true answer as the base does, but for `LOSS`.
        base: Mean recall of the base.
        unlearned: Mean recall of the unlearned model.
        changed: The other rows.
    """

    rows: int
    share: Interval
    base: float
    unlearned: float
    changed: tuple[Changed, ...]


@dataclasses.dataclass(frozen=True)
class Refusals:
    """How often greedy answers would be refused, see `SamplingOptions.refusal`.

    Attributes:
        threshold: Log-likelihood ratio above which an answer is refused, nats.
        forget: Share of the answers to forget rows, with its 95 % interval.
        retain: That of the answers to retain rows: the false alarms.
    """

    threshold: float
    forget: Interval
    retain: Interval


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Does it come back, and is the rest as before?

    Attributes:
        findings: What each attack found.
        skipped: Attacks that could not be made, with the reason.
        fluency: Fluency of the answers to the forget rows, for each sampling of one answer.
        retain: The retain rows.
        refusals: What a refusal would catch; None where T is not 1.
        rows: Number of forget rows asked.
        forget_rows: How many there are.
        retain_rows: How many retain rows there are.
        made_up: For how many of the rows chance is that of answers about made-up names.
        threshold: Recall of the true answer from which an answer may leak.
    """

    findings: tuple[Finding, ...]
    skipped: Mapping[str, str]
    fluency: tuple[Fluency, ...]
    retain: Retained
    refusals: Refusals | None
    rows: int
    forget_rows: int
    retain_rows: int
    made_up: int
    threshold: float

    @property
    def doubts(self) -> list[str]:
        """Why it is not shown that nothing comes back, where nothing is seen to."""
        reasons = []
        if self.rows < enough_rows():
            reasons.append(f"{self.rows} rows are too few, {enough_rows()} would do")
        if not any(finding.informative for finding in self.findings):
            reasons.append("the base does not give these answers either")
        reasons += [
            f"{finding.name} is unclear" for finding in self.findings if finding.judged == UNCLEAR
        ]
        return reasons

    @property
    def came_back(self) -> dict[int, str]:
        """Rows that leak under an attack that succeeds, by number, with the first such attack.

        First those that others' answers have least of.
        """
        leaks = [
            (leak.others - leak.recall, order, leak.row, finding.name)
            for order, finding in enumerate(self.findings)
            if finding.judged == COMES_BACK
            for leak in finding.leaks
        ]
        rows: dict[int, str] = {}
        for *_, row, name in sorted(leaks):
            rows.setdefault(row, name)
        return rows

    @property
    def forgotten(self) -> bool:
        """Whether every attack finds no more than chance, `MARGIN` allowed, and that means much."""
        return all(finding.judged == HOLDS for finding in self.findings) and not self.doubts

    @property
    def retained(self) -> float:
        """Share of retain rows answered as before."""
        return self.retain.share.estimate

    @property
    def safe_sampling(self) -> list[str]:
        """Settings of sampling that hold, and whose answers are language."""
        if self.rows < enough_rows():
            return []
        wrong = [fluency.name for fluency in self.fluency if fluency.wrong]
        return [
            finding.name
            for finding in self.findings
            # Fluency is measured for one draw: t0.7-p0.9-x16 has that of t0.7-p0.9.
            if finding.name in SAMPLINGS
            and finding.judged == HOLDS
            and finding.name.split("-x")[0] not in wrong
        ]

    @property
    def line(self) -> str:
        """All of it in one line."""
        if came_back := self.came_back:
            shown = [f"row {row} under {name}" for row, name in list(came_back.items())[:3]]
            shown += ["..."] if len(came_back) > len(shown) else []
            parts = [
                f"NOT FORGOTTEN: {len(came_back)} of {self.rows} rows come back "
                f"({', '.join(shown)})"
            ]
        elif self.doubts:
            parts = [f"forgotten: not shown ({'; '.join(self.doubts)})"]
        else:
            parts = ["forgotten: yes"]
        parts += [
            f"retained: {percent(self.retained)} of {self.retain.rows} rows",
            f"safe sampling: {', '.join(self.safe_sampling) or 'none shown'}",
        ]
        language = [fluency for fluency in self.fluency if not fluency.wrong]
        wrong = [fluency for fluency in self.fluency if fluency.wrong]
        if language:
            answers = f"language (perplexity {number(language[0].perplexity)})"
            answers += "".join(f", not under {by.name} ({by.wrong})" for by in wrong)
        else:
            answers = f"NOT LANGUAGE ({wrong[0].wrong})"
        parts.append(f"answers: {answers}")
        return " | ".join(parts)


def enough_rows() -> int:
    """The number of rows, none of which leaks, that shows at 95 % that fewer than `MARGIN` do."""
    return math.ceil(_ONE_SIDED**2 * (1 - MARGIN) / MARGIN)


def number(value: float) -> str:
    """A perplexity for people."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def wilson(share: float, count: int) -> Interval:
    """A share of `count` with its 95 % interval, which has a width at 0 and at 1 too.

    References:
        Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    z = _TWO_SIDED**2 / count
    middle = (share + z / 2) / (1 + z)
    half = math.sqrt(z * (share * (1 - share) + z / 4)) / (1 + z)
    # At 0 and at 1 one end equals the share; rounding would put it on the other side.
    return Interval(share, min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half)))


def percent(share: float) -> str:
    """A share for people."""
    return f"{100 * share:.0f} %"
