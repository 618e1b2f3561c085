"""The claims of transfer learning and the rule that judges them, written before their figures.

A claim is a list of statements about the same test images under two treatments. "Better" holds if
the difference is a point or more in the mean over seeds and more than two standard errors; "no
worse" if it is less than a point behind with two standard errors taken off. A claim holds if all
of its statements do, for those that do if some do, and not if none does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import scipy.stats

import targets
from claim_runs import (
    BUILT_IN,
    DEPTHS,
    GUIDED,
    LABELS,
    RATES,
    SPLIT_TARGETS,
    THIN,
    Run,
)

FEW, SOME, MANY = LABELS[0], LABELS[1], LABELS[-1]
EARLY = ("colors", "coarse gratings", "fine gratings", "micro-textures")
LATE = ("counts", "polygons", "digits")
"""Attributes that early layers are said to carry, and classes that late ones are said to."""

LEARNED = ("digits", "polygons")
"""One target on which the network knows the answer already, and one on which it has to learn."""

TUNED = ("polygons",)
"""Where how to train matters: on digits all ways are level (results/strategies.md)."""

SQUARE = ("digits", "digits, shifted", "polygons", "fine gratings")
WAYS = ("everything", "everything at 3e-3")
"""Targets of the decision square, and ways of training that it chooses among."""


@dataclass(frozen=True, eq=False)
class Statement:
    """One of the differences that a claim is made of.

    Args:
        text: what is said to be better, or no worse, than what.
        values: the difference in each seed, positive as the claim has it.
        kind: which of the two.
        least: what counts: a point of accuracy, unless the text names another unit.
    """

    text: str
    values: np.ndarray
    kind: Literal["better", "no worse"] = "better"
    least: float = 1.0

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def deviation(self) -> float:
        return float(np.std(self.values, ddof=1))

    @property
    def holds(self) -> bool:
        """By the rule of this file."""
        twice = 2 * self.deviation / np.sqrt(len(self.values))
        if self.kind == "no worse":
            return bool(self.mean - twice > -self.least)
        return bool(self.mean >= self.least and self.mean > twice)


def verdict(statements: Sequence[Statement]) -> str:
    """By the rule of this file; statements are lettered in their order."""
    held = [chr(ord("a") + n) for n, statement in enumerate(statements) if statement.holds]
    if len(held) == len(statements):
        return "holds"
    of = f"{len(held)} of {len(statements)}"
    return f"holds for {', '.join(held)} ({of})" if held else f"does not hold ({of})"


@dataclass(frozen=True)
class Table:
    """What was measured: values by run and seed, and the seeds that means are taken over."""

    rows: Mapping[tuple[Run, int], Mapping[str, float]]
    seeds: Sequence[int]

    def of(self, run: Run, name: str = "test") -> np.ndarray:
        """A value in each seed; accuracies are in percent."""
        return 100 * np.array([self.rows[run, seed][name] for seed in self.seeds])

    def has(self, run: Run, name: str | None = None) -> bool:
        """Whether a run, and a value of it, is there in every seed."""
        found = [self.rows.get((run, seed), {}) for seed in self.seeds]
        return all(bool(values) if name is None else name in values for values in found)

    def head(self, network: str, target: str, name: str) -> np.ndarray:
        """A value of the heads in each seed."""
        return self.of(Run(network, target, "heads"), name)

    def trained(self, target: str, what: str, per_class: int = SOME) -> np.ndarray:
        """Accuracy of the built-in network after training, in each seed."""
        return self.of(Run(BUILT_IN, target, what, per_class))


@dataclass(frozen=True)
class _Asked(Table):
    """Writes down what is asked for; its values are of no use."""

    runs: dict[Run, None] = field(default_factory=dict)
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def of(self, run: Run, name: str = "test") -> np.ndarray:
        self.runs[run] = None
        return self.random.random(len(self.seeds))


Judge = Callable[[Table, str], list[Statement]]


@dataclass(frozen=True)
class Claim:
    """What is said, and how it is judged.

    Args:
        text: the claim.
        statements: from a table and the name of a network.
        networks: that are asked.
        cited: results of other experiments on the same question.
    """

    text: str
    statements: Judge
    networks: tuple[str, ...]
    cited: str

    def runs(self, network: str) -> list[Run]:
        """What it takes to judge it: what its statements look at."""
        asked = _Asked({}, range(3))
        self.statements(asked, network)
        return list(asked.runs)


CLAIMS: dict[str, Claim] = {}
"""The claims by name."""


def claim(
    text: str, *, networks: tuple[str, ...] = (BUILT_IN, THIN), cited: str = ""
) -> Callable[[Judge], Judge]:
    """Adds a function that makes statements to ``CLAIMS``."""

    def add(judge: Judge) -> Judge:
        CLAIMS[judge.__name__] = Claim(text, judge, networks, cited)
        return judge

    return add


@claim("Early layers carry general attributes, late ones classes")
def hierarchy(table: Table, network: str) -> list[Statement]:
    found = []
    for target in (*EARLY, *LATE):
        at = [table.head(network, target, f"50 {depth}") for depth in DEPTHS]
        # The better of two depths at either end, by its mean over the seeds.
        ends = [max(pair, key=np.mean) for pair in (at[:2], at[3:])]
        names = ["stem or layer1", "layer3 or layer4"]
        if target in LATE:
            ends, names = ends[::-1], names[::-1]
        found.append(Statement(f"{target}: {names[0]} over {names[1]}", ends[0] - ends[1]))
    return found


@claim("Frozen leaves have no gradient, cost no backward pass and stay", networks=(BUILT_IN,))
def freezing(table: Table, network: str) -> list[Statement]:
    run = Run(network, "digits", "freezing")
    flops = [np.full(len(table.seeds), 100.0), *(table.of(run, f"flops {d}") for d in DEPTHS)]
    still, zero = ((table.of(run, name) == 0).astype(float) for name in ("moved", "gradient"))
    return [
        Statement("frozen leaves and statistics keep all bits (1 is yes)", still),
        Statement("a frozen leaf's gradient, if asked for, is exactly 0 (1 is yes)", zero),
        Statement(
            "each part frozen saves FLOPs: the least of five", -np.diff(flops, axis=0).max(0)
        ),
        Statement("the head alone saves FLOPs of a step of everything", flops[0] - flops[-1]),
    ]


@claim(
    "With few labels per parameter a head is better, with many fine-tuning",
    cited="strategies, what_transfers",
)
def labels(table: Table, network: str) -> list[Statement]:
    if network == THIN:
        return [
            Statement(
                f"{target}, {FEW} per class: a sixteenth of layer4's features over all",
                table.head(network, target, f"{FEW} sixteenth")
                - table.head(network, target, f"{FEW} layer4"),
            )
            for target in ("digits", "polygons", "photographs")
        ]
    found, gains, per_parameter = [], [], []
    for target, (what, parameters) in itertools.product(
        LEARNED, (("layer4", 2.1e6), ("everything", 2.8e6))
    ):
        heads = [table.head(network, target, f"{count} layer4") for count in LABELS]
        trained = [table.trained(target, what, count) for count in LABELS]
        gain = np.array(trained) - np.array(heads)
        gains += list(gain)
        classes = targets.FAMILIES[target][1]
        per_parameter += [count * classes / parameters for count in LABELS]
        if what == "everything":
            few, many = (f"{target}, {count} per class" for count in (FEW, MANY))
            found += [
                Statement(f"{few}: the head no worse than everything", -gain[0], "no worse"),
                Statement(f"{many}: everything over the head", gain[-1]),
            ]
    text = "N/P ranks what training gains (rank correlation, 0.5 counts)"
    return [*found, Statement(text, _ranks([per_parameter] * len(table.seeds), gains), least=0.5)]


def _ranks(by_seed: Sequence[Sequence[float]], gains: Sequence[np.ndarray]) -> np.ndarray:
    """Rank correlation in each seed."""
    pairs = zip(by_seed, np.array(gains).T, strict=True)
    return np.array([scipy.stats.spearmanr(*pair)[0] for pair in pairs])


def cells(table: Table, network: str) -> dict[tuple[str, int], dict[str, np.ndarray]]:
    """Accuracies of candidates by target and labels per class, in each seed.

    "square" is what the four boxes of few or many labels and near or far images recommend: a head
    on layer4, one on layer2, everything, everything at a high rate; where heads alone are asked, a
    head on layer4 or, far away, on layer2. "folds" is the head at the depth with the best score on
    folds of the labels.
    """
    apart = {t: float(table.head(network, t, "distance").mean()) for t in SQUARE}
    middle = float(np.median(list(apart.values())))
    found = {}
    for target, count in itertools.product(SQUARE, (FEW, MANY)):
        heads = [table.head(network, target, f"{count} {depth}") for depth in DEPTHS]
        scores = [table.head(network, target, f"{count} {depth}, folds") for depth in DEPTHS]
        one = dict(zip(DEPTHS, heads, strict=True))
        far = apart[target] > middle
        chosen = "layer2" if far else "layer4"
        if network == BUILT_IN:
            one |= {what: table.trained(target, what, count) for what in WAYS}
            chosen = WAYS[far] if count == MANY else chosen
        best = np.argmax(scores, axis=0)
        one |= {"square": one[chosen], "folds": np.choose(best, heads)}
        found[target, count] = one
    return found


def regrets(table: Table, network: str) -> dict[str, np.ndarray]:
    """Points lost to the best candidate by always taking one, mean of the cells, in each seed."""
    every = cells(table, network).values()
    best = [np.max(list(one.values()), axis=0) for one in every]
    names = next(iter(every))
    return {
        name: np.mean([b - one[name] for b, one in zip(best, every, strict=True)], axis=0)
        for name in names
    }


def _chooses(table: Table, network: str, name: str, other: str) -> list[Statement]:
    """That a way of choosing loses less than fixed choices, and than the other way."""
    lost = regrets(table, network)
    others = ("layer4", *(WAYS if network == BUILT_IN else ()), other)
    return [
        Statement(f"{name} against {one}: points of regret less", lost[one] - lost[name])
        for one in others
    ]


@claim("Number of labels and distance of the images decide the strategy", cited="advisor")
def square(table: Table, network: str) -> list[Statement]:
    gains, apart = [], []
    for (target, _), one in cells(table, network).items():
        others = [v for name, v in one.items() if name not in ("layer4", "square", "folds")]
        gains.append(np.max(others, axis=0) - one["layer4"])
        apart.append(table.head(network, target, "distance"))
    text = "distance ranks what is to be gained over layer4 (rank correlation, 0.5 counts)"
    ranks = Statement(text, _ranks(list(np.array(apart).T), gains), least=0.5)
    return [*_chooses(table, network, "square", "folds"), ranks]


@claim("Folds of the labels at hand decide it, by the depth of a head", cited="advisor")
def folds(table: Table, network: str) -> list[Statement]:
    return _chooses(table, network, "folds", "square")


@claim(
    "Progressive unfreezing is better than all at once",
    networks=(BUILT_IN,),
    cited="unfreezing, strategies",
)
def unfreezing(table: Table, network: str) -> list[Statement]:
    return [
        Statement(
            f"{target}: {what} over all at once",
            table.trained(target, what) - table.trained(target, "everything"),
        )
        for target, what in itertools.product(TUNED, ("gradual", GUIDED))
    ]


@claim(
    "BatchNorm alone goes far, and frozen statistics have a price",
    networks=(BUILT_IN,),
    cited="strategies, average_statistics, domain_shift",
)
def batch_norm(table: Table, network: str) -> list[Statement]:
    found = []
    for target in ("digits", "digits, shifted"):
        head = table.head(network, target, f"{SOME} layer4")
        alone, every = (table.trained(target, what) for what in ("BatchNorm", "everything"))
        found += [
            Statement(f"{target}: BatchNorm over the head alone", alone - head),
            Statement(f"{target}: BatchNorm no worse than everything", alone - every, "no worse"),
        ]
        for what, measured in (("BatchNorm", alone), ("everything", every)):
            frozen = table.trained(target, f"{what}, running statistics")
            text = f"{target}: {what} over the same with frozen statistics"
            found.append(Statement(text, measured - frozen))
    return found


@claim(
    "Discriminative rates are better than uniform ones, both tuned",
    networks=(BUILT_IN,),
    cited="strategies, curvature",
)
def rates(table: Table, network: str) -> list[Statement]:
    found = []
    for target in TUNED:
        best = {}
        for kind, tried in RATES.items():
            runs = [Run(BUILT_IN, target, f"{kind} at {rate:g}", SOME) for rate in tried]
            held, test = ([table.of(run, name) for run in runs] for name in ("held", "test"))
            best[kind] = np.choose(np.argmax(held, axis=0), test)
        text = f"{target}: discriminative over uniform, each at its best rate of three"
        found.append(Statement(text, best["discriminative"] - best["uniform"]))
    return found


@claim(
    "Gray silences opponent filters, and a learned adapter wakes them",
    networks=(THIN,),  # the built-in stem has no opponent filter; bands.py has it and others
    cited="bands",
)
def gray(table: Table, network: str) -> list[Statement]:
    plain, linear, curves = (
        Run(network, "gray windows", f"gray, {way}", SOME)
        for way in ("replicate", "linear", "curves")
    )
    color, none = (table.head(network, "photographs", f"{SOME} {n}") for n in ("layer4", "gray"))
    awake = "tone curves wake opponent filters (% of their energy, 5 count)"
    return [
        Statement("opponent filters in the stem (% of its energy)", table.of(plain, "opponent")),
        Statement("photographs: color over replicated gray", color - none),
        Statement("windows: linear adapter over replication", table.of(linear) - table.of(plain)),
        Statement("windows: tone curves over replication", table.of(curves) - table.of(plain)),
        Statement(awake, table.of(curves, "awake"), least=5.0),
    ]


@claim(
    "Fine detail needs early layers that move, coarse shape does not", cited="advisor, frequency"
)
def frequency(table: Table, network: str) -> list[Statement]:
    coarse, fine = (
        {d: table.head(network, f"{name} gratings", f"{SOME} {d}") for d in ("stem", "layer4")}
        for name in ("coarse", "fine")
    )
    found = [
        Statement("fine: a head on the stem over layer4", fine["stem"] - fine["layer4"]),
        Statement(
            "coarse: a head on layer4 no worse than the stem",
            coarse["layer4"] - coarse["stem"],
            "no worse",
        ),
    ]
    if network == BUILT_IN:
        gains = [
            table.trained(target, "stem and layer1") - table.trained(target, "layer2 to layer4")
            for target in ("fine gratings", "coarse gratings")
        ]
        found += [
            Statement("fine: early layers free over frozen", gains[0]),
            Statement("coarse: early layers frozen no worse than free", -gains[1], "no worse"),
        ]
    return found


@claim("More labels lower a head's variance, and not its bias")
def bias_variance(table: Table, network: str) -> list[Statement]:
    found = []
    for target in SPLIT_TARGETS:
        bias, variance = (
            table.head(network, target, f"{FEW} {part}")
            - table.head(network, target, f"{MANY} {part}")
            for part in ("bias", "variance")
        )
        text = f"{target}, {FEW} to {MANY} per class: variance falls"
        found += [
            Statement(text, variance),
            Statement(f"{text} more than bias", variance - bias),
        ]
    return found
