"""The part of a state that a step on cached activations needs; the rest waits outside of it.

A compiled step is handed every leaf of its state, and takes a microsecond or two for each. A step
of the head alone is not much longer than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from flaxtransfer.optimizers import merge
from flaxtransfer.paths import flatten, segment_of, unflatten
from flaxtransfer.training.phases import Phase
from flaxtransfer.training.state import State
from flaxtransfer.types import Params


class Below(NamedTuple):
    """What lies before the cut."""

    params: Params
    batch_stats: Params


def narrow_phase(phase: Phase, segments: Sequence[str], start: str | None) -> Phase:
    """The resolved phase for the segments from ``start`` on; all of it without ``start``."""
    return replace(phase, labels=_split(phase.labels, segments, start)[1])  # type: ignore[arg-type]


def narrow(state: State, segments: Sequence[str], start: str | None) -> tuple[State, Below]:
    """The state for the segments from ``start`` on, and what it leaves out.

    Args:
      state: whole.
      segments: of the network, from the input to the output.
      start: the segment that training enters; None keeps everything.
    """
    params, batch_stats = (_split(t, segments, start) for t in (state.params, state.batch_stats))
    above = state._replace(params=params[1], batch_stats=batch_stats[1])
    return above, Below(params[0], batch_stats[0])


def widen(state: State, below: Below) -> State:
    """The whole state again."""
    return state._replace(
        params=merge(below.params, state.params),
        batch_stats=merge(below.batch_stats, state.batch_stats),
    )


def _split(tree: Params, segments: Sequence[str], start: str | None) -> tuple[Params, Params]:
    if start is None:
        return {}, tree
    kept = set(segments[segments.index(start) :])
    flat = flatten(tree)
    above = {path: leaf for path, leaf in flat.items() if segment_of(path) in kept}
    return unflatten({p: leaf for p, leaf in flat.items() if p not in above}), unflatten(above)
