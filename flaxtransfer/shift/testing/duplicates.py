"""Rows that two samples share: the same images on both sides, or features that are discrete."""

import numpy as np

__all__ = ["duplicate_note", "shared_rows"]


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
    # Adding 0 turns -0 into 0, which has other bytes.
    known = {row.tobytes() for row in np.ascontiguousarray(source + 0.0)}
    return sum(row.tobytes() in known for row in np.ascontiguousarray(target + 0.0))


def duplicate_note(source: np.ndarray, target: np.ndarray) -> tuple[str, ...]:
    """What a test says of shared rows; nothing where there are none.

    >>> duplicate_note(np.ones((2, 2)), np.array([[1.0, 1.0], [2.0, 2.0]]))[0][:40]
    '1 of 2 target rows occur exactly in the '
    """
    shared = shared_rows(source, target)
    if not shared:
        return ()
    return (
        f"{shared} of {len(target)} target rows occur exactly in the source too: either the same "
        "examples are on both sides (leakage), which hides a shift, or the features are discrete",
    )
