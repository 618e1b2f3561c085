"""Every color mode and orientation to RGB or gray bytes; every damage to one kind of error."""

import io
import os
import re
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flaxtransfer.data import decode as decoding
from flaxtransfer.data.decode import (
    ImageError,
    count_frames,
    decode,
    decode_bands,
    is_image,
    read_picture,
)
from flaxtransfer.data.scans import Asked, Levels

RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
LEVELS = np.array([[0, 1, 255, 256], [32767, 32768, 65279, 65535]], np.uint16)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_come_back_bit_for_bit(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(COLOR), kind, **options)
    assert is_image(data[:16])
    np.testing.assert_array_equal(decode(data, name="x"), COLOR)


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("GIF", "L")])
def test_a_flat_color_survives_the_lossy_formats(kind, mode):
    image = Image.new("RGB", (16, 16), (200, 200, 200)).convert(mode)
    data = encoded(image, kind)
    assert is_image(data[:16])
    np.testing.assert_allclose(decode(data, name="x").astype(int), 200, atol=1)


def test_16_bit_gray_is_scaled_and_not_cut_off():
    # Analytic: round(x / 257); cutting to 8 bits would give x % 256 or 255 everywhere.
    wanted = np.rint(LEVELS / 257).astype(np.uint8)
    for kind in ("PNG", "TIFF"):
        found = decode(encoded(Image.fromarray(LEVELS), kind), name="x")
        assert found.shape == (2, 4, 3)
        for channel in range(3):
            np.testing.assert_array_equal(found[..., channel], wanted)
    assert decode(encoded(Image.fromarray(LEVELS)), name="x", channels=1).shape == (2, 4, 1)


def test_big_endian_16_bit_tiff_is_the_same_picture():
    header = b"MM\0*" + (8).to_bytes(4, "big")
    pixels = LEVELS.astype(">u2").tobytes()
    tags = [(256, 3, 4), (257, 3, 2), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 0)]
    tags += [(277, 3, 1), (278, 3, 2), (279, 4, len(pixels))]
    start = 8 + 2 + 12 * len(tags) + 4
    body = len(tags).to_bytes(2, "big")
    for tag, kind, value in tags:
        value = start if tag == 273 else value
        field = value.to_bytes(2, "big") + b"\0\0" if kind == 3 else value.to_bytes(4, "big")
        body += tag.to_bytes(2, "big") + kind.to_bytes(2, "big") + (1).to_bytes(4, "big") + field
    data = header + body + b"\0\0\0\0" + pixels
    np.testing.assert_array_equal(
        decode(data, name="x", channels=1)[..., 0], np.rint(LEVELS / 257).astype(np.uint8)
    )


def test_transparency_is_composed_over_white():
    # Analytic: alpha 0 shows white, whatever is hidden; alpha 51/255 = 0.2 of black over white.
    pixels = np.array([[[9, 9, 9, 0], [0, 0, 0, 51], [10, 20, 30, 255]]], np.uint8)
    found = decode(encoded(Image.fromarray(pixels)), name="x")
    np.testing.assert_array_equal(found, [[[255] * 3, [204] * 3, [10, 20, 30]]])
    gray = Image.fromarray(np.array([[[9, 0], [77, 255]]], np.uint8))
    assert decode(encoded(gray), name="x", channels=1).ravel().tolist() == [255, 77]


def test_palette_is_looked_up_and_its_transparent_color_is_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    np.testing.assert_array_equal(decode(encoded(image), name="x"), [[[255, 0, 0], [0, 0, 255]]])
    np.testing.assert_array_equal(
        decode(encoded(image, transparency=1), name="x"), [[[255, 0, 0], [255, 255, 255]]]
    )
    as_bytes = encoded(image, transparency=b"\x00\xff")
    np.testing.assert_array_equal(decode(as_bytes, name="x"), [[[255, 255, 255], [0, 0, 255]]])


def test_cmyk_jpeg_becomes_rgb():
    # Cyan ink alone leaves green and blue.
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    found = decode(encoded(image, "JPEG", quality=95), name="x")
    np.testing.assert_allclose(found[8, 8].astype(int), [0, 255, 255], atol=6)
    assert found.shape == (16, 16, 3)


def test_lab_is_converted_and_a_mode_that_cannot_be_is_named(monkeypatch):
    white = encoded(Image.new("LAB", (2, 2), (255, 128, 128)), "TIFF")
    np.testing.assert_allclose(decode(white, name="x").astype(int), 255, atol=2)

    def refuse(self, mode):
        raise ValueError(f"conversion to {mode} not supported")

    monkeypatch.setattr(Image.Image, "convert", refuse)
    with pytest.raises(ImageError, match=r"x: LAB pixels cannot be converted \(conversion to RGB"):
        decode(white, name="x")


def test_one_bit_images_are_black_and_white():
    image = Image.fromarray(np.array([[True, False]]))
    assert decode(encoded(image), name="x", channels=1).ravel().tolist() == [255, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_exif_orientation_is_applied_once(orientation, kind):
    # The eight cases of the EXIF standard, tag 0x0112, as array operations.
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, 1),
    }[orientation]
    pixels = np.repeat(np.repeat(np.array([[0, 80, 160], [200, 230, 255]], np.uint8), 8, 0), 8, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encoded(Image.fromarray(pixels), kind, exif=exif), name="x", channels=1)
    np.testing.assert_allclose(found[..., 0].astype(int), upright(pixels).astype(int), atol=8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_bands_are_turned_as_colors_are(kind):
    pixels = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(pixels), kind, exif=exif, **options)
    np.testing.assert_array_equal(decode_bands(data, name="x", bands=4), np.rot90(pixels, -1))


