"""The arrays of a folder that orbax wrote, for whoever and whatever it was written."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flaxtransfer.checkpoint import orbax_driver, step_files
from flaxtransfer.checkpoint.failures import Damage, DamagedCheckpointError
from flaxtransfer.checkpoint.folders import local


@dataclass(frozen=True)
class Arrays:
    """What a folder of orbax' holds, without anything that says what it is for.

    Attributes:
      by_path: the numbers, by the path of each leaf.
      checked: whether each leaf was compared with its checksum; only our own steps have them.
    """

    by_path: dict[str, np.ndarray]
    checked: bool


def folder_of_arrays(folder: str | os.PathLike[str]) -> Path | None:
    """The folder in which orbax keeps a tree: this one, or the only item in it; None without one.

    Raises:
      ValueError: several trees, or a folder of steps; the text names them.

    >>> folder_of_arrays("/") is None
    True
    """
    path = Path(folder)
    if (path / "_METADATA").is_file():
        return path
    items = sorted(inner.parent for inner in path.glob("*/_METADATA"))
    if len(items) == 1:
        return items[0]
    if items:
        names = ", ".join(str(item) for item in items)
        raise ValueError(f"{path} holds several trees, name one: {names}")
    steps = sorted({inner.parents[1] for inner in path.glob("[0-9]*/*/_METADATA")})
    if steps:
        raise ValueError(f"{path} holds checkpoints of several steps, name one: "
                         f"{', '.join(map(str, steps))}")  # fmt: skip
    return None


def read_arrays(folder: str | os.PathLike[str], *, most: int) -> Arrays:
    """The arrays of a folder that any orbax wrote, without a template.

    You want it to look into checkpoints of others. For those of ours there is ``Checkpoints``,
    which also fills a template and passes damaged steps over.

    Args:
      folder: as ``folder_of_arrays`` accepts it, or one of our steps.
      most: numbers that all arrays together may have; nothing is read if there are more.

    Returns:
      The arrays; text and empty nodes of the tree are left out.

    Raises:
      ValueError: no such folder, links in it, more numbers than ``most``.
      DamagedCheckpointError: it cannot be read, or does not match its checksums.
      OSError: the machine did not allow it.
    """
    path = local(folder)
    tree = folder_of_arrays(path)
    if ".orbax-checkpoint-tmp" in f"{tree}":
        raise ValueError(f"{tree} was never finished: the program that wrote it ended before")
    if tree is None:
        raise ValueError(f"{path} holds nothing that orbax wrote")
    linked = [inner for inner in path.rglob("*") if inner.is_symlink()]
    if linked:
        raise ValueError(f"{linked[0]} is a link, and a checkpoint has none")
    try:
        with orbax_driver.quiet():
            if path.name.isdecimal() and (path / "record" / "metadata").is_file():
                return Arrays(_of_our_step(path, most), checked=True)
            return Arrays(_of_anybody(tree, most), checked=False)
    except Damage as damage:
        raise DamagedCheckpointError(f"{path} is damaged: {damage}") from damage


def _of_our_step(path: Path, most: int) -> dict[str, np.ndarray]:
    folder, step = path.parent, int(path.name)
    leaves = step_files.read_record(folder, step)["leaves"]
    _limit([math.prod(leaf["shape"]) for leaf in leaves.values() if "shape" in leaf], most, path)
    return step_files.read_arrays(folder, step, leaves)


def _of_anybody(folder: Path, most: int) -> dict[str, np.ndarray]:
    description = orbax_driver.describe(folder)
    _limit(description.sizes.values(), most, folder)
    return orbax_driver.read_tree(folder, description)


def _limit(sizes: Iterable[int], most: int, folder: Path) -> None:
    numbers = sum(sizes)
    if numbers > most:
        raise ValueError(f"{folder} would unfold to {numbers:,} numbers, which no weights do")
