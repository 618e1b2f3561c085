"""DICOM against pydicom, GeoTIFF against tifffile, and what either cannot read, in one line."""

import io
import re
import subprocess
import sys
import tracemalloc
import warnings

import numpy as np
import pytest
import tifffile
from PIL import Image
from pydicom import dcmread
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array

from flaxtransfer.data import scans
from flaxtransfer.data.decode import count_frames, decode, decode_bands, is_image, read_picture
from flaxtransfer.data.scans import Asked, ImageError, Levels, MissingExtra, dicom_group, to_pixels
from tests.support.scans import band_items, bundled, geotiff, write_dicom

RNG = np.random.default_rng(0)
TWELVE = RNG.integers(0, 4096, (9, 7), dtype=np.uint16)


def shown(path, **options):
    return decode_bands(path, name=path.name, bands=1, **options)[..., 0]


@pytest.mark.parametrize(
    "name",
    [
        "693_J2KI.dcm",
        "J2K_pixelrep_mismatch.dcm",
        "MR_small.dcm",
        "MR_small_RLE.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_implicit.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "examples_overlay.dcm",
        "dicomdirtests/77654033/CR1/6154",
        "dicomdirtests/77654033/CR2/6247",
        "dicomdirtests/98892003/MR1/15820",
        "dicomdirtests/98892001/CT2N/6293",
    ],
)
def test_gray_with_a_window_is_what_pydicom_makes_of_it(name):
    path = bundled(name)
    header = dcmread(path)
    values = apply_modality_lut(pixel_array(path), header)
    # Its result spans the whole output range, which is that of the stored bits, rescaled.
    low, high = (0, 2**header.BitsStored - 1)
    if header.PixelRepresentation:
        low, high = -(2 ** (header.BitsStored - 1)), 2 ** (header.BitsStored - 1) - 1
    if "RescaleSlope" in header and "RescaleIntercept" in header:
        slope, shift = float(header.RescaleSlope), float(header.RescaleIntercept)
        low, high = low * slope + shift, high * slope + shift
    wanted = (apply_voi_lut(values, header) - low) / (high - low)
    if header.PhotometricInterpretation == "MONOCHROME1":
        wanted = 1 - wanted
    found = shown(path)
    assert len(np.unique(found)) > 20
    # float64 and one rounding on either side: ties may fall to either.
    np.testing.assert_allclose(found, 255 * wanted, atol=0.5001)


@pytest.mark.parametrize("name", ["examples_rgb_color.dcm", "SC_rgb_jpeg_dcmtk.dcm"])
def test_color_is_what_pydicom_makes_of_it(name):
    path = bundled(name)
    np.testing.assert_array_equal(decode(path, name="x"), pixel_array(path))


def test_a_palette_is_looked_up():
    path = bundled("examples_palette.dcm")
    wanted = apply_color_lut(pixel_array(path), dcmread(path))
    wanted = wanted if wanted.dtype == np.uint8 else wanted >> 8
    np.testing.assert_array_equal(decode(path, name="x"), wanted)


def test_the_window_is_the_linear_function_of_the_standard(tmp_path):
    # PS3.3 C.11.2.1.2.1: y = ((x - (c - 0.5)) / (w - 1) + 0.5) * (ymax - ymin) + ymin, in floats.
    values = np.arange(-300, 300, dtype=np.int16).reshape(20, 30)
    path = write_dicom(tmp_path / "x", values, WindowCenter="40", WindowWidth="400")
    wanted = np.clip(((values - 39.5) / 399 + 0.5) * 255, 0, 255)
    np.testing.assert_allclose(shown(path), wanted, atol=0.5001)
    plain = write_dicom(tmp_path / "y", values)
    levels = Levels.of_window(40, 400, 1)
    np.testing.assert_array_equal(shown(plain, levels=levels), shown(path))


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        # PS3.3 C.11.2.1.3.2 and C.11.2.1.3.1.
        ("LINEAR_EXACT", lambda x: np.clip((x - 2000) / 1000 + 0.5, 0, 1)),
        ("SIGMOID", lambda x: 1 / (1 + np.exp(-4 * (x - 2000) / 1000))),
    ],
)
def test_the_other_functions_of_the_standard(tmp_path, kind, formula):
    tags = {"WindowCenter": "2000", "WindowWidth": "1000", "VOILUTFunction": kind}
    path = write_dicom(tmp_path / "x", TWELVE, bits=12, **tags)
    np.testing.assert_allclose(shown(path), 255 * formula(TWELVE.astype(float)), atol=0.5001)


