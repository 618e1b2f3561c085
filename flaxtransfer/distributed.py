"""Several processes, one program: start, shares of the rows, what the first does for all, endings.

The same program runs in every process, on one machine or on many, and every process calls the same
functions of this file in the same order. Process 0 alone writes; what it reads is sent to all, so
that no disk has to be shared. In one process each function does the plain thing.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import itertools
import json
import os
import platform
import signal
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

_HEARTBEAT_S = 30
"""A process that is silent for so long is taken for dead, and all others end."""

_SHUTDOWN_S = 10
"""How long a process that is done waits for the others, which are done then too (``finish``)."""

_WATCH_S = 0.5
"""Between two looks at whether another process has ended with an error."""

_HEARD_S = 3 * _WATCH_S
"""How long a process that ends stays: once its connections break, nobody hears its words."""

_FAILED = "flaxtransfer/failed/"
"""Where the coordinator keeps the last words of processes that have failed."""

_LEFT = "flaxtransfer/left/"
"""Where it keeps who has ended after that."""

_STAYS_S = 10.0
"""How long process 0, which is the coordinator, waits for the others to end before it does."""

_ending = threading.Event()
"""This process has begun to end by itself."""

_told = threading.Event()
"""Another process has failed, and this one has printed its words and ends."""


def start(*, stop_together: bool = True) -> None:
    """Joins this process to the others of its run, if there are others.

    Call it before the first array. It takes ``FT_COORDINATOR`` (``host:port`` of process 0),
    ``FT_PROCESSES`` and ``FT_PROCESS`` from the environment; else what SLURM, Open MPI, GKE or a
    Cloud TPU says, where one of them has started this process; else it does nothing. With
    ``FT_PROCESSES=1`` it does nothing in any case. From then on an error in one process ends all.
    A program calls ``finish`` at its end.

    Args:
        stop_together: whether SIGTERM to any process is kept for ``stop_requested``, as training
            asks for it. Otherwise it ends the process, and with it all others.

    Raises:
        ValueError: the variables are incomplete or out of range; the processes have other versions
            or other numbers of devices.
        OSError: jax could not connect them. Where others do not come within five minutes, jax ends
            the process with words of its own.

    >>> start()  # started by nobody: nothing happens
    >>> share()
    (0, 1)
    """
    given = _given()
    if jax.distributed.is_initialized() or (given is None and not _is_launched()):
        return
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
    atexit.register(_ending.set)
    sys.excepthook = _leave_with_traceback
    threading.Thread(target=_watch, daemon=True).start()
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} in process {number}" for number, count in counts.items())
        raise ValueError(f"all processes must have the same number of devices, got {listed}")
    check_alike({"versions": _versions()})


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


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is true in any process; also a moment that all processes wait for.

    >>> any_process(False)
    False
    """
    if not several():
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def total(count: int) -> int:
    """The sum of a number over all processes.

    >>> total(3)
    3
    """
    if not several():
        return count
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
    return several() and bool(multihost_utils.reached_preemption_sync_point(next(_questions)))


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


def lost(error: BaseException) -> str:
    """What an error says about another process that may be gone; "" where it says nothing.

    Args:
        error: of jax, which reports broken connections as errors of the device.
    """
    if not several() or not isinstance(error, jax.errors.JaxRuntimeError):
        return ""
    _listen()
    text = shortened(" ".join(str(error).split()), 200)
    return f"another process of the run may have ended: jax cannot go on without it ({text})"


def leave(text: str, code: int) -> NoReturn:
    """Ends this process at once and tells the others why, so that they end too.

    An ordinary end would wait for the others, which wait for this one.

    Args:
        text: one line, which the others print.
        code: of the exit, theirs too.
    """
    tell(text, code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def tell(text: str, code: int) -> None:
    """Tells the other processes that this one ends, and why; see ``leave``."""
    if not several():
        return
    _ending.set()
    with contextlib.suppress(Exception):  # The coordinator may be gone: nobody is left to tell.
        said = json.dumps({"text": text, "code": code})
        _client().key_value_set(f"{_FAILED}{jax.process_index()}", said)
    time.sleep(_HEARD_S)
    _go()


def _go() -> None:
    """The last thing before a process ends: process 0 is the last to go, for it keeps the words."""
    with contextlib.suppress(Exception):
        if not is_first():
            _client().key_value_set(f"{_LEFT}{jax.process_index()}", "")
            return
        until = time.monotonic() + _STAYS_S
        while time.monotonic() < until:
            if len(_client().key_value_dir_get(_LEFT)) == jax.process_count() - 1:
                return
            time.sleep(_WATCH_S / 5)


def _listen() -> None:
    """Gives a process that can say why it has ended the time to do so; then this one ends, too."""
    time.sleep(_HEARD_S)
    if _told.is_set():
        time.sleep(_HEARTBEAT_S)


def _leave_with_traceback(kind: Any, error: BaseException, trace: Any) -> None:
    if isinstance(error, jax.errors.JaxRuntimeError):
        _listen()
    sys.__excepthook__(kind, error, trace)
    leave("".join(traceback.format_exception_only(kind, error)).strip(), 1)


def _watch() -> None:
    """Ends this process when another one has failed: the main thread may wait for it for ever."""
    while not _ending.wait(_WATCH_S):
        try:
            words = _client().key_value_dir_get(_FAILED)
        except Exception:
            return  # The coordinator is gone, and jax ends the process.
        if words and not _ending.is_set():
            key, said = min(words)
            found, number = json.loads(said), key.rpartition("/")[2]
            line = f"flaxtransfer: process {number} has ended: {found['text']}"
            _told.set()
            print(line, file=sys.stderr, flush=True)
            _go()
            os._exit(found["code"])


def _client() -> Any:
    from jax._src import distributed  # It has no public name.

    return distributed.global_state.client


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
