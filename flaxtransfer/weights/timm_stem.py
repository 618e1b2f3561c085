"""Narrow networks in timm, whose plain stem has 64 channels whatever the width of the stages.

The channels that a narrower network has not are silent: zero filters, zero scales, zero weights in
what follows. Where timm then has a shortcut in the first block, and the network has none, it
passes the other channels on as they are.
"""

from collections.abc import Mapping

import numpy as np

from flaxtransfer.architectures import ResNetConfig

__all__ = ["WIDTH", "narrowed", "widened"]

WIDTH = 64

# The axis of the stem's channels, and what a silent one holds there.
_SILENT = {
    "conv1.weight": (0, 0.0),
    "bn1.weight": (0, 0.0),
    "bn1.bias": (0, 0.0),
    "bn1.running_mean": (0, 0.0),
    "bn1.running_var": (0, 1.0),
    "layer1.0.conv1.weight": (1, 0.0),
    "layer1.0.downsample.0.weight": (1, 0.0),
    "layer1.0.downsample.1.weight": (1, 0.0),
}


def widened(arrays: Mapping[str, np.ndarray], config: ResNetConfig) -> dict[str, np.ndarray]:
    """The arrays of a narrow network under timm's keys, as those of one with timm's stem.

    Raises:
        ValueError: a wider network, or GroupNorms, whose groups silent channels would disturb.
    """
    width = config.width
    if width > WIDTH or config.norm == "group":
        raise ValueError(
            f"timm's plain stem has {WIDTH} channels and that of {config.name} {width}; --to "
            "huggingface, onnx or stablehlo may hold it"
        )
    wide = dict(arrays)
    for key, (axis, value) in _of_the_stem(arrays).items():
        pads = [(0, 0)] * arrays[key].ndim
        pads[axis] = (0, WIDTH - width)
        wide[key] = np.pad(arrays[key], pads, constant_values=value)
    if not config.has_shortcut(1, 0):
        wide |= _passing(width, int(config.shortcut == "average"))
    return wide


def narrowed(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The way back from `widened`; other arrays are left as they are.

    Returns:
        The arrays, and a note where channels were taken away.
    """
    width = _width(arrays)
    keys = _of_the_stem(arrays)
    if width >= WIDTH or not {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight"} <= keys.keys():
        return dict(arrays), []
    beyond = {
        key: (np.moveaxis(arrays[key], axis, 0)[width:], value)
        for key, (axis, value) in keys.items()
    }
    if any(len(part) != WIDTH - width or (part != value).any() for part, value in beyond.values()):
        return dict(arrays), []
    passing = any(_holds(arrays, _passing(width, number)) for number in (0, 1))
    narrow = {
        key: array
        for key, array in arrays.items()
        if not (passing and key.startswith("layer1.0.downsample."))
    }
    for key, (axis, _) in keys.items():
        if key in narrow:
            narrow[key] = np.take(arrays[key], np.arange(width), axis)
    return narrow, [f"{WIDTH - width} silent channels of timm's stem were left out"]


def _of_the_stem(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, float]]:
    # `downsample.1.weight` is a kernel behind an average-pool, and a scale elsewhere.
    return {
        key: (axis, value)
        for key, (axis, value) in _SILENT.items()
        if key in arrays and np.ndim(arrays[key]) == (4 if axis or key == "conv1.weight" else 1)
    }


def _width(arrays: Mapping[str, np.ndarray]) -> int:
    """Planes of the first stage; timm's width where the keys are of no such network."""
    for key, expansion in (("layer1.0.conv3.weight", 4), ("layer1.0.conv2.weight", 1)):
        if key in arrays and np.ndim(arrays[key]) == 4:
            return arrays[key].shape[0] // expansion
    return WIDTH


def _passing(width: int, number: int) -> dict[str, np.ndarray]:
    norm = f"layer1.0.downsample.{number + 1}"
    return {
        f"layer1.0.downsample.{number}.weight": np.eye(width, WIDTH, dtype=np.float32)[
            ..., None, None
        ],
        f"{norm}.weight": np.ones(width, np.float32),
        f"{norm}.bias": np.zeros(width, np.float32),
        f"{norm}.running_mean": np.zeros(width, np.float32),
        # With the epsilon of timm's norms it is 1.
        f"{norm}.running_var": np.full(width, 1 - 1e-5, np.float32),
    }


def _holds(arrays: Mapping[str, np.ndarray], part: Mapping[str, np.ndarray]) -> bool:
    return all(key in arrays and np.array_equal(arrays[key], part[key]) for key in part)
