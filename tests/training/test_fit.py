"""Claims about a run: what moves, what does not, what is kept, and what is refused."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxtransfer as ft
from flaxtransfer.features.inputs import pooled_features
from flaxtransfer.paths import flatten
from flaxtransfer.training.console import read_metrics
from flaxtransfer.training.loop import NonFiniteLoss
from flaxtransfer.training.run_folder import (
    digest,
    finish,
    split_of,
    task_of,
    validation_of,
)
from flaxtransfer.training.step import advance, start, train_step
from tests.support.small import PREPROCESSING, SIZE, batch, feed, network, two_phases


def digests(tree):
    return {path: digest(leaf) for path, leaf in flatten(tree).items()}


def test_frozen_leaves_are_bit_identical_with_decay_clipping_and_average(tmp_path):
    model, variables = network()
    # A frozen -0.0 must not become +0.0 by adding a zero update.
    stem = variables["params"]["conv1"]
    stem["kernel"] = stem["kernel"].at[0, 0, 0, 0].set(-0.0)
    before = digests(variables)
    plan = two_phases(variables["params"], ema=0.9)
    fitted = ft.fit(
        ft.Classifier(model, variables, feed(validation=False).preprocessing),
        plan,
        feed(validation=False),
        tmp_path / "run",
    )
    after = digests(fitted.variables)
    same = {path for path in before if before[path] == after[path]}
    # The stem and its statistics, and nothing else.
    assert same == {p for p in before if p.split("/")[1] in ("conv1", "bn1")}
    assert [audit.moved for audit in fitted.audits] == [(), ()]
    assert fitted.audits[0].leaves > fitted.audits[1].leaves > 0
    assert not any(row["moved"] for row in json.loads((tmp_path / "run/audit.json").read_text()))


def test_the_audit_notices_a_leaf_that_moved(tmp_path, monkeypatch):
    import flaxtransfer.training.step as step

    model, variables = network()
    plan = two_phases(variables["params"], steps=2)
    merge = step.merge

    def drifting_merge(still, moved):
        whole = merge(still, moved)
        whole["bn1"] = jax.tree.map(lambda leaf: leaf * 1.0001, whole["bn1"])
        return whole

    monkeypatch.setattr(step, "merge", drifting_merge)
    monkeypatch.setattr(step, "_shared", step._compiled)  # and no program of an earlier test
    fitted = ft.fit(
        ft.Classifier(model, variables, feed().preprocessing), plan, feed(), tmp_path / "run"
    )
    assert "params/bn1/scale" in fitted.audits[0].moved
    assert "MOVED" in str(fitted.audits[0])


def test_it_learns_and_leaves_a_complete_run_folder(tmp_path):
    model, variables = network()
    folder = tmp_path / "run"
    plan = two_phases(variables["params"], steps=40)
    fitted = ft.fit(
        ft.Classifier(model, variables, feed().preprocessing),
        plan,
        feed(),
        folder,
        config={"data": "brightness"},
    )
    assert fitted.validation.accuracy > 0.9
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
        "audit.json",
        "model.safetensors",
        "result.json",
    } <= names
    rows = read_metrics(folder)
    assert {row["kind"] for row in rows} == {"train", "validation", "decision"}
    loaded = ft.load(folder / "model.safetensors")
    assert loaded.class_names == ("dark", "gray", "bright")
    chex.assert_trees_all_equal(loaded.variables, jax.device_get(fitted.variables))
    kept, batches = validation_of(folder), feed().validation
    seen, labels = pooled_features(
        ft.Classifier(model, fitted.variables, feed().preprocessing), batches()
    )
    logits, _ = model.apply(fitted.variables, jnp.asarray(seen), norm="running", start="head")
    np.testing.assert_array_equal(kept.labels, labels)
    np.testing.assert_allclose(kept.logits, logits, atol=1e-5)
    # Features are kept with the 11 bits of half precision.
    np.testing.assert_allclose(kept.features, seen, rtol=2**-11, atol=1e-5)
    assert kept.features.dtype == np.float16


def offset_loss(logits, labels, key):
    """A loss of somebody's own: cross-entropy, moved to where it cannot be mistaken for it."""
    return 100 + ft.training.cross_entropy(logits, labels, key)


