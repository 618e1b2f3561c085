"""The form that every drawn class takes before it is varied: a stack of small two-plane pictures.

Plane 0 says how far inside the shape a point lies, plane 1 which of the two colors of the class
it takes. Glyphs store a signed distance there, so that one threshold varies the stroke width;
fractals store their density.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TEMPLATE_SIZE = 64
"""Side of a template in pixels."""

TEMPLATES_PER_CLASS = 8
"""Every class has the same number, so that a drawing is one table look-up."""


@dataclass(frozen=True)
class Templates:
    """The classes of one family of drawings.

    Args:
      planes: uint8 ``[classes, TEMPLATES_PER_CLASS, TEMPLATE_SIZE, TEMPLATE_SIZE, 2]``.
      names: one name a class.
      palette: float32 ``[classes, 2, 3]`` RGB in 0..1, or None where color says nothing about
        the class.
    """

    planes: np.ndarray
    names: tuple[str, ...]
    palette: np.ndarray | None = None
