"""Small networks and images for them."""

import jax.numpy as jnp
import numpy as np

from flaxtransfer.models import ResNetConfig

SMALL = ResNetConfig("basic", (1, 1, 1, 1), width=16, classes=3)
SMALL_BOTTLENECK = ResNetConfig("bottleneck", (1, 1, 1, 1), width=16, classes=3)


def noise(*shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)
