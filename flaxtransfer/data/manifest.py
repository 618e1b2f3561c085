"""Manifests: tables that name images, and their labels, groups and parts of a split.

``open_manifest`` opens a CSV or Parquet file with one row per image. Which columns are meant is
given, or guessed from their names; what was guessed, assumed or left out is in ``notes``.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxtransfer.data.folder import (
    FolderSource,
    check_trained,
    natural_key,
    part_counts,
    part_named,
    unreadable_files,
    unseen,
    with_frames,
)
from flaxtransfer.data.source import USUAL_COLUMNS, UnlabeledImages
from flaxtransfer.data.splits import Splits
from flaxtransfer.files import check_regular
from flaxtransfer.paths import listing, shortened, suggest, visible

MOST_CSV_BYTES = 2**29
"""Some million rows; every cell that is used becomes a Python string of ten times its size."""

MOST_LINE = 2**20
"""Characters of a line: a row with many more is no row of a table of images."""

MOST_ROWS = 5_000_000
MOST_PARQUET_BYTES = 2**30
"""Of a Parquet file and, unpacked, of its columns: a few bytes may state any number of rows."""

MOST_CELL = 4096
"""Characters of a cell, as of the longest path."""

NONE = "none"
"""In place of a column's name: there is no such column, whatever the others are called."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a manifest are meant, and how labels are read; None guesses.

    Args:
        image: column with the paths of the images, relative to the folder of the manifest or
            absolute; or a pattern such as ``"train/{id}.png"``, filled from columns.
        label: column of the labels, or one column per output.
        split: column with train, val or test; "none" for no such column.
        group: column of what must not be in two parts of a split, such as patients; "none" for no
            such column.
        separator: between the labels of an image in one column, as in ``cat|dog``; "" for none.
        ignore: the value that means that there is no label: such rows are left out, and of several
            columns the value is missing.
        task: "single_label", "multi_label" or "regression"; by default read off the values.
    """

    image: str | None = None
    label: tuple[str, ...] = ()
    split: str | None = None
    group: str | None = None
    separator: str = "|"
    ignore: str | None = None
    task: str | None = None


@dataclass(frozen=True, eq=False)
class ManifestSource(FolderSource):
    """Images that a table names, decoded when they are read; made by ``open_manifest``."""

    name: str = ""
    task: str = "single_label"
    group_of: tuple[str, ...] | None = field(default=None, repr=False)
    opened: Mapping[str, Any] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """What ``open_source`` opens it by, with the keyword arguments ``opened``."""
        return self.origin or self.name

    def groups(self) -> Sequence[str] | None:
        """A digest of the group of each image: of its column, else of its file; None without.

        Patients may be named in the column; what is computed here keeps no name of them.
        """
        return super().groups() if self.group_of is None else self.group_of


def open_manifest(
    path: str | os.PathLike[str],
    kind: str,
    columns: Columns | None = None,
    *,
    skip_corrupt: bool = False,
    min_side: int | None = None,
    bands: int = 3,
    partial: bool = False,
) -> ManifestSource:
    """Opens a table with one row per image.

    Labels that are text or whole numbers are classes, in natural order. Several labels in a cell
    (``cat|dog``), or several columns of 0, 1 and empty cells (or NaN), are ``multi_label``:
    float32 ``[examples, outputs]``, in which NaN is missing. Other numbers are values
    (``regression``).

    Of the images only names are looked up, and the first bytes where there are at most 2000.

    Args:
        path: the file; ``~`` is expanded.
        kind: "csv" (UTF-8, a line of column names, comma, semicolon or tab) or "parquet".
        columns: which columns are meant, by default guessed.
        skip_corrupt: as for ``open_folder``; also leaves out rows whose image is missing.
        min_side: as for ``open_source``.
        bands: as for ``open_folder``.
        partial: allow one class alone, and parts of a split that cannot be trained on; to evaluate
            on whatever there is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such table, columns that it lacks, or rows that cannot be used; all
            kinds of problem are in one text, each with its first ten rows.

    >>> import tempfile
    >>> from PIL import Image
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("a.png", "b.png"):
    ...     Image.new("L", (2, 2)).save(folder / name)
    >>> lines = ("file,diagnosis,patient", "a.png,cyst,7", "b.png,none,9")
    >>> _ = (folder / "studies.csv").write_text(chr(10).join(lines))
    >>> source = open_manifest(folder / "studies.csv", "csv")
    >>> source.class_names, source.labels().tolist(), len(set(source.groups()))
    (('cyst', 'none'), [0, 1], 2)
    """
    wanted = columns or Columns()
    table = Table.read(path, kind, lambda names: Used.of(names, wanted, labeled=True))
    used = table.used
    files, notes = _paths(table)
    problems = _duplicates(table, files)
    found = read_labels(table, wanted, problems)
    skipped: dict[str, str] = {}
    keep = found.keep
    missing = _missing(table, files, keep)
    if missing and skip_corrupt:
        skipped = {files[i]: f"{files[i]}: there is no such file" for i in missing}
        keep[list(missing)] = False
    elif missing:
        problems.append(_missing_text(table, files, missing))
    part_of = parts_of(table, problems)
    groups = None if used.group is None else table.cells[used.group]
    if groups is not None and part_of is not None:
        problems += torn_groups(table, groups, part_of, keep)
    if problems:
        raise ValueError(f"{table.path}: {'; '.join(problems)}")
    kept = np.flatnonzero(keep)
    chosen = [files[i] for i in kept]
    scans: dict[str, int] = {}
    broken = unreadable_files(table.root, chosen, (), skip_corrupt, min_side, bands, scans)
    if broken:
        skipped |= broken
        kept = np.array([i for i in kept.tolist() if files[i] not in broken], np.int64)
    if not len(kept):
        raise ValueError(f"{table.path}: no row is left of {len(files)}")
    examples, frames = with_frames([files[i] for i in kept.tolist()], scans)
    kept = np.repeat(kept, [scans.get(files[i], 1) for i in kept.tolist()])
    targets, names = found.targets[kept], found.names
    if found.task == "single_label":
        targets, names = _present(targets, names)
        if len(names) < 2 and not partial:
            raise ValueError(
                f"{table.path}: there must be at least 2 classes, got {listing(map(repr, names))} "
                f"in the column {used.label[0]!r}"
            )
    splits = None if part_of is None else splits_of(part_of[kept])
    if splits is not None and found.task == "single_label":
        if not partial:
            check_trained(splits, targets, names, str(table.path))
        found.notes.extend(unseen(splits, targets, names))
    if splits is not None:
        notes.append(f"the column {used.split!r} is the split: {part_counts(splits)} images")
    return ManifestSource(
        root=table.root,
        class_names=tuple(names),
        files=tuple(examples),
        targets=targets,
        skipped=tuple(skipped.values()),
        min_side=min_side,
        bands=bands,
        frames=frames,
        scans=bool(scans),
        splits=splits,
        notes=(*table.notes, *used.notes(), *notes, *found.notes, *group_notes(used, groups)),
        name=f"{kind}:{table.path.absolute()}",
        task=found.task,
        group_of=None if groups is None else group_digests(groups, kept),
        opened=opened_with(used, wanted),
    )


def open_unlabeled_manifest(
    path: str | os.PathLike[str],
    kind: str,
    image: str | None = None,
    *,
    skip_corrupt: bool = False,
    bands: int = 3,
) -> UnlabeledImages:
    """Opens the images that a table names, in its order, without regard to other columns.

    Args:
        path: the file.
        kind: "csv" or "parquet".
        image: the column of the paths, by default guessed.
        skip_corrupt: as for ``open_manifest``.
        bands: as for ``open_folder``.

    Raises:
        FileNotFoundError, ValueError: as for ``open_manifest``.
    """
    table = Table.read(
        path, kind, lambda names: Used.of(names, Columns(image=image), labeled=False)
    )
    files, _ = _paths(table)
    problems = _duplicates(table, files)
    missing = _missing(table, files, np.ones(len(files), bool))
    if missing and not skip_corrupt:
        problems.append(_missing_text(table, files, missing))
    if problems:
        raise ValueError(f"{table.path}: {'; '.join(problems)}")
    skipped = {files[i]: f"{files[i]}: there is no such file" for i in missing}
    files = [file for file in files if file not in skipped]
    scans: dict[str, int] = {}
    broken = unreadable_files(table.root, files, (), skip_corrupt, None, bands, scans)
    files = [file for file in files if file not in broken]
    if not files:
        raise ValueError(f"{table.path}: no row is left of {len(table)}")
    reasons = (*skipped.values(), *broken.values())
    files, frames = with_frames(files, scans)
    labels = np.zeros(len(files), np.int64)
    source = FolderSource(
        table.root, ("?",), tuple(files), labels, reasons, bands=bands, frames=frames
    )
    notes = () if image else (f"images are those of the column {table.used.pattern!r}",)
    return UnlabeledImages(source, tuple(files), reasons, notes)


class Used(NamedTuple):
    """The columns that are read, and what is said about it."""

    image: tuple[str, ...]
    pattern: str
    label: tuple[str, ...]
    split: str | None
    group: str | None
    guessed: tuple[str, ...]
    unused: tuple[str, ...]

    @classmethod
    def of(cls, names: Sequence[str], wanted: Columns, *, labeled: bool) -> Used:
        """The columns that are meant.

        Raises:
            ValueError: columns that the table lacks, and those that cannot be guessed.
        """
        problems: list[str] = []
        asked = [*_fields(wanted.image), *wanted.label]
        asked += [each for each in (wanted.split, wanted.group) if each not in (None, NONE)]
        for each in dict.fromkeys(asked):
            if each not in names:
                problems.append(f"there is no column {each!r}{suggest(each, names)}")
        image = wanted.image or guess("image", names)
        if image is None:
            problems.append("no column is usually called so for images; name it (--image-column)")
        taken = set(_fields(image)) if image else set()
        split = group = None
        label: tuple[str, ...] = ()
        if labeled:
            free = [name for name in names if name not in taken]
            split = _optional(wanted.split, "split", free)
            group = _optional(wanted.group, "group", free)
            rest = [name for name in free if name and name not in (split, group)]
            usual = guess("label", rest)
            label = wanted.label or ((usual,) if usual else tuple(rest) if len(rest) == 1 else ())
            if not label:
                problems.append("which column holds the labels must be said (--label-column)")
            taken |= {*label, split or "", group or ""}
        if problems:
            raise ValueError(f"{'; '.join(problems)}; the columns are {named(names)}")
        assert image is not None  # or there was a problem
        guesses = {"image": (image,), "label": label, "split": (split,), "group": (group,)}
        given = {"image": wanted.image, "label": wanted.label, "split": wanted.split}
        given["group"] = wanted.group
        guessed = [
            f"{kind} {found[0]!r}"
            for kind, found in guesses.items()
            if not given[kind] and found and found[0]
        ]
        unused = [name for name in names if name and name not in taken]
        return cls(
            _fields(image), image, label, split, group, tuple(guessed if labeled else ()),
            tuple(unused),
        )  # fmt: skip

    def notes(self) -> Iterator[str]:
        """What was guessed, and what is not used."""
        if self.guessed:
            yield f"columns by their usual names: {', '.join(self.guessed)}"
        if "weight" in map(str.lower, self.unused):
            yield "the column 'weight' is not used: all images count alike"
        if others := [name for name in self.unused if name.lower() != "weight"]:
            yield f"columns that are not used: {named(others)}"

    @property
    def all(self) -> tuple[str, ...]:
        """All columns that are read."""
        others = (self.split, self.group)
        return tuple(dict.fromkeys((*self.image, *self.label, *filter(None, others))))


def _fields(image: str | None) -> tuple[str, ...]:
    """The columns of a pattern, or of a name."""
    if not image:
        return ()
    return tuple(re.findall(r"\{([^{}]+)\}", image)) or (image,)


def guess(kind: str, names: Sequence[str]) -> str | None:
    alike = {re.sub(r"[ -]+", "_", name.strip().lower()): name for name in reversed(names)}
    return next((alike[usual] for usual in USUAL_COLUMNS[kind] if usual in alike), None)


def _optional(given: str | None, kind: str, names: Sequence[str]) -> str | None:
    if given == NONE and NONE not in names:
        return None
    return given or guess(kind, names)


def named(names: Iterable[str]) -> str:
    return listing((repr(shortened(name, 60)) for name in names), most=12)


@dataclass(frozen=True, eq=False)
class Table:
    """The columns of a file that are used, as text without blanks around it."""

    path: Path
    used: Used
    cells: dict[str, list[str]]
    lines: Sequence[int]
    unit: str
    notes: tuple[str, ...] = ()

    @classmethod
    def read(
        cls, path: str | os.PathLike[str], kind: str, choose: Callable[[list[str]], Used]
    ) -> Table:
        """Reads a file.

        Args:
            path: of the file.
            kind: "csv" or "parquet".
            choose: the columns that are used, of those that there are.
        """
        if not os.fspath(path):
            raise ValueError(f"'{kind}:' needs a path, as in '{kind}:studies.{kind}'")
        where = Path(path).expanduser()
        if not where.exists():
            near = where.parent.glob(f"*{where.suffix}") if where.parent.is_dir() else ()
            raise FileNotFoundError(
                f"there is no file {where}{suggest(where.name, [each.name for each in near])}"
            )
        check_regular(where)
        try:
            table = {"csv": _read_csv, "parquet": _read_parquet}[kind](where, choose)
        except ValueError as error:
            text = str(error)
            raise ValueError(text if text.startswith(str(where)) else f"{where}: {text}") from None
        if not len(table):
            raise ValueError(f"{where} has no rows below the names of its columns")
        for name, cells in table.cells.items():
            if long := [i for i, cell in enumerate(cells) if len(cell) > MOST_CELL]:
                raise ValueError(
                    f"{where}: a cell must have at most {MOST_CELL:,} characters, got more of "
                    f"{name!r} in {table.rows(long, cells.__getitem__)}"
                )
        return table

    @property
    def root(self) -> Path:
        """The folder that paths are relative to."""
        return self.path.parent

    def __len__(self) -> int:
        return len(self.lines)

    def rows(self, where: Sequence[int], text: Callable[[int], str] | None = None) -> str:
        """The first ten of these rows, and how many more there are."""
        shown = [
            f"{self.unit} {self.lines[i]}{f' ({visible(shortened(text(i), 60))})' if text else ''}"
            for i in list(where)[:10]
        ]
        more = len(where) - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more else "")


def _read_csv(path: Path, choose: Callable[[list[str]], Used]) -> Table:
    size = path.stat().st_size
    if size > MOST_CSV_BYTES:
        raise ValueError(
            f"a CSV file must have at most {MOST_CSV_BYTES:,} bytes, got {size:,}; write it as "
            "Parquet"
        )
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = _lines(file)
        try:
            first = next(lines, "")
            plain = re.sub('"[^"]*"', "", first)
            mark = max(",;\t", key=plain.count)
            rows = csv.reader(_chained(first, lines), delimiter=mark, strict=True)
            names = [name.strip() for name in next(rows, [])]
            _check_names(names)
            used = choose(names)
            places = [names.index(name) for name in used.all]
            columns: list[list[str]] = [[] for _ in places]
            numbers: list[int] = []
            uneven: list[str] = []
            for row in rows:
                if len(row) != len(names):
                    if row:
                        uneven.append(f"line {rows.line_num} ({len(row)})")
                    continue
                numbers.append(rows.line_num)
                for column, place in zip(columns, places, strict=True):
                    column.append(row[place].strip())
        except UnicodeDecodeError:
            raise ValueError(
                f"a CSV file must be UTF-8 text, got {_bytes_of(path)}; save it as CSV UTF-8"
            ) from None
        except csv.Error as error:
            raise ValueError(f"not a readable CSV file ({error})") from None
    if uneven:
        raise ValueError(
            f"rows must have {len(names)} cells, as the first line has, got others in "
            f"{listing(uneven, most=10)}"
        )
    notes = () if mark == "," else (f"cells are separated by {mark!r}",)
    return Table(path, used, dict(zip(used.all, columns, strict=True)), numbers, "line", notes)


def _lines(file: Any) -> Iterator[str]:
    number = 0
    while line := file.readline(MOST_LINE):
        number += 1
        if len(line) == MOST_LINE:
            raise csv.Error(f"line {number} is longer than {MOST_LINE:,} characters")
        if "\0" in line:
            raise csv.Error(f"line {number} holds a zero byte")
        yield line


def _chained(first: str, others: Iterator[str]) -> Iterator[str]:
    yield first
    yield from others


def _bytes_of(path: Path) -> str:
    """What the beginning of a file that is no UTF-8 looks like."""
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    return f"other bytes (it begins with {head!r})"


def _check_names(names: Sequence[str]) -> None:
    """Refuses no names of columns, and equal ones."""
    if not any(names):
        raise ValueError("the first line must name the columns, got an empty one")
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise ValueError(f"names of columns must differ, got twice: {named(twice)}")


def _read_parquet(path: Path, choose: Callable[[list[str]], Used]) -> Table:
    import pyarrow as pa  # Here: help and other sources need no pyarrow.
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema, count = file.schema_arrow, file.metadata.num_rows
            if count > MOST_ROWS:
                raise ValueError(f"a manifest must have at most {MOST_ROWS:,} rows, got {count:,}")
            _check_names(schema.names)
            used = choose(list(schema.names))
            for name in used.all:
                kind = schema.field(name).type
                if not _is_plain(kind):
                    raise ValueError(
                        f"the column {name!r} must be text or numbers, got {shortened(str(kind))}"
                    )
            size = _unpacked(file.metadata, used.all)
            if size > MOST_PARQUET_BYTES:
                raise ValueError(
                    f"columns must have at most {MOST_PARQUET_BYTES:,} bytes, got {size:,}"
                )
        # A value that comes up again is decoded once, however often a small file repeats it.
        with pq.ParquetFile(path, read_dictionary=list(used.all)) as file:
            read = file.read(columns=list(used.all))
            cells = {name: texts(read.column(name)) for name in used.all}
        if any(len(column) != count for column in cells.values()):
            raise OSError("it has other rows than it states")
    except (pa.ArrowException, OSError, KeyError) as error:
        text = shortened(" ".join(str(error).split()), 200)
        raise ValueError(f"not a readable Parquet file ({text})") from None
    return Table(path, used, cells, range(1, count + 1), "row")


def _unpacked(metadata: Any, names: Sequence[str]) -> int:
    """Bytes of columns, as the file states them."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    # pyarrow ends the process at a damaged column, which reading refuses: asked for last of all.
    if (whole := sum(group.total_byte_size for group in groups)) <= MOST_PARQUET_BYTES:
        return int(whole)
    chunks = (group.column(i) for group in groups for i in range(group.num_columns))
    return sum(each.total_uncompressed_size for each in chunks if each.path_in_schema in names)


