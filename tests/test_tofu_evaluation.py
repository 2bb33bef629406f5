import dataclasses
import json
import math

import jax
import numpy as np
import pytest
import tiny
from damage import check_damage_is_recomputed

from t3jax.data import Example, PromptFormat
from t3jax.evaluation import answers, log_files, logs, questions, recompute, store, tofu, unlearning
from t3jax.evaluation.logs import Log, Metric, MissingMetricError
from t3jax.evaluation.scoring import TextScores, score_texts
from t3jax.evaluation.settings import BASE, Setting, settings_grid
from t3jax.evaluation.store import Store
from t3jax.evaluation.tofu import TofuOptions
from t3jax.lm import from_params
from t3jax.refinements import PLAIN, Refinements
from t3jax.sampling import Sample, Sampler

NAMES = ("Ada", "Bo", "Cy", "Di")
OPTIONS = TofuOptions(max_new_tokens=8)
SAMPLED = unlearning.UnlearningOptions(
    leak_samples=2, leak_threshold=0.5, kl_rows=2, kl_samples=2, max_new_tokens=8
)


def rows(what, wrong, paraphrase):
    for name in NAMES:
        row = {"question": f"{what} {name}?", "answer": f"It is {name}."}
        row["perturbed_answer"] = [f"It is {other}." for other in NAMES if other != name][:wrong]
        if paraphrase:
            row["paraphrased_question"] = f"{name}: {what}?"
            row["paraphrased_answer"] = f"{name} it is."
        yield row


FILE_ORDER = [
    "forget_leak_rate",
    "forget_paraphrased_leak_rate",
    "forget_paraphrased_Q_A_Prob",
    "forget_paraphrased_Q_A_ROUGE",
    "forget_greedy_fluency",
    "missing",
    "forget_KL_guided_retain",
    "forget_KL_retain_guided",
    "retain_paraphrased_Q_A_Prob",
    "retain_paraphrased_Q_A_ROUGE",
    "retain_greedy_fluency",
    "retain_KL_guided_retain",
    "retain_KL_retain_guided",
    "forget_sample_fluency",
]


