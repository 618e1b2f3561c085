"""Folders of images: numbering, what is ignored, and every way a folder can be wrong."""

import os
import pickle
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flaxtransfer.data import ImageError, Source, folder, open_source
from flaxtransfer.data.open import open_unlabeled


def put(path, value=0, size=(4, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


@pytest.fixture
def tree(tmp_path):
    """Two classes, natural order against alphabetic order, nesting and hidden files."""
    put(tmp_path / "class10" / "b.png", 10)
    put(tmp_path / "class2" / "img10.png", 3)
    put(tmp_path / "class2" / "img9.bmp", 2)
    put(tmp_path / "class2" / "deep" / "x.tif", 1)
    (tmp_path / "class2" / ".DS_Store").write_bytes(b"junk")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README.txt").write_text("about the data")
    return tmp_path


def test_classes_and_files_are_numbered_in_natural_order(tree):
    source = open_source(f"folder:{tree}")
    assert isinstance(source, Source)
    assert source.class_names == ("class2", "class10")
    assert source.files == (
        "class2/deep/x.tif",
        "class2/img9.bmp",
        "class2/img10.png",
        "class10/b.png",
    )
    assert source.labels().tolist() == [0, 0, 0, 1]
    assert source.labels().dtype == np.int64
    assert [source[i]["image"][0, 0, 0] for i in range(len(source))] == [1, 2, 3, 10]
    assert source[3]["label"] == 1
    assert source[0]["image"].shape == (3, 4, 3)
    assert source.skipped == ()


def test_the_contents_decide_not_the_extension(tmp_path):
    put(tmp_path / "a" / "really.png")
    (tmp_path / "a" / "really.png").rename(tmp_path / "a" / "claims.jpg")
    put(tmp_path / "b" / "x.png")
    (tmp_path / "b" / "x.png").rename(tmp_path / "b" / "no_extension")
    assert len(open_source(f"folder:{tmp_path}")) == 2


def test_home_is_expanded_and_the_source_pickles(tree, monkeypatch):
    monkeypatch.setenv("HOME", str(tree.parent))
    source = pickle.loads(pickle.dumps(open_source(f"folder:~/{tree.name}")))
    assert source[3]["image"][0, 0, 0] == 10


def test_labels_need_no_image(tree):
    source = open_source(f"folder:{tree}")
    for file in source.files:
        (tree / file).unlink()
    assert source.labels().tolist() == [0, 0, 0, 1]


def test_a_file_that_is_no_image_is_named_at_opening(tree):
    (tree / "class10" / "notes.txt").write_text("x")
    (tree / "class2" / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"class2/empty\.png: not an image.*class10/notes\.txt"):
        open_source(f"folder:{tree}")


def test_a_damaged_image_is_named_when_it_is_read(tree):
    path = tree / "class10" / "b.png"
    path.write_bytes(path.read_bytes()[:50])
    source = open_source(f"folder:{tree}")
    with pytest.raises(ImageError, match=r"class10/b\.png: the image cannot be decoded"):
        source[3]


def test_skip_corrupt_leaves_out_and_lists(tree):
    put(tree / "class10" / "c.png", 11)
    path = tree / "class10" / "b.png"
    path.write_bytes(path.read_bytes()[:50])
    (tree / "class2" / "notes.txt").write_text("x")
    source = open_source(f"folder:{tree}", skip_corrupt=True)
    assert len(source) == 4
    assert source.labels().tolist() == [0, 0, 0, 1]
    assert [text.split(":")[0] for text in source.skipped] == ["class2/notes.txt", "class10/b.png"]
    assert "cannot be decoded" in source.skipped[1]
    assert source[3]["image"][0, 0, 0] == 11


def test_skipping_a_whole_class_is_an_error(tree):
    (tree / "class10" / "b.png").write_bytes(b"junk")
    text = r"no readable image in the class folder\(s\) \['class10'\].*left out: class10/b\.png"
    with pytest.raises(ValueError, match=text):
        open_source(f"folder:{tree}", skip_corrupt=True)


def test_many_bad_files_are_counted(tree):
    for index in range(8):
        (tree / "class2" / f"{index}.csv").write_text("x")
    with pytest.raises(ValueError, match=r"class2/4\.csv: not an image[^,]*(,[^,]*){7} and 3 more"):
        open_source(f"folder:{tree}")


def test_a_missing_folder_lists_its_neighbors(tmp_path):
    (tmp_path / "scans").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no folder .*scan; folders in .*: scans"):
        open_source(f"folder:{tmp_path}/scan")
    with pytest.raises(FileNotFoundError, match=r"no folder .*/a/b, nor .*/a"):
        open_source(f"folder:{tmp_path}/a/b")


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"x\.zip is a file; give the folder"):
        open_source(f"folder:{tmp_path}/x.zip")


@pytest.mark.parametrize(
    ("files", "text"),
    [
        (
            [],
            r"has no class folders \(nothing that could be a class\); the layout must be .*<class>",
        ),
        (["a.png", "b.png"], r"has no class folders \(only images: a\.png, b\.png\)"),
        (["a/1.png", "b/1.png", "c.png"], r"images outside the class folders: c\.png"),
        (["a/1.png"], "has one class folder, 'a'; a classifier needs at least 2"),
        (["val/a/1.png", "test/b/1.png"], "must have images to train on, got 1 val, 1 test"),
        (
            ["train/a/1.png", "train/b/1.png", "test/c/1.png", "val/d/1.png"],
            "each class must be among the training images, got 'c', 'd' for validation or test al",
        ),
        (["train/a/1.png", "val/a/1.png"], "has one class folder, 'a'"),
        (
            ["train/a/1.png", "train/b/1.png", "val/a/1.png", "valid/a/1.png"],
            "two folders are the same part of a split: val, valid",
        ),
        (
            ["train/a/1.png", "train/b/1.png", "test/1.png"],
            r"test has no class folders \(only images: 1\.png\)",
        ),
        (["train/a/1.png", "train/b/1.png", "test/b/1.png", "2.png"], "images outside .*: 2.png"),
    ],
)
def test_a_folder_of_another_layout_says_what_is_wanted(tmp_path, files, text):
    for file in files:
        put(tmp_path / file)
    with pytest.raises(ValueError, match=text):
        open_source(f"folder:{tmp_path}")


def test_classes_that_are_called_train_and_test_are_classes(tmp_path):
    put(tmp_path / "train" / "1.png")  # locomotives, say
    put(tmp_path / "test" / "1.png")
    assert open_source(f"folder:{tmp_path}").class_names == ("test", "train")


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Training", "validation", "Testing"), ("train", "dev")]
)
def test_folders_of_splits_are_the_splits(tmp_path, names):
    for count, name in zip((3, 2, 1), names, strict=False):
        for label in "ab":
            for number in range(count):
                put(tmp_path / name / label / f"{number}.png")
    (tmp_path / names[1] / "b" / "1.png").unlink()
    source = open_source(f"folder:{tmp_path}")
    assert source.class_names == ("a", "b")
    counts = (6, 3, 2, 0) if len(names) == 3 else (6, 3, 0, 0)
    assert tuple(map(len, source.splits)) == counts
    for part, name in zip(source.splits, names, strict=False):
        assert {source.files[i].split("/")[0] for i in part} == {name}
    assert [source.files[i] for i in np.flatnonzero(source.labels())] == [
        file for file in source.files if "/b/" in file
    ]
    assert source.notes[0].endswith(
        "holds a split: 6 train, 3 val" + ", 2 test" * (len(names) > 2) + " images"
    )


