"""Several labels and numbers per image at the terminal."""

from __future__ import annotations

import csv
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

import flaxtransfer as ft
from flaxtransfer.cli import run
from flaxtransfer.data import open as opening
from tests.support.terminal import SIZE

NAMES = ("red", "bright")


def source_of(task):
    random = np.random.default_rng(0)
    amount = random.uniform(0, 1, (40, 2)).astype(np.float32)
    pixels = 40 + 100 * amount[:, 1, None, None, None] + np.zeros((40, SIZE, SIZE, 3))
    pixels[..., 0] += 100 * amount[:, 0, None, None]
    labels = (amount > 0.5).astype(np.float32) if task == "multi_label" else 100 + 10 * amount
    labels[::5, 0] = np.nan
    return ft.ArraySource(pixels.astype(np.uint8), labels, NAMES, address=f"own:{task}", task=task)


@pytest.fixture
def scheme(monkeypatch):
    """A data source whose name says its task."""
    own = opening.Scheme("own:<task>", "for a test", lambda task, options: source_of(task))
    monkeypatch.setitem(opening.SCHEMES, "own", own)


@pytest.mark.parametrize("task", ["multi_label", "regression"])
def test_a_run_is_trained_evaluated_and_predicts(task, scheme, weights, tmp_path, capsys):
    target = tmp_path / "run"
    words = ["train", "--data", f"own:{task}", "--weights", str(weights), "--run", str(target)]
    words += ["--val-fraction", "0.25"]
    assert run([*words, "--batch-size", "8", "--strategy", "solved_head", "--compare", "no"]) == 0
    name = {"multi_label": "average precision", "regression": "r2"}[task]
    assert f"test {name}:" in capsys.readouterr().out
    assert run(["evaluate", str(target)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[name.replace(" ", "_")] > 0.5
    pixels = source_of(task)[3]["image"]
    Image.fromarray(pixels).save(tmp_path / "one.png")
    assert run(["predict", str(target), str(tmp_path / "one.png")]) == 0
    line = json.loads(capsys.readouterr().out)
    values = line["probabilities" if task == "multi_label" else "values"]
    assert list(values) == list(NAMES)
    if task == "regression":
        assert all(95 < value < 115 for value in values.values())
    assert run(["predict", str(target), str(tmp_path / "one.png"), "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {name: float(rows[0][name]) for name in NAMES} == pytest.approx(values)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["predict", "RUN", "IMAGE", "--top", "2"], "--top must be left out for the task"),
        (["predict", "RUN", "IMAGE", "--adjust-prior"], "a correction of the prior must have one"),
        (["explain", "RUN", "--out", "OUT"], "an explanation of predicted classes must have one"),
        (
            ["diagnose", "--run", "RUN", "--target", "own:multi_label"],
            "a diagnosis of label shift must",
        ),
        (["evaluate", "RUN", "--data", "digits"], "the data must be for the task of the run"),
    ],
)
def test_what_has_no_meaning_is_one_line(words, said, scheme, weights, tmp_path, capsys):
    source = source_of("multi_label")
    splits = ft.stratified_split(source.labels())
    network = ft.transfer(ft.load(weights), classes=2, class_names=NAMES, task=ft.task.MULTI_LABEL)
    data = ft.loaders(source, splits, network.preprocessing, batch_size=8)
    plan = ft.recipes.solved_head(network.params)
    ft.fit(network, plan, data, tmp_path / "run")
    Image.fromarray(source[3]["image"]).save(tmp_path / "one.png")
    places = {"RUN": tmp_path / "run", "IMAGE": tmp_path / "one.png", "OUT": tmp_path / "out"}
    capsys.readouterr()
    assert run([str(places.get(word, word)) for word in words]) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert said in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--task", "single"], "--task must be that of own:multi_label, multi_label"),
        (["train", "--strategy", "gradient_scaled"], "what the strategy gradient_scaled measures"),
        (
            ["train", "--labels-per-class", "3"],
            "labels_per_class and val_per_class must be left",
        ),
        (["probe", "--kind", "logistic"], "kind must be 'ridge' for the task multi_label"),
    ],
)
def test_what_is_not_done_for_a_task_is_refused_before_training(
    words, said, scheme, weights, tmp_path, capsys
):
    command, *rest = words
    place = ["--run", str(tmp_path / "run")] if command == "train" else []
    asked = [command, "--data", "own:multi_label", "--weights", str(weights), *place, *rest]
    assert run(asked) == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("task", ["multi_label", "regression"])
def test_a_depth_is_measured_for_every_task(task, scheme, weights, tmp_path, capsys):
    place = ["--run", str(tmp_path / "run"), "--strategy", "depth_head", "--compare", "no"]
    place += ["--val-fraction", "0.3"]
    assert run(["train", "--data", f"own:{task}", "--weights", str(weights), *place]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert {"multi_label": "average precision", "regression": "R2"}[task] in said
    assert "ridge on" in said


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """Sixteen dark images and four bright ones."""
    root = tmp_path_factory.mktemp("unequal")
    random = np.random.default_rng(0)
    for name, level, count in (("dark", 30, 16), ("bright", 200, 4)):
        (root / name).mkdir()
        for number in range(count):
            pixels = random.integers(level - 30, level + 30, (SIZE, SIZE, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def test_unequal_classes_rank_by_balanced_accuracy_which_is_said(
    unequal, weights, tmp_path, capsys
):
    target = tmp_path / "run"
    words = [
        "train",
        "--data",
        f"folder:{unequal}",
        "--weights",
        str(weights),
        "--run",
        str(target),
    ]
    words += ["--batch-size", "8", "--strategy", "feature_extraction", "--steps", "3"]
    words += ["--compare", "no", "--val-fraction", "0.25", "--balance", "weights"]
    assert run(words) == 0
    output = capsys.readouterr().out
    told = " ".join(output.split())
    assert "validation ranks by balanced_accuracy, for 'dark' has" in told
    assert "test balanced accuracy:" in told
    config = json.loads((target / "config.json").read_text())
    assert config["metric"] == "balanced_accuracy"
    assert "balanced" in str(config["phases"])
    assert run(["evaluate", str(target)]) == 0
    found = json.loads(capsys.readouterr().out)
    report = found["report"]
    assert report["metrics"]["accuracy"] == pytest.approx(found["accuracy"])
    low, high = report["intervals"]["accuracy"]
    assert low <= found["accuracy"] <= high
    assert set(report["outputs"]) == {"dark", "bright"}
    assert sum(map(sum, report["confusion"])) == found["examples"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--metric", "accurracy"], "--metric must be one of accuracy, .* did you mean"),
        (["--metric", "mae"], "metric must be one of accuracy, .* for the task single_label"),
        (["--balance", "weights", "--strategy", "solved_head"], "--balance must be no for phases"),
        (["--balance", "sampling", "--strategy", "solved_head"], "--balance must be no for phases"),
    ],
)
def test_a_metric_or_balance_that_does_not_fit_is_refused(
    words, said, unequal, weights, tmp_path, capsys
):
    place = ["--data", f"folder:{unequal}", "--weights", str(weights)]
    assert run(["train", *place, "--run", str(tmp_path / "run"), *words]) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert re.search(said, text), text
