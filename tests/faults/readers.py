"""Damaged and hostile weights for every reader: errors of one kind, nothing run, nothing written.

Files and folders of every container are made, damaged at random, and given to `load`. What may
come out is a checkpoint or a ValueError (a FileNotFoundError from a folder that lacks a file);
anything else, a file opened for writing, a process or a connection ends the run with the seed of
the case. Prints a table of what happened.

    python -m tests.faults.readers --minutes 10
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import resource
import shutil
import socket
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tyro
from flax import serialization

from flaxtransfer.checkpoint import CheckpointManager
from flaxtransfer.models import ResNetConfig, leaf_shapes
from flaxtransfer.paths import unflatten
from flaxtransfer.weights import Preprocessing, Pretrained, load
from flaxtransfer.weights.exports import onnx
from flaxtransfer.weights.naming import huggingface, keras, key_map, timm
from flaxtransfer.weights.readers import array_files

TINY = ResNetConfig(depths=(1, 1, 1, 1), width=4, classes=3)
BOTTLENECK = dataclasses.replace(TINY, block="bottleneck")
BIT = dataclasses.replace(BOTTLENECK, preactivation=True, norm="group", width=32)


@dataclasses.dataclass(frozen=True)
class Fuzz:
    """Damage files and read them.

    Args:
      minutes: in all, shared evenly by the containers.
      seed: of the first case; case n has seed + n.
      memory: GiB of address space that reading may need beyond what the process has.
      only: names of containers; all of them by default.
    """

    minutes: float = 10.0
    seed: int = 0
    memory: float = 2.0
    only: tuple[str, ...] = ()


@dataclasses.dataclass
class Tally:
    """What became of the files of one container."""

    cases: int = 0
    accepted: int = 0
    slowest: float = 0.0
    reasons: set[str] = dataclasses.field(default_factory=set)


def leaves(config: ResNetConfig) -> dict[str, np.ndarray]:
    """Ones, and positive where variances have to be."""
    return {path: np.ones(shape, np.float32) for path, shape in leaf_shapes(config).items()}


Files = dict[str, bytes]
"""What lies under a folder, by relative path."""


def containers() -> dict[str, tuple[str, Files]]:
    """A small one of every container, by name: the path to load, and the files it consists of."""
    found = {
        name: (f"weights{suffix}", {f"weights{suffix}": data})
        for name, (suffix, data) in single_files().items()
    }
    with tempfile.TemporaryDirectory() as folder:
        of_run, of_others = Path(folder) / "run" / "checkpoints", Path(folder) / "others"
        with CheckpointManager.open(of_run) as store:
            store.save(7, {"model": unflatten(leaves(TINY))})
        tree = of_run / "7" / "tree"
        shutil.copytree(tree, of_others / "7" / "tree")
        found["step of a run"] = ("7", gather(of_run, "7"))
        found["orbax folder"] = ("7", gather(of_others, "7"))
    return found


def gather(folder: Path, inner: str) -> Files:
    """The files of a folder in it."""
    paths = sorted(path for path in (folder / inner).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def lay_out(files: Files, folder: str) -> None:
    """Writes them there."""
    for name, data in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def damage(files: Files, chance: random.Random) -> Files:
    """One of them damaged; of several, one is away or empty now and then."""
    name = chance.choice(sorted(files))
    if len(files) > 1 and chance.random() < 0.1:
        return {other: data for other, data in files.items() if other != name}
    data = files[name]
    if data:
        data = chance.choice(DAMAGES)(bytearray(data), chance)
    return {**files, name: data}


def single_files() -> dict[str, tuple[str, bytes]]:
    """A small file of every container that is one, by name: its suffix and its bytes."""
    torch_keys = key_map.to_keys(timm.table_for(TINY), leaves(TINY))
    found = {"safetensors": (".safetensors", array_files.write_safetensors(torch_keys, {"a": "b"}))}
    archive = io.BytesIO()
    np.savez(archive, **key_map.to_keys(timm.BIT_TABLE, leaves(BIT)))
    found["npz"] = (".npz", archive.getvalue())
    v1 = keras.first_version(BOTTLENECK)
    keras_keys = key_map.to_keys(keras.table([]), leaves(v1))
    found["h5"] = (".h5", hdf5(keras_keys))
    with_config = io.BytesIO()
    with zipfile.ZipFile(with_config, "w") as file:
        file.writestr("config.json", "{}")
        file.writestr("model.weights.h5", hdf5(keras_keys))
    found["keras"] = (".keras", with_config.getvalue())
    flax_keys = key_map.to_keys(huggingface.FLAX, leaves(TINY))
    found["flax"] = (".msgpack", serialization.msgpack_serialize(unflatten(flax_keys)))
    plain = Preprocessing((0.5,) * 3, (0.5,) * 3, size=32, resize=32)
    found["onnx"] = (".onnx", onnx.model_bytes(Pretrained(unflatten(leaves(TINY)), TINY, plain)))
    try:
        import torch
    except ImportError:
        return found
    tensors = {key: torch.from_numpy(array.copy()) for key, array in torch_keys.items()}
    for name, zipped in (("torch, zip", True), ("torch, pickle", False)):
        data = io.BytesIO()
        torch.save({"state_dict": tensors}, data, _use_new_zipfile_serialization=zipped)
        found[name] = (".pth", data.getvalue())
    return found


def hdf5(arrays: dict[str, np.ndarray]) -> bytes:
    """As Keras 2 lays arrays out."""
    import h5py

    data = io.BytesIO()
    with h5py.File(data, "w") as file:
        for key, array in arrays.items():
            file[f"{key.split('/')[0]}/{key}:0"] = array
    return data.getvalue()


def flip(data: bytearray, chance: random.Random) -> bytes:
    """Some bits turned, most of them near the front, where headers are."""
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        reach = len(data) if chance.random() < 0.4 else min(len(data), 4096)
        data[chance.randrange(reach)] ^= 1 << chance.randrange(8)
    return bytes(data)


def cut(data: bytearray, chance: random.Random) -> bytes:
    """The front alone."""
    return bytes(data[: chance.randrange(len(data))])


def splice(data: bytearray, chance: random.Random) -> bytes:
    """A piece of it somewhere else."""
    length = chance.randrange(1, min(512, len(data)))
    start, end = chance.randrange(len(data) - length), chance.randrange(len(data))
    return bytes(
        data[:end] + data[start : start + length] + data[end + chance.choice((0, length)) :]
    )


def extreme(data: bytearray, chance: random.Random) -> bytes:
    """Numbers of the largest and smallest kind in the place of others."""
    for _ in range(chance.choice((1, 2, 4))):
        width = chance.choice((1, 2, 4, 8))
        value = chance.choice((0, 1, (1 << (8 * width - 1)) - 1, (1 << 8 * width) - 1))
        at = chance.randrange(max(1, min(len(data), chance.choice((64, 4096, len(data)))) - width))
        data[at : at + width] = value.to_bytes(width, chance.choice(("little", "big")))
    return bytes(data)


def header(data: bytearray, chance: random.Random) -> bytes:
    """The JSON of a safetensors file with other values in it; other files are cut."""
    try:
        length = int.from_bytes(data[:8], "little")
        content = json.loads(bytes(data[8 : 8 + length]))
    except ValueError:
        return cut(data, chance)
    entry = content[chance.choice(sorted(content))]
    field = chance.choice(sorted(entry))
    entry[field] = chance.choice(
        (-1, 0, 1 << 62, [], [0, 1 << 40], [-1, 2], "F8", "F64", None, {"a": 1}, [[1]], 1e300)
    )
    text = json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data[8 + length :])


def inside(data: bytearray, chance: random.Random) -> bytes:
    """A member of a zip archive, damaged, under a checksum that is right."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except zipfile.BadZipFile:
        return extreme(data, chance)
    name = chance.choice(sorted(members))
    if members[name]:
        members[name] = chance.choice((flip, cut, extreme))(bytearray(members[name]), chance)
    if chance.random() < 0.1:
        members[chance.choice(("../out", "/abs", "a/../../b", name + "2"))] = b"\x80\x02}q\x00."
    out = io.BytesIO()
    with zipfile.ZipFile(
        out, "w", chance.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    ) as file:
        for member, content in members.items():
            file.writestr(member, content)
    return out.getvalue()


