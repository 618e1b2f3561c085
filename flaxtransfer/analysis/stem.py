"""Stem report: what remains of the first-layer filters on gray or multi-band images.

Use it before a network for RGB is applied to images without color or with other bands.
"""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from flaxtransfer.overview import terminal
from flaxtransfer.paths import listing

__all__ = ["OPPONENT", "StemReport", "stem_report"]


OPPONENT = 0.05
"""Fraction of its energy below which a filter counts as color-opponent."""

_DEAD = 1e-6
"""Energy relative to the strongest filter below which a filter counts as dead."""

_EDGES = (0.0, OPPONENT, 1 / 3, 2 / 3, 0.95, 1.0)
"""Ranges of the printed table. A filter of a single color has 1/3."""

_WIDTH = 100
"""Characters per line of ``str(report)``, where there is no terminal."""


def stem_report(stem_kernel: Any, adapter_kernel: Any = None) -> StemReport:
    """Stem report: the fraction of the energy of each first-layer filter that survives.

    On a gray image replicated to three channels, a filter k acts as its sum over the channels, so

        share = ‖k_R + k_G + k_B‖² / (3 ‖k‖²).

    At each pixel of the window, k is a vector of three numbers, and the sum is its projection on
    the gray axis (1, 1, 1) / √3, times √3. The share is thus the fraction of the energy on that
    axis: 1 if all three channels are equal (achromatic), 0 if they cancel at every pixel
    (opponent), and never outside (Cauchy-Schwarz). A filter of a single color has 1/3, and so have
    random filters on average: a stem near that has not learned to separate brightness from color.
    Opponent filters give 0 on replicated gray. Unequal channel weights activate them, but all
    channels still show the same picture; different pictures need tone curves, or a trained stem.

    With an adapter A ``[bands, 3]``, filter k becomes A k at each pixel of the window, and

        share = ‖A k‖² / (‖A‖² ‖k‖²), with the spectral norm ‖A‖,

    the energy relative to the combination of channels that the adapter passes best. Replication has
    ‖A‖² = 3, and channels that are the mean of n bands have 3 / n, so that both give the share
    above; RGB itself (the identity) gives 1 for all. The gain of the adapter has no influence.

    It assumes independent bands of equal variance. It is not the response of a filter to a given
    set of images.

    Args:
        stem_kernel: ``[kernel height, kernel width, 3, filters]``.
        adapter_kernel: ``[1, 1, bands, 3]`` of a linear adapter; replication when left out.

    Returns:
        A ``StemReport``; ``print`` shows it.

    Raises:
        ValueError: kernels of another shape, values that are not finite, an adapter of zeros.

    >>> gray, red, opponent = np.ones(3), np.eye(3)[0], np.array([1.0, 0.0, -1.0])
    >>> kernel = np.stack([gray, red, opponent], axis=-1).reshape(1, 1, 3, 3)
    >>> {filter: round(share, 3) for filter, share in stem_report(kernel).shares.items()}
    {0: 1.0, 1: 0.333, 2: 0.0}

    References:
        A. Krizhevsky, I. Sutskever, G. E. Hinton, "ImageNet Classification with Deep Convolutional
        Neural Networks", 2012 (figure 3: color-agnostic and color-specific filters).
        I. Rafegas, M. Vanrell, "Color encoding in biologically-inspired convolutional neural
        networks", 2018 (color opponency of learned filters).
    """
    kernel = _checked(stem_kernel, "the stem's kernel", "[height, width, 3, filters]")
    if kernel.ndim != 4 or kernel.shape[2] != 3 or 0 in kernel.shape:
        raise ValueError(
            f"the stem's kernel must have shape [height, width, 3, filters], got {kernel.shape}; "
            "transpose(2, 3, 1, 0) converts torch's first kernel"
        )
    adapter = np.ones((1, 3)) if adapter_kernel is None else _checked_adapter(adapter_kernel)
    # Only the Gram matrix of the channels of a filter matters here.
    gram = np.einsum("hwrc,hwsc->crs", kernel, kernel)
    energy = np.trace(gram, axis1=1, axis2=2)
    passed = np.einsum("nr,crs,ns->c", adapter, gram, adapter)
    living = energy > _DEAD * energy.max()
    gain = np.linalg.norm(adapter, 2) ** 2
    # Rounding leaves an opponent filter at ± 1e-17.
    shares = np.clip(passed[living] / (gain * energy[living]), 0, 1)
    indices = np.flatnonzero(living).tolist()
    parts = energy[living] / energy[living].sum()
    return StemReport(
        shares=dict(zip(indices, shares.tolist(), strict=True)),
        energies=dict(zip(indices, parts.tolist(), strict=True)),
        dead=tuple(np.flatnonzero(~living).tolist()),
        bands=len(adapter),
        adapted=adapter_kernel is not None,
    )


