"""SIGINT and SIGTERM as a question the loop asks between steps, not as an exception inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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
