"""Samples of the fault harness; ``python -m tests.faults.kills`` and ``damage`` run it whole."""

from __future__ import annotations

import signal

import pytest

from tests.faults import damage, harness, kills


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The place of a run that nothing befell, its file operations, and its outcome."""
    place = tmp_path_factory.mktemp("kills")
    count = int(kills.start(place / "whole").split()[0])
    return place, count, harness.outcome(place / "whole")


@pytest.mark.parametrize(
    ("share", "number"),
    [(0.0, signal.SIGKILL), (0.55, signal.SIGKILL), (0.97, signal.SIGTERM)],
    ids=["before the configuration", "in the second phase", "SIGTERM at the end"],
)
def test_stopped_at_a_file_operation_and_resumed_it_ends_as_if_never_stopped(whole, share, number):
    place, count, wanted = whole
    assert kills.tried(place, wanted, 2 + round(share * count), number) == "same"


def test_damaged_files_change_nothing_without_a_word(tmp_path):
    counts, violations = damage.check(tmp_path, every=61)
    assert violations == []
    assert sum(counts.values()) > 10
