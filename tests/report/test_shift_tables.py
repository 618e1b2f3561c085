"""The tables of a shift report in the terminal: which number stands under which heading."""

import io

import numpy as np
import pytest
from rich.console import Console

from flaxtransfer.report.shift_page import _prevalence_table, _test_table
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
