"""Compares evaluation pixels with those of torchvision, timm and transformers.

    python experiments/benchmarks/pixels.py

A peer's own record of its preprocessing is laid beside exported weights. What ``load`` makes of it
prepares 20 images of odd sizes, and so does the peer. The normalized inputs of the network are
compared, in levels of 255: for parts of two photographs, and for noise, which no kernel can
smooth. Of a record that is refused, the error is printed. Needs the extra ``parity``.
Figures: experiments/results/pixels.md.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxtransfer import Preprocessing, load
from flaxtransfer.data import evaluation_transform
from flaxtransfer.weights import export

SIZES = (
    *((427, 640), (640, 427), (333, 500), (500, 375), (375, 501), (481, 321), (225, 225)),
    *((224, 224), (223, 301), (97, 31), (31, 97), (61, 61), (199, 1001), (1001, 199), (257, 255)),
    *((256, 341), (383, 385), (719, 1281), (5, 3), (1, 1)),
)
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
NORMAL = {"image_mean": IMAGENET["mean"], "image_std": IMAGENET["std"]}


def photograph(height: int, width: int) -> np.ndarray:
    """A part of one of scikit-learn's two photographs, enlarged if it is too small."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    whole = photos[(height + width) % 2]
    if height > width:
        whole = whole.transpose(1, 0, 2)
    scale = max(1, height / whole.shape[0], width / whole.shape[1])
    if scale > 1:
        sides = [math.ceil(side * scale) for side in whole.shape[1::-1]]
        whole = np.asarray(Image.fromarray(np.ascontiguousarray(whole)).resize(sides))
    top, left = (whole.shape[0] - height) // 2, (whole.shape[1] - width) // 3
    return np.ascontiguousarray(whole[top : top + height, left : left + width])


def noise(height: int, width: int) -> np.ndarray:
    """Independent pixels."""
    random = np.random.default_rng(height * 10_000 + width)
    return random.integers(0, 256, (height, width, 3), dtype=np.uint8)


PICTURES = {"photographs": photograph, "noise": noise}


def _timm(**fields: Any) -> dict[str, Any]:
    return {"input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": 0.95} | fields


