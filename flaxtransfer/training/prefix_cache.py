"""The prefix cache: whether the frozen part of a network is run once per phase, and why.

``choose`` decides from what moves, the budgets and the length of the phase. ``split_state`` then
takes the frozen part out of the state: a compiled step is handed every leaf, at a microsecond or
two each, and a step of the head alone is not much longer than that.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np

from flaxtransfer.batchnorm import Norm, modules
from flaxtransfer.data.loader import DataLoaders
from flaxtransfer.distributed import several
from flaxtransfer.models.layout import segment_of
from flaxtransfer.models.model import Model
from flaxtransfer.paths import Params, Variables, flatten, merge, unflatten
from flaxtransfer.training.plan import Phase
from flaxtransfer.training.step import State, forward

__all__ = [
    "OFF",
    "Cache",
    "Choice",
    "FrozenPrefix",
    "activation_shape",
    "bytes_text",
    "choose",
    "join_state",
    "lowest_moving",
    "prefix_digest",
    "split_phase",
    "split_state",
]


def lowest_moving(
    segments: Sequence[str], params: Params, moving: Iterable[str], norm: Norm
) -> str | None:
    """The first segment whose output changes in the course of training.

    A segment changes if a leaf of it is trainable, or if one of its BatchNorms uses batch
    statistics: then what an image becomes depends on the images beside it.

    Args:
        segments: names, from the input to the output.
        params: nested dict of parameters or their shapes.
        moving: paths of the trainable leaves.
        norm: the BatchNorm policy.

    Returns:
        Its name, where a cut spares all work below; None if that is the very first segment, or if
        nothing moves at all.

    >>> from flaxtransfer.masks import head, selected
    >>> from flaxtransfer.models.registry import resnet
    >>> model = resnet("resnet18")
    >>> params = model.abstract()["params"]
    >>> lowest_moving(model.segments, params, selected(head(), params), "running")
    'head'
    >>> lowest_moving(model.segments, params, selected(head(), params), "batch") is None
    True
    """
    of_batch = modules(params) if norm == "batch" else () if norm == "running" else norm
    changing = {segment_of(path) for path in moving} | {segment_of(f"{m}/mean") for m in of_batch}
    first = next((name for name in segments if name in changing), None)
    return None if first == segments[0] else first


def prefix_digest(variables: Variables, segments: Iterable[str]) -> str:
    """SHA-256 over the parameters and statistics of these segments, names and shapes included."""
    chosen, total = set(segments), hashlib.sha256()
    for path, leaf in sorted(flatten(dict(variables)).items()):
        if segment_of(path.split("/", 1)[1]) in chosen:
            array = np.ascontiguousarray(leaf)
            total.update(repr((path, array.shape, array.dtype.str)).encode())
            total.update(array.tobytes())
    return total.hexdigest()


class FrozenPrefix(NamedTuple):
    """What lies before the cut."""

    params: Params
    batch_stats: Params
    ema_stats: Params


def split_phase(phase: Phase, segments: Sequence[str], start: str | None) -> Phase:
    """The resolved phase for the segments from ``start`` on; all of it without ``start``."""
    if start is None:
        return phase
    return replace(phase, labels=_split(phase.labels, segments, start)[1])  # type: ignore[arg-type]


def split_state(
    state: State, segments: Sequence[str], start: str | None
) -> tuple[State, FrozenPrefix]:
    """The state for the segments from ``start`` on, and what it leaves out.

    Args:
        state: whole.
        segments: of the network, from the input to the output.
        start: the segment that training enters; None keeps everything.
    """
    parts = {name: _split(getattr(state, name), segments, start) for name in FrozenPrefix._fields}
    above: Any = {name: upper for name, (_, upper) in parts.items()}
    return state._replace(**above), FrozenPrefix(**{name: part[0] for name, part in parts.items()})


def join_state(state: State, below: FrozenPrefix) -> State:
    """The whole state again."""
    whole: Any = {
        name: merge(part, getattr(state, name))
        for name, part in zip(below._fields, below, strict=True)
    }
    return state._replace(**whole)


def _split(tree: Params, segments: Sequence[str], start: str | None) -> tuple[Params, Params]:
    if start is None:
        return {}, tree
    kept = set(segments[segments.index(start) :])
    flat = flatten(tree)
    above = {path: leaf for path, leaf in flat.items() if segment_of(path) in kept}
    return unflatten({p: leaf for p, leaf in flat.items() if p not in above}), unflatten(above)


_PLACE = {"memory": "in memory", "disk": "on disk"}

_Place = Literal["memory", "disk"]
_Dtype = Literal["float32", "float16"]
Where = Literal["auto", "memory", "disk", "off"]
Storage = Literal["auto", "float32", "float16"]


@dataclass(frozen=True)
class Cache:
    """How the output of a frozen prefix is kept, so that only what follows it is trained.

    Without random augmentation and in float32 training takes the same course as without a cache,
    to rounding. Random augmentation is replaced by a fixed number of versions of each image, one
    after the other from pass to pass.

    Args:
        where: "auto" uses memory, or else disk, where the budgets allow it and a phase is long
            enough to gain; "memory" and "disk" insist on the place; "off" runs the prefix in every
            step.
        dtype: "auto" is float32 where that fits the budget and float16 where only that does.
            Activations beyond float16's range (65504) are kept in float32 in any case.
        views: versions of each image where augmentation is random; without it there is one.
        memory: bytes of activations to hold in memory at most.
        disk: bytes of activations to hold on disk at most.
        folder: where caches lie on disk, and stay for other runs; by default within the run folder
            until the run has finished.

    Raises:
        ValueError: unknown words, numbers out of range; all in one text.
    """

    where: Where = "auto"
    dtype: Storage = "auto"
    views: int = 8
    memory: int = 2 * 2**30
    disk: int = 20 * 2**30
    folder: Path | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be one of {', '.join(get_args(words))}, got {value!r}"
            for name, words, value in (("where", Where, self.where), ("dtype", Storage, self.dtype))
            if value not in get_args(words)
        ]
        problems += [f"views must be 1 or more, got {self.views}"] if self.views < 1 else []
        problems += [
            f"{name} must be 0 bytes or more, got {value}"
            for name, value in (("memory", self.memory), ("disk", self.disk))
            if value < 0
        ]
        if problems:
            raise ValueError("cache: " + "; ".join(problems))

    def identity(self) -> dict[str, Any]:
        """What of it decides what is learned, as JSON for a run's configuration; {} where off."""
        if self.where == "off":
            return {}
        known = asdict(self)
        return {"cache": {name: value for name, value in known.items() if name != "folder"}}


