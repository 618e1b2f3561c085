"""What has to be done to an image before a set of weights may see it."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["IMAGENET", "Preprocessing"]

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Resize the shorter side, cut the centre square, scale to 0..1, subtract mean, divide by std.

    It belongs to the weights: the same network with another mean is another network. It says how
    an image is prepared for prediction, and nothing about augmentation.

    Args:
        mean: subtracted from each channel, for pixels scaled to 0..1.
        std: divides each channel afterwards; positive.
        size: side of the square that the network sees, in pixels.
        resize: shorter side of the image before the centre square is cut, in pixels.
        interpolation: filter of the resize: nearest, bilinear, bicubic, lanczos, box or hamming.

    Raises:
        ValueError: values that describe no preprocessing; all of them are listed.

    >>> Preprocessing((0.5,), (0.25,), size=224, resize=256).to_json()["mean"]
    [0.5]
    >>> Preprocessing.from_json(IMAGENET.to_json()) == IMAGENET
    True
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    resize: int
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        for field in ("mean", "std"):
            object.__setattr__(self, field, tuple(float(value) for value in getattr(self, field)))
        for field in ("size", "resize"):
            value = getattr(self, field)
            if isinstance(value, float) and value.is_integer():
                object.__setattr__(self, field, int(value))
        problems = self._problems()
        if problems:
            raise ValueError("this is no preprocessing:\n  " + "\n  ".join(problems))

    def _problems(self) -> list[str]:
        problems = []
        if not self.mean or len(self.mean) != len(self.std):
            problems.append(
                f"mean and std need one value a channel, not {len(self.mean)} and {len(self.std)}"
            )
        if not all(map(math.isfinite, self.mean)):
            problems.append(f"mean must be finite, not {self.mean}")
        if not all(math.isfinite(value) and value > 0 for value in self.std):
            problems.append(f"std must be positive, not {self.std}")
        if not isinstance(self.size, int) or self.size < 1:
            problems.append(f"size must be a positive number of pixels, not {self.size!r}")
        elif not isinstance(self.resize, int) or self.resize < self.size:
            problems.append(
                f"resize must be at least the size, {self.size} pixels, not {self.resize!r}"
            )
        if self.interpolation not in INTERPOLATIONS:
            problems.append(
                f"interpolation must be one of {', '.join(INTERPOLATIONS)}, "
                f"not {self.interpolation!r}"
            )
        return problems

    def to_json(self) -> dict[str, Any]:
        """The fields as a dictionary that `json` can write."""
        return {**dataclasses.asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any] | str) -> "Preprocessing":
        """The value that `to_json` wrote, from its dictionary or the text of it.

        Raises:
            ValueError: a field is missing or unknown, or holds what it cannot hold.

        >>> Preprocessing.from_json('{"mean": [0], "std": [1], "size": 8}')
        Traceback (most recent call last):
        ValueError: a preprocessing has mean, std, size, resize, interpolation; missing: resize
        """
        if isinstance(fields, str):
            fields = json.loads(fields)
        if not isinstance(fields, Mapping):
            raise ValueError(f"a preprocessing is a JSON object, not {fields!r}")
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names[:-1] if name not in fields]
        unknown = [name for name in fields if name not in names]
        if missing or unknown:
            raise ValueError(
                f"a preprocessing has {', '.join(names)}"
                + (f"; missing: {', '.join(missing)}" if missing else "")
                + (f"; unknown: {', '.join(map(str, unknown))}" if unknown else "")
            )
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"this is no preprocessing: {error}") from error


IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), size=224, resize=256)
"""What torchvision's first ImageNet weights were evaluated with."""
