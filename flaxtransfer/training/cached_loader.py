"""Loaders of cached activations, and the content-addressed store behind them.

The frozen prefix is run once, and training reads its output, in memory or on disk under a digest of
what it was made from.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flaxtransfer.data.loader import Batch, DataLoaders, IndexedExamples
from flaxtransfer.data.pipeline import label_dtype
from flaxtransfer.distributed import share
from flaxtransfer.files import (
    MOST_JSON_BYTES,
    discard_folder,
    naming,
    parse_json,
    publish_folder,
    read_json,
    write_file,
)
from flaxtransfer.models.model import Model
from flaxtransfer.paths import Variables
from flaxtransfer.sharding import map_batches, place_replicated
from flaxtransfer.training.prefix_cache import Choice, bytes_text, prefix_digest
from flaxtransfer.training.step import forward

__all__ = [
    "Cached",
    "Fingerprint",
    "OutOfRange",
    "cached_feed",
    "evict",
    "get",
    "put",
    "write_array",
]


Fingerprint = Mapping[str, str]
"""Everything the array depends on, by name, each as a short text or a digest."""

_VALUES, _META = "features.npy", "features.json"

_CHUNK = 2**24
"""Bytes read at a time."""

_DAMAGE = (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError)
"""What reading an array raises that is not whole."""

_ATTEMPTS = 5
"""How often an array is looked for while other processes remove and replace it."""


class OutOfRange(ValueError):
    """A number is too large for the dtype that was to hold it."""


def _name(fingerprint: Fingerprint) -> str:
    """The name under which an array with this fingerprint lies."""
    return hashlib.sha256(json.dumps(dict(fingerprint), sort_keys=True).encode()).hexdigest()[:16]


def evict(folder: Path, wanted: int, budget: int) -> list[str]:
    """Removes what was not used for longest until ``wanted`` more bytes fit the budget.

    What a killed process of this machine has left half-written goes as well. A process that has
    mapped an array keeps it until it ends.

    Returns:
        The names of the arrays that were removed.
    """
    if not folder.is_dir():
        return []
    for path in folder.glob(".*@*:*"):
        host, _, process = path.name.rpartition("@")[2].partition(":")
        if host == platform.node() and process.isdecimal() and not _written(path, int(process)):
            shutil.rmtree(path, ignore_errors=True)
    found = []
    for meta in _finished(folder):
        # Another process may remove it at any moment.
        with contextlib.suppress(OSError):
            size = sum(file.stat().st_size for file in meta.parent.iterdir())
            found.append((meta.parent.stat().st_mtime, size, meta.parent))
    total, removed = sum(size for _, size, _ in found), []
    for _, size, slot in sorted(found):
        if total + wanted <= budget:
            break
        with contextlib.suppress(OSError), _opened(slot) as opened:
            discard_folder(slot, opened, _private(slot))
            removed.append(slot.name)
        total -= size
    return removed


def put(shape: tuple[int, ...], dtype: str, parts: Iterable[np.ndarray]) -> np.ndarray:
    """The parts, one after the other, as one array in memory.

    Raises:
        OutOfRange: a number does not fit ``dtype``.
        ValueError: a number is not finite, or the parts do not make up the shape.
    """
    values = np.empty(shape, dtype)
    filled = 0
    for part in _narrow(parts, shape, dtype):
        values[filled : filled + len(part)] = part
        filled += len(part)
    return values


def write_array(
    folder: Path,
    fingerprint: Fingerprint,
    shape: tuple[int, ...],
    dtype: str,
    parts: Iterable[np.ndarray],
) -> np.ndarray:
    """The parts, one after the other, as one array on disk, mapped into memory.

    It lies in a folder of its own, which appears under its name only when it is complete. If
    another process has put the same array there meanwhile, that one stays and is returned.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing is left behind.
        OutOfRange, ValueError: as ``keep``.
    """
    final = folder / _name(fingerprint)
    partial = _private(final)
    try:
        partial.mkdir(parents=True)
        with _opened(partial) as opened:
            # Until the block ends, so that nobody takes it for what a killed process left.
            with contextlib.suppress(OSError):  # A file system without locks.
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            values = _write_parts(partial, fingerprint, shape, dtype, parts)
            for _ in range(_ATTEMPTS):
                if publish_folder(partial, final):
                    return values
                kept, _ = get(folder, fingerprint, shape, dtype)
                if kept is not None:
                    return kept
        # What is there can be neither read nor removed: the own array, whose file has no name.
        return values
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_parts(
    partial: Path,
    fingerprint: Fingerprint,
    shape: tuple[int, ...],
    dtype: str,
    parts: Iterable[np.ndarray],
) -> np.ndarray:
    path, checksum = partial / _VALUES, 0
    # Plain writes: a full disk under a mapped file would end the process by a signal.
    with path.open("wb") as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in _narrow(parts, shape, dtype):
            data = memoryview(np.ascontiguousarray(part)).cast("B")
            with naming(path):
                file.write(data)
            checksum = zlib.crc32(data, checksum)
        with naming(path):
            file.flush()
            os.fsync(file.fileno())
    meta = {"fingerprint": dict(fingerprint), "shape": shape, "dtype": dtype, "crc32": checksum}
    write_file(partial / _META, (json.dumps(meta, indent=2) + "\n").encode())
    # Mapped before it has its name: afterwards another process may remove it.
    values: np.ndarray = np.load(path, mmap_mode="r")
    return values


def get(
    folder: Path, fingerprint: Fingerprint, shape: tuple[int, ...], dtype: str
) -> tuple[np.ndarray | None, str]:
    """The array with this very fingerprint, if it lies there whole.

    Returns:
        The array mapped into memory, or None; and why not, for a person. What is damaged is
        removed, unless another process has replaced it meanwhile.
    """
    slot = folder / _name(fingerprint)
    for _ in range(_ATTEMPTS):
        try:
            with _opened(slot) as opened:
                try:
                    return _read_array(opened, fingerprint, shape, dtype), ""
                except _DAMAGE as error:
                    if not _is_still(slot, opened):
                        continue  # It was removed while it was read: another one may be there now.
                    discard_folder(slot, opened, _private(slot))
                    return None, f"the one in {slot} is damaged ({error}) and is made anew"
        except FileNotFoundError:
            break
        except OSError as error:
            # Not a reason to remove what may be whole: another user's, or too many open files.
            return None, f"the one in {slot} cannot be read ({error.strerror or error})"
    return None, _explain(folder, fingerprint)


def _finished(folder: Path) -> Iterator[Path]:
    """The descriptions of all arrays that are complete; what is being written begins with "."."""
    return folder.glob(f"[!.]*/{_META}")


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """A descriptor of a folder, by which its files are reached whatever happens to its name."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_still(slot: Path, opened: int) -> bool:
    try:
        return os.path.samestat(slot.stat(), os.fstat(opened))
    except OSError:
        return False


