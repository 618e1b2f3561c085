"""Every picture of a shift report, each with a name for its file and a caption."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from flaxtransfer.report.projection_picture import projection_picture
from flaxtransfer.report.shift_pictures import (
    hypotheses_picture,
    prevalence_picture,
    reliability_picture,
)
from flaxtransfer.shift.diagnosis.shift_report import ShiftReport

__all__ = ["shift_drawings"]


def shift_drawings(
    report: ShiftReport, source_features: Any, source_labels: Any, target_features: Any
) -> dict[str, tuple[str, bytes]]:
    """Caption and PNG by name; what there is nothing to draw of is left out.

    Args:
        report: from ``diagnose``.
        source_features: ``[n, D]``, of the source's held-out examples.
        source_labels: ``[n]``.
        target_features: ``[m, D]``.
    """
    names = report.class_names
    bins = report.calibration.bins
    columns = [
        np.array([getattr(one, field) for one in bins])
        for field in ("confidence", "accuracy", "count", "low", "high")
    ]
    found = {
        "features": (
            "Features of source and target, two principal components",
            _png(
                lambda file: projection_picture(
                    file, source_features, target_features,
                    source_labels=source_labels, class_names=names,
                )
            ),
        ),
        "tests": ("Tests", _png(lambda file: hypotheses_picture(
            file, report.tests, level=report.level
        ))),
        "reliability": ("Reliability at the source", _png(
            lambda file: reliability_picture(file, *columns)
        )),
    }  # fmt: skip
    if report.prevalences:
        found["prevalence"] = (
            "Prevalence, if label shift is all there is",
            _png(lambda file: prevalence_picture(file, report.prevalences, class_names=names)),
        )
    return found


def _png(draw: Callable[[io.BytesIO], None]) -> bytes:
    file = io.BytesIO()
    draw(file)
    return file.getvalue()
