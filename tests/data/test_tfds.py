"""TensorFlow Datasets without TensorFlow: pixels, labels, splits, and one clear error each."""

import io
import json
import pickle
import shutil
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from flaxtransfer.data import ImageError, Source, measure_levels, open_source, with_levels

GRAY16 = np.array([[0, 257], [32896, 65535]], np.uint16)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return io.BytesIO(file.getvalue())


class TinyShapes(tfds.core.GeneratorBasedBuilder):
    """Two classes; the images are the kinds that a plain decoder gets wrong."""

    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=["circle", "square"]),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples("train"), "test": self._generate_examples("test")}

    def _generate_examples(self, split):
        if split == "train":
            yield 0, example(Image.new("CMYK", (16, 8), (255, 0, 0, 0)), "JPEG", 0)
            yield 1, example(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), "PNG", 1)
            yield 2, example(Image.fromarray(GRAY16), "PNG", 0)
            yield 3, {"id": "3", "image": io.BytesIO(b"\x89PNG\r\n\x1a\n junk"), "label": 1}
        else:
            yield 0, {"id": "0", "image": encoded(Image.new("L", (2, 2)), "PNG"), "label": -1}


class TinyGray(TinyShapes):
    """One channel, and labels whose names were never given."""

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "picture": tfds.features.Image(shape=(None, None, 1)),
                    "kind": tfds.features.ClassLabel(num_classes=3),
                }
            ),
        )

    def _generate_examples(self, split):
        del split
        yield 0, {"picture": Image.fromarray(GRAY16.astype(np.uint8)), "kind": 2}


class TinyTexts(TinyShapes):
    """No image."""

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
        )

    def _generate_examples(self, split):
        yield 0, {"text": split}


