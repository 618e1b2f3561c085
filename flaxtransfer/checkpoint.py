"""Checkpoints of any pytree with a JSON-able dictionary, which know when they are damaged.

Orbax writes and reads the arrays, and makes a step appear all at once or not at all. What it does
not do is notice that a file has changed since: a flipped bit is restored without a word. So each
step carries a record beside its arrays, with a checksum for every leaf and one for the record
itself, and a step that does not match its record is never returned.

On disk: ``<folder>/<step>/tree`` (the leaves by path, uncompressed zarr in OCDBT) and
``<folder>/<step>/record`` (JSON). Any orbax can open them as a Composite of ``tree`` and
``record``. This is the only module that knows orbax.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from flaxtransfer import inventory as inventories
from flaxtransfer.lock import hold
from flaxtransfer.processes import anywhere, on_first
from flaxtransfer.record import jsonable, seal, unseal
from flaxtransfer.steps import clean, flush, numbered, remove, set_aside
from flaxtransfer.types import PyTree

_T = TypeVar("_T")

_FORMAT = 1
# Errors of the machine, not of the files: a step is not damaged because it cannot be read now.
_NOT_DAMAGE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class DamagedCheckpointError(ValueError):
    """No sound checkpoint is left among those asked for; the text lists each with its reason."""


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


class Checkpoints:
    """The checkpoints of one folder: the newest and the best of them are kept.

    Use :meth:`open`, always in a ``with`` block: a program that ends without closing can lose the
    step that is being written. It stores what it is given and knows nothing of training. It is
    not a place for a file to hand on (weights have their own formats), and it does not merge:
    ``restore`` fills every leaf of its template or says which it cannot.
    """

    def __init__(
        self,
        folder: Path,
        writer: ocp.AsyncCheckpointer | None,
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
    ) -> Iterator[Checkpoints]:
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
        >>> with tempfile.TemporaryDirectory() as folder, Checkpoints.open(folder) as store:
        ...     store.save(10, {"w": np.ones(3)}, {"epoch": 1}, metric=0.5)
        ...     restored = store.restore({"w": np.zeros(3)})
        >>> restored.step, restored.tree, restored.meta
        (10, {'w': array([1., 1., 1.])}, {'epoch': 1})
        """
        path = _local(folder)
        if keep_best < 0 or keep_latest < 1:
            raise ValueError(
                f"keep_best={keep_best} and keep_latest={keep_latest}: at least 0 of the best and "
                "1 of the latest must be kept"
            )
        with ExitStack() as stack:
            stack.enter_context(_quiet_orbax())
            writer = None
            if read_only:
                _require_folder(path)
            else:
                on_first(lambda: _take(path, stack), f"open {path}")
                if jax.process_index() == 0:
                    writer = _writer()
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
        on_first(lambda: self._check_step(step), f"save step {step} in {self.folder}")
        arrays, inventory = inventories.take(tree)
        record = {
            "format": _FORMAT,
            "step": int(step),
            "metric": _rankable(metric),
            "meta": jsonable(meta or {}, "meta"),
            "leaves": inventory,
        }
        on_first(
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
            on_first(lambda: self._finish(step), f"write step {step} to {self.folder}")
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
        return next(iter(_ranked(self._records())), None)

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
        for candidate in self._candidates(step):
            try:
                restored = self._load(candidate, like, tuple(skipped))
            except _Damage as damage:
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

    def _candidates(self, step: int | str | None) -> list[int]:
        found = numbered(self.folder)
        if not found:
            aside = sorted(path.name for path in self.folder.glob("*.damaged*"))
            hint = f", but for what was set aside: {aside}" if aside else ""
            raise FileNotFoundError(errno.ENOENT, f"no checkpoint there{hint}", str(self.folder))
        if step is None:
            return found[::-1]
        if step != "best":
            if step in found:
                return [int(step)]
            near = min(found, key=lambda number: abs(number - int(step)))
            raise FileNotFoundError(
                errno.ENOENT,
                f"no step {step}; there are {found}, the nearest is {near}",
                str(self.folder),
            )
        ranked = _ranked(self._records())
        unreadable = [number for number in found if number in self._damaged]
        if not ranked and not unreadable:
            raise FileNotFoundError(
                errno.ENOENT,
                f"no step has a metric to be the best by; there are {found}",
                str(self.folder),
            )
        # An unreadable record hides its metric: it may have been the best, so that it is tried,
        # and reported, first.
        order = [*unreadable[::-1], *ranked, *found[::-1]]
        return list(dict.fromkeys(order))

    def _load(self, step: int, like: Any, skipped: tuple[tuple[int, str], ...]) -> Restored:
        record = _agreed(lambda: self._record(step))
        if record["format"] != _FORMAT:
            raise ValueError(
                f"step {step} of {self.folder} has the format {record['format']}; this version of "
                f"flaxtransfer reads format {_FORMAT}: use the version that wrote it"
            )
        like = like(record["meta"]) if callable(like) else like
        lines = inventories.differences(record["leaves"], like)
        if lines:
            past = f" (newer steps are damaged: {[number for number, _ in skipped]})"
            raise ValueError(
                f"step {step} of {self.folder} holds another tree than the one asked for"
                f"{past if skipped else ''}; was the configuration changed?\n  "
                + "\n  ".join(lines)
            )
        arrays = _agreed(lambda: self._arrays(step, record["leaves"]))
        tree = inventories.rebuild(record["leaves"], arrays, like)
        return Restored(step, tree, record["meta"], record["metric"], skipped)

    def _records(self) -> dict[int, dict[str, Any]]:
        """The records of the steps that are not known to be damaged; finds unreadable ones."""
        records = {}
        for step in self.steps():
            try:
                records[step] = self._record(step)
            except _Damage as damage:
                self._damaged[step] = str(damage)
        return records

    def _record(self, step: int) -> dict[str, Any]:
        path = self.folder / str(step) / "record" / "metadata"
        try:
            record = unseal(path.read_text())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _Damage("record/metadata is missing") from error
        except ValueError as error:
            raise _Damage(f"record/metadata cannot be used: {_first_line(error)}") from error
        if record["step"] != step:
            raise _Damage(f"the folder of step {step} holds step {record['step']}")
        return record

    def _arrays(self, step: int, inventory: inventories.Inventory) -> dict[str, np.ndarray]:
        wanted = inventories.stored(inventory)
        if not wanted:
            return {}
        patience = _Patient()
        handler = _tree_handler(patience)
        arguments = ocp.args.PyTreeRestore(
            item=dict.fromkeys(wanted, 0),
            restore_args=dict.fromkeys(wanted, ocp.RestoreArgs(restore_type=np.ndarray)),
        )
        folder = self.folder / str(step)
        try:
            arrays = handler.restore(epath.Path(folder / "tree"), args=arguments)
        except MemoryError:
            raise
        except Exception as error:
            number = _error_number(error)
            if number in _NOT_DAMAGE:
                reason = os.strerror(number).lower()
                text = f"step {step} cannot be read now ({reason})"
                raise OSError(number, text, str(self.folder)) from error
            raise _Damage(_unreadable(error, patience.failed, folder)) from error
        finally:
            handler.close()
        corrupted = inventories.corrupted(inventory, arrays)
        if corrupted:
            raise _Damage(f"the content differs from the checksum of {', '.join(corrupted)}")
        return arrays

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
        items: dict[str, Any] = {"record": ocp.args.JsonSave(seal(record))}
        if arrays:
            items["tree"] = ocp.args.PyTreeSave(arrays)
        for damaged in [number for number in self._damaged if number in numbered(self.folder)]:
            set_aside(self.folder, damaged)
        try:
            self._writer.save(epath.Path(self.folder / str(step)), args=ocp.args.Composite(**items))
        except Exception as error:
            raise self._not_written(step, error) from error

    def _finish(self, step: int) -> None:
        assert self._writer is not None
        try:
            self._writer.wait_until_finished()
            self._writer.check_for_errors()
            flush(self.folder, step)
        except Exception as error:
            raise self._not_written(step, error) from error
        self._prune()

    def _not_written(self, step: int, error: Exception) -> OSError:
        with suppress(OSError):
            clean(self.folder)
        number = _error_number(error)
        if number is None:
            reason = f"{type(error).__name__}: {_first_line(error)}"
        else:
            reason = os.strerror(number).lower()
        free = ""
        if number in (errno.ENOSPC, errno.EDQUOT):
            free = f", {shutil.disk_usage(self.folder).free / 1e6:.1f} MB free"
        intact = numbered(self.folder)
        return OSError(
            number or errno.EIO,
            f"step {step} was not written ({reason}{free}); "
            f"{f'steps {intact} are intact' if intact else 'there is no older step'}",
            str(self.folder),
        )

    def _prune(self) -> None:
        records = self._records()
        latest = sorted(records)[-self._keep_latest :]
        best = _ranked(records)[: self._keep_best]
        for step in set(records) - set(latest) - set(best):
            remove(self.folder, step)


@dataclass(frozen=True)
class Arrays:
    """What a folder of orbax' holds, without anything that says what it is for.

    Attributes:
      by_path: the numbers, by the path of each leaf.
      checked: whether each leaf was compared with its checksum; only our own steps have them.
    """

    by_path: dict[str, np.ndarray]
    checked: bool


def folder_of_arrays(folder: str | os.PathLike[str]) -> Path | None:
    """The folder in which orbax keeps a tree: this one, or the only item in it; None without one.

    Raises:
      ValueError: several trees, or a folder of steps; the text names them.

    >>> folder_of_arrays("/") is None
    True
    """
    path = Path(folder)
    if (path / "_METADATA").is_file():
        return path
    items = sorted(inner.parent for inner in path.glob("*/_METADATA"))
    if len(items) == 1:
        return items[0]
    if items:
        names = ", ".join(str(item) for item in items)
        raise ValueError(f"{path} holds several trees, name one: {names}")
    steps = sorted({inner.parents[1] for inner in path.glob("[0-9]*/*/_METADATA")})
    if steps:
        raise ValueError(f"{path} holds checkpoints of several steps, name one: "
                         f"{', '.join(map(str, steps))}")  # fmt: skip
    return None


def read_arrays(folder: str | os.PathLike[str], *, most: int) -> Arrays:
    """The arrays of a folder that any orbax wrote, without a template.

    You want it to look into checkpoints of others. For those of ours there is ``Checkpoints``,
    which also fills a template and passes damaged steps over.

    Args:
      folder: as ``folder_of_arrays`` accepts it, or one of our steps.
      most: numbers that all arrays together may have; nothing is read if there are more.

    Returns:
      The arrays; text and empty nodes of the tree are left out.

    Raises:
      ValueError: no such folder, links in it, more numbers than ``most``.
      DamagedCheckpointError: it cannot be read, or does not match its checksums.
      OSError: the machine did not allow it.
    """
    path = _local(folder)
    tree = folder_of_arrays(path)
    if ".orbax-checkpoint-tmp" in f"{tree}":
        raise ValueError(f"{tree} was never finished: the program that wrote it ended before")
    if tree is None:
        raise ValueError(f"{path} holds nothing that orbax wrote")
    linked = [inner for inner in path.rglob("*") if inner.is_symlink()]
    if linked:
        raise ValueError(f"{linked[0]} is a link, and a checkpoint has none")
    try:
        with _quiet_orbax():
            if path.name.isdecimal() and (path / "record" / "metadata").is_file():
                store = Checkpoints(path.parent, None, keep_best=0, keep_latest=1, read_only=True)
                record = store._record(int(path.name))
                shapes = [leaf["shape"] for leaf in record["leaves"].values() if "shape" in leaf]
                _limit(sum(map(math.prod, shapes)), most, path)
                return Arrays(store._arrays(int(path.name), record["leaves"]), checked=True)
            return Arrays(_foreign_arrays(tree, most), checked=False)
    except _Damage as damage:
        raise DamagedCheckpointError(f"{path} is damaged: {damage}") from damage


def _foreign_arrays(folder: Path, most: int) -> dict[str, np.ndarray]:
    patience = _Patient()
    describing, handler = _describing_handler(), _tree_handler(patience)
    try:
        described = describing.metadata(epath.Path(folder)).tree
        leaves = inventories.named_leaves(described)
        arrays = {name: leaf for name, leaf in leaves.items() if hasattr(leaf, "shape")}
        _limit(sum(math.prod(leaf.shape) for leaf in arrays.values()), most, folder)
        # What is not read is left out of the template: text, and nodes without leaves.
        wanted = jax.tree.map(lambda leaf: leaf if hasattr(leaf, "shape") else ..., described)
        read = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        found = handler.restore(
            epath.Path(folder), args=ocp.args.PyTreeRestore(item=wanted, restore_args=read)
        )
        return {
            name: np.asarray(leaf)
            for name, leaf in inventories.named_leaves(found).items()
            if name in arrays
        }
    except (MemoryError, ValueError) as error:
        if isinstance(error, _TooMuch | MemoryError):
            raise
        raise _Damage(_unreadable(error, patience.failed, folder)) from error
    except Exception as error:
        number = _error_number(error)
        if number in _NOT_DAMAGE:
            reason = os.strerror(number).lower()
            raise OSError(number, f"it cannot be read now ({reason})", str(folder)) from error
        raise _Damage(_unreadable(error, patience.failed, folder)) from error
    finally:
        describing.close()
        handler.close()


class _TooMuch(ValueError):
    """More numbers than a checkpoint of this size on the disk has."""


def _limit(numbers: int, most: int, folder: Path) -> None:
    if numbers > most:
        raise _TooMuch(f"{folder} would unfold to {numbers:,} numbers, which no weights do")


class _Damage(Exception):
    """Why one step cannot be used."""


class _Patient(ocp.type_handlers.NumpyHandler):
    """Reads and writes numpy arrays, and raises only when no transfer is under way any more.

    Orbax raises at the first failure and closes its event loop, while the transfers of the other
    leaves still report to it: each then prints a traceback ("Event loop is closed") over the one
    message that matters. Waiting also finds every leaf that fails, not only the first.
    """

    def __init__(self, kind: str | None = None) -> None:
        super().__init__()
        self._kind = kind
        self.failed: list[str] = []
        self._under_way = 0
        self._errors: list[Exception] = []

    def typestr(self) -> str:
        """What orbax calls the kind of leaf; another one where arrays are read in its place."""
        return self._kind or super().typestr()

    async def metadata(self, infos: Any) -> Any:
        """Shapes and dtypes."""
        describe = super().metadata
        results = await asyncio.gather(
            *(describe([info]) for info in infos), return_exceptions=True
        )
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:
            raise errors[0]
        return [result[0] for result in results if not isinstance(result, BaseException)]

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        read = super().deserialize
        results = await asyncio.gather(
            *(read([info], args and [args[i]]) for i, info in enumerate(infos)),
            return_exceptions=True,
        )
        arrays, errors = [], []
        for info, result in zip(infos, results, strict=True):
            if isinstance(result, BaseException):
                self.failed.append(info.name)
                errors.append(result)
            else:
                arrays.append(result[0])
        if errors:
            raise errors[0]
        return arrays

    async def _open_and_write(self, value: Any, tspec: Any, ts_context: Any) -> None:
        self._under_way += 1
        await asyncio.sleep(0)  # until every other write has been counted
        try:
            await super()._open_and_write(value, tspec, ts_context)
        except Exception as error:
            self._errors.append(error)
        finally:
            self._under_way -= 1
        if not self._under_way and self._errors:
            errors, self._errors = self._errors, []
            raise errors[0]


def _tree_handler(arrays: _Patient) -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(
        # Trained floating-point numbers shrink by a tenth, for more time than the writing takes.
        use_compression=False,
        multiprocessing_options=_alone(),
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((np.ndarray, arrays)),
    )


def _describing_handler() -> ocp.PyTreeCheckpointHandler:
    """Reads what a tree of anybody's holds; every number in it is an array to us."""
    types = ocp.type_handlers
    registry = types.create_type_handler_registry(
        (np.ndarray, _Patient()),
        (jax.Array, _Patient(types.ArrayHandler().typestr())),
        (int, _Patient(types.ScalarHandler().typestr())),
        (str, types.StringHandler()),
    )
    return ocp.PyTreeCheckpointHandler(
        multiprocessing_options=_alone(), type_handler_registry=registry
    )


def _writer() -> ocp.AsyncCheckpointer:
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(
            tree=_tree_handler(_Patient()),
            record=ocp.JsonCheckpointHandler(multiprocessing_options=_alone()),
            composite_options=ocp.CompositeOptions(multiprocessing_options=_alone()),
        ),
        multiprocessing_options=_alone(),
    )


