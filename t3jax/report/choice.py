"""A sweep for people: the choice, the report of its evaluation, a table for the terminal."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from t3jax import files, hosts
from t3jax.evaluation import metrics, selection
from t3jax.evaluation.calibration import Calibrated, Calibration
from t3jax.evaluation.settings import Setting
from t3jax.report.page import write_report
from t3jax.sweep import Sweep


def write_sweep(folder: str | os.PathLike[str], sweep: Sweep, *, title: str) -> str:
    """Writes `selection.json` and `report.html`; returns all scores and the choice as text."""
    folder = pathlib.Path(folder)
    chosen = sweep.chosen[0]
    summary = summary_rows(sweep.choice, sweep.noise_floor)
    write_report(
        folder / "report.html",
        sweep.evaluation,
        title=title,
        selected=summary,
        featured=chosen.name,
    )
    if hosts.is_lead():
        files.write_json(folder / "selection.json", as_json(sweep.choice, sweep.noise_floor))
    width = max(map(len, sweep.scored))
    heading = selection.rows_of(next(iter(sweep.scored.values()))).utility_name
    lines = [f"{'':{width}} {'forget quality':>15} {'D':>7}  {heading}"]
    for name, log in sweep.scored.items():
        score = selection.score_log(log, sweep.retain_scored)
        lines.append(
            f"{name:{width}} {score.quality.p_value:15.3g} {score.quality.statistic:7.3f} "
            f"{score.utility:.3f}"
        )
    lines += [f"head{index}: {path}" for index, path in enumerate(sweep.grid.folders)]
    lines += ["", *(f"{label}: {value} ({note})" for label, value, note in summary)]
    lines += [
        f"{chosen.name}, {metric}: {number:.3f}"
        for metric, number in _read_paraphrased(sweep, chosen.name).items()
    ]
    (head,) = chosen.heads
    lines += [
        f"written: {folder}/selection.json, {folder}/report.html",
        f"{_show_use(sweep.grid.folders[head], chosen)} "
        f"--config.refinements={chosen.refinements.name}",
    ]
    return "\n".join(lines)


def summary_rows(
    choice: selection.CrossFit, noise_floor: metrics.ForgetQuality | None = None
) -> list[tuple[str, str, str]]:
    """Label, value and meaning of a cross-fit's numbers; the noise floor compares retain models."""

    def show_test(quality: metrics.ForgetQuality) -> str:
        return f"p = {quality.p_value:.3g}, D = {quality.statistic:.3f}"

    def show_choice(chosen: selection.Choice) -> tuple[str, str]:
        met = "" if chosen.passed else "; no setting met the rule's condition, this one is nearest"
        optimistic = f"{show_test(chosen.score.quality)}, utility {chosen.score.utility:.3f}"
        return chosen.name, f"on the rows that chose it: {optimistic}{met}"

    table = [
        ("chosen on half A", *show_choice(choice.halves[0])),
        ("chosen on half B", *show_choice(choice.halves[1])),
    ]
    for number, held_out in enumerate(choice.held_out):
        which = f", seed {number + 1} of {len(choice.held_out)}" if len(choice.held_out) > 1 else ""
        quality, interval = held_out.score.quality, held_out.utility_interval
        table += [
            (
                f"forget quality, cross-fitted{which}",
                show_test(quality),
                "all rows, each scored by a setting chosen without it; at D above "
                f"{quality.critical:.3f} p falls under 0.05",
            ),
            (
                f"{held_out.utility_name}, cross-fitted{which}",
                f"{held_out.score.utility:.3f}",
                f"95 % interval {interval.low:.3f} to {interval.high:.3f}",
            ),
        ]
    table.append(("chosen on all rows, to use", *show_choice(choice.overall)))
    if noise_floor is not None:
        note = f"two retain models against each other; critical D {noise_floor.critical:.3f}"
        table.append(("noise floor", show_test(noise_floor), note))
    return table


def as_json(
    choice: selection.CrossFit, noise_floor: metrics.ForgetQuality | None = None
) -> dict[str, object]:
    """A cross-fit as plain nested values."""
    floor = None if noise_floor is None else dataclasses.asdict(noise_floor)
    return {**dataclasses.asdict(choice), "noise_floor": floor}


def write_calibration(
    folder: str | os.PathLike[str], calibration: Calibration, folders: Sequence[pathlib.Path]
) -> str:
    """Writes `selection.json` of a choice without a retain-only model; returns it as text."""
    folder = pathlib.Path(folder)
    if hosts.is_lead():
        heads = [str(path) for path in folders]
        files.write_json(
            folder / "selection.json", {"heads": heads, **dataclasses.asdict(calibration)}
        )
    lines = [f"{'head':>5} {'T':>5} {'s':>5} {'distance':>9} {'forget':>7} {'retained':>9}"]
    lines += [
        f"{setting.head:>5} {setting.base_temperature:5g} {setting.guidance_scale:5.3g} "
        f"{setting.distance:9.3f} {setting.forget_probability:7.3f} {setting.retained:9.3f}"
        for setting in calibration.settings
    ]
    lines += [f"head{index}: {path}" for index, path in enumerate(folders)]
    lines += [
        "",
        str(calibration),
        f"written: {folder}/selection.json",
        _show_use(folders[calibration.chosen.head], calibration.chosen),
    ]
    return "\n".join(lines)


def _show_use(folder: pathlib.Path, chosen: Setting | Calibrated) -> str:
    return (
        f"use: --config.head={folder} --config.base_temperature={chosen.base_temperature:g} "
        f"--config.guidance_scale={chosen.guidance_scale:g}"
    )


def _read_paraphrased(sweep: Sweep, name: str) -> dict[str, float]:
    """ROUGE on paraphrased questions, which no head is trained on."""
    aggregate = sweep.evaluation.unlearning[name].aggregates
    names = ("forget_paraphrased_Q_A_ROUGE", "retain_paraphrased_Q_A_ROUGE")
    return {metric: aggregate[metric] for metric in names if metric in aggregate}
