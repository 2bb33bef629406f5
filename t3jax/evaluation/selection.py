"""The choice of T, s and the head by cross-fitting over logs, so that its score is unbiased.

The best number of many settings contains luck. Here the rows are split in halves A and B: the
setting chosen on A is scored on B, the setting chosen on B is scored on A, and the two scored
halves are joined. No row takes part in the choice of the setting that scores it, and one
Kolmogorov-Smirnov test over all rows keeps its power; on a half alone, p > 0.05 proves nothing. A
setting may have heads of several seeds: it is chosen by its median seed, and no seed is chosen. No
model is needed: all numbers come from the per-row values of logs.

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

_LEAST_UTILITY = 0.97  # of the base model's utility, in "quality_given_utility"


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
    """Forget quality of a setting, and the harmonic mean of its utility parts."""

    quality: metrics.ForgetQuality
    utility: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """A setting that was chosen.

    Attributes:
        name: The setting.
        passed: Whether it meets the rule's condition; if none does, the nearest is chosen.
        score: The optimistic score of its median seed on the rows that it was chosen on.
    """

    name: str
    passed: bool
    score: Score


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The held-out score of a choice.

    Attributes:
        score: Score of the joined halves, each scored by the setting chosen on the other.
        utility_name: `Rows.utility_name` of the joined halves.
        utility_interval: 95 % bootstrap interval of the utility.
    """

    score: Score
    utility_name: str
    utility_interval: metrics.Interval


@dataclasses.dataclass(frozen=True)
class CrossFit:
    """A choice and its held-out score.

    Attributes:
        rule: A key of `RULES`.
        halves: The choices on half A and on half B.
        held_out: The unbiased scores, one for each seed.
        overall: The choice on all rows, to serve; its own score is optimistic.
    """

    rule: str
    halves: tuple[Choice, Choice]
    held_out: tuple[HeldOut, ...]
    overall: Choice


# A rule maps the scores of all settings, and the base model's, to the index of the best setting,
# and whether it meets the rule's condition.
Rule = Callable[[Sequence[Score], Score], tuple[int, bool]]


def _find_nearest(scores: Sequence[Score]) -> int:
    return min(range(len(scores)), key=lambda i: (scores[i].quality.statistic, -scores[i].utility))


def _maximize_utility(scores: Sequence[Score], base: Score) -> tuple[int, bool]:
    passing = [i for i, score in enumerate(scores) if score.quality.p_value > 0.05]
    if passing:
        return max(passing, key=lambda i: scores[i].utility), True
    return _find_nearest(scores), False


def _minimize_distance_at_utility(scores: Sequence[Score], base: Score) -> tuple[int, bool]:
    passing = [
        i for i, score in enumerate(scores) if score.utility >= _LEAST_UTILITY * base.utility
    ]
    if passing:
        return passing[_find_nearest([scores[i] for i in passing])], True
    return max(range(len(scores)), key=lambda i: scores[i].utility), False


def _minimize_distance(scores: Sequence[Score], base: Score) -> tuple[int, bool]:
    nearest = _find_nearest(scores)
    return nearest, scores[nearest].quality.p_value > 0.05


RULES: dict[str, Rule] = {
    "utility_given_quality": _maximize_utility,  # highest utility where forget quality > 0.05
    "quality_given_utility": _minimize_distance_at_utility,  # smallest D at 97 % base utility
    "smallest_distance": _minimize_distance,  # smallest D
}


@compute_once
def rows_of(log: Log) -> Rows:
    """The rows of a log, with real authors and world facts if it has both.

    A log without values of the forget or the retain rows raises a MissingMetricError.
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

    A part is probability, truth ratio and ROUGE of a set's rows, `[rows, 3]`, or the first two. The
    retain set gives the retain utility, all three sets the model utility.
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
    """Scores rows of a setting against the retain model's truth ratios on the same rows."""
    return Score(
        metrics.forget_quality(rows.truth_ratios, retain_ratios), utility(*rows.utility.values())
    )


def score_log(log: Log, retain_log: Log | None) -> Score:
    """Scores a log on all rows, against the retain model's log."""
    return Score(aggregates.forget_quality(log, retain_log), log_utility(log))


def half(count: int, group: int = 1, seed: int = 0) -> Bool[np.ndarray, "rows"]:
    """Which rows are in half A, `[rows]`.

    Consecutive rows of a group, such as the questions on one author, stay together: otherwise
    both halves would have the same authors.
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
    """Chooses a setting, and scores the choice on held-out rows.

    `candidates` are the logs of each setting's seeds, in the same order everywhere, without
    controls. `rule` is a key of `RULES`. Rows of forget and retain stay together by `group`, see
    `half`; real authors and world facts are split row by row.

    Raises:
        MissingMetricError: If a log lacks what the scores need.
        ValueError: If there are no candidates, the rule is unknown, or logs are of different rows.
    """
    if not candidates:
        raise ValueError("no settings to choose from; give at least one with a head")
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; expected one of {sorted(RULES)}")
    names = list(candidates)
    if len(counts := {len(candidates[name]) for name in names}) > 1:
        raise ValueError(f"each candidate needs a log for each seed; numbers of logs are {counts}")
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
            return score(_take_half(rows_of(log), side, group, seed), chosen)

        chosen = ratios if side is None else ratios[half(len(ratios), group, seed) == side]
        scores = [_take_median([score_seed(log) for log in candidates[name]]) for name in names]
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
    """Scores a choice on all rows, each under the setting that was chosen without it.

    `by_a` is the log of the setting chosen on half A, which scores half B; `by_b` scores half A.
    """
    logs.check_retain_log(by_a, retain_log)
    from_a = rows_of(by_a)
    from_b = _read_rows("the choice of half B", by_b, from_a, retain_log)
    in_a = half(len(from_a.truth_ratios), group, seed)
    joined = Rows(
        np.where(in_a, from_b.truth_ratios, from_a.truth_ratios),
        {
            name: np.where(
                _split_part(name, part, group, seed)[:, None], from_b.utility[name], part
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
    """Reads a log's rows, which must agree with the retain model's and in number with `like`."""
    logs.check_retain_log(log, retain_log)
    rows = rows_of(log)
    shapes, expected = (
        {name: part.shape for name, part in parts.utility.items()} for parts in (rows, like)
    )
    if shapes != expected:
        raise ValueError(
            f"{name} has utility rows {shapes}, expected {expected}; evaluate all settings on the "
            "same sets"
        )
    return rows


def _take_median(scores: Sequence[Score]) -> Score:
    """The score of median D; of an even number, the larger of the middle two."""
    return sorted(scores, key=lambda score: score.quality.statistic)[len(scores) // 2]


def _split_part(name: str, part: np.ndarray, group: int, seed: int) -> np.ndarray:
    """Which rows of a utility part are in half A."""
    return half(len(part), group if name == "retain" else 1, seed + 1)


def _take_half(rows: Rows, side: bool, group: int, seed: int) -> Rows:
    return Rows(
        rows.truth_ratios[half(len(rows.truth_ratios), group, seed) == side],
        {
            name: part[_split_part(name, part, group, seed) == side]
            for name, part in rows.utility.items()
        },
    )
