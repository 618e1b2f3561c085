"""Progressive unfreezing through ``fit``: what each transition keeps, and what it undoes."""

from __future__ import annotations

import itertools
import re

import jax
import numpy as np
import pytest

import flaxtransfer as ft
from flaxtransfer.groups import trainable_mask
from flaxtransfer.paths import flatten
from flaxtransfer.training import loop
from flaxtransfer.training.console import read_metrics
from tests.support.small import feed, network, progressive


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a run decided, its states before and after each transition, and at each phase's end."""
    transitions, ends = {}, {}
    advance, best = loop.advance, loop._best

    def ended(run, state, position):
        ends[run.plan.phases[position.phase].name] = jax.device_get(state._replace(key=None))
        return best(run, state, position)

    def recorded(state, phase):
        before = jax.device_get(state._replace(key=None))
        after = advance(state, phase)
        transitions[phase.name] = (before, jax.device_get(after._replace(key=None)), phase)
        return after

    model, variables = network()
    folder = tmp_path_factory.mktemp("progressive") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "advance", recorded)
        patch.setattr(loop, "_best", ended)
        options = ft.FitOptions(evaluate_every=3)
        fitted = ft.fit(
            ft.Classifier(model, variables, feed().preprocessing),
            progressive(variables["params"]),
            feed(),
            folder,
            options=options,
        )
    decisions = [row for row in read_metrics(folder) if row["kind"] == "decision"]
    return decisions, transitions, ends, fitted


def moments(state) -> dict[str, np.ndarray]:
    """Adam's two moments of each leaf that has them, and its count, by path."""
    found = {}
    leaves = [
        (jax.tree_util.keystr(p), v)
        for p, v in jax.tree_util.tree_leaves_with_path(state.opt_state)
    ]
    counts = {
        re.search(r"inner_states\['(.*?)'\]", path)[1]: leaf
        for path, leaf in leaves
        if re.search(r"Adam.*\.count$|\[0\]\.count$", path)
    }
    for path, leaf in leaves:
        place = re.search(r"inner_states\['(.*?)'\].*\.(mu|nu)(.*)$", path)
        if place:
            parameter = "/".join(re.findall(r"'(.*?)'", place[3]))
            found[f"{place[2]} {parameter}"] = leaf
            found[f"count {parameter}"] = counts[place[1]]
    return found


def same(one, other) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), one, other))


def test_the_run_keeps_and_undoes_phases(run):
    """What the tests below rest on."""
    decisions, transitions, *_ = run
    assert [row["kept"] for row in decisions[:3]] == [True, True, True]
    assert not decisions[3]["kept"]
    assert list(transitions) == ["+ layer4", "+ layer3", "+ layer2", "+ layer1", "+ stem"]


def test_each_transition_keeps_the_moments_of_what_moved_leaf_by_leaf(run):
    """Mean, second moment and step count; new leaves start at zero, and frozen ones have none."""
    _, transitions, *_ = run
    for before, after, phase in transitions.values():
        old, new = moments(before), moments(after)
        moving = {
            path
            for path, moves in flatten(trainable_mask(phase.labels, phase.groups)).items()
            if moves
        }
        assert set(new) == {f"{kind} {path}" for kind in ("mu", "nu", "count") for path in moving}
        assert any(old[name].any() for name in old if name.startswith("mu"))
        for name, leaf in new.items():
            if name in old:
                assert leaf.tobytes() == old[name].tobytes(), name
            else:
                assert not leaf.any(), name


def test_after_an_undone_phase_everything_is_as_before_it_bit_for_bit(run):
    """Parameters, statistics and moments; and training had changed them meanwhile."""
    decisions, transitions, ends, fitted = run
    undone = [row["phase"] for row in decisions if not row["kept"]]
    begun = [(name, transitions[name][1]) for name in undone]
    following = [transitions[row["next"]][0] for row in decisions if row["phase"] in undone[:-1]]
    for (name, at_start), afterwards in zip(begun[:-1], following, strict=True):
        assert not same(at_start.params, ends[name].params), name
        assert same(at_start.params, afterwards.params), name
        assert same(at_start.batch_stats, afterwards.batch_stats), name
        then, now = moments(at_start), moments(afterwards)
        assert {k: then[k].tobytes() for k in now} == {k: v.tobytes() for k, v in now.items()}
    last = begun[-1][1]
    final = jax.device_get(fitted.variables)
    assert same(final, {"params": last.params, "batch_stats": last.batch_stats})


def test_the_log_shows_the_evidence_of_each_decision(run):
    decisions, *_, fitted = run
    assert "accuracy_before" not in decisions[0]
    for before, row in itertools.pairwise(decisions):
        gained = row["accuracy"] - row["accuracy_before"]
        assert gained * row["examples"] == pytest.approx(row["won"] - row["lost"])
        assert row["z"] == pytest.approx(
            (row["won"] - row["lost"]) / max(1, row["won"] + row["lost"]) ** 0.5
        )
        asked = 0.01 + (row["won"] + row["lost"]) ** 0.5 / row["examples"]
        assert row["kept"] == (gained > asked + 1e-12)
        if before["kept"]:
            assert row["accuracy_before"] == before["accuracy"]
        assert any(f"phase {row['phase']!r} is" in note for note in fitted.notes)
