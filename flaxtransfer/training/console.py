"""What a run says and hears: progress bars, log lines, metrics, times, traces, signals."""

from __future__ import annotations

import hashlib
import json
import math
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from flaxtransfer import distributed
from flaxtransfer.files import atomic_write, check_regular, parse_json, replace_file, write_file
from flaxtransfer.overview import terminal
from flaxtransfer.paths import visible


class Report(Protocol):
    """Called after every step with the step within the phase and the latest text."""

    def __call__(self, step: int, text: str) -> None: ...


def log(text: str) -> None:
    """One line for whoever watches, beside the bars and away from the results."""
    terminal(stderr=True, soft_wrap=True, highlight=False).print(text)


@contextmanager
def progress_bar(
    name: str, total: int, *, start: int = 0, console: Console | None = None
) -> Iterator[Report]:
    """A bar for one phase; where the output is no terminal, a line at its end instead."""
    console = console or terminal(stderr=True)
    name = visible(name)
    if not console.is_terminal:
        last = ["", start]

        def remember(step: int, text: str) -> None:
            last[:] = [text, step]

        yield remember
        text = f"{name}: step {last[1]} of {total}  {last[0]}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=total, completed=start, text="")

        def update(step: int, text: str) -> None:
            progress.update(task, completed=step, text=text)

        yield update


METRICS_FILE = "metrics.jsonl"


class Extent(NamedTuple):
    """How much of a metrics file was written when a checkpoint was, and its SHA-256."""

    size: int
    sha256: str


class MetricsWriter:
    """Appends one JSON object a line to ``<folder>/metrics.jsonl``.

    Opening it for a run that is resumed drops the lines that an interrupted process wrote after its
    last checkpoint: they will be written again. Of several processes, process 0 alone writes.

    Args:
        folder: the run folder.
        written: what was written up to the checkpoint; by default nothing. A file whose beginning
            is something else is set aside as ``metrics-damaged.jsonl``, and ``damage`` says so.
        step: of the checkpoint, for events.
        tensorboard: also write events to ``<folder>/tensorboard`` (extra ``tb``).

    Raises:
        ValueError: ``tensorboard`` without the extra.
    """

    def __init__(
        self,
        folder: Path,
        *,
        written: Extent | None = None,
        step: int = 0,
        tensorboard: bool = False,
    ) -> None:
        self._file: BinaryIO | None = None
        self._events: Any = None
        self._hash, self._size = _sha256(b""), 0
        self.damage = distributed.from_first(
            lambda: self._open(folder, written, step, tensorboard=tensorboard)
        )

    def _open(self, folder: Path, written: Extent | None, step: int, *, tensorboard: bool) -> str:
        """Opens the files; returns what was damaged."""
        path = folder / METRICS_FILE
        found = _read(path)
        kept = b"" if written is None else found[: written.size]
        damage = ""
        if written is not None and Extent(len(kept), _sha256(kept).hexdigest()) != written:
            aside = path.with_name("metrics-damaged.jsonl")
            state = "is missing" if not path.exists() else f"is damaged, and lies in {aside.name}"
            if path.exists():
                path.replace(aside)
            damage = f"{path} {state}: the metrics up to step {step} are lost"
            kept = b""
        with atomic_write(path) as temporary:
            write_file(temporary, kept)
        self._file = path.open("ab")
        self._hash, self._size = _sha256(kept), len(kept)
        self._events = _event_writer(folder / "tensorboard", step) if tensorboard else None
        return damage

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Appends ``{"kind": ..., "step": ..., **values}``; NaN and infinities become null."""
        if self._file is None:
            return
        line = _line({"kind": kind, "step": step, **values})
        self._file.write(line)
        self._file.flush()
        self._hash.update(line)
        self._size += len(line)
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._events.add_scalar(f"{kind}/{name}", value, step)

    @property
    def written(self) -> Extent:
        """What the file holds now."""
        return Extent(self._size, self._hash.hexdigest())

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All rows of a run's metrics, in order; an empty list if there are none.

    A last line that was cut off is left out: its writer was killed, or is still at it.

    Raises:
        ValueError: the file is damaged; the text names the line.
    """
    path = folder / METRICS_FILE
    lines = _read(path).split(b"\n")
    rows = [parse_json(line, f"{path}, line {n}") for n, line in enumerate(lines[:-1], 1)]
    if wrong := [n for n, row in enumerate(rows, 1) if not {"kind", "step"} <= _keys(row)]:
        raise ValueError(f"{path} is damaged: line {wrong[0]} is no row of metrics")
    return rows


