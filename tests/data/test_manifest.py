"""Tables that name images: what is read, what is guessed, and what is refused, row by row."""

from __future__ import annotations

import builtins
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flaxtransfer.data import Source, folder, manifest, open_source, open_unlabeled


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve images, 0.png to 11.png, of the gray level 20 times their number."""
    root = tmp_path_factory.mktemp("images")
    for number in range(12):
        Image.new("RGB", (4, 3), (20 * number,) * 3).save(root / f"{number}.png")
    (root / "deep").mkdir()
    Image.new("RGB", (4, 3)).save(root / "deep" / "x.png")
    return root


@pytest.fixture
def table(images):
    """Writes a table beside the images and opens it."""
    written = []

    def opened(text, name="table.csv", **options):
        path = images / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        written.append(path)
        return open_source(f"csv:{path}", **options)

    yield opened
    for path in written:
        path.unlink(missing_ok=True)


ROWS = [("path", "label", "split", "patient"), *(
    (f"{i}.png", "dog" if i % 3 else "cat", ("train", "val", "test")[i // 4], f"Jane {i // 2}")
    for i in range(12)
)]  # fmt: skip


def as_csv(rows, mark=","):
    return "\n".join(mark.join(map(str, row)) for row in rows) + "\n"


def test_a_table_is_a_source(table):
    source = table(as_csv(ROWS))
    assert isinstance(source, Source)
    assert source.class_names == ("cat", "dog")
    assert source.task == "single_label"
    assert source.labels().tolist() == [int(i % 3 > 0) for i in range(12)]
    assert [source[i]["image"][0, 0, 0] for i in range(12)] == [20 * i for i in range(12)]
    assert type(source[3]["label"]) is int
    assert source[3]["label"] == 0
    assert [part.tolist() for part in source.splits] == [
        [*range(4)],
        [*range(4, 8)],
        [*range(8, 12)],
        [],
    ]
    groups = source.groups()
    assert [groups.index(group) // 2 for group in groups] == [i // 2 for i in range(12)]
    assert source.notes == (
        "columns by their usual names: image 'path', label 'label', split 'split', group 'patient'",
        "the column 'split' is the split: 4 train, 4 val, 4 test images",
        "6 groups of the column 'patient' stay whole in every split",
    )
    copy = pickle.loads(pickle.dumps(source))
    assert copy[5]["label"] == 1
    assert not any("Jane" in str(value) for value in (groups, source.opened, source.notes))


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_it_is_opened_again_by_its_address(table, kind, images):
    source = table(as_csv([("file", "dx", "patient"), *((f"{i}.png", i % 2, i) for i in range(6))]),
                   label_column="dx", group_column="none")  # fmt: skip
    again = open_source(source.address, **source.opened)
    assert again.files == source.files
    assert again.labels().tolist() == source.labels().tolist()
    assert again.groups() is None


@pytest.mark.parametrize(
    "data",
    [
        b"path,label\n0.png,cat\n1.png,dog\n",
        b"\xef\xbb\xbfpath,label\r\n0.png,cat\r\n1.png,dog\r\n",
        b"path;label\n0.png;cat\n1.png;dog",
        b"path\tlabel\r0.png\tcat\r1.png\tdog\r",
        b' path , label \n"0.png", cat \n"./1.png",dog\n\n',
        b"label,x,path\ncat,1,0.png\ndog,2,deep/../1.png\n",
        b"Image Index,label\n.\\0.png,cat\n1.png,dog\n",
    ],
)
def test_ways_of_writing_a_table(table, data):
    source = table(data)
    assert source.files == ("0.png", "1.png")
    assert source.class_names == ("cat", "dog")


def test_cells_with_marks_in_them(table):
    source = table('path,label\n0.png,"one, or ""two"""\n1.png,"a\nb"\n')
    assert source.class_names == ("a\nb", 'one, or "two"')


def test_parquet_is_read_like_csv(images):
    path = images / "table.parquet"
    columns = {
        "path": [f"{i}.png" for i in range(6)],
        "label": pa.array([2, 10, None, 2, 10, 3], pa.int8()),
        "patient": pa.array(["p", "p", "q", None, "q", "r"]).dictionary_encode(),
        "value": pa.array([0.5, float("nan"), 1, 2, 3, 4], pa.float32()),
    }
    pq.write_table(pa.table(columns), path)
    source = open_source(f"parquet:{path}", ignore_label="")
    assert source.class_names == ("2", "3", "10")
    assert source.labels().tolist() == [0, 2, 0, 2, 1]
    assert len(set(source.groups())) == 4
    values = open_source(f"parquet:{path}", label_column="value", ignore_label="")
    assert values.task == "regression"
    assert values.labels().tolist() == [[0.5], [1], [2], [3], [4]]
    assert values[0]["label"].dtype == np.float32


