"""Two processes that fill one cache at once.

    python -m tests.faults.cache_race --rounds 1000

In every round both look for the same array, and write it where they do not find it. Rounds differ
in what is there before: nothing, a whole array, or a damaged one, which both want to replace; and
in whether the processes make room meanwhile, so that arrays vanish while they are read. After each
round both arrays must be right, and what lies in the folder must be one whole entry, or none where
room was made. Prints the number of rounds, of failures and of damaged entries.
Figures: experiments/results/faults.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import tempfile
import time
import traceback
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np

from flaxtransfer.training import cached_loader

BEFORE = ("nothing", "whole", "half", "one bit", "no values", "text")
"""What lies under the key when a round begins."""

SHAPE = (64, 32)


@dataclass(frozen=True)
class Round:
    """One key, which both processes want at once."""

    number: int

    @property
    def before(self) -> str:
        return BEFORE[self.number % len(BEFORE)]

    @property
    def makes_room(self) -> bool:
        return self.number // len(BEFORE) % 2 == 1

    @property
    def fingerprint(self) -> dict[str, str]:
        return {"round": str(self.number)}

    @property
    def values(self) -> np.ndarray:
        return np.random.default_rng(self.number).standard_normal(SHAPE, np.float32)

    def write(self, folder: Path) -> np.ndarray:
        parts = np.split(self.values, 4)
        return cached_loader.write_array(folder, self.fingerprint, SHAPE, "float32", parts)

    def find(self, folder: Path) -> np.ndarray | None:
        return cached_loader.get(folder, self.fingerprint, SHAPE, "float32")[0]

    def prepare(self, folder: Path) -> None:
        """Puts there what lies there before."""
        if self.before == "nothing":
            return
        self.write(folder)
        (slot,) = (meta.parent for meta in folder.glob("*/features.json"))
        file = slot / "features.npy"
        data = bytearray(file.read_bytes())
        if self.before == "half":
            file.write_bytes(data[: len(data) // 2])
        elif self.before == "one bit":
            data[-5] ^= 1
            file.write_bytes(data)
        elif self.before == "no values":
            file.unlink()
        elif self.before == "text":
            (slot / "features.json").write_text("{")

    def fill(self, folder: Path) -> str:
        """What each of the two does; returns what went wrong."""
        found = self.find(folder)
        if found is None:
            found = self.write(folder)
        if self.makes_room:
            cached_loader.evict(folder, found.nbytes, 1)
        return "" if np.array_equal(found, self.values) else "another array was returned"

    def damage(self, folder: Path) -> str:
        """What is wrong with the folder after the round."""
        names = [path.name for path in folder.iterdir()]
        if left := [name for name in names if name.startswith(".")]:
            return f"left behind: {left}"
        if len(names) > 1 or (not names and not self.makes_room):
            return f"there must be one entry, got {names}"
        if names and not np.array_equal(self.find(folder), self.values):
            return "the entry is damaged"
        return ""


def take_part(folder: Path, rounds: int, barrier: Barrier, report: Path) -> None:
    """One of the two processes; writes what went wrong, round by round."""
    failures = []
    for number in range(rounds):
        barrier.wait()
        try:
            problem = Round(number).fill(folder / str(number))
        except BaseException:
            problem = traceback.format_exc()
        if problem:
            failures.append(f"round {number}: {problem}")
        barrier.wait()
    report.write_text(json.dumps(failures))


def race(folder: Path, rounds: int) -> tuple[list[str], list[str], dict[str, int]]:
    """Runs the rounds.

    Returns:
        Failures, damaged entries, and how many rounds began with what.
    """
    for number in range(rounds):
        Round(number).prepare(folder / str(number))
        (folder / str(number)).mkdir(exist_ok=True)
    context = multiprocessing.get_context("spawn")
    barrier, reports = context.Barrier(2), [folder / f"{i}.json" for i in range(2)]
    other = context.Process(target=take_part, args=(folder, rounds, barrier, reports[1]))
    other.start()
    take_part(folder, rounds, barrier, reports[0])
    other.join()
    failures = list(itertools.chain(*(json.loads(path.read_text()) for path in reports)))
    damaged = [
        f"round {number}: {problem}"
        for number in range(rounds)
        if (problem := Round(number).damage(folder / str(number)))
    ]
    counts = {kind: sum(Round(n).before == kind for n in range(rounds)) for kind in BEFORE}
    return failures, damaged, counts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1000)
    options = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        failures, damaged, counts = race(Path(folder), options.rounds)
    for line in (*failures, *damaged):
        print(line)
    print(
        f"{options.rounds} rounds of 2 processes in {time.perf_counter() - began:.0f} s: "
        f"{len(failures)} failures, {len(damaged)} damaged entries; "
        f"there was before: {', '.join(f'{kind} {n}' for kind, n in counts.items())}"
    )
    raise SystemExit(bool(failures or damaged))


if __name__ == "__main__":
    main()
