"""Times the host's side of the data: files to batches, against torchvision and bare loops.

    pip install '.[parity]' -c constraints.txt
    python experiments/benchmarks/data_pipeline.py

- JPEG: photographs of scikit-learn, cut to 500 x 375 px, to batches of 32 images of 224 px; torch
  has a ``DataLoader`` with two processes, as in its tutorials. The pixels of evaluation are
  compared first; those of training are drawn from the same distribution.
- Small files: PNGs of 32 x 32 px, likewise.
- Depth: the same picture of 8 and of 16 bits, as PNG, TIFF and DICOM (extras ``geo``, ``dicom``).
- Listing: ``open_source`` and the first batch of a folder of 100,000 files against ``os.scandir``
  with a sorted list of its names.
- Labels: a training step of one class per image against one of several labels.

Contestants are processes that take turns; a ratio is the median of those of single turns, so that
other work on the machine meets both. Figures: experiments/results/data_pipeline.md.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image
from turns import Contestant, Facts, alternate, serve

BATCH = 32
SKIPPED = 8
"""Batches before the clock runs: those that lie in buffers already, and more."""


@dataclass(frozen=True)
class DataPipeline:
    """Time the data pipeline.

    Args:
      parts: what is timed.
      rounds: turns of each contestant.
      photographs: JPEG files.
      small: PNG files of 32 x 32 px.
      listed: files of the folder that is listed.
      folder: for the files; by default a temporary one.
    """

    parts: tuple[str, ...] = ("jpeg", "small", "depth", "listing", "labels")
    rounds: int = 5
    photographs: int = 1024
    small: int = 8_000
    listed: int = 100_000
    folder: Path | None = None


def main() -> None:
    options = tyro.cli(DataPipeline)
    print(f"load before: {os.getloadavg()[0]:.1f}; {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for part in options.parts:
            root = Path(name) / part
            root.mkdir()
            {"jpeg": jpeg, "small": small, "depth": depth, "listing": listing, "labels": labels}[
                part
            ](root, options)
    print(f"load after: {os.getloadavg()[0]:.1f}")


def photographs() -> list[np.ndarray]:
    """Two of scikit-learn, uint8 ``[427, 640, 3]``."""
    # Here: processes that decode import this file, too.
    from sklearn.datasets import load_sample_images

    return list(load_sample_images().images)


def jpeg(root: Path, options: DataPipeline) -> None:
    """Photographs to batches."""
    pictures = photographs()
    random = np.random.default_rng(0)
    for i in range(options.photographs):
        picture = pictures[i % 2]
        top, left = (int(random.integers(0, side)) for side in (52, 140))
        place = root / f"class{i % 2}"
        place.mkdir(exist_ok=True)
        cut = picture[top : top + 375, left : left + 500]
        Image.fromarray(cut).save(place / f"{i:06d}.jpg", quality=90)
    job = {"root": str(root), "size": 224, "resize": 256}
    for mode in ("evaluation", "training"):
        contest(f"JPEG, {mode}", job | {"mode": mode}, options.rounds)


def small(root: Path, options: DataPipeline) -> None:
    """Many small files to batches."""
    random = np.random.default_rng(0)
    for i in range(options.small):
        place = root / f"class{i % 10}"
        place.mkdir(exist_ok=True)
        pixels = random.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"{i:06d}.png", compress_level=1)
    job = {"root": str(root), "size": 32, "resize": 32, "mode": "evaluation"}
    contest("small PNG, evaluation", job, options.rounds)


def contest(title: str, job: Facts, rounds: int) -> None:
    """Prints images per second, the ratio of times to torch's, CPU time of an image, and the time
    to a first batch.
    """
    ways = {"torch, 2 processes": {"who": "torch"}, "ours, threads": {"who": "ours", "workers": 0}}
    if job["mode"] == "training":
        ways["ours, 2 processes"] = {"who": "ours", "workers": 2}
    script = Path(__file__).name
    contestants = [Contestant(name, script, job | way) for name, way in ways.items()]
    with contestants[0] as torch, contestants[1] as threads:
        others = [contestants[2].__enter__()] if len(contestants) > 2 else []
        alternate([torch, threads, *others], rounds)
        if job["mode"] == "evaluation":
            apart = np.abs(np.array(torch.facts["pixels"]) - np.array(threads.facts["pixels"]))
            assert apart.max() <= 1, f"pixels differ by {apart.max()}"
        for one in (torch, threads, *others):
            ratio = np.median(np.array(one.seconds) / np.array(torch.seconds))
            print(
                f"| {title} | {one.name} | {one.facts['images'] / one.median:.0f} images/s | "
                f"{ratio:.2f} | {1e3 * one.facts['cpu']:.2f} ms | {one.facts['first']:.2f} s |",
                flush=True,
            )
        for one in others:
            one.__exit__(None, None, None)


def batches_of(job: Facts) -> Callable[[], Iterable[np.ndarray]]:
    """Makes one pass over the files: uint8 ``[batch, height, width, channels]``."""
    size, resize = job["size"], job["resize"]
    training = job["mode"] == "training"
    if job["who"] == "torch":
        import torch
        from pixels import declare_operators

        declare_operators()
        from torchvision import datasets, transforms

        steps: list[Any] = [transforms.Resize(resize), transforms.CenterCrop(size)]
        if training:
            steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        made = datasets.ImageFolder(
            job["root"], transforms.Compose([*steps, transforms.PILToTensor()])
        )
        loader = torch.utils.data.DataLoader(
            made, BATCH, shuffle=training, num_workers=2, persistent_workers=True
        )
        return lambda: (images.permute(0, 2, 3, 1).numpy() for images, _ in loader)
    from flaxtransfer.data import (
        batches_in_order,
        evaluation_transform,
        open_source,
        train_batches,
        training_transform,
    )
    from flaxtransfer.weights import Preprocessing

    preprocessing = Preprocessing((0.5,) * 3, (0.25,) * 3, size=size, resize=resize)
    source = open_source(f"folder:{job['root']}")
    every = np.arange(len(source))
    if not training:
        plain = evaluation_transform(preprocessing)
        return lambda: (
            batch["image"]
            for batch in batches_in_order(source, every, batch_size=BATCH, transform=plain)
        )
    changing = training_transform(preprocessing, geometry="crop", flip=True)

    # Processes live as long as the iterator, which training keeps, too.
    endless = train_batches(
        source, every, batch_size=BATCH, transform=changing, seed=0, workers=job["workers"]
    )
    count = len(every) // BATCH
    return lambda: (batch["image"] for _, batch in zip(range(count), endless, strict=False))


def prepare(job: Facts) -> tuple[Facts, Callable[[], Facts]]:
    """One contestant: a turn is a pass, timed after its first batches."""
    make = batches_of(job)
    began = time.perf_counter()
    first = next(iter(make()))
    facts = {"first": time.perf_counter() - began}
    if job["mode"] == "evaluation":
        facts["pixels"] = first[:2, ::16, ::16].astype(int).tolist()

    def turn() -> Facts:
        images = 0
        for number, batch in enumerate(make()):
            if number == SKIPPED:
                start, used = time.perf_counter(), cpu_seconds()
            images += len(batch) * (number > SKIPPED)
        cpu = (cpu_seconds() - used) / images
        return {"seconds": time.perf_counter() - start, "images": images, "cpu": cpu}

    return facts, turn


def cpu_seconds() -> float:
    """Of this process and the processes that it has started and that are alive."""
    pids = {os.getpid()}
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that has ended
            pids |= set(map(int, (task / "children").read_text().split()))
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def depth(root: Path, options: DataPipeline) -> None:
    """Pictures of 8 and 16 bits in each format, decoded one after the other."""
    from flaxtransfer.data import Levels, open_source, with_levels

    picture = photographs()[0][..., 1].astype(np.uint16)
    random = np.random.default_rng(0)
    # Twelve bits in sixteen, of which the last ones are noise, as in scans; and the upper eight.
    deep = (picture * 16 + random.integers(0, 16, picture.shape, np.uint16)).astype(np.uint16)
    for number, (kind, write) in enumerate(DEPTHS.items()):
        place = root / str(number)
        for name, values in (("8", (deep >> 4).astype(np.uint8)), ("16", deep)):
            (place / name).mkdir(parents=True)
            write(place / name / "picture", values)
        one_depth(
            kind,
            with_levels(open_source(f"folder:{place}", bands=1), Levels((0.0,), (4095.0,))),
            options,
        )


def by_pillow(kind: str, **settings: str) -> Callable[[Path, np.ndarray], None]:
    return lambda path, values: Image.fromarray(values).save(path, kind, **settings)


def dicom(path: Path, values: np.ndarray) -> None:
    """Writes a DICOM file without compression."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

    data, bits = Dataset(), 8 * values.itemsize
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.PhotometricInterpretation, data.SamplesPerPixel = "MONOCHROME2", 1
    data.Rows, data.Columns = values.shape
    data.BitsAllocated = data.BitsStored = bits
    data.HighBit, data.PixelRepresentation = bits - 1, 0
    data.PixelData = values.tobytes()
    data.save_as(path, enforce_file_format=True)


