"""Files that others may have made: checked reads, atomic writes, seals and folder locks.

``check_regular`` and ``read_json`` refuse what a file of ours never is before it can hang or fill
memory. ``atomic_write`` replaces a file or folder only when it is complete. ``folder_lock`` allows
one writer per folder: without it, two processes with one run folder would mix their checkpoints and
metrics. It uses the kernel's ``flock``, which ends with the process, so that a killed writer leaves
no lock behind.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = [
    "LOCK_NAME",
    "MAKE_AGAIN",
    "atomic_write",
    "bucket_address",
    "check_regular",
    "check_seal",
    "discard_folder",
    "folder_lock",
    "json_bytes",
    "naming",
    "parse_json",
    "publish_folder",
    "read_json",
    "refuse_link",
    "replace_file",
    "seal",
    "seal_again",
    "seal_problems",
    "sealed",
    "sha256_of",
    "write_file",
    "write_json",
]


LOCK_NAME = ".lock"


def bucket_address(path: str | os.PathLike[str] | None) -> str | None:
    """The address of a place in a bucket of Cloud Storage; None for a path of this machine.

    A ``Path`` that was made of an address has lost one of its slashes.

    >>> bucket_address(Path("gs://bucket/runs/one")), bucket_address("runs/one")
    ('gs://bucket/runs/one', None)
    """
    text = "" if path is None else os.fspath(path)
    found = text == "gs:" or text.startswith("gs:/")
    return f"gs://{text[3:].strip('/')}" if found else None


MOST_JSON_BYTES = 1 << 27
"""The largest JSON file of ours, the split of a million images, has about 100 MB."""

MOST_JSON_BRACKETS = 4_000_000
"""An empty list of three bytes takes 64 in memory; with this many, JSON stays below 1 GB."""

MOST_JSON_DIGITS = 40
"""Of a whole number; floats that were written as such have exponents."""

MOST_JSON_DEPTH = 64
"""Files of ours are nested about ten deep; from about 1,000 on, Python cannot walk the value."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuses a path that is no regular file, before it is opened.

    Opening a named pipe waits for a writer for ever, and a device may never end. Symbolic links are
    followed: a link to a file is a file.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: it is a folder, named pipe, socket or device.

    >>> check_regular(os.devnull)
    Traceback (most recent call last):
    ValueError: /dev/null must be a regular file, got a device
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise ValueError(f"{os.fspath(path)} must be a regular file, got {kind}")


