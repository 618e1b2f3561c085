"""What a run says and hears: progress bars, log lines, the metrics file, signals."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, NamedTuple, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from flaxtransfer import distributed
from flaxtransfer.files import atomic_write, check_regular, parse_json, write_file
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
        console.print(
            f"{name}: step {last[1]} of {total}  {last[0]}", highlight=False, markup=False
        )
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
