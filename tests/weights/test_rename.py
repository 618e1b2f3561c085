"""The strict engine: what it fills, and all that it refuses."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.models.model import leaf_shapes
from flaxtransfer.models.registry import ARCHITECTURES, RESNETS
from flaxtransfer.weights.naming import huggingface, timm
from flaxtransfer.weights.naming.key_map import CONV, Rule, leaf_of, to_keys, to_leaves
from flaxtransfer.weights.naming.timm import table_for

TABLES = {"torchvision": timm.PLAIN_TABLE, "huggingface": huggingface.TABLE}
TINY = ResNetConfig("bottleneck", (2, 1, 1, 1), width=4, classes=3)


def leaves(config=TINY):
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=shape) for path, shape in leaf_shapes(config).items()}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("config", [TINY, ResNetConfig(depths=(1, 2, 1, 1), width=2)])
def test_there_and_back_is_the_identity(table, config):
    ours = leaves(config)
    theirs = to_keys(TABLES[table], ours)
    back = to_leaves(TABLES[table], theirs, leaf_shapes(config), what="file")
    assert list(back) == list(ours)
    assert all(np.array_equal(back[path], ours[path]) for path in ours)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", [*RESNETS, "wide_resnet50_2", "resnext50_32x4d"])
def test_every_leaf_has_one_key_and_every_key_one_leaf(table, name):
    shapes = leaf_shapes(ARCHITECTURES[name])
    keys = to_keys(TABLES[table], {path: np.zeros((0,) * len(shapes[path])) for path in shapes})
    assert len(keys) == len(shapes)
    assert [leaf_of(TABLES[table], key, ())[0] for key in keys] == list(shapes)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_timms_table_is_one_to_one_for_every_architecture(name):
    config = ARCHITECTURES[name]
    leaves = {path: np.zeros((0,) * len(shape)) for path, shape in leaf_shapes(config).items()}
    keys = to_keys(table_for(config), leaves)
    assert len(keys) == len(leaves)
    table = (timm.v2_table_of if config.preactivation else timm.table_of)(keys)
    assert [leaf_of(table, key, ())[0] for key in keys] == list(leaves)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name.endswith("_bit")])
def test_bits_table_is_one_to_one(name):
    config = ARCHITECTURES[name]
    arrays = leaves(dataclasses.replace(config, width=2, depths=(2, 1, 1, 11), norm="batch"))
    arrays = {path.replace("/bn", "/gn"): a for path, a in arrays.items() if path[0] == "p"}
    keys = to_keys(timm.BIT_TABLE, arrays)
    assert "resnet/block4/unit11/a/standardized_conv2d/kernel" in keys
    assert keys["resnet/head/conv2d/kernel"].shape == (1, 1, 64, 1000)
    shapes = {path: array.shape for path, array in arrays.items()}
    back = to_leaves(timm.BIT_TABLE, keys, shapes, what="file")
    assert all(np.array_equal(back[path], arrays[path]) for path in arrays)


@pytest.mark.parametrize("key", ["unit1/w", "unit00/w", "unit001/w", "unit1a/w", "unit012/w"])
def test_a_number_written_otherwise_is_another_key(key):
    table = (Rule("unit{b+1:02}/w", "params/{b}/kernel"),)
    assert leaf_of(table, "unit01/w", ()) == ("params/0/kernel", ())
    assert leaf_of(table, "unit12/w", ()) == ("params/11/kernel", ())
    assert leaf_of(table, key, ()) is None


@given(b=st.integers(0, 300))
def test_numbers_in_two_digits_go_there_and_back(b):
    table = (Rule("unit{b+1:02}/w", "params/{b}/kernel"),)
    (key,) = to_keys(table, {f"params/{b}/kernel": np.zeros(1)})
    assert key == f"unit{b + 1:02}/w"
    assert leaf_of(table, key, (1,)) == (f"params/{b}/kernel", (1,))


def test_axes_of_length_one_are_dropped_and_given_back():
    table = (Rule("fc.weight", "params/fc/kernel", (1, 0), units=(2, 3)),)
    array = np.arange(6.0).reshape(2, 3, 1, 1)
    assert leaf_of(table, "fc.weight", array.shape) == ("params/fc/kernel", (3, 2))
    found = to_leaves(table, {"fc.weight": array}, {"params/fc/kernel": (3, 2)}, what="file")
    np.testing.assert_array_equal(found["params/fc/kernel"], array[:, :, 0, 0].T)
    np.testing.assert_array_equal(to_keys(table, found)["fc.weight"], array)
    wrong = {"fc.weight": np.zeros((2, 3, 1, 2))}
    with pytest.raises(
        ValueError, match=r"must be \[2, 3, 1, 1\] for the network, got \[2, 3, 1, 2\]"
    ):
        to_leaves(table, wrong, {"params/fc/kernel": (3, 2)}, what="file")


@pytest.mark.parametrize(
    ("key", "leaf"),
    [
        (
            "resnet.encoder.stages.0.layers.2.layer.0.convolution.weight",
            "params/layer1/2/conv1/kernel",
        ),
        (
            "resnet.encoder.stages.3.layers.0.shortcut.normalization.running_var",
            "batch_stats/layer4/0/downsample/1/var",
        ),
        ("classifier.1.weight", "params/fc/kernel"),
        ("classifier.0.weight", None),
        ("xresnet.embedder.embedder.convolution.weight", None),
    ],
)
def test_hugging_face_counts_from_zero(key, leaf):
    found = leaf_of(huggingface.TABLE, key, (1, 2, 3, 4))
    assert (found and found[0]) == leaf


@pytest.mark.parametrize(
    "key",
    [
        "layer01.0.conv1.weight",
        "layer1.0.conv1.weight.x",
        "layer1x0.conv1.weight",
        "conv1xweight",
        "layer-1.0.conv1.weight",
        "overfc.weight",
    ],
)
def test_a_key_that_only_resembles_another_is_foreign(key):
    assert leaf_of(timm.PLAIN_TABLE, key, ()) is None


def test_a_convolution_turns_round():
    kernel = np.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)
    table = (Rule("w", "params/w", CONV),)
    ours = to_leaves(table, {"w": kernel}, {"params/w": (5, 7, 3, 2)}, what="file")["params/w"]
    assert ours[4, 6, 1, 0] == kernel[0, 1, 4, 6]


def test_one_error_lists_every_difference():
    theirs = to_keys(timm.PLAIN_TABLE, leaves())
    theirs["layer1.0.conv9.weight"] = theirs.pop("layer1.0.conv2.weight")
    del theirs["bn1.running_var"]
    theirs["fc.weight"] = theirs["fc.weight"][:, :-1]
    theirs["layer4.0.bn1.bias"] = np.zeros(3)
    theirs["head.extra"] = np.zeros((2, 2))
    theirs["layer7.0.bn1.num_batches_tracked"] = np.zeros(())
    with pytest.raises(ValueError, match="2 missing, 3 unexpected, 2 of") as caught:
        to_leaves(timm.PLAIN_TABLE, theirs, leaf_shapes(TINY), what="x.pth")
    assert str(caught.value).splitlines() == [
        "x.pth; keys: 2 missing, 3 unexpected, 2 of another shape",
        "  missing: layer1.0.conv2.weight [4, 4, 3, 3]",
        "  missing: bn1.running_var [4]",
        "  unexpected: layer1.0.conv9.weight [4, 4, 3, 3]; did you mean 'layer1.0.conv2.weight'?",
        "  unexpected: head.extra [2, 2]",
        "  unexpected: layer7.0.bn1.num_batches_tracked []",
        "  shape: fc.weight must be [3, 128] for the network, got [3, 127] in the file",
        "  shape: layer4.0.bn1.bias must be [32] for the network, got [3] in the file",
    ]


def test_a_transposed_shape_is_a_difference_even_with_as_many_numbers():
    theirs = to_keys(timm.PLAIN_TABLE, leaves())
    theirs["fc.weight"] = theirs["fc.weight"].T
    with pytest.raises(
        ValueError, match=r"fc.weight must be \[3, 128\] for the network, got \[128, 3\]"
    ):
        to_leaves(timm.PLAIN_TABLE, theirs, leaf_shapes(TINY), what="file")


def test_counters_beside_expected_norms_are_excused():
    theirs = to_keys(timm.PLAIN_TABLE, leaves())
    theirs |= {
        "bn1.num_batches_tracked": np.zeros(()),
        "layer2.0.downsample.1.num_batches_tracked": np.zeros(()),
    }
    assert len(to_leaves(timm.PLAIN_TABLE, theirs, leaf_shapes(TINY), what="file")) == len(
        leaf_shapes(TINY)
    )


@given(st.data())
def test_whatever_single_key_goes_missing_is_named(data):
    theirs = to_keys(timm.PLAIN_TABLE, leaves())
    lost = data.draw(st.sampled_from(sorted(theirs)))
    del theirs[lost]
    with pytest.raises(ValueError, match="1 missing, 0 unexpected, 0 of") as caught:
        to_leaves(timm.PLAIN_TABLE, theirs, leaf_shapes(TINY), what="file")
    assert f"missing: {lost} " in str(caught.value)
