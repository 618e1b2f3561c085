"""``flaxtransfer diagnose``: what it prints and writes, and what it refuses in one line."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from rich.console import Console

import flaxtransfer.shift.diagnosis
from flaxtransfer.cli import run
from flaxtransfer.commands import measure
from flaxtransfer.commands.job import trained_network
from flaxtransfer.commands.subcommands import Diagnose
from flaxtransfer.data import open_source, stratified_split
from flaxtransfer.data.splits import Split
from flaxtransfer.files import write_json
from flaxtransfer.training.run_folder import seal_run
from tests.support.brightness import draw, finish_run, write

SCHEMA = json.loads(
    Path(flaxtransfer.shift.diagnosis.__file__).with_name("report.schema.json").read_text()
)
QUICK = ("--permutations", "99", "--batch-size", "16")


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> Path:
    """A run's folder, and beside it images of which one in ten is bright, ten of them labeled."""
    root = tmp_path_factory.mktemp("there")
    finish_run(root / "run")
    images, labels = draw(0.1, 120, 2)
    names = [Path(path).name for path in write(images, root / "images")]
    with (root / "few.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("image", "label"))
        rows.writerows((names[i], ("dark", "bright")[labels[i]]) for i in range(110, 120))
    return root


def diagnosed(there: Path, *more: str) -> int:
    target = f"folder:{there / 'images'}"
    return run(["diagnose", "--run", str(there / "run"), "--target", target, *QUICK, *more])


def test_a_report_on_the_screen_and_in_a_folder(there, capsys):
    assert diagnosed(there, "--target-labels", str(there / "few.csv")) == 0
    printed = capsys.readouterr().out
    assert "support a label shift" in printed
    assert "208 held-out examples of the source, 120 target images, 10 of them" in printed
    # A program made the run, so that its folder does not record its images.
    assert "its saved validation examples are used instead" in printed
    out = there / "run" / "diagnosis" / "images"
    assert sorted(path.name for path in out.iterdir()) == [
        "features.png",
        "prevalence.png",
        "reliability.png",
        "report.html",
        "report.json",
        "tests.png",
    ]
    report = json.loads((out / "report.json").read_text())
    jsonschema.validate(report, SCHEMA)
    assert report["conclusion"] == "label"
    assert report["class_names"] == ["dark", "bright"]
    assert report["prevalences"][0]["estimate"][1] < 0.25  # of 0.1 in truth and 0.5 before
    assert (out / "features.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_features_is_refused(there, tmp_path, capsys):
    shutil.copytree(there / "run", tmp_path / "run")
    kept = np.load(there / "run" / "validation.npz")
    np.savez(tmp_path / "run" / "validation.npz", logits=kept["logits"], labels=kept["labels"])
    assert diagnosed(there, "--run", str(tmp_path / "run")) == 2
    assert "features" in capsys.readouterr().err


def test_a_report_is_replaced_whole(there, tmp_path, capsys):
    out = tmp_path / "report"
    out.mkdir()
    for name in ("old.txt", "report.json"):
        (out / name).write_text("of an earlier report")
    # Of either side 40 are looked at, those with labels among them.
    few = ("--target-labels", str(there / "few.csv"), "--most-images", "40")
    assert diagnosed(there, "--out", str(out), *few) == 0
    assert json.loads((out / "report.json").read_text())["counts"] == [40, 40, 10]
    assert not (out / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


@pytest.mark.parametrize(("count", "most", "expected"), [(20, 20, 20), (21, 20, 20), (90, 30, 30)])
def test_no_more_images_are_looked_at_and_those_with_labels_are(count, most, expected):
    labeled = np.array([0, 7, count - 1])
    found = measure._chosen(count, labeled, Diagnose(Path("run"), "target", most_images=most))
    assert len(set(found.tolist())) == len(found) == expected
    assert set(labeled.tolist()) <= set(found.tolist())


def test_the_source_is_what_the_run_kept_apart(there, tmp_path, monkeypatch):
    for name in ("bright", "dark"):
        write(draw(0.5, 20, 3)[0], tmp_path / name)
    seen = []
    monkeypatch.setattr(measure, "_evidence", lambda *given: seen.append(given[2].tolist()))
    folder = tmp_path.parent / f"{tmp_path.name}-run"
    shutil.copytree(there / "run", folder)
    network = replace(trained_network(folder), class_names=("bright", "dark"))
    source, target = open_source(f"folder:{tmp_path}"), (None, np.arange(5))

    def keep(**fractions):
        parts = stratified_split(source.labels(), **fractions)
        write_json(folder / "split.json", Split.of(source, parts).to_json())
        seal_run(folder)
        return parts

    parts = keep(val_fraction=0.25, test_fraction=0.2)
    measure._samples(network, target, Diagnose(folder, "target"), Console())
    assert seen == [[0, 1, 2, 3, 4], sorted([*parts.val.tolist(), *parts.test.tolist()])]
    keep(val_fraction=0.0, test_fraction=0.0)
    with pytest.raises(ValueError, match="no validation or test images; train it with --val-frac"):
        measure._samples(network, target, Diagnose(folder, "target"), Console())


@pytest.mark.slow
def test_a_data_set_of_tfds(there, tmp_path):
    open_source("digits", cache_dir=tmp_path)
    # The folder of its data sets is read when TensorFlow Datasets is imported.
    main = (sys.executable, "-c", "from flaxtransfer.__main__ import main; main()")
    options = ("--run", there / "run", "--out", tmp_path / "out", *QUICK)
    command = [*main, "diagnose", "--target", "tfds:sklearn_digits:train[:60]", *options]
    environment = {**os.environ, "TFDS_DATA_DIR": str(tmp_path)}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    jsonschema.validate(report, SCHEMA)
    assert report["counts"][1] == 60


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--target", "folder:nowhere"), "there is no folder nowhere"),
        (("--target", "scans"), "unknown data source 'scans'"),
        (("--run", "nowhere"), "nowhere is not a run folder"),
        (("--most-images", "5"), "--most-images must be >= 20, got 5"),
        (("--level", "2"), "--level must be > 0 and < 1, got 2.0"),
        (("--target-labels", "nowhere.csv"), "nowhere.csv"),
    ],
)
def test_one_line_and_exit_code_2(there, arguments, text, capsys):
    given = {"--run": str(there / "run"), "--target": f"folder:{there / 'images'}"}
    given |= {"--permutations": "99", **{arguments[0]: arguments[1]}}
    assert run(["diagnose", *(word for pair in given.items() for word in pair)]) == 2
    said = capsys.readouterr().err
    assert text in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ("image,class\n000.png,dark\n", "has no column label; its columns are image, class"),
        ("image,label\n", "has no rows"),
        ("image,label\n000.png,dork\n", "no class 'dork'; did you mean 'dark'"),
        ("image,label\n999.png,dark\n", "no image is called 999.png; there are 000.png"),
        ("image,label\n000.png,dark\n000.png,dark\n", "given twice: 000.png"),
        ("", "its columns are none"),
    ],
)
def test_files_of_labels_that_are_wrong(there, rows, text, tmp_path, capsys):
    path = tmp_path / "few.csv"
    path.write_text(rows)
    assert diagnosed(there, "--target-labels", str(path)) == 2
    said = capsys.readouterr().err
    assert text in said
    assert len(said.splitlines()) == 1
