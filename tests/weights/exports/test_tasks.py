"""Networks of several labels and of numbers, written for other programs."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

import flaxtransfer as ft
from flaxtransfer.task import MULTI_LABEL, REGRESSION, Units
from flaxtransfer.weights.exports.exporting import stablehlo_logits
from tests.support.small import CONFIG, PREPROCESSING, SIZE

UNITS = Units((10.0, -3.0, 0.5), (2.0, 30.0, 0.01))
IMAGES = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)


def checkpoint(task):
    model = ft.resnet(CONFIG)
    random = np.random.default_rng(1)
    variables = model.init(jax.random.key(0), (SIZE, SIZE, 3))
    head = random.normal(size=variables["params"]["fc"]["kernel"].shape).astype(np.float32)
    variables["params"]["fc"] = {"kernel": head, "bias": np.ones(3, np.float32)}
    arrays = jax.tree.map(np.asarray, variables)
    return ft.Pretrained(arrays, CONFIG, PREPROCESSING, class_names=("a", "b", "c"), task=task)


def outputs(of):
    return np.asarray(ft.resnet(of.config).apply(of.variables, IMAGES)[0])


@pytest.mark.parametrize("task", [MULTI_LABEL, REGRESSION.with_units(UNITS)])
def test_a_file_says_what_its_outputs_are(task, tmp_path):
    ft.save(tmp_path / "net.safetensors", checkpoint(task))
    assert ft.load(tmp_path / "net.safetensors").task == task
    ft.export(checkpoint(task), tmp_path / "timm", to="timm")
    said = json.loads((tmp_path / "timm/config.json").read_text())["outputs"]
    assert ft.load(tmp_path / "timm").task.name == task.name
    ft.export(checkpoint(task), tmp_path / "hf", to="huggingface")
    again = ft.load(tmp_path / "hf")
    assert again.task.name == task.name
    assert f"task: {task.name}, as config.json says" in again.notes
    assert ("sigmoid" if task is MULTI_LABEL else "in the units of the targets") in said
    ft.export(checkpoint(task), tmp_path / "net.stablehlo")
    beside = json.loads((tmp_path / "net.stablehlo.json").read_text())
    assert (beside["output"], beside["task"]) == (said, task.name)


@pytest.mark.parametrize("name", ["net.safetensors", "net.onnx", "net.stablehlo", "timm"])
def test_an_exported_regression_speaks_in_units(name, tmp_path):
    of = checkpoint(REGRESSION.with_units(UNITS))
    expected = outputs(of) * UNITS.scale + np.array(UNITS.mean)
    made = ft.export(of, tmp_path / name, to="timm" if name == "timm" else None)
    assert any("folded into the head" in note for note in made.notes) or name == "net.stablehlo"
    if name == "net.stablehlo":
        found = stablehlo_logits((tmp_path / name).read_bytes(), IMAGES)
    else:
        found = outputs(ft.load(tmp_path / name))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_kept_head_goes_on_with_its_task():
    of = checkpoint(REGRESSION.with_units(UNITS))
    kept = ft.transfer(of, classes=2, class_names=("c", "a"), head="resize")
    assert kept.task.units == Units((0.5, 10.0), (0.01, 2.0))
    assert ft.transfer(of, classes=2).task is ft.task.SINGLE_LABEL
    with pytest.raises(ValueError, match="must go on with the task of memory, regression, got"):
        ft.transfer(of, classes=3, head="keep", task=MULTI_LABEL)
    with pytest.raises(ValueError, match="must have the targets of memory, whose units it keeps"):
        ft.transfer(of, classes=2, class_names=("a", "new"), head="resize")


def test_damaged_units_are_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    of = checkpoint(REGRESSION.with_units(Units((1.0,), (1.0,))))
    ft.save(path, of)
    with pytest.raises(ValueError, match="targets must be those of a regression of 3 outputs"):
        ft.load(path)
    wrong = replace(of, task=replace(MULTI_LABEL, units=UNITS))
    ft.save(path, wrong)
    with pytest.raises(ValueError, match="targets must be those of a regression"):
        ft.load(path)
