import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from t3jax.evaluation import aggregates, log_files, logs, metrics, recompute
from t3jax.evaluation.logs import Log, Metric

MEMBERSHIP = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus")


def make_log(seed: int = 0, rows: int = 40, retain_log: Log | None = None) -> Log:
    """A whole log of made-up numbers and texts, consistent in itself."""
    rng = np.random.default_rng(seed)
    made: dict[str, Metric] = {}
    log = Log(made)

    def add(metric, **columns):
        made[metric] = Metric(0.0, columns)

    for prefix, count, wrong in (
        ("forget", rows, 5),
        ("retain", 12, 5),
        ("ra", 9, 3),
        ("wf", 8, 3),
    ):
        for kind, shape in (("", count), ("_PARA", count), ("_PERT", (count, wrong))):
            loss = rng.exponential(1.0, shape)
            add(f"{prefix}_Q_A{kind}_Prob", avg_loss=loss, prob=metrics.probability(loss))
        truths = [f"the answer of row {row} is {row * row}" for row in range(count)]
        said = [truth[: rng.integers(len(truth))] for truth in truths]
        scores = metrics.rouge_scores(truths, said)
        add(f"{prefix}_Q_A_ROUGE", **scores, ground_truth=truths, generation=said)
    for metric in ("forget_truth_ratio", "retain_Truth_Ratio", "ra_Truth_Ratio", "wf_Truth_Ratio"):
        add(metric, score=aggregates.truth_ratios(log, metric))
    for metric in ("ra_Q_A_Prob_normalised", "wf_Q_A_Prob_normalised"):
        add(metric, prob=aggregates.normalised_probabilities(log, metric))
    add("exact_memorization", score=np.where(np.arange(rows) == 3, np.nan, rng.random(rows)))
    add("extraction_strength", score=rng.random(rows))
    for metric in made:
        value = aggregates.aggregate(log, metric)
        made[metric] = dataclasses.replace(made[metric], aggregate=value)
    for metric in MEMBERSHIP:
        forget, holdout = rng.random(rows), rng.random(rows) + 0.2
        made |= aggregates.membership_metric(metric, forget, holdout)
    for metric in ("model_utility", "privleak"):
        made[metric] = Metric(aggregates.aggregate(log, metric, retain_log))
    if retain_log is None:
        return Log(made, {"forget_quality": "no retain log was named"})
    made["forget_quality"] = Metric(aggregates.aggregate(log, "forget_quality", retain_log))
    return Log(made)


def to_json(log: Log) -> dict:
    """The content of a log's file."""
    return json.loads(json.dumps(log_files._make_entries(log, [*log, *log.missing])))


def change(log: Log, *path, by: Callable) -> Log:
    """A log of which one place of its JSON is changed."""
    content = place = to_json(log)
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = by(place[path[-1]])
    return log_files.parse_log(content, "log")


def without(log: Log, *names: str, **missing: str) -> Log:
    """A log without some metrics, or with the reason why they are missing."""
    gone = {*names, *missing}
    kept = {name: metric for name, metric in log.metrics.items() if name.split("/")[0] not in gone}
    return Log(kept, {**log.missing, **missing})


@pytest.fixture(scope="module")
def retain_log() -> Log:
    return make_log(1)


@pytest.fixture(scope="module")
def log(retain_log) -> Log:
    return make_log(0, retain_log=retain_log)


def named(comparisons: list[recompute.Comparison]) -> dict[str, recompute.Comparison]:
    return {each.name: each for each in comparisons}


def test_official_logs_recompute(shared: pathlib.Path):
    folder = shared / "data" / "tofu_logs"
    full = log_files.read_log(folder / "Llama-3.2-1B-Instruct_full_forget10")
    retain = log_files.read_log(folder / "Llama-3.2-1B-Instruct_retain90")

    for each, its_retain_log in ((full, retain), (retain, None)):
        found = recompute.recompute(each, its_retain_log)
        missing = {c.name for c in found if c.recomputed is None}
        assert missing == ({"forget_quality"} if its_retain_log is None else set())
        assert not [c for c in found if c.differs], recompute.format_comparisons(found)
        assert set(each) <= set(named(found))
    quality = named(recompute.recompute(full, retain))["forget_quality"]
    assert quality.recomputed == pytest.approx(3.9054713571083378e-22, rel=1e-9, abs=0)


