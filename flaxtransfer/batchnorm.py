"""Which statistics each BatchNorm uses: a static policy, decided before anything is compiled.

A BatchNorm with "batch" normalizes by the statistics of the batch and updates its running ones;
one with "running" uses the running statistics and leaves them alone, in training too. Where a
batch is divided over devices, ``normalized_over`` has one message in each pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxtransfer.mask_algebra import select
from flaxtransfer.masks import Mask, as_mask, batch_norm
from flaxtransfer.paths import PyTree, flatten, listing, suggest

__all__ = [
    "Norm",
    "check",
    "divided_over",
    "mesh_at_hand",
    "mode",
    "modules",
    "normalized_over",
    "policy",
]


Norm = Literal["running", "batch"] | frozenset[str]
"""All of one kind, or the paths of the BatchNorms ("encoder/0/norm1") that use batch statistics."""

_STATISTICS = ("mean", "var")
_AFFINE = ("scale", "bias")


def modules(tree: PyTree) -> tuple[str, ...]:
    """The paths of a tree's BatchNorms.

    In a tree of statistics they are what holds a ``mean`` or a ``var``; in a tree of parameters
    they go by name, as in ``flaxtransfer.masks.batch_norm``.

    >>> modules({"encoder": {"bn": {"scale": 0, "bias": 0}}, "decoder": {"bias": 0}})
    ('encoder/bn',)
    """
    return _modules(flatten(tree))


def policy(
    tree: PyTree,
    trainable: PyTree | Mask | str | None = None,
    *,
    overrides: Mapping[Mask | str, Literal["running", "batch"]] | None = None,
) -> frozenset[str]:
    """The policy that follows from what is trainable.

    A BatchNorm of which any leaf is trainable uses batch statistics. One that is frozen uses its
    running statistics and never updates them: otherwise a frozen network's function drifts, and
    differs between training and evaluation.

    Args:
        tree: Parameters or BatchNorm statistics, of arrays or ``jax.ShapeDtypeStruct``.
        trainable: Tree of booleans over the parameters, or a mask. May be left out where ``tree``
            is itself the tree of booleans.
        overrides: Exceptions in order, the later ones winning: for each mask, or its expression,
            "running" or "batch" for the BatchNorms that it touches.

    Returns:
        The paths of the BatchNorms that use, and update, batch statistics.

    Raises:
        ValueError: A tree of booleans that is not this tree's, an override that touches no
            BatchNorm or has another value; all in one text.
        TypeError: ``trainable`` is neither booleans nor a mask.

    >>> params = {"encoder": {"bn": {"scale": 0, "bias": 0}}, "decoder": {"bn": {"scale": 0}}}
    >>> sorted(policy(params, "glob('decoder/**')"))
    ['decoder/bn']
    >>> exceptions = {"everything()": "batch", "glob('encoder/**')": "running"}
    >>> sorted(policy(params, "glob('decoder/**')", overrides=exceptions))
    ['decoder/bn']

    References:
        S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
        Internal Covariate Shift", 2015.
    """
    flat = flatten(tree)
    return policy_of_paths(flat, _trainable_paths(flat, _modules(flat), trainable), overrides)


def policy_of_paths(
    flat: Mapping[str, Any],
    moving: Iterable[str],
    overrides: Mapping[Mask | str, Literal["running", "batch"]] | None = None,
) -> frozenset[str]:
    """``policy`` on a tree that is flat already.

    Args:
        flat: Leaves by path; only their paths matter.
        moving: The paths of the trainable leaves.
        overrides: As for ``policy``.

    Raises:
        ValueError: An override that touches no BatchNorm or has another value.
    """
    found = _modules(flat)
    moving = tuple(moving)
    batch = {module for module in found if any(path.startswith(f"{module}/") for path in moving)}
    problems = []
    for mask, wanted in (overrides or {}).items():
        if wanted not in ("running", "batch"):
            problems.append(f"{mask!r} must be 'running' or 'batch', got {wanted!r}")
            continue
        try:
            taken = select(as_mask(mask), _leaves_of(found))
        except ValueError as error:
            problems.append(f"{mask!r} touches no BatchNorm: {error}")
            continue
        touched = {path.rpartition("/")[0] for path in taken}
        batch = batch | touched if wanted == "batch" else batch - touched
    if problems:
        raise ValueError("overrides of the BatchNorm policy: " + "; ".join(problems))
    return frozenset(batch)


def check(norm: Norm, tree: PyTree) -> Norm:
    """Returns a policy that fits this tree, or raises.

    Args:
        norm: The policy.
        tree: Parameters or BatchNorm statistics.

    Raises:
        ValueError: Another word, or paths where there is no BatchNorm; all of them with the
            nearest.
        TypeError: Neither a word nor a frozenset of paths.

    >>> check(frozenset({"a/nrm"}), {"a": {"norm": {"mean": 0}}})
    Traceback (most recent call last):
    ...
    ValueError: no BatchNorm at 'a/nrm'; did you mean 'a/norm'?; the BatchNorms are a/norm
    """
    if isinstance(norm, str):
        if norm in ("running", "batch"):
            return norm
        raise ValueError(
            f"norm must be 'running', 'batch' or a frozenset of BatchNorm paths, got {norm!r}"
            + suggest(norm, ("running", "batch"))
        )
    if not isinstance(norm, frozenset):
        raise TypeError(
            "norm must be 'running', 'batch' or a frozenset of BatchNorm paths (it is hashed), got "
            f"a {type(norm).__name__}"
        )
    found = modules(tree)
    unknown = sorted(str(path) for path in norm if path not in found)
    if unknown:
        problems = (f"no BatchNorm at {path!r}{suggest(path, found)}" for path in unknown)
        raise ValueError(f"{'; '.join(problems)}; the BatchNorms are {listing(found) or 'none'}")
    return norm


def mode(norm: Norm, module: str) -> Literal["running", "batch"]:
    """Which statistics the BatchNorm at this path uses.

    >>> norm = frozenset({"decoder/bn"})
    >>> mode(norm, "decoder/bn"), mode(norm, "encoder/bn"), mode("batch", "encoder/bn")
    ('batch', 'running', 'batch')
    """
    if norm == "running" or norm == "batch":
        return norm
    return "batch" if module in norm else "running"


def _modules(flat: Mapping[str, Any]) -> tuple[str, ...]:
    named = select(batch_norm(), flat, allow_empty=True)
    found = []
    for path in flat:
        module, _, name = path.rpartition("/")
        if module and (name in _STATISTICS or (path in named and name in _AFFINE)):
            found.append(module)
    return tuple(dict.fromkeys(found))


def _trainable_paths(
    flat: Mapping[str, Any], found: tuple[str, ...], trainable: PyTree | Mask | str | None
) -> frozenset[str]:
    statistics = all(path.rpartition("/")[2] in _STATISTICS for path in flat)
    if isinstance(trainable, Mask | str):
        # On statistics a mask such as head() rightly selects nothing.
        where = _leaves_of(found) if statistics else flat
        return select(as_mask(trainable), where, allow_empty=statistics)
    try:
        booleans = flat if trainable is None else flatten(trainable)
    except TypeError as error:
        raise TypeError(
            f"trainable must be a tree of booleans or a mask, got {trainable!r}"
        ) from error
    wrong = [path for path, value in booleans.items() if not isinstance(value, bool)]
    if wrong:
        raise TypeError(
            "trainable must be a tree of booleans or a mask, got other leaves: " + listing(wrong)
        )
    if statistics:
        modules_there = {path.rpartition("/")[0] for path in booleans}
        missing = [] if not found or modules_there & set(found) else list(found)
    else:
        missing = sorted(set(flat) ^ set(booleans))
    if missing:
        raise ValueError("trainable is of another tree; they differ in " + listing(missing))
    return frozenset(path for path, value in booleans.items() if value)


def _leaves_of(found: tuple[str, ...]) -> dict[str, Any]:
    """All leaves that these BatchNorms have in parameters and statistics together, by path."""
    channels = jax.ShapeDtypeStruct((1,), "float32")  # type: ignore[no-untyped-call]
    names = (*_AFFINE, *_STATISTICS)
    return {f"{module}/{name}": channels for module in found for name in names}


_mesh: ContextVar[Mesh | None] = ContextVar("mesh", default=None)


@contextmanager
def divided_over(mesh: Mesh | None) -> Iterator[None]:
    """Batches of what is traced in the block are divided over the devices of a mesh.

    Args:
        mesh: None, or one device: they are not.

    >>> with divided_over(None):
    ...     mesh_at_hand(8)
    """
    before = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(before)


def mesh_at_hand(rows: int) -> Mesh | None:
    """The mesh over which that many rows are divided; None for one device, or uneven parts."""
    mesh = _mesh.get()
    return mesh if mesh is not None and mesh.size > 1 and rows % mesh.size == 0 else None


def _constrain(x: jax.Array, mesh: Mesh, *axes: tuple[str, ...]) -> jax.Array:
    constrain: Callable[..., jax.Array] = jax.lax.with_sharding_constraint
    sharding = NamedSharding(mesh, PartitionSpec(*axes))  # type: ignore[no-untyped-call]
    return constrain(x, sharding)


def _divided(x: jax.Array, mesh: Mesh) -> jax.Array:
    """The rows of each device, ``[devices, rows, ..., channels]``."""
    return _constrain(x.reshape(mesh.size, -1, *x.shape[1:]), mesh, mesh.axis_names)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalized_over(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """Normalizes by the statistics of a batch that the devices of a mesh divide.

    It is flax's BatchNorm, with as few messages as there can be: one in the forward pass and one in
    the backward pass. What XLA makes of flax's has two in each, of two or three arrays, for the
    mean is subtracted before values are squared; where devices belong to several processes or
    machines, a step of a small network mostly waits for them. Each device takes the moments of its
    rows, in two passes too, and those of all are merged.

    Args:
        x: ``[batch, ..., channels]``; the number of devices divides the batch.
        scale: ``[channels]``.
        bias: ``[channels]``.
        epsilon: is added to the variance.
        mesh: over which the first axis is split evenly.

    Returns:
        The normalized values, as ``x``; and mean and variance of the batch, ``[2, channels]`` in
        float32 or wider, for the running statistics: no gradient is taken of them.

    References:
        T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for
        Computing Sample Variances", 1979.

    >>> mesh = Mesh(jax.devices()[:1], ("data",))
    >>> y, moments = normalized_over(jnp.array([[1.0], [3.0]]), jnp.ones(1), jnp.ones(1), 0.0, mesh)
    >>> y.ravel().tolist(), moments.ravel().tolist()
    ([0.0, 2.0], [2.0, 1.0])
    """
    return _forward(x, scale, bias, epsilon, mesh)[0]


def _forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, mesh: Mesh
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    each = _divided(_wide(x), mesh)
    inner = tuple(range(1, each.ndim - 1))
    means = each.mean(inner, keepdims=True)
    moments = jnp.stack([means.reshape(mesh.size, -1), ((each - means) ** 2).mean(inner)])
    means, variances = _constrain(moments, mesh)  # All of them on all devices.
    mean = means.mean(0)
    var = (variances + (means - mean) ** 2).mean(0)
    inverse = jax.lax.rsqrt(var + epsilon)
    y = ((_wide(x) - mean) * (inverse * scale) + bias).astype(x.dtype)
    return (y, jnp.stack([mean, var])), (x, scale, bias, mean, inverse)


def _backward(
    epsilon: float, mesh: Mesh, kept: tuple[jax.Array, ...], given: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, scale, bias, mean, inverse = kept
    slope = _wide(given[0])
    normal = (_wide(x) - mean) * inverse
    each = [_divided(values, mesh) for values in (slope, slope * normal)]
    sums = jnp.stack([e.sum(tuple(range(1, e.ndim - 1))) for e in each], axis=1).sum(0)
    shift, tilt = sums / (x.size // x.shape[-1])
    of_x = (slope - shift - normal * tilt) * (inverse * scale)
    of_bias, of_scale = sums
    return (
        of_x.astype(x.dtype),
        of_scale.astype(scale.dtype),
        of_bias.astype(bias.dtype),
    )


normalized_over.defvjp(_forward, _backward)
