"""A sample of the fuzzing of ``tests.faults.fuzz``, and that it would find a fault."""

from __future__ import annotations

import time

import pytest

from tests.faults import fuzz


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_no_input_hangs_fills_memory_or_ends_in_a_traceback(kind):
    inputs = 40 if kind in ("plan", "name") else 150
    found = fuzz.fuzz(kind, inputs, seed=1)
    assert found.failures == []
    assert found.inputs == inputs
    assert found.read > 0
    assert found.slowest < fuzz.MOST_SECONDS


def refuse(text):
    raise ValueError(text)


@pytest.mark.parametrize(
    ("read", "failure"),
    [
        (lambda: time.sleep(9), "no end after 0.2 s"),
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: refuse("x" * 601), "an error of 601 characters"),
        (lambda: refuse("a\nb"), "an error of 2 lines"),
        (lambda: refuse("see sys.set_int_max_str_digits()"), "Python's own advice"),
    ],
)
def test_faults_are_found(monkeypatch, read, failure):
    monkeypatch.setattr(fuzz, "MOST_SECONDS", 0.2)
    monkeypatch.setitem(fuzz.KINDS, "bad", lambda draw: ("given", read))
    assert fuzz.fuzz("bad", 1).failures[0].startswith(failure)
