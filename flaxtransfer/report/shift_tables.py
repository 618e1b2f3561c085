"""A shift report in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from flaxtransfer.report.shift_page import HEADLINES
from flaxtransfer.shift.diagnosis.shift_report import ShiftReport
from flaxtransfer.shift.hypotheses import HypothesisTest
from flaxtransfer.shift.prevalence.prevalence import Prevalence

__all__ = ["print_report"]


def print_report(report: ShiftReport, console: Console) -> None:
    """Conclusion, verdicts, tests, prevalence, accuracy, what to do, and what nobody can know."""
    held_out_count, count, labels = report.counts
    console.print(f"[bold]{HEADLINES[report.conclusion]}[/bold]", highlight=False)
    console.print(
        f"{held_out_count} held-out examples of the source, {count} target images, {labels} of "
        f"them with labels; tests at level {report.level:g}\n",
        highlight=False,
    )
    console.print(_verdict_table(report))
    console.print(_test_table(report.tests))
    if report.prevalences:
        console.print(_prevalence_table(report.prevalences, report.class_names))
    console.print(str(report.accuracy), highlight=False, markup=False)
    console.print("\n[bold]What to do[/bold]")
    for number, action in enumerate(report.actions, 1):
        text = " ".join(filter(None, (action.what, action.expected)))
        console.print(f"{number}. {text}", highlight=False, markup=False)
        console.print(f"   Guard: {action.guard}", highlight=False, markup=False, style="dim")
    console.print("\n[bold]What cannot be known from these data[/bold]")
    for text in report.not_identifiable:
        console.print(f"- {text}", highlight=False, markup=False)
    for note in report.notes:
        console.print(f"note: {note}", highlight=False, markup=False, style="dim")


def _verdict_table(report: ShiftReport) -> Table:
    table = Table("shift", "status", "evidence", title="Which kind", title_justify="left")
    for verdict in report.verdicts:
        table.add_row(verdict.kind, verdict.status, verdict.evidence)
    return table


def _test_table(tests: Sequence[HypothesisTest]) -> Table:
    table = Table("test", title="Tests", title_justify="left")
    for heading in ("p", "adjusted", "effect", "detectable"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("in")
    for test in tests:
        if test.p is None:
            table.add_row(test.name, "", "", "", "", f"not testable: {test.not_testable}")
            continue
        numbers = (test.p, test.adjusted_p, test.effect, test.minimum_detectable)
        table.add_row(test.name, *map(_number, numbers), test.effect_name)
    return table


def _prevalence_table(found: Sequence[Prevalence], names: Sequence[str]) -> Table:
    table = Table("class", title="Prevalence, if label shift is all there is", title_justify="left")
    table.add_column("source", justify="right")
    for each in found:
        table.add_column(each.method, justify="right")
    for k, name in enumerate(names):
        shares = [f"{each.estimate[k]:.3f} {_ends(each, k)}" for each in found]
        table.add_row(name, f"{found[0].source[k]:.3f}", *shares)
    return table


def _ends(found: Prevalence, k: int) -> str:
    return "" if np.isnan(found.low[k]) else f"({found.low[k]:.3f} to {found.high[k]:.3f})"


def _number(value: float | None) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:.3g}"
