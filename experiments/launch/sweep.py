"""Runs the lines of a sweep, each a command with a run folder of its own; what is done stays done.

    python experiments/launch/sweep.py sweep.jsonl                  # one after another
    python experiments/launch/sweep.py sweep.jsonl --workers 2      # two at a time
    python experiments/launch/sweep.py sweep.jsonl --index 7        # the one of a SLURM array
    python experiments/launch/sweep.py sweep.jsonl --ray            # tasks of a Ray cluster
    python experiments/launch/sweep.py sweep.jsonl --asha accuracy  # Ray Tune stops what lags

A line is JSON: the words of a command, such as

    ["flaxtransfer", "train", "--data", "folder:scans/", "--learning-rate", "1e-3"]

Its folder is ``sweep/<hash of the line>`` beside the file, and ``{run}`` in a word stands for it.
``flaxtransfer train`` gets ``--run`` and ``--resume`` where the line has none, so that a sweep that
was killed goes on where it was; any other program must bear being started again. What has ended
well is recorded beside the folder, in ``<folder>.json``, and is not run again. SIGINT and SIGTERM
go to what runs. The exit code is 0 if every line has ended well, 1 if one has not, 2 if the file is
wrong. On SLURM: ``sbatch --array=0-99 --wrap 'python ... --index $SLURM_ARRAY_TASK_ID'``.

Ray (extra ``ray``) needs a disk that all its machines see. ASHA compares lines at equal steps of
validation (L. Li et al., "A System for Massively Parallel Hyperparameter Tuning", 2020): those of
other lengths or metrics do not belong in one sweep then.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

POLL_S = 1.0
"""Between two looks at the metrics of a run."""


@dataclass(frozen=True)
class Line:
    """One command of a sweep.

    Args:
        number: in the file, from 0.
        words: program and arguments, with the folder filled in.
        folder: of the run.
    """

    number: int
    words: tuple[str, ...]
    folder: Path

    @property
    def record(self) -> Path:
        """Where it is written that the line has ended well."""
        return self.folder.with_name(f"{self.folder.name}.json")


def read_lines(path: Path) -> list[Line]:
    """The lines of a sweep; raises a ``ValueError`` that names every line that is wrong."""
    found, problems, seen = [], [], {}
    for number, text in enumerate(path.read_text().splitlines()):
        if not text.strip():
            continue
        try:
            words = json.loads(text)
        except ValueError:
            words = None
        if not (isinstance(words, list) and words and all(isinstance(w, str) for w in words)):
            problems.append(f"line {number} must be a JSON list of words, got {text[:60]!r}")
            continue
        name = hashlib.sha256(json.dumps(words).encode()).hexdigest()[:12]
        if name in seen:
            problems.append(f"line {number} is line {seen[name]} again")
        seen.setdefault(name, number)
        folder = path.with_suffix("") / name
        words = [word.replace("{run}", str(folder)) for word in words]
        if words[:2] == ["flaxtransfer", "train"]:
            words += ["--run", str(folder)] if "--run" not in words else []
            words += ["--resume"] if "--resume" not in words else []
        found.append(Line(number, tuple(words), folder))
    if problems or not found:
        raise ValueError(f"{path}: {'; '.join(problems[:10]) or 'there is no line'}")
    return found


def run_line(line: Line, tell: Callable[[dict], None] | None = None) -> int:
    """Runs a line to its end, if nobody has or does; returns its exit code.

    Args:
        line: to be run.
        tell: is given each row of validation as it comes, and may raise to end the line.
    """
    line.folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(line.folder.with_name(f"{line.folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"line {line.number} is run by another process", file=sys.stderr)
        return 1
    with lock:
        if line.record.exists():
            return 0
        began = time.time()
        # In a session of its own: a Ctrl-C comes from us, and comes once.
        process = subprocess.Popen(line.words, start_new_session=True)
        running.add(process)
        try:
            code = _followed(line, process, tell)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
            running.discard(process)
        if code == 0:
            written = {"words": line.words, "seconds": round(time.time() - began, 1)}
            part = line.record.with_suffix(".part")
            part.write_text(json.dumps(written) + "\n")
            part.replace(line.record)
        return code


running: set[subprocess.Popen] = set()
"""What this process has started and what has not ended."""


def _followed(line: Line, process: subprocess.Popen, tell: Callable | None) -> int:
    told = 0
    while tell is not None and process.poll() is None:
        time.sleep(POLL_S)
        rows = validation(line.folder)
        for row in rows[told:]:
            tell(row)
        told = len(rows)
    return process.wait()


def validation(folder: Path) -> list[dict]:
    """The rows of validation that a run has written so far."""
    # Here, because most sweeps need no jax of their own.
    from flaxtransfer.training import read_metrics

    try:
        return [row for row in read_metrics(folder) if row["kind"] == "validation"]
    except FileNotFoundError:
        return []


def run_here(lines: Sequence[Line], workers: int) -> Iterator[tuple[Line, int]]:
    """Runs lines on this machine, so many at a time."""
    stopped: list[int] = []

    def stop(number: int, frame: object) -> None:
        del frame
        stopped.append(number)
        for process in list(running):
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)

    def run(line: Line) -> int:
        return 128 + stopped[0] if stopped else run_line(line)

    with ThreadPoolExecutor(workers) as pool:
        yield from zip(lines, pool.map(run, lines), strict=True)


def run_on_ray(lines: Sequence[Line]) -> Iterator[tuple[Line, int]]:
    """Runs lines as tasks of a Ray cluster, started here if there is none; one CPU each."""
    import ray

    ray.init(ignore_reinit_error=True, log_to_driver=True)
    task = ray.remote(num_cpus=1, max_retries=2)(run_line)
    yield from zip(lines, ray.get([task.remote(line) for line in lines]), strict=True)


def run_by_asha(lines: Sequence[Line], metric: str) -> Iterator[tuple[Line, int]]:
    """Runs lines as trials of Ray Tune; those that lag behind at equal steps are stopped."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    def trial(config: dict) -> None:
        line = lines[config["line"]]

        def tell(row: dict) -> None:
            tune.report({metric: row[metric], "step": row["step"], "code": 0})

        code = run_line(line, tell)
        rows = validation(line.folder)
        last = rows[-1] if rows else {metric: float("-inf"), "step": 0}
        tune.report({metric: last[metric], "step": last["step"] + 1, "code": code})

    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        param_space={"line": tune.grid_search(list(range(len(lines))))},
        tune_config=tune.TuneConfig(
            metric=metric,
            mode="max",
            scheduler=ASHAScheduler(time_attr="step", max_t=10**9, grace_period=1),
        ),
        run_config=tune.RunConfig(failure_config=tune.FailureConfig(max_failures=2)),
    )
    for result in tuner.fit():
        line = lines[result.config["line"]]
        if result.error is None and not line.record.exists():
            print(f"line {line.number} was stopped at step {result.metrics['step']}")
        code = 1 if result.error is not None else int(result.metrics["code"])
        yield line, code


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=Path, help="file with one command a line")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--workers", type=int, default=1, help="lines at a time, here")
    how.add_argument("--index", type=int, help="run this line alone")
    how.add_argument("--ray", action="store_true", help="run lines as tasks of Ray")
    how.add_argument("--asha", metavar="METRIC", help="run lines as trials of Ray Tune")
    options = parser.parse_args()
    try:
        lines = read_lines(options.sweep)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    if options.workers < 1:
        parser.error(f"--workers must be >= 1, got {options.workers}")
    if options.index is not None:
        if not 0 <= options.index < len(lines):
            parser.error(f"--index must be in 0 .. {len(lines) - 1}, got {options.index}")
        lines = [lines[options.index]]
    waiting = [line for line in lines if not line.record.exists()]
    print(f"{len(lines)} lines, {len(lines) - len(waiting)} of them done before", flush=True)
    if options.ray:
        ended = run_on_ray(waiting)
    elif options.asha:
        ended = run_by_asha(waiting, options.asha)
    else:
        ended = run_here(waiting, options.workers)
    codes = []
    for line, code in ended:
        codes.append(code)
        if code:
            print(f"line {line.number} has ended with code {code}: {' '.join(line.words)}")
    stopped = [code for code in codes if code >= 128]
    return stopped[0] if stopped else int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
