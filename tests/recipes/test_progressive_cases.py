"""Progressive unfreezing where the right answer is known by construction; see the script."""

from __future__ import annotations

import pytest

from unfreezing import PHASES, TARGETS, case, reached, unfreeze

# Fewer steps than in the experiment, whose table has the rates over seeds.
CASES = [
    ("nothing", 0, 50),
    ("layer4", 0, 80),
    *((name, seed, 150) for name in TARGETS for seed in (1, 2)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed", "steps"), CASES)
def test_it_stops_where_it_should(name, seed, steps, tmp_path):
    right = TARGETS[name].keeps
    decisions = unfreeze(case(name, seed, 3000), tmp_path / "run", steps=steps, min_z=2.0)
    assert reached(decisions) == right, decisions
    # What was begun: all that is kept and, where there is more, the first that is not.
    assert [row["phase"] for row in decisions] == list(PHASES[: right + 1])
    assert [row["kept"] for row in decisions] == [n < right for n in range(len(decisions))]
    for row in decisions[1:]:
        assert (row["z"] > 2) == row["kept"]
