"""Read and write one checkpoint step, verified by checksum.

A JSON document that shows whether it was changed after it was written.

For documents that a program writes and later believes. A changed digit in a plain JSON file is
still a valid file; here it no longer matches the digest beside it. It is a guard against bad
disks and half-done copies, not against people: whoever can write the file can write the digest.

Where checkpoints can lie: in folders of this machine, or mounted on it.

A folder of numbered steps, in which a kill at any moment leaves no half step under a number.

A step is a folder whose name is its number. Whatever is on its way in or out has another name,
so that a number always stands for a whole step.

The files of one step: written, and read back only when they are what was written.

The arrays of a folder that orbax wrote, for whoever and whatever it was written.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flaxtransfer.checkpoint import orbax_io
from flaxtransfer.checkpoint.errors import Damage, DamagedCheckpointError, error_number, first_line
from flaxtransfer.checkpoint.manifest import Manifest, corrupted, stored


def sign(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its digest, ready to be written as JSON.

    >>> sorted(seal({"epoch": 3}))
    ['record', 'sha256']
    """
    return {"sha256": _digest(record), "record": dict(record)}


def verify(text: str) -> dict[str, Any]:
    """The record in a sealed document.

    Raises:
      ValueError: the text is no sealed document, or the record was changed.

    >>> import json
    >>> unseal(json.dumps(seal({"epoch": 3})))
    {'epoch': 3}
    >>> unseal(json.dumps(seal({"epoch": 3})).replace("3}", "7}"))
    Traceback (most recent call last):
    ValueError: the record was changed after it was written: its digest is another one
    """
    try:
        document = json.loads(text)
        record, digest = document["record"], document["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"this is no sealed record ({type(error).__name__}: {error})") from error
    if digest != _digest(record):
        raise ValueError("the record was changed after it was written: its digest is another one")
    return record


def jsonable(value: Any, name: str) -> Any:
    """A copy of ``value`` as JSON will return it: tuples become lists, all else stays.

    Args:
      value: dictionaries with text as keys, lists, tuples, text, Python numbers, booleans, None.
      name: what the value is called in the error.

    Raises:
      TypeError: anything else in it (numpy and jax numbers too); all of it is listed by place.

    >>> jsonable({"sizes": (224, 256)}, "meta")
    {'sizes': [224, 256]}
    """
    wrong: list[str] = []

    def copy(part: Any, place: str) -> Any:
        if isinstance(part, Mapping):
            wrong.extend(f"{place}: the key {k!r} is no text" for k in part if type(k) is not str)
            return {key: copy(item, f"{place}[{key!r}]") for key, item in part.items()}
        if isinstance(part, list | tuple):
            return [copy(item, f"{place}[{i}]") for i, item in enumerate(part)]
        if part is not None and type(part) not in (str, bool, int, float):
            wrong.append(f"{place}: is a {type(part).__module__}.{type(part).__name__}")
        return part

    result = copy(value, name)
    if wrong:
        raise TypeError(
            f"{name} must hold dictionaries with text as keys, lists, text, Python numbers, "
            "booleans and None:\n  " + "\n  ".join(wrong)
        )
    return result


def _digest(record: Any) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def local(folder: str | os.PathLike[str]) -> Path:
    """The absolute path of a folder, whether or not it is there.

    Raises:
      ValueError: it is an address.

    >>> local("/runs/one")
    PosixPath('/runs/one')
    """
    if "://" in os.fspath(folder):
        raise ValueError(
            f"checkpoints need a local or mounted folder, not the address {folder}; mount the "
            "bucket, or copy the folder when the run is over"
        )
    return Path(folder).expanduser().absolute()


def require(folder: Path) -> None:
    """Refuses a path at which there is no folder.

    Raises:
      OSError: nothing is there, or a file.
    """
    if folder.is_dir():
        return
    number = errno.ENOTDIR if folder.exists() else errno.ENOENT
    raise OSError(number, "there is no folder of checkpoints", str(folder))


_NUMBER = re.compile(r"0|[1-9][0-9]*")
# Steps that the writer underneath had not yet put in place, and steps on their way out.
_LEFTOVER = re.compile(r"[0-9]+(\.orbax-checkpoint-tmp.*|\.deleting)")


def numbered(folder: Path) -> list[int]:
    """The steps in the folder, in ascending order.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("10", "9", "8.damaged", "07"):
    ...     (folder / name).mkdir()
    >>> numbered(folder)
    [9, 10]
    """
    entries = folder.iterdir()
    return sorted(int(p.name) for p in entries if _NUMBER.fullmatch(p.name) and p.is_dir())


def clean(folder: Path) -> None:
    """Removes what a killed writer left half written or half removed."""
    for entry in folder.iterdir():
        if _LEFTOVER.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)


def remove(folder: Path, step: int) -> None:
    """Removes a step."""
    # Renamed first: a kill amid the removal must not leave half a step that looks whole.
    shutil.rmtree((folder / str(step)).rename(folder / f"{step}.deleting"))


