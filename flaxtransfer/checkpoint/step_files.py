"""Checkpoint step files.

One folder per step, named by its number, with the arrays and a signed record. A step is complete or
absent: while it is written or removed its folder has another name. Everything is verified by
checksum when it is read.
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
from flaxtransfer.checkpoint.manifest import (
    Damage,
    DamagedCheckpointError,
    Manifest,
    corrupted,
    error_number,
    first_line,
    stored,
)
from flaxtransfer.files import check_regular, parse_json

_NUMBER = re.compile(r"0|[1-9][0-9]*")
# Steps that orbax has not yet renamed into place, and steps that are being removed.
_LEFTOVER = re.compile(r"[0-9]+(\.orbax-checkpoint-tmp.*|\.deleting)")


def start(
    writer: orbax_io.Writer,
    folder: Path,
    step: int,
    arrays: dict[str, np.ndarray],
    record: dict[str, Any],
) -> None:
    """Starts to write a step with its record.

    Raises:
        OSError: it could not be written; incomplete files are removed.
    """
    try:
        orbax_io.start(writer, folder / str(step), arrays, sign(record))
    except Exception as error:
        raise _not_written(folder, step, error) from error


def finish(writer: orbax_io.Writer, folder: Path, step: int) -> None:
    """Waits until the started step is on the disk.

    Raises:
        OSError: it could not be written; incomplete files are removed.
    """
    try:
        orbax_io.finish(writer)
        sync(folder, step)
    except Exception as error:
        raise _not_written(folder, step, error) from error


def read_record(folder: Path, step: int) -> dict[str, Any]:
    """Reads the record of a step.

    Raises:
        Damage: it is missing, it was changed, or it is of another step.
    """
    path = folder / str(step) / "record" / "metadata"
    try:
        check_regular(path)
        record = verify(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Damage("record/metadata is missing") from error
    except ValueError as error:
        raise Damage(f"record/metadata cannot be used: {first_line(error)}") from error
    if record["step"] != step:
        raise Damage(f"the folder of step {step} holds step {record['step']}")
    return record


def read_arrays(folder: Path, step: int, manifest: Manifest) -> dict[str, np.ndarray]:
    """Reads the arrays of a step and compares each with its checksum in the manifest.

    Raises:
        Damage: one of them cannot be read, or does not match its checksum.
        OSError: the machine failed.
    """
    paths = stored(manifest)
    if not paths:
        return {}
    try:
        _check_files(folder / str(step))
    except ValueError as error:
        raise Damage(str(error)) from error
    arrays = orbax_io.read_step(folder / str(step), paths)
    if wrong := corrupted(manifest, arrays):
        raise Damage(f"the content differs from the checksum of {', '.join(wrong)}")
    return arrays


def _not_written(folder: Path, step: int, error: Exception) -> OSError:
    with suppress(OSError):
        remove_leftovers(folder)
    number = error_number(error)
    if number is None:
        reason = f"{type(error).__name__}: {first_line(error)}"
    else:
        reason = os.strerror(number).lower()
    free = ""
    if number in (errno.ENOSPC, errno.EDQUOT):
        free = f", {shutil.disk_usage(folder).free / 1e6:.1f} MB free"
    intact = list_steps(folder)
    return OSError(
        number or errno.EIO,
        f"step {step} was not written ({reason}{free}); "
        f"{f'steps {intact} are intact' if intact else 'there is no older step'}",
        str(folder),
    )


def list_steps(folder: Path) -> list[int]:
    """The numbers of the steps in a folder, ascending.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("10", "9", "8.damaged", "07"):
    ...     (folder / name).mkdir()
    >>> list_steps(folder)
    [9, 10]
    """
    entries = folder.iterdir()
    return sorted(int(p.name) for p in entries if _NUMBER.fullmatch(p.name) and p.is_dir())


def remove_leftovers(folder: Path) -> None:
    """Removes incomplete steps that a killed writer has left."""
    for entry in folder.iterdir():
        if _LEFTOVER.fullmatch(entry.name):
            with suppress(OSError):
                _remove_folder(entry)


def remove(folder: Path, step: int) -> None:
    """Removes a step."""
    # Renamed first: a kill during the removal must not leave an incomplete step under its number.
    _remove_folder((folder / str(step)).rename(folder / f"{step}.deleting"))


def _remove_folder(folder: Path) -> None:
    # A link that somebody planted there goes, and what it leads to stays.
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def quarantine(folder: Path, step: int) -> Path:
    """Renames a step to ``<step>.damaged`` (or ``.damaged.2`` and so on) and returns that path."""
    target, count = folder / f"{step}.damaged", 1
    while target.exists():
        count += 1
        target = folder / f"{step}.damaged.{count}"
    return (folder / str(step)).rename(target)


def sync(folder: Path, step: int) -> None:
    """Waits until a step is on the disk (fsync), so that it survives a power failure."""
    place = folder / str(step)
    for path in [*place.rglob("*"), place, folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def local_path(folder: str | os.PathLike[str]) -> Path:
    """The absolute path of a local folder, which need not exist.

    Raises:
        ValueError: it is a URL.

    >>> local_path("/runs/one")
    PosixPath('/runs/one')
    """
    if "://" in os.fspath(folder):
        raise ValueError(
            f"checkpoints must be in a local or mounted folder, got the address {folder}; mount "
            "the bucket, or copy the folder after the run"
        )
    return Path(folder).expanduser().absolute()


def check_folder(folder: Path) -> None:
    """Raises unless there is a folder at this path.

    Raises:
        OSError: there is nothing, or a file.
    """
    if folder.is_dir():
        return
    number = errno.ENOTDIR if folder.exists() else errno.ENOENT
    raise OSError(number, "there is no folder of checkpoints", str(folder))


def sign(record: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the SHA-256 digest to a record, ready to be written as JSON.

    It detects failing disks and incomplete copies. It does not protect against deliberate changes:
    whoever can write the file can write the digest.

    >>> sorted(sign({"epoch": 3}))
    ['record', 'sha256']
    """
    return {"sha256": _digest(record), "record": dict(record)}


