"""Models: a network as two pure functions, ``init`` and ``apply``, over named segments.

A ``Model`` is a value without arrays. Its parameters and BatchNorm statistics are nested dicts
that are passed in and returned. ``Model.abstract`` gives their shapes without allocating anything.
"""

import math
import re
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxtransfer.batchnorm import Norm, check
from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.models.layers import (
    Convolution,
    conv,
    for_platform,
    lax_conv,
    platform_at_hand,
)
from flaxtransfer.models.layout import RESNET, Layout
from flaxtransfer.models.resnet import Network, Noise, segments_of
from flaxtransfer.paths import Params, Variables, flatten, listing, suggest, unflatten

__all__ = [
    "Model",
    "initial_params",
    "initial_statistics",
    "leaf_shapes",
    "shape_differences",
]


_COLLECTIONS = ("params", "batch_stats")


@dataclass(frozen=True)
class Model:
    """A network as a value: its architecture and its computation, without parameters.

    Equal models compile once, and a model may be a static argument of ``jax.jit``. Parameters and
    BatchNorm statistics are separate, in ``Variables``, and are never changed in place.

    Args:
        config: the architecture.
        dtype: of the convolutions, such as ``jnp.bfloat16`` on accelerators. None uses that of the
            parameters. Parameters, BatchNorm statistics, pooling and head are float32 in any case
            (or float64 if the parameters are).
        zero_head: whether ``init`` sets the head's kernel to 0, so that all classes start equal.
        zero_init_residual: whether ``init`` sets the last BatchNorm scale of every block to 0 (of
            pre-activations the last kernel), so that blocks start as identities; for training from
            scratch.
        convolution: the function that convolves.
        platform: of the devices that programs are compiled for ("cpu", "gpu", "tpu"), which decides
            how some layers are computed; None: that of jax's default device. See ``on``.
        devices: that a batch is split over, where these are CPUs.

    Raises:
        TypeError: ``config`` is not a ``ResNetConfig``, ``dtype`` is not a floating dtype, or
            ``convolution`` is not a function.
    """

    config: ResNetConfig
    dtype: Any = None
    zero_head: bool = False
    zero_init_residual: bool = False
    convolution: Convolution = conv
    platform: str | None = None
    devices: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.config, ResNetConfig):
            raise TypeError(f"config must be a ResNetConfig, got {self.config!r}")
        if self.dtype is not None:
            # One spelling ("bfloat16", jnp.bfloat16, ...) for one dtype, for equality and hash.
            dtype = _dtype(self.dtype)
            if not jnp.issubdtype(dtype, jnp.floating):
                raise TypeError(f"dtype must be a floating dtype, got {dtype}")
            object.__setattr__(self, "dtype", dtype)
        if not callable(self.convolution):
            raise TypeError(f"convolution must be a function, got {self.convolution!r}")

    @property
    def layout(self) -> Layout:
        """What the family calls its parts.

        >>> Model(ResNetConfig()).layout.head
        'fc'
        """
        return RESNET

    def on(self, mesh: Mesh) -> "Model":
        """The same network, compiled for the devices of a mesh, which need not be of this machine.

        >>> from flaxtransfer.sharding import make_mesh
        >>> model = Model(ResNetConfig())
        >>> model.on(make_mesh()) == model
        True
        """
        platform = mesh.devices.flat[0].platform
        # Equal programs stay equal: most meshes are of the devices that jax takes by itself.
        return replace(
            self,
            platform=None if platform == platform_at_hand() else platform,
            devices=mesh.devices.size if platform == "cpu" else 1,
        )

    @property
    def is_for_cpu(self) -> bool:
        """Whether programs are compiled for a CPU."""
        return (self.platform or platform_at_hand()) == "cpu"

    @property
    def segments(self) -> tuple[str, ...]:
        """Names of the segments, from input to output.

        >>> Model(ResNetConfig()).segments
        ('stem', 'layer1', 'layer2', 'layer3', 'layer4', 'pool', 'head')
        >>> from flaxtransfer.models.config import Adapter
        >>> Model(ResNetConfig(adapter=Adapter(13))).segments[:2]
        ('adapter', 'stem')
        """
        return segments_of(self.config)

    def abstract(self) -> Variables:
        """The variables as ``jax.ShapeDtypeStruct``; allocates nothing.

        >>> Model(ResNetConfig(classes=10)).abstract()["params"]["fc"]["kernel"].shape
        (512, 10)
        """
        flat = _abstract(self.config)
        # A network with GroupNorm has no statistics, and an empty tree has no path.
        return {"params": {}, "batch_stats": {}, **unflatten(dict(flat))}

    def init(self, rng: jax.Array, image_shape: Sequence[int] | None = None) -> Variables:
        """Random parameters and neutral BatchNorm statistics, all float32.

        Args:
            rng: a key.
            image_shape: ``(height, width, bands)``. No leaf depends on height or width; the shape
                is only checked against the network.

        Raises:
            TypeError: ``rng`` is no key.
            ValueError: the network cannot take images of this shape.

        >>> model = Model(ResNetConfig(width=8, classes=2), zero_head=True)
        >>> model.init(jax.random.key(0), (32, 32, 3))["params"]["fc"]["kernel"].any()
        Array(False, dtype=bool)
        """
        if not isinstance(rng, jax.Array):
            raise TypeError(f"`rng` must be a key, such as jax.random.key(0), got {rng!r}")
        if image_shape is not None:
            _check_input(self.segments[0], self.config, (1, *image_shape))
        abstract = self.abstract()
        zero = {"fc/kernel"} if self.zero_head else set()
        if self.zero_init_residual:
            number = "2" if self.config.block == "basic" else "3"
            leaf = f"conv{number}/kernel" if self.config.preactivation else f"[bg]n{number}/scale"
            last = rf"layer\d/\d+/{leaf}"
            zero |= {path for path in flatten(abstract["params"]) if re.fullmatch(last, path)}
        params = initial_params(rng, abstract["params"], zero=zero)
        if self.config.adapter is not None:
            # No ReLU follows: for bands of variance 1, three channels of variance 1 need 1 / bands
            # where `initial_params` has 2 / 3.
            adapter = params["adapter"]
            scale = math.sqrt(1.5 / self.config.bands)
            params["adapter"] = adapter | {"kernel": adapter["kernel"] * scale}
        return {
            "params": params,
            "batch_stats": initial_statistics(abstract["batch_stats"]),
        }

    def apply(
        self,
        variables: Variables,
        images: jax.Array,
        *,
        norm: Norm = "running",
        start: str | None = None,
        stop: str | None = None,
        noise: Noise | None = None,
        remat: bool = False,
    ) -> tuple[jax.Array, Params]:
        """Runs the network, or a slice of its segments.

        ``apply(variables, apply(variables, images, stop=s)[0], start=s)`` equals
        ``apply(variables, images)`` for every segment ``s``, so that the output of a frozen prefix
        can be computed once and cached. Of a network whose head reads several depths, this holds
        up to the first of them, and for "head".

        Args:
            variables: ``{"params": ..., "batch_stats": ...}``. Segments that do not run may be
                absent.
            images: ``[batch, height, width, bands]``, floating and already normalized; with
                ``start``, the output of the segment before it.
            norm: which BatchNorms use, and update, batch statistics: "running" (none), "batch"
                (all) or a frozenset of their paths ("layer4/0/bn1"). It is static: under ``jit``
                it is part of the program and not an argument.
            start: first segment to run; None starts at the first one.
            stop: segment before which to stop, as in a Python slice; None runs to the end.
            noise: what training drops at random; None for nothing, as in evaluation.
            remat: whether the backward pass computes what is in a block once more instead of
                keeping it (gradient checkpointing): less memory, about 1.3 times the arithmetic.

        Returns:
            The output, and the whole tree of BatchNorm statistics, in which statistics that were
            not updated are the same arrays as in the input. The output is ``[batch, height, width,
            channels]`` after the stem or a stage, float32 features ``[batch, features]`` after
            "pool", and float32 logits ``[batch, classes]`` after "head".

        Raises:
            TypeError: images that are not floating, or a policy of another type.
            ValueError: an unknown segment or one after ``stop``, images of another shape, a policy
                for unknown BatchNorms, or variables of another network; with the nearest match.

        >>> model = Model(ResNetConfig(depths=(1, 1, 1, 1), width=8))
        >>> variables = model.init(jax.random.key(0))
        >>> maps, _ = model.apply(variables, jnp.ones((4, 32, 32, 3)), stop="layer1")
        >>> maps.shape
        (4, 8, 8, 8)
        """
        segments = _between(self.segments, start, stop)
        abstract = self.abstract()
        check(norm, abstract["batch_stats"])
        _check_variables(variables, abstract, segments)
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise TypeError(
                "images must be floating and normalized by the checkpoint's preprocessing, got "
                f"{images.dtype}"
            )
        reads = self.config.head_reads
        if reads and "pool" in segments and reads[0] not in segments:
            raise ValueError(
                f"start must be at most {reads[0]}, or 'head', for a network whose head reads "
                f"{', '.join(reads)} too, got {start!r}"
            )
        if segments:
            _check_input(segments[0], self.config, images.shape)
        network = Network(self.dtype, self.convolution, self.config)
        with for_platform(self.platform, self.devices):
            if norm == "running":
                output: Any = network.apply(variables, images, norm, segments, noise, remat)
                return output, variables["batch_stats"]
            # flax's signature does not say that `mutable` makes it a pair.
            result: Any = network.apply(
                variables, images, norm, segments, noise, remat, mutable=["batch_stats"]
            )
        output, updated = result
        return output, updated.get("batch_stats", {})


