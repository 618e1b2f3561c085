"""Where the time of a run goes, traces of steps, and that neither is a part of the run."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxtransfer as ft
from flaxtransfer import sharding
from flaxtransfer.training import console, loop
from flaxtransfer.training.console import Clock, Times, read_metrics, read_times
from tests.faults import harness
from tests.support import small


def arguments(steps=4, make=small.batch, **options):
    model, variables = small.network()
    return {
        "network": ft.Classifier(model, variables, small.PREPROCESSING),
        "plan": ft.Plan(small.two_phases(variables["params"], steps=steps).phases[:1]),
        "data": small.feed(make=make),
        "resume": True,
        "options": ft.FitOptions(log_every=2, **options),
    }


def fit(folder, **options):
    return ft.fit(folder=folder, **arguments(**options))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "times.jsonl").read_text().splitlines()]


def test_the_parts_are_all_of_the_time(tmp_path, capsys):
    given = arguments(evaluate_every=2)
    started = time.perf_counter()
    result = ft.fit(folder=tmp_path, **given)
    wall = time.perf_counter() - started
    rows = rows_of(tmp_path)
    assert [(row["kind"], row["step"], row["phase"]) for row in rows] == [
        ("time", step, "head") for step in (2, 4, 4)
    ]
    times = result.times
    assert times == read_times(tmp_path)
    assert times.images == 4 * 8
    parts = (times.compile, times.steps, times.evaluate, times.save, times.prepare)
    assert min(parts) > 0
    assert times.data >= 0
    assert sum(parts) + times.data + times.rest == pytest.approx(times.wall)
    # The rest is the end of the run: its last predictions and files.
    assert times.rest >= 0
    assert times.wall == pytest.approx(wall, rel=0.1)
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == str(times)
    assert told.startswith("time: ")
    assert "of it in steps" in told


class Busy:
    """A device that computes steps one after the other while the program goes on."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.pool = ThreadPoolExecutor(1)
        self.spans = []

    def _compute(self):
        started = time.perf_counter()
        time.sleep(self.seconds)
        self.spans.append((started, time.perf_counter()))

    def step(self):
        """Starts a step; what it returns is waited for as an array is."""
        done = self.pool.submit(self._compute)

        class Result:
            def block_until_ready(self):
                done.result()

        return Result()


@pytest.mark.parametrize(
    ("reading", "computing", "data", "steps"),
    [(0.0, 0.05, 0, 0.5), (0.05, 0.0, 0.5, 0), (0.06, 0.03, 0.33, 0.3), (0.03, 0.06, 0.03, 0.6)],
    ids=["computes", "reads", "reads longer", "computes longer"],
)
def test_waiting_for_data_is_told_apart_from_computing(tmp_path, reading, computing, data, steps):
    """Ten batches are read while a device computes: reading counts where the device is idle.

    With exact sleeps the numbers are analytic; as the machine is busy, they are of what was slept.
    """
    device, waits = Busy(computing), []
    with Clock(tmp_path, time.perf_counter()) as clock:
        clock.begin_phase()
        for _ in range(10):
            asked = time.perf_counter()
            time.sleep(reading)
            began = time.perf_counter()
            waits.append((asked, began))
            clock.step(asked, began, 8, device.step(), first=False)
        clock.write("head", 10)
    found = read_times(tmp_path)
    ends = [0.0, *(end for _, end in device.spans[:-1])]
    late = sum(max(0.0, b - max(a, end)) for (a, b), end in zip(waits, ends, strict=True))
    busy = sum(end - start for start, end in device.spans)
    assert late >= 0.9 * data
    assert busy >= steps
    assert found.data == pytest.approx(late, abs=0.1)
    assert found.steps == pytest.approx(busy, abs=0.1)
    assert found.data + found.steps <= found.wall
    assert found.starved == pytest.approx(found.data / (found.data + found.steps))


