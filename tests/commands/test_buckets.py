"""Runs and images at gs:// on the command line; the bucket is in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

import flaxtransfer as ft
from flaxtransfer.checkpoint import mirror
from flaxtransfer.cli import run
from flaxtransfer.paths import flatten
from flaxtransfer.training.run_folder import split_of
from tests.support.bucket import BucketFileSystem, Store
from tests.support.terminal import only_line, train


@pytest.fixture
def store(monkeypatch, tmp_path, folder, weights):
    """A bucket "runs", and one "data" with the images, a table of them, and weights."""
    found = Store("runs", "data")
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.png")}
    rows = [f"{name},{name.split('/')[0]}" for name in sorted(files)]
    table = "\n".join(["image,label", *rows]).encode()
    found.objects["data"] = {f"scans/{name}": data for name, data in files.items()}
    found.objects["data"] |= {f"table/{name}": data for name, data in files.items()}
    found.objects["data"]["table/all.csv"] = table
    found.objects["data"]["weights/tiny.safetensors"] = weights.read_bytes()
    monkeypatch.setattr(BucketFileSystem, "store", found)
    monkeypatch.setattr(fsspec, "filesystem", lambda name: BucketFileSystem())
    monkeypatch.setattr(mirror, "_check_answers", lambda: None)
    monkeypatch.setattr(mirror, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setenv("FLAXTRANSFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return found


def leaves(path: str) -> list[np.ndarray]:
    return list(flatten(ft.load(path).variables["params"]).values())


SHORT = ("--strategy", "solved_head", "--labels-per-class", 4, "--batch-size", 8)


def test_a_run_in_a_bucket_is_evaluated_and_predicts_elsewhere(store, weights, tmp_path, capsys):
    words = train("unused", "gs://data/weights/tiny.safetensors", "gs://runs/one", *SHORT)
    words[2] = "gs://data/scans"
    assert run(words) == 0
    told = capsys.readouterr()
    assert "16 files (0.0 MB) of gs://data/scans were fetched to" in told.out
    assert "runs/runs/one is mirrored to gs://runs/one" in told.err
    assert split_of(Path("runs/runs/one")).address == "folder:gs://data/scans"
    # Another machine: neither the run nor the images are there.
    shutil.rmtree("runs")
    shutil.rmtree("cache")
    assert run(["evaluate", "gs://runs/one"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["data"] == "folder:gs://data/scans"
    assert found["examples"] == 8
    assert run(["predict", "gs://runs/one", "gs://data/scans/dark"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 8
    assert run(["explain", "gs://runs/one", "--out", "maps", "--most-images", "2"]) == 0
    assert len(json.loads(Path("maps/explanation.json").read_text())["images"]) == 2
    for source in ("gs://runs/one", "gs://runs/one/model.safetensors"):
        assert run(["convert", source, "copy.safetensors"]) == 0
        kept = store.objects["runs"]["one/model.safetensors"]
        Path("kept.safetensors").write_bytes(kept)
        for copied, leaf in zip(
            *map(leaves, ("copy.safetensors", "kept.safetensors")), strict=True
        ):
            np.testing.assert_array_equal(copied, leaf)
    assert not Path("runs").exists()
    # And the run is not made again.
    assert run([*words, "--resume"]) == 0
    told = capsys.readouterr()
    assert "of gs://runs/one was fetched to runs/runs/one" in told.err
    assert "test accuracy" in told.out


def test_a_table_in_a_bucket_is_read_with_its_images(store):
    source = ft.open_source("csv:gs://data/table/all.csv")
    assert source.class_names == ("bright", "dark")
    assert len(source) == 16
    assert source.address == "csv:gs://data/table/all.csv"
    assert source.notes[0].startswith("17 files (0.0 MB) of gs://data/table were fetched to ")
    assert source[0]["image"].shape == (16, 16, 3)
    again = ft.open_source(source.address, **source.opened)
    assert again.notes[0].endswith(", 17 were there")


def no_extra(name: str) -> None:
    raise ImportError("Please install gcsfs to access Google Storage")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["train", "--run", "gs://none/one"], "there is no bucket none for gs://none/one"),
        (["train", "--run", "gs://"], "the address must be gs://<bucket>/<path>, got gs://"),
        (["train", "--run", "s3://runs/one"], "--run must be a folder or an address gs://bucket/"),
        (["train", "--data", "gs://data/nothing"], "there is nothing at gs://data/nothing"),
        (["evaluate", "gs://runs/nothing"], "there is nothing at gs://runs/nothing"),
        (["evaluate", "gs://data/table"], "the run in gs://data/table has not finished"),
        (["explain", "gs://data/table", "--out", "maps"], "in gs://data/table has not finished"),
        (["explain", "gs://data/a.pth", "--out", "maps"], "--data must name images, unless the"),
        (["convert", "gs://data/a.pth", "b.safetensors"], "there is no gs://data/a.pth"),
        (
            ["convert", "gs://data/weights/tiny.safetensor.pth", "b.onnx"],
            "there is no gs://data/weights/tiny.safetensor.pth; did you mean 'tiny.safetensors'?",
        ),
        (["train", "--weights", "gs://data/none/"], "there is nothing at gs://data/none"),
        (["train", "--weights", "gs://none/a.pth"], "there is no bucket none for gs://none"),
        (["diagnose", "--run", "gs://runs/one", "--target", "folder:."], "--out must name"),
        (["train", "--run", "gs://runs/deny"], "it needs the role Storage Object User"),
    ],
)
def test_errors_are_one_line(store, capsys, words, wanted):
    store.fault = lambda kind, path: 403 if "deny" in path else None
    assert run(words) == 2
    assert wanted in only_line(capsys)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--run", "gs://runs/one"],
        ["train", "--data", "gs://data/scans"],
        ["train", "--compilation-cache", "gs://runs/compiled"],
        ["train", "--weights", "gs://data/weights/tiny.safetensors"],
        ["convert", "gs://data/weights/tiny.safetensors", "b.safetensors"],
        ["evaluate", "gs://runs/one"],
    ],
)
def test_without_the_extra_it_is_named(store, monkeypatch, capsys, words):
    monkeypatch.setattr(fsspec, "filesystem", no_extra)
    assert run(words) == 2
    assert "need the extra 'gcs': pip install 'flaxtransfer[gcs]'" in only_line(capsys)


def test_a_run_that_could_not_be_sent_is_complete_here(store, weights, folder, capsys):
    store.fault = lambda kind, path: 503 if path.endswith("model.safetensors") else None
    assert run(train(folder, weights, "gs://runs/one", *SHORT)) == 2
    told = capsys.readouterr()
    assert "test accuracy" in told.out
    last = told.err.strip().splitlines()[-1]
    assert "could not be written in 3 tries" in last
    assert "all is safe in runs/runs/one: the same command with --resume sends the rest" in last
    store.fault = None
    assert run([*train(folder, weights, "gs://runs/one", *SHORT), "--resume"]) == 0
    assert "one/model.safetensors" in store.objects["runs"]
    assert run(["evaluate", "gs://runs/one"]) == 0


def test_a_run_that_another_start_takes_over_ends_with_one_line(store, weights, folder, capsys):
    def taken(kind: str, path: str) -> None:
        if (kind, path) == ("PUT", "runs/one/config.json"):
            store.objects["runs"]["one/.owner.json"] = json.dumps(
                {"token": "2", "writer": "process 7 on b", "since": "now", "ended": False}
            ).encode()

    store.fault = taken
    assert run(train(folder, weights, "gs://runs/one", *SHORT)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "gs://runs/one was taken over by process 7 on b, since now: this run has" in last
    after = store.requests[store.requests.index(("PUT", "runs/one/config.json")) + 1 :]
    assert {path for _, path in after} == {"runs/one/.owner.json"}
    assert {kind for kind, _ in after} == {"GET"}
