"""Several processes, one program: start, shares of the rows, what the first does for all, endings.

The same program runs in every process, on one machine or on many, and every process calls the same
functions of this file in the same order. Process 0 alone writes; what it reads is sent to all, so
that no disk has to be shared. In one process each function does the plain thing.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib.util
import io
import itertools
import json
import os
import platform
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from flaxtransfer.paths import nested_differences, shortened

T = TypeVar("T")

COORDINATOR, PROCESSES, PROCESS = "FT_COORDINATOR", "FT_PROCESSES", "FT_PROCESS"

LONGEST_WAIT = "FT_LONGEST_WAIT"
"""The variable with the seconds that the others wait for one process, in place of the below."""

LONGEST_WAIT_S = 1800.0
"""What one process may have to do alone, such as a download, or a program that it alone compiles.
More than that is taken for a hang: a deadlock, or a disk that does not answer."""

FAILURE = 2
"""The exit code of all processes where one of them has failed."""

_WATCH_S = 0.5
"""Between two signs of life, and two looks at the others."""

_SILENT_S = 20.0
"""A process without a sign of life for so long is gone. With what it takes to end the others, on a
busy machine too, it is within a minute."""

_HEARTBEAT_S = 100
"""The same in jax, which ends the processes without saying who is gone: only where this cannot."""

_SHUTDOWN_S = 10
"""How long a process that is done waits for the others, which are done then too (``finish``)."""

_HEARD_S = 3 * _WATCH_S
"""How long a process that ends stays: once its connections break, nobody hears its words."""

_STAYS_S = 10.0
"""How long process 0, which is the coordinator, waits for the others to end before it does."""

_FAILED, _LEFT, _SIGNS = "flaxtransfer/failed/", "flaxtransfer/left/", "flaxtransfer/signs/"
"""Where the coordinator keeps why a process has failed, who has ended after that, and the signs of
life, each with the number of places that the process has come to."""

_LINE = "flaxtransfer/line"
"""And where process 0 is to be called, by whom knows the word."""

_ARITHMETIC = ("jax_enable_x64", "jax_default_matmul_precision")
"""Settings of jax that change what it computes."""

_ending = threading.Event()
"""This process has begun to end by itself."""

_told = threading.Event()
"""Another process has failed, and this one has printed why and ends."""


def start(*, stop_together: bool = True) -> None:
    """Joins this process to the others of its run, if there are others.

    Call it before the first array. It takes ``FT_COORDINATOR`` (``host:port`` of process 0),
    ``FT_PROCESSES`` and ``FT_PROCESS`` from the environment; else what SLURM, Open MPI, GKE or a
    Cloud TPU says, where one of them has started this process; else it does nothing. With
    ``FT_PROCESSES=1`` it does nothing in any case. From then on all end with code 2 where one has
    an error, is gone, or lets the others wait for longer than ``FT_LONGEST_WAIT`` (seconds;
    ``LONGEST_WAIT_S``), and each says why. What libraries in C print goes to stderr, so that stdout
    has Python's output alone. A program calls ``finish`` at its end.

    Args:
        stop_together: whether SIGTERM to any process is kept for ``stop_requested``, as training
            asks for it. Otherwise it ends the process, and with it all others.

    Raises:
        ValueError: the variables are incomplete or out of range; the processes have other versions
            or other numbers of devices, another ``FT_LONGEST_WAIT`` or another arithmetic of jax.
        OSError: jax could not connect them. Where others do not come within five minutes, jax ends
            the process with words of its own.

    >>> start()  # started by nobody: nothing happens
    >>> share()
    (0, 1)
    """
    given = _given()
    if jax.distributed.is_initialized() or (given is None and not _is_launched()):
        return
    _longest_wait()
    if given is not None and given[1] == 1:
        return
    names = ("coordinator_address", "num_processes", "process_id")
    settings: dict[str, Any] = {} if given is None else dict(zip(names, given, strict=True))
    if given is not None:
        settings["cluster_detection_method"] = "deactivate"
    try:
        jax.distributed.initialize(
            **settings,
            heartbeat_timeout_seconds=_HEARTBEAT_S,
            shutdown_timeout_seconds=_SHUTDOWN_S,
        )
    except Exception as error:
        # Of many kinds: launchers are asked over the network, by packages that may not be there.
        where = "the launcher's environment" if given is None else f"{COORDINATOR}={given[0]}"
        raise OSError(
            f"the processes of the run did not come together ({where}): {shortened(str(error))}; "
            f"start all of them, or set {PROCESSES}=1 for one process alone"
        ) from error
    kept = stop_together and several()
    if not kept and threading.current_thread() is threading.main_thread():
        # jax has taken the signal; the handler that Python knows of gets it back.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    if not several():
        return
    _print_apart()
    atexit.register(_ending.set)
    sys.excepthook = _leave_with_traceback
    _delay_abort()
    others = (_hold_lines,) if is_first() else (_watch_first, _hold_line_to_first)
    for watch in (_watch, *others):
        threading.Thread(target=watch, daemon=True).start()
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} in process {number}" for number, count in counts.items())
        raise ValueError(f"all processes must have the same number of devices, got {listed}")
    settings = {name: str(getattr(jax.config, name)) for name in _ARITHMETIC}
    check_alike({"versions": _versions(), LONGEST_WAIT: _longest_wait(), **settings})


def _print_apart() -> None:
    """Sends what libraries in C print to stderr: stdout may be JSON, which somebody reads.

    Gloo prints a line for each device whenever it connects those of a program, at any step.
    """
    out = sys.stdout
    # Where they were closed, the numbers 1 and 2 belong to something else.
    if not isinstance(out, io.TextIOWrapper) or out.fileno() != 1 or sys.__stderr__ is None:
        return
    out.flush()
    sys.stdout = io.TextIOWrapper(
        # Open until the process ends, as it was.
        io.BufferedWriter(io.FileIO(os.dup(1), "w", closefd=False)),
        encoding=out.encoding,
        errors=out.errors,
        line_buffering=out.line_buffering or out.write_through,
    )
    os.dup2(2, 1)


def share() -> tuple[int, int]:
    """The share of the rows of every batch that this process has: (index, count).

    It is what ``shard=`` of the batches of ``flaxtransfer.data`` takes.

    >>> share()
    (0, 1)
    """
    return (jax.process_index(), jax.process_count()) if several() else (0, 1)


def several() -> bool:
    """Whether the run has more than one process; asks no device where it has one.

    >>> several()
    False
    """
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes.

    >>> is_first()
    True
    """
    return not several() or jax.process_index() == 0


