"""Phases and plans as data: rules, schedules, decisions between phases, recalibration."""

from __future__ import annotations

import json
from dataclasses import replace

import chex
import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flaxtransfer as ft
from flaxtransfer.training.console import read_metrics
from flaxtransfer.training.plan import plan_text
from flaxtransfer.training.selection import Comparison, Progress, bits, decide, score
from tests.support.small import PREPROCESSING, batch, feed, network

HEAD = {"new": ft.head(), "old": ft.rest()}
ADAM = ft.Group(optax.adamw, ft.WarmupCosine(1e-2), weight_decay=0.1)


def head_phase(**changes):
    return ft.Phase(
        HEAD, {"new": ADAM, "old": ft.FROZEN}, **({"steps": 4, "name": "head"} | changes)
    )


def broken_phase(**changes):
    """A phase that can only make things worse: its learning rate destroys the network."""
    huge = ft.Group(optax.sgd, 1e3)
    settings = {"steps": 4, "name": "broken", "clip": 1.0} | changes
    return ft.Phase({"all": ft.everything()}, {"all": huge}, **settings)


def test_rules_and_what_label_makes_of_them_are_the_same_phase():
    _, variables = network()
    params = variables["params"]
    by_rule = head_phase().resolve(params)
    by_tree = replace(head_phase(), labels=ft.label(params, HEAD)).resolve(params)
    assert by_rule.labels == by_tree.labels
    assert by_rule.batch_norm_policy() == by_tree.batch_norm_policy() == frozenset()


def test_a_schedule_stretches_with_its_phase():
    """Against optax's own schedule of the same length."""
    _, variables = network()
    phase = head_phase(steps=None, epochs=2.5).resolve(variables["params"], steps_per_epoch=8)
    assert phase.steps == 20
    expected = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 20)
    rate = phase.groups["new"].learning_rate
    np.testing.assert_allclose([rate(s) for s in range(21)], [expected(s) for s in range(21)])


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_phases_have_a_learning_rate(steps):
    rate = ft.WarmupCosine(1.0).over(steps)
    assert all(0 <= float(rate(step)) <= 1 for step in range(steps + 1))


def test_exceptions_to_the_batch_norm_policy_are_orthogonal_to_what_moves():
    _, variables = network()
    phase = head_phase(norm={"stage(4)": "batch"}).resolve(variables["params"])
    assert phase.norm
    assert all(path.startswith("layer4") for path in phase.norm)


def test_a_phase_that_leaves_gaps_is_named():
    _, variables = network()
    phase = head_phase(name="gaps")
    phase = replace(phase, labels={"new": ft.head()}, groups={"new": ADAM})
    with pytest.raises(ValueError, match=r"(?s)phase 'gaps'.*no label takes \d+ leaves"):
        phase.resolve(variables["params"])


def test_labels_resolved_on_another_network_are_refused():
    """Both ways at once: leaves without a label, and labels without a leaf."""
    _, variables = network()
    params = variables["params"]
    other = {name: leaves for name, leaves in params.items() if name != "layer4"}
    labels = ft.label({**other, "layer5": params["layer4"]}, HEAD)
    phase = replace(head_phase(name="foreign"), labels=labels)
    with pytest.raises(
        ValueError, match=r"'foreign'.*no label takes \d+ leaves: layer4.*no such leaves .*layer5"
    ):
        phase.resolve(params)


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({}, True),
        ({"steps": 9}, True),
        ({"labels": {"new": ft.glob("fc/**"), "old": ft.rest()}}, True),  # In other words.
        ({"clip": 1.0}, False),
        ({"norm": {"stage(4)": "batch"}}, False),
        ({"recalibrate": ft.everything()}, False),
        ({"groups": {"new": replace(ADAM, learning_rate=1e-4), "old": ft.FROZEN}}, False),
        ({"labels": {"new": ft.head() | ft.stage(4), "old": ft.rest()}}, False),
    ],
)
def test_a_phase_that_unfreezes_nothing_new_is_refused_where_validation_decides(change, refused):
    params = network()[1]["params"]
    phases = [head_phase(), replace(head_phase(name="again"), **change)]
    if refused:
        with pytest.raises(ValueError, match=r"'again' unfreezes nothing new.*as 'head' does"):
            ft.Plan(phases, patience=1).resolve(params)
    else:
        assert ft.Plan(phases, patience=1).resolve(params).phases
    # Without a decision it is a schedule with a restart, and the table says what it is.
    plan = ft.Plan(phases)
    assert plan.resolve(params).phases
    same_leaves = "stage(4)" not in str(phases[1].labels)
    assert ("'again' moves the same leaves as 'head'" in plan_text(plan, params)) is same_leaves


