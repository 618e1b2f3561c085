"""Arrays as this room takes them: checked once, at its doors, and float64 from there on."""

from typing import Any

import numpy as np

__all__ = [
    "as_features",
    "as_labels",
    "as_logits",
    "as_prior",
    "as_probabilities",
    "as_probability_rows",
    "same_width",
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
