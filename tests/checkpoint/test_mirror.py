"""A run is mirrored to a bucket: killed between any two requests, what is there is whole."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import fsspec
import pytest

import flaxtransfer as ft
from flaxtransfer.checkpoint import CheckpointManager, mirror, step_files
from flaxtransfer.checkpoint.mirror import (
    Bucket,
    Mirror,
    Owner,
    TakenOver,
    fetch_steps,
    fetch_tree,
    mirrored,
)
from flaxtransfer.files import folder_lock
from tests.faults import harness
from tests.support import small
from tests.support.bucket import BucketFileSystem, Store, serving
from tests.support.stored import tree_of

ROOT = Path(__file__).parents[2]
ADDRESS = "gs://runs/one"
STEPS = 4
METRICS = {1: 0.2, 2: 0.5, 3: 0.3, 4: 0.9}
"""Of the steps; the best is the second, until the last."""


@pytest.fixture
def store(monkeypatch, tmp_path):
    """A bucket, found under gs:// in the place of the client; failed requests do not wait."""
    found = Store("runs")
    monkeypatch.setattr(BucketFileSystem, "store", found)
    monkeypatch.setattr(fsspec, "filesystem", lambda name: BucketFileSystem())
    monkeypatch.setattr(mirror, "_check_answers", lambda: None)
    monkeypatch.setattr(mirror, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(mirror, "LOOK_S", 0.02)
    monkeypatch.chdir(tmp_path)
    return found


@pytest.fixture(scope="module")
def moments(tmp_path_factory):
    """Copies of a run folder as it is after each of its checkpoints, and at its end."""
    folder, kept = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("moments")
    (folder / "config.json").write_text("{}")
    (folder / "features").mkdir()
    (folder / "features" / "large").write_text("made again")
    with CheckpointManager.open(folder / "checkpoints") as steps:
        for step in range(1, STEPS + 1):
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(f"{step}\n")
            steps.save(step, tree_of(step), {"rows": step}, metric=METRICS[step])
            shutil.copytree(folder, kept / str(step))
    (folder / "manifest.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")
    shutil.copytree(folder, kept / "end")
    return kept


def files_of(folder: Path) -> dict[str, bytes]:
    """What is compared of a run folder: all that is mirrored."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock" and "features" not in path.parts
    }


def bring(work: Path, moment: Path) -> None:
    """The folder of a run as it is at another moment."""
    made = work.with_name("made")
    made.symlink_to(moment)
    if work.is_dir() and not work.is_symlink():
        shutil.rmtree(work)
    made.replace(work)


def send(work: Path, moments: Path, first: int = 1, every: int = 1) -> None:
    """Mirrors what a run makes from a step on; with a look at every checkpoint, or at fewer."""
    sent = Mirror(work, Bucket.at(ADDRESS), print)
    for moment in [*map(str, range(first, STEPS + 1, every)), "end"]:
        bring(work, moments / moment)
        sent.sync()


def until(condition: Callable[[], object]) -> None:
    """Waits for what another thread does."""
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


class Killed(BaseException):
    """The process is gone."""


def test_the_bucket_holds_what_the_folder_holds(store, moments, tmp_path):
    send(tmp_path / "work", moments)
    assert store.names() == sorted(f"runs/one/{name}" for name in files_of(moments / "end"))
    order = [path.removeprefix("runs/one/") for kind, path in store.requests if kind == "PUT"]
    last = [f"checkpoints/4/{name}" for name in files_of(moments / "end" / "checkpoints" / "4")]
    assert order.index("metrics.jsonl") < min(map(order.index, last))
    assert max(last, key=order.index) == "checkpoints/4/record/metadata"
    assert order[-1] == "manifest.json"


def kill_at(request: int):
    count = itertools.count(1)

    def fault(kind: str, path: str) -> None:
        if next(count) == request:
            raise Killed

    return fault


@pytest.mark.parametrize("looks", [1, 2], ids=["at every step", "at every second"])
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_a_request_the_newest_whole_step_is_fetched(
    store, moments, tmp_path, every, looks
):
    send(tmp_path / "whole", moments, 1, looks)
    wanted, total = store.names(), len(store.requests)
    assert total > 50
    reached = set()
    for request in range(1, total + 1, every):
        store.objects["runs"].clear()
        store.fault = kill_at(request)
        with pytest.raises(Killed):
            send(tmp_path / "work", moments, 1, looks)
        store.fault = None
        seen = [int(name.split("/")[3]) for name in store.names() if name.endswith("metadata")]
        # An empty machine, on which the run goes on.
        fresh = tmp_path / f"fresh-{request}"
        said = fetch_steps(Bucket.at(ADDRESS), fresh)
        newest = max(seen, default=0)
        reached.add(newest)
        # To which the run may go back.
        best = max(range(1, newest + 1), key=METRICS.__getitem__, default=None)
        assert best is None or best in seen
        assert ("no whole step" in said) if not newest else (f"step {newest}" in said)
        for step in seen:
            place = fresh / "checkpoints" / str(step)
            assert files_of(place) == files_of(moments / str(step) / "checkpoints" / str(step))
            rows = step_files.read_record(place.parent, step)["meta"]["rows"]
            text = (fresh / "metrics.jsonl").read_text()
            assert text.startswith("".join(f"{row + 1}\n" for row in range(rows)))
        assert sorted(p.name for p in fresh.glob("checkpoints/*")) == sorted(map(str, seen))
        send(fresh, moments, max(newest, 1))
        assert store.names() == wanted
    assert reached == {0, 1, 2, 3, 4}


def test_killed_while_it_is_fetched_it_is_fetched_again(store, moments, tmp_path):
    send(tmp_path / "work", moments)
    before = len(store.requests)
    fetch_steps(Bucket.at(ADDRESS), tmp_path / "whole")
    assert files_of(tmp_path / "whole") == files_of(moments / "end")
    for request in range(1, len(store.requests) - before + 1):
        fresh = tmp_path / f"fresh-{request}"
        store.fault = kill_at(request)
        with pytest.raises(Killed):
            fetch_steps(Bucket.at(ADDRESS), fresh)
        store.fault = None
        with CheckpointManager.open(fresh / "checkpoints") as steps:  # Removes what is half.
            assert steps.steps() in ([], [3], [3, 4])
        fetch_steps(Bucket.at(ADDRESS), fresh)
        assert files_of(fresh) == files_of(moments / "end")


def test_what_is_further_here_is_not_fetched(store, moments, tmp_path):
    send(tmp_path / "work", moments)
    shutil.copytree(moments / "3", tmp_path / "behind")
    assert "step 4" in fetch_steps(Bucket.at(ADDRESS), tmp_path / "behind")
    ahead = tmp_path / "ahead"
    shutil.copytree(moments / "end", ahead)
    (ahead / "metrics.jsonl").write_text("mine")
    said = fetch_steps(Bucket.at(ADDRESS), ahead)
    assert said == f"{ahead} is as far as {ADDRESS}, or further: nothing is fetched"
    assert (ahead / "metrics.jsonl").read_text() == "mine"
    (ahead / "config.json").write_text('{"another": 1}')
    with pytest.raises(ValueError, match="holds another run than gs://runs/one"):
        fetch_steps(Bucket.at(ADDRESS), ahead)


def test_runs_within_a_run_are_sent_and_fetched_too(store, moments, tmp_path):
    """Folds, or a race: each has its own checkpoints, and the files beside them are theirs."""
    for name in ("fold1", "fold2/inner"):
        shutil.copytree(moments / "end", tmp_path / "work" / name)
    (tmp_path / "work" / "folds.json").write_text("[]")
    Mirror(tmp_path / "work", Bucket.at(ADDRESS), print).sync()
    said = fetch_steps(Bucket.at(ADDRESS), tmp_path / "fresh")
    assert said == f"4 checkpoints of runs in {ADDRESS} were fetched to {tmp_path / 'fresh'}"
    assert files_of(tmp_path / "fresh") == files_of(tmp_path / "work")


def test_metrics_that_grow_are_not_sent_at_every_look(store, moments, tmp_path, monkeypatch):
    bring(tmp_path / "work", moments / "2")
    sent = Mirror(tmp_path / "work", Bucket.at(ADDRESS), print)
    sent.sync(now=False)
    before = len(store.requests)
    bring(tmp_path / "work", shutil.copytree(moments / "2", tmp_path / "grown"))
    (tmp_path / "grown" / "metrics.jsonl").write_text("much\n")
    sent.sync(now=False)
    assert len(store.requests) == before
    monkeypatch.setattr(mirror, "SMALL_S", 0.0)
    sent.sync(now=False)
    assert store.requests[before:] == [("PUT", "runs/one/metrics.jsonl")]


def test_a_best_step_that_goes_while_it_is_sent_holds_the_newest_back(store, moments, tmp_path):
    """Else the newest in the bucket would be one whose best is nowhere."""
    bring(tmp_path / "work", moments / "3")
    sent = Mirror(tmp_path / "work", Bucket.at(ADDRESS), print)

    def goes(kind: str, path: str) -> None:
        if path.endswith("metrics.jsonl"):
            bring(tmp_path / "work", moments / "end")

    store.fault = goes
    sent.sync()
    assert mirror.whole_steps(Bucket.at(ADDRESS).objects()) == {}
    store.fault = None
    sent.sync()
    assert mirror.whole_steps(Bucket.at(ADDRESS).objects()) == {"checkpoints": [3, 4]}


def test_a_step_whose_record_was_refused_is_not_called_safe(store, moments, tmp_path):
    bring(tmp_path / "work", moments / "1")
    sent = Mirror(tmp_path / "work", Bucket.at(ADDRESS), print)
    store.fault = lambda kind, path: 503 if path.endswith("record/metadata") else None
    with pytest.raises(OSError, match=r"metadata could not be written .* no step is safe"):
        sent.close()


def test_a_step_of_the_same_number_and_another_content_takes_its_place(store, moments, tmp_path):
    send(tmp_path / "work", moments)
    place = tmp_path / "other"
    with CheckpointManager.open(place / "checkpoints") as steps:
        steps.save(STEPS, tree_of(9), {"rows": 9})
    Mirror(place, Bucket.at(ADDRESS), print).sync()
    names = [name for name in store.names() if "/checkpoints/" in name]
    assert names == sorted(f"runs/one/{name}" for name in files_of(place))
    fetch_steps(Bucket.at(ADDRESS), tmp_path / "fresh")
    assert step_files.read_record(tmp_path / "fresh" / "checkpoints", STEPS)["meta"]["rows"] == 9


def test_failing_storage_is_said_once_and_at_the_end(store, moments, tmp_path):
    said = []
    tried = threading.Event()

    def full(kind: str, path: str) -> int | None:
        if "/checkpoints/4/" in path and kind == "PUT":
            tried.set()
            return 507
        return None

    def run() -> None:
        with mirrored(ADDRESS, resume=False, say=said.append) as folder:
            bring(folder, moments / "3")
            until(lambda: "runs/one/checkpoints/3/record/metadata" in store.names())
            store.fault = full
            bring(folder, moments / "end")
            assert tried.wait(20)
            until(lambda: said)

    with pytest.raises(OSError, match="could not be written in 3 tries") as error:
        run()
    assert "(RuntimeError: status 507); step 3 is safe there" in one_line(error.value)
    assert "and all is safe in runs/runs/one: the same command" in str(error.value)
    assert len(said) == 1
    assert said[0].endswith("; the run goes on")
    assert files_of(Path("runs/runs/one")) == files_of(moments / "end")
    store.fault = None
    with mirrored(ADDRESS, resume=True, say=said.append):
        pass
    names = [*files_of(moments / "end"), mirror._OWNER]
    assert store.names() == sorted(f"runs/one/{name}" for name in names)


def test_a_storage_that_recovers_is_said_too(store, moments, tmp_path):
    said: list[str] = []
    bring(tmp_path / "work", moments / "end")
    sent = Mirror(tmp_path / "work", Bucket.at(ADDRESS), said.append)
    store.fault = lambda kind, path: 503
    sent.start()
    until(lambda: said)
    store.fault = None
    until(lambda: len(said) == 2)
    sent.close()
    assert said[1:] == [
        "gs://runs/one is written again",
        f"{tmp_path / 'work'} is mirrored to {ADDRESS}",
    ]


def test_the_later_of_two_starts_takes_over_and_the_earlier_one_stops(store, moments, tmp_path):
    """It is interrupted where it trains, and sends nothing more; what it made is kept here."""
    bucket, other = Bucket.at(ADDRESS), tmp_path / "other"
    said: list[str] = []

    def run() -> None:
        with mirrored(ADDRESS, resume=False, say=print) as folder:
            bring(folder, moments / "2")
            sealed = {f"runs/one/checkpoints/{step}/record/metadata" for step in (1, 2)}
            until(lambda: sealed <= set(store.names()))
            # Another machine: it fetches what is there, goes on, and ends.
            owner = Owner.claim(bucket, said.append)
            fetch_steps(bucket, other)
            bring(other, moments / "3")
            Mirror(other, bucket, print, owner).close()
            before.update(store.objects["runs"])
            bring(folder, moments / "end")
            until(lambda: False)

    before: dict[str, bytes] = {}
    # A shell lets what it starts in the background ignore it.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(TakenOver) as error:
            run()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert isinstance(error.value.__cause__, KeyboardInterrupt)
    assert re.fullmatch(
        rf"{ADDRESS} was taken over by process {os.getpid()} on \S+, since \S+ \S+ UTC: this run "
        "has stopped, and is kept in runs/runs/one; let one of them write there, or give another "
        "--run",
        one_line(error.value),
    )
    assert re.fullmatch(
        rf"{ADDRESS} is taken over from process {os.getpid()} on \S+, since \S+ \S+ UTC: where "
        "that still runs, it stops at its next upload",
        "".join(said),
    )
    assert store.objects["runs"] == before
    assert files_of(Path("runs/runs/one")) == files_of(moments / "end")
    # The other one has ended: nobody is taken over from.
    said.clear()
    Owner.claim(bucket, said.append)
    assert said == []


def test_who_is_told_at_the_end_stops_as_well(store, moments):
    """Nothing was left to send, and the address is another's."""

    def run() -> None:
        with mirrored(ADDRESS, resume=False, say=print):
            Owner.claim(Bucket.at(ADDRESS), print)

    with pytest.raises(TakenOver, match="was taken over by process"):
        run()
    record = store.objects["runs"].pop(f"one/{mirror._OWNER}")
    assert not json.loads(record)["ended"]
    # Somebody has removed or damaged the record: whose the address is, nobody knows.
    owner = Owner.claim(Bucket.at(ADDRESS), print)
    for left in ({}, {f"one/{mirror._OWNER}": b"[]"}):
        store.objects["runs"] = dict(left)
        with pytest.raises(TakenOver, match="was taken over by another start: this run"):
            Mirror(Path("nothing"), Bucket.at(ADDRESS), print, owner).close()


def test_a_second_start_on_one_machine_takes_nothing_over(store, moments):
    with mirrored(ADDRESS, resume=False, say=print) as folder, folder_lock(folder):
        before = dict(store.objects["runs"])
        for resume in (False, True):
            with (
                pytest.raises(ValueError, match="runs/runs/one is being written by process"),
                mirrored(ADDRESS, resume=resume, say=print),
            ):
                raise AssertionError("must not begin")
        assert store.objects["runs"] == before


def one_line(error: Exception) -> str:
    assert "\n" not in str(error)
    assert len(str(error)) <= 500
    return str(error)


@pytest.mark.parametrize(
    ("address", "resume", "status", "wanted"),
    [
        ("gs://none/one", False, None, "there is no bucket none for gs://none/one"),
        ("gs://", True, None, "must be gs://<bucket>/<path>, got gs://"),
        ("gs://runs/a//b", True, None, "must be gs://<bucket>/<path>"),
        ("gs://runs/../../b", True, None, "must be gs://<bucket>/<path>"),
        (ADDRESS, False, 403, "no permission for it; it needs the role Storage Object User"),
        (ADDRESS, False, 401, "without credentials"),
        (ADDRESS, False, None, "must be empty for a new run; add --resume"),
    ],
)
def test_refused_before_anything_is_computed(store, address, resume, status, wanted):
    if address == ADDRESS and status is None:
        store.objects["runs"]["one/config.json"] = b"{}"
    if status == 401:

        class NoCredentials(Exception):
            code = 401

        def fault(kind: str, path: str) -> None:
            raise NoCredentials("Anonymous caller does not have storage.objects.create access")

        store.fault = fault
    elif status is not None:
        store.fault = lambda kind, path: status
    with (
        pytest.raises((ValueError, OSError)) as error,
        mirrored(address, resume=resume, say=print),
    ):
        raise AssertionError("must not begin")
    assert wanted in one_line(error.value)
    if status is not None:
        assert len(store.requests) == 1  # These are not tried again.


def test_without_the_extra(monkeypatch):
    def missing(name: str) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(mirror, "_check_answers", lambda: None)
    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(
        ValueError, match=r"need the extra 'gcs': pip install 'flaxtransfer\[gcs\]'"
    ):
        Bucket.at(ADDRESS)


@pytest.mark.parametrize(
    ("answers", "wanted"),
    [(True, None), (False, "timed out"), (None, "Connection refused")],
    ids=["with 404", "never", "no server"],
)
def test_without_an_answer_it_is_said_at_once(monkeypatch, answers, wanted):
    monkeypatch.setattr(mirror, "find_spec", lambda name: name)
    monkeypatch.setattr(mirror, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(mirror, "ANSWER_S", 30.0 if answers else 0.3)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    mirror._check_answers.cache_clear()
    with ExitStack() as stack:
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        place = f"http://127.0.0.1:{silent.getsockname()[1]}"
        if answers:
            place = stack.enter_context(serving(Store()))
        if answers is None:
            silent.close()
        monkeypatch.setattr(mirror, "STORAGE", place)
        asked: list[str] = []
        monkeypatch.setattr(fsspec, "filesystem", asked.append)
        if wanted is None:
            Bucket.at(ADDRESS)
            mirror.STORAGE = "http://127.0.0.1:1"
            Bucket.at(ADDRESS)  # It is asked once.
            assert asked == ["gs", "gs"]
        else:
            with pytest.raises(ConnectionError, match=wanted) as error:
                Bucket.at(ADDRESS)
            assert f"{place} does not answer" in one_line(error.value)
            assert not asked
    mirror._check_answers.cache_clear()


def test_a_tree_is_fetched_once_and_follows_the_bucket(store, tmp_path):
    objects = store.objects["runs"]
    objects.update(
        {"a/x/1.png": b"one", "a/x/2.png": b"two", "a/y.txt": b"", "a/x/": b"", "ab": b"3"}
    )
    target = tmp_path / "cache"
    assert fetch_tree("gs://runs/a", target).startswith(
        "3 files (0.0 MB) of gs://runs/a were fetched"
    )
    objects["a/x/1.png"] = b"uno"  # As long as before.
    del objects["a/y.txt"]
    (target / "x" / "2.png").write_bytes(b"damaged")
    assert fetch_tree("gs://runs/a/", target).startswith("2 files")
    requests = len(store.requests)
    assert fetch_tree("gs://runs/a/", target).endswith(f"fetched to {target}, 2 were there")
    assert store.requests[requests:] == [("LIST", "runs/a")]
    found = {p.relative_to(target).as_posix(): p.read_bytes() for p in target.rglob("*.*g")}
    assert found == {"x/1.png": b"uno", "x/2.png": b"two"}
    assert not (target / "y.txt").exists()
    with pytest.raises(FileNotFoundError, match="there is nothing at gs://runs/c"):
        fetch_tree("gs://runs/c", tmp_path / "none")


@pytest.mark.parametrize("name", ["../evil", "x/../../evil", "x//evil", "./evil"])
def test_names_that_lead_out_of_the_folder_are_refused(store, name, tmp_path):
    store.objects["runs"][f"a/{name}"] = b"evil"
    with pytest.raises(ValueError, match="must hold names of files, got"):
        fetch_tree("gs://runs/a", tmp_path / "cache")
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"] == []


def fit_head(folder: str | Path, *, at: int | None = None) -> ft.training.FitResult:
    """Trains a head for four steps, with a checkpoint after every second, until a power cut."""

    def made(number: int) -> ft.data.Batch:
        if number == at:
            raise OSError("power cut")
        return small.batch(number)

    model, variables = small.network()
    plan = small.two_phases(variables["params"], steps=4)
    return ft.fit(
        ft.Classifier(model, variables, small.PREPROCESSING),
        ft.Plan(plan.phases[:1]),
        small.feed(make=made),
        folder,
        resume=True,
        options=ft.FitOptions(evaluate_every=2, log_every=2),
    )


def test_a_run_goes_on_on_an_empty_machine(store, tmp_path, capsys):
    fit_head(tmp_path / "whole")
    with pytest.raises(OSError, match="power cut"):
        fit_head(ADDRESS, at=3)
    shutil.rmtree("runs")
    # The address as the command line makes a path of it.
    result = fit_head(Path(ADDRESS))
    assert "step 2 of gs://runs/one was fetched to runs/runs/one" in capsys.readouterr().err
    assert result.notes == fit_head(tmp_path / "whole").notes
    work = Path("runs/runs/one")
    for name in ("metrics.jsonl", "audit.json", "result.json", "validation.npz"):
        assert (work / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert json.loads(store.objects["runs"].pop("one/.owner.json"))["ended"]
    sent = {f"one/{name}": data for name, data in files_of(work).items()}
    assert store.objects["runs"] == sent


def test_no_step_waits_for_the_storage(store):
    """A storage that answers nothing until the run is complete on this machine."""
    gate, done = threading.Event(), Path("runs/runs/one/manifest.json")

    def hang(kind: str, path: str) -> None:
        if kind == "PUT" and "/." not in path:
            assert gate.wait(60)

    def watch() -> None:
        until(done.exists)
        gate.set()

    store.fault = hang
    watcher = threading.Thread(target=watch)
    watcher.start()
    fit_head(ADDRESS)
    watcher.join()
    assert store.objects["runs"]["one/manifest.json"] == done.read_bytes()


@pytest.mark.slow
def test_every_kind_of_phase_goes_on_on_an_empty_machine(store, tmp_path):
    harness.fit(tmp_path / "whole")
    with pytest.raises(OSError, match="power cut"):
        harness.fit(ADDRESS, at=11)  # type: ignore[arg-type]
    shutil.rmtree("runs")
    # There is a checkpoint after every second step.
    assert mirror.whole_steps(Bucket.at(ADDRESS).objects())["checkpoints"][-1] == 10
    harness.fit(ADDRESS)  # type: ignore[arg-type]
    assert harness.outcome(Path("runs/runs/one")) == harness.outcome(tmp_path / "whole")
    for name, data in files_of(Path("runs/runs/one")).items():
        assert store.objects["runs"][f"one/{name}"] == data
    # Finished, it is not computed again.
    shutil.rmtree("runs")
    harness.fit(ADDRESS)  # type: ignore[arg-type]
    assert harness.outcome(Path("runs/runs/one")) == harness.outcome(tmp_path / "whole")


CHILD = """
import sys
from pathlib import Path
from tests.faults import harness
harness.fit(sys.argv[1])
print("finished")
"""


@pytest.mark.slow
def test_with_the_real_client_killed_at_uploads_and_resumed(tmp_path):
    pytest.importorskip("gcsfs", reason="the extra gcs is not installed")
    harness.fit(tmp_path / "whole")
    wanted = harness.outcome(tmp_path / "whole")
    store = Store("runs")
    with serving(store) as host:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        environment |= {"STORAGE_EMULATOR_HOST": host, "JAX_PLATFORMS": "cpu"}

        def start(place: Path) -> subprocess.Popen[str]:
            place.mkdir()
            command = [sys.executable, "-c", CHILD, ADDRESS]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            return subprocess.Popen(command, cwd=place, env=environment, **pipes)

        for number, request in enumerate((9, 25, 40)):
            count = itertools.count(1)
            process: list[subprocess.Popen[str]] = []
            ready = threading.Event()

            def fault(kind: str, path: str) -> None:
                if kind == "PUT" and next(count) == request:  # noqa: B023
                    ready.wait()  # noqa: B023
                    process[0].send_signal(signal.SIGKILL)  # noqa: B023
                    process[0].wait()  # noqa: B023

            store.fault = fault
            process.append(start(tmp_path / f"machine-{number}"))
            ready.set()
            _, errors = process[0].communicate(timeout=300)
            assert process[0].returncode in (-signal.SIGKILL, 0), errors
        store.fault = None
        last = start(tmp_path / "last")
        output, errors = last.communicate(timeout=300)
        assert output == "finished\n", errors
        assert "Traceback" not in errors
    assert harness.outcome(tmp_path / "last" / "runs" / "runs" / "one") == wanted
    kept = {name.removeprefix("runs/one/") for name in store.names()}
    assert kept == {*files_of(tmp_path / "last" / "runs" / "runs" / "one"), mirror._OWNER}
    assert json.loads(store.objects["runs"]["one/manifest.json"])["files"]
    assert ft.load(tmp_path / "last/runs/runs/one/model.safetensors")