def _private(slot: Path) -> Path:
    """A free name beside an array, which says whose it is, so that the dead's are cleared away."""
    owner = f"{platform.node()}:{os.getpid()}"
    return slot.with_name(f".{slot.name}.{uuid.uuid4().hex[:8]}@{owner}")


def _explain(folder: Path, fingerprint: Fingerprint) -> str:
    """How the nearest of the arrays that lie there differs from what is wanted; "" if none does."""
    nearest: list[str] | None = None
    for path in sorted(_finished(folder)):
        try:
            other = read_json(path)["fingerprint"]
            differs = sorted(k for k in fingerprint if other.get(k) != fingerprint[k])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if nearest is None or len(differs) < len(nearest):
            nearest = differs
    if nearest is None:
        return ""
    return f"none of those in {folder} fits; the nearest differs in {', '.join(nearest)}"


def _read_array(
    slot: int, fingerprint: Fingerprint, shape: tuple[int, ...], dtype: str
) -> np.ndarray:
    def opener(name: str, flags: int) -> int:
        # A named pipe in the place of the file would wait for a writer for ever.
        return os.open(name, flags | os.O_NONBLOCK, dir_fd=slot)

    with open(_META, "rb", opener=opener) as text:
        meta: dict[str, Any] = parse_json(text.read(MOST_JSON_BYTES), _META)
    wanted = {"fingerprint": dict(fingerprint), "shape": list(shape), "dtype": dtype}
    if foreign := [name for name, value in wanted.items() if meta[name] != value]:
        raise ValueError(f"its {' and '.join(foreign)} are of something else")
    with open(_VALUES, "rb", opener=opener) as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0) or np.lib.format.read_array_header_1_0(file) != (
            shape,
            False,
            np.dtype(dtype),
        ):
            raise ValueError("its header is of another array")
        start, size = file.tell(), os.fstat(file.fileno()).st_size
        expected = math.prod(shape) * np.dtype(dtype).itemsize
        if size - start != expected:
            raise ValueError(f"its numbers must take {expected} bytes, got {size - start}")
        checksum = 0
        while data := file.read(_CHUNK):
            checksum = zlib.crc32(data, checksum)
        if checksum != meta["crc32"]:
            raise ValueError("its checksum is another")
        values = np.memmap(file, np.dtype(dtype), "r", start, shape)
    with contextlib.suppress(OSError):  # A folder that may only be read is as good.
        os.utime(slot)  # For whoever clears away what was not used for long.
    return values


