"""Fuzzing of everything that is read from files of other people.

Each input is a file or name that somebody might give: a sound one that was changed at random, or
one that was made to be expensive. What it must come to: a value, or one short line as a ValueError,
TypeError or FileNotFoundError; within 5 seconds and 1 GB of memory.

    python -m tests.faults.fuzz --rounds 1000                # of every kind, about 3 minutes
    python -m tests.faults.fuzz --kinds plan json --seed 7   # of two kinds, other inputs
    python -m tests.faults.fuzz --kinds weights              # of all containers of weights

It prints one row per kind, and every input that failed; the exit code is 1 if there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import string
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from PIL import Image

from flaxtransfer import files, masks, paths
from flaxtransfer.commands.predict import cell_text
from flaxtransfer.data.decode import decode_bands
from flaxtransfer.data.folder import natural_key
from flaxtransfer.data.open import open_source
from flaxtransfer.mask_algebra import matches_glob as match
from flaxtransfer.overview import plain, terminal
from flaxtransfer.report.figures import wrap_text
from flaxtransfer.report.pages import escape
from flaxtransfer.training import console, run_folder
from flaxtransfer.training.plan_yaml import plan_from_yaml
from flaxtransfer.weights.naming import native
from flaxtransfer.weights.readers import array_files, detect
from tests.faults.readers import DAMAGES, hdf5, single_files
from tests.support.scans import bundled, geotiff, nifti

MOST_SECONDS, MOST_BYTES, MOST_TEXT = 5.0, 1 << 30, 600

REFUSALS = (ValueError, TypeError, FileNotFoundError)


@dataclass
class Outcome:
    """What the inputs of one kind came to."""

    read: int = 0
    refused: int = 0
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        return self.read + self.refused + len(self.failures)


class Hang(BaseException):
    """An input took too long."""


def fuzz(kind: str, inputs: int, seed: int = 0) -> Outcome:
    """Tries inputs of one kind; the same arguments try the same inputs."""
    outcome, draw = Outcome(), random.Random(f"{kind} {seed}")
    make = KINDS[kind]

    def alarm(number: int, frame: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, alarm)
    try:
        for _ in range(inputs):
            given, read = make(draw)
            memory = peak()
            start = time.perf_counter()
            signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
            failure = ""
            try:
                read()
            except REFUSALS as error:
                failure = objection(str(error))
                outcome.refused += not failure
            except Hang:
                failure = f"no end after {MOST_SECONDS:g} s"
            except BaseException as error:
                failure = f"{type(error).__name__}: {str(error)[:200]}"
            else:
                outcome.read += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            outcome.slowest = max(outcome.slowest, time.perf_counter() - start)
            if peak() - memory > MOST_BYTES:
                failure = f"{(peak() - memory) / 1e9:.1f} GB of memory"
            if failure:
                outcome.failures.append(f"{failure}: {paths.shortened(repr(given), 300)}")
    finally:
        signal.signal(signal.SIGALRM, before)
    return outcome


def objection(text: str) -> str:
    """What is wrong with the text of an error."""
    if len(text) > MOST_TEXT:
        return f"an error of {len(text):,} characters"
    if len(text.splitlines()) != 1:
        return f"an error of {len(text.splitlines())} lines"
    return "Python's own advice" if "sys.set_int_max_str_digits" in text else ""


def peak() -> int:
    """The most memory that this process had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


Made = tuple[Any, Callable[[], Any]]


# ---- changes ------------------------------------------------------------------------------------


