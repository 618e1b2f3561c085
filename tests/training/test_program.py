"""Which training steps are one program: equal phases of equal models, and nothing else."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace

import chex
import jax
import optax
import pytest

import flaxtransfer as ft
from flaxtransfer.groups import WarmupCosine
from flaxtransfer.losses import CrossEntropy, cross_entropy
from flaxtransfer.training import step as training_step
from flaxtransfer.training.step import train_step
from tests.support.small import PREPROCESSING, feed, network, two_phases


def phase(**changes):
    _, variables = network()
    rate = changes.pop("learning_rate", WarmupCosine(3e-3))
    group = changes.pop("group", ft.Group(optax.adamw, rate, weight_decay=0.1))
    rules = changes.pop("labels", {"new": ft.head(), "frozen": ft.rest()})
    settings = {"steps": 8, "clip": 1.0, **changes}
    made = ft.Phase(rules, {"new": group, "frozen": ft.FROZEN}, **settings)
    return made.resolve(variables["params"])


def step(data=None, model=None, **changes):
    return train_step(model or network()[0], phase(**changes), data or feed())


def test_the_second_run_of_a_plan_compiles_no_step(tmp_path, caplog):
    def compiled(seed):
        caplog.clear()
        model, variables = network(seed)
        plan = two_phases(variables["params"], steps=2, clip=0.123)
        with jax.log_compiles(), caplog.at_level(logging.DEBUG, "jax"):
            ft.fit(
                ft.Classifier(model, variables, PREPROCESSING),
                plan,
                feed(),
                tmp_path / str(seed),
                seed=seed,
            )
        return [r.getMessage() for r in caplog.records if "Compiling jit(step)" in r.getMessage()]

    assert len(compiled(0)) == 2  # the control: one a phase
    assert compiled(1) == []


@pytest.mark.parametrize("traces", [2, 1])
def test_each_phase_is_traced_once(tmp_path, monkeypatch, traces):
    """Whatever number of steps; a limit of one trace for two phases is the control."""
    model, variables = network()
    plan = two_phases(variables["params"], steps=3, clip=0.456 + traces)
    chex.clear_trace_counter()
    # Called once per trace of the step.
    counted = chex.assert_max_traces(optax.apply_updates, n=traces)
    monkeypatch.setattr(training_step.optax, "apply_updates", counted)

    def run():
        ft.fit(ft.Classifier(model, variables, PREPROCESSING), plan, feed(), tmp_path / "run")

    if traces == 2:
        run()
    else:
        with pytest.raises(AssertionError, match="traced > 1 times"):
            run()


def test_names_lengths_and_data_do_not_matter_where_the_arithmetic_is_the_same():
    same = step()
    assert step() is same
    assert step(name="another", patience=3) is same
    assert step(data=replace(feed(), steps_per_epoch=9)) is same
    assert step(learning_rate=3e-3, steps=99) is step(learning_rate=3e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"clip": 2.0},
        {"ema": 0.9},
        {"steps": 9},  # of a schedule that stretches with them
        {"learning_rate": 3e-3},
        {"group": ft.Group(optax.adam, WarmupCosine(3e-3), weight_decay=0.1)},
        {"labels": {"new": ft.head() | ft.stage(4), "frozen": ft.rest()}},
        {"norm": "batch"},
        {"loss": CrossEntropy(0.1)},
        {"data": replace(feed(), start="head")},
        {"data": replace(feed(), preprocessing=replace(PREPROCESSING, mean=(0.4,) * 3))},
        {"model": ft.resnet(network()[0].config, dtype="bfloat16")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_the_arithmetic_is_another_program(changes):
    assert step(**changes) is not step()
    assert step(**changes) is step(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": lambda logits, labels, key: cross_entropy(logits, labels, key)},
        {"learning_rate": lambda count: 0.1},
        {"group": ft.Group(functools.partial(optax.sgd, momentum=0.9), 0.1)},
        {"group": optax.adam(0.1)},
    ],
    ids=["loss", "schedule", "partial", "transformation"],
)
def test_what_cannot_be_compared_is_compiled_for_itself(changes):
    """Somebody else's function may read what has changed since."""
    assert step(**changes) is not step(**changes)
