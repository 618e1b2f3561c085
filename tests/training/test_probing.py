"""A phase that begins with a linear probe begins with the optimum on the features as they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import optax
import pytest

import flaxtransfer as ft
from flaxtransfer.features import fit_linear_probe
from flaxtransfer.paths import flatten
from tests.support.small import network
from tests.training.test_caching import feed


def plan(rate: float, steps: int = 2, **changes: object) -> ft.Plan:
    group = ft.Group(optax.sgd, rate)
    return ft.Plan(
        [
            ft.Phase(
                {"all": ft.everything()},
                {"all": group},
                steps,
                norm="running",
                probe=True,
                **changes,
            )
        ]
    )


def test_the_head_is_the_solved_one(tmp_path):
    """At a rate of 0 nothing else happens."""
    model, variables = network()
    data = feed()
    fitted = ft.fit(
        ft.Classifier(model, variables, data.preprocessing), plan(0.0, ema=0.5), data, tmp_path
    )
    pooled, labels = ft.features.pooled_features(
        ft.Classifier(model, variables, data.preprocessing), data.calibration()
    )
    assert pooled.shape == (14, 32)
    head = fit_linear_probe(pooled, labels, 3)
    np.testing.assert_allclose(fitted.variables["params"]["fc"]["kernel"], head.kernel, rtol=1e-6)
    np.testing.assert_allclose(fitted.variables["params"]["fc"]["bias"], head.bias, rtol=1e-6)
    conv = fitted.variables["params"]["conv1"]["kernel"]
    np.testing.assert_array_equal(conv, variables["params"]["conv1"]["kernel"])
    assert fitted.notes[0].startswith("phase 'fine-tune' begins with logistic regression on 14")


def test_an_interrupted_run_does_not_probe_again(tmp_path):
    model, variables = network()
    options = ft.FitOptions(evaluate_every=1)
    data = feed()
    whole = ft.fit(
        ft.Classifier(model, variables, data.preprocessing),
        plan(1e-2, 6),
        data,
        tmp_path / "whole",
        options=options,
    )

    def stopping(start: int):
        for step, batch in enumerate(data.train(start), start):
            if step == 3:
                raise RuntimeError("stop here")
            yield batch

    with pytest.raises(RuntimeError, match="stop here"):
        ft.fit(
            ft.Classifier(model, variables, replace(data, train=stopping).preprocessing),
            plan(1e-2, 6),
            replace(data, train=stopping),
            tmp_path / "cut",
            options=options,
        )
    resumed = ft.fit(
        ft.Classifier(model, variables, data.preprocessing),
        plan(1e-2, 6),
        data,
        tmp_path / "cut",
        resume=True,
        options=options,
    )
    for path, leaf in flatten(whole.variables).items():
        np.testing.assert_array_equal(flatten(resumed.variables)[path], leaf, err_msg=path)


def test_it_needs_a_pass_over_the_images(tmp_path):
    model, variables = network()
    with pytest.raises(ValueError, match="begins with a probe, but the feed has no pass"):
        ft.fit(
            ft.Classifier(model, variables, replace(feed(), calibration=None).preprocessing),
            plan(0.1),
            replace(feed(), calibration=None),
            tmp_path,
        )


def test_what_is_no_answer():
    with pytest.raises(ValueError, match="probe must be true or false, got 'logistic'"):
        ft.Phase({"a": ft.everything()}, {"a": optax.sgd(1)}, 1, probe="logistic")
