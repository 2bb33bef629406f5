"""Choosing T, s and the head without flattering the choice: cross-fitting over logs.

The best number of many settings contains luck. Here the rows are split in halves A and B: the
setting chosen on A is scored on B, that chosen on B on A, and the two scored halves are joined.
Every row is thus scored by a setting it had no say in, and one Kolmogorov-Smirnov test over all
rows keeps its power; a half alone has too little for p > 0.05 to prove anything. A setting may have
been measured with heads of several seeds: it is chosen by its median seed, and no seed is chosen.
No model is needed: all numbers come from the per-row values of logs.

References:
    Cross-fitting: arXiv 1608.00060. TOFU, arXiv 2401.06121, forget quality and model utility.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from t3jax.evaluation import aggregates, logs, metrics
from t3jax.evaluation.aggregates import UTILITY
from t3jax.evaluation.logs import Log, MissingMetricError, compute_once

_LEAST_KEPT = 0.97  # of the base model's utility, in "quality_given_utility"


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """The per-row values of a setting's log.

    Attributes:
        truth_ratios: Truth ratios of the forget rows, `[rows]`.
        utility: By set (retain, and ra and wf where the log has both), probability, truth ratio,
            and ROUGE where the log has answers, `[rows, parts]`.
    """

    truth_ratios: Float[np.ndarray, "rows"]
    utility: dict[str, Float[np.ndarray, "_ parts"]]

    @property
    def utility_name(self) -> str:
        """`model utility`, or `retain utility` of the retain set alone; with or without ROUGE."""
        name = "model utility" if len(self.utility) == len(UTILITY) else "retain utility"
        return name if self.utility["retain"].shape[1] == 3 else f"{name} without ROUGE"


@dataclasses.dataclass(frozen=True)
class Score:
    """Forget quality and utility of a setting.

    Attributes:
        quality: The test of the forget rows against the retain model's.
        utility: Harmonic mean of the utility parts: nine, or those that there are.
    """

    quality: metrics.ForgetQuality
    utility: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """A setting that was chosen.

    Attributes:
        name: The setting.
        passed: Whether it meets the rule's condition; if none does, the nearest is taken.
        score: On the rows it was chosen on, of its median seed: optimistic.
    """

    name: str
    passed: bool
    score: Score


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The score of a choice on rows that had no say in it.

    Attributes:
        score: Score of the joined halves, each scored by the setting chosen on the other.
        utility_name: What its utility is: model utility or retain utility.
        utility_interval: 95 % bootstrap interval of the utility.
    """

    score: Score
    utility_name: str
    utility_interval: metrics.Interval


@dataclasses.dataclass(frozen=True)
class CrossFit:
    """A choice, and its score on rows that had no say in it.

    Attributes:
        rule: How settings were ranked.
        halves: The choices on half A and on half B.
        held_out: The honest score, one for each seed.
        overall: The choice on all rows, for use; its score there is optimistic.
    """

    rule: str
    halves: tuple[Choice, Choice]
    held_out: tuple[HeldOut, ...]
    overall: Choice


# A rule maps the scores of all settings, and the base model's, to the index of the best one, and
# whether that one meets the rule's condition.
Rule = Callable[[Sequence[Score], Score], tuple[int, bool]]


def _nearest(scores: Sequence[Score]) -> int:
    return min(range(len(scores)), key=lambda i: (scores[i].quality.statistic, -scores[i].utility))


def _utility_given_quality(scores: Sequence[Score], base: Score) -> tuple[int, bool]:
    passing = [i for i, score in enumerate(scores) if score.quality.p_value > 0.05]
    if passing:
        return max(passing, key=lambda i: scores[i].utility), True
    return _nearest(scores), False


def _quality_given_utility(scores: Sequence[Score], base: Score) -> tuple[int, bool]:
    passing = [i for i, score in enumerate(scores) if score.utility >= _LEAST_KEPT * base.utility]
    if passing:
        return passing[_nearest([scores[i] for i in passing])], True
    return max(range(len(scores)), key=lambda i: scores[i].utility), False


