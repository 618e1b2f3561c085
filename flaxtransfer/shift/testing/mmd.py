"""Are two samples of features from one distribution? Maximum mean discrepancy, by permutation."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxtransfer.shift.checks import as_features, same_width
from flaxtransfer.shift.duplicates import duplicate_notes
from flaxtransfer.shift.hypotheses import (
    HypothesisTest,
    detectable_square,
    enough_repetitions,
    permutation_p,
    untestable,
)
from flaxtransfer.shift.testing.kernel import (
    as_bandwidth,
    gaussian_kernel,
    median_bandwidth,
    rescaled,
)

__all__ = ["mmd_test"]

_NAME = "maximum mean discrepancy"
_HYPOTHESIS = "source and target features have one distribution"
_EFFECT = "squared MMD, unbiased"
_FEWEST = 5
"""Rows on each side: 5 and 5 have 252 ways to be told apart, and 4 and 4 only 70."""

_TIE = 1e-5
"""Statistics that agree to this part of their spread are equal but for float32."""


def mmd_test(
    source_features: Any,
    target_features: Any,
    *,
    permutations: int = 1000,
    bandwidth: float | None = None,
    block: int = 4096,
    seed: int = 0,
) -> HypothesisTest:
    """Whether the features of source and target have one distribution; any difference counts.

    Take it first: it asks whether there is a shift at all, of whatever kind. It does not say which
    kind, and a p-value above the level is no proof that there is none: see `minimum_detectable`.
    The kernel is Gaussian; features of very different scale should be standardised or projected
    before, since distances are what it sees.

    Up to `block` rows of both samples together, one kernel matrix serves all permutations. Larger
    samples are cut at random into blocks with the same numbers of either side, labels are permuted
    inside of blocks, and the statistic is the mean over blocks: memory stays that of one block, and
    the test keeps its level. Where one side is much larger, no more of it is used than its blocks
    hold; `notes` say how much.

    Args:
        source_features: `[n, D]`, numpy or JAX.
        target_features: `[m, D]`.
        permutations: of the labels; the smallest p-value is 1 / (1 + permutations).
        bandwidth: of the kernel, in the unit of the features; the median distance by default.
        block: most rows of a kernel matrix. Time and memory grow with its square.
        seed: for permutations, blocks and the pairs of the median.

    Returns:
        A test whose statistic and effect are the unbiased estimate of the squared discrepancy: it
        may be negative where there is none.

    Raises:
        ValueError: features of different width, with NaN, of no rows; fewer than 19 permutations.

    >>> rng = np.random.default_rng(0)
    >>> test = mmd_test(rng.normal(size=(80, 3)), rng.normal(1, 1, size=(60, 3)), permutations=199)
    >>> test.p, test.rejected()
    (0.005, True)

    References:
        A. Gretton, K. Borgwardt, M. Rasch, B. Schoelkopf, A. Smola, "A kernel two-sample test",
        2012. W. Zaremba, A. Gretton, M. Blaschko, "B-tests: low variance kernel two-sample tests",
        2013.
    """
    source = as_features(source_features, "source features")
    target = as_features(target_features, "target features")
    same_width(source, "source features", target, "target features")
    enough_repetitions(permutations, "permutations")
    if block < 4 * _FEWEST:
        raise ValueError(f"block={block}: a block holds {4 * _FEWEST} rows or more, 4096 is usual")
    counts = (len(source), len(target))
    notes = duplicate_notes(source, target)

    no = partial(untestable, _NAME, _HYPOTHESIS, effect_name=_EFFECT, counts=counts, notes=notes)

    if min(counts) < _FEWEST:
        return no(f"{counts[0]} and {counts[1]} rows; each side needs {_FEWEST}")
    pooled = np.concatenate([source, target])
    width = median_bandwidth(pooled, seed=seed) if bandwidth is None else as_bandwidth(bandwidth)
    if not np.ptp(pooled, axis=0).any():
        return no("all features are constant and equal on both sides")

    rng = np.random.default_rng(seed)
    number, sizes = _blocks(counts, block)
    used = (number * sizes[0], number * sizes[1])
    if sum(counts) > block:
        notes += (
            f"in blocks of {sizes[0]} source and {sizes[1]} target rows, {used[0]} of {counts[0]} "
            f"and {used[1]} of {counts[1]} rows",
        )
    features = rescaled(pooled, width)
    order = [rng.permutation(counts[0])[: used[0]], rng.permutation(counts[1])[: used[1]]]
    rows = np.concatenate(
        [order[0].reshape(number, -1), counts[0] + order[1].reshape(number, -1)], axis=1
    )
    # Row 0 are the labels as they are.
    is_source = np.zeros((1 + permutations, sum(sizes)), np.int8)
    is_source[:, : sizes[0]] = 1
    totals = np.zeros(1 + permutations)
    for chosen in rows:
        is_source[1:] = rng.permuted(is_source[1:], axis=1)
        totals += _within(features[chosen], is_source)
    values = totals / number * _scale(*sizes)

    observed, null = float(values[0]), values[1:]
    return HypothesisTest(
        name=_NAME,
        hypothesis=_HYPOTHESIS,
        statistic=observed,
        p=permutation_p(observed - _TIE * float(np.abs(null).max()), null),
        effect=observed,
        effect_name=_EFFECT,
        minimum_detectable=detectable_square(null),
        counts=counts,
        assumptions=(
            "examples are independent: frames of one film or slides of one patient are not",
            f"a difference that a Gaussian kernel of bandwidth {width:.4g} sees",
        ),
        notes=notes,
    )


def _blocks(counts: tuple[int, int], block: int) -> tuple[int, tuple[int, int]]:
    """How many blocks, and how many rows of either side each of them holds."""
    if sum(counts) <= block:
        return 1, counts
    number = -(-min(counts) // (block // 2))
    sizes = [count // number for count in counts]
    larger = int(counts[1] > counts[0])
    sizes[larger] = min(sizes[larger], block - sizes[1 - larger])
    return number, (sizes[0], sizes[1])


def _scale(source: int, target: int) -> float:
    """From the sum of `_within` to the unbiased squared discrepancy."""
    return 1 / (source * (source - 1)) + 1 / (target * (target - 1)) + 2 / (source * target)


def _within(features: np.ndarray, is_source: np.ndarray) -> np.ndarray:
    """The sum over pairs inside of the source, of the kernel without its row and column means.

    The unbiased statistic does not change when a function of either example is subtracted from the
    kernel between different examples. Without its means, in the sense of Szekely and Rizzo's
    U-centring, its three sums are one number and its negative: a matrix product with the labels is
    the whole of a permutation test, and float32 sums small numbers of both signs.
    """
    return np.asarray(_quadratic(features, is_source), np.float64)


@jax.jit
def _quadratic(features: jax.Array, is_source: jax.Array) -> jax.Array:
    rows = features.shape[0]
    off_diagonal = 1 - jnp.eye(rows, dtype=jnp.float32)
    kernel = gaussian_kernel(features, features) * off_diagonal
    means = kernel.sum(1) / (rows - 2)
    mean = kernel.sum() / ((rows - 1) * (rows - 2))
    centred = (kernel - means[:, None] - means[None, :] + mean) * off_diagonal
    signs = is_source.astype(jnp.float32)
    signs = signs - signs.mean(1, keepdims=True)
    return (jnp.matmul(signs, centred, precision="highest") * signs).sum(1)
