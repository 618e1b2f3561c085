"""The tables of a shift report in the terminal: which number stands under which heading."""

import io

import numpy as np
import pytest
from rich.console import Console, Group
from rich.table import Table

from flaxtransfer.overview import terminal
from flaxtransfer.report.figures import wrap_text
from flaxtransfer.report.pages import _prevalence_table, _test_table, escape
from flaxtransfer.report.shift_figures import plot_prevalence
from flaxtransfer.shift.prevalence import Prevalence
from flaxtransfer.shift.statistics import HypothesisTest


def cells(table):
    """What is printed, a list of cells a line."""
    file = io.StringIO()
    Console(file=file, width=200).print(table)
    lines = [line for line in file.getvalue().splitlines() if line[:1] in "│┃"]
    return [
        [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines
    ]


@pytest.mark.parametrize(
    ("detectable", "shown"), [(0.625, "0.625"), (None, ""), (float("nan"), "")]
)
def test_the_numbers_of_a_test(detectable, shown):
    asked = HypothesisTest(
        "a test", "H0", 9.0, 0.01, 0.75, "AUC", detectable, (9, 9), adjusted_p=0.03
    )
    lost = HypothesisTest(
        "another", "H0", 9.0, None, 0.75, "AUC", None, (9, 9), not_testable="no rows"
    )
    assert cells(_test_table([asked, lost])) == [
        ["test", "p", "adjusted", "effect", "detectable", "in"],
        ["a test", "0.01", "0.03", "0.75", shown, "AUC"],
        ["another", "", "", "", "", "not testable: no rows"],
    ]


def test_shares_with_their_intervals_and_without():
    def found(method, estimate, half):
        shares = np.array(estimate)
        return Prevalence(
            method, shares, shares - half, shares + half, 0.95, np.array([0.5, 0.5]), (9, 9)
        )

    both = (found("one", [0.25, 0.75], 0.125), found("other", [0.375, 0.625], np.nan))
    assert cells(_prevalence_table(both, ("dark", "bright"))) == [
        ["class", "source", "one", "other"],
        ["dark", "0.500", "0.250 (0.125 to 0.375)", "0.375"],
        ["bright", "0.500", "0.750 (0.625 to 0.875)", "0.625"],
    ]


NAMES = ("x[/b]", "[red]", "a\x1b]0;owned\x07", ":cat:", "\udcff")


@pytest.mark.parametrize("console", [Console, terminal])
def test_names_are_text_and_never_markup(console):
    shares = np.full(5, 0.2)
    found = (Prevalence("one", shares, shares, shares, 0.95, shares, (9, 9)),)
    file = io.StringIO()
    console(file=file, width=200).print(_prevalence_table(found, NAMES))
    for shown in ("x[/b]", "[red]", r"a\x1b]0;owned\x07", ":cat:", r"\xff"):
        assert f"│ {shown} " in file.getvalue()
    assert "\x1b" not in file.getvalue()


def test_a_terminal_shows_every_string_as_it_is():
    file = io.StringIO()
    console = terminal(file=file, width=200)
    table = Table("[/h]", title="[/t]", caption="[/c]")
    table.add_row("[/cell]")
    for each in ("x[/b]", "\x1b]0;owned\x07", table, Group("[/g]")):
        console.print(each)
    console.print(":cat:", style="bold")
    for shown in ("x[/b]", r"\x1b]0;owned\x07", "[/h]", "[/t]", "[/c]", "[/cell]", "[/g]", ":cat:"):
        assert shown in file.getvalue()


def test_names_in_a_page_and_a_figure():
    assert escape("<b>\x1b\udcff") == r"&lt;b&gt;\x1b\xff"
    assert wrap_text("$x$ \udcff\x1b", 20) == r"\$x\$ \xff\x1b"
    file = io.BytesIO()
    shares = np.full(5, 0.2)
    found = (Prevalence("one", shares, shares, shares, 0.95, shares, (9, 9)),)
    plot_prevalence(file, found, class_names=("$x", "$\\frac$", "\udcff", "\x1b", "_a"))
    assert file.getvalue().startswith(b"\x89PNG")
