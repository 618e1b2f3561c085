"""What a run leaves, and what becomes of it at the terminal: evaluation, predictions, files."""

from __future__ import annotations

import csv
import io
import json
import shutil

import numpy as np
import pytest

import flaxtransfer as ft
from flaxtransfer.cli import run
from flaxtransfer.training.run_folder import seal_run
from tests.support.terminal import train


def test_train_ends_with_the_test_accuracy_and_leaves_everything(finished, capsys):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["train_images"] == 8
    assert summary["test_images"] == 8
    assert {path.name for path in finished.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "audit.json",
        "model.safetensors",
        "environment.json",
        "result.json",
        "summary.json",
    }
    assert all(audit["moved"] == [] for audit in json.loads((finished / "audit.json").read_text()))


@pytest.fixture(scope="module")
def script(folder, weights, tmp_path_factory):
    """What an experiment script does, without the command line."""
    source = ft.open_source(f"folder:{folder}")
    splits = ft.stratified_split(source.labels(), val_fraction=0.25, test_fraction=0.25, seed=3)
    network = ft.transfer(ft.load(weights), classes=2)
    data = ft.loaders(source, splits, network.preprocessing, batch_size=4)
    plan = ft.recipes.feature_extraction(network.params, steps=2)
    target = tmp_path_factory.mktemp("script") / "run"
    return target, splits, ft.fit(network, plan, data, target), source


def test_a_run_of_a_script_is_evaluated_on_its_own_test_images(script, folder, capsys):
    target, splits, fitted, source = script
    assert run(["evaluate", str(target)]) == 0
    found = json.loads(capsys.readouterr().out)
    images = ft.eval_batches(source, splits.test, fitted.network.preprocessing)
    assert found["accuracy"] == ft.evaluate(fitted.network, images).accuracy
    assert (found["data"], found["examples"]) == (f"folder:{folder}", len(splits.test))


def test_images_that_a_run_tested_on_are_asked_for_by_name(script, folder, tmp_path, capsys):
    target, splits, _, source = script
    moved = tmp_path / "moved"
    shutil.copytree(target, moved)
    record = json.loads((moved / "split.json").read_text())
    assert record["test"] == [source.files[i] for i in splits.test]
    record["test"][0] = "bright/gone.png"
    (moved / "split.json").write_text(json.dumps(record))
    assert run(["evaluate", str(moved)]) == 2
    assert "split.json was changed since it was written" in capsys.readouterr().err
    seal_run(moved)
    assert run(["evaluate", str(moved)]) == 2
    said = capsys.readouterr().err
    assert "1 images of the run are missing" in said
    assert "bright/gone.png" in said


def test_evaluate_repeats_what_training_reported(finished, capsys):
    assert run(["evaluate", str(finished)]) == 0
    result = json.loads(capsys.readouterr().out)
    trained = json.loads((finished / "summary.json").read_text())["results"][0]
    assert result["accuracy"] == trained["accuracy"]
    assert result["examples"] == 8


def test_predict_writes_json_lines_and_csv(finished, folder, capsys):
    images = [str(folder / "dark/0.png"), str(folder / "bright/0.png")]
    assert run(["predict", str(finished), *images, "--top", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == images
    assert all(set(row["top"]) == {"dark", "bright"} for row in rows)
    assert all(abs(sum(row["top"].values()) - 1) < 1e-5 for row in rows)
    assert run(["predict", str(finished), *images, "--format", "csv"]) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["label"] for row in table] == [row["label"] for row in rows]


def test_predictions_do_not_depend_on_the_batch(finished, folder, capsys):
    images = sorted(str(path) for path in folder.rglob("*.png"))
    outputs = []
    for size in ("3", "64"):
        assert run(["predict", str(finished), *images, "--batch-size", size]) == 0
        outputs.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert len(outputs[0]) == len(images)
    for one, other in zip(*outputs, strict=True):
        assert one["label"] == other["label"]
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)


def test_convert_round_trips(weights, tmp_path):
    target = tmp_path / "half.safetensors"
    assert run(["convert", str(weights), str(target), "--dtype", "float16"]) == 0
    loaded, original = ft.load(target), ft.load(weights)
    assert loaded.preprocessing == original.preprocessing
    kernel = original.variables["params"]["conv1"]["kernel"]
    np.testing.assert_array_equal(
        loaded.variables["params"]["conv1"]["kernel"], kernel.astype(np.float16)
    )


def test_train_says_what_frozen_features_reach_and_what_it_caches(
    folder, weights, tmp_path, capsys
):
    few = ("--strategy", "feature_extraction", "--steps", 9, "--batch-size", 8, "--cache-views", 1)
    assert run(train(folder, weights, tmp_path / "run", *few)) == 0
    shown = capsys.readouterr()
    assert "heads on the frozen features of" in shown.out
    assert "each held out once: ridge" in shown.out
    assert "before head, 64 numbers each, are cached in memory as float32" in shown.err
    assert "cache before head:" in shown.err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert 0 <= summary["baseline"]["ridge"] <= 1
    shared = tmp_path / "shared"
    on_disk = ("--cache", "disk", "--cache-dir", shared)
    for name, state in (("a", "made in"), ("b", "found in")):
        assert run(train(folder, weights, tmp_path / name, *few, *on_disk)) == 0
        assert state in capsys.readouterr().err
