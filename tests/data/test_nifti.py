"""NIfTI against nibabel: however a volume is stored, its slices are the same."""

from __future__ import annotations

import gzip
import itertools
import struct
import sys

import nibabel
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, inv_ornt_aff

from flaxtransfer.data import scans
from flaxtransfer.data.decode import count_frames, decode_bands, is_image, read_picture
from flaxtransfer.data.folder import open_folder
from flaxtransfer.data.scans import Asked, ImageError, Levels, MissingExtra
from tests.support.scans import nifti

BODY = np.random.default_rng(0).integers(-1000, 2000, (5, 7, 4)).astype(np.int16)
"""[left to right, back to front, feet to head]"""


def write(path, values=BODY, affine=None, kind=nibabel.Nifti1Image, **header):
    image = kind(values, np.diag([2.0, 3.0, 4.0, 1.0]) if affine is None else affine)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def slice_of(path, number=0, bands=1):
    return read_picture(path, Asked(path.name, bands, None, number)).values


def as_seen(body, number):
    """Rows from the front to the back, columns from the right side to the left."""
    return np.array(
        [[body[x, y, number] for x in range(len(body))[::-1]] for y in range(body.shape[1])[::-1]]
    )


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (-1, -1, 1), (1, -1, -1)])
def test_a_volume_is_the_same_in_whichever_order_it_is_stored(tmp_path, order, flips):
    stored_as = np.array(list(zip(order, flips, strict=True)), float)
    values = apply_orientation(BODY, stored_as)
    affine = np.diag([2.0, 3.0, 4.0, 1.0]) @ inv_ornt_aff(stored_as, BODY.shape)
    path = write(tmp_path / "a.nii", values, affine)
    # The peer says the same of the whole volume.
    canonical = nibabel.as_closest_canonical(nibabel.load(path))
    np.testing.assert_array_equal(np.asarray(canonical.dataobj), BODY)
    assert count_frames(path, name="a") == 4
    for number in range(4):
        found = slice_of(path, number)
        assert found.dtype == np.int16
        np.testing.assert_array_equal(found[..., 0], as_seen(BODY, number))


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_compressed_or_not_the_first_bytes_tell(tmp_path, kind, suffix):
    path = write(tmp_path / f"a{suffix}", kind=kind)
    hidden = path.rename(tmp_path / "a.picture")
    assert is_image(hidden.read_bytes()[:512])
    np.testing.assert_array_equal(slice_of(hidden, 3)[..., 0], as_seen(BODY, 3))
    assert not is_image(gzip.compress(b"label,path\n" * 100)[:512])


def test_bytes_in_memory_are_a_volume_too():
    pixels = decode_bands(nifti(), name="a", bands=1, levels=Levels((0,), (139,)))
    assert pixels.shape == (7, 5, 1)
    assert pixels[0, 0, 0] == round(255 * (4 * 28 + 6 * 4) / 139)


def test_the_other_order_of_bytes(tmp_path):
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    image = nibabel.Nifti1Image(BODY.astype(">i2"), np.eye(4), header)
    nibabel.save(image, tmp_path / "a.nii")
    assert (tmp_path / "a.nii").read_bytes()[:4] == struct.pack(">i", 348)
    found = slice_of(tmp_path / "a.nii", 1)
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found[..., 0], as_seen(BODY, 1))


def test_scale_and_display_range_are_those_of_the_header(tmp_path):
    image = nibabel.Nifti1Image(BODY, np.eye(4))
    image.header.set_slope_inter(0.5, 10)
    image.header["cal_min"], image.header["cal_max"] = -100, 300
    nibabel.save(image, tmp_path / "a.nii")
    wanted = as_seen(np.asarray(nibabel.load(tmp_path / "a.nii").dataobj), 2)
    found = slice_of(tmp_path / "a.nii", 2)
    np.testing.assert_allclose(found[..., 0], wanted)
    pixels = decode_bands(tmp_path / "a.nii", name="a", bands=1, frame=2)
    shown = np.rint(np.clip((wanted + 100) / 400, 0, 1) * 255)
    np.testing.assert_array_equal(pixels[..., 0], shown)
    own = decode_bands(tmp_path / "a.nii", name="a", bands=1, frame=2, levels=Levels((0,), (100,)))
    np.testing.assert_array_equal(own[..., 0], np.rint(np.clip(wanted / 100, 0, 1) * 255))


