"""A sample of the damaged weights; ``python -m tests.faults.readers`` tries them for minutes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_damaged_weights_are_refused_and_nothing_else():
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.readers", "--minutes", "0.2"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert "| safetensors |" in done.stdout
    assert "| h5 |" in done.stdout
