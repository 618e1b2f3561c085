"""Checkpoint manager: save, retain and restore the steps of a run.

One writer and any number of readers per folder. The newest and the best steps are kept; damaged
steps are skipped when a run is restored, and never deleted.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flaxtransfer.checkpoint import orbax_io, step_files
from flaxtransfer.checkpoint.manifest import (
    Damage,
    DamagedCheckpointError,
    build_manifest,
    differences,
    rebuild,
)
from flaxtransfer.checkpoint.step_files import (
    check_folder,
    jsonable,
    list_steps,
    local_path,
    quarantine,
    remove,
    remove_leftovers,
)
from flaxtransfer.distributed import arrays_from_first, from_first, is_first
from flaxtransfer.files import folder_lock
from flaxtransfer.paths import PyTree

FORMAT = 1
Records = Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True)
class Restored:
    """A restored checkpoint.

    Args:
        step: its number.
        tree: the pytree, with the structure, types and shardings of the template.
        meta: the dictionary saved with it (tuples come back as lists).
        metric: by which it was ranked; None without one, or if it was not finite.
        skipped: newer (or better) steps that are damaged, each with the reason.
    """

    step: int
    tree: PyTree
    meta: dict[str, Any]
    metric: float | None
    skipped: tuple[tuple[int, str], ...] = ()


class CheckpointManager:
    """Checkpoint manager: keeps the newest and the best steps of a folder.

    Use it for the state of a run. It is not for publishing weights, which have their own formats.
    Use ``open``, always in a ``with`` block: a program that ends without closing can lose the step
    that is being written. ``restore`` fills every leaf of its template, or raises with all
    differences.
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
        """Opens the checkpoints of a folder for a ``with`` block.

        A writer holds the lock of the folder, and removes incomplete steps of a killed writer. In a
        run over several processes every process calls the same methods in the same order; process 0
        alone reads and writes the folder, and sends what it reads to all.

        Args:
            folder: a local or mounted folder; created if it does not exist.
            keep_best: number of steps with the highest metric to keep.
            keep_latest: number of the newest steps to keep. Default 2, so that there is another one
                if the newest is damaged.
            read_only: create, remove, lock and write nothing; a folder that is being written can
                be read.

        Raises:
            FileNotFoundError: ``read_only``, and there is no such folder.
            ValueError: another writer holds the folder, or an argument is out of range.
            OSError: the folder cannot be created or written.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, CheckpointManager.open(folder) as store:
        ...     store.save(10, {"w": np.ones(3)}, {"epoch": 1}, metric=0.5)
        ...     restored = store.restore({"w": np.zeros(3)})
        >>> restored.step, restored.tree, restored.meta
        (10, {'w': array([1., 1., 1.])}, {'epoch': 1})
        """
        path = local_path(folder)
        if keep_best < 0 or keep_latest < 1:
            raise ValueError(
                f"keep_best must be >= 0 and keep_latest >= 1, got {keep_best} and {keep_latest}"
            )
        with ExitStack() as stack:
            stack.enter_context(orbax_io.quiet())
            writer = None
            if read_only:
                from_first(lambda: check_folder(path))
            else:
                from_first(lambda: _lock_and_clean(path, stack))
                if is_first():
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
                    failure.add_note(f"in addition, the last checkpoint was lost: {error}")
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
        """Saves a step, and removes the steps that are neither among the best nor the latest.

        An older step is removed only after the new one is on the disk. Damaged steps are renamed to
        ``<step>.damaged``, never deleted.

        Args:
            step: above every sound step of the folder.
            tree: any pytree of arrays (typed keys included) and Python numbers.
            meta: a JSON-able dictionary.
            metric: to rank steps, higher is better. A value that is not finite is not ranked; of
                equal ones the earliest is the best, because a tie is not an improvement.
            wait: return when the step is on the disk. With False, it is written in the background
                (the tree may be donated at once), and an error is raised by the next ``save``,
                ``wait`` or the end of the block.

        Raises:
            OSError: the step could not be written (disk full, no permission); older steps are
                intact, and the call may be repeated. Also: an earlier step, saved with
                ``wait=False``, could not be written; then this step was not started.
            ValueError: the step is not above the others, or the folder is open for reading only.
            TypeError: leaves or values in meta that cannot be stored; all are listed.
        """
        if self.read_only:
            raise ValueError(f"{self.folder} is not open for writing, step {step} was not saved")
        self.wait()
        from_first(lambda: self._check_step(step))
        arrays, manifest = build_manifest(tree)
        record = {
            "format": FORMAT,
            "step": int(step),
            "metric": checked_metric(metric),
            "meta": jsonable(meta or {}, "meta"),
            "leaves": manifest,
        }
        from_first(lambda: self._write(int(step), arrays, record))
        self._damaged.clear()
        self._pending = int(step)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Waits until a step that was saved with ``wait=False`` is on the disk.

        Raises:
            OSError: it could not be written.
        """
        if self._pending is None:
            return
        step = self._pending
        try:
            from_first(lambda: self._finish(step))
        finally:
            self._pending = None

    def steps(self) -> list[int]:
        """The steps on the disk, ascending, without those known to be damaged."""
        return from_first(self._sound_steps)

    def latest(self) -> int | None:
        """The newest step, or None."""
        return from_first(lambda: max(self._records(), default=None))

    def best(self) -> int | None:
        """The step with the highest metric (of equal ones the earliest), or None."""
        return from_first(lambda: next(iter(ranked(self._records())), None))

    def meta(self) -> dict[str, Any] | None:
        """The dictionary saved with the newest step whose record is intact; None without one."""

        def newest() -> dict[str, Any] | None:
            records = self._records()
            return records[max(records)]["meta"] if records else None

        return from_first(newest)

    def restore(
        self,
        like: PyTree | Callable[[dict[str, Any]], PyTree],
        step: int | Literal["best"] | None = None,
    ) -> Restored:
        """Restores the newest intact step, the best, or a given one.

        Nothing on the disk is changed. Each leaf is compared with its checksum. A damaged step is
        skipped for the one before it (for ``"best"``: the next best, then the newest without a
        metric) and listed in ``skipped``; a step given by number is never replaced.

        Args:
            like: the template: a pytree of arrays (their values are not used) or
                ``jax.ShapeDtypeStruct``, with the sharding of each leaf, if any. Or, if steps have
                different structures, a function from the meta of a step to its template.
            step: a number, ``"best"``, or None for the newest.

        Raises:
            FileNotFoundError: there is no checkpoint, no such step, or none with a metric.
            ValueError: the step has another tree: every leaf that is missing, unexpected, or of
                another shape or type is listed. Such a step is never skipped.
            DamagedCheckpointError: all requested steps are damaged.
        """
        self.wait()
        skipped: list[tuple[int, str]] = []

        def wanted() -> list[int]:
            if step == "best":
                return best_first(self.folder, self._records(), self._damaged)
            return newest_first(self.folder, step)

        for candidate in from_first(wanted):
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
            f"no intact checkpoint in {self.folder} (nothing was deleted):{reasons}{hint}"
        )

    def _sound_steps(self) -> list[int]:
        return [step for step in list_steps(self.folder) if step not in self._damaged]

    def _records(self) -> dict[int, dict[str, Any]]:
        """Records of the steps that are not known to be damaged; marks unreadable ones."""
        records = {}
        for step in self._sound_steps():
            try:
                records[step] = step_files.read_record(self.folder, step)
            except Damage as damage:
                self._damaged[step] = str(damage)
        return records

    def _check_step(self, step: int) -> None:
        if isinstance(step, bool) or int(step) != step or step < 0:
            raise ValueError(f"step must be a whole number >= 0, got {step!r}")
        intact = sorted(self._records())
        if intact and step <= intact[-1]:
            raise ValueError(
                f"step must be above the newest in {self.folder}, whose steps are {intact}, got "
                f"{step}; continue from there with restore(), or give another folder"
            )

    def _write(self, step: int, arrays: dict[str, np.ndarray], record: dict[str, Any]) -> None:
        assert self._writer is not None  # this is process 0, and not read_only
        for damaged in [number for number in self._damaged if number in list_steps(self.folder)]:
            quarantine(self.folder, damaged)
        step_files.start(self._writer, self.folder, step, arrays, record)

    def _finish(self, step: int) -> None:
        assert self._writer is not None
        step_files.finish(self._writer, self.folder, step)
        self._prune()

    def _prune(self) -> None:
        records = self._records()
        for step in steps_to_remove(
            records, keep_best=self._keep_best, keep_latest=self._keep_latest
        ):
            remove(self.folder, step)


def _lock_and_clean(folder: Path, stack: ExitStack) -> None:
    stack.enter_context(folder_lock(folder))
    remove_leftovers(folder)


def restore_step(
    folder: Path,
    step: int,
    like: PyTree | Callable[[dict[str, Any]], PyTree],
    skipped: tuple[tuple[int, str], ...],
) -> Restored:
    """Reads a step; process 0 reads, for all.

    Args:
        folder: of the checkpoints.
        step: its number.
        like: the template, or a function from the step's meta to it.
        skipped: steps that were tried before, each with the reason.

    Raises:
        Damage: the step is damaged.
        ValueError: it has another format, or another tree; the text lists every difference.
        OSError: the machine failed.
    """
    record = from_first(lambda: step_files.read_record(folder, step), Damage)
    if record["format"] != FORMAT:
        raise ValueError(
            f"step {step} of {folder} has the format {record['format']}; this version of "
            f"flaxtransfer reads format {FORMAT}: use the version that wrote it"
        )
    like = like(record["meta"]) if callable(like) else like
    lines = differences(record["leaves"], like)
    if lines:
        skipped_text = f" (newer steps are damaged: {[number for number, _ in skipped]})"
        raise ValueError(
            f"step {step} of {folder} holds another tree than the template"
            f"{skipped_text if skipped else ''}; was the configuration changed?\n  "
            + "\n  ".join(lines)
        )
    arrays = arrays_from_first(
        lambda: step_files.read_arrays(folder, step, record["leaves"]), Damage
    )
    tree = rebuild(record["leaves"], arrays, like)
    return Restored(step, tree, record["meta"], record["metric"], skipped)


def checked_metric(metric: Any) -> float | None:
    """The metric as a float; None without one, or if it is not finite.

    >>> checked_metric(1), checked_metric(float("nan"))
    (1.0, None)
    """
    if metric is None:
        return None
    try:
        value = float(metric)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metric must be a number or None, got {metric!r}") from error
    return value if math.isfinite(value) else None


def ranked(records: Records) -> list[int]:
    """Steps with a metric, best first; of equal ones, the earliest first.

    >>> ranked({1: {"metric": 0.5}, 2: {"metric": None}, 3: {"metric": 0.9}, 4: {"metric": 0.5}})
    [3, 1, 4]
    """
    scored = {step: r["metric"] for step, r in records.items() if r["metric"] is not None}
    return sorted(scored, key=lambda step: (-scored[step], step))


def steps_to_remove(records: Records, *, keep_best: int, keep_latest: int) -> set[int]:
    """Retention: the steps that are neither among the best nor the latest.

    >>> metrics = {1: 0.5, 2: 0.9, 3: None, 4: 0.1}
    >>> steps_to_remove({n: {"metric": m} for n, m in metrics.items()}, keep_best=1, keep_latest=1)
    {1, 3}
    """
    latest = sorted(records)[-keep_latest:]
    return set(records) - set(latest) - set(ranked(records)[:keep_best])


def newest_first(folder: Path, step: int | None) -> list[int]:
    """Steps to try, newest first; only ``step``, if it is given.

    Raises:
        FileNotFoundError: there is no step, or not this one.
    """
    found = _existing_steps(folder)
    if step is None:
        return found[::-1]
    if step in found:
        return [int(step)]
    near = min(found, key=lambda number: abs(number - int(step)))
    raise FileNotFoundError(
        errno.ENOENT, f"no step {step}; there are {found}, the nearest is {near}", str(folder)
    )


def best_first(folder: Path, records: Records, damaged: Container[int]) -> list[int]:
    """Steps to try, best first: damaged ones, then ranked ones, then the others, newest first.

    Raises:
        FileNotFoundError: there is no step, or none with a metric.
    """
    found = _existing_steps(folder)
    best = ranked(records)
    unreadable = [number for number in found if number in damaged]
    if not best and not unreadable:
        raise FileNotFoundError(
            errno.ENOENT,
            f"no step has a metric, so that none is the best; there are {found}",
            str(folder),
        )
    # The metric of an unreadable record is unknown: it may have been the best, so that it is tried,
    # and reported, first.
    return list(dict.fromkeys([*unreadable[::-1], *best, *found[::-1]]))


def _existing_steps(folder: Path) -> list[int]:
    found = list_steps(folder)
    if not found:
        damaged = sorted(path.name for path in folder.glob("*.damaged*"))
        hint = f" (damaged ones: {damaged})" if damaged else ""
        raise FileNotFoundError(errno.ENOENT, f"there is no checkpoint{hint}", str(folder))
    return found
