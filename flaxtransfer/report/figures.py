"""Figures: learning-rate sweeps, probe profiles, stems.

What the pictures of domain shift have in common: colors, a figure, a legend, a file.

Learning-rate sweeps as a picture: loss over rate, one panel a group.

The curve of a probe profile as a picture.

A stem's filters as a picture, in the order of what a gray image leaves of them.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flaxtransfer.analysis.profile import Profile

if TYPE_CHECKING:
    from flaxtransfer.analysis.stem import StemReport
    from flaxtransfer.training.lr_finder import RateSweep

__all__ = [
    "BLUE",
    "RED",
    "SERIES",
    "Target",
    "check_picture",
    "draw_profile",
    "figure",
    "legend",
    "rate_picture",
    "save",
    "stem_picture",
    "wrapped",
]


BLUE, RED, _GREEN, _PINK, _ORANGE, _SKY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)
"""Of Okabe and Ito, which color-blind readers tell apart."""
SERIES = ((BLUE, "o"), (RED, "s"), (_GREEN, "^"), (_PINK, "D"), (_ORANGE, "v"), (_SKY, "P"))
"""Colors, each with a marker: what a color says, a marker says as well."""

Target = str | os.PathLike[str] | BinaryIO
"""The path of a .png, .pdf or .svg, replaced where it exists; or an open file, for a PNG."""


def figure(path: Target, size: tuple[float, float], rows: int = 1, **options: Any) -> Any:
    """A figure of so many inches, and its axes, one above the other.

    Raises:
        ValueError: the path is of another kind of file.
        FileNotFoundError: there is no such folder.
    """
    if isinstance(path, str | os.PathLike):
        check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(rows, 1, **options)
    for one in np.ravel(axes):
        one.spines[["top", "right"]].set_visible(False)
    return made, axes


def save(made: Any, path: Target) -> None:
    """Writes the figure, at a size that stays legible on 800 pixels."""
    options = {} if isinstance(path, str | os.PathLike) else {"format": "png"}
    made.savefig(path, dpi=150, **options)


def legend(axes: Any, entries: Sequence[tuple[str, str, str, bool]]) -> None:
    """Right of the picture, where nothing can run behind it.

    Args:
        axes: of the picture.
        entries: text, color, marker and whether that is filled.
    """
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=color,
            marker=marker,
            linestyle="",
            label=wrapped(text, 22),
            markersize=7,
            markerfacecolor=color if filled else "white",
            markeredgewidth=2.5 if marker in "|_x" else 1,
        )
        for text, color, marker, filled in entries
    ]
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, borderaxespad=0
    )


def wrapped(text: str, width: int, lines: int = 2) -> str:
    r"""The text on so many lines; what does not fit ends in dots.

    >>> wrapped("a class of a long name", 8)
    'a class\nof a...'
    """
    return "\n".join(textwrap.wrap(str(text), width, max_lines=lines, placeholder="...")) or " "


_SUFFIXES = (".png", ".pdf", ".svg")
_RATE_PANELS_ACROSS = 3
"""Panels side by side."""


def rate_picture(path: str | os.PathLike[str], sweeps: Mapping[str, RateSweep]) -> None:
    """Draws sweeps of ``find_learning_rate`` and marks what they suggest.

    Each panel has the training loss of every step in nats (thin), its exponential average (thick),
    the rate at which that fell fastest and the middle of its fall. The axis ends at twice the first
    loss, because what comes after flattens all that is of interest.

    Args:
      path: of the picture: .png, .pdf or .svg; what is there is replaced.
      sweeps: by the title of their panels.

    Raises:
      ValueError: no sweep, or another kind of file.
      FileNotFoundError: there is no such folder.
    """
    path = check_picture(path)
    if not sweeps:
        raise ValueError("there is no sweep to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(_RATE_PANELS_ACROSS, len(sweeps))
    down = -(-len(sweeps) // across)
    figure = Figure(figsize=(1.0 + 4.0 * across, 0.4 + 3.6 * down), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False)
    for number, panel in enumerate(panels.flat):
        panel.set_visible(number < len(sweeps))
    for panel, (title, sweep) in zip(panels.flat, sweeps.items(), strict=False):
        panel.plot(sweep.rates, sweep.losses, color="0.75", linewidth=0.8, label="each step")
        panel.plot(sweep.rates, sweep.smoothed, color="tab:blue", linewidth=2, label="average")
        for rate, color, style, name in (
            (sweep.suggestion, "tab:red", "--", "fastest fall"),
            (sweep.valley, "tab:green", ":", "middle of the fall"),
        ):
            if rate is not None:
                label = f"{name}: {rate:.1e}"
                panel.axvline(rate, color=color, linestyle=style, label=label)
        low, high = min(sweep.smoothed), min(max(sweep.smoothed), 2 * sweep.smoothed[0])
        room = 0.08 * max(high - low, 1e-3)
        panel.set_ylim(low - room, high + room)
        panel.set_xscale("log")
        panel.set_title(f"{title} (diverged)" if sweep.diverged else title)
        panel.set_xlabel("learning rate")
        panel.set_ylabel("training loss, nats")
        # Below the panel: inside it, some curve would always run behind it.
        panel.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    figure.savefig(path, dpi=150)


def check_picture(path: str | os.PathLike[str]) -> Path:
    """The path of a picture that can be written, before anything is computed for it.

    Raises:
      ValueError: another kind of file.
      FileNotFoundError: there is no such folder.
    """
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{path} is no picture; its name has to end in {', '.join(_SUFFIXES)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}")
    return path


def draw_profile(profile: Profile, path: str | os.PathLike[str]) -> None:
    """Accuracy of a probe on each segment, from the input to the output, with standard errors.

    Args:
      profile: from ``probe_profile``.
      path: of a picture in a format that matplotlib writes: .png, .svg, .pdf.

    Raises:
      ValueError: a format that matplotlib does not write.
      OSError: the file cannot be written.
    """
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = [probe.segment for probe in profile.probes]
    percent = [100 * probe.accuracy for probe in profile.probes]
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
    axes.axhline(100 * profile.majority, color="0.6", linestyle="--", linewidth=1)
    axes.annotate(
        "largest class",
        (1, 100 * profile.majority),
        ha="right",
        va="bottom",
        xycoords=("axes fraction", "data"),
        color="0.4",
        fontsize="small",
    )
    axes.margins(x=0.1, y=0.15)
    axes.set_xlabel("probed after")
    axes.set_ylabel("accuracy, held out (%)")
    axes.set_title(f"{profile.kind} probes, {profile.examples} images", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


_FILTERS_ACROSS = 16
"""Filters side by side."""


def stem_picture(
    path: str | os.PathLike[str],
    stem_kernel: Any,
    before: StemReport,
    after: StemReport | None = None,
) -> None:
    """Draws each filter in its colors, and below the share of its energy that survives.

    Filters stand in the order of the share under replication, opponent ones first. Gray in the
    middle is a weight of 0; each filter is scaled to its own largest weight.

    Args:
      path: of the picture: .png, .pdf or .svg; what is there is replaced.
      stem_kernel: ``[height, width, 3, filters]``.
      before: ``stem_report`` of the kernel alone, for replication.
      after: the same with an adapter's kernel.

    Raises:
      ValueError: another kind of file, or a stem whose filters are all dead.
      FileNotFoundError: there is no such folder.
    """
    path = check_picture(path)
    if not before.shares:
        raise ValueError("all filters of the stem are dead: there is nothing to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kernel = np.asarray(stem_kernel, np.float64)
    order = sorted(before.shares, key=lambda index: before.shares[index])
    rows = math.ceil(len(order) / _FILTERS_ACROSS)
    figure = Figure(figsize=(10, 3.2 + 0.75 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(2, 1, height_ratios=[0.75 * rows + 0.4, 2.8])
    upper, lower = halves
    panels = upper.subplots(rows, _FILTERS_ACROSS, squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for panel, index in zip(panels.flat, order, strict=False):
        own = kernel[..., index]
        panel.imshow(0.5 + 0.5 * own / np.abs(own).max(), interpolation="nearest")
        panel.set_title(str(index), fontsize=6, pad=2)
    upper.suptitle("filters, the share that survives replication rising", fontsize=9)
    axes = lower.subplots()
    places = np.arange(len(order))
    axes.bar(places, [before.shares[i] for i in order], color="0.7", label="replicated gray")
    if after is not None:
        axes.plot(
            places,
            [after.shares.get(i, math.nan) for i in order],
            "o",
            markersize=4,
            label=f"through the adapter of {after.bands} bands",
        )
    axes.set_xticks(places, [str(i) for i in order], fontsize=5, rotation=90)
    axes.set_ylim(0, 1.02)
    axes.margins(x=0.01)
    axes.set_xlabel("filter")
    axes.set_ylabel("share of energy")
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