def from_first(action: Callable[[], T], *errors: type[Exception]) -> T:
    """What ``action`` returns in process 0, in every process; it runs in no other.

    Use it for whatever touches the run folder. ``action`` must call nothing that other processes
    take part in.

    Args:
        action: returns JSON values; in several processes they come back as JSON has them.
        errors: classes that are made from one text and are kept as they are.

    Raises:
        Exception: that of ``action``, in every process; in others than process 0 of one of
            ``errors``, or of the built-in class that it is nearest to.

    >>> from_first(lambda: {"step": 3})
    {'step': 3}
    """
    if not several():
        return action()
    error, said = None, b""
    if is_first():
        try:
            said = json.dumps({"value": action()}).encode()
        except Exception as raised:
            error, said = raised, json.dumps({"error": _described(raised, errors)}).encode()
    said = _all_bytes(said)[0]
    if error is not None:
        raise error
    found = json.loads(said)
    if "error" in found:
        known = {each.__name__: each for each in (*errors, *_ERRORS, RuntimeError)}
        raise known[found["error"][0]](*found["error"][1:])
    value: T = found["value"]
    return value


def arrays_from_first(
    action: Callable[[], Mapping[str, np.ndarray]], *errors: type[Exception]
) -> dict[str, np.ndarray]:
    """The arrays that ``action`` returns in process 0, in every process.

    Args:
        action: returns numpy arrays by name.
        errors: see ``from_first``.

    >>> arrays_from_first(lambda: {"w": np.ones(2, np.float32)})
    {'w': array([1., 1.], dtype=float32)}
    """
    if not several():
        return dict(action())
    own: dict[str, np.ndarray] = {}

    def header() -> list[tuple[str, str, list[int]]]:
        own.update(action())
        return [(name, str(a.dtype), list(a.shape)) for name, a in own.items()]

    found: dict[str, np.ndarray] = {}
    for name, dtype, shape in from_first(header, *errors):
        # As bytes, so that no type and no bit pattern is changed on the way.
        kind = jax.numpy.dtype(dtype)
        empty = np.empty(shape, kind)
        whole = np.ascontiguousarray(own[name]) if is_first() else empty
        data = np.frombuffer(whole.tobytes(), np.uint8)
        sent = multihost_utils.broadcast_one_to_all(data) if data.size else data
        found[name] = np.frombuffer(np.asarray(sent).tobytes(), kind).reshape(shape).copy()
    return found


