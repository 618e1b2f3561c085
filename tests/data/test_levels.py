"""Black and white of images of more than 8 bits: measured once, kept, and said."""

import numpy as np
import pytest
from PIL import Image

import flaxtransfer as ft
from flaxtransfer.data import ArraySource, Levels, measure_levels, open_source, with_levels
from flaxtransfer.data.loader import band_preprocessing, eval_batches, loaders
from flaxtransfer.data.open import open_unlabeled
from flaxtransfer.weights import IMAGENET, Preprocessing
from tests.support.scans import band_items, geotiff, write_dicom

RNG = np.random.default_rng(0)
TINY = Preprocessing((0.5,) * 3, (0.25,) * 3, 16, 16)


def folder_of(root, pictures, write):
    """A folder of two classes with pictures in turn."""
    for number, picture in enumerate(pictures):
        path = root / "ab"[number % 2] / f"{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, picture)
    return open_source(f"folder:{root}")


def png(path, picture):
    Image.fromarray(picture).save(path, "PNG")


def ramps(top, count=4, dtype=np.uint16):
    """Pictures whose values are 0 .. top, each once."""
    values = np.linspace(0, top, 64 * 64).reshape(64, 64).astype(dtype)
    return [np.roll(values, 7 * k, axis=1) for k in range(count)]


def test_twelve_bits_in_sixteen_keep_their_gray_levels(tmp_path):
    source = folder_of(tmp_path, ramps(4095), png)
    assert len(np.unique(source[0]["image"])) == 17  # 4095 / 257, as before
    levels = measure_levels(source, np.arange(4))
    # Analytic: the 4096 values 0 .. 4095 are each there once; percentile 0.1 is the 5th of them.
    assert (levels.black, levels.white) == ((4.0,), (4091.0,))
    assert levels.note == (
        "gray levels: black 4 and white 4091 (uint16; percentiles 0.1 and 99.9 of 4 training "
        "images); on a scale to 65535 16 of 256 levels would be left"
    )
    found = with_levels(source, levels)[0]["image"]
    assert len(np.unique(found)) > 200
    # Exactly the numbers of measured_to_pixels, which a program uses for arrays.
    values = np.asarray(Image.open(tmp_path / "a" / "0"))[..., None]
    own = levels.into(TINY)
    assert own.black == (4.0,) * 3
    wanted = ft.weights.measured_to_pixels(np.repeat(values, 3, axis=2), own)
    np.testing.assert_allclose(found, 255 * wanted, atol=0.5001)


def test_eight_bits_stay_bit_for_bit_and_are_not_decoded(tmp_path, monkeypatch):
    source = folder_of(tmp_path, ramps(255, dtype=np.uint8), png)
    before = source[1]["image"]
    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
        assert measure_levels(source, np.arange(4)) is None
    np.testing.assert_array_equal(with_levels(source, Levels((9,), (99,)))[1]["image"], before)
    assert with_levels(source, None) is source


def test_photographs_of_sixteen_bits_keep_the_whole_range(tmp_path):
    source = folder_of(tmp_path, ramps(60_000), png)
    levels = measure_levels(source, np.arange(4))
    assert (levels.black, levels.white) == ((0.0,), (65535.0,))
    assert "the whole range, of which most is used" in levels.note
    np.testing.assert_array_equal(with_levels(source, levels)[2]["image"], source[2]["image"])


