"""What networks cost, against the networks themselves as JAX and XLA see them.

torchvision's and timm's own numbers are compared in `tests/parity`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from flaxtransfer.models import lax_conv
from flaxtransfer.models.config import Adapter, ResNetConfig
from flaxtransfer.models.registry import ARCHITECTURES, costs, resnet

BASIC = ResNetConfig("basic", (2, 1, 1, 1), width=4, classes=3)
BOTTLENECK = ResNetConfig("bottleneck", (1, 2, 1, 1), width=8, classes=5)
# Each part once or more, and odd sizes, which strides round up and averages down.
CASES = {
    "basic": (BASIC, 75, {}),
    "basic, averages, tiered": (
        BASIC,
        64,
        {"anti_alias": "average", "stem": "tiered", "stem_width": 8},
    ),
    "basic, blur, se": (BASIC, 33, {"anti_alias": "blur", "attention": "se"}),
    "averaged shortcut, deep": (
        BOTTLENECK,
        75,
        {"shortcut": "average", "stem": "deep", "stem_width": 8},
    ),
    "averages": (BOTTLENECK, 66, {"anti_alias": "average"}),
    "blur": (BOTTLENECK, 50, {"anti_alias": "blur", "shortcut": "average"}),
    "v1, stem pool, groups": (
        BOTTLENECK,
        65,
        {"stride_in": "1x1", "stem_pool": "convolution", "groups": 2},
    ),
    "as in senet": (BOTTLENECK, 61, {"reduce_first": 2, "shortcut_kernel": 3, "attention": "se"}),
    "group norm, wide": (BOTTLENECK, 40, {"norm": "group", "width": 32, "base_width": 128}),
    "adapter": (BASIC, 32, {"adapter": Adapter(5)}),
    "v2": (BASIC, 75, {"preactivation": True, "stem": "deep", "stem_width": 8}),
    "v2, strides last": (
        BOTTLENECK,
        75,
        {
            "preactivation": True,
            "stride_at": "last",
            "depths": (2, 1, 3, 1),
            "stem_bias": True,
            "stem_pool": "zero-padded",
        },
    ),
}


def abstract_inputs(model, size):
    return model.abstract(), jax.ShapeDtypeStruct((1, size, size, model.config.bands), jnp.float32)


def multiplications(jaxpr):
    """Of all convolutions and products in a traced function, by the shapes of their operands."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            weights = equation.invars[1].aval.shape
            total += equation.outvars[0].aval.size * math.prod(weights[:-1])
        for inner in equation.params.values():  # what is jitted within
            inner = getattr(inner, "jaxpr", inner)
            total += multiplications(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("case", CASES)
def test_the_count_is_that_of_the_traced_network(case):
    config, size, parts = CASES[case]
    model = resnet(dataclasses.replace(config, **parts), convolution=lax_conv)
    inputs = abstract_inputs(model, size)
    counted = costs(model.config, size)
    assert counted.multiply_adds == multiplications(jax.make_jaxpr(model.apply)(*inputs).jaxpr)
    assert counted.parameters == sum(leaf.size for leaf in jax.tree.leaves(inputs[0]["params"]))


@pytest.mark.parametrize("name", ["resnet18", "seresnext26d_32x4d", "resnetaa34d", "ecaresnet26t"])
def test_the_count_is_xlas_to_two_percent(name):
    """XLA counts additions apart, leaves out what meets padding, and adds pools and activations:
    on large images both are small.
    """
    model = resnet(name, convolution=lax_conv)
    forward = jax.jit(lambda variables, images: model.apply(variables, images)[0])
    xla = forward.lower(*abstract_inputs(model, 1792)).cost_analysis()["flops"]
    assert 2 * costs(model.config, 1792).multiply_adds == pytest.approx(xla, rel=0.02)


def test_ecas_filters_slide_along_the_channels():
    plain = dataclasses.replace(BOTTLENECK, attention=None)
    # Blocks of 32, 64, 64, 128 and 256 channels; filters of 3, 3, 3, 5 and 5 taps (Wang et al.,
    # "ECA-Net", 2020, equation 12, an even number of taps becoming one more).
    extra = 3 * (32 + 64 + 64) + 5 * (128 + 256)
    eca = dataclasses.replace(plain, attention="eca")
    assert costs(eca, 64).multiply_adds - costs(plain, 64).multiply_adds == extra


@pytest.mark.parametrize("size", [200, 90, 2])
def test_sizes_that_averages_cannot_halve_are_refused_as_the_network_does(size):
    config = dataclasses.replace(BASIC, anti_alias="average")
    with pytest.raises(ValueError, match=rf"images of {size} px do not fit.*; \d+ px fit"):
        costs(config, size)
    model = resnet(config)
    with pytest.raises((TypeError, ValueError)):
        jax.eval_shape(lambda v, x: model.apply(v, x)[0], *abstract_inputs(model, size))
    assert costs(BASIC, size).multiply_adds > 0


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_a_size_is_a_positive_number(size):
    with pytest.raises(ValueError, match="size must be an integer >= 1"):
        costs(BASIC, size)


def test_every_name_has_its_costs():
    assert all(costs(c).multiply_adds > 10 * costs(c).parameters for c in ARCHITECTURES.values())
