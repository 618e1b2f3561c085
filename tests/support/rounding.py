"""How far rounding takes a result, on whatever processor it is computed."""

import math

import jax.numpy as jnp


def rounding(terms: int, dtype: str = "float32") -> float:
    """Error of a sum of so many terms, relative to the largest of several such sums.

    Processors add in different orders and may fuse a product with its sum: the last digits are
    their own. One addition is wrong by half an eps at most, and errors of both signs grow with the
    square root of their number (N. J. Higham, T. Mary, "A New Approach to Probabilistic Rounding
    Error Analysis", 2019). A whole eps for each leaves a factor of two.

    >>> f"{rounding(576):.1e}"
    '2.9e-06'
    """
    return float(jnp.finfo(dtype).eps) * math.sqrt(terms)
