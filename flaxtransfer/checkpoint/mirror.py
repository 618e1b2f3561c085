"""Run folders and images in a bucket of Cloud Storage.

A bucket has no lock, no append and no rename, on which everything that is proven about kills rests.
A run therefore works in a local folder, and a thread mirrors it: the small files first, then each
checkpoint with its record last, so that a step with a record is whole and the files beside it fit.
Whoever starts on an empty machine fetches the whole steps, and continues from the newest. Of two
that write to one address the later start takes over: the earlier one reads so before its next
upload, and stops.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from flaxtransfer.checkpoint.manager import ranked
from flaxtransfer.checkpoint.manifest import Damage, first_line
from flaxtransfer.checkpoint.step_files import read_record
from flaxtransfer.distributed import from_first
from flaxtransfer.files import (
    MANIFEST_FILE,
    bucket_address,
    folder_lock,
    json_bytes,
    parse_json,
    read_json,
    write_json,
)

T = TypeVar("T")
Say = Callable[[str], None]

TRIES = 3
"""Of each request. The client has tries of its own within each, over half a minute."""

PAUSES_S = (1.0, 5.0)
"""Between the tries."""

STORAGE = "https://storage.googleapis.com"
"""Where it is, if neither STORAGE_EMULATOR_HOST nor the configuration of fsspec says otherwise."""

ANSWER_S = 20.0
"""Within which it gives the first answer of a process. Later ones are waited for longer."""

LOOK_S = 2.0
"""Between two looks at the local folder."""

SMALL_S = 60.0
"""After which small files that have changed are sent without a new step."""

AT_ONCE = 16
"""Objects that are fetched at the same time."""

_STEP = re.compile(r"((?:.*/)?checkpoints)/(0|[1-9][0-9]*)/(.+)")
_RECORD = "record/metadata"
_NOT_SENT = ("checkpoints", "features")
"""Folders of a run that are sent as steps, or made again."""

_OWNER = ".owner.json"
"""The object that tells who writes to an address: the start that came last."""

_INDEX = ".bucket.json"
"""What is known of the files of a folder that was fetched: size and mark of their objects."""


class TakenOver(ValueError):
    """Another start writes to the address now; this one has stopped."""


class Object(NamedTuple):
    """What a listing says of an object: bytes, and a mark that changes with its content."""

    size: int
    mark: str

    def __str__(self) -> str:
        return f"{self.size} {self.mark}"


@dataclass(frozen=True)
class Bucket:
    """A place in a bucket, such as ``gs://bucket/runs/scans``; names are relative to it.

    Requests that fail are repeated (``TRIES``). Errors name the address and what helps.

    Args:
        address: without a slash at its end.
    """

    address: str

    @classmethod
    def at(cls, address: str) -> Bucket:
        """The place of an address; the client is loaded now.

        Raises:
            ConnectionError: the storage has not given any answer within ``ANSWER_S``.
            ValueError: it names no bucket; the extra is not installed.
        """
        found = cls(address.rstrip("/"))
        form = r"gs://[a-z0-9][a-z0-9._-]*(/[^/]+)*"
        if not (re.fullmatch(form, found.address) and _is_safe(found.address[5:])):
            raise ValueError(f"the address must be gs://<bucket>/<path>, got {address}")
        _check_answers()
        _client()
        return found

    @property
    def bucket(self) -> str:
        """The name of the bucket."""
        return self.address.removeprefix("gs://").partition("/")[0]

    def objects(self) -> dict[str, Object]:
        """All objects below the address, by name.

        Those that stand for folders are left out, and the record of who writes.

        Raises:
            OSError: they cannot be listed.
            ValueError: a name that would lie outside of a folder.
        """

        def look() -> Mapping[str, Mapping[str, Any]]:
            _client().invalidate_cache()
            found: Mapping[str, Mapping[str, Any]] = _client().find(self.address, detail=True)
            return found

        root = f"{self.address.removeprefix('gs://')}/"
        found = {}
        for path, each in self._tried(look, "listed").items():
            # The listing of "a" has "a" itself, where there is an object of that name.
            if not path.startswith(root) or path.endswith("/"):
                continue
            name = path.removeprefix(root)
            if name == _OWNER:
                continue
            if not _is_safe(name):
                raise ValueError(f"{self.address} must hold names of files, got {name!r}")
            mark = each.get("md5Hash") or each.get("etag") or each.get("generation") or ""
            found[name] = Object(int(each["size"]), str(mark))
        return found

    def put(self, name: str, data: bytes) -> None:
        """Writes an object, which is there whole or not at all."""
        self._tried(lambda: _client().pipe_file(f"{self.address}/{name}", data), "written", name)

    def get(self, name: str) -> bytes:
        """Reads an object."""
        read = self._tried(lambda: _client().cat_file(f"{self.address}/{name}"), "read", name)
        return bytes(read)

    def fetch(self, name: str, target: Path) -> None:
        """Reads an object into a file, which is there whole or not at all."""
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.tmp")
        self._tried(lambda: _client().get_file(f"{self.address}/{name}", str(part)), "read", name)
        part.replace(target)

    def remove(self, name: str) -> None:
        """Removes an object; nothing happens where there is none."""

        def gone() -> None:
            with suppress(FileNotFoundError):
                _client().rm_file(f"{self.address}/{name}")

        self._tried(gone, "removed", name)

    def check_writable(self) -> None:
        """Writes, replaces and removes an empty object.

        Raises:
            OSError: one of these is refused.
        """
        name = ".flaxtransfer-may-write"
        for data in (b"", b"twice"):
            self.put(name, data)
        self.remove(name)

    def _tried(self, request: Callable[[], T], done: str, name: str = "") -> T:
        """The answer to a request, or what its last failure means."""
        for pause in (*PAUSES_S, None):
            try:
                return request()
            except Exception as error:
                explained = self._explained(error, done, name)
                if pause is None or not isinstance(explained, ConnectionError):
                    raise explained from error
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _explained(self, error: Exception, done: str, name: str) -> OSError:
        """What a person can do about an error; a ConnectionError where trying again may help."""
        what = f"{self.address}/{name}" if name else self.address
        code, text = getattr(error, "code", None), first_line(error)
        kind = type(error).__name__
        if kind in ("DefaultCredentialsError", "RefreshError") or str(code) == "401":
            return PermissionError(
                f"{what} cannot be {done} without credentials ({text}); run gcloud auth "
                "application-default login, or set GOOGLE_APPLICATION_CREDENTIALS"
            )
        if text.startswith("Forbidden") or str(code) == "403":
            return PermissionError(
                f"{what} cannot be {done}: this account has no permission for it; it needs the "
                f"role Storage Object {'Viewer' if done in ('read', 'listed') else 'User'} on the "
                f"bucket {self.bucket}"
            )
        if isinstance(error, FileNotFoundError):
            if done == "read":
                return FileNotFoundError(f"there is no {what}")
            return FileNotFoundError(f"there is no bucket {self.bucket} for {what}")
        if isinstance(error, OSError) and error.filename is not None:
            return error  # Of a local file.
        return ConnectionError(f"{what} could not be {done} in {TRIES} tries ({kind}: {text})")


@cache
def _check_answers() -> None:
    """Asks the storage for nothing, once, before the client is made.

    The client needs two minutes or more to find out that there is no network: it looks for
    credentials first, and repeats every request. Any answer will do, a refusal too.

    Raises:
        ConnectionError: there was none within ``ANSWER_S``.
    """
    if find_spec("gcsfs") is None:
        return  # The client says so.
    from fsspec.config import conf

    endpoints = [conf.get(name, {}).get("endpoint_url") for name in ("gs", "gcs")]
    if any([os.environ.get("STORAGE_EMULATOR_HOST"), *endpoints]):
        return
    said = ["timed out"]

    def ask() -> None:
        for pause in (*PAUSES_S, 0.0):
            said.append(_silence())
            if not said[-1]:
                return
            time.sleep(pause)

    # Looking a name up cannot be interrupted, and each of several addresses has its own time.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_S)
    if said[-1]:
        raise ConnectionError(
            f"addresses gs:// cannot be reached: {STORAGE} does not answer ({said[-1]}); connect "
            "this machine to it, or give a folder"
        )


def _silence() -> str:
    """Why the storage does not answer; "" where it does."""
    try:
        urllib.request.urlopen(STORAGE, timeout=ANSWER_S).close()
    except urllib.error.HTTPError:
        return ""
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        return "" if isinstance(reason, ssl.SSLError) else str(reason)
    return ""


def _client() -> Any:
    """The file system of the extra; one for the process.

    Raises:
        ValueError: it is not installed.
    """
    # The other way asks further services first, which need permissions of their own.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # Its tracebacks are of requests that are repeated, or whose error is explained here.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)
    try:
        import fsspec

        return fsspec.filesystem("gs")
    except ImportError as error:
        raise ValueError(
            "addresses gs:// need the extra 'gcs': pip install 'flaxtransfer[gcs]'"
        ) from error


@dataclass(frozen=True)
class Owner:
    """Who writes to an address, which a bucket keeps beside the run.

    A bucket has no lock that would end with a process, and who was killed cannot be told from who
    is slow. So the start that comes last owns the address, a restarted job among them, and whoever
    wrote there before stops at its next upload.

    Args:
        token: of this start, drawn at random.
        writer: process and machine, for a person.
        since: when it began, UTC.
        ended: whether it has sent all that it had.
    """

    token: str
    writer: str
    since: str
    ended: bool = False

    @classmethod
    def of(cls, bucket: Bucket) -> Owner | None:
        """Who writes to an address; None where nobody has, or the record is damaged.

        Raises:
            OSError: it cannot be read.
        """
        try:
            found = parse_json(bucket.get(_OWNER), f"{bucket.address}/{_OWNER}")
            token, writer, since = (str(found[name]) for name in ("token", "writer", "since"))
            return cls(token, writer, since, found["ended"] is True)
        except (FileNotFoundError, ValueError, TypeError, LookupError):
            return None

    @classmethod
    def claim(cls, bucket: Bucket, say: Say) -> Owner:
        """Makes this process the owner; says so where another one may be at work.

        Raises:
            OSError: the record cannot be read or written.
        """
        before = cls.of(bucket)
        writer = f"process {os.getpid()} on {socket.gethostname()}"
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        owner = cls(secrets.token_hex(16), writer, since)
        owner.write(bucket)
        if before is not None and not before.ended:
            say(
                f"{bucket.address} is taken over from {before.writer}, since {before.since}: where "
                "that still runs, it stops at its next upload"
            )
        return owner

    def write(self, bucket: Bucket, *, ended: bool = False) -> None:
        """Writes the record."""
        bucket.put(_OWNER, json_bytes({**vars(self), "ended": ended}))

    def check(self, bucket: Bucket, folder: Path) -> None:
        """Asks whether this process still is the owner.

        Args:
            bucket: where it writes.
            folder: that it mirrors, for the error.

        Raises:
            TakenOver: it is not.
            OSError: the record cannot be read.
        """
        found = Owner.of(bucket)
        if found is None or found.token != self.token:
            other = "another start" if found is None else f"{found.writer}, since {found.since}"
            raise TakenOver(
                f"{bucket.address} was taken over by {other}: this run has stopped, and is kept in "
                f"{folder}; let one of them write there, or give another --run"
            )


class Mirror:
    """A run folder that is mirrored to a bucket, by a thread; made by ``mirrored``.

    Args:
        folder: local.
        bucket: where it is mirrored to.
        say: gets one line for a person, when the storage fails and when it works again.
        owner: who this process is there; asked for before each change. None asks nobody.
    """

    def __init__(self, folder: Path, bucket: Bucket, say: Say, owner: Owner | None = None) -> None:
        self.folder = folder
        self.bucket = bucket
        self.taken: TakenOver | None = None
        self._say = say
        self._owner = owner
        # What is interrupted when another start takes over.
        self._in_main = threading.current_thread() is threading.main_thread()
        self._there = {name: each.mark for name, each in bucket.objects().items()}
        self._sent: dict[str, tuple[int, int]] = {}
        self._records: dict[str, str] = {}
        whole = whole_steps(self._there)
        self._safe = {f"{place}/{step}" for place, steps in whole.items() for step in steps}
        self._failure = ""
        self._sent_at = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="mirror")

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def sync(self, *, now: bool = True) -> None:
        """Brings the bucket up to the folder; in this order, so that a kill leaves whole steps.

        Args:
            now: send the small files, too, where there is no new step; metrics grow all the time.

        Raises:
            OSError: the storage failed; what is whole in the bucket stays whole.
        """
        # Listed before the small files are read: these then reach at least as far as every step.
        steps = self._steps()
        new = any(f"{place}/{number}" not in self._records for place, number in steps)
        if now or new or time.monotonic() - self._sent_at > SMALL_S:
            for path in self._small_files():
                self._send_file(path)
            self._sent_at = time.monotonic()
        for place in sorted({place for place, _ in steps}):
            for number in self._order(place, {n for other, n in steps if other == place}):
                if not self._send_step(f"{place}/{number}"):
                    break  # It was the best, and is no longer: the next look sees which is.
        for step in sorted({each[:2] for each in map(_parts, self._there) if each}):
            place, number = step
            # Only where there is a newer one: a folder that somebody has emptied empties nothing.
            newer = any(place == other and number < n for other, n in steps)
            if newer and step not in steps:
                self._remove_step(f"{place}/{number}")

    def close(self) -> None:
        """Ends the thread and sends what is left.

        Raises:
            OSError: the storage failed; the text says what is safe where.
            TakenOver: another start writes there.
        """
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self.taken is not None:
            raise self.taken
        try:
            self.sync()
            if self._owner is not None:
                self._check_owner()
                self._owner.write(self.bucket, ended=True)
        except TakenOver:
            raise
        except Exception as error:
            raise OSError(self._told(error)) from error
        self._say(f"{self.folder} is mirrored to {self.bucket.address}")

    def _run(self) -> None:
        while not self._end.wait(LOOK_S if not self._failure else 10 * LOOK_S):
            try:
                self.sync(now=False)
            except TakenOver as error:
                self.taken = error
                self._stop()
                return
            except Exception as error:
                if not self._failure:
                    self._say(f"{self._told(error)}; the run goes on")
                self._failure = str(error)
            else:
                if self._failure:
                    self._say(f"{self.bucket.address} is written again")
                self._failure = ""

    def _stop(self) -> None:
        """Stops what the main thread does, as Ctrl-C would: training ends with a checkpoint."""
        while self._in_main and not self._end.is_set():
            if callable(signal.getsignal(signal.SIGINT)):
                os.kill(os.getpid(), signal.SIGINT)
                return
            self._end.wait(LOOK_S)

    def _told(self, error: Exception) -> str:
        found = [int(name.rpartition("/")[2]) for name in self._safe if name.count("/") == 1]
        safe = f"step {max(found)} is safe there" if found else "no step is safe there"
        return (
            f"{error}; {safe}, and all is safe in {self.folder}: the same command with --resume "
            "sends the rest"
        )

    def _steps(self) -> set[tuple[str, int]]:
        """The steps of the run, such as ("checkpoints", 40), and of runs within the run."""
        steps = set()
        for root, folders, _ in os.walk(self.folder):
            if os.path.basename(root) == "checkpoints":
                place = Path(root).relative_to(self.folder).as_posix()
                steps |= {(place, int(name)) for name in folders if name.isdecimal()}
                folders.clear()
        return steps

    def _order(self, place: str, steps: set[int]) -> list[int]:
        """The order in which steps are sent; damaged ones are not.

        The best comes first, and then the newest, whose run may go back to the best: wherever a
        kill falls, the newest step in the bucket has beside it the best of those up to it. None
        are sent where one has gone meanwhile, which may have been the best.
        """
        sound = {}
        for step in sorted(steps, reverse=True):
            with suppress(Damage, OSError):
                sound[step] = read_record(self.folder / place, step)
        if not all((self.folder / place / str(step)).is_dir() for step in steps):
            return []
        return list(dict.fromkeys([*ranked(sound)[:1], *sound]))

    def _small_files(self) -> Iterator[Path]:
        """All other files that a run keeps, the seals of finished runs last."""
        seals = []
        for root, folders, files in os.walk(self.folder):
            # Activations are made again, and checkpoints are sent as steps.
            folders[:] = [each for each in folders if each not in _NOT_SENT and each[0] != "."]
            for name in sorted(files):
                if name[0] != ".":
                    path = Path(root, name)
                    if name == MANIFEST_FILE:
                        seals.append(path)
                    else:
                        yield path
        yield from seals

    def _send_file(self, path: Path) -> None:
        name = path.relative_to(self.folder).as_posix()
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                signature = (status.st_size, status.st_mtime_ns)
                if self._sent.get(name) == signature:
                    return
                data = file.read()
        except FileNotFoundError:
            return  # Replaced or removed since it was listed.
        if self._there.get(name) != base64.b64encode(hashlib.md5(data).digest()).decode():
            self._put(name, data)
        self._sent[name] = signature

    def _send_step(self, name: str) -> bool:
        """Sends a step, unless it is there; returns whether the folder still had it."""
        place = self.folder / name
        with ExitStack() as stack:
            try:
                # All are opened first, so that the run may remove the step meanwhile.
                files = {
                    path.relative_to(place).as_posix(): stack.enter_context(path.open("rb"))
                    for path in sorted(place.rglob("*"))
                    if path.is_file()
                }
                record = files.pop(_RECORD).read()
            except (FileNotFoundError, KeyError):
                return False
            digest = hashlib.sha256(record).hexdigest()
            seal = f"{name}/{_RECORD}"
            if name not in self._records and seal in self._there:
                self._records[name] = hashlib.sha256(self.bucket.get(seal)).hexdigest()
            if self._records.get(name) == digest:
                return True
            self._remove_step(name)  # What a killed process has left, or a damaged step.
            for inner, file in files.items():
                self._put(f"{name}/{inner}", file.read())
            self._put(seal, record)
            self._records[name] = digest
            self._safe.add(name)
            return True

    def _remove_step(self, name: str) -> None:
        """Removes a step from the bucket, its record first: what is left is not whole."""
        self._records.pop(name, None)
        self._safe.discard(name)
        seal = f"{name}/{_RECORD}"
        inner = {each for each in self._there if each.startswith(f"{name}/")} - {seal}
        for each in (*([seal] if seal in self._there else []), *sorted(inner)):
            self._check_owner()
            self.bucket.remove(each)
            self._there.pop(each, None)

    def _check_owner(self) -> None:
        if self._owner is not None:
            self._owner.check(self.bucket, self.folder)

    def _put(self, name: str, data: bytes) -> None:
        self._check_owner()
        self._there[name] = ""  # Before: it may be there although the answer is lost.
        self.bucket.put(name, data)


def _parts(name: str) -> tuple[str, int, str] | None:
    """Place, step and rest of the name of a file of a step; None for other files."""
    found = _STEP.fullmatch(name)
    return None if found is None else (found[1], int(found[2]), found[3])


def whole_steps(names: Iterable[str]) -> dict[str, list[int]]:
    """The steps with a record among the names of a bucket, by the folder of their checkpoints.

    >>> whole_steps({"checkpoints/8/d/1", "checkpoints/4/d/1", "checkpoints/4/record/metadata"})
    {'checkpoints': [4]}
    """
    found: dict[str, list[int]] = {}
    for place, step, rest in filter(None, map(_parts, names)):
        if rest == _RECORD:
            found.setdefault(place, []).append(step)
    return {place: sorted(steps) for place, steps in found.items()}


def fetch_steps(bucket: Bucket, folder: Path) -> str:
    """Fetches what a bucket has of a run and a folder has not; the newest step comes last.

    A local run that is as far, or further, stays as it is. Steps without a record are left: a
    process was killed while it sent them.

    Args:
        bucket: of the run.
        folder: local, empty or of the same run.

    Returns:
        What was found and done, for a person.

    Raises:
        OSError: the storage or the disk failed.
        ValueError: the folder holds another run.
    """
    objects = bucket.objects()
    whole, config = whole_steps(objects), "config.json"
    local = folder / config
    if local.is_file() and config in objects and bucket.get(config) != local.read_bytes():
        raise ValueError(
            f"{folder} holds another run than {bucket.address}; move it away, or give another --run"
        )
    runs = {place.removesuffix("checkpoints"): steps for place, steps in whole.items()}
    beside: dict[str | None, list[str]] = {}
    for name in objects:
        if _parts(name) is None:
            owner = max((run for run in runs if name.startswith(run)), key=len, default=None)
            beside.setdefault(owner, []).append(name)
    if runs:
        for name in beside.get(None, ()):
            if not (folder / name).exists():
                bucket.fetch(name, folder / name)
    fetched = 0
    for run, steps in sorted(runs.items()):
        if max(_own_steps(folder / run / "checkpoints"), default=-1) >= steps[-1]:
            continue
        for name in beside.get(run, ()):
            bucket.fetch(name, folder / name)
        for step in steps:
            _fetch_step(bucket, folder, f"{run}checkpoints/{step}", objects)
        fetched += len(steps)
    if not runs:
        return f"{bucket.address} has no whole step: the run starts with what is in {folder}"
    if not fetched:
        return f"{folder} is as far as {bucket.address}, or further: nothing is fetched"
    if "" not in runs:
        return f"{fetched} checkpoints of runs in {bucket.address} were fetched to {folder}"
    others = f" (also {', '.join(map(str, runs[''][:-1]))})" if runs[""][:-1] else ""
    return f"step {runs[''][-1]}{others} of {bucket.address} was fetched to {folder}"


def _own_steps(place: Path) -> list[int]:
    return [int(path.name) for path in place.glob("*") if path.name.isdecimal()]


def _fetch_step(bucket: Bucket, folder: Path, name: str, objects: Mapping[str, Object]) -> None:
    target = folder / name
    if target.exists():
        return
    # The name of a step that is being written: whoever opens the folder next removes it.
    part = target.with_name(f"{target.name}.orbax-checkpoint-tmp-fetched")
    shutil.rmtree(part, ignore_errors=True)
    inner = [each.removeprefix(f"{name}/") for each in objects if each.startswith(f"{name}/")]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda each: bucket.fetch(f"{name}/{each}", part / each), inner))
    part.rename(target)


def local_folder(address: str) -> Path:
    """Where a run with this address works: below ``runs``, as other runs do.

    >>> str(local_folder("gs://bucket/some/run"))
    'runs/bucket/some/run'
    """
    return Path("runs", address.removeprefix("gs://"))


@contextmanager
def mirrored(address: str, *, resume: bool, say: Say) -> Iterator[Path]:
    """The local folder of a run that is mirrored to a bucket; for a ``with`` block.

    The step never waits for the storage: a thread sends. At the end of the block it is waited for.
    Of several processes, process 0 alone has to do with the storage and the folder.

    Args:
        address: of the run, such as ``gs://bucket/runs/scans``.
        resume: continue what is there: its whole steps are fetched, where they are not here.
        say: gets lines for a person.

    Yields:
        The folder, which is kept.

    Raises:
        ValueError: no such address; the extra is missing; there is a run and ``resume`` is not set;
            another process of this machine writes in the folder; or, at any time, another start has
            taken the address over (``TakenOver``): training is stopped as by SIGINT.
        OSError: the storage refuses, before anything is computed; or it failed, and at the end of
            the block not all is there: the text says what is safe where.
    """
    mirrors: list[Mirror] = []

    def begin() -> str:
        bucket, folder = Bucket.at(address), local_folder(address)
        bucket.check_writable()
        # Who is refused here must not take over from a process of this machine.
        with folder_lock(folder):
            if not resume and (
                bucket.objects() or any(path.name[0] != "." for path in folder.iterdir())
            ):
                raise ValueError(
                    f"{address}, and {folder} here, must be empty for a new run; add --resume "
                    "(resume=True) to continue the run there, or give another address"
                )
            # Before it is looked what is there: the other one may be sending more.
            owner = Owner.claim(bucket, say)
            if resume:
                say(fetch_steps(bucket, folder))
        mirrors.append(Mirror(folder, bucket, say, owner))
        mirrors[0].start()
        return str(folder)

    def end() -> None:
        for mirror in mirrors:
            mirror.close()

    folder = Path(from_first(begin))
    try:
        yield folder
    except BaseException as interruption:
        # Every process may leave by another way here, and none waits for another.
        try:
            end()
        except TakenOver as error:
            raise error from interruption
        except OSError as error:
            say(str(error))
        raise
    from_first(end)


def fetch_tree(address: str, folder: Path, *, keep: Callable[[str], bool] = lambda _: True) -> str:
    """Fetches all files below an address into a folder that holds nothing else.

    What is there already is compared by size and checksum, not fetched again; what is gone from
    the bucket is removed. Processes of one machine wait for each other.

    Args:
        address: of a folder in a bucket.
        folder: for these files alone; made where it is not.
        keep: which names are fetched.

    Returns:
        What was done, for a person.

    Raises:
        FileNotFoundError: there is nothing below the address, or no such bucket.
        OSError: the storage or the disk failed, or the disk has no room for it.
    """
    bucket = Bucket.at(address)
    with folder_lock(folder, wait=True):
        wanted = {name: each for name, each in bucket.objects().items() if keep(name)}
        if not wanted:
            raise FileNotFoundError(f"there is nothing at {address}")
        known = _known(folder)
        for name in known.keys() - wanted.keys():
            (folder / name).unlink(missing_ok=True)
        here = {n for n, each in wanted.items() if _is_here(folder / n, each, known.get(n))}
        new = [name for name in wanted if name not in here]
        size, free = sum(wanted[name].size for name in new), shutil.disk_usage(folder).free
        if size > free:
            raise OSError(f"{address} needs {size:,} bytes, and {free:,} are free in {folder}")
        kept = {name: known[name] for name in here}

        def fetch(name: str) -> None:
            bucket.fetch(name, folder / name)
            kept[name] = str(wanted[name])

        try:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(fetch, new))
        finally:
            write_json(folder / _INDEX, kept)
    was = f", {len(here):,} were there" if here else ""
    return f"{len(new):,} files ({size / 1e6:.1f} MB) of {address} were fetched to {folder}{was}"


def _known(folder: Path) -> dict[str, str]:
    try:
        found = read_json(folder / _INDEX)
    except (FileNotFoundError, ValueError):
        return {}
    return {name: str(each) for name, each in found.items() if _is_safe(name)}


def _is_safe(name: str) -> bool:
    """Whether the name of an object is that of a file below a folder."""
    return {"", ".", ".."}.isdisjoint(name.split("/")) and "\0" not in name


def _is_here(path: Path, wanted: Object, known: str | None) -> bool:
    return known == str(wanted) and path.is_file() and path.stat().st_size == wanted.size


def cached_folder(address: str, cache: Path) -> Path:
    """Where the files of an address are kept on this machine.

    >>> str(cached_folder("gs://bucket/scans/", Path("cache/data")))
    'cache/data/bucket/scans'
    """
    return cache / address.removeprefix("gs://").rstrip("/")


def fetch_run(run: str | os.PathLike[str], cache: Path) -> Path:
    """The local folder of a finished run; that of an address gs:// is fetched, without checkpoints.

    Args:
        run: a folder, or an address.
        cache: of this machine.

    Raises:
        FileNotFoundError: there is no such run, or it has not finished.
        OSError: the storage failed.
    """
    address = bucket_address(run)
    if address is None:
        return Path(run)
    folder = cached_folder(address, cache / "runs")
    fetch_tree(address, folder, keep=lambda name: "/" not in name)
    if not (folder / MANIFEST_FILE).is_file():
        raise FileNotFoundError(
            f"the run in {address} has not finished (no {MANIFEST_FILE}); continue it with "
            f"flaxtransfer train --resume --run {address}"
        )
    return folder
