"""Experiments of many short runs: shared by processes, continued where they stopped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax


def share(processes: int) -> None:
    """Runs this script once more in every process, each on its own cores, and waits for them.

    Every one gets this script's arguments and its own number as ``--worker``. When one fails the
    others go on, for what they find is kept.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    workers = []
    for number in range(processes):
        own = ",".join(map(str, cores[number::processes]))
        pinned = ["taskset", "-c", own] if own and shutil.which("taskset") else []
        command = [sys.executable, *sys.argv, "--worker", str(number)]
        workers.append(subprocess.Popen([*pinned, *command]))
    statuses = [worker.wait() for worker in workers]
    if any(statuses):
        raise SystemExit("a worker has failed; its message is above, the results so far are kept")


def compile_once(folder: Path) -> None:
    """Keeps compiled programs in a folder: each run compiles its own steps, most of them again."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The results so far; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_row(path: Path, row: dict[str, Any]) -> None:
    """One result more."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
