"""Claims about several processes: what one process computes, they compute, and they end together.

The reference is one process with one device. Sums over devices are taken in another order there,
which in float32 changes last digits: 1e-6 of parameters after 16 steps.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import flaxtransfer as ft
from flaxtransfer import distributed
from flaxtransfer.training.console import read_metrics

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests/support/run_processes.py"

_spec = importlib.util.spec_from_file_location("local", ROOT / "experiments/launch/local.py")
local = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(local)

EXACT = {"x64": True, "steps": 8}
"""In float64, where nothing is left but the order of sums."""

CACHED = {"cache": "memory", "steps": 8, "every": 4}
"""Head, then all but the stem; what does not move is run once, and cached."""


class Ended(NamedTuple):
    """How processes have ended: exit codes, output, and seconds from the first to the last."""

    codes: list[int]
    said: list[str]
    seconds: float


def run(
    folder: Path,
    job: dict[str, Any],
    count: int = 2,
    devices: int = 4,
    *,
    jobs: list[dict[str, Any]] | None = None,
    launcher: Callable[[int], dict[str, str]] | None = None,
) -> Ended:
    """Runs a job of ``run_processes.py``.

    Args:
        folder: of the run and its results.
        job: of all processes.
        count: processes.
        devices: of each.
        jobs: one for each process instead.
        launcher: variables of each process, in place of our own.
    """
    folder.mkdir(exist_ok=True)
    port = local.free_port()
    processes = []
    for number in range(count):
        own = json.dumps(job if jobs is None else jobs[number])
        environment = local.environment(count, number, port, devices)
        if launcher is not None:
            environment = {k: v for k, v in environment.items() if not k.startswith("FT_")}
            environment |= launcher(number)
        # Files, because a pipe that nobody reads would stop its writer.
        with (
            (folder / f"said-{number}").open("w") as said,
            (folder / f"printed-{number}").open("w") as printed,
        ):
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-W", "error", str(SCRIPT), str(folder), own],
                    cwd=ROOT,
                    env={**environment, "PYTHONPATH": str(ROOT)},
                    stdout=printed,
                    stderr=said,
                )
            )
    try:
        first = None
        deadline = time.monotonic() + 400
        while any(process.poll() is None for process in processes):
            if first is None and any(process.poll() is not None for process in processes):
                first = time.monotonic()
            assert time.monotonic() < deadline, "the processes wait for each other for ever"
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
    seconds = 0.0 if first is None else time.monotonic() - first
    printed, said = (
        [(folder / f"{name}-{number}").read_text() for number in range(count)]
        for name in ("printed", "said")
    )
    assert "Gloo" not in "".join(printed)
    said = list(map("".join, zip(printed, said, strict=True)))
    return Ended([process.wait() for process in processes], said, seconds)


class Fates(NamedTuple):
    """Two processes for each fate, and when they were started."""

    processes: dict[tuple[str, int], list[subprocess.Popen[str]]]
    started: float


@pytest.fixture(scope="module")
def fates():
    """All at once: most of their time is spent waiting."""
    program = [sys.executable, "-W", "error", str(ROOT / "tests/support/run_endings.py")]
    found = {
        (fate, struck): local.start(
            [*program, fate, str(struck)],
            2,
            devices=1,
            PYTHONPATH=os.fspath(ROOT),
        )
        for fate, struck in ENDINGS
    }
    yield Fates(found, time.monotonic())
    for process in (each for pair in found.values() for each in pair):
        process.kill()
        process.stdout.close()


def alone(folder: Path, job: dict[str, Any], devices: int = 1) -> Path:
    ended = run(folder, job, 1, devices)
    assert ended.codes == [0], ended.said
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return alone(tmp_path_factory.mktemp("one"), CACHED)


def out(folder: Path, number: int = 0) -> dict[str, np.ndarray]:
    with np.load(folder / f"out-{number}.npz") as found:
        return dict(found)


def rows(folder: Path) -> list[dict[str, Any]]:
    """Metrics but those of caches, of which a resumed run has one more, with times."""
    return [row for row in read_metrics(folder / "run") if row["kind"] != "cache"]


def assert_same(folder: Path, one: Path, processes: int, *, within: float = 1e-6) -> None:
    """Parameters, predictions in their order, metrics row by row, and the files of the run."""
    for number in range(processes):
        found, expected = out(folder, number), out(one)
        assert found["examples"] == expected["examples"] == 17
        assert str(found["notes"]) == str(expected["notes"])
        np.testing.assert_array_equal(found["labels"], expected["labels"])
        for name in ("logits", "features"):
            np.testing.assert_allclose(found[name], expected[name], atol=10 * within, rtol=1e-5)
        for name in (name for name in expected if "/" in name):
            np.testing.assert_allclose(found[name], expected[name], atol=within, rtol=within)
    for row, expected in zip(rows(folder), rows(one), strict=True):
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            near = isinstance(value, float)
            assert row[name] == (pytest.approx(value, rel=1e-4, abs=1e-5) if near else value)
    names = [sorted(path.name for path in (place / "run").iterdir()) for place in (folder, one)]
    assert names[0] == names[1]
    kept = [ft.load(place / "run/model.safetensors").variables for place in (folder, one)]
    within = max(within, 1e-6)  # The file is float32.
    for found, expected in zip(*map(_leaves, kept), strict=True):
        np.testing.assert_allclose(found, expected, atol=within, rtol=within)


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


ENDINGS = {
    ("SIGKILL", 0): "process 0 of 2 is gone: its connection has ended",
    ("SIGKILL", 1): "process 1 of 2 is gone: its connection has ended",
    ("SIGSTOP", 1): "process 1 of 2 is gone: it has given no sign of life for 6 s",
    ("hang", 1): "process 1 of 2 hangs: the others have waited for it for 4 s (FT_LONGEST_WAIT)",
    ("error", 1): "process 1 of 2 has ended: OSError: [Errno 28] No space left on device: '/full/"
    "disk'",
    ("SIGTERM", 1): "",
}
"""What befalls which of two processes, and what the other one says."""

# One process.


def test_in_one_process_every_function_does_the_plain_thing():
    assert distributed.share() == (0, 1)
    assert distributed.is_first()
    assert not distributed.several()
    same = object()
    assert distributed.from_first(lambda: same) is same
    assert distributed.total(4) == 4
    distributed.check_alike({"seed": 0})
    distributed.finish()
    with pytest.raises(KeyError):
        distributed.from_first(lambda: {}["x"])


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"FT_PROCESSES": "2"}, "must be set together, got no FT_COORDINATOR and no FT_PROCESS"),
        (
            {"FT_COORDINATOR": "a:1", "FT_PROCESSES": "2"},
            "must be set together, got no FT_PROCESS",
        ),
        (
            {"FT_COORDINATOR": "a", "FT_PROCESSES": "2", "FT_PROCESS": "0"},
            "FT_COORDINATOR must be host:port, got 'a'",
        ),
        (
            {"FT_COORDINATOR": "a:1", "FT_PROCESSES": "2", "FT_PROCESS": "2"},
            "FT_PROCESS must be 0 .. FT_PROCESSES - 1, got FT_PROCESS=2 and FT_PROCESSES=2",
        ),
        (
            {"FT_COORDINATOR": "a:1", "FT_PROCESSES": "two", "FT_PROCESS": "0"},
            "got FT_PROCESS=0 and FT_PROCESSES=two",
        ),
        (
            {
                "FT_COORDINATOR": "a:1",
                "FT_PROCESSES": "2",
                "FT_PROCESS": "0",
                "FT_LONGEST_WAIT": "0",
            },
            "FT_LONGEST_WAIT must be seconds above 0, got '0'",
        ),
    ],
)
def test_variables_that_do_not_fit_together_are_refused(variables, said, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        distributed.start()


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("variables", "launched"),
    [
        ({}, False),
        ({**SLURM, "SLURM_NTASKS": "2"}, True),
        ({**SLURM, "SLURM_NTASKS": "1"}, False),
        # In an allocation, but not started by srun.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, False),
        ({"OMPI_MCA_orte_hnp_uri": "1;tcp://h:1", "OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"OMPI_MCA_orte_hnp_uri": "1;tcp://h:1", "OMPI_COMM_WORLD_SIZE": "1"}, False),
        # Without libtpu there is no TPU, whatever else is set.
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False),
    ],
)
def test_jax_is_asked_only_where_a_launcher_has_started_several(variables, launched, monkeypatch):
    for name in [*SLURM, "SLURM_NTASKS"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed._is_launched() is launched


def test_who_is_silent_or_late_is_told_from_the_signs_of_life(monkeypatch):
    """Looks of half a second, by process 0 of three; 20 s of silence, 1800 s of waiting."""
    failed = []
    monkeypatch.setattr(distributed, "_fail", lambda number, what, **more: failed.append(number))
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 3)

    def after(looks: int, sign: Callable[[int, int], str]) -> list[int]:
        failed.clear()
        others = distributed._Others()
        for look in range(looks):
            others.look({f"signs/{number}": sign(number, look) for number in range(3)})
        return sorted(set(failed))

    def silent(number: int, look: int) -> str:
        return f"{0 if number == 1 else look} 7"

    assert (after(40, silent), after(41, silent)) == ([], [1])

    def late(number: int, look: int) -> str:
        return f"{look} {6 if number == 2 else 7}"

    assert (after(3600, late), after(3602, late)) == ([], [2])
    # All at one place are at work; somebody who moves on, slow as it is, is no hang.
    assert after(9000, lambda number, look: f"{look} 7") == []
    assert after(9000, lambda number, look: f"{look} {look // 3000 if number == 2 else 7}") == []


# Two processes.


@pytest.mark.parametrize(("fate", "struck"), ENDINGS, ids=str)
def test_however_one_process_ends_all_end_and_say_why(fates, fate, struck):
    processes = fates.processes[fate, struck]
    other = processes[1 - struck]
    if fate == "SIGSTOP":
        # What is stopped can end only when it goes on.
        other.wait(300)
        processes[struck].send_signal(signal.SIGCONT)
    said = [process.communicate(timeout=300)[0] for process in processes]
    codes = [process.returncode for process in processes]
    if fate == "SIGTERM":
        assert codes == [143, 143], said
        stopped = [[line for line in text.splitlines() if "stopped" in line] for text in said]
        assert stopped[0] == stopped[1] != []
        return
    assert f"flaxtransfer: {ENDINGS[fate, struck]}" in said[1 - struck]
    killed = {"SIGKILL": -signal.SIGKILL}.get(fate, 2)
    assert codes == ([killed, 2] if struck == 0 else [2, killed]), said
    if fate == "hang":
        assert ENDINGS[fate, struck] in said[struck]


def test_two_processes_train_and_evaluate_as_one(reference, tmp_path):
    """On a mesh whose devices belong to the processes in turn; the run folder is process 0's."""
    ended = run(tmp_path / "two", {**CACHED, "mesh": "alternating"})
    assert ended.codes == [0, 0], ended.said
    assert_same(tmp_path / "two", reference, 2)
    for said in ended.said:
        assert "each process must give its own share of the examples, got the same rows" in said
        assert "batches must have `index` in a run over several processes, got image" in said
    notes = json.loads(str(out(reference)["notes"]))
    # The control: both phases count, so that all that was trained is compared.
    assert any("'all but the stem' is kept" in note for note in notes)