def verify(text: str) -> dict[str, Any]:
    """Checks the digest of a signed document and returns its record.

    Raises:
        ValueError: the text is not a signed document, or the record was changed.

    >>> verify(json.dumps(sign({"epoch": 3})))
    {'epoch': 3}
    >>> verify(json.dumps(sign({"epoch": 3})).replace("3}", "7}"))
    Traceback (most recent call last):
    ValueError: the record was changed after it was written: its digest does not match
    """
    try:
        document = parse_json(text.encode(errors="surrogatepass"), "it")
        record: dict[str, Any] = document["record"]
        digest = document["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"this is not a signed record ({type(error).__name__}: {error})"
        ) from error
    if digest != _digest(record):
        raise ValueError("the record was changed after it was written: its digest does not match")
    return record


def _digest(record: Any) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def jsonable(value: Any, name: str) -> Any:
    """Checks and copies a JSON-able value; tuples become lists.

    Args:
        value: dictionaries with string keys, lists, tuples, strings, numbers, booleans, None.
        name: of the value, for errors.

    Raises:
        TypeError: anything else in it (numpy and jax numbers too); all places are listed.

    >>> jsonable({"sizes": (224, 256)}, "meta")
    {'sizes': [224, 256]}
    """
    wrong: list[str] = []

    def copy(part: Any, place: str) -> Any:
        if isinstance(part, Mapping):
            wrong.extend(
                f"{place}: the key {k!r} is not a string" for k in part if type(k) is not str
            )
            return {key: copy(item, f"{place}[{key!r}]") for key, item in part.items()}
        if isinstance(part, list | tuple):
            return [copy(item, f"{place}[{i}]") for i, item in enumerate(part)]
        if part is not None and type(part) not in (str, bool, int, float):
            wrong.append(f"{place}: is a {type(part).__module__}.{type(part).__name__}")
        return part

    result = copy(value, name)
    if wrong:
        raise TypeError(
            f"{name} must hold only dictionaries with string keys, lists, strings, Python numbers, "
            "booleans and None:\n  " + "\n  ".join(wrong)
        )
    return result


