"""Which statistics each BatchNorm uses: a static policy, decided before anything is compiled.

A BatchNorm with "batch" normalizes by the statistics of the batch and updates its running ones;
one with "running" uses the running statistics and leaves them alone, in training too.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax

from flaxtransfer.masks import Mask, as_mask, batch_norm, selected
from flaxtransfer.paths import flatten, listing, suggest, unflatten

__all__ = ["Norm", "check", "mode", "modules", "policy"]


Norm = Literal["running", "batch"] | frozenset[str]
"""All of one kind, or the paths of the BatchNorms ("layer4/0/bn1") that use batch statistics."""

_STATISTICS = ("mean", "var")
_AFFINE = ("scale", "bias")


def modules(tree: Mapping[str, Any]) -> tuple[str, ...]:
    """The paths of a tree's BatchNorms.

    In a tree of statistics they are what holds a ``mean`` or a ``var``; in a tree of parameters
    they go by name, as in ``flaxtransfer.masks.batch_norm``.

    >>> modules({"bn1": {"scale": 0, "bias": 0}, "fc": {"bias": 0}})
    ('bn1',)
    """
    named = selected(batch_norm(), tree, allow_empty=True)
    found = []
    for path in flatten(tree):
        module, _, name = path.rpartition("/")
        if module and (name in _STATISTICS or (path in named and name in _AFFINE)):
            found.append(module)
    return tuple(dict.fromkeys(found))


def policy(
    tree: Mapping[str, Any],
    trainable: Mapping[str, Any] | Mask | str | None = None,
    *,
    overrides: Mapping[Mask | str, Literal["running", "batch"]] | None = None,
) -> frozenset[str]:
    """The policy that follows from what is trainable.

    A BatchNorm of which any leaf is trainable uses batch statistics. One that is frozen uses its
    running statistics and never updates them: otherwise a frozen network's function drifts, and
    differs between training and evaluation.

    Args:
      tree: parameters or BatchNorm statistics, of arrays or ``jax.ShapeDtypeStruct``.
      trainable: tree of booleans over the parameters, or a mask. May be left out where ``tree``
        is itself the tree of booleans.
      overrides: exceptions in order, the later ones winning: for each mask, or its expression,
        "running" or "batch" for the BatchNorms that it touches.

    Returns:
      The paths of the BatchNorms that use, and update, batch statistics.

    Raises:
      ValueError: a tree of booleans that is not this tree's, an override that touches no
        BatchNorm or has another value; all in one text.
      TypeError: ``trainable`` is neither booleans nor a mask.

    >>> params = {"bn1": {"scale": 0, "bias": 0}, "layer1": {"0": {"bn1": {"scale": 0}}}}
    >>> sorted(policy(params, "stage(1)"))
    ['layer1/0/bn1']
    >>> sorted(policy(params, "stage(1)", overrides={"everything()": "batch", "stem()": "running"}))
    ['layer1/0/bn1']

    References:
      S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
      Internal Covariate Shift", 2015.
    """
    found = modules(tree)
    moving = _trainable_paths(tree, found, trainable)
    batch = {module for module in found if any(path.startswith(f"{module}/") for path in moving)}
    problems = []
    for mask, wanted in (overrides or {}).items():
        if wanted not in ("running", "batch"):
            problems.append(f"{mask!r}: 'running' or 'batch', not {wanted!r}")
            continue
        try:
            touched = {p.rpartition("/")[0] for p in selected(mask, _leaves_of(found))}
        except ValueError as error:
            problems.append(f"{mask!r} touches no BatchNorm: {error}")
            continue
        batch = batch | touched if wanted == "batch" else batch - touched
    if problems:
        raise ValueError("overrides of the BatchNorm policy: " + "; ".join(problems))
    return frozenset(batch)


def check(norm: Norm, tree: Mapping[str, Any]) -> Norm:
    """Returns a policy that fits this tree, or raises.

    Args:
      norm: the policy.
      tree: parameters or BatchNorm statistics.

    Raises:
      ValueError: another word, or paths where there is no BatchNorm; all of them with the nearest.
      TypeError: neither a word nor a frozenset of paths.

    >>> check(frozenset({"bn2"}), {"bn1": {"mean": 0}})
    Traceback (most recent call last):
    ...
    ValueError: no BatchNorm at 'bn2'; did you mean 'bn1'?; the BatchNorms are bn1
    """
    if isinstance(norm, str):
        if norm in ("running", "batch"):
            return norm
        raise ValueError(
            f"norm is 'running', 'batch' or a frozenset of BatchNorm paths, not {norm!r}"
            + suggest(norm, ("running", "batch"))
        )
    if not isinstance(norm, frozenset):
        raise TypeError(
            "norm is 'running', 'batch' or a frozenset of BatchNorm paths (it is hashed), not a "
            f"{type(norm).__name__}"
        )
    found = modules(tree)
    unknown = sorted(str(path) for path in norm if path not in found)
    if unknown:
        problems = (f"no BatchNorm at {path!r}{suggest(path, found)}" for path in unknown)
        raise ValueError(f"{'; '.join(problems)}; the BatchNorms are {listing(found) or 'none'}")
    return norm


def mode(norm: Norm, module: str) -> Literal["running", "batch"]:
    """Which statistics the BatchNorm at this path uses.

    >>> mode(frozenset({"bn1"}), "bn1"), mode(frozenset({"bn1"}), "bn2"), mode("batch", "bn2")
    ('batch', 'running', 'batch')
    """
    if norm == "running" or norm == "batch":
        return norm
    return "batch" if module in norm else "running"


def _trainable_paths(
    tree: Mapping[str, Any],
    found: tuple[str, ...],
    trainable: Mapping[str, Any] | Mask | str | None,
) -> frozenset[str]:
    if isinstance(trainable, Mask | str):
        statistics = _is_statistics(tree)
        # On statistics a mask such as head() rightly selects nothing.
        where = _leaves_of(found) if statistics else tree
        return selected(as_mask(trainable), where, allow_empty=statistics)
    if trainable is not None and not isinstance(trainable, Mapping):
        raise TypeError(f"trainable is a tree of booleans or a mask, not {trainable!r}")
    booleans = flatten(tree if trainable is None else trainable)
    wrong = [path for path, value in booleans.items() if not isinstance(value, bool)]
    if wrong:
        raise TypeError(
            "trainable is a tree of booleans or a mask; it has other leaves: " + listing(wrong)
        )
    if _is_statistics(tree):
        modules_there = {path.rpartition("/")[0] for path in booleans}
        missing = [] if not found or modules_there & set(found) else list(found)
    else:
        missing = sorted(set(flatten(tree)) ^ set(booleans))
    if missing:
        raise ValueError("trainable is of another tree; they differ in " + listing(missing))
    return frozenset(path for path, value in booleans.items() if value)


def _is_statistics(tree: Mapping[str, Any]) -> bool:
    return all(path.rpartition("/")[2] in _STATISTICS for path in flatten(tree))


def _leaves_of(found: tuple[str, ...]) -> dict[str, Any]:
    """The tree of all leaves that these BatchNorms have in parameters and statistics together."""
    channels = jax.ShapeDtypeStruct((1,), "float32")
    names = (*_AFFINE, *_STATISTICS)
    return unflatten({f"{module}/{name}": channels for module in found for name in names})