@pytest.mark.slow
def test_two_processes_blend_drop_and_accumulate_as_one(tmp_path):
    """Partners, shares and what is dropped belong to the rows of a batch, not to the devices.

    In float64: Adam makes whole steps of gradients that are nothing but rounding.
    """
    settings = {"mixup": 0.4, "cutmix": 1.0, "dropout": 0.3, "stochastic_depth": 0.3}
    job = {"settings": {**settings, "accumulate": 2}, "steps": 4, "every": 4, "x64": True}
    one = alone(tmp_path / "one", job)
    ended = run(tmp_path / "two", {**job, "mesh": "alternating"})
    assert ended.codes == [0, 0], ended.said
    assert_same(tmp_path / "two", one, 2, within=1e-12)


def test_several_processes_keep_no_activations_on_disk(monkeypatch):
    """What is said; one process, the control, keeps them there."""
    from flaxtransfer.training import prefix_cache
    from tests.support.small import PREPROCESSING, SIZE, network, two_phases

    model, variables = network()
    source = ft.ArraySource(np.zeros((6, SIZE, SIZE, 3), np.uint8), [0, 1, 2, 0, 1, 2])
    data = ft.loaders(source, ft.data.Splits.of(range(6)), PREPROCESSING, batch_size=2)
    plan = two_phases(variables["params"], steps=99).resolve(variables["params"], 3)

    def chosen(**changes: Any) -> Any:
        cache = ft.Cache(**changes)
        return prefix_cache.choose(cache, model, variables["params"], plan.phases[0], data)

    assert (chosen(where="disk").where, chosen(memory=1).where) == ("disk", "disk")
    monkeypatch.setattr(prefix_cache, "several", lambda: True)
    assert chosen().where == "memory"
    for changes in ({"where": "disk"}, {"memory": 1}):
        refused = chosen(**changes)
        assert refused.cut is None
        assert "several processes keep none on disk" in refused.text
    assert "more than the budget of 1 bytes in memory;" in refused.text


