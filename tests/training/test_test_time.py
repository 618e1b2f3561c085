"""Test-time augmentation, by hand from predictions on each view; and images of another size."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import flaxtransfer as ft
from flaxtransfer.cli import run
from flaxtransfer.training.evaluation import VIEWS, mean_output
from tests.support.small import PREPROCESSING, SIZE
from tests.support.terminal import only_line

IMAGES = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
CONFIG = ft.models.ResNetConfig(depths=(1, 1), width=4, classes=3)


@pytest.fixture(scope="module")
def network():
    model = ft.resnet(CONFIG)
    return ft.Classifier(model, model.init(jax.random.key(0)), PREPROCESSING)


def outputs(network, images, **how):
    batches = [{"image": images, "label": np.zeros(len(images), np.int32)}]
    return ft.predict(network, batches, **how)


def test_probabilities_are_averaged_over_the_mirrored_image(network):
    plain, mirrored = (outputs(network, x).logits for x in (IMAGES, IMAGES[:, :, ::-1]))
    softmax = ft.task.SINGLE_LABEL.probabilities
    wanted = (softmax(plain) + softmax(mirrored)) / 2
    found = outputs(network, IMAGES, tta="flip", features=True)
    np.testing.assert_allclose(softmax(found.logits), wanted, atol=1e-6)
    assert np.abs(softmax(plain) - wanted).max() > 1e-3
    again = outputs(network, IMAGES[:, :, ::-1], tta="flip", features=True)
    np.testing.assert_allclose(found.logits, again.logits, atol=1e-5)
    np.testing.assert_allclose(found.features, again.features, atol=1e-5)


def test_a_square_has_eight_positions(network):
    seen = {np.asarray(view(IMAGES[:1])).tobytes() for view in VIEWS["dihedral"]}
    assert len(seen) == 8
    turned = outputs(network, np.rot90(IMAGES, axes=(1, 2)).copy(), tta="dihedral").logits
    np.testing.assert_allclose(outputs(network, IMAGES, tta="dihedral").logits, turned, atol=1e-5)


def test_the_mean_is_that_of_what_the_task_says():
    values = np.random.default_rng(1).normal(0, 3, (4, 6, 3)).astype(np.float32)
    for task in (ft.task.SINGLE_LABEL, ft.task.MULTI_LABEL):
        found = task.probabilities(np.asarray(mean_output(values, task.name)))
        wanted = np.mean([task.probabilities(each) for each in values], axis=0)
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_allclose(mean_output(values, "regression"), values.mean(0), atol=1e-6)
    # Certain outputs stay finite.
    certain = np.array([[[-200.0, 200.0]], [[200.0, -200.0]]], np.float32)
    assert np.isfinite(mean_output(certain, "multi_label")).all()


def test_what_cannot_be_averaged_is_refused(network, capsys, tmp_path):
    with pytest.raises(
        ValueError, match="tta must be one of none, flip, dihedral, got 'flipp'; di"
    ):
        outputs(network, IMAGES, tta="flipp")
    with pytest.raises(ValueError, match="tta must be none for batches of activations"):
        outputs(network, IMAGES, tta="flip", start="head")
    (tmp_path / "a.png").touch()
    command = ["predict", str(tmp_path), str(tmp_path / "a.png"), "--tta", "flip", "--adjust-prior"]
    assert run(command) == 2
    assert "--tta must be none with --adjust-prior" in only_line(capsys)


def test_another_image_size_keeps_the_part_that_is_cut_out(network):
    weights = ft.Preprocessing((0.5,), (0.25,), size=224, resize=256)
    assert (weights.at_size(96).size, weights.at_size(96).resize) == (96, 110)
    assert weights.at_size(224) == weights
    assert PREPROCESSING.at_size(32) == dataclasses.replace(PREPROCESSING, size=32, resize=32)
    source = ft.ArraySource(IMAGES, [0, 1, 2, 0, 1])
    batches = ft.eval_batches(source, np.arange(5), PREPROCESSING.at_size(32))
    resized = dataclasses.replace(network, preprocessing=PREPROCESSING.at_size(32))
    assert ft.predict(resized, batches).logits.shape == (5, 3)