def test_a_fourth_axis_holds_bands(tmp_path):
    several = np.stack([BODY, -BODY], axis=3)
    path = write(tmp_path / "a.nii", several)
    found = slice_of(path, 1, bands=2)
    for band in range(2):
        np.testing.assert_array_equal(found[..., band], as_seen(several[..., band], 1))
    with pytest.raises(ImageError, match="1 bands were asked for and the file holds 2"):
        slice_of(path)
    # A fourth axis of one is none.
    np.testing.assert_array_equal(
        slice_of(write(tmp_path / "b.nii", BODY[..., None]))[..., 0], as_seen(BODY, 0)
    )


def test_slices_of_a_volume_are_examples_and_a_group(tmp_path):
    for name in ("well/a", "well/b", "ill/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{name}.nii.gz", BODY + len(name))
    source = open_folder(tmp_path, bands=1)
    assert len(source) == 12
    assert source.files[:2] == ("ill/c.nii.gz#1", "ill/c.nii.gz#2")
    groups = source.groups()
    assert len(set(groups)) == 3
    assert [len(set(groups[start : start + 4])) for start in (0, 4, 8)] == [1, 1, 1]
    found = source.picture(1).values
    np.testing.assert_array_equal(found[..., 0], as_seen(BODY + 5, 1))


def test_the_next_volume_is_another_one(tmp_path):
    """The volume that was read last is kept, and is told by file and time."""
    path = write(tmp_path / "a.nii")
    other = write(tmp_path / "b.nii", BODY + 1)
    for _ in range(2):
        np.testing.assert_array_equal(slice_of(other)[..., 0], slice_of(path)[..., 0] + 1)
    write(path, BODY + 2)
    np.testing.assert_array_equal(slice_of(path)[..., 0], as_seen(BODY + 2, 0))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda data: data[:400], "the volume cannot be read"),
        (lambda data: data[:42] + struct.pack("<h", -5) + data[44:], "must have numbers on three"),
        (lambda data: data[:70] + struct.pack("<h", 128) + data[72:], "must have numbers on three"),
        (lambda data: data[:70] + struct.pack("<h", 999) + data[72:], "cannot be read"),
        (
            lambda data: data[:40] + struct.pack("<4h", 3, 20000, 20000, 20000) + data[48:],
            "must have at most 536,870,912 bytes, got 16,000,000,000,000",
        ),
    ],
)
def test_what_is_no_usable_volume_is_named_in_one_line(tmp_path, change, text):
    path = write(tmp_path / "a.nii")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ImageError, match=text) as found:
        slice_of(path)
    assert len(str(found.value).splitlines()) == 1
    assert len(str(found.value)) <= 600


def test_no_more_is_unpacked_than_the_header_states(tmp_path):
    path = write(tmp_path / "a.nii")
    bomb = tmp_path / "a.nii.gz"
    bomb.write_bytes(gzip.compress(path.read_bytes() + bytes(2**28)))
    np.testing.assert_array_equal(slice_of(bomb)[..., 0], as_seen(BODY, 0))
    assert len(scans._unzipped(bomb.read_bytes(), 1000)) == 1000


def test_damage_gives_pixels_or_an_image_error(tmp_path):
    whole = write(tmp_path / "a.nii").read_bytes()
    random = np.random.default_rng(3)
    for number in range(300):
        data = bytearray(whole)
        for place in random.integers(0, 352, random.integers(1, 4)):
            data[place] = random.integers(256)
        path = tmp_path / f"{number}.nii"
        path.write_bytes(data)
        if is_image(data[:512]):
            try:
                slice_of(path)
            except ImageError as error:
                assert len(str(error)) <= 600  # noqa: PT017 - either outcome is right


def test_without_the_extra_one_line_names_it(tmp_path, monkeypatch):
    path = write(tmp_path / "a.nii")
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(MissingExtra, match=r"needs the extra nifti: pip install 'flaxtransfer\["):
        slice_of(path)
