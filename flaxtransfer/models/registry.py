"""Architectures by name, and what they cost.

Architectures by the names that torchvision and timm give them.

ResNets by name, as torchvision defines them.
"""

from dataclasses import replace
from typing import Any

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.models.convolution import conv
from flaxtransfer.models.layers import Convolution
from flaxtransfer.models.model import Model
from flaxtransfer.paths import suggest

__all__ = ["ARCHITECTURES", "RESNETS", "resnet"]


RESNETS: dict[str, ResNetConfig] = {
    "resnet18": ResNetConfig("basic", (2, 2, 2, 2)),
    "resnet34": ResNetConfig("basic", (3, 4, 6, 3)),
    "resnet50": ResNetConfig("bottleneck", (3, 4, 6, 3)),
    "resnet101": ResNetConfig("bottleneck", (3, 4, 23, 3)),
    "resnet152": ResNetConfig("bottleneck", (3, 8, 36, 3)),
}

_CONFIG_OF_DEPTH: dict[str, ResNetConfig] = {
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

_GROUPED = {
    f"{groups}x{width}d": {"groups": groups, "base_width": width}
    for groups, width in ((32, 4), (32, 8), (32, 16), (32, 32), (64, 4))
}


def _variant(depth: str, letter: str = "", grouped: str = "", **parts: Any) -> ResNetConfig:
    own = {**_LETTERS[letter], **_GROUPED.get(grouped, {}), **parts}
    return replace(_CONFIG_OF_DEPTH[depth], **own)


_RS: dict[str, Any] = {"stem_pool": "convolution", "attention": "se", "se_ratio": 0.25}

_V2: dict[str, Any] = {"preactivation": True}
_BIT: dict[str, Any] = {
    "preactivation": True,
    "norm": "group",
    "standardized": 1e-10,
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
    *(
        _variant(depth, width=64 * times, **_BIT)
        for depth in ("50", "101", "152")
        for times in (1, 2, 3, 4)
    ),
)

ARCHITECTURES: dict[str, ResNetConfig] = {
    **RESNETS,
    **{config.name: config for config in _VARIANTS},
}
"""Every architecture that has a name here; a `ResNetConfig` describes many more."""


def resnet(
    architecture: str | ResNetConfig,
    *,
    classes: int | None = None,
    dtype: Any = None,
    zero_head: bool = False,
    zero_init_residual: bool = False,
    convolution: Convolution = conv,
) -> Model:
    """A ResNet of the v1.5 family, with torchvision's layers, paddings and names.

    It is the network alone. For pre-trained numbers, `flaxtransfer.load` reads a checkpoint and
    `flaxtransfer.classifier` makes the model that fits it and your classes.

    Args:
      architecture: "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", a wide or ResNeXt
        form such as "wide_resnet50_2" and "resnext50_32x4d", or a config of your own.
      classes: outputs of the head; None keeps the config's.
      dtype: of the convolutions; None is that of the parameters. See `Model`.
      zero_head: whether `init` sets the head's kernel to 0.
      zero_init_residual: whether `init` makes every block start as an identity.
      convolution: the function that convolves; `lax_conv` gives the same network without the
        remedies for CPU.

    Raises:
      ValueError: an unknown name, with the nearest; numbers that describe no network.

    >>> import jax
    >>> model = resnet("resnet18", classes=10)
    >>> sum(leaf.size for leaf in jax.tree.leaves(model.abstract()["params"]))
    11181642

    References:
      K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", 2016.
      P. Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017 (stride
      in the 3x3 convolution; zero-initialized last scale of each block).
    """
    config = _by_name(architecture) if isinstance(architecture, str) else architecture
    if classes is not None:
        config = replace(config, classes=classes)
    return Model(config, dtype, zero_head, zero_init_residual, convolution)


def _by_name(name: str) -> ResNetConfig:
    if name not in ARCHITECTURES:
        raise ValueError(
            f"no network {name!r}{suggest(name, ARCHITECTURES)}; there are "
            f"{', '.join(ARCHITECTURES)}, and any other shape as a ResNetConfig"
        )
    return ARCHITECTURES[name]
