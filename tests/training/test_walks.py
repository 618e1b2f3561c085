"""How often a fit walks the tree of parameters by path."""

from __future__ import annotations

import sys

import numpy as np

import flaxtransfer as ft
from flaxtransfer.paths import flatten
from tests.support.small import PREPROCESSING, SIZE, network


def test_a_small_fit_of_two_phases_walks_the_paths_at_most_thirty_times(tmp_path, monkeypatch):
    """Labels and groups are checked once a phase, and what follows from them is kept.

    The number is a budget, not a peer's: each phase labels, binds, digests what is frozen at its
    start and end, and makes an optimizer. Before labels were bound to groups it was 166.
    """
    random = np.random.default_rng(0)
    images = random.integers(0, 255, (40, SIZE, SIZE, 3), np.uint8)
    source = ft.ArraySource(images, np.arange(40) % 3)
    model, variables = network()
    splits = ft.data.Splits.of(range(32), range(32, 40))
    data = ft.loaders(source, splits, PREPROCESSING, batch_size=8)
    plan = ft.recipes.head_then_fine_tune(variables["params"], head_steps=4, fine_tune_steps=4)
    assert callable(ft.fit)  # Imports what it needs.

    calls = []

    def counted(tree):
        calls.append(sys._getframe(1).f_code.co_name)
        return flatten(tree)

    for name, module in list(sys.modules.items()):
        if name.startswith("flaxtransfer.") and getattr(module, "flatten", None) is flatten:
            monkeypatch.setattr(module, "flatten", counted)
    ft.fit(ft.Classifier(model, variables, PREPROCESSING), plan, data, tmp_path / "run")
    assert calls, "nothing was counted"
    assert len(calls) <= 30, sorted(calls)