def test_a_width_of_one_is_a_threshold(tmp_path):
    path = write_dicom(tmp_path / "x", TWELVE, bits=12, WindowCenter="2000", WindowWidth="1")
    np.testing.assert_array_equal(shown(path), np.where(TWELVE > 1999.5, 255, 0))


def test_a_table_is_preferred_to_a_window(tmp_path):
    from pydicom.dataset import Dataset

    table = Dataset()
    table.LUTDescriptor = [256, 1000, 16]
    table.LUTData = (np.arange(256) ** 2).astype("<u2").tobytes()
    tags = {"VOILUTSequence": [table], "WindowCenter": "1", "WindowWidth": "2"}
    path = write_dicom(tmp_path / "x", TWELVE, bits=12, **tags)
    wanted = np.clip(TWELVE.astype(int) - 1000, 0, 255) ** 2 * 255 / 65535
    np.testing.assert_allclose(shown(path), wanted, atol=0.5001)


@pytest.mark.parametrize(("depth", "entry"), [(16, "<u2"), (8, "u1")])
def test_a_table_of_values_between_whole_numbers(tmp_path, depth, entry):
    from pydicom.dataset import Dataset

    table = Dataset()
    entries = np.arange(256) ** 2 >> (16 - depth)
    table.LUTDescriptor = [256, -100, depth]
    table.LUTData = entries.astype(entry).tobytes()
    tags = {"VOILUTSequence": [table], "RescaleSlope": "0.25", "RescaleIntercept": "-0.5"}
    values = np.arange(-500, 700, dtype=np.int16).reshape(30, 40)
    path = write_dicom(tmp_path / "x", values, **tags)
    # As pydicom, whose reader of tables takes no bytes: the entry at or below the value.
    places = np.clip(np.floor(values * 0.25 - 0.5 + 100), 0, 255).astype(int)
    np.testing.assert_allclose(shown(path), entries[places] * 255 / (2**depth - 1), atol=0.5001)
    if depth == 16:
        peer = apply_voi_lut(apply_modality_lut(values, dcmread(path)), dcmread(path))
        np.testing.assert_array_equal(peer, entries[places])


def test_a_table_that_is_shorter_than_it_says_is_named(tmp_path):
    from pydicom.dataset import Dataset

    table = Dataset()
    table.LUTDescriptor, table.LUTData = [256, 0, 16], bytes(20)
    path = write_dicom(tmp_path / "x", TWELVE, bits=12, VOILUTSequence=[table])
    with pytest.raises(ImageError, match="VOI table states 256 entries and has 10"):
        shown(path)


