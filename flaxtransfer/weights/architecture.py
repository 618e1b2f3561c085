"""Between a `ResNetConfig` and the shapes of its leaves, both ways."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from flaxtransfer.architectures import ResNetConfig
from flaxtransfer.bands import Adapter
from flaxtransfer.paths import suggest

__all__ = ["differences", "infer", "leaf_shapes"]

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
        for leaf in ("params/{}/scale", "params/{}/bias", "batch_stats/{}/mean"):
            shapes[leaf.format(path)] = (channels,)
        shapes[f"batch_stats/{path}/var"] = (channels,)

    if config.adapter is not None:
        shapes["params/adapter/kernel"] = (1, 1, config.adapter.bands, config.in_channels)
        if config.adapter.kind == "curves":
            curves = (config.adapter.bands, config.adapter.knots, config.in_channels)
            shapes["params/adapter/curves"] = curves
    conv("conv1", 7, config.in_channels, config.width)
    norm("bn1", config.width)
    channels = config.width
    for stage, depth in enumerate(config.depths):
        planes = config.width * 2**stage
        inner = int(planes * config.base_width / 64) * config.groups
        outputs = planes * config.expansion
        for index in range(depth):
            block = f"layer{stage + 1}/{index}"
            if config.block == "basic":
                layers = [(3, channels, planes, 1), (3, planes, planes, 1)]
            else:
                layers = [
                    (1, channels, inner, 1),
                    (3, inner, inner, config.groups),
                    (1, inner, outputs, 1),
                ]
            for number, (size, inputs, width, groups) in enumerate(layers, 1):
                conv(f"{block}/conv{number}", size, inputs, width, groups)
                norm(f"{block}/bn{number}", width)
            if index == 0 and (stage > 0 or channels != outputs):
                conv(f"{block}/downsample/0", 1, channels, outputs)
                norm(f"{block}/downsample/1", outputs)
            channels = outputs
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

    widths = [shapes[p][-1] for p in shapes if p.split("/")[1] in ("conv1", "bn1") and shapes[p]]
    last = "conv3" if bottleneck else "conv2"
    for stage in range(1, 5):
        for index in blocks.get(stage, ()):
            shape = shapes.get(f"params/layer{stage}/{index}/{last}/kernel", ())
            if len(shape) == 4:
                widths.append(shape[3] // (expansion * 2 ** (stage - 1)))
    width = _majority(widths, 64)
    classes = [shapes[p][-1] for p in ("params/fc/bias", "params/fc/kernel") if shapes.get(p)]
    stem = shapes.get("params/conv1/kernel", ())
    in_channels = stem[2] if len(stem) == 4 and stem[2] > 0 else 3
    groups, base_width = _grouping(shapes, blocks, width) if bottleneck else (1, 64)
    return ResNetConfig(
        block="bottleneck" if bottleneck else "basic",
        depths=tuple(len(blocks.get(stage, ())) or 1 for stage in range(1, 5)),
        width=width,
        base_width=base_width,
        groups=groups,
        classes=_majority(classes, 1000),
        in_channels=in_channels,
        adapter=_adapter(shapes) if in_channels == 3 else None,
    )


def _adapter(shapes: Mapping[str, Shape]) -> Adapter | None:
    """The adapter that leaves show; the span of its curves shows in no shape."""
    kernel, curves = (shapes.get(f"params/adapter/{name}", ()) for name in ("kernel", "curves"))
    if curves and len(curves) == 3 and curves[0] > 0 and curves[1] > 1:
        return Adapter(curves[0], "curves", curves[1])
    return Adapter(kernel[2]) if len(kernel) == 4 and kernel[2] > 0 else None


def _grouping(
    shapes: Mapping[str, Shape], blocks: Mapping[int, Iterable[int]], width: int
) -> tuple[int, int]:
    """Groups and base width from the middle convolutions, [3, 3, inner / groups, inner]."""
    groups, inner = [], []
    for stage in range(1, 5):
        for index in blocks.get(stage, ()):
            shape = shapes.get(f"params/layer{stage}/{index}/conv2/kernel", ())
            if len(shape) == 4 and shape[2] > 0:
                groups.append(shape[3] // shape[2])
                inner.append((width * 2 ** (stage - 1), shape[2]))
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