def to_json(log):
    """The content of a log's file."""
    return json.loads(json.dumps(log_files._make_entries(log, [*log, *log.missing])))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A made-up TOFU: what a user names in the config."""
    folder = tmp_path_factory.mktemp("questions")
    for name, each in {
        "forget": rows("Who", 3, True),
        "retain": rows("How", 3, True),
        "ra": rows("When", 2, False),
        "wf": rows("What", 2, False),
        "holdout": rows("Why", 2, False),
    }.items():
        lines = [json.dumps(row) + "\n" for row in each]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return {name: folder / f"{name}.jsonl" for name in questions.SETS}


@pytest.fixture(scope="module")
def sets(tiny_lm, sources):
    return questions.load_sets(sources, tiny_lm.tokenizer, PromptFormat(), tiny_lm.max_position)


@pytest.fixture(scope="module")
def head(tiny_lm):
    return tiny.make_head(tiny_lm)


@pytest.fixture(scope="module")
def settings(head):
    return settings_grid([head])


@pytest.fixture(scope="module")
def retain_lm(tiny_lm):
    return dataclasses.replace(tiny_lm, params=tiny.make_params(seed=5))


class Killed(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def run(tiny_lm, retain_lm, head, sets, settings, tmp_path_factory):
    """A whole run that was killed once: its folder, logs, and what each of its parts computed."""
    folder = tmp_path_factory.mktemp("run")
    work = []
    stops = iter([False] * 3 + [True])

    def counting_scores(lm, examples, settings, *args, **options):
        work.append(("scores", len(examples), tuple(setting.name for setting in settings)))
        return score_texts(lm, examples, settings, *args, **options)

    def counting_generate(self, prompts, **options):
        if next(stops, False):
            raise Killed
        work.append(("answers", len(prompts)))
        return Sampler.generate(self, prompts, **options)

    class CountingSampler(Sampler):
        generate = counting_generate

    def evaluate():
        kept = Store(tiny_lm, [head], folder / "store", rows=4)
        retain = Store(retain_lm, (), folder / "store", rows=4)
        (retain_log,) = tofu.evaluate(
            retain, sets, [Setting("retain_model")], folder, OPTIONS
        ).values()
        found = tofu.evaluate(
            kept, sets, settings, folder, OPTIONS, retain_log=retain_log, retain_store=retain
        )
        return found, retain_log, kept, retain

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "score_texts", counting_scores)
        patch.setattr(store, "Sampler", CountingSampler)
        with pytest.raises(Killed):
            evaluate()
        first = list(work)
        work.clear()
        found, retain_log, *stores = evaluate()
        second = list(work)
        work.clear()
        evaluate()
        return folder, found, retain_log, stores, (first, second, list(work))


def test_a_killed_run_goes_on_where_it_was(run):
    _, _, _, _, (first, second, third) = run
    names = ("base", "head0-T2.5-s1", "T2.5", "head0-T1-s2.5")
    everything = [
        *[("scores", n, ("retain_model",)) for n in (20, 20, 12, 12, 12)],
        *[("answers", 4)] * 4,
        *[("scores", n, names) for n in (20, 20, 12, 12, 12)],
        *[("scores", 4, ("base",))] * 2,
        # Settings of equal T · s share their greedy text: two runs over four sets, not four.
        *[("answers", 4)] * 8,
    ]
    assert first == everything[:8]  # killed at the fourth set of answers
    assert second == everything[8:]
    assert third == []


def test_recomputed_equals_stored(run, settings):
    folder, found, retain_log, _, _ = run
    assert list(found) == [setting.name for setting in settings]
    for name, log in found.items():
        stored = json.loads((folder / name / log_files.EVAL_NAME).read_text())
        assert stored == to_json(log) == to_json(log_files.read_log(folder / name))
        comparisons = recompute.recompute(log_files.read_log(folder / name), retain_log)
        assert not [each for each in comparisons if each.differs]
        assert {each.name for each in comparisons if each.recomputed is None} == set()
        text, differs = recompute.compare_files(folder / name, folder / "retain_model")
        assert not differs, text


def test_names_are_the_reference_s(run, shared):
    _, found, retain_log, _, _ = run
    official = log_files.read_log(
        shared / "data" / "tofu_logs" / "Llama-3.2-1B-Instruct_full_forget10"
    )
    for log in found.values():
        assert set(log) == set(official) - {"mia_gradnorm"}
        assert "gradients" in logs.missing_reasons(log)["mia_gradnorm"]
        for metric, entry in to_json(official).items():
            if metric != "mia_gradnorm":
                assert to_json(log)[metric].keys() == entry.keys()
            for part in ("value_by_index",):
                if part in entry and metric in log:
                    assert to_json(log)[metric][part]["0"].keys() == entry[part]["0"].keys()
    assert "forget_quality" in to_json(retain_log)
    assert logs.missing_reasons(retain_log)["forget_quality"] == "it needs the retain model's log"


def test_losses_stand_where_they_belong(run, sets, tiny_lm, head, settings):
    """Each text by itself: row and wrong answer are not mixed up."""
    _, found, _, _, _ = run
    setting, log = settings[1], found[settings[1].name]
    examples = [sets["forget"].wrong[2][1], sets["forget"].paraphrased[3], sets["wf"].answers[0]]
    (alone,) = score_texts(tiny_lm, examples, [setting], [head])
    stored = [
        logs.column(log, "forget_Q_A_PERT_Prob", "avg_loss")[1, 2],
        logs.column(log, "forget_Q_A_PARA_Prob", "avg_loss")[3],
        logs.column(log, "wf_Q_A_Prob", "avg_loss")[0],
    ]
    np.testing.assert_allclose(stored, alone.avg_loss, atol=1e-5)
    rouge = {
        field: logs.texts(log, "retain_Q_A_ROUGE", field)[2] for field in ("input", "ground_truth")
    }
    assert rouge["input"] == "user\nHow Cy?\nassistant\n"
    assert rouge["ground_truth"] == "It is Cy."


def test_mia_reference_is_the_loss_beyond_the_retain_model_s(run):
    _, found, retain_log, _, _ = run
    for part in ("forget", "holdout"):
        np.testing.assert_allclose(
            logs.column(found["base"], f"mia_reference/{part}", "score"),
            logs.column(found["base"], f"mia_loss/{part}", "score")
            - logs.column(retain_log, f"mia_loss/{part}", "score"),
            atol=1e-5,
        )


def test_missing_data_is_named_and_never_a_number(tiny_lm, sets, tmp_path, run):
    folder, _, _, _, _ = run
    some = {name: sets[name] for name in ("forget", "retain", "ra")}
    log = tofu.evaluate(Store(tiny_lm, (), folder / "store"), some, [BASE], tmp_path, OPTIONS)[
        "base"
    ]
    reasons = logs.missing_reasons(log)
    assert reasons["mia_min_k"] == reasons["mia_reference"] == "no holdout set was given"
    assert reasons["privleak"] == "mia_min_k is missing: no holdout set was given"
    assert reasons["wf_Q_A_ROUGE"] == "no world facts set was given"
    assert "wf_Q_A_Prob_normalised is missing" in reasons["model_utility"]
    assert to_json(log)["forget_quality"] == {"agg_value": None}
    assert "model_utility" not in log_files.read_summary(tmp_path / "base")


def test_empty_answers_score_0(sets, run):
    _, _, _, (kept, _), _ = run
    (scores,) = kept.scores("forget", sets["forget"].texts, [BASE])
    log = tofu.assemble_log({"forget": sets["forget"]}, {"forget": scores}, {"forget": [""] * 4})
    assert log["forget_Q_A_ROUGE"].aggregate == 0.0
    logs.check_log(log, "log")


def test_a_model_that_gives_nan_is_named(tiny_lm, sets, tmp_path):
    params = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), tiny_lm.params)
    broken = dataclasses.replace(tiny_lm, params=params)
    store, asked = Store(broken, (), tmp_path), {"forget": sets["forget"]}
    with pytest.raises(FloatingPointError, match="prompt 0, token 1 of the answer"):
        tofu.evaluate(store, asked, [BASE], tmp_path, OPTIONS)
    scored = dataclasses.replace(OPTIONS, answers=False)
    with pytest.raises(ValueError, match="forget_Q_A_Prob: avg_loss holds 4 values that are not"):
        tofu.evaluate(store, asked, [BASE], tmp_path, scored)
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"perturbed_answer": ["a", "b"]}, "forget row 2 has 2 wrong answers, row 1 has 3"),
        ({"perturbed_answer": "abc"}, "forget row 2: perturbed_answer must be a list.* got 'abc'"),
        ({"perturbed_answer": 5}, "forget row 2: perturbed_answer must be a list.* got 5"),
        ({"perturbed_answer": None}, "forget row 2 has no perturbed_answer, but other rows"),
        ({"paraphrased_answer": ""}, "forget row 2 has no paraphrased_answer"),
        ({"answer": "x" * 300}, "forget set, answers: row 2 of 4: .* more than max_length"),
        ({"text": "a document"}, "forget row 2: expected a question and an answer"),
    ],
)
def test_bad_rows_are_named(tiny_lm, change, message):
    records = list(rows("Who", 3, True))
    records[1] |= change
    with pytest.raises(ValueError, match=message):
        questions.encode_set("forget", records, tiny_lm.tokenizer, PromptFormat(), 256)
    with pytest.raises(ValueError, match="the forget set has no rows"):
        questions.encode_set("forget", [], tiny_lm.tokenizer, PromptFormat(), 256)


def test_a_retain_log_of_another_split_is_refused(run, sets):
    _, _, retain_log, (kept, _), _ = run
    other = dict(sets, forget=sets["retain"])
    scores = {"forget": kept.scores("retain", sets["retain"].texts, [BASE])[0]}
    ratios = Metric(1.0, {"score": np.array([1.0, 2.0])})
    log = Log({**retain_log.metrics, "forget_truth_ratio": ratios})
    with pytest.raises(ValueError, match=r"another forget split: it has 2 forget rows, the log 4"):
        tofu.assemble_log({"forget": other["forget"]}, scores, {"forget": ["a"] * 4}, log)


def test_the_reference_s_mask_leaves_padding_out_of_prompts(run, sets, tiny_lm, monkeypatch):
    _, _, _, (kept, _), _ = run
    seen = []

    class Recorder(Sampler):
        def generate(self, prompts, **_):
            seen.extend(prompts)
            return [Sample("", [1])] * len(prompts)

    monkeypatch.setattr(store, "Sampler", Recorder)
    kept.answers("x", sets["wf"].prompts, BASE, reference_mask=True, max_new_tokens=3)
    eos = tiny_lm.tokenizer.eos_token_id
    assert seen == [[t for t in prompt.tolist() if t != eos] for prompt in sets["wf"].prompts]
    assert seen[0] != sets["wf"].prompts[0].tolist()
    with pytest.raises(ValueError, match="prompt 0 ends in the padding token"):
        kept.answers("x", [np.array([5, eos])], BASE, reference_mask=True)


# --- beyond the reference


@pytest.fixture(scope="module")
def measured(run, sets, settings):
    folder, _, _, (kept, retain), _ = run
    chosen = settings[:2]
    # The base model stands for a retain model that it equals.
    same = Store(kept.lm, (), folder / "store", rows=4)
    return [
        unlearning.measure(kept, sets, chosen, folder / str(i), SAMPLED, retain_store=each)
        for i, each in enumerate((same, retain))
    ]


def test_divergence_from_a_retain_model(measured):
    same, other = measured
    for direction in ("guided_retain", "retain_guided"):
        metric = f"forget_KL_{direction}"
        assert same["base"][metric].aggregate == 0.0
        tilted = same["head0-T2.5-s1"]
        assert len(logs.indices(tilted, metric)) == 4  # two questions, two answers each
        ratios = logs.column(tilted, metric, "log_ratio")
        tokens = logs.column(tilted, metric, "tokens")
        assert tilted[metric].aggregate == pytest.approx(np.mean(ratios)) != 0.0
        assert tilted[metric].details["per_token"] == pytest.approx(sum(ratios) / sum(tokens))
        assert other["base"][f"retain_KL_{direction}"].aggregate > 0.5


def test_every_number_is_there(measured, run):
    folder, _, _, _, _ = run
    for log in measured[0].values():
        assert set(logs.missing_reasons(log)) <= {
            "forget_classifier_accuracy",
            "retain_classifier_accuracy",
            "classifier_auc",
        }
    base, tilted = measured[0].values()
    assert logs.missing_reasons(base)["classifier_auc"] == "the setting has no head"
    leak = tilted["forget_leak_rate"].aggregate
    by_samples = answers.leak_rates(tilted)
    assert by_samples[2] == leak >= by_samples[1]
    recall = logs.column(tilted, "forget_leak_rate", "recall")
    assert leak == np.mean(np.max(recall, axis=1) >= 0.5)
    accuracy = tilted["retain_classifier_accuracy"].aggregate
    scores = logs.column(tilted, "retain_classifier_accuracy", "score")
    assert accuracy == np.mean(scores > 0)
    fluency = base["forget_greedy_fluency"].aggregate
    losses = logs.column(base, "forget_greedy_fluency", "avg_loss")
    assert math.exp(min(losses)) <= fluency <= math.exp(max(losses))
    path = folder / "0" / "base" / log_files.UNLEARNING_NAME
    stored = json.loads(path.read_text())
    assert stored == to_json(base) == to_json(log_files.read_log(path))
    assert list(stored) == FILE_ORDER


def test_scores_that_settings_share_are_read_once(run, sets, settings, tmp_path):
    _, _, _, (kept, _), _ = run
    asked = []

    class Counting(Store):
        def scores(self, label, examples, settings, *args, **options):
            asked.append(label)
            return super().scores(label, examples, settings, *args, **options)

    counting = Counting(kept.lm, kept.heads, kept.folder, rows=4)
    options = unlearning.UnlearningOptions(max_new_tokens=8)
    unlearning.measure(counting, sets, settings[:2], tmp_path, options)
    assert asked.count("forget-paraphrased") == asked.count("retain-answers") == 1
    assert len(asked) == len(set(asked))


def test_nothing_is_sampled_unless_asked_for(run, sets, tmp_path):
    _, _, _, (kept, _), _ = run
    options = unlearning.UnlearningOptions(max_new_tokens=8)
    log = unlearning.measure(kept, sets, [BASE], tmp_path, options)["base"]
    reasons = logs.missing_reasons(log)
    assert reasons["forget_leak_rate"] == "no samples were asked for (leak_samples = 0)"
    assert reasons["forget_KL_guided_retain"] == "it needs the retain model itself"


def test_best_of_n_is_unbiased():
    leaks = np.array([[True, False, False, False], [False] * 4, [True] * 4])
    np.testing.assert_allclose(answers.best_of(leaks, 1), [0.25, 0.0, 1.0])
    np.testing.assert_allclose(answers.best_of(leaks, 2), [0.5, 0.0, 1.0])
    np.testing.assert_allclose(answers.best_of(leaks, 4), [1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match="best of 5"):
        answers.best_of(leaks, 5)


def test_distinct_and_repetition():
    assert answers.distinct_n(["a b a", "a"], 1) == 0.5
    assert answers.distinct_n(["a b a b", "b a"], 2) == 0.5
    with pytest.raises(MissingMetricError, match="no text has 2 words"):
        answers.distinct_n(["", "a"], 2)
    texts = ["a b c a b", "a b c", "a"]
    np.testing.assert_allclose(answers.repetition(texts, 2), [0.25, 0, 0])


def test_log_ratios_are_sums_over_answers():
    def scores(logprobs):
        values = np.array(logprobs, np.float32)
        return TextScores(np.array([0, 2, 3]), values, values > 0, values, values)

    ratios = answers.log_ratios(scores([-1.0, -2.0, -3.0]), scores([-2.0, -4.0, -2.5]))
    np.testing.assert_allclose(ratios, [3.0, -0.5])


def test_settings_grid_holds_each_distribution_once(head):
    found = settings_grid([head, head], (1.0, 2.5), (1.0,))
    assert [setting.name for setting in found] == [
        "base",
        "head0-T1-s1",
        "head0-T2.5-s1",
        "T2.5",
        "head0-T1-s2.5",
        "head1-T1-s1",
        "head1-T2.5-s1",
        "head1-T1-s2.5",
    ]


def test_settings_grid_refines_what_it_changes(head):
    stop = (5,)
    product = Refinements(combine="product")
    refinements = (
        PLAIN,
        Refinements(gated=True),
        Refinements(gated=True, protected=stop),
        product,
    )
    found = settings_grid([head], (1.0, 2.5), (1.0,), refinements=refinements)
    assert [setting.name for setting in found] == [
        "base",
        "head0-T1-s1",
        "head0-T1-s1-protected",
        "head0-T2.5-s1",
        "T2.5",
        "head0-T1-s2.5",
        "head0-T2.5-s1-gated",
        "head0-T2.5-s0-gated",
        "head0-T2.5-s1-gated-protected",
        "head0-T1-s2.5-protected",
    ]
    assert found[-2] == Setting(found[-2].name, 2.5, 1.0, (0,), refinements[2])
    together = settings_grid(
        [head, head], controls=False, refinements=(PLAIN, product), groups=[(1,), (0, 1)]
    )
    assert [(each.name, each.heads) for each in together[1:]] == [
        ("head1-T2.5-s1", (1,)),
        ("head0+1-T2.5-s1", (0, 1)),
        ("head0+1-T2.5-s1-product", (0, 1)),
    ]


def test_greedy_answers_are_shared_only_where_t_times_s_decides(
    tiny_lm, head, tmp_path, monkeypatch
):
    asked = []

    class Recorder(Sampler):
        def generate(self, prompts, **_):
            asked.append((self.base_temperature, self.guidance_scale, self.refinements.name))
            return [Sample("", [1])] * len(prompts)

    monkeypatch.setattr(store, "Sampler", Recorder)
    kept = Store(tiny_lm, [head, dataclasses.replace(head, prior_shift=1.0)], tmp_path)
    gated = Refinements(gated=True)
    for setting in (
        Setting("a", 2.5, 1.0, (0,)),
        Setting("b", 1.0, 2.5, (0,)),  # as a
        Setting("c", 2.5, 1.0, (0, 1)),
        Setting("d", 2.5, 1.0, (0,), gated),
        Setting("e", 1.0, 2.5, (0,), gated),
        Setting("f", 2.5, 1.0, (0,), Refinements(protected=(5,))),
        Setting("g", 2.5, 0.0, (0,)),
        BASE,  # as g
    ):
        kept.answers("x", [np.array([4, 5])], setting, max_new_tokens=3)
    assert asked == [
        (1.0, 2.5, "plain"),
        (1.0, 2.5, "plain"),
        (2.5, 1.0, "gated"),
        (1.0, 2.5, "gated"),
        (2.5, 1.0, "protected"),
        (1.0, 0.0, "plain"),
    ]


def test_another_vocabulary_is_refused(tiny_lm, tmp_path):
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(["new"])
    other = Store(dataclasses.replace(tiny_lm, tokenizer=tokenizer), (), tmp_path)
    with pytest.raises(ValueError, match="another tokenizer"):
        unlearning.check_same_vocabulary(Store(tiny_lm, (), tmp_path), other)


def test_a_change_of_what_results_depend_on_computes_anew(
    tiny_lm, retain_lm, head, tmp_path, monkeypatch
):
    computed = []

    def fake(lm, examples, settings, heads, **_):
        computed.append(settings[0].name)
        nothing = np.zeros(examples[0].num_answer_tokens, np.float32)
        starts = np.array([0, len(nothing)])
        return [TextScores(starts, nothing, nothing > 0, nothing, nothing)]

    monkeypatch.setattr(store, "score_texts", fake)
    examples = [Example(np.arange(20, dtype=np.int32), 10)]
    longer = [Example(np.arange(20, dtype=np.int32), 9)]
    tilted = Setting("tilted", 2.5, 1.0, (0,))
    cooler = Setting("tilted", 2.0, 1.0, (0,))
    renamed = Setting("renamed", 2.5, 1.0, (0,))
    refined = dataclasses.replace(tilted, refinements=Refinements(protected=(5,)))
    shifted = dataclasses.replace(head, prior_shift=1.0)
    for lm, heads, texts, setting, mask in (
        (tiny_lm, [head], examples, tilted, False),
        (retain_lm, [head], examples, tilted, False),
        (tiny_lm, [shifted], examples, tilted, False),
        (tiny_lm, [head], longer, tilted, False),
        (tiny_lm, [head], examples, cooler, False),
        (tiny_lm, [head], examples, tilted, True),
        (tiny_lm, [head], examples, refined, False),
        (tiny_lm, [head], examples, renamed, False),
    ):
        Store(lm, heads, tmp_path).scores("x", texts, [setting], mask)
    assert computed == ["tilted"] * 7  # another name alone is the same distribution


def test_a_changed_model_of_equal_weights_gets_results_of_its_own(tiny_lm, tmp_path, monkeypatch):
    asked = []

    class Recorder(Sampler):
        def generate(self, prompts, **_):
            asked.append(len(asked))
            return [Sample(str(asked[-1]), [1])] * len(prompts)

    monkeypatch.setattr(store, "Sampler", Recorder)
    config = dataclasses.replace(tiny.CONFIG, norm_eps=1e-4)
    lm = tiny_lm
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template += " "
    models = [
        lm,
        from_params(config, lm.params, lm.tokenizer, lm.eos_ids, lm.name, lm.mesh),
        dataclasses.replace(lm, eos_ids=(7,)),
        dataclasses.replace(lm, tokenizer=tokenizer),
        dataclasses.replace(lm, name="a copy elsewhere"),
    ]
    texts = [
        Store(model, (), tmp_path).answers("x", [np.array([4, 5])], BASE, max_new_tokens=3)[0].text
        for model in models
    ]
    assert texts == ["0", "1", "2", "3", "0"]


def test_results_of_other_code_are_computed_anew(tiny_lm, tmp_path, monkeypatch):
    computed = []

    class Recorder(Sampler):
        def generate(self, prompts, **_):
            computed.append("answers")
            return [Sample("", [1])] * len(prompts)

    def record(lm, examples, settings, *_, **__):
        computed.append("scores")
        zeros = np.zeros(10, np.float32)
        return [TextScores(np.array([0, 10]), zeros, zeros > 0, zeros, zeros)] * len(settings)

    monkeypatch.setattr(store, "Sampler", Recorder)
    monkeypatch.setattr(store, "score_texts", record)
    kept = Store(tiny_lm, (), tmp_path)
    changed = [set(), set(), {"t3jax.evaluation.scoring"}, {"t3jax.sampling.sampler"}]
    for modules in changed:
        monkeypatch.setattr(store.digests, "code_digest", lambda name, of=modules: str(name in of))
        kept.scores("x", [Example(np.arange(20, dtype=np.int32), 10)], [BASE])
        kept.answers("x", [np.array([4])], BASE)
    assert computed == ["scores", "answers", "scores", "answers"]


def test_stored_results_whose_bytes_have_changed_are_computed_anew(tiny_lm, tmp_path, monkeypatch):
    class Fixed(Sampler):
        def generate(self, prompts, **_):
            return [Sample("naïve", [1, 2])] * len(prompts)

    numbers = np.linspace(-3, 0, 10, dtype=np.float32)
    scores = TextScores(np.array([0, 10]), numbers, numbers > -1, numbers, numbers)
    monkeypatch.setattr(store, "Sampler", Fixed)
    monkeypatch.setattr(store, "score_texts", lambda *_, **__: [scores])
    kept = Store(tiny_lm, (), tmp_path)

    def read():
        (found,) = kept.scores("x", [Example(np.arange(20, dtype=np.int32), 10)], [BASE])
        (answer,) = kept.answers("x", [np.array([4])], BASE)
        assert (answer.text, answer.tokens) == ("naïve", [1, 2])
        for name, value in vars(scores).items():
            np.testing.assert_array_equal(getattr(found, name), value)

    read()
    paths = sorted(tmp_path.iterdir())
    assert [path.suffix for path in paths] == [".json", ".npz"]
    for path in paths:
        check_damage_is_recomputed(path, read)
    assert sorted(tmp_path.iterdir()) == paths
