"""The table of finite samples: what the usual numbers say of nothing, and the nulls beside it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_script_prints_what_is_known_of_small_samples():
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "shift_distances.py"), "--permutations", "19"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    table = {(name, size): rest for name, size, *rest in rows[2:]}
    # Of 1 against its copy without a null, at sizes where each fails.
    assert 640 < float(table["Frechet", "100, 512"][1].split(",")[0]) < 680
    assert table["proxy A", "100, 512"][0] == "2.000, 2.000"
    assert table["H-score", "200, 512"][0] == "4.000, 4.000"
    assert float(table["LogME", "50, 2048"][0].split(",")[0]) > 100
    assert -1 < float(table["LogME", "50, 2048"][1].split(",")[0]) < 0
    for size, usual in (("1000, 64", 0.058), ("100, 512", 0.838), ("50, 2048", 0.975)):
        assert float(table["CKA", size][0].split(",")[0]) == pytest.approx(usual, abs=0.005)
        assert abs(float(table["CKA", size][1].split(",")[0])) < 0.06
    # And with something to be found, nearly all nulls are left behind.
    assert sum(rest[-1].endswith("(0.05)") for rest in table.values()) >= 17
