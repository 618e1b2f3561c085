"""Tables, groups, splits of folders and folds at the terminal, from training to prediction."""

from __future__ import annotations

import csv
import json
import re
import shutil

import numpy as np
import pytest

from flaxtransfer.cli import run
from tests.support.scans import traces_of
from tests.support.terminal import only_line

SHORT = ("--batch-size", 8, "--strategy", "solved_head", "--compare", "no")


def words(data, weights, target, *options):
    places = ("--data", data, "--weights", weights, "--run", target)
    return ["train", *map(str, (*places, *SHORT, *options))]


def rows_of(folder):
    """Sixteen images of eight patients: two of each, of the same class."""
    return [
        [f"{folder}/{name}/{i}.png", name, f"Jane Doe {name} {i // 2}"]
        for name in ("dark", "bright")
        for i in range(8)
    ]


def write(path, rows, names=("image", "label", "patient")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    return path


@pytest.fixture(scope="module")
def trained(folder, weights, tmp_path_factory):
    """A table, and a finished run on it."""
    place = tmp_path_factory.mktemp("table")
    shutil.copytree(folder, place / "images")
    table = write(place / "studies.csv", rows_of("images"))
    options = ("--val-fraction", 0.25, "--test-fraction", 0.25)
    assert run(words(f"csv:{table}", weights, place / "run", *options)) == 0
    return table, place / "run"


@pytest.fixture
def copies(trained, tmp_path):
    shutil.copytree(trained[0].parent, tmp_path / "copy")
    return tmp_path / "copy" / "studies.csv", tmp_path / "copy" / "run"


def resumed(table, weights, target, *options):
    given = ("--val-fraction", 0.25, "--test-fraction", 0.25, "--resume")
    return run(words(f"csv:{table}", weights, target, *given, *options))


def test_no_patient_is_in_two_parts_and_no_name_is_kept(trained):
    _, target = trained
    kept = json.loads((target / "split.json").read_text())
    assert [len(kept[part]) for part in ("train", "val", "test")] == [8, 4, 4]
    where = {row[0]: row[2] for row in rows_of("images")}
    parts = [{where[name] for name in kept[part]} for part in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 8
    # The first patient is 0 in every run, whatever the name.
    assert kept["groups"]["train"] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert traces_of({*where.values(), "Jane"}, target) == set()


def test_the_same_rows_elsewhere_are_the_same_run(copies, weights, capsys):
    table, target = copies
    rows = [[*row[:2], f"site {row[2]}", 7] for row in rows_of("images")]
    moved = write(table.with_name("other.csv"), rows, ("path", "dx", "site", "age"))
    table.unlink()
    before = (target / "summary.json").read_text()
    assert resumed(moved, weights, target, "--label-column", "dx", "--group-column", "site") == 0
    assert (target / "summary.json").read_text() == before
    said = capsys.readouterr().out
    assert "made again" not in said


def remove(rows):
    del rows[3]


def rename(rows):
    shutil.copy(rows[3][0], f"{rows[3][0]}.new.png")
    rows[3][0] += ".new.png"


def relabel(rows):
    rows[3][1] = "bright"


def regroup(rows):
    for row in rows[:4]:
        row[2] = "someone else"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (remove, r"1 images of the run are missing from csv:.*: images/dark/3.png; put them back"),
        (rename, r"missing .*: images/dark/3.png \(now images/dark/3.png.new.png\)"),
        (relabel, r"1 example is relabeled: images/dark/3.png \(dark, now bright\)"),
        (regroup, "the examples are in other groups"),
    ],
)
def test_a_changed_row_is_another_run(copies, weights, capsys, monkeypatch, change, text):
    table, target = copies
    monkeypatch.chdir(table.parent)
    rows = rows_of("images")
    change(rows)
    write(table, rows)
    assert resumed(table, weights, target) == 2
    line = only_line(capsys)
    assert re.search(text, line), line


def test_new_rows_are_left_out_and_said(copies, weights, capsys):
    table, target = copies
    shutil.copy(table.parent / "images/dark/0.png", table.parent / "images/dark/new.png")
    write(table, [["images/dark/new.png", "dark", "Joe"], *rows_of("images")])
    assert resumed(table, weights, target) == 0
    assert "1 new example belongs to no part of the run" in capsys.readouterr().out


