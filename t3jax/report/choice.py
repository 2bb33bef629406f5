"""A sweep for people: what was chosen, the report of its evaluation, a table for the terminal."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from t3jax import files, hosts
from t3jax.evaluation import recompute, selection
from t3jax.evaluation.calibration import Calibrated, Calibration
from t3jax.evaluation.scoring import Setting
from t3jax.report.page import write_report
from t3jax.sweep import Sweep


def write_sweep(folder: str | os.PathLike[str], found: Sweep, *, title: str) -> str:
    """Writes `selection.json` and `report.html`.

    Args:
        folder: Where to.
        found: The sweep.
        title: Title of the report.

    Returns:
        Every setting's numbers, the choice, and how to use it, as text.

    Raises:
        OSError: If a file cannot be written.
    """
    folder = pathlib.Path(folder)
    chosen = found.chosen[0]
    summary = selection.summary_rows(found.choice, found.noise_floor)
    write_report(
        folder / "report.html",
        found.evaluation,
        title=title,
        selected=summary,
        featured=chosen.name,
    )
    if hosts.is_lead():
        described = selection.as_json(found.choice, found.noise_floor)
        files.write_json(folder / "selection.json", described)
    width = max(map(len, found.scored))
    heading = selection.rows_of(next(iter(found.scored.values()))).utility_name
    lines = [f"{'':{width}} {'forget quality':>15} {'D':>7}  {heading}"]
    for name, log in found.scored.items():
        quality = recompute.forget_quality(log, found.retain_scored)
        utility = selection.log_utility(log)
        lines.append(
            f"{name:{width}} {quality.p_value:15.3g} {quality.statistic:7.3f} {utility:.3f}"
        )
    lines += [f"head{index}: {path}" for index, path in enumerate(found.grid.folders)]
    lines += ["", *(f"{label}: {value} ({note})" for label, value, note in summary)]
    lines += [
        f"{chosen.name}, {metric}: {number:.3f}"
        for metric, number in _reworded(found, chosen.name).items()
    ]
    (head,) = chosen.heads
    lines += [
        f"written: {folder}/selection.json, {folder}/report.html",
        f"{_use(found.grid.folders[head], chosen)} --config.refinements={chosen.refinements.name}",
    ]
    return "\n".join(lines)


def write_calibration(
    folder: str | os.PathLike[str], calibration: Calibration, folders: Sequence[pathlib.Path]
) -> str:
    """Writes `selection.json` of a choice without a retain-only model.

    Args:
        folder: Where to.
        calibration: The choice.
        folders: Where each head is.

    Returns:
        Every setting's numbers, the choice, and how to use it, as text.

    Raises:
        OSError: If a file cannot be written.
    """
    folder = pathlib.Path(folder)
    if hosts.is_lead():
        heads = [str(path) for path in folders]
        files.write_json(
            folder / "selection.json", {"heads": heads, **dataclasses.asdict(calibration)}
        )
    lines = [f"{'head':>5} {'T':>5} {'s':>5} {'distance':>9} {'forget':>7} {'retained':>9}"]
    lines += [
        f"{each.head:>5} {each.base_temperature:5g} {each.guidance_scale:5.3g} "
        f"{each.distance:9.3f} {each.forget_probability:7.3f} {each.retained:9.3f}"
        for each in calibration.settings
    ]
    lines += [f"head{index}: {path}" for index, path in enumerate(folders)]
    lines += [
        "",
        str(calibration),
        f"written: {folder}/selection.json",
        _use(folders[calibration.chosen.head], calibration.chosen),
    ]
    return "\n".join(lines)


def _use(folder: pathlib.Path, chosen: Setting | Calibrated) -> str:
    return (
        f"use: --config.head={folder} --config.base_temperature={chosen.base_temperature:g} "
        f"--config.guidance_scale={chosen.guidance_scale:g}"
    )


def _reworded(found: Sweep, name: str) -> dict[str, float]:
    """Numbers on what no head trained on: reworded questions."""
    log = found.evaluation.unlearning[name]
    metrics = ("forget_paraphrased_Q_A_ROUGE", "retain_paraphrased_Q_A_ROUGE")
    return {metric: log[metric]["agg_value"] for metric in metrics if metric in log}
