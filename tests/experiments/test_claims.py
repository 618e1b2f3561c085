"""The claims of transfer learning: their rule, and a small form of every measurement."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import claim_rules
import claim_runs
import flaxtransfer as ft
import targets
from claim_rules import CLAIMS, Statement, Table, verdict
from claim_runs import BUILT_IN, DEPTHS, GUIDED, STRATEGIES, THIN, Cell, Scale
from claims import Claims, judged, programs, take, taken

SEEDS = range(5)


@pytest.mark.parametrize(
    ("values", "kind", "holds"),
    [
        ([1.0, 1.0, 1.0, 1.0], "better", True),
        ([0.99, 0.99, 0.99, 0.99], "better", False),  # less than a point
        # Standard error 1: a mean of 2 is not more than two of them.
        ([0.0, 0.0, 4.0, 4.0], "better", False),
        ([0.5, 0.5, 4.0, 4.0], "better", True),
        ([-0.5, -0.5, -0.5, -0.5], "no worse", True),
        ([-1.0, -1.0, -1.0, -1.0], "no worse", False),
        ([-3.0, -1.0, 1.0, 3.0], "no worse", False),  # level, and it might be three behind
        ([2.0, 2.0, 2.0, 2.0], "no worse", True),
    ],
)
def test_a_statement_holds_by_a_point_and_two_standard_errors(values, kind, holds):
    assert Statement("", np.array(values), kind).holds is holds


def test_the_verdict_names_the_statements_that_hold():
    yes, no = Statement("", np.full(3, 9.0)), Statement("", np.full(3, -9.0))
    assert verdict([yes, yes]) == "holds"
    assert verdict([no, yes, yes]) == "holds for b, c (2 of 3)"
    assert verdict([no, no]) == "does not hold (0 of 2)"


def table(values):
    """A table whose values are a function of run, name and seed."""

    class Rows(dict):
        def __missing__(self, key):
            run, seed = key
            return Names(run, seed)

    class Names(dict):
        def __init__(self, run, seed):
            self.run, self.seed = run, seed

        def __missing__(self, name):
            return values(self.run, name, self.seed)

    return Table(Rows(), SEEDS)


def letters(name, values, network=BUILT_IN):
    """Which statements of a claim hold."""
    statements = CLAIMS[name].statements(table(values), network)
    return "".join(chr(ord("a") + n) for n, one in enumerate(statements) if one.holds)


def by_depth(rising):
    """Heads whose accuracy rises with depth on some targets and falls on others."""

    def values(run, name, seed):
        place = DEPTHS.index(name.split()[1])
        return 0.3 + 0.1 * (place if run.target in rising else 4 - place)

    return values


def test_hierarchy_asks_every_attribute_for_its_end():
    late, early = claim_rules.LATE, claim_rules.EARLY
    assert letters("hierarchy", by_depth(late)) == "abcdefg"
    assert letters("hierarchy", by_depth(early)) == ""
    assert letters("hierarchy", by_depth((*late, "colors"))) == "bcdefg"


def test_freezing_wants_zeros_and_fewer_operations_at_every_depth():
    def values(flops, moved=0.0, gradient=0.0):
        costs = dict(zip((f"flops {d}" for d in DEPTHS), flops, strict=True))
        return lambda run, name, seed: {**costs, "moved": moved, "gradient": gradient}[name]

    assert letters("freezing", values((0.9, 0.7, 0.5, 0.4, 0.35))) == "abcd"
    assert letters("freezing", values((0.9, 0.7, 0.7, 0.4, 0.35))) == "abd"
    assert letters("freezing", values((0.9, 0.7, 0.5, 0.4, 0.35), moved=1.0)) == "bcd"
    assert letters("freezing", values((0.9, 0.7, 0.5, 0.4, 0.35), gradient=1e-30)) == "acd"


def test_labels_want_a_gain_that_grows_with_labels_per_parameter():
    def values(slope):
        def of(run, name, seed):
            if run.what == "heads":
                return 0.5
            return 0.5 + slope * np.log(run.per_class / 20)

        return of

    assert letters("labels", values(0.1)) == "abcde"
    assert letters("labels", values(-0.1)) == ""
    # Few parameters are better: a sixteenth of the features ranks above all.
    sixteenth = lambda run, name, seed: 0.6 if "sixteenth" in name else 0.5  # noqa: E731
    assert letters("labels", sixteenth, THIN) == "abc"


def test_the_square_is_judged_by_what_it_recommends():
    far = claim_rules.SQUARE[2:]

    def values(run, name, seed):
        if name == "distance":
            return 0.9 if run.target in far else 0.1
        if name.endswith("folds"):
            return 1.0 if "stem" in name else 0.0  # folds say stem, and are wrong
        few = run.per_class == 5 if run.what != "heads" else name.startswith("5 ")
        best = {
            (True, False): "5 layer4",
            (True, True): "5 layer2",
            (False, False): "everything",
            (False, True): "everything at 3e-3",
        }[few, run.target in far]
        gain = 0.2 if run.target in far else 0.0
        return 0.5 + gain * (best in (name, run.what)) + 0.1 * (best in (name, run.what))

    assert letters("square", values)[:4] == "abcd"
    assert "d" not in letters("folds", values)


def test_folds_choose_the_depth_by_folds_and_not_by_tests():
    def values(run, name, seed):
        if name == "distance":
            return 0.5
        if name.endswith("folds"):
            return 0.9 if "layer1" in name else 0.1
        return 0.9 if "layer1" in name else 0.4

    assert letters("folds", values) == "abcd"
    assert letters("folds", values, THIN) == "ab"
    assert np.all(claim_rules.regrets(table(values), BUILT_IN)["folds"] == 0)


def test_rates_are_chosen_on_held_out_images():
    def values(run, name, seed):
        # Discriminative rates: the best on tests, 1e-2, is not the best on held-out images.
        if run.what.startswith("uniform"):
            return 0.5
        best = {"test": "0.01", "held": "0.003"}[name]
        return 0.9 if run.what.endswith(best) else 0.3

    assert letters("rates", values) == ""
    better = lambda run, name, seed: 0.9 if run.what.startswith("disc") else 0.5  # noqa: E731
    assert letters("rates", better) == "a"


@pytest.mark.parametrize(
    ("name", "better", "network", "found"),
    [
        ("unfreezing", "gradual", BUILT_IN, "ab"),
        ("unfreezing", "everything", BUILT_IN, ""),
        ("batch_norm", "BatchNorm", BUILT_IN, "abef"),
        ("batch_norm", ", running", BUILT_IN, "bf"),  # as good as everything, and both too low
        ("gray", "gray, curves", THIN, "ade"),
        ("gray", "gray, replicate", THIN, "ae"),  # all of 40 % awake, and no gain
        ("frequency", "stem and layer1", BUILT_IN, "bc"),
        ("frequency", "layer2 to layer4", BUILT_IN, "bd"),
    ],
)
def test_what_is_better_is_found_to_be(name, better, network, found):
    def values(run, name, seed):
        return 0.9 if better in run.what else 0.4

    assert letters(name, values, network) == found


def test_variance_has_to_fall_more_than_bias():
    def values(bias, variance):
        def of(run, name, seed):
            count, part = name.split()
            return (bias if part == "bias" else variance) / np.log(int(count))

        return of

    assert letters("bias_variance", values(0.1, 0.4)) == "abcdef"
    assert letters("bias_variance", values(0.4, 0.1)) == "ace"
    assert letters("bias_variance", values(0.4, 0.0)) == ""


def test_every_group_of_runs_is_taken_by_one_process(tmp_path):
    config = Claims(weights=Path("file"), results=tmp_path / "claims.jsonl")
    groups = programs(config)
    assert sorted(run for runs in groups for run in runs) == sorted(config.runs())
    compiled = [{(run.network, run.what, run.target) for run in runs} for runs in groups]
    assert all(len(names) == 1 for names in compiled)
    assert len(set.union(*compiled)) == len(groups)
    taken(config).mkdir()
    assert [take(config, number) for number in (0, 1, 0, 1, 2)] == [True, True, False, False, True]
    # Without a file, the built-in network is asked alone.
    assert {run.network for run in Claims().runs()} == {BUILT_IN}


def test_what_is_not_measured_is_not_judged(capsys):
    assert list(judged(Claims(names=("rates",)), Table({}, SEEDS))) == []
    assert capsys.readouterr().err == "rates, built-in: not judged, 6 runs are missing\n"
    there = {(run, seed): {"x": 1.0} for run in CLAIMS["rates"].runs(BUILT_IN) for seed in SEEDS}
    assert not Table(there, range(6)).has(next(iter(there))[0])
    assert Table(there, SEEDS).has(next(iter(there))[0], "x")


@pytest.fixture(scope="module")
def tiny():
    """A small random network on 10 digits of each class and 40 others."""
    train, test = targets.draw("digits", 10, 0), targets.draw("digits", 4, 0, test=True)
    labels = np.concatenate([train.labels, test.labels])
    names = [f"class {n}" for n in range(10)]
    source = ft.ArraySource(np.concatenate([train.images, test.images]), labels, names)
    config = ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=16, classes=10)
    variables = ft.resnet(config).init(jax.random.key(0))
    preprocessing = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, 32, 32)
    found = ft.Pretrained(jax.tree.map(np.asarray, variables), config, preprocessing)
    return Cell(ft.transfer(found, classes=10, class_names=names), source, labels, 100, 0)


def test_few_labels_are_the_first_of_many(tiny):
    few, many = tiny.of_each(slice(2)), tiny.of_each(slice(5))
    assert np.bincount(tiny.labels[few]).tolist() == [2] * 10
    assert set(few) < set(many) < set(range(100))
    assert not set(tiny.of_each(slice(-5, None))) & set(many)
    assert tiny.test.tolist() == list(range(100, 140))


def test_heads_are_judged_at_every_depth_and_number_of_labels(tiny):
    found = claim_runs.heads(tiny, (2, 10), split=True)
    wanted = {f"{n} {name}" for n in (2, 10) for name in (*DEPTHS, "sixteenth")}
    wanted |= {f"{name}, folds" for name in wanted}
    wanted |= {f"{n} {part}" for n in (2, 10) for part in ("bias", "variance")}
    assert set(found) == wanted | {"distance"}
    # Random features of digits are far above chance, and more labels help.
    assert found["10 layer2"] > 0.3
    assert np.mean([found[f"10 {d}"] - found[f"2 {d}"] for d in DEPTHS]) > 0
    colored = np.asarray(tiny.source.images).copy()
    colored[..., 0] //= 2
    colored = ft.ArraySource(colored, tiny.labels, tiny.source.class_names)
    with_color = dataclasses.replace(tiny, source=colored)
    assert "2 gray" in claim_runs.heads(with_color, (2,), split=False)
    plain = np.asarray(claim_runs.without_color(with_color).source.images)
    assert np.ptp(plain, axis=-1).max() == 0


def test_frozen_leaves_and_statistics_that_moved_are_found(tiny):
    before = tiny.network.variables
    assert claim_runs.moved(before, before, "layer4") == []
    leaves = {path: np.array(leaf) for path, leaf in ft.models.flatten(before).items()}
    kernel, mean = "params/layer1/0/conv1/kernel", "batch_stats/layer2/0/bn1/mean"
    leaves[kernel][0, 0, 0, 0] = np.nextafter(leaves[kernel][0, 0, 0, 0], np.float32(9))
    leaves[mean][0] += 1
    leaves["params/fc/bias"][0] += 1
    after = ft.models.unflatten(leaves)
    assert claim_runs.moved(before, after, "stem") == []
    assert claim_runs.moved(before, after, "layer1") == [kernel]
    assert sorted(claim_runs.moved(before, after, "layer4")) == sorted([kernel, mean])


@pytest.mark.slow
def test_frozen_leaves_stay_and_cost_no_backward_pass(tiny):
    found = claim_runs.freezing(tiny, Scale(batch_size=8))
    assert found["moved"] == found["gradient"] == 0
    flops = [1.0, *(found[f"flops {depth}"] for depth in DEPTHS)]
    assert np.all(np.diff(flops) < 0)
    assert flops[-1] < 0.5


@pytest.mark.parametrize("what", STRATEGIES)
def test_strategies_take_the_same_steps(tiny, what):
    phases = STRATEGIES[what](tiny.network.params, 60).phases
    assert sum(phase.steps for phase in phases) == 60
    assert len(phases) == (6 if "gradual" in what else 1)


@pytest.mark.slow
def test_training_runs_are_tested_and_tuned_on_other_images(tiny):
    found = claim_runs.trained(tiny, "uniform at 0.001", 5, Scale(steps=2, batch_size=8))
    assert set(found) == {"test", "held"}
    assert set(claim_runs.trained(tiny, GUIDED, 5, Scale(steps=6, batch_size=8))) == {"test"}


def test_strips_of_photographs_for_tests_are_others():
    train = targets.photograph_strips(30, 0, size=80)
    test = targets.photograph_strips(30, 0, test=True, size=80)
    assert train.images.shape == (240, 80, 80, 3)
    assert np.bincount(train.labels).tolist() == [30] * 8

    def columns(target):
        """The first row of every crop's pixels, each as one number."""
        return {row.tobytes() for image in target.images for row in image[:, :8]}

    assert not columns(train) & columns(test)
    assert len(columns(train)) < 240 * 80  # crops of one strip share pixels
