"""How often a fit walks the tree of parameters by path."""

from __future__ import annotations

import sys

import jax
import numpy as np

import flaxtransfer as ft
from flaxtransfer.paths import flatten


def test_a_small_fit_of_two_phases_walks_the_paths_at_most_thirty_times(tmp_path, monkeypatch):
    """Labels and groups are checked once a phase, and what follows from them is kept.

    The number is a budget, not a peer's: each phase labels, binds, digests what is frozen at its
    start and end, and makes an optimizer. Before labels were bound to groups it was 166.
    """
    random = np.random.default_rng(0)
    source = ft.ArraySource(random.integers(0, 255, (40, 32, 32, 3), np.uint8), np.arange(40) % 4)
    preprocessing = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, 32, 32)
    model = ft.resnet(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=3, classes=4))
    variables = model.init(jax.random.key(0))
    network = ft.Classifier(model, variables, preprocessing)
    splits = ft.data.Splits.of(range(32), range(32, 40))
    data = ft.loaders(source, splits, preprocessing, batch_size=8)
    plan = ft.recipes.head_then_fine_tune(variables["params"], head_steps=4, fine_tune_steps=4)
    assert callable(ft.fit)  # Imports what it needs.

    calls = []

    def counted(tree):
        calls.append(sys._getframe(1).f_code.co_name)
        return flatten(tree)

    for name, module in list(sys.modules.items()):
        if name.startswith("flaxtransfer.") and getattr(module, "flatten", None) is flatten:
            monkeypatch.setattr(module, "flatten", counted)
    ft.fit(network, plan, data, tmp_path / "run")
    assert calls, "nothing was counted"
    assert len(calls) <= 30, sorted(calls)
