"""Architecture configurations: frozen values without arrays and without a framework.

A ``ResNetConfig`` describes a network of the ResNet family, and an ``Adapter`` describes the layer
that maps images with n bands to the three input channels of an RGB stem. Its ``name`` is composed
by ``layout.name_of``, and ``config_of`` reads such a name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from flaxtransfer.models.layout import fields_of, name_of
from flaxtransfer.paths import listing, shortened, suggest

__all__ = [
    "BASE_FIELDS",
    "GROUPS",
    "KINDS",
    "METHODS",
    "Adapter",
    "Method",
    "ResNetConfig",
    "config_of",
    "eca_size",
    "squeezed",
]


KINDS = ("linear", "curves")
"""The kinds of an ``Adapter``."""

GROUPS = 32
"""Groups of a GroupNorm."""

BASE_FIELDS = ("block", "depths", "width", "base_width", "groups", "classes", "in_channels")
"""The fields of ``ResNetConfig`` that describe a plain ResNet; every file states them."""

Method = Literal["linear", "curves", "replicate", "sum", "average", "repeat"]
METHODS = get_args(Method)
"""The ways in which images of other bands reach a stem; the first two are adapters that learn."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Input adapter: maps n bands to the three channels of an RGB stem.

    "linear" is a 1×1 convolution. It folds exactly into the stem (``fold``). On a single gray band
    it can only re-weight the stem's channels: all three channels see the same picture.
    "curves" adds a tone curve per band and channel, so that the three channels can show different
    content, such as different windows of a radiograph. A curve is a sum of hat functions over the
    range of normalized pixels. It need not be monotone, and it is constant outside the range. It
    passes through the origin, because the zeros with which the stem pads its border must remain
    zeros. Curves start flat: both kinds are initially the same function.

    Args:
        bands: channels of the image, >= 1.
        kind: "linear" or "curves".
        knots: hat functions per curve, evenly spaced over the span, both ends included; >= 2.
            "linear" does not use it.
        span: lowest and highest pixel in normalized units. The default covers the range that
            ImageNet's normalization can produce, -2.12 to 2.64.

    Raises:
        ValueError: a number out of range or an unknown kind; all problems in one text.

    >>> Adapter(bands=13)
    Adapter(bands=13, kind='linear', knots=9, span=(-2.2, 2.7))
    """

    bands: int
    kind: Literal["linear", "curves"] = "linear"
    knots: int = 9
    span: tuple[float, float] = (-2.2, 2.7)

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be an integer >= {least}, got {value!r}"
            for name, value, least in (("bands", self.bands, 1), ("knots", self.knots, 2))
            if not _at_least(value, least)
        ]
        problems += [
            f"{name} must be at most {_MOST:,}, got {shortened(str(value), 60)}"
            for name, value in (("bands", self.bands), ("knots", self.knots))
            if _at_least(value, _MOST + 1)
        ]
        if self.kind not in KINDS:
            problems.append(
                f"kind must be {_one_of(KINDS)}, got {self.kind!r}{suggest(str(self.kind), KINDS)}"
            )
        span = tuple(self.span) if isinstance(self.span, Sequence) else ()
        numbers = all(isinstance(end, int | float) and math.isfinite(end) for end in span)
        if len(span) != 2 or not numbers or span[0] >= span[1]:
            problems.append(f"span must be two increasing numbers, got {self.span!r}")
        if problems:
            raise ValueError("invalid Adapter: " + "; ".join(problems))
        # A list from a JSON file would not be hashable.
        object.__setattr__(self, "span", span)


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Configuration of a ResNet.

    Use it to build a network and to describe what a checkpoint holds. The first fields describe
    plain, wide and ResNeXt networks. Each field after ``adapter`` is one modification of them, and
    almost all modifications can be combined.

    Args:
        block: "basic" (two 3x3 convolutions) or "bottleneck" (1x1, 3x3, and 1x1 with four times the
            planes).
        depths: blocks per stage, layer1 to layer4. Fewer than four are a network that ends at an
            earlier stage, none one that ends at the stem: its head reads the mean of that output.
        width: planes of layer1; layer N has ``width * 2**(N-1)`` planes.
        base_width: the 3x3 convolution of a bottleneck has ``int(planes * base_width / 64) *
            groups`` channels. A basic block only supports 64.
        groups: groups of the 3x3 convolution of a bottleneck. A basic block only supports 1.
        classes: outputs of the head.
        in_channels: input channels of the stem: those of the image unless there is an adapter.
        adapter: maps an image's bands to the stem's three channels; None without an adapter.
        stem: "plain" (one 7x7 convolution with ``stem_width`` channels), "deep" (three 3x3
            convolutions with ``stem_width``, ``stem_width`` and ``2 * stem_width`` channels), or
            "tiered" (like "deep", but the first has 3/4 of ``stem_width``).
        stem_width: channels of the stem. None, for a plain stem only, is those of layer1; an equal
            number is stored as None.
        stem_pool: "max"; "zero-padded" (max-pooling padded with 0 instead of -inf, which matters
            where no activation precedes it: BiT, Keras); "ceil" (without padding, but with a last
            window that reaches over the edge: Caffe, ``ceil_mode`` in torch); or "convolution" (a
            3x3 convolution with stride 2 and its norm: ResNet-RS).
        shortcut: "convolution" (1x1 with the block's stride), or "average" (2x2 average-pooling
            with the stride, then a 1x1 convolution with stride 1).
        shortcut_kernel: 1, or 3 for 3x3 convolutions in shortcuts with a stride (SENet-154).
        reduce_first: divides the channels of a block's first convolution (SENet-154: 2).
        attention: channel attention on each block's output: "se", "eca" or None.
        se_ratio: hidden channels of "se" as a fraction of the block's channels, rounded to 8.
        anti_alias: pooling that replaces the strides of blocks and of the stem's pool: "average"
            (2x2 mean), "blur" (3x3 binomial filter, reflected edges) or None.
        norm: "batch" (BatchNorm), or "group" (GroupNorm with 32 groups, no running statistics).
        stride_in: the convolution of a bottleneck that has the stride: "3x3" (v1.5: torchvision,
            timm) or "1x1", the first one (v1: Caffe, Keras).
        preactivation: whether norms and activations precede the convolutions (v2); one more norm
            then follows layer4, and none follows an earlier last stage.
        stride_at: the block that has the stride: the "first" of layer2 to layer4, or the "last" of
            layer1 to layer3 (Keras v2).
        stem_bias: whether the stem's convolution has a bias (Keras v2).
        standardized: epsilon of weight standardization; None without weight standardization.
        epsilon: of the norms (Keras: 1.001e-5).
        head_reads: segments before the last one whose means the head reads too, such as ("stem",
            "layer2"), before those of the last.

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
        TypeError: ``adapter`` has another type.
        ValueError: fields that do not describe a network; all problems in one text.

    >>> ResNetConfig("bottleneck", (3, 4, 6, 3)).name
    'resnet50'
    >>> ResNetConfig("basic", (2, 2, 2, 2), width=32, classes=10).name
    'resnet18w32'
    >>> ResNetConfig("bottleneck", (3, 4, 6, 3), 32, stem_width=64, stride_in="1x1").name
    'resnet50w32s64_v1'
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
    stem_pool: Literal["max", "zero-padded", "ceil", "convolution"] = "max"
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
    head_reads: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(self.depths))
        object.__setattr__(self, "head_reads", tuple(self.head_reads))
        if self.adapter is not None and not isinstance(self.adapter, Adapter):
            raise TypeError(f"adapter must be an Adapter or None, got {self.adapter!r}")
        if self.stem == "plain" and self.stem_width == self.width:
            object.__setattr__(self, "stem_width", None)
        # Combinations are only meaningful for fields that are valid by themselves.
        if problems := self._field_problems() or self._combination_problems():
            raise ValueError("invalid ResNetConfig: " + "; ".join(problems))

    def _field_problems(self) -> list[str]:
        values = vars(self)
        problems = [
            f"{name} must be {_one_of(choices)}, got {values[name]!r}"
            for name, choices in _CHOICES.items()
            if values[name] not in choices
        ]
        problems += [
            f"{name} must be an integer >= 1, got {values[name]!r}"
            for name in _COUNTS
            if not _at_least(values[name], 1)
        ]
        if len(self.depths) > 4 or not all(_at_least(depth, 1) for depth in self.depths):
            problems.append(f"depths must be at most 4 integers >= 1, got {self.depths!r}")
        earlier = self._ends[:-1]
        if [name for name in earlier if name in self.head_reads] != list(self.head_reads):
            problems.append(
                f"head_reads must be some of {', '.join(earlier) or 'no segment'}, in this order, "
                f"got {shortened(repr(self.head_reads), 60)}"
            )
        least = 1 if self.stem == "plain" else 4
        if self.stem_width is not None and not _at_least(self.stem_width, least):
            problems.append(
                f"stem_width must be an integer >= {least} or None, got {self.stem_width!r}"
            )
        problems += [
            f"{name} must be at most {most:,}, got {shortened(str(value), 60)}"
            for name, value, most in (
                *((name, values[name], _MOST) for name in (*_COUNTS, "stem_width")),
                *(("depths", depth, _MOST_BLOCKS) for depth in self.depths),
            )
            if _at_least(value, most + 1)
        ]
        if not 0 < self.se_ratio <= 1:
            problems.append(f"se_ratio must be > 0 and <= 1, got {self.se_ratio!r}")
        problems += [
            f"{name} must be a float between 0 and 1, got {value!r}"
            for name, value in (("standardized", self.standardized), ("epsilon", self.epsilon))
            if not (isinstance(value, float) and 0 < value < 1)
            and not (name == "standardized" and value is None)
        ]
        return problems

    def _combination_problems(self) -> list[str]:
        plain_stem, basic = self.stem == "plain", self.block == "basic"
        if self.stem_width is None and not plain_stem:
            return [f"stem_width must be an integer >= 4 for a {self.stem} stem, got None"]
        inner = [self.inner(stage) for stage in range(1, max(1, len(self.depths)) + 1)]
        first = inner[0] // self.reduce_first
        firsts = [channels // self.reduce_first for channels in inner]
        uneven = [n for n in (*self.stem_channels, *inner, *firsts, self.width) if n % GROUPS]
        rules = (
            (
                basic and (self.base_width, self.groups) != (64, 1),
                "a basic block must have base_width 64 and groups 1, got "
                f"{self.base_width} and {self.groups}; use block='bottleneck'",
            ),
            (
                self.inner(1) < 1,
                f"width {self.width} with base_width {self.base_width} leaves a bottleneck "
                "no channels",
            ),
            (
                self.inner(1) >= 1 > first,
                f"reduce_first {self.reduce_first} leaves the first convolution no channels",
            ),
            (
                first >= 1 and any(channels % self.groups for channels in firsts),
                f"the first convolutions must have a multiple of {self.groups} channels with "
                f"groups={self.groups}, got {firsts}",
            ),
            (
                self.stem_bias and not plain_stem,
                f"stem_bias requires stem='plain', got {self.stem!r}",
            ),
            (
                self.stem_pool != "max" and self.anti_alias is not None,
                f"anti_alias must be None with stem_pool={self.stem_pool!r}, got "
                f"{self.anti_alias!r}",
            ),
            (
                self.stride_in == "1x1" and (basic or self.anti_alias is not None),
                "stride_in='1x1' requires bottleneck blocks without anti_alias: a basic block has "
                "no 1x1 convolution, and an anti-aliased block lowers resolution after its 3x3",
            ),
            (
                self.shortcut == "average" and self.shortcut_kernel != 1,
                f"shortcut_kernel must be 1 with shortcut='average', got {self.shortcut_kernel}",
            ),
            (
                self.preactivation
                and (
                    self.attention is not None
                    or self.anti_alias is not None
                    or self.stem_pool in ("convolution", "ceil")
                    or self.stride_in == "1x1"
                    or (self.stem_pool == "zero-padded" and self.stem == "tiered")
                    or (self.groups, self.reduce_first, self.shortcut_kernel) != (1, 1, 1)
                ),
                "a pre-activation network must not have attention, anti_alias, groups, "
                "reduce_first, stem_pool='convolution' or 'ceil', a zero-padded pool behind "
                "stem='tiered', stride_in='1x1' or shortcut_kernel=3",
            ),
            (
                self.stride_at == "last"
                and (
                    (self.block, self.stem, self.shortcut, self.norm)
                    != ("bottleneck", "plain", "convolution", "batch")
                    or self.standardized is not None
                ),
                "stride_at='last' requires bottleneck blocks, stem='plain', "
                "shortcut='convolution', norm='batch' and no weight standardization, as Keras has",
            ),
            (
                not self.preactivation and (self.stride_at == "last" or self.stem_bias),
                "stride_at='last' and stem_bias=True require preactivation=True",
            ),
            (
                self.stem_bias
                and (
                    self.norm == "group"
                    or (self.stem_pool == "zero-padded" and self.stride_at == "first")
                ),
                "stem_bias=True requires norm='batch', and stride_at='last' behind a zero-padded "
                "pool, as Keras has",
            ),
            (
                self.norm == "group" and bool(uneven),
                f"every layer must have a multiple of {GROUPS} channels with norm='group', got "
                f"{min(uneven, default=GROUPS)}",
            ),
            (
                self.adapter is not None and self.in_channels != 3,
                "in_channels must be 3 with an adapter, which outputs the channels of an RGB "
                f"stem, got {self.in_channels}",
            ),
        )
        return [text for broken, text in rules if broken]

    def inner(self, stage: int) -> int:
        """Channels of the 3x3 convolutions in the blocks of a stage, 1 to 4."""
        planes = self.width * 2 ** (stage - 1)
        return int(planes * self.base_width / 64) * self.groups

    @property
    def stem_channels(self) -> tuple[int, ...]:
        """Output channels of the stem's convolutions, in order.

        >>> ResNetConfig(width=32).stem_channels, ResNetConfig(stem_width=48).stem_channels
        ((32,), (48,))
        """
        if self.stem == "plain" or self.stem_width is None:
            return (self.stem_width or self.width,)
        first = 3 * (self.stem_width // 4) if self.stem == "tiered" else self.stem_width
        return (first, self.stem_width, 2 * self.stem_width)

    @property
    def first_kernel(self) -> str:
        """Path of the first kernel of the stem, which sees the image or the adapter's output.

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
        """Input channels of the head.

        >>> [ResNetConfig(depths=depths).features for depths in ((2, 2, 2, 2), (2, 2), ())]
        [512, 128, 64]
        >>> ResNetConfig(head_reads=("stem", "layer3")).features
        832
        """
        return sum(map(self.channels, (*self.head_reads, self._ends[-1])))

    @property
    def _ends(self) -> tuple[str, ...]:
        """The segments with a map that a head can read."""
        return ("stem", *(f"layer{stage}" for stage in range(1, len(self.depths) + 1)))

    def channels(self, segment: str) -> int:
        """Channels of the output of the stem or of a stage.

        >>> ResNetConfig("bottleneck", (3, 4, 6, 3)).channels("layer2")
        512
        """
        if segment == "stem":
            return self.stem_channels[-1]
        return self.width * self.expansion << int(segment.removeprefix("layer")) - 1

    @property
    def name(self) -> str:
        """The name in torchvision or timm, with widths and endings: see ``name_of``."""
        return name_of(self)

    def ending_at(self, segment: str | Sequence[str]) -> ResNetConfig:
        """The network that ends at a segment, whose output its head reads.

        Args:
            segment: its name; or several, of which the network ends at the last, and whose outputs
                its head reads all.

        Raises:
            ValueError: no segment with a map, or one that this network has not.

        >>> ResNetConfig("bottleneck", (3, 4, 6, 3)).ending_at("layer2").name
        'resnet-bottleneck-3-4'
        >>> ResNetConfig().ending_at(["layer3", "stem"]).name
        'resnet-basic-2-2-2_with-stem'
        """
        names, ends = [segment] if isinstance(segment, str) else list(segment), self._ends
        unknown = [name for name in names if name not in ends]
        if unknown or not names:
            near = suggest(str(unknown[0]), ends) if unknown else ""
            got = listing(map(repr, unknown)) or "none"
            raise ValueError(f"{self.name} can end at {', '.join(ends)}, got {got}{near}")
        *earlier, last = (name for name in ends if name in names)
        depths = self.depths[: ends.index(last)]
        return dataclasses.replace(self, depths=depths, head_reads=tuple(earlier))

    def stride(self, stage: int, block: int) -> int:
        """Stride of a block, counted from 0, in a stage, counted from 1.

        >>> [ResNetConfig().stride(stage, 0) for stage in (1, 2, 3, 4)]
        [1, 2, 2, 2]
        """
        if self.stride_at == "first":
            return 2 if stage > 1 and block == 0 else 1
        return 2 if stage < 4 and block == self.depths[stage - 1] - 1 else 1

    def has_shortcut(self, stage: int, block: int) -> bool:
        """Whether a convolution maps the input of a block to the shape of its output."""
        if block > 0:
            return False
        wider = stage > 1 or self.stem_channels[-1] != self.width * self.expansion
        # timm and Keras project at the head of every stage of pre-activation bottlenecks.
        always = self.preactivation and self.block == "bottleneck"
        return wider or always or self.stride(stage, block) != 1

    def to_json(self) -> dict[str, Any]:
        """The fields as a dictionary for ``json``: those in ``BASE_FIELDS`` and non-default ones.

        >>> "adapter" in ResNetConfig().to_json()
        False
        """
        default = {field.name: field.default for field in dataclasses.fields(self)}
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name in BASE_FIELDS or value != default[name]
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ResNetConfig:
        """The configuration from the output of ``to_json``.

        Raises:
            TypeError: an unknown field or a field of another type.
            ValueError: fields that do not describe a network.

        >>> config = ResNetConfig(adapter=Adapter(13))
        >>> ResNetConfig.from_json(config.to_json()) == config
        True
        """
        if not isinstance(fields, Mapping):
            text = shortened(repr(fields), 60)
            raise TypeError(f"a ResNetConfig must be a JSON object, got {text}")
        adapter = fields.get("adapter")
        given = {name: value for name, value in fields.items() if name != "adapter"}
        return cls(**given, adapter=None if adapter is None else Adapter(**adapter))