OFF = Cache("off")


@dataclass(frozen=True)
class Choice:
    """What is done for one phase.

    Args:
        cut: the segment that training enters; what comes before is run once. None caches nothing.
        where: "memory" or "disk".
        dtype: "float32" or "float16".
        views: versions of each training image.
        shape: of one example's activations.
        nbytes: of all of them, those of validation included.
        budget: bytes that may lie in that place.
        passes: over the training examples in the phase.
        text: all that for a person, and why.
    """

    cut: str | None
    text: str
    where: _Place = "memory"
    dtype: _Dtype = "float32"
    views: int = 1
    shape: tuple[int, ...] = ()
    nbytes: int = 0
    budget: int = 0
    passes: float = 0.0

    @property
    def place(self) -> str:
        """The place in words: "in memory" or "on disk"."""
        return _PLACE[self.where]


def choose(cache: Cache, model: Model, params: Params, phase: Phase, feed: DataLoaders) -> Choice:
    """Applies the rules to one resolved phase; a pure function of what is given.

    Nothing here is timed, so that a run that is resumed chooses as it did before: the prefix is
    run ``views`` times over all images instead of once a pass, which pays as soon as there are more
    passes than versions.

    Args:
        cache: budgets and wishes.
        model: the network.
        params: its parameters or their shapes.
        phase: resolved.
        feed: of the run, with ``examples``.
    """
    moving = phase.param_groups.trainable_paths
    lowest = lowest_moving(model.segments, params, moving, phase.batch_norm_policy())
    cut = _with_what_the_head_reads(model, lowest)
    reason = _never(cache, cut, feed, phase)
    if cut is None and lowest is not None and cache.where != "off":
        reason = f"for the head reads {model.config.head_reads[0]}, before which nothing is frozen"
    if reason or feed.examples is None or cut is None:
        return Choice(None, f"phase {phase.name!r}: nothing is cached, {reason}")
    examples = feed.examples
    count, held_out = len(examples.labels), len(examples.validation_labels)
    views = cache.views if examples.random else 1
    passes = phase.total_steps(feed.steps_per_epoch) * examples.batch_size / count
    shape = activation_shape(model, feed, cut)
    numbers = (views * count + held_out) * math.prod(shape)
    begin = (
        f"phase {phase.name!r}: {_count(views, 'version')} of {_count(count, 'image')}"
        + (f" and {held_out} of validation" if held_out else "")
        + f" before {cut}, {math.prod(shape):,} numbers each"
    )
    if cache.where == "auto" and passes <= views:
        return Choice(
            None,
            f"{begin}, are not cached: that pays after {_count(views, 'pass')}, and the phase has "
            f"{passes:.3g}",
        )
    for dtype, where, budget in _places(cache):
        nbytes = numbers * np.dtype(dtype).itemsize
        if nbytes <= budget:
            text = (
                f"{begin}, are cached {_PLACE[where]} as {dtype} ({bytes_text(nbytes)}): breaks "
                f"even after {_count(views, 'pass')} of {passes:.3g}"
            )
            return Choice(cut, text, where, dtype, views, shape, nbytes, budget, passes)
    smallest = numbers * (4 if cache.dtype == "float32" else 2)
    return Choice(
        None,
        f"{begin}, are not cached: {bytes_text(smallest)} are more than the budget of "
        f"{_budget(cache)}" + ("; several processes keep none on disk" if several() else ""),
    )


