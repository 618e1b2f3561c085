"""Between a `ResNetConfig` and the shapes of its leaves, both ways."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from flaxtransfer.models.config import Adapter, ResNetConfig, eca_size, squeezed
from flaxtransfer.paths import suggest

__all__ = ["UNSEEN", "differences", "infer", "leaf_shapes", "with_unseen"]


UNSEEN = ("anti_alias", "stride_in", "stride_at", "stem_pool", "standardized", "epsilon")
"""Fields of a config that show in no leaf, or not always."""

Shape = tuple[int, ...]


def leaf_shapes(config: ResNetConfig) -> dict[str, Shape]:
    """The shape of every leaf of the network, by path, without building it.

    Returns:
        {"params/conv1/kernel": (7, 7, in, width), ..., "batch_stats/bn1/mean": (width,), ...}

    >>> leaf_shapes(ResNetConfig(classes=5))["params/fc/kernel"]
    (512, 5)
    """
    shapes: dict[str, Shape] = {}

    def conv(path: str, size: int, inputs: int, outputs: int, groups: int = 1) -> None:
        shapes[f"params/{path}/kernel"] = (size, size, inputs // groups, outputs)

    def norm(path: str, channels: int) -> None:
        if config.norm == "group":
            path = re.sub(r"(bn)?(\d+)$", r"gn\2", path)
        for leaf in ("params/{}/scale", "params/{}/bias"):
            shapes[leaf.format(path)] = (channels,)
        if config.norm == "batch":
            for leaf in ("batch_stats/{}/mean", "batch_stats/{}/var"):
                shapes[leaf.format(path)] = (channels,)

    if config.adapter is not None:
        shapes["params/adapter/kernel"] = (1, 1, config.adapter.bands, config.in_channels)
        if config.adapter.kind == "curves":
            curves = (config.adapter.bands, config.adapter.knots, config.in_channels)
            shapes["params/adapter/curves"] = curves
    channels = config.in_channels
    if config.stem == "plain":
        conv("conv1", 7, channels, config.width)
        if config.stem_bias:
            shapes["params/conv1/bias"] = (config.width,)
    else:
        for number, outputs in zip((0, 3, 6), config.stem_channels, strict=True):
            conv(f"conv1/{number}", 3, channels, outputs)
            if number < 6:
                norm(f"conv1/bn{number + 1}", outputs)
            channels = outputs
    channels = config.stem_channels[-1]
    if not config.preactivation:
        norm("bn1", channels)
    if config.stem_pool == "convolution":
        conv("maxpool/0", 3, channels, channels)
        norm("maxpool/bn1", channels)
    for stage, depth in enumerate(config.depths, start=1):
        planes = config.width * 2 ** (stage - 1)
        inner, first = config.inner(stage), config.inner(stage) // config.reduce_first
        outputs = planes * config.expansion
        for index in range(depth):
            block = f"layer{stage}/{index}"
            if config.block == "basic":
                narrow = planes // config.reduce_first
                layers = [(3, channels, narrow, 1), (3, narrow, planes, 1)]
            else:
                layers = [
                    (1, channels, first, 1),
                    (3, first, inner, config.groups),
                    (1, inner, outputs, 1),
                ]
            for number, (size, inputs, width, groups) in enumerate(layers, 1):
                conv(f"{block}/conv{number}", size, inputs, width, groups)
                norm(f"{block}/bn{number}", inputs if config.preactivation else width)
            if config.attention == "se":
                hidden = squeezed(outputs, config.se_ratio)
                for layer, inputs, width in (("fc1", outputs, hidden), ("fc2", hidden, outputs)):
                    conv(f"{block}/se/{layer}", 1, inputs, width)
                    shapes[f"params/{block}/se/{layer}/bias"] = (width,)
            elif config.attention == "eca":
                shapes[f"params/{block}/se/conv/kernel"] = (eca_size(outputs), 1, 1)
            if config.has_shortcut(stage, index):
                pooled = config.shortcut == "average"
                size = 1 if stage == 1 else config.shortcut_kernel
                conv(f"{block}/downsample/{int(pooled)}", size, channels, outputs)
                if not config.preactivation:
                    norm(f"{block}/downsample/{1 + pooled}", outputs)
            channels = outputs
    if config.preactivation:
        norm("layer4/bn1", channels)
    shapes["params/fc/kernel"] = (channels, config.classes)
    shapes["params/fc/bias"] = (config.classes,)
    return shapes


def differences(leaves: Mapping[str, Any], shapes: Mapping[str, Shape]) -> list[str]:
    """What keeps the leaves from having exactly these paths and shapes: a line for each.

    >>> differences({"fc/bias": np.zeros(2)}, {"fc/bias": (3,), "fc/kernel": (4, 3)})
    ['missing: fc/kernel [4, 3]', 'shape: fc/bias is [2] and should be [3]']
    """
    missing = [path for path in shapes if path not in leaves]
    foreign = [path for path in leaves if path not in shapes]
    lines = [f"missing: {path} {list(shapes[path])}" for path in missing]
    lines += [f"unexpected: {path}{suggest(path, missing)}" for path in foreign]
    return lines + [
        f"shape: {path} is {list(np.shape(leaf))} and should be {list(shapes[path])}"
        for path, leaf in leaves.items()
        if path in shapes and np.shape(leaf) != tuple(shapes[path])
    ]


def infer(shapes: Mapping[str, Shape]) -> ResNetConfig:
    """The network that a set of leaves most likely belongs to.

    Each number is the one that most leaves agree on, so that a single damaged leaf shows up as
    that leaf's wrong shape and not as another network. It never fails: whether the leaves really
    form that network is for the strict comparison with `leaf_shapes` to say.

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

    stem = _stem(shapes)
    first_layers = () if stem else ("conv1", "bn1", "gn1")
    widths = [shapes[p][-1] for p in shapes if p.split("/")[1] in first_layers and shapes[p]]
    last = "conv3" if bottleneck else "conv2"
    for stage in range(1, 5):
        for index in blocks.get(stage, ()):
            shape = shapes.get(f"params/layer{stage}/{index}/{last}/kernel", ())
            if len(shape) == 4:
                widths.append(shape[3] // (expansion * 2 ** (stage - 1)))
    width = _majority(widths, 64)
    classes = [shapes[p][-1] for p in ("params/fc/bias", "params/fc/kernel") if shapes.get(p)]
    first = shapes.get("params/conv1/0/kernel" if stem else "params/conv1/kernel", ())
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
    """The config with those of the other's parts that show in no leaf.

    >>> with_unseen(ResNetConfig(classes=5), ResNetConfig(anti_alias="blur")).name
    'resnetblur18'
    """
    plain = ResNetConfig()
    parts = {name: getattr(other, name) for name in UNSEEN}
    own = {name: part for name, part in parts.items() if part != getattr(plain, name)}
    return dataclasses.replace(config, **own)


def _stem(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields of a deep stem; none for a plain one."""
    outputs = [shapes.get(f"params/conv1/{number}/kernel", ())[-1:] for number in (0, 3, 6)]
    if not any(outputs):
        return {}
    first, second = (end[0] if end else 0 for end in outputs[:2])
    width = second if second > 3 else 32
    tiered = first == 3 * (width // 4) and first != width
    return {"stem": "tiered" if tiered else "deep", "stem_width": width}


def _parts(shapes: Mapping[str, Shape], expansion: int) -> dict[str, Any]:
    """The fields that show in the presence of leaves."""
    parts: dict[str, Any] = {}

    def some(pattern: str) -> bool:
        return any(re.search(pattern, path) for path in shapes)

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

        def agreement(ratio: float) -> tuple[int, bool, float]:
            fits = sum(squeezed(outer, ratio) == inner for outer, inner in hidden)
            return fits, ratio == 1 / 16, -ratio

        parts |= {"attention": "se", "se_ratio": max(ratios, key=agreement)}
    return parts


def _reduction(shapes: Mapping[str, Shape], bottleneck: bool) -> int:
    """Output channels of a block's second convolution by those of its first."""
    found = []
    for path, shape in shapes.items():
        if re.fullmatch(r"params/layer\d/\d+/conv1/kernel", path) and len(shape) == 4:
            second = shapes.get(path.replace("conv1", "conv2"), ())
            if len(second) == 4 and shape[3] and second[3] % shape[3] == 0:
                found.append(second[3] // shape[3])
    return _majority(found, 1)


def _adapter(shapes: Mapping[str, Shape]) -> Adapter | None:
    """The adapter that leaves show; the span of its curves shows in no shape."""
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
