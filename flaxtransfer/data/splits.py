"""Train, validation and test splits, folds, and the record of a split that a run keeps.

A split is a pure function of the labels, their groups and a seed. ``subsample`` takes a fixed
random sample of positions.
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

    Examples are recorded by name where the source has names (the paths of a folder or a manifest),
    so that they are found again when files were added, and else by position. Groups are recorded by
    number, in the order in which they come up: which examples belong together is all that a run has
    to know, and the number of a patient may be as personal as a name, under a digest too.

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
        groups: for each part, the number of each example's group; empty where there are none.
        opened: the keyword arguments of ``open_source`` that name columns of a manifest.
    """

    address: str
    examples: int
    parts: Mapping[str, Sequence[str] | Sequence[int]]
    labels: Mapping[str, Sequence[Any]]
    class_names: tuple[str, ...]
    bands: int | None = None
    contents: Mapping[str, Sequence[Content]] = field(default_factory=dict)
    groups: Mapping[str, Sequence[int]] = field(default_factory=dict)
    opened: Mapping[str, Any] = field(default_factory=dict)

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
        groups, numbers = groups_of(source), {}
        if groups is not None:
            used = [groups[i] for where in places.values() for i in where.tolist()]
            each = iter(unit_numbers(used, len(used)).tolist())
            numbers = {part: [next(each) for _ in where] for part, where in places.items()}
        return cls(
            getattr(source, "address", ""),
            len(source),
            parts,
            {part: _plain(labels[where]) for part, where in places.items()},
            tuple(source.class_names),
            getattr(source, "bands", None),
            found,
            numbers,
            dict(getattr(source, "opened", {})),
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
        elif not texts and self.groups != now.groups:
            texts = ["the examples are in other groups"]
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
            "groups": {part: list(found) for part, found in self.groups.items()},
            "opened": dict(self.opened),
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
            dict(value["groups"]),
            dict(value["opened"]),
        )


_IDENTITY = ("bands", "class_names", *_PARTS, "labels", "sizes", "sha256", "groups")

_MOST_SEARCHED = 10_000
"""New files that are read to find the missing ones among them: some seconds of reading."""


class _Recorded(NamedTuple):
    """One example of a record."""

    part: str
    label: Any
    content: Content | None