def _read(path: Path) -> bytes:
    if not path.exists():
        return b""
    check_regular(path)
    return path.read_bytes()


def _keys(row: Any) -> set[str]:
    return set(row) if isinstance(row, dict) else set()


def _line(row: Mapping[str, Any]) -> bytes:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return (json.dumps(finite) + "\n").encode()


def _sha256(data: bytes) -> Any:
    return hashlib.sha256(data)


def _event_writer(folder: Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "TensorBoard events need the extra 'tb': pip install 'flaxtransfer[tb]'"
        ) from error
    return SummaryWriter(str(folder), purge_step=step or None)


TIMES_FILE = "times.jsonl"
"""Beside the metrics and not among them: equal runs have equal metrics, and no two equal times."""


@dataclass(frozen=True)
class Times:
    """Where the time of a run went, in seconds.

    Args:
        wall: all of it, from the call of ``fit`` on.
        compile: tracing and compiling the steps.
        data: the devices had nothing to do, and the next batch was not there.
        steps: the devices computed steps.
        evaluate: validation, with what is measured and compiled for it.
        save: checkpoints.
        prepare: before the steps of a phase: examples and checkpoints read, activations cached,
            heads solved.
        images: that the steps have seen.

    >>> times = Times(wall=100, compile=20, data=6, steps=54, evaluate=10, images=5400)
    >>> times.goodput, times.starved, times.rest
    (0.54, 0.1, 10.0)
    """

    wall: float = 0.0
    compile: float = 0.0
    data: float = 0.0
    steps: float = 0.0
    evaluate: float = 0.0
    save: float = 0.0
    prepare: float = 0.0
    images: int = 0

    @property
    def goodput(self) -> float:
        """Share of the time in which the devices computed steps."""
        return self.steps / self.wall if self.wall else 0.0

    @property
    def starved(self) -> float:
        """Share of the time of the steps in which they waited for a batch."""
        both = self.steps + self.data
        return self.data / both if both else 0.0

    @property
    def rest(self) -> float:
        """What is none of the parts."""
        parts = (self.compile, self.data, self.steps, self.evaluate, self.save, self.prepare)
        return self.wall - sum(parts)

    def __add__(self, other: Times) -> Times:
        return Times(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Times)))

    def __str__(self) -> str:
        both = self.steps + self.data
        speed = f", {self.images / both:,.0f} images/s" if both else ""
        return (
            f"time: {seconds_text(self.wall)}, {self.goodput:.0%} of it in steps{speed}; compile "
            f"{self.compile:.1f} s, waiting for data {self.data:.1f} s ({self.starved:.0%} of the "
            f"time of steps), validation {self.evaluate:.1f} s, checkpoints {self.save:.1f} s, "
            f"preparation {self.prepare:.1f} s, rest {self.rest:.1f} s"
        )


