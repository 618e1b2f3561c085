"""Loads the files that other programs write and compares the logits with those of the peer.

    pip install '.[whole-job]' -c constraints.txt    # parity, and fastai
    python experiments/benchmarks/weight_files.py

Each row is a shape of file, each column a network of a peer with random weights and statistics. A
cell is the largest difference of the logits, relative to the largest logit; of the features, where
the head is not one linear map and stays out; or that the file is refused. Anything else is wrong,
and the script then ends with code 1.
"""

from __future__ import annotations

import collections
import functools
import importlib.metadata
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peer_training  # noqa: F401  adds to PROGRAMS
import torch
import tyro
from peer_files import PEERS, SHAPES, SIZE, Peer, Written, features, other
from peer_programs import PROGRAMS
from rich.console import Console
from torch import nn

import flaxtransfer as ft


@dataclass(frozen=True)
class WeightFiles:
    """Compare loaded files with the peers that wrote them.

    Args:
      only: shapes and networks whose name contains this.
      json: file for the figures.
    """

    only: str = ""
    json: Path | None = None


@functools.cache
def forward(config: ft.models.ResNetConfig, stop: str | None) -> Any:
    model = ft.resnet(config)
    return jax.jit(lambda variables, images: model.apply(variables, images, stop=stop)[0])


@dataclass(frozen=True)
class Cell:
    """What became of a file: its number, or how it was refused."""

    right: bool
    text: str
    error: str = ""


def outcome(written: Written, peer: Peer | None, network: nn.Module | None) -> Cell:
    """Loads a file and compares."""
    network = written.network if written.network is not None else network
    try:
        found = ft.load(written.path, **written.options)
    except (ValueError, TypeError, OSError) as error:
        text = str(error)
        short = len(text.splitlines()) == 1 and len(text) <= 600
        said = "refused" if short else "refused at length"
        return Cell(short and written.expected in ("refused", "any"), said, text)
    if written.expected == "refused" or network is None:
        right = written.expected in ("any", "dilated")
        if written.expected == "dilated":
            right = any("dilation" in note for note in found.notes)
        return Cell(right, "loaded, with a note" if right else "LOADED", "; ".join(found.notes))
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    stop = "head" if found.no_head else None
    arrays = images.permute(0, 2, 3, 1).numpy()
    ours = np.asarray(forward(found.config, stop)(found.variables, arrays))
    if stop:
        theirs = features(peer or Peer("", nn.Identity), network, images).numpy()
    else:
        with torch.no_grad():
            theirs = (peer.logits if peer else _logits)(network(images)).numpy()
    if ours.shape != theirs.shape:
        return Cell(False, f"SHAPE {ours.shape}, not {theirs.shape}")
    difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    kind = "features " if stop else ""
    expected = written.expected in ("any", "features" if stop else "logits")
    right = expected and difference <= written.limit
    return Cell(right, f"{kind}{difference:.1e}", "" if right else "; ".join(found.notes))


def _logits(output: Any) -> torch.Tensor:
    return getattr(output, "logits", output)


def tried(make: Callable[[Path], Written], peer: Peer | None, network: nn.Module | None) -> Cell:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # Peers warn of their own future.
        warnings.simplefilter("ignore")
        try:
            written = make(Path(folder))
        except Exception as error:  # Of the peer, whatever it is: no verdict on the file.
            return Cell(False, "not written", f"{type(error).__name__}: {error}")
        return outcome(written, peer, network)


def main(options: WeightFiles) -> None:
    """Writes, loads, compares, prints."""
    torch.set_num_threads(2)
    cells: dict[tuple[str, str], Cell] = {}
    for name, make in SHAPES.items():
        for peer in PEERS:
            if options.only in f"{name} {peer.name}":
                network = other(peer, 0)
                cells[name, peer.name] = tried(
                    functools.partial(make, peer, network), peer, network
                )
    for name, alone in PROGRAMS.items():
        if options.only in name:
            cells[name, ""] = tried(alone, None, None)
    show(cells)
    if options.json is not None:
        rows = [{"shape": a, "peer": b, **vars(cell)} for (a, b), cell in cells.items()]
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    raise SystemExit(any(not cell.right for cell in cells.values()))


def show(cells: Mapping[tuple[str, str], Cell]) -> None:
    """Tables in Markdown, the texts of refusals, counts and versions."""
    console = Console(width=10_000, highlight=False, soft_wrap=True)

    def line(*words: str) -> None:
        console.print(f"| {' | '.join(words)} |", markup=False)

    names = [peer.name for peer in PEERS]
    line("file", *names)
    line(*["---"] * (len(names) + 1))
    for name in SHAPES:
        if any((name, peer) in cells for peer in names):
            own = [cells.get((name, peer)) for peer in names]
            line(name, *("–" if cell is None else cell.text for cell in own))
    console.print()
    line("file", "result")
    line("---", "---")
    for name in PROGRAMS:
        if (name, "") in cells:
            line(name, cells[name, ""].text)
    console.print("\nRefusals, word by word:\n")
    for (name, peer), cell in cells.items():
        if cell.text == "refused":
            console.print(f"- {name}{f' ({peer})' if peer else ''}: {cell.error}", markup=False)
    wrong = {key: cell for key, cell in cells.items() if not cell.right}
    counts = collections.Counter(
        "wrong" if not cell.right else "refused" if cell.text == "refused" else "right"
        for cell in cells.values()
    )
    console.print(f"\n{len(cells)} files: {dict(counts)}")
    for (name, peer), cell in wrong.items():
        console.print(f"WRONG {name} ({peer}): {cell.text}; {cell.error}", markup=False)
    packages = ("jax", "torch", "torchvision", "timm", "transformers", "keras", "fastai")
    console.print(", ".join(f"{p} {_version(p)}" for p in packages), markup=False)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main(tyro.cli(WeightFiles))