def quarantine(folder: Path, step: int) -> Path:
    """Renames a step to ``<step>.damaged`` (or ``.damaged.2`` and so on), and returns that path."""
    target, count = folder / f"{step}.damaged", 1
    while target.exists():
        count += 1
        target = folder / f"{step}.damaged.{count}"
    return (folder / str(step)).rename(target)


def flush(folder: Path, step: int) -> None:
    """Returns when the system has put a step on the disk itself: it outlives a loss of power."""
    place = folder / str(step)
    for path in [*place.rglob("*"), place, folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def start(
    writer: orbax_io.Writer,
    folder: Path,
    step: int,
    arrays: dict[str, np.ndarray],
    record: dict[str, Any],
) -> None:
    """Starts to write a step with its record.

    Raises:
      OSError: it could not be written; what of it was there is removed.
    """
    try:
        orbax_io.start(writer, folder / str(step), arrays, sign(record))
    except Exception as error:
        raise _not_written(folder, step, error) from error


def finish(writer: orbax_io.Writer, folder: Path, step: int) -> None:
    """Returns when the step that was started is on the disk.

    Raises:
      OSError: it could not be written; what of it was there is removed.
    """
    try:
        orbax_io.finish(writer)
        flush(folder, step)
    except Exception as error:
        raise _not_written(folder, step, error) from error


def read_record(folder: Path, step: int) -> dict[str, Any]:
    """The record of a step.

    Raises:
      Damage: there is none, it was changed, or it is of another step.
    """
    path = folder / str(step) / "record" / "metadata"
    try:
        record = verify(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Damage("record/metadata is missing") from error
    except ValueError as error:
        raise Damage(f"record/metadata cannot be used: {first_line(error)}") from error
    if record["step"] != step:
        raise Damage(f"the folder of step {step} holds step {record['step']}")
    return record


def read_arrays(folder: Path, step: int, inventory: Manifest) -> dict[str, np.ndarray]:
    """The arrays of a step, each compared with its checksum in the inventory.

    Raises:
      Damage: one of them cannot be read, or is not what was saved.
      OSError: the machine did not allow it.
    """
    wanted = stored(inventory)
    if not wanted:
        return {}
    arrays = orbax_io.read_step(folder / str(step), wanted)
    wrong = corrupted(inventory, arrays)
    if wrong:
        raise Damage(f"the content differs from the checksum of {', '.join(wrong)}")
    return arrays


def _not_written(folder: Path, step: int, error: Exception) -> OSError:
    with suppress(OSError):
        clean(folder)
    number = error_number(error)
    if number is None:
        reason = f"{type(error).__name__}: {first_line(error)}"
    else:
        reason = os.strerror(number).lower()
    free = ""
    if number in (errno.ENOSPC, errno.EDQUOT):
        free = f", {shutil.disk_usage(folder).free / 1e6:.1f} MB free"
    intact = numbered(folder)
    return OSError(
        number or errno.EIO,
        f"step {step} was not written ({reason}{free}); "
        f"{f'steps {intact} are intact' if intact else 'there is no older step'}",
        str(folder),
    )


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
        raise ValueError(
            f"{path} holds checkpoints of several steps, name one: {', '.join(map(str, steps))}"
        )
    return None


def read_any_arrays(folder: str | os.PathLike[str], *, most: int) -> Arrays:
    """The arrays of a folder that any orbax wrote, without a template.

    You want it to look into checkpoints of others. For ours there is ``CheckpointManager``,
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
    path = local(folder)
    tree = folder_of_arrays(path)
    if ".orbax-checkpoint-tmp" in f"{tree}":
        raise ValueError(f"{tree} was never finished: the program that wrote it ended before")
    if tree is None:
        raise ValueError(f"{path} holds nothing that orbax wrote")
    linked = [inner for inner in path.rglob("*") if inner.is_symlink()]
    if linked:
        raise ValueError(f"{linked[0]} is a link, and a checkpoint has none")
    try:
        with orbax_io.quiet():
            if path.name.isdecimal() and (path / "record" / "metadata").is_file():
                return Arrays(_of_our_step(path, most), checked=True)
            return Arrays(_of_anybody(tree, most), checked=False)
    except Damage as damage:
        raise DamagedCheckpointError(f"{path} is damaged: {damage}") from damage


def _of_our_step(path: Path, most: int) -> dict[str, np.ndarray]:
    folder, step = path.parent, int(path.name)
    leaves = read_record(folder, step)["leaves"]
    _limit([math.prod(leaf["shape"]) for leaf in leaves.values() if "shape" in leaf], most, path)
    return read_arrays(folder, step, leaves)


def _of_anybody(folder: Path, most: int) -> dict[str, np.ndarray]:
    description = orbax_io.describe(folder)
    _limit(description.sizes.values(), most, folder)
    return orbax_io.read_tree(folder, description)


def _limit(sizes: Iterable[int], most: int, folder: Path) -> None:
    numbers = sum(sizes)
    if numbers > most:
        raise ValueError(f"{folder} would unfold to {numbers:,} numbers, which no weights do")
