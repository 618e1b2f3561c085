"""Prevalence by maximum likelihood for hundreds of resampled targets at once."""

import numpy as np

__all__ = ["maximise_resampled"]

_CHUNK = 2_000_000
"""Numbers of gathered probabilities at a time; 16 MB."""

_LONGEST = 1000.0


def maximise_resampled(
    probabilities: np.ndarray,
    rows: np.ndarray,
    priors: np.ndarray,
    *,
    tolerance: float = 1e-6,
    max_steps: int = 500,
) -> tuple[np.ndarray, np.ndarray]:
    """The maximum-likelihood prevalence of every resampled target, and how much likelier it is.

    What bootstrap and permutation tests need: the same rows, drawn again and again. For the one
    estimate that is reported, with intervals and advice, there is `estimate_prevalence`.

    Expectation maximisation, extrapolated in the logarithm of the shares (SQUAREM) where that
    raises the likelihood. A resampling is done when its certificate says that the mean
    log-likelihood can rise by no more than `tolerance`.

    Args:
        probabilities: `[N, K]`, calibrated.
        rows: `[B, m]`, which rows each resampled target consists of.
        priors: `[B, K]` or `[K]`, the source's prior that goes with it. A class of prior 0 has
            probability 0 in every row, and gets share 0.
        tolerance: of the certificate.
        max_steps: of three passes each; what is left then is the best that was found.

    Returns:
        Shares `[B, K]`, and log-likelihood ratios `[B]` of these against the prior, summed over
        the m rows: not negative.

    >>> probabilities = np.array([[0.8, 0.2], [0.2, 0.8]])
    >>> shares, ratios = maximise_resampled(probabilities, np.array([[0, 0, 1]]), np.full(2, 0.5))
    >>> shares.round(3)
    array([[0.778, 0.222]])

    References:
        M. Saerens, P. Latinne, C. Decaestecker, "Adjusting the outputs of a classifier to new a
        priori probabilities: a simple procedure", 2002.
        R. Varadhan, C. Roland, "Simple and globally convergent methods for accelerating the
        convergence of any EM algorithm", 2008.
    """
    classes = probabilities.shape[1]
    priors = np.broadcast_to(priors, (len(rows), classes))
    shares, ratios = np.empty((len(rows), classes)), np.empty(len(rows))
    chunk = max(1, _CHUNK // (rows.shape[1] * classes))
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        shares[part], ratios[part] = _maximise(
            probabilities[rows[part]], priors[part], tolerance, max_steps
        )
    return shares, ratios


def _maximise(
    samples: np.ndarray, priors: np.ndarray, tolerance: float, max_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    # Likelihoods of the rows under each class, up to a factor for each row.
    samples = np.divide(
        samples, priors[:, None], out=np.zeros_like(samples), where=priors[:, None] > 0
    )
    shares, heights = priors.copy(), np.zeros(len(priors))
    active = np.arange(len(priors))
    point = priors.copy()
    height, slopes = _pass(samples, point)
    for _ in range(max_steps):
        done = slopes.max(1) - 1 <= tolerance
        shares[active], heights[active] = point, height
        if done.all():
            break
        if done.any():
            active, samples, priors = active[~done], samples[~done], priors[~done]
            point, height, slopes = point[~done], height[~done], slopes[~done]
        once = _normalised(point * slopes)
        height_once, slopes_once = _pass(samples, once)
        twice = _normalised(once * slopes_once)
        further = _extrapolated(point, slopes, slopes_once)
        height, slopes = _pass(samples, further)
        worse = ~(height >= height_once)
        if worse.any():
            further[worse] = twice[worse]
            height[worse], slopes[worse] = _pass(samples[worse], twice[worse])
        point = further
    return shares, np.maximum(heights, 0)


def _pass(samples: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Summed log-likelihoods `[B]`, and slopes `[B, K]` of their means, of samples `[B, m, K]`."""
    density = np.maximum(np.matmul(samples, shares[:, :, None])[:, :, 0], 1e-300)
    slopes = np.matmul((1 / density)[:, None, :], samples)[:, 0] / samples.shape[1]
    return np.log(density).sum(1), slopes


def _extrapolated(point: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """As far along the two last steps of EM as the change between them says, in logarithms."""
    first, second = np.log(np.maximum(first, 1e-12)), np.log(np.maximum(second, 1e-12))
    change = second - first
    # Shares that are all but 0 say nothing about the length of the step.
    size = np.sqrt((point * first**2).sum(1)), np.sqrt((point * change**2).sum(1))
    length = np.clip(size[0] / np.maximum(size[1], 1e-300), 1, _LONGEST)[:, None]
    logs = np.log(np.maximum(point, 1e-300)) + 2 * length * first + length**2 * change
    moved = np.exp(logs - logs.max(1, keepdims=True))
    return _normalised(np.where(point > 0, np.maximum(moved, 1e-200), 0))


def _normalised(shares: np.ndarray) -> np.ndarray:
    return shares / shares.sum(1, keepdims=True)
