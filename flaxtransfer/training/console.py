"""Progress bars, log lines, and signals as a question that the loop asks between steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

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


class Interrupted(Exception):
    """A run was asked to end and did so, with a checkpoint.

    Args:
        signal_number: what asked for it.
        step: the step that the checkpoint holds.
    """

    def __init__(self, signal_number: int, step: int) -> None:
        name = signal.Signals(signal_number).name
        super().__init__(f"ended by {name} at step {step}, with a checkpoint; --resume continues")
        self.signal_number = signal_number
        self.step = step


class Request:
    """Whether somebody asked the run to end: the number of the signal, or None."""

    signal_number: int | None = None


@contextmanager
def watch_signals() -> Iterator[Request]:
    """Records the first SIGINT or SIGTERM; a second one acts as if nothing had been installed.

    Outside the main thread, where Python allows no handlers, nothing is watched.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    watched = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in watched}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def record(number: int, frame: FrameType | None) -> None:
        del frame
        request.signal_number = number
        restore()

    for number in watched:
        signal.signal(number, record)
    try:
        yield request
    finally:
        restore()