def test_a_run_is_used_with_tables(trained, tmp_path, capsys):
    table, target = trained
    assert run(["evaluate", str(target)]) == 0
    own = json.loads(capsys.readouterr().out)
    assert own["examples"] == 4
    folder = table.parent / "images"
    parts = [["test" if i % 8 < 2 else "train"] for i in range(16)]
    rows = [[*row[:2], *part] for row, part in zip(rows_of(folder), parts, strict=True)]
    other = write(tmp_path / "other.csv", rows, ("file", "kind", "subset"))
    assert run(["evaluate", str(target), "--data", f"csv:{other}", "--label-column", "kind"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["examples"], found["part"]) == (4, "test")
    assert found["notes"][0] == "columns by their usual names: image 'file', split 'subset'"
    assert run(["predict", str(target), f"csv:{other}", f"{folder}/dark/7.png"]) == 0
    said = capsys.readouterr()
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert [line["image"] for line in lines] == [*(row[0] for row in rows), f"{folder}/dark/7.png"]
    assert "images are those of the column 'file'" in said.err
    assert run(["predict", str(target), f"folder:{folder}"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 16


@pytest.mark.slow
def test_a_run_is_diagnosed_and_explained_with_tables(trained, tmp_path, capsys):
    table, target = trained
    rows = [row[:1] for row in rows_of(table.parent / "images")]
    other = write(tmp_path / "other.csv", rows, ("file",))
    place = tmp_path / "report"
    report = ["--target", f"csv:{other}", "--out", str(place), "--permutations", "19"]
    assert run(["diagnose", "--run", str(target), *report, "--image-column", "file"]) == 0
    assert (place / "report.json").exists()
    maps = ["--data", f"csv:{other}", "--out", str(tmp_path / "maps"), "--most-images", "2"]
    assert run(["explain", str(target), *maps]) == 0
    assert "images are those of the column 'file'" in capsys.readouterr().out


def test_advice_and_probes_take_tables(trained, weights, capsys):
    table, _ = trained
    for command in ("advise", "probe"):
        assert run([command, "--data", f"csv:{table}", "--weights", str(weights)]) == 0
        assert "data: columns by their usual names: image 'image'" in capsys.readouterr().out


@pytest.fixture(scope="module")
def parts(folder, tmp_path_factory):
    """The images in folders train, val and test."""
    root = tmp_path_factory.mktemp("parts")
    for name in ("dark", "bright"):
        for i in range(8):
            place = root / ("train", "train", "val", "test")[i // 2] / name
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name / f"{i}.png", place)
    return root


def test_folders_of_a_split_are_the_split(parts, weights, tmp_path, capsys):
    data, target = f"folder:{parts}", tmp_path / "run"
    assert run(words(data, weights, target)) == 0
    kept = json.loads((target / "split.json").read_text())
    for part, count in (("train", 8), ("val", 4), ("test", 4)):
        assert len(kept[part]) == count
        assert {name.split("/")[0] for name in kept[part]} == {part}
    assert "holds a split: 8 train, 4 val, 4 test images" in capsys.readouterr().out
    assert run(words(data, weights, target, "--resume")) == 0
    capsys.readouterr()
    assert run(["evaluate", str(target), "--data", data]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 4
    assert run(words(data, weights, tmp_path / "x", "--test-fraction", 0.5)) == 2
    assert "the data come with a split, and --test-fraction would make another" in only_line(capsys)


def test_a_part_that_the_data_lack_is_drawn_from_those_to_train_on(
    parts, weights, tmp_path, capsys
):
    shutil.copytree(parts, tmp_path / "images")
    shutil.rmtree(tmp_path / "images/val")
    shutil.copy(tmp_path / "images/train/dark/0.png", tmp_path / "images/test/dark/copy.png")
    options = ("--val-fraction", 0.25)
    assert run(words(f"folder:{tmp_path}/images", weights, tmp_path / "run", *options)) == 0
    kept = json.loads((tmp_path / "run/split.json").read_text())
    assert [len(kept[part]) for part in ("train", "val", "test")] == [6, 2, 5]
    said = capsys.readouterr().out
    assert "1 near-duplicate across the split, which make validation and test easier" in said
    assert re.search(r"train/dark/0.png \((train|val)\) and test/dark/copy.png \(test\)", said)
    assert {name.split("/")[0] for name in kept["val"]} == {"train"}


def test_folds_test_each_image_once_and_are_resumed(trained, weights, tmp_path, capsys):
    table, _ = trained
    target = tmp_path / "folds"
    options = ("--folds", 3, "--val-fraction", 0.2)
    # One fold alone, as on another machine; then all of them.
    assert run(words(f"csv:{table}", weights, target, *options, "--fold", 2)) == 0
    written = (target / "fold2/model.safetensors").stat().st_mtime_ns
    assert run(words(f"csv:{table}", weights, target, *options)) == 2
    assert "folds holds folds; add --resume to go on" in capsys.readouterr().err
    assert run(words(f"csv:{table}", weights, target, *options, "--resume")) == 0
    assert (target / "fold2/model.safetensors").stat().st_mtime_ns == written
    said = capsys.readouterr().out
    found = json.loads((target / "folds.json").read_text())
    assert found["examples"] == 16
    accuracies = [fold["accuracy"] for fold in found["folds"]]
    assert found["mean"]["accuracy"] == pytest.approx(np.mean(accuracies))
    assert found["standard_deviation"]["accuracy"] == pytest.approx(np.std(accuracies, ddof=1))
    last = said.strip().splitlines()[-1]
    assert last.startswith(
        f"test accuracy {np.mean(accuracies):.4f} ± {np.std(accuracies, ddof=1):.4f}"
    )
    with (target / "out_of_fold.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [row[0] for row in rows_of("images")]
    assert [row["label"] for row in rows] == [row[1] for row in rows_of("images")]
    patients = {row[0]: row[2] for row in rows_of("images")}
    for fold in range(1, 4):
        tested = {row["image"] for row in rows if int(row["fold"]) == fold}
        kept = json.loads((target / f"fold{fold}/split.json").read_text())
        assert tested == set(kept["test"])
        others = {patients[name] for name in (*kept["train"], *kept["val"])}
        assert not others & {patients[name] for name in tested}
    right = [row["label"] == row["predicted"] for row in rows]
    sizes = [fold["examples"] for fold in found["folds"]]
    assert np.mean(right) == pytest.approx(np.average(accuracies, weights=sizes))
    for row in rows:
        shares = {name: float(row[f"probability {name}"]) for name in ("bright", "dark")}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert max(shares, key=shares.get) == row["predicted"]
    assert run(words(f"csv:{table}", weights, target / "fold1", "--folds", 3)) == 2
    assert "holds a run without folds" in only_line(capsys)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--data", "csv:no.csv"], "there is no file no.csv"),
        (["--data", "csv:"], "'csv:' needs a path"),
        (
            ["--ignore-label", "x"],
            "--ignore-label must be given with --data hf:<name or folder>[:config][:split], csv:",
        ),
        (["--folds", "3", "--test-fraction", "0.1"], "--folds tests on every image in turn; leave"),
        (["--folds", "3", "--fold", "4"], "--fold must be 1 .. 3, got 4"),
        (["--fold", "1"], "--fold belongs to --folds"),
    ],
)
def test_options_that_do_not_fit(options, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["train", *options]) == 2
    assert text in only_line(capsys)


@pytest.mark.parametrize(
    "kind", ["tags", "columns", pytest.param("values", marks=pytest.mark.slow)]
)
def test_tables_of_several_labels_or_values_are_trained(trained, weights, tmp_path, capsys, kind):
    table, _ = trained
    images = rows_of(table.parent / "images")
    cells = {
        "tags": lambda i: ("bright|old" if i % 3 else "old",),
        "columns": lambda i: (i % 2, "" if i % 5 == 0 else i % 3 // 2),
        "values": lambda i: (i / 4,),
    }[kind]
    names = ("image", "a", "b", "patient") if kind == "columns" else ("image", "label", "patient")
    rows = [[row[0], *cells(i), row[2]] for i, row in enumerate(images)]
    write(tmp_path / "t.csv", rows, names)
    options = ["--label-column", "a", "b"] if kind == "columns" else []
    short = ["--batch-size", 8, "--head-steps", 4, "--fine-tune-steps", 2, "--compare", "no"]
    data = ["--data", f"csv:{tmp_path}/t.csv", *options]
    given = ["--weights", weights, "--run", tmp_path / "run", *short]
    parts = ["--val-fraction", 0.25, "--test-fraction", 0.25]
    assert run([str(w) for w in ["train", *data, *given, *parts]]) == 0
    assert run([str(w) for w in ["train", *data, *given, *parts, "--resume"]]) == 0
    assert run(["evaluate", str(tmp_path / "run")]) == 0
    assert run(["evaluate", str(tmp_path / "run"), *map(str, data)]) == 0
    capsys.readouterr()
    assert run(["predict", str(tmp_path / "run"), f"csv:{tmp_path}/t.csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 16
    given[3] = tmp_path / "folds"
    assert run([str(w) for w in ["train", *data, *given, "--folds", 2]]) == 0
    assert "(mean and standard deviation of 2 folds" in capsys.readouterr().out
    assert len((tmp_path / "folds/out_of_fold.csv").read_text().splitlines()) == 17


def test_a_hugging_face_data_set_is_trained_resumed_and_evaluated(
    folder, weights, tmp_path, capsys
):
    import datasets

    datasets.disable_progress_bars()
    rows = rows_of(folder)
    data = {
        "scan": [{"bytes": None, "path": path} for path, *_ in rows],
        "tone": [name for _, name, _ in rows],
        "patient": [patient for *_, patient in rows],
    }
    features = {
        "scan": datasets.Image(),
        "tone": datasets.ClassLabel(names=["dark", "bright"]),
        "patient": datasets.Value("string"),
    }
    whole = datasets.Dataset.from_dict(data, features=datasets.Features(features))
    whole.save_to_disk(tmp_path / "saved")
    command = words(f"hf:{tmp_path / 'saved'}", weights, tmp_path / "run", "--val-fraction", 0.25,
                    "--test-fraction", 0.25)  # fmt: skip
    assert run(command) == 0
    said = capsys.readouterr().out
    assert "columns by their usual names: image 'scan', label 'tone', group 'patient'" in said
    assert "Jane" not in (tmp_path / "run" / "split.json").read_text()
    assert run([*command, "--resume"]) == 0
    capsys.readouterr()
    assert run(["evaluate", str(tmp_path / "run")]) == 0
    assert run(["evaluate", str(tmp_path / "run"), "--data", f"hf:{tmp_path / 'saved'}"]) == 0
    capsys.readouterr()
    other = whole.map(lambda row: {"scan": whole[0]["scan"]})
    shutil.rmtree(tmp_path / "saved")
    other.save_to_disk(tmp_path / "saved")
    assert run([*command, "--resume"]) == 2
    assert "belongs to another run" in only_line(capsys)
