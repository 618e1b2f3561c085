"""Tries the claims of transfer learning, and says which hold.

    nice python experiments/claims.py --weights thin_resnet50.safetensors   # about 25 CPU minutes
    python experiments/claims.py rates unfreezing --seeds 8
    python experiments/claims.py --print-only

The claims and the rule that judges them are in claim_rules.py, what is measured in claim_runs.py.
Without names all claims are tried, on the built-in network and, with a file of weights, on a thin
ResNet-50 that photographs trained (the file of benchmarks/whole_job.py). Results are appended to a
file, one line each, and what is there already is not computed again.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.axes import Axes

from claim_rules import CLAIMS, EARLY, LATE, Claim, Statement, Table, regrets, verdict
from claim_runs import BUILT_IN, DEPTHS, LABELS, SPLIT_TARGETS, THIN, Run, Scale, measure
from workers import append_row, compile_once, read_rows, share

COLORS = {BUILT_IN: "tab:blue", THIN: "tab:orange"}


@dataclass(frozen=True)
class Claims:
    """Which claims, and how much is computed.

    Args:
        names: of claim_rules.CLAIMS; by default all.
        seeds: draws, 2 or more; claims are about means over five.
        weights: of the thin ResNet-50, a file with torchvision's names.
        scale: length of the runs.
        results: JSON lines.
        figure: file of a picture of all that was judged.
        processes: that share the work, each on its part of the CPU cores.
        print_only: judge what is there.
        worker: number of this process; for the script's own use.
    """

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    seeds: int = 5
    weights: Path | None = None
    scale: Scale = field(default_factory=Scale)
    results: Path = Path("runs/claims.jsonl")
    figure: Path | None = None
    processes: int = 2
    print_only: bool = False
    worker: int | None = None

    def chosen(self) -> dict[str, Claim]:
        """The claims that were asked for."""
        return {name: CLAIMS[name] for name in self.names or CLAIMS}

    def networks(self, claim: Claim) -> tuple[str, ...]:
        """Of a claim, those that there are weights of."""
        return tuple(n for n in claim.networks if n == BUILT_IN or self.weights is not None)

    def runs(self) -> list[Run]:
        """All that is looked at, each once."""
        every = (
            run
            for claim in self.chosen().values()
            for network in self.networks(claim)
            for run in claim.runs(network)
        )
        return list(dict.fromkeys(every))


def read(config: Claims) -> dict[tuple[Run, int], dict[str, float]]:
    """Values by run and seed, of runs as long as these."""
    scale = dataclasses.asdict(config.scale)
    return {
        (Run(**row["run"]), row["seed"]): row["values"]
        for row in read_rows(config.results)
        if row["scale"] == scale
    }


def programs(config: Claims) -> list[list[Run]]:
    """The runs in groups that are compiled once."""
    found: dict[tuple[str, str, str], list[Run]] = {}
    for run in config.runs():
        found.setdefault((run.network, run.what, run.target), []).append(run)
    return list(found.values())


def taken(config: Claims) -> Path:
    """Marks of the groups that a process has begun, a file each."""
    return config.results.with_suffix(".taken")


def take(config: Claims, number: int) -> bool:
    """Whether a group is this process's: the first to mark it has it."""
    try:
        (taken(config) / str(number)).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def compute(config: Claims) -> None:
    """Appends what is missing, in this process."""
    compile_once(config.results.parent / "compiled")
    for number, runs in enumerate(programs(config)):
        if config.worker is not None and not take(config, number):
            continue
        for run, seed in itertools.product(runs, range(config.seeds)):
            if (run, seed) in read(config):
                continue
            began = time.perf_counter()
            values = measure(run, seed, config.scale, config.weights)
            row = {"run": dataclasses.asdict(run), "seed": seed, "values": values}
            row |= {"scale": dataclasses.asdict(config.scale)}
            row |= {"seconds": round(time.perf_counter() - began, 1)}
            append_row(config.results, row)


Judged = tuple[str, str, list[Statement]]


def judged(config: Claims, table: Table) -> Iterator[Judged]:
    """Name, network and statements of each claim, if all of it is measured."""
    for name, claim in config.chosen().items():
        for network in config.networks(claim):
            if missing := sum(not table.has(run) for run in claim.runs(network)):
                print(f"{name}, {network}: not judged, {missing} runs are missing", file=sys.stderr)
            else:
                yield name, network, claim.statements(table, network)


