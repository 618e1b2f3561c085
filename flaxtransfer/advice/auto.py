"""``auto``: advice, a race of the strategies that it cannot tell apart, and the training of one.

The currency is steps, not seconds: what is decided by a clock falls out differently when a run goes
on after an interruption. A budget in minutes is turned into runs once, and kept. Every run of the
race is a run folder of its own, so that a race that was killed goes on where it stopped, and
decides the same.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flaxtransfer.advice.advise import Advice, Candidate, advise, expectations
from flaxtransfer.advice.race import Gains, Race, following, race
from flaxtransfer.classifier import Classifier
from flaxtransfer.data.loader import DataLoaders, eval_batches, loaders, reading
from flaxtransfer.data.source import Source
from flaxtransfer.data.splits import Splits, groups_of
from flaxtransfer.features.inputs import folds_with_singletons
from flaxtransfer.features.ridge import target_folds
from flaxtransfer.files import read_json, write_json
from flaxtransfer.metrics import Draws
from flaxtransfer.sharding import make_mesh, place_batch, place_replicated
from flaxtransfer.training.evaluation import predict
from flaxtransfer.training.loop import FitResult, fit
from flaxtransfer.training.plan import Plan
from flaxtransfer.training.prefix_cache import Cache
from flaxtransfer.training.run_folder import RACE
from flaxtransfer.training.selection import prepared
from flaxtransfer.training.step import start, train_step

__all__ = ["Auto", "Choice", "auto", "beginning", "budget_runs", "choose"]

FOLDS = 3
"""Folds of the race: two thirds of the labels train, one third judges."""

CHOICE_FILE = "choice.json"
BUDGET_FILE = "budget.json"

TIMED_STEPS = 3
"""Steps that are timed, after one that compiles; the median is taken for all."""

Feed = Callable[[Splits], DataLoaders]

Lengths = Callable[[str], Mapping[str, int]]
"""Steps of a strategy by the name of its argument, for the training set at hand."""


@dataclass(frozen=True, eq=False)
class Choice:
    """The strategy that was chosen, and what decided.

    Args:
        candidate: the strategy.
        advice: that the race began with.
        race: where it ended; None where there was nothing to race for.
        runs: full runs that the race took.
    """

    candidate: Candidate
    advice: Advice
    race: Race | None
    runs: int

    @property
    def pooled(self) -> tuple[np.ndarray, np.ndarray] | None:
        """What a head that was chosen reads of all images, and their labels; see ``Evidence``."""
        seen = self.advice.evidence.features
        if seen is None or self.candidate.skill is None:
            return None
        features, labels = seen
        return features[
            self.candidate.settings.get("segment", self.advice.evidence.last.name)
        ], labels

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "candidate": self.candidate.to_json(),
            "advice": self.advice.to_json(),
            "race": None if self.race is None else self.race.to_json(),
            "runs": self.runs,
        }

    def __str__(self) -> str:
        return str(self.advice) if self.race is None else f"{self.advice}\n{self.race}"


@dataclass(frozen=True, eq=False)
class Auto:
    """What ``auto`` ended with.

    Args:
        choice: the strategy and what decided.
        fitted: the training of it, on all labels.
    """

    choice: Choice
    fitted: FitResult

    @property
    def advice(self) -> Advice:
        """That the race began with."""
        return self.choice.advice


def budget_runs(budget: str, seconds: Callable[[], float] = lambda: 60.0) -> int:
    """Full runs that a budget allows, the last one on all labels included.

    Args:
        budget: a number of runs, "4x", or of minutes, "10m".
        seconds: says how long a run takes, where the budget is in minutes.

    Raises:
        ValueError: a budget of another form, or of nothing.

    >>> budget_runs("4x"), budget_runs("10m", lambda: 150.0)
    (4, 4)
    """
    if not (found := re.fullmatch(r"([1-9]\d{0,3})([xm])", budget)):
        raise ValueError(
            "budget must be a number of full runs or of minutes, such as '4x' or '10m', got "
            f"{budget!r}"
        )
    number = int(found[1])
    return number if found[2] == "x" else int(60 * number / max(seconds(), 1e-9))


def choose(
    network: Classifier,
    source: Source,
    splits: Splits,
    folder: str | os.PathLike[str],
    *,
    budget: str = "4x",
    batch_size: int = 64,
    seed: int = 0,
    feed: Feed | None = None,
    lengths: Lengths = lambda strategy: {},
    cache: Cache | None = None,
    mesh: Mesh | None = None,
    gains: Gains | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Choice:
    """Which strategy to train: by evidence, and by a race where evidence does not say.

    Args:
        network: from ``ft.transfer``; not changed.
        source: images and labels.
        splits: whose training part is looked at and raced on, and no other.
        folder: of the race; one that was interrupted goes on there.
        budget: for all, the training of the choice included: full runs, "4x", or minutes, "10m".
            Minutes are turned into runs by timing a few steps, once: a race that goes on has the
            runs that it began with.
        batch_size: examples a step.
        seed: of folds, order and augmentation.
        feed: makes the batches of a split; by default ``ft.loaders``.
        lengths: steps of a strategy; by default the recipes' own.
        cache: see ``ft.fit``.
        mesh: devices; by default all of them.
        gains: see ``ft.advise``.
        say: is told what happens.

    Raises:
        ValueError: nothing is learnable from these features; a budget of another form; and as
            ``ft.advise`` and ``ft.fit``.
    """
    budget_runs(budget)  # A budget of another form is refused before anything is computed.
    folder = Path(folder)
    feed = feed or partial(_loaders, source, network, batch_size, seed)
    found = advise(
        network, source, splits.train, seed=seed, batch_size=batch_size, mesh=mesh, gains=gains
    )
    if found.best is None:
        raise ValueError(f"{found.summary} To train all the same, name a strategy")
    say(str(found))
    free = next(one for one in found.candidates if one.skill is not None)
    challengers = [one for one in found.candidates if one.tried and one is not free]
    about = expectations(found.verdict, found.evidence, gains)
    challengers.sort(key=lambda one: -about(one.strategy).mean)
    priors = {one.strategy: about(one.strategy) for one in challengers}
    if found.verdict in ("ceiling", "level") or not challengers:
        return Choice(found.best, found, None, 0)
    slowest = max(challengers, key=lambda one: one.moves)

    def seconds() -> float:
        plan = slowest.plan(network.params, lengths(slowest.strategy))
        return run_seconds(network, plan, feed(splits), mesh)

    runs = _kept_runs(folder, budget, seconds, say)
    if runs < 2:
        return Choice(found.best if runs else free, found, None, 0)
    costs = {one.strategy: float(one.moves) for one in (free, *challengers)}
    labels = np.asarray(source.labels())[splits.train]
    groups = groups_of(source)
    own = None if groups is None else [groups[i] for i in splits.train.tolist()]
    if labels.ndim == 1:
        fold_of = folds_with_singletons(labels, FOLDS, seed, own)
    else:
        fold_of = target_folds(labels, FOLDS, seed, own)
    by_name = {one.strategy: one for one in (free, *challengers)}
    parts = [
        Splits.of(splits.train[fold_of != fold], (), splits.train[fold_of == fold])
        for fold in range(FOLDS)
    ]
    folds: list[dict[str, np.ndarray | Draws]] = [{} for _ in parts]

    def judge(name: str, fold: int) -> None:
        say(f"race, fold {fold + 1}: {by_name[name]}")
        fitted = fit(
            beginning(name, network, seed),
            by_name[name].plan(network.params, lengths(name)),
            feed(parts[fold]),
            folder / f"{fold}-{name}",
            seed=seed,
            resume=True,
            cache=cache,
            mesh=mesh,
        )
        test = parts[fold].test
        said = predict(fitted.network, eval_batches(source, test, network.preprocessing), mesh)
        folds[fold][name] = found.evidence.measure.judged(
            said.task.probabilities(said.logits),
            said.labels,
            None if groups is None else np.array([groups[i] for i in test.tolist()]),
        )

    def standing() -> Race:
        return race([fold for fold in folds if fold], priors, costs, free.strategy)

    state, done = standing(), 0
    while done < runs - 1:  # The last run of the budget is that of the choice, on all labels.
        name = following(state, folds, priors, FOLDS, free.strategy)
        if name is None or (done and state.over):
            break
        fold = next(number for number, one in enumerate(folds) if name not in one)
        for each in (free.strategy, name):
            if each not in folds[fold]:
                judge(each, fold)
        state, done = standing(), done + 1
    say(str(state))
    chosen = by_name[state.leader]
    choice = Choice(chosen, found, state, done)
    write_json(folder / CHOICE_FILE, choice.to_json())
    return choice


def _kept_runs(
    folder: Path, budget: str, seconds: Callable[[], float], say: Callable[[str], None]
) -> int:
    """The runs of a budget; for one in minutes, those that the folder has, where it has them."""
    if not budget.endswith("m"):
        return budget_runs(budget)
    path = folder / BUDGET_FILE
    kept = read_json(path) if path.exists() else {}
    if kept.get("budget") != budget:
        found = seconds()
        runs = budget_runs(budget, lambda: found)
        kept = {"budget": budget, "seconds_of_a_run": round(found, 3), "runs": runs}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, kept)
    runs = int(kept["runs"])
    what = "no full run: the free head is taken" if not runs else f"{runs} full runs"
    say(f"a full run takes about {kept['seconds_of_a_run'] / 60:.1f} minutes; {budget} are {what}")
    return runs


def run_seconds(
    network: Classifier, plan: Plan, data: DataLoaders, mesh: Mesh | None = None
) -> float:
    """About how long the steps of a plan take, by timing a few steps of its longest phase.

    Compilation, validation and checkpoints come on top.

    Args:
        network: that is trained; not changed.
        plan: whose steps are counted.
        data: whose first batches are used.
        mesh: devices; by default all of them.
    """
    phase = max(plan.phases, key=lambda one: one.steps or 0)
    if not phase.steps:
        return 0.0
    mesh = mesh or make_mesh()
    network, alone = prepared(network, Plan([replace(phase, patience=None)]), data)
    timed = alone.phases[0]
    state = place_replicated(start(network.variables, timed, 0), mesh)
    step = train_step(network.model, timed, data, network.task, mesh)
    seconds = []
    with reading(data, 0) as batches:
        for _ in range(1 + TIMED_STEPS):
            began = time.perf_counter()
            batch = next(batches)
            placed = place_batch({k: batch[k] for k in ("image", "label")}, mesh)
            state, metrics = step(state, placed)
            float(metrics["loss"])
            seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[1:])) * sum(one.steps or 0 for one in plan.phases)


def beginning(strategy: str, network: Classifier, seed: int) -> Classifier:
    """The network that a strategy begins with: random weights for ``from_scratch``."""
    if strategy != "from_scratch":
        return network
    return network.with_variables(network.model.init(jax.random.key(seed)))


def _loaders(
    source: Source, network: Classifier, batch_size: int, seed: int, splits: Splits
) -> DataLoaders:
    return loaders(source, splits, network.preprocessing, batch_size=batch_size, seed=seed)


def auto(
    network: Classifier,
    source: Source,
    splits: Splits,
    folder: str | os.PathLike[str],
    *,
    budget: str = "4x",
    batch_size: int = 64,
    seed: int = 0,
    resume: bool = False,
    cache: Cache | None = None,
    mesh: Mesh | None = None,
    gains: Gains | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Auto:
    """Chooses a strategy by advice and a race, and trains it on all labels.

    Args:
        network: from ``ft.transfer``; not changed.
        source: images and labels.
        splits: to train, to validate, to test on; the race sees the training part alone.
        folder: the run folder; the race is in it.
        budget: for all, such as "4x" (full runs) or "10m" (minutes); see ``choose``.
        batch_size: examples a step.
        seed: of everything that is drawn.
        resume: continue in the folder, race included; start where there is nothing.
        cache: see ``ft.fit``.
        mesh: devices; by default all of them.
        gains: see ``ft.advise``.
        say: is told what happens.

    Raises:
        ValueError: as ``choose`` and ``ft.fit``.
    """
    folder = Path(folder)
    choice = choose(
        network,
        source,
        splits,
        folder / RACE,
        budget=budget,
        batch_size=batch_size,
        seed=seed,
        cache=cache,
        mesh=mesh,
        gains=gains,
        say=say,
    )
    fitted = fit(
        beginning(choice.candidate.strategy, network, seed),
        choice.candidate.plan(network.params),
        _loaders(source, network, batch_size, seed, splits),
        folder,
        seed=seed,
        config={"budget": budget},
        resume=resume,
        cache=cache,
        mesh=mesh,
        pooled=choice.pooled,
    )
    return Auto(choice, fitted)
