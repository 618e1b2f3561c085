"""Resizing and affine maps against Pillow, SciPy and exact cases."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import map_coordinates

from flaxtransfer.data.geometry import affine, center_offset, resize_box, resize_crop, resized_shape
from flaxtransfer.weights.preprocessing import INTERPOLATIONS

RNG = np.random.default_rng(0)
SMALL = RNG.integers(0, 256, (8, 8, 1), dtype=np.uint8)
WIDE = RNG.integers(0, 256, (30, 50, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "shortest", "wanted"),
    [
        # torchvision: the longer side is int(shortest * long / short).
        (8, 8, 48, (48, 48)),
        (375, 500, 256, (256, 341)),
        (500, 375, 256, (341, 256)),
        (3, 2, 1, (1, 1)),
    ],
)
def test_the_shorter_side_is_given_and_the_longer_one_cut(height, width, shortest, wanted):
    assert resized_shape(height, width, shortest) == wanted


# transformers' int((side - size) / 2) and torchvision's int(round((side - size) / 2.0)).
@pytest.mark.parametrize("side", range(20, 32))
def test_crops_begin_where_the_peers_begin(side):
    assert center_offset(side, 17) == int(round((side - 17) / 2.0))  # noqa: RUF046
    assert center_offset(side, 17, "huggingface") == int((side - 17) / 2)


def test_a_squash_resizes_both_sides():
    plain = np.asarray(Image.fromarray(WIDE).resize((24, 24), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resize_crop(WIDE, 20, 24, "bicubic", "squash"), plain[2:22, 2:22])


# Pillow is one of the two libraries with which transformers resizes.
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_hugging_faces_pixels_are_pillows_to_one_level(interpolation):
    method = Image.Resampling[interpolation.upper()]
    whole = Image.fromarray(WIDE).resize((24, WIDE.shape[0]), method).resize((24, 24), method)
    found = resize_crop(WIDE, 20, 24, interpolation, "squash", "huggingface")
    difference = found.astype(int) - np.asarray(whole)[2:22, 2:22]
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest", "box"])
def test_resize_crop_is_pillows_resize_and_a_central_crop(interpolation):
    method = Image.Resampling[interpolation.upper()]
    whole = np.asarray(Image.fromarray(WIDE).resize((40, 24), method))
    # Margins: round((40 - 20) / 2) = 10 and round((24 - 20) / 2) = 2.
    np.testing.assert_array_equal(resize_crop(WIDE, 20, 24, interpolation), whole[2:22, 10:30])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest", "box"])
def test_an_image_of_the_size_is_what_pillow_makes_of_it(interpolation):
    """It is not resampled, and Pillow's resampling to the same size changes no pixel."""
    same = np.asarray(
        Image.fromarray(WIDE).resize(WIDE.shape[1::-1], interpolation_of(interpolation))
    )
    np.testing.assert_array_equal(same, WIDE)
    side = min(WIDE.shape[:2])
    found = resize_crop(WIDE, side - 4, side, interpolation)
    top, left = (round((length - side + 4) / 2) for length in WIDE.shape[:2])
    np.testing.assert_array_equal(found, WIDE[top : top + side - 4, left : left + side - 4])


def interpolation_of(name):
    return Image.Resampling[name.upper()]


def test_half_margins_round_to_even_as_in_torchvision():
    image = np.arange(5 * 8, dtype=np.uint8).reshape(5, 8, 1)
    found = resize_crop(image, 5, 5, "nearest")  # the margin is 1.5, which becomes 2
    np.testing.assert_array_equal(found[0, :, 0], [2, 3, 4, 5, 6])


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_any_number_of_channels_is_resampled_alike(channels):
    image = RNG.integers(0, 256, (9, 11, channels), dtype=np.uint8)
    alone = [resize_crop(image[..., c : c + 1], 6, 7, "bilinear") for c in range(channels)]
    np.testing.assert_array_equal(
        resize_crop(image, 6, 7, "bilinear"), np.concatenate(alone, axis=2)
    )
    mapped = affine(image, size=6, resize=7, degrees=20)
    alone = [affine(image[..., c : c + 1], size=6, resize=7, degrees=20) for c in range(channels)]
    np.testing.assert_array_equal(mapped, np.concatenate(alone, axis=2))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("image", [SMALL, WIDE], ids=["enlarged", "shrunk"])
def test_the_affine_map_that_does_nothing_is_the_evaluations_resize(image, interpolation):
    size = 24 if image is WIDE else 48
    plain = resize_crop(image, size, size, interpolation)
    mapped = affine(image, size=size, resize=size, interpolation=interpolation)
    np.testing.assert_allclose(mapped.astype(int), plain.astype(int), atol=1)


