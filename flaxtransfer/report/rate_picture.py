"""Learning-rate sweeps as a picture: loss over rate, one panel a group."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Sweeps are made floors above this one; their values are all that is used here.
    from flaxtransfer.training.finder import RateSweep

_SUFFIXES = (".png", ".pdf", ".svg")
_ACROSS = 3
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

    across = min(_ACROSS, len(sweeps))
    down = -(-len(sweeps) // across)
    figure = Figure(figsize=(1.0 + 4.0 * across, 0.4 + 3.6 * down), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False)
    for number, panel in enumerate(panels.flat):
        panel.set_visible(number < len(sweeps))
    for panel, (title, sweep) in zip(panels.flat, sweeps.items(), strict=False):
        panel.plot(sweep.rates, sweep.losses, color="0.75", linewidth=0.8, label="each step")
        panel.plot(sweep.rates, sweep.smoothed, color="tab:blue", linewidth=2, label="average")
        for rate, colour, style, name in (
            (sweep.suggestion, "tab:red", "--", "fastest fall"),
            (sweep.valley, "tab:green", ":", "middle of the fall"),
        ):
            if rate is not None:
                label = f"{name}: {rate:.1e}"
                panel.axvline(rate, color=colour, linestyle=style, label=label)
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