KINDS = [
    # cells of one column, options, task, names, labels
    (["b", "a10", "a2"], {}, "single_label", ("a2", "a10", "b"), [2, 1, 0]),
    (["10", "9", "10"], {}, "single_label", ("9", "10"), [1, 0, 1]),
    (["-1", "1", "1"], {}, "single_label", ("-1", "1"), [0, 1, 1]),
    (["2", "2b", "1"], {}, "single_label", ("1", "2", "2b"), [1, 2, 0]),
    (["0.5", "2", "1e3"], {}, "regression", ("label",), [[0.5], [2], [1000]]),
    (["1", "2", "3"], {"task": "regression"}, "regression", ("label",), [[1], [2], [3]]),
    (["1.5", "2.0", "1.5"], {"task": "single_label"}, "single_label", ("1.5", "2.0"), [0, 1, 0]),
    (["b|a", "b", "c"], {}, "multi_label", ("a", "b", "c"), [[1, 1, 0], [0, 1, 0], [0, 0, 1]]),
    (["b|a", "b", "c"], {"label_separator": ""}, "single_label", ("b", "b|a", "c"), [1, 0, 2]),
    (["a;b", "b"], {"label_separator": ";"}, "multi_label", ("a", "b"), [[1, 1], [0, 1]]),
    (["0", "1", "1"], {"task": "multi_label"}, "multi_label", ("label",), [[0], [1], [1]]),
]  # fmt: skip


@pytest.mark.parametrize(("cells", "options", "task", "names", "labels"), KINDS)
def test_what_labels_are(table, cells, options, task, names, labels):
    rows = [("path", "label"), *((f"{i}.png", f'"{cell}"') for i, cell in enumerate(cells))]
    source = table(as_csv(rows), **options)
    assert (source.task, source.class_names) == (task, names)
    assert source.labels().tolist() == labels
    assert source.labels().dtype == (np.int64 if task == "single_label" else np.float32)


def test_several_columns_are_labels_that_an_image_has_or_lacks(table):
    rows = [("path", "edema", "mass"), ("0.png", 1, 0), ("1.png", "", 1), ("2.png", -1, 0)]
    source = table(as_csv(rows), label_column=["edema", "mass"], ignore_label="-1")
    assert source.task == "multi_label"
    np.testing.assert_array_equal(source.labels(), [[1, 0], [np.nan, 1], [np.nan, 0]])
    assert source.notes[-2:] == (
        "0 rows are left out: no label but '-1', which is the value of 1 cells",
        "labels are 0 or 1 for each of 'edema', 'mass', empty for unknown",
    )
    with pytest.raises(
        ValueError, match=r"labels must be 0, 1 or empty, got .* line 4 \(edema '-1'\)"
    ):
        table(as_csv(rows), label_column=["edema", "mass"])
    one_hot = [("path", "a", "b"), ("0.png", 1, 0), ("1.png", 0, 1), ("2.png", 0, 1)]
    assert "would make one class" in table(as_csv(one_hot), label_column=["a", "b"]).notes[-1]
    source = table(as_csv(one_hot), label_column=["a", "b"], task="single_label")
    assert source.labels().tolist() == [0, 1, 1]
    values = [("path", "x", "y"), ("0.png", 1.5, 0), ("1.png", "", 1)]
    source = table(as_csv(values), label_column=["x", "y"])
    assert source.task == "regression"
    np.testing.assert_array_equal(source.labels(), [[1.5, 0], [np.nan, 1]])


@pytest.mark.parametrize("nothing", ["", "NaN", "nan", "NULL", "<NA>"])
def test_findings_as_pandas_writes_them(table, nothing):
    # 1.0 where a column has empty cells, and -1.0 for doubtful, as in CheXpert's tables.
    rows = [("path", "edema", "mass"), ("0.png", "1.0", nothing), ("1.png", "-1.0", "0.0")]
    both = ["edema", "mass"]
    source = table(as_csv([*rows, ("2.png", nothing, "1.0")]), label_column=both, ignore_label="-1")
    assert source.task == "multi_label"
    np.testing.assert_array_equal(source.labels(), [[1, np.nan], [np.nan, 0], [np.nan, 1]])
    with pytest.raises(ValueError, match=r"must be 0, 1 or empty, got .* line 3 \(edema '-1.0'\)"):
        table(as_csv(rows), label_column=both)
    values = [("path", "x", "y"), ("0.png", "1.5", nothing), ("1.png", "2", "7")]
    source = table(as_csv(values), label_column=["x", "y"])
    np.testing.assert_array_equal(source.labels(), [[1.5, np.nan], [2, 7]])
    rows = [("path", "edema", "mass"), ("0.png", 1, nothing), ("1.png", 0, nothing)]
    with pytest.raises(ValueError, match="columns without a label in any row: 'mass'; leave them"):
        table(as_csv(rows), label_column=both)


