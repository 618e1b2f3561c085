"""What a step takes of devices, read off the compiler before anything runs."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from flaxtransfer.cli import run
from flaxtransfer.models import layers
from flaxtransfer.models.model import Model
from flaxtransfer.models.registry import costs, resnet
from flaxtransfer.recipes import feature_extraction, full_fine_tuning, solved_head
from flaxtransfer.sharding import make_mesh
from flaxtransfer.training import step_cost

BATCH, SIZE = 8, 64


@pytest.fixture(scope="module")
def model():
    return resnet("resnet10w8", classes=4)


def one_device():
    return make_mesh(jax.devices()[:1])


def cost_of(model, recipe):
    phase = recipe(model.abstract()["params"]).phases[0]
    return step_cost(model, phase, one_device(), BATCH, (SIZE, SIZE, 3))


def test_arithmetic_and_memory_follow_what_moves(model):
    """A backward pass costs twice the forward pass, and frozen leaves have none."""
    forward = 2 * BATCH * costs(model.config, SIZE).multiply_adds
    head, everything = cost_of(model, feature_extraction), cost_of(model, full_fine_tuning)
    # Taps in the padding count in the formula and not in the compiler.
    assert 0.85 < head.flops / forward < 1.15
    # The images need no gradient: the first convolution costs twice its forward pass.
    assert 2.2 < everything.flops / forward < 3.1
    assert everything.traffic > 1.5 * head.traffic
    assert everything.temporary > 1.5 * head.temporary
    assert head.fits is None, "a CPU has no memory of its own"

    def size(tree):
        return sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    variables = model.abstract()
    batch = BATCH * (SIZE * SIZE * 3 + 4)
    moments = 2 * size(variables["params"])
    assert everything.arguments == pytest.approx(size(variables) + moments + batch, rel=0.01)


def test_a_loop_counts_as_often_as_it_turns(model, monkeypatch):
    """Convolutions that are loops on some processors: the arithmetic is what it is on others."""
    monkeypatch.setattr(layers, "has_wide_registers", lambda: True)
    without = cost_of(model, full_fine_tuning)
    monkeypatch.setattr(layers, "_LARGE", 1)
    monkeypatch.setattr(layers, "has_wide_registers", lambda: False)
    loops = cost_of(model, full_fine_tuning)
    assert loops.temporary != without.temporary, "the programs are the same"
    assert loops.flops == without.flops


def test_devices_that_need_not_be_here_decide_the_route(model):
    """Where convolutions are sums over taps for CPUs, TPUs get the convolution itself."""
    x = jnp.zeros((1, SIZE, SIZE, 3))
    of = {
        platform: str(jax.make_jaxpr(lambda v, m=one: m.apply(v, x)[0])(model.abstract()))
        for platform in ("cpu", "tpu")
        for one in [Model(model.config, platform=platform)]
    }
    assert of["tpu"].count("conv_general_dilated[") == 12
    assert "reduce_window" in of["tpu"]
    assert of["cpu"].count("conv_general_dilated[") < 12
    assert "reduce_window" not in of["cpu"]


def test_what_cannot_be_compiled_is_said(model, capsys):
    params = model.abstract()["params"]
    with pytest.raises(ValueError, match="takes no step"):
        step_cost(model, solved_head(params).phases[0], one_device(), BATCH, (SIZE, SIZE, 3))
    for words, text in (
        (["--strategy", "solved_head"], "--strategy solved_head trains no step"),
        (["--topology", "v5e"], "must be kind and shape of a slice, such as v5e:4x4, got 'v5e'"),
        (["--strategy", "curvature_scaled"], "measures curvature and examples on the images first"),
    ):
        assert run(["compile", "--model", "resnet10w8", *words]) == 2
        assert text in capsys.readouterr().err


def test_the_command_prints_a_row_for_each_phase(capsys):
    words = ["compile", "--model", "resnet10w8", "--size", "32", "--batch-size", "8"]
    assert run(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "resnet10w8, float32; " in lines[0]
    assert [line.split()[1] for line in lines if line.startswith("│")] == ["head", "fine-tune"]


@pytest.mark.slow
def test_a_step_for_a_slice_of_tpus():
    """By libtpu, without a TPU: freezing, donation and bfloat16 are in the program of the slice."""
    script = """
import jax.numpy as jnp
from flaxtransfer.models.registry import resnet
from flaxtransfer.recipes import feature_extraction, full_fine_tuning
from flaxtransfer.sharding import topology_mesh
from flaxtransfer.training import step_cost
model, mesh = resnet("resnet18w16", classes=4, dtype=jnp.bfloat16), topology_mesh("v5e:4x4")
params = model.abstract()["params"]
found = [
    step_cost(model, recipe(params).phases[0], mesh, 128, (64, 64, 3))
    for recipe in (feature_extraction, full_fine_tuning)
]
for cost in found:
    exchanges = cost.collectives["all-reduce"]
    print(cost.device, cost.devices, cost.flops, exchanges, cost.results, cost.fits)
try:
    topology_mesh("v5e:3x7")
except ValueError as error:
    print(error)
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    head, everything, refused = (line.split() for line in done.stdout.splitlines())
    assert head[:4] == everything[:4] == ["TPU", "v5", "lite", "16"]
    assert float(head[4]) < 0.5 * float(everything[4])
    assert int(head[5]) == 1 < int(everything[5])
    # What a step returns takes the place of what it was given, but for a few scalars.
    assert int(everything[6]) < 10_000
    assert everything[7] == "True"
    assert "v5e:3x7" in " ".join(refused)
