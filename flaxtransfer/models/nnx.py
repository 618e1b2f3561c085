"""NNX: pre-trained networks as modules, and masks and labels on the state of any module.

The variables of an NNX module by path, as the nested dicts that masks and labels take.

Masks and labels for NNX: what the gradient is taken of, and what the optimizer does.

NNX: a pre-trained network as an `nnx.Module`, and masks and labels on any module's state.

The paths are those of the nested dicts that the rest of flaxtransfer sees: the keys of a state,
joined by ``/``, where a position in a list is its number (``blocks/0/conv/kernel``).
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
from flaxtransfer.masks import Mask, as_mask, segment_or_empty, selected
from flaxtransfer.models.model import Model
from flaxtransfer.paths import flatten, listing, suggest, unflatten
from flaxtransfer.types import Variables
from flaxtransfer.weights.infer import differences

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


def variables(module: Any) -> Variables:
    """The parameters and BatchNorm statistics of any module, as nested dicts with string keys.

    What `label`, `resolve`, `table` and `Model.apply` take. Of a `ResNet` they are the variables
    that `flaxtransfer.save` writes. Random keys, caches and all else that a module may hold are
    left out; an abstract module (``nnx.eval_shape``) gives shapes.

    Args:
      module: an ``nnx.Module``, or a state with its variables, of gradients too.

    Returns:
      ``{"params": ..., "batch_stats": ...}``: the values of each ``nnx.Param`` and
      ``nnx.BatchStat``, not copied.

    Raises:
      TypeError: neither module nor state, a state without variables, or one of more than arrays.
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
            raise TypeError(f"each variable holds an array; these hold more: {listing(nested)}")
        found[collection] = unflatten(values)
    return found


def update(module: nnx.Module, variables: Variables) -> None:
    """Puts variables into a module that has them: the way back from ``variables``.

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
    problems = [f"{path} is not there{suggest(path, there)}" for path in given if path not in there]
    for path in given.keys() & there.keys():
        old, new = _kind(there[path][1].get_value()), _kind(given[path])
        problems += [f"{path} is {old} there, not {new}"] if old != new else []
    if problems:
        raise ValueError("these variables are not the module's: " + listing(problems))
    put(module, {there[path][0]: leaf for path, leaf in given.items()})


def put(module: nnx.Module, values: Mapping[tuple[Any, ...], Any]) -> None:
    """Sets variables of a module, by their keys; nothing is checked."""
    if values:
        nnx.update(module, nnx.from_flat_state({k: jnp.asarray(v) for k, v in values.items()}))


def as_dict(state: Any) -> tuple[dict[str, Any], Callable[[Mapping[str, Any]], Any]]:
    """The arrays of a state as a nested dict, and the function that makes a state of such a dict.

    ``nnx.Optimizer`` hands over variables at first and plain arrays later; both are taken.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(
        state, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    paths = [_path(tuple(jax.tree_util.keystr((key,), simple=True) for key in k)) for k, _ in flat]
    leaves = [leaf for _, leaf in flat]
    values = [leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf for leaf in leaves]

    def restored(tree: Mapping[str, Any]) -> Any:
        by_path = flatten(tree)
        new = [
            leaf.replace(by_path[path]) if isinstance(leaf, nnx.Variable) else by_path[path]
            for path, leaf in zip(paths, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, new)

    return unflatten(dict(zip(paths, values, strict=True))), restored


def _collected(module: Any) -> dict[str, dict[str, tuple[tuple[Any, ...], nnx.Variable]]]:
    """Keys and variable by path, of parameters and of BatchNorm statistics."""
    if not isinstance(module, nnx.State | nnx.Module):
        raise TypeError(f"an nnx.Module or nnx.State is needed, not {type(module).__name__}")
    state = module if isinstance(module, nnx.State) else nnx.state(module)
    found: dict[str, dict[str, Any]] = {"params": {}, "batch_stats": {}}
    bare = []
    # What is no variable, an array of constants say, is nothing that is trained or measured.
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
            "only its variables tell parameters from statistics, and this state holds arrays "
            f"instead: {listing(bare)}; give the module, or nnx.state of it"
        )
    return found


def _path(keys: tuple[Any, ...]) -> str:
    if not keys or any(not str(key) or "/" in str(key) for key in keys):
        raise ValueError(f"keys are joined to paths by '/'; {keys} have none that is unambiguous")
    return "/".join(map(str, keys))


def _kind(array: Any) -> str:
    return f"{jnp.result_type(array)}{list(jnp.shape(array))}"


@dataclass(frozen=True)
class Where:
    """An NNX filter that selects variables by path; made by ``where``.

    It is a value: equal ones compile once.

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
    """The filter for a module's parameters that a mask, or labels, say may move.

    For ``nnx.DiffState(0, filter)``, so that the gradient ends at what moves, and for
    ``nnx.Optimizer(..., wrt=filter)``, so that nothing else has a state. It is made for one module:
    inside another one the paths are longer.

    Args:
      which: a mask or its expression, a nested dict of booleans, or, with groups, of labels.
      module: any module or state, or an abstract one.
      groups: for each label its group; all that is not ``FROZEN`` is selected.

    Raises:
      ValueError: a mask that selects nothing, labels or booleans of another tree, groups that do
        not fit.
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
                f"a tree of booleans is needed, or labels with their groups; see {listing(wrong)}"
            )
        _check_same(flat, flatten(params), "these booleans or labels are of another module")
        paths = frozenset(path for path, value in flat.items() if value)
        if not paths:
            raise ValueError("nothing is selected: every leaf is False, or in a FROZEN group")
        return Where(paths)
    if groups is not None:
        raise TypeError("groups belong to labels; a mask selects without them")
    return Where(selected(as_mask(which), params))


