"""The checkpoint manager: save, keep, choose and restore the steps of a folder.

Which steps are read, in which order, and which need not be kept.

A record is what ``step_files.read_record`` returns; records are given by step, of sound steps only.

One step of a folder, put into the template that it is asked for with.

The checkpoints of a folder: saved, kept, restored, by one writer and any readers.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np

from flaxtransfer.checkpoint import manifest as inventories
from flaxtransfer.checkpoint import orbax_io, step_files
from flaxtransfer.checkpoint.errors import Damage, DamagedCheckpointError
from flaxtransfer.checkpoint.step_files import (
    clean,
    jsonable,
    local,
    numbered,
    quarantine,
    remove,
    require,
)
from flaxtransfer.distributed import any_process, on_primary
from flaxtransfer.files import folder_lock
from flaxtransfer.types import PyTree

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
    if any_process(error is not None):
        raise error or Damage("another process cannot read it")
    return result


class CheckpointManager:
    """The checkpoints of one folder: the newest and the best of them are kept.

    Use :meth:`open`, always in a ``with`` block: a program that ends without closing can lose the
    step that is being written. It stores what it is given and knows nothing of training. It is
    not a place for a file to hand on (weights have their own formats), and it does not merge:
    ``restore`` fills every leaf of its template or says which it cannot.
    """

    def __init__(
        self,
        folder: Path,
        writer: orbax_io.Writer | None,
        *,
        keep_best: int,
        keep_latest: int,
        read_only: bool,
    ) -> None:
        self.folder = folder
        self.read_only = read_only
        self._keep_best = keep_best
        self._keep_latest = keep_latest
        self._writer = writer
        self._pending: int | None = None
        self._damaged: dict[int, str] = {}

    @classmethod
    @contextmanager
    def open(
        cls,
        folder: str | os.PathLike[str],
        *,
        keep_best: int = 1,
        keep_latest: int = 2,
        read_only: bool = False,
    ) -> Iterator[CheckpointManager]:
        """Opens the checkpoints of a folder for the length of a ``with`` block.

        A writer holds the folder's lock, and removes what a killed writer left half done. In a
        run over several processes every process opens the same folder on a shared disk and calls
        the same methods in the same order; process 0 does the writing.

        Args:
          folder: a local or mounted folder; made when it does not exist.
          keep_best: how many steps with the highest metric are kept.
          keep_latest: how many of the newest steps are kept. Two, because a damaged newest step
            is worth less without the one before it.
          read_only: nothing is made, cleaned, locked or written; a folder that is being written
            can be read.

        Raises:
          FileNotFoundError: ``read_only``, and there is no such folder.
          ValueError: another writer holds the folder, or an argument is out of range.
          OSError: the folder cannot be made or written.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, CheckpointManager.open(folder) as store:
        ...     store.save(10, {"w": np.ones(3)}, {"epoch": 1}, metric=0.5)
        ...     restored = store.restore({"w": np.zeros(3)})
        >>> restored.step, restored.tree, restored.meta
        (10, {'w': array([1., 1., 1.])}, {'epoch': 1})
        """
        path = local(folder)
        if keep_best < 0 or keep_latest < 1:
            raise ValueError(
                f"keep_best={keep_best} and keep_latest={keep_latest}: at least 0 of the best and "
                "1 of the latest must be kept"
            )
        with ExitStack() as stack:
            stack.enter_context(orbax_io.quiet())
            writer = None
            if read_only:
                require(path)
            else:
                on_primary(lambda: _take(path, stack), f"open {path}")
                if jax.process_index() == 0:
                    writer = orbax_io.open_writer()
                    stack.callback(writer.close)
            store = cls(
                path, writer, keep_best=keep_best, keep_latest=keep_latest, read_only=read_only
            )
            try:
                yield store
            except BaseException as failure:
                try:
                    store.wait()
                except Exception as error:
                    failure.add_note(f"besides, the last checkpoint was lost: {error}")
                raise
            else:
                store.wait()
            finally:
                store.read_only = True

    def save(
        self,
        step: int,
        tree: PyTree,
        meta: Mapping[str, Any] | None = None,
        *,
        metric: float | None = None,
        wait: bool = True,
    ) -> None:
        """Saves a step; removes the steps that are neither among the best nor the latest.

        An older step is removed only once the new one is on the disk. Steps that were found
        damaged are moved aside to ``<step>.damaged``, never deleted.

        Args:
          step: above every sound step of the folder.
          tree: any pytree of arrays (typed keys included) and Python numbers.
          meta: a JSON-able dictionary.
          metric: what the step is ranked by, higher is better. A value that is not finite never
            ranks; among equals the earliest is the best, for a tie is no improvement.
          wait: return when the step is on the disk. With False, it is written while the program
            goes on (the tree may be donated at once), and an error comes out of the next
            ``save``, ``wait`` or the end of the block.

        Raises:
          OSError: the step could not be written (disk full, no permission); older steps are
            untouched, and the same call may be repeated. Also: an earlier step, saved with
            ``wait=False``, could not be written; then nothing of this step was tried yet.
          ValueError: the step is not above the others, or the folder was opened to read only.
          TypeError: something in the tree or in meta cannot be stored; all of it is listed.
        """
        if self.read_only:
            raise ValueError(f"{self.folder} is not open for writing, step {step} was not saved")
        self.wait()
        on_primary(lambda: self._check_step(step), f"save step {step} in {self.folder}")
        arrays, inventory = inventories.build_manifest(tree)
        record = {
            "format": FORMAT,
            "step": int(step),
            "metric": rankable(metric),
            "meta": jsonable(meta or {}, "meta"),
            "leaves": inventory,
        }
        on_primary(
            lambda: self._write(int(step), arrays, record), f"write step {step} to {self.folder}"
        )
        self._damaged.clear()
        self._pending = int(step)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when a step that was saved with ``wait=False`` is on the disk.

        Raises:
          OSError: it could not be written.
        """
        if self._pending is None:
            return
        step = self._pending
        try:
            on_primary(lambda: self._finish(step), f"write step {step} to {self.folder}")
        finally:
            self._pending = None

    def steps(self) -> list[int]:
        """The steps on the disk in ascending order, without those found damaged."""
        return [step for step in numbered(self.folder) if step not in self._damaged]

    def latest(self) -> int | None:
        """The newest step, or None."""
        return max(self._records(), default=None)

    def best(self) -> int | None:
        """The step with the highest metric (the earliest of equals), or None."""
        return next(iter(ranked(self._records())), None)

    def restore(
        self,
        like: PyTree | Callable[[dict[str, Any]], PyTree],
        step: int | Literal["best"] | None = None,
    ) -> Restored:
        """Reads the newest sound step, the best, or a given one.

        Nothing on the disk is changed. Each leaf is compared with its checksum. A damaged step is
        passed over for the one before it (for ``"best"``: the next best, then the newest without a
        metric) and listed in ``skipped``; a step given by number is never replaced.

        Args:
          like: the template: a pytree of arrays (their values are not used) or
            ``jax.ShapeDtypeStruct``, with the sharding that each leaf shall have, if any. Or, where
            steps hold trees of different structure, a function from a step's meta to its template.
          step: a number, ``"best"``, or None for the newest.

        Raises:
          FileNotFoundError: there is no checkpoint, no such step, or none with a metric.
          ValueError: the step was saved from another configuration: every leaf that is missing,
            unexpected, or of another shape or type is listed. This is never passed over.
          DamagedCheckpointError: no step among those asked for is sound.
        """
        self.wait()
        skipped: list[tuple[int, str]] = []
        if step == "best":
            candidates = best_first(self.folder, self._records(), self._damaged)
        else:
            candidates = asked_for(self.folder, step)
        for candidate in candidates:
            try:
                restored = restore_step(self.folder, candidate, like, tuple(skipped))
            except Damage as damage:
                self._damaged[candidate] = str(damage)
                skipped.append((candidate, str(damage)))
            else:
                self._damaged.pop(candidate, None)
                return restored
        reasons = "".join(f"\n  step {number}: {reason}" for number, reason in skipped)
        others = [number for number in self.steps() if number not in dict(skipped)]
        hint = f"\nother steps there: {others}" if others else ""
        raise DamagedCheckpointError(
            f"no sound checkpoint in {self.folder} (nothing was deleted):{reasons}{hint}"
        )

    def _records(self) -> dict[int, dict[str, Any]]:
        """The records of the steps that are not known to be damaged; finds unreadable ones."""
        records = {}
        for step in self.steps():
            try:
                records[step] = step_files.read_record(self.folder, step)
            except Damage as damage:
                self._damaged[step] = str(damage)
        return records

    def _check_step(self, step: int) -> None:
        if isinstance(step, bool) or int(step) != step or step < 0:
            raise ValueError(f"a step is a whole number from 0, not {step!r}")
        sound = sorted(self._records())
        if sound and step <= sound[-1]:
            raise ValueError(
                f"step {step} is not above the newest in {self.folder}, whose steps are {sound}; "
                "go on from there with restore(), or give another folder"
            )

    def _write(self, step: int, arrays: dict[str, np.ndarray], record: dict[str, Any]) -> None:
        assert self._writer is not None  # process 0 of a store that may write
        for damaged in [number for number in self._damaged if number in numbered(self.folder)]:
            quarantine(self.folder, damaged)
        step_files.start(self._writer, self.folder, step, arrays, record)

    def _finish(self, step: int) -> None:
        assert self._writer is not None
        step_files.finish(self._writer, self.folder, step)
        self._prune()

    def _prune(self) -> None:
        records = self._records()
        for step in superfluous(records, keep_best=self._keep_best, keep_latest=self._keep_latest):
            remove(self.folder, step)


def _take(folder: Path, stack: ExitStack) -> None:
    stack.enter_context(folder_lock(folder))
    clean(folder)
