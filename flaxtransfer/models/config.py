"""Architecture configurations, as values: no arrays and no framework.

How images of n bands reach a stem that was trained on RGB, as a value.

What networks are called: the names of torchvision and timm, composed from a network's parts.

What a ResNet looks like, as a value: depths, widths, block; no arrays and no framework.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flaxtransfer.paths import suggest

__all__ = ["GROUPS", "KINDS", "PLAIN", "Adapter", "ResNetConfig", "eca_size", "name_of", "squeezed"]


KINDS = ("linear", "curves")


@dataclass(frozen=True)
class Adapter:
    """From n bands to the three channels of an RGB stem.

    "linear" is a 1×1 convolution. It folds exactly into the stem (``fold``), and on a single gray
    band it can only re-weight the stem's channels: all three see the same picture.
    "curves" adds to it a tone curve for each band and channel, so that the three channels can
    show different content, such as different windows of a radiograph. A curve is a sum of hat
    functions over the range of normalized pixels, need not be monotone, goes on level outside the
    range, and passes through the origin, because the zeros with which the stem pads its border
    must stay "nothing there". Curves start flat: at first both kinds are the same function.

    Args:
      bands: channels of the image, 1 or more.
      kind: "linear" or "curves".
      knots: hat functions of a curve, evenly spaced over the span, both ends included; 2 or more.
        "linear" makes no use of it.
      span: lowest and highest pixel in normalized units. The default holds what ImageNet's
        normalization can give, -2.12 to 2.64.

    Raises:
      ValueError: a number out of range or another kind; all in one text.

    >>> Adapter(bands=13)
    Adapter(bands=13, kind='linear', knots=9, span=(-2.2, 2.7))
    """

    bands: int
    kind: Literal["linear", "curves"] = "linear"
    knots: int = 9
    span: tuple[float, float] = (-2.2, 2.7)

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be a whole number, {least} or more, not {value!r}"
            for name, value, least in (("bands", self.bands, 1), ("knots", self.knots, 2))
            if isinstance(value, bool) or not isinstance(value, int) or value < least
        ]
        if self.kind not in KINDS:
            hint = suggest(str(self.kind), KINDS)
            problems.append(f"kind must be 'linear' or 'curves', not {self.kind!r}{hint}")
        span = tuple(self.span) if isinstance(self.span, Sequence) else ()
        numbers = all(isinstance(end, int | float) and math.isfinite(end) for end in span)
        if len(span) != 2 or not numbers or span[0] >= span[1]:
            problems.append(f"span must be two numbers, the lower one first, not {self.span!r}")
        if problems:
            raise ValueError("this is no adapter: " + "; ".join(problems))
        # A list from a JSON file would not be hashable.
        object.__setattr__(self, "span", span)


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

    >>> from flaxtransfer.models.config import ResNetConfig
    >>> name_of(ResNetConfig("bottleneck", (3, 4, 6, 3), groups=32, base_width=4))
    'resnext50_32x4d'
    >>> big = {"preactivation": True, "norm": "group", "standardized": 1e-10}
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
    big = config.stem_pool == "zero-padded" and config.norm == "group" and config.standardized
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
    name += "_ws" if config.standardized else ""
    name += "_v1" if config.stride_in == "1x1" else ""
    name += "_last" if config.stride_at == "last" else ""
    name = _OTHER_NAMES.get(name, name)
    return name if config.width == 64 else f"{name}w{config.width}"


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """The shape of a ResNet.

    Use it to build a network, and to say what a checkpoint holds. The first fields describe the
    plain, wide and ResNeXt forms; each of those after ``adapter`` is one change to them, and
    nearly all can be combined.

    Args:
        block: "basic" (two 3x3) or "bottleneck" (1x1, 3x3, 1x1 with four times the planes).
        depths: blocks in layer1 .. layer4.
        width: channels of the stem and planes of layer1; layer N has `width * 2**(N-1)` planes.
        base_width: a bottleneck's 3x3 convolution has `int(planes * base_width / 64) * groups`
            channels. A basic block knows only 64.
        groups: groups of the 3x3 convolution of a bottleneck. A basic block knows only 1.
        classes: outputs of the head.
        in_channels: channels that the stem takes; those of the image where there is no adapter.
        adapter: what makes three channels for the stem out of an image's bands; None without one.
        stem: "plain" (one 7x7 convolution of `width` channels), "deep" (three 3x3 of `stem_width`,
            `stem_width` and `2 * stem_width`), or "tiered" (likewise, the first with 3/4 of it).
        stem_width: of a deep or tiered stem; None for a plain one.
        stem_pool: "max"; "zero-padded" (of zeros and not of -inf, which shows where nothing
            before it is an activation: BiT, Keras); or "convolution" (a 3x3 with stride 2 and its
            norm, ResNet-RS).
        shortcut: "convolution" (1x1 with the block's stride), or "average" (2x2 average-pooling
            with the stride, then a 1x1 with stride 1).
        shortcut_kernel: 1, or 3 for convolutions of 3x3 in the shortcuts with a stride (SENet-154).
        reduce_first: divides the channels of a block's first convolution (SENet-154: 2).
        attention: over the channels of each block's output: "se", "eca" or None.
        se_ratio: inner channels of "se" as a share of the block's; rounded to 8.
        anti_alias: how a block with a stride lowers resolution instead: "average" (2x2 averages),
            "blur" (3x3 binomial filter, edges reflected) or None; the pool of the stem likewise.
        norm: "batch", or "group" (GroupNorm of 32 groups, without running statistics).
        stride_in: the convolution of a bottleneck that has the stride: "3x3" (v1.5: torchvision,
            timm) or "1x1", the first one (v1: Caffe, Keras).
        preactivation: whether norms and activations stand before the convolutions (v2), the last
            norm then after layer4.
        stride_at: the block that has the stride: the "first" of layer2 .. layer4, or the "last" of
            layer1 .. layer3 (Keras' v2).
        stem_bias: whether the stem's convolution has a bias (Keras' v2).
        standardized: what is added to the variances of weight standardization; None without it.
        epsilon: what norms add to variances (Keras: 1.001e-5).

    References:
        K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", 2016.
        T. He et al., "Bag of Tricks for Image Classification with Convolutional Neural Networks",
        2019 (deep stem, average-pooled shortcut).
        J. Hu, L. Shen, G. Sun, "Squeeze-and-Excitation Networks", 2018.
        Q. Wang et al., "ECA-Net: Efficient Channel Attention for Deep CNNs", 2020.
        R. Zhang, "Making Convolutional Networks Shift-Invariant Again", 2019 (blur).
        Y. Wu, K. He, "Group Normalization", 2018.
        I. Bello et al., "Revisiting ResNets: Improved Training and Scaling Strategies", 2021 (RS).
        K. He, X. Zhang, S. Ren, J. Sun, "Identity Mappings in Deep Residual Networks", 2016 (v2).
        A. Kolesnikov et al., "Big Transfer (BiT): General Visual Representation Learning", 2020.
        S. Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization", 2019.

    Raises:
        ValueError: a number that cannot describe a network; the text names the field.

    >>> ResNetConfig("bottleneck", (3, 4, 6, 3)).name
    'resnet50'
    >>> ResNetConfig("basic", (2, 2, 2, 2), width=32, classes=10).name
    'resnet18w32'
    >>> ResNetConfig("bottleneck", (3, 4, 6, 3), base_width=128).name
    'wide_resnet50_2'
    >>> ResNetConfig("bottleneck", (3, 4, 6, 3)).features
    2048
    >>> deep = {"stem": "deep", "stem_width": 32, "shortcut": "average"}
    >>> ResNetConfig("bottleneck", (3, 4, 6, 3), attention="se", **deep).name
    'seresnet50d'
    """

    block: Literal["basic", "bottleneck"] = "basic"
    depths: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    base_width: int = 64
    groups: int = 1
    classes: int = 1000
    in_channels: int = 3
    adapter: Adapter | None = None
    stem: Literal["plain", "deep", "tiered"] = "plain"
    stem_width: int | None = None
    stem_pool: Literal["max", "zero-padded", "convolution"] = "max"
    shortcut: Literal["convolution", "average"] = "convolution"
    shortcut_kernel: Literal[1, 3] = 1
    reduce_first: int = 1
    attention: Literal["se", "eca"] | None = None
    se_ratio: float = 1 / 16
    anti_alias: Literal["average", "blur"] | None = None
    norm: Literal["batch", "group"] = "batch"
    stride_in: Literal["3x3", "1x1"] = "3x3"
    preactivation: bool = False
    stride_at: Literal["first", "last"] = "first"
    stem_bias: bool = False
    standardized: float | None = None
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                words = " or ".join(map(repr, choices))
                raise ValueError(f"{field} must be {words}, not {getattr(self, field)!r}")
        object.__setattr__(self, "depths", tuple(self.depths))
        if len(self.depths) != 4 or any(not _positive(depth) for depth in self.depths):
            raise ValueError(f"depths must be 4 positive integers, not {self.depths!r}")
        for field in ("width", "base_width", "groups", "classes", "in_channels", "reduce_first"):
            if not _positive(getattr(self, field)):
                raise ValueError(
                    f"{field} must be a positive integer, not {getattr(self, field)!r}"
                )
        if self.block == "basic" and (self.base_width, self.groups) != (64, 1):
            raise ValueError(
                "a basic block has base_width 64 and groups 1, not "
                f"{self.base_width} and {self.groups}; use block='bottleneck'"
            )
        if int(self.width * self.base_width / 64) < 1:
            raise ValueError(
                f"width {self.width} with base_width {self.base_width} leaves a bottleneck "
                "no channels"
            )

        self._check_parts()
        if self.adapter is not None and not isinstance(self.adapter, Adapter):
            raise TypeError(f"adapter must be an Adapter or None, not {self.adapter!r}")
        if self.adapter is not None and self.in_channels != 3:
            raise ValueError(
                f"an adapter makes 3 channels, and the stem takes {self.in_channels}; an adapter "
                "stands before an RGB stem"
            )

    def _check_parts(self) -> None:
        if (self.stem == "plain") != (self.stem_width is None):
            raise ValueError(
                f"a deep or tiered stem has a stem_width and a plain one has width, not "
                f"stem={self.stem!r} with stem_width={self.stem_width!r}"
            )
        if self.stem_width is not None and not (_positive(self.stem_width) and self.stem_width > 3):
            raise ValueError(f"stem_width must be a whole number above 3, not {self.stem_width!r}")
        if not 0 < self.se_ratio <= 1:
            raise ValueError(f"se_ratio is a share above 0 and up to 1, not {self.se_ratio!r}")
        if self.stem_pool == "convolution" and self.anti_alias is not None:
            raise ValueError("a stem whose pool is a convolution has no anti-aliased one")
        if self.stride_in == "1x1" and (self.block == "basic" or self.anti_alias is not None):
            raise ValueError(
                "stride_in '1x1' is for bottlenecks that are not anti-aliased: a basic block has "
                "no 1x1 convolution, and an anti-aliased block lowers resolution after its 3x3"
            )
        if self.shortcut == "average" and self.shortcut_kernel != 1:
            raise ValueError("an average-pooled shortcut has shortcut_kernel 1, not 3")
        if self.inner(1) // self.reduce_first < 1:
            raise ValueError(
                f"reduce_first {self.reduce_first} leaves the first convolution no channels"
            )
        if self.preactivation and (
            self.attention
            or self.anti_alias
            or self.stem_pool == "convolution"
            or self.stride_in == "1x1"
            or self.shortcut_kernel != 1
        ):
            raise ValueError(
                "a network of pre-activations has no attention, anti-aliasing, stem_pool "
                "'convolution', stride_in '1x1' or shortcut_kernel 3"
            )
        if not self.preactivation and (self.stride_at == "last" or self.stem_bias):
            raise ValueError("stride_at 'last' and stem_bias are for networks of pre-activations")
        if self.stem_bias and self.stem != "plain":
            raise ValueError("stem_bias is for a plain stem")
        for field in ("standardized", "epsilon"):
            value = getattr(self, field)
            if value is None and field == "standardized":
                continue
            if not (isinstance(value, float) and 0 < value < 1):
                raise ValueError(f"{field} is a small number above 0, not {value!r}")
        narrow = [self.stem_channels[0], self.inner(1) // self.reduce_first, self.width]
        if self.norm == "group" and any(channels % GROUPS for channels in narrow):
            raise ValueError(
                f"GroupNorm has {GROUPS} groups, and the network layers of {min(narrow)} channels"
            )

    def inner(self, stage: int) -> int:
        """Channels of the 3x3 convolutions in the blocks of a stage, 1 to 4."""
        planes = self.width * 2 ** (stage - 1)
        return int(planes * self.base_width / 64) * self.groups

    @property
    def stem_channels(self) -> tuple[int, ...]:
        """Output channels of the stem's convolutions, in their order."""
        if self.stem_width is None:
            return (self.width,)
        first = 3 * (self.stem_width // 4) if self.stem == "tiered" else self.stem_width
        return (first, self.stem_width, 2 * self.stem_width)

    @property
    def first_kernel(self) -> str:
        """The path of the kernel that the image, or the adapter's output, meets.

        >>> ResNetConfig().first_kernel, ResNetConfig(stem="deep", stem_width=32).first_kernel
        ('conv1/kernel', 'conv1/0/kernel')
        """
        return "conv1/kernel" if self.stem == "plain" else "conv1/0/kernel"

    @property
    def bands(self) -> int:
        """Channels of the image."""
        return self.in_channels if self.adapter is None else self.adapter.bands

    @property
    def expansion(self) -> int:
        """Output channels of a block divided by its planes."""
        return 4 if self.block == "bottleneck" else 1

    @property
    def features(self) -> int:
        """Channels that the head sees."""
        return self.width * 8 * self.expansion

    def to_json(self) -> dict[str, Any]:
        """The fields as a dictionary that `json` can write. Parts that a plain ResNet does not have
        are not mentioned, so that its files are what they were before there were such parts.

        >>> "adapter" in ResNetConfig().to_json()
        False
        """
        default = {field.name: field.default for field in dataclasses.fields(self)}
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name in PLAIN or value != default[name]
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ResNetConfig:
        """The value that `to_json` wrote.

        Raises:
            TypeError, ValueError: fields that describe no network.

        >>> config = ResNetConfig(adapter=Adapter(13))
        >>> ResNetConfig.from_json(config.to_json()) == config
        True
        """
        adapter = fields.get("adapter")
        given = {name: value for name, value in fields.items() if name != "adapter"}
        return cls(**given, adapter=None if adapter is None else Adapter(**adapter))

    def stride(self, stage: int, block: int) -> int:
        """Of a block, counted from 0, of a stage, counted from 1.

        >>> [ResNetConfig().stride(stage, 0) for stage in (1, 2, 3, 4)]
        [1, 2, 2, 2]
        """
        if self.stride_at == "first":
            return 2 if stage > 1 and block == 0 else 1
        return 2 if stage < 4 and block == self.depths[stage - 1] - 1 else 1

    def has_shortcut(self, stage: int, block: int) -> bool:
        """Whether a convolution brings the input of a block to the shape of its output."""
        if block > 0:
            return False
        wider = stage > 1 or self.stem_channels[-1] != self.width * self.expansion
        return wider or self.stride(stage, block) != 1

    @property
    def name(self) -> str:
        """The name that users know ("resnet50"); "w32" is added for another width."""
        return name_of(self)


def squeezed(channels: int, ratio: float) -> int:
    """Inner channels of a squeeze: the share, rounded to a multiple of 8, and 8 at least.

    >>> squeezed(256, 1 / 16), squeezed(64, 1 / 16)
    (16, 8)
    """
    return max(8, int(channels * ratio + 4) // 8 * 8)


def eca_size(channels: int) -> int:
    """Neighbors among the channels that ECA looks at, an odd number.

    >>> eca_size(64), eca_size(2048)
    (3, 7)
    """
    size = int(abs(math.log2(channels) + 1) / 2)
    return max(3, size if size % 2 else size + 1)


def _positive(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


_CHOICES: dict[str, tuple[Any, ...]] = {
    "block": ("basic", "bottleneck"),
    "stem": ("plain", "deep", "tiered"),
    "stem_pool": ("max", "zero-padded", "convolution"),
    "shortcut": ("convolution", "average"),
    "shortcut_kernel": (1, 3),
    "attention": (None, "se", "eca"),
    "anti_alias": (None, "average", "blur"),
    "norm": ("batch", "group"),
    "stride_in": ("3x3", "1x1"),
    "preactivation": (False, True),
    "stride_at": ("first", "last"),
    "stem_bias": (False, True),
}

PLAIN = ("block", "depths", "width", "base_width", "groups", "classes", "in_channels")
"""The fields that describe a plain ResNet, which every file mentions."""

GROUPS = 32
"""Of a GroupNorm."""