def spread(values: np.ndarray) -> str:
    """Mean ± sd."""
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def print_tables(config: Claims, table: Table, every: list[Judged]) -> None:
    """Verdicts, then every statement, then what they are made of, in Markdown."""
    print("| claim | network | verdict | other experiments |")
    print("|---|---|---|---|")
    for name, network, statements in every:
        cited = ", ".join(f"[{c}]({c}.md)" for c in CLAIMS[name].cited.split(", ") if c)
        print(f"| {CLAIMS[name].text} | {network} | {verdict(statements)} | {cited} |")
    for name, network, statements in every:
        print(f"\n## {name}, {network}: {verdict(statements)}\n")
        print("| | statement | mean ± sd | holds |")
        print("|---|---|---|---|")
        for number, one in enumerate(statements):
            shown = f"{one.mean:+.2f} ± {one.deviation:.2f}"
            letter = chr(ord("a") + number)
            print(f"| {letter} | {one.text} | {shown} | {'yes' if one.holds else 'no'} |")
        if name in ("square", "folds"):
            lost = regrets(table, network)
            print("\nPoints lost to the best candidate, mean of eight cells:", end=" ")
            print("; ".join(f"{what} {spread(values)}" for what, values in lost.items()))
    print_measured(config, table)


def print_measured(config: Claims, table: Table) -> None:
    """Heads by depth and number of labels, and test accuracy of every training run."""
    runs = [run for run in config.runs() if table.has(run)]
    print("\n## Heads, test accuracy in percent\n")
    print("| network | target | per class | distance | " + " | ".join(DEPTHS) + " |")
    print("|---" * (4 + len(DEPTHS)) + "|")
    for run in sorted(run for run in runs if run.what == "heads"):
        apart = table.of(run, "distance") / 100
        for count in (n for n in LABELS if table.has(run, f"{n} stem")):
            shown = " | ".join(spread(table.of(run, f"{count} {depth}")) for depth in DEPTHS)
            print(f"| {run.network} | {run.target} | {count} | {np.mean(apart):.2f} | {shown} |")
    print("\n## Training runs, test accuracy in percent\n")
    print("| network | target | per class | what | accuracy |")
    print("|---|---|---|---|---|")
    for run in sorted(run for run in runs if run.what not in ("heads", "freezing")):
        shown = spread(table.of(run))
        print(f"| {run.network} | {run.target} | {run.per_class} | {run.what} | {shown} |")
    if any(run.what == "freezing" for run in runs):
        run = Run(BUILT_IN, "digits", "freezing")
        costs = (f"{depth} {table.of(run, f'flops {depth}')[0]:.0f}" for depth in DEPTHS)
        print("\nFLOPs of a step in percent, everything up to a depth frozen:", ", ".join(costs))


def draw(config: Claims, table: Table, every: list[Judged], file: Path) -> None:
    """A panel for each claim: curves where there are any, else its statements."""
    found: dict[str, list[tuple[str, list[Statement]]]] = {}
    for name, network, statements in every:
        found.setdefault(name, []).append((network, statements))
    curves = {
        "hierarchy": by_depth,
        "freezing": by_frozen,
        "labels": by_count,
        "bias_variance": by_part,
    }
    figure, grid = plt.subplots(3, 4, figsize=(15, 9.5), layout="constrained")
    for axes in grid.flat:
        axes.tick_params(labelsize=7)
    for axes, (name, claim) in zip(grid.flat, CLAIMS.items(), strict=False):
        axes.set_title(textwrap.fill(claim.text, 45), fontsize=8)
        if name not in found:
            axes.text(0.5, 0.5, "not measured", ha="center")
        elif name in curves and len(found[name]) == len(config.networks(claim)):
            curves[name](axes, config, table)
            axes.legend(fontsize=5, ncols=2, framealpha=0.5)
        else:
            forest(axes, found[name])
    for axes in list(grid.flat)[len(CLAIMS) :]:
        axes.axis("off")
        for network, color in COLORS.items():
            axes.plot([], [], "o", color=color, label=network)
        axes.plot([], [], "o", color="gray", mfc="white", label="does not hold")
        axes.legend(loc="center", fontsize=8)
    figure.savefig(file, dpi=80)
    plt.close(figure)