def test_different_processes_are_refused_by_name(tmp_path):
    jobs = [CACHED, {**CACHED, "seed": 1, "steps": 9, "compute": "bfloat16", "images": 16}]
    ended = run(tmp_path / "two", {}, jobs=jobs)
    assert ended.codes == [2, 2], ended.said
    assert ended.seconds < 60
    for said in ended.said:
        assert "all processes of a run must do the same, got" in said
        assert "seed is 1 in process 1 and 0 in process 0" in said
        assert "steps is 9 in process 1 and 8 in process 0" in said
        assert "compute is 'bfloat16' in process 1 and 'float32' in process 0" in said
        assert "that of the data is " in said
    assert not (tmp_path / "two/run/config.json").exists()


@pytest.mark.slow
def test_different_versions_and_devices_are_refused_by_name(tmp_path):
    jobs = [{"versions": {"jax": "1", "numpy": "2"}}, {"versions": {"jax": "3", "numpy": "2"}}]
    ended = run(tmp_path / "versions", {}, jobs=jobs)
    assert ended.codes == [2, 2], ended.said
    for said in ended.said:
        assert "got versions.jax is '3' in process 1 and '1' in process 0\n" in said

    def uneven(number: int) -> dict[str, str]:
        flags = os.environ.get("XLA_FLAGS", "")
        port = {"FT_COORDINATOR": f"127.0.0.1:{free}", "FT_PROCESSES": "2"}
        devices = f"{flags} --xla_force_host_platform_device_count={2 + 2 * number}"
        return {**port, "FT_PROCESS": str(number), "XLA_FLAGS": devices}

    free = local.free_port()
    ended = run(tmp_path / "devices", {}, launcher=uneven)
    assert ended.codes == [2, 2], ended.said
    for said in ended.said:
        assert "the same number of devices, got 2 in process 0, 4 in process 1\n" in said


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(1, 8), (2, 4)])
def test_devices_and_processes_do_not_matter(reference, tmp_path, count, devices):
    ended = run(tmp_path / "run", CACHED, count, devices)
    assert ended.codes == [0] * count, ended.said
    assert_same(tmp_path / "run", reference, count)


