"""Layouts and names: what each family of networks calls its parts, and a network of it.

A layout is the only place that knows a family's leaf names. Masks such as ``stem()``, ``stage(4)``
and ``head()``, layer-wise decay, the order of tables, the parts that recipes unfreeze and the
cached prefix all read it. A second family needs one more constant in ``LAYOUTS``.

``name_of`` composes the name of a ResNet from the fields of its configuration, and ``fields_of``
reads it: torchvision's and timm's names, with widths and endings for what they lack.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "DEPTHS",
    "LAYOUTS",
    "RESNET",
    "STEM_LETTERS",
    "By",
    "Layout",
    "fields_of",
    "layout_of",
    "name_of",
    "segment_of",
]


By = Literal["segment", "block"]
"""The size of a network's parts: a whole segment, or a residual block."""


@dataclass(frozen=True)
class Layout:
    r"""The names of the parts of one family of networks.

    Paths are those of ``flaxtransfer.paths``, of parameters or of BatchNorm statistics. Patterns
    are regular expressions that match from the start of a path to the end of a component.

    Args:
        family: What the family is called in messages.
        segments: The names of the segments, from the input to the output. A segment is the unit at
            which a network can be cut.
        prefixes: ``(pattern, segment)``: which paths belong to which segment. The segment may refer
            to groups of its pattern, as ``r"layer\1"``.
        stage: The segment of stage number n, as a format: ``"layer{}"``.
        block: The pattern of a residual block's path.
        head: The path of the module of the last layer, which holds ``kernel`` and ``bias``.
        first_kernels: The paths that the kernel of the first convolution can have.
        batch_norms: Patterns of the leaves of BatchNorms that their names do not give away.

    >>> [RESNET.segment(path) for path in ("layer3/0/conv2/kernel", "fc/bias", "decoder/bias")]
    ['layer3', 'head', '']
    """

    family: str
    segments: tuple[str, ...]
    prefixes: tuple[tuple[str, str], ...]
    stage: str
    block: str
    head: str
    first_kernels: tuple[str, ...] = ()
    batch_norms: tuple[str, ...] = ()

    def segment(self, path: str) -> str:
        """The segment that a leaf belongs to; an empty string for a foreign path."""
        return _segment(self, path)

    def stage_number(self, segment: str) -> int | None:
        """The number of a stage, counted from 1; None for a segment that is not a stage.

        >>> RESNET.stage_number("layer3"), RESNET.stage_number("head")
        (3, None)
        """
        before, _, after = self.stage.partition("{}")
        number = segment.removeprefix(before).removesuffix(after)
        whole = segment == self.stage.format(number) and number.isdecimal()
        return int(number) if whole else None

    def position(self, segment: str) -> tuple[int, int]:
        """The key that sorts segments from the input to the output.

        Stages beyond those of ``segments`` come after the others.

        Raises:
            ValueError: The family has no such segment.
        """
        number = self.stage_number(segment)
        if number is not None:
            return self.segments.index(self.stage.format(1)), number
        return self.segments.index(segment), 0

    def present(self, paths: Iterable[str]) -> list[str]:
        """The segments that these paths belong to, from the input to the output.

        >>> RESNET.present(["fc/bias", "layer2/0/conv1/kernel", "conv1/kernel", "decoder/kernel"])
        ['stem', 'layer2', 'head']
        """
        return sorted({self.segment(path) for path in paths} - {""}, key=self.position)

    def part(self, path: str, by: By = "segment") -> str:
        """The part that a leaf belongs to: its segment, or its block where it is in one.

        >>> RESNET.part("layer4/10/bn1/bias", "block"), RESNET.part("bn1/bias", "block")
        ('layer4/10', 'stem')
        """
        segment = self.segment(path)
        block = _compiled(self.block).match(path) if segment and by == "block" else None
        return block.group() if block else segment

    def parts(self, paths: Iterable[str], by: By = "segment") -> list[str]:
        """The parts that these paths belong to, from the input to the output.

        >>> RESNET.parts(["fc/bias", "layer2/1/conv1/kernel", "layer2/0/conv1/kernel"], "block")
        ['layer2/0', 'layer2/1', 'head']
        """
        positions = {}
        for path in paths:
            if segment := self.segment(path):
                part = self.part(path, by)
                inside = _natural(part) if part != segment else []
                positions[part] = (self.position(segment), inside)
        return sorted(positions, key=lambda part: positions[part])

    def first_kernel(self, paths: Iterable[str]) -> str | None:
        """The path of the first convolution's kernel; None where these paths have none."""
        there = set(paths)
        return next((path for path in self.first_kernels if path in there), None)

    def is_batch_norm(self, path: str) -> bool:
        """Whether the family's own names say that a leaf is a BatchNorm's."""
        return any(_compiled(pattern).fullmatch(path) for pattern in self.batch_norms)