def test_a_program_that_is_made_is_not_a_step(tmp_path):
    with Clock(tmp_path, time.perf_counter()) as clock:
        clock.begin_phase()
        began = time.perf_counter()
        time.sleep(0.1)
        clock.step(began, began, 8, jnp.zeros(()), first=True)
        clock.write("head", 1)
    found = read_times(tmp_path)
    assert found.compile > 0.1
    assert found.steps < 0.05


def test_times_of_an_interrupted_process_count_and_are_no_part_of_the_run(tmp_path, capsys):
    def broken(number):
        if number == 3:
            raise OSError("power cut")
        return small.batch(number)

    fit(tmp_path / "whole", evaluate_every=2)
    with pytest.raises(OSError, match="power cut"):
        fit(tmp_path / "cut", evaluate_every=2, make=broken)
    (row,) = rows_of(tmp_path / "cut")
    # Half a row, as a full disk leaves it, and one of somebody else.
    with (tmp_path / "cut" / "times.jsonl").open("a") as file:
        file.write('{"kind": "else"}\n{"kind": "time", "wal')
    result = fit(tmp_path / "cut", evaluate_every=2)
    said = f"{tmp_path / 'cut' / 'times.jsonl'}: 2 rows cannot be read and are left out"
    assert capsys.readouterr().err.splitlines().count(said) == 1
    rows = rows_of(tmp_path / "cut")
    assert rows[0] == row
    assert [each["step"] for each in rows] == [2, 4, 4]
    assert result.times.wall == pytest.approx(sum(each["wall"] for each in rows))
    for name in ("metrics.jsonl", "audit.json", "result.json", "validation.npz", "config.json"):
        one, other = ((tmp_path / which / name).read_bytes() for which in ("whole", "cut"))
        assert one == other, name


def test_times_that_cannot_be_written_are_said_and_stop_nothing(tmp_path, capsys):
    (tmp_path / "run" / "times.jsonl").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    result = fit(tmp_path / "run", evaluate_every=2)
    assert result.steps == 4
    told = [line for line in capsys.readouterr().err.splitlines() if "times are not kept" in line]
    assert len(told) == 1


def test_a_long_phase_says_so_beforehand(tmp_path, capsys, monkeypatch):
    fit(tmp_path / "short", steps=8)
    assert "more steps take" not in capsys.readouterr().err
    monkeypatch.setattr(loop, "LONG_S", 0.0)
    fit(tmp_path / "long", steps=8, evaluate_every=4)
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "more steps take" in line]
    assert told.startswith("phase 'head': ")
    assert told.endswith(" validations beside")


def test_the_length_is_that_of_the_first_steps(tmp_path):
    with Clock(tmp_path, time.perf_counter()) as clock:
        clock.begin_phase()
        for number in range(6):
            assert clock.forecast(100) is None
            time.sleep(0.03)
            now = time.perf_counter()
            clock.step(now, now, 8, jnp.zeros(()), first=number == 0)
            clock._steps.join()
        assert clock.forecast(100) == pytest.approx(3.0, rel=0.3)


def test_steps_are_traced_into_the_run_folder(tmp_path, capsys):
    fit(tmp_path, profile=(2, 3))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert f"the trace is in {tmp_path / 'profile'}" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "profile")
    fit(tmp_path, profile=(2, 3))
    assert "were made before: nothing is traced" in capsys.readouterr().err
    assert not (tmp_path / "profile").exists()