@contextmanager
def held_by_first(make: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """A ``with`` block that process 0 alone enters; an error on entering is raised in all.

    >>> import tempfile
    >>> with held_by_first(tempfile.TemporaryDirectory):
    ...     pass
    """
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(make())

        from_first(enter)
        yield


def from_all(own: bytes) -> list[bytes]:
    """The bytes that each process gives, in their order, in every process.

    >>> from_all(b"mine")
    [b'mine']
    """
    return _all_bytes(own) if several() else [own]


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is true in any process; also a moment that all processes wait for.

    >>> any_process(False)
    False
    """
    if not several():
        return flag
    arrive()
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def total(count: int) -> int:
    """The sum of a number over all processes.

    >>> total(3)
    3
    """
    if not several():
        return count
    arrive()
    return int(np.sum(multihost_utils.process_allgather(np.asarray(count, np.int32))))


def check_alike(facts: Mapping[str, Any]) -> None:
    """Refuses processes that are not about to do the same.

    Args:
        facts: JSON values by name, which must be equal in all processes.

    Raises:
        ValueError: in every process the same text, with each fact that differs.

    >>> check_alike({"seed": 0})
    """
    if not several():
        return
    own = json.dumps(facts, sort_keys=True, default=str).encode()
    first, *others = (json.loads(text) for text in _all_bytes(own))
    problems = [
        f"{name} is {shortened(repr(there), 60)} in process {number} and "
        f"{shortened(repr(here), 60)} in process 0"
        for number, other in enumerate(others, 1)
        for name, here, there in nested_differences(first, other)
    ]
    if problems:
        raise ValueError(f"all processes of a run must do the same, got {'; '.join(problems)}")


_questions = itertools.count(1)
"""Of ``stop_requested``: steps begin anew with each training, and jax wants numbers that rise."""


def stop_requested() -> bool:
    """Whether all processes are to stop now, for one of them has got SIGTERM.

    Every process has to ask after every step. The answer is the same in all, costs microseconds,
    and is false in one process.

    >>> stop_requested()
    False
    """
    if not several():
        return False
    arrive()
    return bool(multihost_utils.reached_preemption_sync_point(next(_questions)))


_places = 0
"""How many places that all come to this process has come to."""


def arrive() -> None:
    """Counts a place that every process comes to, before it waits there for the others.

    The functions of this file do so. The counts tell which process lets the others wait.

    >>> arrive()
    """
    global _places
    _places += 1


def check_alone(what: str) -> None:
    """Refuses what is not shared between processes.

    Args:
        what: the beginning of a sentence.

    Raises:
        ValueError: there are several.

    >>> check_alone("tent")
    """
    if several():
        raise ValueError(f"{what} must run in one process, got {jax.process_count()}")


def finish() -> None:
    """Waits until all processes are done, and parts them; the last thing that a program calls.

    >>> finish()
    """
    if several():
        any_process(False)
        _ending.set()
        # Now, and not when Python has ended: on a busy machine that may be long after the others.
        jax.distributed.shutdown()  # type: ignore[no-untyped-call]


_BROKEN = ("UNKNOWN: ", "INTERNAL: ", "UNAVAILABLE: ", "ABORTED: ", "CANCELLED: ", "DEADLINE_")
"""How errors of jax begin, of whatever class, where a connection may be broken."""


def is_broken(error: BaseException) -> bool:
    """Whether an error may come of a connection to another process that is gone.

    >>> is_broken(ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"))
    False
    """
    return several() and str(error).startswith(_BROKEN)


def lost(error: BaseException) -> str:
    """What an error says about another process that may be gone; "" where it says nothing.

    Args:
        error: of jax, which reports broken connections as errors of the device.
    """
    if not is_broken(error):
        return ""
    _listen()
    text = shortened(" ".join(str(error).split()), 200)
    return f"another process of the run may have ended: jax cannot go on without it ({text})"


def leave(text: str) -> NoReturn:
    """Ends this process with code 2 at once, and tells the others why, so that they end likewise.

    An ordinary end would wait for the others, which wait for this one.

    Args:
        text: one line, which the others print.
    """
    tell(text, FAILURE)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(FAILURE)


def tell(text: str, code: int) -> None:
    """Tells the other processes that this one ends, and why; they end with the same code."""
    if not several():
        return
    _ending.set()

    def last_words() -> None:
        with contextlib.suppress(Exception):
            _fail(jax.process_index(), f"has ended: {text}", code)
        time.sleep(_HEARD_S)
        _go()

    # The coordinator may be gone, and asking it may take for ever: nobody is left to tell.
    teller = threading.Thread(target=last_words, daemon=True)
    teller.start()
    teller.join(2 * _STAYS_S)


def _fail(number: int, what: str, code: int = FAILURE, *, gone: bool = False) -> None:
    """Lets all processes know what has become of one of them."""
    text = f"process {number} of {jax.process_count()} {what}"
    words = json.dumps({"text": text, "code": code, "gone": gone})
    _client().key_value_set(f"{_FAILED}{number}", words)


def _go(gone: bool = False) -> None:
    """The last thing before a process ends: process 0 is the last to go, for it keeps the words."""
    with contextlib.suppress(Exception):
        if not is_first():
            _client().key_value_set(f"{_LEFT}{jax.process_index()}", "")
            return
        until = time.monotonic() + _STAYS_S
        while time.monotonic() < until:
            if len(_client().key_value_dir_get(_LEFT)) >= jax.process_count() - 1 - gone:
                return
            time.sleep(_WATCH_S / 5)


def _listen() -> None:
    """Waits until it is known who has ended.

    The watch knows it at once from a process that could say why, and else after its silence; it
    ends this one, too.
    """
    if _told.wait(_SILENT_S + 10 * _WATCH_S):
        time.sleep(2 * _STAYS_S)


def _leave_with_traceback(kind: Any, error: BaseException, trace: Any) -> None:
    if is_broken(error):
        _listen()
    sys.__excepthook__(kind, error, trace)
    leave("".join(traceback.format_exception_only(kind, error)).strip())


def _watch() -> None:
    """Gives signs of life, and ends this process when another has failed.

    The main thread may wait for the other for ever. All time is counted in looks: a process that
    was stopped itself, or had no core, has not seen others be silent.
    """
    first, others, unanswered = is_first(), _Others(), 0
    for look in itertools.count():
        if _ending.wait(_WATCH_S):
            return
        try:
            client = _client()
            if client is None:
                return  # A program has parted the processes itself.
            sign = f"{_SIGNS}{jax.process_index()}"
            client.key_value_set(sign, f"{look} {_places}", allow_overwrite=True)
            words = client.key_value_dir_get(_FAILED)
            if not words and first:
                others.look(dict(client.key_value_dir_get(_SIGNS)))
        except Exception:
            unanswered += 1
            if unanswered * _WATCH_S > 2 * _HEARD_S:
                _end_without_first("it does not answer")
            continue
        _answers.set()
        unanswered = 0
        if words and not _ending.is_set():
            _, said = min(words)
            found = json.loads(said)
            _say(found["text"])
            _go(found["gone"])
            os._exit(found["code"])


_answers = threading.Event()
"""Process 0 has answered since it was last asked."""


def _watch_first() -> None:
    """Ends this process when process 0 is silent: the other watch may wait for it for ever."""
    quiet = 0
    while not _ending.wait(_WATCH_S):
        quiet = 0 if _answers.is_set() else quiet + 1
        _answers.clear()
        if quiet * _WATCH_S >= _SILENT_S:
            _end_without_first(f"it has not answered for {_SILENT_S:g} s")


def _hold_lines() -> None:
    """Process 0 keeps a connection to each other process, which breaks when that one is gone.

    Where no connection comes to be, for a firewall say, there are still the signs of life.
    """
    token, lines = secrets.token_hex(8), selectors.DefaultSelector()
    with contextlib.suppress(OSError), socket.create_server(("", 0)) as door:
        _client().key_value_set(_LINE, f"{door.getsockname()[1]} {token}")
        lines.register(door, selectors.EVENT_READ)
        names: dict[Any, int] = {}
        while True:
            for key, _ in lines.select():
                line: Any = key.fileobj
                if line is door:
                    line, _ = door.accept()
                    lines.register(line, selectors.EVENT_READ)
                    continue
                said = b""
                with contextlib.suppress(OSError):
                    said = line.recv(64)
                found, _, number = said.decode(errors="replace").partition(" ")
                if found == token and number.isdecimal():
                    names[line] = int(number)
                    continue
                lines.unregister(line)
                line.close()
                if line in names:
                    # It may have said why, and then this comes too late.
                    threading.Timer(_HEARD_S, _line_broken, (names.pop(line),)).start()


def _line_broken(number: int) -> None:
    if not (_ending.is_set() or _told.is_set()):
        with contextlib.suppress(Exception):
            _fail(number, "is gone: its connection has ended", gone=True)


def _hold_line_to_first() -> None:
    """The other end; see ``_hold_lines``."""
    try:
        port, token = _client().blocking_key_value_get(_LINE, 60_000).split()
    except Exception:
        return
    host = _state().coordinator_address.rpartition(":")[0].strip("[]")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as line:
        line.sendall(f"{token} {jax.process_index()}".encode())
        with contextlib.suppress(ConnectionError):
            while line.recv(64):
                pass
        time.sleep(_HEARD_S)
        _end_without_first("its connection has ended")


def _end_without_first(why: str) -> None:
    if not _ending.is_set() and _client() is not None:
        _say(f"process 0 of {jax.process_count()} is gone: {why}")
        os._exit(FAILURE)


def _say(text: str) -> None:
    _told.set()
    print(f"flaxtransfer: {text}", file=sys.stderr, flush=True)


class _Others:
    """What process 0 knows of all processes, from their signs of life."""

    def __init__(self) -> None:
        self.signs: dict[int, str] = {}
        self.silent = dict.fromkeys(range(jax.process_count()), 0)
        self.places: dict[int, int] = {}
        self.waiting = 0

    def look(self, found: Mapping[str, str]) -> None:
        """Compares the signs with those of the look before; says so where a process has failed."""
        signs = {int(key.rpartition("/")[2]): sign for key, sign in found.items()}
        for number in self.silent:
            same = signs.get(number) == self.signs.get(number)
            self.silent[number] = self.silent[number] + 1 if same else 0
            if self.silent[number] * _WATCH_S >= _SILENT_S:
                why = f"it has given no sign of life for {_SILENT_S:g} s"
                _fail(number, f"is gone: {why}", gone=True)
                return
        places = {number: int(sign.split()[1]) for number, sign in signs.items()}
        # Where all are at the same place they are at work.
        waiting = places == self.places and len(set(places.values())) > 1
        self.waiting = self.waiting + 1 if waiting else 0
        self.signs, self.places = signs, places
        longest = _longest_wait()
        last = min(places, key=places.__getitem__, default=0)
        # One that is silent, too, has not begun to hang.
        if self.waiting * _WATCH_S >= longest and self.silent[last] * _WATCH_S < _HEARD_S:
            _fail(last, f"hangs: the others have waited for it for {longest:g} s ({LONGEST_WAIT})")


def _delay_abort() -> None:
    """Delays the end by SIGABRT, so that the watch can say why before.

    jax ends a process so as soon as its connection to process 0 is broken, with words of its own
    that name nobody. ``sleep`` may be called where a signal is handled, and takes the number of the
    signal for its seconds, which are 6.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # Only where C has them.
        library = ctypes.CDLL(None)
        library.signal.argtypes, library.signal.restype = (ctypes.c_int, ctypes.c_void_p), None
        library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))


