"""Folders that orbax wrote: a tree of arrays by path, of anybody's program or of a run of ours."""

import json
from pathlib import Path

import numpy as np

from flaxtransfer.weights import archive

__all__ = ["MODEL", "read"]

MODEL = "model of the run"
"""Metadata under which a step of a run says what network it trains, as JSON."""


def read(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]] | None:
    """Arrays, metadata and notes of a folder; None for one that orbax did not write.

    Raises:
        ValueError: a folder that is damaged, holds links or several trees, or whose arrays would
            unfold to far more than it holds.
    """
    # Orbax takes a second to be imported, and whoever loads a file has no use for it.
    if not any(path.is_file() for path in folder.glob("_METADATA")) and not any(
        path.is_file() for depth in ("*", "[0-9]*/*") for path in folder.glob(f"{depth}/_METADATA")
    ):
        return None
    from flaxtransfer.checkpoint import read_arrays

    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    found = read_arrays(folder, most=archive.most(size) // 4)
    notes = ["a folder of orbax"]
    if not found.checked:
        notes = ["a folder of orbax, which keeps no checksums: damage to numbers would not show"]
    return found.by_path, _of_run(folder), notes


def _of_run(folder: Path) -> dict[str, str]:
    """What the run says of itself, where the folder is a step of one."""
    path = folder.absolute().parent.parent / "config.json"
    if folder.absolute().parent.name != "checkpoints" or not path.is_file():
        return {}
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {MODEL: json.dumps(model)}
