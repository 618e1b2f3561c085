"""The progress of a run for a person who watches: one bar a phase, with the time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


class Report(Protocol):
    """Called after every step with the step within the phase and the latest text."""

    def __call__(self, step: int, text: str) -> None: ...


def say(text: str) -> None:
    """One line for whoever watches, beside the bars and away from the results."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(text, markup=False)


@contextmanager
def progress_bar(
    name: str, total: int, *, start: int = 0, console: Console | None = None
) -> Iterator[Report]:
    """A bar for one phase; where the output is no terminal, a line at its end instead."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        last = ["", start]

        def remember(step: int, text: str) -> None:
            last[:] = [text, step]

        yield remember
        console.print(f"{name}: step {last[1]} of {total}  {last[0]}", highlight=False)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=total, completed=start, text="")

        def update(step: int, text: str) -> None:
            progress.update(task, completed=step, text=text)

        yield update
