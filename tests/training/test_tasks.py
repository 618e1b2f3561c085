"""Several labels and numbers per image, through the whole way on small data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from sklearn.metrics import average_precision_score, r2_score

import flaxtransfer as ft
from flaxtransfer.task import MULTI_LABEL, REGRESSION, Units
from flaxtransfer.training.evaluation import init_head_from_probe
from flaxtransfer.training.run_folder import validation_of
from tests.support.small import CONFIG, PREPROCESSING, SIZE

NAMES = ("red", "bright", "left")


def images_and_labels(count, task, missing=0.0, seed=0):
    """Red, bright, and whether the left half is light; for a regression how much of each."""
    random = np.random.default_rng(seed)
    amount = random.uniform(0, 1, (count, 3)).astype(np.float32)
    pixels = (
        40 + 60 * amount[:, 1, None, None, None] + random.integers(0, 20, (count, SIZE, SIZE, 3))
    )
    pixels[..., 0] += 80 * amount[:, 0, None, None]
    pixels[:, :, : SIZE // 2] += 50 * amount[:, 2, None, None, None]
    labels = amount > 0.5 if task == "multi_label" else amount * [1, 10, 100] + [0, 5, 1000]
    labels = labels.astype(np.float32)
    hidden = random.uniform(size=labels.shape) < missing
    hidden[:, 1] = False
    labels[hidden] = np.nan
    return pixels.clip(0, 255).astype(np.uint8), labels


def data(task, missing=0.2):
    images, labels = images_and_labels(60, task, missing)
    source = ft.ArraySource(images, labels, NAMES, task=task)
    splits = ft.stratified_split(source.labels(), val_fraction=0.3, test_fraction=0.2)
    return source, splits, ft.loaders(source, splits, PREPROCESSING, batch_size=12)


def network(task):
    model = ft.resnet(replace(CONFIG, classes=3))
    variables = model.init(jax.random.key(0), (SIZE, SIZE, 3))
    return ft.Classifier(model, variables, PREPROCESSING, NAMES, task)


def plan(**changes):
    groups = {"all": ft.Group(optax.adam, 3e-3)}
    settings = {"steps": 6, "probe": "ridge"} | changes
    return ft.Plan([ft.Phase({"all": ft.everything()}, groups, **settings)])


TASKS = {"multi_label": MULTI_LABEL, "regression": REGRESSION}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_goes_the_whole_way(name, tmp_path):
    source, splits, feed = data(name)
    fitted = ft.fit(network(TASKS[name]), plan(), feed, tmp_path / "run")
    kept = ft.load(tmp_path / "run/model.safetensors")
    assert kept.task == fitted.network.task
    again = ft.Classifier.of(kept)
    found = ft.predict(again, ft.eval_batches(source, splits.test, PREPROCESSING))
    truth = source.labels()[splits.test]
    values = again.task.probabilities(found.logits)
    np.testing.assert_array_equal(found.labels, truth)
    ranked = [
        (average_precision_score if name == "multi_label" else r2_score)(
            truth[ok, k], values[ok, k]
        )
        for k, ok in enumerate(~np.isnan(truth).T)
    ]
    result = ft.evaluate(again, ft.eval_batches(source, splits.test, PREPROCESSING))
    assert result.metrics[again.task.ranking] == pytest.approx(np.mean(ranked), abs=1e-6)
    stored = validation_of(tmp_path / "run")
    assert stored.task == again.task
    assert stored.evaluation().to_json() == pytest.approx(fitted.validation.to_json(), abs=1e-5)
    json.loads((tmp_path / "run/split.json").read_text(), parse_constant=pytest.fail)


def test_the_units_are_those_of_the_training_targets():
    source, splits, _ = data("regression")
    labels = source.labels()[splits.train]
    task = REGRESSION.fitted(labels)
    np.testing.assert_allclose(task.units.mean, np.nanmean(labels.astype(float), 0), rtol=1e-6)
    np.testing.assert_allclose(task.units.scale, np.nanstd(labels.astype(float), 0), rtol=1e-6)
    standard = task.targets(labels)
    np.testing.assert_allclose(task.probabilities(standard), labels, rtol=1e-4)
    assert task.fitted(labels + 1) is task
    with pytest.raises(ValueError, match="one scale above 0 per target"):
        Units((0.0,), (0.0,))


@pytest.mark.parametrize("name", TASKS)
def test_a_task_resumes_to_the_same_bits(name, tmp_path, monkeypatch):
    _, _, feed = data(name)
    options = ft.FitOptions(evaluate_every=2)
    whole = ft.fit(network(TASKS[name]), plan(), feed, tmp_path / "whole", options=options)

    def train(start):
        for number, batch in enumerate(feed.train(start), start):
            if number == 4:
                raise KeyboardInterrupt
            yield batch

    broken = replace(feed, train=train)
    with pytest.raises(KeyboardInterrupt):
        ft.fit(network(TASKS[name]), plan(), broken, tmp_path / "run", options=options)
    resumed = ft.fit(
        network(TASKS[name]), plan(), feed, tmp_path / "run", options=options, resume=True
    )
    jax.tree.map(np.testing.assert_array_equal, whole.variables, resumed.variables)


def test_a_missing_label_has_no_gradient():
    """The gradient is that of the sum without the label, which is known at 0 in the other case."""
    random = np.random.default_rng(0)
    outputs = random.normal(size=(5, 3)).astype(np.float32)
    labels = (random.uniform(size=(5, 3)) < 0.5).astype(np.float32)
    hidden = labels.copy()
    hidden[:, 1] = np.nan
    for task in TASKS.values():
        gradient = jax.grad(lambda z, y, t=task: t.loss(z, y, None).sum())
        found, without = gradient(outputs, hidden), gradient(outputs[:, ::2], labels[:, ::2])
        np.testing.assert_array_equal(found[:, 1], 0)
        np.testing.assert_allclose(found[:, ::2], without, rtol=1e-6)


@pytest.mark.parametrize("name", TASKS)
def test_cached_activations_train_the_same(name, tmp_path):
    source, splits, _ = data(name)
    feed = ft.loaders(source, splits, PREPROCESSING, batch_size=12, transform=lambda x, _: x)
    groups = {"head": ft.Group(optax.adam, 3e-3), "rest": ft.FROZEN}
    head = ft.Plan([ft.Phase({"head": ft.head(), "rest": ft.rest()}, groups, steps=6)])
    found = [
        ft.fit(network(TASKS[name]), head, feed, tmp_path / str(n), cache=cache).validation
        for n, cache in enumerate((None, ft.Cache(where="memory")))
    ]
    assert found[0].to_json() == pytest.approx(found[1].to_json(), abs=1e-5)


def test_a_solved_head_is_scikit_learns():
    """Ridge with the strength that was chosen, on standardized features; labels with gaps."""
    from sklearn.linear_model import Ridge

    from flaxtransfer.features.sweep import fit_target_probe

    random = np.random.default_rng(0)
    features = random.normal(size=(50, 6))
    labels = features @ random.normal(size=(6, 2)) + random.normal(size=(50, 2))
    labels[::7, 1] = np.nan
    head = fit_target_probe(features, labels)
    scaled = (features - features.mean(0)) / features.std(0)
    known = ~np.isnan(labels[:, 1])
    near = [
        np.abs(
            Ridge(alpha=alpha).fit(scaled[known], labels[known, 1]).predict(scaled)
            - (features @ head.kernel + head.bias)[:, 1]
        ).max()
        for alpha in np.logspace(-3, 6, 19)
    ]
    assert min(near) < 1e-9


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_a_solved_head_of_labels_separates_them(kind):
    _, _, feed = data("multi_label")
    of = network(MULTI_LABEL)
    params, text = init_head_from_probe(of, feed.calibration(), kind=kind)
    solved = of.with_variables({**of.variables, "params": params})
    before, after = (ft.evaluate(each, feed.calibration()) for each in (of, solved))
    assert after.metrics["average_precision"] > before.metrics["average_precision"] + 0.1
    assert f"{kind} regression of 3 labels" in text


def test_phases_are_decided_by_the_bootstrap(tmp_path):
    _, _, feed = data("multi_label", missing=0)
    groups = {"head": ft.Group(optax.adam, 3e-3), "rest": ft.FROZEN}
    first = ft.Phase({"head": ft.head(), "rest": ft.rest()}, groups, steps=2, name="head")
    both = {"head": groups["head"], "rest": ft.Group(optax.adam, 3e-3)}
    second = ft.Phase({"head": ft.head(), "rest": ft.rest()}, both, steps=2, name="all")
    several = ft.Plan([first, second], patience=1, min_z=1.0)
    found = ft.fit(network(MULTI_LABEL), several, feed, tmp_path / "run")
    assert any(
        "validation metric" in note and "over bootstrap samples" in note for note in found.notes
    )


@pytest.mark.parametrize(
    ("task", "labels", "said"),
    [
        (MULTI_LABEL, [[0.5, 1, 0]], "labels must be 0, 1 or NaN .* got 0.5"),
        (MULTI_LABEL, [[0, 1]], r"labels must be numbers \[examples, 3\]"),
        (MULTI_LABEL, [[np.nan] * 3], "every example must have a known label, got none for 1"),
        (REGRESSION, [[np.inf, 0, 0]], "labels must be finite or NaN"),
        (REGRESSION, [["a", "b", "c"]], r"labels must be numbers \[examples, 3\]"),
    ],
)
def test_labels_that_a_task_cannot_take_are_refused(task, labels, said):
    with pytest.raises(ValueError, match=said):
        task.check(labels, 3)


def test_what_has_no_meaning_is_refused(tmp_path):
    source, splits, _ = data("multi_label")
    with pytest.raises(ValueError, match="entropy minimization must have one class per image"):
        ft.adapt.tent(network(MULTI_LABEL), np.zeros((8, SIZE, SIZE, 3), np.uint8))
    one = np.zeros((len(source), 3), np.float32)
    constant = ft.ArraySource(np.zeros((60, 4, 4), np.uint8), one, NAMES, task="multi_label")
    alike = ft.loaders(constant, splits, PREPROCESSING, batch_size=12)
    with pytest.raises(ValueError, match="validation labels must define the metric that ranks"):
        ft.fit(network(MULTI_LABEL), plan(), alike, tmp_path / "run")


@pytest.mark.parametrize("name", TASKS)
def test_a_rate_is_found_for_a_task(name):
    """Of the head of a new network; the sweep standardizes as training does."""
    _, _, feed = data(name)
    phase = replace(plan(probe=None).phases[0], norm="running")
    sweep = ft.find_learning_rate(network(TASKS[name]), phase, feed, steps=8, highest=1e-2)
    assert len(sweep.losses) == 8
    assert sweep.losses[0] < 2


def test_the_mean_score_of_a_regression_is_its_r2_on_the_training_set():
    source, splits, _ = data("regression", missing=0)
    labels = source.labels()[splits.train]
    task = REGRESSION.fitted(labels)
    outputs = np.random.default_rng(0).normal(size=labels.shape).astype(np.float32)
    found = task.evaluate(outputs, labels)
    assert found["explained"] == pytest.approx(r2_score(labels, task.probabilities(outputs)), 1e-4)
    assert found["explained"] == pytest.approx(found["r2"], rel=1e-4)
    by_error = task.ranked_by("mae").evaluate(outputs, labels)
    assert list(by_error) == ["mae", "loss", "explained", "rmse"]
    assert task.ranked_by("mae").evidence(outputs, labels).value == -by_error["mae"]


KILLED = """
import os, signal, sys
import flaxtransfer as ft
from flaxtransfer.training import loop
from tests.training import test_tasks as t

save = loop._save

def deadly(run, state, position, metric):
    save(run, state, position, metric)
    if position.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)

loop._save = deadly
_, _, feed = t.data(sys.argv[1])
options = ft.FitOptions(evaluate_every=2)
ft.fit(t.network(t.TASKS[sys.argv[1]]), t.plan(), feed, sys.argv[2], options=options)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_killed_run_goes_on_to_the_same_bits(name, tmp_path):
    words = [sys.executable, "-c", KILLED, name, str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    _, _, feed = data(name)
    options = ft.FitOptions(evaluate_every=2)
    resumed, whole = (
        ft.fit(network(TASKS[name]), plan(), feed, tmp_path / run, options=options, resume=True)
        for run in ("run", "whole")
    )
    jax.tree.map(np.testing.assert_array_equal, whole.variables, resumed.variables)
    assert resumed.network.task == whole.network.task
