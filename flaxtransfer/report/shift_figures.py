"""Figures of domain shift.

Features of two domains in the plane in which they vary most.

Domain shift as pictures: prevalence beside its source, reliability, and tests.

Every picture of a shift report, each with a name for its file and a caption.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flaxtransfer.report.figures import BLUE, RED, SERIES, Target, figure, legend, save, wrapped
from flaxtransfer.shift.report import ShiftReport

if TYPE_CHECKING:
    from flaxtransfer.shift.prevalence import Prevalence
    from flaxtransfer.shift.statistics import HypothesisTest

__all__ = [
    "hypotheses_picture",
    "prevalence_picture",
    "projection_picture",
    "reliability_picture",
    "shift_drawings",
]


_MARKERS = "os^DvP*X<>"
_MOST_POINTS = 2000
"""Of each domain: beyond, points cover each other and pictures take long to open."""


def projection_picture(
    path: Target,
    source: Any,
    target: Any,
    *,
    source_labels: Any = None,
    target_labels: Any = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Features of both domains along the two directions in which both together vary most.

    What lies apart here does lie apart; what lies together may be apart in another direction. With
    labels and at most 10 classes every class has a marker; a domain without labels has crosses.

    Args:
        path: of a .png, .pdf or .svg; or an open binary file, for a PNG.
        source: features ``[n, D]``, D >= 2.
        target: features ``[m, D]``.
        source_labels: ``[n]``, class numbers from 0.
        target_labels: ``[m]``, likewise.
        class_names: of class 0, 1 and so on.

    Raises:
        ValueError: features that are no matrices of one width, NaN, labels of another count,
            another kind of file.
        FileNotFoundError: there is no such folder.
    """
    domains = [np.asarray(array, np.float64) for array in (source, target)]
    if (
        any(x.ndim != 2 or not len(x) for x in domains)
        or domains[0].shape[1] != domains[1].shape[1]
    ):
        raise ValueError(
            f"features have shapes {domains[0].shape} and {domains[1].shape}, wanted [n, D], [m, D]"
        )
    if domains[0].shape[1] < 2 or not all(np.isfinite(x).all() for x in domains):
        raise ValueError("features are NaN or infinite, or have one column: there is no plane")
    labels = [None if y is None else np.asarray(y) for y in (source_labels, target_labels)]
    for rows, own, name in zip(domains, labels, ("source", "target"), strict=True):
        if own is not None and own.shape != (len(rows),):
            raise ValueError(
                f"{name} labels have shape {own.shape}, and there are {len(rows)} rows"
            )
    known = sorted({int(label) for own in labels if own is not None for label in np.unique(own)})
    if known and (known[0] < 0 or (class_names is not None and known[-1] >= len(class_names))):
        raise ValueError(f"classes are {known}, which have not all a name of {class_names}")
    if len(known) > len(_MARKERS):
        known = []
    places, shares = _principal(np.concatenate(domains))
    split = len(domains[0])

    made, axes = figure(path, (7.2, 4.8))
    sides = [
        ("source", BLUE, places[:split], labels[0]),
        ("target", RED, places[split:], labels[1]),
    ]
    entries = []
    # The larger domain first, so that it covers nothing.
    for name, color, points, own in sorted(sides, key=lambda side: -len(side[2])):
        chosen = np.arange(0, len(points), -(-len(points) // _MOST_POINTS))
        size = float(np.clip(8000 / len(chosen), 10, 36))
        # Among classes with markers, points of no known class are crosses.
        plain = "x" if known else "o"
        for label in known if own is not None and known else [None]:
            here = chosen if label is None or own is None else chosen[own[chosen] == label]
            marker = plain if label is None else _MARKERS[known.index(label)]
            axes.scatter(
                *points[here].T,
                s=size,
                c=color,
                marker=marker,
                alpha=0.55,
                linewidths=1.2 if marker == "x" else 0,
            )
        few = "" if len(chosen) == len(points) else f", {len(chosen)} drawn"
        marker = "_" if own is not None and known else plain
        entries.append((f"{name} ({len(points)}{few})", color, marker, True))
    axes.set_xlabel(f"first principal component ({100 * shares[0]:.0f} % of variance)")
    axes.set_ylabel(f"second principal component ({100 * shares[1]:.0f} %)")
    axes.set_aspect("equal", adjustable="datalim")
    entries.sort()
    for label, marker in zip(known, _MARKERS, strict=False):
        told = str(label) if class_names is None else class_names[label]
        entries.append((told, "0.35", marker, True))
    legend(axes, entries)
    save(made, path)


def _principal(pooled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places ``[n, 2]`` along two principal components, and their shares of the variance."""
    centered = pooled - pooled.mean(0)
    few = len(centered) < centered.shape[1]
    squares, vectors = np.linalg.eigh(centered @ centered.T if few else centered.T @ centered)
    vectors, largest = vectors[:, :-3:-1], np.maximum(squares[:-3:-1], 0)
    places = vectors * np.sqrt(largest) if few else centered @ vectors
    # An eigenvector's sign is any: the side that reaches farther is the positive one.
    places *= np.where(places.max(0) < -places.min(0), -1, 1)
    return places, largest / max(float(squares.sum()), np.finfo(np.float64).tiny)


_MOST_CLASSES = 20
_LEAST_P = 1e-6


def prevalence_picture(
    path: Target, estimates: Sequence[Prevalence], *, class_names: Sequence[str] | None = None
) -> None:
    """Shares of the classes in the target by several methods, beside those in the source.

    Each class has a line a method, with its interval; black bars are the source's prior. Of more
    than 20 classes those 20 are drawn that changed most by any method.

    Args:
        path: of a .png, .pdf or .svg; or an open binary file, for a PNG.
        estimates: one or more, at most 6, of the same classes.
        class_names: of the K classes.

    Raises:
        ValueError: no estimate, more than 6, other classes; another kind of file.
        FileNotFoundError: there is no such folder.
    """
    if not 1 <= len(estimates) <= len(SERIES):
        raise ValueError(f"{len(estimates)} estimates; from 1 to {len(SERIES)} can be drawn")
    classes = len(estimates[0].estimate)
    if any(len(one.estimate) != classes for one in estimates) or (
        class_names is not None and len(class_names) != classes
    ):
        found = [len(one.estimate) for one in estimates]
        told = "" if class_names is None else f", and {len(class_names)} names"
        raise ValueError(f"estimates are of {found} classes{told}: they have to be the same")
    change = np.max([np.abs(one.estimate - one.source) for one in estimates], axis=0)
    shown = np.sort(np.argsort(-change, kind="stable")[:_MOST_CLASSES])
    band = min(0.8, 0.25 * len(estimates))
    offsets = band * ((np.arange(len(estimates)) + 0.5) / len(estimates) - 0.5)

    rows = len(shown) * (0.14 + 0.11 * len(estimates))
    made, axes = figure(path, (7.2, 1.6 + max(1.2, rows)))
    entries = [("source prior", "black", "|", True)]
    for one, offset, (color, marker) in zip(estimates, offsets, SERIES, strict=False):
        heights = np.arange(len(shown)) + offset
        half = 0.5 * band / len(estimates) + 0.02
        axes.vlines(100 * one.source[shown], heights - half, heights + half, color="black", lw=2)
        known = np.isfinite(one.low[shown]) & np.isfinite(one.high[shown])
        axes.hlines(
            heights[known],
            100 * one.low[shown][known],
            100 * one.high[shown][known],
            color=color,
            lw=1.8,
        )
        face = color if one.identifiable else "white"
        axes.plot(
            100 * one.estimate[shown],
            heights,
            marker,
            color=color,
            markersize=6,
            markerfacecolor=face,
        )
        told = one.method if one.identifiable else f"{one.method} (not identifiable)"
        entries.append((told, color, marker, one.identifiable))
    names = [str(k) for k in range(classes)] if class_names is None else class_names
    axes.set_yticks(np.arange(len(shown)), [wrapped(names[k], 20) for k in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    levels = sorted({f"{100 * one.level:g} %" for one in estimates if np.isfinite(one.low).any()})
    told = f", with intervals of {' and '.join(levels)}" if levels else ""
    axes.set_xlabel(f"share of the class (%){told}")
    few = f"{len(shown)} of {classes} classes, which changed most"
    axes.set_ylabel("class" if len(shown) == classes else few)
    legend(axes, entries)
    save(made, path)


def reliability_picture(
    path: Target, confidence: Any, accuracy: Any, count: Any, low: Any, high: Any
) -> None:
    """How often predictions of each confidence are right, and how many there are of each.

    Points on the diagonal are calibrated, points below it over-confident. Bins without examples
    are left out. The title has the expected calibration error of these bins.

    Args:
        path: of a .png, .pdf or .svg; or an open binary file, for a PNG.
        confidence: ``[bins]``, mean confidence, 0 to 1.
        accuracy: ``[bins]``, share of right predictions.
        count: ``[bins]``, examples.
        low: ``[bins]``, lower ends of the accuracy's intervals.
        high: ``[bins]``, upper ends.

    Raises:
        ValueError: arrays of different lengths, no example at all; another kind of file.
        FileNotFoundError: there is no such folder.
    """
    arrays = [np.asarray(one, np.float64) for one in (confidence, accuracy, count, low, high)]
    if arrays[0].ndim != 1 or any(one.shape != arrays[0].shape for one in arrays):
        raise ValueError(f"bins have shapes {[one.shape for one in arrays]}, wanted [bins] each")
    held = arrays[2] > 0
    if not held.any():
        raise ValueError("no bin holds an example: there is nothing to draw")
    sure, right, number, least, most = (one[held] for one in arrays)
    error = float((number * np.abs(right - sure)).sum() / number.sum())

    made, (upper, lower) = figure(path, (5.6, 6.0), rows=2, height_ratios=[3, 1], sharex=True)
    upper.plot([0, 100], [0, 100], "--", color="0.6", lw=1.2)
    upper.vlines(100 * sure, 100 * least, 100 * most, color=BLUE, lw=1.8)
    upper.plot(100 * sure, 100 * right, "o", color=BLUE, markersize=6)
    upper.set_xlim(-2, 102)
    upper.set_ylim(-2, 102)
    upper.set_ylabel("right predictions (%)")
    upper.set_title(f"expected calibration error {100 * error:.1f} % (dashed: 0 %)", loc="left")
    width = 0.8 * 100 / len(arrays[0])
    lower.bar(100 * sure, number, width=width, color="0.65")
    lower.set_xlabel("confidence (%)")
    lower.set_ylabel("examples")
    save(made, path)


def hypotheses_picture(
    path: Target, tests: Sequence[HypothesisTest], *, level: float = 0.05
) -> None:
    """P-values of several tests on one axis, each with its effect in words.

    A filled marker is the p-value that counts, after correction where there was one; a hollow one
    is the p-value before. Squares are rejections at the level, circles are not; p-values below 1e-6
    stand there and point to the left.

    Args:
        path: of a .png, .pdf or .svg; or an open binary file, for a PNG.
        tests: one or more, in the order in which they are drawn from the top.
        level: at which the dashed line stands.

    Raises:
        ValueError: no test; another kind of file.
        FileNotFoundError: there is no such folder.
    """
    if not tests:
        raise ValueError("there is no test to draw")
    made, axes = figure(path, (8.0, 1.3 + 0.58 * len(tests)))
    corrected = False
    least = level / 10
    for row, test in enumerate(tests):
        if test.p is None:
            axes.text(
                0.02,
                row,
                wrapped(f"not testable: {test.not_testable}", 46),
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
        least = min(least, max(_LEAST_P, test.p))
        if test.adjusted_p is not None:
            corrected = True
            before = "<" if test.p < _LEAST_P else marker
            ends = [max(_LEAST_P, test.p), max(_LEAST_P, p)]
            axes.plot(ends, [row, row], color=color, lw=1.2)
            axes.plot(ends[:1], [row], before, color=color, markerfacecolor="white", markersize=6)
        axes.plot(
            [max(_LEAST_P, p)], [row], "<" if p < _LEAST_P else marker, color=color, markersize=8
        )
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
    axes.set_yticks(range(len(tests)), [wrapped(test.name, 26) for test in tests])
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
    told = "p-value: filled after correction, hollow before" if corrected else "p-value"
    axes.set_xlabel(told)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    save(made, path)


def _effect(test: HypothesisTest) -> str:
    p = test.p if test.adjusted_p is None else test.adjusted_p
    told = f"{test.effect_name} {test.effect:.3g}, p = {p:.2g}"
    if test.minimum_detectable is not None:
        told += f"\ndetectable: {test.minimum_detectable:.3g}"
    return told


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
            _png(lambda file: hypotheses_picture(file, report.tests, level=report.level)),
        ),
        "reliability": (
            "Reliability at the source",
            _png(lambda file: reliability_picture(file, *columns)),
        ),
    }
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
