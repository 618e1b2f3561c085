"""Train, validation and test splits, and the record of one that a run keeps.

A split is a pure function of the labels and a seed. ``subsample`` takes a fixed random sample of
positions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from flaxtransfer.data.source import Content, Source, contents
from flaxtransfer.paths import listing


class Splits(NamedTuple):
    """Positions in a source, int64, ascending; disjoint, and together all of them."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    rest: np.ndarray  # in none of the three; their labels are not used

    @classmethod
    def of(cls, train: Any, val: Any = (), test: Any = ()) -> Splits:
        """The split with these positions, however they were chosen; nothing is in ``rest``.

        >>> Splits.of([0, 1], [2]).val
        array([2])
        """
        train, val, test = (np.sort(np.asarray(part, np.int64)) for part in (train, val, test))
        return cls(train, val, test, np.empty(0, np.int64))


_PARTS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class Split:
    """The record of a split that a run keeps: which examples of which data are in which part.

    Examples are recorded by name where the source has names (the paths of a folder), so that they
    are found again when files were added, and else by position.

    Args:
        address: what ``open_source`` opens again, such as "folder:/data/scans"; "" for a source
            that a program made.
        examples: of the whole source.
        parts: for "train", "val" and "test", the names or the positions, in order.
        labels: for each part, the labels of its examples: numbers, or lists of them in which None
            is a missing one.
        class_names: what the labels 0, 1, ... mean, or a name for each number of a list.
        bands: channels that were read from image files; None where the source decides.
        contents: for each part, size and digest of its examples; empty where they were not read.
    """

    address: str
    examples: int
    parts: Mapping[str, Sequence[str] | Sequence[int]]
    labels: Mapping[str, Sequence[Any]]
    class_names: tuple[str, ...]
    bands: int | None = None
    contents: Mapping[str, Sequence[Content]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        source: Source,
        splits: Splits,
        *,
        read: bool = False,
        progress: Callable[[int], object] | None = None,
    ) -> Split:
        """The record of a split of this source.

        Args:
            source: the examples.
            splits: their positions.
            read: whether each example is read, so that a change of it is noticed.
            progress: called with the number of examples that were read so far.
        """
        names, labels = getattr(source, "files", None), source.labels()
        places = {part: getattr(splits, part) for part in _PARTS}
        parts: dict[str, Any] = {
            part: where.tolist() if names is None else [names[i] for i in where]
            for part, where in places.items()
        }
        found: dict[str, Sequence[Content]] = {}
        if read:
            every = iter(contents(source, np.concatenate(list(places.values())), progress))
            found = {part: [next(every) for _ in where] for part, where in places.items()}
        return cls(
            getattr(source, "address", ""),
            len(source),
            parts,
            {part: _plain(labels[where]) for part, where in places.items()},
            tuple(source.class_names),
            getattr(source, "bands", None),
            found,
        )

    def positions(self, source: Source) -> Splits:
        """Where the recorded examples lie in this source; all others are in ``rest``.

        Raises:
            ValueError: examples that are missing, or a source of another size whose examples have
                no names.
        """
        names = getattr(source, "files", None)
        by_name = any(isinstance(each, str) for part in _PARTS for each in self.parts[part])
        if by_name and names is not None:
            where = {name: i for i, name in enumerate(names)}
            missing = [str(n) for part in _PARTS for n in self.parts[part] if n not in where]
            if missing:
                raise ValueError(
                    f"{len(missing)} images of the run are missing from {self.address}: "
                    f"{self._now_called(missing, source)}; put them back, or give other data with "
                    "--data (a new run: another folder with --run)"
                )
            found = {part: [where[str(n)] for n in self.parts[part]] for part in _PARTS}
        elif by_name or len(source) != self.examples:
            raise ValueError(
                f"the data must be that of the run, {self.examples} examples of "
                f"{self.address or 'a source that a program made'}; got {len(source)} examples"
            )
        else:
            found = {part: [int(n) for n in self.parts[part]] for part in _PARTS}
        arrays = {part: np.asarray(found[part], np.int64) for part in _PARTS}
        used = np.concatenate(list(arrays.values()))
        return Splits(**arrays, rest=np.setdiff1d(np.arange(len(source), dtype=np.int64), used))

    def _now_called(self, missing: Sequence[str], source: Any) -> str:
        """The missing examples, and what those that lie there under new names are called now."""
        known = {name for part in _PARTS for name in self.parts[part]}
        new = [i for i, name in enumerate(source.files) if name not in known]
        if not self.contents or len(new) > _MOST_SEARCHED:
            return listing(missing, most=10)
        found = contents(source, new)
        now = {each.sha256: source.files[i] for i, each in zip(new, found, strict=True)}
        before = {
            str(name): each.sha256
            for part in _PARTS
            for name, each in zip(self.parts[part], self.contents[part], strict=True)
        }
        texts = (
            f"{name} (now {now[before[name]]})" if before[name] in now else name for name in missing
        )
        return listing(list(texts), most=10)

    def differences(self, now: Split) -> list[str]:
        """How a split of today differs from this record; one text for each kind, none if equal.

        Examples of the source that are in no part of either do not count.
        """
        if self.class_names != now.class_names:
            return [_class_differences(self.class_names, now.class_names)]
        before, after = self._by_name(), now._by_name()
        kinds: dict[str, list[str]] = {}

        def add(kind: str, name: str, detail: str = "") -> None:
            kinds.setdefault(kind, []).append(f"{name} ({detail})" if detail else name)

        for name, old in before.items():
            new = after.get(name)
            if new is None:
                add("no longer in the split", name, f"in {old.part}")
                continue
            if new.part != old.part:
                add("in another part", name, f"{old.part}, now {new.part}")
            if new.label != old.label:
                label, today = (_label_text(each.label, self.class_names) for each in (old, new))
                add("relabeled", name, f"{label}, now {today}")
            if None not in (old.content, new.content) and old.content != new.content:
                add("changed", name)
        for name, new in after.items():
            if name not in before:
                add("new in the split", name, f"in {new.part}")
        texts = [
            f"{len(names)} {'example is' if len(names) == 1 else 'examples are'} {kind}: "
            f"{listing(names, most=10)}"
            for kind, names in kinds.items()
        ]
        if not texts and any(list(self.parts[p]) != list(now.parts[p]) for p in _PARTS):
            texts = ["the examples are in another order"]
        return texts

    def _by_name(self) -> dict[str, _Recorded]:
        found = {}
        for part in _PARTS:
            unread: list[Content | None] = [None] * len(self.parts[part])
            read = self.contents.get(part) or unread
            for name, label, content in zip(self.parts[part], self.labels[part], read, strict=True):
                shown = name if isinstance(name, str) else f"example {name}"
                found[shown] = _Recorded(part, label, content)
        return found

    def identity(self) -> str:
        """SHA-256 of what is in which part, in order; the address and other examples are left out.

        Two runs with equal identities see the same examples, wherever they lie.
        """
        kept = {name: value for name, value in self.to_json().items() if name in _IDENTITY}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """What the run folder holds."""
        return {
            "data": self.address,
            "examples": self.examples,
            "bands": self.bands,
            "class_names": list(self.class_names),
            **{part: list(self.parts[part]) for part in _PARTS},
            "labels": {part: list(self.labels[part]) for part in _PARTS},
            "sizes": {part: [c.size for c in found] for part, found in self.contents.items()},
            "sha256": {part: [c.sha256 for c in found] for part, found in self.contents.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Split:
        """The split that ``to_json`` wrote."""
        return cls(
            str(value["data"]),
            int(value["examples"]),
            {part: tuple(value[part]) for part in _PARTS},
            {part: tuple(value["labels"][part]) for part in _PARTS},
            tuple(value["class_names"]),
            value["bands"],
            {
                part: [Content(*c) for c in zip(sizes, value["sha256"][part], strict=True)]
                for part, sizes in value["sizes"].items()
            },
        )


_IDENTITY = ("bands", "class_names", *_PARTS, "labels", "sizes", "sha256")

_MOST_SEARCHED = 10_000
"""New files that are read to find the missing ones among them: some seconds of reading."""


class _Recorded(NamedTuple):
    """One example of a record."""

    part: str
    label: Any
    content: Content | None


def _plain(labels: np.ndarray) -> list[Any]:
    """Labels as JSON has them, which knows no NaN."""
    if labels.ndim == 1:
        return list(labels.tolist())
    return [[None if value != value else value for value in row] for row in labels.tolist()]


def _label_text(label: Any, names: Sequence[str]) -> str:
    if not isinstance(label, Sequence):
        return str(names[label])
    pairs = zip(names, label, strict=True)
    return " ".join(f"{name}={'?' if value is None else f'{value:g}'}" for name, value in pairs)


def _class_differences(before: Sequence[str], after: Sequence[str]) -> str:
    if sorted(before) == sorted(after):
        return (
            f"the classes are in another order: {listing(before)} there and {listing(after)} here"
        )
    gone = [name for name in before if name not in after]
    new = [name for name in after if name not in before]
    texts = [f"the run has the classes {listing(gone)}, which the data lack"] if gone else []
    texts += [f"the data have the classes {listing(new)}, which the run lacks"] if new else []
    return " and ".join(texts)


def stratified_split(
    labels: np.ndarray | Sequence[int],
    *,
    labels_per_class: int | None = None,
    val_per_class: int | None = None,
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
) -> Splits:
    """Stratified train / validation / test split.

    Every class is shuffled by itself, in an order that depends on ``seed`` and the class alone.
    The first examples are the test part (if ``test_fraction`` is given); then come the examples
    that may be learned from, of which the last are for validation.

    With ``labels_per_class=n``, only n labels of each class are used: **validation comes out of
    those n** (``val_per_class`` of them, none by default), as for somebody who has only n labels.
    Without a ``test_fraction`` all other examples are the test set; with one, the test set is
    fixed first, and is therefore the same for every n, and what remains is ``rest``.

    For one seed (and one ``test_fraction``), the examples of a smaller n are among those of a
    larger n, and so are the training examples as long as ``n - val_per_class`` grows.

    Labels of several numbers per example have no classes: they are split at random, or, where there
    is one number, stratified by its deciles. Fractions alone can be given for them.

    Args:
        labels: integers ``[examples]``, 0 .. classes - 1; or floats ``[examples, outputs]``.
        labels_per_class: how many labels of each class may be used; all when left out.
        val_per_class: how many of those validate; they are not trained on.
        val_fraction: instead, without ``labels_per_class``: the fraction of what is left after the
            test part. Default 0.1 when neither this nor ``labels_per_class`` nor ``val_per_class``
            is given.
        test_fraction: fraction of each class, fixed first. Default: all the rest with
            ``labels_per_class``, else 0.2; 0.0 for no test set.
        seed: 0 or more.
        class_names: for error texts.

    Returns:
        The four parts. A fraction above 0 is at least one example per class.

    Raises:
        TypeError: labels are not integers.
        ValueError: numbers out of range, or a class that is too small for them; every such class is
            listed.

    >>> splits = stratified_split([0, 0, 0, 1, 1, 1], labels_per_class=2, val_per_class=1)
    >>> [len(part) for part in splits]
    [2, 2, 2, 0]
    """
    if np.ndim(labels) == 2 and np.asarray(labels).dtype.kind == "f":
        if labels_per_class is not None or val_per_class is not None:
            raise ValueError(
                "labels_per_class and val_per_class must be left out where an image has several "
                "labels or numbers, which are no classes; give val_fraction and test_fraction"
            )
        return _split_of_rows(np.asarray(labels), val_fraction, test_fraction, seed)
    targets = _checked_labels(labels)
    counts = np.bincount(targets)
    if class_names is not None:
        counts = np.bincount(targets, minlength=len(class_names))
    names = [str(c) for c in range(len(counts))] if class_names is None else list(class_names)
    _check_numbers(labels_per_class, val_per_class, val_fraction, test_fraction, seed)
    if len(counts) < 2:
        raise ValueError(f"there must be at least 2 classes, got only {names[0]!r}")
    if len(names) != len(counts):
        raise ValueError(
            f"class_names must have one name per class, got {len(names)} names and labels up to "
            f"{len(counts) - 1}"
        )
    if labels_per_class is None:
        test_fraction = 0.2 if test_fraction is None else test_fraction
        if val_per_class is None and val_fraction is None:
            val_fraction = 0.1

    parts: dict[str, list[np.ndarray]] = {name: [] for name in Splits._fields}
    problems = []
    for label, count in enumerate(counts.tolist()):
        tested = _count(test_fraction or 0.0, count)
        pool = count - tested
        used = pool if labels_per_class is None else labels_per_class
        val = _count(val_fraction, pool) if val_fraction is not None else val_per_class or 0
        problem = _class_problem(count, tested, used, val, rest_is_test=test_fraction is None)
        if problem:
            problems.append(f"class {names[label]!r} {problem}")
            continue
        order = _order(np.flatnonzero(targets == label), seed, label)
        test, order = order[:tested], order[tested:]
        chosen, rest = order[:used], order[used:]
        if test_fraction is None:
            test, rest = rest, rest[:0]
        for name, part in zip(
            Splits._fields, (chosen[: used - val], chosen[used - val :], test, rest), strict=True
        ):
            parts[name].append(part)
    if problems:
        raise ValueError("invalid split: " + "; ".join(problems))
    return Splits(**{name: np.sort(np.concatenate(found)) for name, found in parts.items()})


def _split_of_rows(
    labels: np.ndarray, val_fraction: float | None, test_fraction: float | None, seed: int
) -> Splits:
    """The split of examples with several numbers each; deciles of a single one are its strata."""
    test = 0.2 if test_fraction is None else test_fraction
    val = 0.1 if val_fraction is None else val_fraction
    _check_numbers(None, None, val, test, seed)
    strata = np.zeros(len(labels), np.int64)
    if labels.shape[1] == 1:
        # Ties have one rank, so that two values alone (one binary label) are two strata.
        values = np.nan_to_num(labels[:, 0].astype(np.float64), nan=-np.inf)
        _, rank, counts = np.unique(values, return_inverse=True, return_counts=True)
        strata = (10 * (np.cumsum(counts) - counts)[rank]) // len(labels)
    parts: dict[str, list[np.ndarray]] = {"train": [], "val": [], "test": []}
    for stratum in np.unique(strata):
        order = _order(np.flatnonzero(strata == stratum), seed, int(stratum))
        tested = _count(test, len(order)) if len(order) > 1 else 0
        held = _count(val, len(order) - tested) if len(order) - tested > 1 else 0
        parts["test"].append(order[:tested])
        parts["val"].append(order[tested : tested + held])
        parts["train"].append(order[tested + held :])
    return Splits.of(*(np.concatenate(parts[name]) for name in ("train", "val", "test")))


def subsample(positions: np.ndarray, most: int, labels: np.ndarray | None = None) -> np.ndarray:
    """A random sample of positions without replacement, in order, the same every time.

    Args:
        positions: int64, in a source.
        most: size of the sample.
        labels: of the whole source. With them, one example of every class is in the sample, even
            if that makes more than ``most``: a head cannot be fitted without.

    Returns:
        int64, at most ``most`` of the positions; all of them if there are no more.

    >>> subsample(np.arange(5), 9).tolist(), len(subsample(np.arange(9), 5))
    ([0, 1, 2, 3, 4], 5)
    >>> labels = np.array([0, 0, 0, 0, 1, 0, 0, 0, 0])
    >>> 4 in subsample(np.arange(9), 2, labels), len(subsample(np.arange(9), 2, labels))
    (True, 2)
    """
    if len(positions) <= most:
        return positions
    keys = np.random.PCG64(np.random.SeedSequence(0)).random_raw(len(positions))
    order = np.argsort(keys, kind="stable")
    if labels is not None and np.ndim(labels) == 1:
        _, firsts = np.unique(np.asarray(labels)[positions][order], return_index=True)
        order = np.concatenate([order[firsts], np.delete(order, firsts)])
        most = max(most, len(firsts))
    return positions[np.sort(order[:most])]


def _order(members: np.ndarray, seed: int, label: int) -> np.ndarray:
    # Raw generator output, unlike ``permutation``, is the same in every release of NumPy.
    keys = np.random.PCG64(np.random.SeedSequence([seed, label])).random_raw(len(members))
    return members[np.argsort(keys, kind="stable")].astype(np.int64)


def _count(fraction: float, count: int) -> int:
    return max(1, round(fraction * count)) if fraction > 0 and count else 0


def _class_problem(count: int, tested: int, used: int, val: int, *, rest_is_test: bool) -> str:
    if count == 0:
        return "has no examples"
    needs = max(used, val + 1)
    if count - tested < needs:
        after, of = (f" after {tested} for testing", f" of {count}") if tested else ("", "")
        return f"must have {needs} examples{after}, got {count - tested}{of}"
    if rest_is_test and count == used:
        return (
            f"has {count} examples, all of which would be used, so that none is left to test on; "
            "test_fraction=0.0 makes no test set"
        )
    return ""


def _checked_labels(labels: np.ndarray | Sequence[int]) -> np.ndarray:
    targets = np.asarray(labels)
    if targets.ndim != 1 or not len(targets):
        raise ValueError(f"labels must have shape [examples], one or more, got {targets.shape}")
    if not np.issubdtype(targets.dtype, np.integer):
        raise TypeError(f"labels must be integers, got {targets.dtype}")
    if targets.min() < 0:
        raise ValueError(f"labels must be >= 0, got {targets.min()}")
    return targets


def _check_numbers(
    labels_per_class: int | None,
    val_per_class: int | None,
    val_fraction: float | None,
    test_fraction: float | None,
    seed: int,
) -> None:
    problems = []
    if labels_per_class is not None and labels_per_class < 1:
        problems.append(f"labels_per_class must be >= 1, got {labels_per_class}")
    if val_per_class is not None and val_per_class < 0:
        problems.append(f"val_per_class must be >= 0, got {val_per_class}")
    elif (
        val_per_class is not None
        and labels_per_class is not None
        and val_per_class >= max(labels_per_class, 1)
    ):
        problems.append(
            f"val_per_class must be < labels_per_class ({labels_per_class}), got {val_per_class}, "
            "which leaves none to train on"
        )
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if value is not None and not 0 <= value < 1:
            problems.append(f"{name} must be >= 0 and < 1, got {value}")
    if val_fraction is not None:
        if val_per_class is not None:
            problems.append("val_fraction and val_per_class are both given; give one")
        elif labels_per_class is not None:
            problems.append(
                "val_fraction cannot be combined with labels_per_class, whose validation examples "
                "come out of those labels; give val_per_class"
            )
    if seed < 0:
        problems.append(f"seed must be >= 0, got {seed}")
    if problems:
        raise ValueError("; ".join(problems))
