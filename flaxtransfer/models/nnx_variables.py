"""The variables of an NNX module by path, as the nested dicts that masks and labels take."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flaxtransfer.paths import flatten, listing, suggest, unflatten
from flaxtransfer.types import Variables

__all__ = ["as_dict", "put", "update", "variables"]


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