def forest(axes: Axes, every: list[tuple[str, list[Statement]]]) -> None:
    """Mean differences with two standard errors, lettered as in the tables."""
    places: list[float] = []
    letters = []
    for network, statements in every:
        for number, one in enumerate(statements):
            place = -float(len(places))
            places.append(place)
            letters.append(chr(ord("a") + number))
            twice = 2 * one.deviation / np.sqrt(len(one.values))
            style: dict[str, Any] = {"color": COLORS[network], "fmt": "o", "markersize": 4}
            style |= {} if one.holds else {"mfc": "white"}
            axes.errorbar(one.mean, place, xerr=twice, **style)
    axes.axvline(0, color="gray", linewidth=0.5)
    axes.set_yticks(places, letters)
    axes.set_xlabel("difference, as the claim has it, ± 2 standard errors", fontsize=7)


def by_depth(axes: Axes, config: Claims, table: Table) -> None:
    """Accuracy of heads with 50 labels per class."""
    networks = config.networks(CLAIMS["hierarchy"])
    for network, line in zip(networks, ("-", "--"), strict=False):
        for number, target in enumerate((*EARLY, *LATE)):
            means = [table.head(network, target, f"50 {depth}").mean() for depth in DEPTHS]
            label = target if line == "-" else None
            axes.plot(DEPTHS, means, line, color=f"C{number}", label=label)
    axes.set_ylabel("% right; dashed: thin ResNet-50", fontsize=7)


def by_frozen(axes: Axes, config: Claims, table: Table) -> None:
    """What a step costs."""
    run = Run(BUILT_IN, "digits", "freezing")
    costs = [100.0, *(table.of(run, f"flops {depth}").mean() for depth in DEPTHS)]
    axes.bar(["nothing", *DEPTHS], costs, color=COLORS[BUILT_IN], label="frozen up to")
    axes.set_ylabel("FLOPs of a step, %", fontsize=7)


def by_count(axes: Axes, config: Claims, table: Table) -> None:
    """What training gains over a head on the same labels."""
    for number, (target, what) in enumerate(
        (t, w) for t in ("digits", "polygons") for w in ("layer4", "everything")
    ):
        gains = np.array(
            [
                table.trained(target, what, count) - table.head(BUILT_IN, target, f"{count} layer4")
                for count in LABELS
            ]
        )
        bars = 2 * gains.std(axis=1, ddof=1) / np.sqrt(gains.shape[1])
        axes.errorbar(
            LABELS, gains.mean(axis=1), bars, color=f"C{number}", label=f"{target}, {what}"
        )
    axes.axhline(0, color="gray", linewidth=0.5)
    axes.set_xscale("log")
    axes.set_xticks(LABELS, [str(count) for count in LABELS])
    axes.set_ylabel("points over the head on layer4", fontsize=7)


def by_part(axes: Axes, config: Claims, table: Table) -> None:
    """Bias and variance of a head by number of labels."""
    for network in config.networks(CLAIMS["bias_variance"]):
        for number, target in enumerate(SPLIT_TARGETS):
            for part, line in (("bias", "-"), ("variance", ":")):
                means = [table.head(network, target, f"{n} {part}").mean() for n in LABELS]
                marker = "o" if network == BUILT_IN else "s"
                label = f"{target}, {part}" if network == BUILT_IN else None
                axes.plot(
                    LABELS,
                    means,
                    line,
                    color=f"C{number}",
                    marker=marker,
                    markersize=3,
                    label=label,
                )
    axes.set_xscale("log")
    axes.set_xticks(LABELS, [str(count) for count in LABELS])
    axes.set_ylabel("% of images; squares: thin ResNet-50", fontsize=7)


def main(config: Claims) -> None:
    """Computes what is missing, judges and draws."""
    if unknown := [name for name in config.names if name not in CLAIMS]:
        print(f"no claims {unknown}; there are {list(CLAIMS)}", file=sys.stderr)
        raise SystemExit(2)
    config.results.parent.mkdir(parents=True, exist_ok=True)
    if config.worker is not None or (config.processes == 1 and not config.print_only):
        compute(config)
    elif not config.print_only:
        shutil.rmtree(taken(config), ignore_errors=True)
        taken(config).mkdir()
        share(config.processes)
    if config.worker is None:
        table = Table(read(config), range(config.seeds))
        every = list(judged(config, table))
        print_tables(config, table, every)
        if config.figure is not None:
            draw(config, table, every, config.figure)


if __name__ == "__main__":
    main(tyro.cli(Claims))
