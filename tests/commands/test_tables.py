"""Commands that print what there is: parameters, architectures, help; and probes of segments."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import get_type_hints

import pytest

import flaxtransfer as ft
from flaxtransfer.cli import run
from flaxtransfer.commands.options import (
    BatchOptions,
    CacheOptions,
    DataOptions,
    InputOptions,
    JobOptions,
    RunOptions,
    SplitOptions,
    flag,
    from_record,
    recorded,
)
from flaxtransfer.commands.subcommands import SUBCOMMANDS, FindRate, Train
from flaxtransfer.data.open import SCHEMES
from flaxtransfer.models.config import METHODS
from flaxtransfer.weights.naming.formats import FORMATS
from flaxtransfer.weights.naming.published import SENSORS
from tests.support.terminal import only_line


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


REQUIRED = {
    "evaluate": {"run": Path("run")},
    "predict": {"run": Path("run"), "images": (Path("a.png"),)},
    "explain": {"source": "run", "out": Path("explained")},
    "diagnose": {"run": Path("run"), "target": "digits"},
    "convert": {"source": "a", "target": Path("b")},
}


def options_of(options):
    """Names, documentation and notes of all options, those of groups included."""
    hints = get_type_hints(type(options), include_extras=True)
    for field in dataclasses.fields(options):
        value, notes = getattr(options, field.name), getattr(hints[field.name], "__metadata__", ())
        if dataclasses.is_dataclass(value):
            yield from options_of(value)
        else:
            entry = re.search(rf"^ {{8}}{field.name}: (\S+ \S+)", type(options).__doc__, re.M)
            given = [note.help for note in notes if getattr(note, "help", None)]
            yield field.name, notes, given[0] if given else entry and entry[1]


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_option_has_help_that_fits_80_columns(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        run([name, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    usage, *lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(usage) <= 112
    words = " ".join(shown.replace("│", " ").split())
    assert "None" not in words
    for option, notes, text in options_of(SUBCOMMANDS[name](**REQUIRED.get(name, {}))):
        assert text, option
        assert " ".join(text.split()[:2]) in words
        assert flag(option, notes) in words or option.upper() in words


def test_the_list_of_subcommands_fits_80_columns(capsys):
    for arguments, code in (["--help"], 0), (["-h"], 0), ([], 2):
        assert run(arguments) == code
        shown = "".join(capsys.readouterr())
        assert max(map(len, shown.splitlines())) <= 80
        assert re.findall(r"^  (\S+) ", shown, re.M) == list(SUBCOMMANDS)


def test_the_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"flaxtransfer {ft.__version__}\n"


def test_help_lists_what_the_tables_hold(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        run(["train", "--help"])
    shown = capsys.readouterr().out
    for table in (ft.recipes.RECIPES, FORMATS, SENSORS, METHODS, SCHEMES):
        assert [name for name in table if name not in shown] == []


def test_names_of_options_are_their_own():
    """Groups are not a part of the name of a flag, so no two may have the same."""
    for kind in (Train, FindRate):
        flags = [flag(name, notes) for name, notes, _ in options_of(kind())]
        assert sorted(set(flags)) == sorted(flags)


def test_a_run_records_what_decides_what_is_learned():
    """And nothing else: the same run may be resumed with other workers, or in another place."""
    quiet = Train(
        run=RunOptions(run=Path("there"), resume=True, compare="no", tensorboard=True),
        job=JobOptions(data=DataOptions(download=True), batch=BatchOptions(workers=3)),
        cache=CacheOptions(folder=Path("caches")),
    )
    assert recorded(quiet) == recorded(Train())
    options = JobOptions(
        split=SplitOptions(seed=4), input=InputOptions(bands=2, wavelengths=(400.0, 500.0))
    )
    record = json.loads(json.dumps(recorded(Train(job=options))))
    assert record != recorded(Train())
    assert from_record(JobOptions(), record) == options
