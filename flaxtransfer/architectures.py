"""What a ResNet looks like, as a value: depths, widths, block; no arrays and no framework."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from flaxtransfer.bands import Adapter

__all__ = ["RESNETS", "VARIANTS", "ResNetConfig"]

_DEPTHS: dict[tuple[str, tuple[int, ...]], int] = {
    ("basic", (2, 2, 2, 2)): 18,
    ("basic", (3, 4, 6, 3)): 34,
    ("bottleneck", (3, 4, 6, 3)): 50,
    ("bottleneck", (3, 4, 23, 3)): 101,
    ("bottleneck", (3, 8, 36, 3)): 152,
}


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """The shape of a ResNet of the v1.5 family (stride in the 3x3 convolution).

    Use it to build a network, and to say what a checkpoint holds. It describes the plain,
    wide and ResNeXt forms; it does not describe deep stems, attention or pre-activation.

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
    """

    block: Literal["basic", "bottleneck"] = "basic"
    depths: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    base_width: int = 64
    groups: int = 1
    classes: int = 1000
    in_channels: int = 3
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        if self.block not in ("basic", "bottleneck"):
            raise ValueError(f"block must be 'basic' or 'bottleneck', not {self.block!r}")
        object.__setattr__(self, "depths", tuple(self.depths))
        if len(self.depths) != 4 or any(not _positive(depth) for depth in self.depths):
            raise ValueError(f"depths must be 4 positive integers, not {self.depths!r}")
        for field in ("width", "base_width", "groups", "classes", "in_channels"):
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

        if self.adapter is not None and not isinstance(self.adapter, Adapter):
            raise TypeError(f"adapter must be an Adapter or None, not {self.adapter!r}")
        if self.adapter is not None and self.in_channels != 3:
            raise ValueError(
                f"an adapter makes 3 channels, and the stem takes {self.in_channels}; an adapter "
                "stands before an RGB stem"
            )

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
        """The fields as a dictionary that `json` can write; without an adapter there is no word
        of one, so that files of plain networks are what they were before there were adapters.

        >>> "adapter" in ResNetConfig().to_json()
        False
        """
        fields = dataclasses.asdict(self)
        if self.adapter is None:
            del fields["adapter"]
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "ResNetConfig":
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

    @property
    def name(self) -> str:
        """The name that users know ("resnet50"); "w32" is added for another width."""
        depth = _DEPTHS.get((self.block, self.depths))
        number = str(depth) if depth else f"-{self.block}-" + "-".join(map(str, self.depths))
        if self.groups != 1:
            name = f"resnext{number}_{self.groups}x{self.base_width}d"
        elif self.base_width == 64:
            name = f"resnet{number}"
        elif self.base_width % 64 == 0:
            name = f"wide_resnet{number}_{self.base_width // 64}"
        else:
            name = f"resnet{number}b{self.base_width}"
        return name if self.width == 64 else f"{name}w{self.width}"


def _positive(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


RESNETS: dict[str, ResNetConfig] = {
    "resnet18": ResNetConfig("basic", (2, 2, 2, 2)),
    "resnet34": ResNetConfig("basic", (3, 4, 6, 3)),
    "resnet50": ResNetConfig("bottleneck", (3, 4, 6, 3)),
    "resnet101": ResNetConfig("bottleneck", (3, 4, 23, 3)),
    "resnet152": ResNetConfig("bottleneck", (3, 8, 36, 3)),
}

VARIANTS: dict[str, ResNetConfig] = {
    "wide_resnet50_2": ResNetConfig("bottleneck", (3, 4, 6, 3), base_width=128),
    "wide_resnet101_2": ResNetConfig("bottleneck", (3, 4, 23, 3), base_width=128),
    "resnext50_32x4d": ResNetConfig("bottleneck", (3, 4, 6, 3), base_width=4, groups=32),
    "resnext101_32x8d": ResNetConfig("bottleneck", (3, 4, 23, 3), base_width=8, groups=32),
    "resnext101_64x4d": ResNetConfig("bottleneck", (3, 4, 23, 3), base_width=4, groups=64),
}
