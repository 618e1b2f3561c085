"""Figures of domain shift: features, prevalence, reliability, and tests.

``render_figures`` draws all figures of a shift report; each can also be drawn alone.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flaxtransfer.report.figures import (
    BLUE,
    RED,
    SERIES,
    FigureTarget,
    legend,
    new_figure,
    save_figure,
    wrap_text,
)
from flaxtransfer.shift.report import ShiftReport

if TYPE_CHECKING:
    from flaxtransfer.shift.prevalence import Prevalence
    from flaxtransfer.shift.statistics import HypothesisTest

__all__ = [
    "plot_prevalence",
    "plot_projection",
    "plot_reliability",
    "plot_tests",
    "render_figures",
]

_MARKERS = "os^DvP*X<>"

_MAX_POINTS = 2000
"""Per domain; with more, points cover each other and files become slow to open."""

_MAX_CLASSES = 20

_MIN_P = 1e-6


def render_figures(
    report: ShiftReport, source_features: Any, source_labels: Any, target_features: Any
) -> dict[str, tuple[str, bytes]]:
    """Caption and PNG of every figure of a shift report, by name.

    Args:
        report: From ``diagnose``.
        source_features: ``[n, D]``, of the source's held-out examples.
        source_labels: ``[n]``.
        target_features: ``[m, D]``.

    Returns:
        "features", "tests", "reliability", and "prevalence" if there is an estimate.
    """
    names = report.class_names
    bins = report.calibration.bins
    columns = [
        np.array([getattr(each, field) for each in bins])
        for field in ("confidence", "accuracy", "count", "low", "high")
    ]
    found = {
        "features": (
            "Features of source and target, two principal components",
            _png(
                lambda file: plot_projection(
                    file,
                    source_features,
                    target_features,
                    source_labels=source_labels,
                    class_names=names,
                )
            ),
        ),
        "tests": (
            "Tests",
            _png(lambda file: plot_tests(file, report.tests, level=report.level)),
        ),
        "reliability": (
            "Reliability at the source",
            _png(lambda file: plot_reliability(file, *columns)),
        ),
    }
    if report.prevalences:
        found["prevalence"] = (
            "Prevalence, assuming label shift only",
            _png(lambda file: plot_prevalence(file, report.prevalences, class_names=names)),
        )
    return found


def plot_projection(
    path: FigureTarget,
    source: Any,
    target: Any,
    *,
    source_labels: Any = None,
    target_labels: Any = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Features of both domains on the first two principal components of the pooled features.

    Domains that are apart here are apart; domains that overlap here may be apart in another
    direction. With labels and at most 10 classes, every class has its own marker; a domain without
    labels has crosses.

    Args:
        path: A .png, .pdf or .svg; or an open binary file, for a PNG.
        source: Features ``[n, D]``, D >= 2.
        target: Features ``[m, D]``.
        source_labels: ``[n]``, class numbers from 0.
        target_labels: ``[m]``, likewise.
        class_names: Names of class 0, 1 and so on.

    Raises:
        ValueError: Features that are not matrices of one width, NaN, labels of another length;
            another kind of file.
        FileNotFoundError: The folder does not exist.
    """
    domains = [np.asarray(array, np.float64) for array in (source, target)]
    if (
        any(x.ndim != 2 or not len(x) for x in domains)
        or domains[0].shape[1] != domains[1].shape[1]
    ):
        raise ValueError(
            f"features must have shapes [n, D] and [m, D], got {list(domains[0].shape)} and "
            f"{list(domains[1].shape)}"
        )
    if domains[0].shape[1] < 2 or not all(np.isfinite(x).all() for x in domains):
        raise ValueError(
            "features must be finite and have >= 2 columns, got NaN, infinity or 1 column"
        )
    labels = [None if y is None else np.asarray(y) for y in (source_labels, target_labels)]
    for rows, own, name in zip(domains, labels, ("source", "target"), strict=True):
        if own is not None and own.shape != (len(rows),):
            raise ValueError(f"{name} labels must have shape [{len(rows)}], got {list(own.shape)}")
    known = sorted({int(label) for own in labels if own is not None for label in np.unique(own)})
    if known and (known[0] < 0 or (class_names is not None and known[-1] >= len(class_names))):
        raise ValueError(f"every class of {known} must have a name, got class_names={class_names}")
    if len(known) > len(_MARKERS):
        known = []
    positions, fractions = _principal(np.concatenate(domains))
    split = len(domains[0])

    drawing, axes = new_figure(path, (7.2, 4.8))
    sides = [
        ("source", BLUE, positions[:split], labels[0]),
        ("target", RED, positions[split:], labels[1]),
    ]
    entries = []
    # The larger domain first, so that it does not cover the other.
    for name, color, points, own in sorted(sides, key=lambda side: -len(side[2])):
        chosen = np.arange(0, len(points), -(-len(points) // _MAX_POINTS))
        size = float(np.clip(8000 / len(chosen), 10, 36))
        # Where classes have markers, unlabeled points are crosses.
        unlabeled_marker = "x" if known else "o"
        for label in known if own is not None and known else [None]:
            here = chosen if label is None or own is None else chosen[own[chosen] == label]
            marker = unlabeled_marker if label is None else _MARKERS[known.index(label)]
            axes.scatter(
                *points[here].T,
                s=size,
                c=color,
                marker=marker,
                alpha=0.55,
                linewidths=1.2 if marker == "x" else 0,
            )
        drawn = "" if len(chosen) == len(points) else f", {len(chosen)} drawn"
        marker = "_" if own is not None and known else unlabeled_marker
        entries.append((f"{name} ({len(points)}{drawn})", color, marker, True))
    axes.set_xlabel(f"first principal component ({100 * fractions[0]:.0f} % of variance)")
    axes.set_ylabel(f"second principal component ({100 * fractions[1]:.0f} %)")
    axes.set_aspect("equal", adjustable="datalim")
    entries.sort()
    for label, marker in zip(known, _MARKERS, strict=False):
        text = str(label) if class_names is None else class_names[label]
        entries.append((text, "0.35", marker, True))
    legend(axes, entries)
    save_figure(drawing, path)


def plot_prevalence(
    path: FigureTarget, estimates: Sequence[Prevalence], *, class_names: Sequence[str] | None = None
) -> None:
    """Class proportions of the target by several methods, with those of the source.

    Each class has one line per method, with its interval; black bars are the source prior. Of more
    than 20 classes, the 20 that changed most by any method are drawn.

    Args:
        path: A .png, .pdf or .svg; or an open binary file, for a PNG.
        estimates: 1 to 6 estimates of the same classes.
        class_names: Names of the K classes.

    Raises:
        ValueError: No estimate, more than 6, or different classes; another kind of file.
        FileNotFoundError: The folder does not exist.
    """
    if not 1 <= len(estimates) <= len(SERIES):
        raise ValueError(f"estimates must have 1 to {len(SERIES)} entries, got {len(estimates)}")
    classes = len(estimates[0].estimate)
    if any(len(each.estimate) != classes for each in estimates) or (
        class_names is not None and len(class_names) != classes
    ):
        found = [len(each.estimate) for each in estimates]
        given = "" if class_names is None else f" and {len(class_names)} names"
        raise ValueError(f"estimates must have the same classes, got {found} classes{given}")
    change = np.max([np.abs(each.estimate - each.source) for each in estimates], axis=0)
    shown = np.sort(np.argsort(-change, kind="stable")[:_MAX_CLASSES])
    band = min(0.8, 0.25 * len(estimates))
    offsets = band * ((np.arange(len(estimates)) + 0.5) / len(estimates) - 0.5)

    rows = len(shown) * (0.14 + 0.11 * len(estimates))
    drawing, axes = new_figure(path, (7.2, 1.6 + max(1.2, rows)))
    entries = [("source prior", "black", "|", True)]
    for each, offset, (color, marker) in zip(estimates, offsets, SERIES, strict=False):
        heights = np.arange(len(shown)) + offset
        half = 0.5 * band / len(estimates) + 0.02
        axes.vlines(100 * each.source[shown], heights - half, heights + half, color="black", lw=2)
        known = np.isfinite(each.low[shown]) & np.isfinite(each.high[shown])
        axes.hlines(
            heights[known],
            100 * each.low[shown][known],
            100 * each.high[shown][known],
            color=color,
            lw=1.8,
        )
        face = color if each.identifiable else "white"
        axes.plot(
            100 * each.estimate[shown],
            heights,
            marker,
            color=color,
            markersize=6,
            markerfacecolor=face,
        )
        text = each.method if each.identifiable else f"{each.method} (not identifiable)"
        entries.append((text, color, marker, each.identifiable))
    names = [str(k) for k in range(classes)] if class_names is None else class_names
    axes.set_yticks(np.arange(len(shown)), [wrap_text(names[k], 20) for k in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    levels = sorted(
        {f"{100 * each.level:g} %" for each in estimates if np.isfinite(each.low).any()}
    )
    text = f", with intervals of {' and '.join(levels)}" if levels else ""
    axes.set_xlabel(f"proportion of the class (%){text}")
    subset = f"the {len(shown)} of {classes} classes that changed most"
    axes.set_ylabel("class" if len(shown) == classes else subset)
    legend(axes, entries)
    save_figure(drawing, path)


def plot_reliability(
    path: FigureTarget, confidence: Any, accuracy: Any, count: Any, low: Any, high: Any
) -> None:
    """Reliability diagram: accuracy by confidence, and the number of examples per bin.

    Points on the diagonal are calibrated, points below it overconfident. Empty bins are left out.
    The title has the expected calibration error of these bins.

    Args:
        path: A .png, .pdf or .svg; or an open binary file, for a PNG.
        confidence: ``[bins]``, mean confidence, 0 to 1.
        accuracy: ``[bins]``, fraction of correct predictions.
        count: ``[bins]``, examples.
        low: ``[bins]``, lower ends of the accuracy's intervals.
        high: ``[bins]``, upper ends.

    Raises:
        ValueError: Arrays of different lengths, or no example at all; another kind of file.
        FileNotFoundError: The folder does not exist.
    """
    arrays = [np.asarray(each, np.float64) for each in (confidence, accuracy, count, low, high)]
    if arrays[0].ndim != 1 or any(each.shape != arrays[0].shape for each in arrays):
        raise ValueError(
            f"all arrays must have shape [bins], got {[list(each.shape) for each in arrays]}"
        )
    nonempty = arrays[2] > 0
    if not nonempty.any():
        raise ValueError("count must be > 0 in >= 1 bin, got empty bins only")
    confidences, accuracies, counts, least, most = (each[nonempty] for each in arrays)
    error = float((counts * np.abs(accuracies - confidences)).sum() / counts.sum())

    drawing, (upper, lower) = new_figure(
        path, (5.6, 6.0), rows=2, height_ratios=[3, 1], sharex=True
    )
    upper.plot([0, 100], [0, 100], "--", color="0.6", lw=1.2)
    upper.vlines(100 * confidences, 100 * least, 100 * most, color=BLUE, lw=1.8)
    upper.plot(100 * confidences, 100 * accuracies, "o", color=BLUE, markersize=6)
    upper.set_xlim(-2, 102)
    upper.set_ylim(-2, 102)
    upper.set_ylabel("correct predictions (%)")
    upper.set_title(f"expected calibration error {100 * error:.1f} % (dashed: 0 %)", loc="left")
    width = 0.8 * 100 / len(arrays[0])
    lower.bar(100 * confidences, counts, width=width, color="0.65")
    lower.set_xlabel("confidence (%)")
    lower.set_ylabel("examples")
    save_figure(drawing, path)


def plot_tests(path: FigureTarget, tests: Sequence[HypothesisTest], *, level: float = 0.05) -> None:
    """P-values of several tests on one axis, each with its effect in words.

    A filled marker is the p-value that counts, corrected if there is a correction; a hollow one is
    the uncorrected p-value. Squares are rejections at the level, circles are not; p-values below
    1e-6 are drawn there as triangles that point to the left.

    Args:
        path: A .png, .pdf or .svg; or an open binary file, for a PNG.
        tests: One or more, drawn from top to bottom.
        level: Significance level of the dashed line.

    Raises:
        ValueError: No test; another kind of file.
        FileNotFoundError: The folder does not exist.
    """
    if not tests:
        raise ValueError("tests must have >= 1 entry, got none")
    drawing, axes = new_figure(path, (8.0, 1.3 + 0.58 * len(tests)))
    corrected = False
    least = level / 10
    for row, test in enumerate(tests):
        if test.p is None:
            axes.text(
                0.02,
                row,
                wrap_text(f"not testable: {test.not_testable}", 46),
                va="center",
                color="0.4",
                style="italic",
                fontsize="small",
                backgroundcolor="white",
                transform=axes.get_yaxis_transform(),
            )
            continue
        p = test.p if test.adjusted_p is None else test.adjusted_p
        color, marker = (RED, "s") if test.rejected(level) else (BLUE, "o")
        least = min(least, max(_MIN_P, test.p))
        if test.adjusted_p is not None:
            corrected = True
            before = "<" if test.p < _MIN_P else marker
            ends = [max(_MIN_P, test.p), max(_MIN_P, p)]
            axes.plot(ends, [row, row], color=color, lw=1.2)
            axes.plot(ends[:1], [row], before, color=color, markerfacecolor="white", markersize=6)
        axes.plot([max(_MIN_P, p)], [row], "<" if p < _MIN_P else marker, color=color, markersize=8)
        axes.text(
            1.02,
            row,
            _effect(test),
            va="center",
            fontsize="small",
            transform=axes.get_yaxis_transform(),
        )
    axes.axvline(level, color="0.5", linestyle="--", lw=1)
    axes.set_xscale("log")
    axes.set_xlim(least / 2, 1.5)
    axes.set_yticks(range(len(tests)), [wrap_text(test.name, 26) for test in tests])
    axes.set_ylim(len(tests) - 0.5, -0.5)
    axes.text(
        level,
        1.01,
        f"level {level:g}",
        color="0.4",
        ha="center",
        va="bottom",
        fontsize="small",
        transform=axes.get_xaxis_transform(),
    )
    axes.text(
        1.02, 1.01, "effect", color="0.4", va="bottom", fontsize="small", transform=axes.transAxes
    )
    text = "p-value: filled after correction, hollow before" if corrected else "p-value"
    axes.set_xlabel(text)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    save_figure(drawing, path)


def _principal(pooled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates ``[n, 2]`` on two principal components, and their fractions of the variance."""
    centered = pooled - pooled.mean(0)
    wide = len(centered) < centered.shape[1]
    squares, vectors = np.linalg.eigh(centered @ centered.T if wide else centered.T @ centered)
    vectors, largest = vectors[:, :-3:-1], np.maximum(squares[:-3:-1], 0)
    positions = vectors * np.sqrt(largest) if wide else centered @ vectors
    # The sign of an eigenvector is arbitrary: the side that reaches farther is positive.
    positions *= np.where(positions.max(0) < -positions.min(0), -1, 1)
    return positions, largest / max(float(squares.sum()), np.finfo(np.float64).tiny)


def _effect(test: HypothesisTest) -> str:
    p = test.p if test.adjusted_p is None else test.adjusted_p
    text = f"{test.effect_name} {test.effect:.3g}, p = {p:.2g}"
    if test.minimum_detectable is not None:
        text += f"\ndetectable: {test.minimum_detectable:.3g}"
    return text


def _png(draw: Callable[[io.BytesIO], None]) -> bytes:
    file = io.BytesIO()
    draw(file)
    return file.getvalue()