@lru_cache(maxsize=512)
def _abstract(config: ResNetConfig) -> tuple[tuple[str, jax.ShapeDtypeStruct], ...]:
    """Paths and abstract leaves of both collections, sorted as JAX sorts nested dicts."""
    # All blocks of a stage after the first have the same leaves, so tracing two of them suffices.
    # Tracing the deepest networks as a whole takes seconds.
    short = replace(config, depths=tuple(min(depth, 2) for depth in config.depths))
    leaves = {}
    for path, leaf in _traced(short):
        leaves[path] = leaf
        if second := _SECOND_BLOCK.fullmatch(path):
            for index in range(2, config.depths[int(second[2]) - 1]):
                leaves[f"{second[1]}{index}{second[3]}"] = leaf
    order = {name: number for number, name in enumerate(_COLLECTIONS)}

    def position(path: str) -> tuple[int, list[str]]:
        collection, *names = path.split("/")
        return order[collection], names

    return tuple((path, leaves[path]) for path in sorted(leaves, key=position))


_SECOND_BLOCK = re.compile(r"(\w+/layer([1-4])/)1(/.+)")


@lru_cache(maxsize=512)
def _traced(config: ResNetConfig) -> tuple[tuple[str, jax.ShapeDtypeStruct], ...]:
    # With `lax_conv` a convolution is a single operation to trace.
    network = Network(jnp.dtype("float32"), lax_conv, config)
    images = jax.ShapeDtypeStruct((1, 32, 32, config.bands), jnp.float32)  # type: ignore[no-untyped-call]
    variables = jax.eval_shape(
        lambda images: network.init(jax.random.key(0), images, "running"), images
    )
    return tuple(flatten({name: variables.get(name, {}) for name in _COLLECTIONS}).items())


