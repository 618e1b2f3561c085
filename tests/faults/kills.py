"""Kills a run at its file operations, resumes it, and compares the end with that of a whole run.

    python -m tests.faults.kills                      # SIGKILL at every file operation
    python -m tests.faults.kills --signal TERM        # SIGTERM
    python -m tests.faults.kills --every 20           # at every twentieth
    python -m tests.faults.kills --job race --random 10   # a race between strategies

A file operation is whatever Python reports to its audit hooks below the run folder: a file opened
for writing, a rename, a folder made or removed. The signal comes just before it.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.faults import harness

EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")


def child(folder: str, log: str, at: int, number: int, job: str) -> None:
    """The run, in a process of its own; writes to a log how it ended."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if not _is_ours(event, arguments, folder):
            return
        count += 1
        if count == at:
            os.kill(os.getpid(), number)

    os.environ["JAX_PLATFORMS"] = "cpu"
    text = "finished"
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        sys.addaudithook(hook)
        try:
            harness.JOBS[job][0](Path(folder))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
    Path(log).write_text(f"{count} {text}")
    os._exit(0)


def _is_ours(event: str, arguments: tuple[object, ...], folder: str) -> bool:
    if event == "open":
        path, _, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return bool(writes) and str(path).startswith(folder)
    if event not in EVENTS:
        return False
    # Within rmtree, names are relative to an open folder.
    return any(
        isinstance(a, str | os.PathLike) and (str(a).startswith(folder) or "/" not in str(a))
        for a in arguments
    )


def start(folder: Path, at: int = 0, number: int = signal.SIGKILL, job: str = "fit") -> str:
    """Runs or resumes; returns how it ended."""
    log = folder.with_suffix(".log")
    log.unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.harness"])
    process = context.Process(target=child, args=(str(folder), str(log), at, number, job))
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        return "0 hangs"
    return log.read_text() if log.exists() else "killed"


def tried(place: Path, whole: dict[str, str], at: int, number: int, job: str = "fit") -> str:
    """One signal at operation ``at``: "same", or what is wrong."""
    folder = place / f"run-{at}"
    ended = start(folder, at, number, job)
    if number == signal.SIGKILL and ended != "killed":
        return f"was not killed: {ended}"
    # Before training begins, SIGTERM does in a script what it does by default.
    if number == signal.SIGTERM and not any(
        word in ended for word in ("finished", "Interrupted", "killed")
    ):
        return f"SIGTERM: {ended}"
    ended = start(folder, job=job)
    if "finished" not in ended:
        return f"not resumed: {ended}"
    found = harness.JOBS[job][1](folder)
    wrong = [name for name in whole if found[name] != whole[name]]
    left = harness.litter(folder)
    return f"differs in {wrong}" if wrong else f"left {left}" if left else "same"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--job", choices=tuple(harness.JOBS), default="fit")
    parser.add_argument("--random", type=int, help="so many operations, drawn")
    options = parser.parse_args()
    number = getattr(signal, f"SIG{options.signal}")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(place / "compiled"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        start(place / "warm", job=options.job)  # Compiles, for all others.
        count = int(start(place / "whole", job=options.job).split()[0])
        whole = harness.JOBS[options.job][1](place / "whole")
        results = Counter()
        points = range(options.first, count + 1, options.every)
        if options.random is not None:
            points = sorted(random.Random(0).sample(points, options.random))
        for at in points:
            result = tried(place, whole, at, number, options.job)
            results[result.split(":")[0]] += 1
            if result != "same":
                print(f"operation {at} of {count}: {result}", flush=True)
        print(f"SIG{options.signal} at {sum(results.values())} of {count} operations: {results}")


if __name__ == "__main__":
    main()