def example(image, kind, label):
    return {"id": "x", "image": encoded(image, kind), "label": label}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data folder with the three data sets."""
    folder = tmp_path_factory.mktemp("tfds")
    for builder in (TinyShapes, TinyGray, TinyTexts):
        builder(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def own(prepared, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(prepared, tmp_path / "data")
    return tmp_path / "data"


def test_examples_are_rgb_bytes_whatever_was_stored(prepared):
    source = open_source("tfds:tiny_shapes", cache_dir=prepared)
    assert isinstance(source, Source)
    assert len(source) == 4
    assert source.class_names == ("circle", "square")
    cyan, clear, gray = (source[i]["image"] for i in range(3))
    assert cyan.shape == (8, 16, 3)
    np.testing.assert_allclose(cyan[4, 8].astype(int), [0, 255, 255], atol=6)
    np.testing.assert_array_equal(clear, np.full((4, 4, 3), 255))
    np.testing.assert_array_equal(gray[..., 1], [[0, 1], [128, 255]])
    assert [source[i]["label"] for i in range(3)] == [0, 1, 0]


def test_labels_come_without_decoding_even_a_broken_image(prepared):
    source = open_source("tfds:tiny_shapes", cache_dir=prepared)
    assert source.labels().tolist() == [0, 1, 0, 1]
    with pytest.raises(ImageError, match="example 3 of tfds:tiny_shapes:train: "):
        source[3]
    with pytest.raises(IndexError, match="example 4 does not exist"):
        source[4]


def test_one_channel_stays_one_and_unnamed_classes_are_numbered(prepared):
    source = open_source("tfds:tiny_gray:test", cache_dir=prepared)
    assert source.class_names == ("0", "1", "2")
    assert source[0]["image"].shape == (2, 2, 1)
    assert source[0]["label"] == 2


@pytest.mark.parametrize(
    ("split", "labels"),
    [
        ("train[:2]", [0, 1]),
        ("train[75%:]", [1]),
        ("train[:1]+train[3:]", [0, 1]),
    ],
)
def test_a_split_may_be_a_slice(prepared, split, labels):
    for spec in (f"tfds:tiny_shapes:{split}", f"tfds:tiny_shapes:1.2.0:{split}"):
        assert open_source(spec, cache_dir=prepared).labels().tolist() == labels


def test_the_source_pickles(prepared):
    source = pickle.loads(pickle.dumps(open_source("tfds:tiny_shapes", cache_dir=prepared)))
    assert source[1]["image"].shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("spec", "error", "text"),
    [
        ("tiny_shapse", ValueError, r"no data set 'tiny_shapse'; did you mean 'tiny_shapes'"),
        ("mnistt", ValueError, r"no data set 'mnistt'; did you mean 'mnist'.*\(\d+ names are"),
        (
            "mnist",
            FileNotFoundError,
            r"'tfds:mnist' is not prepared: .*mnist/3\.0\.1 \(prepared here: tiny_gray:1\.2\.0, "
            r"tiny_shapes:1\.2\.0, tiny_texts:1\.2\.0\)\. Prepare it once, where there is "
            r"internet, "
            "with download=True",
        ),
        ("mnist/big", ValueError, "'tfds:mnist/big' cannot be opened: mnist has no configs"),
        (
            "imagenette/160px-v3",
            ValueError,
            r"imagenette has the configs \['full-size-v2'.*; did you mean '160px-v2'",
        ),
        ("mnist:9.9.9", ValueError, r"no version 9\.9\.9; the code makes 3\.0\.1 \(prepar"),
        ("tiny_shapes:1.0.0", ValueError, r"no version 1\.0\.0; the code makes 1\.2\.0 \("),
        (
            "tiny_shapes:trian",
            ValueError,
            r"no split 'trian'; did you mean 'train'\?.*the splits train \(4 examples\), test \(1 ",
        ),
        ("tiny_shapes:train[:99]", ValueError, r"'train\[:99\]' cannot be read: .*has the splits"),
        ("tiny_shapes:train[:", ValueError, r"'train\[:' cannot be read: "),
        ("tiny_shapes:train[:0]", ValueError, r"'train\[:0\]' has no examples; .*has the splits"),
        ("tiny_shapes:train[3:1]", ValueError, r"'train\[3:1\]' "),
        (
            "tiny_texts",
            ValueError,
            r"'tfds:tiny_texts' is not an image classification data set: it must have one Image "
            r"feature, got 0; its features: text \(Text\)",
        ),
        ("a b", ValueError, r"name must be 'tfds:<name>\[/config\].*, got 'tfds:a b'"),
    ],
)
def test_what_cannot_be_opened_says_so_at_once(prepared, spec, error, text):
    start = time.monotonic()
    with pytest.raises(error, match=text):
        open_source(f"tfds:{spec}", cache_dir=prepared)
    assert time.monotonic() - start < 5


def test_labels_that_are_kept_back_are_an_error(prepared):
    source = open_source("tfds:tiny_shapes:test", cache_dir=prepared)
    with pytest.raises(ValueError, match=r"1 of 1 examples have no label \(label is negative"):
        source.labels()


@pytest.mark.parametrize("file_format", ["tfrecord", "parquet"])
def test_a_format_without_random_access_is_named(own, file_format):
    info = own / "tiny_shapes" / "1.2.0" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": file_format}))
    text = f"is prepared in .* as {file_format}, which has no random access .*another cache_dir"
    with pytest.raises(ValueError, match=text):
        open_source("tfds:tiny_shapes", cache_dir=own)


def test_another_prepared_version_is_offered_and_opens_by_its_number(own):
    folder = own / "tiny_shapes"
    (folder / "1.2.0").rename(folder / "1.1.0")
    info = folder / "1.1.0" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"version": "1.1.0"}))
    with pytest.raises(FileNotFoundError, match=r"prepared here: .*tiny_shapes:1\.1\.0"):
        open_source("tfds:tiny_shapes", cache_dir=own)
    assert len(open_source("tfds:tiny_shapes:1.1.0", cache_dir=own)) == 4


def test_a_data_set_without_code_opens_from_its_files(own):
    # As when a colleague's prepared folder is copied, but not their builder.
    for path in [*(own / "tiny_shapes" / "1.2.0").iterdir()]:
        path.rename(path.with_name(path.name.replace("tiny_shapes", "their_scans")))
    (own / "tiny_shapes").rename(own / "their_scans")
    info = own / "their_scans" / "1.2.0" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"name": "their_scans"}))
    assert len(open_source("tfds:their_scans", cache_dir=own)) == 4
    with pytest.raises(
        ValueError, match=r"their_scans:3\.0\.0' cannot be opened: .*their_scans:1\.2"
    ):
        open_source("tfds:their_scans:3.0.0", cache_dir=own)
    with pytest.raises(ValueError, match="no data set 'their_scan'; did you mean 'their_scans'"):
        open_source("tfds:their_scan", cache_dir=own)


def test_a_damaged_description_is_named(own):
    (own / "tiny_shapes" / "1.2.0" / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match=r"'tfds:tiny_shapes' cannot be opened: \w+Error: "):
        open_source("tfds:tiny_shapes", cache_dir=own)


def test_missing_records_are_damage(own):
    for path in (own / "tiny_shapes" / "1.2.0").glob("*.array_record*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"is damaged \(.*\); delete that folder and prepare"):
        open_source("tfds:tiny_shapes", cache_dir=own)


def test_download_prepares_array_records_that_open_next_time(tmp_path):
    source = open_source("tfds:tiny_gray:train", cache_dir=tmp_path, download=True)
    assert source.labels().tolist() == [2]
    assert open_source("tfds:tiny_gray:train", cache_dir=tmp_path).labels().tolist() == [2]


@pytest.mark.parametrize(
    ("raised", "text"),
    [
        (
            ModuleNotFoundError("no", name="tensorflow"),
            "uses TensorFlow. Install tensorflow-cpu to",
        ),
        (ConnectionError("Max retries exceeded"), "ConnectionError: Max retries exceeded"),
        (AssertionError("Manual directory x is empty"), "Manual directory x is empty"),
        (FileExistsError("Cannot rename"), "FileExistsError: Cannot rename"),
    ],
)
def test_a_download_that_fails_says_why(tmp_path, monkeypatch, raised, text):
    def fail(self):
        raise raised

    monkeypatch.setattr(TinyGray, "download_and_prepare", fail)
    with pytest.raises(RuntimeError, match=f"'tfds:tiny_gray' could not be prepared in .*{text}"):
        open_source("tfds:tiny_gray", cache_dir=tmp_path, download=True)


def test_losing_the_race_to_prepare_is_no_failure(prepared, tmp_path, monkeypatch):
    def other_process_was_faster(self):
        shutil.copytree(prepared, tmp_path / "data")
        raise FileExistsError("Cannot rename")

    monkeypatch.setattr(TinyGray, "download_and_prepare", other_process_was_faster)
    source = open_source("tfds:tiny_gray", cache_dir=tmp_path / "data", download=True)
    assert len(source) == 1


def test_sixteen_bits_are_measured_and_leveled(prepared):
    source = open_source("tfds:tiny_shapes:train[:3]", cache_dir=prepared)
    levels = measure_levels(source, [0, 1, 2])
    assert (levels.black[0], levels.white[0]) == (float(GRAY16.min()), float(GRAY16.max()))
    found = with_levels(source, levels)
    low, high = levels.black[0], levels.white[0]
    wanted = np.rint(255 * ((GRAY16 - low) / (high - low)))
    np.testing.assert_array_equal(found[2]["image"][..., 0], wanted)
    np.testing.assert_array_equal(found[0]["image"], source[0]["image"])
