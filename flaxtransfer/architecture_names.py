"""What networks are called: the names of torchvision and timm, composed from a network's parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flaxtransfer.architectures import ResNetConfig

__all__ = ["name_of"]

_DEPTHS: dict[tuple[str, tuple[int, ...]], int] = {
    ("basic", (1, 1, 1, 1)): 10,
    ("bottleneck", (1, 1, 1, 1)): 14,
    ("basic", (2, 2, 2, 2)): 18,
    ("bottleneck", (2, 2, 2, 2)): 26,
    ("basic", (3, 4, 6, 3)): 34,
    ("bottleneck", (3, 4, 6, 3)): 50,
    ("bottleneck", (3, 4, 23, 3)): 101,
    ("bottleneck", (3, 8, 36, 3)): 152,
    ("bottleneck", (3, 24, 36, 3)): 200,
    ("bottleneck", (3, 30, 48, 8)): 269,
    ("bottleneck", (4, 29, 53, 4)): 270,
    ("bottleneck", (4, 36, 72, 4)): 350,
    ("bottleneck", (4, 44, 87, 4)): 420,
}

_STEMS: dict[tuple[str, int | None, str], str] = {
    ("plain", None, "convolution"): "",
    ("deep", 32, "convolution"): "c",
    ("deep", 32, "average"): "d",
    ("deep", 64, "average"): "e",
    ("deep", 64, "convolution"): "s",
    ("tiered", 32, "average"): "t",
}
"""The letter after the depth, by stem, its width, and shortcut."""

_OTHER_NAMES = {
    "seresnext152s_64x4d_first2_down3": "senet154",
    "ecaresnet-bottleneck-1-1-11-3-plain-average": "ecaresnetlight",
}


def name_of(config: ResNetConfig) -> str:
    """The name of a network; "w32" is added for another width.

    >>> from flaxtransfer.architectures import ResNetConfig
    >>> name_of(ResNetConfig("bottleneck", (3, 4, 6, 3), groups=32, base_width=4))
    'resnext50_32x4d'
    >>> big = {"preactivation": True, "norm": "group", "standardised": 1e-10}
    >>> name_of(ResNetConfig("bottleneck", (3, 4, 6, 3), 192, stem_pool="zero-padded", **big))
    'resnetv2_50x3_bit'
    """
    depth = _DEPTHS.get((config.block, config.depths))
    number = str(depth) if depth else f"-{config.block}-" + "-".join(map(str, config.depths))
    letter = _STEMS.get((config.stem, config.stem_width, config.shortcut))
    if letter is None:
        letter = f"-{config.stem}{config.stem_width or ''}-{config.shortcut}"
    alias = {"average": "aa", "blur": "blur", None: ""}[config.anti_alias]
    if config.stem_pool == "convolution":
        alias, letter = "rs", "" if letter == "d" else letter
    if config.preactivation:
        alias = "v2_"
    prefix = "" if alias == "rs" and config.attention == "se" else config.attention or ""
    big = config.stem_pool == "zero-padded" and config.norm == "group" and config.standardised
    if config.groups != 1:
        name = f"{prefix}resnext{alias}{number}{letter}_{config.groups}x{config.base_width}d"
    elif config.base_width != 64 and config.base_width % 64 == 0:
        name = f"{prefix}wide_resnet{alias}{number}{letter}_{config.base_width // 64}"
    elif config.base_width != 64:
        name = f"{prefix}resnet{alias}{number}{letter}b{config.base_width}"
    elif big and alias == "v2_" and config.width % 64 == 0:
        return f"resnetv2_{number}x{config.width // 64}{letter}_bit"
    else:
        name = f"{prefix}resnet{alias}{number}{letter}"
    if (config.reduce_first, config.shortcut_kernel) != (1, 1):
        name += f"_first{config.reduce_first}_down{config.shortcut_kernel}"
    name += "_gn" if config.norm == "group" else ""
    name += "_ws" if config.standardised else ""
    name += "_v1" if config.stride_in == "1x1" else ""
    name += "_last" if config.stride_at == "last" else ""
    name = _OTHER_NAMES.get(name, name)
    return name if config.width == 64 else f"{name}w{config.width}"
