"""Config, leaf shapes and inference agree with the models and with published numbers."""

import dataclasses
import json
import math

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.models.registry import ARCHITECTURES, RESNETS, resnet
from flaxtransfer.paths import flatten
from flaxtransfer.weights.infer import infer, leaf_shapes, with_unseen

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


def configs():
    sizes = st.integers(1, 5)
    depths = st.tuples(sizes, sizes, sizes, sizes)
    ends = {"classes": st.integers(1, 50), "in_channels": st.integers(1, 14)}
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
    assert leaf_shapes(infer(leaf_shapes(config))) == leaf_shapes(config)


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
    seen = infer(leaf_shapes(config))
    # Anti-aliasing and standardized weights, for instance, have no leaves.
    assert with_unseen(seen, config) == config


@pytest.mark.parametrize("name", PARAMETERS)
def test_counts_as_many_parameters_as_torchvision(name):
    config = ARCHITECTURES[name]
    shapes = leaf_shapes(config)
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
    abstract = flatten(resnet(config).abstract())
    assert leaf_shapes(config) == {path: leaf.shape for path, leaf in abstract.items()}


@given(configs())
@settings(deadline=None, max_examples=60)
def test_inference_finds_a_config_with_the_same_leaves(config):
    # Several base widths can round to the same channels; the leaves are what counts.
    assert leaf_shapes(infer(leaf_shapes(config))) == leaf_shapes(config)


@given(configs(), st.data())
@settings(deadline=None, max_examples=60)
def test_one_damaged_leaf_does_not_change_the_network(config, data):
    shapes = leaf_shapes(config)
    leaf = data.draw(
        st.sampled_from([path for path in shapes if path.count("/") > 2]), label="damaged"
    )
    damaged = shapes | {leaf: tuple(size + 1 for size in shapes[leaf])}
    inferred = infer(damaged)
    kept = ("width", "depths", "groups", "block", "classes", "in_channels")
    assert all(getattr(inferred, field) == getattr(config, field) for field in kept)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"block": "wide"}, "'basic' or 'bottleneck', not 'wide'"),
        ({"depths": (2, 2, 2)}, "4 positive integers"),
        ({"depths": (2, 0, 2, 2)}, "4 positive integers"),
        ({"width": 0}, "width must be a positive integer, not 0"),
        ({"classes": 2.5}, "classes must be a positive integer, not 2.5"),
        ({"in_channels": True}, "in_channels must be a positive integer"),
        ({"groups": 2}, "use block='bottleneck'"),
        ({"block": "bottleneck", "width": 2, "base_width": 1}, "no channels"),
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
