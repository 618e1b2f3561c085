"""DICOM and GeoTIFF at the terminal: trained on, resumed, evaluated, predicted."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from flaxtransfer.cli import run
from flaxtransfer.commands.predict import match_classes, match_columns
from flaxtransfer.data import ArraySource, with_levels
from flaxtransfer.data.scans import Levels
from flaxtransfer.task import MULTI_LABEL
from flaxtransfer.weights import load
from tests.support.scans import band_items, geotiff, traces_of, write_dicom
from tests.support.terminal import SIZE, only_line, train

QUICK = ("--strategy", "solved_head", "--labels-per-class", 4, "--batch-size", 8)


def pictures(low, high, count=6, seed=0):
    """12 bits whose brightness is between two levels."""
    random = np.random.default_rng(seed)
    return random.integers(low, high, (count, SIZE, SIZE), dtype=np.uint16)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Two classes that 12 bits in 16 tell apart: values below 700 and above 1300 of 65535."""
    root = tmp_path_factory.mktemp("dicom")
    for name, low in (("dark", 100), ("bright", 1300)):
        for number, picture in enumerate(pictures(low, low + 600, seed=low)):
            write_dicom(
                root / name / f"{number}.dcm", picture, bits=12, patient=f"Patient-{name}{number}"
            )
    return root


@pytest.fixture(scope="module")
def trained(scans, weights, tmp_path_factory):
    """A run on DICOM files without windows of their own."""
    target = tmp_path_factory.mktemp("runs") / "scans"
    assert run(train(scans, weights, target, *QUICK)) == 0
    return target


def test_training_says_the_levels_and_the_run_keeps_them(trained, scans, weights, capsys):
    assert run(train(scans, weights, trained.with_name("again"), *QUICK)) == 0
    said = capsys.readouterr()
    line = next(line for line in said.out.splitlines() if line.startswith("gray levels"))
    assert "percentiles 0.1 and 99.9 of 8 training images" in line
    assert "of 256 levels would be left" in line
    own = load(trained / "model.safetensors").preprocessing
    assert 100 <= own.black[0] <= 110
    assert 1890 <= own.white[0] < 1900
    everything = said.out + said.err
    for path in trained.rglob("*.json*"):
        everything += path.read_text()
    assert "Doe" not in everything
    assert "19700101" not in everything
    assert "Patient-" not in everything


