"""How much accuracy the advice and the race of `--strategy auto` lose to the best strategy.

    python experiments/strategy_grid.py --seeds 0 1                  # an hour on 2 busy cores
    python experiments/advisor_regret.py --seeds 1 --known-seeds 0   # 10 minutes more

Judged on draws of the targets that no rule was made on. What is known of gains comes from the other
draws of all other families: each family is left out in turn. What `advise` recommends and what the
race chooses were trained by strategy_grid.py, from whose file their accuracies are read. What is in
the file of choices already is not computed again.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import flaxtransfer as ft
import strategy_grid
import targets
import workers


@dataclass(frozen=True)
class Regret:
    """Which cells, and where their results are.

    Args:
        results: JSON lines of strategy_grid.py.
        choices: JSON lines of this script, which goes on where it stopped.
        seeds: draws to judge on.
        known_seeds: draws that the gains are taken of.
        per_class: labels per class.
        families: targets; by default all but random labels.
        budget: of the race; "1x" leaves the race out.
        steps: of every strategy that is trained.
        batch_size: images per step.
    """

    results: Path = Path("strategy_grid.jsonl")
    choices: Path = Path("advisor_regret.jsonl")
    seeds: tuple[int, ...] = (1,)
    known_seeds: tuple[int, ...] = (0,)
    per_class: int = 20
    families: tuple[str, ...] = tuple(name for name in targets.FAMILIES if name != "random labels")
    budget: str = "4x"
    steps: int = 300
    batch_size: int = 32


def judged(config: Regret, rows: list[dict[str, Any]], family: str, seed: int) -> dict[str, Any]:
    """What advice and race choose for a target, and what they lose."""
    place = (family, config.per_class, seed)
    own = [row for row in rows if (row["family"], row["per_class"], row["seed"]) == place]
    accuracy = {row["what"]: row["accuracy"] for row in own if row["what"] != "advice"}
    known = [row for row in rows if row["seed"] in config.known_seeds]
    network = ft.load("builtin").config.name
    gains = {"network": network, "gains": strategy_grid.gains(known, family)}
    cell = strategy_grid.Cell.of(*place)
    lengths = {"steps": config.steps}
    with tempfile.TemporaryDirectory() as folder:
        choice = ft.advice.choose(
            cell.network,
            cell.source,
            cell.splits,
            folder,
            budget=config.budget,
            batch_size=config.batch_size,
            seed=seed,
            feed=lambda splits: ft.loaders(
                cell.source,
                splits,
                cell.network.preprocessing,
                batch_size=config.batch_size,
                transform=strategy_grid.shifted,
                seed=seed,
            ),
            lengths=lambda name: {} if name in ("solved_head", "depth_head") else lengths,
            cache=ft.Cache(),
            gains=gains,
        )
    recommended = choice.advice.best
    assert recommended is not None  # or `choose` refuses
    best = max(accuracy.values())
    return {
        "family": family,
        "seed": seed,
        "wrong": choice.advice.evidence.wrong,
        "verdict": choice.advice.verdict,
        "best": max(accuracy, key=lambda name: accuracy[name]),
        "advice": recommended.strategy,
        "advice_regret": best - accuracy[recommended.strategy],
        "auto": choice.candidate.strategy,
        "auto_regret": best - accuracy[choice.candidate.strategy],
        "runs": choice.runs,
        "stated": None if choice.race is None else choice.race.regret,
        "race": None if choice.race is None else choice.race.to_json(),
        "fixed": {name: best - value for name, value in accuracy.items()},
    }


def main(config: Regret) -> None:
    """Prints a row per target, and means."""
    rows, found = workers.read_rows(config.results), []
    made = {(one["family"], one["seed"]): one for one in workers.read_rows(config.choices)}
    print(
        f"{'target':<22} {'seed':>4} {'verdict':<8} {'advice':<22} {'lost':>5} {'auto':<22}", end=""
    )
    print(f" {'lost':>5} {'runs':>4} {'said':>5}  best")
    for seed in config.seeds:
        for family in config.families:
            if (one := made.get((family, seed))) is None:
                one = judged(config, rows, family, seed)
                workers.append_row(config.choices, one)
            found.append(one)
            said = "" if one["stated"] is None else f"{100 * one['stated']:.1f}"
            print(
                f"{family:<22} {seed:>4} {one['verdict']:<8} {one['advice']:<22} "
                f"{100 * one['advice_regret']:>5.1f} {one['auto']:<22} "
                f"{100 * one['auto_regret']:>5.1f} {one['runs']:>4} {said:>5}  {one['best']}",
                flush=True,
            )
    fixed = {
        name: [one["fixed"][name] for one in found]
        for name in found[0]["fixed"]
        if all(name in one["fixed"] for one in found)
    }
    best_fixed = min(fixed, key=lambda name: float(np.mean(fixed[name])))
    columns = {
        "advice": [one["advice_regret"] for one in found],
        "auto": [one["auto_regret"] for one in found],
        f"best fixed: {best_fixed}": fixed[best_fixed],
    }
    for name, values in columns.items():
        lost = 100 * np.array(values)
        print(
            f"{name}: mean regret {lost.mean():.1f} points, 95th percentile "
            f"{np.percentile(lost, 95):.1f}, largest {lost.max():.1f}"
        )


if __name__ == "__main__":
    main(tyro.cli(Regret))