def _narrow(
    parts: Iterable[np.ndarray], shape: tuple[int, ...], dtype: str
) -> Iterator[np.ndarray]:
    count, largest = 0, float(np.finfo(dtype).max)
    for part in parts:
        if not np.isfinite(part).all():
            raise ValueError("the activations hold numbers that are not finite")
        if part.size and (most := float(np.abs(part).max())) > largest:
            raise OutOfRange(f"{most:.3g} is beyond the {largest:.5g} of {dtype}")
        count += len(part)
        if part.shape[1:] != shape[1:] or count > shape[0]:
            raise ValueError(f"parts of shape {part.shape} do not make up {shape}")
        yield part.astype(dtype, copy=False)
    if count != shape[0]:
        raise ValueError(f"{count} rows do not make up {shape}")


def _written(partial: Path, process: int) -> bool:
    """Whether a process is still at work on what it has not finished.

    Its number alone does not say: another process may have it by now, and one in a container is
    not seen from outside. The kernel's lock is the second witness.
    """
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        pass
    except PermissionError:
        return True
    else:
        return True
    try:
        with _opened(partial) as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # Gone, or a file system without locks.
    return False


Say = Callable[[str], None]


@dataclass(frozen=True)
class Cached:
    """What was kept.

    Args:
        feed: batches of activations, with ``start`` set.
        text: what it took, for a person.
        facts: the same as numbers, for the metrics.
    """

    feed: DataLoaders
    text: str
    facts: Mapping[str, Any]


def cached_feed(
    choice: Choice,
    model: Model,
    variables: Variables,
    feed: DataLoaders,
    mesh: Mesh,
    folder: Path,
    say: Say = lambda text: None,
) -> Cached | None:
    """Runs the prefix over all examples, or finds what an earlier run has kept.

    Args:
        choice: with a cut.
        model: the network.
        variables: as they are when the phase begins.
        feed: of images, with ``examples``.
        mesh: devices.
        folder: for arrays on disk.
        say: called with what a person should know before the long part begins.

    Returns:
        The feed, or None where the disk would not take it; ``say`` is told.

    Raises:
        ValueError: activations that are not finite.
    """
    examples = feed.examples
    assert examples is not None
    assert choice.cut is not None
    job = _Job(choice, choice.cut, model, variables, feed, examples, mesh, folder, say)
    began = time.monotonic()
    try:
        training, validation = job.parts()
    except OutOfRange as problem:
        wider = replace(choice, dtype="float32", nbytes=2 * choice.nbytes)
        if wider.nbytes > choice.budget:
            say(
                f"activations before {choice.cut} are not cached: {problem}, and float32 needs "
                f"{bytes_text(wider.nbytes)}"
            )
            return None
        say(f"activations before {choice.cut} are kept as float32 instead: {problem}")
        return cached_feed(wider, model, variables, feed, mesh, folder, say)
    except OSError as error:
        say(
            f"activations before {choice.cut} could not be kept in {folder} "
            f"({error.strerror or error}); training goes on without a cache"
        )
        return None
    nbytes = training.nbytes + validation.nbytes
    facts = {
        "cut": choice.cut,
        "where": choice.where,
        "dtype": choice.dtype,
        "images": len(examples.labels),
        "versions": choice.views,
        "bytes": nbytes,
        "seconds": round(time.monotonic() - began, 2),
        "found": job.found,
    }
    text = (
        f"cache before {choice.cut}: {len(training) + len(validation):,} activations, "
        f"{bytes_text(nbytes)} as {choice.dtype} {choice.place}, "
        f"{'found' if job.found == job.wanted else 'made'} in {facts['seconds']:.1f} s"
    )
    return Cached(_feed(choice, feed, examples, training, validation), text, facts)


