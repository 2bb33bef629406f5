import dataclasses

import numpy as np
import pytest
import tiny

import t3jax
from configs import default
from t3jax import pipeline
from t3jax.commands import sweep, train
from t3jax.data import Example
from t3jax.evaluation import calibration
from t3jax.evaluation.calibration import Calibrated, calibrate, choose_setting
from t3jax.pipeline import heads
from t3jax.sweep import Grid
from t3jax.training_sets import TrainingSets
from t3jax.verification.reciting import Answered


def of(distance, retained, scale=1.0, temperature=1.0, probability=0.5):
    return Calibrated(temperature, scale, distance, probability, retained)


def test_the_nearest_setting_that_keeps_what_is_to_be_retained_is_chosen():
    far, near, harmful = of(0.4, 1.0), of(0.2, 0.98, 2.0), of(0.1, 0.9, 3.0)
    assert choose_setting([far, near, harmful], 0.5, 1.0) is near
    assert choose_setting([harmful, of(0.9, 0.95)], 0.5, 1.0).retained == 0.95
    weaker = of(0.2, 0.98, 1.5)
    assert choose_setting([near, weaker], 0.5, 1.0) is weaker


def test_tempering_is_chosen_only_where_nothing_else_forgets_and_retains():
    nearer, weaker = of(0.1, 0.99, 1.0, 1.5), of(0.1, 0.99, 0.9, 1.5)
    assert choose_setting([nearer, of(0.2, 0.98)], 0.5, 1.0).base_temperature == 1
    assert choose_setting([nearer, weaker, of(0.2, 0.9)], 0.5, 1.0) is weaker
    assert choose_setting([nearer, of(0.2, 0.98, probability=0.7)], 0.5, 1.0) is nearer


def test_a_setting_that_leaves_more_than_the_level_is_not_chosen():
    leaks, forgets = of(0.1, 0.99, probability=0.3), of(0.3, 0.98, probability=0.1)
    assert choose_setting([leaks, forgets], 0.23, 1.0) is forgets
    assert choose_setting([leaks, forgets], 0.25, 1.0) is leaks
    assert (
        choose_setting([leaks, of(0.2, 0.98, probability=0.25)], 0.1, 1.0).forget_probability
        == 0.25
    )


def test_a_setting_must_lose_most_of_what_made_up_names_lose():
    """Where the wording is probable under every name, 1.25 times the level is no limit."""
    leaks, forgets = of(0.1, 0.99, probability=0.87), of(0.3, 0.98, probability=0.76)
    assert choose_setting([leaks, forgets], level=0.82, base=0.99) is forgets
    assert choose_setting([leaks, forgets], level=0.99, base=0.9) is leaks


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [Example(rng.integers(0, 256, 24).astype(np.int32), 12) for _ in range(20)]


def test_settings_are_compared_with_the_made_up_name_level(tiny_lm, texts):
    """Where the counterfactuals are the rows themselves, the base's own level is the aim."""
    head = tiny.make_head(tiny_lm, scale=2.0)
    forget, retain = texts[:10], texts[10:]
    grid = [(1.0, scale) for scale in calibration.SCALES]
    found = calibrate(tiny_lm, [head], forget, [[each] for each in forget], retain, grid=grid)
    assert found.made_up_probability == pytest.approx(found.base_probability)
    assert len(found.settings) == len(calibration.SCALES)
    assert found.chosen == choose_setting(
        found.settings, found.made_up_probability, found.base_probability
    )
    assert f"s = {found.chosen.guidance_scale:g}" in str(found)
    # The level is the mean over the made-up people of a row.
    twice = calibrate(
        tiny_lm, [head], forget, [[each, texts[-1]] for each in forget], retain, grid=grid
    )
    assert twice.made_up_probability != pytest.approx(found.made_up_probability)
    with pytest.raises(ValueError, match="one of the sets is empty"):
        calibrate(tiny_lm, [head], forget, [[]] * 10, [])
    with pytest.raises(ValueError, match="forget row 10 has no counterfactual"):
        calibrate(tiny_lm, [head], forget, [[texts[0]]] * 9 + [[]], retain)


