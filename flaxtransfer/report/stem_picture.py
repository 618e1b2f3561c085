"""A stem's filters as a picture, in the order of what a gray image leaves of them."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from flaxtransfer.report.rate_picture import check_picture

if TYPE_CHECKING:
    # Reports are made floors above this one; their values are all that is used here.
    from flaxtransfer.analysis.stem import StemReport

_ACROSS = 16
"""Filters side by side."""


def stem_picture(
    path: str | os.PathLike[str],
    stem_kernel: Any,
    before: StemReport,
    after: StemReport | None = None,
) -> None:
    """Draws each filter in its colours, and below the share of its energy that survives.

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
    rows = math.ceil(len(order) / _ACROSS)
    figure = Figure(figsize=(10, 3.2 + 0.75 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(2, 1, height_ratios=[0.75 * rows + 0.4, 2.8])
    upper, lower = halves
    panels = upper.subplots(rows, _ACROSS, squeeze=False)
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
        axes.plot(places, [after.shares.get(i, math.nan) for i in order], "o", markersize=4,
                  label=f"through the adapter of {after.bands} bands")  # fmt: skip
    axes.set_xticks(places, [str(i) for i in order], fontsize=5, rotation=90)
    axes.set_ylim(0, 1.02)
    axes.margins(x=0.01)
    axes.set_xlabel("filter")
    axes.set_ylabel("share of energy")
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
