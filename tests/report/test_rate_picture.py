"""Pictures of learning-rate sweeps: that they are drawn, and what is refused."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import flaxtransfer as ft
from flaxtransfer.report.figures import plot_rate_sweeps


def sweep(*, falls: bool = True, diverged: bool = False) -> ft.training.RateSweep:
    rates = tuple(np.logspace(-6, 0, 50))
    losses = tuple(1 / (1 + math.exp(2 * math.log10(r) + 4)) for r in rates)
    losses = losses if falls else losses[::-1]
    return ft.training.RateSweep(rates, losses, losses, 1e-2 if falls else None, diverged)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_each_sweep_has_a_panel_with_its_curve(tmp_path, count):
    """The curve is drawn in each panel: blue is found in each cell of the grid."""
    plot_rate_sweeps(tmp_path / "rates.png", {f"group {n}": sweep() for n in range(count)})
    pixels = np.asarray(Image.open(tmp_path / "rates.png").convert("RGB"), np.int64)
    blue = np.abs(pixels - np.array([31, 119, 180])).sum(-1) < 12
    across, down = min(3, count), -(-count // 3)
    cells = [
        cell for row in np.array_split(blue, down, 0) for cell in np.array_split(row, across, 1)
    ]
    assert [cell.any() for cell in cells] == [n < count for n in range(across * down)]


def test_a_suggestion_is_marked_and_its_absence_is_not(tmp_path):
    red = {}
    for falls in (True, False):
        path = tmp_path / f"{falls}.png"
        plot_rate_sweeps(path, {"all": sweep(falls=falls, diverged=True)})
        pixels = np.asarray(Image.open(path).convert("RGB"), np.int64)
        red[falls] = (np.abs(pixels - np.array([214, 39, 40])).sum(-1) < 12).sum()
    assert red[True] > 100
    assert red[False] == 0


@pytest.mark.parametrize(
    ("name", "sweeps", "error", "text"),
    [
        ("rates.txt", {"a": sweep()}, ValueError, "name must end in .png, .pdf, .svg, got"),
        (
            "no/rates.png",
            {"a": sweep()},
            FileNotFoundError,
            "the folder .*no for rates.png does not exist",
        ),
        ("rates.png", {}, ValueError, "sweeps must have >= 1 entry, got none"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, name, sweeps, error, text):
    with pytest.raises(error, match=text):
        plot_rate_sweeps(tmp_path / name, sweeps)
    assert not list(tmp_path.iterdir())


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, flaxtransfer.cli; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
