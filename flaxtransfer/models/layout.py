"""Layouts: what each family of networks calls its parts.

A layout is the only place that knows a family's leaf names. Masks such as ``stem()``, ``stage(4)``
and ``head()``, layer-wise decay, the order of tables, the parts that recipes unfreeze and the
cached prefix all read it. A second family needs one more constant in ``LAYOUTS``.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["LAYOUTS", "RESNET", "By", "Layout", "layout_of", "segment_of"]


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