DEPTHS: dict[str, Callable[[Path, np.ndarray], None]] = {
    "PNG": by_pillow("PNG"),
    "TIFF": by_pillow("TIFF"),
    "TIFF, deflate": by_pillow("TIFF", compression="tiff_adobe_deflate"),
    "TIFF, LZW": by_pillow("TIFF", compression="tiff_lzw"),
    "DICOM": dicom,
}


def one_depth(kind: str, source: Any, options: DataPipeline) -> None:
    """Prints the times of the two files of a format, and their ratio."""
    sizes = [(source.root / name).stat().st_size for name in source.files]

    def turn(index: int) -> float:
        began = time.process_time()
        for _ in range(20):
            source[index]
        return time.process_time() - began

    ratios, seconds = [], []
    for _ in range(4 * options.rounds):
        eight, sixteen = turn(0), turn(1)
        ratios.append(sixteen / eight)
        seconds.append((eight / 20, sixteen / 20))
    eight, sixteen = np.median(seconds, axis=0)
    text = " and ".join(f"{size / 1e3:.0f} kB" for size in sizes)
    print(
        f"| {kind} of 8 and 16 bits ({text}) | {1e3 * eight:.2f} ms, {1e3 * sixteen:.2f} ms | "
        f"{np.median(ratios):.2f} |",
        flush=True,
    )


