"""Input validation for domain-shift estimators, and duplicate rows.

Every public function of this room checks its arrays here once and works in float64 from there on.
Duplicate rows are reported: the same images more than once or on both sides, or discrete features.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = [
    "as_features",
    "as_labels",
    "as_logits",
    "as_prior",
    "as_probabilities",
    "as_probability_rows",
    "duplicate_row_notes",
    "repeated_row_notes",
    "repeated_rows",
    "same_width",
    "shared_rows",
    "uncertain_rows",
]

_SUM_TOLERANCE = 1e-3
"""The rows of a half-precision softmax over 1000 classes sum to 1 within this."""

_BLOCK_SIZE = 1_000_000
"""Numbers per block when an array is checked without a copy."""

_CERTAIN = 1 - 1e-6


def as_probabilities(array: Any, name: str) -> np.ndarray:
    """Class probabilities ``[n, K]``, float64, normalized so that each row sums to 1.

    Args:
        array: Probabilities ``[n, K]`` of NumPy or JAX.
        name: Name of the array, for the error text.

    Raises:
        ValueError: A wrong shape, fewer than 2 classes, no rows, NaN or negative numbers, or rows
            that do not sum to 1.

    >>> as_probabilities([[0.25, 0.75]], "probabilities")
    array([[0.25, 0.75]])
    """
    found = _matrix(array, name, "[n, classes]")
    _check_two_classes(found, name)
    if (found < 0).any():
        row = int(np.argmax((found < 0).any(1)))
        raise ValueError(
            f"{name} must be >= 0, got negative numbers, first in row {row}; are they logits?"
        )
    sums = found.sum(1)
    wrong = np.abs(sums - 1) > _SUM_TOLERANCE
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"{name} must sum to 1 per row, got {int(wrong.sum())} of {len(found)} rows that do "
            f"not (row {row} sums to {sums[row]:.6g}); apply a softmax to logits"
        )
    result: np.ndarray = found / sums[:, None]
    return result


def as_probability_rows(array: Any, name: str) -> np.ndarray:
    """Class probabilities ``[n, K]`` without a copy.

    Checked like ``as_probabilities``, one block of rows at a time. float32 and float64 arrays are
    returned as they are, other types become float64; rows are not normalized.

    Args:
        array: Probabilities ``[n, K]``.
        name: Name of the array, for the error text.

    Raises:
        ValueError: What ``as_probabilities`` finds; rows are counted from the start of the block
            that the message names.

    >>> as_probability_rows(np.array([[0.25, 0.75]], np.float32), "probabilities").dtype
    dtype('float32')
    """
    found = np.asarray(array)
    if found.dtype not in (np.float32, np.float64):
        return as_probabilities(array, name)
    if found.ndim != 2 or found.shape[0] == 0 or found.shape[1] < 2:
        return as_probabilities(found, name)
    step = max(1, _BLOCK_SIZE // found.shape[1])
    for start in range(0, len(found), step):
        part = found[start : start + step]
        # Both comparisons are False for NaN.
        valid = (
            part.min() >= 0 and np.abs(part.sum(1, dtype=np.float64) - 1).max() <= _SUM_TOLERANCE
        )
        if not valid:
            whole = len(found) <= step
            as_probabilities(part, name if whole else f"{name}[{start}:{start + len(part)}]")
    return found


def as_logits(array: Any, name: str) -> np.ndarray:
    """Logits ``[n, K]``, float64, finite, of at least 2 classes.

    >>> as_logits([[0, 2]], "logits")
    array([[0., 2.]])
    """
    found = _matrix(array, name, "[n, classes]")
    _check_two_classes(found, name)
    return found


def as_features(array: Any, name: str) -> np.ndarray:
    """Features ``[n, D]``, float64, finite.

    >>> as_features([[1, 2, 3]], "features").shape
    (1, 3)
    """
    return _matrix(array, name, "[n, features]")


def as_labels(array: Any, name: str, *, count: int, classes: int) -> np.ndarray:
    """Labels ``[n]`` from 0 to K - 1, int64.

    Args:
        array: The labels; floats that are whole numbers are accepted.
        name: Name of the array, for the error text.
        count: n, the number of rows that they belong to.
        classes: K.

    Raises:
        ValueError: A wrong shape, other values than whole numbers, or values outside of 0 .. K - 1.

    >>> as_labels([0, 2.0], "labels", count=2, classes=3)
    array([0, 2])
    """
    found = np.asarray(array)
    if found.ndim != 1 or len(found) != count:
        raise ValueError(f"{name} must have shape [{count}], got {list(found.shape)}")
    if found.dtype.kind not in "iufb" or not np.array_equal(found, np.round(found)):
        raise ValueError(
            f"{name} must be class numbers, got {found.dtype} such as {found[:3].tolist()}"
        )
    found = found.astype(np.int64)
    outside = (found < 0) | (found >= classes)
    if outside.any():
        raise ValueError(
            f"{name} must be within 0 .. {classes - 1}, got {int(outside.sum())} outside of it, "
            f"first {found[outside][0]} in row {int(np.argmax(outside))}"
        )
    return found


def as_prior(array: Any, name: str, *, classes: int) -> np.ndarray:
    """A distribution over K classes, float64 ``[K]``, normalized to sum to 1.

    >>> as_prior([1, 3], "prior", classes=2)
    Traceback (most recent call last):
    ValueError: prior must sum to 1, got a sum of 4
    """
    found = np.asarray(array, np.float64)
    if found.shape != (classes,):
        raise ValueError(f"{name} must have shape [{classes}], got {list(found.shape)}")
    if not np.isfinite(found).all() or (found < 0).any():
        raise ValueError(f"{name} must be finite and >= 0, got {found.tolist()}")
    total = found.sum()
    if abs(total - 1) > _SUM_TOLERANCE:
        raise ValueError(f"{name} must sum to 1, got a sum of {total:.6g}")
    result: np.ndarray = found / total
    return result


def same_width(first: np.ndarray, first_name: str, second: np.ndarray, second_name: str) -> int:
    """The number of columns of two arrays, checked to be equal.

    Raises:
        ValueError: The numbers differ.
    """
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"{first_name} and {second_name} must have the same number of columns, got "
            f"{first.shape[1]} and {second.shape[1]}; use the same model for both"
        )
    return int(first.shape[1])


def duplicate_row_notes(source: np.ndarray, target: np.ndarray) -> tuple[str, ...]:
    """Notes on rows that both samples have, or that one of them has more than once.

    Where all rows of both samples are equal, that is the only note.

    >>> duplicate_row_notes(np.eye(2), np.array([[1.0, 0.0], [2.0, 2.0]]))[0][:38]
    '1 of 2 target rows also occur exactly '
    """
    if len(source) and (source == source[0]).all() and (target == source[0]).all():
        return ("all rows of both samples are equal",)
    common = shared_rows(source, target)
    notes = (
        f"{common} of {len(target)} target rows also occur exactly in the source: either the same "
        "examples are on both sides (leakage), which hides a shift, or the features are discrete",
    )
    own = repeated_row_notes(source, "source") + repeated_row_notes(target, "target")
    return (notes if common else ()) + own


def repeated_row_notes(rows: np.ndarray, name: str) -> tuple[str, ...]:
    """A note on rows that repeat earlier ones; empty where there are none.

    >>> repeated_row_notes(np.ones((3, 2)), "source")[0][:38]
    '2 of 3 source rows repeat an earlier o'
    """
    repeated = repeated_rows(rows)
    if not repeated:
        return ()
    return (
        f"{repeated} of {len(rows)} {name} rows repeat an earlier one exactly: either the features "
        "are discrete, or examples occur more than once and p is too small (keep one of each)",
    )


def shared_rows(source: np.ndarray, target: np.ndarray) -> int:
    """Number of target rows that also occur in the source, equal in every number.

    Two samples of a continuous distribution have no row in common. Common rows are examples on both
    sides (leakage), which makes a test find less than there is.

    Args:
        source: ``[n, D]``.
        target: ``[m, D]``.

    >>> shared_rows(np.array([[0.0, 1.0], [2.0, 3.0]]), np.array([[2.0, 3.0], [-0.0, 1.0], [4, 4]]))
    2
    """
    known = set(_row_hashes(source))
    return sum(key in known for key in _row_hashes(target))


def repeated_rows(rows: np.ndarray) -> int:
    """Number of rows that equal an earlier row in every number.

    Copies of an example add no information; a test that counts them finds more than there is.

    Args:
        rows: ``[n, D]``.

    >>> repeated_rows(np.array([[0.0, 1.0], [2.0, 3.0], [0.0, 1.0], [0.0, 1.0]]))
    2
    """
    keys = _row_hashes(rows)
    return len(keys) - len(set(keys))


def uncertain_rows(probabilities: np.ndarray) -> np.ndarray:
    """The rows in which no class has probability 1; certain rows are equal by rounding alone.

    >>> uncertain_rows(np.array([[1.0, 0.0], [0.5, 0.5]])).tolist()
    [[0.5, 0.5]]
    """
    result: np.ndarray = probabilities[probabilities.max(1) < _CERTAIN]
    return result


def _matrix(array: Any, name: str, shape: str) -> np.ndarray:
    found = np.asarray(array)
    if found.dtype.kind not in "iufb":
        # bfloat16 and similar types have NumPy's kind "V" but are floats.
        try:
            found = found.astype(np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"{name} must be numbers, got {found.dtype}") from None
    found = found.astype(np.float64)
    if found.ndim != 2 or 0 in found.shape:
        raise ValueError(f"{name} must have shape {shape}, got {list(np.shape(array))}")
    broken = ~np.isfinite(found).all(1)
    if broken.any():
        raise ValueError(
            f"{name} must be finite, got {int(broken.sum())} of {len(found)} rows with NaN or "
            f"infinite numbers, first row {int(np.argmax(broken))}"
        )
    return found


def _check_two_classes(found: np.ndarray, name: str) -> None:
    if found.shape[1] < 2:
        raise ValueError(
            f"{name} must have one column per class, got 1 column; for 2 classes use p and 1 - p"
        )


def _row_hashes(rows: np.ndarray) -> list[int]:
    # Hashes of 64 bits instead of the rows, to save memory. Adding 0 turns -0 into 0, whose bytes
    # differ.
    return [hash((row + 0.0).tobytes()) for row in rows]
