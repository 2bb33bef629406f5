"""T and s without a retain-only model: the base model under made-up names takes its place.

A request to forget comes without a model that never saw the forget rows. The base model gives
answers about people who do not exist the probability that such a model would give the forget
answers. The setting to serve matches the distribution of these probabilities best, among those
under which the retain answers keep their probability.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import scipy  # opens `stats`, which takes most of a second to import, when it is used

from t3jax.data import Example, evenly_spread
from t3jax.evaluation.metrics import probability
from t3jax.evaluation.scoring import score_texts
from t3jax.evaluation.settings import BASE, Setting
from t3jax.head_io import Head
from t3jax.lm.model import LM
from t3jax.refinements import PLAIN, Refinements

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)  # T · s
TEMPERATURES = (1.0, 1.25, 1.5, 2.5)
GRID = tuple(itertools.product(TEMPERATURES, SCALES))
_MOST_ROWS = 200
_LEAST_RETAINED = 0.97
# Limits of what counts as forgotten: the probability, over that of the made-up-name level, and the
# share of the log-probability that an answer loses there.
_ABOVE_LEVEL = 1.25
_LEAST_LOST = 0.8


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """How one setting compares with the made-up-name level.

    Attributes:
        base_temperature: T.
        guidance_scale: s.
        distance: Kolmogorov-Smirnov distance of the forget answers' probabilities, in [0, 1].
        forget_probability: Mean probability of the forget answers, served.
        retained: Mean probability of the retain answers, served, over the base model's.
        head: Index of the head.
    """

    base_temperature: float
    guidance_scale: float
    distance: float
    forget_probability: float
    retained: float
    head: int = 0


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The chosen setting, and the candidates.

    Attributes:
        chosen: The setting to serve.
        settings: All candidates.
        made_up_probability: Mean probability of the forget answers at the made-up-name level.
        base_probability: Mean probability of the forget answers under the base model.
    """

    chosen: Calibrated
    settings: tuple[Calibrated, ...]
    made_up_probability: float
    base_probability: float

    @property
    def stronger(self) -> list[Calibrated]:
        """Settings of the chosen T that tilt more and keep 97 % of the retain answers, in order."""
        c = self.chosen
        return [
            setting
            for setting in sorted(self.settings, key=lambda setting: setting.guidance_scale)
            if (setting.head, setting.base_temperature) == (c.head, c.base_temperature)
            and setting.guidance_scale > c.guidance_scale
            and setting.retained >= _LEAST_RETAINED
        ]

    def __str__(self) -> str:
        c = self.chosen
        return (
            f"T = {c.base_temperature:g}, s = {c.guidance_scale:g} chosen without a retain-only "
            f"model: probability of the forget answers {c.forget_probability:.3f} (base "
            f"{self.base_probability:.3f}, under made-up names {self.made_up_probability:.3f}, "
            f"distance {c.distance:.3f}); retain answers keep {c.retained:.3f} of theirs"
        )


def choose_setting(settings: Sequence[Calibrated], level: float, base: float) -> Calibrated:
    """Chooses the smallest distance among the settings that forget and retain.

    A setting forgets if the forget answers are at most 1.25 times as probable as at the
    made-up-name level, and lose at least 80 % of the log-probability that they lose there; `level`
    and `base` are the probabilities there and under the base model. The second condition decides
    where most tokens of an answer are not secret: they are probable under every name. A setting
    retains if the retain answers keep 97 % of their probability. Settings at T = 1 are preferred:
    at a higher T, untruncated sampling draws from the flattened tail of the vocabulary. The weaker
    tilt breaks ties. If no setting does both, the setting with the least probable forget answers
    among those that retain is chosen, or else the one that retains most.
    """
    retaining = [setting for setting in settings if setting.retained >= _LEAST_RETAINED]
    if not retaining:
        return max(settings, key=lambda setting: setting.retained)
    limit = min(_ABOVE_LEVEL * level, level**_LEAST_LOST * base ** (1 - _LEAST_LOST))
    forgetting = [setting for setting in retaining if setting.forget_probability <= limit]
    if not forgetting:
        return min(retaining, key=lambda setting: setting.forget_probability)
    untempered = [setting for setting in forgetting if setting.base_temperature == 1]
    return min(
        untempered or forgetting,
        key=lambda setting: (setting.distance, setting.base_temperature * setting.guidance_scale),
    )


def calibrate(
    lm: LM,
    heads: Sequence[Head],
    forget: Sequence[Example],
    counterfactuals: Sequence[Sequence[Example]],
    retain: Sequence[Example],
    *,
    grid: Sequence[tuple[float, float]] = GRID,
    refinements: Refinements = PLAIN,
    seeds: int = 1,
) -> Calibration:
    """Scores forget and retain answers under a grid of heads and settings and chooses one.

    `counterfactuals` are, for each forget row, the same row about made-up people; `grid` holds
    pairs of T and T · s. Each `seeds` consecutive heads differ in their seed alone: a setting is
    compared by the mean over them and named by the first. At most 200 rows of each set are scored.
    """
    if not forget or not retain:
        raise ValueError("choosing T and s needs forget and retain rows; one of the sets is empty")
    if not all(counterfactuals):
        row = next(i for i, of_row in enumerate(counterfactuals, start=1) if not of_row)
        raise ValueError(f"forget row {row} has no counterfactual; give at least one for each row")
    pairs = evenly_spread(list(zip(forget, counterfactuals, strict=True)), _MOST_ROWS)
    rows = [row for row, _ in pairs]
    made_up = [counterfactual for _, of_row in pairs for counterfactual in of_row]
    index = np.repeat(np.arange(len(pairs)), [len(of_row) for _, of_row in pairs])
    (scores,) = score_texts(lm, made_up, [BASE])
    level = np.bincount(index, probability(scores.avg_loss)) / np.bincount(index)
    settings = [
        Setting(
            f"head{i}-T{temperature:g}-s{scale / temperature:g}",
            temperature,
            scale / temperature,
            (i,),
            refinements,
        )
        for first in range(0, len(heads), seeds)
        for temperature, scale in grid
        for i in range(first, first + seeds)
    ]
    of_forget = score_texts(lm, rows, [BASE, *settings], heads)
    of_retain = score_texts(lm, evenly_spread(retain, _MOST_ROWS), [BASE, *settings], heads)
    forgotten = [probability(scores.avg_loss) for scores in of_forget]
    retained = [float(probability(scores.avg_loss).mean()) for scores in of_retain]
    ks_2samp = scipy.stats.ks_2samp
    results = []
    for i in range(0, len(settings), seeds):
        served = slice(1 + i, 1 + i + seeds)
        results.append(
            Calibrated(
                settings[i].base_temperature,
                settings[i].guidance_scale,
                float(np.mean([ks_2samp(seed, level).statistic for seed in forgotten[served]])),
                float(np.mean(forgotten[served])),
                float(np.mean(retained[served])) / retained[0],
                *settings[i].heads,
            )
        )
    made_up_probability, base_probability = float(level.mean()), float(forgotten[0].mean())
    return Calibration(
        choose_setting(results, made_up_probability, base_probability),
        tuple(results),
        made_up_probability,
        base_probability,
    )