def test_the_transparent_value_of_16_bits_is_no_measurement():
    # Where GDAL's driver of PNG puts nodata; Pillow writes the same chunk.
    data = encoded(Image.fromarray(LEVELS), transparency=256)
    found = read_picture(data, Asked("x", bands=1)).values[..., 0]
    np.testing.assert_array_equal(found, np.where(LEVELS == 256, np.nan, LEVELS))
    levels = Levels((0,), (65535,))
    assert decode_bands(data, name="x", bands=1, levels=levels)[0, 3] == 0


def test_broken_exif_does_not_hide_the_pixels():
    data = encoded(Image.fromarray(COLOR), exif=b"Exif\0\0XX garbage that is no TIFF header")
    np.testing.assert_array_equal(decode(data, name="x"), COLOR)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("L", (4, 4), value) for value in (10, 200)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.unique(decode(data, name="x")).tolist() == [10]


def test_min_side_decodes_a_large_jpeg_smaller_and_never_below():
    ramp = np.linspace(0, 255, 640, dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp, (400, 640)).copy())
    data = encoded(image, "JPEG", quality=95)
    shapes = {side: decode(data, name="x", min_side=side).shape[:2] for side in (1, 100, 101, 400)}
    assert shapes == {1: (50, 80), 100: (100, 160), 101: (200, 320), 400: (400, 640)}
    assert decode(data, name="x", min_side=999).shape[:2] == (400, 640)
    small = decode(data, name="x", min_side=100)[50, :, 0].astype(float)
    np.testing.assert_allclose(small, np.linspace(0, 255, 160), atol=3)
    png = encoded(image)
    assert decode(png, name="x", min_side=10).shape[:2] == (400, 640)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "x.png: not an image in PNG, JPEG, BMP, GIF, DICOM, NIfTI, TIFF, WEBP"),
        (b"label,path\n", "x.png: not an image in PNG"),
        (encoded(Image.fromarray(COLOR))[:-30], "x.png: the image cannot be decoded"),
        (encoded(Image.fromarray(COLOR), "JPEG")[:-200], "x.png: the image cannot be decoded"),
        (encoded(Image.new("I", (2, 2)), "TIFF"), r"x.png: int32 pixels \(0 .. 0\) have no fixed"),
        (
            encoded(Image.new("F", (2, 2)), "TIFF"),
            r"x.png: float32 pixels \(0 .. 0\) have no fixed black",
        ),
        (encoded(Image.new("L", (2, 2)), "PPM"), "x.png: not an image in PNG"),
    ],
)
def test_what_is_no_usable_image_is_named(data, text):
    with pytest.raises(ImageError, match=text):
        decode(data, name="x.png")


def test_an_image_too_large_to_be_true_is_named(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ImageError, match=r"x: the image cannot be decoded .*decompression bomb"):
        decode(encoded(Image.fromarray(COLOR)), name="x")


def test_a_missing_file_is_not_called_a_broken_image(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        decode(tmp_path / "gone.png", name="gone.png")


SAMPLES = [
    encoded(Image.fromarray(COLOR), kind) for kind in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
]


# Pillow warns of damage that it can read past; here that is as good as reading.
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(st.sampled_from(SAMPLES), st.data())
def test_damage_gives_pixels_or_an_image_error_and_nothing_else(sample, data):
    broken = bytearray(sample)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    broken = bytes(broken[: data.draw(st.integers(1, len(broken)))])
    try:
        pixels = decode(broken, name="x")
    except ImageError as error:
        assert str(error).startswith("x: ")  # noqa: PT017 - either outcome is right
    else:
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3


def claiming(width, height):
    """A PNG whose header states a size, with the pixels of a small one."""
    data = encoded(Image.new("1", (8, 8)))
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


@pytest.mark.parametrize("size", [(13_000, 13_000), (20_000, 20_000), (50_000_001, 1)])
@pytest.mark.parametrize("bands", [1, 3, 2])
def test_an_image_that_would_fill_the_memory_is_refused_by_its_header(size, bands):
    tracemalloc.start()
    with pytest.raises(ImageError, match=r"x.png: .*(50,000,000 px|exceeds limit)") as said:
        decode_bands(claiming(*size), name="x.png", bands=bands)
    assert tracemalloc.get_traced_memory()[1] < 5 << 20
    tracemalloc.stop()
    assert "\n" not in str(said.value)


def test_a_named_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ImageError, match=r"x\.png must be a regular file, got a named pipe"):
        decode(tmp_path / "x.png", name="x.png")
    with pytest.raises(ImageError, match=r"x\.png must be a regular file, got a named pipe"):
        count_frames(tmp_path / "x.png", name="x.png")


def test_libtiff_does_not_write_about_damage(capfd):
    """It writes from C, past ``sys.stderr``."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(file, "TIFF", compression="tiff_adobe_deflate")
    data = bytearray(file.getvalue())
    data[20:60] = bytes(40)
    with pytest.raises(ImageError, match="the image cannot be decoded"):
        decode(bytes(data), name="x.tif")
    assert capfd.readouterr() == ("", "")


def test_pillow_does_not_write_about_damage(capfd):
    data = encoded(Image.new("L", (13, 7)), "TIFF")
    place = re.search(rb"\x01\x01[\3\4]\0", data).start()  # The height; its count is next.
    damaged = data[: place + 4] + b"\xff\xff\xff\x7f" + data[place + 8 :]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for _ in range(2):
            with pytest.raises(ImageError, match=r"x\.tif"):
                decode(damaged, name="x.tif")
        assert warnings.filters.count(decoding._IGNORED) == 1
    assert capfd.readouterr() == ("", "")