def _is_plain(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    tests = (types.is_string, types.is_large_string, types.is_integer, types.is_floating)
    return any(test(kind) for test in (*tests, types.is_boolean, types.is_null))


def texts(column: Any) -> list[str]:
    """The values of a column as a CSV file has them; "" for null and NaN."""
    import pyarrow.types as types

    found: list[str] = []
    values: dict[int | None, str]
    for chunk in column.chunks:
        if types.is_dictionary(chunk.type):
            values = {i: _text(value) for i, value in enumerate(chunk.dictionary.to_pylist())}
            values[None] = ""
            found += [values[i] for i in chunk.indices.to_pylist()]
        else:
            found += map(_text, chunk.to_pylist())
    return found


def _text(value: Any) -> str:
    return "" if value is None or value != value else str(value).strip()


def _paths(table: Table) -> tuple[list[str], list[str]]:
    """The paths of the images, as they are opened and recorded, and what is said about them."""
    used, notes = table.used, []
    if used.pattern in used.image:
        raw = table.cells[used.pattern]
    else:
        rows = zip(*(table.cells[name] for name in used.image), strict=True)
        raw = [_filled(used.pattern, used.image, row) for row in rows]
    root, slashed = os.fspath(table.root), 0
    known = {"": ""}
    for text in raw:
        if text in known:
            continue
        name = text
        if "\\" in text and not os.path.exists(os.path.join(root, text)):
            name = text.replace("\\", "/")
            slashed += 1
        known[text] = os.path.normpath(name)
    files = [known[text] for text in raw]
    if slashed:
        notes.append(f"backslashes were read as slashes in {slashed} paths")
    outside = sum(file.startswith("../") for file in files)
    if outside:
        notes.append(f"{outside} images lie outside the folder of the manifest (..)")
    return files, notes


def _filled(pattern: str, names: Sequence[str], row: Sequence[str]) -> str:
    if "" in row:
        return ""
    for name, value in zip(names, row, strict=True):
        pattern = pattern.replace(f"{{{name}}}", value)
    return pattern


def _duplicates(table: Table, files: Sequence[str]) -> list[str]:
    """Rows without an image, and images with several rows."""
    problems = []
    if empty := [i for i, file in enumerate(files) if not file]:
        problems.append(f"{counted(empty, 'row')} without an image: {table.rows(empty)}")
    first: dict[str, int] = {}
    again, inside = [], os.path.normpath(table.root) + "/"
    for i, file in enumerate(files):
        if file and first.setdefault(file.removeprefix(inside), i) != i:
            again.append(i)
    if again:
        problems.append(
            f"{counted(again, 'row')} with the image of an earlier row: "
            + table.rows(again, lambda i: files[i])
        )
    return problems


def _missing(table: Table, files: Sequence[str], keep: np.ndarray) -> list[int]:
    """Rows whose image is no file; nothing is opened."""
    root = os.fspath(table.root)
    rows = [i for i in np.flatnonzero(keep).tolist() if files[i]]
    there = {file: os.path.isfile(os.path.join(root, file)) for file in {files[i] for i in rows}}
    return [i for i in rows if not there[files[i]]]


def _missing_text(table: Table, files: Sequence[str], missing: Sequence[int]) -> str:
    text = f"{counted(missing, 'image')} missing: {table.rows(missing, lambda i: files[i])}"
    path = Path(files[missing[0]])
    for place in (table.root, *_subfolders(table.root)):
        with suppress(OSError, ValueError):  # Names that no file can have.
            near = [place / path, *place.joinpath(path).parent.glob(_plain(path.name) + ".*")]
            if found := next((each for each in near if each.is_file()), None):
                name = os.path.relpath(found, table.root)
                pattern = "--image-column takes patterns such as 'images/{id}.png'"
                return f"{text}; did you mean {name!r}? {pattern}"
    return f"{text}; paths are relative to {table.root}"


def _plain(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _subfolders(root: Path) -> list[Path]:
    """Where images may lie that a manifest names without their folder."""
    with os.scandir(root) as entries:
        found = [entry.path for entry in entries if entry.is_dir() and entry.name[0] != "."]
    return [Path(path) for path in sorted(found)[:20]]


def counted(rows: Sequence[int], what: str) -> str:
    return f"{len(rows)} {what}{'' if len(rows) == 1 else 's'}"


def parts_of(table: Table, problems: list[str]) -> np.ndarray | None:
    """The part of each row, 0 to 2, or 3 for none; None without a split."""
    if table.used.split is None:
        return None
    cells = table.cells[table.used.split]
    place = {"train": 0, "val": 1, "test": 2}
    known = {each: place.get(part_named(each) or "", 3) for each in set(cells)}
    wrong = [i for i, each in enumerate(cells) if each and known[each] == 3]
    if wrong:
        rows = table.rows(wrong, cells.__getitem__)
        problems.append(f"the split must be train, val or test, got others in {rows}")
    return np.array([known[each] for each in cells])


def splits_of(part_of: np.ndarray) -> Splits:
    return Splits(*(np.flatnonzero(part_of == part).astype(np.int64) for part in range(4)))


def torn_groups(
    table: Table, groups: Sequence[str], part_of: np.ndarray, keep: np.ndarray
) -> Iterator[str]:
    """Groups that the split of the data tears; by their rows, since names may be personal."""
    first: dict[str, int] = {}
    torn = [
        i
        for i in np.flatnonzero(keep & (part_of < 3)).tolist()
        if groups[i] and part_of[first.setdefault(groups[i], i)] != part_of[i]
    ]
    if torn:
        yield (
            f"no group may be in two parts of the split, got {counted(torn, 'row')} in another "
            f"part than the first of their {table.used.group!r}: "
            + table.rows(torn, lambda i: f"{table.unit} {table.lines[first[groups[i]]]}")
        )


def group_notes(used: Used, groups: Sequence[str] | None) -> Iterator[str]:
    if groups is None:
        return
    count, empty = len(set(groups) - {""}), sum(not each for each in groups)
    yield f"{count} groups of the column {used.group!r} stay whole in every split"
    if empty:
        yield f"{empty} rows without one are groups of their own"


def group_digests(groups: Sequence[str], kept: np.ndarray) -> tuple[str, ...]:
    texts = (groups[i] or f"\0{i}" for i in kept.tolist())
    return tuple(hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts)


def opened_with(used: Used, wanted: Columns) -> dict[str, Any]:
    """The arguments of ``open_source`` that find the same columns, whatever else is added later."""
    found: dict[str, Any] = {
        "image_column": used.pattern,
        "label_column": list(used.label),
        "split_column": used.split or NONE,
        "group_column": used.group or NONE,
        "label_separator": wanted.separator,
        "ignore_label": wanted.ignore,
        "task": wanted.task,
    }
    return {name: value for name, value in found.items() if value is not None}


class RowLabels(NamedTuple):
    """Labels of all rows; those of rows that are not kept mean nothing."""

    targets: np.ndarray
    names: tuple[str, ...]
    task: str
    keep: np.ndarray
    notes: list[str]


_MISSING = {"nan", "n/a", "#n/a", "<na>", "null"}
"""What programs write for a missing value; pandas reads it so, too."""

_WHOLE = re.compile(r"[+-]?\d+")


def read_labels(table: Table, wanted: Columns, problems: list[str]) -> RowLabels:
    used = table.used.label
    columns = [table.cells[name] for name in used]
    if len(used) > 1 or wanted.task == "regression" or any(map(_is_fraction, {*columns[0]})):
        # Among numbers, what programs write for a missing value is an empty cell.
        columns = [["" if _is_missing(cell) else cell for cell in column] for column in columns]
    ignored = np.array([[_same(cell, wanted.ignore) for cell in column] for column in columns]).T
    empty = np.array([[not cell for cell in column] for column in columns]).T & ~ignored
    nothing, keep = (empty | ignored).all(axis=1), ~(empty | ignored).all(axis=1)
    notes: list[str] = []
    left_out = int((nothing & ignored.any(axis=1)).sum())
    if wanted.ignore is not None:
        rows = "row is" if left_out == 1 else "rows are"
        said = f"{left_out} {rows} left out: no label but {wanted.ignore!r}"
        if len(columns) > 1:
            said += f", which is the value of {int(ignored.sum())} cells"
        notes.append(said)
    if blank := np.flatnonzero(nothing & ~ignored.any(axis=1)).tolist():
        problems.append(
            f"{counted(blank, 'row')} without a label: {table.rows(blank)}; --ignore-label '' "
            "leaves them out"
        )
    known = ~(empty | ignored)
    values = {cell for c, column in enumerate(columns)
              for cell, there in zip(column, known[:, c], strict=True) if there}  # fmt: skip
    task = wanted.task or _task_of(values, len(columns), wanted.separator)
    if task not in ("single_label", "multi_label", "regression"):
        raise ValueError(f"task must be single_label, multi_label or regression, got {task!r}")
    blank_labels = RowLabels(np.zeros(len(table), np.int64), used, task, keep, notes)
    if not values:
        problems.append("no row has a label")
        return blank_labels
    if never := [name for name, there in zip(used, known.any(axis=0), strict=True) if not there]:
        problems.append(f"columns without a label in any row: {named(never)}; leave them out")
    several = len(columns) > 1
    if task == "multi_label" and not several and not _are_flags(values):
        return _tags(columns[0], used[0], wanted.separator, blank_labels)
    if task == "single_label" and not several:
        commas = {value for value in values if _DECIMAL_COMMA.fullmatch(value)}
        if wanted.task is None and commas and all(map(_WHOLE.fullmatch, values - commas)):
            where = [i for i in np.flatnonzero(keep).tolist() if columns[0][i] in commas]
            problems.append(
                "numbers must have a decimal point, got a comma in "
                f"{table.rows(where, columns[0].__getitem__)}; task='single_label' takes them as "
                "classes"
            )
        return _classes(table, columns[0], values, blank_labels, problems)
    read = _number if task == "regression" else _flag
    numbers = np.full(known.shape, np.nan, np.float32)
    wrong: dict[int, str] = {}
    for c, column in enumerate(columns):
        for i in np.flatnonzero(known[:, c]).tolist():
            value = read(column[i])
            if value is None:
                wrong.setdefault(i, f"{used[c]} {column[i]!r}")
            else:
                numbers[i, c] = value
    if wrong:
        what = "numbers" if task == "regression" else "0, 1 or empty"
        problems.append(
            f"labels must be {what}, got others in {table.rows(list(wrong), wrong.__getitem__)}; "
            "--ignore-label VALUE says which value is no label"
        )
    if task == "single_label":
        return _one_hot(table, numbers, blank_labels, problems)
    notes.append(_said(task, used, numbers))
    return blank_labels._replace(targets=numbers)


def _task_of(values: set[str], columns: int, separator: str) -> str:
    """What labels are, by their values."""
    if columns > 1:
        # 1.0 is 1: programs write so where a cell is empty.
        fraction = any(_is_fraction(value) and _number(value) not in (-1, 0, 1) for value in values)
        return "regression" if fraction else "multi_label"
    if separator and any(separator in value for value in values):
        return "multi_label"
    return "regression" if any(map(_is_fraction, values)) else "single_label"


def _is_fraction(text: str) -> bool:
    """Whether a text is a number that is not written as a whole one."""
    return _number(text) is not None and not _WHOLE.fullmatch(text)


def _is_missing(text: str) -> bool:
    return text.lower() in _MISSING


def _same(cell: str, ignore: str | None) -> bool:
    """Whether a cell is the value that is ignored: -1.0 is -1."""
    if ignore is None or cell == ignore:
        return cell == ignore
    number = _number(ignore)
    return number is not None and _number(cell) == number


_LARGEST = float(np.finfo(np.float32).max)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) <= _LARGEST and "_" not in text else None


_FLAGS = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0}


