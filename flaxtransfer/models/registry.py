"""Architectures by name, and what they cost.

``ARCHITECTURES`` lists the names that torchvision and timm use, ``named`` reads these and
all that ``ResNetConfig.name`` composes, and ``resnet`` makes a model of one. ``costs`` counts
parameters and multiply-adds from the shapes of the leaves and the spatial size of each layer.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flaxtransfer.models.config import ResNetConfig, config_of
from flaxtransfer.models.layout import DEPTHS, STEM_LETTERS
from flaxtransfer.paths import shortened, suggest

if TYPE_CHECKING:
    from flaxtransfer.models.layers import Convolution
    from flaxtransfer.models.model import Model

__all__ = ["ARCHITECTURES", "RESNETS", "Costs", "costs", "named", "resnet"]


RESNETS: dict[str, ResNetConfig] = {
    f"resnet{depth}": ResNetConfig(*DEPTHS[depth]) for depth in (18, 34, 50, 101, 152)
}
"""The plain ResNets of torchvision."""

_GROUPED = {
    f"{groups}x{width}d": {"groups": groups, "base_width": width}
    for groups, width in ((32, 4), (32, 8), (32, 16), (32, 32), (64, 4))
}


def _variant(depth: str, letter: str = "", grouped: str = "", **parts: Any) -> ResNetConfig:
    own = {**STEM_LETTERS[letter], **_GROUPED.get(grouped, {}), **parts}
    return replace(ResNetConfig(*DEPTHS[int(depth)]), **own)


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
    _variant("201", "e", "32x8d", anti_alias="average", attention="se"),
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
"""Every architecture with a name, as a configuration."""


def resnet(
    architecture: str | ResNetConfig,
    *,
    classes: int | None = None,
    dtype: Any = None,
    zero_head: bool = False,
    zero_init_residual: bool = False,
    convolution: Convolution | None = None,
) -> Model:
    """A ResNet of the v1.5 family, with torchvision's layers, paddings and names.

    It has random weights. For pre-trained weights, ``flaxtransfer.load`` reads a checkpoint, and
    ``flaxtransfer.transfer`` builds the model that fits it and your classes.

    Args:
        architecture: a name in ``ARCHITECTURES``, such as "resnet50", "wide_resnet50_2" or
            "resnext50_32x4d", one with widths and endings, such as "resnet50w32s64_v1", or a
            configuration of your own.
        classes: outputs of the head; None keeps the configuration's.
        dtype: of the convolutions; None uses that of the parameters. See ``Model``.
        zero_head: whether ``init`` sets the head's kernel to 0.
        zero_init_residual: whether ``init`` makes every block start as an identity.
        convolution: the function that convolves; None is ``conv``, and ``lax_conv`` gives the same
            network without the faster algorithms for CPU.

    Raises:
        ValueError: an unknown name, with the nearest one, or an invalid configuration.

    >>> import jax
    >>> model = resnet("resnet18", classes=10)
    >>> sum(leaf.size for leaf in jax.tree.leaves(model.abstract()["params"]))
    11181642

    References:
        K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", 2016.
        P. Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017 (stride
        in the 3x3 convolution; zero-initialized last scale of each block).
    """
    # Inside, so that the table above can be read without importing jax.
    from flaxtransfer.models.layers import conv
    from flaxtransfer.models.model import Model

    config = named(architecture) if isinstance(architecture, str) else architecture
    if classes is not None:
        config = replace(config, classes=classes)
    return Model(config, dtype, zero_head, zero_init_residual, convolution or conv)


def named(name: str, what: str = "`architecture`") -> ResNetConfig:
    """The configuration of an architecture by its name, with widths and endings.

    Args:
        name: as ``ResNetConfig.name`` gives it.
        what: the argument or option, for the error text.

    Raises:
        ValueError: an unknown name, with the nearest one.

    >>> named("resnet18w32").width, named("resnet50_v1").stride_in
    (32, '1x1')
    """
    try:
        return ARCHITECTURES.get(name) or config_of(name)
    except ValueError as error:
        reason = shortened(str(error).removeprefix("invalid ResNetConfig: "), 250)
    raise ValueError(
        f"{what} must be the name of a network, such as resnet50 or resnet50w32s64_v1, got "
        f'{shortened(name, 60)!r}; {reason}; "flaxtransfer models" lists the names'
        f"{suggest(name, ARCHITECTURES)}"
    )


_IN_STAGE = re.compile(r"layer(\d)/(\d+)/(.+)/kernel")


@dataclass(frozen=True)
class Costs:
    """Number of parameters and multiply-adds; the result of ``costs``.

    Args:
        parameters: number of trainable parameters.
        multiply_adds: multiplications with a weight, each with its addition, in the convolutions
            and dense layers. Tables write them as GMACs or, loosely, GFLOPs. A training step takes
            about three times as many if all parameters are trained.
    """

    parameters: int
    multiply_adds: int


def costs(config: ResNetConfig, size: int = 224) -> Costs:
    """Counts the parameters of a network, and its multiply-adds per image.

    Normalization, activations, pooling and the scaling of channels are not counted, as in the
    tables of torchvision and timm.

    Args:
        config: of the network.
        size: height and width of the image in px.

    Raises:
        ValueError: a size that is not positive, or one that gives an odd number of pixels to a
            layer that averages 2x2 of them.

    >>> costs(ResNetConfig())
    Costs(parameters=11689512, multiply_adds=1814073344)
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"size must be an integer >= 1 (px), got {size!r}")
    sides = _sides(config, size)
    parameters = multiply_adds = 0
    from flaxtransfer.models.model import leaf_shapes  # Here: names need no jax.

    for leaf, shape in leaf_shapes(config).items():
        collection, _, path = leaf.partition("/")
        if collection == "params":
            parameters += math.prod(shape)
            if path.endswith("/kernel"):
                multiply_adds += math.prod(shape) * _uses(config, path, shape, sides)
    return Costs(parameters, multiply_adds)


