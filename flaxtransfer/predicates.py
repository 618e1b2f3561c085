"""What each selector of the mask language means, as a predicate on (path, leaf).

The names are those of the functions in ``flaxtransfer.masks``, which document them.
"""

import re
from collections.abc import Callable
from typing import Any

from flaxtransfer import globs
from flaxtransfer.paths import segment_of, segment_position

__all__ = ["PREDICATES", "segment_or_empty"]


def segment_or_empty(path: str) -> str:
    """The segment of a ResNet, or an empty string for a foreign path."""
    try:
        return segment_of(path)
    except ValueError:
        return ""


def _insegment_or_empty(name: str) -> Callable[..., bool]:
    return lambda path, leaf: segment_or_empty(path) == name


def _named(name: str) -> Callable[..., bool]:
    return lambda path, leaf: path.split("/")[-1] == name


def _in_stages(path: str, leaf: Any, *numbers: int) -> bool:
    return segment_or_empty(path) in {f"layer{number}" for number in numbers}


def _up_to(path: str, leaf: Any, last: str) -> bool:
    segment = segment_or_empty(path)
    return bool(segment) and segment_position(segment) <= segment_position(last)


def _is_matrix(path: str, leaf: Any) -> bool:
    if not hasattr(leaf, "shape"):
        raise TypeError(f"matrices() needs shapes, but {path!r} is {leaf!r}")
    return len(leaf.shape) >= 2


_BATCH_NORM_NAME = re.compile(r"(?:.*_)?bn(?:[0-9_].*)?|batch_?norm.*", re.IGNORECASE)
_DOWNSAMPLE_NORM = re.compile(r"(?:.*/)?downsample/[0-9]+/(?:scale|bias|mean|var)")


def _is_batch_norm(path: str, leaf: Any) -> bool:
    named = any(map(_BATCH_NORM_NAME.fullmatch, path.split("/")))
    return named or _DOWNSAMPLE_NORM.fullmatch(path) is not None


PREDICATES: dict[str, Callable[..., bool]] = {
    "adapter": _insegment_or_empty("adapter"),
    "batch_norm": _is_batch_norm,
    "biases": _named("bias"),
    "everything": lambda path, leaf: True,
    "glob": lambda path, leaf, pattern: globs.match(pattern, path),
    "head": _insegment_or_empty("head"),
    "kernels": _named("kernel"),
    "matrices": _is_matrix,
    "stage": _in_stages,
    "stages": _in_stages,
    "stem": _insegment_or_empty("stem"),
    "up_to": _up_to,
}
"""``{function: (path, leaf, *arguments) -> selected}``."""
