"""The race between strategies: what each got right on the same images in, a decision out.

Strategies are compared on the same held-out images, fold by fold, with the one that costs nothing.
What is known beforehand of their gains is the prior, and each fold turns it into a posterior. The
race is forgiving: one bad fold drops nobody whose posterior still leaves room.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import scipy.stats

from flaxtransfer.files import read_json
from flaxtransfer.metrics import Draws, compared
from flaxtransfer.paths import listing, shortened, suggest
from flaxtransfer.recipes.catalog import RECIPES

__all__ = [
    "Gains",
    "Prior",
    "Race",
    "Standing",
    "Verdict",
    "checked_gains",
    "following",
    "on_target",
    "prior_of",
    "race",
]

Verdict = Literal["nothing", "ceiling", "early", "depth", "level", "train"]
"""What the evidence says: nothing is learnable from these features; a head is as good as anything;
early layers have to move; an earlier depth knows more; all depths are level and leave little;
training is next."""

Gains = Mapping[str, Any] | str | os.PathLike[str]
"""What each strategy gained on other data with a network, or the file of it."""

DELTA = 0.01
"""Strategies within one point of skill are equal."""

DROP = 0.1
"""A strategy is dropped once it is the best, or within DELTA of it, with less probability."""

LEAVE = 1.0
"""Standard errors that a challenger has to be ahead by, for the free head to be left where nothing
is known of gains: where they were measured, the posterior decides, which knows more than images do.

Two ask for proof, which a few hundred images do not give: measured over 14 targets, one loses 1.4
points to the best choice, two 2.4, and none 1.5."""

GROWTH, GROWTH_DEVIATION = 0.18, 0.10
"""By what share of what the head leaves training on all labels gains more over it than training on
two thirds, and the standard deviation of that over targets.