def test_validation_reports_the_loss_that_was_trained(tmp_path):
    model, variables = network()
    plan = two_phases(variables["params"], steps=4, loss=offset_loss)
    fitted = ft.fit(ft.Classifier(model, variables, PREPROCESSING), plan, feed(), tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    trained, validated = (
        [row["loss"] for row in rows if row["kind"] == kind] for kind in ("train", "validation")
    )
    assert all(100 < loss < 110 for loss in (*trained, *validated))
    result = json.loads((tmp_path / "run/result.json").read_text())["validation"]
    assert result["loss"] == fitted.validation.loss == validated[-1]
    plain = ft.evaluate(fitted.network, feed().validation())
    assert fitted.validation.loss == pytest.approx(100 + plain.loss, rel=1e-6)


def test_the_task_is_kept_with_the_run_and_the_weights(tmp_path):
    model, variables = network()
    plan = two_phases(variables["params"], steps=2)
    ft.fit(ft.Classifier(model, variables, PREPROCESSING), plan, feed(), tmp_path / "run")
    assert task_of(tmp_path / "run") is ft.task.SINGLE_LABEL
    assert ft.load(tmp_path / "run/model.safetensors").task is ft.task.SINGLE_LABEL


def test_data_for_another_network_is_refused(tmp_path):
    model, variables = network()
    other = ft.Preprocessing((0.1,) * 3, (0.25,) * 3, SIZE, SIZE)
    plan = two_phases(variables["params"])
    with pytest.raises(ValueError, match=r"data must be prepared for this network.*0\.1.*0\.5"):
        ft.fit(ft.Classifier(model, variables, other), plan, feed(), tmp_path / "run")
    source = ft.ArraySource(np.zeros((6, SIZE, SIZE, 3), np.uint8), [0, 1, 2, 3, 0, 1])
    data = ft.loaders(source, ft.data.Splits.of(range(6)), PREPROCESSING, batch_size=2)
    with pytest.raises(ValueError, match=r"labels must be 0 \.\. 2 for .* 3 classes, got 3"):
        ft.fit(ft.Classifier(model, variables, PREPROCESSING), plan, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_its_split(tmp_path):
    model, variables = network()
    images = np.stack([batch(n, 1)["image"][0] for n in range(12)])
    source = ft.ArraySource(images, np.arange(12) % 3)
    splits = ft.stratified_split(source.labels(), val_fraction=0.25, test_fraction=0.25)
    data = ft.loaders(source, splits, PREPROCESSING, batch_size=4)
    plan = ft.Plan([two_phases(variables["params"], steps=2).phases[0]])
    ft.fit(ft.Classifier(model, variables, PREPROCESSING), plan, data, tmp_path / "run")
    kept = split_of(tmp_path / "run")
    assert (kept.address, kept.examples) == ("", 12)
    for part, found in zip(splits, kept.positions(source), strict=True):
        np.testing.assert_array_equal(found, part)
    with pytest.raises(ValueError, match="12 examples of a source that a program made; got 11"):
        kept.positions(ft.ArraySource(images[1:], np.arange(11) % 3))


@pytest.mark.parametrize(("largest", "kept"), [(6e4, np.float16), (1e5, np.float32)])
def test_features_too_large_for_half_precision_are_kept_whole(tmp_path, largest, kept):
    model, variables = network()
    said = ft.training.Predictions(
        np.zeros((2, 3)), np.zeros(2, int), np.array([[1.0], [-largest]])
    )
    finish(tmp_path, ft.Classifier(model, variables, PREPROCESSING), 1, said, said.evaluation())
    found = validation_of(tmp_path).features
    assert found.dtype == kept
    np.testing.assert_array_equal(found, said.features)


def kernel_moments(state):
    """The leaves of an optimizer state that belong to the head's kernel."""
    return [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if "['fc']['kernel']" in jax.tree_util.keystr(path)
    ]


def test_unfreezing_keeps_the_moments_of_leaves_that_already_trained():
    model, variables = network()
    plan = two_phases(variables["params"])
    state = start(variables, plan.phases[0], 0)
    step = train_step(model, plan.phases[0], feed())
    for number in range(3):
        state, _ = step(state, batch(number))
    moments = state.opt_state
    after = advance(state, plan.phases[1])
    before, now = kernel_moments(moments), kernel_moments(after.opt_state)
    assert len(before) == len(now) == 2  # Adam's two moments
    for old, new in zip(before, now, strict=True):
        assert float(abs(old).max()) > 0
        np.testing.assert_array_equal(old, new)


def test_clipping_uses_the_norm_of_trainable_gradients_alone():
    """Against optax's own clip on the gradient of the trainable leaves, taken by jax.grad."""
    model, variables = network()
    phase = replace(
        two_phases(variables["params"]).phases[0],
        clip=1e-3,
        groups={"new": ft.Group(optax.sgd, 1.0), "frozen": ft.FROZEN},
    )
    images = (batch(0)["image"].astype(np.float32) / 255 - 0.5) / 0.25

    def loss(fc):
        params = {**variables["params"], "fc": fc}
        logits, _ = model.apply({**variables, "params": params}, images, norm="running")
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch(0)["label"]).mean()

    gradient = jax.grad(loss)(variables["params"]["fc"])
    clipped, _ = optax.clip_by_global_norm(1e-3).update(gradient, optax.EmptyState())
    expected = optax.apply_updates(variables["params"]["fc"], jax.tree.map(lambda g: -g, clipped))
    state, metrics = train_step(model, phase, feed())(start(variables, phase, 0), batch(0))
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradient), rtol=1e-5)
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(state.params["fc"][name], expected[name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "network",
    [
        ft.models.ResNetConfig("bottleneck", (1, 1, 1, 1), classes=10),
        pytest.param("resnet50", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_head_only_step_costs_at_most_036_of_a_full_one(network):
    """Compiled cost analysis, with clipping and gradient-norm logging on."""
    model = ft.resnet(network, classes=10)
    variables = model.abstract()

    def flops(rules, groups):
        phase = ft.Phase(ft.label(variables["params"], rules), groups, steps=1, clip=1.0)
        state = jax.eval_shape(lambda: start(variables_of(variables), phase, 0))
        shapes = {
            "image": jax.ShapeDtypeStruct((2, 64, 64, 3), np.uint8),
            "label": jax.ShapeDtypeStruct((2,), np.int32),
        }
        compiled = train_step(model, phase, feed()).lower(state, shapes).compile()
        return compiled.cost_analysis()["flops"]

    def variables_of(abstract):
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)

    sgd = ft.Group(optax.sgd, 0.1)
    head = flops({"new": ft.head(), "frozen": ft.rest()}, {"new": sgd, "frozen": ft.FROZEN})
    full = flops({"all": ft.everything()}, {"all": sgd})
    assert head <= 0.36 * full


def test_patience_ends_a_phase_early(tmp_path):
    model, variables = network()
    plan = two_phases(variables["params"], steps=400, patience=2)
    options = ft.FitOptions(evaluate_every=2)
    fitted = ft.fit(
        ft.Classifier(model, variables, feed().preprocessing),
        plan,
        feed(),
        tmp_path / "run",
        options=options,
    )
    assert fitted.steps < 200
    best = max(
        row["accuracy"] for row in read_metrics(tmp_path / "run") if row["kind"] == "validation"
    )
    assert fitted.validation.accuracy == best  # the best validated state was restored


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    model, variables = network()

    def poison(number):
        good = batch(number)
        return good if number < 11 else {**good, "label": np.full(8, -7, np.int32)}

    def loss(logits, labels, key):
        plain = ft.training.cross_entropy(logits, labels.clip(0), key)
        return jax.numpy.where(labels < 0, jax.numpy.nan, plain)

    plan = two_phases(variables["params"], steps=20, loss=loss)
    options = ft.FitOptions(evaluate_every=5)
    data = replace(feed(validation=False), train=lambda k: (poison(n) for n in range(k, 99)))
    with pytest.raises(NonFiniteLoss, match=r"loss is nan.* at step 12 .*checkpoint of step 10"):
        ft.fit(
            ft.Classifier(model, variables, data.preprocessing),
            plan,
            data,
            tmp_path / "run",
            options=options,
        )
    with ft.training.CheckpointManager.open(tmp_path / "run/checkpoints", read_only=True) as store:
        assert store.latest() == 10


def test_a_size_below_zero_is_refused_before_anything_is_written(tmp_path):
    model, variables = network()
    plan = two_phases(variables["params"], steps=2)
    classifier = ft.Classifier(model, variables, feed().preprocessing)
    with pytest.raises(ValueError, match="shard_above must be bytes >= 0, or None, got -1"):
        ft.fit(classifier, plan, feed(), tmp_path / "run", shard_above=-1)
    assert not (tmp_path / "run").exists()


def test_another_configuration_is_refused_and_an_unfinished_run_needs_resume(tmp_path):
    model, variables = network()
    plan = two_phases(variables["params"], steps=2)
    ft.fit(
        ft.Classifier(model, variables, feed().preprocessing),
        plan,
        feed(),
        tmp_path / "run",
        config={"data": "a"},
    )
    with pytest.raises(ValueError, match="belongs to another run: data is 'a' there and 'b' here"):
        ft.fit(
            ft.Classifier(model, variables, feed().preprocessing),
            plan,
            feed(),
            tmp_path / "run",
            config={"data": "b"},
            resume=True,
        )
    with pytest.raises(ValueError, match=r"a finished run of this very configuration.*--resume"):
        ft.fit(
            ft.Classifier(model, variables, feed().preprocessing),
            plan,
            feed(),
            tmp_path / "run",
            config={"data": "a"},
        )
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"not a run folder .*thesis\.tex"):
        ft.fit(
            ft.Classifier(model, variables, feed().preprocessing), plan, feed(), tmp_path / "other"
        )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_a_checkpoint_and_resume_goes_on(tmp_path, number):
    model, variables = network()
    plan = two_phases(variables["params"])

    def interrupting(step):
        if step == 5:
            signal.raise_signal(number)
        return batch(step)

    with pytest.raises(ft.training.Interrupted, match=f"{number.name} at step 6"):
        ft.fit(
            ft.Classifier(model, variables, feed(make=interrupting).preprocessing),
            plan,
            feed(make=interrupting),
            tmp_path / "run",
        )
    resumed = ft.fit(
        ft.Classifier(model, variables, feed().preprocessing),
        plan,
        feed(),
        tmp_path / "run",
        resume=True,
    )
    straight = ft.fit(
        ft.Classifier(model, variables, feed().preprocessing), plan, feed(), tmp_path / "straight"
    )
    assert digests(resumed.variables) == digests(straight.variables)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == sorted(
        row["step"] for row in read_metrics(tmp_path / "run")
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"steps": None}, "give steps or epochs"),
        ({"steps": 3, "epochs": 1.0}, "give steps or epochs"),
        ({"steps": -1}, "steps must be positive, got -1"),
        ({"steps": float("inf")}, "steps must be finite, got inf; steps must be a whole number"),
        ({"steps": 1.5}, "steps must be a whole number, got 1.5"),
        ({"steps": 1, "patience": True}, "patience must be a whole number, got True"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"clip": 0.0}, "clip must be positive, got 0.0"),
    ],
)
def test_a_phase_refuses_what_makes_no_sense(changes, text):
    _, variables = network()
    phase = two_phases(variables["params"]).phases[0]
    with pytest.raises(ValueError, match=text):
        replace(phase, **changes)


