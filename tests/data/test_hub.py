"""Hugging Face data sets as that library writes them: pixels, labels, splits, one clear error each.

All are made here by the library itself, saved to a folder or prepared in a cache; nothing is asked
of the Hub.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Pillow

from flaxtransfer.data import Source, measure_levels, open_source, open_unlabeled, with_levels
from flaxtransfer.data.hub import open_hub
from flaxtransfer.data.source import contents

KINDS = Features({"image": Image(), "label": ClassLabel(names=["zebra", "ant"])})


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """A cache of its own, no bars, and a Hub that is never asked."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def png(values):
    file = io.BytesIO()
    Pillow.fromarray(np.asarray(values)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def gray(level, bits=np.uint8):
    return png(np.full((2, 3), level, bits))


def rows(count=6, **columns):
    return {
        "image": [gray(10 * i) for i in range(count)],
        "label": [i % 2 for i in range(count)],
        **columns,
    }


def saved(folder, data, kinds=None):
    """The name of a data set that was saved to a folder."""
    if type(data) is dict:
        data = Dataset.from_dict(data, features=kinds)
    data.save_to_disk(folder)
    return f"hf:{folder}"


def test_classes_are_those_that_are_declared_in_their_order(tmp_path):
    name = saved(tmp_path / "a", rows(), KINDS)
    source = open_source(name)
    assert isinstance(source, Source)
    assert source.class_names == ("zebra", "ant")
    assert source.labels().tolist() == [0, 1, 0, 1, 0, 1]
    assert source.labels().dtype == np.int64
    for i in range(6):
        example = source[i]
        np.testing.assert_array_equal(example["image"], np.full((2, 3, 3), 10 * i))
        assert example["label"] == i % 2
    assert "columns by their usual names: image 'image', label 'label'" in source.notes
    assert source.splits is None
    with pytest.raises(IndexError, match="example 6 does not exist"):
        source[6]


def test_every_declared_class_keeps_its_number_and_one_without_an_image_is_said(tmp_path):
    kinds = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    source = open_source(saved(tmp_path / "a", rows(label=[0, 2, 0, 2, 0, 2]), kinds))
    assert source.class_names == ("a", "b", "c")
    assert any("no image of 'b'" in note for note in source.notes)
    alone = saved(tmp_path / "b", rows(label=[2] * 6), kinds)
    with pytest.raises(ValueError, match="no image of 'a', 'b'; there must be images of at least"):
        open_source(alone)
    assert open_source(alone, partial=True).labels().tolist() == [2] * 6


def test_deep_images_keep_their_bits(tmp_path):
    data = rows(image=[gray(1000 + 10 * i, np.uint16) for i in range(6)])
    source = open_source(saved(tmp_path / "a", data, KINDS), bands=1)
    assert source.picture(3).values.ravel().tolist() == [1030] * 6
    assert source[3]["image"].max() == 4  # 1030 / 257: the whole range, of which little is used
    leveled = with_levels(source, measure_levels(source, range(6)))
    assert [int(leveled[i]["image"].max()) for i in (0, 5)] == [0, 255]


def test_identity_is_that_of_bytes_and_workers_get_paths(tmp_path):
    source = open_source(saved(tmp_path / "a", rows(), KINDS))
    again = open_source(f"hf:{tmp_path / 'a'}")
    assert contents(source, range(6)) == contents(again, range(6))
    other = open_source(saved(tmp_path / "b", rows(image=[gray(1)] * 6), KINDS))
    assert contents(other, [0]) != contents(source, [0])
    packed = pickle.dumps(source)
    assert len(packed) < 20_000
    np.testing.assert_array_equal(pickle.loads(packed)[5]["image"], source[5]["image"])
    reopened = open_source(source.address, **source.opened)
    assert reopened.labels().tolist() == source.labels().tolist()


def test_images_are_never_in_memory_together(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (8, 700, 700, 3), np.uint8)
    name = saved(tmp_path / "a", rows(8, image=[png(each) for each in noise]), KINDS)
    size = sum(path.stat().st_size for path in (tmp_path / "a").glob("*.arrow"))
    source = open_source(name)
    import pyarrow

    assert size > 10_000_000
    before = pyarrow.total_allocated_bytes()
    for i in range(8):
        np.testing.assert_array_equal(source[i]["image"], noise[i])
    assert pyarrow.total_allocated_bytes() - before < size / 8


@pytest.mark.parametrize(
    ("names", "kept", "said"),
    [
        (["train", "validation", "test"], (4, 2, 2, 0), "a split: 4 train, 2 val, 2 test images"),
        (["train", "test"], (4, 0, 2, 0), "a split: 4 train, 2 test images"),
        (["train", "test", "extra"], (4, 0, 2, 0), "left out: the split 'extra' (2 rows)"),
    ],
)
def test_its_own_splits_are_honored(tmp_path, names, kept, said):
    parts = {name: rows(2 + 2 * (name == "train")) for name in names}
    data = {name: Dataset.from_dict(part, features=KINDS) for name, part in parts.items()}
    source = open_source(saved(tmp_path / "a", DatasetDict(data)))
    assert tuple(map(len, source.splits)) == kept
    assert source.splits.train.tolist() == [0, 1, 2, 3]
    assert any(said in note for note in source.notes), source.notes
    together = open_source(f"hf:{tmp_path / 'a'}", split_column="none")
    assert together.splits is None
    assert len(together) == sum(len(part["label"]) for part in parts.values())
    assert any("taken as one set" in note for note in together.notes)
    for name in names:
        one = open_source(f"hf:{tmp_path / 'a'}:{name}")
        assert len(one) == len(parts[name]["label"])
        assert one.splits is None
        assert open_source(one.address, **one.opened).labels().tolist() == one.labels().tolist()


def test_splits_of_other_names_are_one_set(tmp_path):
    data = {name: Dataset.from_dict(rows(2), features=KINDS) for name in ("spring", "fall")}
    source = open_source(saved(tmp_path / "a", DatasetDict(data)))
    assert (len(source), source.splits) == (4, None)
    assert any("its splits 'spring', 'fall' are taken as one set" in n for n in source.notes)


def test_columns_of_split_and_group_are_those_of_a_manifest(tmp_path):
    columns = {"patient": list("aabbcc"), "split": ["train"] * 4 + ["test"] * 2}
    text = {"patient": Value("string"), "split": Value("string")}
    source = open_source(saved(tmp_path / "a", rows(**columns), Features({**KINDS, **text})))
    assert tuple(map(len, source.splits)) == (4, 0, 2, 0)
    assert len(set(source.groups())) == 3
    assert "a" not in source.groups()
    torn = rows(patient=list("aabbcb"), split=columns["split"])
    with pytest.raises(ValueError, match=r"no group may be in two parts .*: row 5 \(row 2\)"):
        open_source(saved(tmp_path / "b", torn, Features({**KINDS, **text})))


TAGS = [[0], [1], [0, 1], [], [1], [0]]
FLAGS = [[1, 0], [0, 1], [1, 1], [0, 0], [0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("columns", "kinds", "names"),
    [
        ({"label": TAGS}, {"label": List(ClassLabel(names=["wet", "cold"]))}, ("wet", "cold")),
        (
            {"label": [[("wet", "cold")[tag] for tag in row] for row in TAGS]},
            {"label": List(Value("string"))},
            ("cold", "wet"),
        ),
        ({"label": FLAGS}, {"label": List(Value("int64"))}, ("0", "1")),
        ({"label": FLAGS}, {"label": List(Value("float32"))}, ("0", "1")),
        (
            {"wet": [row[0] for row in FLAGS], "cold": [bool(row[1]) for row in FLAGS]},
            {"wet": ClassLabel(names=["no", "yes"]), "cold": Value("bool")},
            ("wet", "cold"),
        ),
    ],
)
def test_lists_and_several_columns_are_many_labels(tmp_path, columns, kinds, names):
    data = {"image": rows()["image"], **columns}
    kinds = Features({"image": Image(), **kinds})
    given = {} if "label" in columns else {"label_column": names}
    source = open_source(saved(tmp_path / "a", data, kinds), **given)
    assert source.task == "multi_label"
    assert source.class_names == names
    wet = names.index("wet") if "wet" in names else 0
    np.testing.assert_array_equal(source.labels()[:, [wet, 1 - wet]], np.array(FLAGS, np.float32))
    assert source[2]["label"].tolist() == [1, 1]


def test_numbers_are_regression_and_a_missing_one_is_missing(tmp_path):
    columns = {"age": [1.5, 2.0, 3.25, None, 5.0, 6.0], "size": [1.0, 2.0, 3.0, 4.0, 5.5, 6.0]}
    numbers = {"age": Value("float32"), "size": Value("float64")}
    data = {"image": rows()["image"], **columns}
    name = saved(tmp_path / "a", data, Features({"image": Image(), **numbers}))
    source = open_source(name, label_column=("age", "size"))
    assert source.task == "regression"
    assert np.isnan(source.labels()[3, 0])
    np.testing.assert_array_equal(source.labels()[:, 1], np.float32(columns["size"]))


def test_rows_without_a_label_are_named_and_may_be_left_out(tmp_path):
    name = saved(tmp_path / "a", rows(label=[0, 1, -1, 0, None, 1]), KINDS)
    with pytest.raises(ValueError, match="2 rows without a label: row 2, row 4; --ignore-label ''"):
        open_source(name)
    source = open_source(name, ignore_label="-1")
    assert source.labels().tolist() == [0, 1, 0, 1]
    assert [int(source[i]["image"].max()) for i in range(4)] == [0, 10, 30, 50]
    assert any("2 rows without a label left out" in note for note in source.notes)
    unlabeled = open_unlabeled(name)
    assert unlabeled.names == tuple("012345")


def test_a_class_that_means_no_label_is_no_class(tmp_path):
    kinds = Features({"image": Image(), "label": ClassLabel(names=["a", "unknown", "b"])})
    name = saved(tmp_path / "a", rows(label=[0, 1, 2, 0, 2, 1]), kinds)
    source = open_source(name, ignore_label="unknown")
    assert source.class_names == ("a", "b")
    assert source.labels().tolist() == [0, 1, 0, 1]
    kinds = Features({"image": Image(), "label": List(ClassLabel(names=["a", "unknown", "b"]))})
    name = saved(tmp_path / "b", rows(label=[[0], [1], [], [0, 2], [1, 2], [2]]), kinds)
    source = open_source(name, ignore_label="unknown")
    assert source.class_names == ("a", "b")
    assert source.labels().tolist() == [[1, 0], [0, 0], [1, 1], [0, 1], [0, 1]]


def test_a_column_without_a_usual_name_is_found_by_what_it_holds(tmp_path):
    data = {"scan": rows()["image"], "grade": rows()["label"], "caption": ["x"] * 6}
    kinds = {"scan": Image(), "grade": KINDS["label"], "caption": Value("string")}
    source = open_source(saved(tmp_path / "a", data, Features(kinds)))
    assert source.class_names == ("zebra", "ant")
    assert "columns by their usual names: image 'scan', label 'grade'" in source.notes
    assert "columns that are not used: 'caption'" in source.notes


def test_images_may_be_plain_bytes(tmp_path):
    kinds = Features({"image": Value("binary"), "label": KINDS["label"]})
    plain = rows(image=[gray(i)["bytes"] for i in range(6)])
    assert int(open_source(saved(tmp_path / "b", plain, kinds))[4]["image"].max()) == 4


def test_unreadable_images_are_left_out_when_asked(tmp_path):
    data = rows()
    data["image"][2] = {"bytes": b"\x89PNG\r\n\x1a\n junk", "path": None}
    data["image"][4] = None
    name = saved(tmp_path / "a", data, KINDS)
    with pytest.raises(ValueError, match=f"row 2 of {name}: not a readable PNG image"):
        open_source(name)[2]
    source = open_source(name, skip_corrupt=True)
    assert source.labels().tolist() == [0, 1, 1, 1]
    assert len(source.skipped) == 2
    assert "row 2" in source.skipped[0]
    assert source.skipped[1].endswith("row 4 of " + name + ": its image is empty")


class Tiny(datasets.GeneratorBasedBuilder):
    """As the Hub's data sets are prepared in the cache."""

    BUILDER_CONFIGS = [datasets.BuilderConfig("small"), datasets.BuilderConfig("large")]  # noqa: RUF012

    def _info(self):
        return datasets.DatasetInfo(features=KINDS)

    def _split_generators(self, dl_manager):
        return [datasets.SplitGenerator(part, gen_kwargs={"part": part}) for part in self.parts]

    parts = ("train", "test")

    def picture(self, i):
        return gray(i)

    def _generate_examples(self, part):
        for i in range({"small": 4, "large": 6}[self.config.name]):
            yield i, {"image": self.picture(i), "label": (i + (part == "test")) % 2}


def cached(folder, *configs):
    for config in configs:
        Tiny(
            cache_dir=str(folder), dataset_name="tiny", repo_id="lab/tiny", config_name=config,
            hash="0a",
        ).download_and_prepare()  # fmt: skip
    return folder


def test_images_may_be_files_here_and_nowhere_else(tmp_path, monkeypatch):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(gray(100 + i)["bytes"])
    paths = [str(tmp_path / "0.png"), str(tmp_path / "1.png"), "https://example.org/x.png", "x.png"]
    monkeypatch.setattr(Tiny, "parts", ("train",))
    monkeypatch.setattr(Tiny, "picture", lambda _, i: {"bytes": None, "path": paths[i]})
    cached(tmp_path / "cache", "small")
    source = open_source("hf:lab/tiny")
    assert [int(source[i]["image"].max()) for i in range(2)] == [100, 101]
    assert contents(source, [0])[0] != contents(source, [1])[0]
    with pytest.raises(ValueError, match=r"row 2 of hf:lab/tiny: .* 'https://.*' is no file here"):
        source[2]
    with pytest.raises(
        ValueError, match=r"row 3 of hf:lab/tiny: its image 'x.png' is no file here"
    ):
        source[3]


@pytest.mark.parametrize("download", [False, True])
def test_what_the_cache_has_needs_no_hub(tmp_path, download):
    cached(tmp_path / "mine", "small", "large")
    source = open_source("hf:lab/tiny:large", cache_dir=tmp_path / "mine", download=download)
    assert tuple(map(len, source.splits)) == (6, 0, 6, 0)
    part = open_source("hf:lab/tiny:small:test", cache_dir=tmp_path / "mine", download=download)
    assert (len(part), part.address) == (4, "hf:lab/tiny:small:test")
    assert source.address == "hf:lab/tiny:large"


def test_the_only_config_need_not_be_named(tmp_path):
    cached(tmp_path / "cache", "small")
    assert len(open_source("hf:lab/tiny:train")) == 4
    assert len(open_source("hf:lab/tiny")) == 8


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("hf:", ValueError, "must be 'hf:<name or folder>[:config][:split]', got 'hf:'"),
        ("hf:a:b:c:d", ValueError, "must be 'hf:<name or folder>[:config][:split]', got 'hf:a:b"),
        ("hf:lab/tinny", FileNotFoundError, "hf:lab/tinny is neither a folder nor in the cache"),
        ("hf:lab/tinny", FileNotFoundError, "did you mean 'lab/tiny'?; --download"),
        ("hf:/nowhere/x", FileNotFoundError, "there is no folder /nowhere/x"),
        ("hf:lab/tiny", ValueError, "with one of its configs, large, small, got none; write"),
        ("hf:lab/tiny:smal", ValueError, "large, small, got 'smal'; did you mean 'small'?"),
        ("hf:lab/tiny:huge:train", ValueError, "has no config 'huge'; it has the configs ['large"),
        (
            "hf:lab/tiny:small:valid",
            ValueError,
            "no split or config 'valid'; it has the splits ['t",
        ),
    ],
)
def test_names_that_open_nothing_are_one_line(tmp_path, name, kind, text):
    cached(tmp_path / "cache", "small", "large")
    with pytest.raises(kind) as caught:
        open_source(name)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 600


