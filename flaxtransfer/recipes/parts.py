"""What recipes are made of, and what they measure before they decide.

The registry, an optimizer with its schedule, and a network's parts; measurements on the training
images, which a recipe takes as arguments.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec

import jax
import numpy as np
import optax

from flaxtransfer.analysis.curvature import (
    curvature_by_part,
    fisher_diagonal,
    mean_gradient,
    relative_gradient_norms,
)
from flaxtransfer.analysis.profile import greedy_depths, probe_profile
from flaxtransfer.classifier import Classifier
from flaxtransfer.data.loader import Batch
from flaxtransfer.distributed import check_alone
from flaxtransfer.features.inputs import segment_features
from flaxtransfer.groups import FROZEN, Frozen, Group, WarmupCosine
from flaxtransfer.labels import Rest, rest
from flaxtransfer.masks import Mask, adapter, as_mask, glob, head, selected, stage, stem
from flaxtransfer.models.layout import By
from flaxtransfer.optimizers import by_parts, scaled
from flaxtransfer.paths import Params, listing, suggest
from flaxtransfer.task import for_classes
from flaxtransfer.training.evaluation import init_head_from_probe
from flaxtransfer.training.plan import Phase, Plan
from flaxtransfer.weights.preprocessing import normalize

__all__ = [
    "MEASURED",
    "MOST_IMAGES",
    "RECIPES",
    "Groups",
    "Labels",
    "Measurement",
    "adamw",
    "below_head",
    "check_decay",
    "check_measured",
    "chosen_part",
    "curvature_rates",
    "fresh",
    "head_and_backbone",
    "measure",
    "measured_below_head",
    "most_images",
    "one_phase",
    "recipe",
    "scaled_groups",
    "units",
]


RECIPES: dict[str, Callable[..., Plan]] = {}
"""The recipes by name, those that move least first."""

MEASURED: list[str] = []
"""Those that measure, or can."""

_MEASUREMENTS = ("curvature", "gradients", "segment", "segments")
"""The arguments that are measured."""

_ARGUMENTS = {
    "params": "Parameters or their shapes.",
    "by": '"segment" or "block": the size of the parts of the network.',
    "steps": "Optimizer steps.",
    "learning_rate": "Peak rate of everything but the head.",
    "head_learning_rate": "Peak rate of the head.",
    "weight_decay": "Decoupled, on kernels.",
    "patience": "Evaluations without improvement that end a phase; needs a validation set.",
}
"""What the arguments mean where a recipe does not say otherwise."""

P = ParamSpec("P")
Labels = dict[str, Mask | Rest]
Groups = dict[str, Group | Frozen]


def recipe(function: Callable[P, Plan]) -> Callable[P, Plan]:
    """Adds a function to ``RECIPES``, and to its docstring the arguments that recipes share."""
    RECIPES[function.__name__] = function
    if set(_MEASUREMENTS) & set(inspect.signature(function).parameters):
        MEASURED.append(function.__name__)
    text = inspect.getdoc(function) or ""
    if "Args:" not in text:
        text = text.replace("References:", "Args:\n\nReferences:")
    before, _, after = text.partition("Args:")
    block, _, sections = after.partition("\n\n")
    own = {found[1]: found[0] for found in re.finditer(r"\n {4}(\w+): .*(\n {8}.*)*", block)}
    names = inspect.signature(function).parameters
    entries = [own.get(name, f"\n    {name}: {_ARGUMENTS.get(name, '')}") for name in names]
    function.__doc__ = f"{before}Args:{''.join(entries)}\n\n{sections}"
    return function


def head_and_backbone(
    params: Params, on_head: Group, on_backbone: Group | Frozen
) -> tuple[Labels, Groups]:
    return {"head": fresh(params), "backbone": rest()}, {"head": on_head, "backbone": on_backbone}


def one_phase(
    labels: Mapping[str, Mask | Rest],
    groups: Mapping[str, Group | Frozen],
    steps: int,
    patience: int | None,
    name: str = "fine-tune",
    **settings: Any,
) -> Plan:
    """A plan of one phase, which clips the gradient unless told otherwise."""
    options = {"clip": 1.0, "patience": patience, **settings}
    return Plan([Phase(labels, groups, steps=steps, name=name, **options)])


def adamw(peak: float, weight_decay: float) -> Group:
    """AdamW that warms up for a tenth of its phase and follows a cosine to 0."""
    return Group(optax.adamw, WarmupCosine(peak), weight_decay=weight_decay)


def fresh(params: Params) -> Mask:
    """What no pre-training has seen: the head, and the input adapter where there is one."""
    return head() | adapter() if selected(adapter(), params, allow_empty=True) else head()


def units(params: Params, by: By = "segment") -> dict[str, Mask]:
    """The parts of a network from the input to the output, the head last, each with its mask.

    An input adapter is as new as the head, and belongs to that part.

    Raises:
        ValueError: Leaves of no known family, or another ``by``.
    """
    layout, order = by_parts(params, by)
    masks: dict[str, Mask] = {}
    for part in order:
        number = layout.stage_number(part)
        if number is not None:
            masks[part] = stage(number)
        elif part not in ("adapter", "head"):
            masks[part] = stem() if part == "stem" else glob(f"{part}/**")
    return masks | {"head": fresh(params)}


def below_head(parts: Mapping[str, Mask]) -> list[str]:
    """The names of all parts but the head, from the input to the output."""
    return [name for name in parts if name != "head"]


def curvature_rates(
    curvature: Mapping[str, float], examples: int, prior_precision: float | None = None
) -> dict[str, float]:
    """The factors of ``curvature_scaled``, the largest of which is 1.

    >>> curvature_rates({"encoder": 8.0, "decoder": 0.0}, examples=1, prior_precision=1.0)
    {'encoder': 0.3333333333333333, 'decoder': 1.0}
    """
    if examples < 1:
        raise ValueError(f"examples must be >= 1, got {examples}")
    sums = {name: examples * value for name, value in curvature.items()}
    if bad := {name: curvature[name] for name, value in sums.items() if not 0 <= value < np.inf}:
        raise ValueError(f"curvature must be finite and >= 0, got {bad}")
    if prior_precision is None:
        positive = [value for value in sums.values() if value > 0]
        prior_precision = float(np.exp(np.mean(np.log(positive)))) if positive else 1.0
    if not prior_precision > 0:
        raise ValueError(f"prior_precision must be > 0, got {prior_precision}")
    precision = {name: value + prior_precision for name, value in sums.items()}
    widest = min(precision.values())
    return {name: float(np.sqrt(widest / value)) for name, value in precision.items()}


def check_decay(decay: float) -> None:
    """Refuses a decay outside (0, 1]."""
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be a factor in (0, 1], got {decay!r}")


def check_measured(measured: Mapping[str, float], argument: str) -> None:
    """Refuses what no measurement can be, before it decides which leaves move.

    Comparisons with NaN are all false: unchecked, it would freeze a part or choose one by its
    place in the order, without a word.
    """
    values = list(measured.values())
    if not all(0 <= value < np.inf for value in values) or not any(values):
        raise ValueError(
            f"{argument} must be finite, not negative and not all 0, got {dict(measured)}"
        )


def measured_below_head(
    parts: Mapping[str, Mask], measured: Mapping[str, float], argument: str
) -> dict[str, float]:
    """The measurements of all parts but the head, whose own is of no use here."""
    body = below_head(parts)
    missing = [name for name in body if name not in measured]
    foreign = [name for name in measured if name not in parts]
    problems = [f"{argument} lack {listing(missing)}"] if missing else []
    problems += [f"there is no part {name!r}{suggest(name, body)}" for name in foreign]
    if problems:
        raise ValueError(f"{'; '.join(problems)}; the parts are {', '.join(body)}")
    return {name: float(measured[name]) for name in body}


def scaled_groups(
    parts: Mapping[str, Mask],
    rates: Mapping[str, float],
    learning_rate: float,
    head_learning_rate: float,
    weight_decay: float,
) -> dict[str, Group | Frozen]:
    """The head at its own rate, each other part at a share of one rate."""
    top = adamw(learning_rate, weight_decay)
    body = {
        name: replace(top, learning_rate=scaled(top.learning_rate, rates[name]))
        # A part that does not move at all is frozen, statistics included.
        if rates[name] > 0
        else FROZEN
        for name in below_head(parts)
    }
    return body | {"head": adamw(head_learning_rate, weight_decay)}


def chosen_part(
    params: Params, part: Mask | str | None, gradients: Mapping[str, float] | None, by: By
) -> Mask:
    """The part that is named, or that has the largest gradient for its weights.

    Raises:
        ValueError: Both are given, or gradients of a part that there is not.
    """
    if gradients is None:
        return as_mask("stem() | stage(1)" if part is None else part)
    if part is not None:
        raise ValueError(f"give a part or gradients that choose one, not both: {part!r}")
    parts = units(params, by)
    body = {name: value for name, value in gradients.items() if name != "head"}
    unknown = [name for name in body if name not in parts]
    if unknown or not body:
        raise ValueError(
            f"gradients must be of parts of the network, got {unknown or 'empty'}; there are "
            f"{', '.join(below_head(parts))}"
        )
    check_measured(body, "gradients")
    return parts[max(body, key=lambda name: body[name])]


MOST_IMAGES = 512
"""More images than that are not looked at: each costs a backward pass of its own."""

MOST_IMAGES_FOR_DEPTH = 5000
"""The same where an image costs a forward pass alone."""

_OF_DEPTHS = ("depth_head", "depths_head")


@dataclass(frozen=True)
class Measurement:
    """A measurement.

    Args:
        settings: arguments of the recipe, rounded to what is printed, so that a run that is resumed
            elsewhere measures the same.
        text: the same as a table.
        pooled: features ``[examples, channels]`` of the segments that were chosen, and the labels,
            for whoever would run the network for them again; None where no segment is chosen.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    pooled: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False, compare=False)


