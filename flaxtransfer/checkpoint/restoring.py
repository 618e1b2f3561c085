"""One step of a folder, put into the template that it is asked for with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flaxtransfer.checkpoint import inventory as inventories
from flaxtransfer.checkpoint import step_files
from flaxtransfer.checkpoint.failures import Damage
from flaxtransfer.processes import anywhere
from flaxtransfer.types import PyTree

_T = TypeVar("_T")

FORMAT = 1


@dataclass(frozen=True)
class Restored:
    """What a checkpoint held.

    Attributes:
      step: the step it was saved at.
      tree: the pytree, with the structure, types and shardings of the template.
      meta: the dictionary that was saved with it (tuples come back as lists).
      metric: the value it was ranked by; None without one, or when it was not finite.
      skipped: the newer (or better) steps that could not be read, each with the reason.
    """

    step: int
    tree: PyTree
    meta: dict[str, Any]
    metric: float | None
    skipped: tuple[tuple[int, str], ...] = ()


def restore_step(
    folder: Path,
    step: int,
    like: PyTree | Callable[[dict[str, Any]], PyTree],
    skipped: tuple[tuple[int, str], ...],
) -> Restored:
    """Reads a step in every process, or in none.

    Args:
      folder: where the step lies.
      step: its number.
      like: the template, or a function from the step's meta to it.
      skipped: the steps that were tried before it, each with the reason.

    Raises:
      Damage: the step is not what was saved.
      ValueError: it is of another format, or holds another tree; the text lists every difference.
      OSError: the machine did not allow it.
    """
    record = _agreed(lambda: step_files.read_record(folder, step))
    if record["format"] != FORMAT:
        raise ValueError(
            f"step {step} of {folder} has the format {record['format']}; this version of "
            f"flaxtransfer reads format {FORMAT}: use the version that wrote it"
        )
    like = like(record["meta"]) if callable(like) else like
    lines = inventories.differences(record["leaves"], like)
    if lines:
        past = f" (newer steps are damaged: {[number for number, _ in skipped]})"
        raise ValueError(
            f"step {step} of {folder} holds another tree than the one asked for"
            f"{past if skipped else ''}; was the configuration changed?\n  " + "\n  ".join(lines)
        )
    arrays = _agreed(lambda: step_files.read_arrays(folder, step, record["leaves"]))
    tree = inventories.rebuild(record["leaves"], arrays, like)
    return Restored(step, tree, record["meta"], record["metric"], skipped)


def _agreed(read: Callable[[], _T]) -> _T:
    """What ``read`` returns; damage that one process meets is damage for all of them."""
    error: Exception | None = None
    try:
        result = read()
    except Exception as raised:
        error = raised
    if anywhere(error is not None):
        raise error or Damage("another process cannot read it")
    return result
