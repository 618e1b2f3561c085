"""What is drawn for pre-training, and what never is."""

from __future__ import annotations

import unicodedata

import jax
import numpy as np
import pytest

from drawing.fractals import COLORINGS, fractal_templates
from drawing.glyphs import glyph_templates, thin
from drawing.render import draw_batch, make_bank
from drawing.templates import TEMPLATE_SIZE, TEMPLATES_PER_CLASS

GLYPHS, FRACTALS, SIZE = 40, 3, 24


@pytest.fixture(scope="module")
def families():
    return [glyph_templates(GLYPHS), fractal_templates(FRACTALS, seed=0)]


def test_no_number_of_any_script_is_drawn():
    """Unicode's categories Nd, Nl and No: digits, letter numbers, fractions, superscripts."""
    import flaxtransfer as ft

    names = ft.load("builtin").class_names
    characters = [chr(int(name.split("U+")[1], 16)) for name in names if name.startswith("glyph")]
    assert len(characters) == 480
    assert not [c for c in characters if unicodedata.category(c).startswith("N")]


def test_templates_fill_their_form(families):
    for family, classes in zip(families, (GLYPHS, FRACTALS), strict=True):
        assert family.planes.shape == (
            classes,
            TEMPLATES_PER_CLASS,
            TEMPLATE_SIZE,
            TEMPLATE_SIZE,
            2,
        )
        assert family.planes.dtype == np.uint8
        assert len(set(family.names)) == classes


def test_fractals_of_one_shape_differ_in_color_alone(families):
    fractals = families[1]
    for first in range(0, FRACTALS, COLORINGS):
        for other in range(first + 1, first + COLORINGS):
            np.testing.assert_array_equal(fractals.planes[first], fractals.planes[other])
            assert np.abs(fractals.palette[first] - fractals.palette[other]).max() > 0.3


def test_thinning_leaves_the_middle_of_a_bar():
    bar = np.zeros((21, 41), bool)
    bar[8:13, 5:36] = True
    line = thin(bar)
    assert set(np.flatnonzero(line.any(axis=1))) == {10}
    assert line.sum() >= 20


def test_a_batch_is_a_pure_function_of_its_key(families):
    bank = make_bank(families, SIZE)
    images, labels = draw_batch(jax.random.key(3), bank, 16)
    again, same = draw_batch(jax.random.key(3), bank, 16)
    other, _ = draw_batch(jax.random.key(4), bank, 16)
    assert images.shape == (16, SIZE, SIZE, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, same)
    assert (np.asarray(images) != np.asarray(other)).any()
    assert int(labels.max()) < GLYPHS + FRACTALS


def test_asking_for_more_than_there_is_says_how_many_there_are():
    with pytest.raises(ValueError, match="4 fractal classes do not divide by 3"):
        fractal_templates(4, seed=0)
