"""How images of n bands reach a stem that was trained on RGB, as a value."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flaxtransfer.paths import suggest

__all__ = ["KINDS", "Adapter"]

KINDS = ("linear", "curves")


@dataclass(frozen=True)
class Adapter:
    """From n bands to the three channels of an RGB stem.

    "linear" is a 1×1 convolution. It folds exactly into the stem (``fold``), and on a single gray
    band it can only re-weight the stem's channels: all three see the same picture.
    "curves" adds to it a tone curve for each band and channel, so that the three channels can
    show different content, such as different windows of a radiograph. A curve is a sum of hat
    functions over the range of normalised pixels, need not be monotone, goes on level outside the
    range, and passes through the origin, because the zeros with which the stem pads its border
    must stay "nothing there". Curves start flat: at first both kinds are the same function.

    Args:
      bands: channels of the image, 1 or more.
      kind: "linear" or "curves".
      knots: hat functions of a curve, evenly spaced over the span, both ends included; 2 or more.
        "linear" makes no use of it.
      span: lowest and highest pixel in normalised units. The default holds what ImageNet's
        normalisation can give, -2.12 to 2.64.

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
