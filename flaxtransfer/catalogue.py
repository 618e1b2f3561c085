"""Architectures by the names that torchvision and timm give them."""

from dataclasses import replace
from typing import Any

from flaxtransfer.architectures import ResNetConfig

__all__ = ["ARCHITECTURES", "RESNETS"]

RESNETS: dict[str, ResNetConfig] = {
    "resnet18": ResNetConfig("basic", (2, 2, 2, 2)),
    "resnet34": ResNetConfig("basic", (3, 4, 6, 3)),
    "resnet50": ResNetConfig("bottleneck", (3, 4, 6, 3)),
    "resnet101": ResNetConfig("bottleneck", (3, 4, 23, 3)),
    "resnet152": ResNetConfig("bottleneck", (3, 8, 36, 3)),
}

_DEPTHS: dict[str, ResNetConfig] = {
    "10": ResNetConfig("basic", (1, 1, 1, 1)),
    "14": ResNetConfig("bottleneck", (1, 1, 1, 1)),
    "26": ResNetConfig("bottleneck", (2, 2, 2, 2)),
    **{name.removeprefix("resnet"): config for name, config in RESNETS.items()},
    "200": ResNetConfig("bottleneck", (3, 24, 36, 3)),
    "269": ResNetConfig("bottleneck", (3, 30, 48, 8)),
    "270": ResNetConfig("bottleneck", (4, 29, 53, 4)),
    "350": ResNetConfig("bottleneck", (4, 36, 72, 4)),
    "420": ResNetConfig("bottleneck", (4, 44, 87, 4)),
}

_LETTERS: dict[str, dict[str, Any]] = {
    "": {},
    "c": {"stem": "deep", "stem_width": 32},
    "d": {"stem": "deep", "stem_width": 32, "shortcut": "average"},
    "s": {"stem": "deep", "stem_width": 64},
    "t": {"stem": "tiered", "stem_width": 32, "shortcut": "average"},
}

_GROUPED = {f"{groups}x{width}d": {"groups": groups, "base_width": width}
            for groups, width in ((32, 4), (32, 8), (32, 16), (32, 32), (64, 4))}  # fmt: skip


def _variant(depth: str, letter: str = "", grouped: str = "", **parts: Any) -> ResNetConfig:
    own = {**_LETTERS[letter], **_GROUPED.get(grouped, {}), **parts}
    return replace(_DEPTHS[depth], **own)


_RS: dict[str, Any] = {"stem_pool": "convolution", "attention": "se", "se_ratio": 0.25}

_V2: dict[str, Any] = {"preactivation": True}
_BIT: dict[str, Any] = {
    "preactivation": True,
    "norm": "group",
    "standardised": 1e-10,
    "stem_pool": "zero-padded",
}

_VARIANTS: tuple[ResNetConfig, ...] = (
    _variant("26"),
    _variant("200"),
    *(_variant(depth, "t") for depth in ("10", "14", "26", "50")),
    *(_variant(depth, "d") for depth in ("18", "26", "34", "50", "101", "152", "200")),
    *(_variant(depth, letter) for depth in ("50", "101", "152") for letter in "cs"),
    *(_variant(depth, base_width=128) for depth in ("50", "101")),
    _variant("50", norm="group"),
    _variant("50", "", "32x4d"),
    _variant("50", "d", "32x4d"),
    *(_variant("101", "", grouped) for grouped in _GROUPED),
    *(_variant(depth, attention="se") for depth in ("18", "34", "50", "101", "152")),
    _variant("50", "t", attention="se"),
    *(_variant(depth, "d", attention="se") for depth in ("152", "200", "269")),
    *(_variant("26", letter, "32x4d", attention="se") for letter in "dt"),
    _variant("50", "", "32x4d", attention="se"),
    *(_variant("101", "", grouped, attention="se") for grouped in ("32x4d", "32x8d", "64x4d")),
    _variant("101", "d", "32x8d", attention="se"),
    _variant("152", "s", "64x4d", attention="se", reduce_first=2, shortcut_kernel=3),
    *(_variant(depth, "t", attention="eca") for depth in ("26", "50")),
    *(_variant(depth, "d", attention="eca") for depth in ("50", "101", "200", "269")),
    *(_variant(depth, "t", "32x4d", attention="eca") for depth in ("26", "50")),
    ResNetConfig("bottleneck", (1, 1, 11, 3), shortcut="average", attention="eca"),
    *(_variant(depth, anti_alias="blur") for depth in ("18", "50")),
    *(_variant(depth, "d", anti_alias="blur") for depth in ("50", "101")),
    _variant("50", anti_alias="average"),
    *(_variant(depth, "d", anti_alias="average") for depth in ("34", "50", "101")),
    _variant("50", "d", anti_alias="average", attention="se"),
    _variant("101", "d", "32x8d", anti_alias="average", attention="se"),
    *(_variant(depth, "d", **_RS) for depth in ("50", "101", "152", "200", "270", "350", "420")),
    *(_variant(depth, **_V2) for depth in ("18", "34", "50", "101", "152")),
    *(_variant(depth, "d", **_V2) for depth in ("18", "34", "50", "101", "152")),
    _variant("50", "t", **_V2),
    _variant("50", "d", norm="group", **_V2),
    *(_variant(depth, width=64 * times, **_BIT)
      for depth in ("50", "101", "152") for times in (1, 2, 3, 4)),
)  # fmt: skip

ARCHITECTURES: dict[str, ResNetConfig] = {
    **RESNETS,
    **{config.name: config for config in _VARIANTS},
}
"""Every architecture that has a name here; a `ResNetConfig` describes many more."""
