"""``flaxtransfer predict`` where classes are differently common than in training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from brightness import APART, SIZE, SPREAD, draw, finish_run, write
from scipy.stats import norm

from flaxtransfer.cli import run
<<<<<<< HEAD
from flaxtransfer.shift.calibration.calibrating import calibrate
=======
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.shift.calibration.calibrating import calibrate
from flaxtransfer.training import run_folder
from flaxtransfer.training.step import forward

SIZE = 16
PREPROCESSING = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, SIZE, SIZE)
MIDDLE, APART, SPREAD = 128, 15, 20
"""Gray levels of dark and bright images overlap: the right answer depends on the prior."""

OFFSET = 4
"""Keeps brightness, in deviations of the preprocessing, above 0 on its way through the network."""

BATCHES = ("--batch-size", "16")
"""So that the network is compiled once, for batches of one size."""


def draw(bright: float, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = (random.random(count) < bright).astype(int)
    level = MIDDLE + APART * (2 * labels - 1) + random.normal(0, SPREAD, count)
    images = level[:, None, None, None] + random.normal(0, 4, (count, SIZE, SIZE, 1))
    return np.repeat(np.clip(images, 0, 255).astype(np.uint8), 3, axis=-1), labels


def write(images: np.ndarray, folder: Path) -> list[str]:
    folder.mkdir(parents=True)
    paths = [folder / f"{number:03}.png" for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        Image.fromarray(image).save(path)
    return [str(path) for path in paths]
>>>>>>> heads/domain


def brightness_network(model: ft.Model) -> ft.Variables:
    """Its first channel is the brightness of the image, all others are 0; by the logits' odds.

    Blocks are identities, and the log-odds of the two classes are those of Bayes' rule, but for
    what max-pooling makes of the noise.
    """

    def leaf(path: str, shape: tuple[int, ...]) -> np.ndarray:
        found = np.full(shape, path.endswith(("/var", "/scale")), np.float32)
        if path.endswith("bn2/scale"):
            found[:] = 0
        if path.endswith("downsample/0/kernel"):
            found[0, 0, 0, 0] = 1
        if path == "params/conv1/kernel":
            found[3, 3, :, 0] = 1 / 3
        if path == "params/bn1/bias":
            found[0] = OFFSET
        slope = APART / SPREAD**2 * 255 * PREPROCESSING.std[0]
        if path == "params/fc/kernel":
            found[0] = -slope, slope
        if path == "params/fc/bias":
            found[:] = slope * OFFSET, -slope * OFFSET
        return found

    flat = flatten(model.abstract())
    return unflatten({path: leaf(path, abstract.shape) for path, abstract in flat.items()})


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
<<<<<<< HEAD
    """The folder of a run with 200 validation examples."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    finish_run(folder)
=======
    """The folder of a run with 208 validation examples."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    model = ft.resnet(ft.ResNetConfig(depths=(1, 1, 1, 1), width=8, classes=2))
    variables = brightness_network(model)
    held, known = draw(0.5, 208, 1)
    network = forward(model, PREPROCESSING)
    logits = np.concatenate([network(variables, held[n : n + 16]) for n in range(0, 208, 16)])
    feed = ft.Feed(iter, 1, None, PREPROCESSING, ("dark", "bright"))
    run_folder.finish(folder, model, variables, feed, 1, ft.Predictions(logits, known))
>>>>>>> heads/domain
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


def test_the_estimate_says_what_it_did_and_helps(finished, target, capsys):
    """Bayes' rule for two normal levels says by how much: from 77 to 91 % at a tenth bright."""
    paths, labels = target
    rows, said = predicted(capsys, finished, *paths, "--adjust-prior", "--top", "2")
    assert [row["image"] for row in rows] == paths
    assert all(sum(row["top"].values()) == pytest.approx(1, abs=1e-5) for row in rows)
    assert said[0].startswith("prior by maximum likelihood on 120 images, relative to 208 valid")
    assert said[1].startswith("dark: 0.5")
    line = r"bright: (0\.\d+) -> (0\.\d+) \((0\.\d+) to (0\.\d+) at 95%\)"
    before, estimate, low, high = map(float, re.fullmatch(line, said[2]).groups())
    assert before == pytest.approx(0.5, abs=0.07)
    assert low < estimate < high
    assert estimate == pytest.approx(labels.mean(), abs=0.12)
    as_trained, _ = predicted(capsys, finished, *paths)
    assert accuracy(as_trained, labels) == pytest.approx(norm.cdf(APART / SPREAD), abs=0.07)
    assert accuracy(rows, labels) > accuracy(as_trained, labels) + 0.05
    # The count is against calibrated predictions, which the prior of the source leaves as they are.
    kept = np.load(finished / "validation.npz")
    prior = map(str, calibrate(kept["logits"], kept["labels"]).prior)
    calibrated, none = predicted(capsys, finished, *paths, "--prior", *prior)
    assert none[-1] == "0 of 120 predictions changed"
    assert said[3] == f"{changed(rows, calibrated)} of 120 predictions changed"


