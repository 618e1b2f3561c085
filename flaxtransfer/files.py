"""Atomic writes and one writer per folder.

One writer per folder: an advisory lock that ends with the process that holds it.

Two processes that write one run folder do not fail, they mix: checkpoints of both, one metrics
file with the lines of both. The kernel's ``flock`` is held by an open file, so that a killed
writer leaves no lock behind, which a "pid file" would.

Files and folders that appear whole or not at all.
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
def folder_lock(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Holds the one writer's place of ``folder`` for the length of a ``with`` block.

    Use it around everything that writes into a run folder. It does not keep readers out, and it
    is advisory: a program that writes without asking is not stopped. In a run over several
    processes only process 0 takes it. A process that is forked (not spawned) while the lock is
    held keeps it alive until that child ends as well, unless the block has been left before.

    Args:
      folder: the folder to write in; made, with its parents, when it does not exist.

    Yields:
      The path of the lock file, ``<folder>/.lock``. The file stays after the block: removing it
      would let two later writers lock two different files of the same name.

    Raises:
      ValueError: another writer holds the folder; the text names its process and machine.
      OSError: the folder cannot be made or written, or its file system knows no locks.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, hold(folder) as lock:
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
        # Closing alone would leave the lock with any forked child that inherited the file.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except FileExistsError as error:
        raise NotADirectoryError(
            errno.ENOTDIR, "a folder is needed here, but there is a file", str(path.parent)
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
            "the file system knows no locks, so that two writers could mix their files; "
            "use a folder on another one",
            str(path.parent),
        ) from error


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """A path beside the target that becomes the target when the block ends without an error.

    What was there before is replaced then, and stays if the block fails.
    """
    beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    made, replaced = beside / target.name, beside / "replaced"
    try:
        yield made
        if made.is_dir() and target.is_dir():
            # A folder with files in it cannot be renamed over.
            target.rename(replaced)
        try:
            made.replace(target)
        except BaseException:
            if replaced.exists():
                replaced.rename(target)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_file(path: Path, data: bytes) -> None:
    """Writes a file and waits until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