def test_a_run_is_evaluated_and_predicts_by_its_own_levels(trained, scans, tmp_path, capsys):
    assert run(["evaluate", str(trained)]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 1
    # Much darker images: measured anew, the brighter half would be called bright.
    for name, low in (("dark", 100), ("bright", 400)):
        for number, picture in enumerate(pictures(low, low + 200, seed=1)):
            write_dicom(tmp_path / name / f"{number}.dcm", picture, bits=12)
    assert run(["evaluate", str(trained), "--data", f"folder:{tmp_path}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == 0.5
    assert found["gray_levels"].endswith("(uint16; as the weights have them)")
    files = [str(tmp_path / "bright" / "1.dcm"), str(scans / "bright" / "1.dcm")]
    assert run(["predict", str(trained), *files]) == 0
    said = capsys.readouterr()
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert [row["label"] for row in rows] == ["dark", "bright"]
    assert "as the weights have them" in said.err


def test_each_frame_is_predicted(trained, tmp_path, capsys):
    stack = np.concatenate([pictures(100, 700, 2), pictures(1300, 1900, 1)])
    path = write_dicom(tmp_path / "x.dcm", stack, bits=12)
    arguments = ["predict", str(trained), str(path), "--batch-size", "2"]
    assert run(arguments) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["image"], row["label"]) for row in rows] == [
        (f"{path}#1", "dark"),
        (f"{path}#2", "dark"),
        (f"{path}#3", "bright"),
    ]


def test_resume_finds_the_same_levels(trained, scans, weights, capsys):
    assert run([*train(scans, weights, trained, *QUICK), "--resume"]) == 0
    capsys.readouterr()
    words = train(scans, weights, trained, *QUICK, "--window", "1000", "2000")
    assert run([*words, "--resume"]) == 2
    said = only_line(capsys)
    assert "window is None there and [1000.0, 2000.0] here" in said


def test_a_window_is_asked_for_and_checked(scans, weights, tmp_path, capsys):
    words = train(scans, weights, tmp_path / "run", *QUICK)
    assert run([*words, "--window", "9000", "100"]) == 2
    assert "must overlap what the images measure" in only_line(capsys)
    assert run([*words, "--window", "900", "1"]) == 2
    assert only_line(capsys).endswith("--window: its width must be > 1, got 1")
    assert run([*words, "--window", "1000.5", "2001"]) == 0
    assert "black 0 and white 2000 (uint16; as asked for)" in capsys.readouterr().out
    assert load(tmp_path / "run" / "model.safetensors").preprocessing.white == (2000,) * 3


def test_a_run_on_windows_of_the_files_refuses_one_without(scans, weights, tmp_path, capsys):
    copy = tmp_path / "windows"
    window = {"WindowCenter": "1000", "WindowWidth": "2000"}
    for name, low in (("dark", 100), ("bright", 1300)):
        for number, picture in enumerate(pictures(low, low + 600, seed=low)):
            write_dicom(copy / name / f"{number}.dcm", picture, bits=12, **window)
    target = tmp_path / "run"
    assert run(train(copy, weights, target, *QUICK)) == 0
    assert "gray levels: each file by its own window" in capsys.readouterr().out
    assert load(target / "model.safetensors").preprocessing.black == ()
    assert run(["predict", str(target), str(copy / "dark" / "0.dcm")]) == 0
    capsys.readouterr()
    assert run(["predict", str(target), str(scans / "dark" / "0.dcm")]) == 2
    assert "have no fixed black and white" in capsys.readouterr().err


def test_bands_of_a_geotiff_with_names_and_wavelengths(weights, tmp_path, capsys):
    items = band_items("DESCRIPTION", ["B2", "B3", "B4", "B8"])
    items += band_items("CENTRAL_WAVELENGTH_UM", [0.49, 0.56, 0.665, 0.842])
    random = np.random.default_rng(0)
    for name, gain in (("field", 900), ("water", 100)):
        (tmp_path / "tiles" / name).mkdir(parents=True)
        for number in range(6):
            values = random.integers(200, 1200, (SIZE, SIZE, 4), dtype=np.uint16)
            values[..., 3] += gain
            order = "contig" if number % 2 else "separate"
            if order == "separate":
                values = np.moveaxis(values, 2, 0)
            path = tmp_path / "tiles" / name / f"{number}.tif"
            path.write_bytes(geotiff(values, items=items, planarconfig=order))
    target = tmp_path / "run"
    assert run(train(tmp_path / "tiles", weights, target, *QUICK, "--bands", 4)) == 0
    assert "gray levels: black and white B2 20" in capsys.readouterr().out
    own = load(target / "model.safetensors").preprocessing
    assert own.bands == ("B2", "B3", "B4", "B8")
    assert own.wavelengths == (490, 560, 665, 842)
    assert len(set(own.white)) > 1
    assert run(["evaluate", str(target)]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 4
    assert run(["predict", str(target), str(tmp_path / "tiles" / "water" / "0.tif")]) == 0
    capsys.readouterr()
    other = geotiff(
        values, items=items.replace("B2", "x").replace("B3", "B2"), planarconfig="contig"
    )
    (tmp_path / "other.tif").write_bytes(other)
    assert run(["predict", str(target), str(tmp_path / "other.tif")]) == 2
    assert "its bands must be B2, B3, B4, B8, got x, B2, B4, B8" in capsys.readouterr().err


def test_eight_bits_train_as_before(folder, weights, tmp_path, capsys):
    assert run(train(folder, weights, tmp_path / "run", *QUICK)) == 0
    assert "gray levels" not in capsys.readouterr().out
    assert load(tmp_path / "run" / "model.safetensors").preprocessing.black == ()
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["preprocessing"]
    assert kept["black"] == kept["white"] == []
    Image.fromarray(pictures(0, 4096, 1)[0]).save(tmp_path / "x.png")
    assert run(["predict", str(tmp_path / "run"), str(tmp_path / "x.png")]) == 0
    assert "16-bit PNG and TIFF are read on the scale to 65535" in capsys.readouterr().err
    assert run(train(folder, weights, tmp_path / "run2", *QUICK, "--window", "40", "400")) == 2
    assert "leave out --window" in only_line(capsys)


def test_the_measures_before_training_take_the_levels_too(scans, weights, capsys):
    data = ["--data", f"folder:{scans}", "--weights", str(weights), "--labels-per-class", "4"]
    assert run(["probe", *data]) == 0
    assert "gray levels: black" in capsys.readouterr().out


def test_a_file_of_another_kind_among_scans_is_named(scans, weights, tmp_path, capsys):
    from tests.support.scans import bundled

    copy = tmp_path / "copy"
    shutil.copytree(scans, copy)
    shutil.copy(bundled("test-SR.dcm"), copy / "dark" / "report.dcm")
    Image.fromarray(np.full((SIZE, SIZE), 200, np.uint8)).save(copy / "bright" / "x.png")
    words = train(copy, weights, tmp_path / "run", *QUICK[:2], "--test-fraction", 0.2)
    assert run(words) == 2
    assert "report.dcm: a DICOM file without a picture (modality SR)" in only_line(capsys)
    assert run([*words, "--skip-corrupt"]) == 0
    assert "1 unreadable images were left out" in capsys.readouterr().out


def test_the_files_of_a_patient_stay_in_one_part(weights, tmp_path, capsys):
    for name, low in (("dark", 100), ("bright", 1300)):
        for number, picture in enumerate(pictures(low, low + 600, 20, seed=low)):
            patient = f"Patient-{number // 4}"
            write_dicom(tmp_path / name / f"{number:02}.dcm", picture, bits=12, patient=patient)
    words = ("--strategy", "solved_head", "--batch-size", 8, "--test-fraction", 0.4)
    assert run(train(tmp_path, weights, tmp_path.with_name("grouped"), *words)) == 0
    assert "16 train, 8 val, 16 test" in " ".join(capsys.readouterr().out.split())
    record = json.loads((tmp_path.with_name("grouped") / "split.json").read_text())
    patients = [
        {int(name[-6:-4]) // 4 for name in record[part]} for part in ("train", "val", "test")
    ]
    assert sorted(patient for part in patients for patient in part) == [0, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    """Forty images of five patients, each with images of both classes, and who they are."""
    root, names = tmp_path_factory.mktemp("patients"), [f"Patient-{n}" for n in range(5)]
    for name, low in (("dark", 100), ("bright", 1300)):
        for number, picture in enumerate(pictures(low, low + 600, 20, seed=low)):
            path = root / name / f"{number:02}.dcm"
            write_dicom(path, picture, bits=12, patient=names[number // 4])
    return root, names


def test_nothing_written_tells_whose_a_picture_is(patients, weights, tmp_path, capsys):
    """An unsalted digest is as good as the number, for somebody who can try all numbers."""
    root, names = patients
    target, files = tmp_path / "run", ("--json", tmp_path / "a.json", "--html", tmp_path / "a.html")
    words = ("--head-steps", 2, "--fine-tune-steps", 1, "--batch-size", 8, "--folds", 2)
    words += ("--cache", "disk", "--cache-dir", tmp_path / "cache")
    assert run(train(root, weights, target, *words)) == 0
    assert run(["evaluate", str(target / "fold1")]) == 0
    data = ("--data", f"folder:{root}", "--weights", weights)
    assert run(list(map(str, ("advise", *data, *files)))) == 0
    (tmp_path / "said.txt").write_text("".join(capsys.readouterr()))
    assert len((target / "out_of_fold.csv").read_text().splitlines()) == 41
    assert "groups" in json.loads((target / "fold1" / "split.json").read_text())
    assert json.loads((tmp_path / "a.json").read_text())["evidence"]["grouped"]
    assert any((tmp_path / "cache").rglob("*"))
    assert traces_of(names, tmp_path) == set()


def test_traces_of_identifiers_are_found(tmp_path):
    digest = hashlib.sha256(b"Patient-3")
    (tmp_path / "a.json").write_text(digest.hexdigest()[:16])
    np.savez_compressed(tmp_path / "b.npz", x=np.frombuffer(digest.digest(), np.uint8))
    (tmp_path / "c.txt").write_text("of Patient-3")
    found = traces_of(["Patient-3", "Patient-4"], tmp_path)
    assert {name for name, _ in found} == {"a.json", "b.npz", "c.txt"}


@pytest.mark.parametrize("task", ["single_label", "multi_label"])
def test_a_source_that_is_matched_to_a_run_takes_its_levels(task):
    """Else evaluate would read 16 bits on another scale than training, without a word."""
    labels = [0, 1] if task == "single_label" else [[0.0, 1.0], [1.0, 0.0]]
    seen = []

    class Scans(ArraySource):
        def with_levels(self, levels):
            seen.append(levels)
            return self

    source = Scans(np.zeros((2, 4, 4), np.uint8), labels, ("a", "b"), task=task)
    if task == "single_label":
        matched = match_classes(source, ("b", "a"))
    else:
        matched = match_columns(source, ("b", "a"), MULTI_LABEL)
    levels = Levels((100.0,), (900.0,))
    found = with_levels(matched, levels)
    assert seen == [levels]
    assert type(found) is type(matched)
    np.testing.assert_array_equal(found.labels(), matched.labels())
