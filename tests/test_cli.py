"""What a person meets at the terminal: outputs, one-line errors, exit codes."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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

SIZE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two classes of small images that brightness tells apart."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name, level in (("dark", 30), ("bright", 200)):
        (root / name).mkdir()
        for number in range(8):
            pixels = random.integers(level - 30, level + 30, (SIZE, SIZE, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A tiny checkpoint in the format of torchvision."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    config = ft.ResNetConfig(depths=(1, 1, 1, 1), width=8, classes=5)
    model = ft.resnet(config)
    import jax

    variables = jax.tree.map(np.asarray, model.init(jax.random.key(0), (SIZE, SIZE, 3)))
    preprocessing = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, SIZE, SIZE)
    ft.save(path, ft.Checkpoint(variables, config, preprocessing))
    return path


@pytest.fixture(scope="module")
def finished(folder, weights, tmp_path_factory) -> Path:
    """A finished run on the folder."""
    target = tmp_path_factory.mktemp("runs") / "run"
    arguments = [
        "train", "--data", f"folder:{folder}", "--weights", str(weights), "--run", str(target),
        "--labels-per-class", "4", "--batch-size", "8", "--head-steps", "20",
        "--fine-tune-steps", "4", "--compare", "no",
    ]  # fmt: skip
    assert run(arguments) == 0
    return target


def only_line(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_train_ends_with_the_test_accuracy_and_leaves_everything(finished, capsys):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["train_images"] == 8
    assert summary["test_images"] == 8
    assert {path.name for path in finished.iterdir()} >= {
        "config.json", "metrics.jsonl", "checkpoints", "audit.json", "model.safetensors",
        "environment.json", "result.json", "summary.json",
    }  # fmt: skip
    assert all(audit["moved"] == [] for audit in json.loads((finished / "audit.json").read_text()))


def test_evaluate_repeats_what_training_reported(finished, capsys):
    assert run(["evaluate", str(finished)]) == 0
    result = json.loads(capsys.readouterr().out)
    trained = json.loads((finished / "summary.json").read_text())["results"][0]
    assert result["accuracy"] == trained["accuracy"]
    assert result["examples"] == 8


def test_predict_writes_json_lines_and_csv(finished, folder, capsys):
    images = [str(folder / "dark/0.png"), str(folder / "bright/0.png")]
    assert run(["predict", str(finished), *images, "--top", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == images
    assert all(set(row["top"]) == {"dark", "bright"} for row in rows)
    assert all(abs(sum(row["top"].values()) - 1) < 1e-5 for row in rows)
    assert run(["predict", str(finished), *images, "--format", "csv"]) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["label"] for row in table] == [row["label"] for row in rows]


def test_predictions_do_not_depend_on_the_batch(finished, folder, capsys):
    images = sorted(str(path) for path in folder.rglob("*.png"))
    outputs = []
    for size in ("3", "64"):
        assert run(["predict", str(finished), *images, "--batch-size", size]) == 0
        outputs.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert len(outputs[0]) == len(images)
    for one, other in zip(*outputs, strict=True):
        assert one["label"] == other["label"]
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)


def test_convert_round_trips(weights, tmp_path):
    target = tmp_path / "half.safetensors"
    assert run(["convert", str(weights), str(target), "--dtype", "float16"]) == 0
    loaded, original = ft.load(target), ft.load(weights)
    assert loaded.preprocessing == original.preprocessing
    kernel = original.variables["params"]["conv1"]["kernel"]
    np.testing.assert_array_equal(
        loaded.variables["params"]["conv1"]["kernel"], kernel.astype(np.float16)
    )


def test_params_prints_the_table_without_allocating_a_network(capsys):
    arguments = [
        "params", "--model", "resnet152", "--rules", "new=head()",
        "late=stage(4) - batch_norm()", "frozen=rest()", "--rates", "new=1e-3", "late=1e-4",
    ]  # fmt: skip
    assert run(arguments) == 0
    output = capsys.readouterr().out
    # torchvision documents 60,192,808 parameters for ResNet-152 with 1000 classes.
    assert "60,192,808" in output
    assert "layer4/0/conv1/kernel" in output


ERRORS = [
    (["train", "--data", "digit"], "unknown data source 'digit'; did you mean 'digits'?"),
    (["train", "--weights", "nowhere.safetensors"], "nowhere.safetensors"),
    (["train", "--model", "resnet50"], "holds resnet18w32"),
    (["train", "--data", "folder:nowhere"], "nowhere"),
    (["train", "--batch-size", "0"], "--batch-size must be positive, not 0"),
    (["train", "--data", "tfds:no_such_set"], "no_such_set"),
    (["train", "--labels-per-class", "500"], "class"),
    (["train", "--strategy", "surgicl"], "no strategy 'surgicl'; did you mean 'surgical'?"),
    (["train", "--strategy", "nowhere.yaml"], "there is no plan nowhere.yaml"),
    (["train", "--strategy", "l2_sp", "--head-steps", "5"], "l2_sp takes no --head-steps"),
    (["train", "--patience", "2"], "patience needs a validation set"),
    (["plan", "--strategy", "unfreezing"], "did you mean 'progressive_unfreezing'?"),
    (["plan", "--model", "resnet5"], "unknown model 'resnet5'"),
    (["predict", "nowhere", "image.png"], "no such image: image.png"),
    (["evaluate", "nowhere"], "nowhere is not a run folder"),
    (["params", "--model", "resnet5"], "unknown model 'resnet5'; did you mean 'resnet50'"),
    (["params", "--rules", "a=heat()"], "head"),
    (["params", "--rules", "a=head()", "--rates", "a=1"], "conv1/kernel"),
    (["params", "--rates", "hed=1"], "'hed'; did you mean 'head'?"),
    (["models", "*resent50*"], "no architecture is called '*resent50*'; did you mean 'resnet50'"),
    (["models", "resnet[50"], "never closes a '['"),
    (["models", "--size", "0"], "--size is a positive number of px, not 0"),
    (["find-rate", "--group", "hed"], "no group 'hed' with a learning rate; did you mean 'head'?"),
    (["find-rate", "--group", "head", "--each-group"], "give one of the two options"),
    (["find-rate", "--phase", "finetune"], "no phase 'finetune'; did you mean 'fine-tune'?"),
    (["find-rate", "--out", "rates.txt"], "rates.txt is no picture; its name has to end in .png"),
    (["find-rate", "--out", "no/rates.png"], "there is no folder no for rates.png"),
    (["find-rate", "--lowest", "1", "--steps", "2"], "not from 1.0 to 1.0; steps is 2"),
    (["find-rate", "--strategy", "l2_sp", "--group", "backbone"], "train the head first"),
    (["convert", "nowhere.pth", "x.safetensors"], "nowhere.pth"),
]


@pytest.mark.parametrize(("arguments", "text"), ERRORS, ids=[" ".join(a) for a, _ in ERRORS])
def test_errors_are_one_line_with_exit_code_2(arguments, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    assert text in only_line(capsys)
    assert list(tmp_path.iterdir()) == []  # nothing half-made


def test_errors_in_a_folder_of_images_are_named(weights, tmp_path, capsys):
    images = tmp_path / "images"
    for name in ("a", "b"):
        (images / name).mkdir(parents=True)
        for number in range(7):
            Image.new("RGB", (SIZE, SIZE)).save(images / name / f"{number}.png")
    for number in range(1, 5):  # more than are held back for testing, so that training meets one
        (images / f"a/{number}.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    train = ["train", "--data", f"folder:{images}", "--weights", str(weights), "--run",
             str(tmp_path / "run"), "--labels-per-class", "2", "--head-steps", "2",
             "--fine-tune-steps", "0", "--compare", "no"]  # fmt: skip
    assert run(train) == 2
    assert ".png: not an image" in only_line(capsys)
    # The run folder of the failed attempt holds no checkpoint, and may be used again.
    assert run([*train, "--skip-corrupt"]) == 0
    assert "4 unreadable images" in capsys.readouterr().out


def test_a_strategy_is_printed_edited_and_run(folder, weights, tmp_path, capsys):
    """Progressive unfreezing by way of a file: the decisions are printed, and in the metrics."""
    path = tmp_path / "plan.yaml"
    command = ["plan", "--strategy", "progressive_unfreezing", "--out", str(path)]
    assert run(command) == 0
    assert "Ends after a phase without better validation" in capsys.readouterr().out
    path.write_text(path.read_text().replace("steps: 100", "steps: 4"))
    target = tmp_path / "run"
    train = ["train", "--data", f"folder:{folder}", "--weights", str(weights), "--run", str(target),
             "--labels-per-class", "4", "--val-per-class", "2", "--batch-size", "4",
             "--compare", "no", "--strategy", str(path)]  # fmt: skip
    assert run(train) == 0
    output = " ".join(capsys.readouterr().out.split())
    kept = np.load(target / "validation.npz")
    result = json.loads((target / "result.json").read_text())["validation"]
    assert result["examples"] == len(kept["labels"]) == 4
    assert result["accuracy"] == np.mean(kept["logits"].argmax(1) == kept["labels"])
    rows = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]
    decisions = [row for row in rows if row["kind"] == "decision"]
    assert decisions[0]["phase"] == "head"
    for decision in decisions[1:]:
        verdict = "kept" if decision["kept"] else "undone"
        assert f"phase '{decision['phase']}' is {verdict}" in output
    assert run([*train, "--learning-rate", "1"]) == 2
    assert "edit the file instead" in only_line(capsys)
    path.write_text(path.read_text().replace("steps: 4", "steps: 5"))
    assert run([*train, "--resume"]) == 2
    assert "belongs to another run: plan is" in only_line(capsys)


@pytest.mark.slow
def test_rates_of_a_later_phase_are_printed_and_drawn(folder, weights, tmp_path, capsys):
    """Each group of it, from the network that the phase before it leaves; no run remains."""
    arguments = [
        "find-rate", "--data", f"folder:{folder}", "--weights", str(weights), "--batch-size", "8",
        "--phase", "fine-tune", "--each-group", "--steps", "12", "--lowest", "1e-4",
        "--out", str(tmp_path / "rates.png"),
    ]  # fmt: skip
    assert run(arguments) == 0
    output = capsys.readouterr().out
    for name in ("head", "backbone"):
        assert re.search(rf"│ {name} +│ +3.0e-04 │ .*1e-04", output), output
    assert [path.name for path in tmp_path.iterdir()] == ["rates.png"]
    with Image.open(tmp_path / "rates.png") as picture:
        assert picture.size[0] > 1000


def test_a_run_folder_that_cannot_be_made_is_said(folder, weights, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    arguments = ["train", "--data", f"folder:{folder}", "--weights", str(weights), "--run",
                 str(tmp_path / "file/run")]  # fmt: skip
    assert run(arguments) == 2
    assert "file" in only_line(capsys)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_loss_that_is_not_finite_stops_with_step_and_checkpoint(
    folder, weights, tmp_path, capsys
):
    arguments = ["train", "--data", f"folder:{folder}", "--weights", str(weights), "--run",
                 str(tmp_path / "run"), "--labels-per-class", "4", "--head-steps", "4",
                 "--fine-tune-steps", "20", "--learning-rate", "1e30",
                 "--weight-decay", "0"]  # fmt: skip
    assert run(arguments) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"(nan|inf) at step \d+ \(fine-tune\)", line), line
    assert "the checkpoint of step" in line
    assert run(["predict", str(tmp_path / "run"), str(folder / "dark/0.png")]) == 2


def test_no_space_is_one_line_and_the_run_goes_on_once_there_is(folder, weights, tmp_path, capsys):
    """A limit on the size of files stands for the full disk; the same call fails alike."""
    program = (
        "import resource; from flaxtransfer.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); main()"
    )
    target = tmp_path / "run"
    arguments = ["train", "--data", f"folder:{folder}", "--weights", str(weights), "--run",
                 str(target), "--labels-per-class", "4", "--batch-size", "8", "--head-steps", "2",
                 "--fine-tune-steps", "2", "--compare", "no", "--resume"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(r"step \d+ was not written \(file too large\)", last), done.stderr
    assert "Traceback" not in done.stderr
    assert not (target / "model.safetensors").exists()
    assert run(arguments) == 0
    assert (target / "model.safetensors").exists()


def test_head_keep_with_another_class_count_says_so(folder, weights, tmp_path, capsys):
    arguments = ["train", "--data", f"folder:{folder}", "--weights", str(weights), "--run",
                 str(tmp_path / "run"), "--head", "keep"]  # fmt: skip
    assert run(arguments) == 2
    line = only_line(capsys)
    assert "5" in line
    assert "2" in line


def test_a_folder_of_another_run_is_refused(finished, folder, weights, capsys):
    arguments = ["train", "--data", f"folder:{folder}", "--weights", str(weights), "--run",
                 str(finished), "--seed", "3", "--resume"]  # fmt: skip
    assert run(arguments) == 2
    assert "seed is 0 there and 3 here" in only_line(capsys)


def test_an_unfinished_run_cannot_predict(tmp_path, folder, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    assert run(["predict", str(tmp_path / "run"), str(folder / "dark/0.png")]) == 2
    assert "has not finished" in only_line(capsys)


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
    assert list(every) == list(ft.ARCHITECTURES)
    assert every["resnet50"] == ["25.56", "4.089", "2048"]
    assert f"{len(every)} of {len(every)} names" in notes
    found, _ = models_shown(capsys, "se*50*", "--sort", "macs")
    assert set(found) == {n for n in ft.ARCHITECTURES if n.startswith("se") and "50" in n}
    numbers = [float(cells[1]) for cells in found.values()]
    assert numbers == sorted(numbers)
    named, _ = models_shown(capsys, "resnet1", "--sort", "name")
    names = [name for name in named if re.fullmatch(r"resnet\d+", name)]
    assert names == ["resnet18", "resnet101", "resnet152"]
    small, _ = models_shown(capsys, "resnet50d", "--sort", "parameters", "--size", "448")
    assert set(small) == {name for name in ft.ARCHITECTURES if "resnet50d" in name}
    assert float(small["resnet50d"][1]) == pytest.approx(4 * 4.329, rel=1e-3)


def test_models_says_which_no_images_of_a_size_fit(capsys):
    found, notes = models_shown(capsys, "resnet*50", "--size", "200")
    assert {name for name, cells in found.items() if cells[1] == "–"} == {"resnetaa50"}
    assert "images of 200 px do not fit resnetaa50" in notes


def test_probe_prints_a_row_a_segment_and_draws_them(folder, weights, tmp_path, capsys):
    picture = tmp_path / "probe.png"
    arguments = ["probe", "--data", f"folder:{folder}", "--weights", str(weights), "--out",
                 str(picture)]  # fmt: skip
    assert run(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split()[0] for line in lines]
    assert rows[rows.index("segment") + 1 :][:5] == ["stem", *(f"layer{n}" for n in (1, 2, 3, 4))]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run([*arguments[:-1], str(tmp_path / "probe.txt")]) == 2
    assert "txt" in only_line(capsys)


def test_train_says_what_frozen_features_reach_and_what_it_caches(
    folder, weights, tmp_path, capsys
):
    arguments = ["train", "--data", f"folder:{folder}", "--weights", str(weights), "--compare",
                 "no", "--strategy", "feature_extraction", "--steps", "9", "--batch-size", "8",
                 "--cache-views", "1"]  # fmt: skip
    assert run([*arguments, "--run", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr()
    assert "heads on the frozen features of" in shown.out
    assert "each held out once: ridge" in shown.out
    assert "before head, 64 numbers each, are cached in memory as float32" in shown.err
    assert "cache before head:" in shown.err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert 0 <= summary["baseline"]["ridge"] <= 1
    shared = tmp_path / "shared"
    again = [*arguments, "--cache", "disk", "--cache-dir", str(shared), "--run"]
    for name, state in (("a", "made in"), ("b", "found in")):
        assert run([*again, str(tmp_path / name)]) == 0
        assert state in capsys.readouterr().err


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
    arguments = ["train", "--data", f"folder:{folder}", "--weights", str(weights), "--compare",
                 "no", "--strategy", strategy, "--steps", "2", "--batch-size", "8", "--run",
                 str(tmp_path / "run")]  # fmt: skip
    assert run(arguments) == 0
    shown = capsys.readouterr().out
    assert "measured with logistic regression on" in shown
    assert column in shown
    assert shown.index(column) < shown.index("peak rate")


def test_a_plan_that_has_to_be_measured(capsys):
    assert run(["plan", "--strategy", "curvature_scaled"]) == 2
    assert "measures curvature and examples on the images first" in only_line(capsys)


def test_a_cache_out_of_range_is_one_line(capsys):
    assert run(["train", "--cache-views", "0", "--cache-disk-gb", "-1"]) == 2
    assert "views is 1 or more, not 0; disk is a number of bytes" in only_line(capsys)


@pytest.mark.slow
def test_import_costs_at_most_half_more_than_jax_flax_and_optax():
    def seconds(statement: str) -> float:
        code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
        times = [
            float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                 check=True).stdout) for _ in range(5)
        ]  # fmt: skip
        return min(times)

    assert seconds("import flaxtransfer") <= 1.5 * seconds("import jax, flax, optax")


def test_import_loads_no_heavy_room():
    code = textwrap.dedent("""
        import sys, flaxtransfer
        heavy = ("orbax", "grain", "tensorflow_datasets", "sklearn", "scipy", "matplotlib", "PIL",
                 "flax", "torch", "tensorflow")
        print([name for name in heavy if name in sys.modules])
    """)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