@pytest.fixture(scope="module")
def exact_reference(tmp_path_factory):
    return alone(tmp_path_factory.mktemp("exact"), EXACT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "mesh"), [(1, 8, "plain"), (2, 4, "plain"), (2, 4, "alternating")]
)
def test_in_float64_devices_and_processes_do_not_matter(
    exact_reference, tmp_path, count, devices, mesh
):
    ended = run(tmp_path / "run", {**EXACT, "mesh": mesh}, count, devices)
    assert ended.codes == [0] * count, ended.said
    assert out(tmp_path / "run")["params/fc/kernel"].dtype == np.float64
    assert_same(tmp_path / "run", exact_reference, count, within=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("split_first", [True, False])
def test_large_leaves_are_split_and_joined_across_a_resume(tmp_path, split_first):
    """In two processes; stopped, and then as the other way on eight devices of one."""
    job, split = {**CACHED, "cache": "off"}, {**CACHED, "cache": "off", "above": 1024}
    stopped = {**(split if split_first else job), "signal": ["SIGTERM", 10]}
    ended = run(tmp_path / "run", stopped)
    assert ended.codes == [143, 143], ended.said
    ended = run(tmp_path / "run", job if split_first else split, 1, 8)
    assert ended.codes == [0], ended.said
    assert_same(tmp_path / "run", alone(tmp_path / "one", job), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "within"),
    [
        # The average's statistics are measured at each validation.
        ({"ema": 0.9, "steps": 10, "every": 5}, 1e-5),
        # Measured statistics, and a head that an iteration ends within its tolerance.
        ({"plan": "measured"}, 2e-5),
        ({"mesh": "alternating", "steps": 8}, 1e-6),
        ({"mesh": "alternating", "steps": 8, "above": 1024, "ema": 0.9}, 1e-5),
    ],
    ids=str,
)
def test_every_pass_over_images_is_shared(job, within, tmp_path):
    one = alone(tmp_path / "one", {**job, "mesh": "plain", "above": None})
    ended = run(tmp_path / "two", job)
    assert ended.codes == [0, 0], ended.said
    assert_same(tmp_path / "two", one, 2, within=within)