def test_official_logs_survive_reading_and_writing(shared: pathlib.Path, tmp_path: pathlib.Path):
    folder = shared / "data" / "tofu_logs" / "Llama-3.2-1B-Instruct_retain90"
    log_files.write_log(tmp_path, log_files.read_log(folder))
    for name in (log_files.EVAL_NAME, log_files.SUMMARY_NAME):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        log_files.EVAL_NAME,
        log_files.SUMMARY_NAME,
    ]


def test_official_log_without_retain_log_says_so(shared: pathlib.Path):
    full = log_files.read_log(shared / "data" / "tofu_logs" / "Llama-3.2-1B-Instruct_full_forget10")
    found = recompute.recompute(full)
    assert {c.name: c.note for c in found if c.recomputed is None} == {
        "forget_quality": "it needs the retain model's log",
        "privleak": "it needs the retain model's log",
    }


def test_own_log_round_trip(log, retain_log, tmp_path):
    log_files.write_log(tmp_path / "new", log)
    again = log_files.read_log(tmp_path / "new")
    assert to_json(again) == to_json(log)
    assert log_files.read_summary(tmp_path / "new") == logs.summarize(log)
    found = recompute.recompute(again, retain_log)
    assert not [c for c in found if c.differs or c.recomputed is None], (
        recompute.format_comparisons(found)
    )
    assert to_json(again)["exact_memorization"]["value_by_index"]["3"] == {"score": None}
    assert len(aggregates.rows(again, "exact_memorization")) == 39


@pytest.mark.parametrize("metric", [
    "forget_quality", "model_utility", "privleak", "forget_truth_ratio", "wf_Truth_Ratio",
    "forget_Q_A_PERT_Prob", "ra_Q_A_Prob_normalised", "retain_Q_A_ROUGE", "mia_min_k",
    "exact_memorization", "extraction_strength",
])  # fmt: skip
def test_recompute_finds_a_wrong_aggregate(log, retain_log, metric):
    log = change(log, metric, "agg_value", by=lambda value: value * (1 + 2e-9))
    assert [c.name for c in recompute.recompute(log, retain_log) if c.differs] == [metric]


@pytest.mark.parametrize(("metric", "field", "row"), [
    ("forget_truth_ratio", "score", "7"),
    ("ra_Q_A_Prob_normalised", "prob", "2"),
    ("forget_Q_A_Prob", "prob", "5"),
    ("wf_Q_A_ROUGE", "rougeL_recall", "1"),
])  # fmt: skip
def test_recompute_finds_a_wrong_row(log, retain_log, metric, field, row):
    log = change(log, metric, "value_by_index", row, field, by=lambda value: value + 0.01)
    found = named(recompute.recompute(log, retain_log))
    assert found[f"{metric}, {field} of row {row}"].differs
    assert found[metric].differs


def test_rows_whose_probability_vanishes_in_float32_are_no_difference(log, retain_log):
    columns = {"avg_loss": np.full(40, 120.0), "prob": np.zeros(40)}
    log = Log({**log.metrics, "forget_Q_A_Prob": Metric(0.0, columns)})
    found = named(recompute.recompute(log, retain_log))
    assert not found["forget_Q_A_Prob, prob of row 0"].differs


@pytest.mark.parametrize("rows", [20, 39])
def test_retain_log_of_another_split(log, rows):
    other = make_log(2, rows=rows)
    for call in (recompute.recompute, lambda a, b: aggregates.aggregate(a, "forget_quality", b)):
        with pytest.raises(ValueError, match=f"another forget split: it has {rows} .* the log 40"):
            call(log, other)


def test_retain_log_of_other_answers_but_as_many(log, retain_log):
    place = ("forget_Q_A_ROUGE", "value_by_index", "4", "ground_truth")
    other = change(retain_log, *place, by=lambda text: f" {text.replace(' ', '  ')}")
    logs.check_retain_log(log, other)
    other = change(retain_log, *place, by=lambda text: "something else")
    with pytest.raises(ValueError, match="right answer of forget row 4 differs"):
        recompute.recompute(log, other)


