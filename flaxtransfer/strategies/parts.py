"""What the recipes are made of: an optimizer with its schedule, and the parts of a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import optax

from flaxtransfer.groups import Group
from flaxtransfer.masks import Mask, adapter, glob, head, stage, stem
from flaxtransfer.paths import flatten, listing, segment_of, segment_position
from flaxtransfer.predicates import segment_or_empty
from flaxtransfer.schedules import WarmupCosine
from flaxtransfer.types import Params

By = Literal["segment", "block"]


def adamw(peak: float, weight_decay: float) -> Group:
    """AdamW that warms up for a tenth of its phase and follows a cosine to 0."""
    return Group(optax.adamw, WarmupCosine(peak), weight_decay=weight_decay)


def fresh(params: Params) -> Mask:
    """What no pre-training has seen: the head, and the input adapter where there is one."""
    adapted = any(segment_or_empty(path) == "adapter" for path in flatten(params))
    return head() | adapter() if adapted else head()


def units(params: Params, by: By = "segment") -> dict[str, Mask]:
    """The parts of a ResNet from the input to the output, the head last, each with its mask.

    An input adapter is as new as the head, and belongs to that part.

    Raises:
      ValueError: leaves that are no ResNet's, or another ``by``.
    """
    if by not in ("segment", "block"):
        raise ValueError(f"by is 'segment' or 'block', not {by!r}")
    paths = list(flatten(params))
    if foreign := [path for path in paths if not segment_or_empty(path)]:
        raise ValueError(
            f"no segment of a ResNet has these leaves: {listing(foreign)}; for other networks "
            "write the phases with masks"
        )
    found: dict[str, Mask] = {}
    for path in sorted(paths, key=lambda path: _position(path, by)):
        segment = segment_of(path)
        block = path.split("/")[1]
        if segment in ("adapter", "head"):
            continue
        if by == "block" and segment.startswith("layer"):
            found.setdefault(f"{segment}/{block}", glob(f"{segment}/{block}/**"))
        elif segment.startswith("layer"):
            found.setdefault(segment, stage(int(segment.removeprefix("layer"))))
        else:
            found.setdefault(segment, stem())
    return found | {"head": fresh(params)}


def check_measured(measured: Mapping[str, float], argument: str) -> None:
    """Refuses what no measurement can be, before it decides which leaves move.

    Comparisons with NaN are all false: unchecked, it would freeze a part or choose one by its
    place in the order, without a word.

    Raises:
      ValueError: numbers that are negative or not finite, or nothing above 0.
    """
    values = list(measured.values())
    if not all(0 <= value < np.inf for value in values) or not any(values):
        raise ValueError(f"{argument} are finite, not negative and not all 0: {dict(measured)}")


def _position(path: str, by: By) -> tuple[tuple[int, int], int]:
    segment = segment_of(path)
    block = path.split("/")[1]
    inside = by == "block" and segment.startswith("layer")
    return segment_position(segment), int(block) if inside else 0
