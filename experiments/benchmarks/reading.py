"""Times the loading of a ResNet-50 against torch and safetensors, on the same two files.

    python experiments/benchmarks/reading.py

`flaxtransfer.load` reads the bytes of a file, finds the network among the keys, checks every
number, and gives arrays in place; their SHA-256 is computed beside this and after it, and one
contestant waits for it. `safetensors.torch.load_file` maps the file and reads nothing, so that one
contestant copies each tensor, as whoever uses it will, and another one also takes the SHA-256 of
the file; `safetensors.numpy.load_file` copies by itself. Each contestant is a process of its own,
and they take turns; a turn ends with the checksum, so that none is computed while others are timed.
Programs load once: before each turn, memory of the last one goes back to the system. CPU is the
least time that all threads of the process took in a turn, checksum included. Memory is the peak of
what the process holds during its first turn, less what it held before. Figures:
experiments/results/reading.md.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from turns import Contestant, Facts, alternate, serve

FILES = {"safetensors": "model.safetensors", "torch.save": "model.pt"}
OWN = ("flaxtransfer", "flaxtransfer, hashed")
PEERS = {
    "safetensors": ("peer", "peer, in numpy", "peer, copied", "peer, copied and hashed"),
    "torch.save": ("peer", "peer, copied", "peer, copied and hashed"),
}
LIBRARIES = ("flaxtransfer", "torch", "safetensors", "numpy")


@dataclass(frozen=True)
class Reading:
    """Time the loading of weights.

    Args:
        model: the network in the files.
        rounds: turns of each contestant.
        first: gives the contestants real-time priority, so that other work on the machine does
            not disturb them; needs root, and holds others up for some seconds.
    """

    model: str = "resnet50"
    rounds: int = 15
    first: bool = False


def main() -> None:
    """Writes the files, lets the contestants take turns, and prints the table."""
    options = tyro.cli(Reading)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    print(f"Python {platform.python_version()}, {versions}\n")
    heads = ("best", "median", "CPU", "peak memory", "best, ratio", "memory, ratio")
    print(f"| file | contestant | {' | '.join(heads)} |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write(options.model, Path(folder))
        for kind, name in FILES.items():
            path = Path(folder) / name
            size = path.stat().st_size / 1e6
            with ExitStack() as stack:
                contestants = [
                    stack.enter_context(
                        Contestant(who, Path(__file__).name, {"who": who, "path": str(path)})
                    )
                    for who in (*OWN, *PEERS[kind])
                ]
                if options.first:
                    for each in contestants:
                        each.go_first()
                alternate(contestants, options.rounds)
                own, hashed, *peers = contestants
                for each in contestants:
                    ours = hashed if each.name.endswith("hashed") else own
                    print(row(f"{kind}, {size:.0f} MB", each, ours if each in peers else None))


def row(file: str, each: Contestant, own: Contestant | None) -> str:
    """One line of the table; the ratio is ours over the peer's of the line, hashed or not."""
    ratios = ["", ""]
    if own is not None:
        ratios = [f"{own.best / each.best:.2f}", f"{own.facts['peak'] / each.facts['peak']:.2f}"]
    cells = [
        *(file, each.name, f"{1e3 * each.best:.0f} ms", f"{1e3 * each.median:.0f} ms"),
        *(f"{1e3 * each.facts['cpu']:.0f} ms", f"{each.facts['peak'] / 1e6:.0f} MB", *ratios),
    ]
    return f"| {' | '.join(cells)} |"


def write(model: str, folder: Path) -> None:
    """The same network as safetensors and as a file of torch."""
    import jax
    import numpy as np
    import torch
    from safetensors.torch import load_file, save_file

    import flaxtransfer as ft

    config = ft.models.ARCHITECTURES[model]
    variables = jax.tree.map(np.asarray, ft.resnet(config).init(jax.random.key(0)))
    own = folder / "own.safetensors"
    ft.save(own, ft.Pretrained(variables, config, ft.weights.IMAGENET))
    state = {name: tensor.clone() for name, tensor in load_file(own).items()}
    own.unlink()
    # Without our header, as other programs write them.
    save_file(state, folder / FILES["safetensors"])
    torch.save(state, folder / FILES["torch.save"])


def prepare(job: Facts) -> tuple[Facts, Callable[[], Facts]]:
    """One contestant."""
    load = loader(job["who"], Path(job["path"]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = held("VmRSS")
    result = load()
    settle(result)
    peak = held("VmHWM") - before
    del result

    cpu: list[float] = []

    trim = ctypes.CDLL(None).malloc_trim

    def turn() -> Facts:
        trim(0)
        began, used = time.perf_counter(), time.process_time()
        result = load()
        seconds = time.perf_counter() - began
        settle(result)
        cpu.append(time.process_time() - used)
        del result
        return {"seconds": seconds, "cpu": min(cpu)}

    return {"peak": peak}, turn


def settle(result: Any) -> None:
    """Waits for the checksum of ours."""
    getattr(result, "sha256", "")


def loader(who: str, path: Path) -> Callable[[], Any]:
    """What a contestant does in a turn."""
    if who in OWN:
        import flaxtransfer as ft

        ft.load("builtin")  # what is imported on first use is not counted

        def own() -> ft.Pretrained:
            checkpoint = ft.load(path)
            if who.endswith("hashed"):
                settle(checkpoint)
            return checkpoint

        return own
    if who.endswith("in numpy"):
        from safetensors import numpy as in_numpy

        return lambda: in_numpy.load_file(path)
    import torch
    from safetensors.torch import load_file

    def read() -> dict[str, Any]:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: dict[str, Any] = torch.load(path, weights_only=True)
        return state

    if who == "peer":
        return read
    if who == "peer, copied":
        return lambda: {name: tensor.clone() for name, tensor in read().items()}

    def hashed() -> tuple[dict[str, Any], str]:
        state = {name: tensor.clone() for name, tensor in read().items()}
        with path.open("rb") as file:
            return state, hashlib.file_digest(file, "sha256").hexdigest()

    return hashed


def held(field: str) -> int:
    """Bytes that the system says this process holds, or held at its peak."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("{"):
        serve(prepare)
    else:
        main()