def _alone() -> ocp.options.MultiprocessingOptions:
    """Orbax waits for no other process: what process 0 met is told to the others here, once."""
    this = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process{this}"
    )


def _agreed(read: Callable[[], _T]) -> _T:
    """What ``read`` returns; damage that one process meets is damage for all of them."""
    error: Exception | None = None
    try:
        result = read()
    except Exception as raised:
        error = raised
    if anywhere(error is not None):
        raise error or _Damage("another process cannot read it")
    return result


@contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Drops orbax's log while a store is open: its errors all reach us as exceptions."""
    logger = logging.getLogger("absl")

    def foreign(record: logging.LogRecord) -> bool:
        return "orbax" not in Path(record.pathname).parts

    logger.addFilter(foreign)
    try:
        yield
    finally:
        logger.removeFilter(foreign)


def _local(folder: str | os.PathLike[str]) -> Path:
    if "://" in os.fspath(folder):
        raise ValueError(
            f"checkpoints need a local or mounted folder, not the address {folder}; mount the "
            "bucket, or copy the folder when the run is over"
        )
    return Path(folder).expanduser().absolute()


def _require_folder(path: Path) -> None:
    if path.is_dir():
        return
    number = errno.ENOTDIR if path.exists() else errno.ENOENT
    raise OSError(number, "there is no folder of checkpoints", str(path))


