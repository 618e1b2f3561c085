"""The pictures of a shift report are those of its numbers."""

import io
from types import SimpleNamespace

import numpy as np

from flaxtransfer.report.shift_figures import plot_reliability, plot_tests, render_figures
from flaxtransfer.shift.calibration_metrics import ReliabilityBin
from flaxtransfer.shift.statistics import HypothesisTest


def png(draw, *arguments, **options):
    file = io.BytesIO()
    draw(file, *arguments, **options)
    return file.getvalue()


def test_each_picture_is_of_its_numbers():
    test = HypothesisTest("a test", "H0", 1.0, 0.03, 0.7, "AUC", 0.6, (9, 9))
    bins = (
        ReliabilityBin(30, 0.6, 0.5, 0.4, 0.7, 0.5, 0.7),
        ReliabilityBin(10, 0.9, 0.7, 0.5, 0.95, 0.8, 1.0),
    )
    report = SimpleNamespace(
        class_names=("a", "b"),
        calibration=SimpleNamespace(bins=bins),
        tests=(test,),
        level=0.02,
        prevalences=(),
    )
    source, target = np.random.default_rng(0).normal(size=(2, 20, 3))
    found = render_figures(report, source, np.arange(20) % 2, target)
    # Without an estimate there is no prevalence to draw.
    assert list(found) == ["features", "tests", "reliability"]
    assert found["tests"][1] == png(plot_tests, [test], level=0.02)
    columns = ([0.6, 0.9], [0.5, 0.7], [30, 10], [0.4, 0.5], [0.7, 0.95])
    assert found["reliability"][1] == png(plot_reliability, *columns)
