"""Atomic writes and folder locks.

``atomic_write`` replaces a file or folder only when it is complete. ``folder_lock`` allows one
writer per folder: without it, two processes with one run folder would mix their checkpoints and
metrics. It uses the kernel's ``flock``, which ends with the process, so that a killed writer leaves
no lock behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["LOCK_NAME", "atomic_write", "folder_lock", "write_file"]


LOCK_NAME = ".lock"


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Atomic write of a file or folder.

    Args:
        target: the file or folder to write.

    Yields:
        A temporary path next to the target. When the block ends, it replaces the target; if the
        block raises an error, the target stays as it was.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_write(Path(folder) / "a.txt") as path:
    ...         _ = path.write_text("done")
    ...     (Path(folder) / "a.txt").read_text()
    'done'
    """
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    made, replaced = temporary / target.name, temporary / "replaced"
    try:
        yield made
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
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def folder_lock(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Folder lock: one writer of ``folder`` during a ``with`` block.

    Use it around everything that writes into a run folder. It does not block readers, and it is
    advisory: a program that writes without it is not stopped. In a run over several processes only
    process 0 takes it. A process that is forked (not spawned) while the lock is held keeps it until
    it ends too, unless the block was left before.

    Args:
        folder: the folder to write in; created, with its parents, if it does not exist.

    Yields:
        The path of the lock file, ``<folder>/.lock``. The file stays after the block: removing it
        would let two later writers lock two different files of the same name.

    Raises:
        ValueError: another writer holds the folder; the text names its process and machine.
        OSError: the folder cannot be created or written, or its file system has no locks.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, folder_lock(folder) as lock:
    ...     lock.name
    '.lock'
    """
    path = Path(folder) / LOCK_NAME
    descriptor = _open(path)
    try:
        _lock(descriptor, path)
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
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except FileExistsError as error:
        raise NotADirectoryError(
            errno.ENOTDIR, "this must be a folder, but it is a file", str(path.parent)
        ) from error
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO).lower()
        raise type(error)(
            error.errno, f"the folder cannot be written ({reason})", str(path.parent)
        ) from error


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