def seconds_text(seconds: float) -> str:
    """A length of time as people say it.

    >>> [seconds_text(value) for value in (3.21, 75, 1000, 9000)]
    ['3.2 s', '75 s', '17 min', '2.5 h']
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def read_times(folder: Path) -> Times:
    """The times of a run up to its last checkpoint, those of interrupted processes among them.

    Rows that cannot be read are left out: nothing depends on them.
    """
    total = Times()
    for line in _time_rows(folder / TIMES_FILE):
        row = parse_json(line, TIMES_FILE)
        total += Times(**{field.name: row[field.name] for field in fields(Times)})
    return total


def _time_rows(path: Path) -> list[bytes]:
    """The rows of times that can be read."""
    found: list[bytes] = []
    with suppress(OSError, ValueError):
        lines = _read(path).splitlines()
        for line in lines:
            with suppress(ValueError, TypeError, KeyError):
                row = parse_json(line, TIMES_FILE)
                if all(math.isfinite(row[field.name]) for field in fields(Times)):
                    found.append(line)
        if len(found) < len(lines):
            log(f"{path}: {len(lines) - len(found)} rows cannot be read and are left out")
    return found


Part = Literal["evaluate", "save", "prepare"]

_FEW_STEPS = 5
"""After so many, whose times differ little, it is said how long a phase will take."""

LONG_S = 30.0
"""From which on it is."""


class Clock:
    """Times a run without slowing it; for a ``with`` block.

    Steps are started and not waited for, so that the main thread cannot know when they end. A
    thread waits for each, and so tells apart that a batch was late and that the devices were busy
    meanwhile. Of several processes, process 0 alone writes.

    Args:
        folder: the run folder, in which ``times.jsonl`` gets a row with each checkpoint.
        started: when the run was, by ``time.perf_counter``; since then it was prepared.
    """

    def __init__(self, folder: Path, started: float) -> None:
        self._path = folder / TIMES_FILE if distributed.is_first() else None
        self._rows = [] if self._path is None else _time_rows(self._path)
        self._parts = dict.fromkeys((field.name for field in fields(Times)), 0.0)
        self._last_row = started
        self._parts["prepare"] = time.perf_counter() - started
        self._steps: queue.Queue[tuple[float, float, float, Any] | None] = queue.Queue()
        self._ready = 0.0
        self._ends: list[float] = []
        self._images, self._seconds = 0, 0.0
        self._shown = (0, 0.0)
        self._thread = threading.Thread(target=self._wait, daemon=True, name="clock")
        self._thread.start()

    @contextmanager
    def during(self, part: Part) -> Iterator[None]:
        """Counts the block as this part."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._parts[part] += time.perf_counter() - started

    def begin_phase(self) -> None:
        """Forgets the steps of the phase before, which took another time each."""
        self._steps.join()
        self._ends.clear()
        self._shown = (self._images, self._seconds)

    def step(self, asked: float, began: float, images: int, done: Any, *, first: bool) -> None:
        """Counts a step that was started now.

        Args:
            asked: when its batch was asked for.
            began: when the batch was there.
            images: in the batch, of all processes.
            done: arrays that are ready when the step is.
            first: whether its program was made in this call.
        """
        now = time.perf_counter()
        if first:
            self._parts["compile"] += now - began
        self._parts["images"] += images
        self._images += images
        self._steps.put((asked, began, now if first else began, done))

    def _wait(self) -> None:
        while (step := self._steps.get()) is not None:
            asked, there, began, done = step
            with suppress(Exception):  # The main thread gets it, too, and stops.
                _wait_for(done)
            now = time.perf_counter()
            late = max(0.0, there - max(asked, self._ready))
            busy = now - max(began, self._ready)
            self._parts["data"] += late
            self._parts["steps"] += busy
            self._seconds += late + busy
            self._ready = now
            self._ends.append(now)
            self._steps.task_done()
        self._steps.task_done()

    def speed(self) -> float | None:
        """Images per second since it was asked last in this phase; None without a step."""
        self._steps.join()
        (images, seconds), self._shown = self._shown, (self._images, self._seconds)
        if self._seconds <= seconds:
            return None
        return (self._images - images) / (self._seconds - seconds)

    def forecast(self, left: int) -> float | None:
        """Seconds that the steps left of a phase take; None until some were timed."""
        ends = self._ends[:]
        if len(ends) <= _FEW_STEPS:
            return None
        return left * (ends[-1] - ends[0]) / (len(ends) - 1)

    def write(self, phase: str, step: int) -> None:
        """Adds a row with the times since the last one."""
        self._steps.join()
        now = time.perf_counter()
        self._parts["wall"], self._last_row = now - self._last_row, now
        found = {name: round(value, 6) for name, value in self._parts.items()}
        found["images"] = int(found["images"])
        self._parts = dict.fromkeys(self._parts, 0.0)
        if self._path is None:
            return
        row = {"kind": "time", "step": step, "phase": phase, **found}
        self._rows.append(json.dumps(row).encode())
        try:
            replace_file(self._path, b"\n".join(self._rows) + b"\n")
        except OSError as error:
            log(f"{self._path} cannot be written ({error}): times are not kept")
            self._path = None

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *exception: object) -> None:
        self._steps.put(None)
        # A step that another process has left unfinished may never end.
        self._thread.join(timeout=5)


