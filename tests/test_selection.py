"""Cross-fitted selection, on made-up logs whose truth is known."""

import json

import numpy as np
import pytest

from t3jax.evaluation import selection
from t3jax.evaluation.logs import Log, Metric
from t3jax.report.choice import as_json, summary_rows

SETS = {
    "retain": ("_Q_A_Prob", 120),
    "ra": ("_Q_A_Prob_normalised", 40),
    "wf": ("_Q_A_Prob_normalised", 50),
}


def make_log(ratios, utility=0.8, names=("retain", "ra", "wf"), spread=0.0, seed=0):
    """A log with these truth ratios of the forget rows and about this in every utility part."""
    rng = np.random.default_rng(seed)
    made = {"forget_truth_ratio": Metric(0.5, {"score": np.asarray(ratios)})}
    for name in names:
        prob, rows = SETS[name]
        parts = np.clip(utility + spread * rng.standard_normal((3, rows)), 0.01, 1)
        made[name + prob] = Metric(0.0, {"prob": parts[0]})
        made[f"{name}_Q_A_ROUGE"] = Metric(0.0, {"rougeL_recall": parts[1]})
        # The metric is max(0, 1 - r) of the stored r.
        made[f"{name}_Truth_Ratio"] = Metric(0.0, {"score": 1 - parts[2]})
    return Log(made)


def cross_fit(candidates, retain_log, *args, base=None, **kwargs):
    """`selection.cross_fit` of one seed."""
    logs_of = {name: [log] for name, log in candidates.items()}
    base = next(iter(candidates.values()), retain_log) if base is None else base
    return selection.cross_fit(logs_of, base, retain_log, *args, **kwargs)


@pytest.fixture
def ratios():
    return np.random.default_rng(1).uniform(0.2, 1.5, 200)


def test_the_default_rule_takes_the_most_useful_of_those_that_forget(ratios):
    candidates = {
        "remembers": make_log(ratios + 3, utility=0.9),
        "useful": make_log(ratios * 1.01, utility=0.7),
        "useless": make_log(ratios, utility=0.3),
    }
    found = cross_fit(candidates, make_log(ratios))
    assert [choice.name for choice in (*found.halves, found.overall)] == ["useful"] * 3
    assert found.overall.passed
    assert found.held_out[0].utility_name == "model utility"
    assert found.held_out[0].score.utility == pytest.approx(0.7)
    assert found.held_out[0].score.quality.p_value > 0.9
    nearest = cross_fit(candidates, make_log(ratios), "smallest_distance")
    assert nearest.overall.name == "useless"
    assert nearest.held_out[0].score.quality.statistic == 0


def test_the_other_rule_takes_the_nearest_of_those_that_keep_the_utility(ratios):
    candidates = {
        "remembers": make_log(ratios + 3, utility=0.8),
        "near": make_log(ratios + 0.1, utility=0.79),
        "useless": make_log(ratios, utility=0.7),
    }
    base = make_log(ratios + 5, utility=0.8)
    found = cross_fit(candidates, make_log(ratios), "quality_given_utility", base=base)
    assert (found.overall.name, found.overall.passed) == ("near", True)
    base = make_log(ratios + 5, utility=0.9)
    found = cross_fit(candidates, make_log(ratios), "quality_given_utility", base=base)
    assert (found.overall.name, found.overall.passed) == ("remembers", False)


def test_a_setting_is_worth_its_median_seed_and_every_seed_is_scored(ratios):
    lucky = [make_log(ratios + shift) for shift in (0, 3, 4)]
    steady = [make_log(ratios + shift) for shift in (0.02, 0.04, 0.06)]
    found = selection.cross_fit(
        {"lucky": lucky, "steady": steady}, make_log(ratios), make_log(ratios), "smallest_distance"
    )
    assert {choice.name for choice in (*found.halves, found.overall)} == {"steady"}
    distances = [each.score.quality.statistic for each in found.held_out]
    assert len(distances) == 3
    assert distances == sorted(distances)
    labels = [label for label, _, _ in summary_rows(found)]
    assert "forget quality, cross-fitted, seed 3 of 3" in labels
    with pytest.raises(ValueError, match="log for each seed"):
        selection.cross_fit({"a": lucky, "b": lucky[:2]}, lucky[0], make_log(ratios))


