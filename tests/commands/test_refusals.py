"""Input errors print one line and exit with code 2; nothing is lost or half-written."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile

import pytest
from PIL import Image

from flaxtransfer import cli
from flaxtransfer.cli import run
from tests.support.terminal import SIZE, only_line, train

ERRORS = [
    (["train", "--data", "digit"], "unknown data source 'digit'; did you mean 'digits'?"),
    (["train", "--weights", "nowhere.safetensors"], "nowhere.safetensors"),
    (["train", "--model", "resnet50"], "holds resnet18w32"),
    (["train", "--data", "folder:nowhere"], "nowhere"),
    (["train", "--batch-size", "0"], "--batch-size must be >= 1, got 0"),
    (["train", "--data", "tfds:no_such_set"], "no_such_set"),
    (["train", "--labels-per-class", "500"], "class"),
    (["train", "--strategy", "l2sp"], "--strategy must be auto, or a recipe (batch_norm_only, "),
    (["train", "--strategy", "surgicl"], "got 'surgicl'; did you mean 'surgical'?"),
    (["train", "--strategy", "nowhere.yaml"], "there is no plan nowhere.yaml"),
    (["train", "--strategy", "l2_sp", "--head-steps", "5"], "l2_sp does not take --head-steps"),
    (["train", "--patience", "2"], "patience needs a validation set"),
    (["plan", "--strategy", "unfreezing"], "did you mean 'progressive_unfreezing'?"),
    (["plan", "--model", "resnet5"], "--model must be the name of a network"),
    (["predict", "nowhere", "image.png"], "no such image: image.png"),
    (["evaluate", "nowhere"], "nowhere is not a run folder"),
    (["params", "--model", "resnet5"], "lists the names; did you mean 'resnet50'"),
    (["params", "--rules", "a=heat()"], "head"),
    (["params", "--rules", "a=head()", "--rates", "a=1"], "conv1/kernel"),
    (["params", "--rates", "hed=1"], "'hed'; did you mean 'head'?"),
    (["params", "--rates", "head=fast"], "the rate of 'head' must be a number, got 'fast'"),
    (["params", "--rules", "head"], "'head' must be of the form name=value"),
    (["predict", "nowhere"], "no image was given"),
    (["probe", "--most-images", "2"], "--most-images must be >= 3, got 2"),
    (["probe", "--out", "probe.txt"], "probe.txt"),
    (["trian"], "got 'trian'; did you mean 'train'?"),
    (["models", "*resent50*"], "no architecture is called '*resent50*'; did you mean 'resnet50'"),
    (["models", "resnet[50"], "never closes a '['"),
    (["models", "--size", "0"], "--size must be >= 1, got 0"),
    (["find-rate", "--group", "hed"], "no group 'hed' with a learning rate; did you mean 'head'?"),
    (["find-rate", "--group", "head", "--each-group"], "give one of the two options"),
    (["find-rate", "--phase", "finetune"], "no phase 'finetune'; did you mean 'fine-tune'?"),
    (["find-rate", "--out", "rates.txt"], "name must end in .png, .pdf, .svg, got rates.txt"),
    (["find-rate", "--out", "no/rates.png"], "the folder no for rates.png does not exist"),
    (["find-rate", "--lowest", "1"], "--lowest must be < --highest, got 1.0 and 1.0"),
    (["find-rate", "--lowest", "0", "--steps", "2"], "--lowest must be > 0, got 0.0; --steps must"),
    (["find-rate", "--lowest", "nan"], "--lowest must be > 0, got nan"),
    (["convert", "nowhere.pth", "x.safetensors"], "nowhere.pth"),
    (
        ["convert", "nowhere.pth", "x.xyz"],
        "must end in .safetensors, .onnx, .stablehlo, .h5, got x.xyz",
    ),
    (["convert", "nowhere.pth", "no/x.onnx"], "the folder no for x.onnx does not exist"),
    (["stem", "--out", "x.xyz"], "--out: its name must end in .png, .pdf, .svg, got x.xyz"),
    (["plan", "--out", "missing/p.yaml"], "the folder missing for p.yaml does not exist; make it"),
    (["plan", "--out", "p.txt"], "--out: its name must end in .yaml, .yml, got p.txt"),
    (["plan", "--out", "/dev/null/p.yaml"], "the folder /dev/null for p.yaml does not exist"),
    (["train", "--run", "/dev/null/run"], "--run must be a folder, got /dev/null/run, and /dev/nu"),
    (["train", "--cache-dir", "/dev/null"], "--cache-dir must be a folder, got /dev/null"),
    (["params", "--rules", "new=head()"], "no label takes 60 leaves: bn1/bias"),
    (["params", "--rules", "new=head()"], "the rules are new=head()"),
    (["params", "--rules", "new=head()", "--rates", "old=1"], "no label takes 60 leaves: bn1/bias"),
    (["params", "--rules", "new=head()", "--rates", "old=1"], "names without a rule: 'old'"),
    (
        ["train", "--dat", "digits"],
        'unrecognized option --dat; did you mean --data? "flaxtransfer ',
    ),
    (
        ["train", "--xyz"],
        'unrecognized option --xyz; "flaxtransfer train --help" lists the options',
    ),
    (["train", "scans"], 'unrecognized words: scans; "flaxtransfer train --help" lists'),
    (["train", "--data"], "--data must be followed by a value, got none"),
    (["train", "--batch-size", "x"], "--batch-size must be a whole number, got 'x'"),
    (["train", "--learning-rate=x"], "--learning-rate must be a number, got 'x'"),
    (
        ["train", "--head", "kep"],
        "--head must be one of new, keep, resize, got 'kep'; did you mean",
    ),
    (["diagnose", "--run", "nowhere"], "flaxtransfer diagnose must be given --target STR; "),
    (["convert"], "flaxtransfer convert must be given SOURCE, TARGET; "),
]


@pytest.mark.parametrize(("arguments", "text"), ERRORS, ids=[" ".join(a) for a, _ in ERRORS])
def test_errors_are_one_line_with_exit_code_2(arguments, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    assert text in only_line(capsys)
    assert list(tmp_path.iterdir()) == []  # nothing half-made


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyError("layer9"), "KeyError: 'layer9'; this is a fault of flaxtransfer, not of what"),
        (RecursionError("deep"), "RecursionError: deep; this is a fault of flaxtransfer"),
        (MemoryError("Unable to allocate 9 TiB"), "out of memory (MemoryError: Unable to "),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating"),
            "out of memory (RuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating); smaller "
            "batches (--batch-size)",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_nobody_foresaw_is_one_line_too(error, text, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fail(options):
        raise error

    monkeypatch.setattr("flaxtransfer.cli.check", fail)
    assert run(["stem"]) == 2
    line = only_line(capsys)
    assert line.startswith(f"flaxtransfer: {text}")
    files = list(tmp_path.iterdir())
    assert [line.endswith(f"; the traceback is in {file}") for file in files] == [True] * len(files)
    assert all(file.read_text().startswith("Traceback") for file in files)
    assert bool(files) == ("fault" in line)


def test_a_signal_that_a_library_wrapped_is_no_error(monkeypatch):
    def fail(options):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemError("initialization failed") from None

    monkeypatch.setattr("flaxtransfer.cli.check", fail)
    with pytest.raises(SystemError):
        run(["stem"])


def test_a_long_message_is_cut_and_the_whole_is_in_a_file(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    name = "x" * 900
    assert run(["convert", name, "x.safetensors"]) == 2
    line = only_line(capsys)
    assert len(line) == 600
    assert line.startswith("flaxtransfer: ")
    (file,) = tmp_path.iterdir()
    assert line.endswith(f" ... (all of it in {file})")
    assert name in file.read_text()


def test_a_long_message_is_cut_where_there_is_no_room_for_the_whole(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert run(["convert", "x" * 900, "x.safetensors"]) == 2
    line = only_line(capsys)
    assert (len(line), line[-4:]) == (600, " ...")


def test_a_full_disk_is_named_before_and_while_something_is_written(
    weights, tmp_path, capsys, monkeypatch
):
    target = tmp_path / "new.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: (10**9, 10**9, 3))
        assert run(["convert", str(weights), str(target)]) == 2
        line = only_line(capsys)
        assert f"{target} needs {weights.stat().st_size:,} bytes, and 3 are free in" in line
        assert "make room" in line

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert run(["convert", str(weights), str(target)]) == 2
    assert only_line(capsys) == (
        f"flaxtransfer: {target}: No space left on device; make room there, or name another place"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["plan", "--out", "p.yaml"], "p.yaml"),
        (["convert", "builtin", "x.onnx"], "x.onnx"),
        (["train", "--run", "r", "--cache-dir", "c"], "r or c"),
        (["diagnose", "--run", "r", "--target", "folder:x"], "r"),
        (["evaluate", "r"], "the disk"),
    ],
)
def test_an_error_of_a_full_disk_without_a_name_says_where_it_was(
    words, place, capsys, tmp_path, monkeypatch
):
    def full(options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_execute", full)
    assert run(words) == 2
    assert only_line(capsys).startswith(f"flaxtransfer: {place}: No space left on device; make ro")


def test_a_place_that_may_not_be_written_is_said(tmp_path, capsys, monkeypatch):
    def refuse(**settings):
        raise PermissionError(13, "Permission denied", settings["dir"])

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert run(["plan", "--out", str(tmp_path / "p.yaml")]) == 2
    assert f"nothing can be written in {tmp_path} (Permission denied)" in only_line(capsys)


def test_a_report_does_not_replace_a_folder_of_other_files(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("not a report")
    words = ["diagnose", "--run", "nowhere", "--target", "folder:x", "--out", str(tmp_path)]
    assert run(words) == 2
    assert "--out must be a new folder, or that of an earlier report" in only_line(capsys)
    assert (tmp_path / "mine.txt").read_text() == "not a report"


def test_a_group_under_a_new_head_has_no_rate_to_find(folder, weights, capsys):
    data = ["--data", f"folder:{folder}", "--weights", str(weights)]
    assert run(["find-rate", *data, "--strategy", "l2_sp", "--group", "backbone"]) == 2
    assert "train the head first" in only_line(capsys)


def test_errors_in_a_folder_of_images_are_named(weights, tmp_path, capsys):
    images = tmp_path / "images"
    for name in ("a", "b"):
        (images / name).mkdir(parents=True)
        for number in range(7):
            Image.new("RGB", (SIZE, SIZE)).save(images / name / f"{number}.png")
    for number in range(1, 5):  # more than are held back for testing, so that training meets one
        (images / f"a/{number}.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    few = ("--labels-per-class", 2, "--strategy", "feature_extraction", "--steps", 2)
    arguments = train(images, weights, tmp_path / "run", *few)
    assert run(arguments) == 2
    assert ".png: not a readable PNG image" in only_line(capsys)
    # The run folder of the failed attempt holds no checkpoint, and may be used again.
    assert run([*arguments, "--skip-corrupt"]) == 0
    assert "4 unreadable images" in capsys.readouterr().out


def test_a_run_folder_that_cannot_be_made_is_said(folder, weights, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert run(train(folder, weights, tmp_path / "file/run")) == 2
    assert "file" in only_line(capsys)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_loss_that_is_not_finite_stops_with_step_and_checkpoint(
    folder, weights, tmp_path, capsys
):
    steps = ("--head-steps", 4, "--fine-tune-steps", 20)
    rate = ("--learning-rate", 1e30, "--weight-decay", 0)
    run_folder = tmp_path / "run"
    assert run(train(folder, weights, run_folder, "--labels-per-class", 4, *steps, *rate)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"(nan|inf) at step \d+ \(fine-tune\)", line), line
    assert "the checkpoint of step" in line
    assert run(["predict", str(tmp_path / "run"), str(folder / "dark/0.png")]) == 2


def test_no_space_is_one_line_and_the_run_goes_on_once_there_is(folder, weights, tmp_path, capsys):
    """A limit on the size of files stands for the full disk; the same call fails alike.

    It is above the size of a compiled program, which would be damaged in the cache for all others.
    """
    program = (
        "import resource; from flaxtransfer.__main__ import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); main()"
    )
    target = tmp_path / "run"
    few = ("--labels-per-class", 4, "--batch-size", 8, "--strategy", "full_fine_tuning")
    arguments = train(folder, weights, target, *few, "--steps", 2, "--resume")
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(r"step \d+ was not written \(file too large\)", last), done.stderr
    assert "Traceback" not in done.stderr
    assert not (target / "model.safetensors").exists()
    assert run(arguments) == 0
    assert (target / "model.safetensors").exists()


def test_head_keep_with_another_class_count_says_so(folder, weights, tmp_path, capsys):
    assert run(train(folder, weights, tmp_path / "run", "--head", "keep")) == 2
    line = only_line(capsys)
    assert "5" in line
    assert "2" in line


def test_a_folder_of_another_run_is_refused(finished, folder, weights, capsys):
    assert run(train(folder, weights, finished, "--seed", 3, "--resume")) == 2
    assert "seed is 0 there and 3 here" in only_line(capsys)


def test_an_unfinished_run_cannot_predict(tmp_path, folder, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    assert run(["predict", str(tmp_path / "run"), str(folder / "dark/0.png")]) == 2
    assert "has not finished" in only_line(capsys)


def test_a_cache_out_of_range_is_one_line(capsys):
    assert run(["train", "--cache-views", "0", "--cache-disk-gb", "-1"]) == 2
    assert "--cache-views must be >= 1, got 0; --cache-disk-gb must be >= 0, got -1.0" in only_line(
        capsys
    )
