"""Two-sample tests: maximum mean discrepancy and the classifier test.

How far a covariance has to be pulled towards a sphere to be of use, in closed form.

The Gaussian kernel between examples, and the bandwidth that data suggest for it.

Are two samples of features from one distribution? Maximum mean discrepancy, by permutation.

Can a classifier tell source from target? The classifier two-sample test, with its AUC.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression

from flaxtransfer.shift.checks import as_features, duplicate_notes, same_width
from flaxtransfer.shift.statistics import (
    HypothesisTest,
    detectable,
    detectable_square,
    enough_repetitions,
    permutation_p,
    untestable,
)

__all__ = [
    "as_bandwidth",
    "classifier_test",
    "gaussian_kernel",
    "median_bandwidth",
    "mmd_test",
    "rescaled",
    "shrinkage",
]


def shrinkage(centered: np.ndarray, features: int | None = None) -> tuple[float, float]:
    """Intensity and variance of Ledoit and Wolf: cov = (1 - intensity) S + intensity * variance I.

    S is ``centered.T @ centered / n``. With fewer examples than features S has no inverse, and its
    large eigenvalues are too large, its small ones too small; this is the pull towards their mean
    that has the least expected squared error. It is for covariances that are used as a whole, and
    not for single entries.

    Args:
        centered: ``[n, r]``, columns of mean 0; coordinates in any orthonormal basis of the span.
        features: how many there are, r included; r where None. Those outside of the span are 0.

    Returns:
        The intensity, between 0 and 1, and the mean variance of all features; 0 and 0 where all
        rows are equal.

    >>> shrinkage(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    (0.0, 0.5)

    References:
        O. Ledoit, M. Wolf, "A well-conditioned estimator for large-dimensional covariance
        matrices", 2004.
    """
    count, width = centered.shape
    features = width if features is None else features
    squares = np.einsum("ij,ij->i", centered, centered)
    trace = float(squares.sum()) / count
    # The same norm from whichever of the two products is smaller.
    product = centered @ centered.T if count < width else centered.T @ centered
    norm = float(np.einsum("ij,ij->", product, product)) / count**2
    from_sphere = norm - trace**2 / features
    error = (float(squares @ squares) / count - norm) / count
    # Rounding, of a covariance that is a sphere already, or of rows that are all of one length.
    tiny = 1e-14 * norm
    if from_sphere <= tiny or error <= tiny:
        return 0.0, trace / features
    return min(1.0, error / from_sphere), trace / features


_PAIRS = 20_000
"""Pairs whose median distance is taken: its standard error is below 1 % of their spread."""

_KERNEL_CHUNK = 2048


def median_bandwidth(features: np.ndarray, *, seed: int = 0) -> float:
    """The median distance between two examples, the usual bandwidth of a Gaussian kernel.

    Of the pooled sample, so that it says nothing of who is source and who is target. All pairs of
    up to 200 examples, 20,000 random ones of more. Where most examples are identical, the median
    of the distances that are not 0; 0 where all features are constant.

    Args:
        features: `[N, D]` of both samples together.
        seed: for the choice of pairs.

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
                features[first[start : start + _KERNEL_CHUNK]]
                - features[second[start : start + _KERNEL_CHUNK]],
                axis=1,
            )
            for start in range(0, len(first), _KERNEL_CHUNK)
        ]
        or [np.zeros(1)]
    )
    median = float(np.median(distances))
    if median > 0:
        return median
    if (distances > 0).any():
        return float(np.median(distances[distances > 0]))
    # The few examples that differ were in no pair.
    return float(np.sqrt(2 * features.var(0).sum())) if np.ptp(features, axis=0).any() else 0.0


def as_bandwidth(bandwidth: Any) -> float:
    """A bandwidth that somebody asked for.

    Raises:
        ValueError: not a positive number.
    """
    found = float(bandwidth)
    if not (np.isfinite(found) and found > 0):
        raise ValueError(f"bandwidth={bandwidth!r}: a bandwidth is positive; None takes the median")
    return found


def rescaled(features: np.ndarray, bandwidth: float) -> np.ndarray:
    """Features for `gaussian_kernel`: about their mean, in bandwidths, float32.

    Centered and divided before the cast: squared distances are differences of squared norms, and
    a common offset or a large unit would leave nothing of them in single precision.
    """
    return ((features - features.mean(0)) / bandwidth).astype(np.float32)


@jax.jit
def gaussian_kernel(first: Any, second: Any) -> jax.Array:
    """exp(-d^2 / 2) of every pair, `[N, M]` float32, of features in bandwidths (`rescaled`).

    >>> np.asarray(gaussian_kernel(np.zeros((1, 1)), np.array([[0.0], [2.0]])))
    array([[1.        , 0.13533528]], dtype=float32)
    """
    # Accelerators would multiply in bfloat16 or TF32 by default, too coarse for distances.
    inner = jnp.matmul(first, second.T, precision="highest")
    norms = (first**2).sum(1)[:, None] + (second**2).sum(1)[None, :]
    return jnp.exp(-0.5 * jnp.maximum(norms - 2 * inner, 0))


