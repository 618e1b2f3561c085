"""Claims about sweeps: each line has a folder, what is done stays done, and Ray does the same."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SWEEP = ROOT / "experiments/launch/sweep.py"
RAY_JOB = ROOT / "experiments/launch/ray_job.py"
JOB = ROOT / "tests/support/run_processes.py"

STEP = """
import pathlib, sys, time
folder, seconds, code = pathlib.Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
folder.mkdir(exist_ok=True)
with (folder / "starts").open("a") as starts:
    starts.write("x")
while seconds < 0 and not (folder.parent / "go").exists():
    time.sleep(0.05)
time.sleep(max(seconds, 0))
sys.exit(code)
"""


def write(path: Path, *lines: list[str]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def line(seconds: float = 0, code: int = 0, name: str = "") -> list[str]:
    """A run that writes down that it was started; it waits for a file if ``seconds`` < 0."""
    return [sys.executable, "-c", STEP, "{run}", str(seconds), str(code), name]


def sweep(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SWEEP), str(path), *words], capture_output=True, text=True, check=False
    )


def begun(path: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, str(SWEEP), str(path), *words], text=True)


def starts(path: Path) -> list[int]:
    """How often each line was started that was started at all."""
    return sorted(len(found.read_text()) for found in path.with_suffix("").glob("*/starts"))


def wait_for(condition, most: float = 60) -> None:
    end = time.monotonic() + most
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


def test_what_is_done_stays_done_and_what_failed_is_tried_again(tmp_path):
    path = write(tmp_path / "all.jsonl", line(name="a"), line(code=3), line(name="b"))
    first = sweep(path, "--workers", "2")
    assert first.returncode == 1
    assert "3 lines, 0 of them done before" in first.stdout
    assert "line 1 has ended with code 3" in first.stdout
    assert starts(path) == [1, 1, 1]
    second = sweep(path)
    assert "3 lines, 2 of them done before" in second.stdout
    assert starts(path) == [1, 1, 2]


def test_one_line_of_an_array(tmp_path):
    path = write(tmp_path / "all.jsonl", line(name="a"), line(name="b"))
    assert sweep(path, "--index", "1").returncode == 0
    assert starts(path) == [1]
    assert sweep(path, "--index", "1").returncode == 0
    assert starts(path) == [1]
    refused = sweep(path, "--index", "2")
    assert refused.returncode == 2
    assert "--index must be in 0 .. 1, got 2" in refused.stderr


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_sweep_that_was_stopped_goes_on_with_what_is_not_done(tmp_path, how):
    path = write(tmp_path / "all.jsonl", line(name="a"), line(seconds=-1), line(name="b"))
    process = begun(path)
    wait_for(lambda: len(starts(path)) == 2)
    process.send_signal(how)
    # SIGTERM ends what runs too; a killed sweep leaves it to end by itself.
    assert process.wait() == (143 if how == signal.SIGTERM else -9)
    assert len(starts(path)) == 2
    (tmp_path / "all/go").touch()
    wait_for(lambda: sweep(path).returncode == 0)
    assert starts(path) == [1, 1, 2]


def test_two_sweeps_never_run_one_line_at_once(tmp_path):
    path = write(tmp_path / "all.jsonl", line(seconds=-1))
    process = begun(path)
    wait_for(lambda: starts(path) == [1])
    other = sweep(path)
    (tmp_path / "all/go").touch()
    assert process.wait() == 0
    assert "line 0 is run by another process" in other.stderr
    assert starts(path) == [1]


def test_training_gets_its_folder_and_goes_on(tmp_path):
    spec = importlib.util.spec_from_file_location("sweep", SWEEP)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    train = ["flaxtransfer", "train", "--seed", "1"]
    path = write(tmp_path / "all.jsonl", train, [*train, "--run", "{run}/x", "--resume"])
    one, other = module.read_lines(path)
    assert one.folder.parent == tmp_path / "all"
    assert one.words == (*train, "--run", str(one.folder), "--resume")
    assert other.words == (*train, "--run", f"{other.folder}/x", "--resume")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('["a"\n', "line 0 must be a JSON list of words, got '[\"a\"'"),
        ('{"a": 1}\n', "line 0 must be a JSON list of words"),
        ('["a", 1]\n', "line 0 must be a JSON list of words"),
        ('["a"]\n["b"]\n["a"]\n', "line 2 is line 0 again"),
        ("\n", "there is no line"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(tmp_path, text, said):
    path = tmp_path / "wrong.jsonl"
    path.write_text(text)
    done = sweep(path)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def on_ray(script: Path, *words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """On a cluster of this machine, which Ray starts for the program."""
    return subprocess.run(
        [sys.executable, str(script), *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={
            **os.environ,
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        },
        timeout=900,
    )


@pytest.mark.slow
def test_two_workers_of_ray_train_what_one_process_trains(tmp_path):
    pytest.importorskip("ray")
    results = {}
    for name in ("ray", "alone"):
        folder = tmp_path / name
        folder.mkdir()
        command = [sys.executable, str(JOB), str(folder), "{}"]
        if name == "ray":
            done = on_ray(RAY_JOB, "2", "--devices", "4", "--", *command, folder=tmp_path)
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            environment = {**os.environ, "FT_PROCESSES": "1", "JAX_PLATFORMS": "cpu"}
            subprocess.run(command, check=True, env=environment)
        results[name] = dict(np.load(folder / "out-0.npz"))
    assert results["ray"].keys() == results["alone"].keys()
    numbers = {name: value for name, value in results["alone"].items() if value.dtype.kind == "f"}
    assert len(numbers) > 10
    for name, value in numbers.items():
        np.testing.assert_allclose(results["ray"][name], value, atol=2e-6, err_msg=name)


@pytest.mark.slow
def test_a_worker_that_fails_is_an_error_and_no_hang(tmp_path):
    pytest.importorskip("ray")
    program = (
        "import os, sys, time\n"
        "if os.environ['FT_PROCESS'] == '1': sys.exit('on purpose')\n"
        "time.sleep(600)\n"
    )
    done = on_ray(RAY_JOB, "2", "--", sys.executable, "-c", program, folder=tmp_path)
    assert done.returncode == 1
    assert "on purpose" in done.stderr


@pytest.mark.slow
def test_lines_are_tasks_and_trials_of_ray(tmp_path):
    pytest.importorskip("ray")
    path = write(tmp_path / "tasks.jsonl", line(name="a"), line(code=3), line(name="b"))
    done = on_ray(SWEEP, str(path), "--ray", folder=tmp_path)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "line 1 has ended with code 3" in done.stdout
    assert starts(path) == [1, 1, 1]
    curve = (
        "import json, pathlib, sys, time\n"
        "folder, best = pathlib.Path(sys.argv[1]), float(sys.argv[2])\n"
        "folder.mkdir(exist_ok=True)\n"
        "for step in range(1, 41):\n"
        "    row = {'kind': 'validation', 'step': step, 'accuracy': best * step / 40}\n"
        "    with (folder / 'metrics.jsonl').open('a') as rows:\n"
        "        rows.write(json.dumps(row) + '\\n')\n"
        "    time.sleep(1)\n"
    )
    values = ("0.9", "0.8", "0.2", "0.1")
    lines = [[sys.executable, "-c", curve, "{run}", value] for value in values]
    path = write(tmp_path / "trials.jsonl", *lines)
    done = on_ray(SWEEP, str(path), "--asha", "accuracy", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    # The best is never stopped, and of what lags behind something is.
    assert "was stopped at step" in done.stdout
    assert "line 0 was stopped" not in done.stdout
