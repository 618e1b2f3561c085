"""Rows that occur more than once: the same images twice or on both sides, or discrete features."""

from __future__ import annotations

import numpy as np

__all__ = ["duplicate_notes", "repeated_rows", "repetition_notes", "shared_rows", "uncertain"]

_CERTAIN = 1 - 1e-6


def shared_rows(source: np.ndarray, target: np.ndarray) -> int:
    """How many rows of the target occur in the source too, equal in every number.

    Two samples of a continuous distribution share none. Shared rows are examples that were put on
    both sides; a test that compares the sides then finds less than there is.

    Args:
        source: `[n, D]`.
        target: `[m, D]`.

    >>> shared_rows(np.array([[0.0, 1.0], [2.0, 3.0]]), np.array([[2.0, 3.0], [-0.0, 1.0], [4, 4]]))
    2
    """
    known = set(_keys(source))
    return sum(key in known for key in _keys(target))


def repeated_rows(rows: np.ndarray) -> int:
    """How many rows are equal to an earlier one, in every number.

    Copies of an example are no further examples; a test that counts them as such finds more than
    there is.

    Args:
        rows: `[n, D]`.

    >>> repeated_rows(np.array([[0.0, 1.0], [2.0, 3.0], [0.0, 1.0], [0.0, 1.0]]))
    2
    """
    keys = _keys(rows)
    return len(keys) - len(set(keys))


def repetition_notes(rows: np.ndarray, name: str) -> tuple[str, ...]:
    """What is said of rows that repeat others; nothing where there are none.

    >>> repetition_notes(np.ones((3, 2)), "source")[0][:38]
    '2 of 3 source rows repeat an earlier o'
    """
    repeated = repeated_rows(rows)
    if not repeated:
        return ()
    return (
        f"{repeated} of {len(rows)} {name} rows repeat an earlier one exactly: either examples are "
        "there more than once, and p is too small (keep one of each), or the features are discrete",
    )


def duplicate_notes(source: np.ndarray, target: np.ndarray) -> tuple[str, ...]:
    """What is said of rows that both samples have, or that one of them has more than once.

    Where all rows are one, that is said instead.

    >>> duplicate_notes(np.eye(2), np.array([[1.0, 0.0], [2.0, 2.0]]))[0][:40]
    '1 of 2 target rows occur exactly in the '
    """
    if len(source) and (source == source[0]).all() and (target == source[0]).all():
        return ("all rows of both samples are equal",)
    shared = shared_rows(source, target)
    notes = (
        f"{shared} of {len(target)} target rows occur exactly in the source too: either the same "
        "examples are on both sides (leakage), which hides a shift, or the features are discrete",
    )
    own = repetition_notes(source, "source") + repetition_notes(target, "target")
    return (notes if shared else ()) + own


def uncertain(probabilities: np.ndarray) -> np.ndarray:
    """The rows in which no class is certain: those of certain ones coincide by rounding.

    >>> uncertain(np.array([[1.0, 0.0], [0.5, 0.5]])).tolist()
    [[0.5, 0.5]]
    """
    return probabilities[probabilities.max(1) < _CERTAIN]


def _keys(rows: np.ndarray) -> list[int]:
    # Hashes of 64 bits, for the rows themselves would be held a second time. Adding 0 turns -0 into
    # 0, which has other bytes.
    return [hash((row + 0.0).tobytes()) for row in rows]