def partition(
    groups: Mapping[str, Group | optax.GradientTransformation | Frozen],
    labels: Mapping[str, Any],
    *,
    clip: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`flaxtransfer.partition` for ``nnx.Optimizer``: on states in the place of nested dicts.

    Args:
      groups: for each label a ``Group``, any optax transformation, or ``FROZEN``.
      labels: from ``label(variables(module)["params"], ...)``.
      clip: largest global norm of the gradients of all trainable leaves together.

    Returns:
      A transformation for states of all labeled parameters (``wrt=nnx.Param``) or of those that
      move (``wrt=where(labels, module, groups)``).

    Raises:
      ValueError, TypeError: as `flaxtransfer.partition`; at ``init`` and ``update``, a state of
        other leaves.

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
    moving = optimizers.trainable(labels, labels, groups)
    part = optimizers.partition(groups, moving, clip=clip)
    every, some = frozenset(flatten(labels)), frozenset(flatten(moving))

    def fitting(tree: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
        there = frozenset(flatten(tree))
        if there == some:
            return part
        _check_same(
            there,
            every,
            "the optimizer's parameters are not the labeled ones; give wrt=nnx.Param, or "
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


class ResNet(nnx.Module):
    """A network of ours as an NNX module: called, put into other modules and trained as these are.

    Its state has the paths and, bit for bit, the numbers of the variables that it is made of;
    ``variables`` gives them back. It starts in the mode of ``eval()``, with running statistics;
    after ``train()`` BatchNorms follow the policy, and those that normalize by the batch update
    their ``nnx.BatchStat``.

    Args:
      model: as `flaxtransfer.transfer` or `flaxtransfer.resnet` return it.
      variables: its variables, which are copied. Whole segments may be absent, the head say, where
        only the others are run.
      policy: which BatchNorms use, and update, batch statistics in the mode of ``train()``; see
        `flaxtransfer.policy`. "batch" (all) is what NNX's own do.

    Raises:
      ValueError: variables that are not this model's, with the differences; a policy for BatchNorms
        that do not exist.

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
        # The name that `train()`, `eval()` and `nnx.view` know.
        self.use_running_average = True
        kinds = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
        leaves = {
            # A copy: whoever jits with donated arguments gives these buffers away.
            path: kind(jnp.array(leaf))
            for collection, kind in kinds.items()
            for path, leaf in flatten(variables[collection]).items()
        }
        for name, part in unflatten(leaves).items():
            setattr(self, name, _nested(part))

    def __call__(
        self, images: jax.Array, *, start: str | None = None, stop: str | None = None
    ) -> jax.Array:
        """The output of the network, or of a slice of its segments, as of `Model.apply`.

        Args:
          images: normalized, ``[batch, height, width, bands]``, or what ``start`` takes.
          start: first segment to run; None is the first of all.
          stop: segment before which to stop: "head" for features, "pool" for maps.

        Returns:
          Logits ``[batch, classes]``, or the output of the last segment that runs.

        Raises:
          TypeError, ValueError: as `Model.apply`: images or parameters of another shape say.
        """
        norm = "running" if self.use_running_average else self.policy
        before = variables(self)
        output, after = self.model.apply(before, images, norm=norm, start=start, stop=stop)
        old, new = flatten(before["batch_stats"]), flatten(after)
        put(self, {tuple(p.split("/")): new[p] for p in old if new[p] is not old[p]})
        return output

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Called by ``nnx.view``.

        Args:
          use_running_average: whether all BatchNorms use their running statistics.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


def train(module: nnx.Module, policy: batchnorm.Norm) -> None:
    """``module.train()``, but with batch statistics only where the policy has them.

    ``module.train()`` alone lets every BatchNorm normalize by the batch and update its running
    statistics, those of a frozen part too, whose function then drifts.

    Args:
      module: any module; its ``nnx.BatchNorm`` and each `ResNet` within are set.
      policy: as `flaxtransfer.policy` gives it on the module's ``variables``.

    Raises:
      ValueError: a policy for BatchNorms that do not exist, with the nearest.

    >>> layers = nnx.List([nnx.BatchNorm(3, rngs=nnx.Rngs(0)) for _ in range(2)])
    >>> train(layers, frozenset({"1"}))
    >>> layers[0].use_running_average, layers[1].use_running_average
    (True, False)
    """
    batchnorm.check(policy, variables(module)["batch_stats"])
    module.train()
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


def _nested(part: Any) -> Any:
    """Nested dicts as the containers that NNX knows, whose entries are attributes too."""
    if not isinstance(part, Mapping):
        return part
    return nnx.Dict({name: _nested(value) for name, value in part.items()})


def _check_variables(variables: Mapping[str, Any], abstract: Variables) -> None:
    """Raises unless these are all leaves of some of the segments."""
    if not isinstance(variables, Mapping) or set(variables) != set(abstract):
        given = listing(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(f"variables are {{'params': ..., 'batch_stats': ...}}, not {given}")
    leaves = flatten(variables)
    there = {segment_or_empty(path.partition("/")[2]) for path in leaves}
    wanted = {
        path: leaf.shape
        for path, leaf in flatten(abstract).items()
        if segment_or_empty(path.partition("/")[2]) in there
    }
    if problems := differences(leaves, wanted):
        raise ValueError(
            "these variables are not the model's:" + "".join(f"\n  {line}" for line in problems)
        )
