"""Names of networks: what ``ResNetConfig.name`` prints is read again as the same network."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flaxtransfer as ft
from flaxtransfer.models.config import ResNetConfig, config_of
from flaxtransfer.models.registry import ARCHITECTURES, named
from tests.support.random_networks import known_depths, networks

BOTTLENECKS = ResNetConfig("bottleneck", (3, 4, 6, 3))


def said_by_a_name(config):
    """The configuration with the usual values of all that a name does not carry."""
    plain = ResNetConfig()
    lost = {name: getattr(plain, name) for name in ("classes", "in_channels", "epsilon")}
    if config.standardized is not None:
        lost["standardized"] = 1e-10
    if config.attention != "se":
        lost["se_ratio"] = plain.se_ratio
    return dataclasses.replace(config, adapter=None, **lost)


EARLIER = ("stem", "layer1", "layer2", "layer3")


@given(
    networks(widths=(32, 64, 96, 192)), st.none() | known_depths, st.sets(st.sampled_from(EARLIER))
)
@settings(deadline=None, max_examples=400)
def test_a_name_is_read_as_the_network_that_has_it(config, depths, reads):
    config = dataclasses.replace(config, head_reads=[name for name in EARLIER if name in reads])
    if depths is not None:
        config = dataclasses.replace(config, depths=depths)
    assert config_of(config.name) == said_by_a_name(config)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_established_names_are_read(name):
    assert config_of(name) == ARCHITECTURES[name]


# Fields by timm's and Caffe's descriptions of what the endings stand for.
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("resnet50w32s64_v1_ceilpool", (32, {"stem_width": 64, "stem_pool": "ceil"})),
        ("resnet50_v1_ceilpoolw32s64", (32, {"stem_width": 64, "stem_pool": "ceil"})),
        ("resnet50s48_v1", (64, {"stem_width": 48})),
        ("resnet50w64s64_v1", (64, {})),
        ("resnet50b32_v1", (64, {"base_width": 32})),
        ("resnet50_v1_gn", (64, {"norm": "group"})),
    ],
)
def test_widths_and_endings(name, fields):
    width, others = fields
    expected = dataclasses.replace(BOTTLENECKS, width=width, stride_in="1x1", **others)
    assert named(name) == expected
    assert ft.resnet(expected.name).config == expected


def test_two_networks_have_two_names():
    # Without a convolution instead of the pool there is no RS network.
    pool = {"stem_pool": "convolution"}
    deep = {"stem": "deep", "stem_width": 32, "shortcut": "average"}
    squeezed = {"attention": "se", "se_ratio": 0.25}
    configs = [
        dataclasses.replace(BOTTLENECKS, **pool, **stem, **attention)
        for stem in ({}, deep)
        for attention in ({}, {"attention": "se"}, squeezed)
    ]
    assert len({config.name for config in configs}) == len(configs)
    assert configs[-1].name == "resnetrs50"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("resnet51", "'resnet50'"),
        ("resnet50_v2", "'_v2' must be one of"),
        ("resnet18_v1", "a basic block has no 1x1 convolution"),
        ("resnet50_v1_v1", "sets stride_in a second time"),
        ("resnext50", "a resnext has groups, as in _32x4d"),
        ("vit_base_patch16_224", "must be the name of a network"),
        ("resnet50" + "_x" * 5000, "a name has at most 200 characters"),
        ("resnet" + "9" * 5000, "must be the name of a network"),
        ("resnet50w0", "'w0' must be one of"),
    ],
)
def test_an_unknown_name_is_one_short_line(name, part):
    with pytest.raises(ValueError, match="`architecture` must be the name") as caught:
        ft.resnet(name)
    text = str(caught.value)
    assert part in text
    assert len(text) <= 600
    assert "\n" not in text
