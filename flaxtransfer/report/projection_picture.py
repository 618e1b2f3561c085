"""Features of two domains in the plane in which they vary most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flaxtransfer.report.figures import BLUE, RED, Target, figure, legend, save

__all__ = ["projection_picture"]

_MARKERS = "os^DvP*X<>"
_MOST_POINTS = 2000
"""Of each domain: beyond, points cover each other and pictures take long to open."""


def projection_picture(
    path: Target, source: Any, target: Any, *, source_labels: Any = None,
    target_labels: Any = None, class_names: Sequence[str] | None = None,
) -> None:  # fmt: skip
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
    for name, colour, points, own in sorted(sides, key=lambda side: -len(side[2])):
        chosen = np.arange(0, len(points), -(-len(points) // _MOST_POINTS))
        size = float(np.clip(8000 / len(chosen), 10, 36))
        # Among classes with markers, points of no known class are crosses.
        plain = "x" if known else "o"
        for label in known if own is not None and known else [None]:
            here = chosen if label is None or own is None else chosen[own[chosen] == label]
            marker = plain if label is None else _MARKERS[known.index(label)]
            axes.scatter(*points[here].T, s=size, c=colour, marker=marker,
                         alpha=0.55, linewidths=1.2 if marker == "x" else 0)  # fmt: skip
        few = "" if len(chosen) == len(points) else f", {len(chosen)} drawn"
        marker = "_" if own is not None and known else plain
        entries.append((f"{name} ({len(points)}{few})", colour, marker, True))
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
    centred = pooled - pooled.mean(0)
    few = len(centred) < centred.shape[1]
    squares, vectors = np.linalg.eigh(centred @ centred.T if few else centred.T @ centred)
    vectors, largest = vectors[:, :-3:-1], np.maximum(squares[:-3:-1], 0)
    places = vectors * np.sqrt(largest) if few else centred @ vectors
    # An eigenvector's sign is any: the side that reaches farther is the positive one.
    places *= np.where(places.max(0) < -places.min(0), -1, 1)
    return places, largest / max(float(squares.sum()), np.finfo(np.float64).tiny)