def test_a_plan_refuses_phases_that_train_nothing_or_share_a_name():
    _, variables = network()
    phase = two_phases(variables["params"]).phases[0]
    nothing = replace(phase, groups={"new": ft.FROZEN, "frozen": ft.FROZEN})
    with pytest.raises(ValueError, match="phase 'head' trains nothing: frozen are new, frozen"):
        ft.Plan([nothing])
    with pytest.raises(ValueError, match="repeated: head"):
        ft.Plan([phase, phase])
    with pytest.raises(ValueError, match="at least one phase"):
        ft.Plan([])


def test_batch_norm_of_a_frozen_subtree_uses_running_statistics():
    _, variables = network()
    policy = two_phases(variables["params"]).phases[1].batch_norm_policy()
    assert "bn1" not in policy
    assert "layer1/0/bn1" in policy
    assert SIZE == 16


def test_an_average_is_validated_with_statistics_of_its_own(tmp_path):
    """As the same weights with measured ones; with those of the stepped weights it is useless."""
    random, labels = np.random.default_rng(0), np.arange(96) % 3
    noise = random.integers(0, 40, (96, SIZE, SIZE, 3))
    images = (noise + 90 * labels[:, None, None, None]).astype(np.uint8)
    splits = ft.data.Splits.of(range(64), range(64, 96))
    source = ft.ArraySource(images, labels, ("dark", "gray", "bright"))
    data = ft.loaders(source, splits, PREPROCESSING, batch_size=16)
    model, variables = network()
    everything = {"all": ft.everything()}
    groups = {"all": ft.Group(optax.adamw, 1e-2)}
    plan = ft.Plan(
        [ft.Phase(ft.label(variables["params"], everything), groups, steps=60, ema=0.97)]
    )
    options = ft.FitOptions(evaluate_every=60)
    start_from = ft.Classifier(model, variables, PREPROCESSING)
    fitted = ft.fit(start_from, plan, data, tmp_path / "run", options=options)
    found = flatten(fitted.variables["batch_stats"])
    measured = flatten(ft.training.recalibrate(fitted.network, data.calibration()))
    for path, leaf in measured.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-4, atol=1e-5, err_msg=path)
    chex.assert_trees_all_equal(
        jax.device_get(fitted.variables), ft.load(tmp_path / "run/model.safetensors").variables
    )