def _longest_wait() -> float:
    """The seconds that the others wait for one process."""
    given = os.environ.get(LONGEST_WAIT, "")
    with contextlib.suppress(ValueError):
        seconds = float(given) if given else LONGEST_WAIT_S
        if seconds > 0:
            return seconds
    raise ValueError(f"{LONGEST_WAIT} must be seconds above 0, got {given!r}")


def _client() -> Any:
    return _state().client


def _state() -> Any:
    from jax._src import distributed  # It has no public name.

    return distributed.global_state


def _given() -> tuple[str, int, int] | None:
    """Coordinator, number of processes and number of this one, from our own variables."""
    found = {name: os.environ.get(name, "") for name in (COORDINATOR, PROCESSES, PROCESS)}
    if not any(found.values()):
        return None
    if found[PROCESSES] == "1":
        return found[COORDINATOR], 1, 0
    if missing := [name for name, value in found.items() if not value]:
        raise ValueError(
            f"{', '.join(found)} must be set together, got no {' and no '.join(missing)}"
        )
    host, _, port = found[COORDINATOR].rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"{COORDINATOR} must be host:port, got {found[COORDINATOR]!r}")
    numbers = {name: found[name] for name in (PROCESSES, PROCESS)}
    if not all(value.isdecimal() for value in numbers.values()) or not (
        0 <= int(numbers[PROCESS]) < int(numbers[PROCESSES])
    ):
        raise ValueError(
            f"{PROCESS} must be 0 .. {PROCESSES} - 1, got {PROCESS}={numbers[PROCESS]} and "
            f"{PROCESSES}={numbers[PROCESSES]}"
        )
    return found[COORDINATOR], int(numbers[PROCESSES]), int(numbers[PROCESS])