def test_a_plan_for_a_deeper_network_names_the_phase_and_the_part():
    deep = ft.resnet("resnet34", classes=3).abstract()["params"]
    plan = ft.recipes.progressive_unfreezing(deep, by="block")
    with pytest.raises(ValueError, match=r"(?s)phase '\+ layer4/2'.*layer4/2"):
        plan.resolve(network()[1]["params"])


@pytest.mark.parametrize(
    ("won", "lost", "min_z", "kept"),
    [
        (5, 0, 2, True),
        (4, 0, 2, False),
        (10, 2, 2, True),
        (9, 2, 2, True),
        (8, 2, 2, False),
        (22, 10, 2, True),
        (21, 10, 2, False),
        (1, 0, 0, True),
        (0, 0, 0, False),
        (1, 0, 1, False),
        (2, 0, 1, True),
    ],
)
def test_a_gain_has_to_exceed_its_standard_errors(won, lost, min_z, kept):
    """McNemar: kept exactly where won - lost > min_z * sqrt(won + lost)."""
    plan = ft.Plan([head_phase(), head_phase(name="b")], patience=1, min_z=min_z)
    before = np.arange(60) < 30
    after = before.copy()
    after[:lost], after[30 : 30 + won] = False, True
    first = Progress().validated(score(plan, Progress(), before), before).next_phase()
    position = first.validated(score(plan, first, after), after)
    decision = decide(plan, position)
    assert decision.evidence["kept"] is position.helped is kept
    assert (decision.evidence["won"], decision.evidence["lost"]) == (won, lost)
    assert f"{won} images won and {lost} lost of 60" in decision.text


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_what_was_right_survives_the_checkpoint(pairs):
    """Comparisons of the packed bits are those of the arrays themselves."""
    old, new = (np.array(column) for column in zip(*pairs, strict=True))
    compared = Comparison.of(bits(old), bits(new), len(old))
    assert compared == Comparison(old.sum(), (new & ~old).sum(), (old & ~new).sum(), len(old))
    assert compared.gain() == pytest.approx(new.mean() - old.mean())


