"""Initial values for a whole network at once.

A program that draws each kernel by itself takes more than ten seconds to compile for a ResNet-50,
because the generator is compiled anew for every shape. Here all kernels are cut from one array of
normal numbers, which takes one second; each has a key of its own, made from its path, so that
another head or a deeper network leaves the values of the rest as they were.
"""

import math
import zlib
from collections.abc import Collection
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.types import Params

__all__ = ["initial_params", "initial_statistics"]

_BLOCK = 1 << 16
"""Normal numbers that one key gives."""


def initial_params(rng: jax.Array, abstract: Params, *, zero: Collection[str] = ()) -> Params:
    """Draws kernels from normal distributions; sets scales to 1 and biases to 0.

    A convolution has variance `2 / (kernel height * kernel width * outputs)`, which keeps the size
    of the gradient through ReLUs (He initialisation, "fan out"); a dense kernel has `1 / inputs`
    (LeCun), which keeps the size of the output.

    Args:
      rng: a key.
      abstract: nested dict of `jax.ShapeDtypeStruct`; the last component of a path ("kernel",
        "scale", "bias") says what a leaf is.
      zero: paths whose leaves shall be 0 instead.

    Returns:
      The nested dict of arrays.

    >>> shapes = {"fc": {"kernel": jax.ShapeDtypeStruct((512, 10), jnp.float32)}}
    >>> kernel = initial_params(jax.random.key(0), shapes)["fc"]["kernel"]
    >>> abs(float(kernel.std()) * 512**0.5 - 1) < 0.05
    True

    References:
      K. He, X. Zhang, S. Ren, J. Sun, "Delving Deep into Rectifiers: Surpassing Human-Level
      Performance on ImageNet Classification", 2015.
      Y. LeCun, L. Bottou, G. Orr, K.-R. Müller, "Efficient BackProp", 1998.
    """
    flat = flatten(abstract)
    drawn = {path: leaf for path, leaf in flat.items() if path.endswith("kernel")}
    specs = tuple(
        (path, leaf.shape, leaf.dtype) for path, leaf in drawn.items() if path not in zero
    )
    kernels = _draw(rng, specs) if specs else {}

    def value(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path in kernels:
            return kernels[path]
        one = path.endswith("scale") and path not in zero
        return _constant(1 if one else 0, leaf)

    return unflatten({path: value(path, leaf) for path, leaf in flat.items()})


def initial_statistics(abstract: Params) -> Params:
    """Running statistics that change nothing: mean 0 and variance 1.

    >>> initial_statistics({"bn1": {"var": jax.ShapeDtypeStruct((2,), jnp.float32)}})
    {'bn1': {'var': Array([1., 1.], dtype=float32)}}
    """
    return unflatten(
        {
            path: _constant(1 if path.endswith("var") else 0, leaf)
            for path, leaf in flatten(abstract).items()
        }
    )


def _constant(value: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    # By way of numpy there is nothing to compile; `jnp.full` compiles for every shape.
    return jnp.asarray(np.full(leaf.shape, value, leaf.dtype))


@partial(jax.jit, static_argnums=1)
def _draw(
    rng: jax.Array, specs: tuple[tuple[str, tuple[int, ...], np.dtype], ...]
) -> dict[str, jax.Array]:
    """A kernel for each path and shape."""
    counts = [math.ceil(math.prod(shape) / _BLOCK) for _, shape, _ in specs]
    hashes = [zlib.crc32(path.encode()) for path, _, _ in specs]
    keys = jax.vmap(lambda name, block: jax.random.fold_in(jax.random.fold_in(rng, name), block))(
        np.repeat(np.array(hashes, np.uint32), counts),
        np.concatenate([np.arange(count, dtype=np.uint32) for count in counts]),
    )
    deviations = np.array([_deviation(shape) for _, shape, _ in specs], np.float32)
    values = jax.vmap(
        lambda key, deviation: deviation * jax.random.normal(key, (_BLOCK,), jnp.float32)
    )(keys, np.repeat(deviations, counts))
    ends = np.cumsum(counts)
    return {
        path: values[end - count : end].ravel()[: math.prod(shape)].reshape(shape).astype(dtype)
        for (path, shape, dtype), count, end in zip(specs, counts, ends, strict=True)
    }


def _deviation(shape: tuple[int, ...]) -> float:
    if len(shape) == 2:
        return (1 / shape[0]) ** 0.5
    return (2 / (math.prod(shape[:-2]) * shape[-1])) ** 0.5
