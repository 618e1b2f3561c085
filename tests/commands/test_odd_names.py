"""Names that are no text, that a terminal would obey or that look like markup, from end to end."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from pathlib import Path

import pytest

from flaxtransfer.cli import run
from flaxtransfer.commands.predict import cell_text
from tests.support.terminal import only_line, train

CLASSES = {"dark": "=dark\udcff[bold]", "bright": "[red]\x1b]0;owned\x07$x$"}


@pytest.fixture(scope="module")
def odd(folder, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("odd") / "im\udcffages[/b]"
    for name, other in CLASSES.items():
        shutil.copytree(folder / name, root / other)
        for path in (root / other).iterdir():
            path.rename(path.with_name(f"im\udcfe\n{path.name}"))
    return root


@pytest.fixture(scope="module")
def odd_run(odd, weights, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("odd-runs") / "ru\udcffn[/b]"
    size = ("--labels-per-class", 4, "--batch-size", 8)
    steps = ("--head-steps", 20, "--fine-tune-steps", 4)
    assert run(train(odd, weights, target, *size, *steps)) == 0
    return target


def test_the_words_of_a_finished_run_are_text(odd, weights, odd_run, capsys):
    size = ("--labels-per-class", 4, "--batch-size", 8)
    steps = ("--head-steps", 20, "--fine-tune-steps", 4, "--resume")
    assert run(train(odd, weights, odd_run, *size, *steps)) == 0
    said = capsys.readouterr()
    assert r"ru\xffn[/b]" in said.out
    assert "\x1b" not in said.out + said.err


@pytest.mark.parametrize("there", [False, True])
def test_evaluate(odd, odd_run, there, capsys):
    assert run(["evaluate", str(odd_run), *(["--data", f"folder:{odd}"] if there else [])]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["data"] == f"folder:{odd}"
    assert out.isascii()


def test_predict(odd, odd_run, capsys):
    images = [str(path) for path in sorted((odd / CLASSES["dark"]).iterdir())[:2]]
    assert run(["predict", str(odd_run), *images, "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert out.isascii()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["image"] for row in rows] == images
    assert set(rows[0]["top"]) == set(CLASSES.values())
    assert run(["predict", str(odd_run), *images, "--top", "2", "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {rows[0]["label"], rows[0]["label_2"]} == {
        r"'=dark\xff[bold]",
        r"[red]\x1b]0;owned\x07$x$",
    }
    assert rows[0]["image"].endswith(r"im\xfe\x0a0.png")


def test_diagnose(odd, odd_run, tmp_path, capsys):
    labels = tmp_path / "labels.csv"
    image = f"{CLASSES['dark']}/im\udcfe\n0.png"
    text = io.StringIO()
    csv.writer(text).writerows([["image", "label"], [image, CLASSES["dark"]]])
    labels.write_bytes(text.getvalue().encode(errors="surrogateescape"))
    out = tmp_path / "report\udcff"
    places = ["--run", str(odd_run), "--target", f"folder:{odd}", "--out", str(out)]
    options = ["--permutations", "20", "--target-labels", str(labels)]
    assert run(["diagnose", *places, *options]) == 0
    said = capsys.readouterr().out
    assert r"=dark\xff[bold]" in said
    assert "\x1b" not in said
    assert json.loads((out / "report.json").read_text())["class_names"] == list(CLASSES.values())
    page = (out / "report.html").read_text()
    assert r"[red]\x1b]0;owned\x07$x$" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate", "none\udcff[/b]\x1b]0;x\x07"], r"none\xff[/b]\x1b]0;x\x07"),
        (["evaluate", "RUN", "--data", "folder:m[/b]\udcff"], r"m[/b]\xff"),
        (["predict", "RUN", "none\udcff[/b].png"], r"none\xff[/b].png"),
        (["plan", "--strategy", "none\udcff[/b].yaml"], r"none\xff[/b].yaml"),
        (["train", "--data", "folder:m[/b]"], "m[/b]"),
        (["train", "--data", "folder:" + "m" * 5000], "mmm"),
    ],
)
def test_a_refusal_is_one_short_line_of_text(finished, words, said, capsys):
    assert run([str(finished) if word == "RUN" else word for word in words]) == 2
    line = only_line(capsys)
    assert said in line
    assert len(line) <= 600
    assert "\x1b" not in line


PIPED = {
    "image": (["predict", "RUN", "PIPE"], "pipe must be a regular file, got a named pipe"),
    "labels": (
        ["diagnose", "--run", "RUN", "--target", "DATA", "--target-labels", "PIPE"],
        "pipe must be a regular file, got a named pipe",
    ),
    "weights": (["convert", "PIPE", "OUT"], "pipe must be a regular file, got a named pipe"),
    "plan": (["plan", "--strategy", "PIPE.yaml"], "must be a regular file"),
}


@pytest.mark.parametrize("name", PIPED)
def test_a_named_pipe_is_refused_unopened(finished, folder, tmp_path, name, capsys):
    words, said = PIPED[name]
    for pipe in ("pipe", "pipe.yaml"):
        os.mkfifo(tmp_path / pipe)
    places = {
        "RUN": str(finished),
        "DATA": f"folder:{folder}",
        "PIPE": str(tmp_path / "pipe"),
        "PIPE.yaml": str(tmp_path / "pipe.yaml"),
        "OUT": str(tmp_path / "out.safetensors"),
    }
    assert run([places.get(word, word) for word in words]) == 2
    assert said in only_line(capsys)


@pytest.mark.parametrize(
    "text", ["image,label\n" + "x" * 200_000, 'image,label\n"a', "image,label\na\0,b", "\0", "a,b"]
)
def test_a_hostile_file_of_labels_is_named(finished, folder, tmp_path, text, capsys):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    places = ["--run", str(finished), "--target", f"folder:{folder}"]
    assert run(["diagnose", *places, "--target-labels", str(path)]) == 2
    assert str(path) in only_line(capsys)


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+1+1", "'+1+1"),
        ("-1+1", "'-1+1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", r"'\x09=1"),
        ("\r=1", r"'\x0d=1"),
        ("-1.5", "-1.5"),
        ("+3", "+3"),
        ("cat=1", "cat=1"),
        ("a\x1b", r"a\x1b"),
    ],
)
def test_no_cell_is_a_formula(text, cell):
    assert cell_text(text) == cell


@pytest.mark.parametrize("name", ["checkpoints", "features", "tensorboard", ".lock"])
def test_a_link_planted_in_a_run_folder_is_refused(folder, weights, tmp_path, name, capsys):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "7.deleting").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.tmp").symlink_to(victim / "file")
    (tmp_path / "run" / name).symlink_to(victim)
    words = train(folder, weights, tmp_path / "run", "--labels-per-class", 4, "--batch-size", 8)
    assert run([*words, "--head-steps", "20", "--fine-tune-steps", "4"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "symbolic link" in said or "is not a run folder" in said
    assert [path.name for path in victim.iterdir()] == ["7.deleting"]
