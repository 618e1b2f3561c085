"""Rates that follow from measurements, by formula."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flaxtransfer as ft
from flaxtransfer.groups import FROZEN
from flaxtransfer.masks import selected
from flaxtransfer.recipes.parts import curvature_rates, units
from tests.support.small import network

MODEL, VARIABLES = network()
PARAMS = VARIABLES["params"]
BODY = ("stem", "layer1", "layer2", "layer3", "layer4")
LEVEL, NAN = dict.fromkeys(BODY, 1.0), float("nan")


def peaks(plan: ft.Plan) -> dict[str, float]:
    (phase,) = plan.phases
    return {
        name: group.learning_rate.peak
        for name, group in phase.groups.items()
        if group is not FROZEN
    }


def test_curvature_by_hand():
    """Precisions 100 F + 1: 401, 101, 26, 17 and 1; rates go as their inverse square roots."""
    curvature = dict(zip(BODY, (4.0, 1.0, 0.25, 0.16, 0.0), strict=True))
    plan = ft.recipes.curvature_scaled(
        PARAMS,
        curvature=curvature,
        examples=100,
        prior_precision=1.0,
        learning_rate=1e-2,
        head_learning_rate=5e-3,
    )
    wanted = dict(zip(BODY, 1e-2 / np.sqrt([401, 101, 26, 17, 1]), strict=True))
    assert peaks(plan) == pytest.approx(wanted | {"head": 5e-3})
    assert plan.phases[0].probe


@given(
    st.dictionaries(st.sampled_from(BODY), st.floats(1e-9, 1e9), min_size=2),
    st.integers(1, 10_000),
    st.floats(1e-3, 1e3),
)
def test_sharper_parts_are_slower_and_units_do_not_matter(curvature, examples, unit):
    rates = curvature_rates(curvature, examples)
    assert max(rates.values()) == 1
    order = sorted(curvature, key=lambda name: curvature[name])
    values = [rates[name] for name in order]
    assert values == sorted(values, reverse=True)
    other = curvature_rates({n: unit * v for n, v in curvature.items()}, examples)
    assert other == pytest.approx(rates, rel=1e-6)


def test_a_large_prior_makes_rates_alike():
    rates = curvature_rates({"a": 1.0, "b": 100.0}, 10, prior_precision=1e9)
    assert rates == pytest.approx({"a": 1.0, "b": 1.0}, rel=1e-5)


def test_gradients_by_hand():
    gradients = dict(zip(BODY, (0.0, 1.0, 2.0, 4.0, 3.0), strict=True))
    plan = ft.recipes.gradient_scaled(
        PARAMS, gradients=gradients, learning_rate=1e-2, head_learning_rate=5e-3
    )
    assert peaks(plan) == pytest.approx(
        {"layer1": 2.5e-3, "layer2": 5e-3, "layer3": 1e-2, "layer4": 7.5e-3, "head": 5e-3}
    )
    (phase,) = plan.resolve(PARAMS).phases
    assert phase.groups["stem"] is FROZEN
    assert "bn1" not in phase.norm


def test_batch_norms_in_and_out():
    gradients = dict.fromkeys(BODY, 1.0)
    without = ft.recipes.gradient_scaled(PARAMS, gradients=gradients, batch_norms=False)
    (phase,) = without.resolve(PARAMS).phases
    assert phase.norm == frozenset()
    assert phase.labels["bn1"]["scale"] == "rest"
    (phase,) = ft.recipes.gradient_scaled(PARAMS, gradients=gradients).resolve(PARAMS).phases
    assert "bn1" in phase.norm
    assert "layer4/0/bn2" in phase.norm


def test_surgery_where_the_gradient_is_largest():
    gradients = dict(zip((*BODY, "head"), (1.0, 2.0, 9.0, 4.0, 3.0, 99.0), strict=True))
    (phase,) = ft.recipes.surgical(PARAMS, gradients=gradients).phases
    assert phase.labels["part"] == ft.stage(2) - ft.head()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: ft.recipes.curvature_scaled(PARAMS, curvature={"stem": 1.0}, examples=1),
            "curvature lack layer1, layer2, layer3, layer4",
        ),
        (
            lambda: ft.recipes.gradient_scaled(
                PARAMS, gradients=dict.fromkeys((*BODY, "layr1"), 1.0)
            ),
            "no part 'layr1'; did you mean 'layer1'",
        ),
        (
            lambda: ft.recipes.gradient_scaled(PARAMS, gradients=dict.fromkeys(BODY, 0.0)),
            "not all 0",
        ),
        (
            lambda: ft.recipes.gradient_scaled(PARAMS, gradients=dict.fromkeys(BODY, -1.0)),
            "not negative",
        ),
        (
            lambda: ft.recipes.gradient_scaled(PARAMS, gradients={**LEVEL, "layer4": NAN}),
            "must be finite",
        ),
        (lambda: ft.recipes.surgical(PARAMS, gradients={**LEVEL, "stem": NAN}), "must be finite"),
        (
            lambda: ft.recipes.surgical(PARAMS, gradients={**LEVEL, "layer2": np.inf}),
            "must be finite",
        ),
        (lambda: ft.recipes.surgical(PARAMS, gradients={**LEVEL, "stem": -1.0}), "not negative"),
        (lambda: ft.recipes.surgical(PARAMS, gradients=dict.fromkeys(BODY, 0.0)), "not all 0"),
        (lambda: curvature_rates({"a": -1.0}, 1), "must be finite and >= 0"),
        (lambda: curvature_rates({"a": 1.0, "b": NAN}, 1), "must be finite"),
        (lambda: curvature_rates({"a": 1e308, "b": 1.0}, 100), "must be finite"),
        (lambda: curvature_rates({"a": 1.0}, 0), "examples must be >= 1, got 0"),
        (lambda: curvature_rates({"a": 1.0}, 1, 0.0), "prior_precision must be > 0, got 0"),
        (lambda: ft.recipes.surgical(PARAMS, gradients={"layer9": 1.0}), "layer9"),
        (lambda: ft.recipes.surgical(PARAMS, gradients={}), "empty"),
        (lambda: ft.recipes.surgical(PARAMS, part=ft.stem(), gradients={"stem": 1.0}), "not both"),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_plans_with_measured_rates_are_written_and_read():
    plan = ft.recipes.curvature_scaled(PARAMS, curvature=dict.fromkeys(BODY, 0.5), examples=7)
    assert ft.training.plan_from_yaml(ft.training.plan_to_yaml(plan)) == plan


def test_an_input_adapter_is_as_new_as_the_head():
    """It is no part to be measured, chosen or slowed down."""
    adapted = ft.resnet(replace(MODEL.config, adapter=ft.models.Adapter(4))).abstract()["params"]
    assert list(units(adapted)) == [*BODY, "head"]
    assert {"adapter/kernel", "fc/kernel"} <= selected(units(adapted)["head"], adapted)
    ratios = dict.fromkeys(BODY, 1.0)
    for plan in (
        ft.recipes.gradient_scaled(adapted, gradients=ratios, head_learning_rate=5e-3),
        ft.recipes.surgical(adapted, gradients=ratios | {"layer4": 2.0}, head_learning_rate=5e-3),
        ft.recipes.discriminative(adapted, learning_rate=5e-3),
        ft.recipes.progressive_unfreezing(adapted, head_learning_rate=5e-3),
    ):
        for phase in plan.resolve(adapted).phases:
            group = phase.groups[phase.labels["adapter"]["kernel"]]
            assert group.learning_rate == phase.groups[phase.labels["fc"]["kernel"]].learning_rate
