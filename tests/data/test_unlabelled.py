"""Images without regard to classes: where they lie, what they are called, what is refused."""

import numpy as np
import pytest
from PIL import Image

from flaxtransfer.data.open import open_unlabeled


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (value,) * 3).save(path)


@pytest.fixture
def scans(tmp_path):
    for number, name in enumerate(["a10.png", "a9.png", "ward/deep/x.png"]):
        put(tmp_path / name, number)
    return tmp_path


def test_images_at_any_depth_in_natural_order(scans):
    found = open_unlabeled(f"folder:{scans}")
    assert found.names == ("a9.png", "a10.png", "ward/deep/x.png")
    assert [found.source[i]["image"][0, 0, 0] for i in range(3)] == [1, 0, 2]
    assert found.positions(["ward/deep/x.png", "a9.png"]).tolist() == [2, 0]
    assert open_unlabeled(f"folder:{scans}", bands=1).source[0]["image"].shape == (3, 4, 1)


def test_names_that_no_image_has(scans):
    with pytest.raises(
        ValueError, match=r"no image is called b.png; given twice: a9.png; there are a9"
    ):
        open_unlabeled(f"folder:{scans}").positions(["a9.png", "b.png", "a9.png"])


def test_files_that_are_no_image(scans):
    (scans / "notes.txt").write_text("about the scans")
    with pytest.raises(ValueError, match=r"notes\.txt: not an image"):
        open_unlabeled(f"folder:{scans}")
    found = open_unlabeled(f"folder:{scans}", skip_corrupt=True)
    assert len(found.source) == 3
    assert found.skipped[0].startswith("notes.txt")


@pytest.mark.parametrize("key", ["image", "images"])
def test_arrays(tmp_path, key):
    images = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)
    np.savez(tmp_path / "target.npz", **{key: images})
    found = open_unlabeled(f"npz:{tmp_path / 'target.npz'}")
    assert found.names == ("0", "1")
    np.testing.assert_array_equal(found.source[1]["image"][..., 0], images[1])


@pytest.mark.parametrize(
    ("spec", "error", "text"),
    [
        ("folder:{}/none", FileNotFoundError, "there is no folder"),
        ("folder:{}", ValueError, "no image in this folder"),
        ("npz:{}/none.npz", FileNotFoundError, "there is no file"),
        ("scans", ValueError, "unknown data source"),
    ],
)
def test_what_is_not_there(spec, error, text, tmp_path):
    with pytest.raises(error, match=text):
        open_unlabeled(spec.format(tmp_path))


def test_a_file_of_other_arrays_and_no_file_of_arrays(tmp_path):
    np.savez(tmp_path / "other.npz", pixels=np.zeros(3))
    with pytest.raises(ValueError, match="has no array 'image'; it has pixels"):
        open_unlabeled(f"npz:{tmp_path / 'other.npz'}")
    (tmp_path / "other.npz").rename(tmp_path / "other.zip")
    with pytest.raises(ValueError, match=r"must end in \.npz, got .*other\.zip"):
        open_unlabeled(f"npz:{tmp_path / 'other.zip'}")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(ValueError, match="not a readable"):
        open_unlabeled(f"npz:{tmp_path / 'broken.npz'}")
    np.savez(tmp_path / "objects.npz", image=np.array([{}], object))
    with pytest.raises(ValueError, match="must be numeric, got object"):
        open_unlabeled(f"npz:{tmp_path / 'objects.npz'}")