@dataclass(frozen=True)
class StemReport:
    """Result of ``stem_report``; it prints as a table.

    Args:
        shares: fraction of the energy that remains, 0 .. 1, by the index of the filter; without
            dead filters.
        energies: fraction of the energy of the whole stem, by the index of the filter; they sum to
            1.
        dead: indices of filters that are zero or nearly so.
        bands: number of bands of the input; 1 for replication.
        adapted: whether the input goes through an adapter, and not through replication.
    """

    shares: dict[int, float]
    energies: dict[int, float]
    dead: tuple[int, ...]
    bands: int
    adapted: bool

    @property
    def opponent(self) -> tuple[int, ...]:
        """Indices of the filters of which less than 5 % remains."""
        return tuple(index for index, share in self.shares.items() if share < OPPONENT)

    @property
    def median(self) -> float | None:
        """Median share of the filters that are not dead; None if all are."""
        return float(np.median(list(self.shares.values()))) if self.shares else None

    @property
    def surviving(self) -> float | None:
        """Fraction of the energy of the whole stem that remains; None if all filters are dead."""
        if not self.shares:
            return None
        return sum(share * self.energies[index] for index, share in self.shares.items())

    def summary(self) -> str:
        """The report in one line."""
        how = f"an adapter of {self.bands} bands" if self.adapted else "replication"
        if self.median is None:
            return f"all {len(self.dead)} filters of the stem are dead"
        return (
            f"{len(self.opponent)} of {len(self.shares)} filters are opponent (less than "
            f"{OPPONENT:.0%} survives {how}); median share {self.median:.2f}; "
            f"{self.surviving:.0%} of the stem's energy survives; {len(self.dead)} dead"
        )

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON-able dictionary."""
        return {
            "filters": len(self.shares) + len(self.dead),
            "bands": self.bands,
            "adapted": self.adapted,
            "opponent": list(self.opponent),
            "dead": list(self.dead),
            "median": self.median,
            "surviving": self.surviving,
            "shares": {str(index): share for index, share in self.shares.items()},
            "energies": {str(index): energy for index, energy in self.energies.items()},
        }

    def __str__(self) -> str:
        text = io.StringIO()
        terminal(file=text, width=_WIDTH, color_system=None).print(self)
        return text.getvalue().rstrip()

    def __rich__(self) -> Any:
        # Imported here, so that rich is needed for printing only.
        from rich.console import Group
        from rich.table import Table

        table = Table("share that survives", "filters", "of the energy", "which")
        for low, high in itertools.pairwise(_EDGES):
            last = high == _EDGES[-1]
            found = [i for i, s in self.shares.items() if low <= s < high or (last and s >= low)]
            name = "opponent" if high == OPPONENT else "achromatic" if last else ""
            table.add_row(
                f"{low:.2f} to {high:.2f} {name}".rstrip(),
                str(len(found)),
                f"{sum(self.energies[i] for i in found):.1%}",
                listing(map(str, found), most=10),
            )
        if self.dead:
            table.add_row("dead", str(len(self.dead)), "–", listing(map(str, self.dead), most=10))
        for column in table.columns[1:3]:
            column.justify = "right"
        return Group(table, self.summary())


def _checked_adapter(adapter_kernel: Any) -> np.ndarray:
    kernel = _checked(adapter_kernel, "the adapter's kernel", "[1, 1, bands, 3]")
    if kernel.ndim != 4 or kernel.shape[:2] != (1, 1) or kernel.shape[3] != 3 or not kernel.size:
        raise ValueError(
            f"the adapter's kernel must have shape [1, 1, bands, 3], got {kernel.shape}"
        )
    if not kernel.any():
        raise ValueError("the adapter's kernel must not be all zeros: nothing would reach the stem")
    adapter: np.ndarray = kernel[0, 0]
    return adapter


def _checked(values: Any, what: str, shape: str) -> np.ndarray:
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{what} must be an array {shape}, the kernel of the first convolution, got a "
            f"{type(values).__name__}"
        ) from error
    if not np.isfinite(array).all():
        raise ValueError(f"{what} must be finite")
    return array
