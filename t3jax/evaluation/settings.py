"""Settings: which distributions are scored and sampled from, and the controls of each.

T tempers and s tilts. Both together are compared with each alone: (T, s = 0) and (T = 1,
s' = T · s), whose greedy text is the same where there are no refinements.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

from t3jax.head_io import Head, common_default
from t3jax.refinements import PLAIN, Refinements


@dataclasses.dataclass(frozen=True)
class Setting:
    """A distribution to score or to sample from: T, s and the heads that tilt.

    Attributes:
        name: For tables, files and folders.
        base_temperature: T.
        guidance_scale: s.
        heads: Indices of heads that are served together; without any s must be 0.
        refinements: Extensions of the method; they need a head.
    """

    name: str
    base_temperature: float = 1.0
    guidance_scale: float = 0.0
    heads: tuple[int, ...] = ()
    refinements: Refinements = PLAIN

    def __post_init__(self):
        if not re.fullmatch(r"\w[\w.+-]*", self.name):
            raise ValueError(
                f"setting {self.name!r}: its name becomes a folder's; use letters, digits, and ._+-"
            )
        if not 0 < self.base_temperature < math.inf or not 0 <= self.guidance_scale < math.inf:
            raise ValueError(
                f"setting {self.name}: base_temperature must be positive and guidance_scale not "
                "negative, both finite, got "
                f"{self.base_temperature} and {self.guidance_scale}"
            )
        if not self.heads and (self.guidance_scale > 0 or self.refinements != PLAIN):
            raise ValueError(
                f"setting {self.name}: guidance_scale > 0 needs a head, and so do refinements"
            )


BASE = Setting("base")


def temper_only(setting: Setting) -> Setting:
    """The control (T, s = 0) of a setting."""
    return make_setting(setting.heads, setting.base_temperature, 0.0, setting.refinements)


def tilt_only(setting: Setting) -> Setting:
    """The control (T = 1, s' = T · s) of a setting."""
    scale = setting.base_temperature * setting.guidance_scale
    return make_setting(setting.heads, 1.0, scale, setting.refinements)


def make_setting(
    heads: tuple[int, ...], temperature: int | float, scale: int | float, refinements: Refinements
) -> Setting:
    """A setting with its name, without options that have no effect.

    Left out are a gate at T = 1, protection at s = 0, the product of one head, and heads that
    neither tilt nor gate. The name lists heads, T, s and refinements: `head0-T2.5-s1`,
    `head0+1-T2.5-s1-gated`. T = 1 without a tilt is the base model.
    """
    refinements = dataclasses.replace(
        refinements,
        gated=refinements.gated and temperature != 1,
        protected=refinements.protected if scale > 0 else (),
        combine=refinements.combine if len(heads) > 1 else PLAIN.combine,
    )
    name = f"T{temperature:g}"
    if scale > 0 or refinements.gated:
        name = f"head{'+'.join(map(str, heads))}-{name}-s{scale:g}"
    else:
        heads, refinements = (), PLAIN
    if refinements != PLAIN:
        name += f"-{refinements.name}"
    setting = Setting(name, float(temperature), float(scale), heads, refinements)
    return BASE if serve_alike(setting, BASE) else setting


def serve_alike(first: Setting, second: Setting) -> bool:
    """Whether two settings are the same distribution, whatever their names."""
    return dataclasses.replace(first, name=second.name) == second


def settings_grid(
    heads: Sequence[Head],
    temperatures: Sequence[float] = (),
    scales: Sequence[float] = (),
    controls: bool = True,
    refinements: Sequence[Refinements] = (PLAIN,),
    groups: Sequence[tuple[int, ...]] | None = None,
) -> list[Setting]:
    """The base model, every head at every (T, s), and the controls of each (T, s).

    Without temperatures or scales each head's own are taken. `groups` are indices of heads that
    are served together; None: each alone. Settings are as `make_setting` gives them, each
    distribution once, the base model first. If heads of a group differ in T or s, values of these
    are required.
    """
    settings = [BASE]
    for group in [(index,) for index in range(len(heads))] if groups is None else groups:
        members = [heads[index] for index in group]
        for temperature, scale, refined in itertools.product(
            temperatures or (common_default(members, "base_temperature", 1.0),),
            scales or (common_default(members, "guidance_scale", 0.0),),
            refinements,
        ):
            setting = make_setting(group, temperature, scale, refined)
            pair = (temper_only(setting), tilt_only(setting)) if controls else ()
            for new in (setting, *pair):
                if not any(serve_alike(new, known) for known in settings):
                    settings.append(new)
    return settings


def find_controls(setting: Setting, settings: Sequence[Setting]) -> list[Setting]:
    """Finds the controls of a setting among others."""
    controls = temper_only(setting), tilt_only(setting)
    return [
        known
        for known in settings
        if known.name != setting.name and any(serve_alike(known, control) for control in controls)
    ]
