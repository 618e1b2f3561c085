"""What the diagnosis says of shifts that are known, unlabeled and with a few target labels.

    python experiments/shift_diagnosis.py                 # about ten minutes on 2 CPU cores
    python experiments/shift_diagnosis.py --draws 5

The worlds are those of ``shift_tests.py``: four Gaussian classes in ten dimensions, their exact
posteriors for a model, 600 held-out examples of the source and 300 of the target. Rows are what is
true, columns what is concluded; what is neither true nor "undetermined" is a false attribution. A
step along the classes changes p(y | x) as well, so that with labels "concept" is right there.
Expected: without labels, what changes p(y | x) alone is not seen at all.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import get_args

import numpy as np
import tyro

from flaxtransfer.shift import Conclusion, diagnose
from shift_tests import MILD, STRONG, draw, log_posteriors

CONCLUSIONS: tuple[str, ...] = get_args(Conclusion)

SCENARIOS: dict[str, dict] = {
    "none": {},
    "label, mild": {"prevalence": MILD},
    "label, strong": {"prevalence": STRONG},
    "covariate, nuisance": {"nuisance": 0.5},
    "covariate, p(y given x) kept": {"tilt": 0.5},
    "step along the classes": {"aligned": 0.6},
    "label and covariate": {"prevalence": STRONG, "nuisance": 0.5},
    "concept, labels swapped": {"swapped": 0.4},
    "one class moved": {"moved": 1.0},
}
"""What is true, and the world in which it is; ``moved`` is a step of the first class alone."""


@dataclass(frozen=True)
class Study:
    """What to simulate.

    Args:
      draws: worlds of each kind.
      labels: numbers of target labels, one table each.
      permutations: of each test.
      processes: that share the work.
      seed: of all that is drawn.
    """

    draws: int = 40
    labels: tuple[int, ...] = (0, 50)
    permutations: int = 199
    processes: int = 2
    seed: int = 0


def conclusion(world: dict, labels: int, permutations: int, seed: tuple[int, int]) -> str:
    """Of one draw of the world."""
    rng = np.random.default_rng(seed)
    moved = world.get("moved", 0.0)
    settings = {name: value for name, value in world.items() if name != "moved"}
    found = draw(rng, **settings)
    if moved:
        features = found.target_features.copy()
        features[found.target_labels == 0, 6] += moved
        found = dataclasses.replace(
            found,
            target_features=features,
            target_probabilities=np.exp(log_posteriors(features)),
        )
    known = np.arange(labels)
    return diagnose(
        np.log(found.source.probabilities),
        found.source.labels,
        found.source_features,
        np.log(found.target_probabilities),
        found.target_features,
        labeled=(known, found.target_labels[:labels]) if labels else None,
        permutations=permutations,
        seed=seed[1],
    ).conclusion


def confusion(study: Study, labels: int) -> dict[str, Counter[str]]:
    """Conclusions by what is true."""
    with ProcessPoolExecutor(study.processes) as pool:
        waiting = {
            name: [
                pool.submit(conclusion, world, labels, study.permutations, (study.seed, number))
                for number in range(study.draws)
            ]
            for name, world in SCENARIOS.items()
        }
        return {name: Counter(f.result() for f in futures) for name, futures in waiting.items()}


def main(study: Study) -> None:
    """Prints a table for each number of labels."""
    for labels in study.labels:
        print(
            f"\n| {labels} target labels, {study.draws} draws | " + " | ".join(CONCLUSIONS) + " |"
        )
        print("|---" * (len(CONCLUSIONS) + 1) + "|")
        for name, counts in confusion(study, labels).items():
            shares = [counts[each] / study.draws for each in CONCLUSIONS]
            print(
                f"| {name} | " + " | ".join(f"{share:.2f}" for share in shares) + " |", flush=True
            )


if __name__ == "__main__":
    main(tyro.cli(Study))
