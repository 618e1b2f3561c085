"""Trains three steps on one device, on eight, and with large leaves split over the eight.

Prints as JSON what became of it; run in its own process, in float64.
"""

from __future__ import annotations

import json
import re

import jax
import numpy as np
import optax

import flaxtransfer as ft
from flaxtransfer.paths import flatten
from flaxtransfer.sharding import leaf_shardings, make_mesh, place_batch, place_replicated
from flaxtransfer.training.step import State, start, train_step
from tests.support.run_processes import Compiled
from tests.support.small import batch, feed, network

ABOVE = 1024
"""Bytes; the kernels of the stages are larger, norms, biases and the head are smaller."""


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    model, variables = network()
    variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    rules = {"all": ft.everything() - ft.stem(), "frozen": ft.rest()}
    groups = {"all": ft.Group(optax.adamw, 3e-3, weight_decay=0.1), "frozen": ft.FROZEN}
    phase = ft.Phase(rules, groups, steps=3, clip=1.0, ema=0.9).resolve(variables["params"])
    meshes = {"one": make_mesh(jax.devices()[:1]), "eight": make_mesh(), "split": make_mesh()}
    assert meshes["split"].size == 8
    states, found = {}, {}
    for name, mesh in meshes.items():
        above = ABOVE if name == "split" else None
        step = train_step(model, phase, feed(), mesh=mesh, above=above)
        state = place_replicated(start(variables, phase, 0), mesh, above)
        before = jax.tree.map(lambda leaf: leaf.sharding, state)
        compiled = Compiled()
        with compiled, jax.log_compiles():
            for number in range(3):
                state, _ = step(state, place(number, mesh))
        found[f"programs of {name}"] = len(compiled.steps)
        after = jax.tree.map(lambda leaf: leaf.sharding, state)
        assert jax.tree.all(jax.tree.map(lambda a, b: a == b, before, after)), name
        # Split or not, the parts of a state agree on it.
        wanted = leaf_shardings(state, mesh, above)
        assert jax.tree.all(jax.tree.map(lambda a, b: a == b, wanted, after)), name
        states[name] = values(state)
        if name == "split":
            found["norms"] = len(phase.batch_norm_policy())
            found |= facts(state, step.lower(state, place(0, mesh)).compile().as_text())
    for name in ("eight", "split"):
        found[f"difference of {name}"] = max(
            float(np.abs(leaf - states["one"][path]).max()) for path, leaf in states[name].items()
        )
    print(json.dumps(found))


def place(number: int, mesh: jax.sharding.Mesh) -> ft.data.Batch:
    return place_batch(batch(number), mesh)


def values(state: State) -> dict[str, np.ndarray]:
    parts = {"params": state.params, "ema": state.ema, "batch_stats": state.batch_stats}
    return {path: np.asarray(leaf) for path, leaf in flatten(parts).items()}


def facts(state: State, program: str) -> dict[str, int | list[str]]:
    leaves = jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))
    large = [leaf for leaf in leaves if leaf.nbytes > ABOVE]
    divided = {id(leaf) for leaf in large if any(length % 8 == 0 for length in leaf.shape)}
    parts = ("params", "ema")
    split = {
        part: sorted(
            path
            for path, leaf in flatten(getattr(state, part)).items()
            if not leaf.sharding.is_fully_replicated
        )
        for part in parts
    }
    names = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    return {
        "bytes": sum(leaf.addressable_data(0).nbytes for leaf in leaves),
        "computed": sum(leaf.nbytes // (8 if id(leaf) in divided else 1) for leaf in leaves),
        "large": len(large),
        "divided": len(divided),
        "whole": sum(leaf.nbytes for leaf in leaves),
        "split": split["params"],
        "split in the average": split["ema"],
        **{name: len(re.findall(rf" {name}(?:-start)?\(", program)) for name in names},
    }


if __name__ == "__main__":
    main()