def changed(rows: list[dict], others: list[dict]) -> int:
    return sum(row["label"] != other["label"] for row, other in zip(rows, others, strict=True))


def test_a_known_prior_is_taken_as_it_is(finished, target, capsys):
    """In the order of the classes or by their names; calibrated odds times the ratio of priors."""
    paths, labels = target
    rows, said = predicted(capsys, finished, *paths, "--prior", "0.9", "0.1")
    assert said[0].startswith("prior as given, relative to 208 validation examples")
    named, _ = predicted(capsys, finished, *paths, "--adjust-prior", "--prior", "bright=0.1",
                         "dark=0.9")  # fmt: skip
    assert named == rows
    assert accuracy(rows, labels) > 0.85
    even, _ = predicted(capsys, finished, *paths, "--prior", "0.5", "0.5", "--top", "2")
    tilted, _ = predicted(capsys, finished, *paths, "--prior", "0.9", "0.1", "--top", "2")
    odds = [np.array([row["top"]["bright"] / row["top"]["dark"] for row in found]) for found in
            (even, tilted)]  # fmt: skip
    inside = (odds[1] > 1e-3) & (odds[1] < 1e3)
    np.testing.assert_allclose(odds[1][inside], odds[0][inside] / 9, rtol=2e-3)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--prior", "0.9"], "--prior has 1 numbers, and the run has 2 classes: dark, bright"),
        (["--prior", "0.9", "0.2"], "0.9 0.2 sum to 1.1"),
        (["--prior", "drak=0.9", "bright=0.1"], "no class 'drak'; did you mean 'dark'?"),
        (["--prior", "bright=0.1"], "no share for 'dark'"),
        (["--prior", "a", "b"], "shares are numbers, not a b"),
    ],
)
def test_what_is_no_prior(finished, target, capsys, arguments, text):
    refused(capsys, [str(finished), target[0][0], *arguments], text)


def refused(capsys, arguments, text):
    assert run(["predict", *arguments, *BATCHES]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.strip().splitlines()) == 1
    assert text in shown.err


def test_what_images_cannot_tell_is_refused(finished, target, tmp_path, capsys):
    few = "29 examples say too little about the shares of 2 classes: give 30 or more"
    refused(capsys, [str(finished), *target[0][:29], "--adjust-prior"], few)
    same = write(np.full((40, SIZE, SIZE, 3), 128, np.uint8), tmp_path / "same")
    refused(capsys, [str(finished), *same, "--adjust-prior"], "do not determine the prevalence")
    random = np.random.default_rng(0)
    other = random.integers(0, 256, (80, SIZE, SIZE, 3)).astype(np.uint8)
    other[40:] //= 3
    strange = write(other, tmp_path / "other")
    refused(capsys, [str(finished), *strange, "--adjust-prior"], "images themselves have changed")


def test_a_run_without_validation_says_how_to_have_some(finished, target, tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes((finished / "model.safetensors").read_bytes())
    text = "keeps no validation examples (no validation.npz); train with --val-per-class"
    refused(capsys, [str(tmp_path), target[0][0], "--adjust-prior"], text)
    (tmp_path / "validation.npz").write_bytes((finished / "validation.npz").read_bytes()[:200])
    refused(capsys, [str(tmp_path), target[0][0], "--adjust-prior"], "validation.npz is damaged")
    np.savez(tmp_path / "validation.npz", logits=np.zeros((9, 2)), labels=np.zeros(9, int))
    refused(capsys, [str(tmp_path), target[0][0], "--prior", "0.5", "0.5"],
            "has 9 validation examples, and a correction of the prior needs 10")  # fmt: skip
