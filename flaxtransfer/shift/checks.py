"""Input validation for domain-shift estimators, and duplicate rows.

Arrays as this room takes them: checked once, at its doors, and float64 from there on.

Rows that occur more than once: the same images twice or on both sides, or discrete features.
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
    "duplicate_notes",
    "repeated_rows",
    "repetition_notes",
    "same_width",
    "shared_rows",
    "uncertain",
]


_SUM_TOLERANCE = 1e-3
"""Half-precision softmax over a thousand classes is this far from 1."""

_CHECKED_AT_ONCE = 1_000_000
"""Numbers in a block of an array that is not copied."""


def as_probabilities(array: Any, name: str) -> np.ndarray:
    """Class probabilities ``[n, K]`` whose rows sum to exactly 1.

    Raises:
        ValueError: another shape, fewer than 2 classes, no rows, numbers that are NaN or negative,
            rows that do not sum to 1.

    >>> as_probabilities([[0.25, 0.75]], "probabilities")
    array([[0.25, 0.75]])
    """
    found = _matrix(array, name, "[n, classes]")
    _at_least_two(found, name)
    if (found < 0).any():
        row = int(np.argmax((found < 0).any(1)))
        raise ValueError(f"{name} hold negative numbers, first in row {row}: are they logits?")
    sums = found.sum(1)
    wrong = np.abs(sums - 1) > _SUM_TOLERANCE
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"{name}: {int(wrong.sum())} of {len(found)} rows do not sum to 1 (row {row} sums to "
            f"{sums[row]:.6g}); logits become probabilities by a softmax"
        )
    return found / sums[:, None]


def as_probability_rows(array: Any, name: str) -> np.ndarray:
    """Class probabilities ``[n, K]`` as they are, for arrays that should not be copied.

    Checked like `as_probabilities`, a block of rows at a time. float32 and float64 stay what and
    where they are, and everything else becomes float64; rows sum to 1 as nearly as they did.

    Raises:
        ValueError: what `as_probabilities` finds; rows are counted from the block that it names.

    >>> as_probability_rows(np.array([[0.25, 0.75]], np.float32), "probabilities").dtype
    dtype('float32')
    """
    found = np.asarray(array)
    if found.dtype not in (np.float32, np.float64):
        return as_probabilities(array, name)
    if found.ndim != 2 or found.shape[0] == 0 or found.shape[1] < 2:
        return as_probabilities(found, name)
    step = max(1, _CHECKED_AT_ONCE // found.shape[1])
    for start in range(0, len(found), step):
        part = found[start : start + step]
        # NaN is at home in neither comparison.
        fine = part.min() >= 0 and np.abs(part.sum(1, dtype=np.float64) - 1).max() <= _SUM_TOLERANCE
        if not fine:
            whole = len(found) <= step
            as_probabilities(part, name if whole else f"{name}[{start}:{start + len(part)}]")
    return found


def as_logits(array: Any, name: str) -> np.ndarray:
    """Logits ``[n, K]``, finite, of at least 2 classes.

    >>> as_logits([[0, 2]], "logits")
    array([[0., 2.]])
    """
    found = _matrix(array, name, "[n, classes]")
    _at_least_two(found, name)
    return found


def as_features(array: Any, name: str) -> np.ndarray:
    """Features ``[n, D]``, finite.

    >>> as_features([[1, 2, 3]], "features").shape
    (1, 3)
    """
    return _matrix(array, name, "[n, features]")


def as_labels(array: Any, name: str, *, count: int, classes: int) -> np.ndarray:
    """Class numbers ``[n]`` from 0 to K - 1, as int64.

    Args:
        array: the labels; floats that are whole numbers are taken.
        name: for the error text.
        count: how many rows they have to belong to.
        classes: K.

    >>> as_labels([0, 2.0], "labels", count=2, classes=3)
    array([0, 2])
    """
    found = np.asarray(array)
    if found.ndim != 1 or len(found) != count:
        raise ValueError(f"{name} have shape {found.shape}, and there are {count} rows")
    if found.dtype.kind not in "iufb" or not np.array_equal(found, np.round(found)):
        raise ValueError(f"{name} are class numbers, not {found.dtype} like {found[:3].tolist()}")
    found = found.astype(np.int64)
    outside = (found < 0) | (found >= classes)
    if outside.any():
        raise ValueError(
            f"{name}: {int(outside.sum())} are outside of 0 .. {classes - 1}, as "
            f"{found[outside][0]} in row {int(np.argmax(outside))}"
        )
    return found


def as_prior(array: Any, name: str, *, classes: int) -> np.ndarray:
    """A distribution over K classes, ``[K]``, that sums to exactly 1.

    >>> as_prior([1, 3], "prior", classes=2)
    Traceback (most recent call last):
    ValueError: prior sums to 4, and a distribution sums to 1
    """
    found = np.asarray(array, np.float64)
    if found.shape != (classes,):
        raise ValueError(f"{name} has shape {found.shape}, and there are {classes} classes")
    if not np.isfinite(found).all() or (found < 0).any():
        raise ValueError(f"{name} holds numbers that are no probabilities: {found.tolist()}")
    total = found.sum()
    if abs(total - 1) > _SUM_TOLERANCE:
        raise ValueError(f"{name} sums to {total:.6g}, and a distribution sums to 1")
    return found / total


def same_width(first: np.ndarray, first_name: str, second: np.ndarray, second_name: str) -> int:
    """The number of columns that both have.

    Raises:
        ValueError: they differ.
    """
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"{first_name} have {first.shape[1]} columns and {second_name} {second.shape[1]}; both "
            "have to come from the same model"
        )
    return first.shape[1]


def _matrix(array: Any, name: str, shape: str) -> np.ndarray:
    found = np.asarray(array)
    if found.dtype.kind not in "iufb":
        # bfloat16 and its like are of numpy's kind "V", and floats all the same.
        try:
            found = found.astype(np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"{name} are numbers, not {found.dtype}") from None
    found = found.astype(np.float64)
    if found.ndim != 2 or 0 in found.shape:
        raise ValueError(f"{name} have shape {np.shape(array)}, wanted {shape}")
    broken = ~np.isfinite(found).all(1)
    if broken.any():
        raise ValueError(
            f"{name}: {int(broken.sum())} of {len(found)} rows hold NaN or infinite numbers, first "
            f"row {int(np.argmax(broken))}"
        )
    return found


def _at_least_two(found: np.ndarray, name: str) -> None:
    if found.shape[1] < 2:
        raise ValueError(f"{name} have one column; two classes have two, p and 1 - p")


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
