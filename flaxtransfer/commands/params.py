"""``flaxtransfer params``: what would move, how fast, before a single array exists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import optax
from rich.console import Console

from flaxtransfer.batchnorm import policy
from flaxtransfer.labels import label, rest
from flaxtransfer.masks import parse
from flaxtransfer.models.registry import ARCHITECTURES, resnet
from flaxtransfer.optimizers import FROZEN, Frozen, Group, layerwise_decay, trainable_mask
from flaxtransfer.overview import parameter_table
from flaxtransfer.paths import suggest


@dataclass(frozen=True)
class Params:
    """Print every parameter of a network with its label, learning rate, decay and BatchNorm mode.

    Nothing is allocated: the table comes from shapes alone. Example:
    flaxtransfer params --model resnet50 --rules "new=head()" "late=stage(4) - batch_norm()"
    "frozen=rest()" --rates new=1e-3 late=1e-4

    Args:
      model: architecture, such as resnet18 or resnet50.
      width: channels of the stem; by default the architecture's 64.
      classes: outputs of the head.
      rules: name=mask, one or more; each leaf must fall under exactly one. A mask is an expression
        of stem() stage(3) stages(3, 4) head() adapter() batch_norm() kernels() biases() matrices()
        up_to("layer2") glob("layer4/*/conv?/kernel") everything() with & | ~ -; rest() takes what
        no other rule does.
      rates: name=learning rate; names without one are frozen.
      weight_decay: of all groups that train; on leaves with two or more dimensions.
      layerwise_decay: instead of rules: this factor a segment from the head down, from
        --rates all=<rate> or 1e-3.
    """

    model: str = "resnet18"
    width: int | None = None
    classes: int = 1000
    rules: tuple[str, ...] = ("head=head()", "frozen=rest()")
    rates: tuple[str, ...] = ("head=1e-3",)
    weight_decay: float = 0.0
    layerwise_decay: float | None = None


def params(options: Params, console: Console) -> None:
    """Runs ``flaxtransfer params``."""
    if options.model not in ARCHITECTURES:
        raise ValueError(
            f"unknown model {options.model!r}{suggest(options.model, list(ARCHITECTURES))}; "
            f"known: {', '.join(ARCHITECTURES)}"
        )
    config = replace(ARCHITECTURES[options.model], classes=options.classes)
    if options.width is not None:
        config = replace(config, width=options.width)
    variables = resnet(config).abstract()
    labels, groups = _labels_and_groups(options, variables["params"])
    norm = policy(variables["params"], trainable_mask(labels, groups))
    console.print(parameter_table(variables, labels, groups, norm))


def _labels_and_groups(
    options: Params, parameters: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Group | Frozen]]:
    rates = {name: _number(name, value) for name, value in map(_pair, options.rates)}
    if options.layerwise_decay is not None:
        group = Group(optax.adamw, rates.get("all", 1e-3), options.weight_decay)
        return layerwise_decay(parameters, group, options.layerwise_decay)
    rules = dict(map(_pair, options.rules))
    unknown = [f"{name!r}{suggest(name, list(rules))}" for name in rates if name not in rules]
    if unknown:
        raise ValueError(
            f"rates for names without a rule: {', '.join(unknown)}; rules: {', '.join(rules)}"
        )
    masks = {name: rest() if text == "rest()" else parse(text) for name, text in rules.items()}
    groups = {
        name: Group(optax.adamw, rates[name], options.weight_decay) if name in rates else FROZEN
        for name in rules
    }
    return label(parameters, masks), groups


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise ValueError(f"{text!r} is not of the form name=value")
    return name.strip(), value.strip()


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"the rate of {name!r} is no number: {text!r}") from error