@pytest.mark.parametrize("quarter", range(4))
def test_quarter_turns_are_exact_and_counter_clockwise(quarter):
    found = affine(SMALL, size=8, resize=8, degrees=90 * quarter, interpolation="nearest")
    np.testing.assert_array_equal(found, np.rot90(SMALL, quarter))


def test_shifts_go_right_and_down_and_uncover_the_fill():
    found = affine(SMALL, size=8, resize=8, shift=(2, 1), fill=7)
    np.testing.assert_array_equal(found[1:, 2:], SMALL[:-1, :-2])
    assert (found[0] == 7).all()
    assert (found[:, :2] == 7).all()


def test_magnifying_by_two_shows_the_middle():
    found = affine(SMALL, size=8, resize=8, scale=2, interpolation="nearest")
    np.testing.assert_array_equal(found, np.kron(SMALL[2:6, 2:6, 0], np.ones((2, 2)))[..., None])


def test_shear_moves_the_lower_half_to_the_right():
    image = np.zeros((8, 8, 1), np.uint8)
    image[:, 4] = 255
    found = affine(image, size=8, resize=8, shear=45, interpolation="nearest")[..., 0]
    columns = found.argmax(axis=1)
    assert columns[6] > columns[4] > columns[2]


@given(
    st.floats(-180, 180),
    st.tuples(st.floats(-6, 6), st.floats(-6, 6)),
    st.floats(0.7, 1.6),
    st.floats(-30, 30),
)
def test_affine_is_the_inverse_matrix_applied_by_scipy(degrees, shift, scale, shear):
    # The forward matrix is multiplied together here and inverted numerically, and SciPy samples.
    size, resize = 24, 24
    image = RNG.integers(0, 256, (12, 16, 1), dtype=np.uint8)  # resized to 24 x 32, offset (0, 4)
    found = affine(
        image, size=size, resize=resize, degrees=degrees, shift=shift, scale=scale, shear=shear
    )[..., 0]
    angle = np.deg2rad(degrees)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    slant = np.array([[1, np.tan(np.deg2rad(shear))], [0, 1]])
    back = np.linalg.inv(scale * rotation @ slant)
    y, x = np.mgrid[:size, :size] + 0.5
    offset = np.stack([x - 12 - shift[0], y - 12 - shift[1]])
    px, py = np.tensordot(back, offset, 1)
    px, py = (px + 16) / 2, (py + 12) / 2  # the resized image's center, then its own pixels
    wanted = map_coordinates(
        image[..., 0].astype(float), [py - 0.5, px - 0.5], order=1, mode="nearest"
    )
    inside = (px > 0.01) & (px < 15.99) & (py > 0.01) & (py < 11.99)
    outside = (px < -0.01) | (px > 16.01) | (py < -0.01) | (py > 12.01)
    # Pillow rounds positions to 1/65536 and values to integers.
    np.testing.assert_allclose(found[inside], wanted[inside], atol=1.5)
    assert (found[outside] == 0).all()


def test_a_box_is_resized_alone():
    flat = np.zeros((20, 20, 1), np.uint8)
    flat[5:15, 5:15] = 200
    assert (resize_box(flat, (5, 5, 15, 15), 4, "bilinear") == 200).all()
    part = Image.fromarray(WIDE[3:28, 10:45]).resize((9, 9), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resize_box(WIDE, (10, 3, 45, 28), 9, "bicubic"), part)


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (
            SMALL.astype(np.float32),
            r"uint8 \[height, width, channels\], got float32 \[8, 8",
        ),
        (SMALL[..., 0], r"got uint8 \[8, 8\]"),
        (SMALL[:0], r"got uint8 \[0, 8, 1\]"),
        ([1], r"got list \[\]"),
    ],
)
def test_what_is_no_image_is_refused(image, text):
    for function in (
        lambda: resize_crop(image, 4, 4, "bilinear"),
        lambda: affine(image, size=4, resize=4),
        lambda: resize_box(image, (0, 0, 1, 1), 4, "bilinear"),
    ):
        with pytest.raises(TypeError, match=text):
            function()


def test_an_unknown_interpolation_names_the_known_ones():
    with pytest.raises(
        ValueError, match=r"'bilinaer'; did you mean 'bilinear'.*known: nearest, bilinear"
    ):
        resize_crop(SMALL, 4, 4, "bilinaer")
