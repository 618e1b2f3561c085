"""A feed of activations: the frozen prefix is run once, and training reads what came out of it."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flaxtransfer.features import store
from flaxtransfer.features.cut import prefix_digest
from flaxtransfer.models import Model
from flaxtransfer.sharding import place_batch, place_replicated
from flaxtransfer.training.caching import Choice, bytes_text
from flaxtransfer.training.feed import Batch, Examples, Feed
from flaxtransfer.training.step import forward
from flaxtransfer.types import Variables

__all__ = ["Cached", "cached_feed"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Cached:
    """What was kept.

    Args:
      feed: batches of activations, with ``start`` set.
      text: what it took, for a person.
      facts: the same as numbers, for the metrics.
    """

    feed: Feed
    text: str
    facts: Mapping[str, Any]


def cached_feed(
    choice: Choice,
    model: Model,
    variables: Variables,
    feed: Feed,
    mesh: Mesh,
    folder: Path,
    say: Say = lambda text: None,
) -> Cached | None:
    """Runs the prefix over all examples, or finds what an earlier run has kept.

    Args:
      choice: with a cut.
      model: the network.
      variables: as they are when the phase begins.
      feed: of images, with ``examples``.
      mesh: devices.
      folder: for arrays on disk.
      say: called with what a person should know before the long part begins.

    Returns:
      The feed, or None where the disk would not take it; ``say`` is told.

    Raises:
      ValueError: activations that are not finite.
    """
    examples = feed.examples
    assert examples is not None
    assert choice.cut is not None
    job = _Job(choice, choice.cut, model, variables, feed, examples, mesh, folder, say)
    began = time.monotonic()
    try:
        training, validation = job.parts()
    except store.OutOfRange as problem:
        wider = replace(choice, dtype="float32", nbytes=2 * choice.nbytes)
        if wider.nbytes > choice.budget:
            say(f"activations before {choice.cut} are not cached: {problem}, and float32 needs "
                f"{bytes_text(wider.nbytes)}")  # fmt: skip
            return None
        say(f"activations before {choice.cut} are kept as float32 instead: {problem}")
        return cached_feed(wider, model, variables, feed, mesh, folder, say)
    except OSError as error:
        say(
            f"activations before {choice.cut} could not be kept in {folder} "
            f"({error.strerror or error}); training goes on without a cache"
        )
        return None
    nbytes = training.nbytes + validation.nbytes
    facts = {
        "cut": choice.cut,
        "where": choice.where,
        "dtype": choice.dtype,
        "images": len(examples.labels),
        "versions": choice.views,
        "bytes": nbytes,
        "seconds": round(time.monotonic() - began, 2),
        "found": job.found,
    }
    text = (
        f"cache before {choice.cut}: {len(training) + len(validation):,} activations, "
        f"{bytes_text(nbytes)} as {choice.dtype} {choice.place}, "
        f"{'found' if job.found == job.wanted else 'made'} in {facts['seconds']:.1f} s"
    )
    return Cached(_feed(choice, feed, examples, training, validation), text, facts)


@dataclass
class _Job:
    choice: Choice
    cut: str
    model: Model
    variables: Variables
    feed: Feed
    examples: Examples
    mesh: Mesh
    folder: Path
    say: Say
    wanted: int = 2
    found: int = 0

    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """The activations of training, [versions * examples, ...], and of validation."""
        of_training: Mapping[str, str] = {}
        of_validation: Mapping[str, str] = {}
        if self.choice.where == "disk":
            of_training, of_validation = self.examples.fingerprint()
        count, views = len(self.examples.labels), self.choice.views
        versions = (self.examples.view(k) for k in range(views))
        made = self._one(
            views * count, itertools.chain.from_iterable(versions),
            {**of_training, "versions": str(views)}, predict=True,
        )  # fmt: skip
        held_out = len(self.examples.validation_labels)
        if not held_out or self.feed.validation is None:
            self.wanted = 1
            return made, np.empty((0, *self.choice.shape), self.choice.dtype)
        return made, self._one(held_out, self.feed.validation(), of_validation)

    def _one(
        self, rows: int, batches: Iterable[Batch], images: Mapping[str, str], predict: bool = False
    ) -> np.ndarray:
        shape, dtype = (rows, *self.choice.shape), self.choice.dtype
        parts = self._activations(batches, rows if predict else 0)
        if self.choice.where == "memory":
            return store.keep(shape, dtype, parts)
        fingerprint = {**images, **self._network()}
        values, why = store.find(self.folder, fingerprint, shape, dtype)
        if values is not None:
            self.found += 1
            return values
        if why:
            self.say(f"cache before {self.cut}: {why}")
        wanted = math.prod(shape) * np.dtype(dtype).itemsize
        if removed := store.make_room(self.folder, wanted, self.choice.budget):
            self.say(f"{len(removed)} older caches in {self.folder} made room")
        return store.write(self.folder, fingerprint, shape, dtype, parts)

    def _network(self) -> dict[str, str]:
        segments = self.model.segments
        cut = segments.index(self.cut)
        return {
            "weights": prefix_digest(self.variables, segments[:cut]),
            "network": f"{self.model!r} up to {self.cut}, BatchNorm running",
            "preprocessing": repr(self.feed.preprocessing),
            "storage": self.choice.dtype,
            "software": f"jax {jax.__version__} on {self.mesh.devices.flat[0].device_kind}",
        }

    def _activations(self, batches: Iterable[Batch], predict: int) -> Iterator[np.ndarray]:
        """One batch is computed while the one before it is fetched."""
        run = forward(self.model, self.feed.preprocessing, None, self.cut)
        placed = place_replicated(self.variables, self.mesh)
        waiting: tuple[jax.Array, np.ndarray] | None = None
        began = 0.0
        for number, batch in enumerate(batches):
            images = place_batch(batch["image"], self.mesh)
            weight = np.asarray(batch.get("weight", np.ones(len(batch["image"]))))
            output = run(placed, images)
            if predict and number <= 1:
                # The first batch waits for the compiler, the second is timed.
                jax.block_until_ready(output)
                if number == 1:
                    seconds = time.perf_counter() - began
                    self._predict(seconds * predict / len(weight))
                began = time.perf_counter()
            if waiting is not None:
                yield _kept(*waiting)
            waiting = output, weight
        if waiting is not None:
            yield _kept(*waiting)

    def _predict(self, seconds: float) -> None:
        spared = seconds * (self.choice.passes / self.choice.views - 1)
        self.say(f"cache before {self.cut}: takes about {seconds:.2g} s, spares {spared:.2g} s")


def _kept(output: jax.Array, weight: np.ndarray) -> np.ndarray:
    return np.asarray(output, np.float32)[weight > 0]


def _feed(
    choice: Choice, feed: Feed, examples: Examples, training: np.ndarray, validation: np.ndarray
) -> Feed:
    count, size = len(examples.labels), examples.batch_size
    labels = examples.labels.astype(np.int32)

    def train(start: int) -> Iterator[Batch]:
        for step in itertools.count(start):
            rows, passes = examples.rows(step)
            yield {"image": training[passes % choice.views * count + rows], "label": labels[rows]}

    def held_out() -> Iterator[Batch]:
        targets = examples.validation_labels.astype(np.int32)
        for first in range(0, len(validation), size):
            batch = np.asarray(validation[first : first + size])
            missing = size - len(batch)
            yield {
                "image": np.pad(batch, [(0, missing), *[(0, 0)] * (batch.ndim - 1)]),
                "label": np.pad(targets[first : first + size], (0, missing)),
                "weight": (np.arange(size) < len(batch)).astype(np.float32),
            }

    return replace(
        feed,
        train=train,
        validation=held_out if len(validation) else None,
        start=choice.cut,
        calibration=None,
        examples=None,
    )