def test_the_hub_without_an_answer_is_one_line(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"neither a folder nor in the cache .*; the Hub gave"
    ):
        open_source("hf:lab/unknown", download=True)


TEXTS = Features({"text": Value("string"), "label": KINDS["label"]})
TWO = Features({"left": Image(), "right": Image(), "label": KINDS["label"]})
NO_LABEL = Features({"image": Image(), "text": Value("string"), "id": Value("int64")})
BOXES = Features({"image": Image(), "label": List(Value("float32"))})
POINTS = Features({"image": Image(), "label": List(List(Value("int64")))})


@pytest.mark.parametrize(
    ("data", "kinds", "given", "text"),
    [
        ({"text": ["a"], "label": [0]}, TEXTS, {}, "must have an image column, got text (string)"),
        (
            {"left": [gray(1)], "right": [gray(2)], "label": [0]}, TWO, {},
            "must have one image column (--image-column), got left (Image), right (Image)",
        ),
        (
            {"image": [gray(1)], "text": ["x"], "id": [1]}, NO_LABEL, {},
            "holds the labels must be said (--label-column), got image (Image), text (string), id",
        ),
        (
            rows(1), KINDS, {"label_column": "lable"},
            "there is no column 'lable'; did you mean 'label'?; the columns are 'image', 'label'",
        ),
        (
            rows(1), KINDS, {"image_column": "label"},
            "the image column of hf:",
        ),
        ({"image": [gray(1)], "label": [[0.5]]}, BOXES, {}, "must be classes, texts, whole numb"),
        ({"image": [gray(1)], "label": [[[1]]]}, POINTS, {}, "must be classes, texts, whole numb"),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_used_are_one_line(tmp_path, data, kinds, given, text):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        open_source(saved(tmp_path / "a", data, kinds), **given)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_streams_are_refused(tmp_path, monkeypatch):
    name = saved(tmp_path / "a", rows(), KINDS)
    stream = datasets.load_from_disk(tmp_path / "a").to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_from_disk", lambda path: stream)
    with pytest.raises(ValueError, match="must have random access, got a stream"):
        open_hub(name.removeprefix("hf:"))


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"hf:lab/tiny needs the extra hf: pip install"):
        open_source("hf:lab/tiny")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(path):
    path.unlink()


def scramble(path):
    path.write_text(json.dumps({"features": {"image": 3}}))


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        ("data-00000-of-00001.arrow", cut),
        ("data-00000-of-00001.arrow", remove),
        ("data-00000-of-00001.arrow", scramble),
        ("dataset_info.json", cut),
        ("dataset_info.json", scramble),
        ("state.json", cut),
    ],
)
def test_damaged_files_are_one_line(tmp_path, file, harm):
    name = saved(tmp_path / "a", rows(), KINDS)
    harm(tmp_path / "a" / file)
    with pytest.raises((ValueError, FileNotFoundError), match="hf:") as caught:
        open_source(name)
    assert "\n" not in str(caught.value)
    assert "cannot be read" in str(caught.value)


