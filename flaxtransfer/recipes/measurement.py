"""What recipes measure on the training images before they decide."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from flaxtransfer.analysis.curvature import (
    curvature_by_part,
    fisher_diagonal,
    mean_gradient,
    relative_gradient_norms,
)
from flaxtransfer.analysis.profile import probe_profile
from flaxtransfer.classifier import Classifier
from flaxtransfer.data.loader import Batch
from flaxtransfer.distributed import check_alone
from flaxtransfer.features.inputs import segment_features
from flaxtransfer.paths import Params
from flaxtransfer.recipes.catalog import RECIPES
from flaxtransfer.recipes.parts import units
from flaxtransfer.task import for_classes
from flaxtransfer.training.evaluation import init_head_from_probe
from flaxtransfer.weights.preprocessing import normalize

MOST_IMAGES = 512
"""More images than that are not looked at: each costs a backward pass of its own."""

MOST_IMAGES_FOR_DEPTH = 5000
"""The same where an image costs a forward pass alone."""

MEASURED = tuple(
    name
    for name, function in RECIPES.items()
    if {"curvature", "gradients", "segment"} & set(inspect.signature(function).parameters)
)
"""The recipes that measure, or can."""


@dataclass(frozen=True)
class Measurement:
    """A measurement.

    Args:
        settings: arguments of the recipe, rounded to what is printed, so that a run that is resumed
            elsewhere measures the same.
        text: the same as a table.
        pooled: features ``[examples, channels]`` of the segment that was chosen, and the labels,
            for whoever would run the network for them again; None where no segment is chosen.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    pooled: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False, compare=False)


def most_images(strategy: str) -> int:
    """How many images a strategy looks at."""
    return MOST_IMAGES_FOR_DEPTH if strategy == "depth_head" else MOST_IMAGES


def measure(
    strategy: str,
    network: Classifier,
    batches: Iterable[Batch],
    examples: int,
    groups: Sequence[Any] | None = None,
) -> Measurement:
    """Measures what a recipe asks for.

    Gradients are those with a linear probe as the head: below a new head that is zero nothing
    pulls.

    Args:
        strategy: one of MEASURED.
        network: pre-trained.
        batches: of the training images, without augmentation; see ``most_images``.
        examples: training images there are in all.
        groups: of the images in the batches, such as patients; a depth is judged with each held out
            as a whole.

    Raises:
        ValueError: a class without examples, gradients that are not finite; a curvature in several
            processes.
    """
    if strategy == "depth_head":
        return _best_depth(network, batches, groups)
    for_classes(network.task, f"what the strategy {strategy} measures")
    if strategy == "curvature_scaled":
        check_alone("the measurement of curvature_scaled")
    batches = list(batches)
    params, text = init_head_from_probe(network, batches)
    probed = network.with_variables({**network.variables, "params": params})
    lines = [f"measured with {text}:"]
    if strategy == "curvature_scaled":
        fisher, count = fisher_diagonal(_logits(network), params, _images(batches))
        found = curvature_by_part(fisher, units(params), count)
        means = {name: _rounded(value) for name, value in found.means().items()}
        return Measurement(
            {"curvature": means, "examples": examples}, "\n".join([*lines, str(found)])
        )
    gradient = mean_gradient(probed, batches)
    norms = relative_gradient_norms(params, gradient, units(params))
    rounded = {name: _rounded(value) for name, value in norms.items()}
    lines.append(f"{'part':<10} {'gradient / weights':>18}")
    lines += [f"{name:<10} {value:>18.3g}" for name, value in rounded.items()]
    return Measurement({"gradients": rounded}, "\n".join(lines))


def _best_depth(
    network: Classifier, batches: Iterable[Batch], groups: Sequence[Any] | None
) -> Measurement:
    """The segment whose features know most, by cross-validation of a solved head on each."""
    segments = network.model.segments
    depths = segments[segments.index("stem") : segments.index("pool")]
    features, labels = segment_features(network, batches, depths)
    profile = probe_profile(
        features,
        labels,
        classes=network.model.config.classes,
        task=network.task,
        groups=groups,
    )
    best = profile.best.segment
    return Measurement({"segment": best}, str(profile), (features[best], labels))


def _logits(network: Classifier) -> Any:
    mean, std = network.preprocessing.mean, network.preprocessing.std

    def logits(params: Params, images: Any) -> jax.Array:
        variables = {**network.variables, "params": params}
        return network.model.apply(variables, normalize(images, mean, std), norm="running")[0]

    return logits


def _images(batches: Iterable[Batch]) -> Iterable[np.ndarray]:
    for batch in batches:
        yield batch["image"][np.asarray(batch.get("weight", np.ones(len(batch["label"])))) > 0]


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