DAMAGES: tuple[Callable[[bytearray, random.Random], bytes], ...] = (
    flip,
    flip,
    cut,
    splice,
    extreme,
    header,
    inside,
    inside,
)


class Watch:
    """Ends the program where reading a file does what it must not."""

    def __init__(self) -> None:
        self.on = False
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        """Called by the interpreter."""
        if not self.on:
            return
        writes = (
            event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        )
        forbidden = (
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "os.remove",
            "os.rename",
            "os.mkdir",
            "subprocess.",
            "socket.",
            "shutil.",
            "os.putenv",
        )
        # An event loop, which orbax needs, wakes itself through a pair of local sockets.
        local = event == "socket.__new__" and arguments[1] in (-1, socket.AF_UNIX)
        if writes or (event.startswith(forbidden) and not local):
            os.write(2, f"FORBIDDEN {event} {arguments}\n".encode())
            os._exit(70)


def fuzz(options: Fuzz) -> dict[str, Tally]:
    """Runs all cases and returns what became of them."""
    watch, files = Watch(), containers()
    unknown = [name for name in options.only if name not in files]
    if unknown:
        raise ValueError(f"no containers {unknown}; there are {sorted(files)}")
    files = {name: file for name, file in files.items() if name in (options.only or files)}
    tallies = {name: Tally() for name in files}
    for path, content in files.values():
        with tempfile.TemporaryDirectory() as folder:
            lay_out(content, folder)
            load(Path(folder) / path)  # what is undamaged is read, and everything is imported
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    limit = used + int(options.memory * (1 << 30))
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    warnings.simplefilter("error")
    case = options.seed
    for name, (path, content) in files.items():
        ends = time.monotonic() + options.minutes * 60 / len(files)
        while time.monotonic() < ends:
            case += 1
            one(name, path, content, case, tallies[name], watch)
    return tallies