def test_doubtful_labels_are_said(table):
    def notes(*cells):
        rows = [("path", "label"), *((f"{i}.png", cell) for i, cell in enumerate(cells))]
        return table(as_csv(rows)).notes[-1]

    # One "e" with an accent, and two signs, which look alike.
    assert notes("Caf\u00e9", "cafe\u0301", "tea") == (
        "these names of classes differ in writing alone: 'Caf\u00e9' and 'cafe\u0301'"
    )
    assert notes("1.0", "2.0", "1.0").endswith(
        "all of them whole: task='single_label' would make classes of them"
    )
    assert notes("1.5", "2.0", "1.0") == "labels are values of 'label'"


@pytest.mark.parametrize("value", ["-1", "-1.0", "unknown"])
def test_rows_without_a_label_are_left_out_and_counted(table, value):
    cells = ["cat", value, "dog", value] if value == "unknown" else ["0", "-1", "1", "-1"]
    rows = [("path", "label"), *((f"{i}.png", cell) for i, cell in enumerate(cells))]
    source = table(as_csv(rows), ignore_label=value)
    assert source.files == ("0.png", "2.png")
    assert source.labels().tolist() == [0, 1]
    assert f"2 rows are left out: no label but {value!r}" in source.notes


def test_paths_may_be_absolute_patterns_or_outside(table, images):
    rows = [("path", "label"), (images / "0.png", "a"), (f"../{images.name}/1.png", "b")]
    source = table(as_csv(rows))
    assert source.files == (str(images / "0.png"), f"../{images.name}/1.png")
    assert [source[i]["image"][0, 0, 0] for i in range(2)] == [0, 20]
    assert "1 images lie outside the folder of the manifest (..)" in source.notes
    rows = [("id", "place", "label"), (0, ".", "a"), ("x", "deep", "b")]
    source = table(as_csv(rows), image_column="{place}/{id}.png")
    assert source.files == ("0.png", "deep/x.png")