def groups_of(source: Source) -> Sequence[str] | None:
    """The group of each example, from the source's own ``groups()``.

    None where it has none, or every example is one by itself.
    """
    groups = getattr(source, "groups", None)
    found: Sequence[str] | None = None if groups is None else groups()
    return None if found is None or len(set(found)) == len(found) else found


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
    labels: np.ndarray | Sequence[Any],
    *,
    labels_per_class: int | None = None,
    val_per_class: int | None = None,
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    groups: Sequence[Any] | np.ndarray | None = None,
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

    With ``groups`` (patients, scenes, sites), no group is in two parts. The parts then have about
    their shares of the examples and of each class: as closely as whole groups allow, found by
    allotting the largest groups first and moving them while that helps. Labels of several outputs
    are split alike, by positives and negatives of each label, or by the quantiles of each value.

    Args:
        labels: integers ``[examples]``, 0 .. classes - 1; or floats ``[examples, outputs]``, where
            NaN is missing: 0 and 1 are labels that an example has or lacks, others are values.
        labels_per_class: how many labels of each class may be used; all when left out.
        val_per_class: how many of those validate; they are not trained on.
        val_fraction: instead, without ``labels_per_class``: the fraction of what is left after the
            test part. Default 0.1 when neither this nor ``labels_per_class`` nor ``val_per_class``
            is given.
        test_fraction: fraction of each class, fixed first. Default: all the rest with
            ``labels_per_class``, else 0.2; 0.0 for no test set.
        groups: ``[examples]``, what each example belongs to; equal values are one group.
        seed: 0 or more.
        class_names: for error texts.

    Returns:
        The four parts. A fraction above 0 is at least one example per class.

    Raises:
        TypeError: labels are not integers.
        ValueError: numbers out of range, or a class that is too small, or in too few groups, for
            them; every such class is listed.

    References:
        K. Sechidis et al., "On the Stratification of Multi-label Data", 2011.

    >>> splits = stratified_split([0, 0, 0, 1, 1, 1], labels_per_class=2, val_per_class=1)
    >>> [len(part) for part in splits]
    [2, 2, 2, 0]
    >>> patients = ["a", "a", "b", "b", "c", "c"]
    >>> splits = stratified_split(
    ...     [0, 1, 0, 1, 0, 1], groups=patients, val_fraction=0.5, test_fraction=0.33
    ... )
    >>> [sorted({patients[i] for i in part}) for part in splits[:3]]
    [['c'], ['b'], ['a']]
    """
    if groups is not None or _has_outputs(labels):
        if labels_per_class is not None or val_per_class is not None:
            raise ValueError(
                "labels_per_class and val_per_class must be left out where an image has several "
                "labels or numbers, or a group; give val_fraction and test_fraction"
            )
        _check_numbers(None, None, val_fraction, test_fraction, seed)
        tested = 0.2 if test_fraction is None else test_fraction
        validated = (0.1 if val_fraction is None else val_fraction) * (1 - tested)
        shares = np.array([1 - tested - validated, validated, tested])
        return _allotted_split(labels, groups, shares, seed, class_names)
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


def stratified_folds(
    labels: np.ndarray | Sequence[Any],
    folds: int,
    *,
    groups: Sequence[Any] | np.ndarray | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
) -> tuple[Splits, ...]:
    """The splits of a cross-validation: every example is tested in exactly one of them.

    Without groups, the number of examples of a class differs by at most one between the test
    parts, and so does the number of all examples. With groups, see ``stratified_split``.

    Args:
        labels: as for ``stratified_split``.
        folds: how many, 2 or more.
        groups: ``[examples]``; no group is in two parts of a split.
        val_fraction: of the examples that a fold does not test.
        seed: 0 or more.
        class_names: for error texts.

    Returns:
        One split per fold; nothing is in ``rest``. Each class is among its training examples.

    Raises:
        TypeError: labels are neither integers nor floats ``[examples, outputs]``.
        ValueError: numbers out of range; fewer groups or examples than folds; a class in one group,
            or of one example, which could not be both trained on and tested.

    >>> splits = stratified_folds([0, 0, 0, 1, 1, 1], 3, val_fraction=0.0)
    >>> [len(split.test) for split in splits]
    [2, 2, 2]
    >>> sorted(np.concatenate([split.test for split in splits]).tolist())
    [0, 1, 2, 3, 4, 5]
    """
    _check_numbers(None, None, val_fraction, None, seed)
    if folds < 2:
        raise ValueError(f"folds must be >= 2, got {folds}")
    strata, targets = strata_of(labels)
    units = unit_numbers(groups, len(strata))
    count, what = int(units.max()) + 1, "examples" if groups is None else "groups"
    if count < folds:
        raise ValueError(f"{folds} folds need at least {folds} {what}, got {count}")
    _check_spread(targets, units, 2, what, class_names)
    classes = targets if groups is None else None
    if classes is not None:
        fold_of = _dealt(classes, folds, seed)
    else:
        fold_of = allot(strata, np.full(folds, 1 / folds), units, seed)[units]
    shares = np.array([share for share in (1 - val_fraction, val_fraction) if share])
    found = []
    for fold in range(folds):
        others = np.flatnonzero(fold_of != fold)
        if classes is not None:
            validates = _last_of_each(classes[others], val_fraction, seed)
        else:
            inner = unit_numbers(units[others], len(others))
            validates = allot(strata[others], shares, inner, seed)[inner] == 1
            if targets is not None:
                _keep_classes(validates, targets[others], inner)
        tested = np.flatnonzero(fold_of == fold)
        split = Splits.of(others[~validates], others[validates], tested)
        _check_trained(split.train, targets, class_names)
        found.append(split)
    return tuple(found)


def _allotted_split(
    labels: Any,
    groups: Any,
    shares: np.ndarray,
    seed: int,
    class_names: Sequence[str] | None,
) -> Splits:
    """A split by whole groups, with these shares of train, validation and test."""
    strata, targets = strata_of(labels)
    units = unit_numbers(groups, len(strata))
    parts, what = np.flatnonzero(shares > 0), "examples" if groups is None else "groups"
    count = int(units.max()) + 1
    if count < len(parts):
        raise ValueError(f"a split of {len(parts)} parts needs as many {what}, got {count}")
    _check_spread(targets, units, len(parts), what, class_names)
    chosen = parts[allot(strata, shares[parts], units, seed)]
    classes = np.zeros(len(units), np.int64) if targets is None else targets
    for part in parts[parts > 0].tolist():
        _fill(part, chosen, classes, units)
    split = Splits.of(*(np.flatnonzero(chosen[units] == part) for part in range(3)))
    _check_trained(split.train, targets, class_names)
    return split


def _fill(part: int, chosen: np.ndarray, classes: np.ndarray, units: np.ndarray) -> None:
    """Moves the smallest units that can be spared from training into a part that lacks a class."""
    count = len(chosen)
    has = np.zeros((count, int(classes.max()) + 1), bool)
    has[units, classes] = True
    sizes = np.bincount(units, minlength=count)
    for each in np.unique(classes).tolist():
        if has[chosen == part, each].any():
            continue
        left = has[chosen == 0].sum(axis=0)
        spared = (chosen == 0) & has[:, each] & (left - has >= np.minimum(left, 1)).all(axis=1)
        if spared.any():
            chosen[np.flatnonzero(spared)[np.argmin(sizes[spared])]] = part


def _has_outputs(labels: Any) -> bool:
    """Whether each example has a value per output, instead of one class."""
    found = np.asarray(labels)
    return found.ndim == 2 and found.dtype.kind == "f" and found.size > 0


_BINS = 10
"""Of a value, by its quantiles, so that parts have alike distributions of it."""


def strata_of(labels: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """What parts should have alike, ``[examples, strata]``, and the classes of single labels."""
    if not _has_outputs(labels):
        targets = _checked_labels(labels)
        return (targets[:, None] == np.unique(targets)).astype(np.float64), targets
    columns = []
    for values in np.asarray(labels, np.float64).T:
        known = values[~np.isnan(values)]
        edges: Any = [0.5]
        if not np.isin(known, (0, 1)).all():
            edges = np.unique(np.quantile(known, np.arange(1, _BINS) / _BINS))
        bins = np.where(np.isnan(values), -1, np.searchsorted(edges, values))
        columns += [bins == each for each in range(-1, len(edges) + 1)]
    strata = np.stack(columns, axis=1).astype(np.float64)
    return strata[:, strata.any(axis=0)], None


def unit_numbers(groups: Any, count: int) -> np.ndarray:
    """The number of each example's group; of itself without groups."""
    if groups is None:
        return np.arange(count)
    if len(groups) != count:
        raise ValueError(f"groups must have one value per example, {count}, got {len(groups)}")
    places: dict[Any, int] = {}
    return np.array([places.setdefault(each, len(places)) for each in groups], np.int64)