def _take(folder: Path, stack: ExitStack) -> None:
    stack.enter_context(hold(folder))
    clean(folder)


def _ranked(records: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """The steps with a metric, best first, the earliest of equals before the others."""
    scored = {step: r["metric"] for step, r in records.items() if r["metric"] is not None}
    return sorted(scored, key=lambda step: (-scored[step], step))


def _rankable(metric: Any) -> float | None:
    if metric is None:
        return None
    try:
        value = float(metric)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metric must be one number or None, not {metric!r}") from error
    return value if math.isfinite(value) else None


def _error_number(error: BaseException | None) -> int | None:
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code:
            return int(code.group(1))
        error = error.__cause__ or error.__context__
    return None


def _unreadable(error: Exception, leaves: list[str], folder: Path) -> str:
    """One line that names the unreadable leaves, and the file where the error says which."""
    named = re.findall(re.escape(str(folder)) + r"""/([^\s"'\\]+)""", str(error))
    files = [name for name in (name.rstrip(":,.") for name in named) if (folder / name).is_file()]
    where = f" (in {files[-1]})" if files else ""
    if leaves:
        return f"these leaves cannot be read{where}: {', '.join(sorted(leaves))}"
    return f"its arrays cannot be read{where}: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException, length: int = 200) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return text if len(text) <= length else text[: length - 3] + "..."