_COUNTS = ("width", "base_width", "groups", "classes", "in_channels", "reduce_first")
"""Fields that must be integers >= 1."""

_CHOICES: dict[str, tuple[Any, ...]] = {
    "block": ("basic", "bottleneck"),
    "stem": ("plain", "deep", "tiered"),
    "stem_pool": ("max", "zero-padded", "ceil", "convolution"),
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


_MOST, _MOST_BLOCKS = 1 << 24, 1 << 9
"""Largest count, and most blocks of a stage: a file may state any number, and shapes are computed
from it. The deepest networks that were published have 333 blocks in a stage.
"""


def _at_least(number: object, least: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= least


def _one_of(choices: Sequence[Any]) -> str:
    return " or ".join(map(repr, choices))


def squeezed(channels: int, ratio: float) -> int:
    """Hidden channels of a squeeze-and-excitation layer: rounded to a multiple of 8, >= 8.

    >>> squeezed(256, 1 / 16), squeezed(64, 1 / 16)
    (16, 8)
    """
    return max(8, int(channels * ratio + 4) // 8 * 8)


def eca_size(channels: int) -> int:
    """Kernel size of an ECA layer along the channels, an odd number.

    >>> eca_size(64), eca_size(2048)
    (3, 7)
    """
    size = int(abs(math.log2(channels) + 1) / 2)
    return max(3, size if size % 2 else size + 1)


def config_of(name: str) -> ResNetConfig:
    """The configuration with a name; its head has 1000 classes.

    Args:
        name: as ``ResNetConfig.name`` gives it; widths and endings may stand in any order.

    Raises:
        ValueError: another name; the text says what of it is unknown.

    >>> config_of("resnet50w32s64_v1") == ResNetConfig(
    ...     "bottleneck", (3, 4, 6, 3), width=32, stem_width=64, stride_in="1x1")
    True
    """
    return ResNetConfig(**fields_of(name))
