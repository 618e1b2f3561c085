"""Config, leaf shapes and inference agree with the models and with published numbers."""

import dataclasses
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxtransfer.models.config import ResNetConfig, eca_size, squeezed
from flaxtransfer.models.layers import conv
from flaxtransfer.models.model import leaf_shapes
from flaxtransfer.models.registry import ARCHITECTURES, RESNETS
from flaxtransfer.models.resnet import Network
from flaxtransfer.paths import flatten
from flaxtransfer.weights.infer import infer, with_unseen

# Parameters as torchvision documents them for its weights ("num_params").
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "resnext101_64x4d": 83_455_272,
}


@functools.lru_cache(maxsize=4096)
def reference_shapes(config):
    """The shape of every leaf by the formulas of the papers, independent of the network's code."""
    shapes = {}

    def conv(path, size, inputs, outputs, groups=1):
        shapes[f"params/{path}/kernel"] = (size, size, inputs // groups, outputs)

    def norm(path, channels):
        if config.norm == "group":
            path = re.sub(r"(bn)?(\d+)$", r"gn\2", path)
        for leaf in ("params/{}/scale", "params/{}/bias"):
            shapes[leaf.format(path)] = (channels,)
        if config.norm == "batch":
            for leaf in ("batch_stats/{}/mean", "batch_stats/{}/var"):
                shapes[leaf.format(path)] = (channels,)

    if config.adapter is not None:
        shapes["params/adapter/kernel"] = (1, 1, config.adapter.bands, config.in_channels)
        if config.adapter.kind == "curves":
            curves = (config.adapter.bands, config.adapter.knots, config.in_channels)
            shapes["params/adapter/curves"] = curves
    channels = config.in_channels
    if config.stem == "plain":
        conv("conv1", 7, channels, config.stem_channels[0])
        if config.stem_bias:
            shapes["params/conv1/bias"] = config.stem_channels
    else:
        for number, outputs in zip((0, 3, 6), config.stem_channels, strict=True):
            conv(f"conv1/{number}", 3, channels, outputs)
            if number < 6:
                norm(f"conv1/bn{number + 1}", outputs)
            channels = outputs
    channels = config.stem_channels[-1]
    if not config.preactivation:
        norm("bn1", channels)
    if config.stem_pool == "convolution":
        conv("maxpool/0", 3, channels, channels)
        norm("maxpool/bn1", channels)
    for stage, depth in enumerate(config.depths, start=1):
        planes = config.width * 2 ** (stage - 1)
        inner, first = config.inner(stage), config.inner(stage) // config.reduce_first
        outputs = planes * config.expansion
        for index in range(depth):
            block = f"layer{stage}/{index}"
            if config.block == "basic":
                narrow = planes // config.reduce_first
                layers = [(3, channels, narrow, 1), (3, narrow, planes, 1)]
            else:
                layers = [
                    (1, channels, first, 1),
                    (3, first, inner, config.groups),
                    (1, inner, outputs, 1),
                ]
            for number, (size, inputs, width, groups) in enumerate(layers, 1):
                conv(f"{block}/conv{number}", size, inputs, width, groups)
                norm(f"{block}/bn{number}", inputs if config.preactivation else width)
            if config.attention == "se":
                hidden = squeezed(outputs, config.se_ratio)
                for layer, inputs, width in (("fc1", outputs, hidden), ("fc2", hidden, outputs)):
                    conv(f"{block}/se/{layer}", 1, inputs, width)
                    shapes[f"params/{block}/se/{layer}/bias"] = (width,)
            elif config.attention == "eca":
                shapes[f"params/{block}/se/conv/kernel"] = (eca_size(outputs), 1, 1)
            if config.has_shortcut(stage, index):
                pooled = config.shortcut == "average"
                size = 1 if stage == 1 else config.shortcut_kernel
                conv(f"{block}/downsample/{int(pooled)}", size, channels, outputs)
                if not config.preactivation:
                    norm(f"{block}/downsample/{1 + pooled}", outputs)
            channels = outputs
    if config.preactivation:
        norm("layer4/bn1", channels)
    shapes["params/fc/kernel"] = (channels, config.classes)
    shapes["params/fc/bias"] = (config.classes,)
    return shapes


def configs():
    """Plain networks, half of them with a stem of another width than their stages."""
    sizes = st.integers(1, 5)
    depths = st.tuples(sizes, sizes, sizes, sizes)
    ends = {
        "classes": st.integers(1, 50),
        "in_channels": st.integers(1, 14),
        "stem_width": st.none() | st.integers(1, 130),
    }
    basic = st.builds(
        ResNetConfig, st.just("basic"), depths, st.integers(1, 96), st.just(64), st.just(1), **ends
    )
    bottleneck = st.builds(
        ResNetConfig,
        st.just("bottleneck"),
        depths,
        st.sampled_from([16, 32, 64, 96]),
        st.integers(4, 140),
        st.integers(1, 32),
        **ends,
    )
    return basic | bottleneck


def variants():
    """Configs with any of the parts that a plain ResNet does not have."""
    stems = st.just({}) | st.fixed_dictionaries(
        {"stem": st.sampled_from(["deep", "tiered"]), "stem_width": st.sampled_from([8, 32, 64])}
    )
    shortcuts = st.sampled_from([{}, {"shortcut": "average"}, {"shortcut_kernel": 3}])
    attention = st.sampled_from(
        [{}, {"attention": "eca"}, {"attention": "se"}, {"attention": "se", "se_ratio": 0.25}]
    )
    pools = st.sampled_from([{}, {"stem_pool": "convolution"}])
    plain = st.builds(
        ResNetConfig,
        st.sampled_from(["basic", "bottleneck"]),
        st.tuples(*[st.integers(1, 3)] * 4),
        st.sampled_from([32, 64]),
        classes=st.integers(1, 20),
        reduce_first=st.sampled_from([1, 2]),
    )
    return st.builds(
        lambda config, *parts: dataclasses.replace(
            config, **{name: value for part in parts for name, value in part.items()}
        ),
        plain,
        stems,
        shortcuts,
        attention,
        pools,
    )


@given(variants())
@settings(deadline=None, max_examples=100)
def test_inference_finds_every_part_that_has_leaves(config):
    assert reference_shapes(infer(reference_shapes(config))) == reference_shapes(config)


@given(variants())
@settings(deadline=None, max_examples=50)
def test_a_config_survives_json(config):
    assert ResNetConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_a_plain_networks_json_is_what_it_was_before_there_were_other_parts():
    assert list(RESNETS["resnet50"].to_json()) == [
        "block",
        "depths",
        "width",
        "base_width",
        "groups",
        "classes",
        "in_channels",
    ]


@pytest.mark.parametrize(("name", "config"), ARCHITECTURES.items())
def test_every_name_is_found_again_in_its_leaves(name, config):
    assert config.name == name
    seen = infer(reference_shapes(config))
    # Anti-aliasing and standardized weights, for instance, have no leaves.
    assert with_unseen(seen, config) == config


@pytest.mark.parametrize("name", PARAMETERS)
def test_counts_as_many_parameters_as_torchvision(name):
    config = ARCHITECTURES[name]
    shapes = reference_shapes(config)
    count = sum(math.prod(shape) for path, shape in shapes.items() if path.startswith("params/"))
    assert count == PARAMETERS[name]
    assert config.name == name


@pytest.mark.parametrize(
    "config",
    [
        RESNETS["resnet34"],
        RESNETS["resnet50"],
        *(
            ARCHITECTURES[name]
            for name in (
                "resnet18d",
                "ecaresnet26t",
                "seresnext26t_32x4d",
                "resnetrs50",
                "resnet50_gn",
                "senet154",
            )
        ),
        ResNetConfig("basic", (1, 1, 2, 1), width=6, classes=3, in_channels=5),
        ResNetConfig("bottleneck", (1, 2, 1, 1), 32, 26, 3, classes=2, in_channels=1),
    ],
    ids=lambda config: config.name,
)
def test_leaf_shapes_are_those_of_the_model(config):
    # The whole network, traced with the convolution that it runs with; `leaf_shapes` traces two
    # blocks of each stage.
    images = jax.ShapeDtypeStruct((1, 32, 32, config.bands), jnp.float32)
    network = Network(jnp.dtype("float32"), conv, config)
    whole = jax.eval_shape(lambda x: network.init(jax.random.key(0), x, "running"), images)
    assert leaf_shapes(config) == {path: leaf.shape for path, leaf in flatten(whole).items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_leaf_shapes_are_those_of_the_papers(name):
    config = ARCHITECTURES[name]
    assert leaf_shapes(config) == reference_shapes(config)


@given(variants())
@settings(deadline=None, max_examples=10)
def test_leaf_shapes_of_other_networks_are_those_of_the_papers(config):
    assert leaf_shapes(config) == reference_shapes(config)


@given(configs())
@settings(deadline=None, max_examples=60)
def test_inference_finds_a_config_with_the_same_leaves(config):
    # Several base widths can round to the same channels; the leaves are what counts.
    assert reference_shapes(infer(reference_shapes(config))) == reference_shapes(config)


@given(configs(), st.data())
@settings(deadline=None, max_examples=60)
def test_one_damaged_leaf_does_not_change_the_network(config, data):
    shapes = reference_shapes(config)
    leaf = data.draw(
        st.sampled_from([path for path in shapes if path.count("/") > 2]), label="damaged"
    )
    damaged = shapes | {leaf: tuple(size + 1 for size in shapes[leaf])}
    inferred = infer(damaged)
    kept = ("width", "stem_width", "depths", "groups", "block", "classes", "in_channels")
    assert all(getattr(inferred, field) == getattr(config, field) for field in kept)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"block": "wide"}, "block must be 'basic' or 'bottleneck', got 'wide'"),
        ({"depths": (2, 2, 2, 2, 2)}, "depths must be at most 4 integers >= 1"),
        (
            {"block": "bottleneck", "width": 15, "groups": 3, "reduce_first": 2},
            "must have a multiple of 3 channels with groups=3",
        ),
        ({"depths": (2, 0, 2, 2)}, "depths must be at most 4 integers >= 1"),
        ({"width": 0}, "width must be an integer >= 1, got 0"),
        ({"classes": 2.5}, "classes must be an integer >= 1, got 2.5"),
        ({"in_channels": True}, "in_channels must be an integer >= 1, got True"),
        ({"groups": 2}, "use block='bottleneck'"),
        ({"block": "bottleneck", "width": 2, "base_width": 1}, "no channels"),
        ({"block": "wide", "width": 0, "epsilon": 2.0}, "block must .*width must .*epsilon must"),
    ],
)
def test_a_config_refuses_what_is_no_network(arguments, text):
    with pytest.raises(ValueError, match=text):
        ResNetConfig(**arguments)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (ResNetConfig(width=32), "resnet18w32"),
        (ResNetConfig(depths=(3, 4, 6, 3)), "resnet34"),
        (ResNetConfig(depths=(1, 1, 2, 1)), "resnet-basic-1-1-2-1"),
        (ResNetConfig("bottleneck", (3, 4, 6, 3), base_width=96), "resnet50b96"),
        (ResNetConfig("bottleneck", (3, 4, 6, 3), 32, 4, 32), "resnext50_32x4dw32"),
    ],
)
def test_names(config, name):
    assert config.name == name


def test_a_config_is_a_static_value():
    assert hash(ResNetConfig(depths=[2, 2, 2, 2])) == hash(RESNETS["resnet18"])
    assert jax.tree.leaves(RESNETS["resnet18"]) == [RESNETS["resnet18"]]
