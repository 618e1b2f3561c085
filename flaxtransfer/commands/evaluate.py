"""``flaxtransfer evaluate``: accuracy of a finished run on its test images, or on others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
from rich.console import Console

from flaxtransfer.commands.job import run_bands, run_data, trained_network
from flaxtransfer.commands.subcommands import Evaluate
from flaxtransfer.data.loader import eval_batches
from flaxtransfer.data.open import open_source
from flaxtransfer.data.source import Example, Source
from flaxtransfer.paths import listing, suggest
from flaxtransfer.training.evaluation import evaluate as measure
from flaxtransfer.training.run_folder import split_of


def evaluate(options: Evaluate, console: Console) -> None:
    """Runs ``flaxtransfer evaluate``."""
    network, reading = trained_network(options.run), options.reading
    if options.data is None:
        source, splits = run_data(options.run, skip_corrupt=reading.skip_corrupt)
        name, chosen = split_of(options.run).address, splits.test
        if not len(chosen):
            raise ValueError(
                f"the run in {options.run} has no test images; give others with --data"
            )
    else:
        name = options.data
        bands = run_bands(options.run, network)
        source = open_source(name, skip_corrupt=reading.skip_corrupt, bands=bands, partial=True)
        chosen = np.arange(len(source))
    trained = network.class_names or tuple(map(str, range(network.model.config.classes)))
    matched = match_classes(source, trained)
    labels = matched.labels()[chosen]
    found: dict[str, Any] = {"data": name}
    if (labels < 0).any():
        counts = np.bincount(source.labels()[chosen][labels < 0])
        unknown = {source.class_names[i]: int(counts[i]) for i in np.flatnonzero(counts)}
        if not options.skip_unknown_classes:
            raise ValueError(_unknown_text(name, unknown, trained))
        chosen, labels = chosen[labels >= 0], labels[labels >= 0]
        if not len(chosen):
            raise ValueError(f"{_unknown_text(name, unknown, trained)}; nothing is left")
        found["classes_left_out"] = unknown
    if unseen := [each for label, each in enumerate(trained) if label not in labels]:
        found["classes_not_seen"] = unseen
    batches = eval_batches(matched, chosen, network.preprocessing, batch_size=reading.batch_size)
    found |= measure(network, batches).to_json()
    # In ASCII: the name of a folder may be bytes that are not UTF-8.
    console.print_json(json.dumps(found), ensure_ascii=True)


@dataclass(frozen=True)
class MatchedSource:
    """A source with the labels of a network; made by ``match_classes``."""

    source: Source
    class_names: tuple[str, ...]
    table: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        example = self.source[index]
        return {"image": example["image"], "label": int(self.table[example["label"]])}

    def labels(self) -> np.ndarray:
        """All labels, int64 ``[examples]``; -1 where the network lacks the class."""
        return np.asarray(self.table[self.source.labels()])


def match_classes(source: Source, trained: Sequence[str]) -> MatchedSource:
    """The source with its labels matched to a network's by the names of the classes.

    The order, the number and the position of the classes do not matter.

    Args:
        source: labeled images.
        trained: classes of the network, in its order.

    >>> from flaxtransfer.data.source import ArraySource
    >>> source = ArraySource(np.zeros((3, 4, 4), np.uint8), [0, 1, 2], ("cat", "newt", "dog"))
    >>> match_classes(source, ("dog", "cat", "owl")).labels()
    array([ 1, -1,  0])
    """
    place = {name: label for label, name in enumerate(trained)}
    table = np.array([place.get(name, -1) for name in source.class_names], np.int64)
    return MatchedSource(source, tuple(trained), table)


def _unknown_text(name: str, unknown: dict[str, int], trained: Sequence[str]) -> str:
    named = (f"{each!r} ({n} images){suggest(each, trained)}" for each, n in unknown.items())
    return (
        f"{name} must have classes of the run ({listing(map(repr, trained), most=10)}), got "
        f"{listing(named)}; rename the folders, or leave them out with --skip-unknown-classes"
    )