def refuse_link(path: str | os.PathLike[str]) -> None:
    """Refuses a symbolic link where a file or folder of ours is written.

    A run folder may come from a download or lie in a shared place; a link that somebody left there
    would lead the writer out of it.

    Raises:
        ValueError: the path is a symbolic link; the text names its target.
    """
    if os.path.islink(path):
        raise ValueError(
            f"{os.fspath(path)} must not be a symbolic link, got one to {os.readlink(path)}: "
            "writing would leave the folder; remove the link"
        )


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file that somebody else may have made or damaged.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: "<path> is damaged: ...": no regular file, no JSON, or larger or deeper nested
            than a file of ours.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.json"
    ...     _ = path.write_text('{"steps": 3}')
    ...     read_json(path)
    {'steps': 3}
    """
    check_regular(path)
    size = os.stat(path).st_size
    if size > MOST_JSON_BYTES:
        raise ValueError(
            f"{os.fspath(path)} is damaged: it must have at most {MOST_JSON_BYTES:,} bytes, got "
            f"{size:,}"
        )
    return parse_json(Path(path).read_bytes(), os.fspath(path))


def parse_json(data: bytes, name: str) -> Any:
    """The value of JSON text: of a file, or of one line of it.

    Args:
        data: the text, in UTF-8.
        name: of the file or the place in it, for errors.

    Raises:
        ValueError: "<name> is damaged: ..."; see ``read_json``.
    """
    try:
        if data.count(b"[") + data.count(b"{") > MOST_JSON_BRACKETS:
            raise ValueError(f"more than {MOST_JSON_BRACKETS:,} brackets")
        value = json.loads(data.decode(), parse_int=_whole)
        if _depth_exceeds(value, MOST_JSON_DEPTH):
            raise RecursionError
    except RecursionError:
        reason = f"it must be nested at most {MOST_JSON_DEPTH} deep"
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 (byte {data[error.start]:#04x} at {error.start:,})"
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        reason = f"it is not JSON ({error.msg}, {place})" if data.strip() else "it is empty"
    except ValueError as error:
        reason = str(error)
    else:
        return value
    raise ValueError(f"{name} is damaged: {reason}")


def _whole(digits: str) -> int:
    # What no float and no array holds overflows later, where nobody expects it.
    if len(digits) > MOST_JSON_DIGITS:
        raise ValueError(f"it has a number of {len(digits):,} digits")
    return int(digits)


def _depth_exceeds(value: Any, most: int) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(most):
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [child for node in inner for child in node if isinstance(child, dict | list)]
        if not level:
            return False
    return True


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Atomic write of a file or folder.

    Args:
        target: the file or folder to write.

    Yields:
        A temporary path next to the target. When the block ends, it replaces the target; if the
        block raises an error, the target stays as it was. Its name cannot be predicted, so that no
        link can be planted there; a link at the target is replaced, not followed.

    Raises:
        OSError: the folder of the target does not exist or cannot be written.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_write(Path(folder) / "a.txt") as path:
    ...         _ = path.write_text("done")
    ...     (Path(folder) / "a.txt").read_text()
    'done'
    """
    try:
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO).lower()
        raise type(error)(
            error.errno, f"{target.name} cannot be written ({reason})", str(target.parent)
        ) from error
    made, replaced = temporary / target.name, temporary / "replaced"
    try:
        try:
            yield made
        except OSError as error:
            # A person knows the target, not the temporary name; a full disk gives none at all.
            if error.errno is not None and str(error.filename or made).startswith(str(temporary)):
                error.filename = str(target)
            raise
        if made.is_dir() and target.is_dir():
            # A folder that is not empty cannot be the target of a rename.
            target.rename(replaced)
        try:
            made.replace(target)
        except BaseException:
            if replaced.exists():
                replaced.rename(target)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: Path, data: bytes) -> None:
    """Writes a file and waits until it is on the disk (fsync)."""
    with naming(path), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Writes a small file so that a reader, or a killed writer, sees the old one or the new one.

    Its temporary name is always the same, so that a killed writer leaves at most one, which the
    next removes; a link that somebody planted under that name is removed and not followed. For one
    writer at a time; ``atomic_write`` is for any number.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with suppress(FileNotFoundError):
        temporary.unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the name of a file into errors of the system that have none, such as of a full disk.

    >>> with naming(Path("a.txt")):
    ...     raise OSError(errno.ENOSPC, "No space left on device")
    Traceback (most recent call last):
    ...
    OSError: [Errno 28] No space left on device: 'a.txt'
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def publish_folder(made: Path, target: Path) -> bool:
    """Gives a complete folder its name, unless there is one already, which stays as it is.

    Of several processes that make the same content, the first one's is kept.

    Returns:
        Whether ``made`` has become ``target``.
    """
    try:
        made.rename(target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise
    return True


def discard_folder(folder: Path, opened: int, aside: Path) -> None:
    """Removes a folder, if it still is the one that is open under the descriptor ``opened``.

    Somebody else may have replaced it since it was looked at; then theirs stays.

    Args:
        folder: the name.
        opened: descriptor of the folder that was looked at; as long as it is open, no other folder
            can have its inode.
        aside: a free name on the same file system, for the moment between.
    """
    try:
        folder.rename(aside)
    except OSError:
        return  # Somebody else has removed it, or it must stay, in a folder that is read-only.
    if not os.path.samestat(aside.stat(), os.fstat(opened)):
        # Not what was looked at: back, unless a third one has come meanwhile.
        publish_folder(aside, folder)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def folder_lock(folder: str | os.PathLike[str], *, wait: bool = False) -> Iterator[Path]:
    """Folder lock: one writer of ``folder`` during a ``with`` block.

    Use it around everything that writes into a run folder. It does not block readers, and it is
    advisory: a program that writes without it is not stopped. In a run over several processes only
    process 0 takes it. A process that is forked (not spawned) while the lock is held keeps it until
    it ends too, unless the block was left before.

    Args:
        folder: the folder to write in; created, with its parents, if it does not exist.
        wait: wait for another writer to end, in place of an error.

    Yields:
        The path of the lock file, ``<folder>/.lock``. The file stays after the block: removing it
        would let two later writers lock two different files of the same name.

    Raises:
        ValueError: another writer holds the folder (the text names its process and machine), or
            the lock file is a link, which somebody else has put there.
        OSError: the folder cannot be created or written, or its file system has no locks.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, folder_lock(folder) as lock:
    ...     lock.name
    '.lock'
    """
    path = Path(folder) / LOCK_NAME
    descriptor = _open(path)
    try:
        _lock(descriptor, path, wait)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield path
    finally:
        # Closing alone would leave the lock to any forked child that inherited the file.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() or path.is_symlink():
            refuse_link(path)
            check_regular(path)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        return os.open(path, flags, 0o644)
    except FileExistsError as error:
        raise NotADirectoryError(
            errno.ENOTDIR, "this must be a folder, but it is a file", str(path.parent)
        ) from error
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO).lower()
        raise type(error)(
            error.errno, f"the folder cannot be written ({reason})", str(path.parent)
        ) from error