TRACE = "profile"
"""The folder of a run with the trace of some of its steps."""


_profiler: Any = jax.profiler  # which has no types
_wait_for: Any = jax.block_until_ready


class Tracer:
    """Traces the steps of a run from one number to another; for a ``with`` block.

    The trace is of ``jax.profiler``, which xprof and TensorBoard show. Only these steps are in it:
    the devices have nothing left to do when it begins, and are waited for before it ends.

    Args:
        folder: the run folder, which gets a folder ``profile``.
        steps: numbers of the first and the last step, from 1; None traces nothing.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None) -> None:
        self._folder = folder / TRACE
        self._steps = steps if distributed.is_first() else None
        self._on = False

    @contextmanager
    def step(self, number: int, before: Any) -> Iterator[None]:
        """A step, by its number.

        Args:
            number: from 1, in the run.
            before: arrays that are ready when the devices have nothing left to do.
        """
        if self._steps is None:
            yield
            return
        first, last = self._steps
        if not self._on and first <= number <= last:
            _wait_for(before)
            _profiler.start_trace(self._folder)
            self._on = True
        elif number > last:
            self.close(before)
        if not self._on:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def close(self, before: Any = ()) -> None:
        """Ends the trace, where there is one."""
        if not self._on:
            return
        self._on, self._steps = False, None
        with suppress(Exception):  # Of the step, which the loop reports.
            _wait_for(before)
        _profiler.stop_trace()
        log(f"the trace is in {self._folder}; xprof and TensorBoard show it")

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Interrupted(Exception):
    """A run was asked to end and did so; what it had reached is kept.

    Args:
        signal_number: what asked for it.
        text: how far the run has come, and how to go on.
    """

    def __init__(self, signal_number: int, text: str) -> None:
        super().__init__(f"ended by {signal.Signals(signal_number).name} {text}")
        self.signal_number = signal_number


class Request:
    """Whether somebody asked the run to end: the number of the signal, or None."""

    signal_number: int | None = None
    _at_once: str | None = None

    def asked(self) -> bool:
        """Whether the run is to end after this step; every process asks after every step."""
        if distributed.stop_requested():
            self.signal_number = signal.SIGTERM
        return self.signal_number is not None

    @contextmanager
    def at_once(self, text: str) -> Iterator[None]:
        """Within the block a signal ends the run where it is, for nothing there has to be saved.

        Args:
            text: what ``Interrupted`` says.
        """
        if self.signal_number is not None:
            raise Interrupted(self.signal_number, text)
        self._at_once = text
        try:
            yield
        finally:
            self._at_once = None

    def record(self, number: int) -> None:
        """Notes a signal.

        Raises:
            Interrupted: within ``at_once``.
        """
        self.signal_number = number
        if self._at_once is not None:
            raise Interrupted(number, self._at_once)


@contextmanager
def watch_signals() -> Iterator[Request]:
    """Records the first SIGINT or SIGTERM; a second one acts as if nothing had been installed.

    Outside the main thread, where Python allows no handlers, nothing is watched. In a run over
    several processes jax watches SIGTERM, so that all end after the same step; SIGINT is passed on
    to it.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    together = distributed.several()
    watched = (signal.SIGINT,) if together else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in watched}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def record(number: int, frame: FrameType | None) -> None:
        del frame
        restore()
        if together:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            request.record(number)

    for number in watched:
        signal.signal(number, record)
    try:
        yield request
    finally:
        restore()
