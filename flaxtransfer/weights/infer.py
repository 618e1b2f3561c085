"""Infer the configuration of a network from the shapes of its leaves.

``infer`` takes the value that most leaves agree on for each field. Fields that no leaf shows
(``UNSEEN``) come from elsewhere, through ``with_unseen``.
"""

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from flaxtransfer.models.config import Adapter, ResNetConfig, squeezed
from flaxtransfer.models.registry import ARCHITECTURES, named
from flaxtransfer.paths import shortened, visible
from flaxtransfer.weights import pretrained, sidecar
from flaxtransfer.weights.naming import native, published, timm
from flaxtransfer.weights.naming.formats import FORMATS
from flaxtransfer.weights.readers import array_files
from flaxtransfer.weights.readers.detect import Tensors

__all__ = [
    "UNSEEN",
    "assumptions",
    "infer",
    "statistics_problem",
    "unfit",
    "with_placeholders",
    "with_unseen",
]


UNSEEN = ("anti_alias", "stride_in", "stride_at", "stem_pool", "standardized", "epsilon")
"""Fields of a configuration that no leaf shows, or not always."""

Shape = tuple[int, ...]


def infer(shapes: Mapping[str, Shape]) -> ResNetConfig:
    """Infers the most likely configuration of a network from the shapes of its leaves.

    Each number is the one that most leaves agree on, so that a single damaged leaf is reported as
    a wrong shape and not as another network. It does not verify the result: compare the leaves with
    ``leaf_shapes`` afterwards.

    >>> from flaxtransfer.models.model import leaf_shapes
    >>> infer(leaf_shapes(ResNetConfig("bottleneck", (3, 4, 6, 3), base_width=4, groups=32))).name
    'resnext50_32x4d'
    """
    bottleneck = any(path.endswith("/conv3/kernel") for path in shapes)
    expansion = 4 if bottleneck else 1
    blocks: dict[int, set[int]] = {}
    for path in shapes:
        parts = path.split("/")
        if len(parts) > 2 and parts[1].startswith("layer") and parts[2].isdigit():
            blocks.setdefault(int(parts[1][5:]), set()).add(int(parts[2]))

    widths = []
    last = "conv3" if bottleneck else "conv2"
    for stage in range(1, 5):
        for index in blocks.get(stage, ()):
            shape = shapes.get(f"params/layer{stage}/{index}/{last}/kernel", ())
            if len(shape) == 4:
                widths.append(shape[3] // (expansion * 2 ** (stage - 1)))
    width = _majority(widths, 64)
    stem = _stem(shapes, width)
    classes = [shapes[p][-1] for p in ("params/fc/bias", "params/fc/kernel") if shapes.get(p)]
    deep = stem["stem"] != "plain"
    first = shapes.get("params/conv1/0/kernel" if deep else "params/conv1/kernel", ())
    in_channels = first[2] if len(first) == 4 and first[2] > 0 else 3
    reduce_first = _reduction(shapes, bottleneck)
    groups, base_width = _grouping(shapes, blocks, width, reduce_first) if bottleneck else (1, 64)
    return ResNetConfig(
        block="bottleneck" if bottleneck else "basic",
        depths=tuple(len(blocks.get(stage, ())) or 1 for stage in range(1, 5)),
        width=width,
        base_width=base_width,
        groups=groups,
        classes=_majority(classes, 1000),
        in_channels=in_channels,
        adapter=_adapter(shapes) if in_channels == 3 else None,
        reduce_first=reduce_first,
        **stem,
        **_parts(shapes, expansion),
    )


def with_unseen(config: ResNetConfig, other: ResNetConfig) -> ResNetConfig:
    """The configuration with the non-default ``UNSEEN`` fields of another one.

    >>> with_unseen(ResNetConfig(classes=5), ResNetConfig(anti_alias="blur")).name
    'resnetblur18'
    """
    plain = ResNetConfig()
    parts = {name: getattr(other, name) for name in UNSEEN}
    own = {name: part for name, part in parts.items() if part != getattr(plain, name)}
    return dataclasses.replace(config, **own)


def _assumed(config: ResNetConfig, told: bool) -> str:
    """What is assumed of a network because no leaf shows it; "" for nothing.

    Args:
        config: the network.
        told: whether the caller or a file said which network it is.

    >>> _assumed(ResNetConfig(norm="group"), told=True)
    'assumed 32 groups in each GroupNorm, which no leaf shows'
    """
    groups = "32 groups in each GroupNorm" if config.norm == "group" else ""
    if told:
        return f"assumed {groups}, which no leaf shows" if groups else ""
    deep = config.block == "bottleneck"
    parts = [
        *([groups] if groups else []),
        *(["strides in the 3x3 convolutions"] if deep else []),
        "no dilation (backbones of segmentation often have it)",
        "no anti-aliasing",
        "a stem pool padded on both sides",
        "ReLU",
    ]
    other = dataclasses.replace(config, stride_in="1x1").name if _can_be_v1(config) else ""
    return (
        f"assumed, as no leaf shows it and no file says it: {', '.join(parts)}; say otherwise "
        f"with model= (--model), such as {other or 'resnetaa50'!r}"
    )


def _can_be_v1(config: ResNetConfig) -> bool:
    return config.block == "bottleneck" and not config.preactivation and config.anti_alias is None


def _lacks_statistics(shapes: Mapping[str, Shape]) -> bool:
    """Whether no norm has running statistics: GroupNorms, or BatchNorms that lost them."""
    norms = any(re.search(r"/gn\d*/scale$", path) for path in shapes)
    return norms and not any(path.startswith("batch_stats/") for path in shapes)


def with_placeholders(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
    """Arrays under torch's or flax's names, with mean 0 and variance 1 for norms without both.

    >>> scale = np.ones(3, np.float32)
    >>> list(with_placeholders({"bn1.weight": scale, "bn1.bias": scale})[0])[2:]
    ['bn1.running_mean', 'bn1.running_var']
    """
    norms = [
        key.removesuffix("weight")
        for key, array in arrays.items()
        if key.endswith(".weight") and array.ndim == 1 and key[:-6] + "bias" in arrays
    ]
    ends = ("running_mean", "running_var")
    lacking = [norm for norm in norms if not any(norm + end in arrays for end in ends)]
    found = dict(arrays)
    for norm in lacking:
        size = arrays[norm + "weight"].size
        found[norm + "running_mean"] = np.zeros(size, np.float32)
        found[norm + "running_var"] = np.ones(size, np.float32)
    for path in [key for key in arrays if _of_batch_norm(key)]:
        norm = f"batch_stats/{path.removeprefix('params/').removesuffix('scale')}"
        if norm + "mean" not in arrays and norm + "var" not in arrays:
            lacking.append(norm)
            found[norm + "mean"] = np.zeros(arrays[path].size, np.float32)
            found[norm + "var"] = np.ones(arrays[path].size, np.float32)
    return found, len(lacking)


def _of_batch_norm(path: str) -> bool:
    """Whether a leaf under flax's names is the scale of a BatchNorm."""
    return path.startswith("params/") and path.endswith("/scale") and "/gn" not in path


def unfit(file: Tensors, problem: str) -> ValueError:
    """The error for a file that is no network of ours: what it is, or what is wrong with it."""
    settings = sidecar.beside(file)
    family = sidecar.family_text(file.arrays, settings) or sidecar.family_text(
        file.beside, settings
    )
    if family:
        return ValueError(shortened(visible(f"{shortened(str(file.path), 150)} {family}"), 600))
    first, *lines = problem.splitlines()
    text, room = shortened(first, 450), 560
    # One of each kind in turn, so that a long list of one kind does not hide the others.
    kinds: dict[str, list[str]] = {}
    for line in map(str.strip, lines):
        kinds.setdefault(line.split(":")[0], []).append(shortened(line, 150))
    turns = [line for turn in itertools.zip_longest(*kinds.values()) for line in turn if line]
    told = 0
    while told < len(turns) and len(text) + len(turns[told]) + 2 <= room:
        text, told = f"{text}; {turns[told]}", told + 1
    more = f"; and {len(turns) - told} more" if told < len(turns) else ""
    return ValueError(shortened(visible(text), 560) + more)


def statistics_problem(
    model: str | ResNetConfig | None,
    shapes: Mapping[str, tuple[int, ...]],
    format: str,
    file: Tensors,
) -> str:
    """What is wrong with norms that have no running statistics; "" where they are GroupNorms.

    Args:
        model: what the caller expects.
        shapes: of the leaves, by path.
        format: the naming of the file.
        file: the weights' file.
    """
    if any(map(_of_batch_norm, file.arrays)) and not any("batch_stats/" in p for p in shapes):
        return (
            f"{shortened(str(file.path), 150)} must have the statistics of its BatchNorms "
            "(batch_stats), got parameters alone; save both collections, or load with "
            "statistics='measure' and call training.recalibrate with your images, which "
            "--statistics measure does"
        )
    # In other formats the names of GroupNorms are their own.
    if format not in ("torchvision", "timm", "timm-v2") or not _lacks_statistics(shapes):
        return ""
    counted = any(key.endswith(".num_batches_tracked") for key in file.arrays)
    if not counted and _says_groups(model, file):
        return ""
    way = "" if counted else ", or say model='resnet50_gn' where the norms are GroupNorms"
    return (
        f"{shortened(str(file.path), 150)} must have the running statistics of its norms "
        "(running_mean, running_var), got none: without them BatchNorm and GroupNorm look the "
        "same; save the whole state_dict(), not parameters() alone"
        f"{way}, or load with statistics='measure' and call training.recalibrate with your images, "
        "which --statistics measure does"
    )


def _says_groups(model: str | ResNetConfig | None, file: Tensors) -> bool:
    if isinstance(model, ResNetConfig):
        return model.norm == "group"
    if model is not None:
        return named(model, "`model` (--model)").norm == "group"
    own = pretrained.read_header(file.metadata)
    if own is not None:
        return own.config.norm == "group"
    settings = sidecar.beside(file)
    architecture, _ = sidecar.timm_architecture(settings)
    stated = ARCHITECTURES.get(architecture or "")
    return timm.has_groups(settings) or (stated is not None and stated.norm == "group")


def assumptions(
    file: Tensors,
    config: ResNetConfig,
    format: str,
    model: str | ResNetConfig | None,
    source: str,
) -> list[str]:
    """What was assumed of a network because neither a leaf nor a file shows it."""
    headers = (native.HEADER_KEY, array_files.MODEL)
    if not FORMATS[format].variants or any(key in file.metadata for key in headers):
        return []
    settings, name = sidecar.beside(file), file.path.name
    if timm.own(settings) is not None:
        return []
    architecture = sidecar.timm_architecture(settings)[0]
    told = (
        model is not None
        or settings.get("model_type") == "resnet"
        or (format.startswith("huggingface") and "downsample_in_bottleneck" in settings)
        or architecture in ARCHITECTURES
        or published.is_of_radiographs(name)
        or published.by_torchvision(name, file.digest) is not None
        or published.by_torchgeo(name, source) is not None
    )
    text = _assumed(config, told)
    if text and architecture and architecture not in ARCHITECTURES:
        text += f"; config.json states {shortened(architecture, 40)!r}, which is not known here"
    return [text] if text else []


def _stem(shapes: Mapping[str, Shape], width: int) -> dict[str, Any]:
    """The fields of a stem before stages of a width."""
    outputs = [shapes.get(f"params/conv1/{number}/kernel", ())[-1:] for number in (0, 3, 6)]
    if not any(outputs):
        own = ("conv1", "bn1", "gn1")
        found = [shape[-1] for path, shape in shapes.items() if path.split("/")[1] in own and shape]
        # What follows takes as many channels.
        after = (shapes.get(f"params/layer1/0/{path}", ()) for path in _AFTER_STEM)
        found += [shape[2] for shape in after if len(shape) == 4]
        return {"stem": "plain", "stem_width": _majority(found, width)}
    first, second = (end[0] if end else 0 for end in outputs[:2])
    width = second if second > 3 else 32
    tiered = first == 3 * (width // 4) and first != width
    return {"stem": "tiered" if tiered else "deep", "stem_width": width}


_AFTER_STEM = ("conv1/kernel", "downsample/0/kernel", "downsample/1/kernel")


def _parts(shapes: Mapping[str, Shape], expansion: int) -> dict[str, Any]:
    """The fields that the presence of leaves shows."""
    parts: dict[str, Any] = {}
    paths = "\n".join(shapes)

    def some(pattern: str) -> bool:
        return re.search(pattern, paths, re.MULTILINE) is not None

    if some("^params/layer4/[bg]n1/"):
        parts["preactivation"] = True
        parts["stem_bias"] = some("^params/conv1/bias$")
    elif some("^params/maxpool/"):
        parts["stem_pool"] = "convolution"
    if some("/downsample/1/kernel$"):
        parts["shortcut"] = "average"
    kernels = [
        shape[0]
        for path, shape in shapes.items()
        if re.search("layer[2-4]/0/downsample/0/kernel$", path) and len(shape) == 4
    ]
    if _majority(kernels, 1) == 3:
        parts["shortcut_kernel"] = 3
    if some("/gn"):
        parts["norm"] = "group"
    if some("/se/conv/"):
        parts["attention"] = "eca"
    if some("/se/fc"):
        hidden = [
            (shape[2], shape[3])
            for path, shape in shapes.items()
            if path.endswith("/se/fc1/kernel") and len(shape) == 4 and min(shape) > 0
        ]
        ratios = {1 / 16, 1 / 4, 1 / 8, *(min(1.0, inner / outer) for outer, inner in hidden)}
        # Hidden channels are multiples of 8, and 8 at least; the middle of what all layers allow.
        low = max(((inner - 4) / outer for outer, inner in hidden if inner > 8), default=0.0)
        high = min(((inner + 4) / outer for outer, inner in hidden), default=1.0)
        ratios |= {(low + high) / 2} if 0 < low + high <= 2 else set()

        def agreement(ratio: float) -> tuple[int, bool, float]:
            fits = sum(squeezed(outer, ratio) == inner for outer, inner in hidden)
            return fits, ratio == 1 / 16, -ratio

        parts |= {"attention": "se", "se_ratio": max(ratios, key=agreement)}
    return parts


def _reduction(shapes: Mapping[str, Shape], bottleneck: bool) -> int:
    """Channels of a block's second convolution divided by those of the first."""
    found = []
    for path, shape in shapes.items():
        if re.fullmatch(r"params/layer\d/\d+/conv1/kernel", path) and len(shape) == 4:
            second = shapes.get(path.replace("conv1", "conv2"), ())
            if len(second) == 4 and shape[3] and second[3] % shape[3] == 0:
                found.append(second[3] // shape[3])
    return _majority(found, 1)


def _adapter(shapes: Mapping[str, Shape]) -> Adapter | None:
    """The adapter; no shape shows the span of its curves."""
    kernel, curves = (shapes.get(f"params/adapter/{name}", ()) for name in ("kernel", "curves"))
    if curves and len(curves) == 3 and curves[0] > 0 and curves[1] > 1:
        return Adapter(curves[0], "curves", curves[1])
    return Adapter(kernel[2]) if len(kernel) == 4 and kernel[2] > 0 else None


def _grouping(
    shapes: Mapping[str, Shape], blocks: Mapping[int, Iterable[int]], width: int, reduction: int
) -> tuple[int, int]:
    """Groups and base width from the middle convolutions.

    They are [3, 3, inner / groups / reduction of the first convolution, inner].
    """
    groups, inner = [], []
    for stage in range(1, 5):
        for index in blocks.get(stage, ()):
            shape = shapes.get(f"params/layer{stage}/{index}/conv2/kernel", ())
            if len(shape) == 4 and shape[2] > 0:
                groups.append(shape[3] // (shape[2] * reduction))
                inner.append((width * 2 ** (stage - 1), shape[2] * reduction))
    # inner = int(planes * base_width / 64) leaves an interval of base widths for each block.
    candidates = {64, *(math.ceil(64 * channels / planes) for planes, channels in inner)}
    candidates = {base for base in candidates if int(width * base / 64) >= 1}

    def agreement(base: int) -> tuple[int, bool, int]:
        fits = sum(int(planes * base / 64) == channels for planes, channels in inner)
        return fits, base == 64, -base

    return _majority(groups, 1), max(candidates, key=agreement, default=64)


def _majority(values: Iterable[int], default: int) -> int:
    counted = Counter(value for value in values if value > 0)
    return counted.most_common(1)[0][0] if counted else default