def test_retain_log_of_other_indices(log, retain_log):
    other = change(
        retain_log,
        "forget_truth_ratio",
        "value_by_index",
        by=lambda rows: {str(int(row) or 40): fields for row, fields in rows.items()},
    )
    with pytest.raises(ValueError, match="40 forget rows, the log 40, other indices"):
        logs.check_retain_log(log, other)


def test_retain_log_without_what_is_needed(log, retain_log):
    other = without(retain_log, "forget_truth_ratio", "mia_min_k")
    found = named(recompute.recompute(log, other))
    for metric, lacks in (("forget_quality", "forget_truth_ratio"), ("privleak", "mia_min_k")):
        assert found[metric].recomputed is None
        assert found[metric].note == f"the retain log cannot be used: {lacks} is missing"


def test_missing_metrics_are_never_numbers(log, retain_log):
    log = without(log, "ra_Q_A_ROUGE", "ra_Q_A_PERT_Prob")
    log = without(log, **dict.fromkeys(MEMBERSHIP, "no holdout set was named"))
    found = named(recompute.recompute(log, retain_log))
    assert {name: c.note for name, c in found.items() if c.recomputed is None} == {
        "model_utility": "ra_Q_A_ROUGE is missing",
        "ra_Truth_Ratio, rows": "ra_Q_A_PERT_Prob is missing",
        "ra_Q_A_Prob_normalised, rows": "ra_Q_A_PERT_Prob is missing",
        "privleak": "mia_min_k is missing: no holdout set was named",
    }
    assert not set(MEMBERSHIP) & set(logs.summarize(log))


def test_missing_reasons_go_when_the_metric_comes(log, tmp_path):
    lacking = without(
        log, mia_loss="no holdout set was named", forget_quality="no retain log was named"
    )
    log_files.write_log(tmp_path, lacking)
    again = log_files.read_log(tmp_path)
    assert to_json(again)["forget_quality"] == {"agg_value": None}
    assert set(logs.missing_reasons(again)) == {"mia_loss", "forget_quality"}
    again = Log({**again.metrics, "mia_loss": log["mia_loss"]}, again.missing)
    assert set(logs.missing_reasons(again)) == {"forget_quality"}


def test_metric_without_per_example_values_or_definition(log, retain_log):
    made = {name: metric for name, metric in log.metrics.items() if name != "mia_loss/holdout"}
    log = Log({**made, "forget_Q_A_gibberish": Metric(0.5)})
    found = named(recompute.recompute(log, retain_log))
    assert found["mia_loss"].note == "mia_loss has no per-example values for holdout"
    assert "not known" in found["forget_Q_A_gibberish"].note


def test_combined_metrics_of_other_rows(log):
    log = change(
        log,
        "ra_Q_A_PERT_Prob",
        "value_by_index",
        by=lambda rows: {row: fields for row, fields in rows.items() if row != "0"},
    )
    with pytest.raises(ValueError, match="ra_Q_A_Prob has 9 rows and ra_Q_A_PERT_Prob 8"):
        aggregates.truth_ratios(log, "ra_Truth_Ratio")


def test_rows_are_ordered_by_index(log):
    want = logs.column(log, "forget_truth_ratio", "score")
    log = change(
        log,
        "forget_truth_ratio",
        "value_by_index",
        by=lambda rows: dict(sorted(rows.items())),  # "10" before "2"
    )
    np.testing.assert_array_equal(logs.column(log, "forget_truth_ratio", "score"), want)


def _set(path, value):
    def change(log):
        *parents, last = path
        for key in parents:
            log = log[key]
        log[last] = value

    return change


PERT = ("forget_Q_A_PERT_Prob", "value_by_index", "2")


