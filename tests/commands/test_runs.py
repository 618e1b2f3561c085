"""What a run leaves, and what becomes of it at the terminal: evaluation, predictions, files."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import flaxtransfer as ft
from flaxtransfer.cli import run
from flaxtransfer.commands import train as commands_train
from flaxtransfer.commands.job import prepare, run_data, trained_network
from flaxtransfer.commands.options import DataOptions, JobOptions, WeightsOptions
from flaxtransfer.paths import flatten
from flaxtransfer.training.run_folder import seal_run, weights_of
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


def test_large_leaves_are_split_where_it_was_asked_for(folder, weights, tmp_path, monkeypatch):
    asked = []

    def fitted(*arguments, shard_above, **more):
        asked.append(shard_above)
        raise ValueError("enough")

    monkeypatch.setattr(commands_train, "fit", fitted)
    words = train(folder, weights, tmp_path / "run", "--strategy", "feature_extraction")
    assert run([*words, "--steps", "1", "--shard-above-mb", "0.5"]) == 2
    assert run([*words, "--steps", "1"]) == 2
    assert asked == [500_000, None]


def test_the_number_type_is_the_runs_in_evaluation_and_prediction_too(
    folder, weights, tmp_path, capsys
):
    """A control in float32 gives other digits of the loss."""
    target = tmp_path / "run"
    words = train(folder, weights, target, "--strategy", "feature_extraction", "--steps", 2)
    assert run([*words, "--compute", "bfloat16"]) == 0
    (trained,) = json.loads((target / "summary.json").read_text())["results"]
    capsys.readouterr()
    assert run(["evaluate", str(target)]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == trained["loss"]
    assert run([*words, "--resume"]) == 2
    assert "compute is 'bfloat16' there and 'float32' here" in capsys.readouterr().err
    source, parts = run_data(target)
    found = {}
    for network in (trained_network(target), ft.Classifier.of(ft.load(weights_of(target)))):
        batches = ft.eval_batches(source, parts.test, network.preprocessing)
        found[str(network.model.dtype)] = ft.evaluate(network, batches).loss
    assert found["bfloat16"] == trained["loss"]
    assert found["None"] == pytest.approx(trained["loss"], rel=0.02)
    assert found["None"] != trained["loss"]


@pytest.fixture
def other(folder, tmp_path):
    """The images of the run's classes, to be changed."""
    shutil.copytree(folder, tmp_path / "other")
    return tmp_path / "other"


def evaluated(capsys, run_folder, images, *options):
    assert run(["evaluate", str(run_folder), "--data", f"folder:{images}", *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("empty", [False, True])
def test_evaluate_says_which_classes_a_folder_lacks(finished, other, capsys, empty):
    whole = evaluated(capsys, finished, other)
    assert "classes_not_seen" not in whole
    right = {}
    for name in ("dark", "bright"):
        part = other.with_name(name)
        shutil.copytree(other, part)
        missing = {"dark": "bright", "bright": "dark"}[name]
        shutil.rmtree(part / missing)
        if empty:
            (part / missing).mkdir()
        found = evaluated(capsys, finished, part)
        assert (found["examples"], found["classes_not_seen"]) == (8, [missing])
        right[name] = 8 * found["accuracy"]
    # Labels are matched by name: alone, "dark" is the first class of its folder, not of the run.
    assert sum(right.values()) == pytest.approx(16 * whole["accuracy"])


def test_evaluate_refuses_unknown_classes_by_name_or_leaves_them_out(finished, other, capsys):
    whole = evaluated(capsys, finished, other)
    shutil.copytree(other / "dark", other / "a_darkk")
    assert run(["evaluate", str(finished), "--data", f"folder:{other}"]) == 2
    said = capsys.readouterr().err
    assert "got 'a_darkk' (8 images); did you mean 'dark'?" in said
    assert "--skip-unknown-classes" in said
    found = evaluated(capsys, finished, other, "--skip-unknown-classes")
    assert found.pop("classes_left_out") == {"a_darkk": 8}
    assert found == whole
    for name in ("dark", "bright"):
        shutil.rmtree(other / name)
    arguments = ["evaluate", str(finished), "--data", f"folder:{other}", "--skip-unknown-classes"]
    assert run(arguments) == 2
    assert "nothing is left" in capsys.readouterr().err


def test_a_run_without_test_images_is_complete_and_says_so(folder, weights, tmp_path, capsys):
    few = ("--strategy", "feature_extraction", "--steps", 1, "--batch-size", 8)
    arguments = train(folder, weights, tmp_path / "run", *few, "--test-fraction", 0)
    for words in (arguments, [*arguments, "--resume"]):
        assert run(words) == 0
        shown = capsys.readouterr().out
        assert "nothing was tested" in shown
        assert "test accuracy:" not in shown
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["test_images"] == 0
    (row,) = summary["results"]
    assert (row["accuracy"], row["loss"], row["examples"]) == (None, None, 0)
    assert (tmp_path / "run/model.safetensors").exists()


@pytest.mark.slow
def test_batches_that_the_devices_do_not_divide_are_padded(folder, weights, finished, tmp_path):
    """Three devices, and batches of 64, 7 and 6: training, evaluation, probes and predictions."""
    target = tmp_path / "run"
    small = ("--strategy", "feature_extraction", "--steps", 2, "--batch-size", 6)
    data = ("--data", f"folder:{folder}")
    commands = [
        train(folder, weights, target, *small),
        ["evaluate", str(target)],
        ["evaluate", str(finished), "--batch-size", "7"],
        ["predict", str(finished), *map(str, sorted(folder.rglob("*.png"))[:7])],
        ["probe", *data, "--weights", str(weights)],
    ]
    program = (
        "import json, sys; from flaxtransfer.cli import run\n"
        "print([run(words) for words in json.loads(sys.argv[1])])"
    )
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=3"
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(commands)],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags},
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["[0, 0, 0, 0, 0]"], done.stderr
    assert json.loads((target / "summary.json").read_text())["test_images"] == 4
    devices = json.loads((target / "environment.json").read_text())["devices"]
    assert len(devices) == 3


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


def test_running_statistics_are_measured_on_the_training_images(folder, weights, tmp_path):
    """For a file that has none: by `train` and whoever prepares as it does."""
    arrays = {name: a for name, a in load_file(weights).items() if "running" not in name}
    bare = tmp_path / "bare.safetensors"
    save_file(arrays, bare)
    chosen = WeightsOptions(str(bare), statistics="measure")
    job = prepare(JobOptions(data=DataOptions(f"folder:{folder}"), weights=chosen))
    start = ft.transfer(ft.load(bare, statistics="measure"), classes=2)
    images = ft.eval_batches(job.source, job.splits.train, start.preprocessing)
    expected = flatten(ft.training.recalibrate(start, images))
    found = flatten(job.network.variables["batch_stats"])
    assert found.keys() == expected.keys()
    for path, numbers in expected.items():
        np.testing.assert_allclose(found[path], numbers, rtol=1e-6)
    assert found["bn1/mean"].any()