def changed(draw: random.Random, data: bytes, words: tuple[bytes, ...]) -> bytes:
    """Sound bytes with a few changes: bits, pieces, and words that mean something."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        place = draw.randrange(len(found) + 1)
        match draw.randrange(7):
            case 0 if found:
                found[place % len(found)] ^= 1 << draw.randrange(8)
            case 1:
                found[place:place] = draw.choice(words)
            case 2:
                del found[place : place + draw.choice((1, 2, 8, 64))]
            case 3:
                end = min(len(found), place + draw.choice((1, 8, 64)))
                found[place:place] = found[place:end] * draw.choice((1, 2, 50))
            case 4:
                del found[place:]
            case 5:
                found[place:place] = draw.randbytes(draw.choice((1, 4, 30)))
            case _:
                found[place : place + 4] = draw.choice(words)
    return bytes(found)


def some_text(draw: random.Random) -> str:
    """A name of any characters."""
    parts = []
    for _ in range(draw.randrange(1, 6)):
        match draw.randrange(6):
            case 0:
                parts.append(draw.choice(("[/b]", "[red]", "[", "\\[", "[link=x]", ":cat:", "$x$")))
            case 1:
                parts.append(draw.choice(("\x1b]0;owned\x07", "\x1b[2J", "\r", "\n", "\x9b", "\0")))
            case 2:
                parts.append(draw.randbytes(3).decode(errors="surrogateescape"))
            case 3:
                parts.append(chr(draw.choice((0x202E, 0x200B, 0x2028, 0xD83D, 0xFEFF, 0x1F600))))
            case 4:
                parts.append(draw.choice(("=", "+", "-", "@", "<b>", "&amp;", "\\frac", "$", "{}")))
            case _:
                parts.append("".join(draw.choices(string.printable, k=draw.choice((1, 5, 40)))))
    return "".join(parts) * draw.choice((1, 1, 1, 20))


# ---- kinds --------------------------------------------------------------------------------------

PLAN = """phases:
- name: head
  labels: {head: head(), backbone: rest()}
  groups:
    head: {optimizer: adamw, learning_rate: {peak: 0.003, warmup: 0.1}, weight_decay: 0.01}
    backbone: frozen
  steps: 100
  clip: 1.0
- name: fine-tune
  labels: {stem: "stem() | glob('layer[12]/**')", all: rest()}
  groups:
    stem: {optimizer: {name: sgd, momentum: 0.9}, learning_rate: 0.01}
    all: {optimizer: lion, learning_rate: 0.001}
  epochs: 3
  loss: {cross_entropy: {label_smoothing: 0.1, class_weights: {a: 2.0}}}
  norm: {stem(): running}
