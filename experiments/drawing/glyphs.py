"""Glyphs of many scripts as signed distances: printed in several faces, and as thin pen strokes."""

from __future__ import annotations

import itertools
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from drawing.templates import TEMPLATE_SIZE, TEMPLATES_PER_CLASS, Templates

FACES = (
    "DejaVuSans",
    "DejaVuSans-Oblique",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "DejaVuSansMono",
    "DejaVuSerif-Italic",
)
"""Printed faces in order of preference: a character takes the first four that hold it."""

PEN_FACES = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif-Italic", "DejaVuSans-Oblique")
"""Faces whose thinned shapes stand for what a pen would write."""

CANVAS = 128
"""Glyphs are rasterized this large, so that thinning and distances are smooth."""

GLYPH_BOX = 96
"""The longer side of a glyph on the canvas; the rest is margin."""

DISTANCE_SCALE = 6.0
"""uint8 steps per template pixel of signed distance; 128 is the outline."""

PEN_RADIUS = 2.0
"""Half the stroke width of the thinned templates, in template pixels."""


def glyph_templates(classes: int) -> Templates:
    """Draws ``classes`` characters that differ visibly from one another.

    Characters are letters without a canonical decomposition (an accent is too small a difference
    at 8 pixels). The Unicode number categories Nd, Nl and No are left out altogether: no decimal
    digit of any script is ever drawn.

    Args:
      classes: how many characters, taken in the order of their code points.

    Returns:
      The templates, without a palette: a letter is the same letter in every color.

    Raises:
      ValueError: the faces hold fewer distinct characters than asked.
    """
    chosen: list[str] = []
    planes: list[np.ndarray] = []
    signatures: list[np.ndarray] = []
    covered = {face: set(_font_file(face).get_charmap()) for face in {*FACES, *PEN_FACES}}
    for character in _letters(covered["DejaVuSans"]):
        if len(chosen) == classes:
            break
        shape = _rasterize(character, "DejaVuSans")
        if shape is None:
            continue
        signature = _signature(shape)
        if signatures and np.max(np.stack(signatures) @ signature) > 0.93:
            continue
        signatures.append(signature)
        chosen.append(character)
        planes.append(_templates_of(character, covered))
    if len(chosen) < classes:
        raise ValueError(f"{classes} glyph classes were asked for; the faces hold {len(chosen)}")
    return Templates(np.stack(planes), tuple(f"glyph {c} U+{ord(c):04X}" for c in chosen))


def thin(shape: np.ndarray) -> np.ndarray:
    """Thins a boolean shape ``[height, width]`` to lines one pixel wide.

    References:
      Zhang and Suen, "A fast parallel algorithm for thinning digital patterns", 1984.
    """
    image = np.pad(shape, 1).astype(bool)
    changed = True
    while changed:
        changed = False
        for step in (0, 1):
            # Clockwise from north, as in the paper: p2 ... p9.
            shifts = ((1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1))
            p = [np.roll(image, shift, (0, 1)) for shift in shifts]
            neighbors = np.sum(p, axis=0)
            crossings = np.sum([~p[i] & p[(i + 1) % 8] for i in range(8)], axis=0)
            if step == 0:
                open_side = ~(p[0] & p[2] & p[4]) & ~(p[2] & p[4] & p[6])
            else:
                open_side = ~(p[0] & p[2] & p[6]) & ~(p[0] & p[4] & p[6])
            remove = image & (neighbors >= 2) & (neighbors <= 6) & (crossings == 1) & open_side
            image &= ~remove
            changed |= bool(remove.any())
    return image[1:-1, 1:-1]


def _letters(code_points: set[int]) -> list[str]:
    letters = []
    for code_point in sorted(code_points):
        character = chr(code_point)
        category = unicodedata.category(character)
        if category in ("Lu", "Ll", "Lo") and not unicodedata.decomposition(character):
            letters.append(character)
    return letters


def _font_file(face: str) -> FT2Font:
    return FT2Font(str(_font_path(face)))


def _font_path(face: str) -> Path:
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"


def _rasterize(character: str, face: str) -> np.ndarray | None:
    """The glyph's boolean shape, its longer side GLYPH_BOX pixels, centered; or None."""
    font = ImageFont.truetype(str(_font_path(face)), 160)
    left, top, right, bottom = font.getbbox(character)
    if right - left < 4 or bottom - top < 4:
        return None
    glyph = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(glyph).text((-left, -top), character, fill=255, font=font)
    scale = GLYPH_BOX / max(glyph.size)
    glyph = glyph.resize([max(1, round(side * scale)) for side in glyph.size])
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(glyph, ((CANVAS - glyph.width) // 2, (CANVAS - glyph.height) // 2))
    return np.asarray(canvas) > 127


def _signature(shape: np.ndarray) -> np.ndarray:
    """A unit vector whose inner products tell look-alikes from different characters."""
    blurred = ndimage.gaussian_filter(shape.astype(np.float32), CANVAS / 24)[::4, ::4].ravel()
    centered = blurred - blurred.mean()
    return centered / np.linalg.norm(centered)


def _templates_of(character: str, covered: dict[str, set[int]]) -> np.ndarray:
    def available(faces: tuple[str, ...]) -> list[str]:
        return [face for face in faces if ord(character) in covered[face]]

    halves = []
    half = TEMPLATES_PER_CLASS // 2
    for faces, distance in ((PEN_FACES, _pen_distance), (FACES, _print_distance)):
        shapes = (_rasterize(character, face) for face in available(faces))
        drawn = [distance(s) for s in itertools.islice((s for s in shapes if s is not None), half)]
        halves.extend(drawn[i % len(drawn)] for i in range(half))
    planes = np.zeros((TEMPLATES_PER_CLASS, TEMPLATE_SIZE, TEMPLATE_SIZE, 2), np.uint8)
    planes[..., 0] = np.stack(halves)
    return planes


def _print_distance(shape: np.ndarray) -> np.ndarray:
    inside = ndimage.distance_transform_edt(shape)
    outside = ndimage.distance_transform_edt(~shape)
    return _encode(inside - outside)


def _pen_distance(shape: np.ndarray) -> np.ndarray:
    line = thin(shape)
    pixels_per_template_pixel = CANVAS / TEMPLATE_SIZE
    return _encode(PEN_RADIUS * pixels_per_template_pixel - ndimage.distance_transform_edt(~line))


def _encode(distance: np.ndarray) -> np.ndarray:
    """Signed distance in canvas pixels -> uint8 on the template grid, 128 at the outline."""
    factor = CANVAS // TEMPLATE_SIZE
    blocks = distance.reshape(TEMPLATE_SIZE, factor, TEMPLATE_SIZE, factor).mean(axis=(1, 3))
    return np.clip(np.rint(128 + DISTANCE_SCALE * blocks / factor), 0, 255).astype(np.uint8)
