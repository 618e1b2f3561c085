"""What a number means that is large even where nothing is the matter: its value, beside its null.

Distances between samples and scores of features grow with the number of features and shrink with
the number of examples, whatever the truth is. Here each comes with the distribution that it has
when examples are dealt to the samples, or labels to the examples, at random.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from flaxtransfer.shift.checks import as_features, as_labels, same_width
from flaxtransfer.shift.statistics import permutation_p

__all__ = [
    "Distance",
    "NullCalibrated",
    "Similarity",
    "Transferability",
    "labeled",
    "orders",
    "random_folds",
    "stream",
    "summary",
    "two_samples",
]


_FEWEST_ROWS = 4
_FEWEST_PERMUTATIONS = 19
"""Below, no p-value reaches 0.05."""
_MOST_CLASSES = 2**31


@dataclasses.dataclass(frozen=True)
class NullCalibrated:
    """A number beside the distribution that it has where there is nothing to be found.

    Args:
        name: of the number.
        value: as it is defined, in `unit`.
        null_mean: its mean over random deals: of examples to the two samples, or of labels, or of
            rows, to examples.
        null_sd: standard deviation of the same.
        p: share of random deals with a value at least as large, (1 + k) / (1 + permutations).
        permutations: how many random deals.
        counts: how many of what the number is made of.
        unit: of the value.
        notes: what a reader has to know.
    """

    name: str
    value: float
    null_mean: float
    null_sd: float
    p: float
    permutations: int
    counts: tuple[int, ...]
    unit: str = ""
    notes: tuple[str, ...] = ()

    @property
    def excess(self) -> float:
        """The value beyond that of random deals: near 0 where nothing is found, below 0 at times.

        To be read in units of `null_sd`, and with the value: what is subtracted from an estimate
        of a distance that is there is too much.
        """
        return self.value - self.null_mean

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        by_chance = f"by chance {self.null_mean:.4g} ± {self.null_sd:.2g}, p {self.p:.3g}"
        notes = [f"  note: {note}" for note in self.notes]
        return "\n".join([f"{self.name}: {self.value:.4g}{unit}; {by_chance}", *notes])


@dataclasses.dataclass(frozen=True)
class Distance(NullCalibrated):
    """How far two samples lie apart; `counts` are their sizes, in the order of the arguments.

    The value is biased upwards, the more the fewer the examples and the more the features.
    """


@dataclasses.dataclass(frozen=True)
class Similarity(NullCalibrated):
    """How alike two representations of the same examples are; `counts` is how many examples."""


@dataclasses.dataclass(frozen=True)
class Transferability(NullCalibrated):
    """How well features tell the classes apart; larger is better.

    `counts` are examples, features (or source classes) and classes. Scores of several networks are
    comparable on the same examples alone.

    Args:
        effective_parameters: how many of the head's weights the labels determine; None for scores
            that have no such number.
    """

    effective_parameters: float | None = None


def two_samples(source: Any, target: Any) -> tuple[np.ndarray, np.ndarray]:
    """Features of both domains, float64, of one width and at least 4 rows each.

    Raises:
        ValueError: fewer rows, other widths, numbers that are NaN or infinite.

    >>> two_samples([[0.0]] * 4, [[1.0]] * 3)
    Traceback (most recent call last):
    ValueError: target features have 3 rows, and a distance wants at least 4 of each sample
    """
    found = []
    for array, name in ((source, "source features"), (target, "target features")):
        features = as_features(array, name)
        if len(features) < _FEWEST_ROWS:
            raise ValueError(
                f"{name} have {len(features)} rows, and a distance wants at least {_FEWEST_ROWS} "
                "of each sample"
            )
        found.append(features)
    same_width(found[0], "source features", found[1], "target features")
    return found[0], found[1]


def labeled(labels: Any, count: int) -> tuple[np.ndarray, int]:
    """Numbers 0 to C - 1 of the C classes that occur, int64 ``[count]``, and C.

    A class that no example has is left out: nothing can be said of it.

    Raises:
        ValueError: labels that are no class numbers or of another count; fewer than 4; one class.

    >>> labeled([7, 2, 7, 2], 4)
    (array([1, 0, 1, 0]), 2)
    """
    if count < _FEWEST_ROWS:
        raise ValueError(f"there are {count} labeled examples; a score wants {_FEWEST_ROWS}")
    names, found = np.unique(
        as_labels(labels, "labels", count=count, classes=_MOST_CLASSES), return_inverse=True
    )
    if len(names) < 2:
        raise ValueError(
            f"all {count} labels are {names[0]}: how well features tell classes apart wants two"
        )
    return found, len(names)


def orders(count: int, permutations: int, seed: int) -> Iterator[np.ndarray]:
    """Random orders of `count` rows, int64 ``[count]`` each; equal in every release of NumPy.

    Raises:
        ValueError: fewer than 19, of which no p-value falls to 0.05.

    >>> [order.tolist() for order in orders(3, 19, seed=0)][:2]
    [[0, 1, 2], [1, 0, 2]]
    """
    if permutations < _FEWEST_PERMUTATIONS:
        raise ValueError(
            f"{permutations} permutations cannot show p <= 0.05; take {_FEWEST_PERMUTATIONS} or "
            "more, 199 as a rule"
        )
    bits = stream(seed, "orders")
    return (_shuffled(count, bits) for _ in range(permutations))


def random_folds(count: int, folds: int, seed: int) -> np.ndarray:
    """The fold of each row, int64 ``[count]``; sizes differ by one at most.

    They know nothing of samples or labels, so that a permutation changes no fold.

    Raises:
        ValueError: fewer than 2 folds, or more than rows.

    >>> random_folds(5, 2, seed=0).tolist()
    [0, 1, 0, 0, 1]
    """
    if not 2 <= folds <= count:
        raise ValueError(f"{folds} folds of {count} examples; take 2 or more, 5 as a rule")
    found = np.empty(count, np.int64)
    found[_shuffled(count, stream(seed, "folds"))] = np.arange(count) % folds
    return found


def stream(seed: int, use: str) -> np.random.PCG64:
    """Random bits of their own for every use of a seed.

    The caller's features may have been drawn with the same small seed. Lines, folds or orders of
    the same bits would be made of those very features.

    >>> stream(0, "lines").random_raw() == np.random.PCG64(0).random_raw()
    False
    """
    return np.random.PCG64(np.random.SeedSequence((seed, *use.encode())))


def _shuffled(count: int, bits: np.random.PCG64) -> np.ndarray:
    # Raw output, unlike `Generator.permutation`, is promised to stay what it is.
    return np.argsort(bits.random_raw(count), kind="stable")


def summary(value: float, null: np.ndarray) -> dict[str, Any]:
    """What a `NullCalibrated` says of a value and its null ``[permutations]``.

    >>> summary(4.0, np.array([1.0, 2.0, 3.0]))
    {'value': 4.0, 'null_mean': 2.0, 'null_sd': 1.0, 'p': 0.25, 'permutations': 3}
    """
    return {
        "value": float(value),
        "null_mean": float(null.mean()),
        "null_sd": float(null.std(ddof=1)),
        "p": permutation_p(float(value), null),
        "permutations": len(null),
    }
