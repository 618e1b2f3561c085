"""``flaxtransfer predict`` where classes are differently common than in training."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from flaxtransfer.cli import run
from flaxtransfer.shift.calibration import calibrate
from flaxtransfer.training.run_folder import seal_run
from tests.support.brightness import APART, SIZE, SPREAD, draw, finish_run, write

BATCHES = ("--batch-size", "16")
"""So that the network is compiled once, for batches of one size."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run with 208 validation examples."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    finish_run(folder)
    return folder


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> tuple[list[str], np.ndarray]:
    """Files of which one in ten is bright."""
    images, labels = draw(0.1, 120, 2)
    return write(images, tmp_path_factory.mktemp("target") / "images"), labels


def predicted(capsys, *arguments) -> tuple[list[dict], list[str]]:
    assert run(["predict", *map(str, arguments), *BATCHES]) == 0
    shown = capsys.readouterr()
    return [json.loads(line) for line in shown.out.splitlines()], shown.err.splitlines()


def accuracy(rows: list[dict], labels: np.ndarray) -> float:
    return float(np.mean(np.array([row["label"] == "bright" for row in rows]) == labels))


def test_the_estimate_says_what_it_did_and_helps(trained, target, capsys):
    """Bayes' rule for two normal levels says by how much: from 77 to 91 % at a tenth bright."""
    paths, labels = target
    rows, said = predicted(capsys, trained, *paths, "--adjust-prior", "--top", "2")
    assert [row["image"] for row in rows] == paths
    assert all(sum(row["top"].values()) == pytest.approx(1, abs=1e-5) for row in rows)
    assert said[0].startswith("prior by maximum likelihood on 120 images, relative to 208 valid")
    assert said[1].startswith("dark: 0.5")
    line = r"bright: (0\.\d+) -> (0\.\d+) \((0\.\d+) to (0\.\d+) at 95%\)"
    before, estimate, low, high = map(float, re.fullmatch(line, said[2]).groups())
    assert before == pytest.approx(0.5, abs=0.07)
    assert low < estimate < high
    assert estimate == pytest.approx(labels.mean(), abs=0.12)
    as_trained, _ = predicted(capsys, trained, *paths)
    assert accuracy(as_trained, labels) == pytest.approx(norm.cdf(APART / SPREAD), abs=0.07)
    assert accuracy(rows, labels) > accuracy(as_trained, labels) + 0.05
    # The count is against calibrated predictions, which the prior of the source leaves as they are.
    kept = np.load(trained / "validation.npz")
    prior = map(str, calibrate(kept["logits"], kept["labels"]).prior)
    calibrated, none = predicted(capsys, trained, *paths, "--prior", *prior)
    assert none[-1] == "0 of 120 predictions changed"
    assert said[3] == f"{changed(rows, calibrated)} of 120 predictions changed"


def changed(rows: list[dict], others: list[dict]) -> int:
    return sum(row["label"] != other["label"] for row, other in zip(rows, others, strict=True))


