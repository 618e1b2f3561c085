"""Which changes make another run, and what a resumed run says of them."""

from __future__ import annotations

import dataclasses
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import flaxtransfer as ft
from flaxtransfer.data.splits import Split
from tests.support.small import CONFIG, PREPROCESSING, SIZE

CLASSES = (("b_dark", 20), ("c_mid", 110), ("d_light", 200))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten images of three brightnesses."""
    root, random = tmp_path_factory.mktemp("data") / "scans", np.random.default_rng(0)
    for name, level in CLASSES:
        (root / name).mkdir(parents=True)
        for number in range(10):
            pixels = random.integers(0, 40, (SIZE, SIZE, 3)) + level
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return root


def run(root, folder, *, at=None, splits=None, **changes):
    """A run on a folder, which may be cut off at a batch, and resumed with changes."""
    settings = {"batch_size": 6, "seed": 0, "every": 4, "weights": 0, "run_seed": 0} | changes
    source = ft.open_source(f"folder:{root}")
    if splits is None:
        splits = ft.stratified_split(source.labels(), val_fraction=0.2, test_fraction=0.2)
    if callable(splits):
        splits = splits(source)
    preprocessing = settings.get("preprocessing", PREPROCESSING)
    data = ft.loaders(
        source,
        splits,
        preprocessing,
        batch_size=settings["batch_size"],
        seed=settings["seed"],
        transform=settings.get("transform"),
    )
    if at is not None:
        whole = data.train

        def train(start):
            for number, batch in enumerate(whole(start), start):
                if number == at:
                    raise OSError("power cut")
                yield batch

        data = dataclasses.replace(data, train=train)
    model = ft.resnet(CONFIG, dtype=settings.get("dtype"))
    variables = model.init(jax.random.key(settings["weights"]), (SIZE, SIZE, 3))
    network = ft.Classifier(model, variables, preprocessing, tuple(source.class_names))
    plan = ft.recipes.feature_extraction(variables["params"], steps=12)
    return ft.fit(
        network,
        plan,
        data,
        folder,
        seed=settings["run_seed"],
        resume=True,
        options=ft.FitOptions(evaluate_every=settings["every"]),
    )


@pytest.fixture(scope="module")
def interrupted(images, tmp_path_factory):
    """A run that was cut off at its ninth batch."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.raises(OSError, match="power cut"):
        run(images, folder, at=9)
    return folder


@pytest.fixture
def copies(images, interrupted, tmp_path):
    """Data and run to be changed."""
    shutil.copytree(images, tmp_path / "scans")
    shutil.copytree(interrupted, tmp_path / "run")
    return tmp_path / "scans", tmp_path / "run"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch_size": 5}, "batch_size is 6 there and 5 here"),
        ({"seed": 1}, "order_seed is 0 there and 1 here"),
        (
            {"transform": ft.data.training_transform(PREPROCESSING, policy="trivial")},
            r"augmentation is .* there and .*TrivialAugment\(rgb=True, .* here",
        ),
        ({"every": 3}, "evaluate_every is 4 there and 3 here"),
        ({"run_seed": 1}, "seed is 0 there and 1 here"),
        ({"dtype": "bfloat16"}, "compute is 'float32' there and 'bfloat16' here"),
        ({"weights": 1}, "the weights that training starts from are others"),
        (
            {"preprocessing": dataclasses.replace(PREPROCESSING, mean=(0.4,) * 3)},
            "preprocessing.mean is",
        ),
        (
            {"splits": lambda s: ft.stratified_split(s.labels(), val_fraction=0.2, seed=1)},
            r"in another part: .*\(train, now test\)",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_are_another_run(copies, changes, text):
    images, folder = copies
    with pytest.raises(ValueError, match=text) as refused:
        run(images, folder, **changes)
    assert "belongs to another run" in str(refused.value)
    assert "\n" not in str(refused.value)


def rename(images):
    (images / "d_light").rename(images / "a_light")


def delete(images):
    (images / "c_mid/3.png").unlink()


def replace(images):
    shutil.copy(images / "c_mid/4.png", images / "c_mid/3.png")


def move(images):
    (images / "c_mid/3.png").rename(images / "b_dark/3b.png")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (rename, r"the run has the classes d_light, which the data lack and .* a_light, which the"),
        (delete, r"1 example is no longer in the split: c_mid/3.png"),
        (replace, r"1 example is changed: c_mid/3.png"),
        (move, r"c_mid/3.png .*b_dark/3b.png"),
    ],
    ids=["class renamed", "deleted", "replaced", "moved to another class"],
)
def test_other_examples_are_another_run(copies, change, text):
    images, folder = copies
    change(images)
    with pytest.raises(ValueError, match=text):
        run(images, folder)


def test_new_examples_are_left_out_and_said(copies):
    images, folder = copies
    shutil.copy(images / "c_mid/4.png", images / "c_mid/44.png")
    with pytest.raises(ValueError, match=r"new in the split: .*ft.training.kept_splits"):
        run(images, folder)
    resumed = run(images, folder, splits=lambda source: ft.training.kept_splits(folder, source))
    assert "1 new example belongs to no part of the run and is left out" in resumed.notes


def test_the_same_data_elsewhere_are_the_same_run(copies, images, tmp_path, monkeypatch):
    moved, folder = copies
    straight = run(images, tmp_path / "straight")
    monkeypatch.chdir(moved.parent)
    resumed = run("scans", folder)
    assert resumed.notes == ()
    assert resumed.validation == straight.validation
    assert str(moved) in (folder / "split.json").read_text()


def test_a_feed_that_cannot_tell_its_examples_apart_is_resumed_on_trust(tmp_path):
    from tests.support.small import feed, network, two_phases

    model, variables = network()
    for _ in range(2):
        fitted = ft.fit(
            ft.Classifier(model, variables, PREPROCESSING),
            two_phases(variables["params"], steps=2),
            feed(),
            tmp_path / "run",
            resume=True,
        )
    assert any("not compared with those of the interrupted run" in note for note in fitted.notes)


def record(labels, names):
    """The record of six examples in memory, of which one validates and one tests."""
    source = ft.ArraySource(np.arange(6 * 16, dtype=np.uint8).reshape(6, 4, 4), labels, names)
    splits = ft.data.Splits.of(range(4), [4], [5])
    return Split.of(source, splits, read=True)


@pytest.mark.parametrize(
    ("labels", "names", "text"),
    [
        (
            (0, 1, 0, 1, 0, 1),
            ("b", "a"),
            "the classes are in another order: a, b there and b, a here",
        ),
        ((0, 1, 0, 0, 0, 1), ("a", "b"), r"1 example is relabeled: example 3 \(b, now a\)"),
        ((0, 1, 0, 1, 0, 1), ("a", "c"), "the run has the classes b, which the data lack and the"),
        ((0, 1, 0, 1, 0, 1), ("a", "b"), None),
    ],
)
def test_labels_and_classes_are_part_of_the_record(labels, names, text):
    kept = record((0, 1, 0, 1, 0, 1), ("a", "b"))
    assert Split.from_json(kept.to_json()).identity() == kept.identity()
    now = record(labels, names)
    found = kept.differences(now)
    assert (kept.identity() == now.identity()) == (text is None) == (found == [])
    if text is not None:
        assert re.search(text, found[0])
