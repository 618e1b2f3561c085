"""Figures: learning-rate sweeps, probe profiles, stems, frequency responses, saliency.

Also the parts that all figures have in common: colors, a figure with its axes, a legend, and the
output file. matplotlib is imported when a figure is drawn.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from flaxtransfer.metrics import shown
from flaxtransfer.paths import visible

if TYPE_CHECKING:
    from flaxtransfer.advice.advise import Advice
    from flaxtransfer.analysis.frequency import FrequencyResponse
    from flaxtransfer.analysis.profile import Profile
    from flaxtransfer.analysis.stem import StemReport
    from flaxtransfer.training.lr_finder import RateSweep

__all__ = [
    "BLUE",
    "FIGURE_SUFFIXES",
    "RED",
    "SERIES",
    "FigureTarget",
    "check_figure_path",
    "figure_text",
    "legend",
    "new_figure",
    "plot_frequency",
    "plot_profile",
    "plot_rate_sweeps",
    "plot_saliency",
    "plot_stem",
    "plot_training",
    "save_figure",
    "wrap_text",
]

BLUE, RED, _GREEN, _PINK, _ORANGE, _SKY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)
"""The palette of Okabe and Ito, safe for color-blind readers."""

SERIES = ((BLUE, "o"), (RED, "s"), (_GREEN, "^"), (_PINK, "D"), (_ORANGE, "v"), (_SKY, "P"))
"""Colors, each with its own marker, so that color is never the only difference."""

FigureTarget = str | os.PathLike[str] | BinaryIO
"""The path of a .png, .pdf or .svg, replaced if it exists; or an open binary file, for a PNG."""

FIGURE_SUFFIXES = (".png", ".pdf", ".svg")

_RATE_PANELS_ACROSS = 3
"""Panels per row."""

_FILTERS_ACROSS = 16
"""Filters per row."""

_PAIRS_ACROSS = 4
"""Images with their overlays per row."""


def plot_rate_sweeps(path: str | os.PathLike[str], sweeps: Mapping[str, RateSweep]) -> None:
    """Learning-rate sweeps: loss over learning rate, one panel per sweep.

    Each panel has the training loss of every step in nats (thin), its exponential average (thick),
    the rate of steepest descent and the middle of the descent. The axis ends at twice the first
    loss, because a diverging loss would flatten the rest.

    Args:
        path: A .png, .pdf or .svg, replaced if it exists.
        sweeps: Results of ``find_learning_rate`` by panel title.

    Raises:
        ValueError: No sweep, or another kind of file.
        FileNotFoundError: The folder does not exist.
    """
    path = check_figure_path(path)
    if not sweeps:
        raise ValueError("sweeps must have >= 1 entry, got none")
    across = min(_RATE_PANELS_ACROSS, len(sweeps))
    down = -(-len(sweeps) // across)
    figure = _blank_figure((1.0 + 4.0 * across, 0.4 + 3.6 * down))
    panels = figure.subplots(down, across, squeeze=False)
    for number, panel in enumerate(panels.flat):
        panel.set_visible(number < len(sweeps))
    for panel, (title, sweep) in zip(panels.flat, sweeps.items(), strict=False):
        panel.plot(sweep.rates, sweep.losses, color="0.75", linewidth=0.8, label="each step")
        panel.plot(sweep.rates, sweep.smoothed, color="tab:blue", linewidth=2, label="average")
        for rate, color, style, name in (
            (sweep.suggestion, "tab:red", "--", "steepest descent"),
            (sweep.valley, "tab:green", ":", "middle of the descent"),
        ):
            if rate is not None:
                label = f"{name}: {rate:.1e}"
                panel.axvline(rate, color=color, linestyle=style, label=label)
        low, high = min(sweep.smoothed), min(max(sweep.smoothed), 2 * sweep.smoothed[0])
        margin = 0.08 * max(high - low, 1e-3)
        panel.set_ylim(low - margin, high + margin)
        panel.set_xscale("log")
        title = figure_text(title)
        panel.set_title(f"{title} (diverged)" if sweep.diverged else title)
        panel.set_xlabel("learning rate")
        panel.set_ylabel("training loss, nats")
        # Below the panel: inside it, it would cover a curve.
        panel.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    figure.savefig(path, dpi=150)


def plot_profile(profile: Profile, path: str | os.PathLike[str]) -> None:
    """Probe profile: skill of a probe after each segment, with standard errors.

    Args:
        profile: From ``probe_profile``.
        path: A file in a format that matplotlib writes: .png, .svg, .pdf.

    Raises:
        ValueError: A format that matplotlib does not write.
        OSError: The file cannot be written.
    """
    figure = _blank_figure((6, 3.5))
    axes = figure.add_subplot()
    names = [probe.segment for probe in profile.probes]
    percent = [100 * probe.skill for probe in profile.probes]
    errors = [100 * probe.standard_error for probe in profile.probes]
    axes.errorbar(names, percent, yerr=errors, marker="o", capsize=3)
    for name, value, error in zip(names, percent, errors, strict=True):
        axes.annotate(
            f"{value:.1f}",
            (name, value + error),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
        )
    axes.axhline(100 * profile.guess, color="0.6", linestyle="--", linewidth=1)
    axes.annotate(
        "guess",
        (1, 100 * profile.guess),
        ha="right",
        va="bottom",
        xycoords=("axes fraction", "data"),
        color="0.4",
        fontsize="small",
    )
    axes.margins(x=0.1, y=0.15)
    axes.set_xlabel("probed after")
    axes.set_ylabel(f"{profile.measure.name}, held out (points)")
    axes.set_title(f"{profile.kind} probes, {profile.examples} images", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def plot_advice(advice: Advice, path: str | os.PathLike[str] | BinaryIO) -> None:
    """What heads know at each depth, beside the spectrum of the pixels and a guess.

    Args:
        advice: From ``ft.advise``.
        path: A file in a format that matplotlib writes, or an open one for PNG.
    """
    evidence = advice.evidence
    figure = _blank_figure((6, 3.5))
    axes = figure.add_subplot()
    names = [head.name for head in evidence.depths]
    percent = [100 * head.skill for head in evidence.depths]
    errors = [100 * head.standard_error for head in evidence.depths]
    axes.errorbar(names, percent, yerr=errors, marker="o", capsize=3, label="head on the segment")
    best = names.index(evidence.best.name)
    axes.plot([names[best]], [percent[best]], "o", color="C1", markersize=10, zorder=0)
    for height, style, text in (
        (evidence.reference.skill, "-.", "head on the pixels' spectrum"),
        (evidence.measure.of_guess, "--", "guess"),
    ):
        axes.axhline(100 * height, color="0.5", linestyle=style, linewidth=1, label=text)
    axes.margins(x=0.1)
    axes.set_ylim(min(0, *percent, 100 * evidence.reference.skill), 105)
    axes.set_ylabel(f"{evidence.measure.name}, held out (points)")
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    axes.set_title(f"{evidence.examples} images, {evidence.outputs_text}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, format=None if isinstance(path, str | os.PathLike) else "png")


def plot_training(
    path: str | os.PathLike[str],
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    tested: Mapping[str, float | None],
    *,
    metric: str = "accuracy",
) -> None:
    """Training curves: loss and the mean score over the step, one line per run.

    Args:
        path: A .png, .pdf or .svg, replaced if it exists.
        runs: Rows of ``read_metrics`` by the name of the run.
        tested: For the same names, the metric on the test images, drawn as a dotted line; None
            where there are no test images.
        metric: The score of the second panel; shares are drawn in percent.

    Raises:
        ValueError: Another kind of file.
        FileNotFoundError: The folder does not exist.
    """
    path = check_figure_path(path)
    figure = _blank_figure((9, 3.4))
    losses, scores = figure.subplots(1, 2)
    percent = shown(metric, 1.0).endswith("%")
    factor = 100 if percent else 1
    for (name, rows), (color, _) in zip(runs.items(), SERIES, strict=False):
        rows = [row for row in rows if row["kind"] == "train"]
        text = figure_text(name)
        steps = [row["step"] for row in rows]
        losses.plot(steps, [row["loss"] for row in rows], color=color, label=text)
        scores.plot(
            steps, [factor * row[metric] for row in rows], color=color, label=f"{text}, training"
        )
        if (value := tested.get(name)) is not None:
            label = f"{text}, test: {shown(metric, value)}"
            scores.axhline(factor * value, color=color, linestyle=":", label=label)
    unit = f"{metric}, %" if percent else metric
    for axes, label in ((losses, "training loss"), (scores, unit)):
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def plot_stem(
    path: str | os.PathLike[str],
    stem_kernel: Any,
    before: StemReport,
    after: StemReport | None = None,
) -> None:
    """Filters of a stem, and the fraction of their energy that survives on gray input.

    Filters are sorted by that fraction under replication, color-opponent ones first. Mid-gray is a
    weight of 0; each filter is scaled to its own largest weight.

    Args:
        path: A .png, .pdf or .svg, replaced if it exists.
        stem_kernel: ``[height, width, 3, filters]``.
        before: ``stem_report`` of the kernel alone, for replication.
        after: The same with an adapter's kernel.

    Raises:
        ValueError: Another kind of file, or a stem without a live filter.
        FileNotFoundError: The folder does not exist.
    """
    path = check_figure_path(path)
    if not before.shares:
        raise ValueError("the stem must have >= 1 live filter, got dead filters only")
    kernel = np.asarray(stem_kernel, np.float64)
    order = sorted(before.shares, key=lambda index: before.shares[index])
    rows = math.ceil(len(order) / _FILTERS_ACROSS)
    figure = _blank_figure((10, 3.2 + 0.75 * rows))
    halves: Any = figure.subfigures(2, 1, height_ratios=[0.75 * rows + 0.4, 2.8])
    upper, lower = halves
    panels = upper.subplots(rows, _FILTERS_ACROSS, squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for panel, index in zip(panels.flat, order, strict=False):
        own = kernel[..., index]
        panel.imshow(0.5 + 0.5 * own / np.abs(own).max(), interpolation="nearest")
        panel.set_title(str(index), fontsize=6, pad=2)
    upper.suptitle("filters, by the fraction of energy that survives replication", fontsize=9)
    axes = lower.subplots()
    places = np.arange(len(order))
    axes.bar(places, [before.shares[i] for i in order], color="0.7", label="replicated gray")
    if after is not None:
        axes.plot(
            places,
            [after.shares.get(i, math.nan) for i in order],
            "o",
            markersize=4,
            label=f"with the adapter of {after.bands} bands",
        )
    axes.set_xticks(places, [str(i) for i in order], fontsize=5, rotation=90)
    axes.set_ylim(0, 1.02)
    axes.margins(x=0.01)
    axes.set_xlabel("filter")
    axes.set_ylabel("fraction of energy")
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def plot_saliency(
    path: FigureTarget, images: Any, maps: Any, titles: Sequence[str], verdict: str
) -> None:
    """Images, each beside itself under its saliency map, and what is known of the maps.

    Each map is scaled to its own largest value; what speaks against the class is not shown.

    Args:
        path: A .png, .pdf or .svg, replaced if it exists; or an open file, for a PNG.
        images: uint8 ``[images, height, width, bands]``; three bands are shown as RGB, others by
            their mean.
        maps: ``[images, height, width]``, of the size of the images.
        titles: One per image.
        verdict: Of ``faithfulness``, printed above.

    Raises:
        ValueError: No image, arrays that do not fit, or another kind of file.
        FileNotFoundError: The folder does not exist.
    """
    pixels, heat = np.asarray(images), np.maximum(np.asarray(maps, np.float64), 0)
    if not len(pixels) or heat.shape != pixels.shape[:3] or len(titles) != len(pixels):
        raise ValueError(
            "plot_saliency must have a map and a title for each image, at least one, got images "
            f"{list(pixels.shape)}, maps {list(heat.shape)} and {len(titles)} titles"
        )
    across = min(_PAIRS_ACROSS, len(pixels))
    rows = math.ceil(len(pixels) / across)
    drawing, _ = new_figure(path, (3.0 * across, 0.7 + 1.75 * rows))
    drawing.clear()
    panels = np.reshape(drawing.subplots(rows, 2 * across, squeeze=False), (-1, 2))
    for panel in panels.flat:
        panel.set_axis_off()
    for pair, image, own, title in zip(panels, pixels, heat, titles, strict=False):
        shown = image if image.shape[-1] == 3 else image.mean(axis=-1)
        for panel in pair:
            panel.imshow(shown, cmap="gray", vmin=0, vmax=255)
        pair[1].imshow(own, cmap="inferno", vmin=0, vmax=own.max() or 1, alpha=0.6)
        pair[0].set_title(wrap_text(title, 40), fontsize=7, loc="left")
    text = figure_text("\n".join(textwrap.wrap(visible(verdict), 32 * across)))
    drawing.suptitle(text, fontsize=8, x=0.01, ha="left")
    save_figure(drawing, path)


def plot_frequency(path: FigureTarget, response: FrequencyResponse) -> None:
    """Frequency responses over the octaves, and where the images have their variance.

    Args:
        path: A .png, .pdf or .svg, replaced if it exists; or an open file, for a PNG.
        response: From ``frequency_response``.

    Raises:
        ValueError: Another kind of file.
        FileNotFoundError: The folder does not exist.
    """
    from flaxtransfer.analysis.spectrum import OCTAVE_NAMES

    drawing, (upper, lower) = new_figure(
        path, (7, 5), 2, sharex=True, gridspec_kw={"height_ratios": [3, 1.2]}
    )
    places = np.arange(len(OCTAVE_NAMES))
    entries = []
    for stages, filled in ((response.stages, True), (response.random, False)):
        for number, stage in enumerate(stages):
            color, marker = SERIES[number % len(SERIES)]
            values = [math.nan if value is None else value for value in stage.decibels]
            upper.plot(
                places,
                values,
                color=color,
                marker=marker,
                linestyle="-" if filled else ":",
                markerfacecolor=color if filled else "white",
            )
            name = stage.segment if filled else f"{stage.segment}, random"
            entries.append((name, color, marker, filled))
    upper.axhline(-3, color="0.6", linestyle="--", linewidth=1)
    upper.set_ylabel("response, dB of the strongest")
    legend(upper, entries)
    lower.bar(places, [100 * share for share in response.power], color="0.7", width=0.6)
    lower.set_ylabel("variance of\nthe images, %")
    lower.set_xticks(places, OCTAVE_NAMES)
    lower.set_xlabel("cycles per pixel of the network's input")
    save_figure(drawing, path)


def new_figure(path: FigureTarget, size: tuple[float, float], rows: int = 1, **options: Any) -> Any:
    """A figure of this size in inches, and its axes, one above the other.

    Raises:
        ValueError: The path is of another kind of file.
        FileNotFoundError: The folder does not exist.
    """
    if isinstance(path, str | os.PathLike):
        check_figure_path(path)
    drawing = _blank_figure(size)
    axes = drawing.subplots(rows, 1, **options)
    for axis in np.ravel(axes):
        axis.spines[["top", "right"]].set_visible(False)
    return drawing, axes


def save_figure(drawing: Any, path: FigureTarget) -> None:
    """Write the figure at a resolution that is legible at 800 pixels."""
    options = {} if isinstance(path, str | os.PathLike) else {"format": "png"}
    drawing.savefig(path, dpi=150, **options)


def legend(axes: Any, entries: Sequence[tuple[str, str, str, bool]]) -> None:
    """A legend to the right of the axes, where it covers nothing.

    Args:
        axes: The axes.
        entries: Text, color, marker, and whether the marker is filled.
    """
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=color,
            marker=marker,
            linestyle="",
            label=wrap_text(text, 22),
            markersize=7,
            markerfacecolor=color if filled else "white",
            markeredgewidth=2.5 if marker in "|_x" else 1,
        )
        for text, color, marker, filled in entries
    ]
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, borderaxespad=0
    )


def wrap_text(text: str, width: int, lines: int = 2) -> str:
    r"""Text wrapped to a width and a number of lines; what does not fit is replaced by dots.

    >>> wrap_text("a class of a long name", 8)
    'a class\nof a...'
    """
    wrapped = textwrap.wrap(visible(text), width, max_lines=lines, placeholder="...")
    return figure_text("\n".join(wrapped)) or " "


def figure_text(text: str) -> str:
    r"""Text from outside for a figure, in which matplotlib would set what is between $ as math.

    >>> figure_text("$5 and $7")
    '\\$5 and \\$7'
    """
    return visible(text, keep="\n").replace("$", r"\$")


def check_figure_path(path: str | os.PathLike[str]) -> Path:
    """The path of a figure, checked before anything is computed for it.

    Raises:
        ValueError: Another suffix than .png, .pdf or .svg.
        FileNotFoundError: The folder does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in FIGURE_SUFFIXES:
        raise ValueError(f"a figure's name must end in {', '.join(FIGURE_SUFFIXES)}, got {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} for {path.name} does not exist")
    return path


def _blank_figure(size: tuple[float, float]) -> Any:
    """An empty figure with the Agg canvas, which needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
