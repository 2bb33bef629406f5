"""Choosing T, s and the head without flattering the choice: cross-fitting over logs.

Whoever tries many settings and reports the best one's number reports luck too. Here the rows are
split in halves A and B: the setting chosen on A is scored on B, that chosen on B on A, and the two
scored halves are joined. Every row is thus scored by a setting it had no say in, and one
Kolmogorov-Smirnov test over all rows keeps its power; a half alone has too little for p > 0.05 to
prove anything. No model is needed: all numbers come from the per-row values of logs.

References:
    Cross-fitting: arXiv 1608.00060. TOFU, arXiv 2401.06121, forget quality and model utility.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from t3jax.evaluation import logs, metrics, recompute
from t3jax.evaluation.logs import Log, MissingMetricError

_UTILITY = {
    "retain": ("retain_Q_A_Prob", "retain_Q_A_ROUGE", "retain_Truth_Ratio"),
    "ra": ("ra_Q_A_Prob_normalised", "ra_Q_A_ROUGE", "ra_Truth_Ratio"),
    "wf": ("wf_Q_A_Prob_normalised", "wf_Q_A_ROUGE", "wf_Truth_Ratio"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """What a setting's log says of each row.

    Attributes:
        truth_ratios: Of the forget rows, `[rows]`.
        utility: By set (retain, and ra and wf where the log has both), probability, ROUGE and truth
            ratio, `[rows, 3]`.
    """

    truth_ratios: Float[np.ndarray, "rows"]
    utility: dict[str, Float[np.ndarray, "_ 3"]]

    @property
    def utility_name(self) -> str:
        """`model utility`, or `retain utility` where there are no other sets than retain."""
        return "model utility" if len(self.utility) == len(_UTILITY) else "retain utility"


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a setting forgets, and what it keeps.

    Attributes:
        quality: The test of the forget rows against the retain model's.
        utility: Harmonic mean of the utility parts: nine, or the retain set's three.
    """

    quality: metrics.ForgetQuality
    utility: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """A setting that was chosen.

    Attributes:
        name: The setting.
        passed: Whether it meets the rule's condition; if none does, the nearest is taken.
        score: On the rows it was chosen on: optimistic.
    """

    name: str
    passed: bool
    score: Score


@dataclasses.dataclass(frozen=True)
class CrossFit:
    """A choice, and what it is worth on rows that had no say in it.

    Attributes:
        rule: How settings were ranked.
        utility_name: What `utility` is: model utility or retain utility.
        halves: What was chosen on half A and on half B.
        held_out: The joined halves, each scored by the setting chosen on the other.
        utility_interval: 95 % bootstrap interval of their utility.
        overall: What is chosen on all rows, for use; its score there is optimistic.
    """

    rule: str
    utility_name: str
    halves: tuple[Choice, Choice]
    held_out: Score
    utility_interval: metrics.Interval
    overall: Choice


def _utility_given_quality(scores: Sequence[Score]) -> tuple[int, bool]:
    passing = [i for i, each in enumerate(scores) if each.quality.p_value > 0.05]
    if passing:
        return max(passing, key=lambda i: scores[i].utility), True
    nearest = max(
        range(len(scores)), key=lambda i: (scores[i].quality.p_value, -scores[i].quality.statistic)
    )
    return nearest, False


def _smallest_distance(scores: Sequence[Score]) -> tuple[int, bool]:
    nearest = min(range(len(scores)), key=lambda i: scores[i].quality.statistic)
    return nearest, scores[nearest].quality.p_value > 0.05


# A rule maps scores to the index of the best one, and whether that one meets the rule's condition.
RULES: dict[str, Callable[[Sequence[Score]], tuple[int, bool]]] = {
    "utility_given_quality": _utility_given_quality,  # highest utility where forget quality > 0.05
    "smallest_distance": _smallest_distance,  # smallest D
}


def rows_of(log: Log) -> Rows:
    """Reads a log's per-row values.

    Args:
        log: A checked log.

    Returns:
        The rows; of real authors and world facts where the log has both.

    Raises:
        MissingMetricError: If the log lacks values of the forget or of the retain rows.
        ValueError: If a set's metrics are not of the same rows.
    """

    def columns(name: str) -> np.ndarray:
        logs.check_same_rows(log, *_UTILITY[name])
        return np.stack([recompute.rows(log, metric) for metric in _UTILITY[name]], axis=1)

    utility = {"retain": columns("retain")}
    with contextlib.suppress(MissingMetricError):
        utility |= {"ra": columns("ra"), "wf": columns("wf")}
    return Rows(logs.column(log, "forget_truth_ratio", "score"), utility)


def utility(*parts: Float[np.ndarray, "_ 3"]) -> float:
    """Harmonic mean of the means of all columns of all parts, as model utility has it.

    Args:
        *parts: Probability, ROUGE and truth ratio of a set's rows, `[rows, 3]`; one part is the
            retain utility, three are the model utility.

    Returns:
        In [0, 1]; 0 if any mean is 0.
    """
    means = np.concatenate([part.mean(axis=0) for part in parts])
    return 0.0 if np.any(means == 0) else float(len(means) / np.sum(1 / means))


def score(rows: Rows, retain_ratios: Float[np.ndarray, "retain_rows"]) -> Score:
    """Scores rows.

    Args:
        rows: Of a setting.
        retain_ratios: Truth ratios of the retain model on the same forget rows.

    Returns:
        The score.
    """
    return Score(
        metrics.forget_quality(rows.truth_ratios, retain_ratios), utility(*rows.utility.values())
    )


