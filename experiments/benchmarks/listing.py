"""Times the listing of a large image folder against a bare loop over it.

    python experiments/benchmarks/listing.py

The loop is ``os.scandir`` with one ``stat`` per entry, the least that says which files there are
and how large. Both take turns in one process over the same folder, in CPU seconds, the best of
several turns each. The files have an image's first bytes and no more: nothing is decoded.
Figures: experiments/results/listing.md.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from flaxtransfer.data import open_source, open_unlabeled

FIRST_BYTES = b"\x89PNG\r\n\x1a\n" + bytes(8)
NAMES = {
    "padded": lambda i: f"img_{i:07d}.png",
    "counted": lambda i: f"{i}.png",
    "hashed": lambda i: f"{hash((i, 7)) & (1 << 64) - 1:016x}.jpg",
    "unknown suffix": lambda i: f"{i}.scan",
}


@dataclass(frozen=True)
class Listing:
    """Time the listing of a folder.

    Args:
      files: in the folder.
      classes: folders that they lie in.
      rounds: turns of each.
      names: kinds of file names.
    """

    files: int = 200_000
    classes: int = 10
    rounds: int = 5
    names: tuple[str, ...] = tuple(NAMES)


def main() -> None:
    options = tyro.cli(Listing)
    print("| names | scandir and stat | open_source | ratio | open_unlabeled | ratio |")
    print("|---|---|---|---|---|---|")
    for kind in options.names:
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            make(root, options, NAMES[kind])
            turns: list[Callable[[], int]] = [
                lambda root=root: bare(root),
                lambda root=root: len(open_source(f"folder:{root}")),
                lambda root=root: len(open_unlabeled(f"folder:{root}").names),
            ]
            best = [float("inf")] * len(turns)
            for _ in range(options.rounds):
                for place, turn in enumerate(turns):
                    began = time.process_time()
                    assert turn() == options.files
                    best[place] = min(best[place], time.process_time() - began)
        least, labeled, unlabeled = best
        print(
            f"| {kind} | {least:.2f} s | {labeled:.2f} s | {labeled / least:.2f} | "
            f"{unlabeled:.2f} s | {unlabeled / least:.2f} |",
            flush=True,
        )


def make(root: Path, options: Listing, name: Callable[[int], str]) -> None:
    """Makes the folder."""
    for label in range(options.classes):
        (root / f"class{label}").mkdir()
    for i in range(options.files):
        with open(root / f"class{i % options.classes}" / name(i), "wb") as file:
            file.write(FIRST_BYTES)


def bare(root: Path) -> int:
    """The least work: every entry of the class folders, with its size."""
    count = 0
    with os.scandir(root) as folders:
        for folder in folders:
            with os.scandir(folder) as entries:
                for entry in entries:
                    count += entry.stat().st_size > 0
    return count


if __name__ == "__main__":
    main()