An error that falls with the square root of the labels falls by 1 - (2/3)^0.5 = 0.18; measured on
nine targets it is 0.06 to 0.30. A third more labels hardly help a solved head."""

LEARNED = 0.5
"""Points that a trained network loses for each percent of wrong labels: as far as it learns every
label by heart it loses one, as a nearest neighbor does; as far as it does not, none."""

_CLEAR = 1.28
"""Standard deviations from which it is clear which of two strategies is better: nine in ten."""

_DRAWS = 4096


@dataclass(frozen=True)
class Prior:
    """What is known of a strategy's gain over the free head before it is tried.

    Args:
        mean: gain in skill; see ``metrics.Skill``.
        deviation: its standard deviation.
        noise: standard deviation between what folds show and what training on all labels gives,
            beside that of counting images. More folds do not lower it.
        targets: on which it was measured; 0 where nothing is known.
        growth: by how much training on all labels gains more than folds show.
        drawn: share of labels that are as good as drawn, by which folds show too small a
            difference.
    """

    mean: float = 0.0
    deviation: float = 0.06
    noise: float = 0.035
    targets: int = 0
    growth: float = 0.0
    drawn: float = 0.0


@dataclass(frozen=True)
class Standing:
    """How a strategy stands against the free head.

    Args:
        name: of the strategy.
        mean: posterior mean of its gain in skill.
        deviation: posterior standard deviation.
        z: the gain on the images alone, in its standard errors.
        images: that both were judged on.
        best: probability of being the best, or within one point of it.
        dropped: whether it is out.
    """

    name: str
    mean: float
    deviation: float
    z: float = 0.0
    images: int = 0
    best: float = 0.0
    dropped: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


@dataclass(frozen=True)
class Race:
    """Where a race stands.

    Args:
        standings: one per strategy, the free head first.
        leader: the strategy that would be chosen now.
        regret: expected skill that the leader loses to the best.
        over: whether another fold would hardly change the choice.
    """

    standings: tuple[Standing, ...]
    leader: str
    regret: float
    over: bool

    @property
    def within(self) -> float:
        """The probability that the leader is within one point of the best."""
        return next(one.best for one in self.standings if one.name == self.leader)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "leader": self.leader,
            "regret": self.regret,
            "within": self.within,
            "over": self.over,
            "standings": [one.to_json() for one in self.standings],
        }

    def __str__(self) -> str:
        lines = [f"{'strategy':<28} {'gain, points':>14} {'in errors':>9} {'best':>6}"]
        for one in self.standings:
            gain = f"{100 * one.mean:+.1f} ± {100 * one.deviation:.1f}"
            row = f"{one.name:<28} {gain:>14} {one.z:>+9.1f} {100 * one.best:>4.0f} %"
            lines.append(row + (" out" if one.dropped else ""))
        lines.append(
            f"{self.leader} is chosen: expected regret {100 * self.regret:.1f} points, "
            f"{100 * self.within:.0f} % sure to be within one point of the best"
        )
        return "\n".join(lines)


def prior_of(
    verdict: str, strategy: str, network: str, gains: Mapping[str, Any] | None = None
) -> Prior:
    """What other targets say of a strategy's gain, where the evidence said the same.

    Too few targets of one verdict are taken with those of all. The gain of a strategy that was not
    tried, or not with this network, is taken to be 0, give or take 6 points.

    Args:
        verdict: of the advice.
        strategy: name of a recipe.
        network: name of its configuration.
        gains: see ``checked_gains``; by default those of the built-in network, which the package
            holds.

    >>> prior_of("depth", "no such strategy", "resnet18w32") == Prior()
    True
    """
    noise = _UNSTEADY.get(strategy, Prior().noise)
    found = _measured() if gains is None else gains
    if network == found["network"]:
        for bucket in (verdict, "all"):
            row = found["gains"].get(bucket, {}).get(strategy)
            if row is not None and row["targets"] >= FEWEST:
                deviation = max(row["deviation"], _SUREST)
                return Prior(row["mean"], deviation, noise, row["targets"])
    return Prior(noise=noise)


def on_target(prior: Prior, left: float, wrong: float = 0.0, classes: int = 2) -> Prior:
    """What is expected of a strategy on a target, by what a head leaves there.

    It gains no more than is left; training on all labels gains beyond the folds, and the more the
    more is left (where gains are known: that was measured with the same network); and what it
    trains learns wrong labels, too, while a solved head averages over them.

    Args:
        prior: from other targets.
        left: share of the labels, as they are, that the head is expected to get wrong.
        wrong: share of the labels that are wrong; see ``Evidence``.
        classes: number of classes, any of which a wrong label may name.

    References:
        C. Zhang, S. Bengio, M. Hardt, B. Recht, O. Vinyals, "Understanding Deep Learning Requires
        Rethinking Generalization", 2017 (networks fit labels that are drawn).
        T. M. Cover, P. E. Hart, "Nearest Neighbor Pattern Classification", 1967.

    >>> elsewhere = Prior(0.15, 0.17, targets=9)
    >>> on_target(elsewhere, left=0.02).mean, on_target(elsewhere, left=0.02).deviation
    (0.02, 0.03)
    >>> round(on_target(elsewhere, left=0.42, wrong=0.36, classes=10).mean, 2)
    -0.08
    """
    drawn = min(wrong * classes / (classes - 1), _MOST_DRAWN)
    left = max(left - wrong, 0.0) / (1 - drawn)
    return replace(
        prior,
        mean=min(prior.mean, left) - LEARNED * wrong,
        # Any share from 0 to 1 of the wrong labels may be learned.
        deviation=math.hypot(min(prior.deviation, max(left, _SUREST)), wrong / math.sqrt(12)),
        noise=math.hypot(prior.noise, GROWTH_DEVIATION * left),
        growth=GROWTH * left if prior.targets else 0.0,
        drawn=drawn,
    )


@functools.cache
def _measured() -> Mapping[str, Any]:
    file = importlib.resources.files("flaxtransfer.advice") / "gains.json"
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def checked_gains(gains: Gains, network: str) -> Mapping[str, Any]:
    """Gains that were measured with a network, or the JSON file of them, checked.

    Args:
        gains: what ``experiments/strategy_grid.py --gains`` writes: ``{"network": name, "gains":
            {"all": {strategy: row}}}``, a row being ``{"mean": 0.02, "deviation": 0.05, "targets":
            10}``: mean and standard deviation over that many kinds of images of the gain in skill
            over the best solved head, 0.02 being 2 points. Beside "all" there may be rows for a
            verdict alone. Other keys are not read.
        network: name of the configuration that advice is asked on.

    Raises:
        TypeError: neither a mapping nor a path.
        ValueError: gains of another network, of unknown strategies or verdicts, or that are no such
            numbers; a file that is no such JSON. All problems in one line.
        FileNotFoundError: no such file.

    >>> row = {"mean": 0.02, "deviation": 0.05, "targets": 10}
    >>> found = checked_gains({"network": "mine", "gains": {"all": {"surgical": row}}}, "mine")
    >>> prior_of("depth", "surgical", "mine", found).mean
    0.02
    """
    name, found = "`gains`", gains
    if isinstance(gains, str | os.PathLike):
        name, found = os.fspath(gains), _read(gains)
    elif not isinstance(gains, Mapping):
        what = shortened(repr(gains), 60)
        raise TypeError(f"`gains` must be a mapping or the path of a JSON file, got {what}")
    if not isinstance(found, Mapping):
        raise ValueError(f"{name} must hold a JSON object, got {shortened(repr(found), 60)}")
    if problems := list(_problems_of_gains(found, network)):
        more = f"; and {len(problems) - 3} more" if problems[3:] else ""
        raise ValueError(shortened(f"{name} {'; '.join(problems[:3])}{more}", 600))
    return found


def _read(path: str | os.PathLike[str]) -> Any:
    if not os.path.exists(path):
        raise FileNotFoundError(f"`gains` must name a file, got {os.fspath(path)}: there is none")
    return read_json(path)


def _problems_of_gains(found: Mapping[str, Any], network: str) -> Iterator[str]:
    """What keeps gains from being read; each follows the word "gains"."""
    if any(key not in found for key in ("network", "gains")):
        other = [key for key in found if key not in ("network", "gains")]
        near = next(filter(None, (suggest(str(key), ("network", "gains")) for key in other)), "")
        got = listing(map(repr, found)) or "nothing"
        yield f"must have 'network' and 'gains', got {shortened(got)}{near}"
        return
    if found["network"] != network:
        yield (
            f"must be of the network that is advised on, {network}, got gains of "
            f"{shortened(repr(found['network']), 80)}, which say nothing of it"
        )
    by_verdict, verdicts = found["gains"], (*get_args(Verdict), "all")
    if not isinstance(by_verdict, Mapping) or "all" not in by_verdict:
        whole = not isinstance(by_verdict, Mapping)
        got = repr(by_verdict) if whole else listing(map(repr, by_verdict)) or "nothing"
        yield f"must have ['gains']['all'], strategies over all verdicts, got {shortened(got)}"
    for verdict, rows in by_verdict.items() if isinstance(by_verdict, Mapping) else ():
        if verdict not in verdicts:
            yield (
                f"must be by verdict ({', '.join(verdicts)}), got {shortened(repr(verdict))}"
                f"{suggest(str(verdict), verdicts)}"
            )
        elif not isinstance(rows, Mapping):
            yield f"must have strategies in [{verdict!r}], got {shortened(repr(rows), 60)}"
        else:
            for strategy, row in rows.items():
                yield from _problems_of_row(verdict, strategy, row)


def _problems_of_row(verdict: str, strategy: Any, row: Any) -> Iterator[str]:
    place = f"in [{verdict!r}][{shortened(repr(strategy), 60)}]"
    if strategy not in RECIPES:
        near = suggest(str(strategy), RECIPES) or f"; there are {', '.join(RECIPES)}"
        yield f"must be of recipes, got {shortened(repr(strategy), 60)}{near}"
        return
    if not isinstance(row, Mapping) or any(key not in row for key in _ROW):
        got, near = shortened(repr(row), 60), ""
        if isinstance(row, Mapping):
            got = listing(map(repr, row)) or "nothing"
            other = [key for key in row if key not in _ROW]
            near = next(filter(None, (suggest(str(key), _ROW) for key in other)), "")
        yield f"must have {', '.join(map(repr, _ROW))} {place}, got {got}{near}"
        return
    for key, (least, most, what) in _ROW.items():
        kind = numbers.Integral if most == math.inf else numbers.Real
        right = isinstance(row[key], kind) and not isinstance(row[key], bool)
        value = float(row[key]) if right else math.nan
        if not least <= value <= most:
            near = f"; did you mean {value / 100:g}?" if most < abs(value) <= 100 else ""
            yield f"{key!r} {place} must be {what}, got {shortened(repr(row[key]), 60)}{near}"


_ROW: dict[str, tuple[float, float, str]] = {
    "mean": (-1, 1, "a share from -1 to 1, 0.01 being a point"),
    "deviation": (0, 1, "a share from 0 to 1, 0.01 being a point"),
    "targets": (0, math.inf, "an integer >= 0"),
}
"""What a row of gains has: least and largest number, and both in words."""


_UNSTEADY = {"from_scratch": 0.16}
"""Noise of strategies of which two thirds of the labels say little about all of them: measured on
full-length hold-outs of small sets."""

_MOST_DRAWN = 0.9
"""Labels of which more are drawn say nothing, of nothing."""

FEWEST, _SUREST = 8, 0.03
"""Targets that make a prior, and the least standard deviation of one: targets differ. Means of
three to five targets chose worse, each left out in turn, than the mean of all."""


def race(
    folds: Sequence[Mapping[str, Any]],
    priors: Mapping[str, Prior],
    costs: Mapping[str, float],
    free: str,
    *,
    delta: float = DELTA,
) -> Race:
    """Where a race stands after some folds.

    Args:
        folds: by fold and strategy, bool ``[examples]``, what was right; or draws of the skill, see
            ``metrics.Draws``. The free head is in every fold, a strategy that was not tried in some
            is missing there.
        priors: of the challengers by name, in the order in which they are tried.
        costs: of all strategies, what decides between equal ones: parameters that move.
        free: the name of the head that costs nothing.
        delta: skill below which two strategies are equal.

    Raises:
        ValueError: a fold without the free head, or with arrays of other lengths.

    References:
        M. Birattari, T. Stützle, L. Paquete, K. Varrentrapp, "A Racing Algorithm for Configuring
        Metaheuristics", 2002 (drop what the evidence speaks against, fold by fold).

    >>> right = np.ones(100, bool)
    >>> wrong = np.arange(100) < 70
    >>> fold, costs = {"head": wrong, "all": right}, {"head": 1, "all": 9}
    >>> found = race([fold], {"all": Prior()}, costs, "head")
    >>> found.leader, round(found.standings[1].z, 1)
    ('all', 5.5)
    """
    standings = [
        Standing(free, 0.0, 0.0),
        *(_standing(n, folds, p, free) for n, p in priors.items()),
    ]
    draws = _posterior_draws(standings)
    ahead = draws.max(axis=1)
    best = ((draws >= ahead[:, None] - delta).mean(axis=0)).tolist()
    standings = [
        Standing(
            one.name,
            one.mean,
            one.deviation,
            one.z,
            one.images,
            chance,
            # The free head stays: it is what all are measured by.
            one.name != free and one.images > 0 and chance < DROP,
        )
        for one, chance in zip(standings, best, strict=True)
    ]
    leader = _leader(standings, priors, costs, free, delta)
    place = [one.name for one in standings].index(leader)
    regret = float((ahead - draws[:, place]).mean())
    return Race(tuple(standings), leader, regret, regret < delta / 2)


def following(
    state: Race,
    folds: Sequence[Mapping[str, Any]],
    priors: Mapping[str, Prior],
    most: int,
    free: str,
) -> str | None:
    """The challenger whose next fold is worth a run; None where the race is over.

    Where gains are known the first is judged until it is clear whether it is better than the free
    head, then the next one is tried, and so on: which of two challengers is ahead by a few points a
    fold of 40 images does not say. Where nothing is known all are equal, and the best of several is
    worth more than to be sure of one: each is tried once, before any is tried again. (Drawn with
    gains of 0 ± 6 points, three runs on three strategies lose 3.0 points, one after the other 3.9.)

    Args:
        state: where the race stands.
        folds: see ``race``.
        priors: see ``race``.
        most: folds that there are.
        free: the name of the head that costs nothing.
    """
    seen = {one.name: sum(one.name in fold for fold in folds) for one in state.standings}
    for one in state.standings[1:]:
        if not (one.dropped or seen[one.name] or priors[one.name].targets):
            return one.name
    tried = [one for one in state.standings if one.name == free or seen[one.name]]
    for one in state.standings[1:]:
        if one.dropped or seen[one.name] >= most:
            continue
        if not seen[one.name]:
            return one.name
        rival = max((other for other in tried if other is not one), key=lambda other: other.mean)
        apart = abs(one.mean - rival.mean)
        if apart < _CLEAR * math.hypot(one.deviation, rival.deviation):
            return one.name
    return None


def _standing(name: str, folds: Sequence[Mapping[str, Any]], prior: Prior, free: str) -> Standing:
    """The posterior of one strategy: a normal prior, and a normal observation of all folds."""
    gained, spread, images = 0.0, 0.0, 0
    for number, fold in enumerate(folds):
        if free not in fold:
            raise ValueError(f"fold {number} must have {free!r}, got {', '.join(fold)}")
        if name not in fold:
            continue
        ours, theirs = fold[name], fold[free]
        sizes = [
            (one.examples,) if isinstance(one, Draws) else np.shape(one) for one in (ours, theirs)
        ]
        if sizes[0] != sizes[1] or len(sizes[0]) != 1 or not sizes[0][0]:
            raise ValueError(
                f"in fold {number} {name!r} and {free!r} must be right on the same images, got "
                f"{sizes[0]} and {sizes[1]}"
            )
        count = int(sizes[0][0])
        gain, error = compared(ours, theirs)
        gained += count * gain
        spread += (count * error) ** 2
        images += count
    if not images:
        return Standing(name, prior.mean, prior.deviation)
    # Two images are added that differ, one each way: no fold is proof.
    error = math.sqrt(spread + 2) / images / (1 - prior.drawn)
    gain = gained / images / (1 - prior.drawn) + prior.growth
    precision, seen = prior.deviation**-2, 1 / (error**2 + prior.noise**2)
    mean = (prior.mean * precision + gain * seen) / (precision + seen)
    z = gained / math.sqrt(max(spread, 1.0))
    return Standing(name, mean, (precision + seen) ** -0.5, z, images)


def _posterior_draws(standings: Sequence[Standing]) -> np.ndarray:
    """Gains ``[draws, strategies]``, the same every time."""
    random = np.random.PCG64(np.random.SeedSequence(0))
    uniform = random.random_raw(_DRAWS * len(standings)) / 2**64
    normal = scipy.stats.norm.ppf(np.clip(uniform, 1e-12, 1 - 1e-12)).reshape(_DRAWS, -1)
    means, deviations = np.array([(one.mean, one.deviation) for one in standings]).T
    found: np.ndarray = means + deviations * normal
    return found


def _leader(
    standings: Sequence[Standing],
    priors: Mapping[str, Prior],
    costs: Mapping[str, float],
    free: str,
    delta: float,
) -> str:
    """The largest posterior mean; of equal ones the cheapest.

    Of those that were tried; and that are ahead on the images too, where nothing else is known.
    """
    allowed = [
        one
        for one in standings
        if one.name == free or (one.images and (one.z > LEAVE or priors[one.name].targets))
    ]
    top = max(one.mean for one in allowed)
    if top <= 0:
        return free
    equal = [one for one in allowed if one.mean >= top - delta and one.mean >= 0]
    return min(equal, key=lambda one: (costs[one.name], -one.mean)).name
