"""Commands that print what there is: parameters, architectures, help; and probes of segments."""

from __future__ import annotations

import dataclasses
import re

import pytest
from terminal import only_line

import flaxtransfer as ft
from flaxtransfer.cli import (
    Convert,
    Evaluate,
    FindRate,
    Models,
    Params,
    Plan,
    Predict,
    Probe,
    Stem,
    Train,
    run,
)


def test_params_prints_the_table_without_allocating_a_network(capsys):
    arguments = [
        "params",
        "--model",
        "resnet152",
        "--rules",
        "new=head()",
        "late=stage(4) - batch_norm()",
        "frozen=rest()",
        "--rates",
        "new=1e-3",
        "late=1e-4",
    ]
    assert run(arguments) == 0
    output = capsys.readouterr().out
    # torchvision documents 60,192,808 parameters for ResNet-152 with 1000 classes.
    assert "60,192,808" in output
    assert "layer4/0/conv1/kernel" in output


def models_shown(capsys, *arguments):
    """{name: the other cells} of what `models` prints, in its order, and its notes."""
    assert run(["models", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    return {row[0]: row[1:] for row in rows}, " ".join(line for line in lines if "│" not in line)


def test_models_prints_what_the_names_cost(capsys):
    """The numbers of resnet50 are those that torchvision publishes with its weights."""
    every, notes = models_shown(capsys)
    assert list(every) == list(ft.models.ARCHITECTURES)
    assert every["resnet50"] == ["25.56", "4.089", "2048"]
    assert f"{len(every)} of {len(every)} names" in notes
    found, _ = models_shown(capsys, "se*50*", "--sort", "macs")
    assert set(found) == {n for n in ft.models.ARCHITECTURES if n.startswith("se") and "50" in n}
    numbers = [float(cells[1]) for cells in found.values()]
    assert numbers == sorted(numbers)
    named, _ = models_shown(capsys, "resnet1", "--sort", "name")
    names = [name for name in named if re.fullmatch(r"resnet\d+", name)]
    assert names == ["resnet18", "resnet101", "resnet152"]
    small, _ = models_shown(capsys, "resnet50d", "--sort", "parameters", "--size", "448")
    assert set(small) == {name for name in ft.models.ARCHITECTURES if "resnet50d" in name}
    assert float(small["resnet50d"][1]) == pytest.approx(4 * 4.329, rel=1e-3)


def test_models_says_which_no_images_of_a_size_fit(capsys):
    found, notes = models_shown(capsys, "resnet*50", "--size", "200")
    assert {name for name, cells in found.items() if cells[1] == "–"} == {"resnetaa50"}
    assert "images of 200 px do not fit resnetaa50" in notes


def test_probe_prints_a_row_a_segment_and_draws_them(folder, weights, tmp_path, capsys):
    picture = tmp_path / "probe.png"
    arguments = [
        "probe",
        "--data",
        f"folder:{folder}",
        "--weights",
        str(weights),
        "--out",
        str(picture),
    ]
    assert run(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split()[0] for line in lines]
    assert rows[rows.index("segment") + 1 :][:5] == ["stem", *(f"layer{n}" for n in (1, 2, 3, 4))]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run([*arguments[:-1], str(tmp_path / "probe.txt")]) == 2
    assert "txt" in only_line(capsys)


@pytest.mark.parametrize(
    "command", [Train, Plan, Probe, Stem, FindRate, Models, Params, Evaluate, Predict, Convert]
)
def test_every_option_has_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        run([re.sub("(?<=.)([A-Z])", r"-\1", command.__name__).lower(), "--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(command):
        documented = re.search(rf"^ +{field.name}: (\S+ \S+)", command.__doc__, re.MULTILINE)
        assert documented, field.name
        assert documented[1] in shown