@dataclass(frozen=True)
class _Sides:
    """Sides of square maps in px: image, stem, and input and output of each block."""

    image: int
    stem: int
    into: dict[tuple[int, int], int]
    out: dict[tuple[int, int], int]


def _sides(config: ResNetConfig, size: int) -> _Sides:
    stem = math.ceil(size / 2)
    averaged = config.anti_alias == "average"
    # Padded by half the kernel, a stride of 2 rounds up; 2x2 averages drop an odd row, and the
    # windows of "ceil" start inside the last pair of rows.
    side = stem // 2 if averaged or config.stem_pool == "ceil" else math.ceil(stem / 2)
    into, out = {(1, 0): side}, {}
    for stage, depth in enumerate(config.depths, start=1):
        for block in range(depth):
            into[stage, block] = side
            if config.stride(stage, block) != 1:
                if side == 0 or (averaged and side % 2):
                    raise ValueError(
                        f"images of {size} px do not fit {config.name}: layer{stage} gets {side} "
                        f"px and averages 2x2 of them; {math.ceil(size / 32) * 32} px fit"
                    )
                side = math.ceil(side / 2)
            out[stage, block] = side
    return _Sides(size, stem, into, out)


def _uses(config: ResNetConfig, path: str, shape: tuple[int, ...], sides: _Sides) -> int:
    """How often each number of a kernel is multiplied: once per position of its output."""
    if path.startswith("adapter/"):
        return sides.image**2
    if path.startswith("fc/"):
        return 1
    if path.startswith("maxpool/"):
        return sides.into[1, 0] ** 2
    if not (found := _IN_STAGE.fullmatch(path)):
        return sides.stem**2
    stage, block, layer = int(found[1]), int(found[2]), found[3]
    if layer.startswith("se/"):
        # ECA's filter of 3 to 9 taps runs along the output channels of the block.
        channels = config.width * 2 ** (stage - 1) * config.expansion
        return channels if len(shape) == 3 else 1
    before = layer in _before_the_stride(config)
    return (sides.into if before else sides.out)[stage, block] ** 2


def _before_the_stride(config: ResNetConfig) -> tuple[str, ...]:
    """The convolutions of a block whose output has the resolution of the block's input."""
    if config.block == "basic":
        return ("conv1",) if config.anti_alias else ()
    if config.stride_in == "1x1":
        return ()
    return ("conv1", "conv2") if config.anti_alias else ("conv1",)
