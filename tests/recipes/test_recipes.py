"""What each recipe moves, how fast, and in which order; from shapes alone."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxtransfer as ft
from flaxtransfer.batchnorm import modules
from flaxtransfer.groups import AnchorState, trainable_mask
from flaxtransfer.masks import selected
from flaxtransfer.paths import flatten
from tests.support.evidence import EVIDENCE

PARAMS = ft.resnet("resnet18", classes=10).abstract()["params"]


def moving(phase: ft.Phase) -> set[str]:
    resolved = phase.resolve(PARAMS)
    flags = flatten(trainable_mask(resolved.labels, resolved.groups))
    return {path for path, moves in flags.items() if moves}


@pytest.mark.parametrize("name", ft.recipes.RECIPES)
def test_every_recipe_fits_the_network_and_says_when_to_use_it(name):
    recipe = ft.recipes.RECIPES[name]
    plan = recipe(PARAMS, **EVIDENCE.get(name, {}))
    assert plan.resolve(PARAMS).phases
    text = inspect.getdoc(recipe)
    assert "References:\n    " in text
    assert ("Raises:" in text) == ("Raises:\n    ValueError: " in text)
    assert "Use it" in text or "control" in text
    for argument in inspect.signature(recipe).parameters:
        # Its own entry or the shared one, and never both.
        assert len(re.findall(rf"^    {argument}: [\w\"]", text, re.MULTILINE)) == 1, argument


@pytest.mark.parametrize("name", ft.recipes.RECIPES)
def test_every_recipe_moves_the_head_and_decays_no_batch_norm(name):
    for phase in ft.recipes.RECIPES[name](PARAMS, **EVIDENCE.get(name, {})).phases:
        assert selected(ft.head(), PARAMS) <= moving(phase)
        resolved = phase.resolve(PARAMS)
        variables = ft.resnet("resnet18", classes=10).abstract()
        rows = ft.parameter_table(variables, resolved.labels, phase.groups, resolved.norm).rows
        assert not [row.path for row in rows if row.weight_decay and len(row.shape) < 2]


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("feature_extraction", ft.head()),
        ("batch_norm_only", ft.head() | ft.batch_norm()),
        ("surgical", ft.head() | ft.stem() | ft.stage(1)),
        ("full_fine_tuning", ft.everything()),
        ("discriminative", ft.everything()),
        ("l2_sp", ft.everything()),
        ("from_scratch", ft.everything()),
    ],
)
def test_what_moves(name, mask):
    (phase,) = ft.recipes.RECIPES[name](PARAMS).phases
    assert moving(phase) == selected(mask, PARAMS)


def test_frozen_batch_norms_keep_their_statistics():
    assert ft.recipes.feature_extraction(PARAMS).resolve(PARAMS).phases[0].norm == frozenset()
    surgery = ft.recipes.surgical(PARAMS, part="stage(2)").resolve(PARAMS).phases[0].norm
    assert surgery == {m for m in modules(PARAMS) if m.startswith("layer2")}
    without = ft.recipes.surgical(PARAMS, part="stage(2)", batch_norms=False)
    assert without.resolve(PARAMS).phases[0].norm == frozenset()


@pytest.mark.parametrize("statistics", [True, False])
def test_batch_norm_only_with_and_without_statistics(statistics):
    plan = ft.recipes.batch_norm_only(PARAMS, statistics=statistics).resolve(PARAMS)
    assert plan.phases[0].norm == (set(modules(PARAMS)) if statistics else set())


def test_discriminative_rates_are_those_of_layerwise_decay():
    for by in ("segment", "block"):
        phase = ft.recipes.discriminative(PARAMS, learning_rate=1e-2, decay=0.5, by=by).phases[0]
        group = ft.Group(optax.adamw, 1e-2)
        labels, groups = ft.layerwise_decay(PARAMS, group, decay=0.5, by=by)
        assert phase.resolve(PARAMS).labels == labels
        for name, expected in groups.items():
            np.testing.assert_allclose(
                phase.groups[name].learning_rate.peak, expected.learning_rate, rtol=1e-12
            )


@pytest.mark.parametrize(("by", "count"), [("segment", 6), ("block", 10)])
def test_progressive_unfreezing_goes_from_the_top_and_adds_one_part_a_phase(by, count):
    plan = ft.recipes.progressive_unfreezing(PARAMS, by=by)
    assert len(plan.phases) == count
    before: set[str] = set()
    for phase in plan.phases:
        assert before < moving(phase)
        before = moving(phase)
    assert before == selected(ft.everything(), PARAMS)
    assert moving(plan.phases[0]) == selected(ft.head(), PARAMS)
    assert plan.phases[1].name == ("+ layer4" if by == "segment" else "+ layer4/1")
    assert plan.patience == 1


def test_progressive_unfreezing_stops_where_it_is_told_and_names_what_there_is():
    plan = ft.recipes.progressive_unfreezing(PARAMS, down_to="layer3")
    assert [phase.name for phase in plan.phases] == ["head", "+ layer4", "+ layer3"]
    with pytest.raises(ValueError, match=r"no part 'layer9' below the head; there are layer4, "):
        ft.recipes.progressive_unfreezing(PARAMS, down_to="layer9")
    with pytest.raises(ValueError, match="decay must be a factor"):
        ft.recipes.progressive_unfreezing(PARAMS, decay=0.0)
    with pytest.raises(ValueError, match=r"no segment of a ResNet has these leaves: .*w"):
        ft.recipes.progressive_unfreezing({"encoder": {"w": jnp.ones(2)}})


def test_unfreezing_keeps_the_moments_of_what_already_moved():
    """No warning of mixed counts either: each part has a label of its own."""
    params = {
        "layer4": {"0": {"conv1": {"kernel": jnp.ones((2, 2))}}},
        "fc": {"kernel": jnp.ones((2, 2))},
    }
    plan = ft.recipes.progressive_unfreezing(params).resolve(params)
    first, second = (
        ft.partition(phase.groups, phase.labels, clip=phase.clip) for phase in plan.phases
    )
    gradient = jax.tree.map(jnp.ones_like, params)
    _, state = first.update(gradient, first.init(params), params)
    carried = ft.training.migrate(state, second.init(params))
    moments = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(carried)
        if ".mu" in jax.tree_util.keystr(path)
    }
    assert {("fc" in path): bool(leaf.any()) for path, leaf in moments.items()} == {
        True: True,
        False: False,
    }


def test_decay_toward_the_start_is_the_gradient_of_its_penalty():
    """Against jax.grad of strength / 2 * |w - w0|^2 over the kernel alone."""
    start = {"kernel": jnp.arange(4.0).reshape(2, 2), "bias": jnp.ones(2)}
    now = jax.tree.map(lambda leaf: leaf * 2 + 1, start)
    group = ft.Group(optax.sgd, 1.0, weight_decay=0.3, decay_toward="start")
    tx = group.transformation()
    state = tx.init(start)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, now), state, now)

    def penalty(params):
        return 0.15 * jnp.sum((params["kernel"] - start["kernel"]) ** 2)

    expected = jax.tree.map(lambda leaf: -leaf, jax.grad(penalty)(now))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)


def test_the_start_is_carried_from_phase_to_phase():
    start, later = {"fc": {"kernel": jnp.zeros((1, 1))}}, {"fc": {"kernel": jnp.ones((1, 1))}}
    tx = ft.Group(optax.adamw, 1e-3, weight_decay=0.1, decay_toward="start").transformation()
    carried = ft.training.migrate(tx.init(start), tx.init(later))
    (anchor,) = [
        node
        for node in jax.tree.leaves(carried, is_leaf=lambda n: isinstance(n, AnchorState))
        if isinstance(node, AnchorState)
    ]
    np.testing.assert_array_equal(anchor.anchor["fc"]["kernel"], 0)


def test_a_group_refuses_another_direction():
    with pytest.raises(ValueError, match="decay_toward must be 'zero' or 'start', got 'origin'"):
        ft.Group(optax.sgd, 0.1, decay_toward="origin")


def test_recipes_can_be_composed():
    """Phases are values: one recipe's phase after another's, changed on the way."""
    (first,) = ft.recipes.feature_extraction(PARAMS, steps=10).phases
    (second,) = ft.recipes.l2_sp(PARAMS).phases
    plan = ft.Plan([first, replace(second, steps=None, epochs=2)])
    assert [phase.steps for phase in plan.resolve(PARAMS, 7).phases] == [10, 14]
