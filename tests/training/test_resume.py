"""Killed anywhere and resumed equals never killed, bit for bit; damage and second writers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import feed, network, two_phases

import flaxtransfer as ft
from flaxtransfer.lock import hold
from flaxtransfer.paths import flatten
from flaxtransfer.training.audit import digest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def launch(folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}"}
    process = subprocess.Popen(
        [sys.executable, str(HERE / "run_small.py"), str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def final_digests(folder: Path) -> dict[str, str]:
    variables = ft.load(folder / "model.safetensors").variables
    return {path: digest(leaf) for path, leaf in flatten(variables).items()}


def kill_and_resume(folder: Path, kills: int, seed: int) -> None:
    """Kills the run ``kills`` times at random moments, then lets it finish."""
    moments = random.Random(seed)
    for _ in range(kills):
        process = launch(folder)
        time.sleep(moments.uniform(0.3, 4.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = launch(folder)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert output == "finished\n"


def check_kills(tmp_path: Path, kills: int) -> None:
    kill_and_resume(tmp_path / "straight", 0, 0)
    kill_and_resume(tmp_path / "killed", kills, seed=7)
    assert final_digests(tmp_path / "killed") == final_digests(tmp_path / "straight")


def test_killed_twice_and_resumed_equals_undisturbed(tmp_path):
    check_kills(tmp_path, 2)


@pytest.mark.slow
def test_killed_ten_times_and_resumed_equals_undisturbed(tmp_path):
    check_kills(tmp_path, 10)


def run_some(folder: Path, steps: int = 6):
    model, variables = network()
    options = ft.Options(evaluate_every=2)
    plan = two_phases(variables["params"], steps=steps)
    return ft.fit(model, variables, plan, feed(validation=False), folder,
                  resume=True, options=options)  # fmt: skip


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
    with hold(tmp_path / "run"), pytest.raises(ValueError, match=f"process {os.getpid()}"):
        run_some(tmp_path / "run")
