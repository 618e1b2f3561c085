"""The curve of a probe profile as a picture."""

from __future__ import annotations

import os

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flaxtransfer.analysis.profile import Profile

__all__ = ["draw_profile"]


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
    for name, value in zip(names, percent, strict=True):
        axes.annotate(f"{value:.1f}", (name, value), xytext=(7, 4), textcoords="offset points")
    axes.axhline(100 * profile.majority, color="0.6", linestyle="--", linewidth=1)
    axes.annotate("largest class", (1, 100 * profile.majority), ha="right", va="bottom",
                  xycoords=("axes fraction", "data"), color="0.4", fontsize="small")  # fmt: skip
    axes.margins(x=0.1, y=0.15)
    axes.set_xlabel("probed after")
    axes.set_ylabel("accuracy, held out (%)")
    axes.set_title(f"{profile.kind} probes, {profile.examples} images", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
