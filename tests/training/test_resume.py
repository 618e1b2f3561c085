"""Killed anywhere and resumed equals never killed, bit for bit; damage and second writers."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import flaxtransfer as ft
from flaxtransfer.files import folder_lock
from flaxtransfer.paths import flatten
from flaxtransfer.training.console import read_metrics
from flaxtransfer.training.run_folder import digest
from tests.support.small import feed, network, two_phases

ROOT = Path(__file__).parents[2]


def launch(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/support/run_small.py"), str(folder), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def final_digests(folder: Path) -> dict[str, str]:
    variables = ft.load(folder / "model.safetensors").variables
    return {path: digest(leaf) for path, leaf in flatten(variables).items()}


def kill_and_resume(
    folder: Path, kills: int, seed: int, plan: str = "two_phases", latest: float = 4.0
) -> None:
    """Kills the run ``kills`` times at random moments, then lets it finish."""
    moments = random.Random(seed)
    for _ in range(kills):
        process = launch(folder, plan)
        time.sleep(moments.uniform(0.3, latest))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    let_finish(folder, plan)


def let_finish(folder: Path, plan: str) -> None:
    process = launch(folder, plan)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert output == "finished\n"


def check_kills(tmp_path: Path, kills: int, plan: str = "two_phases", latest: float = 4.0) -> None:
    kill_and_resume(tmp_path / "straight", 0, 0, plan)
    kill_and_resume(tmp_path / "killed", kills, 7, plan, latest)
    assert_same_runs(tmp_path / "killed", tmp_path / "straight")


def assert_same_runs(one: Path, other: Path) -> None:
    """Parameters, every line of metrics, decisions among them, audits and result."""
    assert final_digests(one) == final_digests(other)
    assert read_metrics(one) == read_metrics(other)
    for name in ("audit.json", "result.json"):
        assert (one / name).read_text() == (other / name).read_text()


@pytest.mark.slow
def test_killed_twice_and_resumed_equals_undisturbed(tmp_path):
    check_kills(tmp_path, 2, "short", latest=2.0)


@pytest.mark.slow
def test_killed_ten_times_and_resumed_equals_undisturbed(tmp_path):
    check_kills(tmp_path, 10)


# In this order: last save of a phase, return to the best, decision, new optimizer, first save of
# the next. Between two deaths at one place lies a phase, so that each hits another transition.
TRANSITIONS = (
    "_run_phase:1",
    "_best:1",
    "_decide:1",
    "advance:1",
    "_save:1",
    "_decide:2",
    "_best:2",
)


@pytest.mark.slow
@pytest.mark.parametrize("moments", [TRANSITIONS[1:2], TRANSITIONS], ids=len)
def test_killed_between_phases_and_resumed_equals_undisturbed(tmp_path, moments):
    """From one phase to the next, where phases are kept and where they are undone."""
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    let_finish(straight, "progressive")
    decisions = [row for row in read_metrics(straight) if row["kind"] == "decision"]
    assert len(decisions) == 6
    assert {row["kept"] for row in decisions[1:]} == {True, False}
    for moment in moments:
        process = launch(killed, "progressive", moment)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL
        assert "finished" not in output
    let_finish(killed, "progressive")
    assert_same_runs(killed, straight)


@pytest.mark.slow
def test_unfreezing_killed_ten_times_equals_undisturbed(tmp_path):
    check_kills(tmp_path, 10, "progressive")


def run_some(folder: Path, steps: int = 6):
    model, variables = network()
    options = ft.FitOptions(evaluate_every=2)
    plan = two_phases(variables["params"], steps=steps)
    return ft.fit(
        ft.Classifier(model, variables, feed(validation=False).preprocessing),
        plan,
        feed(validation=False),
        folder,
        resume=True,
        options=options,
    )


def flip_bit(folder: Path, seed: int) -> None:
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(files[-1].read_bytes())
    # The middle of the largest file: array data, not its index.
    place = len(data) // 2 + random.Random(seed).randrange(len(data) // 8)
    data[place] ^= 1 << (seed % 8)
    files[-1].write_bytes(data)


@pytest.mark.parametrize("damage", ["flipped bit", "truncated file", "half-written step"])
def test_a_damaged_newest_step_is_named_and_the_one_before_is_used(tmp_path, damage):
    straight = run_some(tmp_path / "straight")
    run_some(tmp_path / "run")
    steps = tmp_path / "run/checkpoints"
    newest = max((p for p in steps.iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))
    if damage == "flipped bit":
        flip_bit(newest, seed=3)
    elif damage == "truncated file":
        largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
    else:
        newest.rename(newest.with_name(f"{newest.name}.orbax-checkpoint-tmp"))
    again = run_some(tmp_path / "run")
    if damage != "half-written step":  # which never became a step, so that there is none to name
        assert any(f"checkpoint of step {newest.name} is damaged" in note for note in again.notes)
    assert {p: digest(leaf) for p, leaf in flatten(again.variables).items()} == {
        p: digest(leaf) for p, leaf in flatten(straight.variables).items()
    }


def test_a_second_writer_is_refused(tmp_path):
    with folder_lock(tmp_path / "run"), pytest.raises(ValueError, match=f"process {os.getpid()}"):
        run_some(tmp_path / "run")


@pytest.mark.slow
def test_bits_do_not_depend_on_process_or_compilation_cache(tmp_path, monkeypatch):
    """README and ``result.json`` say so; a fresh process compiles everything, the other nothing."""
    let_finish(tmp_path / "warm", "short")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    let_finish(tmp_path / "cold", "short")
    assert_same_runs(tmp_path / "warm", tmp_path / "cold")
    kept = json.loads((tmp_path / "cold/result.json").read_text())
    assert "compilation cache full or empty" in kept["determinism"]["same bits"]
    assert kept["environment"]["cores"] >= 1