@pytest.mark.parametrize(
    ("shares", "drawn", "scale", "recited", "fault"),
    [
        ({1.0: 0.04}, {}, 1.0, 0.04, ""),
        ({1.0: 0.04, 2.0: 0.02}, {1.0: 0.1, 2.0: 0.09}, 2.0, 0.02, ""),
        ({1.0: 0.3, 2.0: 0.06, 3.0: 0.05}, {}, 3.0, 0.05, "makes answers that do not end"),
        # 4 harms, and other heads and T are others.
        ({1.0: 0.3, 2.0: 0.1, 3.0: 0.2}, {}, 2.0, 0.1, "recites forget rows"),
        # Draws alone are no fault: they may recite what anybody would guess.
        ({1.0: 0.05, 2.0: 0.04, 3.0: 0.0}, {1.0: 0.3, 2.0: 0.2, 3.0: 0.25}, 2.0, 0.04, ""),
    ],
)
def test_the_scale_of_a_classifier_grows_until_little_is_recited(
    tiny_lm, monkeypatch, shares, drawn, scale, recited, fault
):
    grid = [of(0.2, 0.99, s) for s in (0.5, 1.0, 2.0, 3.0)]
    settings = (*grid, of(0.2, 0.9, 4.0), of(0.2, 0.99, 2.5, temperature=1.5))
    chosen = calibration.Calibration(grid[1], settings, 0.4, 0.9)
    monkeypatch.setattr(heads, "calibrate_heads", lambda *_: chosen)

    def ask(sampler, draws, guidance_scale, **_):
        ended = {0.0: 0.95, 1.0: 0.9, 2.0: 0.9, 3.0: 0.8}[guidance_scale]
        share = (drawn or shares) if draws.get("num_samples") == 4 else shares
        return Answered(1.0 if guidance_scale == 0 else share[guidance_scale], ended, 100)

    monkeypatch.setattr(heads, "prepare_asking", lambda *_: ask)
    sets = TrainingSets.__new__(TrainingSets)
    vars(sets).update(loss="classifier", counterfactuals=[1], rows=[], retained=[])
    config = tiny.make_settings(default, {})
    (head,) = heads.choose_setting(config, tiny_lm, [tiny.make_head(tiny_lm)], sets)
    assert (head.guidance_scale, head.record["recited"]) == (scale, recited)
    assert head.record["calibration"]["chosen"]["guidance_scale"] == scale
    assert heads.name_fault(head.record) == fault
    vars(sets).update(loss="distillation")
    (head,) = heads.choose_setting(config, tiny_lm, [tiny.make_head(tiny_lm)], sets)
    assert head.guidance_scale == 1.0
    assert not heads.name_fault(head.record)


@pytest.mark.parametrize(("recited", "unended"), [(0.04, 0.1), (0.3, 0.0), (0.0, 0.11)])
def test_auto_distils_where_the_classifier_has_a_fault(
    tiny_lm, monkeypatch, tmp_path, recited, unended
):
    fitted = []

    def fit(config, lm, sets, *, workdir, **_):
        fitted.append((config.train.loss, sets.loss, workdir))
        record = {"seconds": 0.0}
        if sets.loss == "classifier":
            record |= {"recited": recited, "unended": unended}
        return [dataclasses.replace(tiny.make_head(lm), model=sets.loss, record=record)]

    def make_sets(config, _):
        sets = TrainingSets.__new__(TrainingSets)
        loss = {"auto": "classifier"}.get(config.train.loss, config.train.loss)
        vars(sets).update(loss=loss, written={}, names=("Ada",), counterfactuals=[])
        return sets

    monkeypatch.setattr(t3jax, "load_lm", lambda *_: tiny_lm)
    monkeypatch.setattr(pipeline, "training_sets", make_sets)
    monkeypatch.setattr(pipeline, "fit_heads", fit)
    monkeypatch.setattr(pipeline, "digests", lambda *_: {})
    config = tiny.make_settings(default, {"model": "tiny", "workdir": str(tmp_path)})
    train._train(config, tiny_lm.mesh)
    classifier = ("classifier", "classifier", str(tmp_path))
    distilled = ("distillation", "distillation", f"{tmp_path}/distillation")
    assert fitted == ([classifier] if recited == 0.04 else [classifier, distilled])
    assert t3jax.load_head(tmp_path / "head").model == fitted[-1][0]


def test_a_sweep_distils_where_the_best_classifier_has_a_fault(tiny_lm, monkeypatch, tmp_path):
    found = calibration.Calibration(of(0.2, 0.99, 1.0), (), 0.4, 0.9)
    grids, written = [], []

    def make_sets(config, _):
        sets = TrainingSets.__new__(TrainingSets)
        vars(sets).update(loss=config.train.settle_loss("classifier").loss)
        return sets

    def train_grid(config, lm, sets, mesh):
        grids.append((config.train.loss, sets.loss, config.workdir))
        return Grid([tmp_path / sets.loss], [tiny.make_head(tiny_lm)], 1)

    def choose(config, lm, heads, sets, seeds):
        return found, {"recited": 0.3} if sets.loss == "classifier" else {}

    monkeypatch.setattr(pipeline, "training_sets", make_sets)
    monkeypatch.setattr(pipeline, "choose_among", choose)
    monkeypatch.setattr(sweep, "train_grid", train_grid)
    monkeypatch.setattr(sweep, "write_calibration", lambda *each: written.append(each) or "")
    for loss in ("auto", "classifier"):
        fields = {"workdir": str(tmp_path), "train.loss": loss}
        config = tiny.make_settings(default, fields)
        sweep._choose_by_made_up_names(config, tiny_lm, tiny_lm.mesh)
    classifier = ("classifier", "classifier", str(tmp_path))
    distilled = ("distillation", "distillation", f"{tmp_path}/distillation")
    assert grids == [classifier, distilled, classifier]
    names = ("distillation", "classifier")
    assert written == [(str(tmp_path), found, [tmp_path / name]) for name in names]