@pytest.mark.parametrize(("change", "message"), [
    (_set((*PERT, "prob"), [0.1] * 4), "row 2.* unequal numbers of answers"),
    (_set(PERT, {"avg_loss": [1.0] * 4, "prob": [0.1] * 4}), "row 2.*: 4 wrong answers, but 5"),
    (_set((*PERT, "avg_loss", 1), float("nan")),
     r"PERT_Prob, row 2, avg_loss is nan|PERT_Prob.value_by_index.2.avg_loss\[1\]: NaN"),
    (_set(("mia_loss", "holdout", "value_by_index", "3", "score"), float("inf")),
     r"mia_loss, holdout, row 3, score is inf|mia_loss.holdout.*score: infinite"),
    (_set(("model_utility", "agg_value"), float("nan")),
     "model_utility, agg_value is nan|model_utility.agg_value: NaN"),
    (_set(("forget_truth_ratio", "value_by_index", "3", "score"), None), "number, got null"),
    (_set(("forget_truth_ratio", "value_by_index", "3"), {"prob": 1.0}), r"row 3: has .*'prob'"),
    (_set(("forget_truth_ratio", "value_by_index"), {}), "expected rows by index"),
    (_set(("forget_truth_ratio", "value_by_index", "x"), {"score": 1.0}), "row 'x'"),
    (_set(("forget_truth_ratio", "value_by_index", "07"), {"score": 1.0}), "row '07'"),
    (_set(("forget_truth_ratio", "value_by_index", "٣"), {"score": 1.0}), "row '٣'"),
    (_set(("forget_truth_ratio", "value_by_index", "9" * 5000), {"score": 1.0}), "row '9{40}':"),
    (_set(("forget_truth_ratio", "value_by_index", "3", "score"), True), "a number, got True"),
    (_set(("forget_Q_A_Prob", "value_by_index", "3", "prob"), 1.5), "prob is 1.5, expected a sh"),
    (_set(("forget_Q_A_Prob", "value_by_index", "3", "avg_loss"), -0.5), "expected a loss of at"),
    (_set(("mia_loss", "auc"), -0.5), "mia_loss, auc is -0.5, expected a share"),
    (_set(("forget_truth_ratio", "value_by_index", "3", "score"), 1e200), "at most 1e.150"),
    (_set(("missing", ), {"agg_value": None, "reasons": ["a"]}), "missing: expected reasons"),
    (_set(("missing", ), {"agg_value": None, "reasons": {"a": 1}}), "missing: expected reasons"),
    (_set(("forget_Q_A_ROUGE", "value_by_index", "3", "generation"), 3.0), "but a text"),
    (_set(("forget_quality",), 0.3), 'not a TOFU_SUMMARY.json'),
    (_set(("exact_memorization", "value_by_index", "1", "score"), [0.5]), "row 1, score: a list"),
    (_set(("exact_memorization", "value_by_index", "0", "score"), [0.5]), "a list in the first"),
    (_set(("a/b",), {"agg_value": 0.5}), "expected a name without a slash"),
])  # fmt: skip
def test_bad_logs_are_refused_and_not_written(log, change, message, tmp_path):
    content = to_json(log)
    change(content)
    path = tmp_path / log_files.EVAL_NAME
    with pytest.raises(ValueError, match=message):
        log_files.write_log(tmp_path, log_files.parse_log(content, log_files.EVAL_NAME))
    assert not list(tmp_path.iterdir())
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        log_files.read_log(path)


def test_fields_of_the_wrong_kind(log):
    with pytest.raises(ValueError, match="expected numbers, got texts"):
        logs.column(log, "forget_Q_A_ROUGE", "generation")
    with pytest.raises(ValueError, match="expected texts, got"):
        logs.texts(log, "forget_Q_A_ROUGE", "rougeL_f1")
    with pytest.raises(ValueError, match="equal numbers of rows"):
        Metric(0.0, {"score": np.ones(1), "prob": np.ones(2)})


def test_numbers_that_are_not_possible_are_not_written(log, tmp_path):
    losses = np.array([1.0, np.nan])
    for made, message in (
        ({"forget_Q_A_Prob": Metric(0.5, {"avg_loss": losses})}, "row 1, avg_loss is nan"),
        ({"model_utility": Metric(float("inf"))}, "model_utility, agg_value is inf"),
        ({"mia_loss": Metric(0.5, details={"auc": 1.5})}, "auc is 1.5, expected a share"),
    ):
        bad = Log({**log.metrics, **made})
        with pytest.raises(ValueError, match=message):
            log_files.write_log(tmp_path, bad)
        with pytest.raises(ValueError, match=message):
            log_files.write_unlearning(tmp_path, bad, list(bad))
    assert not list(tmp_path.iterdir())


