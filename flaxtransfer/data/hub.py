"""Hugging Face Datasets: what that library saved, or has in its cache.

``open_hub`` maps the Arrow files, and our decoders read the images from their bytes; columns are
chosen, and plain ones read, as those of a manifest. The Hub is asked only with ``download``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from flaxtransfer.data.decode import decode_bands, read_picture
from flaxtransfer.data.folder import check_trained, natural_key, part_counts, part_named, unseen
from flaxtransfer.data.manifest import (
    NONE,
    Columns,
    RowLabels,
    Table,
    Used,
    counted,
    group_digests,
    group_notes,
    guess,
    opened_with,
    parts_of,
    read_labels,
    splits_of,
    texts,
    torn_groups,
)
from flaxtransfer.data.scans import Asked, ImageError, Levels, Picture
from flaxtransfer.data.source import Example, position
from flaxtransfer.data.splits import Splits
from flaxtransfer.paths import listing, shortened, suggest

_IN_LISTS = ("string", "large_string", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16",
             "float32", "float64")  # fmt: skip

_SAVED = ("dataset_dict.json", "state.json")
"""Of which a folder has one that Hugging Face Datasets saved."""


@dataclass(frozen=True, eq=False)
class HubSource:
    """Images of a Hugging Face data set, decoded when read; made by ``open_hub``."""

    name: str
    class_names: tuple[str, ...]
    data: Any  # datasets.Dataset of one column, as Arrow
    rows: np.ndarray = field(repr=False)  # of the data, one for each example
    targets: np.ndarray = field(repr=False)
    bands: int = 3
    min_side: int | None = None
    levels: Levels | None = None
    task: str = "single_label"
    splits: Splits | None = None
    notes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()  # "example: reason"
    group_of: tuple[str, ...] | None = field(default=None, repr=False)
    opened: Mapping[str, Any] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """What ``open_source`` opens it by, with the keyword arguments ``opened``."""
        return self.name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        index = position(index, len(self.rows))
        image = decode_bands(
            self._stored(index),
            name=f"row {self.rows[index]} of {self.name}",
            bands=self.bands,
            min_side=self.min_side,
            levels=self.levels,
        )
        label = self.targets[index]
        return {"image": image, "label": label.copy() if label.ndim else int(label)}

    def _stored(self, index: int) -> bytes | str:
        row = int(self.rows[index])
        cell = self.data[row].column(0)[0].as_py()
        data, path = (cell["bytes"], cell["path"]) if isinstance(cell, dict) else (cell, None)
        if data is not None:
            return bytes(data)
        if path is None or "://" in path or not os.path.isfile(path):
            where = "is empty" if path is None else f"{shortened(path)!r} is no file here"
            raise ImageError(f"row {row} of {self.name}: its image {where}")
        return str(path)

    def picture(self, index: SupportsIndex, /, *, measured: bool = False) -> Picture | None:
        """The image as it is stored; None for one of 8 bits if only ``measured`` are asked."""
        index = position(index, len(self.rows))
        name = f"row {self.rows[index]} of {self.name}"
        return read_picture(
            self._stored(index), Asked(name, self.bands, self.min_side, measured=measured)
        )

    def with_levels(self, levels: Levels) -> HubSource:
        """The same images with this black and white for those of more than 8 bits."""
        return replace(self, levels=levels)

    def content(self, index: SupportsIndex, /) -> bytes:
        """The bytes that the image is decoded from, for digests, and how they are read."""
        data = self._stored(position(index, len(self.rows)))
        data = Path(data).read_bytes() if isinstance(data, str) else data
        return f"{self.min_side}, {self.bands}\0".encode() + data

    def labels(self) -> np.ndarray:
        """All labels, int64 ``[examples]`` or float32 ``[examples, outputs]``."""
        return self.targets.copy()

    def groups(self) -> Sequence[str] | None:
        """A digest of the group of each image; None without a column of groups."""
        return self.group_of


def open_hub(
    spec: str,
    columns: Columns | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    skip_corrupt: bool = False,
    min_side: int | None = None,
    bands: int = 3,
    partial: bool = False,
    labeled: bool = True,
) -> HubSource:
    """Opens a Hugging Face data set, ``<name or folder>[:config][:split]``.

    Arrow files are mapped and not loaded, and images are decoded from their bytes by our decoders.
    No code of a data set is ever run: that library has given up scripts.

    A ``ClassLabel`` column is one class per image, by the names and in the order that it declares;
    lists are any number of labels; all other columns are read as those of a manifest (see
    ``open_manifest``). Splits train, validation and test are the split of the source; others are
    left out, and said.

    Args:
        spec: ``"org/name"`` in the cache of that library, or a folder: one that ``save_to_disk``
            wrote, or any that ``load_dataset`` reads, which fills that cache. A name after it is
            that of a config, if there is one, else that of a split.
        columns: which columns are meant, by default guessed; ``split="none"`` takes all splits as
            one set.
        cache_dir: in place of that library's cache (HF_DATASETS_CACHE).
        download: whether to ask the Hub, and download what is not in the cache. Nothing is asked
            where HF_DATASETS_OFFLINE or HF_HUB_OFFLINE are set.
        skip_corrupt: leave out images that cannot be decoded; each is decoded once.
        min_side: as for ``open_source``.
        bands: channels of the images; see ``decode_bands``.
        partial: allow one class alone, and a split that cannot be trained on.
        labeled: whether labels are read.

    Raises:
        FileNotFoundError: neither a folder nor in the cache.
        ValueError: the extra ``hf`` is not installed; an unknown config or split; columns that are
            missing or no image or label; a damaged cache.
    """
    wanted = columns or Columns()
    try:
        from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
    except ImportError as error:
        raise ValueError(
            f"hf:{spec} needs the extra hf: pip install 'flaxtransfer[hf]' ({error})"
        ) from error
    name, loaded = _load_hub(spec, cache_dir, download)
    if isinstance(loaded, IterableDataset | IterableDatasetDict):
        raise ValueError(f"{name} must have random access, got a stream")
    assert isinstance(loaded, Dataset | DatasetDict)
    parts = dict(loaded) if isinstance(loaded, DatasetDict) else {"": loaded}
    try:
        return _hub_source(name, parts, wanted, skip_corrupt, min_side, bands, partial, labeled)
    except (OSError, KeyError, TypeError) as error:
        raise _damaged(name, error) from error
    except ValueError as error:  # pyarrow's are among them
        if type(error).__module__.startswith("pyarrow"):
            raise _damaged(name, error) from error
        raise


def _damaged(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"{name} cannot be read ({type(error).__name__}: {_line(error)}); if it is damaged, delete "
        "it and make it again"
    )


def _line(error: Exception) -> str:
    return shortened(" ".join(str(error).split()), 200)


def _load_hub(spec: str, cache_dir: Any, download: bool) -> tuple[str, Any]:
    """The full name of a data set, with ``hf:`` before it, and what that library has of it."""
    folder = Path(spec).expanduser()
    pieces = [] if folder.is_dir() else spec.split(":")
    folder = Path(pieces[0]).expanduser() if pieces else folder
    asked = pieces[1:]
    if not spec or len(asked) > 2 or "" in asked or not (pieces or folder.is_dir()):
        raise ValueError(
            f"a Hugging Face name must be 'hf:<name or folder>[:config][:split]', got 'hf:{spec}'"
        )
    there = folder.is_dir()
    saved = there and any((folder / each).is_file() for each in _SAVED)
    base = str(folder.absolute()) if there else pieces[0]
    if not there and (base.startswith(("/", ".", "~")) or base.count("/") > 1):
        raise FileNotFoundError(f"hf:{spec}: there is no folder {folder}")
    configs = [] if saved else _configs(base, there, cache_dir, download)
    known = bool(asked) and asked[0] in configs
    if len(asked) == 2 and not known:
        there_are = (
            f"the configs {configs}{suggest(asked[0], configs)}" if configs else "no configs"
        )
        raise ValueError(f"hf:{base} has no config {asked[0]!r}; it has {there_are}")
    config = asked[0] if known else "default" if "default" in configs else None
    split = asked[1] if len(asked) == 2 else asked[0] if asked and not known else None
    if config is None and len(configs) > 1:
        got = "none" if split is None else repr(split)
        raise ValueError(
            f"hf:{base} must be given with one of its configs, {listing(configs)}, got {got}"
            f"{'' if split is None else suggest(split, configs)}; write 'hf:{base}:{configs[0]}'"
        )
    try:
        loaded = _loaded(base, config, there, saved, cache_dir, download)
    except Exception as error:  # Damaged files raise many types of error.
        raise _damaged(f"hf:{base}", error) from error
    name = ":".join(("hf", base, *asked))
    if split is None:
        return name, loaded
    splits = list(loaded) if hasattr(loaded, "items") else []
    if split not in splits:
        has = f"the splits {splits}{suggest(split, splits)}" if splits else "no splits"
        also = f", and the configs {configs}{suggest(split, configs)}" if configs else ""
        raise ValueError(f"hf:{base} has no split or config {split!r}; it has {has}{also}")
    return name, loaded[split]


def _configs(base: str, there: bool, cache_dir: Any, download: bool) -> list[str]:
    """The configs of a data set that was not saved to a folder.

    Raises:
        FileNotFoundError: it is not in the cache, and the Hub does not answer, or was not asked.
    """
    import datasets

    root = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser()
    if there or download:
        try:
            return list(datasets.get_dataset_config_names(base))
        except Exception as error:
            if there:
                raise _damaged(f"hf:{base}", error) from error
            failure = f"; the Hub gave none ({type(error).__name__}: {_line(error)})"
    else:
        failure = "; --download (download=True) asks the Hub for it"
    from datasets.naming import camelcase_to_snakecase

    *space, last = base.split("/")
    place = root / "___".join((*space, camelcase_to_snakecase(last)))
    found = {path.parts[-3] for path in place.glob("*/*/*") if path.is_dir()}
    if not found:
        near = [path.name.replace("___", "/") for path in root.glob("*") if path.is_dir()]
        raise FileNotFoundError(
            f"hf:{base} is neither a folder nor in the cache {root}{suggest(base, near)}{failure}"
        )
    return sorted(found)


def _loaded(
    base: str, config: str | None, there: bool, saved: bool, cache_dir: Any, download: bool
) -> Any:
    import datasets

    folder = None if cache_dir is None else os.fspath(cache_dir)
    if saved:
        return datasets.load_from_disk(base)
    if there or (download and not datasets.config.HF_HUB_OFFLINE):
        return datasets.load_dataset(base, config, cache_dir=folder)
    # What `load_dataset` takes when the Hub does not answer; this way it is not asked.
    from datasets.packaged_modules.cache import cache

    logging.getLogger(cache.__name__).setLevel(logging.ERROR)
    builder = cache.Cache(
        cache_dir=folder,
        repo_id=base,
        dataset_name=base.split("/")[-1],
        config_name=config,
        version="auto",
        hash="auto",
    )
    builder.download_and_prepare()
    return builder.as_dataset()


def _hub_source(
    name: str,
    parts: dict[str, Any],
    wanted: Columns,
    skip_corrupt: bool,
    min_side: int | None,
    bands: int,
    partial: bool,
    labeled: bool,
) -> HubSource:
    import datasets

    parts, part_of, notes = _known_parts(name, parts, wanted if labeled else Columns(split=NONE))
    whole = datasets.concatenate_datasets(list(parts.values()))
    whole = whole.with_format("arrow")
    if not len(whole):
        raise ValueError(f"{name} has no examples")
    kinds = dict(whole.features)
    if part_of is not None:
        wanted = replace(wanted, split=NONE)
    used = _hub_columns(name, kinds, wanted, labeled)
    data = whole.select_columns([used.pattern])
    for column in used.all:  # Offsets beyond the data would end the process when they are followed.
        whole.data.column(column).validate(full=True)
    problems: list[str] = []
    plain = {each for each in used.all[1:] if isinstance(kinds[each], datasets.Value)}
    cells = {each: texts(_column(whole, each)) for each in plain}
    several = len(used.label) > 1
    for each in used.label:
        if isinstance(kinds[each], datasets.ClassLabel) and (several or wanted.task):
            values = _column(whole, each).to_pylist()
            cells[each] = ["" if value in (None, -1) else str(value) for value in values]
    table = Table(Path(name), used, cells, range(len(whole)), "row")
    if not labeled:
        found = RowLabels(np.zeros(len(whole), np.int64), ("?",), "single_label",
                          np.ones(len(whole), bool), [])  # fmt: skip
    elif used.label[0] in cells:
        found = read_labels(table, wanted, problems)
    else:
        column = _column(whole, used.label[0])
        found = _declared(table, column, kinds[used.label[0]], wanted, problems)
    if part_of is None:
        part_of = parts_of(table, problems) if labeled else None
    groups = None if used.group is None else cells[used.group]
    if groups is not None and part_of is not None:
        problems += torn_groups(table, groups, part_of, found.keep)
    if problems:
        raise ValueError(f"{name}: {'; '.join(problems)}")
    source = HubSource(
        name=name,
        class_names=tuple(found.names),
        data=data,
        rows=np.flatnonzero(found.keep),
        targets=found.targets[found.keep],
        bands=bands,
        min_side=min_side,
        task=found.task,
    )
    broken = _broken(source) if skip_corrupt else {}
    kept = np.delete(source.rows, list(broken))
    if not len(kept):
        raise ValueError(f"{name}: no row is left of {len(whole)}")
    targets = found.targets[kept]
    absent = np.setdiff1d(np.arange(len(found.names)), targets)
    if found.task == "single_label" and labeled and len(absent):
        left = f"{name}: no image of {listing(repr(found.names[c]) for c in absent.tolist())}"
        if len(found.names) - len(absent) < 2 and not partial:
            raise ValueError(f"{left}; there must be images of at least 2 classes")
        notes.append(left)
    splits = None if part_of is None else splits_of(part_of[kept])
    if splits is not None:
        if found.task == "single_label":
            if not partial:
                check_trained(splits, targets, found.names, name)
            notes.extend(unseen(splits, targets, found.names))
        notes.append(f"{name} comes with a split: {part_counts(splits)} images")
    return replace(
        source,
        rows=kept,
        targets=targets,
        splits=splits,
        notes=(*used.notes(), *notes, *found.notes, *group_notes(used, groups)),
        skipped=tuple(broken.values()),
        group_of=None if groups is None else group_digests(groups, kept),
        opened=opened_with(used, wanted) if labeled else {},
    )


def _known_parts(
    name: str, parts: dict[str, Any], wanted: Columns
) -> tuple[dict[str, Any], np.ndarray | None, list[str]]:
    """The splits to read, the part of each row, as ``parts_of`` has them, and what is said."""
    together = f"its splits {listing(map(repr, parts))} are taken as one set"
    known = {each: part_named(each) for each in parts}
    if len(parts) < 2:
        return parts, None, []
    if wanted.split is not None or not any(known.values()):
        return parts, None, [together]
    others = [each for each, part in known.items() if part is None]
    notes = [f"left out: the split {each!r} ({len(parts[each])} rows)" for each in others]
    read = {each: part for each, part in parts.items() if known[each]}
    places = [("train", "val", "test").index(known[each] or "") for each in read]
    return read, np.repeat(places, [len(part) for part in read.values()]), notes


def _hub_columns(name: str, kinds: Mapping[str, Any], wanted: Columns, labeled: bool) -> Used:
    """The columns that are read."""
    from datasets import ClassLabel, Image, LargeList, List, Value

    columns = list(kinds)
    listed = listing((f"{each} ({_kind(kind)})" for each, kind in kinds.items()), most=12)
    pictures = [
        each for each in columns
        if isinstance(kinds[each], Image) or _kind(kinds[each]) in ("binary", "large_binary")
    ]  # fmt: skip
    image = wanted.image
    if image is None:
        image = pictures[0] if len(pictures) == 1 else guess("image", pictures)
        if image is None:
            what = "an image column" if not pictures else "one image column (--image-column)"
            raise ValueError(f"{name} must have {what}, got {listed}")
    elif image in columns and image not in pictures:
        raise ValueError(
            f"the image column of {name} must hold images or bytes, got {listed}; a table of paths "
            "is opened by csv: or parquet:"
        )
    label = wanted.label
    free = [each for each in columns if each != image]
    if labeled and not label and guess("label", free) is None:
        classes = [each for each in free if "ClassLabel" in _kind(kinds[each])]
        if len(classes) != 1:
            raise ValueError(
                f"which column of {name} holds the labels must be said (--label-column), got "
                f"{listed}"
            )
        label = (classes[0],)
    try:
        used = Used.of(columns, replace(wanted, image=image, label=label), labeled=labeled)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    many = isinstance(kinds[used.label[0]], List | LargeList) if used.label else False
    wrong = [
        each for each in used.all[1:]
        if not isinstance(kinds[each], Value)
        and not (each in used.label and isinstance(kinds[each], ClassLabel))
        and not (each in used.label and many and len(used.label) == 1)
    ]  # fmt: skip
    if wrong:
        raise ValueError(f"{name}: columns must be classes, texts or numbers, got {listed}")
    guessed = [] if wanted.image else [f"image {image!r}"]
    guessed += [f"label {label[0]!r}"] if label and not wanted.label else []
    return used._replace(guessed=(*guessed, *used.guessed))


def _kind(feature: Any) -> str:
    """What a column holds, in a word."""
    name = type(feature).__name__
    if name in ("List", "LargeList"):
        return f"list of {_kind(feature.feature)}"
    return str(feature.dtype) if name == "Value" else name


def _column(whole: Any, name: str) -> Any:
    return whole.select_columns([name])[:].column(0)


def _declared(
    table: Table, column: Any, kind: Any, wanted: Columns, problems: list[str]
) -> RowLabels:
    """Labels of a column of classes or of lists; -1 and null are no label."""
    from datasets import ClassLabel

    name, several = table.used.label[0], not isinstance(kind, ClassLabel)
    inner = kind.feature if several else kind
    names = tuple(inner.names or ()) if isinstance(inner, ClassLabel) else ()
    task = "multi_label" if several else "single_label"
    if several and (wanted.task or task) != task:
        raise ValueError(f"task must be {task} for lists of labels, got {wanted.task!r}")
    if not isinstance(inner, ClassLabel) and _kind(inner) not in _IN_LISTS:
        raise ValueError(
            f"labels in lists must be classes, texts, whole numbers, or 0 and 1 for each label, "
            f"got a {_kind(kind)}"
        )
    rows = column.to_pylist() if several else [[value] for value in column.to_pylist()]
    if not several:
        rows = [None if row[0] in (None, -1) else row for row in rows]
    if flags := not names and _are_flags(rows):
        names = tuple(map(str, range(len(rows[0]))))
        rows = [[place for place, value in enumerate(row) if value] for row in rows]
    elif not names:
        rows, names = _numbered(rows)
    count = len(names)
    if wrong := [i for i, row in enumerate(rows) if row and not 0 <= min(row) <= max(row) < count]:
        problems.append(
            f"labels must be 0 .. {count - 1}, got others in "
            + table.rows(wrong, lambda i: str(rows[i]))
        )
        rows = [None if row and not 0 <= min(row) <= max(row) < count else row for row in rows]
    if wanted.ignore in names:
        left = names.index(wanted.ignore)
        names = (*names[:left], *names[left + 1 :])
        rows = [None if row == [left] else row for row in rows]
        rows = [row and [each - (each > left) for each in row if each != left] for row in rows]
    keep = np.array([row is not None for row in rows])
    unlabeled = np.flatnonzero(~keep).tolist()
    notes: list[str] = []
    if unlabeled and wanted.ignore is None and not wrong:
        problems.append(
            f"{counted(unlabeled, 'row')} without a label: {table.rows(unlabeled)}; "
            "--ignore-label '' leaves them out"
        )
    elif wanted.ignore is not None:
        notes.append(f"{counted(unlabeled, 'row')} without a label left out")
    if not several:
        targets = np.array([row[0] if row else 0 for row in rows], np.int64)
        return RowLabels(targets, names, task, keep, notes)
    how = "0 or 1 for each" if flags else "any number"
    notes.append(f"the column {name!r} holds {how} of {len(names)} labels")
    targets = np.zeros((len(rows), len(names)), np.float32)
    for i, row in enumerate(rows):
        targets[i, row or []] = 1
    return RowLabels(targets, names, task, keep, notes)


def _are_flags(rows: list[Any]) -> bool:
    """Whether lists are a 0 or 1 for each label, and not the labels of a row."""
    lengths = {-1 if row is None else len(row) for row in rows}
    values = {value for row in rows for value in row or ()}
    return len(lengths) == 1 and min(lengths) > 1 and values <= {0, 1}


def _numbered(rows: list[Any]) -> tuple[list[Any], tuple[str, ...]]:
    """Lists of the places of labels, and their names in natural order."""
    values = {value for row in rows for value in row or ()}
    if odd := [value for value in values if not isinstance(value, str | int)]:
        raise ValueError(f"labels in lists must be classes, texts, whole numbers, or 0 and 1 for "
                         f"each label, got {odd[0]!r}")  # fmt: skip
    names = tuple(sorted({str(value) for value in values}, key=natural_key))
    place = {value: names.index(str(value)) for value in values}
    return [None if row is None else [place[value] for value in row] for row in rows], names


def _broken(source: HubSource) -> dict[int, str]:
    """The examples that cannot be decoded, each with the reason."""

    def reason(index: int) -> str | None:
        try:
            source.picture(index)
        except (ValueError, OSError) as error:
            return str(error)
        return None

    with ThreadPoolExecutor(4) as pool:
        reasons = enumerate(pool.map(reason, range(len(source))))
        return {index: text for index, text in reasons if text}