def most_images(strategy: str) -> int:
    """How many images a strategy looks at."""
    return MOST_IMAGES_FOR_DEPTH if strategy in _OF_DEPTHS else MOST_IMAGES


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
        strategy: one of ``MEASURED``.
        network: pre-trained.
        batches: of the training images, without augmentation; see ``most_images``.
        examples: training images there are in all.
        groups: of the images in the batches, such as patients; a depth is judged with each held out
            as a whole.

    Raises:
        ValueError: a class without examples, gradients that are not finite; a curvature in several
            processes.
    """
    if strategy in _OF_DEPTHS:
        return _best_depths(network, batches, groups, several=strategy == "depths_head")
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


def _best_depths(
    network: Classifier, batches: Iterable[Batch], groups: Sequence[Any] | None, *, several: bool
) -> Measurement:
    """The segment whose features know most, by cross-validation of a solved head on each.

    Args:
        network: pre-trained.
        batches: of the training images.
        groups: of the images.
        several: whether others are added that know what it does not.
    """
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
    if not several:
        return Measurement({"segment": best}, str(profile), (features[best], labels))
    added = greedy_depths(features, labels, task=network.task, groups=groups, first=best)
    chosen = [name for name in depths if name in added.segments]
    matrix = np.concatenate([features[name] for name in chosen], axis=1)
    return Measurement({"segments": chosen}, f"{profile}\n{added}", (matrix, labels))


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