def _smallest_distance(scores: Sequence[Score], base: Score) -> tuple[int, bool]:
    nearest = _nearest(scores)
    return nearest, scores[nearest].quality.p_value > 0.05


RULES: dict[str, Rule] = {
    "utility_given_quality": _utility_given_quality,  # highest utility where forget quality > 0.05
    "quality_given_utility": _quality_given_utility,  # smallest D at 97 % of the base's utility
    "smallest_distance": _smallest_distance,  # smallest D
}


@compute_once
def rows_of(log: Log) -> Rows:
    """The rows of a log; of real authors and world facts where it has both.

    Raises:
        MissingMetricError: If the log lacks values of the forget or of the retain rows.
        ValueError: If a set's metrics are not of the same rows.
    """
    answered = "retain_Q_A_ROUGE" in log

    def columns(name: str) -> np.ndarray:
        parts = UTILITY[name] if answered else UTILITY[name][:2]
        logs.check_same_rows(log, *parts)
        return np.stack([aggregates.rows(log, metric) for metric in parts], axis=1)

    utility = {"retain": columns("retain")}
    with contextlib.suppress(MissingMetricError):
        utility |= {"ra": columns("ra"), "wf": columns("wf")}
    return Rows(logs.column(log, "forget_truth_ratio", "score"), utility)


def utility(*parts: Float[np.ndarray, "_ parts"]) -> float:
    """Harmonic mean of the means of all columns of all parts; 0 if one is 0.

    A part is probability, truth ratio and ROUGE of a set's rows, `[rows, 3]`, or the first two. One
    set's part is the retain utility, three sets' the model utility.
    """
    means = np.concatenate([part.mean(axis=0) for part in parts])
    return 0.0 if np.any(means == 0) else float(len(means) / np.sum(1 / means))


@compute_once
def log_utility(log: Log) -> float:
    """The `utility` of a log."""
    return utility(*rows_of(log).utility.values())


@compute_once
def utility_interval(log: Log) -> metrics.Interval:
    """The `utility` of a log with its 95 % bootstrap interval."""
    return metrics.bootstrap_interval(utility, *rows_of(log).utility.values())


def score(rows: Rows, retain_ratios: Float[np.ndarray, "retain_rows"]) -> Score:
    """Scores rows of a setting; the truth ratios are the retain model's on the same rows."""
    return Score(
        metrics.forget_quality(rows.truth_ratios, retain_ratios), utility(*rows.utility.values())
    )


def score_log(log: Log, retain_log: Log | None) -> Score:
    """Scores a log on all rows, against the retain model's log."""
    return Score(aggregates.forget_quality(log, retain_log), log_utility(log))