TIMM = {
    "timm, crop_pct 0.875": _timm(crop_pct=0.875, interpolation="bilinear", **IMAGENET),
    "timm, crop_pct 0.95": _timm(**IMAGENET),
    "timm, crop_pct 0.965, 176 px": _timm(
        crop_pct=0.965, input_size=[3, 176, 176], mean=[0.5] * 3, std=[0.5] * 3
    ),
    "timm, crop_pct 1, lanczos": _timm(crop_pct=1.0, interpolation="lanczos", **IMAGENET),
    "timm, nearest, 161 px": _timm(interpolation="nearest", input_size=[3, 161, 161], **IMAGENET),
    "timm, box": _timm(interpolation="box", **IMAGENET),
    "timm, hamming": _timm(interpolation="hamming", **IMAGENET),
    "timm, squash": _timm(crop_mode="squash", **IMAGENET),
    "timm, squash, crop_pct 1": _timm(crop_mode="squash", crop_pct=1.0, **IMAGENET),
    "timm, border": _timm(crop_mode="border", **IMAGENET),
    "timm, test_input_size": _timm(test_input_size=[3, 288, 288], test_crop_pct=1.0, **IMAGENET),
    "timm, 224 by 288 px": _timm(input_size=[3, 224, 288], **IMAGENET),
    "timm, crop_pct 1.2": _timm(crop_pct=1.2, **IMAGENET),
    "timm, its defaults": {"input_size": [3, 192, 192]},
}
_SHORTEST = {"shortest_edge": 256}
HUGGING_FACE: dict[str, tuple[str, dict[str, Any]]] = {
    "ConvNext, 224 px": ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
    "ConvNext, crop_pct 0.95, bilinear": (
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": 224}, "crop_pct": 0.95, "resample": 2},
    ),
    "ConvNext on Pillow": ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 224}}),
    "ConvNext, 384 px": ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
    "ConvNext, its defaults": ("ConvNextImageProcessor", {}),
    "ConvNext, rescale_factor 1/128": (
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": 224}, "rescale_factor": 1 / 128},
    ),
    "ConvNext, a second crop": (
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 192},
    ),
    "Bit": ("BitImageProcessor", {}),
    "Bit on Pillow": ("BitImageProcessorPil", {"size": {"shortest_edge": 256}}),
    "Bit, 256 to 223 px, bilinear": (
        "BitImageProcessor",
        {"size": {"shortest_edge": 256}, "crop_size": 223, "resample": 2},
    ),
    "Bit, nearest": ("BitImageProcessor", {"size": {"shortest_edge": 256}, "resample": 0}),
    "Bit on Pillow, box": ("BitImageProcessorPil", {"size": {"shortest_edge": 256}, "resample": 4}),
    "Bit on Pillow, hamming": (
        "BitImageProcessorPil",
        {"size": {"shortest_edge": 256}, "resample": 5},
    ),
    "Bit on Pillow, lanczos": (
        "BitImageProcessorPil",
        {"size": {"shortest_edge": 256}, "resample": 1},
    ),
    "Bit, without normalization": ("BitImageProcessor", {"do_normalize": False}),
    "Bit, without rescaling": ("BitImageProcessor", {"do_rescale": False}),
    "Bit, without either": ("BitImageProcessor", {"do_rescale": False, "do_normalize": False}),
    "Bit, without a crop": ("BitImageProcessor", {"do_center_crop": False}),
    "Bit, height and width": (
        "BitImageProcessor",
        {"size": {"height": 256, "width": 256}, "crop_size": 224},
    ),
    "Bit, crop larger than size": ("BitImageProcessor", {"size": {"shortest_edge": 200}}),
    "Bit, crop not square": ("BitImageProcessor", {"crop_size": {"height": 224, "width": 200}}),
    "Bit, longest_edge": (
        "BitImageProcessor",
        {"size": {"shortest_edge": 224, "longest_edge": 300}},
    ),
    "Bit, without resizing": ("BitImageProcessor", {"do_resize": False}),
    "Bit, padded": ("BitImageProcessor", {"do_pad": True, "pad_size": {"height": 9, "width": 9}}),
    "ViT": ("ViTImageProcessor", {}),
    "ViT on Pillow": ("ViTImageProcessorPil", {}),
    "ViT, 191 px, bicubic": ("ViTImageProcessor", {"size": 191, "resample": 3}),
    "DeiT": ("DeiTImageProcessor", {}),
    "CLIP": ("CLIPImageProcessor", {}),
    "MobileNetV2": ("MobileNetV2ImageProcessor", {}),
    "BEiT": ("BeitImageProcessor", {"do_center_crop": True, "size": 256}),
    "LeViT": ("LevitImageProcessor", {}),
    "EfficientNet": ("EfficientNetImageProcessor", {"rescale_offset": True}),
}
TORCHVISION = {
    "torchvision, 256 to 224 px": {"crop_size": 224, "resize_size": 256},
    "torchvision, 232 to 224 px": {"crop_size": 224, "resize_size": 232},
}

KEPT: list[Any] = []
"""Declarations of torch's, which end with their object."""

Record = tuple[str, Mapping[str, Any]]
Peer = Callable[[np.ndarray], np.ndarray]
Found = dict[str, float]


def declare_operators() -> None:
    """Lets torchvision be imported beside a torch that its compiled part was not built for."""
    import torch

    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT.append(library)