def test_steps_on_cached_activations_are_traced_over_the_end_of_a_phase(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(console._profiler, "start_trace", lambda place: seen.append(place))
    monkeypatch.setattr(console._profiler, "stop_trace", lambda: seen.append("end"))
    annotated = []

    class Annotation:
        def __init__(self, name, step_num):
            annotated.append(step_num)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(console._profiler, "StepTraceAnnotation", Annotation)
    model, variables = small.network()
    ft.fit(
        ft.Classifier(model, variables, small.PREPROCESSING),
        ft.Plan(harness.plan(variables["params"]).phases[:2]),
        harness.data(),
        tmp_path / "run",
        options=ft.FitOptions(profile=(3, 6)),
        cache=ft.Cache("memory"),
    )
    assert [row["kind"] for row in read_metrics(tmp_path / "run")].count("cache") == 2
    assert annotated == [3, 4, 5, 6]
    assert seen == [tmp_path / "run" / "profile", "end"]


def test_a_trace_ends_with_a_run_that_fails(tmp_path):
    def broken(number):
        if number == 2:
            raise OSError("unreadable")
        return small.batch(number)

    with pytest.raises(OSError, match="unreadable"):
        fit(tmp_path, profile=(1, 4), make=broken)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("profile", [(0, 3), (3, 2)])
def test_ranges_that_are_none_are_refused(profile):
    with pytest.raises(ValueError, match="profile must be first and last step, from 1"):
        ft.FitOptions(profile=profile)


def test_steps_that_the_run_has_not_are_refused_before_anything(tmp_path):
    with pytest.raises(ValueError, match="profile must be steps of the run, which has 4, got 3:5"):
        fit(tmp_path / "run", profile=(3, 5))
    assert not (tmp_path / "run").exists()


def test_the_share_of_the_peak_is_that_of_the_counted_operations(tmp_path, capsys, monkeypatch):
    """Of a linear step the operations are known: 2 for each weight and row."""
    assert loop.peak_flops(ft.training.make_mesh(), "float32") is None
    fit(tmp_path / "cpu")
    told = capsys.readouterr().err
    assert "images/s" in told
    assert "of peak" not in told
    monkeypatch.setattr(loop, "peak_flops", lambda mesh, compute: 1e9)
    fit(tmp_path / "known")
    assert "% of peak FLOP/s)" in capsys.readouterr().err

    class Run:
        mesh = ft.training.make_mesh()
        network = ft.Classifier(small.network()[0], {}, small.PREPROCESSING)

    step = jax.jit(lambda weights, rows: rows @ weights)
    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 10), (8, 64)))
    assert loop._flops(Run, step, *shapes) == 2 * 8 * 64 * 10


class Device:
    def __init__(self, kind, number, platform="gpu", coords=None):
        self.device_kind, self.id, self.platform = kind, number, platform
        if coords is not None:
            self.coords = coords


def mesh_of(*devices):
    class Made:
        pass

    made = Made()
    made.devices = np.array(devices, object)
    return made


@pytest.mark.parametrize(
    ("kind", "compute", "wanted"),
    [
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA A100-SXM4-40GB", "float32", 156e12),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("NVIDIA L40S", "bfloat16", 362e12),
        ("NVIDIA L40", "bfloat16", None),
        ("NVIDIA A100-SXM4-40GB", "float16", None),
        ("Tesla T4", "float32", None),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(kind, compute, wanted):
    assert sharding.peak_flops(mesh_of(Device(kind, 0)), compute) == wanted
    two = sharding.peak_flops(mesh_of(Device(kind, 0), Device(kind, 1)), compute)
    assert two == (None if wanted is None else 2 * wanted)


def test_two_cores_of_a_tpu_are_one_chip():
    cores = [Device("TPU v3", n, "tpu", (n // 2, 0, 0)) for n in range(4)]
    assert sharding.peak_flops(mesh_of(*cores), "bfloat16") == 2 * 123e12
    lite = Device("TPU v5 lite", 0, "tpu", (0, 0, 0))
    assert sharding.peak_flops(mesh_of(lite), "bfloat16") == 197e12


def test_metrics_have_no_times(tmp_path):
    fit(tmp_path)
    assert {row["kind"] for row in read_metrics(tmp_path)} == {"train", "validation"}


def test_nothing_is_divided_by_nothing():
    assert (Times().goodput, Times().starved) == (0.0, 0.0)
    assert str(Times()).startswith("time: 0.0 s, 0% of it in steps; ")
