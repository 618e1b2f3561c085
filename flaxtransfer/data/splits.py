"""Which examples are trained on, validated on and tested on: a pure function of labels and seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Splits(NamedTuple):
    """Positions in a source, int64, ascending; disjoint, and together all of them."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    rest: np.ndarray  # in none of the three; their labels were never used


def stratified_split(
    labels: np.ndarray | Sequence[int],
    *,
    labels_per_class: int | None = None,
    val_per_class: int | None = None,
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
) -> Splits:
    """Splits examples class by class.

    Every class is put in an order of its own that depends on ``seed`` and the class alone. Its
    beginning is the test part (when ``test_fraction`` is given), then come the examples that may
    be learned from, of which the last are for validation.

    With ``labels_per_class=n``, n labels of each class are used and no more: **validation comes
    out of those n** (``val_per_class`` of them, none by default), as it would for somebody who
    has only n labels. Without a ``test_fraction`` all the remaining examples are the test set;
    with one, the test set is fixed first, and is therefore the same for every n, and what lies
    between is ``rest``.

    For one seed (and one ``test_fraction``), the examples of a smaller n are among those of a
    larger n, and so are the training examples as long as ``n - val_per_class`` grows.

    Args:
      labels: integers ``[examples]``, 0 .. classes - 1.
      labels_per_class: how many labels of each class may be used; all when left out.
      val_per_class: how many of those validate; they are not trained on.
      val_fraction: instead, without ``labels_per_class``: the share of what is left after the
        test part. Default 0.1 when neither this nor ``labels_per_class`` nor ``val_per_class`` is
        given.
      test_fraction: share of each class, fixed first. Default: all the rest with
        ``labels_per_class``, else 0.2; 0.0 for no test set.
      seed: 0 or more.
      class_names: for the texts of errors.

    Returns:
      The four parts. A share that is greater than 0 is at least one example a class.

    Raises:
      TypeError: labels are not integers.
      ValueError: numbers out of range, or a class that is too small for them; every such class is
        listed.

    >>> splits = stratified_split([0, 0, 0, 1, 1, 1], labels_per_class=2, val_per_class=1)
    >>> [len(part) for part in splits]
    [2, 2, 2, 0]
    """
    targets = _checked_labels(labels)
    counts = np.bincount(targets)
    if class_names is not None:
        counts = np.bincount(targets, minlength=len(class_names))
    names = [str(c) for c in range(len(counts))] if class_names is None else list(class_names)
    _check_numbers(labels_per_class, val_per_class, val_fraction, test_fraction, seed)
    if len(counts) < 2:
        raise ValueError(f"there is only one class, {names[0]!r}; a classifier needs two or more")
    if len(names) != len(counts):
        raise ValueError(f"labels go up to {len(counts) - 1}, but there are {len(names)} names")
    if labels_per_class is None:
        test_fraction = 0.2 if test_fraction is None else test_fraction
        if val_per_class is None and val_fraction is None:
            val_fraction = 0.1

    parts: dict[str, list[np.ndarray]] = {name: [] for name in Splits._fields}
    problems = []
    for label, count in enumerate(counts.tolist()):
        tested = _share(test_fraction or 0.0, count)
        pool = count - tested
        used = pool if labels_per_class is None else labels_per_class
        val = _share(val_fraction, pool) if val_fraction is not None else val_per_class or 0
        problem = _class_problem(count, tested, used, val, rest_is_test=test_fraction is None)
        if problem:
            problems.append(f"class {names[label]!r} {problem}")
            continue
        order = _order(np.flatnonzero(targets == label), seed, label)
        test, order = order[:tested], order[tested:]
        chosen, rest = order[:used], order[used:]
        if test_fraction is None:
            test, rest = rest, rest[:0]
        for name, part in zip(
            Splits._fields, (chosen[: used - val], chosen[used - val :], test, rest), strict=True
        ):
            parts[name].append(part)
    if problems:
        raise ValueError("this split cannot be made: " + "; ".join(problems))
    return Splits(**{name: np.sort(np.concatenate(found)) for name, found in parts.items()})