_MOST_TO_MOVE = 5000
"""Groups that are moved once all are allotted; with more, there are small ones that fill gaps."""

_PASSES = 10


def allot(strata: np.ndarray, shares: np.ndarray, units: np.ndarray, seed: int) -> np.ndarray:
    """The part of each unit, with nearly these shares of the examples and of each stratum.

    What is made small is the sum of ``(share found - share wanted)**2 / share wanted`` over parts,
    strata and the number of examples. The units that are most of a stratum are allotted first.
    """
    count = int(units.max()) + 1
    sums = np.zeros((count, strata.shape[1] + 1))
    np.add.at(sums, units, np.concatenate([np.ones((len(strata), 1)), strata], axis=1))
    # A part of all examples may lack a stratum.
    weights = sums / np.maximum(sums.sum(axis=0), 1)
    keys = np.random.PCG64(np.random.SeedSequence([seed, count])).random_raw(count)
    order = np.argsort(keys, kind="stable")
    order = order[np.argsort(-weights[order].max(axis=1), kind="stable")]
    # Distance to what is wanted, of each part and stratum; and the part of each unit.
    gap = np.repeat(-shares[:, None], weights.shape[1], axis=1)
    chosen = np.full(count, -1)
    for repeat in range(1 + _PASSES * (count <= _MOST_TO_MOVE)):
        moved = False
        for unit in order:
            weight, before = weights[unit], chosen[unit]
            if before >= 0:
                gap[before] -= weight
            cost = ((2 * gap + weight) @ weight) / shares
            # Only what surely is better, so that rounding moves nothing for ever.
            best = int(np.argmin(cost))
            if before >= 0 and cost[best] >= cost[before] - 1e-12:
                best = before
            gap[best] += weight
            moved |= best != before
            chosen[unit] = best
        if repeat and not moved:
            break
    return chosen


