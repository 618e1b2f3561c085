"""Average thresholded confidence: the share of a target that is surer than the source's errors."""

import numpy as np

__all__ = ["ThresholdedConfidence", "negative_entropy"]


def negative_entropy(probabilities: np.ndarray) -> np.ndarray:
    """Sum of p log p of each row `[n]` of probabilities `[n, K]`, in nats: 0 where it is sure.

    >>> negative_entropy(np.array([[1.0, 0.0], [0.5, 0.5]])).round(4).tolist()
    [0.0, -0.6931]
    """
    # Sorted, the sum has one rounding for every order of the classes, and ties stay ties.
    ordered = np.sort(probabilities, axis=1)
    logarithms = np.log(ordered, out=np.zeros_like(ordered), where=ordered > 0)
    return (ordered * logarithms).sum(1)


class ThresholdedConfidence:
    """The estimate for one score, for any weights of the examples.

    The threshold leaves as much of the source below it as there are errors, midway between two
    scores. Where several examples have the threshold's score, the share of them counts that makes
    the source's accuracy come out; a source that is its own target has it exactly.

    Args:
        source_scores: `[n]`, larger where the model is surer.
        right: bool `[n]`, whether it predicts the class.
        target_scores: `[m]`.

    >>> found = ThresholdedConfidence([0.5, 0.6, 0.8, 0.9], [False, True, True, True], [0.5, 0.7])
    >>> found.threshold(), found.estimate()
    ((0.55, 1.0), 0.5)

    References:
        S. Garg, S. Balakrishnan, Z. Lipton, B. Neyshabur, H. Sedghi, "Leveraging unlabeled data to
        predict out-of-distribution performance", 2022.
    """

    def __init__(
        self, source_scores: np.ndarray, right: np.ndarray, target_scores: np.ndarray
    ) -> None:
        self._order = np.argsort(source_scores, kind="stable")
        self._scores = np.asarray(source_scores)[self._order]
        self._wrong = ~np.asarray(right, bool)[self._order]
        self._target_order = np.argsort(target_scores, kind="stable")
        self._target = np.asarray(target_scores)[self._target_order]

    def threshold(self, weights: np.ndarray | None = None) -> tuple[float, float]:
        """The score, and the share that counts of examples that have exactly this score.

        Args:
            weights: `[n]`, whole numbers; 1 each if None.
        """
        scores = self._scores
        weight = np.ones(len(scores)) if weights is None else weights[self._order].astype(float)
        mass = np.cumsum(weight)
        errors, total = float(weight @ self._wrong), mass[-1]
        if errors == 0:
            place = scores[np.searchsorted(mass, 0, side="right")]
        elif errors == total:
            place = scores[np.searchsorted(mass, total, side="left")]
        else:
            below = scores[np.searchsorted(mass, errors, side="left")]
            place = (below + scores[np.searchsorted(mass, errors, side="right")]) / 2
        above, tied = _above_and_tied(scores, mass, place)
        return float(place), float((total - errors - above) / tied) if tied else 1.0

    def estimate(
        self, weights: np.ndarray | None = None, target_weights: np.ndarray | None = None
    ) -> float:
        """The target's accuracy.

        Args:
            weights: `[n]`, whole numbers; 1 each if None.
            target_weights: `[m]`, as well.
        """
        place, share = self.threshold(weights)
        count = len(self._target)
        mass = np.cumsum(
            np.ones(count) if target_weights is None else target_weights[self._target_order]
        )
        above, tied = _above_and_tied(self._target, mass, place)
        return float((above + share * tied) / mass[-1])


def _above_and_tied(ordered: np.ndarray, mass: np.ndarray, place: float) -> tuple[float, float]:
    """The mass above a score and at it, of sorted scores with cumulated masses."""
    padded = np.concatenate([[0.0], mass])
    first = padded[np.searchsorted(ordered, place, side="left")]
    last = padded[np.searchsorted(ordered, place, side="right")]
    return float(mass[-1] - last), float(last - first)