def half(count: int, group: int = 1, seed: int = 0) -> Bool[np.ndarray, "rows"]:
    """Which rows are in half A.

    Args:
        count: Number of rows.
        group: Rows that follow one another and stay together, such as the questions on one author:
            apart, each half would know the other's authors.
        seed: Of the split.

    Returns:
        True for rows of half A, `[rows]`.

    Raises:
        ValueError: If there are fewer than two groups.
    """
    if group < 1 or (groups := -(-count // group)) < 2:
        raise ValueError(
            f"{count} rows in groups of {group} cannot be split in halves; use smaller groups"
        )
    chosen = np.random.default_rng(seed).permutation(groups) < groups // 2
    return np.repeat(chosen, group)[:count]


def cross_fit(
    candidates: Mapping[str, Log],
    retain_log: Log,
    rule: str = "utility_given_quality",
    *,
    group: int = 1,
    seed: int = 0,
) -> CrossFit:
    """Chooses a setting, and scores the choosing on rows that had no say in it.

    Args:
        candidates: Logs of the settings to choose from, by name; controls do not belong here.
        retain_log: The retain model's log.
        rule: A key of `RULES`.
        group: Rows of forget and retain that stay together; see `half`. Rows of real authors and
            world facts are split one by one.
        seed: Of the split.

    Returns:
        The choice and its honest score.

    Raises:
        MissingMetricError: If a log lacks what the scores need.
        ValueError: If there are no candidates, an unknown rule, or logs are of different rows.
    """
    if not candidates:
        raise ValueError("no settings to choose from; give at least one with a head")
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; expected one of {sorted(RULES)}")
    names = list(candidates)
    for name in names:
        logs.check_retain_log(candidates[name], retain_log)
    table = [rows_of(candidates[name]) for name in names]
    for name, rows in zip(names, table, strict=True):
        shapes, first = ({k: len(v) for k, v in r.utility.items()} for r in (rows, table[0]))
        if shapes != first:
            raise ValueError(
                f"{name} has utility rows {shapes} and {names[0]} has {first}; evaluate all "
                "settings on the same sets"
            )
    ratios = logs.column(retain_log, "forget_truth_ratio", "score")
    in_a = half(len(ratios), group, seed)
    utility_in_a = {
        name: half(len(part), group if name == "retain" else 1, seed + 1)
        for name, part in table[0].utility.items()
    }

    def part(rows: Rows, side: bool) -> Rows:
        return Rows(
            rows.truth_ratios[in_a == side],
            {name: rows.utility[name][mask == side] for name, mask in utility_in_a.items()},
        )

    def choose(sides: list[Rows], retain_ratios: np.ndarray) -> tuple[int, Choice]:
        scores = [score(rows, retain_ratios) for rows in sides]
        index, passed = RULES[rule](scores)
        return index, Choice(names[index], passed, scores[index])

    by_a, on_a = choose([part(rows, True) for rows in table], ratios[in_a])
    by_b, on_b = choose([part(rows, False) for rows in table], ratios[~in_a])
    from_a, from_b = table[by_a], table[by_b]  # A's choice scores B and the other way round
    joined = Rows(
        np.where(in_a, from_b.truth_ratios, from_a.truth_ratios),
        {
            name: np.where(mask[:, None], from_b.utility[name], from_a.utility[name])
            for name, mask in utility_in_a.items()
        },
    )
    return CrossFit(
        rule=rule,
        utility_name=joined.utility_name,
        halves=(on_a, on_b),
        held_out=score(joined, ratios),
        utility_interval=metrics.bootstrap_interval(utility, *joined.utility.values()),
        overall=choose(table, ratios)[1],
    )


def summary_rows(
    found: CrossFit, noise_floor: metrics.ForgetQuality | None = None
) -> list[tuple[str, str, str]]:
    """A cross-fit for people: label, value, what it means.

    Args:
        found: The cross-fit.
        noise_floor: The test between two retain models, if there are two.

    Returns:
        Rows of a table.
    """

    def tested(quality: metrics.ForgetQuality) -> str:
        return f"p = {quality.p_value:.3g}, D = {quality.statistic:.3f}"

    def chosen(choice: Choice) -> tuple[str, str]:
        met = "" if choice.passed else "; no setting met the rule's condition, this one is nearest"
        optimistic = f"{tested(choice.score.quality)}, utility {choice.score.utility:.3f}"
        return choice.name, f"on the rows that chose it: {optimistic}{met}"

    held_out, interval = found.held_out, found.utility_interval
    table = [
        ("chosen on half A", *chosen(found.halves[0])),
        ("chosen on half B", *chosen(found.halves[1])),
        (
            "forget quality, cross-fitted",
            tested(held_out.quality),
            f"all rows, each scored by a setting chosen without it; at D above "
            f"{held_out.quality.critical:.3f} p falls under 0.05",
        ),
        (
            f"{found.utility_name}, cross-fitted",
            f"{held_out.utility:.3f}",
            f"95 % interval {interval.low:.3f} to {interval.high:.3f}",
        ),
        ("chosen on all rows, to use", *chosen(found.overall)),
    ]
    if noise_floor is not None:
        note = f"two retain models against each other; critical D {noise_floor.critical:.3f}"
        table.append(("noise floor", tested(noise_floor), note))
    return table


def as_json(found: CrossFit, noise_floor: metrics.ForgetQuality | None = None) -> dict[str, Any]:
    """A cross-fit as plain nested values.

    Args:
        found: The cross-fit.
        noise_floor: The test between two retain models, if there are two.

    Returns:
        The fields by name.
    """
    floor = None if noise_floor is None else dataclasses.asdict(noise_floor)
    return {**dataclasses.asdict(found), "noise_floor": floor}
