"""The experiment scripts run end to end, small."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flaxtransfer as ft

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(EXPERIMENTS.parent)}
    done = subprocess.run(
        [sys.executable, str(EXPERIMENTS / script), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_pretraining_runs_resumes_and_exports_a_checkpoint_with_its_card(tmp_path):
    arguments = [
        "--run",
        str(tmp_path / "run"),
        "--output",
        str(tmp_path / "out"),
        "--name",
        "tiny",
        "--steps",
        "4",
        "--batch-size",
        "8",
        "--glyphs",
        "12",
        "--fractals",
        "3",
        "--width",
        "4",
        "--image-size",
        "24",
        "--test-batches",
        "2",
    ]
    first = run("pretrain_builtin.py", *arguments)
    assert "test accuracy" in first
    card = json.loads((tmp_path / "out/tiny.json").read_text())
    loaded = ft.load(tmp_path / "out/tiny.safetensors")
    assert loaded.sha256 == card["sha256"]
    assert loaded.config.classes == 15
    assert loaded.preprocessing.size == 24
    assert run("pretrain_builtin.py", *arguments).split(";")[0] == first.split(";")[0]


@pytest.mark.slow
def test_the_main_job_as_a_script(tmp_path):
    output = run(
        "digits.py",
        "--head-steps",
        "2",
        "--fine-tune-steps",
        "2",
        "--batch-size",
        "16",
        "--runs",
        str(tmp_path),
    )
    assert "pre-trained:" in output
    assert "from scratch:" in output


@pytest.mark.slow
def test_strategies_are_computed_once_and_tabled(tmp_path):
    arguments = [
        "--labels-per-class",
        "5",
        "--seeds",
        "0",
        "--strategies",
        "feature_extraction",
        "progressive_unfreezing",
        "surgical, by gradient",
        "--steps",
        "2",
        "--phase-steps",
        "2",
        "--processes",
        "1",
        "--results",
        str(tmp_path / "results.jsonl"),
    ]
    table = run("strategies.py", *arguments)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["strategy"] for row in rows] == arguments[5:8]
    assert rows[0]["trainable"] == 2570
    assert f"| feature_extraction | 2,570 | {100 * rows[0]['accuracy']:.1f} ± 0.0 |" in table
    assert run("strategies.py", *arguments) == table
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_curvature_prints_parts_shifts_and_draws():
    shown = run(
        "curvature.py", "--labels-per-class", "2", "--seeds", "0", "1", "--labels", "sampled"
    )
    parts, shifts, draws = shown.strip().split("\n\n")
    wanted = ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    for table in (parts, shifts):
        assert [line.split()[1] for line in table.splitlines()[2:]] == wanted
    assert "| as they are | noise | inverted | relabeled |" in shifts
    assert [line.split()[1] for line in draws.splitlines()[2:]] == ["0", "1"]


@pytest.mark.slow
def test_unfreezing_prints_decisions_and_computes_nothing_twice(tmp_path):
    arguments = [
        "--targets",
        "nothing",
        "--min-z",
        "0",
        "--seeds",
        "0",
        "--steps",
        "2",
        "--validation",
        "40",
        "--results",
        str(tmp_path / "results.jsonl"),
    ]
    first = run("unfreezing.py", *arguments)
    assert "| nothing | head |" in first
    assert "| nothing | + layer4 |" in first
    assert "of 1" in first
    again = run("unfreezing.py", *arguments)
    assert again.splitlines()[-8:] == first.splitlines()[-8:]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_bands_prints_a_row_for_every_way_and_what_of_the_stem_survives():
    shown = run(
        "bands.py",
        "--train",
        "64",
        "--test",
        "16",
        "--steps",
        "1",
        "--pretraining",
        "1",
        "--seeds",
        "0",
    )
    rows = [line.strip("| ").split(" | ") for line in shown.splitlines() if " ± " in line]
    assert [row[:2] for row in rows] == [
        [network, target]
        for network in ("built-in", "color")
        for target, count in (("gray", 3), ("13 bands", 6))
        for _ in range(count)
    ]
    # The stem of the second network is written down: half of its filters are opponent exactly.
    replicated, averaged = (
        next(row for row in rows[9:] if row[2] == way) for way in ("replicate", "average")
    )
    assert replicated[4:] == averaged[4:] == ["50 %", "0.0 %"]


@pytest.mark.slow
def test_domain_shift_is_computed_once_and_tabled_with_and_without_guards(tmp_path):
    arguments = [
        "--seeds",
        "0",
        "--targets",
        "one class",
        "contrast",
        "--train",
        "200",
        "--validation",
        "100",
        "--images",
        "64",
        "--processes",
        "1",
        "--results",
        str(tmp_path / "results.jsonl"),
    ]
    tables = run("domain_shift.py", *arguments)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["target"] for row in rows] == arguments[3:5]
    alone, changed = rows
    assert alone["without"]["BN target"] < alone["as is"] - 0.3
    assert alone["refused"]["BN target"]
    assert alone["with"]["BN target"] == alone["as is"]
    assert changed["without"]["BN target"] > changed["as is"] + 0.2
    assert f"| one class | {100 * alone['as is']:.1f} ± 0.0 |" in tables
    assert f"{100 * alone['as is']:.1f} ± 0.0 (1 refused)" in tables
    assert run("domain_shift.py", *arguments) == tables
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_the_prior_is_corrected_under_label_shift_and_not_under_blur(tmp_path):
    results = tmp_path / "results.jsonl"
    run(
        "domain_shift.py",
        "--seeds",
        "0",
        "--targets",
        "label shift",
        "blur",
        "--processes",
        "1",
        "--results",
        str(results),
    )
    shares, images = (json.loads(line) for line in results.read_text().splitlines())
    assert not shares["refused"]["prior, EM"]
    assert shares["with"]["prior, EM"] > shares["as is"]
    assert images["refused"]["prior, EM"]
    assert images["without"]["prior, EM"] < images["as is"] == images["with"]["prior, EM"]


@pytest.mark.slow
def test_measured_gray_levels_are_worth_more_than_the_scale_to_65535():
    table = run("gray_levels.py", "--spans", "300", "--seeds", "0", "--tests", "200")
    rows = [line.split("|") for line in table.splitlines()[2:]]
    (few, low), (many, high) = ((int(row[3]), float(row[4].split()[0])) for row in rows)
    assert few <= 3
    assert many > 200
    assert high > low + 5


@pytest.mark.slow
def test_claims_are_judged_and_computed_once(tmp_path):
    arguments = ["bias_variance", "unfreezing", "gray", "--seeds", "2", "--processes", "1"]
    arguments += ["--scale.steps", "6", "--scale.tests", "40"]
    arguments += ["--results", str(tmp_path / "results.jsonl")]
    shown = run("claims.py", *arguments)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["run"]["what"] for row in rows} >= {"heads", "gradual", "gray, curves"}
    assert "## unfreezing, built-in: " in shown
    assert run("claims.py", *arguments) == shown
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(rows)


@pytest.mark.parametrize("name", sorted(path.stem for path in EXPERIMENTS.glob("*.py")))
def test_what_a_script_imports_is_there(name):
    importlib.import_module(name)


@pytest.mark.slow
def test_tasks_go_the_whole_way():
    found = run("tasks.py", "--count", "60", "--steps", "2")
    assert found.count("| solved head |") == found.count("| fine-tuned |") == 2
