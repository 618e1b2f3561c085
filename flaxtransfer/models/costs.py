"""What a network costs: its parameters, and its multiply-adds for one image.

Counted from shapes alone, so that a table of all architectures takes no time.
"""

import math
import re
from dataclasses import dataclass

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.weights.infer import leaf_shapes

__all__ = ["Costs", "costs"]


_IN_STAGE = re.compile(r"layer(\d)/(\d+)/(.+)/kernel")


@dataclass(frozen=True)
class Costs:
    """What ``costs`` returns.

    Args:
      parameters: numbers that can be trained.
      multiply_adds: multiplications with a weight, each with its addition, in the convolutions and
        dense layers. Tables write them as GMACs or, loosely, GFLOPs; a training step takes about
        three times as many where everything moves.
    """

    parameters: int
    multiply_adds: int


def costs(config: ResNetConfig, size: int = 224) -> Costs:
    """Parameters, and multiply-adds for one image.

    Normalization, activations, pooling and the gating of channels are not counted, as in the tables
    of torchvision and timm.

    Args:
      config: of the network.
      size: height and width of the image in px.

    Raises:
      ValueError: a size that is not positive, or one that leaves an odd number of pixels where a
        network averages 2x2 of them.

    >>> costs(ResNetConfig())
    Costs(parameters=11689512, multiply_adds=1814073344)
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"size is a positive number of px, not {size!r}")
    sides = _sides(config, size)
    parameters = multiply_adds = 0
    for leaf, shape in leaf_shapes(config).items():
        collection, _, path = leaf.partition("/")
        if collection == "params":
            parameters += math.prod(shape)
            if path.endswith("/kernel"):
                multiply_adds += math.prod(shape) * _uses(config, path, shape, sides)
    return Costs(parameters, multiply_adds)


@dataclass(frozen=True)
class _Sides:
    """Sides of square maps in px: the image, after the stem's stride, into and out of blocks."""

    image: int
    stem: int
    into: dict[tuple[int, int], int]
    out: dict[tuple[int, int], int]


def _sides(config: ResNetConfig, size: int) -> _Sides:
    stem = math.ceil(size / 2)
    averaged = config.anti_alias == "average"
    # Padded by half the kernel, a stride of 2 rounds up; averages of 2x2 leave an odd row out.
    side = stem // 2 if averaged else math.ceil(stem / 2)
    into, out = {}, {}
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
    """How often each number of a kernel is multiplied: once at every place of its output."""
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
        # ECA's filter of 3 to 9 taps runs along the channels, of which there are the block's.
        channels = config.width * 2 ** (stage - 1) * config.expansion
        return channels if len(shape) == 3 else 1
    before = layer in _before_the_stride(config)
    return (sides.into if before else sides.out)[stage, block] ** 2


def _before_the_stride(config: ResNetConfig) -> tuple[str, ...]:
    """The convolutions of a block whose output still has the resolution of its input."""
    if config.block == "basic":
        return ("conv1",) if config.anti_alias else ()
    if config.stride_in == "1x1":
        return ()
    return ("conv1", "conv2") if config.anti_alias else ("conv1",)