def test_the_choice_can_be_scored_again_by_other_logs_of_the_same_rows(ratios):
    metrics = dict(make_log(ratios + 1, names=("retain",)).metrics)
    del metrics["retain_Q_A_ROUGE"]
    scored = {name: Log(metrics) for name in "ab"}
    found = cross_fit(scored, make_log(ratios), group=20)
    assert found.held_out[0].utility_name == "retain utility without ROUGE"
    again = selection.held_out(make_log(ratios), make_log(ratios), make_log(ratios), group=20)
    assert again.utility_name == "model utility"
    assert again.score.quality.statistic == 0


def test_where_nothing_forgets_the_nearest_is_taken_and_marked(ratios):
    candidates = {"far": make_log(ratios + 9), "near": make_log(ratios + 0.5)}
    found = cross_fit(candidates, make_log(ratios))
    assert (found.overall.name, found.overall.passed) == ("near", False)
    assert "no setting met the rule's condition" in str(summary_rows(found))


def test_rows_never_leak_between_halves(ratios):
    rng = np.random.default_rng(2)
    candidates = {f"s{i}": make_log(ratios + rng.normal(0, 0.3, 200)) for i in range(5)}
    before = cross_fit(candidates, make_log(ratios), "smallest_distance")
    in_a = selection.half(200)
    for i, (name, log) in enumerate(candidates.items()):  # all that half B says is turned round
        scores = log["forget_truth_ratio"].columns["score"] + 0.4 * (5 - i) * ~in_a
        turned = {"forget_truth_ratio": Metric(0.5, {"score": scores})}
        candidates[name] = Log({**log.metrics, **turned})
    after = cross_fit(candidates, make_log(ratios), "smallest_distance")
    assert after.halves[0] == before.halves[0]
    assert after.halves[1].name != before.halves[1].name


def test_choosing_among_equals_flatters_and_cross_fitting_does_not(ratios):
    """Sixty settings that differ by luck alone: their true utility is 0.5."""
    optimistic, honest = [], []
    for run in range(20):
        candidates = {
            f"s{i}": make_log(ratios, 0.5, spread=0.3, seed=60 * run + i) for i in range(60)
        }
        found = cross_fit(candidates, make_log(ratios), seed=run)
        optimistic.append(found.overall.score.utility)
        honest.append(found.held_out[0].score.utility)
    true = np.mean(
        [selection.utility(*selection.rows_of(log).utility.values()) for log in candidates.values()]
    )
    assert np.mean(optimistic) > true + 0.01
    assert abs(np.mean(honest) - true) < 0.005


def test_halves_keep_groups_together():
    in_a = selection.half(90, group=20, seed=3)
    groups = [set(in_a[i : i + 20]) for i in range(0, 90, 20)]
    assert all(len(each) == 1 for each in groups)
    assert sum(True in each for each in groups) == 2
    np.testing.assert_array_equal(in_a, selection.half(90, group=20, seed=3))
    assert (in_a != selection.half(90, group=20, seed=4)).any()
    with pytest.raises(ValueError, match="20 rows in groups of 20"):
        selection.half(20, group=20)


def test_without_other_sets_it_is_retain_utility(ratios):
    candidates = {"one": make_log(ratios, 0.6, names=("retain",))}
    found = cross_fit(candidates, make_log(ratios), group=20)
    assert found.held_out[0].utility_name == "retain utility"
    assert found.held_out[0].score.utility == pytest.approx(0.6)
    rows = dict((label, value) for label, value, _ in summary_rows(found))
    assert rows["retain utility, cross-fitted"] == "0.600"
    json.dumps(as_json(found))


def test_what_cannot_be_compared_is_refused(ratios):
    retain = make_log(ratios)
    with pytest.raises(ValueError, match="no settings to choose from"):
        cross_fit({}, retain)
    with pytest.raises(ValueError, match="unknown rule 'best'"):
        cross_fit({"a": make_log(ratios)}, retain, "best")
    with pytest.raises(ValueError, match="another forget split"):
        cross_fit({"a": make_log(ratios[:100])}, retain)
    some = make_log(ratios, names=("retain",))
    with pytest.raises(ValueError, match="the same sets"):
        cross_fit({"a": make_log(ratios), "b": some}, retain)