def _with_what_the_head_reads(model: Model, cut: str | None) -> str | None:
    """The cut, moved to the first segment that the head reads, if that would be lost behind it."""
    reads, segments = model.config.head_reads, model.segments
    if not reads or cut in (None, "head") or segments.index(cut) <= segments.index(reads[0]):
        return cut
    return None if reads[0] == segments[0] else reads[0]


def _places(cache: Cache) -> Iterator[tuple[_Dtype, _Place, int]]:
    """What may be tried, exact numbers first, and memory before the disk."""
    dtypes: tuple[_Dtype, ...] = ("float32", "float16")
    places: tuple[tuple[_Place, int], ...] = (("memory", cache.memory), ("disk", cache.disk))
    for dtype in dtypes:
        for where, budget in places:
            if cache.dtype in ("auto", dtype) and where in _allowed(cache):
                yield dtype, where, budget


def _allowed(cache: Cache) -> list[_Place]:
    """Where activations may be kept. Several processes would have to find the same files."""
    places: tuple[_Place, ...] = ("memory",) if several() else ("memory", "disk")
    return [name for name in places if cache.where in ("auto", name)]


def activation_shape(model: Model, feed: DataLoaders, cut: str) -> tuple[int, ...]:
    """The shape of one example's activations before ``cut``."""
    size, channels = feed.preprocessing.size, len(feed.preprocessing.mean)
    image = jax.ShapeDtypeStruct((1, size, size, channels), np.uint8)  # type: ignore[no-untyped-call]
    prefix = forward(model, feed.preprocessing, None, cut)
    return tuple(jax.eval_shape(prefix, model.abstract(), image).shape[1:])


def _never(cache: Cache, cut: str | None, feed: DataLoaders, phase: Phase) -> str:
    if cache.where == "off":
        return "as it was asked for"
    if mixed := [name for name in ("mixup", "cutmix") if getattr(phase, name)]:
        blend = "blends" if len(mixed) == 1 else "blend"
        return f"for {' and '.join(mixed)} {blend} images, not what the network makes of them"
    if phase.image_size is not None:
        return f"for images are made smaller in the step (image_size {phase.image_size})"
    if cut is None:
        return "for training moves the network from its input on"
    if feed.examples is None:
        return "for the feed does not tell its examples apart (Feed.examples)"
    if not _allowed(cache):
        return "for several processes keep none on disk"
    return ""


def _budget(cache: Cache) -> str:
    budgets = {"memory": cache.memory, "disk": cache.disk}
    return " and ".join(
        f"{bytes_text(budget)} {_PLACE[name]}"
        for name, budget in budgets.items()
        if name in _allowed(cache)
    )


def bytes_text(count: float) -> str:
    """A number of bytes for a person.

    >>> bytes_text(2_500_000)
    '2.5 MB'
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:g} bytes"


def _count(number: int, what: str) -> str:
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    return f"{number:,} {what if number == 1 else plural}"