def leaf_shapes(config: ResNetConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf of a network, by path: ``Model.abstract`` flattened.

    Args:
        config: of the network. The first call per configuration takes about 0.1 s.

    Returns:
        ``{"params/conv1/kernel": (7, 7, in, width), "batch_stats/bn1/mean": (width,), ...}``.

    >>> leaf_shapes(ResNetConfig(classes=5))["params/fc/kernel"]
    (512, 5)
    """
    return {path: tuple(leaf.shape) for path, leaf in _abstract(config)}


def shape_differences(
    leaves: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Compares leaves with the expected paths and shapes; one line per difference.

    Args:
        leaves: arrays or ``jax.ShapeDtypeStruct`` by path.
        shapes: the expected shape of each leaf, as ``leaf_shapes`` returns them.

    >>> shape_differences({"fc/bias": np.zeros(2)}, {"fc/bias": (3,), "fc/kernel": (4, 3)})
    ['missing: fc/kernel [4, 3]', 'shape: fc/bias must be [3], got [2]']
    """
    missing = [path for path in shapes if path not in leaves]
    foreign = [path for path in leaves if path not in shapes]
    lines = [f"missing: {path} {list(shapes[path])}" for path in missing]
    lines += [f"unexpected: {path}{suggest(path, missing)}" for path in foreign]
    return lines + [
        f"shape: {path} must be {list(shapes[path])}, got {list(np.shape(leaf))}"
        for path, leaf in leaves.items()
        if path in shapes and np.shape(leaf) != tuple(shapes[path])
    ]


def _dtype(dtype: Any) -> jnp.dtype:
    try:
        result: jnp.dtype = jnp.dtype(dtype)
        return result
    except TypeError:
        raise TypeError(
            f"dtype must be a dtype such as float32 or bfloat16, got {dtype!r}"
        ) from None


def _between(names: tuple[str, ...], start: str | None, stop: str | None) -> tuple[str, ...]:
    """The segments from ``start`` up to but not including ``stop``."""
    unknown = [name for name in (start, stop) if name is not None and name not in names]
    if unknown:
        raise ValueError(
            "; ".join(f"unknown segment {name!r}{suggest(str(name), names)}" for name in unknown)
            + f"; the segments are {', '.join(names)}"
        )
    first = 0 if start is None else names.index(start)
    last = len(names) if stop is None else names.index(stop)
    if first > last:
        raise ValueError(
            f"start must not come after stop, got start={start!r} and stop={stop!r}; the segments "
            f"from input to output are {', '.join(names)}"
        )
    return names[first:last]


def _check_input(segment: str, config: ResNetConfig, shape: Sequence[int]) -> None:
    """Raises unless ``segment`` can take an array of this shape."""
    if segment == "adapter":
        channels, source = config.bands, "images"
    elif segment == "stem":
        source = "images" if config.adapter is None else "the output of the adapter"
        channels = config.in_channels
    elif segment == "layer1":
        channels, source = config.stem_channels[-1], "the output of the stem"
    elif segment == "head":
        channels, source = config.features, "the output of the previous segment"
    elif segment == "pool":
        last = f"layer{len(config.depths)}" if config.depths else "stem"
        channels, source = config.channels(last), "the output of the previous segment"
    else:
        stage = int(segment.removeprefix("layer")) - 1
        channels = config.width * 2 ** (stage - 1) * config.expansion
        source = f"the output of layer{stage}"
    axes = ("batch", "features") if segment == "head" else ("batch", "height", "width", "channels")
    expected = f"{segment} takes {source} [{', '.join(axes)}] with {channels} {axes[-1]}"
    if len(shape) != len(axes) or shape[-1] != channels:
        raise ValueError(f"{expected}, got an array of shape {tuple(shape)}")
    if 0 in shape[1:]:
        raise ValueError(f"{expected}; the shape {tuple(shape)} has no pixels")


def _check_variables(
    variables: Mapping[str, Any], abstract: Variables, segments: Iterable[str]
) -> None:
    """Raises unless the running segments have all their leaves and no leaf is unknown."""
    if not isinstance(variables, Mapping) or any(name not in variables for name in _COLLECTIONS):
        given = ", ".join(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(f"variables must be {{'params': ..., 'batch_stats': ...}}, got {given}")
    problems = []
    for name in _COLLECTIONS:
        if _alike(variables[name], abstract[name]):
            continue
        wanted, found = flatten(abstract[name]), flatten(variables[name])
        missing = [p for p in wanted if p not in found and RESNET.segment(p) in segments]
        foreign = [p for p in found if p not in wanted]
        shapes = [
            f"{p} must be {leaf.shape}, got {found[p].shape}"
            for p, leaf in wanted.items()
            if p in found and found[p].shape != leaf.shape
        ]
        problems += [f"{name} lacks {listing(missing)}"] if missing else []
        problems += [f"{name} has unknown leaves {listing(foreign)}"] if foreign else []
        problems += [f"in {name} {listing(shapes)}"] if shapes else []
    if problems:
        raise ValueError("the variables do not fit the network: " + "; ".join(problems))


def _alike(tree: Any, abstract: Params) -> bool:
    """Whether a tree is whole and right, told without paths."""
    structures: list[Any] = [jax.tree.structure(one) for one in (tree, abstract)]
    if structures[0] != structures[1]:
        return False
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(abstract), strict=True)
    return all(getattr(leaf, "shape", None) == wanted.shape for leaf, wanted in pairs)


_BLOCK = 1 << 16
"""Normal numbers per key."""


def initial_params(rng: jax.Array, abstract: Params, *, zero: Collection[str] = ()) -> Params:
    """Initializes parameters: kernels from normal distributions, scales to 1, biases to 0.

    All kernels are cut from one array of normal numbers, which compiles in one second. A program
    that draws each kernel separately takes more than ten seconds for a ResNet-50, because the
    generator is compiled for every shape. Each kernel has its own key, derived from its path, so
    that a different head or a deeper network does not change the other values.

    A convolution has variance ``2 / (kernel height * kernel width * outputs)``, which keeps the
    size of the gradient through ReLUs (He initialization, "fan out"); a dense kernel has ``1 /
    inputs`` (LeCun), which keeps the size of the output.

    Args:
        rng: a key.
        abstract: nested dict of ``jax.ShapeDtypeStruct``; the last component of a path ("kernel",
            "scale", "bias") says what a leaf is.
        zero: paths of leaves that are set to 0 instead.

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
            result: jax.Array = kernels[path]
            return result
        one = path.endswith("scale") and path not in zero
        return _constant(1 if one else 0, leaf)

    return unflatten({path: value(path, leaf) for path, leaf in flat.items()})


def initial_statistics(abstract: Params) -> Params:
    """Initializes running statistics: mean 0 and variance 1.

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
    # numpy needs no compilation; `jnp.full` compiles for every shape.
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
    dense = len(shape) == 2
    variance = 1 / shape[0] if dense else 2 / (math.prod(shape[:-2]) * shape[-1])
    return float(variance**0.5)
