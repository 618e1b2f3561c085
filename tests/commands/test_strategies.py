"""Strategies at the terminal: printed, edited, measured, their rates found."""

from __future__ import annotations

import json
import re
from typing import get_args

import numpy as np
import pytest
from PIL import Image

import flaxtransfer as ft
from flaxtransfer.cli import run
from flaxtransfer.commands.job import AUGMENTATIONS, regularized
from flaxtransfer.commands.options import (
    Augmentation,
    BatchOptions,
    JobOptions,
    RegularizationOptions,
)
from flaxtransfer.losses import BinaryCrossEntropy, CrossEntropy
from tests.support.terminal import only_line, train


def test_a_strategy_is_printed_edited_and_run(folder, weights, tmp_path, capsys):
    """Progressive unfreezing by way of a file: the decisions are printed, and in the metrics."""
    path = tmp_path / "plan.yaml"
    command = ["plan", "--strategy", "progressive_unfreezing", "--out", str(path)]
    assert run(command) == 0
    assert "Ends after a phase without better validation" in capsys.readouterr().out
    path.write_text(path.read_text().replace("steps: 100", "steps: 4"))
    target = tmp_path / "run"
    size = ("--labels-per-class", 4, "--val-per-class", 2, "--batch-size", 4)
    arguments = train(folder, weights, target, *size, "--strategy", path)
    assert run(arguments) == 0
    output = " ".join(capsys.readouterr().out.split())
    with np.load(target / "validation.npz") as file:
        kept = dict(file)
    result = json.loads((target / "result.json").read_text())["validation"]
    assert result["examples"] == len(kept["labels"]) == 4
    assert result["accuracy"] == np.mean(kept["logits"].argmax(1) == kept["labels"])
    rows = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]
    decisions = [row for row in rows if row["kind"] == "decision"]
    assert decisions[0]["phase"] == "head"
    for decision in decisions[1:]:
        verdict = "kept" if decision["kept"] else "undone"
        assert f"phase '{decision['phase']}' is {verdict}" in output
    assert run([*arguments, "--learning-rate", "1"]) == 2
    assert "edit the file instead" in only_line(capsys)
    path.write_text(path.read_text().replace("steps: 4", "steps: 5"))
    assert run([*arguments, "--resume"]) == 2
    line = only_line(capsys)
    assert "belongs to another run: " in line
    assert "steps is 4 there and 5 here" in line
    assert "options.plan is " in line


@pytest.mark.parametrize(
    ("strategy", "column"),
    [
        pytest.param("curvature_scaled", "Fisher diagonal", marks=pytest.mark.slow),
        ("surgical", "gradient / weights"),
    ],
)
def test_strategies_that_measure_say_what_they_found(
    folder, weights, tmp_path, capsys, strategy, column
):
    few = ("--strategy", strategy, "--steps", 2, "--batch-size", 8)
    assert run(train(folder, weights, tmp_path / "run", *few)) == 0
    shown = capsys.readouterr().out
    assert "measured with logistic regression on" in shown
    assert column in shown
    assert shown.index(column) < shown.index("peak rate")


def test_a_depth_is_chosen_and_its_head_solved_in_one_pass(folder, weights, tmp_path, monkeypatch):
    def again(*_: object) -> None:
        raise AssertionError("the network is run again for features that are known")

    monkeypatch.setattr("flaxtransfer.training.loop.pooled_features", again)
    for strategy in ("depth_head", "depths_head"):
        place = tmp_path / strategy
        assert run(train(folder, weights, place, "--strategy", strategy)) == 0
        assert json.loads((place / "summary.json").read_text())["results"][0]["steps"] == 1