_MMD_NAME = "maximum mean discrepancy"
_MMD_HYPOTHESIS = "source and target features have one distribution"
_MMD_EFFECT = "squared MMD, unbiased"
_MMD_FEWEST = 5
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
    The kernel is Gaussian; features of very different scale should be standardized or projected
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
    if block < 4 * _MMD_FEWEST:
        raise ValueError(
            f"block={block}: a block holds {4 * _MMD_FEWEST} rows or more, 4096 is usual"
        )
    counts = (len(source), len(target))
    notes = duplicate_notes(source, target)

    no = partial(
        untestable, _MMD_NAME, _MMD_HYPOTHESIS, effect_name=_MMD_EFFECT, counts=counts, notes=notes
    )

    if min(counts) < _MMD_FEWEST:
        return no(f"{counts[0]} and {counts[1]} rows; each side needs {_MMD_FEWEST}")
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
        name=_MMD_NAME,
        hypothesis=_MMD_HYPOTHESIS,
        statistic=observed,
        p=permutation_p(observed - _TIE * float(np.abs(null).max()), null),
        effect=observed,
        effect_name=_MMD_EFFECT,
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
    centered = (kernel - means[:, None] - means[None, :] + mean) * off_diagonal
    signs = is_source.astype(jnp.float32)
    signs = signs - signs.mean(1, keepdims=True)
    return (jnp.matmul(signs, centered, precision="highest") * signs).sum(1)


_CLASSIFIER_NAME = "classifier two-sample test"
_CLASSIFIER_HYPOTHESIS = "no linear classifier tells source from target better than chance"
_CLASSIFIER_EFFECT = "AUC"
_CLASSIFIER_FEWEST = 10
_CHUNK = 20_000_000
"""Numbers of a matrix of permuted labels; 160 MB."""


def classifier_test(
    source_features: Any,
    target_features: Any,
    *,
    folds: int = 5,
    permutations: int = 499,
    seed: int = 0,
) -> HypothesisTest:
    """Whether a linear classifier that has not seen an example can tell where it is from.

    Its AUC is a size of shift that people can read: 0.5 is chance, 1 is two separate worlds. It
    sees what a linear classifier sees; a change of spread without a change of mean is for
    `mmd_test`.

    The effect is the AUC of logistic regression on folds that it was not fitted on. Scores of
    different folds depend on each other, and a binomial or rank-sum p-value of them all would not
    have its level. So p is by permutation, refits included, of the AUC of the classifier's first
    Newton step (regularized least squares, Fisher's discriminant): its refits are one matrix
    product for all permutations. Labels are permuted inside of folds; that is exact.

    Both are regularized as a ridge whose penalty is the number of features (after each is divided
    by its standard deviation): negligible where examples are many, and fit for more features than
    examples.

    Args:
        source_features: `[n, D]`, numpy or JAX.
        target_features: `[m, D]`.
        folds: stratified; fewer where a side has fewer than two examples for each.
        permutations: of the labels, each with its refits.
        seed: for folds and permutations.

    Returns:
        A test whose statistic is the mean over folds of the discriminant's AUC, and whose effect is
        that of logistic regression.

    Raises:
        ValueError: features of different width, with NaN, of no rows; fewer than 2 folds or 19
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
    enough_repetitions(permutations, "permutations")
    if folds < 2:
        raise ValueError(f"folds={folds}: a classifier is tested on a fold it was not fitted on")
    counts = (len(source), len(target))
    notes = duplicate_notes(source, target)

    no = partial(
        untestable,
        _CLASSIFIER_NAME,
        _CLASSIFIER_HYPOTHESIS,
        effect_name=_CLASSIFIER_EFFECT,
        counts=counts,
        notes=notes,
    )

    if min(counts) < _CLASSIFIER_FEWEST:
        return no(f"{counts[0]} and {counts[1]} rows; each side needs {_CLASSIFIER_FEWEST}")
    pooled = np.concatenate([source, target])
    varies = np.ptp(pooled, axis=0) > 0
    if not varies.any():
        return no("all features are constant and equal on both sides")
    pooled = pooled[:, varies] - pooled[:, varies].mean(0)
    pooled /= pooled.std(0)

    rng = np.random.default_rng(seed)
    folds = min(folds, min(counts) // 2)
    fold = np.concatenate([rng.permutation(np.arange(count) % folds) for count in counts])
    is_target = np.repeat([0.0, 1.0], counts)
    members = [np.flatnonzero(fold == number) for number in range(folds)]

    observed = _discriminant_aucs(pooled, is_target[None], members)[0]
    chunk = max(1, _CHUNK // len(pooled))
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
        minimum_detectable=min(1.0, detectable(aucs)),
        counts=counts,
        assumptions=("examples are independent, within a side and between the sides",),
        notes=notes,
    )


def _discriminant_aucs(
    features: np.ndarray, is_target: np.ndarray, folds: list[np.ndarray]
) -> np.ndarray:
    """`[B]`, mean AUC over folds of a discriminant fitted to labels `[B, N]` on other folds."""
    rows, width = features.shape
    inner, total = features.T @ features, features.sum(0)
    products = [features[fold].T @ is_target[:, fold].T for fold in folds]
    product = np.sum(products, axis=0)
    positives = is_target.sum(1)
    aucs = np.zeros(len(is_target))
    for fold, own in zip(folds, products, strict=True):
        left, others = features[fold], rows - len(fold)
        mean = (total - left.sum(0)) / others
        share = (positives - is_target[:, fold].sum(1)) / others
        gram = inner - left.T @ left - others * np.outer(mean, mean)
        moment = product - own - others * np.outer(mean, share)
        weights = cho_solve(cho_factor(gram + width * np.eye(width)), moment)
        aucs += _auc((left @ weights).T, is_target[:, fold])
    return aucs / len(folds)


def _auc(scores: np.ndarray, is_target: np.ndarray) -> np.ndarray:
    """Probability that a target scores higher than a source, for each row; ties count half."""
    positives, negatives = is_target.sum(1), (1 - is_target).sum(1)
    ranks = (rankdata(scores, axis=1) * is_target).sum(1)
    return (ranks - positives * (positives + 1) / 2) / (positives * negatives)


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