def test_a_number_is_computed_once(log, retain_log, monkeypatch):
    computed = []

    def count(*samples):
        computed.append(samples)
        return metrics.ForgetQuality(0.5, 0.1, 0.2)

    monkeypatch.setattr(metrics, "forget_quality", count)
    fresh = Log(log.metrics)
    assert aggregates.aggregate(fresh, "forget_quality", retain_log) == 0.5
    assert aggregates.forget_quality(fresh, retain_log).statistic == 0.1
    assert len(computed) == 1
    aggregates.forget_quality(fresh, fresh)
    assert len(computed) == 2  # against another log it is another number


def test_cut_short_and_absent_files(log, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"TOFU_EVAL\.json does not exist"):
        log_files.read_log(tmp_path)
    log_files.write_log(tmp_path, log)
    path = tmp_path / log_files.EVAL_NAME
    path.write_text(path.read_text()[:5000])
    with pytest.raises(ValueError, match="not valid JSON"):
        log_files.read_log(tmp_path)
    (tmp_path / log_files.SUMMARY_NAME).write_text('{"model_utility": NaN}')
    with pytest.raises(ValueError, match="model_utility: NaN"):
        log_files.read_summary(tmp_path)


def test_an_interrupted_write_leaves_the_old_log(log, tmp_path, monkeypatch):
    log_files.write_log(tmp_path, log)
    before = (tmp_path / log_files.EVAL_NAME).read_bytes()

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    log = change(log, "model_utility", "agg_value", by=lambda value: 0.123)
    with pytest.raises(KeyboardInterrupt):
        log_files.write_log(tmp_path, log)
    assert (tmp_path / log_files.EVAL_NAME).read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_summary_left_behind_by_an_interrupted_write(log, tmp_path):
    log_files.write_log(tmp_path, log)
    log = change(log, "model_utility", "agg_value", by=lambda value: 0.123)
    found = recompute.compare_summary(log, log_files.read_summary(tmp_path))
    assert [c.name for c in found if c.differs] == ["summary, model_utility"]


def test_comparison_is_relative_to_the_larger():
    assert not recompute.Comparison("m", 1e-240, 1e-240 * (1 + 5e-10)).differs
    assert recompute.Comparison("m", 1e-240, 1e-240 * (1 + 2e-9)).differs
    assert recompute.Comparison("m", 0.0, 1e-300).differs
    assert not recompute.Comparison("m", 0.0, 0.0).differs
    assert not recompute.Comparison("m", None, 0.5).differs


def test_compare_files(log, retain_log, tmp_path):
    log_files.write_log(tmp_path, log)
    log_files.write_log(tmp_path / "retain", retain_log)
    text, differs = recompute.compare_files(tmp_path / log_files.EVAL_NAME, tmp_path / "retain")
    assert not differs
    assert " 0 differ, 0 not recomputed" in text
    assert "summary, model_utility" in text
    assert "D = " in text
    text, differs = recompute.compare_files(tmp_path)
    assert not differs
    assert " 0 differ, 2 not recomputed" in text


def test_command_line(log, retain_log, tmp_path, repository):
    # Without ROUGE, whose import takes seconds.
    log = without(log, *(metric for metric in log if metric.endswith("_ROUGE")))
    log = change(log, "forget_quality", "agg_value", by=lambda value: value * (1 + 1e-6))
    log_files.write_log(tmp_path / "wrong", log)
    log_files.write_log(tmp_path / "retain", retain_log)
    log_files.write_log(tmp_path / "other", make_log(2, rows=20))

    def start(*retain_flag):
        return subprocess.Popen(
            [sys.executable, "evaluate.py", "--recompute", str(tmp_path / "wrong"), *retain_flag],
            cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    runs = start("--retain-log", f"{tmp_path}/retain"), start(f"--retain_log={tmp_path}/other")
    (text, _), (_, error) = (run.communicate(timeout=120) for run in runs)
    assert [run.returncode for run in runs] == [1, 2], error
    differing = [line.split()[0] for line in text.splitlines() if "DIFFERS" in line]
    assert differing == ["forget_quality"]
    assert "another forget split" in error
    assert "Traceback" not in error


def test_evaluation_imports_no_torch(repository):
    code = (
        "import sys; from t3jax.evaluation import metrics, recompute;"
        "metrics.rouge_scores(['a'], ['a']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=repository, check=False, timeout=120
    )
    assert done.returncode == 0
