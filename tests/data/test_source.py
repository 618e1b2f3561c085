"""Sources in memory, and the names by which sources are opened."""

import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from flaxtransfer.data import ArraySource, Source, near_duplicates, open_source

GRAY = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


@pytest.mark.parametrize(
    ("images", "shape"),
    [
        (GRAY, (3, 4, 1)),
        (GRAY[..., None], (3, 4, 1)),
        (np.zeros((2, 3, 4, 13), np.uint8), (3, 4, 13)),
    ],
)
def test_arrays_become_height_width_channels(images, shape):
    source = ArraySource(images, [0, 1])
    assert isinstance(source, Source)
    assert source[0]["image"].shape == shape
    assert source[0]["image"].dtype == np.uint8
    assert source[1] == {"image": pytest.approx(images[1].reshape(shape)), "label": 1}


def test_floats_are_scaled_by_255_and_rounded():
    images = np.array([[[0.0, 1.0, 0.5, 0.1]]])
    # 0.5 * 255 = 127.5 goes to the even 128; 0.1 * 255 = 25.5 to 26, the double being above.
    assert ArraySource(images, [0])[0]["image"].ravel().tolist() == [0, 255, 128, 26]


def test_labels_are_a_copy_and_images_read_only():
    source = ArraySource(GRAY, [0, 1])
    source.labels()[:] = 7
    assert source.labels().tolist() == [0, 1]
    with pytest.raises(ValueError, match="read-only"):
        source[0]["image"][:] = 0
    GRAY[0, 0, 0] = GRAY[0, 0, 0]  # the caller's own array stays writable


def test_class_names_default_to_numbers():
    assert ArraySource(GRAY, [0, 2]).class_names == ("0", "1", "2")
    assert ArraySource(GRAY, [0, 0], ("a", "b")).class_names == ("a", "b")


def test_pickle_keeps_the_source():
    again = pickle.loads(pickle.dumps(ArraySource(GRAY, [0, 1], ("a", "b"))))
    assert again.class_names == ("a", "b")
    np.testing.assert_array_equal(again[1]["image"][..., 0], GRAY[1])


@pytest.mark.parametrize("index", [-1, 2, np.int64(5)])
def test_a_position_outside_is_an_index_error(index):
    source = ArraySource(GRAY, [0, 1])
    with pytest.raises(IndexError, match=rf"example {index} does not exist; there are 2 \(0 to 1"):
        source[index]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            (GRAY.astype(np.uint16), [0, 1]),
            TypeError,
            "images must be uint8 .*, got uint16; .*images / 65535",
        ),
        (
            (GRAY.astype(np.int64), [0, 1]),
            TypeError,
            r"images must be uint8 \(0 to 255\) or .*, got int64",
        ),
        ((GRAY, [0.0, 1.0]), TypeError, "labels must be integers, .*, got float64"),
        (
            (GRAY, [0, 1], "ab"),
            TypeError,
            "class_names must be a tuple of strings, got the string 'ab'",
        ),
        ((GRAY[0], [0, 1, 0]), ValueError, r"images must have shape \[examples.*, got \(3, 4\)"),
        ((GRAY[:0], []), TypeError, "labels must be integers"),
        (
            (GRAY[:0], np.zeros(0, int)),
            ValueError,
            r"images must have shape .* without a 0, got \(0, 3, 4\)",
        ),
        ((GRAY * 1.0, [0, 1]), ValueError, r"must lie in 0 \.\. 1, got 0 \.\. 23"),
        ((GRAY * np.nan, [0, 1]), ValueError, r"must lie in 0 \.\. 1, got nan \.\. nan"),
        ((GRAY, [0]), ValueError, r"labels must have shape \(2,\), one per image, got \(1,\)"),
        ((GRAY, [[0, 1]]), ValueError, r"labels must have shape .*, got \(1, 2\)"),
        ((GRAY, [-1, 0]), ValueError, r"labels must be >= 0, got -1 \.\. 0"),
        (
            (GRAY, [0, 2], ("a", "b")),
            ValueError,
            r"labels must be in 0 \.\. 1 \(2 class names\), got 0 \.\. 2",
        ),
        ((GRAY, [0, 1], ("a", "a")), ValueError, r"class names must differ, got twice: \['a'\]"),
    ],
)
def test_wrong_arrays_say_what_is_wrong(arguments, error, text):
    with pytest.raises(error, match=text):
        ArraySource(*arguments)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ValueError, match=r"must lie in.*got \(1,\).*labels must be .*got -3"):
        ArraySource(GRAY * 1.0, [-3])


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("digit", r"unknown data source 'digit'; did you mean 'digits'\?.*known: 'digits', 'tfds:"),
        ("digits:train", "'digits' takes nothing after it"),
        ("fodler:x", r"did you mean 'folder'\?"),
        ("mnist", r"\(a TensorFlow Datasets name is written 'tfds:mnist'\)"),
        ("", "unknown data source ''"),
        ("tfds:", r"name must be 'tfds:<name>\[/config\].*, got 'tfds:'"),
        ("folder:", "'folder:' needs a path"),
    ],
)
def test_an_unknown_source_names_those_that_exist(spec, text):
    with pytest.raises(ValueError, match=text):
        open_source(spec)


