"""The diagnosis of every evaluated head: predicted errors over T beside measured forget quality.

`t3jax.theory.diagnose` computes it from held-out rows; this module chooses the rows and the
settings, and writes the sentences. A head that cannot be diagnosed gets a reason.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from t3jax.evaluation import aggregates
from t3jax.evaluation.logs import MissingMetricError
from t3jax.evaluation.metrics import ForgetQuality
from t3jax.evaluation.questions import SETS
from t3jax.evaluation.settings import Setting, tilt_only
from t3jax.pipeline import Evaluation
from t3jax.refinements import PLAIN
from t3jax.report.tables import MISSING, Cell, Row, Table
from t3jax.theory import diagnose


@dataclasses.dataclass(frozen=True, eq=False)
class HeadDiagnosis:
    """Predictions for a head, and its measurements.

    Attributes:
        name: The head as settings name it: `head0`.
        reason: Why it was not diagnosed; empty if it was.
        diagnosis: The diagnosis; None if there is none.
        measured: Forget quality by T, for the T evaluated at the diagnosis's s.
        reworded: Whether the rows are paraphrased questions, which no head is trained on.
    """

    name: str
    reason: str = ""
    diagnosis: diagnose.Diagnosis | None = None
    measured: Mapping[float, ForgetQuality] = dataclasses.field(default_factory=dict)
    reworded: bool = False

    @property
    def best_measured(self) -> float | None:
        """The T of the smallest D; None if fewer than two were measured."""
        if len(self.measured) < 2:
            return None
        return min(self.measured, key=lambda temperature: self.measured[temperature].statistic)


class Section(NamedTuple):
    """A diagnosis as the page shows it."""

    name: str
    sentences: list[str]
    table: Table | None


def diagnose_heads(evaluation: Evaluation) -> list[HeadDiagnosis]:
    """Diagnoses every head of an evaluation, at the head's s or the first that was evaluated.

    The held-out rows are paraphrased questions of the forget and retain sets, or the questions
    themselves without these.
    """
    diagnoses = []
    for index in range(len(evaluation.examined.store.heads)):
        served = [setting for setting in evaluation.settings if index in setting.heads]
        if served:
            diagnoses.append(_diagnose_head(evaluation, index, served))
    return diagnoses


def _diagnose_head(
    evaluation: Evaluation, index: int, settings: Sequence[Setting]
) -> HeadDiagnosis:
    name, examined = f"head{index}", evaluation.examined
    head = examined.store.heads[index]
    for needed in ("forget", "retain"):
        if needed not in examined.sets:
            return HeadDiagnosis(name, f"no {SETS[needed]} set was given")
    if reason := diagnose.find_obstacle(head):
        return HeadDiagnosis(name, reason)
    settings = [s for s in settings if s.heads == (index,) and s.refinements == PLAIN]
    if not settings:
        return HeadDiagnosis(name, "it was not evaluated by itself and without refinements")
    controls = [tilt_only(setting).name for setting in settings if setting.base_temperature != 1]
    scales = [setting.guidance_scale for setting in settings if setting.name not in controls]
    scale = head.guidance_scale if head.guidance_scale in scales else scales[0]
    at_scale = {s.base_temperature: s for s in settings if s.guidance_scale == scale}
    temperatures = sorted({*diagnose.TEMPERATURES, *(t for t in at_scale if t >= 1)})
    diagnosis = diagnose.diagnose_sets(
        examined.store.with_heads([head]),
        examined.sets,
        temperatures,
        scale,
        examined.retain_store,
    )
    measured = {}
    for temperature, setting in sorted(at_scale.items()):
        try:
            measured[temperature] = aggregates.forget_quality(
                evaluation.logs[setting.name], evaluation.retain_log
            )
        except MissingMetricError:
            continue
    reworded = examined.sets["forget"].reworded and examined.sets["retain"].reworded
    return HeadDiagnosis(name, "", diagnosis, measured, bool(reworded))


def describe(head: HeadDiagnosis) -> list[str]:
    """A diagnosis in sentences: loss, peak, the suggested T, and the T that measured best."""
    diagnosis = head.diagnosis
    if diagnosis is None:
        return [f"Not diagnosed: {head.reason}."]
    low, high = diagnosis.interval
    suggested = ", ".join(f"T = {value:g} {by}" for by, value in diagnosis.suggested.items())
    rows = "reworded questions" if head.reworded else "the questions, which the head may know"
    sentences = [
        f"Held-out loss on {rows}: {diagnosis.loss:.4f} nats a token (95 % interval {low:.4f} to "
        f"{high:.4f}), an upper bound of the excess risk.",
        f"Probability of a forget token under the base model: median {diagnosis.peak[0]:.3f}, "
        f"largest {diagnosis.peak[1]:.3f}.",
        f"Suggested at s = {diagnosis.scale:g}: {suggested}.",
    ]
    if diagnosis.best:
        of_all, of_secret = diagnosis.best.values()
        sentences.append(
            f"Smallest errors against the retain model: of all tokens at T = {of_all:g}, of secret "
            f"ones at T = {of_secret:g}."
        )
    if head.best_measured is None:
        sentences.append("Forget quality was measured at fewer than two of these T.")
    else:
        tried = ", ".join(f"{value:g}" for value in head.measured)
        sentences.append(
            f"Smallest distance D of whole answers: T = {head.best_measured:g} of {tried}."
        )
    return sentences


def describe_diagnoses(heads: Sequence[HeadDiagnosis]) -> str:
    """Diagnoses as text, a line for each sentence."""
    return "\n".join(f"{head.name}: {line}" for head in heads for line in describe(head))


def make_section(head: HeadDiagnosis) -> Section:
    """A diagnosis as the page shows it."""
    diagnosis = head.diagnosis
    if diagnosis is None:
        return Section(head.name, describe(head), None)
    names = {name: f"{name} error, measured" for name in diagnose.Measured._fields}
    columns = {names.get(name, name): values for name, values in diagnosis.columns.items()}
    rows = [
        Row(
            f"T = {temperature:g}",
            "",
            [
                *(Cell(f"{values[k]:.3g}") for values in columns.values()),
                _show_quality(head.measured.get(temperature)),
            ],
        )
        for k, temperature in enumerate(diagnosis.temperatures)
    ]
    return Section(head.name, describe(head), Table([*columns, "forget quality"], rows))


def _show_quality(quality: ForgetQuality | None) -> Cell:
    if quality is None:
        return MISSING
    return Cell(f"{quality.p_value:.2g}", f"D {quality.statistic:.3f}")