def test_a_known_prior_is_taken_as_it_is(trained, target, capsys):
    """In the order of the classes or by their names; calibrated odds times the ratio of priors."""
    paths, labels = target
    rows, said = predicted(capsys, trained, *paths, "--prior", "0.9", "0.1")
    assert said[0].startswith("prior as given, relative to 208 validation examples")
    named, _ = predicted(
        capsys, trained, *paths, "--adjust-prior", "--prior", "bright=0.1", "dark=0.9"
    )
    assert named == rows
    assert accuracy(rows, labels) > 0.85
    even, _ = predicted(capsys, trained, *paths, "--prior", "0.5", "0.5", "--top", "2")
    tilted, _ = predicted(capsys, trained, *paths, "--prior", "0.9", "0.1", "--top", "2")
    odds = [
        np.array([row["top"]["bright"] / row["top"]["dark"] for row in found])
        for found in (even, tilted)
    ]
    inside = (odds[1] > 1e-3) & (odds[1] < 1e3)
    np.testing.assert_allclose(odds[1][inside], odds[0][inside] / 9, rtol=2e-3)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--prior", "0.9"], "a share for each of the 2 classes (dark, bright), got 1"),
        (["--prior", "0.9", "0.2"], "got 0.9 0.2, which sum to 1.1"),
        (["--prior", "drak=0.9", "bright=0.1"], "no class 'drak'; did you mean 'dark'?"),
        (["--prior", "bright=0.1"], "no share for 'dark'"),
        (["--prior", "a", "b"], "shares must be numbers, got a b"),
        (["--prior", "dark=-0.1", "bright=1.1"], "shares must be >= 0 and sum to 1"),
        (["--prior", "dark=0.5", "dark=0.5", "bright=0.5"], "a class is named twice"),
    ],
)
def test_what_is_no_prior(trained, target, capsys, arguments, text):
    refused(capsys, [str(trained), target[0][0], *arguments], text)


def refused(capsys, arguments, text):
    assert run(["predict", *arguments, *BATCHES]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.strip().splitlines()) == 1
    assert text in shown.err


def test_what_images_cannot_tell_is_refused(trained, target, tmp_path, capsys):
    few = "29 examples are too few to estimate the prevalence of 2 classes: use 30 or more"
    refused(capsys, [str(trained), *target[0][:29], "--adjust-prior"], few)
    same = write(np.full((40, SIZE, SIZE, 3), 128, np.uint8), tmp_path / "same")
    refused(capsys, [str(trained), *same, "--adjust-prior"], "do not determine the prevalence")
    random = np.random.default_rng(0)
    other = random.integers(0, 256, (80, SIZE, SIZE, 3)).astype(np.uint8)
    other[40:] //= 3
    strange = write(other, tmp_path / "other")
    refused(capsys, [str(trained), *strange, "--adjust-prior"], "images themselves have changed")


def test_features_that_changed_are_missing_or_damaged_are_refused(
    trained, target, tmp_path, capsys
):
    """Predictions are those of a label shift; the head saw twice of what it did in training."""
    kept = dict(np.load(trained / "validation.npz"))
    assert kept["features"].dtype == np.float16
    assert len(kept["features"]) == len(kept["labels"])
    shutil.copytree(trained, tmp_path / "run")

    def write_kept(**arrays):
        np.savez(tmp_path / "run" / "validation.npz", **arrays)
        seal_run(tmp_path / "run")

    write_kept(**{**kept, "features": kept["features"] / 2})
    command = [str(tmp_path / "run"), *target[0], "--adjust-prior"]
    refused(capsys, command, "no mixture of the source's classes explains these features")
    without = {name: kept[name] for name in ("logits", "labels")}
    write_kept(**without)
    refused(capsys, command, "features")
    write_kept(**without, features=kept["features"][:-1])
    refused(capsys, command, "validation.npz is damaged: its arrays have 207, 208 rows")


def test_a_run_without_validation_says_how_to_have_some(trained, target, tmp_path, capsys):
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    seal_run(tmp_path)
    text = "keeps no validation examples (no validation.npz); train with --val-per-class"
    refused(capsys, [str(tmp_path), target[0][0], "--adjust-prior"], text)
    (tmp_path / "validation.npz").write_bytes((trained / "validation.npz").read_bytes()[:200])
    seal_run(tmp_path)
    refused(capsys, [str(tmp_path), target[0][0], "--adjust-prior"], "validation.npz is damaged")
    few = {"logits": np.zeros((9, 2)), "labels": np.zeros(9, int), "features": np.zeros((9, 4))}
    np.savez(tmp_path / "validation.npz", **few)
    seal_run(tmp_path)
    refused(
        capsys,
        [str(tmp_path), target[0][0], "--prior", "0.5", "0.5"],
        "has 9 validation examples, and a correction of the prior needs 10",
    )
