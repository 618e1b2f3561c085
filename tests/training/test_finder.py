"""The learning-rate sweep: what it finds, and that it leaves no trace."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

import flaxtransfer as ft
from flaxtransfer.training.lr_finder import steepest
from flaxtransfer.training.run_folder import digest
from tests.support.small import batch, feed, network

RULES = {"new": ft.head(), "old": ft.rest()}
SGD = ft.Group(optax.sgd, 0.0)


def phase(**groups):
    return ft.Phase(RULES, {"new": SGD, "old": SGD} | groups, steps=1)


def digests(tree):
    return jax.tree.map(digest, tree)


def test_it_leaves_no_trace(tmp_path):
    """Variables, the batches that were read, and the run afterwards, bit for bit."""
    model, variables = network()
    before = digests(variables)
    read = []

    def counted(number):
        read.append(number)
        return batch(number)

    data = feed(make=counted)
    plan = ft.Plan([ft.Phase(RULES, {"new": ft.Group(optax.adamw, 1e-2), "old": ft.FROZEN}, 6)])
    straight = ft.fit(
        ft.Classifier(model, variables, feed().preprocessing), plan, feed(), tmp_path / "straight"
    )
    sweep = ft.find_learning_rate(
        ft.Classifier(model, variables, data.preprocessing), plan.phases[0], data, steps=5
    )
    assert digests(variables) == before
    assert read == list(range(5))
    after = ft.fit(
        ft.Classifier(model, variables, feed().preprocessing), plan, feed(), tmp_path / "after"
    )
    assert digests(after.variables) == digests(straight.variables)
    assert sweep == ft.find_learning_rate(
        ft.Classifier(model, variables, feed().preprocessing), plan.phases[0], feed(), steps=5
    )


def test_rates_rise_evenly_in_the_logarithm_and_all_groups_take_them():
    model, variables = network()
    sweep = ft.find_learning_rate(
        ft.Classifier(model, variables, feed().preprocessing),
        phase(),
        feed(),
        lowest=1e-6,
        highest=1e-4,
        steps=5,
    )
    np.testing.assert_allclose(sweep.rates, [1e-6, 10**-5.5, 1e-5, 10**-4.5, 1e-4], rtol=1e-6)
    assert not sweep.diverged


def test_a_group_alone_is_that_group_with_the_others_frozen():
    model, variables = network()
    alone = ft.find_learning_rate(
        ft.Classifier(model, variables, feed().preprocessing),
        phase(),
        feed(),
        group="new",
        lowest=1e-3,
        highest=1.0,
        steps=4,
    )
    frozen = ft.find_learning_rate(
        ft.Classifier(model, variables, feed().preprocessing),
        phase(old=ft.FROZEN),
        feed(),
        lowest=1e-3,
        highest=1.0,
        steps=4,
    )
    assert alone.losses == frozen.losses
    assert alone.group == "new"


def test_it_finds_the_order_of_magnitude_and_ends_when_the_loss_diverges():
    model, variables = network()
    sweep = ft.find_learning_rate(
        ft.Classifier(model, variables, feed().preprocessing),
        phase(),
        feed(),
        lowest=1e-5,
        highest=1e4,
        steps=90,
    )
    assert sweep.diverged
    assert 1e-4 < sweep.suggestion < 10
    assert sweep.rates[-1] < 1e4
    assert f"suggestion: {sweep.suggestion:.1e}" in str(sweep)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"group": "nw"},
            "phase 'fine-tune' has no group 'nw' with a learning rate; did you mean 'new'",
        ),
        ({"lowest": 0.0}, "rates must rise from a lowest above 0"),
        ({"steps": 2}, "steps must be 3 or more, got 2"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, text):
    model, variables = network()
    with pytest.raises(ValueError, match=text):
        ft.find_learning_rate(
            ft.Classifier(model, variables, feed().preprocessing), phase(), feed(), **changes
        )


def test_a_hidden_learning_rate_is_named():
    model, variables = network()
    with pytest.raises(ValueError, match="learning rates of old are hidden"):
        ft.find_learning_rate(
            ft.Classifier(model, variables, feed().preprocessing), phase(old=optax.sgd(0.1)), feed()
        )


def swept(losses):
    """A sweep of one decade a step, whose average is the given losses."""
    rates = tuple(10.0 ** (n - 6) for n in range(len(losses)))
    return ft.training.RateSweep(rates, tuple(losses), tuple(losses), None, False)


@pytest.mark.parametrize(
    ("losses", "rate"),
    [
        ((5, 4, 3, 2, 1), 1e-4),
        ((1, 5, 4, 3, 2, 1), 1e-3),  # A first step that is better than what follows is no fall.
        ((5, 4, 6, 3, 7, 2, 9), 1e-3),  # One that is broken by noise is one fall: 5, 4, 3, 2.
        ((1, 2, 3, 4), None),
        ((2, 1, 2, 1), None),
        ((), None),
    ],
)
def test_the_valley_is_the_middle_of_the_longest_fall(losses, rate):
    """Worked out by hand."""
    assert swept(losses).valley == rate


def test_the_steepest_fall_of_a_known_curve():
    """A logistic curve in the logarithm of the rate falls fastest at its middle."""
    rates = np.logspace(-6, 0, 121)
    losses = 1 / (1 + np.exp(3 * (np.log10(rates) + 2)))
    assert steepest(list(rates), list(losses)) == pytest.approx(1e-2)
    assert steepest(list(rates), list(-losses)) is None


def test_each_group_alone_leaves_no_trace_and_is_the_sweep_of_that_group():
    model, variables = network()
    fitted = {
        **variables,
        "params": {
            **variables["params"],
            "fc": jax.tree.map(lambda leaf: leaf + 0.1, variables["params"]["fc"]),
        },
    }
    before = digests(fitted)
    settings = {"lowest": 1e-4, "highest": 1.0, "steps": 4}
    sweeps = ft.training.find_learning_rates(
        ft.Classifier(model, fitted, feed().preprocessing), phase(), feed(), **settings
    )
    assert list(sweeps) == ["new", "old"]
    for name, sweep in sweeps.items():
        assert sweep == ft.find_learning_rate(
            ft.Classifier(model, fitted, feed().preprocessing),
            phase(),
            feed(),
            group=name,
            **settings,
        )
    assert digests(fitted) == before
    none = ft.Phase(RULES, {"new": optax.sgd(0.1), "old": ft.FROZEN}, steps=1)
    with pytest.raises(ValueError, match="no group with a learning rate"):
        ft.training.find_learning_rates(
            ft.Classifier(model, fitted, feed().preprocessing), none, feed()
        )


def test_a_group_under_a_head_at_zero_is_refused():
    """Its gradient is zero, so that the curve would be the noise of the batches."""
    model, variables = network()
    head = jax.tree.map(np.zeros_like, variables["params"]["fc"])
    blank = {**variables, "params": {**variables["params"], "fc": head}}
    with pytest.raises(ValueError, match=r"old gets no gradient.*train the head first"):
        ft.find_learning_rate(
            ft.Classifier(model, blank, feed().preprocessing), phase(), feed(), group="old"
        )


def test_a_network_that_is_not_finite_is_refused():
    model, variables = network()
    broken = jax.tree.map(lambda leaf: leaf * np.nan, variables)
    with pytest.raises(ValueError, match="not finite before any step"):
        ft.find_learning_rate(ft.Classifier(model, broken, feed().preprocessing), phase(), feed())