"""
YAML_WORDS = (
    *(b"&a ", b"*a", b"[", b"]", b"{", b"}", b": ", b"- ", b"? ", b"| ", b"> ", b"!!int ", b"<<: "),
    *(b"!!python/object:os.x ", b"!!binary ", b"!!timestamp ", b"!!set ", b"!!omap ", b"%YAML 9\n"),
    *(b"---\n", b"...\n", b"\n", b"\t", b"'", b'"', b"#", b"~", b".inf", b".nan", b"0x1", b"1:1:1"),
    *(
        b"9" * 5000,
        b"[" * 3000,
        b"{a: " * 900,
        b"- " * 900,
        b"? " * 900,
        b"\xff",
        b"\0",
        b"\xc2\x85",
    ),
    *(b"glob('" + b"*a" * 30 + b"')", b"head() - " * 300, b"~" * 300, b"rest()", b"frozen"),
)


def plans(draw: random.Random) -> Made:
    data = changed(draw, PLAN.encode(), YAML_WORDS)
    if draw.randrange(20) == 0:
        data = draw.choice(YAML_WORDS) * draw.choice((1, 10, 1000))
    text = data[: 1 << 18].decode(errors="replace")
    return text, lambda: plan_from_yaml(text)


MASK = b"stage(4) - batch_norm() | ~(glob('layer1/{0,1}/**') & kernels()) | up_to('layer2')"
MASK_WORDS = (
    *(
        b"(",
        b")",
        b"~",
        b" & ",
        b" | ",
        b" - ",
        b"head()",
        b"where(f)",
        b"glob('",
        b"'",
        b",",
        b"0",
    ),
    *(
        b"9" * 5000,
        b"0x" + b"f" * 5000,
        b"(" * 500,
        b"~" * 500,
        b"head() - " * 300,
        b"lambda: ",
        b"\0",
    ),
    *(
        b"[x for x in y]",
        b"f'{x}'",
        b"1 if x else 2",
        b"head.x",
        b"head(x=1)",
        b"*",
        b"\\ud800",
        b"1(",
    ),
)


def expressions(draw: random.Random) -> Made:
    text = changed(draw, MASK, MASK_WORDS).decode(errors="surrogateescape")
    return text, lambda: repr(masks.parse(text))


GLOB_PARTS = ("*", "**", "?", "/", "[a-c]", "[!a]", "{a,b}", "{", "}", "[", "]", ",", "a", "b", "-")


def globs(draw: random.Random) -> Made:
    size = draw.choice((3, 6, 12, 30, 200))
    parts = draw.choices(GLOB_PARTS, k=size)
    if draw.randrange(3) == 0:
        parts = draw.choices(("*", "a", "b", "**/", "?", "/"), k=size)
    pattern = "".join(parts) * draw.choice((1, 1, 1, 5))
    path = "".join(draw.choices("aab/", k=draw.choice((3, 20, 100, 2000))))
    return (pattern, path), lambda: match(pattern, path)


JSON = {
    "config": {"model": {"depths": [1, 1], "width": 8}, "task": "single_label", "seed": 0},
    "metrics": {"kind": "train", "step": 3, "loss": 1.25, "accuracy": None},
    "summary": {"options": {"data": "folder:x"}, "results": [{"start": "a", "loss": 0.5}]},
    "audit": [{"phase": "head", "leaves": 60, "moved": []}, {"phase": "all", "leaves": 0}],
    "split": {"address": "folder:x", "train": ["a/0.png"], "val": [], "test": ["b/\udcff.png"]},
    "frozen": {"params/stem/kernel": "0" * 64, "batch_stats/bn/mean": "f" * 64},
}
JSON_WORDS = (
    *(b"[", b"]", b"{", b"}", b":", b",", b'"', b"null", b"true", b"NaN", b"-Infinity", b"1e999"),
    *(b"9" * 5000, b"-" + b"9" * 5000, b"[" * 3000, b'{"a":' * 900, b"[" * 60 + b"]" * 60, b"\0"),
    *(b"\\ud800", b"\\", b"\xff", b"\xef\xbb\xbf", b"[]," * 1000, b"{}", b"[]", b"0", b'""', b"\n"),
)


def some_json(draw: random.Random) -> bytes:
    sound = json.dumps(draw.choice(list(JSON.values()))).encode()
    if draw.randrange(50) == 0:
        return draw.choice(JSON_WORDS) * draw.choice((1, 10, 10_000))
    return changed(draw, sound, JSON_WORDS)


def json_texts(draw: random.Random) -> Made:
    data = some_json(draw)
    return data, lambda: files.parse_json(data, "run/config.json")


PLACE = Path(tempfile.gettempdir()) / f"flaxtransfer-fuzz-{os.getpid()}"
READERS: dict[str, Callable[[Path], Any]] = {
    run_folder.CONFIG_FILE: run_folder.task_of,
    run_folder.SPLIT_FILE: run_folder.split_of,
    console.METRICS_FILE: console.read_metrics,
    run_folder.VALIDATION_FILE: run_folder.validation_of,
    files.MANIFEST_FILE: files.sealed,
}


def run_files(draw: random.Random) -> Made:
    """A file of a run folder, and what reads it."""
    name = draw.choice(list(READERS))
    data = some_archive(draw) if name.endswith(".npz") else some_json(draw)
    PLACE.mkdir(exist_ok=True)
    (PLACE / run_folder.WEIGHTS_FILE).touch()
    (PLACE / name).write_bytes(data)
    if name != files.MANIFEST_FILE:
        files.seal(PLACE, [name, run_folder.WEIGHTS_FILE])
    return (name, data), lambda: READERS[name](PLACE)


def names(draw: random.Random) -> Made:
    """A name, printed in every way; what is written must be text without control characters."""
    name = some_text(draw)

    def shown() -> None:
        file = io.StringIO()
        console = terminal(file=file, width=100)
        console.print(name)
        console.print(plain(name), style="bold")
        written = [file.getvalue(), escape(name), wrap_text(name, 20), cell_text(name)]
        for text in (*written, paths.shortened(paths.visible(name), 50)):
            text.encode()
            if left := set(text) & {chr(n) for n in (*range(10), *range(11, 32), *range(127, 160))}:
                raise AssertionError(f"{left} was written")
        natural_key(name)

    return name, shown


def encoded(kind: str, mode: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (13, 7), 100 if mode in ("L", "P", "1", "I;16") else None).save(
        file, kind, **options
    )
    return file.getvalue()


IMAGES = (
    *(encoded("PNG", mode) for mode in ("1", "L", "P", "RGB", "RGBA", "I;16")),
    *(encoded("TIFF", mode) for mode in ("L", "RGB", "RGBA", "I;16")),
    *(encoded(kind, "RGB") for kind in ("JPEG", "BMP", "WEBP")),
    encoded("GIF", "P", save_all=True, append_images=[Image.new("P", (13, 7))] * 3),
    encoded("TIFF", "L", save_all=True, append_images=[Image.new("L", (13, 7))] * 3),
    *(
        geotiff(np.ones((7, 13, 4), np.uint16), nodata=0, compression=kind, planarconfig="contig")
        for kind in (None, "zlib", "lzw")
    ),
    *(bundled(name).read_bytes() for name in ("MR_small_RLE.dcm", "rtdose.dcm")),
    *(nifti(suffix) for suffix in (".nii", ".nii.gz")),
)
IMAGE_WORDS = (
    *(
        b"\xff\xff\xff\xff",
        b"\x7f\xff\xff\xff",
        b"\0\0\0\0",
        b"\0\1\0\0",
        b"\0\0\x40\0",
        b"\xff\xd8",
    ),
    *(
        b"IHDR",
        b"IDAT",
        b"iTXt",
        b"zTXt",
        b"eXIf",
        b"acTL",
        b"II*\0",
        b"RIFF",
        b"VP8X",
        b"\xff\xc0",
    ),
)


def images(draw: random.Random) -> Made:
    data = bytearray(changed(draw, draw.choice(IMAGES), IMAGE_WORDS))
    if data[:4] == b"\x89PNG" and len(data) > 33 and draw.randrange(2):
        # A sound checksum, so that the header is believed.
        import zlib

        data[16:24] = draw.choice(
            (b"\0\0\x32\xc8" * 2, b"\0\0\1\0\0\0\1\0", b"\x7f\xff\xff\xff" * 2)
        )
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    bands, given = draw.choice((1, 3, 3, 2, 4)), bytes(data)
    smaller = draw.choice((None, None, 4))
    return given, lambda: decode_bands(given, name="x.png", bands=bands, min_side=smaller)


def a_table(folder: Path, kind: str) -> bytes:
    """A sound table of twelve images, which are made beside it."""
    rows = [
        {
            "path": f"{i}.png",
            "label": ("cat", "dog", "a|b")[i % (2 + (kind == "csv"))],
            "split": ("train", "train", "val", "test")[i // 2 % 4],
            "patient": f"p{i // 2}",
            "x": i / 3,
            "y": i % 2,
        }
        for i in range(16)
    ]
    for row in rows:
        Image.new("L", (2, 2)).save(folder / str(row["path"]))
    file = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    if kind == "csv":
        pa_csv.write_csv(table, file)
    else:
        pq.write_table(table, file)
    return file.getvalue()


TABLE_WORDS = (
    *(b",", b'"', b'""', b"\n", b"\r", b"\0", b";", b"\t", b"|", b"-1", b"nan", b"1e999", b"inf"),
    *(b"../", b"/", b"\\", b"C:\\", b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xae", b"train", b"{path}"),
    *(b"x" * 5000, b"9" * 5000, b"a," * 3000, b"path,label\n", b"PAR1", b"\x15\x04", b"\xff" * 8),
)


def tables(draw: random.Random) -> Made:
    kind = draw.choice(("csv", "csv", "parquet"))
    folder = PLACE / kind
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / "sound").write_bytes(a_table(folder, kind))
    given = changed(draw, (folder / "sound").read_bytes(), TABLE_WORDS)
    (folder / "table").write_bytes(given)
    options = draw.choice(
        (
            {},
            {"label_column": "y"},
            {"label_column": ["x", "y"]},
            {"label_column": "x", "ignore_label": "0.0"},
            {"image_column": "{y}{path}", "label_column": "y"},
            {"split_column": "none", "skip_corrupt": True, "partial": True},
        )
    )

    def read() -> None:
        try:
            open_source(f"{kind}:{folder}/table", **options)
        except ValueError as error:  # A terminal shows as much.
            raise ValueError(paths.shortened(str(error), MOST_TEXT)) from None

    return (kind, options, given), read


def some_archive(draw: random.Random) -> bytes:
    file = io.BytesIO()
    save = draw.choice((np.savez, np.savez_compressed))
    save(file, logits=np.zeros((4, 3), np.float32), labels=np.arange(4), features=np.ones((4, 2)))
    if draw.randrange(8) == 0:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", draw.choice((0, 8, 12, 14))) as archive:
            archive.writestr("logits.npy", bytes(1 << draw.choice((4, 20, 24))))
    data = bytearray(file.getvalue())
    if draw.randrange(4) == 0:
        place = data.rindex(b"PK\1\2") + draw.choice((10, 16, 20, 24, 28, 42))
        data[place : place + 4] = draw.choice((b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\x10\0\0\0"))
        return bytes(data)
    return changed(draw, bytes(data), (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"\xff\xff\xff\x7f", b"O"))


ONNX_WORDS = (
    *(
        b"Conv",
        b"Relu",
        b"Add",
        b"Loop",
        b"Identity",
        b"Constant",
        b"Reshape",
        b"Pad",
        b"Shape",
        b"Gather",
        b"BatchNormalization",
    ),
    *(
        b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x0a\x00" * 40_000,
        b"\x22" * 3000,
        b"\x72\x01",
    ),
)
PICKLE_WORDS = (
    *(b"N0" * 20_000, b"(" * 5000, b"]" * 5000, b"2" * 5000, b"\x80\2", b"cos\nsystem\n"),
    *(b"R", b"b", b"q\0", b"h\0", b"\x8a\xff", b"\x94", b"ctorch\nFloatStorage\n", b"Q", b"t"),
)
OPCODES = b"(N0]})l}u\x85\x86\x87\x94h\0q\0K\1JKKKKcos\nsystem\n\x93RbXaaaa2t."
MSGPACK_WORDS = (
    *(b"\xdf\xff\xff\xff\xff", b"\xdd\x7f\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xc1"),
    *(b"\x91" * 3000, b"\x81\xa1a" * 900, b"\xc7\x05\x01", b"\xd9\xff", b"\xcb" + b"\xff" * 8),
    *(b"\xa7float64", b"\xa6object", b"\xa2V8", b"\xc0", b"\xdc\xff\xff"),
)
HDF5_WORDS = (
    *(b"\x89HDF\r\n\x1a\n", b"TREE", b"SNOD", b"HEAP", b"OHDR", b"FRHP", b"GCOL", b"\xff" * 8),
    *(b"\0" * 8, b"\xff\xff\xff\x7f", b"\1\0\0\0", b"\x11\0", b"\x03\0", b"\x0b\0"),
)
ZIP_WORDS = (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"\xff\xff\xff\x7f", b"\1\0", b"\x08\0", b"O")


def _containers() -> dict[str, tuple[bytes, tuple[bytes, ...]]]:
    """A small sound file of every container, and the words that mean something in it."""
    files = single_files()
    two = {"fc.weight": np.ones((3, 2), np.float32), "fc.bias": np.ones(3, np.float32)}
    arrays, keras = io.BytesIO(), io.BytesIO()
    np.savez(arrays, **two)
    hdf5_bytes = hdf5({"conv1_conv/kernel": np.ones((7, 7, 3, 4)), "conv1_conv/bias": np.ones(4)})
    with zipfile.ZipFile(keras, "w") as archive:
        archive.writestr("config.json", json.dumps({"config": {"layers": []}}))
        archive.writestr("model.weights.h5", hdf5_bytes)
    json_words = (*JSON_WORDS, b"data_offsets", b"F64", b"shape", b"__metadata__")
    torch = {kind: GOLDEN.joinpath(f"{kind}.pth").read_bytes() for kind in ("zip", "legacy")}
    return {
        "safetensors": (files["safetensors"][1], json_words),
        "msgpack": (files["flax"][1], MSGPACK_WORDS),
        "torch-zip": (torch["zip"], (*ZIP_WORDS, *PICKLE_WORDS)),
        "torch-legacy": (torch["legacy"], PICKLE_WORDS),
        "onnx": (files["onnx"][1], ONNX_WORDS),
        "npz": (arrays.getvalue(), ZIP_WORDS),
        "hdf5": (hdf5_bytes, HDF5_WORDS),
        "keras": (keras.getvalue(), (*ZIP_WORDS, *HDF5_WORDS)),
    }


GOLDEN = Path(__file__).parents[1] / "golden" / "torch_files"
CONTAINERS = _containers()


def damaged(draw: random.Random, kind: str) -> bytes:
    """A file of weights of one container, changed as bytes, as what it is, or made from nothing."""
    sound, words = CONTAINERS[kind]
    if draw.randrange(8) == 0:
        if kind == "npz":
            return some_archive(draw)
        if kind == "torch-legacy":
            codes = bytes(draw.choices(OPCODES, k=draw.choice((5, 40, 2000))))
            return b"\x80\2" + codes + b"."
    if draw.randrange(3) == 0:
        return changed(draw, sound, words)
    return draw.choice(DAMAGES)(bytearray(sound), draw)


def a_file(kind: str) -> Callable[[random.Random], Made]:
    """Inputs of one container: its arrays are read, and the network is found among them."""

    def make(draw: random.Random) -> Made:
        data = damaged(draw, kind)

        def read() -> None:
            container, _ = detect.recognize(data, "w")
            search = detect._Search(None)
            arrays, *_ = detect._unpacked(PLACE / "w", memoryview(data), container, search.wanted)
            if search.found is None:
                native.find(arrays, None)

        return data, read

    return make


def indices(draw: random.Random) -> Made:
    """A folder of two files with an index, of which one is changed."""
    folder = PLACE / "index"
    sound = {}
    for number in (1, 2):
        one = {f"layer{number}.0.conv1.weight": np.full((2, 2, 1, 1), number, np.float32)}
        name = f"model-0000{number}-of-00002.safetensors"
        sound[name] = array_files.write_safetensors(one, {})
    places = {f"layer{n}.0.conv1.weight": name for n, name in enumerate(sound, 1)}
    index = {"metadata": {"total_size": 32}, "weight_map": places}
    sound["model.safetensors.index.json"] = json.dumps(index).encode()
    name = draw.choice(list(sound))
    words = (*JSON_WORDS, b"../", b"/etc/passwd", b"weight_map", b"data_offsets")
    given = {**sound, name: changed(draw, sound[name], words)}
    if draw.randrange(20) == 0:
        del given[name]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for each, data in given.items():
        (folder / each).write_bytes(data)
    return (name, given.get(name)), lambda: detect.read_tensors(folder)


KINDS: dict[str, Callable[[random.Random], Made]] = {
    "plan": plans,
    "expression": expressions,
    "glob": globs,
    "json": json_texts,
    "run": run_files,
    "name": names,
    "image": images,
    "table": tables,
    **{kind: a_file(kind) for kind in CONTAINERS},
    "index": indices,
}
WEIGHTS = (*CONTAINERS, "index")
"""Kinds of files of weights."""

PER_ROUND = {
    "json": 30,
    "glob": 20,
    "expression": 10,
    "image": 10,
    **{"safetensors": 20, "msgpack": 20, "torch-zip": 15, "torch-legacy": 15, "onnx": 10},
    **{"npz": 10, "hdf5": 4, "keras": 4, "index": 2},
    "run": 5,
    "table": 3,
}
"""Inputs per round, in proportion to their speed; 1 of the others."""


@contextlib.contextmanager
def clean() -> Iterator[None]:
    """Removes the files of the inputs."""
    try:
        yield
    finally:
        shutil.rmtree(PLACE, ignore_errors=True)


def main() -> int:
    """Runs the kinds that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    choices = [*KINDS, "weights"]
    parser.add_argument("--kinds", nargs="+", choices=choices, default=list(KINDS))
    given = parser.parse_args()
    kinds = [k for kind in given.kinds for k in (WEIGHTS if kind == "weights" else (kind,))]
    failed = 0
    heads = ("inputs", "read", "refused", "failed", "slowest", "CPU")
    print(f"{'kind':<12}" + "".join(f"{head:>12}" for head in heads))
    with clean():
        for kind in kinds:
            start = time.process_time()
            found = fuzz(kind, given.rounds * PER_ROUND.get(kind, 1), given.seed)
            print(
                f"{kind:<12}{found.inputs:>12,}{found.read:>12,}{found.refused:>12,}"
                f"{len(found.failures):>12,}{found.slowest:>10.2f} s"
                f"{time.process_time() - start:>10.0f} s",
                flush=True,
            )
            for line in found.failures[:5]:
                print(f"    {paths.visible(line)}")
            failed += len(found.failures)
    print(f"{failed} failed; at most {peak() / 1e6:,.0f} MB of memory in all")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