def _order(members: np.ndarray, seed: int, label: int) -> np.ndarray:
    # Raw generator output, unlike ``permutation``, is the same in every release of NumPy.
    keys = np.random.PCG64(np.random.SeedSequence([seed, label])).random_raw(len(members))
    return members[np.argsort(keys, kind="stable")].astype(np.int64)


def _share(fraction: float, count: int) -> int:
    return max(1, round(fraction * count)) if fraction > 0 and count else 0


def _class_problem(count: int, tested: int, used: int, val: int, *, rest_is_test: bool) -> str:
    if count == 0:
        return "has no examples"
    needs = max(used, val + 1)
    if count - tested < needs:
        held = f" after {tested} for testing" if tested else ""
        return f"has {count} examples, {count - tested} left{held}, and {needs} are wanted"
    if rest_is_test and count == used:
        return (
            f"has {count} examples, all of which would be used, and none is left to test on "
            "(test_fraction=0.0 goes without a test set)"
        )
    return ""


def _checked_labels(labels: np.ndarray | Sequence[int]) -> np.ndarray:
    targets = np.asarray(labels)
    if targets.ndim != 1 or not len(targets):
        raise ValueError(f"labels have shape {targets.shape}, wanted [examples], one or more")
    if not np.issubdtype(targets.dtype, np.integer):
        raise TypeError(f"labels are {targets.dtype}, wanted integers")
    if targets.min() < 0:
        raise ValueError(f"labels go down to {targets.min()}; a label is 0 or more")
    return targets


def _check_numbers(
    labels_per_class: int | None,
    val_per_class: int | None,
    val_fraction: float | None,
    test_fraction: float | None,
    seed: int,
) -> None:
    problems = []
    if labels_per_class is not None and labels_per_class < 1:
        problems.append(f"labels_per_class is {labels_per_class}, wanted 1 or more")
    if val_per_class is not None and val_per_class < 0:
        problems.append(f"val_per_class is {val_per_class}, wanted 0 or more")
    elif (
        val_per_class is not None
        and labels_per_class is not None
        and val_per_class >= max(labels_per_class, 1)
    ):
        problems.append(
            f"val_per_class is {val_per_class} of {labels_per_class} labels per class, which "
            "leaves none to train on"
        )
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if value is not None and not 0 <= value < 1:
            problems.append(f"{name} is {value}, wanted at least 0 and less than 1")
    if val_fraction is not None:
        if val_per_class is not None:
            problems.append("val_fraction and val_per_class are both given; give one")
        elif labels_per_class is not None:
            problems.append(
                "val_fraction does not go with labels_per_class, whose validation examples are "
                "counted out of those labels; give val_per_class"
            )
    if seed < 0:
        problems.append(f"seed is {seed}, wanted 0 or more")
    if problems:
        raise ValueError("; ".join(problems))


def subsample(positions: np.ndarray, most: int, labels: np.ndarray | None = None) -> np.ndarray:
    """At most so many of the positions, in order, drawn the same way every time.

    Args:
      positions: int64, in a source.
      most: how many to take.
      labels: of the whole source. With them, one example of every class is among those taken,
        also where that makes more than ``most``: a head cannot be fitted without.

    >>> some(np.arange(5), 9).tolist(), len(some(np.arange(9), 5))
    ([0, 1, 2, 3, 4], 5)
    >>> labels = np.array([0, 0, 0, 0, 1, 0, 0, 0, 0])
    >>> 4 in some(np.arange(9), 2, labels), len(some(np.arange(9), 2, labels))
    (True, 2)
    """
    if len(positions) <= most:
        return positions
    keys = np.random.PCG64(np.random.SeedSequence(0)).random_raw(len(positions))
    order = np.argsort(keys, kind="stable")
    if labels is not None:
        _, firsts = np.unique(np.asarray(labels)[positions][order], return_index=True)
        order = np.concatenate([order[firsts], np.delete(order, firsts)])
        most = max(most, len(firsts))
    return positions[np.sort(order[:most])]