RESNET = Layout(
    family="ResNet",
    segments=("adapter", "stem", "layer1", "layer2", "layer3", "layer4", "pool", "head"),
    prefixes=(
        ("adapter", "adapter"),
        ("conv1|bn1|gn1|maxpool", "stem"),
        ("layer([1-9][0-9]*)", r"layer\1"),
        ("fc", "head"),
    ),
    stage="layer{}",
    block="layer[1-9][0-9]*/[0-9]+",
    head="fc",
    first_kernels=("conv1/kernel", "conv1/0/kernel"),
    # The normalization among the numbered parts of a shortcut; the convolution has a kernel only.
    batch_norms=("(?:.*/)?downsample/[0-9]+/(?:scale|bias|mean|var)",),
)
"""ResNets under torchvision's names."""

LAYOUTS = (RESNET,)
"""The families that masks and recipes recognize by the names of a tree's leaves."""


def layout_of(paths: Iterable[str], layouts: Sequence[Layout] = LAYOUTS) -> Layout | None:
    """The layout that knows most of these paths; None where no layout knows any.

    Args:
        paths: Paths of leaves.
        layouts: The families to choose from; of equals, the first.

    >>> layout_of(["fc/kernel", "decoder/kernel"]).family, layout_of(["decoder/kernel"])
    ('ResNet', None)
    """
    paths = list(paths)
    known = [sum(map(bool, map(layout.segment, paths))) for layout in layouts]
    most = max(known, default=0)
    return layouts[known.index(most)] if most else None


def segment_of(path: str) -> str:
    """The segment that a leaf of a known family belongs to.

    Raises:
        ValueError: No known family has this path.

    >>> segment_of("layer3/0/conv2/kernel")
    'layer3'
    """
    layout = layout_of([path])
    if layout is not None:
        return layout.segment(path)
    first = path.split("/")[0]
    known = [name for each in LAYOUTS for name in (*each.segments, each.head)]
    near = difflib.get_close_matches(first, known, n=1)
    raise ValueError(
        f"{path!r} belongs to no segment of a known family "
        f"({', '.join(layout.family for layout in LAYOUTS)})"
        + (f"; did you mean {near[0]!r}?" if near else "")
    )


@functools.lru_cache(maxsize=1 << 14)
def _segment(layout: Layout, path: str) -> str:
    for pattern, segment in layout.prefixes:
        if found := _compiled(pattern).match(path):
            return found.expand(segment)
    return ""


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:{pattern})(?=/|\Z)", re.DOTALL)


