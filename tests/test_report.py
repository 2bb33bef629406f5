import base64
import dataclasses
import html.parser
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import tiny

from t3jax.data import PromptFormat, evenly_spread
from t3jax.evaluation import aggregates
from t3jax.evaluation.logs import Log, Metric
from t3jax.evaluation.questions import encode_set
from t3jax.evaluation.scoring import TextScores
from t3jax.evaluation.settings import BASE, Setting, find_controls
from t3jax.evaluation.store import Store
from t3jax.pipeline import Evaluation, Examined
from t3jax.refinements import Refinements
from t3jax.report import diagnosis, page, tables
from t3jax.report.answers import answer_tokens

ROWS = 6
SETTING = Setting("head0-T2-s0.5", 2.0, 0.5, (0,))
TEMPERED, TILTED = Setting("T2", 2.0), Setting("head0-T1-s1", 1.0, 1.0, (0,))
SETTINGS = [BASE, SETTING, TEMPERED, TILTED]


def make_log(seed, retain_log=None):
    """A log of forget and retain rows with random numbers."""
    rng = np.random.default_rng(seed)
    made = {}
    log = Log(made, {"privleak": "no holdout set was given"})
    for name in ("forget", "retain"):
        losses = {"Q_A_Prob": (ROWS,), "Q_A_PARA_Prob": (ROWS,), "Q_A_PERT_Prob": (ROWS, 2)}
        for metric, shape in losses.items():
            loss = rng.uniform(0.1, 2.0, shape)
            made[f"{name}_{metric}"] = Metric(0.0, {"prob": np.exp(-loss), "avg_loss": loss})
        recall = rng.uniform(0.2, 1.0, ROWS)
        made[f"{name}_Q_A_ROUGE"] = Metric(
            0.0,
            {
                "rougeL_recall": recall,
                "ground_truth": [f"truth {i}" for i in range(ROWS)],
                "generation": [f"<b>{name}</b> answer {i} of {seed}" for i in range(ROWS)],
            },
        )
        metric = "forget_truth_ratio" if name == "forget" else "retain_Truth_Ratio"
        made[metric] = Metric(0.0, {"score": aggregates.truth_ratios(log, metric)})
    for metric in made:
        value = aggregates.aggregate(log, metric, retain_log)
        made[metric] = dataclasses.replace(made[metric], aggregate=value)
    return log


def make_beyond(seed):
    recall = np.random.default_rng(seed).uniform(0, 1, (ROWS, 2))
    details = {"samples": 2, "threshold": 0.7, "by_samples/1": 0.2, "by_samples/2": 0.4}
    return Log({"forget_leak_rate": Metric(0.5, {"recall": recall}, details=details)})


class FakeStore(Store):
    """Made-up scores, one token after the other."""

    def scores(self, label, examples, settings):
        starts = np.cumsum([0, *(each.num_answer_tokens for each in examples)])
        ramp = np.linspace(-3.0, 3.0, starts[-1], dtype=np.float32)
        return [
            TextScores(starts, ramp * setting.guidance_scale, ramp > 0, ramp, ramp, ramp)
            for setting in settings
        ]


@pytest.fixture(scope="module")
def evaluation(tiny_lm):
    records = [{"question": f"Who is <i>{i}</i>?", "answer": "A, B & C."} for i in range(ROWS)]
    sets = {
        name: encode_set(name, records, tiny_lm.tokenizer, PromptFormat(), 256)
        for name in ("forget", "retain")
    }
    retain_log = make_log(9)
    store = FakeStore(tiny_lm, [tiny.make_head(tiny_lm)])
    return Evaluation(
        examined=Examined(store=store, retain_store=None, sets=sets),
        settings=SETTINGS,
        logs={setting.name: make_log(i, retain_log) for i, setting in enumerate(SETTINGS)},
        unlearning={setting.name: make_beyond(i) for i, setting in enumerate(SETTINGS)},
        retain_log=retain_log,
        retain_unlearning=make_beyond(9),
    )