def test_an_unresolved_phase_says_so():
    with pytest.raises(ValueError, match="phase 'head' is not resolved yet"):
        head_phase().batch_norm_policy()
    with pytest.raises(ValueError, match=r"takes its length from a phase.*group\.over\(steps\)"):
        ADAM.transformation()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ft.Plan([head_phase()], patience=0), "patience must be 1 phase or more"),
        (lambda: ft.Plan([head_phase()], min_gain=-0.1), "min_gain must be in"),
        (lambda: ft.Plan([head_phase()], min_z=-1.0), "min_z must be 0 standard errors or more"),
        (
            lambda: ft.WarmupCosine(-1.0, warmup=1.0),
            "peak must be >= 0, got -1.0; warmup must be .* got 1.0",
        ),
        (
            lambda: ft.training.CrossEntropy(1.0),
            "label_smoothing must be in \\[0, 1\\), got 1.0",
        ),
        (
            lambda: ft.Plan([replace(head_phase(), groups={"new": ft.FROZEN, "old": ft.FROZEN})]),
            "phase 'head' trains nothing",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_rules_that_the_data_cannot_answer_are_refused_at_once(tmp_path):
    model, variables = network()
    plan = ft.Plan([head_phase(patience=2, recalibrate=ft.everything())], patience=1)
    with pytest.raises(ValueError, match=r"'head', the plan; phase 'head' recalibrates"):
        ft.fit(
            ft.Classifier(model, variables, PREPROCESSING),
            plan,
            feed(validation=False),
            tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_phase_that_hurts_is_undone_and_ends_the_plan(tmp_path):
    model, variables = network()
    first = head_phase(steps=8)
    last = head_phase(name="never")
    # A network that names one class only is lucky now and then; half of the images is no luck.
    plan = ft.Plan([first, broken_phase(), last], patience=1, min_gain=0.5)
    fitted = ft.fit(ft.Classifier(model, variables, PREPROCESSING), plan, feed(), tmp_path / "run")
    alone = ft.fit(
        ft.Classifier(model, variables, PREPROCESSING), ft.Plan([first]), feed(), tmp_path / "alone"
    )
    chex.assert_trees_all_equal(fitted.variables, alone.variables)
    assert fitted.steps == 12
    decisions = [r for r in read_metrics(tmp_path / "run") if r["kind"] == "decision"]
    assert [(d["phase"], d["kept"], d["next"]) for d in decisions] == [
        ("head", True, "broken"),
        ("broken", False, None),
    ]
    assert decisions[1]["score"] <= decisions[1]["score_before"] == decisions[0]["score"]
    assert any("'broken' is undone" in n and "'never' is not begun" in n for n in fitted.notes)


def test_a_run_that_stops_at_a_decision_takes_the_same_one_again(tmp_path):
    """The last checkpoint of the first phase is there, and nothing after it."""
    model, variables = network()
    plan = ft.Plan([head_phase(steps=8), broken_phase()], patience=1, min_gain=0.5)

    def stop(number):
        if number == 8:
            raise KeyboardInterrupt
        return batch(number)

    with pytest.raises(KeyboardInterrupt):
        ft.fit(
            ft.Classifier(model, variables, PREPROCESSING), plan, feed(make=stop), tmp_path / "run"
        )
    ft.fit(
        ft.Classifier(model, variables, PREPROCESSING), plan, feed(), tmp_path / "run", resume=True
    )
    ft.fit(ft.Classifier(model, variables, PREPROCESSING), plan, feed(), tmp_path / "straight")
    resumed, straight = (
        [row for row in read_metrics(tmp_path / name) if row["kind"] == "decision"]
        for name in ("run", "straight")
    )
    assert resumed == straight
    names = ("run", "straight")
    audits = [json.loads((tmp_path / name / "audit.json").read_text()) for name in names]
    assert audits[0] == audits[1]
    assert [audit["phase"] for audit in audits[0]] == ["head", "broken"]
    assert json.loads((tmp_path / "run/result.json").read_text())["steps"] == 12


@pytest.mark.parametrize(
    ("scores", "patience", "goes_on"),
    [
        ((0.5, 0.6), 1, True),
        ((0.5, 0.5), 1, False),
        ((0.5, 0.4), None, True),
        ((0.5, 0.4), 2, True),
    ],
)
def test_the_rule_between_phases(scores, patience, goes_on):
    phases = [head_phase(name=str(number)) for number in range(4)]
    right = np.ones(8, bool)
    first = Progress(phase_step=4).validated(scores[0], right)
    position = first.next_phase().validated(scores[1], right)
    assert decide(ft.Plan(phases, patience=patience), position).goes_on is goes_on
    again = position.next_phase().validated(0.1, right)
    assert decide(ft.Plan(phases, patience=2), again).goes_on is (scores[1] > scores[0])


def test_recalibrated_statistics_of_the_first_layer_are_numpys():
    """Nothing lies before the stem's BatchNorm but a convolution, so that batches do not matter."""
    model, variables = network()
    batches = [batch(n) for n in range(3)]
    padded = batch(3)
    padded = {**padded, "weight": np.array([1, 1, 1, 0, 0, 0, 0, 0])}
    measured = ft.training.recalibrate(
        ft.Classifier(model, variables, PREPROCESSING), [*batches, padded], ft.stem()
    )
    images = np.concatenate([b["image"] for b in batches] + [padded["image"][:3]])
    normal = (images.astype(np.float64) / 255 - 0.5) / 0.25
    kernel = np.asarray(variables["params"]["conv1"]["kernel"], np.float64)
    with jax.enable_x64(True):
        maps = np.asarray(
            jax.lax.conv_general_dilated(
                normal, kernel, (2, 2), ((3, 3), (3, 3)), dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )
    np.testing.assert_allclose(measured["bn1"]["mean"], maps.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(measured["bn1"]["var"], maps.var((0, 1, 2)), rtol=1e-4)
    for name, stage in variables["batch_stats"].items():
        if name != "bn1":
            assert jax.tree.all(jax.tree.map(np.array_equal, stage, measured[name]))


def test_one_batch_and_the_network_itself_agree():
    """With one batch, what was measured normalizes as the batch itself does, at every depth."""
    model, variables = network()
    images = (batch(0, 32)["image"].astype(np.float32) / 255 - 0.5) / 0.25
    measured = ft.training.recalibrate(
        ft.Classifier(model, variables, PREPROCESSING), [batch(0, 32)]
    )
    by_batch, _ = model.apply(variables, images, norm="batch")
    running, _ = model.apply({**variables, "batch_stats": measured}, images)
    np.testing.assert_allclose(running, by_batch, rtol=1e-4, atol=1e-5)


def test_recalibration_needs_images_and_a_batch_norm():
    model, variables = network()
    with pytest.raises(ValueError, match="no images"):
        ft.training.recalibrate(ft.Classifier(model, variables, PREPROCESSING), [])
    with pytest.raises(ValueError, match="touches no BatchNorm"):
        ft.training.recalibrate(
            ft.Classifier(model, variables, PREPROCESSING), [batch(0)], ft.head()
        )


def test_a_phase_that_recalibrates_leaves_those_statistics_alone_afterwards(tmp_path):
    model, variables = network()
    data = replace(feed(), calibration=lambda: [batch(n) for n in range(4)])
    plan = ft.Plan([head_phase(recalibrate=ft.everything())])
    fitted = ft.fit(
        ft.Classifier(model, variables, data.preprocessing), plan, data, tmp_path / "run"
    )
    expected = ft.training.recalibrate(
        ft.Classifier(model, variables, PREPROCESSING), data.calibration()
    )
    found = fitted.variables["batch_stats"]
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
    assert not np.array_equal(found["bn1"]["mean"], variables["batch_stats"]["bn1"]["mean"])