def _natural(text: str) -> list[tuple[int, str]]:
    """The key that sorts names by the numbers in them."""
    return [
        (int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", text)
    ]


DEPTHS: dict[int, tuple[Literal["basic", "bottleneck"], tuple[int, ...]]] = {
    10: ("basic", (1, 1, 1, 1)),
    14: ("bottleneck", (1, 1, 1, 1)),
    18: ("basic", (2, 2, 2, 2)),
    26: ("bottleneck", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
    200: ("bottleneck", (3, 24, 36, 3)),
    201: ("bottleneck", (3, 24, 36, 4)),
    269: ("bottleneck", (3, 30, 48, 8)),
    270: ("bottleneck", (4, 29, 53, 4)),
    350: ("bottleneck", (4, 36, 72, 4)),
    420: ("bottleneck", (4, 44, 87, 4)),
}
"""Block and depths by the number in a network's name."""

STEM_LETTERS: dict[str, dict[str, Any]] = {
    "": {"stem": "plain", "stem_width": None, "shortcut": "convolution"},
    "c": {"stem": "deep", "stem_width": 32, "shortcut": "convolution"},
    "d": {"stem": "deep", "stem_width": 32, "shortcut": "average"},
    "e": {"stem": "deep", "stem_width": 64, "shortcut": "average"},
    "s": {"stem": "deep", "stem_width": 64, "shortcut": "convolution"},
    "t": {"stem": "tiered", "stem_width": 32, "shortcut": "average"},
}
"""Stem and shortcut by the letter after the number in a network's name."""

_ALIASES = {
    "seresnext152s_64x4d_first2_down3": "senet154",
    "seresnextaa201e_32x8d": "seresnextaa201d_32x8d",
    "ecaresnet-bottleneck-1-1-11-3-plain-average": "ecaresnetlight",
}
"""Established names by the composed ones."""

_VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "aa": {"anti_alias": "average"},
    "blur": {"anti_alias": "blur"},
    "v2_": {"preactivation": True},
    "rs": {"stem_pool": "convolution", "attention": "se", "se_ratio": 1 / 4},
}
"""Fields by what follows "resnet" in a name; the stem of "rs" is that of "d" without a letter."""

_BIT = {"norm": "group", "standardized": 1e-10, "stem_pool": "zero-padded"}

_ENDINGS: dict[str, dict[str, Any]] = {
    "bit": _BIT,
    "gn": {"norm": "group"},
    "ws": {"standardized": 1e-10},
    "v1": {"stride_in": "1x1"},
    "last": {"stride_at": "last"},
    "bias": {"stem_bias": True},
    "zeropool": {"stem_pool": "zero-padded"},
    "ceilpool": {"stem_pool": "ceil"},
    "convpool": {"stem_pool": "convolution"},
}
"""Fields by the words at the end of a name, each after "_"."""


def name_of(config: Any) -> str:
    """The name of a network in torchvision or timm, with other widths and endings where they lack.

    "w32" is another width of the stages, "s64" another one of a plain stem; then follow ``_gn``
    (GroupNorm), ``_ws`` (weight standardization), ``_bit`` (both, and a zero-padded pool), ``_v1``
    (stride in the first convolution), ``_last`` (stride in the last block), ``_bias`` (of the
    stem), ``_zeropool``, ``_ceilpool`` and ``_convpool`` (the stem's pool), and ``_ratio0.5``
    (hidden channels of squeeze-and-excitation), and ``_with-stem-layer2`` (segments that the head
    reads beside the last). A name does not carry classes, image channels,
    adapter, and the numbers ``epsilon`` and ``standardized``. ``config_of`` reads names.

    >>> from flaxtransfer.models.config import ResNetConfig
    >>> name_of(ResNetConfig("bottleneck", (3, 4, 6, 3), groups=32, base_width=4))
    'resnext50_32x4d'
    >>> big = {"preactivation": True, "norm": "group", "standardized": 1e-10}
    >>> name_of(ResNetConfig("bottleneck", (3, 4, 6, 3), 192, stem_pool="zero-padded", **big))
    'resnetv2_50x3_bit'
    """
    variant = {"average": "aa", "blur": "blur", None: ""}[config.anti_alias]
    if config.preactivation:
        variant = "v2_"
    elif (config.attention, config.stem_pool) == ("se", "convolution"):
        variant = "rs"
    size = (config.norm, config.stem_pool, config.groups, config.base_width, config.width % 64)
    big = config.preactivation and size == ("group", "zero-padded", 1, 64, 0)
    big = big and config.standardized is not None
    number = _number(config) + (f"x{config.width // 64}" if big else "")
    name = _core(config, variant, number, _letter(config, variant))
    if name in _ALIASES.values():  # taken by another network
        name = _core(config, variant, number, _long_letter(config))
    name = _ALIASES.get(name, name)
    if config.width != 64 and not big:
        name += f"w{config.width}"
    if config.stem == "plain" and config.stem_width is not None:
        name += f"s{config.stem_width}"
    implied = {**_VARIANTS[variant], **(_BIT if big else {})}
    told = ["bit"] if big else []
    for word, fields in _ENDINGS.items():
        ((field, value), *more) = fields.items()
        given = getattr(config, field)
        same = given is not None if field == "standardized" else given == value
        if same and not more and field not in implied:
            told.append(word)
    if config.attention == "se" and config.se_ratio != implied.get("se_ratio", 1 / 16):
        told.append(f"ratio{config.se_ratio!r}")
    if config.head_reads:
        told.append("-".join(("with", *config.head_reads)))
    return "_".join((name, *told))


def _core(config: Any, variant: str, number: str, letter: str) -> str:
    """A name without widths and endings."""
    kind = "resnet" if config.groups == 1 else "resnext"
    core = f"{kind}{variant}{number}{letter}"
    if config.groups != 1:
        core += f"_{config.groups}x{config.base_width}d"
    elif config.base_width != 64 and config.base_width % 64 == 0:
        core = f"wide_{core}_{config.base_width // 64}"
    elif config.base_width != 64:
        core += f"b{config.base_width}"
    core = ("" if variant == "rs" else config.attention or "") + core
    if (config.reduce_first, config.shortcut_kernel) != (1, 1):
        core += f"_first{config.reduce_first}_down{config.shortcut_kernel}"
    return core


def _number(config: Any) -> str:
    shape = (config.block, config.depths)
    found = (str(depth) for depth, known in DEPTHS.items() if known == shape)
    return next(found, "-".join(map(str, ("", config.block, *config.depths))))


def _letter(config: Any, variant: str) -> str:
    """Stem and shortcut, by a letter where there is one."""
    width = None if config.stem == "plain" else config.stem_width
    stem = {"stem": config.stem, "stem_width": width, "shortcut": config.shortcut}
    found = (letter for letter, known in STEM_LETTERS.items() if known == stem)
    letter = next(found, _long_letter(config))
    if variant != "rs":
        return letter
    return {"": _long_letter(config), "d": ""}.get(letter, letter)


def _long_letter(config: Any) -> str:
    width = "" if config.stem == "plain" else config.stem_width
    return f"-{config.stem}{width}-{config.shortcut}"


_LONGEST = 200
"""Characters of a name."""

_COUNT = r"[1-9]\d{0,8}"
_NAME = re.compile(
    r"(?P<attention>se|eca|)(?P<kind>wide_resnet|resnext|resnet)(?P<variant>aa|blur|rs|v2_|)"
    rf"(?P<depth>{_COUNT}|-(?:basic|bottleneck)(?:-{_COUNT}){{0,4}})(?:x(?P<times>{_COUNT}))?"
    rf"(?P<letter>[cdet]|s(?!\d)|-(?:plain|(?:deep|tiered){_COUNT})-(?:convolution|average)|)"
    rf"(?:_(?P<groups>{_COUNT})x(?P<per>{_COUNT})d|_(?P<wide>{_COUNT})|b(?P<base>{_COUNT})|)"
    r"(?P<rest>.*)"
)
_REST = re.compile(
    rf"w(?P<width>{_COUNT})|s(?P<stem>{_COUNT})|_first(?P<first>{_COUNT})|_down(?P<down>[13])|"
    rf"_ratio(?P<ratio>\d+(?:\.\d+)?(?:e-\d+)?)|_with(?P<with>(?:-stem|-layer[1-3])+)|"
    rf"_(?P<word>{'|'.join(_ENDINGS)})(?=_|[ws]\d|$)"
)


def fields_of(name: str) -> dict[str, Any]:
    """The fields of ``ResNetConfig`` that a name states: the inverse of ``name_of``.

    Endings may stand in any order.

    Raises:
        ValueError: another name; the text says what of it is unknown.

    >>> fields = fields_of("resnet50w32s64_v1")
    >>> [fields[name] for name in ("depths", "width", "stem_width", "stride_in")]
    [(3, 4, 6, 3), 32, 64, '1x1']
    """
    if len(name) > _LONGEST:
        raise ValueError(f"a name has at most {_LONGEST} characters")
    composed = name
    for long, short in _ALIASES.items():
        composed = re.sub(rf"^{short}(?=_|[ws]\d|$)", long, composed)
    found = _NAME.fullmatch(composed)
    if found is None:
        raise ValueError("no network has such a name")
    block, depths = _depths(found["depth"])
    variant, letter = found["variant"], found["letter"]
    fields: dict[str, Any] = {"block": block, "depths": depths, **_VARIANTS[variant]}
    fields |= _stem(letter if letter or variant != "rs" else "d")
    if found["attention"]:
        fields["attention"] = found["attention"]
    grouped, wide = found["groups"] is not None, found["wide"] is not None
    if grouped != (found["kind"] == "resnext") or wide != (found["kind"] == "wide_resnet"):
        raise ValueError("a resnext has groups, as in _32x4d, and a wide_resnet a factor, as in _2")
    if grouped:
        fields |= {"groups": int(found["groups"]), "base_width": int(found["per"])}
    elif wide or found["base"]:
        fields["base_width"] = int(found["base"] or 64 * int(found["wide"]))
    if found["times"]:
        fields["width"] = 64 * int(found["times"])
    return fields | _told(found["rest"])


def _depths(text: str) -> tuple[str, tuple[int, ...]]:
    if not text.startswith("-"):
        if int(text) not in DEPTHS:
            raise ValueError(f"the depth must be one of {', '.join(map(str, DEPTHS))}, got {text}")
        return DEPTHS[int(text)]
    _, block, *depths = text.split("-")
    return block, tuple(map(int, depths))


def _stem(text: str) -> dict[str, Any]:
    if not text.startswith("-"):
        return STEM_LETTERS[text]
    _, stem, shortcut = text.split("-")
    kind = stem.rstrip("0123456789")
    width = int(stem.removeprefix(kind)) if kind != stem else None
    return {"stem": kind, "stem_width": width, "shortcut": shortcut}


def _told(text: str) -> dict[str, Any]:
    """The fields of the widths and endings of a name."""
    names = {"width": "width", "stem": "stem_width", "first": "reduce_first"}
    names |= {"down": "shortcut_kernel"}
    fields: dict[str, Any] = {}
    while text:
        found = _REST.match(text)
        if found is None:
            endings = ", ".join(f"_{word}" for word in _ENDINGS)
            raise ValueError(f"{text!r} must be one of w32, s64, {endings}")
        kind = found.lastgroup or ""
        if kind == "word":
            new = _ENDINGS[found["word"]]
        elif kind == "ratio":
            new = {"se_ratio": float(found["ratio"])}
        elif kind == "with":
            new = {"head_reads": tuple(found["with"][1:].split("-"))}
        else:
            new = {names[kind]: int(found[kind])}
        if again := [field for field in new if field in fields]:
            raise ValueError(f"{text!r} sets {again[0]} a second time")
        fields |= new
        text = text[found.end() :]
    return fields