def listing(root: Path, options: DataPipeline) -> None:
    """The first batch of a large folder against a sorted listing."""
    from flaxtransfer.data import batches_in_order, evaluation_transform, open_source
    from flaxtransfer.weights import Preprocessing

    seed = root / "seed.png"
    Image.new("RGB", (32, 32)).save(seed)
    for i in range(options.listed):
        place = root / "data" / f"class{i % 10}"
        if i < 10:
            place.mkdir(parents=True)
        # File systems have a largest number of links to one file.
        if i % 10_000 == 0:
            seed = place / f"{i}.png"
            Image.new("RGB", (32, 32)).save(seed)
        else:
            os.link(seed, place / f"{i}.png")
    plain = evaluation_transform(Preprocessing((0.5,) * 3, (0.25,) * 3, size=32, resize=32))

    def bare() -> int:
        names = []
        with os.scandir(root / "data") as folders:
            for folder in folders:
                with os.scandir(folder) as entries:
                    files = (each.name for each in entries if each.is_file())
                    names += sorted(f"{folder.name}/{name}" for name in files)
        return len(names)

    def first() -> int:
        source = open_source(f"folder:{root / 'data'}")
        every = np.arange(len(source))
        next(iter(batches_in_order(source, every, batch_size=BATCH, transform=plain)))
        return len(source)

    ratios, seconds = [], []
    for _ in range(options.rounds + 1):
        taken = []
        for turn in (bare, first):
            began = time.process_time()
            assert turn() == options.listed
            taken.append(time.process_time() - began)
        ratios.append(taken[1] / taken[0])
        seconds.append(taken)
    least, found = np.median(seconds[1:], axis=0)
    print(
        f"| first batch of {options.listed:,} files | {least:.3f} s, {found:.3f} s | "
        f"{np.median(ratios[1:]):.2f} |",
        flush=True,
    )


def labels(root: Path, options: DataPipeline) -> None:
    """A training step of each task."""
    del root
    import jax
    import jax.numpy as jnp
    import optax

    import flaxtransfer as ft
    from flaxtransfer.training import make_mesh, place_batch, place_replicated, start, train_step

    random, mesh = np.random.default_rng(0), make_mesh()
    images = random.integers(0, 256, (BATCH, 64, 64, 3), np.uint8)
    targets = {
        ft.task.SINGLE_LABEL: random.integers(0, 20, BATCH),
        ft.task.MULTI_LABEL: (random.random((BATCH, 20)) < 0.2).astype(np.float32),
    }
    preprocessing = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, 64, 64)
    model = ft.resnet(ft.models.ResNetConfig(depths=(2, 2, 2, 2), width=32, classes=20))
    variables = model.init(jax.random.key(0))
    steps, states, batches = {}, {}, {}
    for task, values in targets.items():
        phase = ft.Phase({"all": ft.everything()}, {"all": ft.Group(optax.sgd, 0.01)}, 10)
        phase = ft.Plan([phase]).resolve(variables["params"]).phases[0]
        source = ft.ArraySource(images, values, tuple(map(str, range(20))), task=task.name)
        splits = ft.data.Splits.of(range(BATCH))
        data = ft.loaders(source, splits, preprocessing, batch_size=BATCH)
        states[task] = place_replicated(start(variables, phase, 0), mesh)
        steps[task] = train_step(model, phase, data, task, mesh)
        batches[task] = place_batch(
            {"image": jnp.asarray(images), "label": jnp.asarray(values)}, mesh
        )
    ratios, seconds = [], []
    for _ in range(4 * options.rounds + 1):
        taken = []
        for task in targets:
            began = time.perf_counter()
            for _ in range(3):
                states[task], metrics = steps[task](states[task], batches[task])
                float(metrics["loss"])
            taken.append((time.perf_counter() - began) / 3)
        ratios.append(taken[1] / taken[0])
        seconds.append(taken)
    one, several = np.median(seconds[1:], axis=0)
    print(
        f"| step of one class and of 20 labels | {1e3 * one:.0f} ms, {1e3 * several:.0f} ms | "
        f"{np.median(ratios[1:]):.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("{"):
        serve(prepare)
    else:
        main()