BAD = [
    ("", "the first line must name the columns, got an empty one"),
    ("path,label\n", "has no rows below the names of its columns"),
    ("path,label\n0.png,a\n1.png\n2.png,b,c\n", r"must have 2 cells.* line 3 \(1\), line 4 \(3\)"),
    ('path,label\n0.png,"a\n1.png,b\n', r"not a readable CSV file \(unexpected end of data\)"),
    ("path,label,label\n0.png,a,b\n", "names of columns must differ, got twice: 'label'"),
    ("path,lable\n0.png,a\n1.png,b\n", None),
    ("x,label\n0.png,a\n1.png,b\n", r"no column is usually called so for images; name it"),
    ("path,x,y\n0.png,a,b\n", r"which column holds the labels must be said.* 'path', 'x', 'y'"),
    ("path,label\n0.png,a\n8.pgn,b\nz.png,a\n", r"missing: line 3 \(8.pgn\), line 4 \(z.png\)"),
    ("path,label\nx.png,a\n1.png,b\n", r"1 image missing.*; did you mean 'deep/x.png'\?"),
    ("path,label\n0,a\n1,b\n", r"2 images missing.*; did you mean '0.png'\?.* patterns such as"),
    ("path,label\n0.png,a\n1.png,b\n./0.png,a\n", "the image of an earlier row: line 4"),
    ("path,label\n0.png,a\n,b\n", "1 row without an image: line 3"),
    ("path,label\n0.png,a\n1.png,\n2.png,b\n", "1 row without a label: line 3; --ignore-label ''"),
    ("path,label\n0.png,\n", "no row has a label"),
    ("path,label\n0.png,a\n1.png,a\n", "must be at least 2 classes, got 'a' in the column 'label'"),
    ("path,label\n0.png,0\n1.png,-1\n2.png,1\n", "labels that no class can be, '-1', in line 3"),
    ("path,label\n0.png,cat\n1.png,NaN\n2.png,dog\n", "that no class can be, 'NaN', in line 3"),
    ("path,label\n0.png,1\n1.png,2\n2.png,unknown\n", "no class can be, 'unknown', in line 4"),
    ("path,label\n0.png,1.5\n1.png,NaN\n2.png,2\n", r"without a label: line 3; --ignore-label ''"),
    ('path,label\n0.png,"1,5"\n1.png,2\n', r"have a decimal point, .* in line 2 \(1,5\)"),
    ("path,label\n0.png,1.5\n1.png,x\n2.png,2\n", r"must be numbers, .* line 3 \(label 'x'\)"),
    ("path,label\n0.png,1.5\n1.png,1e39\n2.png,2\n", r"must be numbers, .* line 3 \(label '1e39'"),
    ("path,label\n0.png,1.5\n1.png,inf\n2.png,2\n", r"must be numbers, .* line 3 \(label 'inf'\)"),
    ("path,label,split\n0.png,a,train\n1.png,b,tset\n", r"val or test, .* line 3 \(tset\)"),
    (
        "path,label,split\n0.png,a,train\n1.png,b,train\n2.png,c,test\n",
        "each class must be among the training images, got 'c' for validation or test alone",
    ),
    (
        "path,label,split\n0.png,a,val\n1.png,b,test\n",
        "must have images to train on, got 1 val, 1 test",
    ),
    (
        "path,label,split,patient\n0.png,a,train,Jane\n1.png,b,train,Joe\n2.png,b,test,Jane\n",
        r"no group may be in two parts .* of their 'patient': line 4 \(line 2\)$",
    ),
    ("path,label\n0.png,a\n" + "x" * 2**20, "line 3 is longer than 1,048,576 characters"),
    ("path,label\n0.png,a\n" + "x/" * 2000 + ",b\n", r"missing: line 3 \(x/x/.* \.\.\. .*x\)"),
    ("path,label\n0.png,a\n" + "x/" * 5000 + ",b\n", r"at most 4,096 .* in line 3 \(x/x"),
    (b"path,label\n0.png,a\n1\0.png,b\n", "line 3 holds a zero byte"),
    (b"\x89PNG\r\n\x1a\n\0\0", r"must be UTF-8 text, .* \(it begins with b'\\x89PNG'\)"),
    ("path,label\n0.png,a\n".encode("utf-16"), "must be UTF-8 text, got UTF-16"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "error"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_used_is_named_by_row(table, text, error):
    if error is None:
        with pytest.raises(
            ValueError, match=r"no column 'label'; did you mean 'lable'\?; the columns"
        ):
            table(text, label_column="label")
        return
    with pytest.raises(ValueError, match=error) as raised:
        table(text)
    assert "\n" not in str(raised.value)
    assert "Jane" not in str(raised.value)


def test_all_kinds_of_problem_are_said_at_once_with_ten_rows_each(table):
    rows = [
        ("path", "label"),
        *((f"no{i}.png", "a") for i in range(30)),
        ("0.png", ""),
        ("0.png", "b"),
    ]
    with pytest.raises(ValueError) as raised:  # noqa: PT011  # the text is compared below
        table(as_csv(rows))
    text = str(raised.value)
    assert "1 row with the image of an earlier row: line 33 (0.png)" in text
    assert "1 row without a label: line 32" in text
    assert "30 images missing: line 2 (no0.png)" in text
    assert "line 11 (no9.png) and 20 more; paths are relative to" in text
    assert "line 12" not in text


def test_missing_and_broken_images_may_be_left_out(table, images):
    (images / "broken.png").write_bytes(b"no image")
    rows = [
        ("path", "label"),
        ("0.png", "a"),
        ("gone.png", "a"),
        ("broken.png", "b"),
        ("1.png", "b"),
    ]
    with pytest.raises(ValueError, match=r"broken\.png: not an image"):
        table(as_csv([row for row in rows if row[0] != "gone.png"]))
    source = table(as_csv(rows), skip_corrupt=True)
    assert source.files == ("0.png", "1.png")
    assert [reason.split(":")[0] for reason in source.skipped] == ["gone.png", "broken.png"]


def test_files_that_are_no_table(tmp_path, images):
    (tmp_path / "table.csv").touch()
    with pytest.raises(FileNotFoundError, match=r"no file .*/tabel.csv; did you mean 'table.csv'"):
        open_source(f"csv:{tmp_path}/tabel.csv")
    with pytest.raises(ValueError, match="must be a regular file, got a folder"):
        open_source(f"csv:{tmp_path}")
    with pytest.raises(ValueError, match="'csv:' needs a path"):
        open_source("csv:")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        open_source(f"parquet:{images}/0.png")
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"path": ["0.png"] * 9, "label": ["a"] * 9}), whole)
    (tmp_path / "cut.parquet").write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        open_source(f"parquet:{tmp_path}/cut.parquet")
    pq.write_table(pa.table({"image": [{"bytes": b"x"}], "label": [1]}), whole)
    with pytest.raises(ValueError, match=r"the column 'image' must be text or numbers, got struct"):
        open_source(f"parquet:{whole}")


