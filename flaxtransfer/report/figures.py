"""What the pictures of domain shift have in common: colours, a figure, a legend, a file."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from flaxtransfer.report.rate_picture import check_picture

__all__ = ["BLUE", "RED", "SERIES", "Target", "figure", "legend", "save", "wrapped"]

BLUE, RED, _GREEN, _PINK, _ORANGE, _SKY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
)  # fmt: skip
"""Of Okabe and Ito, which colour-blind readers tell apart."""
SERIES = ((BLUE, "o"), (RED, "s"), (_GREEN, "^"), (_PINK, "D"), (_ORANGE, "v"), (_SKY, "P"))
"""Colours, each with a marker: what a colour says, a marker says as well."""

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
        entries: text, colour, marker and whether that is filled.
    """
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=wrapped(text, 22),
               markersize=7, markerfacecolor=colour if filled else "white",
               markeredgewidth=2.5 if marker in "|_x" else 1)
        for text, colour, marker, filled in entries
    ]  # fmt: skip
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False,
                borderaxespad=0)  # fmt: skip


def wrapped(text: str, width: int, lines: int = 2) -> str:
    r"""The text on so many lines; what does not fit ends in dots.

    >>> wrapped("a class of a long name", 8)
    'a class\nof a...'
    """
    return "\n".join(textwrap.wrap(str(text), width, max_lines=lines, placeholder="...")) or " "
