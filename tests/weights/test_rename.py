"""The strict engine: what it fills, and all that it refuses."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxtransfer.architectures import ResNetConfig
from flaxtransfer.catalogue import ARCHITECTURES, RESNETS
from flaxtransfer.weights import huggingface, timm, torchvision
from flaxtransfer.weights.architecture import leaf_shapes
from flaxtransfer.weights.rename import CONV, Rule, leaf_of, to_keys, to_leaves

TABLES = {"torchvision": torchvision.TABLE, "huggingface": huggingface.TABLE}
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
    keys = to_keys(timm.table_for(config), leaves)
    assert len(keys) == len(leaves)
    table = timm.table_of(keys)
    assert [leaf_of(table, key, ())[0] for key in keys] == list(leaves)


@pytest.mark.parametrize(
    ("key", "leaf"),
    [
        ("resnet.encoder.stages.0.layers.2.layer.0.convolution.weight",
         "params/layer1/2/conv1/kernel"),
        ("resnet.encoder.stages.3.layers.0.shortcut.normalization.running_var",
         "batch_stats/layer4/0/downsample/1/var"),
        ("classifier.1.weight", "params/fc/kernel"),
        ("classifier.0.weight", None),
        ("xresnet.embedder.embedder.convolution.weight", None),
    ],
)  # fmt: skip
def test_hugging_face_counts_from_zero(key, leaf):
    found = leaf_of(huggingface.TABLE, key, (1, 2, 3, 4))
    assert (found and found[0]) == leaf


@pytest.mark.parametrize(
    "key",
    ["layer01.0.conv1.weight", "layer1.0.conv1.weight.x", "layer1x0.conv1.weight", "conv1xweight",
     "layer-1.0.conv1.weight", "overfc.weight"],
)  # fmt: skip
def test_a_key_that_only_resembles_another_is_foreign(key):
    assert leaf_of(torchvision.TABLE, key, ()) is None


def test_a_convolution_turns_round():
    kernel = np.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)
    table = (Rule("w", "params/w", CONV),)
    ours = to_leaves(table, {"w": kernel}, {"params/w": (5, 7, 3, 2)}, what="file")["params/w"]
    assert ours[4, 6, 1, 0] == kernel[0, 1, 4, 6]


def test_one_error_lists_every_difference():
    theirs = to_keys(torchvision.TABLE, leaves())
    theirs["layer1.0.conv9.weight"] = theirs.pop("layer1.0.conv2.weight")
    del theirs["bn1.running_var"]
    theirs["fc.weight"] = theirs["fc.weight"][:, :-1]
    theirs["layer4.0.bn1.bias"] = np.zeros(3)
    theirs["head.extra"] = np.zeros((2, 2))
    theirs["layer7.0.bn1.num_batches_tracked"] = np.zeros(())
    with pytest.raises(ValueError, match="2 missing, 3 unexpected, 2 of") as caught:
        to_leaves(torchvision.TABLE, theirs, leaf_shapes(TINY), what="x.pth")
    assert str(caught.value).splitlines() == [
        "x.pth; keys: 2 missing, 3 unexpected, 2 of another shape",
        "  missing: bn1.running_var [4]",
        "  missing: layer1.0.conv2.weight [4, 4, 3, 3]",
        "  unexpected: layer1.0.conv9.weight [4, 4, 3, 3]; did you mean 'layer1.0.conv2.weight'?",
        "  unexpected: head.extra [2, 2]",
        "  unexpected: layer7.0.bn1.num_batches_tracked []",
        "  shape: layer4.0.bn1.bias is [3] in the file, [32] in the network",
        "  shape: fc.weight is [3, 127] in the file, [3, 128] in the network",
    ]


def test_a_transposed_shape_is_a_difference_even_with_as_many_numbers():
    theirs = to_keys(torchvision.TABLE, leaves())
    theirs["fc.weight"] = theirs["fc.weight"].T
    with pytest.raises(ValueError, match=r"fc.weight is \[128, 3\] in the file, \[3, 128\]"):
        to_leaves(torchvision.TABLE, theirs, leaf_shapes(TINY), what="file")


def test_counters_beside_expected_norms_are_excused():
    theirs = to_keys(torchvision.TABLE, leaves())
    theirs |= {"bn1.num_batches_tracked": np.zeros(()),
               "layer2.0.downsample.1.num_batches_tracked": np.zeros(())}  # fmt: skip
    assert len(to_leaves(torchvision.TABLE, theirs, leaf_shapes(TINY), what="file")) == len(
        leaf_shapes(TINY)
    )


@given(st.data())
def test_whatever_single_key_goes_missing_is_named(data):
    theirs = to_keys(torchvision.TABLE, leaves())
    lost = data.draw(st.sampled_from(sorted(theirs)))
    del theirs[lost]
    with pytest.raises(ValueError, match="1 missing, 0 unexpected, 0 of") as caught:
        to_leaves(torchvision.TABLE, theirs, leaf_shapes(TINY), what="file")
    assert f"missing: {lost} " in str(caught.value)