@pytest.mark.slow
def test_processes_that_slurm_has_started_find_each_other(tmp_path):
    """SLURM's variables as jax reads them; the port follows from the number of the job."""
    job = str(os.getpid())

    def launcher(number: int) -> dict[str, str]:
        own = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
        shared = {"SLURM_JOB_ID": job, "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
        return {**shared, **own}

    ended = run(tmp_path, {"steps": 1}, launcher=launcher)
    assert ended.codes == [0, 0], ended.said
    assert out(tmp_path)["examples"] == out(tmp_path, 1)["examples"] == 17


@pytest.mark.slow
@pytest.mark.parametrize("struck", [0, 1])
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_to_one_stops_all_at_the_same_step(reference, tmp_path, number, struck):
    ended = run(tmp_path / "run", {**CACHED, "signal": [number, 3], "struck": struck})
    assert ended.codes == [143, 143], ended.said
    lines = [
        next(line for line in said.splitlines() if "ended by SIGTERM" in line)
        for said in ended.said
    ]
    assert lines[0] == lines[1]
    assert "with a checkpoint; --resume continues" in lines[0]
    # Resumed by two processes, or by one on one device, it equals the run that nobody stopped.
    count, devices = (2, 4) if struck == 0 else (1, 1)
    ended = run(tmp_path / "run", CACHED, count, devices)
    assert ended.codes == [0] * count, ended.said
    assert_same(tmp_path / "run", reference, count)


@pytest.mark.slow
@pytest.mark.parametrize("struck", [0, 1])
def test_a_dead_process_ends_all(tmp_path, struck):
    ended = run(tmp_path / "run", {**CACHED, "signal": ["SIGKILL", 3], "struck": struck})
    assert (ended.codes[struck], ended.codes[1 - struck]) == (-signal.SIGKILL, 2)
    assert ended.seconds < 60
    assert f"flaxtransfer: process {struck} of 2 is gone: " in ended.said[1 - struck]


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_and_is_named(tmp_path):
    ended = run(tmp_path / "run", {**CACHED, "bad": 5})
    assert ended.codes == [2, 2], ended.said
    assert ended.seconds < 60
    assert "flaxtransfer: process 1 of 2 has ended: image 5 cannot be read" in ended.said[0]
    assert "Traceback" not in ended.said[0]


@pytest.mark.slow
def test_the_folder_of_another_run_is_refused_in_every_process(tmp_path):
    """By process 0, which alone looks; a job that is started again with the same goes on."""
    job = {"steps": 1}
    for again in range(2):
        ended = run(tmp_path / "run", job)
        assert ended.codes == [0, 0], (again, ended.said)
    ended = run(tmp_path / "run", {**job, "seed": 1})
    assert ended.codes == [2, 2], ended.said
    for said in ended.said:
        assert "/run belongs to another run: " in said
        assert "seed is 0 there and 1 here" in said


@pytest.mark.slow
def test_a_full_disk_of_process_0_ends_all_and_is_named(tmp_path):
    """The disk holds the first checkpoint, and no second one."""
    ended = run(tmp_path / "run", {**CACHED, "full": 6})
    assert ended.codes == [2, 2], ended.said
    assert ended.seconds < 60
    for said in ended.said:
        assert "No space left on device" in said
        assert "/run/checkpoints" in said


@pytest.mark.slow
@pytest.mark.parametrize("draw", range(10))
def test_sigterm_to_a_random_process_at_a_random_step(reference, tmp_path, draw):
    """To one or both, in both phases of 8 steps; resumed, it is the run that nobody stopped.

    Word of it takes some steps to come round: at the last ones the run would be complete before.
    """
    random = np.random.default_rng(draw)
    struck, step = random.choice([0, 1, -1]), int(random.integers(1, 13))
    ended = run(tmp_path / "run", {**CACHED, "signal": ["SIGTERM", step], "struck": int(struck)})
    lines = [[line for line in said.splitlines() if "ended by" in line] for said in ended.said]
    assert ended.codes == [143, 143], (struck, step, ended.said)
    assert lines[0] == lines[1]
    assert len(lines[0]) == 1
    alone(tmp_path / "run", CACHED)
    assert_same(tmp_path / "run", reference, 1)


@pytest.mark.slow
def test_the_command_line_in_two_processes(tmp_path):
    """A control in one process has the same accuracy, loss and files."""
    summaries, files = [], []
    for count in (1, 2):
        folder = tmp_path / f"run{count}"
        words = ["train", "--run", str(folder), "--labels-per-class", "2", "--compare", "no"]
        words += ["--batch-size", "20", "--strategy", "solved_head"]
        processes = local.start(
            [sys.executable, "-m", "flaxtransfer", *words],
            count,
            devices=2,
            PYTHONPATH=os.fspath(ROOT),
        )
        said = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * count, said
        assert "test accuracy" in said[0]
        assert all("accuracy" not in other for other in said[1:])
        summaries.append(json.loads((folder / "summary.json").read_text()))
        files.append(sorted(path.name for path in folder.iterdir()))
    one, two = (summary["results"][0] for summary in summaries)
    assert one["examples"] == two["examples"] == 1777
    assert two["accuracy"] == pytest.approx(one["accuracy"], abs=2e-3)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    assert files[0] == files[1]


@pytest.mark.slow
def test_a_command_that_is_not_shared_is_refused_in_every_process():
    processes = local.start(
        [sys.executable, "-m", "flaxtransfer", "plan"], 2, PYTHONPATH=os.fspath(ROOT)
    )
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    for each in said:
        assert "the subcommand must be one of train, evaluate, predict, probe in a" in each


def command(words: list[str], count: int, **more: str) -> list[str]:
    """What each process of a command has said."""
    processes = local.start(
        [sys.executable, "-m", "flaxtransfer", *words],
        count,
        devices=2,
        PYTHONPATH=f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        **more,
    )
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, said
    return said


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eleven images of two classes."""
    from PIL import Image

    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(11):
        place = folder / ("dark", "bright")[number % 2]
        place.mkdir(exist_ok=True)
        pixels = random.integers(0, 99, (16, 16, 3)) + 150 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")
    return folder


SOLVED = ("--strategy", "solved_head", "--compare", "no", "--batch-size", "4")


def profile_of(said: str) -> list[str]:
    """The lines about segments, which one process prints."""
    return [line for line in said.splitlines() if " ± " in line]


@pytest.mark.slow
def test_two_processes_predict_and_probe_as_one(images, tmp_path):
    run_folder = tmp_path / "run"
    data = ("--data", f"folder:{images}", "--labels-per-class", "4")
    command(["train", "--run", str(run_folder), *data, *SOLVED], 1)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    files = [*sorted(map(str, images.rglob("*.png"))), str(tmp_path / "broken.png")]
    for more in ([], ["--tta", "flip", "--top", "2"]):
        words = ["predict", str(run_folder), *files, "--skip-corrupt", "--batch-size", "3", *more]
        found = []
        for count in (1, 2):
            first, *others = command(words, count)
            assert all("probability" not in said for said in others)
            assert f"left out: {tmp_path / 'broken.png'}" in first
            rows = [json.loads(line) for line in first.splitlines() if line.startswith("{")]
            found.append(rows)
        assert [row["image"] for row in found[1]] == files[:-1]
        for one, two in zip(*found, strict=True):
            assert (one["image"], one["label"]) == (two["image"], two["label"])
            assert one["probability"] == pytest.approx(two["probability"], abs=1e-5)
    # More processes than images.
    first, other = command(["predict", str(run_folder), files[0]], 2)
    rows = [json.loads(line) for line in first.splitlines() if line.startswith("{")]
    assert [row["image"] for row in rows] == files[:1]
    assert "probability" not in other
    one, two = (command(["probe", *data], count) for count in (1, 2))
    assert profile_of(two[0]) == profile_of(one[0])
    assert len(profile_of(one[0])) == 5
    assert profile_of(two[1]) == []


@pytest.mark.slow
def test_two_processes_have_one_run_in_a_bucket(images, tmp_path):
    """Process 0 alone writes it; what it holds is the run, and a second start goes on from it."""
    pytest.importorskip("gcsfs", reason="the extra gcs is not installed")
    from tests.support.bucket import Store, serving

    store = Store("runs")
    for path in images.rglob("*.png"):
        store.objects["runs"][f"images/{path.relative_to(images)}"] = path.read_bytes()
    words = ["train", "--run", "gs://runs/one", "--data", "gs://runs/images", "--resume"]
    words += ["--labels-per-class", "4", *SOLVED]
    with serving(store) as host:

        def machine(name: str) -> dict[str, str]:
            return {"STORAGE_EMULATOR_HOST": host, "FLAXTRANSFER_CACHE": str(tmp_path / name)}

        place = Path.cwd()
        try:
            for name in ("one", "two"):
                (tmp_path / f"work-{name}").mkdir()
                os.chdir(tmp_path / f"work-{name}")
                compiled = ("--compilation-cache", "gs://runs/compiled")
                first, other = command([*words, *compiled], 2, **machine(name))
                assert "is mirrored to gs://runs/one" in first
                assert "mirrored" not in other
                assert "test accuracy" in first
            assert "was fetched to runs/runs/one" in first
            said = command(["evaluate", "gs://runs/one"], 2, **machine("three"))
        finally:
            os.chdir(place)
    assert '"examples": 3' in said[0]
    kept = {name.removeprefix("runs/one/") for name in store.names() if "/one/" in name}
    assert {"manifest.json", "summary.json", "times.jsonl", "model.safetensors"} <= kept
    assert any(name.startswith("runs/compiled/") for name in store.names())