class Elements(html.parser.HTMLParser):
    """The page's elements: tag, attributes, and the text up to the next tag."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append([tag, dict(attrs), ""])

    def handle_data(self, data):
        if self.found and not self.found[-1][2]:
            self.found[-1][2] = data.strip()


@pytest.fixture(scope="module")
def report(evaluation, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    selected = [("chosen on half A", SETTING.name, "a note")]
    page.write_report(
        path,
        evaluation,
        title="A <title>",
        selected=selected,
        featured=SETTING.name,
        diagnoses=diagnosis.diagnose_heads(evaluation),
    )
    return path.read_text()


def test_the_page_needs_nothing_else_and_escapes_what_models_say(report):
    elements = Elements(report).found
    for _, attributes, _ in elements:
        for name in {"src", "href"} & attributes.keys():
            assert attributes[name].startswith("data:image/svg+xml;base64,")
    assert "@import" not in report
    assert "url(" not in report
    assert [text for tag, _, text in elements if tag == "h2"] == [
        "Summary",
        "The choice, cross-fitted",
        "Figures",
        "Before and after",
        "Token by token",
        "Beyond the benchmark",
        "What theory says of each head",
        "Not measured",
    ]
    assert "<b>forget</b>" not in report
    assert "&lt;b&gt;forget&lt;/b&gt; answer 0 of 1" in report
    assert "A &lt;title&gt;" in report


def test_every_figure_is_a_picture(report):
    images = [attributes for tag, attributes, _ in Elements(report).found if tag == "img"]
    assert [image["alt"] for image in images] == [
        "Forget quality against retain utility",
        "Truth ratios on the forget set",
        *["Temperature sweep"] * 3,
        "Leaks when many answers are drawn",
    ]
    for image in images:
        picture = base64.b64decode(image["src"].partition(",")[2])
        assert ET.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"


def test_summary_holds_the_numbers_of_the_logs(evaluation):
    table = tables.summary_table(SETTINGS, evaluation.logs, evaluation.retain_log)
    assert [row.label for row in table.rows] == [s.name for s in SETTINGS] + ["retain model"]
    assert [row.kind for row in table.rows] == [
        tables.BASE,
        tables.UNLEARNED,
        tables.TEMPERED,
        tables.TILTED,
        tables.RETAIN_MODEL,
    ]
    row = dict(zip(table.columns, table.rows[1].cells, strict=True))
    log = evaluation.logs[SETTING.name]
    quality = aggregates.forget_quality(log, evaluation.retain_log)
    assert row["forget quality"].text == f"{quality.p_value:.2g}"
    assert row["distance D"].text == f"{quality.statistic:.3f}"
    mean = log["forget_Q_A_ROUGE"].aggregate
    assert row["forget ROUGE-L recall"].text == f"{mean:.3f}"
    low, high = map(float, row["forget ROUGE-L recall"].note.split(" to "))
    assert low < mean < high


def test_numbers_that_no_model_has_are_left_out(evaluation):
    log = Log({name: m for name, m in make_log(1).metrics.items() if "ROUGE" not in name})
    shown = tables.cards([("base", "base", log)], None)
    assert [card.title for card in shown] == ["Retain utility without ROUGE"]
    shown = tables.cards([("base", "base", log)], evaluation.retain_log)
    assert [card.title for card in shown] == ["Forget quality", "Retain utility without ROUGE"]
    assert tables.missing(SETTINGS, evaluation.logs) == [("privleak", "no holdout set was given")]
    only = {**evaluation.logs, BASE.name: Log()}
    assert tables.missing(SETTINGS, only)[0][0] == "privleak (head0-T2-s0.5, T2, head0-T1-s1)"


def test_a_setting_is_shown_beside_its_controls():
    assert find_controls(SETTING, SETTINGS) == [TEMPERED, TILTED]
    other = [Setting("T3", 3.0), dataclasses.replace(TILTED, name="other", heads=(1,))]
    assert find_controls(SETTING, other) == []


def test_a_tilt_at_temperature_1_is_a_control_of_another_setting_alone():
    tilted = Setting("head0-T1-s3", 1.0, 3.0, (0,))
    assert tables.kind_of(tilted, [*SETTINGS, tilted]) == tables.UNLEARNED
    assert tables.kind_of(TILTED, SETTINGS) == tables.TILTED
    assert tables.kind_of(TILTED, [BASE, TILTED]) == tables.UNLEARNED


def test_the_featured_setting(evaluation):
    # Of equal numbers the first are taken, but a control is not featured.
    logs = {**evaluation.logs, TILTED.name: evaluation.logs[SETTING.name]}
    equal = dataclasses.replace(evaluation, settings=[BASE, TILTED, SETTING], logs=logs)
    assert page._find_featured(equal, None) == SETTING
    alone = dataclasses.replace(evaluation, settings=[BASE, TILTED])
    assert page._find_featured(alone, None) == TILTED
    assert page._find_featured(evaluation, "T2") == TEMPERED
    with pytest.raises(ValueError, match="no setting 'T9' was evaluated"):
        page._find_featured(evaluation, "T9")


def test_a_report_without_heads_and_retain_model(evaluation):
    alone = dataclasses.replace(
        evaluation, settings=[BASE], retain_log=None, retain_unlearning=None
    )
    values = page.contents(alone, "base", (), None, [])
    assert [figure.title for figure in values["figures"]] == [
        "Truth ratios on the forget set",
        "Leaks when many answers are drawn",
    ]
    assert "Token by token" not in page.render(values)


def test_tokens_join_to_the_answer(evaluation):
    rows = answer_tokens(evaluation.examined.store, evaluation.examined.sets, SETTING)
    assert [row.set_name for row in rows] == ["forget"] * 2 + ["retain"] * 2
    for row in rows:
        assert "".join(token.text for token in row.tokens) == "A, B & C.<|im_end|>⏎<|im_end|>"
    first = rows[0].tokens[0]
    assert first.retain_prob == pytest.approx(1 / (1 + np.exp(3.0)), rel=1e-6)
    assert first.change == pytest.approx(-3.0 * 0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("value", "colour"), [(0.0, "#f2a060"), (0.5, "#ffffff"), (1.0, "#78b2e2"), (7.0, "#78b2e2")]
)
def test_colours(value, colour):
    assert page._mix_colour(value, 0.0, 1.0) == colour


def test_rows_are_spread_evenly():
    assert evenly_spread(range(10), 3) == [0, 3, 6]
    assert evenly_spread("ab", 5) == ["a", "b"]


def test_a_second_retain_model_is_the_noise_floor(evaluation):
    second_log, second_unlearning = make_log(10, evaluation.retain_log), make_beyond(10)
    found = dataclasses.replace(
        evaluation, second_retain_log=second_log, second_retain_unlearning=second_unlearning
    )
    values = page.contents(found, "title", [], None, [])
    quality = aggregates.forget_quality(second_log, evaluation.retain_log)
    cells = {}
    for name in ("summary", "unlearning"):
        *_, first, second = values[name].rows
        assert (first.label, second.label) == (tables.RETAIN_MODEL, tables.SECOND_RETAIN_MODEL)
        cells |= dict(zip(values[name].columns, second.cells, strict=True))
    assert cells["distance D"].text == f"{quality.statistic:.3f}"
    assert "than the retain model" in cells["leak in 2 answers (recall ≥ 0.7)"].note
    assert "noise floor" in page.render(values)
    # The first one may have been evaluated without draws.
    table = tables.unlearning_table([], {}, Log(), second_unlearning)
    assert "than the retain model" not in table.rows[-1].cells[0].note
    assert "noise floor" not in page.render(page.contents(evaluation, "title", [], None, []))


def test_a_head_is_diagnosed_beside_what_was_measured(evaluation, report):
    cooler = Setting("head0-T3-s0.5", 3.0, 0.5, (0,))
    logs = {**evaluation.logs, cooler.name: evaluation.retain_log}
    more = dataclasses.replace(evaluation, settings=[*SETTINGS, cooler], logs=logs)
    (head,) = diagnosis.diagnose_heads(more)
    assert head.diagnosis.scale == 0.5  # the head's own s was not evaluated
    assert head.best_measured == 3.0
    quality = aggregates.forget_quality(evaluation.logs[SETTING.name], evaluation.retain_log)
    section = diagnosis.make_section(head)
    shown = {row.label: row.cells[-1] for row in section.table.rows}
    assert shown["T = 2"].text == f"{quality.p_value:.2g}"
    assert shown["T = 3"] == ("1", "D 0.000")
    assert shown["T = 4"] == tables.MISSING
    assert section.table.columns == ["bound", "leak", "price", "retain bound", "forget quality"]
    assert "which the head may know" in section.sentences[0]
    assert "Smallest distance D of whole answers: T = 3 of 2, 3." in section.sentences
    assert f"held-out loss of the head {head.diagnosis.loss:.4f}" in str(head.diagnosis)
    known = "Held-out loss on the questions, which the head may know"
    assert f"{known}: {head.diagnosis.loss:.4f}" in report


def test_a_head_that_cannot_be_diagnosed_has_a_reason(evaluation):
    examined = evaluation.examined
    distilled = dataclasses.replace(
        examined.store.heads[0], record={"training": {"loss": "distillation"}}
    )
    forget = {"forget": examined.sets["forget"]}
    for changed, reason in (
        (dataclasses.replace(examined, store=FakeStore(examined.store.lm, [distilled])), "distill"),
        (dataclasses.replace(examined, sets=forget), "no retain set was given"),
        (examined, "not evaluated by itself"),
    ):
        gated = dataclasses.replace(SETTING, refinements=Refinements(gated=True))
        settings = [BASE, gated] if changed is examined else SETTINGS
        heads = diagnosis.diagnose_heads(
            dataclasses.replace(evaluation, examined=changed, settings=settings)
        )
        assert reason in diagnosis.describe_diagnoses(heads)
        values = page.contents(evaluation, "title", (), None, [], heads)
        assert reason in page.render(values)
    assert diagnosis.diagnose_heads(dataclasses.replace(evaluation, settings=[BASE])) == []