def _flag(text: str) -> float | None:
    return _FLAGS.get(text.lower())


def _are_flags(values: set[str]) -> bool:
    return all(_flag(value) is not None for value in values)


def _classes(
    table: Table, cells: Sequence[str], values: set[str], found: RowLabels, problems: list[str]
) -> RowLabels:
    """One class per row."""
    whole = {value for value in values if _WHOLE.fullmatch(value)}
    odd: set[str] = set()
    # Numbers beside text, and what programs write for a missing value, are slips.
    if any(map(_is_fraction, values)) and found.task == "single_label":
        odd |= {value for value in values if _number(value) is None}
    odd |= set(filter(_is_missing, values))
    if len(whole) > len(values - whole):
        odd |= {v for v in values - whole if v.lower() in (*_MISSING, "na", "none", "unknown", "?")}
    negative = {value for value in whole if value.startswith("-") and int(value) < 0}
    if negative and whole != {"-1", "1"} and whole != {"-1", "+1"}:
        odd |= negative
    if odd:
        rows = [i for i in np.flatnonzero(found.keep).tolist() if cells[i] in odd]
        problems.append(
            f"labels that no class can be, {listing(map(repr, sorted(odd)), most=5)}, in "
            f"{table.rows(rows)}; --ignore-label VALUE leaves such rows out"
        )
    if whole == values:
        names = sorted(values, key=lambda value: (int(value), value))
    else:
        names = sorted(values, key=natural_key)
    found.notes.extend(_doubts(names, whole == values))
    place = {name: label for label, name in enumerate(names)}
    targets = np.array([place.get(cell, 0) for cell in cells], np.int64)
    return found._replace(targets=targets, names=tuple(names))