def peers() -> dict[str, Callable[[], tuple[Record | None, Peer]]]:
    """Each case's record (file and content; None for torchvision's) and the peer's function."""
    cases: dict[str, Callable[[], tuple[Record | None, Peer]]] = {}
    for name, fields in TORCHVISION.items():
        cases[name] = lambda fields=fields: (None, _torchvision_peer(fields))
    for name, fields in TIMM.items():
        cases[name] = lambda fields=fields: _timm_case(fields)
    for name, (kind, fields) in HUGGING_FACE.items():
        cases[f"transformers, {name}"] = lambda kind=kind, f=fields: _transformers_case(kind, f)
    return cases


def _torchvision_peer(fields: dict[str, Any]) -> Peer:
    from torchvision.transforms import _presets

    transform = _presets.ImageClassification(**fields)
    return lambda image: transform(_pillow(image)).numpy()


def _timm_case(fields: dict[str, Any]) -> tuple[Record, Peer]:
    import timm

    resolved = timm.data.resolve_data_config(pretrained_cfg=fields, model=None)
    transform = timm.data.create_transform(**resolved)
    record = {"architecture": "mine", "pretrained_cfg": fields}
    return ("config.json", record), lambda image: transform(_pillow(image)).numpy()


def _transformers_case(kind: str, fields: dict[str, Any]) -> tuple[Record, Peer]:
    import transformers

    processor = getattr(transformers, kind)(**(NORMAL | fields))
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        record = json.loads((Path(folder) / "preprocessor_config.json").read_text())
    return ("preprocessor_config.json", record), lambda image: np.asarray(
        processor(_pillow(image), return_tensors="np")["pixel_values"][0]
    )


def _pillow(image: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(image)


def compare(own: Preprocessing, peer: Peer, kind: str) -> float:
    """The largest difference over all sizes, in levels of 255.

    Args:
        own: what our transform follows.
        peer: from an image to the normalized input, channels first.
        kind: of ``PICTURES``.
    """
    transform = evaluation_transform(own)
    mean, std = np.array(own.mean)[:, None, None], np.array(own.std)[:, None, None]
    worst = 0.0
    for height, width in SIZES:
        image = PICTURES[kind](height, width)
        pixels = transform(image, np.random.default_rng(0)).transpose(2, 0, 1)
        theirs = 255 * (peer(image) * std + mean)
        if theirs.shape != pixels.shape:
            return math.inf
        worst = max(worst, float(np.abs(pixels - theirs).max()))
    return worst


def results(
    names: Sequence[str] | None = None,
) -> Iterator[tuple[str, Found | str]]:
    """Each case with the result of ``compare`` per kind of picture, or with the error.

    Args:
        names: of the cases; None for all.
    """
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "net"
        export(load("builtin"), folder, to="huggingface")
        (folder / "preprocessor_config.json").unlink()
        for name, case in peers().items():
            if names is not None and name not in names:
                continue
            record, peer = case()
            if record is not None:
                (folder / record[0]).write_text(json.dumps(record[1]))
            try:
                own = load(folder).preprocessing
            except ValueError as error:
                yield name, str(error)
                continue
            finally:
                for file in ("config.json", "preprocessor_config.json"):
                    (folder / file).unlink(missing_ok=True)
            if record is None:
                # torchvision's records are code.
                fields = TORCHVISION[name]
                own = Preprocessing(own.mean, own.std, fields["crop_size"], fields["resize_size"])
            yield name, {kind: compare(own, peer, kind) for kind in PICTURES}


def main() -> None:
    declare_operators()
    print(f"Largest difference over {len(SIZES)} sizes, in levels of 255.\n")
    print(f"| preprocessing | {' | '.join(PICTURES)} |")
    print("|---|" + "---|" * len(PICTURES))
    refused = []
    for name, found in results():
        if isinstance(found, str):
            refused.append((name, found.split("not supported: ")[-1].split("; edit")[0]))
        else:
            print(f"| {name} | {' | '.join(f'{level:.2f}' for level in found.values())} |")
    print("\n| refused | by |\n|---|---|")
    for name, text in refused:
        print(f"| {name} | {text} |")


if __name__ == "__main__":
    main()
