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

__all__ = [
    "LOCK_NAME",
    "atomic_write",
    "discard_folder",
    "folder_lock",
    "naming",
    "publish_folder",
    "write_file",
]


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