@dataclass(frozen=True)
class Arrays:
    """Arrays from any orbax folder.

    Args:
        by_path: the arrays, by the path of each leaf.
        checked: whether each leaf was compared with its checksum; only our own steps have one.
    """

    by_path: dict[str, np.ndarray]
    checked: bool


def read_any_arrays(folder: str | os.PathLike[str], *, most: int) -> Arrays:
    """Reads the arrays of any orbax folder, without a template.

    Use it for checkpoints of other programs. For our own use ``CheckpointManager``, which also
    fills a template and skips damaged steps.

    Args:
        folder: as ``find_tree_folder`` accepts it, or one of our steps.
        most: limit on the elements of all arrays; if there are more, nothing is read.

    Returns:
        The arrays; strings and empty nodes of the tree are left out.

    Raises:
        ValueError: no such folder, links in it, more elements than ``most``.
        DamagedCheckpointError: it cannot be read, or does not match its checksums.
        OSError: the machine failed.
    """
    path = local_path(folder)
    tree = find_tree_folder(path)
    if ".orbax-checkpoint-tmp" in f"{tree}":
        raise ValueError(
            f"{tree} is incomplete: the program that wrote it ended before it was finished"
        )
    if tree is None:
        raise ValueError(f"{path} is not an orbax checkpoint")
    _check_files(path)
    try:
        with orbax_io.quiet():
            if path.name.isdecimal() and (path / "record" / "metadata").is_file():
                return Arrays(_read_our_step(path, most), checked=True)
            return Arrays(_read_foreign_tree(tree, most), checked=False)
    except Damage as damage:
        raise DamagedCheckpointError(f"{path} is damaged: {damage}") from damage


def _check_files(folder: Path) -> None:
    """Refuses what orbax must not open: links, and named pipes, which would block it for ever."""
    for inner in folder.rglob("*"):
        if inner.is_symlink():
            raise ValueError(f"a checkpoint must not hold links, got {inner}")
        if not inner.is_dir():
            check_regular(inner)


def find_tree_folder(folder: str | os.PathLike[str]) -> Path | None:
    """The folder of an orbax tree: this one, or the only item in it; None without one.

    Raises:
        ValueError: several trees, or a folder of steps; the text names them.

    >>> find_tree_folder("/") is None
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
        raise ValueError(f"{path} holds several trees, give one of them: {names}")
    steps = sorted({inner.parents[1] for inner in path.glob("[0-9]*/*/_METADATA")})
    if steps:
        raise ValueError(
            f"{path} holds checkpoints of several steps, give one of them: "
            f"{', '.join(map(str, steps))}"
        )
    return None


def _read_our_step(path: Path, most: int) -> dict[str, np.ndarray]:
    folder, step = path.parent, int(path.name)
    leaves = read_record(folder, step)["leaves"]
    _check_size(
        [math.prod(leaf["shape"]) for leaf in leaves.values() if "shape" in leaf], most, path
    )
    return read_arrays(folder, step, leaves)


def _read_foreign_tree(folder: Path, most: int) -> dict[str, np.ndarray]:
    description = orbax_io.describe(folder)
    _check_size(description.sizes.values(), most, folder)
    return orbax_io.read_tree(folder, description)


def _check_size(sizes: Iterable[int], most: int, folder: Path) -> None:
    elements = sum(sizes)
    if elements > most:
        raise ValueError(f"{folder} must have at most {most:,} numbers, got {elements:,}")