@dataclass
class _Job:
    choice: Choice
    cut: str
    model: Model
    variables: Variables
    feed: DataLoaders
    examples: IndexedExamples
    mesh: Mesh
    folder: Path
    say: Say
    wanted: int = 2
    found: int = 0

    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """The activations of training, [versions * examples, ...], and of validation."""
        of_training: Mapping[str, str] = {}
        of_validation: Mapping[str, str] = {}
        if self.choice.where == "disk":
            of_training, of_validation = self.examples.fingerprint()
        count, views = len(self.examples.labels), self.choice.views
        versions = (self.examples.view(k) for k in range(views))
        made = self._one(
            views * count,
            itertools.chain.from_iterable(versions),
            {**of_training, "versions": str(views)},
            predict=True,
        )
        held_out = len(self.examples.validation_labels)
        if not held_out or self.feed.validation is None:
            self.wanted = 1
            return made, np.empty((0, *self.choice.shape), self.choice.dtype)
        return made, self._one(held_out, self.feed.validation(), of_validation)

    def _one(
        self, rows: int, batches: Iterable[Batch], images: Mapping[str, str], predict: bool = False
    ) -> np.ndarray:
        shape, dtype = (rows, *self.choice.shape), self.choice.dtype
        parts = self._activations(batches, rows if predict else 0)
        if self.choice.where == "memory":
            return put(shape, dtype, parts)
        fingerprint = {**images, **self._network()}
        values, why = get(self.folder, fingerprint, shape, dtype)
        if values is not None:
            self.found += 1
            return values
        if why:
            self.say(f"cache before {self.cut}: {why}")
        wanted = math.prod(shape) * np.dtype(dtype).itemsize
        if removed := evict(self.folder, wanted, self.choice.budget):
            self.say(f"{len(removed)} older caches in {self.folder} made room")
        return write_array(self.folder, fingerprint, shape, dtype, parts)

    def _network(self) -> dict[str, str]:
        segments = self.model.segments
        cut = segments.index(self.cut)
        return {
            "weights": prefix_digest(self.variables, segments[:cut]),
            "network": f"{self.model!r} up to {self.cut}, BatchNorm running",
            "preprocessing": repr(self.feed.preprocessing),
            "storage": self.choice.dtype,
            "software": f"jax {jax.__version__} on {self.mesh.devices.flat[0].device_kind}",
        }

    def _activations(self, batches: Iterable[Batch], predict: int) -> Iterator[np.ndarray]:
        """The prefix's output for every example, batch by batch; ``predict`` of them are timed."""
        prefix = forward(self.model.on(self.mesh), self.feed.preprocessing, None, self.cut)
        placed = place_replicated(self.variables, self.mesh)
        ended: list[float] = []

        def run(images: jax.Array) -> jax.Array:
            output = prefix(placed, images)
            if predict and len(ended) <= 1:
                # The first batch waits for the compiler, the second is timed.
                output.block_until_ready()
                ended.append(time.perf_counter())
                if len(ended) == 2:
                    self._predict((ended[1] - ended[0]) * predict / len(images))
            return output

        for output, _ in map_batches(run, batches, self.mesh):
            yield np.asarray(output, np.float32)

    def _predict(self, seconds: float) -> None:
        spared = seconds * (self.choice.passes / self.choice.views - 1)
        self.say(f"cache before {self.cut}: takes about {seconds:.2g} s, spares {spared:.2g} s")


def _feed(
    choice: Choice,
    feed: DataLoaders,
    examples: IndexedExamples,
    training: np.ndarray,
    validation: np.ndarray,
) -> DataLoaders:
    count, size = len(examples.labels), examples.batch_size
    labels = examples.labels.astype(label_dtype(examples.labels.ndim - 1))
    number, processes = share()
    own = slice(number * size // processes, (number + 1) * size // processes)

    def train(start: int) -> Iterator[Batch]:
        for step in itertools.count(start):
            rows, passes = (each[own] for each in examples.rows(step))
            yield {"image": training[passes % choice.views * count + rows], "label": labels[rows]}

    def held_out() -> Iterator[Batch]:
        targets = examples.validation_labels.astype(labels.dtype)
        for first in range(0, len(validation), size):
            batch = np.asarray(validation[first : first + size])
            missing = size - len(batch)
            places = first + np.arange(size)
            there = places < len(validation)
            whole = {
                "image": np.pad(batch, [(0, missing), *[(0, 0)] * (batch.ndim - 1)]),
                "label": np.pad(
                    targets[first : first + size], [(0, missing), *[(0, 0)] * (targets.ndim - 1)]
                ),
                "index": np.where(there, places, -1),
                "weight": there.astype(np.float32),
            }
            yield {name: values[own] for name, values in whole.items()}

    return replace(
        feed,
        train=train,
        validation=held_out if len(validation) else None,
        start=choice.cut,
        calibration=None,
        calibration_sample=None,
        examples=None,
    )
