"""Where the built-in network is stiff, and where new data pull at it: measured, stage by stage.

    python experiments/curvature.py        # six minutes on 2 CPU cores

Are early layers stiffer? The Fisher diagonal is printed over all leaves and over kernels alone, for
the network with a linear probe on digits as its head. Then the norm of the gradient beside that of
the weights, for the digits as they are, with noise, inverted, and with their labels exchanged; the
probe in each case is the one of the digits as they are, as if the shift came afterwards. Last, the
stem beside layer4 for every draw by itself, where what all parts have in common cancels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
import tyro

import flaxtransfer as ft
from flaxtransfer.analysis import (
    Curvature,
    curvature_by_part,
    fisher_diagonal,
    mean_gradient,
    relative_gradient_norms,
)
from flaxtransfer.recipes import units
from flaxtransfer.training import init_head_from_probe
from flaxtransfer.weights import normalize


@dataclass(frozen=True)
class CurvatureOfStages:
    """What to measure on.

    Args:
      labels_per_class: digits of each class.
      seeds: draws of digits.
      noise: standard deviation of the noise, in gray values of 255.
      labels: "all" takes the exact expectation over labels, "sampled" draws one an image, at a
        tenth of the price.
    """

    labels_per_class: int = 20
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    noise: float = 60.0
    labels: Literal["all", "sampled"] = "all"


def measure(config: CurvatureOfStages, seed: int) -> tuple[Curvature, Curvature, dict[str, Any]]:
    """Curvature of all leaves and of kernels, and ratios by shift, for one draw of digits."""
    source, checkpoint = ft.open_source("digits"), ft.load("builtin")
    preprocessing = checkpoint.preprocessing
    network = ft.transfer(checkpoint, classes=10, seed=seed)
    model, variables = network.model, network.variables
    labels_per_class = config.labels_per_class
    drawn = ft.stratified_split(source.labels(), labels_per_class=labels_per_class, seed=seed)
    batches = list(ft.eval_batches(source, drawn.train, preprocessing, batch_size=50))
    params, _ = init_head_from_probe(ft.Classifier(model, variables, preprocessing), batches)

    def logits(params: ft.models.Params, images: Any) -> jax.Array:
        inputs = normalize(images, preprocessing.mean, preprocessing.std)
        return model.apply({**variables, "params": params}, inputs, norm="running")[0]

    images = [batch["image"][batch["weight"] > 0] for batch in batches]
    fisher, count = fisher_diagonal(logits, params, images, labels=config.labels)
    parts = units(params)
    random = np.random.default_rng(seed)
    shifts = {
        "as they are": lambda batch: batch,
        "noise": lambda batch: batch | {"image": noisy(batch["image"], config.noise, random)},
        "inverted": lambda batch: batch | {"image": 255 - batch["image"]},
        "relabeled": lambda batch: batch | {"label": (batch["label"] + 1) % 10},
    }
    ratios = {
        name: relative_gradient_norms(
            params,
            mean_gradient(
                ft.Classifier(model, {**variables, "params": params}, preprocessing),
                map(shift, batches),
            ),
            parts,
        )
        for name, shift in shifts.items()
    }
    kernels = curvature_by_part(fisher, parts, count, ft.kernels())
    return curvature_by_part(fisher, parts, count), kernels, ratios


def noisy(images: np.ndarray, deviation: float, random: np.random.Generator) -> np.ndarray:
    noise = random.normal(scale=deviation, size=images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


def main(config: CurvatureOfStages) -> None:
    found = [measure(config, seed) for seed in config.seeds]
    every, kernels, ratios = zip(*found, strict=True)
    print("| part | parameters | mean of all leaves | of kernels | share of the trace |")
    print("|---|---|---|---|---|")
    for number, part in enumerate(every[0].parts):
        of_all = [one.parts[number].mean for one in every]
        of_kernels = [one.parts[number].mean for one in kernels]
        share = 100 * np.mean([one.parts[number].share for one in every])
        print(
            f"| {part.name} | {part.parameters:,} | {geometric(of_all)} | {geometric(of_kernels)} "
            f"| {share:.1f} % |"
        )
    print("\n| gradient / weights | " + " | ".join(ratios[0]) + " |")
    print("|---" * (1 + len(ratios[0])) + "|")
    for part in every[0].parts:
        cells = [geometric([one[shift][part.name] for one in ratios]) for shift in ratios[0]]
        print(f"| {part.name} | " + " | ".join(cells) + " |")
    print_draws(config, every, ratios)


def print_draws(
    config: CurvatureOfStages, every: tuple[Curvature, ...], ratios: tuple[dict[str, Any], ...]
) -> None:
    """Stem over layer4: of the curvature, and of what each shift does to the ratio of gradients."""
    shifts = [name for name in ratios[0] if name != "as they are"]
    print(
        "\n| draw | stem / layer4, Fisher | "
        + " | ".join(f"{s}: stem, layer4" for s in shifts)
        + " |"
    )
    print("|---" * (2 + len(shifts)) + "|")
    for seed, one, ratio in zip(config.seeds, every, ratios, strict=True):
        means, before = one.means(), ratio["as they are"]
        cells = [
            ", ".join(f"x {ratio[s][part] / before[part]:.0f}" for part in ("stem", "layer4"))
            for s in shifts
        ]
        print(f"| {seed} | {means['stem'] / means['layer4']:.0f} | " + " | ".join(cells) + " |")


def geometric(values: list[float]) -> str:
    """Geometric mean over the seeds, and the factor that one standard deviation is."""
    logs = np.log(values)
    spread = np.exp(logs.std(ddof=1)) if len(values) > 1 else 1.0
    return f"{np.exp(logs.mean()):.2e} (x {spread:.2f})"


if __name__ == "__main__":
    main(tyro.cli(CurvatureOfStages))
