"""The report's figures, drawn by matplotlib and returned as SVG pictures that HTML holds inline.

Colours are Okabe and Ito's, which the colour-blind can distinguish; markers and dashes are
redundant with them.
"""

import base64
import functools
import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from t3jax.report import tables

if TYPE_CHECKING:  # slow to import: only who draws waits
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from t3jax.study import variations

BLUE, ORANGE, GREEN, GREY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#666666", "#CC79A7"
LEVEL = 0.05
FLOOR = 1e-12  # of forget quality in the trade-off
# By kind of setting: colour, marker and line.
STYLES = {
    tables.BASE: (GREY, "s", ":"),
    tables.UNLEARNED: (BLUE, "o", "-"),
    tables.TEMPERED: (ORANGE, "v", "--"),
    tables.TILTED: (PURPLE, "^", "-."),
    tables.RETAIN_MODEL: (GREEN, "*", "-"),
}
# Styles of a temperature sweep, line by line.
_LINES = [style for kind, style in STYLES.items() if kind != tables.RETAIN_MODEL]
_SETTINGS: Any = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "t3jax",
}


class Point(NamedTuple):
    """A setting in the trade-off; `kind` is a key of `STYLES`, and an empty label shows none."""

    label: str
    kind: str
    quality: float
    utility: float


class Line(NamedTuple):
    """A line of a temperature sweep."""

    label: str
    temperatures: Sequence[float]
    values: Sequence[float]


def _render(draw: Callable[..., None]) -> Callable[..., str]:
    """Makes a function that draws on axes one that returns the picture in this module's style."""

    @functools.wraps(draw)
    def render(*arguments: object) -> str:
        import matplotlib as mpl  # slow to import: only who draws waits
        from matplotlib.figure import Figure  # no pyplot: nothing global, no display

        with mpl.rc_context(_SETTINGS):
            figure = Figure(figsize=(5.4, 3.8), layout="constrained")
            axes = figure.subplots()
            draw(axes, *arguments)
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
            return "data:image/svg+xml;base64," + base64.b64encode(_write_svg(figure)).decode()

    return render


@_render
def trade_off(axes: "Axes", points: Sequence[Point], utility_name: str) -> None:
    """Forget quality against utility: up and right is better."""
    for kind, (colour, marker, _) in STYLES.items():
        members = [point for point in points if point.kind == kind]
        if members:
            axes.scatter(
                [point.utility for point in members],
                [max(point.quality, FLOOR) for point in members],
                s=190 if kind == tables.RETAIN_MODEL else 55,
                c=colour,
                marker=marker,
                label=kind,
                zorder=3,
            )
    for point in points:
        if point.label:
            axes.annotate(
                point.label,
                (point.utility, max(point.quality, FLOOR)),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
    axes.axhline(LEVEL, color="black", linewidth=1, linestyle="--")
    axes.text(0.01, LEVEL * 1.5, "p = 0.05", transform=axes.get_yaxis_transform(), fontsize=9)
    axes.set(yscale="log", xlabel=utility_name, ylabel="forget quality (p)")
    axes.set_ylim(FLOOR / 10, 20)
    axes.margins(x=0.12)  # room for labels


@_render
def distributions(
    axes: "Axes", ratios: Mapping[str, tuple[str, Float[np.ndarray, "rows"]]]
) -> None:
    """Distribution functions of the forget rows' truth ratios; by label, kind and ratios."""
    for label, (kind, values) in ratios.items():
        colour, _, line = STYLES[kind]
        axes.ecdf(values, label=label, color=colour, linestyle=line, linewidth=2)
    axes.set(xscale="log", xlabel="truth ratio (log scale)", ylabel="share of forget rows below")
    low, high = axes.get_xlim()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    ticks = [m * 10.0**decade for decade in decades for m in (1, 2, 5)]
    if len(decades) > 2:
        ticks = [10.0**decade for decade in decades]
    shown = [tick for tick in ticks if low <= tick <= high]
    axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
    axes.set_xticks([], minor=True)


@_render
def temperature_sweep(axes: "Axes", panel: str, lines: Sequence[Line]) -> None:
    """One number over T, a line for each s."""
    for line, style in zip(lines, itertools.cycle(_LINES)):
        _plot_line(axes, line.temperatures, line.values, style, line.label)
    axes.set(xlabel="T", ylabel=panel)


@_render
def leaks(axes: "Axes", rates: Mapping[str, tuple[str, Mapping[int, float]]]) -> None:
    """Leak rate by number of samples; by label, kind and rate at n."""
    for label, (kind, by_samples) in rates.items():
        samples = sorted(by_samples)
        _plot_line(axes, samples, [by_samples[n] for n in samples], STYLES[kind], label)
    axes.set(xlabel="answers drawn", ylabel="questions with a leak", ylim=(-0.02, 1.02))
    axes.locator_params(axis="x", integer=True)


def draw_variations(points: Sequence["variations.Point"]) -> bytes:
    """Draws D, utility without ROUGE and the forget answers' probability over each axis, as SVG.

    Lines are the median seed; bands are the 95 % bootstrap interval of the first seed or, for D,
    the range of the seeds.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels: dict[str, Callable[[variations.Point], tuple[Sequence[float], tuple[float, float]]]] = {
        "distance D": lambda p: (p.distances, (min(p.distances), max(p.distances))),
        "utility": lambda p: (p.utilities, p.utility_interval),
        "forget probability": lambda p: (p.forget_probs, p.forget_interval),
    }
    by_axis: dict[str, dict[str, list[variations.Point]]] = {}
    for point in sorted(points, key=lambda point: point.value):
        by_axis.setdefault(point.axis, {}).setdefault(point.line, []).append(point)
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(11, 2.9 * len(by_axis)), layout="constrained")
        grid = figure.subplots(len(by_axis), len(panels), squeeze=False)
        for row, (axis, lines) in zip(grid, by_axis.items(), strict=True):
            for axes, (panel, number) in zip(row, panels.items(), strict=True):
                for (label, members), style in zip(lines.items(), itertools.cycle(_LINES)):
                    values = [point.value for point in members]
                    seeds, bands = zip(*(number(point) for point in members), strict=True)
                    low, high = zip(*bands, strict=True)
                    axes.fill_between(values, low, high, color=style[0], alpha=0.15, linewidth=0)
                    medians = [float(np.median(by_seed)) for by_seed in seeds]
                    _plot_line(axes, values, medians, style, label)
                axes.set(xlabel=axis, ylabel=panel)
                if values[0] > 0 and values[-1] > 6 * values[0]:
                    axes.set_xscale("log")
                    axes.set_xticks(values, [f"{value:g}" for value in values])
                    axes.minorticks_off()
            row[0].legend(fontsize=8)
        return _write_svg(figure)


def _plot_line(
    axes: "Axes",
    x: Sequence[int | float],
    y: Sequence[int | float],
    style: tuple[str, str, str],
    label: str,
) -> None:
    colour, marker, dashes = style
    axes.plot(x, y, color=colour, marker=marker, linestyle=dashes, label=label)


def _write_svg(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