def one(name: str, inner: str, content: Files, case: int, tally: Tally, watch: Watch) -> None:
    """One that is damaged."""
    damaged = damage(content, random.Random(case))
    refusals = (ValueError,) if len(damaged) == len(content) else (ValueError, FileNotFoundError)
    with tempfile.TemporaryDirectory() as folder:
        lay_out(damaged, folder)
        path = Path(folder) / inner
        start, watch.on = time.monotonic(), True
        try:
            load(path)
            tally.accepted += 1
        except refusals as error:
            tally.reasons.add(str(error).replace(str(path), "").split(":")[0][:40])
        except BaseException as error:
            watch.on = False
            print(f"{name}, case {case}: {type(error).__name__}: {error}", file=sys.stderr)
            raise
        watch.on = False
        tally.cases += 1
        tally.slowest = max(tally.slowest, time.monotonic() - start)
        assert gather(Path(folder), "") == damaged, f"{name}, case {case}: reading changed files"


def main(options: Fuzz) -> None:
    """Prints the table."""
    tallies = fuzz(options)
    print("| container | cases | read all the same | refused | kinds of reasons | slowest, ms |")
    print("|---|---|---|---|---|---|")
    for name, t in tallies.items():
        print(
            f"| {name} | {t.cases:,} | {t.accepted:,} | {t.cases - t.accepted:,} "
            f"| {len(t.reasons)} | {1000 * t.slowest:.0f} |"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    print(
        f"\n{sum(t.cases for t in tallies.values()):,} files in {options.minutes:g} minutes, "
        f"resident memory at most {peak:.2f} GiB"
    )


if __name__ == "__main__":
    main(tyro.cli(Fuzz))