def test_a_parquet_file_that_states_too_many_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "MOST_ROWS", 8)
    pq.write_table(pa.table({"path": ["0.png"] * 9, "label": ["a"] * 9}), tmp_path / "many.parquet")
    with pytest.raises(ValueError, match="at most 8 rows, got 9"):
        open_source(f"parquet:{tmp_path}/many.parquet")


def test_a_parquet_file_that_unpacks_to_much_more(tmp_path, monkeypatch):
    text = pa.array([f"{i}{'x' * 100_000}" for i in range(9)])
    pq.write_table(pa.table({"path": text, "label": ["a"] * 9}), tmp_path / "large.parquet")
    assert (tmp_path / "large.parquet").stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"at most 4,096 characters, .* row 9 \(8xxx"):
        open_source(f"parquet:{tmp_path}/large.parquet")
    monkeypatch.setattr(manifest, "MOST_PARQUET_BYTES", 800_000)
    with pytest.raises(ValueError, match=r"columns must have at most 800,000 bytes, got 9\d\d,"):
        open_source(f"parquet:{tmp_path}/large.parquet")


def test_options_of_columns_are_for_tables(tmp_path):
    with pytest.raises(ValueError, match=r"label_column, task must be given for .*'csv:<path>', "):
        open_source("digits", label_column="x", task="regression")
    (tmp_path / "table.csv").write_text("path,label\n0.png,a\n")
    with pytest.raises(ValueError, match="task must be single_label, multi_label or regression"):
        open_source(f"csv:{tmp_path}/table.csv", task="classes")


def test_images_of_a_table_without_labels(images):
    path = images / "new.csv"
    path.write_text("study,file\n7,3.png\n9,0.png\n")
    found = open_unlabeled(f"csv:{path}")
    assert found.names == ("3.png", "0.png")
    assert found.source[0]["image"][0, 0, 0] == 60
    assert found.notes == ("images are those of the column 'file'",)
    with pytest.raises(ValueError, match="there is no column 'fil'; did you mean 'file'"):
        open_unlabeled(f"csv:{path}", image_column="fil")
    path.write_text("file\n3.png\ngone.png\n")
    with pytest.raises(ValueError, match=r"1 image missing: line 3 \(gone\.png\)"):
        open_unlabeled(f"csv:{path}")
    assert open_unlabeled(f"csv:{path}", skip_corrupt=True).names == ("3.png",)
    path.unlink()


def test_a_large_table_is_listed_without_opening_images(tmp_path, monkeypatch):
    count = 2 * folder._MOST_TO_OPEN + 1
    rows = ((f"{i}.png", "ab"[i % 2], f"p{i // 9}") for i in range(count))
    (tmp_path / "table.csv").write_text(as_csv([("path", "label", "patient"), *rows]))
    monkeypatch.setattr("os.path.isfile", lambda path: True)
    monkeypatch.setattr(folder, "_head", lambda path: pytest.fail(f"{path} was opened"))
    opened = []
    plain = builtins.open
    monkeypatch.setattr("builtins.open", lambda *a, **k: opened.append(a[0]) or plain(*a, **k))
    source = open_source(f"csv:{tmp_path}/table.csv")
    assert len(source) == count
    assert opened == []


DAMAGE = """
import sys
from pathlib import Path
from flaxtransfer.data import open_source
whole, path = Path(sys.argv[1]).read_bytes(), Path(sys.argv[1]).with_name("damaged")
end = len(whole) - 8
for place in range(end - int.from_bytes(whole[-8:-4], "little"), end):
    for value in (0x01, 0x18, 0x29):
        path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
        try:
            open_source(f"parquet:{path}")
        except ValueError:
            pass
"""


def test_a_damaged_footer_of_parquet_never_ends_the_process(tmp_path):
    """At some damage pyarrow ends it, without an error, where a column's metadata are asked for."""
    names = [f"{number}.png" for number in range(4)]
    for name in names:
        Image.new("L", (2, 2)).save(tmp_path / name)
    # Text with values that are missing has histograms of its levels.
    table = pa.table({"path": names, "label": ["a", "b", "a", "b"], "other": ["x", None, "y", "z"]})
    pq.write_table(table, tmp_path / "sound")
    done = subprocess.run(
        [sys.executable, "-c", DAMAGE, str(tmp_path / "sound")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]
