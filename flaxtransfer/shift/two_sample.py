"""Two-sample tests: maximum mean discrepancy and the classifier test.

``mmd_test`` asks whether two samples of features have one distribution; ``classifier_test`` whether
a linear classifier can tell them apart, with the AUC as a readable effect. The Gaussian kernel, its
median bandwidth and Ledoit-Wolf shrinkage are shared with other statistics of features.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression

from flaxtransfer.shift.checks import as_features, duplicate_row_notes, same_width
from flaxtransfer.shift.statistics import (
    HypothesisTest,
    check_repetitions,
    detectable_effect,
    detectable_squared_effect,
    permutation_p,
    untestable,
)

__all__ = [
    "as_bandwidth",
    "classifier_test",
    "gaussian_kernel",
    "ledoit_wolf",
    "median_bandwidth",
    "mmd_test",
    "rescaled",
]

_PAIRS = 20_000
"""Pairs for the median distance; its standard error is below 1 % of their spread."""

_PAIR_CHUNK_SIZE = 2048

_MMD_NAME = "maximum mean discrepancy"

_MMD_HYPOTHESIS = "source and target features have one distribution"

_MMD_EFFECT = "squared MMD, unbiased"

_MMD_MIN_ROWS = 5
"""Rows per side: 5 and 5 can be split in 252 ways, 4 and 4 only in 70."""

_TIE_TOLERANCE = 1e-5
"""Statistics this close, relative to their range, differ by float32 rounding only."""

_CLASSIFIER_NAME = "classifier two-sample test"

_CLASSIFIER_HYPOTHESIS = "no linear classifier tells source from target better than chance"

_CLASSIFIER_EFFECT = "AUC"

_CLASSIFIER_MIN_ROWS = 10

_CHUNK_SIZE = 20_000_000
"""Numbers in a matrix of permuted labels; 160 MB."""


def mmd_test(
    source_features: Any,
    target_features: Any,
    *,
    permutations: int = 1000,
    bandwidth: float | None = None,
    block: int = 4096,
    seed: int = 0,
) -> HypothesisTest:
    """Maximum mean discrepancy two-sample test.

    Use it first: it tests whether there is a shift at all, of whatever kind. It does not show which
    kind, and a p-value above the level does not prove that there is none: see
    ``minimum_detectable``. The kernel is Gaussian and sees distances only; standardize or project
    features of very different scale first.

    Up to ``block`` rows of both samples together, one kernel matrix serves all permutations. Larger
    samples are split at random into blocks with the same numbers of either side, labels are
    permuted within blocks, and the statistic is the mean over blocks: memory stays that of one
    block, and the test keeps its level. Where one side is much larger, only as many of its rows are
    used as its blocks hold; ``notes`` give the number.

    Args:
        source_features: ``[n, D]``, NumPy or JAX.
        target_features: ``[m, D]``.
        permutations: Of the labels; the smallest p-value is 1 / (1 + permutations).
        bandwidth: Of the kernel, in the unit of the features; the median distance by default.
        block: Most rows of a kernel matrix. Time and memory grow with its square.
        seed: For permutations, blocks and the pairs of the median.

    Returns:
        A test whose statistic and effect are the unbiased estimate of the squared discrepancy,
        which may be negative where there is none.

    Raises:
        ValueError: Features of different width, with NaN, or without rows; fewer than 19
            permutations.

    >>> rng = np.random.default_rng(0)
    >>> test = mmd_test(rng.normal(size=(80, 3)), rng.normal(1, 1, size=(60, 3)), permutations=199)
    >>> test.p, test.rejected()
    (0.005, True)

    References:
        A. Gretton, K. Borgwardt, M. Rasch, B. Schoelkopf, A. Smola, "A kernel two-sample test",
        2012.
        W. Zaremba, A. Gretton, M. Blaschko, "B-tests: low variance kernel two-sample tests", 2013.
    """
    source = as_features(source_features, "source features")
    target = as_features(target_features, "target features")
    same_width(source, "source features", target, "target features")
    check_repetitions(permutations, "permutations")
    if block < 4 * _MMD_MIN_ROWS:
        raise ValueError(f"block must be >= {4 * _MMD_MIN_ROWS} rows, got {block}; 4096 is usual")
    counts = (len(source), len(target))
    notes = duplicate_row_notes(source, target)

    untested = partial(
        untestable, _MMD_NAME, _MMD_HYPOTHESIS, effect_name=_MMD_EFFECT, counts=counts, notes=notes
    )

    if min(counts) < _MMD_MIN_ROWS:
        return untested(f"{counts[0]} and {counts[1]} rows; each side needs >= {_MMD_MIN_ROWS}")
    pooled = np.concatenate([source, target])
    width = median_bandwidth(pooled, seed=seed) if bandwidth is None else as_bandwidth(bandwidth)
    if not np.ptp(pooled, axis=0).any():
        return untested("all features are constant and equal on both sides")

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
    # Row 0 holds the true labels.
    is_source = np.zeros((1 + permutations, sum(sizes)), np.int8)
    is_source[:, : sizes[0]] = 1
    totals = np.zeros(1 + permutations)
    for chosen in rows:
        is_source[1:] = rng.permuted(is_source[1:], axis=1)
        totals += _centered_sums(features[chosen], is_source)
    values = totals / number * _scale(*sizes)

    observed, null = float(values[0]), values[1:]
    return HypothesisTest(
        name=_MMD_NAME,
        hypothesis=_MMD_HYPOTHESIS,
        statistic=observed,
        p=permutation_p(observed - _TIE_TOLERANCE * float(np.abs(null).max()), null),
        effect=observed,
        effect_name=_MMD_EFFECT,
        minimum_detectable=detectable_squared_effect(null),
        counts=counts,
        assumptions=(
            "examples are independent: frames of one video or slides of one patient are not",
            f"a difference that a Gaussian kernel of bandwidth {width:.4g} sees",
        ),
        notes=notes,
    )


def classifier_test(
    source_features: Any,
    target_features: Any,
    *,
    folds: int = 5,
    permutations: int = 499,
    seed: int = 0,
) -> HypothesisTest:
    """Classifier two-sample test: can a linear classifier tell source from target?

    Its AUC is an effect size that people can read: 0.5 is chance, 1 is complete separation. It sees
    what a linear classifier sees; for a change of spread without a change of mean use ``mmd_test``.

    The effect is the AUC of logistic regression on folds that it was not fitted on. Scores of
    different folds depend on each other, and a binomial or rank-sum p-value of all of them would
    not have its level. So the p-value is by permutation, refits included, of the AUC of the
    classifier's first Newton step (regularized least squares, Fisher's discriminant), whose refits
    are one matrix product for all permutations. Labels are permuted within folds, which is exact.

    Both are regularized with a ridge penalty equal to the number of features (after dividing each
    by its standard deviation): negligible with many examples, and suitable for more features than
    examples.

    Args:
        source_features: ``[n, D]``, NumPy or JAX.
        target_features: ``[m, D]``.
        folds: Stratified folds; fewer where a side has less than two examples per fold.
        permutations: Of the labels, each with its refits.
        seed: For folds and permutations.

    Returns:
        A test whose statistic is the mean over folds of the discriminant's AUC, and whose effect is
        that of logistic regression.

    Raises:
        ValueError: Features of different width, with NaN, or without rows; fewer than 2 folds or 19
            permutations.

    >>> rng = np.random.default_rng(0)
    >>> test = classifier_test(rng.normal(size=(80, 3)), rng.normal(1, 1, size=(60, 3)))
    >>> test.p, round(test.effect, 1), test.effect_name
    (0.002, 0.9, 'AUC')

    References:
        D. Lopez-Paz, M. Oquab, "Revisiting classifier two-sample tests", 2017.
    """
    source = as_features(source_features, "source features")
    target = as_features(target_features, "target features")
    same_width(source, "source features", target, "target features")
    check_repetitions(permutations, "permutations")
    if folds < 2:
        raise ValueError(f"folds must be >= 2, got {folds}")
    counts = (len(source), len(target))
    notes = duplicate_row_notes(source, target)

    untested = partial(
        untestable,
        _CLASSIFIER_NAME,
        _CLASSIFIER_HYPOTHESIS,
        effect_name=_CLASSIFIER_EFFECT,
        counts=counts,
        notes=notes,
    )

    if min(counts) < _CLASSIFIER_MIN_ROWS:
        return untested(
            f"{counts[0]} and {counts[1]} rows; each side needs >= {_CLASSIFIER_MIN_ROWS}"
        )
    pooled = np.concatenate([source, target])
    varies = np.ptp(pooled, axis=0) > 0
    if not varies.any():
        return untested("all features are constant and equal on both sides")
    pooled = pooled[:, varies] - pooled[:, varies].mean(0)
    pooled /= pooled.std(0)

    rng = np.random.default_rng(seed)
    folds = min(folds, min(counts) // 2)
    fold = np.concatenate([rng.permutation(np.arange(count) % folds) for count in counts])
    is_target = np.repeat([0.0, 1.0], counts)
    members = [np.flatnonzero(fold == number) for number in range(folds)]

    observed = _discriminant_aucs(pooled, is_target[None], members)[0]
    chunk = max(1, _CHUNK_SIZE // len(pooled))
    null = []
    for start in range(0, permutations, chunk):
        permuted = np.empty((min(chunk, permutations - start), len(pooled)))
        for rows in members:
            permuted[:, rows] = rng.permuted(
                np.broadcast_to(is_target[rows], (len(permuted), len(rows))), axis=1
            )
        null.append(_discriminant_aucs(pooled, permuted, members))
    aucs = np.concatenate(null)
    return HypothesisTest(
        name=_CLASSIFIER_NAME,
        hypothesis=_CLASSIFIER_HYPOTHESIS,
        statistic=float(observed),
        p=permutation_p(float(observed), aucs),
        effect=_logistic_auc(pooled, is_target, members),
        effect_name=_CLASSIFIER_EFFECT,
        minimum_detectable=min(1.0, detectable_effect(aucs)),
        counts=counts,
        assumptions=("examples are independent, within a side and between the sides",),
        notes=notes,
    )


@jax.jit
def gaussian_kernel(first: Any, second: Any) -> jax.Array:
    """Gaussian kernel exp(-d^2 / 2) of every pair, float32 ``[N, M]``; use ``rescaled`` features.

    >>> np.asarray(gaussian_kernel(np.zeros((1, 1)), np.array([[0.0], [2.0]])))
    array([[1.        , 0.13533528]], dtype=float32)
    """
    # Accelerators multiply in bfloat16 or TF32 by default, which is too coarse for distances.
    inner = jnp.matmul(first, second.T, precision="highest")
    norms = (first**2).sum(1)[:, None] + (second**2).sum(1)[None, :]
    return jnp.exp(-0.5 * jnp.maximum(norms - 2 * inner, 0))


def rescaled(features: np.ndarray, bandwidth: float) -> np.ndarray:
    """Features for ``gaussian_kernel``: centered, in units of the bandwidth, float32.

    They are centered and divided before the cast: squared distances are differences of squared
    norms, and a common offset or a large unit would use up single precision.
    """
    result: np.ndarray = ((features - features.mean(0)) / bandwidth).astype(np.float32)
    return result


def median_bandwidth(features: np.ndarray, *, seed: int = 0) -> float:
    """Median heuristic: the median distance between two examples as kernel bandwidth.

    Computed on the pooled sample, so that it does not depend on the split into source and target.
    All pairs of up to 200 examples, 20,000 random pairs of more. Where most examples are identical,
    the median of the non-zero distances; 0 where all features are constant.

    Args:
        features: ``[N, D]`` of both samples together.
        seed: For the choice of pairs.

    >>> median_bandwidth(np.array([[0.0], [1.0], [3.0]]))
    2.0
    """
    rows = len(features)
    if rows * (rows - 1) // 2 <= _PAIRS:
        first, second = np.triu_indices(rows, 1)
    else:
        rng = np.random.default_rng(seed)
        first = rng.integers(rows, size=_PAIRS)
        second = rng.integers(rows - 1, size=_PAIRS)
        second += second >= first
    distances = np.concatenate(
        [
            np.linalg.norm(
                features[first[start : start + _PAIR_CHUNK_SIZE]]
                - features[second[start : start + _PAIR_CHUNK_SIZE]],
                axis=1,
            )
            for start in range(0, len(first), _PAIR_CHUNK_SIZE)
        ]
        or [np.zeros(1)]
    )
    median = float(np.median(distances))
    if median > 0:
        return median
    if (distances > 0).any():
        return float(np.median(distances[distances > 0]))
    # No sampled pair contains the few examples that differ.
    return float(np.sqrt(2 * features.var(0).sum())) if np.ptp(features, axis=0).any() else 0.0


def as_bandwidth(bandwidth: Any) -> float:
    """A kernel bandwidth, checked.

    Raises:
        ValueError: Not a positive number.
    """
    found = float(bandwidth)
    if not (np.isfinite(found) and found > 0):
        raise ValueError(f"bandwidth must be > 0 or None (the median), got {bandwidth!r}")
    return found


def ledoit_wolf(centered: np.ndarray, features: int | None = None) -> tuple[float, float]:
    """Ledoit-Wolf shrinkage.

    The intensity and variance of (1 - intensity) S + intensity * variance I, with S = ``centered.T
    @ centered / n``: the estimator of this form with the smallest expected squared error. With
    fewer examples than features S has no inverse, its large eigenvalues are too large and its small
    ones too small. Use it for covariances that are used as a whole, not for single entries. Unlike
    scikit-learn's function of this name it accepts coordinates in a basis of the span.

    Args:
        centered: ``[n, r]``, columns of mean 0; coordinates in any orthonormal basis of the span.
        features: Number of features, at least r; r by default. Those outside of the span are 0.

    Returns:
        The intensity, between 0 and 1, and the mean variance of all features; 0 and 0 where all
        rows are equal.

    >>> ledoit_wolf(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    (0.0, 0.5)

    References:
        O. Ledoit, M. Wolf, "A well-conditioned estimator for large-dimensional covariance
        matrices", 2004.
    """
    count, width = centered.shape
    features = width if features is None else features
    squares = np.einsum("ij,ij->i", centered, centered)
    trace = float(squares.sum()) / count
    # Both products have the same norm; take the smaller one.
    product = centered @ centered.T if count < width else centered.T @ centered
    norm = float(np.einsum("ij,ij->", product, product)) / count**2
    dispersion = norm - trace**2 / features
    error = (float(squares @ squares) / count - norm) / count
    # Rounding errors only: S is already a multiple of I, or all rows have the same length.
    negligible = 1e-14 * norm
    if dispersion <= negligible or error <= negligible:
        return 0.0, trace / features
    return min(1.0, error / dispersion), trace / features


def _blocks(counts: tuple[int, int], block: int) -> tuple[int, tuple[int, int]]:
    """Number of blocks, and rows of either side per block."""
    if sum(counts) <= block:
        return 1, counts
    number = -(-min(counts) // (block // 2))
    sizes = [count // number for count in counts]
    larger = int(counts[1] > counts[0])
    sizes[larger] = min(sizes[larger], block - sizes[1 - larger])
    return number, (sizes[0], sizes[1])


def _scale(source: int, target: int) -> float:
    """Factor from the sum of ``_centered_sums`` to the unbiased squared discrepancy."""
    return 1 / (source * (source - 1)) + 1 / (target * (target - 1)) + 2 / (source * target)


def _centered_sums(features: np.ndarray, is_source: np.ndarray) -> np.ndarray:
    """Sum over source pairs of the kernel without its row and column means.

    The unbiased statistic does not change when a function of either example is subtracted from the
    kernel between different examples. Without its means (Szekely and Rizzo's U-centering), its
    three sums are one number and its negative: a permutation test is one matrix product with the
    labels, and float32 sums small numbers of both signs.
    """
    return np.asarray(_quadratic(features, is_source), np.float64)


@jax.jit
def _quadratic(features: jax.Array, is_source: jax.Array) -> jax.Array:
    rows = features.shape[0]
    off_diagonal = 1 - jnp.eye(rows, dtype=jnp.float32)
    kernel = gaussian_kernel(features, features) * off_diagonal
    means = kernel.sum(1) / (rows - 2)
    mean = kernel.sum() / ((rows - 1) * (rows - 2))
    centered = (kernel - means[:, None] - means[None, :] + mean) * off_diagonal
    signs = is_source.astype(jnp.float32)
    signs = signs - signs.mean(1, keepdims=True)
    return (jnp.matmul(signs, centered, precision="highest") * signs).sum(1)


def _discriminant_aucs(
    features: np.ndarray, is_target: np.ndarray, folds: list[np.ndarray]
) -> np.ndarray:
    """Mean AUC ``[B]`` over folds of a discriminant fitted to labels ``[B, N]`` on other folds."""
    rows, width = features.shape
    inner, total = features.T @ features, features.sum(0)
    products = [features[fold].T @ is_target[:, fold].T for fold in folds]
    product = np.sum(products, axis=0)
    positives = is_target.sum(1)
    aucs = np.zeros(len(is_target))
    for fold, own in zip(folds, products, strict=True):
        left, others = features[fold], rows - len(fold)
        mean = (total - left.sum(0)) / others
        fraction = (positives - is_target[:, fold].sum(1)) / others
        gram = inner - left.T @ left - others * np.outer(mean, mean)
        moment = product - own - others * np.outer(mean, fraction)
        weights = cho_solve(cho_factor(gram + width * np.eye(width)), moment)
        aucs += _auc((left @ weights).T, is_target[:, fold])
    return aucs / len(folds)


def _auc(scores: np.ndarray, is_target: np.ndarray) -> np.ndarray:
    """Probability that a target scores higher than a source, per row; ties count half."""
    positives, negatives = is_target.sum(1), (1 - is_target).sum(1)
    ranks = (rankdata(scores, axis=1) * is_target).sum(1)
    result: np.ndarray = (ranks - positives * (positives + 1) / 2) / (positives * negatives)
    return result


def _logistic_auc(features: np.ndarray, is_target: np.ndarray, folds: list[np.ndarray]) -> float:
    # At its start logistic regression has a quarter of the curvature of least squares.
    model = LogisticRegression(C=4 / features.shape[1], max_iter=1000)
    aucs = []
    for fold in folds:
        rest = np.setdiff1d(np.arange(len(features)), fold)
        fitted = model.fit(features[rest], is_target[rest])
        scores = fitted.decision_function(features[fold])
        aucs.append(_auc(scores[None], is_target[None, fold])[0])
    return float(np.mean(aucs))