def _doubts(names: Sequence[str], whole: bool) -> Iterator[str]:
    """What is odd about the names of classes, and may be meant."""
    first: dict[str, str] = {}
    alike = [
        f"{other!r} and {name!r}"
        for name in names
        if (other := first.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)) != name
    ]
    if alike:
        yield f"these names of classes differ in writing alone: {listing(alike, most=5)}"
    if whole and len(names) > _MANY_NUMBERS:
        yield f"{len(names)} numbers are classes: task='regression' would make values of them"


_MANY_NUMBERS = 20

_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")


def _tags(cells: Sequence[str], column: str, separator: str, found: RowLabels) -> RowLabels:
    """Any number of labels per row, in one column."""
    rows = [cell.split(separator) if separator else [cell] for cell in cells]
    rows = [[tag.strip() for tag in row if tag.strip()] for row in rows]
    names = sorted({tag for i in np.flatnonzero(found.keep) for tag in rows[i]}, key=natural_key)
    place = {name: label for label, name in enumerate(names)}
    targets = np.zeros((len(cells), len(names)), np.float32)
    for i in np.flatnonzero(found.keep).tolist():
        targets[i, [place[tag] for tag in rows[i]]] = 1
    found.notes.append(
        f"the column {column!r} holds any number of {len(names)} labels, separated by {separator!r}"
    )
    return found._replace(targets=targets, names=tuple(names))


def _one_hot(table: Table, numbers: np.ndarray, found: RowLabels, problems: list[str]) -> RowLabels:
    """Several columns of which one is 1 in each row."""
    wrong = np.flatnonzero(found.keep & ((numbers == 1).sum(axis=1) != 1)).tolist()
    if wrong:
        problems.append(
            f"exactly one column must be 1 for one class, got others in {table.rows(wrong)}"
        )
    return found._replace(targets=(numbers == 1).argmax(axis=1).astype(np.int64))


def _said(task: str, used: Sequence[str], numbers: np.ndarray) -> str:
    if task == "regression":
        text = f"labels are values of {named(used)}"
        if len(used) == 1 and not (numbers % 1 > 0).any():
            text += ", all of them whole: task='single_label' would make classes of them"
        return text
    text = f"labels are 0 or 1 for each of {named(used)}, empty for unknown"
    if len(used) > 1 and (np.nansum(numbers, axis=1) == 1).all():
        text += "; each row has one 1: task='single_label' would make one class of it"
    return text


def _present(targets: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels and names of the classes that have a row left."""
    found, places = np.unique(targets, return_inverse=True)
    return places.astype(np.int64), tuple(names[label] for label in found.tolist())
