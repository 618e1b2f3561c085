"""NNX: a pre-trained network as an `nnx.Module`, and masks and labels on any module's state.

The paths are those of the nested dicts that the rest of flaxtransfer sees: the keys of a state,
joined by ``/``, where a position in a list is its number (``blocks/0/conv/kernel``).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flaxtransfer import batchnorm
from flaxtransfer.models.model import Model
from flaxtransfer.models.nnx_optimizer import Where, partition, where
from flaxtransfer.models.nnx_variables import put, update, variables
from flaxtransfer.paths import flatten, listing, unflatten
from flaxtransfer.predicates import segment_or_empty
from flaxtransfer.types import Variables
from flaxtransfer.weights.architecture import differences

__all__ = ["ResNet", "Where", "partition", "train", "update", "variables", "where"]


class ResNet(nnx.Module):
    """A network of ours as an NNX module: called, put into other modules and trained as these are.

    Its state has the paths and, bit for bit, the numbers of the variables that it is made of;
    ``variables`` gives them back. It starts in the mode of ``eval()``, with running statistics;
    after ``train()`` BatchNorms follow the policy, and those that normalise by the batch update
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

    >>> from flaxtransfer.architectures import ResNetConfig
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
          images: normalised, ``[batch, height, width, bands]``, or what ``start`` takes.
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

    ``module.train()`` alone lets every BatchNorm normalise by the batch and update its running
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