def _keep_classes(validates: np.ndarray, targets: np.ndarray, units: np.ndarray) -> None:
    """Brings classes that only validate back to training, with their groups."""
    for each in np.setdiff1d(targets[validates], targets[~validates]):
        validates[np.isin(units, units[targets == each])] = False


def _dealt(targets: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold of each example: the examples of a class in turn, and the classes on end."""
    order = np.concatenate(
        [_order(np.flatnonzero(targets == c), seed, c) for c in np.unique(targets).tolist()]
    )
    found = np.empty(len(order), np.int64)
    found[order] = np.arange(len(order)) % folds
    return found


def _last_of_each(targets: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Whether an example validates: this fraction of each class, but never all of it."""
    found = np.zeros(len(targets), bool)
    for label in np.unique(targets).tolist():
        order = _order(np.flatnonzero(targets == label), seed, label)
        count = min(_count(fraction, len(order)), len(order) - 1)
        found[order[len(order) - count :]] = True
    return found


def _check_spread(
    targets: np.ndarray | None,
    units: np.ndarray,
    least: int,
    what: str,
    class_names: Sequence[str] | None,
) -> None:
    """Refuses classes in too few groups."""
    if targets is None:
        return
    names = _names_for(targets, class_names)
    if targets.max() >= len(names):
        raise ValueError(
            f"class_names must have one name per class, got {len(names)} names and labels up to "
            f"{targets.max()}"
        )
    if len(names) < 2:
        raise ValueError(f"there must be at least 2 classes, got only {names[0]!r}")
    pairs = np.unique(np.stack([targets, units], axis=1), axis=0)
    counts = np.bincount(pairs[:, 0], minlength=len(names))
    few = [f"{name!r} ({n})" for name, n in zip(names, counts, strict=True) if n < least]
    if few:
        raise ValueError(
            f"each class must be in at least {least} {what}, one per part, got {listing(few)}"
        )


def _check_trained(
    train: np.ndarray, targets: np.ndarray | None, class_names: Sequence[str] | None
) -> None:
    if targets is None:
        return
    names = _names_for(targets, class_names)
    if lost := np.setdiff1d(targets, targets[train]).tolist():
        raise ValueError(
            f"no split by whole groups trains on class {listing(repr(names[c]) for c in lost)}: it "
            "lies in groups that are tested; give another seed or fewer parts"
        )


def _names_for(targets: np.ndarray, class_names: Sequence[str] | None) -> Sequence[str]:
    return (
        class_names
        if class_names is not None
        else [str(label) for label in range(int(targets.max()) + 1)]
    )


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
    check_classes(targets, None)
    return targets


def check_classes(
    labels: np.ndarray, classes: int | None, names: Sequence[str] | None = None
) -> None:
    """Refuses labels that no class can have, by example.

    Args:
        labels: integers ``[examples]``.
        classes: how many there are; None for any number.
        names: of the examples, by default their positions.

    Raises:
        ValueError: see above; such labels often mean that there is none.

    >>> check_classes(np.array([0, -1, 1]), 2)
    Traceback (most recent call last):
    ...
    ValueError: labels must be 0 .. 1, got -1 for example 1; leave out examples without a label
    """
    wrong = np.flatnonzero((labels < 0) | (labels >= (np.inf if classes is None else classes)))
    if len(wrong):
        limit = ">= 0" if classes is None else f"0 .. {classes - 1}"
        each = (f"{labels[i]} for {names[i] if names else f'example {i}'}" for i in wrong.tolist())
        raise ValueError(
            f"labels must be {limit}, got {listing(each, most=10)}; leave out examples without a "
            "label"
        )


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
