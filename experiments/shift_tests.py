"""How the tests of shift behave: their level where H0 is true, their power where it is not.

    python experiments/shift_tests.py

Four Gaussian classes in ten dimensions, their exact posteriors for a model, 600 source and 300
target examples. Prints four tables in Markdown; about 4 minutes on 2 CPU cores.
Expected: every rate at level 0.05 between 0.03 and 0.07. The second table shows what comes of
posteriors that are estimated and passed as if they were known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
import tyro
from scipy.special import log_softmax
from scipy.stats import binomtest, kstest

from flaxtransfer.shift import (
    Calibration,
    EstimatedPosteriors,
    HypothesisTest,
    calibrate,
    classifier_test,
    corrected_posteriors,
    kolmogorov_smirnov_test,
    label_residual_test,
    log_loss_test,
    mmd_test,
    posterior_ratio_tests,
    predicted_label_test,
    prior_test,
    residual_test,
)

CLASSES, WIDTH = 4, 10
EVEN = np.full(CLASSES, 1 / CLASSES)
MILD = np.array([0.4, 0.3, 0.2, 0.1])
STRONG = np.array([0.7, 0.1, 0.1, 0.1])
BIAS = np.array([0.5, 0.0, -0.5, 0.0])
MEANS = 2.0 * np.eye(CLASSES, WIDTH)
REPETITIONS = 199


@dataclass(frozen=True)
class Study:
    """How many draws of the world each number is from."""

    null_draws: int = 500
    power_draws: int = 50
    seed: int = 0
    processes: int = 2


@dataclass(frozen=True, eq=False)
class World:
    """Source validation and target of one draw."""

    source_features: np.ndarray
    source: Calibration
    target_features: np.ndarray
    target_probabilities: np.ndarray
    target_labels: np.ndarray


def log_posteriors(features: np.ndarray) -> np.ndarray:
    """Of the source, exactly."""
    return log_softmax(features @ MEANS.T - (MEANS**2).sum(1) / 2, axis=1)


def draw(
    rng: np.random.Generator,
    *,
    rows: int = 600,
    target_rows: int = 300,
    prevalence: np.ndarray = EVEN,
    nuisance: float = 0.0,
    aligned: float = 0.0,
    tilt: float = 0.0,
    swapped: float = 0.0,
    renamed: float = 0.0,
    fitted: bool = False,
) -> World:
    """A source of even prevalence, and a target that differs in what is not 0.

    Args:
        rng: of the draw.
        rows: of the source.
        target_rows: of the target.
        prevalence: of the target's classes.
        nuisance: a step in the four dimensions that say nothing about the class.
        aligned: a step from the first class's mean towards the second's, of all classes.
        tilt: of a density ratio exp(tilt * x) in the first dimension: p(y | x) stays.
        swapped: share of labels that are replaced by the next class: p(y | x) changes, x does not.
        renamed: share of the first class's labels that are replaced by the second.
        fitted: whether the model is too sure and biased, and is calibrated on the source's rows.
    """
    labels = rng.integers(CLASSES, size=rows)
    features = MEANS[labels] + rng.normal(size=(rows, WIDTH))
    # A Gaussian tilted by exp(a x) is moved by a, and of prevalence in proportion to exp(a mean).
    shares = prevalence * np.exp(tilt * MEANS[:, 0])
    target_labels = rng.choice(CLASSES, size=target_rows, p=shares / shares.sum())
    target = MEANS[target_labels] + rng.normal(size=(target_rows, WIDTH))
    target[:, 0] += tilt
    target[:, 6:] += nuisance
    target[:, :2] += aligned * np.array([-1.0, 1.0])
    target_labels = (target_labels + (rng.random(target_rows) < swapped)) % CLASSES
    target_labels[(target_labels == 0) & (rng.random(target_rows) < renamed)] = 1
    if fitted:
        source = calibrate(1.7 * log_posteriors(features) + BIAS, labels)
        probabilities = source.apply(1.7 * log_posteriors(target) + BIAS)
    else:
        own, probabilities = np.exp(log_posteriors(features)), np.exp(log_posteriors(target))
        source = Calibration("none", np.ones(CLASSES), np.zeros(CLASSES), own, labels)
    return World(features, source, target, probabilities, target_labels)


def on_features(world: World, seed: int, **options: int) -> HypothesisTest:
    return mmd_test(
        world.source_features,
        world.target_features,
        permutations=REPETITIONS,
        seed=seed,
        **options,
    )


def by_classifier(world: World, seed: int) -> HypothesisTest:
    return classifier_test(
        world.source_features, world.target_features, permutations=REPETITIONS, seed=seed
    )


def on_columns(world: World, seed: int) -> HypothesisTest:
    del seed
    return kolmogorov_smirnov_test(world.source_features, world.target_features)


def on_probabilities(world: World, seed: int) -> HypothesisTest:
    del seed
    return kolmogorov_smirnov_test(world.source.probabilities, world.target_probabilities)


def on_predictions(world: World, seed: int) -> HypothesisTest:
    return predicted_label_test(
        world.source.probabilities, world.target_probabilities, permutations=999, seed=seed
    )


def on_prior(world: World, seed: int) -> HypothesisTest:
    return prior_test(world.target_probabilities, world.source, permutations=REPETITIONS, seed=seed)


def on_residual(world: World, seed: int) -> HypothesisTest:
    return residual_test(
        world.source_features,
        world.target_features,
        world.target_probabilities,
        world.source,
        simulations=REPETITIONS,
        seed=seed,
    )


def adjusted(world: World, count: int, seed: int) -> EstimatedPosteriors:
    return corrected_posteriors(
        np.arange(count), world.target_probabilities, world.source, draws=100, seed=seed
    )


def on_labels(
    test: Callable[..., HypothesisTest], count: int, *, adjust: bool, known: bool = False
) -> Callable[[World, int], HypothesisTest]:
    """A test of the labels of the first `count` target examples."""

    def run(world: World, seed: int) -> HypothesisTest:
        given: np.ndarray | EstimatedPosteriors = world.target_probabilities[:count]
        if adjust:
            found = adjusted(world, count, seed)
            given = found.posteriors if known else found
        return test(given, world.target_labels[:count], simulations=999, seed=seed)

    return run


def of_two(which: int, count: int) -> Callable[[World, int], HypothesisTest]:
    """The test of the covariate hypothesis (0) or of the label hypothesis (1) by `count` labels."""

    def run(world: World, seed: int) -> HypothesisTest:
        return posterior_ratio_tests(
            world.target_probabilities[:count],
            adjusted(world, count, seed),
            world.target_labels[:count],
            simulations=999,
            seed=seed,
        )[which]

    return run


UNCORRECTED = "posteriors taken as known"
NULLS: tuple[tuple[str, str, dict, Callable[[World, int], HypothesisTest]], ...] = (
    ("MMD", "no shift", {}, on_features),
    ("MMD in blocks of 128", "no shift", {}, lambda w, s: on_features(w, s, block=128)),
    ("classifier", "no shift", {}, by_classifier),
    ("KS of features", "no shift", {}, on_columns),
    ("KS of probabilities (conservative)", "no shift", {}, on_probabilities),
    ("predicted labels", "no shift", {}, on_predictions),
    (
        "predicted labels, n = 30, m = 15",
        "no shift",
        {"rows": 30, "target_rows": 15},
        on_predictions,
    ),
    ("prior", "no shift", {}, on_prior),
    ("prior, n = 100", "no shift", {"rows": 100}, on_prior),
    ("prior, calibrated on the same", "no shift", {"fitted": True}, on_prior),
    ("prior, calibrated on the same, n = 100", "no shift", {"fitted": True, "rows": 100}, on_prior),
    ("residual", "no shift", {}, on_residual),
    ("residual", "label, mild", {"prevalence": MILD}, on_residual),
    ("residual", "label, strong", {"prevalence": STRONG}, on_residual),
    ("residual, n = 150", "label, mild", {"rows": 150, "prevalence": MILD}, on_residual),
    (
        "residual, calibrated on the same",
        "label, mild",
        {"fitted": True, "prevalence": MILD},
        on_residual,
    ),
    (
        "residual, calibrated on the same, n = 100",
        "label, mild",
        {"fitted": True, "rows": 100, "prevalence": MILD},
        on_residual,
    ),
    ("log-loss, 50 labels", "covariate", {"tilt": 0.5}, on_labels(log_loss_test, 50, adjust=False)),
    (
        "label residual, 50 labels",
        "covariate",
        {"tilt": 0.5},
        on_labels(label_residual_test, 50, adjust=False),
    ),
    (
        "log-loss, 200 labels, " + UNCORRECTED,
        "label, strong",
        {"prevalence": STRONG},
        on_labels(log_loss_test, 200, adjust=True, known=True),
    ),
    (
        "log-loss, 200 labels",
        "label, strong",
        {"prevalence": STRONG},
        on_labels(log_loss_test, 200, adjust=True),
    ),
    (
        "label residual, 200 labels, " + UNCORRECTED,
        "label, strong",
        {"prevalence": STRONG},
        on_labels(label_residual_test, 200, adjust=True, known=True),
    ),
    (
        "label residual, 200 labels",
        "label, strong",
        {"prevalence": STRONG},
        on_labels(label_residual_test, 200, adjust=True),
    ),
    ("covariate hypothesis, 50 labels", "covariate", {"tilt": 0.5}, of_two(0, 50)),
    ("label hypothesis, 50 labels", "label, strong", {"prevalence": STRONG}, of_two(1, 50)),
)
"""Test, what is true, the world, the function; H0 holds in all of them."""

UNLABELLED = {
    "MMD": on_features,
    "classifier": by_classifier,
    "KS": on_columns,
    "predicted": on_predictions,
    "prior": on_prior,
    "residual": on_residual,
}
SHIFTS: tuple[tuple[str, dict], ...] = (
    *(
        (
            f"label, {share:.0%} of the way to (.7, .1, .1, .1)",
            {"prevalence": EVEN + share * (STRONG - EVEN)},
        )
        for share in (0.1, 0.2, 0.4, 1.0)
    ),
    *((f"features, nuisance step {step}", {"nuisance": step}) for step in (0.1, 0.2, 0.4)),
    *((f"features, class-aligned step {step}", {"aligned": step}) for step in (0.2, 0.4, 0.8)),
    *((f"covariate, tilt {tilt}", {"tilt": tilt}) for tilt in (0.1, 0.2, 0.4)),
    *(
        (
            f"nuisance step 0.2, n = {rows}, m = {rows // 2}",
            {"nuisance": 0.2, "rows": rows, "target_rows": rows // 2},
        )
        for rows in (150, 300, 1200)
    ),
    *(
        (
            f"label, 20% of the way, n = {rows}, m = {rows // 2}",
            {"prevalence": EVEN + 0.2 * (STRONG - EVEN), "rows": rows, "target_rows": rows // 2},
        )
        for rows in (150, 300, 1200)
    ),
)

LABELLED: tuple[tuple[str, dict, Callable[[int], Callable[[World, int], HypothesisTest]]], ...] = (
    (
        "log-loss, 15 % of labels swapped",
        {"swapped": 0.15},
        lambda count: on_labels(log_loss_test, count, adjust=False),
    ),
    (
        "label residual, 15 % of labels swapped",
        {"swapped": 0.15},
        lambda count: on_labels(label_residual_test, count, adjust=False),
    ),
    (
        "log-loss, half of class 0 renamed 1",
        {"renamed": 0.5},
        lambda count: on_labels(log_loss_test, count, adjust=False),
    ),
    (
        "label residual, half of class 0 renamed 1",
        {"renamed": 0.5},
        lambda count: on_labels(label_residual_test, count, adjust=False),
    ),
    (
        "covariate hypothesis under label shift",
        {"prevalence": STRONG},
        lambda count: of_two(0, count),
    ),
    ("label hypothesis under covariate shift", {"tilt": 0.8}, lambda count: of_two(1, count)),
    ("label hypothesis under class-aligned step", {"aligned": 0.8}, lambda count: of_two(1, count)),
)
LABEL_COUNTS = (10, 20, 50, 100, 200)


def p_values(
    world: dict, test: Callable[[World, int], HypothesisTest], draws: int, seed: int
) -> np.ndarray:
    """Of `draws` worlds; 1 where the question was not testable."""
    found = []
    for number in range(draws):
        rng = np.random.default_rng((seed, number))
        p = test(draw(rng, **world), number).p
        found.append(1.0 if p is None else p)
    return np.array(found)


def null_row(number: int, study: Study) -> np.ndarray:
    return p_values(
        NULLS[number][2], NULLS[number][3], study.null_draws, study.seed + 1000 * number
    )


def power_row(number: int, study: Study) -> list[float]:
    """Of the tests without labels in one of `SHIFTS`, then of those with labels in `LABELLED`."""
    if number < len(SHIFTS):
        world = SHIFTS[number][1]
        tests = list(UNLABELLED.values())
    else:
        _, world, test_of = LABELLED[number - len(SHIFTS)]
        tests = [test_of(count) for count in LABEL_COUNTS]
    return [
        float((p_values(world, test, study.power_draws, study.seed) <= 0.05).mean())
        for test in tests
    ]


def table(name: str, columns: Iterable[object]) -> None:
    print("|".join(["", f" {name} ", *(f" {column} " for column in columns), ""]), flush=True)


def null_table(title: str, rows: dict[tuple[str, str], np.ndarray], study: Study) -> None:
    """How often tests reject what is true."""
    table(
        title,
        [
            "what is true",
            f"rate at .05 of {study.null_draws}",
            "95 % interval",
            "mean p",
            "p of uniformity",
        ],
    )
    table("---", ["---"] * 5)
    for (name, truth), found in rows.items():
        rejected = int((found <= 0.05).sum())
        interval = binomtest(rejected, len(found)).proportion_ci(method="wilson")
        table(
            name,
            [
                truth,
                f"{rejected / len(found):.3f}",
                f"{interval.low:.3f}-{interval.high:.3f}",
                f"{found.mean():.2f}",
                f"{kstest(found, 'uniform').pvalue:.3f}",
            ],
        )


def main(study: Study) -> None:
    # JAX and a forked process do not go together.
    pool = ProcessPoolExecutor(study.processes, mp_context=get_context("spawn"))
    with pool:
        nulls = pool.map(partial(null_row, study=study), range(len(NULLS)))
        powers = pool.map(partial(power_row, study=study), range(len(SHIFTS) + len(LABELLED)))
        tests, misuses = {}, {}
        for (name, truth, _, _), found in zip(NULLS, nulls, strict=True):
            (misuses if UNCORRECTED in name else tests)[name, truth] = found
        for title, rows in (("test", tests), ("the same misused: the level is lost", misuses)):
            null_table(title, rows, study)
            print()
        table(f"power at .05, {study.power_draws} draws", UNLABELLED)
        table("---", ["---"] * len(UNLABELLED))
        for name, _ in SHIFTS:
            table(name, [f"{rate:.2f}" for rate in next(powers)])
        print()
        table("power at .05", [f"{count} labels" for count in LABEL_COUNTS])
        table("---", ["---"] * len(LABEL_COUNTS))
        for name, _, _ in LABELLED:
            table(name, [f"{rate:.2f}" for rate in next(powers)])


if __name__ == "__main__":
    main(tyro.cli(Study))