@pytest.mark.parametrize("window", [("nan", "100"), ("100", "inf"), ("100", "0"), ("100", "-5")])
def test_a_window_without_meaning_is_none(tmp_path, window):
    tags = dict(zip(("WindowCenter", "WindowWidth"), window, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, of numbers that DICOM cannot hold
        path = write_dicom(tmp_path / "x", TWELVE, bits=12, **tags)
    assert not read_picture(path, Asked("x", bands=1)).window


def deflated(path):
    """The bytes of a DICOM file with its data set deflated, as pydicom writes it."""
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    data, file = dcmread(path), io.BytesIO()
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    data.save_as(file)
    return file.getvalue()


def test_a_deflated_file_is_the_same_picture(tmp_path):
    stack = np.stack([TWELVE, TWELVE[::-1], TWELVE // 2])
    path = write_dicom(tmp_path / "x", stack, bits=12, patient="P1")
    packed = tmp_path / "y"
    packed.write_bytes(deflated(path))
    assert count_frames(packed, name="y") == 3
    assert dicom_group(packed, "y") == dicom_group(path, "x")
    for frame in range(3):
        values = read_picture(packed, Asked("y", bands=1, frame=frame)).values[..., 0]
        np.testing.assert_array_equal(values, stack[frame])


def test_a_deflated_file_is_inflated_to_a_size_that_fits(tmp_path, monkeypatch):
    data = deflated(write_dicom(tmp_path / "x", TWELVE, bits=12))
    for broken in (data[:-20], data[:500] + b"\xff" * 60):
        with pytest.raises(ImageError, match=r"x: (a deflated|the) DICOM file"):
            decode(broken, name="x")
    monkeypatch.setattr(scans, "MOST_BYTES", 100)
    with pytest.raises(ImageError, match="inflate to at most 100 bytes, got 100 and no end"):
        decode(data, name="x")


@pytest.mark.parametrize("levels", [None, Levels((0,), (4000,))])
def test_monochrome1_is_monochrome2_inverted(tmp_path, levels):
    window = {"WindowCenter": "2000", "WindowWidth": "3001"}
    two = write_dicom(tmp_path / "2", TWELVE, bits=12, **window)
    one = write_dicom(
        tmp_path / "1", TWELVE, bits=12, PhotometricInterpretation="MONOCHROME1", **window
    )
    np.testing.assert_array_equal(shown(one, levels=levels), 255 - shown(two, levels=levels))
    eight = (TWELVE >> 4).astype(np.uint8)
    two, one = (
        write_dicom(tmp_path / kind, eight, PhotometricInterpretation=kind)
        for kind in ("MONOCHROME2", "MONOCHROME1")
    )
    np.testing.assert_array_equal(shown(two), eight)
    np.testing.assert_array_equal(shown(one), 255 - eight)


def test_eight_bits_stay_as_they_are_in_dicom_too(tmp_path):
    eight = (TWELVE >> 4).astype(np.uint8)
    same = {"RescaleSlope": "1", "RescaleIntercept": "0"}
    for number, (values, tags) in enumerate([(eight, same), (eight.astype(np.uint16), {})]):
        path = write_dicom(tmp_path / str(number), values, bits=8, **tags)
        np.testing.assert_array_equal(shown(path), eight)
        np.testing.assert_array_equal(shown(path, levels=Levels((9,), (99,))), eight)
        assert read_picture(path, Asked("x", measured=True)) is None
    path = write_dicom(tmp_path / "2", eight, RescaleSlope="2", RescaleIntercept="0")
    assert read_picture(path, Asked("x", measured=True)).values.max() == 2 * int(eight.max())


def test_levels_are_in_units_of_the_modality_and_padding_is_black(tmp_path):
    values = np.array([[-2000, 0, 200, 400, 1000]], np.int16)
    tags = {"RescaleSlope": "2", "RescaleIntercept": "-1000", "PixelPaddingValue": -2000}
    path = write_dicom(tmp_path / "x", values, PhotometricInterpretation="MONOCHROME1", **tags)
    # 2 x - 1000: -1000, -600, -200, 1000; white is the lowest.
    assert shown(path, levels=Levels((-1000,), (1000,))).tolist() == [[0, 255, 204, 153, 0]]


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_in_eight_bits_too(tmp_path, kind):
    values = np.array([[255, 0, 100, 101]], np.uint8)
    tags = {"PhotometricInterpretation": kind, "PixelPaddingValue": 100}
    path = write_dicom(tmp_path / "x", values, PixelPaddingRangeLimit=101, **tags)
    assert shown(path).tolist() == [[0, 255, 0, 0] if kind == "MONOCHROME1" else [255, 0, 0, 0]]


def test_padding_of_floats_is_no_measurement(tmp_path):
    values = np.array([[1.5, -999, 4]], np.float32)
    path = write_dicom(tmp_path / "x", values)
    data = dcmread(path)
    data.FloatPixelData, data.FloatPixelPaddingValue = data.PixelData, -999.0
    del data.PixelData, data.BitsStored, data.HighBit, data.PixelRepresentation
    data.save_as(path)
    np.testing.assert_array_equal(
        read_picture(path, Asked("x", bands=1)).values[..., 0], [[1.5, np.nan, 4]]
    )


def test_the_frames_of_a_file_are_examples(tmp_path):
    path = bundled("rtdose.dcm")
    assert count_frames(path, name="x") == 15
    stack = pixel_array(path)
    levels = Levels((0,), (float(stack.max()),))
    for frame in (0, 14):
        wanted = 255 * (stack[frame] / stack.max())
        np.testing.assert_allclose(shown(path, levels=levels, frame=frame), wanted, atol=0.5001)
    lying = write_dicom(tmp_path / "x", TWELVE, NumberOfFrames=10**9)
    with pytest.raises(
        ImageError, match="x: NumberOfFrames must be 1 or more and fit into the file"
    ):
        count_frames(lying, name="x")


def test_frames_of_enhanced_files_have_transforms_of_their_own(tmp_path):
    from pydicom.dataset import Dataset

    def item(**tags):
        found = Dataset()
        for name, value in tags.items():
            setattr(found, name, value)
        return found

    per_frame = [
        item(
            PixelValueTransformationSequence=[item(RescaleSlope=k, RescaleIntercept=0)],
            FrameVOILUTSequence=[item(WindowCenter="2000.5", WindowWidth="4001")],
        )
        for k in (1, 2)
    ]
    stack = np.stack([TWELVE // 2, TWELVE // 2])
    path = write_dicom(tmp_path / "x", stack, PerFrameFunctionalGroupsSequence=per_frame)
    wanted = np.clip(255 * (TWELVE / 2 // 1) / 4000, 0, 255)
    np.testing.assert_allclose(shown(path), wanted, atol=0.5001)
    np.testing.assert_allclose(shown(path, frame=1), np.clip(2 * wanted, 0, 255), atol=0.5001)


def test_a_group_is_the_patient_then_the_study_and_a_digest(tmp_path):
    files = {
        name: write_dicom(tmp_path / name, TWELVE, patient=patient, study=study)
        for name, patient, study in [
            ("a", "P1", "1.2.3"),
            ("b", "P1", "1.2.4"),
            ("c", "", "1.2.3"),
            ("d", "", ""),
        ]
    }
    found = {name: dicom_group(path, name) for name, path in files.items()}
    assert found["a"] == found["b"] != found["c"]
    assert found["d"] == ""
    assert all(re.fullmatch("[0-9a-f]{16}", found[name]) for name in "abc")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("test-SR.dcm", r"x: a DICOM file without a picture \(modality SR\)"),
        ("rtplan.dcm", r"x: a DICOM file without a picture \(modality RTPLAN\)"),
        ("MR_truncated.dcm", r"x: the picture cannot be read"),
        ("JPEG-lossy.dcm", r"x: JPEG Extended .*pylibjpeg-libjpeg, which is under the GPL"),
        ("CT_small.dcm", r"x: float32 pixels \(-896 .. 1167\) have no fixed black.* --window"),
    ],
)
def test_what_is_no_usable_dicom_is_named_in_one_line(name, text):
    with pytest.raises(ImageError, match=text) as said:
        decode(bundled(name), name="x")
    assert "\n" not in str(said.value)
    assert len(str(said.value)) <= 600


def test_a_dicom_that_states_too_many_pixels_is_refused_by_its_header(tmp_path):
    path = write_dicom(tmp_path / "x", TWELVE, Rows=60_000, Columns=60_000)
    with pytest.raises(ImageError, match="at most 50,000,000 px, got 60,000 x 60,000"):
        decode(path, name="x")


def test_names_and_birth_dates_are_never_read():
    assert not {"PatientName", "PatientBirthDate", "PatientID"} & set(scans._PICTURE_TAGS.split())


def test_damage_to_dicom_gives_pixels_or_an_image_error(tmp_path):
    data = write_dicom(tmp_path / "x", TWELVE, WindowCenter="9", WindowWidth="9").read_bytes()
    assert is_image(data[:132])
    for seed in range(150):
        random, broken = np.random.default_rng(seed), bytearray(data)
        for place in random.integers(132, len(data), 4):
            broken[place] = random.integers(256)
        broken = bytes(broken[: random.integers(140, len(data))])
        try:
            assert decode(broken, name="x").dtype == np.uint8
        except ImageError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either outcome is right


def test_pydicom_does_not_write_about_damage(capfd):
    with pytest.raises(ImageError, match=r"NumberOfFrames must be 1 or more.*got none"):
        count_frames(bundled("badVR.dcm"), name="x")  # It warns of "1A".
    data = bytearray(bundled("MR_small_RLE.dcm").read_bytes())
    with pytest.raises(ImageError):
        decode(bytes(data[:-3000]), name="x")
    assert capfd.readouterr() == ("", "")


def test_a_folder_called_dl_does_not_stop_the_import(tmp_path):
    (tmp_path / "dl").mkdir()
    code = "from flaxtransfer.data.scans import _pydicom; _pydicom('x')"
    path = f"{tmp_path}:{':'.join(sys.path)}"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": path}, capture_output=True
    )
    assert found.returncode == 0, found.stderr.decode()


@pytest.mark.parametrize(
    ("library", "extra", "data"),
    [
        ("pydicom", "dicom", bytes(128) + b"DICM"),
        ("tifffile", "geo", geotiff(np.zeros((4, 4, 13), np.uint16), planarconfig="contig")),
        ("imagecodecs", "geo", geotiff(np.zeros((16, 16), np.uint16), compression="lzw")),
    ],
)
def test_without_the_extra_one_line_names_it(monkeypatch, library, extra, data):
    monkeypatch.setitem(sys.modules, library, None)
    if library == "imagecodecs":
        # What tifffile says then.
        def refuse(page):
            raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

        monkeypatch.setattr(tifffile.TiffPage, "asarray", refuse)
    with pytest.raises(ImageError, match=rf"x: .*needs the extra {extra}") as said:
        decode_bands(data, name="x", bands=13 if library == "tifffile" else 3)
    assert isinstance(said.value, MissingExtra) or library == "tifffile"
    assert "\n" not in str(said.value)


BANDS = RNG.integers(0, 3000, (12, 10, 13), dtype=np.uint16)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zlib", "predictor": True},
        {"compression": "lzw"},
        {"compression": "zstd", "tile": (16, 16)},
        {"bigtiff": True},
        {"byteorder": ">"},
    ],
)
def test_bands_in_either_order_are_the_array_of_tifffile(options):
    pixel = geotiff(BANDS, planarconfig="contig", **options)
    band = geotiff(np.moveaxis(BANDS, 2, 0), planarconfig="separate", **options)
    pages = geotiff(np.moveaxis(BANDS, 2, 0), **options)
    asked, levels = Asked("x", 13), Levels((0,) * 13, (3000,) * 13)
    for data in (pixel, band, pages):
        picture = read_picture(data, asked)
        np.testing.assert_array_equal(picture.values, BANDS)
        wanted = np.rint(BANDS * (255 / 3000)).astype(np.uint8)
        np.testing.assert_array_equal(to_pixels(picture, levels, asked), wanted)


def test_each_band_has_its_own_black_and_white():
    levels = Levels(tuple(range(13)), tuple(range(1000, 2300, 100)))
    found = decode_bands(geotiff(BANDS, planarconfig="contig"), name="x", bands=13, levels=levels)
    black, white = np.array(levels.black), np.array(levels.white)
    wanted = np.clip(255 * ((BANDS - black) / (white - black)), 0, 255)
    np.testing.assert_allclose(found, wanted, atol=0.5001)


@pytest.mark.parametrize(
    ("dtype", "nodata"), [("int16", -9999), ("uint16", 0), ("float32", -3.4e38), ("float32", "nan")]
)
def test_missing_pixels_are_black_and_no_measurement(dtype, nodata):
    values = RNG.integers(1, 100, (6, 5, 2)).astype(dtype)
    values[0, 0, 0] = values[1, 2, 1] = float(nodata)
    picture = read_picture(geotiff(values, nodata=nodata, planarconfig="contig"), Asked("x", 2))
    missing = np.isnan(picture.values)
    assert np.argwhere(missing).tolist() == [[0, 0, 0], [1, 2, 1]]
    np.testing.assert_array_equal(picture.values[~missing], values[~missing].astype(float))
    pixels = to_pixels(picture, Levels((0, 0), (100, 100)), Asked("x", 2))
    assert pixels[0, 0, 0] == pixels[1, 2, 1] == 0


@pytest.mark.parametrize("nodata", ["inf", "-inf", "1e40"])
def test_infinity_may_be_nodata(nodata):
    with np.errstate(over="ignore"):
        values = np.array([[np.float32(float(nodata)), 3]], np.float32)
    values = read_picture(geotiff(values, nodata=nodata), Asked("x", 1)).values
    np.testing.assert_array_equal(values[..., 0], [[np.nan, 3]])


def test_missing_pixels_are_black_where_zero_is_white():
    for dtype in (np.uint8, np.uint16):
        data = geotiff(np.array([[7, 0, 200]], dtype), nodata=7, photometric="miniswhite")
        found = decode_bands(data, name="x", bands=1, levels=Levels((0,), (255,)))
        assert found.ravel().tolist() == [0, 255, 55]


def test_a_palette_with_nodata_is_looked_up():
    # Land cover, as GDAL writes it; Pillow is the peer, which does not know of nodata.
    index = np.array([[0, 1, 2, 255]], np.uint8)
    colors = RNG.integers(0, 256, (3, 256)).astype(np.uint16) * 257
    options = {"photometric": "palette", "colormap": colors}
    wanted = np.array(Image.open(io.BytesIO(geotiff(index, **options))).convert("RGB"))
    wanted[0, 1] = 0
    data = geotiff(index, nodata=1, **options)
    np.testing.assert_array_equal(decode(data, name="x"), wanted)
    assert read_picture(data, Asked("x", measured=True)) is None


def test_a_palette_of_two_colors_is_looked_up(tmp_path):
    colors = np.array([[9, 200], [8, 100], [7, 50]], np.uint16) * 257
    tags = [(42113, 2, 0, "0", True), (320, 3, 6, colors.ravel().tolist(), True)]
    index = np.array([[True, False, True]])
    tifffile.imwrite(tmp_path / "x", index, photometric="minisblack", extratags=tags, metadata=None)
    with tifffile.TiffFile(tmp_path / "x", mode="r+b") as file:
        file.pages[0].tags[262].overwrite(3)
    wanted = [[[200, 100, 50], [0, 0, 0], [200, 100, 50]]]
    assert decode(tmp_path / "x", name="x").tolist() == wanted


@pytest.mark.parametrize("kind", ["cielab", "ycbcr"])
def test_other_colors_are_named_and_not_taken_for_rgb(kind):
    data = geotiff(RNG.integers(0, 4096, (5, 4, 3), dtype=np.uint16), photometric=kind)
    with pytest.raises(ImageError, match=f"(?i)x: its colors must be RGB or gray, got {kind}"):
        decode(data, name="x")


def test_scale_offset_names_and_wavelengths_are_those_of_the_file():
    # As GDAL writes them: SCALE and OFFSET, DESCRIPTION, CENTRAL_WAVELENGTH_UM in micrometers.
    items = band_items("SCALE", [0.5, 2]) + band_items("OFFSET", [-1, 0])
    items += band_items("DESCRIPTION", ["B2", "B8A"])
    items += band_items("CENTRAL_WAVELENGTH_UM", [0.49, 0.865])
    values = np.array([[[4, 10], [0, 1]]], np.uint16)
    picture = read_picture(geotiff(values, items=items, planarconfig="contig"), Asked("x", 2))
    np.testing.assert_array_equal(picture.values, [[[1, 20], [-1, 2]]])
    assert (picture.names, picture.wavelengths) == (("B2", "B8A"), (490, 865))


def test_a_band_without_scale_has_scale_one():
    # GDAL writes no entry for a scale of 1 and an offset of 0.
    items = '<Item name="SCALE" sample="0" role="scale">0.5</Item>'
    items += '<Item name="OFFSET" sample="1" role="offset">10</Item>'
    values = np.array([[[4, 10, 7], [0, 1, 9]]], np.uint16)
    data = geotiff(values, items=items, planarconfig="contig", photometric="rgb")
    np.testing.assert_array_equal(
        read_picture(data, Asked("x")).values, values * [0.5, 1, 1] + [0, 10, 0]
    )


def test_entities_are_not_unfolded():
    evil = '<!DOCTYPE x [<!ENTITY a "aaaa">]>' + band_items("DESCRIPTION", ["&a;", "b"])
    values = np.zeros((4, 4, 2), np.uint16)
    picture = read_picture(geotiff(values, items=evil, planarconfig="contig"), Asked("x", 2))
    assert picture.names == ()


def test_bands_in_another_order_than_those_of_the_levels_are_refused():
    values = np.zeros((4, 4, 2), np.uint16)
    data = geotiff(values, items=band_items("DESCRIPTION", ["B8", "B04"]), planarconfig="contig")
    with pytest.raises(ImageError, match="x: its bands must be B4, B8, got B8, B04"):
        decode_bands(data, name="x", bands=2, levels=Levels((0, 0), (1, 1), ("B4", "B8")))
    for names in (("B8", "B4"), ("red", "nir"), ()):
        decode_bands(data, name="x", bands=2, levels=Levels((0, 0), (1, 1), names))


@pytest.mark.parametrize("bands", [1, 2, 3, 12])
def test_another_number_of_bands_is_named_with_the_option(bands):
    data = geotiff(BANDS, planarconfig="contig")
    text = rf"x: {bands} bands were asked for and the file holds 13 .*--bands 13"
    with pytest.raises(ImageError, match=text):
        decode_bands(data, name="x", bands=bands)


def test_a_tiff_that_states_400_mb_is_refused_before_it_is_decoded():
    data = geotiff(np.zeros((5000, 5000, 8), np.uint16), compression="zlib", planarconfig="contig")
    assert len(data) < 500_000
    tracemalloc.start()
    with pytest.raises(ImageError, match=r"at most 200,000,000 bytes .* got 400,000,000"):
        decode_bands(data, name="x", bands=8)
    assert tracemalloc.get_traced_memory()[1] < 5 << 20
    tracemalloc.stop()


def test_sixteen_bits_of_color_are_kept_and_of_transparency_named():
    values = RNG.integers(0, 4096, (5, 4, 3), dtype=np.uint16)
    data = geotiff(values, photometric="rgb")
    np.testing.assert_array_equal(read_picture(data, Asked("x")).values, values)
    np.testing.assert_array_equal(decode(data, name="x"), np.rint(values / 257))
    gray = values @ (0.299, 0.587, 0.114)  # ITU-R 601-2
    np.testing.assert_allclose(read_picture(data, Asked("x", 1)).values[..., 0], gray)
    four = np.concatenate([values, values[..., :1]], axis=2)
    with pytest.raises(ImageError, match=r"the last is alpha.*--bands 4"):
        decode(geotiff(four, photometric="rgb", extrasamples=["unassalpha"]), name="x")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sixteen_bits_are_turned_as_eight_are(orientation):
    # Eight bits go through Pillow, sixteen through tifffile.
    eight = RNG.integers(0, 256, (3, 5), dtype=np.uint8)
    tag = [(274, 3, 1, orientation, True)]
    found = []
    for values in (eight, eight.astype(np.uint16) * 257):
        file = io.BytesIO()
        tifffile.imwrite(file, values, photometric="minisblack", extratags=tag)
        found.append(decode(file.getvalue(), name="x", channels=1))
    np.testing.assert_array_equal(found[0], found[1])


def test_white_is_zero_where_the_file_says_so():
    values = np.array([[0, 1000, 65535]], np.uint16)
    found = decode(geotiff(values, photometric="miniswhite"), name="x", channels=1)
    assert found.ravel().tolist() == [255, 251, 0]


def test_overviews_are_no_bands():
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        plain = {"photometric": "minisblack", "planarconfig": "contig"}
        writer.write(BANDS, subifds=1, **plain)
        writer.write(BANDS[::2, ::2], subfiletype=1, **plain)
    found = read_picture(file.getvalue(), Asked("x", 13))
    np.testing.assert_array_equal(found.values, BANDS)


def test_dark_colors_of_16_bits_that_pillow_cuts_off_are_named():
    import imagecodecs

    dark, bright = np.full((4, 5, 3), 4000, np.uint16), np.full((4, 5, 3), 40_000, np.uint16)
    with pytest.raises(ImageError, match="x: its 16-bit colors are all below 4096"):
        decode(imagecodecs.png_encode(dark), name="x")
    assert np.unique(decode(imagecodecs.png_encode(bright), name="x")).tolist() == [156]


@pytest.mark.parametrize(("bands", "asked"), [(3, 3), (4, 4), (4, 3), (2, 1)])
def test_dark_measurements_beside_an_alpha_are_named_too(bands, asked):
    import imagecodecs

    dark = np.full((4, 5, bands), 4000, np.uint16)
    if bands != 3:
        dark[..., -1] = 65535
        dark[0, :, -1] = 0  # Composed over white, these pixels are bright.
    with pytest.raises(ImageError, match="x: its 16-bit colors are all below 4096"):
        decode_bands(imagecodecs.png_encode(dark), name="x", bands=asked)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_single_pixel_is_an_image(tmp_path, kind, dtype):
    Image.fromarray(np.array([[7]], dtype)).save(tmp_path / "x", kind)
    assert decode(tmp_path / "x", name="x").shape == (1, 1, 3)