def _lock(descriptor: int, path: Path, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        raise ValueError(
            f"{path.parent} is being written by {holder or 'another process'}"
            f"{' (this process)' if holder.startswith(f'process {os.getpid()} on') else ''}; "
            "wait until it ends, or give another folder"
        ) from error
    except OSError as error:
        raise OSError(
            error.errno,
            "the file system has no locks, so that two writers could mix their files; use a "
            "folder on another file system",
            str(path.parent),
        ) from error


MANIFEST_FILE = "manifest.json"


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no regular file.
    """
    check_regular(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader, or a killed writer, sees the old file or the new one."""
    replace_file(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """What ``write_json`` writes."""
    return (json.dumps(value, indent=2) + "\n").encode()


def seal(folder: Path, names: Iterable[str]) -> None:
    """Writes the manifest of a folder: the SHA-256 of each of these files that is there.

    Readers compare with it (``seal_problems``), so that a file that was damaged or edited later is
    named and not believed. It is no signature: who can write files can write the manifest too.
    """
    digests = {name: sha256_of(folder / name) for name in names if (folder / name).is_file()}
    _write_manifest(folder, digests)


def seal_again(folder: Path, name: str) -> None:
    """Brings the manifest of a sealed folder up to a file that was written anew."""
    if (folder / MANIFEST_FILE).exists():
        _write_manifest(folder, sealed(folder) | {name: sha256_of(folder / name)})


def _write_manifest(folder: Path, digests: dict[str, str]) -> None:
    write_json(folder / MANIFEST_FILE, {"sha256": _digest_of(digests), "files": digests})


def sealed(folder: Path) -> dict[str, str]:
    """The digests in the manifest of a folder, by file name.

    Raises:
        FileNotFoundError: the folder has no manifest.
        ValueError: the manifest itself is damaged.
    """
    path = folder / MANIFEST_FILE
    manifest = read_json(path)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or manifest.get("sha256") != _digest_of(files):
        raise ValueError(f"{path} is damaged: its checksum does not match")
    return files


def seal_problems(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Files of a sealed folder that are not what they were, each with what is wrong.

    Args:
        folder: with a manifest.
        names: which files to look at; by default all of the manifest.

    Raises:
        FileNotFoundError: the folder has no manifest.
        ValueError: the manifest itself is damaged.

    >>> with tempfile.TemporaryDirectory() as name:
    ...     folder = Path(name)
    ...     _ = (folder / "a.txt").write_text("one")
    ...     seal(folder, ["a.txt"])
    ...     before = seal_problems(folder)
    ...     _ = (folder / "a.txt").write_text("two")
    ...     before, seal_problems(folder)
    ({}, {'a.txt': 'was changed since it was written'})
    """
    files = sealed(folder)
    problems = {}
    for name in files if names is None else names:
        if name not in files:
            problems[name] = "is not in the manifest"
            continue
        try:
            if sha256_of(folder / name) != files[name]:
                problems[name] = "was changed since it was written"
        except FileNotFoundError:
            problems[name] = "is missing"
        except ValueError as error:
            problems[name] = str(error)
    return problems


MAKE_AGAIN = "flaxtransfer train --resume (fit(resume=True)) makes it again from checkpoints"
"""What helps against a damaged file of a finished run."""


def check_seal(path: Path, digest: Callable[[], str]) -> None:
    """Refuses a file that is not what the manifest beside it says; other files pass.

    Args:
        path: of the file; a ``manifest.json`` of another program beside it says nothing.
        digest: gives the SHA-256 of the bytes that were read; asked where a manifest tells it.

    Raises:
        ValueError: the file, or the manifest that tells, was damaged or changed.
    """
    manifest = path.with_name(MANIFEST_FILE)
    if not manifest.is_file():
        return
    content = read_json(manifest)
    if not isinstance(content, dict) or not {"sha256", "files"} <= content.keys():
        return
    wanted = sealed(path.parent)
    if path.name in wanted and wanted[path.name] != digest():
        raise ValueError(f"it was changed since the run wrote it; {MAKE_AGAIN}")


def _digest_of(digests: Any) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