_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")


def _is_launched() -> bool:
    """Whether a launcher that jax knows has started several processes; looks at no network."""
    variables = os.environ
    if all(name in variables for name in _SLURM):
        return variables.get("SLURM_NTASKS", "1") != "1"
    if "OMPI_MCA_orte_hnp_uri" in variables:
        return variables.get("OMPI_COMM_WORLD_SIZE", "1") != "1"
    if importlib.util.find_spec("libtpu") is None or variables.get("TPU_SKIP_MDS_QUERY"):
        return False
    hosts = variables.get("TPU_PROCESS_ADDRESSES") or variables.get("TPU_WORKER_HOSTNAMES")
    if hosts:
        return "," in hosts
    places = (("/dev", "accel*"), ("/dev/vfio", "[0-9]*"))
    return any(any(Path(folder).glob(pattern)) for folder, pattern in places)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("flaxtransfer", "jax", "jaxlib", "flax", "optax", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _all_bytes(own: bytes) -> list[bytes]:
    """The bytes of all processes, in their order."""
    arrive()
    sizes = np.asarray(multihost_utils.process_allgather(np.asarray(len(own), np.int32)))
    # Few sizes, because each is compiled for.
    padded = np.zeros(max(1024, 1 << int(sizes.max()).bit_length()), np.uint8)
    padded[: len(own)] = np.frombuffer(own, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


_ERRORS = (OSError, ValueError, TypeError, ImportError)


def _described(error: Exception, errors: tuple[type[Exception], ...]) -> list[Any]:
    """The name of a class and its arguments, as JSON."""
    if isinstance(error, OSError) and error.errno is not None:
        name = None if error.filename is None else os.fspath(error.filename)
        return ["OSError", error.errno, error.strerror, name]
    known = (*errors, *_ERRORS)
    kind = next((each for each in known if isinstance(error, each)), RuntimeError)
    return [kind.__name__, str(error)]