def half(count: int, group: int = 1, seed: int = 0) -> Bool[np.ndarray, "rows"]:
    """Which rows are in half A, `[rows]`.

    Rows of a group follow one another and stay together, such as the questions on one author:
    apart, each half would know the other's authors.
    """
    if group < 1 or (groups := -(-count // group)) < 2:
        raise ValueError(
            f"{count} rows in groups of {group} cannot be split in halves; use smaller groups"
        )
    chosen = np.random.default_rng(seed).permutation(groups) < groups // 2
    return np.repeat(chosen, group)[:count]


def cross_fit(
    candidates: Mapping[str, Sequence[Log]],
    base_log: Log,
    retain_log: Log,
    rule: str = "utility_given_quality",
    *,
    group: int = 1,
    seed: int = 0,
) -> CrossFit:
    """Chooses a setting, and scores the choosing on rows that had no say in it.

    `candidates` are the logs of each setting's seeds, in the same order everywhere; controls do not
    belong there. `rule` is a key of `RULES`. Rows of forget and retain stay together by `group`,
    see `half`; those of real authors and world facts are split one by one.

    Raises:
        MissingMetricError: If a log lacks what the scores need.
        ValueError: If there are no candidates, an unknown rule, or logs are of different rows.
    """
    if not candidates:
        raise ValueError("no settings to choose from; give at least one with a head")
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; expected one of {sorted(RULES)}")
    names = list(candidates)
    if len({len(candidates[name]) for name in names}) > 1:
        raise ValueError("candidates must have as many logs as there are seeds, all the same")
    ratios = logs.column(retain_log, "forget_truth_ratio", "score")
    logs.check_retain_log(base_log, retain_log)
    base = rows_of(base_log)
    for name in names:
        for log in candidates[name]:
            _read_rows(name, log, base, retain_log)

    def choose(side: bool | None) -> Choice:
        def score_seed(log: Log) -> Score:
            if side is None:
                return score_log(log, retain_log)
            return score(_part(rows_of(log), side, group, seed), chosen)

        chosen = ratios if side is None else ratios[_in_a(ratios, group, seed) == side]
        scores = [_median_seed([score_seed(log) for log in candidates[name]]) for name in names]
        index, passed = RULES[rule](scores, score_seed(base_log))
        return Choice(names[index], passed, scores[index])

    by_a, by_b = choose(True), choose(False)
    return CrossFit(
        rule=rule,
        halves=(by_a, by_b),
        held_out=tuple(
            held_out(a, b, retain_log, group=group, seed=seed)
            for a, b in zip(candidates[by_a.name], candidates[by_b.name], strict=True)
        ),
        overall=choose(None),
    )


def held_out(by_a: Log, by_b: Log, retain_log: Log, *, group: int = 1, seed: int = 0) -> HeldOut:
    """Scores a choice on all rows, each by the setting that was chosen without it.

    `by_a` is the log of the setting chosen on half A, which scores half B; `by_b` the other way.
    """
    logs.check_retain_log(by_a, retain_log)
    from_a = rows_of(by_a)
    from_b = _read_rows("the choice of half B", by_b, from_a, retain_log)
    in_a = _in_a(from_a.truth_ratios, group, seed)
    joined = Rows(
        np.where(in_a, from_b.truth_ratios, from_a.truth_ratios),
        {
            name: np.where(
                _utility_in_a(name, part, group, seed)[:, None], from_b.utility[name], part
            )
            for name, part in from_a.utility.items()
        },
    )
    return HeldOut(
        score(joined, logs.column(retain_log, "forget_truth_ratio", "score")),
        joined.utility_name,
        metrics.bootstrap_interval(utility, *joined.utility.values()),
    )


def _read_rows(name: str, log: Log, like: Rows, retain_log: Log) -> Rows:
    """Reads a log's rows, which must be as many as others, and the retain model's."""
    logs.check_retain_log(log, retain_log)
    rows = rows_of(log)
    shapes, expected = (
        {name: part.shape for name, part in of_log.utility.items()} for of_log in (rows, like)
    )
    if shapes != expected:
        raise ValueError(
            f"{name} has utility rows {shapes}, where {expected} was expected; evaluate all "
            "settings on the same sets"
        )
    return rows


def _median_seed(scores: Sequence[Score]) -> Score:
    """The score of middle D; of two, the farther."""
    return sorted(scores, key=lambda score: score.quality.statistic)[len(scores) // 2]


def _in_a(ratios: np.ndarray, group: int, seed: int) -> np.ndarray:
    return half(len(ratios), group, seed)


def _utility_in_a(name: str, part: np.ndarray, group: int, seed: int) -> np.ndarray:
    return half(len(part), group if name == "retain" else 1, seed + 1)


def _part(rows: Rows, side: bool, group: int, seed: int) -> Rows:
    return Rows(
        rows.truth_ratios[_in_a(rows.truth_ratios, group, seed) == side],
        {
            name: part[_utility_in_a(name, part, group, seed) == side]
            for name, part in rows.utility.items()
        },
    )