def test_classes_that_a_part_lacks_are_said(tmp_path):
    for file in ("train/a/1.png", "train/b/1.png", "train/c/1.png", "test/a/1.png", "val/c/1.png"):
        put(tmp_path / file)
    source = open_source(f"folder:{tmp_path}")
    assert source.notes[1:] == (
        "not validated, for want of images: 'a', 'b'",
        "not tested, for want of images: 'b', 'c'",
    )
    # To evaluate on whatever there is.
    put(tmp_path / "test/d/1.png")
    assert open_source(f"folder:{tmp_path}", partial=True).class_names == ("a", "b", "c", "d")


def test_an_empty_class_is_named(tmp_path):
    put(tmp_path / "a" / "1.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match=r"no image in the class folder\(s\) \['b', 'c'\]"):
        open_source(f"folder:{tmp_path}")


def test_min_side_reaches_the_decoder(tmp_path):
    for name in "ab":
        put(tmp_path / name / "x.jpg", 90, size=(64, 32))
    assert open_source(f"folder:{tmp_path}", min_side=16)[0]["image"].shape == (16, 32, 3)
    with pytest.raises(ValueError, match="min_side must be >= 1 px, got 0"):
        open_source(f"folder:{tmp_path}", min_side=0)


@pytest.mark.parametrize("skip", [False, True])
def test_what_is_no_file_in_a_class_folder_is_named_and_never_opened(tree, skip):
    label = min(path for path in tree.iterdir() if path.is_dir() and path.name[0] != ".")
    os.mkfifo(label / "pipe.png")
    (label / "device.png").symlink_to("/dev/zero")
    if skip:
        source = open_source(f"folder:{tree}", skip_corrupt=True)
        assert [line.split(": ")[1] for line in source.skipped] == [
            "cannot be read (it is no regular file)"
        ] * 2
    else:
        with pytest.raises(ValueError, match=r"pipe\.png: cannot be read \(it is no reg"):
            open_source(f"folder:{tree}")


def by_parts(name):
    """Natural order as a list of parts: a number before a text, the shorter list first."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part], name


NAMES = st.lists(st.text("0019ab./-_é\x01", max_size=6), max_size=8)


@given(NAMES)
def test_the_key_of_natural_order_orders_as_the_parts_do(names):
    assert sorted(names, key=folder.natural_key) == sorted(names, key=by_parts)
    assert folder.in_natural_order(names) == sorted(names, key=folder.natural_key)


@given(
    st.sampled_from(["", "a", "a1", "x/y", "0"]),
    st.lists(st.sampled_from(["0", "1", "01", "10", "2", "007", "12", "٣", "b", ""]), min_size=1),
    st.sampled_from(["", ".png", "_png", "b2"]),
)
def test_names_that_differ_by_a_number_are_ordered_alike(begins, middles, ends):
    """The short way and the keys agree, leading zeros and other digits included."""
    names = [f"{begins}{middle}{ends}" for middle in middles]
    assert folder.in_natural_order(names) == sorted(names, key=folder.natural_key)


@pytest.fixture
def large(tree, monkeypatch):
    """The tree counts as large: names of images are believed."""
    monkeypatch.setattr(folder, "_MOST_TO_OPEN", 2)
    return tree


def test_in_a_large_folder_names_are_believed_until_an_image_is_decoded(large):
    (large / "class2" / "empty.png").write_bytes(b"")
    source = open_source(f"folder:{large}")
    assert source.files[1] == "class2/empty.png"
    with pytest.raises(ImageError, match=r"class2/empty\.png: not an image in PNG"):
        source[1]
    skipped = open_source(f"folder:{large}", skip_corrupt=True).skipped
    assert [text.split(":")[0] for text in skipped] == ["class2/empty.png"]


@pytest.mark.parametrize("name", ["notes.txt", "Thumbs.db", "no_suffix", "png", "a.png.part"])
def test_in_a_large_folder_what_is_not_named_as_an_image_is_opened(large, name):
    (large / "class2" / name).write_text("x")
    with pytest.raises(ValueError, match=rf"class2/{re.escape(name)}: not an image"):
        open_source(f"folder:{large}")
    (large / "class2" / "deep" / "x.tif").rename(large / "class2" / name)
    assert f"class2/{name}" in open_source(f"folder:{large}").files


@pytest.mark.parametrize("name", ["{}.scan", "scan.{}", "{}"])
def test_in_a_large_folder_another_suffix_is_believed_if_a_sample_are_images(large, name):
    images = [large / "class10" / name.format(number) for number in range(8)]
    for path in images:
        path.write_bytes((large / "class10" / "b.png").read_bytes())
    images[3].write_text("none")  # Of 8 every fourth is opened: 0 and 4.
    source = open_source(f"folder:{large}")
    assert len(source) == 12
    with pytest.raises(ImageError, match=f"{images[3].name}: not an image in PNG"):
        source[source.files.index(f"class10/{images[3].name}")]
    images[4].write_text("none")
    with pytest.raises(ValueError, match="class10/") as error:
        open_source(f"folder:{large}")
    assert all(f"class10/{images[k].name}: not an image" in str(error.value) for k in (3, 4))


@pytest.mark.parametrize("opened", [open_source, open_unlabeled])
@pytest.mark.parametrize("most", [2, 2000])
def test_a_named_pipe_is_refused_and_not_waited_for(tree, monkeypatch, most, opened):
    monkeypatch.setattr(folder, "_MOST_TO_OPEN", most)
    os.mkfifo(tree / "class2" / "pipe.png")
    (tree / "README.txt").unlink()
    with pytest.raises(ValueError, match=r"class2/pipe\.png: cannot be read \(it is no regular"):
        opened(f"folder:{tree}")


def test_links_to_files_are_images_and_links_to_folders_are_not_followed(tree):
    (tree / "class2" / "linked.png").symlink_to(tree / "class10" / "b.png")
    (tree / "class10" / "round").symlink_to(tree / "class10")
    source = open_source(f"folder:{tree}")
    assert "class2/linked.png" in source.files
    assert [file for file in source.files if file.startswith("class10")] == ["class10/b.png"]


def test_a_part_of_the_classes_can_be_opened_on_request(tree):
    (tree / "class3").mkdir()
    source = open_source(f"folder:{tree}", partial=True)
    assert source.class_names == ("class2", "class10")
    assert source.labels().tolist() == [0, 0, 0, 1]
    (tree / "class10" / "b.png").unlink()
    source = open_source(f"folder:{tree}", partial=True)
    assert (source.class_names, source.labels().tolist()) == (("class2",), [0, 0, 0])
    for file in source.files:
        (tree / file).unlink()
    with pytest.raises(ValueError, match=r"no image in the class folder\(s\) \['class2', 'class3'"):
        open_source(f"folder:{tree}", partial=True)
