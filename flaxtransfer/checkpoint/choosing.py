"""Which steps are read, in which order, and which need not be kept.

A record is what ``step_files.read_record`` returns; records are given by step, of sound steps only.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from flaxtransfer.checkpoint.steps import numbered

Records = Mapping[int, Mapping[str, Any]]


def rankable(metric: Any) -> float | None:
    """The metric as a number; None without one, and for a value that is not finite.

    >>> rankable(1), rankable(float("nan"))
    (1.0, None)
    """
    if metric is None:
        return None
    try:
        value = float(metric)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metric must be one number or None, not {metric!r}") from error
    return value if math.isfinite(value) else None


def ranked(records: Records) -> list[int]:
    """The steps with a metric, best first, the earliest of equals before the others.

    >>> ranked({1: {"metric": 0.5}, 2: {"metric": None}, 3: {"metric": 0.9}, 4: {"metric": 0.5}})
    [3, 1, 4]
    """
    scored = {step: r["metric"] for step, r in records.items() if r["metric"] is not None}
    return sorted(scored, key=lambda step: (-scored[step], step))


def superfluous(records: Records, *, keep_best: int, keep_latest: int) -> set[int]:
    """The steps that are neither among the best nor the latest.

    >>> metrics = {1: 0.5, 2: 0.9, 3: None, 4: 0.1}
    >>> superfluous({n: {"metric": m} for n, m in metrics.items()}, keep_best=1, keep_latest=1)
    {1, 3}
    """
    latest = sorted(records)[-keep_latest:]
    return set(records) - set(latest) - set(ranked(records)[:keep_best])


def asked_for(folder: Path, step: int | None) -> list[int]:
    """The step alone; without one all of them, the newest first.

    Raises:
      FileNotFoundError: there is no step at all, or not this one.
    """
    found = _found(folder)
    if step is None:
        return found[::-1]
    if step in found:
        return [int(step)]
    near = min(found, key=lambda number: abs(number - int(step)))
    raise FileNotFoundError(
        errno.ENOENT, f"no step {step}; there are {found}, the nearest is {near}", str(folder)
    )


def best_first(folder: Path, records: Records, damaged: Container[int]) -> list[int]:
    """All steps: the damaged, the ranked from the best on, the others from the newest on.

    Raises:
      FileNotFoundError: there is no step at all, or none with a metric.
    """
    found = _found(folder)
    best = ranked(records)
    unreadable = [number for number in found if number in damaged]
    if not best and not unreadable:
        raise FileNotFoundError(
            errno.ENOENT,
            f"no step has a metric to be the best by; there are {found}",
            str(folder),
        )
    # An unreadable record hides its metric: it may have been the best, so that it is tried,
    # and reported, first.
    return list(dict.fromkeys([*unreadable[::-1], *best, *found[::-1]]))


def _found(folder: Path) -> list[int]:
    found = numbered(folder)
    if not found:
        aside = sorted(path.name for path in folder.glob("*.damaged*"))
        hint = f", but for what was set aside: {aside}" if aside else ""
        raise FileNotFoundError(errno.ENOENT, f"no checkpoint there{hint}", str(folder))
    return found