def test_a_head_on_several_depths_goes_through_a_file_and_is_used_as_any_other(
    folder, weights, tmp_path, capsys
):
    path, target = tmp_path / "plan.yaml", tmp_path / "run"
    params = ft.load(weights).variables["params"]
    ft.training.save_plan(path, ft.recipes.depths_head(params, segments=("stem", "layer2")))
    assert "ends_at:\n- stem\n- layer2\n" in path.read_text()
    assert run(train(folder, weights, target, "--strategy", path)) == 0
    assert "The head reads stem, layer2" in " ".join(capsys.readouterr().out.split())
    assert ft.load(target).config.head_reads == ("stem",)
    assert run([*map(str, train(folder, weights, target, "--strategy", path)), "--resume"]) == 0
    assert run(["evaluate", str(target)]) == 0
    capsys.readouterr()
    assert run(["predict", str(target), *map(str, (folder / "dark").iterdir())]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 8
    assert run(["convert", str(target), str(tmp_path / "net.stablehlo")]) == 0
    capsys.readouterr()
    for words, said in (
        (["convert", str(target), str(tmp_path / "net.onnx")], "use --to safetensors or stablehlo"),
        (["explain", str(target), "--out", str(tmp_path / "maps")], "reads stem, layer2"),
    ):
        assert run(words) == 2
        assert said in only_line(capsys)


def test_a_plan_that_has_to_be_measured(capsys):
    assert run(["plan", "--strategy", "curvature_scaled"]) == 2
    assert "measures curvature and examples on the images first" in only_line(capsys)


@pytest.mark.slow
def test_rates_of_a_later_phase_are_printed_and_drawn(folder, weights, tmp_path, capsys):
    """Each group of it, from the network that the phase before it leaves; no run remains."""
    arguments = [
        "find-rate",
        "--data",
        f"folder:{folder}",
        "--weights",
        str(weights),
        "--batch-size",
        "8",
        "--phase",
        "fine-tune",
        "--each-group",
        "--steps",
        "12",
        "--lowest",
        "1e-4",
        "--out",
        str(tmp_path / "rates.png"),
    ]
    assert run(arguments) == 0
    output = capsys.readouterr().out
    for name in ("head", "backbone"):
        assert re.search(rf"│ {name} +│ +3.0e-04 │ .*1e-04", output), output
    assert [path.name for path in tmp_path.iterdir()] == ["rates.png"]
    with Image.open(tmp_path / "rates.png") as picture:
        assert picture.size[0] > 1000


def test_every_augmentation_of_the_command_line_is_one_of_the_library():
    assert list(AUGMENTATIONS) == list(get_args(Augmentation))
    weights = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, size=8, resize=8)
    made = [
        ft.data.training_transform(weights, geometry=geometry, policy=policy)
        for geometry, policy in AUGMENTATIONS.values()
    ]
    assert len({repr(transform) for transform in made}) == len(made)
    names = {
        name: [type(step).__name__ for step in t.steps]
        for name, t in zip(AUGMENTATIONS, made, strict=True)
    }
    assert names["crop-trivial"] == ["RandomResizedCrop", "TrivialAugment", "Channels"]
    assert names["randaugment"] == ["ResizeCrop", "RandAugment", "Channels"]


def regularized_plan(
    task=ft.task.SINGLE_LABEL, recipe="head_then_fine_tune", batch=None, **options
):
    params = ft.resnet(ft.models.ResNetConfig(depths=(1, 1), width=4)).abstract()["params"]
    job = JobOptions(
        regularization=RegularizationOptions(**options), batch=BatchOptions(**(batch or {}))
    )
    return regularized(ft.recipes.RECIPES[recipe](params), job, task)


def test_regularization_goes_into_every_phase_that_takes_steps():
    plain = regularized_plan()
    assert plain == regularized_plan(mixup=None)
    batch = {"accumulate": 2, "remat": True}
    plan = regularized_plan(mixup=0.2, dropout=0.1, label_smoothing=0.1, batch=batch)
    for phase in plan.phases:
        assert (phase.mixup, phase.dropout, phase.accumulate, phase.remat) == (0.2, 0.1, 2, True)
        assert phase.loss == CrossEntropy(label_smoothing=0.1)
        assert phase.cutmix == phase.stochastic_depth == 0
    several = regularized_plan(ft.task.MULTI_LABEL, label_smoothing=0.1)
    assert several.phases[0].loss == BinaryCrossEntropy(label_smoothing=0.1)
    # What a plan says itself stays, unless it is given.
    again = regularized(plan, JobOptions(batch=BatchOptions(accumulate=4)), ft.task.SINGLE_LABEL)
    assert (again.phases[0].mixup, again.phases[0].accumulate) == (0.2, 4)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"recipe": "solved_head", "mixup": 0.2, "label_smoothing": 0.1},
            "--mixup, --label-smoothing must be left out where the head is solved, not trained",
        ),
        (
            {"task": ft.task.REGRESSION, "label_smoothing": 0.1},
            "--label-smoothing must be left out for the task regression with the loss SquaredError",
        ),
    ],
)
def test_regularization_that_does_nothing_is_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        regularized_plan(**settings)
