"""Critical values near a border, against the intervals that their authors published."""

import numpy as np
import pytest
from scipy.stats import norm

from flaxtransfer.shift.prevalence_intervals import critical_values


@pytest.mark.parametrize(
    ("level", "estimate", "ends"),
    [
        # Feldman and Cousins, 1998: a Gaussian mean that cannot be negative.
        (0.90, -1.0, (0.0, 0.81)),
        (0.90, 0.0, (0.0, 1.64)),
        (0.95, -3.0, (0.0, 0.42)),
        (0.95, 0.0, (0.0, 1.96)),
        (0.95, 1.0, (0.0, 2.96)),
        (0.95, 2.0, (0.35, 3.96)),
    ],
)
def test_a_mean_that_cannot_be_negative(level, estimate, ends):
    means = np.linspace(0, 8, 80_001)
    above, below = critical_values(means, level)
    kept = means[(estimate <= means + above) & (estimate >= means - below)]
    np.testing.assert_allclose((kept.min(), kept.max()), ends, atol=0.006)


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95, 0.999])
def test_what_is_kept_is_as_likely_as_was_asked(level):
    distance = np.linspace(0, 5, 101)
    above, below = critical_values(distance, level)
    np.testing.assert_allclose(norm.cdf(above) - norm.cdf(-below), level, atol=1e-4)
    # From the quantile on, the border is out of sight.
    far = distance > norm.ppf((1 + level) / 2)
    np.testing.assert_allclose(above[far], norm.ppf((1 + level) / 2))
    np.testing.assert_allclose(below[far], above[far])