def test_one_pair_for_colors_and_one_for_each_of_other_bands(tmp_path):
    values = [np.stack([p, p // 2, p // 4], axis=2) for p in ramps(3000)]
    source = folder_of(
        tmp_path, values, lambda path, v: path.write_bytes(geotiff(v, photometric="rgb"))
    )
    levels = measure_levels(source, np.arange(4))
    assert len(set(levels.white)) == 1
    two = tmp_path / "two"
    names = band_items("DESCRIPTION", ["B4", "B8"])
    folder_of(
        two,
        [value[..., :2] for value in values],
        lambda path, v: path.write_bytes(geotiff(v, items=names, planarconfig="contig")),
    )
    source = open_source(f"folder:{two}", bands=2)
    levels = measure_levels(source, np.arange(4))
    assert levels.names == ("B4", "B8")
    assert levels.white[1] == pytest.approx(levels.white[0] / 2, abs=2)
    assert "B4 2 .. 2997, B8 1 .. 1498" in levels.note
    source = with_levels(source, levels)
    own = band_preprocessing(IMAGENET, source, np.arange(4), 2)
    assert (own.black, own.white, own.bands) == (levels.black, levels.white, levels.names)
    assert own.mean == pytest.approx((0.5, 0.5), abs=0.01)


def test_bands_that_differ_between_files_are_refused(tmp_path):
    names = iter([["B4", "B8"], ["B8", "B4"], ["B4", "B8"], ["B4", "B8"]])

    def write(path, values):
        items = band_items("DESCRIPTION", next(names))
        path.write_bytes(geotiff(values, items=items, planarconfig="contig"))

    folder_of(tmp_path, [np.stack([p, p], axis=2) for p in ramps(3000)], write)
    source = open_source(f"folder:{tmp_path}", bands=2)
    with pytest.raises(ValueError, match="same bands in the same order, got B4, B8 and B8, B4"):
        measure_levels(source, np.arange(4))


def test_a_geotiff_with_other_bands_than_its_neighbors_is_named(tmp_path):
    shapes = iter([2, 2, 3, 4])
    folder_of(
        tmp_path,
        ramps(3000),
        lambda path, v: path.write_bytes(
            geotiff(np.stack([v] * next(shapes), axis=2), planarconfig="contig")
        ),
    )
    source = open_source(f"folder:{tmp_path}", bands=2)
    one = r"a/2: 2 bands were asked for and the file holds 3"
    with pytest.raises(ValueError, match=rf"^[^ ]*{one}"):
        measure_levels(source, np.arange(3))
    both = rf"^2 of 4 images cannot be used: .*{one}.*, .*[ab]/\d+: 2 bands .* the file holds 4"
    with pytest.raises(ValueError, match=both):
        measure_levels(source, np.arange(4))


def test_missing_pixels_are_not_measured_and_said(tmp_path):
    values = ramps(3000)
    for value in values:
        value[:16] = 65535
    source = folder_of(tmp_path, values, lambda path, v: path.write_bytes(geotiff(v, nodata=65535)))
    levels = measure_levels(source, np.arange(4))
    assert levels.white[0] < 3001
    assert levels.note.endswith("25.0% of the pixels have no measurement and are black")


def test_a_window_takes_the_place_of_the_percentiles(tmp_path):
    source = folder_of(tmp_path, ramps(4095), png)
    levels = measure_levels(source, np.arange(4), window=(1000.5, 1001))
    assert (levels.black, levels.white) == ((500.0,), (1500.0,))
    assert "as asked for" in levels.note
    assert "75.6% of the pixels are beyond them" in levels.note
    with pytest.raises(ValueError, match=r"black 8000, .*must overlap .*got 0 \.\. 4095"):
        measure_levels(source, np.arange(4), window=(9000.5, 2001))
    with pytest.raises(ValueError, match="the width of a window must be > 1, got 1"):
        measure_levels(source, np.arange(4), window=(9000, 1))
    eight = folder_of(tmp_path / "8", ramps(255, dtype=np.uint8), png)
    with pytest.raises(ValueError, match=r"more than 8 bits.* leave out --window"):
        measure_levels(eight, np.arange(4), window=(40, 400))


def test_windows_of_the_files_hold_if_all_have_one(tmp_path):
    window = {"WindowCenter": "2000", "WindowWidth": "4000"}
    source = folder_of(tmp_path, ramps(4095), lambda p, v: write_dicom(p, v, bits=12, **window))
    levels = measure_levels(source, np.arange(4))
    assert levels.note == (
        "gray levels: each file by its own window, the first where it has several"
    )
    assert levels.into(TINY) == TINY
    assert with_levels(source, levels) is source
    write_dicom(tmp_path / "b" / "1", ramps(4095)[0], bits=12)
    mixed = measure_levels(source, np.arange(4))
    assert (mixed.black, mixed.white) == ((4.0,), (4091.0,))
    assert mixed.note.endswith("windows of single files are not used")


def test_loaders_read_by_the_levels_of_the_preprocessing(tmp_path):
    source = folder_of(tmp_path, ramps(4095), png)
    levels = measure_levels(source, np.arange(4))
    splits = ft.data.Splits.of([0, 1], [2, 3])
    data = loaders(source, splits, levels.into(TINY), batch_size=2)
    for batches in (data.train(0), data.validation(), data.calibration()):
        # On the scale to 65535 nothing would be above 16.
        assert next(iter(batches))["image"].max() > 200
    batch = next(iter(eval_batches(source, np.arange(4), levels.into(TINY))))
    assert batch["image"].max() > 200


def test_frames_are_examples_of_one_group(tmp_path):
    stack = np.stack(ramps(4095, 3))
    window = {"WindowCenter": "2000", "WindowWidth": "4000"}
    write_dicom(tmp_path / "a" / "x.dcm", stack, patient="P1", **window)
    write_dicom(tmp_path / "b" / "y.dcm", stack[0], patient="P1", **window)
    write_dicom(tmp_path / "b" / "z.dcm", stack[0], **window)
    png(tmp_path / "b" / "w.png", stack[0])
    source = open_source(f"folder:{tmp_path}")
    assert source.files == (
        "a/x.dcm#1",
        "a/x.dcm#2",
        "a/x.dcm#3",
        "b/w.png",
        "b/y.dcm",
        "b/z.dcm",
    )
    assert source.labels().tolist() == [0, 0, 0, 1, 1, 1]
    groups = source.groups()
    assert groups[0] == groups[1] == groups[2] == groups[4]
    assert len(set(groups)) == 3
    assert not any("P1" in group for group in groups)
    assert len({source.content(i) for i in range(6)}) == 6
    np.testing.assert_array_equal(source[0]["image"], source[4]["image"])
    assert not (source[1]["image"] == source[0]["image"]).all()
    assert open_unlabeled(f"folder:{tmp_path}").names == source.files
    plain = ArraySource(np.zeros((2, 4, 4), np.uint8), [0, 1])
    assert getattr(plain, "groups", lambda: None)() is None


def test_skip_corrupt_looks_at_the_last_frame_too(tmp_path):
    random = np.random.default_rng(0)
    for name in ("a/1", "b/1", "b/2"):
        values = random.integers(0, 4096, (3, 8, 8)).astype(np.uint16)
        # The file has 3 frames, and of the last one says that there are 5.
        write_dicom(tmp_path / name, values, **({"NumberOfFrames": 5} if name == "b/2" else {}))
    source = open_source(f"folder:{tmp_path}", skip_corrupt=True)
    assert len(source) == 6
    assert [each.partition(":")[0] for each in source.skipped] == ["b/2"]


def test_loaders_warn_where_nothing_says_what_is_black(tmp_path):
    source = folder_of(tmp_path, ramps(4095), png)
    splits = ft.data.Splits.of([0, 1, 2], [3])
    with pytest.warns(UserWarning, match=r"16 of 256 levels would be left: give measure_levels"):
        loaders(source, splits, TINY, batch_size=2)
    loaders(source, splits, measure_levels(source, splits.train).into(TINY), batch_size=2)


def test_a_cache_and_the_levels(tmp_path):
    source = ft.data.cached(folder_of(tmp_path, ramps(4095), png))
    assert source[0]["image"].max() < 17
    levels = measure_levels(source, np.arange(4))
    assert with_levels(source, levels)[0]["image"].max() == 255
    plain = ft.data.cached(ArraySource(np.zeros((2, 4, 4), np.uint8), [0, 1]))
    assert measure_levels(plain, [0, 1]) is None
    assert with_levels(plain, levels) is plain
