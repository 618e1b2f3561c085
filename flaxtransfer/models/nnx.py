"""Flax NNX: a pre-trained network as an ``nnx.Module``, and masks and labels for any module.

Paths are the keys of a module's state, joined by ``/``, where a position in a list is its number
(``blocks/0/conv/kernel``): the paths of the nested dicts that the rest of flaxtransfer uses.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from flaxtransfer import batchnorm, optimizers
from flaxtransfer.groups import Frozen, Group, trainable_mask
from flaxtransfer.labels import ParamGroups
from flaxtransfer.masks import Mask, as_mask, selected
from flaxtransfer.models.layout import RESNET
from flaxtransfer.models.model import Model, shape_differences
from flaxtransfer.paths import Variables, flatten, listing, map_with_path, suggest, unflatten

__all__ = [
    "ResNet",
    "Where",
    "as_dict",
    "partition",
    "put",
    "train",
    "update",
    "variables",
    "where",
]


class ResNet(nnx.Module):
    """A ResNet as an NNX module, for use inside other modules and in NNX training loops.

    Its state has the paths and, bit for bit, the values of the given variables; ``variables``
    returns them. It starts in evaluation mode (``eval()``), with running statistics. After
    ``train()``, BatchNorms follow the policy, and those that normalize by the batch update their
    ``nnx.BatchStat``.

    Args:
        model: as returned by ``flaxtransfer.transfer`` or ``flaxtransfer.resnet``.
        variables: its variables, which are copied. Whole segments, such as the head, may be
            absent if only the others are run.
        policy: which BatchNorms use, and update, batch statistics in the mode of ``train()``; see
            ``flaxtransfer.policy``. "batch" (all) is the behavior of NNX's own BatchNorm.

    Raises:
        ValueError: variables of another model, with the differences, or a policy for unknown
            BatchNorms.

    >>> from flaxtransfer.models.config import ResNetConfig
    >>> model = Model(ResNetConfig(depths=(1, 1, 1, 1), width=2))
    >>> network = ResNet(model, model.init(jax.random.key(0)))
    >>> network(jnp.ones((1, 32, 32, 3)), stop="layer1").shape, network.layer4["0"].bn2.var.shape
    ((1, 8, 8, 2), (16,))
    """

    def __init__(
        self, model: Model, variables: Variables, *, policy: batchnorm.Norm = "batch"
    ) -> None:
        abstract = model.abstract()
        _check_variables(variables, abstract)
        self.model = model
        self.policy = batchnorm.check(policy, abstract["batch_stats"])
        # `train()`, `eval()` and `nnx.view` set the attribute of this name.
        self.use_running_average = True
        kinds = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
        leaves = {
            # A copy, because jit with donated arguments invalidates the buffers.
            path: kind(jnp.array(leaf))
            for collection, kind in kinds.items()
            for path, leaf in flatten(variables[collection]).items()
        }
        for name, part in unflatten(leaves).items():
            setattr(self, name, _nested(part))

    def __call__(
        self, images: jax.Array, *, start: str | None = None, stop: str | None = None
    ) -> jax.Array:
        """Runs the network, or a slice of its segments, as ``Model.apply`` does.

        Args:
            images: normalized, ``[batch, height, width, bands]``, or the input of ``start``.
            start: first segment to run; None starts at the first one.
            stop: segment before which to stop: "head" for features, "pool" for maps.

        Returns:
            Logits ``[batch, classes]``, or the output of the last segment that was run.

        Raises:
            TypeError, ValueError: as ``Model.apply``, for example images of another shape.
        """
        norm = "running" if self.use_running_average else self.policy
        before = variables(self)
        output, after = self.model.apply(before, images, norm=norm, start=start, stop=stop)
        old, new = flatten(before["batch_stats"]), flatten(after)
        put(self, {tuple(p.split("/")): new[p] for p in old if new[p] is not old[p]})
        return output

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Sets the mode; called by ``nnx.view``.

        Args:
            use_running_average: whether all BatchNorms use their running statistics.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


def train(module: nnx.Module, policy: batchnorm.Norm) -> None:
    """Sets training mode, with batch statistics only for the BatchNorms in the policy.

    ``module.train()`` alone makes every BatchNorm normalize by the batch and update its running
    statistics, including those in frozen parts, whose function then drifts.

    Args:
        module: any module; every ``nnx.BatchNorm`` and ``ResNet`` in it is set.
        policy: the result of ``flaxtransfer.policy`` for the module's ``variables``.

    Raises:
        ValueError: a policy for unknown BatchNorms, with the nearest path.

    >>> layers = nnx.List([nnx.BatchNorm(3, rngs=nnx.Rngs(0)) for _ in range(2)])
    >>> train(layers, frozenset({"1"}))
    >>> layers[0].use_running_average, layers[1].use_running_average
    (True, False)
    """
    batchnorm.check(policy, variables(module)["batch_stats"])
    module.train()  # type: ignore[no-untyped-call]
    for keys, part in nnx.iter_modules(module):
        path = "/".join(map(str, keys))
        if isinstance(part, nnx.BatchNorm):
            part.use_running_average = batchnorm.mode(policy, path) == "running"
        elif isinstance(part, ResNet):
            inside = f"{path}/" if path else ""
            part.policy = (
                policy
                if isinstance(policy, str)
                else frozenset(p.removeprefix(inside) for p in policy if p.startswith(inside))
            )


def variables(module: Any) -> Variables:
    """The parameters and BatchNorm statistics of any module, as nested dicts with string keys.

    ``label``, ``parameter_table`` and ``Model.apply`` take them. For a ``ResNet`` they are the
    variables that ``flaxtransfer.save`` writes. Random keys, caches and other state are omitted; an
    abstract module (``nnx.eval_shape``) gives shapes.

    Args:
        module: an ``nnx.Module``, or a state with its variables or gradients.

    Returns:
        ``{"params": ..., "batch_stats": ...}``: the values of each ``nnx.Param`` and
        ``nnx.BatchStat``, not copied.

    Raises:
        TypeError: neither module nor state, a state without variables, or variables that hold
            other things than arrays.
        ValueError: keys that make paths ambiguous.

    >>> layers = nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0))])
    >>> sorted(flatten(variables(layers)))  # doctest: +NORMALIZE_WHITESPACE
    ['batch_stats/1/mean', 'batch_stats/1/var', 'params/0/bias', 'params/0/kernel',
     'params/1/bias', 'params/1/scale']
    """
    found: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for collection, of_kind in _collected(module).items():
        values = {path: variable.get_value() for path, (_, variable) in of_kind.items()}
        nested = [path for path, value in values.items() if not hasattr(value, "shape")]
        if nested:
            raise TypeError(
                f"each variable must hold one array; these hold more: {listing(nested)}"
            )
        found[collection] = unflatten(values)
    return found


def update(module: nnx.Module, variables: Variables) -> None:
    """Writes variables into a module: the inverse of ``variables``.

    Args:
        module: is changed in place.
        variables: nested dicts; leaves that are not mentioned stay as they are.

    Raises:
        ValueError: leaves that the module does not have, or has in another shape or dtype; all in
            one text.

    >>> layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> update(layer, {"params": {"bias": jnp.ones(3)}})
    >>> layer.bias[...].tolist()
    [1.0, 1.0, 1.0]
    """
    there = {
        f"{collection}/{path}": (keys, variable)
        for collection, of_kind in _collected(module).items()
        for path, (keys, variable) in of_kind.items()
    }
    given = flatten(variables)
    problems = [f"unknown {path}{suggest(path, there)}" for path in given if path not in there]
    for path in given.keys() & there.keys():
        old, new = _kind(there[path][1].get_value()), _kind(given[path])
        problems += [f"{path} must be {old}, got {new}"] if old != new else []
    if problems:
        raise ValueError("the variables do not fit the module: " + listing(problems))
    put(module, {there[path][0]: leaf for path, leaf in given.items()})


def put(module: nnx.Module, values: Mapping[tuple[Any, ...], Any]) -> None:
    """Sets variables of a module by their keys, without checks."""
    if values:
        nnx.update(module, nnx.from_flat_state({k: jnp.asarray(v) for k, v in values.items()}))


def as_dict(state: Any) -> tuple[dict[str, Any], Callable[[Mapping[str, Any]], Any]]:
    """The arrays of a state as a nested dict, and a function that converts such a dict back.

    ``nnx.Optimizer`` passes variables at first and plain arrays later; both are accepted.
    """

    def restored(tree: Mapping[str, Any]) -> Any:
        by_path = flatten(tree)
        return map_with_path(lambda path, leaf: by_path[path], state)

    return unflatten(flatten(state)), restored


def _collected(module: Any) -> dict[str, dict[str, tuple[tuple[Any, ...], nnx.Variable[Any]]]]:
    """Keys and variable by path, of parameters and BatchNorm statistics."""
    if not isinstance(module, nnx.State | nnx.Module):
        raise TypeError(f"module must be an nnx.Module or nnx.State, got {type(module).__name__}")
    state = module if isinstance(module, nnx.State) else nnx.state(module)
    found: dict[str, dict[str, Any]] = {"params": {}, "batch_stats": {}}
    bare = []
    # Leaves that are not variables, such as constant arrays, are neither trained nor measured.
    for keys, variable in (flat := nnx.to_flat_state(state)):
        path = _path(keys)
        if isinstance(variable, nnx.Param | nnx.BatchStat):
            of_kind = found["params" if isinstance(variable, nnx.Param) else "batch_stats"]
            if path in of_kind:
                raise ValueError(
                    f"two variables have the path {path!r}: {of_kind[path][0]}, {keys}"
                )
            of_kind[path] = (keys, variable)
        elif not isinstance(variable, nnx.Variable):
            bare.append(path)
    if bare and len(bare) == len(flat):
        raise TypeError(
            "a state must hold variables, which separate parameters from statistics, but this one "
            f"holds arrays instead: {listing(bare)}; give the module, or nnx.state of it"
        )
    return found


def _path(keys: tuple[Any, ...]) -> str:
    if not keys or any(not str(key) or "/" in str(key) for key in keys):
        raise ValueError(
            f"keys must not be empty or contain '/', which joins them to paths, got {keys}"
        )
    return "/".join(map(str, keys))


def _kind(array: Any) -> str:
    return f"{jnp.result_type(array)}{list(jnp.shape(array))}"


@dataclass(frozen=True)
class Where:
    """An NNX filter that selects variables by path; the result of ``where``.

    It is a value: equal filters compile once.

    >>> Where(frozenset({"blocks/0/kernel"}))(("blocks", 0, "kernel"), None)
    True
    """

    paths: frozenset[str] = field(repr=False)

    def __call__(self, path: tuple[Any, ...], value: Any) -> bool:
        del value
        return "/".join(map(str, path)) in self.paths


def where(
    which: Mask | str | Mapping[str, Any], module: Any, groups: Mapping[str, Any] | None = None
) -> Where:
    """The NNX filter for the trainable parameters of a module, by mask or labels.

    Use it for ``nnx.DiffState(0, filter)``, so that only trainable parameters have gradients, and
    for ``nnx.Optimizer(..., wrt=filter)``, so that only they have optimizer state. It fits one
    module: inside another module the paths are longer.

    Args:
        which: a mask, a mask expression, a nested dict of booleans, or (with ``groups``) of labels.
        module: any module or state, or an abstract one.
        groups: the group of each label; everything that is not ``FROZEN`` is selected.

    Raises:
        ValueError: a mask that selects nothing, labels or booleans of another tree, or groups that
            do not fit the labels.
        TypeError: labels without groups.

    >>> from flax import nnx
    >>> layers = nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 1, rngs=nnx.Rngs(0))])
    >>> nnx.to_flat_state(nnx.state(layers, where("glob('1/*')", layers))).paths
    ((1, 'bias'), (1, 'kernel'))
    """
    params = variables(module)["params"]
    if isinstance(which, Mapping):
        flat = flatten(which if groups is None else trainable_mask(which, groups))
        if wrong := [path for path, value in flat.items() if not isinstance(value, bool)]:
            raise TypeError(
                f"which must be a tree of booleans, or labels with their groups; see "
                f"{listing(wrong)}"
            )
        _check_same(flat, flatten(params), "these booleans or labels belong to another module")
        paths = frozenset(path for path, value in flat.items() if value)
        if not paths:
            raise ValueError("nothing is selected: every leaf is False, or in a FROZEN group")
        return Where(paths)
    if groups is not None:
        raise TypeError("groups require labels; a mask does not use them")
    return Where(selected(as_mask(which), params))


def partition(
    groups: Mapping[str, Group | optax.GradientTransformation | Frozen],
    labels: Mapping[str, Any],
    *,
    clip: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``flaxtransfer.partition`` for ``nnx.Optimizer``: for states instead of nested dicts.

    Args:
        groups: a ``Group``, an optax transformation, or ``FROZEN`` per label.
        labels: from ``label(variables(module)["params"], ...)``.
        clip: maximum global norm of the gradients of all trainable leaves.

    Returns:
        A transformation for states of all labeled parameters (``wrt=nnx.Param``) or only of the
        trainable ones (``wrt=where(labels, module, groups)``).

    Raises:
        ValueError, TypeError: as ``flaxtransfer.partition``; at ``init`` and ``update``, a state
            with other leaves.

    >>> from flax import nnx
    >>> layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> groups = {"new": optax.sgd(1.0), "old": optimizers.FROZEN}
    >>> labels = {"kernel": "old", "bias": "new"}
    >>> optimizer = nnx.Optimizer(layer, partition(groups, labels), wrt=nnx.Param)
    >>> before = variables(layer)["params"]
    >>> gradients = nnx.grad(lambda layer: layer(before["kernel"][:1, :2]).sum())(layer)
    >>> _ = optimizer.update(layer, gradients)
    >>> layer.bias[...].tolist(), bool((layer.kernel[...] == before["kernel"]).all())
    ([-1.0, -1.0, -1.0], True)
    """
    whole = optimizers.partition(groups, labels, clip=clip)
    bound = ParamGroups(labels, groups)
    moving = bound.trainable(labels)
    part = bound.optimizer(clip)
    all_paths, trained_paths = frozenset(flatten(labels)), frozenset(flatten(moving))

    def fitting(tree: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
        there = frozenset(flatten(tree))
        if there == trained_paths:
            return part
        _check_same(
            there,
            all_paths,
            "the optimizer's parameters must be the labeled ones; give wrt=nnx.Param, or "
            "wrt=where(labels, module, groups)",
        )
        return whole

    def init(params: Any) -> optax.OptState:
        tree, _ = as_dict(params)
        return fitting(tree).init(tree)

    def update(
        updates: Any, state: optax.OptState, params: Any = None, **extra: Any
    ) -> tuple[Any, optax.OptState]:
        tree, restored = as_dict(updates)
        values = None if params is None else as_dict(params)[0]
        updated, state = fitting(tree).update(tree, state, values, **extra)
        return restored(updated), state

    return optax.GradientTransformationExtraArgs(init, update)


def _check_same(there: Iterable[str], wanted: Iterable[str], text: str) -> None:
    """Raises unless both have the same paths."""
    there, wanted = set(there), set(wanted)
    problems = [f"unknown: {listing(sorted(there - wanted))}"] if there - wanted else []
    problems += [f"missing: {listing(sorted(wanted - there))}"] if wanted - there else []
    if problems:
        raise ValueError(f"{text}; {'; '.join(problems)}")


def _nested(part: Any) -> Any:
    """Converts nested dicts to ``nnx.Dict``, whose entries are also attributes."""
    if not isinstance(part, Mapping):
        return part
    return nnx.Dict({name: _nested(value) for name, value in part.items()})


def _check_variables(variables: Mapping[str, Any], abstract: Variables) -> None:
    """Raises unless these are all the leaves of some segments."""
    if not isinstance(variables, Mapping) or set(variables) != set(abstract):
        given = listing(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(f"variables must be {{'params': ..., 'batch_stats': ...}}, got {given}")
    leaves = flatten(variables)
    there = {RESNET.segment(path.partition("/")[2]) for path in leaves}
    wanted = {
        path: leaf.shape
        for path, leaf in flatten(abstract).items()
        if RESNET.segment(path.partition("/")[2]) in there
    }
    if problems := shape_differences(leaves, wanted):
        raise ValueError(
            "the variables do not fit the model:" + "".join(f"\n  {line}" for line in problems)
        )