def test_flipped_bytes_never_end_the_process(tmp_path):
    """Offsets of an Arrow file point anywhere if it is damaged; they are checked before use."""
    saved(tmp_path / "a", rows(), KINDS)
    file = next((tmp_path / "a").glob("*.arrow"))
    sound = file.read_bytes()
    draw, said = np.random.default_rng(0), []
    for place in draw.integers(0, len(sound), 150).tolist():
        file.write_bytes(sound[:place] + bytes([sound[place] ^ 0xFF]) + sound[place + 1 :])
        try:
            source = open_source(f"hf:{tmp_path / 'a'}", skip_corrupt=True, partial=True)
            assert len(source.labels()) == len(source)
        except (ValueError, FileNotFoundError) as error:
            said.append(str(error))
    assert [text for text in said if "\n" in text] == []
    assert said


def test_a_folder_of_parquet_files_is_read_and_a_script_beside_them_refused(tmp_path):
    folder = tmp_path / "repo"
    folder.mkdir()
    Dataset.from_dict(rows(), features=KINDS).to_parquet(folder / "train.parquet")
    source = open_source(f"hf:{folder}")
    assert (len(source), source.class_names) == (6, ("zebra", "ant"))
    marker = tmp_path / "ran"
    (folder / "repo.py").write_text(f"open({str(marker)!r}, 'w').close()")
    with pytest.raises(ValueError, match="scripts are no longer supported"):
        open_source(f"hf:{folder}")
    assert not Path(marker).exists()
