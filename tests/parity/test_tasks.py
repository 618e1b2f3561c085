"""Losses equal to torch's, and networks of several labels and numbers in timm."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import flaxtransfer as ft
from flaxtransfer.losses import BinaryCrossEntropy, CrossEntropy, Huber, SquaredError, bound
from flaxtransfer.task import MULTI_LABEL, REGRESSION, Units

pytestmark = pytest.mark.parity

RANDOM = np.random.default_rng(0)
OUTPUTS = RANDOM.normal(size=(40, 3)).astype(np.float32)
CLASSES = RANDOM.integers(0, 3, 40)
LABELS = RANDOM.integers(0, 2, (40, 3)).astype(np.float32)
VALUES = RANDOM.normal(size=(40, 3)).astype(np.float32)
WEIGHTS = {"a": 2.0, "b": 0.5, "c": 1.5}


def check(torch, loss, targets, of_torch, task):
    """Values and gradients of each example are those of torch."""
    loss = bound(loss, task, tuple("abc"), targets)
    found = loss(OUTPUTS, targets, jax.random.key(0))
    gradient = jax.grad(lambda z: loss(z, targets, jax.random.key(0)).sum())(OUTPUTS)
    outputs = torch.tensor(OUTPUTS, requires_grad=True)
    theirs = of_torch(torch, outputs, torch.tensor(targets))
    theirs.sum().backward()
    np.testing.assert_allclose(found, theirs.detach().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, outputs.grad.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_cross_entropy_is_torchs(torch, smoothing, weights):
    def theirs(torch, outputs, targets):
        weight = None if weights is None else torch.tensor(list(weights.values()))
        return torch.nn.functional.cross_entropy(
            outputs, targets, weight=weight, label_smoothing=smoothing, reduction="none"
        )

    check(torch, CrossEntropy(smoothing, weights), CLASSES, theirs, "single_label")


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_binary_cross_entropy_is_torchs(torch, weights):
    def theirs(torch, outputs, targets):
        weight = None if weights is None else torch.tensor(list(weights.values()))
        each = torch.nn.functional.binary_cross_entropy_with_logits(
            outputs, targets, pos_weight=weight, reduction="none"
        )
        return each.mean(1)

    check(torch, BinaryCrossEntropy(positive_weights=weights), LABELS, theirs, "multi_label")


def test_focal_loss_is_torchvisions(torch, torchvision):
    def theirs(torch, outputs, targets):
        return torchvision.ops.sigmoid_focal_loss(outputs, targets, alpha=-1, gamma=2.0).mean(1)

    check(torch, BinaryCrossEntropy(focal=2.0), LABELS, theirs, "multi_label")


@pytest.mark.parametrize("delta", [0.3, 1.0])
def test_huber_and_squared_error_are_torchs(torch, delta):
    def theirs(torch, outputs, targets):
        functional = torch.nn.functional
        return functional.huber_loss(outputs, targets, delta=delta, reduction="none").mean(1)

    def squared(torch, outputs, targets):
        return torch.nn.functional.mse_loss(outputs, targets, reduction="none").mean(1) / 2

    check(torch, Huber(delta), VALUES, theirs, "regression")
    check(torch, SquaredError(), VALUES, squared, "regression")


@pytest.mark.parametrize(
    "task", [MULTI_LABEL, REGRESSION.with_units(Units((5.0, 0.0), (2.0, 9.0)))]
)
def test_timm_gives_our_probabilities(task, torch, torchvision, tmp_path):
    timm = pytest.importorskip("timm")
    config = ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=64, classes=2)
    model = ft.resnet(config)
    variables = jax.tree.map(np.asarray, model.init(jax.random.key(0), (32, 32, 3)))
    preprocessing = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, 32, 32)
    head = np.random.default_rng(1).normal(size=(512, 2)).astype(np.float32)
    variables["params"]["fc"] = {"kernel": head, "bias": np.ones(2, np.float32)}
    checkpoint = ft.Pretrained(variables, config, preprocessing, class_names=("a", "b"), task=task)
    ft.export(checkpoint, tmp_path / "timm", to="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    images = np.random.default_rng(2).normal(size=(3, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        found = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
        found = (torch.sigmoid(found) if task is MULTI_LABEL else found).numpy()
    ours = task.probabilities(np.asarray(model.apply(variables, images)[0]))
    np.testing.assert_allclose(found, ours, rtol=1e-4, atol=1e-5)