def test_a_bare_folder_is_told_its_scheme(tmp_path):
    with pytest.raises(ValueError, match=f"it is a folder: write 'folder:{tmp_path}'"):
        open_source(str(tmp_path))


def test_importing_the_package_imports_no_reader():
    heavy = ["grain", "tensorflow_datasets", "PIL", "sklearn", "tensorflow"]
    code = (
        "import sys, flaxtransfer.data as d; d.open_source, d.stratified_split, d.ArraySource;"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    import flaxtransfer.data

    assert "open_source" in dir(flaxtransfer.data)
    with pytest.raises(AttributeError, match="has no attribute 'open_sauce'"):
        _ = flaxtransfer.data.open_sauce


def test_every_exported_name_exists():
    import flaxtransfer.data

    for name in flaxtransfer.data.__all__:
        assert getattr(flaxtransfer.data, name).__name__ == name


def jpeg(pixels, quality):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def half(pixels):
    size = (pixels.shape[1] // 2, pixels.shape[0] // 2)
    return np.asarray(Image.fromarray(pixels).resize(size))


class Listed:
    """A source of images of several sizes."""

    class_names = ("a", "b")

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": index % 2}

    def labels(self):
        return np.arange(len(self)) % 2


CHANGES = {
    "the same": lambda pixels: pixels,
    "jpeg": lambda pixels: jpeg(pixels, 75),
    "half the size": half,
    "darker": lambda pixels: (0.7 * pixels + 20).astype(np.uint8),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("frame", [0, 40])
def test_copies_of_an_image_are_found_across_parts(name, frame):
    photo = load_sample_image("china.jpg")[180:]  # Below the sky, which is noise.
    crops = [photo[i : i + 120, j : j + 140] for i in range(0, 121, 60) for j in range(0, 491, 70)]
    crops = [np.pad(crop, ((frame, frame), (0, 0), (0, 0))) for crop in crops]
    changed = [CHANGES[name](crop) for crop in crops]
    count = len(crops)
    source = Listed([*crops, *changed])
    parts = [np.arange(count), np.arange(count, 2 * count), np.empty(0, np.int64)]
    found = near_duplicates(source, parts)
    assert {pair for pair in found if pair[1] - pair[0] != count} == set()
    assert len(found) >= 0.9 * count


def test_different_images_and_images_without_contrast_are_no_copies(digits):
    # The two most alike of 1.6 million pairs, as drawings of a 1 can be.
    assert len(near_duplicates(digits, [np.arange(900), np.arange(900, 1797)])) <= 1
    flat = ArraySource(np.full((4, 8, 8), 7, np.uint8), [0, 1, 0, 1])
    assert near_duplicates(flat, [np.array([0, 1]), np.array([2, 3])]) == []
    assert near_duplicates(flat, [np.array([0, 1]), np.array([], np.int64)]) == []


@pytest.mark.parametrize(
    ("images", "labels", "names", "said"),
    [
        ((2, 4, 4), [0, 1], None, r"labels must have shape \(2, outputs\)"),
        ((2, 4, 4), [[0], [1], [1]], None, r"labels must have shape \(2, outputs\)"),
        ((), [[0]], None, "images must have shape"),
        ((1, 4, 4), [[0, 2]], None, "labels must be 0, 1 or NaN"),
        ((1, 4, 4), [[0, 1]], ("cat",), r"labels must be numbers \[examples, 1\]"),
        ((1, 4, 4), [[np.nan]], None, "every example must have a known label"),
    ],
)
def test_several_labels_that_do_not_fit_are_refused(images, labels, names, said):
    with pytest.raises(ValueError, match=said):
        ArraySource(np.zeros(images, np.uint8), labels, names, task="multi_label")


def test_several_labels_are_kept_as_floats():
    labels = [[0, 1, np.nan], [1, 0, 0]]
    source = ArraySource(np.zeros((2, 4, 4), np.uint8), labels, task="multi_label")
    assert source.labels().dtype == source[0]["label"].dtype == np.float32
    np.testing.assert_array_equal(source.labels(), labels)
    assert source.class_names == ("0", "1", "2")
    with pytest.raises(ValueError, match="task must be one of"):
        ArraySource(np.zeros((1, 4, 4), np.uint8), [[0]], task="multi")
