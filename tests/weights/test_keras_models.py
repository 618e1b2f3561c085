"""Keras models with layers of the user's around a ResNet; Keras itself writes them in tests/parity.

The configurations have the forms of Keras 3.15 and of the legacy ``.h5``.
"""

import io
import json
import zipfile

import h5py
import numpy as np
import pytest

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.models.model import leaf_shapes
from flaxtransfer.weights import load
from flaxtransfer.weights.naming import keras
from flaxtransfer.weights.naming.key_map import to_keys

FEATURES = 128
RANDOM = np.random.default_rng(0)
KERNEL, BIAS = (RANDOM.normal(size=shape).astype(np.float32) for shape in ((FEATURES, 7), (7,)))


def network():
    """The arrays of a small first version, by Keras' names, without a head."""
    config = ResNetConfig("bottleneck", (1, 1, 1, 1), width=4, classes=3)
    config = keras.first_version(config)
    rng = np.random.default_rng(0)
    leaves = {
        path: rng.uniform(0.5, 1, shape).astype(np.float32)
        for path, shape in leaf_shapes(config).items()
        if "/fc/" not in path
    }
    return to_keys(keras.table([]), leaves)


def layer(kind, name=None, **config):
    return {"class_name": kind, "config": {"name": name or kind.lower(), **config}}


def called(kind, name, *arguments):
    """An operation of Keras 3 on the layer before it."""
    tensor = {"class_name": "__keras_tensor__", "config": {"keras_history": ["before", 0, 0]}}
    node = {"args": [tensor, *arguments], "kwargs": {}}
    return {**layer(kind, name), "inbound_nodes": [node]}


INPUT = layer("InputLayer", "input", batch_shape=[None, 96, 96, 3])
BODY = [
    layer("Conv2D", "conv1_conv", strides=[2, 2], dilation_rate=[1, 1]),
    layer("Activation", "conv1_relu", activation="relu"),
    layer("Conv2D", "conv3_block1_0_conv", strides=[2, 2]),
    layer("Activation", "conv5_block1_out", activation="relu"),
]
BASE = {"class_name": "Functional", "config": {"name": "resnet50", "layers": [INPUT, *BODY]}}
POOL, DENSE = layer("GlobalAveragePooling2D"), layer("Dense", "species", activation="softmax")
HEAD = [POOL, layer("Dropout"), DENSE]
RESCALING = layer("Rescaling", scale=1 / 127.5, offset=-1)
AUGMENTED = {"class_name": "Sequential", "config": {"layers": [layer("RandomFlip")]}}
CAFFE = [
    *(called("GetItem", f"pick{n}", [{"class_name": "__ellipsis__"}, n]) for n in (2, 1, 0)),
    layer("Stack", axis=-1),
    called(
        "Add",
        "add",
        {"class_name": "__tensor__", "config": {"value": [[-103.939, -116.779, -123.68]]}},
    ),
]


@pytest.fixture
def save(tmp_path):
    """Writes a .keras archive with these layers; without layers a .weights.h5."""

    def save(layers=None, more=None, groups=()):
        data = io.BytesIO()
        arrays = network() | (
            {"species/kernel": KERNEL, "species/bias": BIAS} if more is None else more
        )
        with h5py.File(data, "w") as file:
            for key, array in arrays.items():
                name, _, variable = key.rpartition("/")
                group = file.require_group(f"layers/{name}/vars")
                group.attrs["name"] = name
                group[variable] = array
            for name in groups:
                file.require_group(f"layers/{name}")
        if layers is None:
            path = tmp_path / "net.weights.h5"
            path.write_bytes(data.getvalue())
            return path
        model = {"class_name": "Functional", "config": {"name": "mine", "layers": layers}}
        path = tmp_path / "net.keras"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("config.json", json.dumps(model))
            archive.writestr("model.weights.h5", data.getvalue())
        return path

    return save


@pytest.mark.parametrize("layers", [None, [INPUT, BASE, *HEAD], [INPUT, *BODY, *HEAD]])
def test_the_head_is_the_dense_layer(save, layers):
    found = load(save(layers))
    fc = found.variables["params"]["fc"]
    assert np.array_equal(fc["kernel"], KERNEL)
    assert np.array_equal(fc["bias"], BIAS)
    assert "the head is the linear layer 'species'" in found.notes
    assert found.preprocessing == keras.CAFFE
    assert "the stem's input channels were reordered from BGR to RGB" in found.notes


def test_weights_alone_may_have_as_many_classes_as_bands(save):
    found = load(save(None, {"species/0": KERNEL[:, :3], "species/1": BIAS[:3]}))
    assert found.config.classes == found.config.in_channels == 3
    assert found.no_head == ""


# Pixels p from 0 to 255 become (p / 255 - mean) / std.
BEFORE = {
    "rescaling": ([RESCALING], (0.5,) * 3, (0.5,) * 3, False),
    "to 0..1": ([layer("Rescaling", scale=1 / 255, offset=0.0)], (0,) * 3, (1,) * 3, False),
    "normalization": (
        [layer("Normalization", mean=[[102, 51, 204]], variance=[[2500.0] * 3])],
        (0.4, 0.2, 0.8),
        (50 / 255,) * 3,
        False,
    ),
    "both": (
        [
            AUGMENTED,
            layer("Rescaling", scale=1 / 255, offset=0),
            layer("Normalization", mean=[0.5, 0.4, 0.3], variance=[0.04] * 3),
        ],
        (0.5, 0.4, 0.3),
        (0.2,) * 3,
        False,
    ),
    "preprocess_input": (CAFFE, keras.CAFFE.mean, keras.CAFFE.std, True),
    "arithmetic": (
        [called("TrueDivide", "a", 127.5), called("Subtract", "b", 1.0)],
        (0.5,) * 3,
        (0.5,) * 3,
        False,
    ),
    "TensorFlow's": (
        [
            {
                **layer("TFOpLambda", "tf.math.truediv", function="math.truediv"),
                "inbound_nodes": [["input", 0, 0, {"y": 127.5, "name": None}]],
            },
            {
                **layer("TFOpLambda", "tf.math.subtract", function="math.subtract"),
                "inbound_nodes": [["tf.math.truediv", 0, 0, {"y": 1.0}]],
            },
        ],
        (0.5,) * 3,
        (0.5,) * 3,
        False,
    ),
}


@pytest.mark.parametrize("case", BEFORE)
def test_layers_before_the_network_are_its_preprocessing(save, case):
    layers, mean, std, turned = BEFORE[case]
    found = load(save([INPUT, *layers, BASE, *HEAD]))
    np.testing.assert_allclose(found.preprocessing.mean, mean, atol=1e-7)
    np.testing.assert_allclose(found.preprocessing.std, std, rtol=1e-7)
    assert (found.preprocessing.size, found.preprocessing.resize) == (96, 96)
    assert "preprocessing: from layers of the model" in found.notes
    reordered = any("from BGR to RGB" in note for note in found.notes)
    assert reordered == turned
    kernel = network()["conv1_conv/kernel"]
    ours = found.variables["params"]["conv1"]["kernel"]
    assert np.array_equal(ours, kernel[:, :, ::-1] if turned else kernel)


def test_augmentation_and_stored_statistics(save):
    stored = {"norm/0": np.float32([102] * 3), "norm/1": np.float32([2500] * 3), "norm/2": 1.0}
    measured = layer("Normalization", "norm", mean=None, variance=None)
    head = {"species/kernel": KERNEL, "species/bias": BIAS}
    found = load(save([INPUT, AUGMENTED, measured, BASE, *HEAD], stored | head))
    np.testing.assert_allclose(found.preprocessing.mean, (0.4,) * 3)
    assert "augmentation in the model was left out: randomflip" in found.notes
    with pytest.raises(ValueError, match="layer 'norm', and does not say whether it stands before"):
        load(save(None, stored | head))


OTHER_HEADS = {
    "two layers": [POOL, layer("Dense", "hidden", activation="relu"), DENSE],
    "a norm": [POOL, layer("BatchNormalization"), DENSE],
    "another pool": [layer("GlobalMaxPooling2D"), DENSE],
    "pixels": [layer("Flatten"), DENSE],
    "a bend": [POOL, layer("Dense", "species", activation="relu")],
    "names of its own": [layer("GlobalMaxPooling2D", "max_pool"), layer("Dense", "predictions")],
    "a norm of its own": [POOL, layer("BatchNormalization"), layer("Dense", "predictions")],
}


@pytest.mark.parametrize("case", OTHER_HEADS)
def test_other_heads_are_left_out(save, case):
    own = {"predictions/kernel": KERNEL, "predictions/bias": BIAS}
    head = own if "of its own" in case else {"species/kernel": KERNEL, "species/bias": BIAS}
    found = load(save([INPUT, RESCALING, BASE, *OTHER_HEADS[case]], head))
    assert found.no_head.startswith(("the head is not one linear map", "the head ends in 'relu'"))
    assert found.config.classes == 1


def test_a_sigmoid_is_said(save):
    found = load(save([INPUT, BASE, POOL, layer("Dense", "species", activation="sigmoid")]))
    assert found.no_head == ""
    assert any("ends in a sigmoid" in note for note in found.notes)


REFUSED = {
    "a program": ([INPUT, layer("Lambda"), BASE, *HEAD], r"'lambda' \(Lambda\) before the network"),
    "a convolution": ([INPUT, layer("Conv2D"), BASE, *HEAD], r"'conv2d' \(Conv2D\) before the"),
    "one channel": ([INPUT, CAFFE[0], BASE, *HEAD], "picks channels of its input"),
    "a negative": ([INPUT, layer("Rescaling", scale=-1, offset=0), BASE], "scale pixels by more"),
    "no number": ([INPUT, layer("Rescaling", scale="x", offset=0), BASE], "must have one number"),
    "no square": ([INPUT, layer("Resizing", height=8, width=9), BASE], "must make squares"),
    "an activation": (
        [INPUT, *BODY[:1], layer("Activation", "conv1_relu", activation="silu"), *BODY[2:]],
        "conv1_relu must have the activation 'relu', got 'silu'",
    ),
    "a stride": (
        [INPUT, *BODY, layer("Conv2D", "conv2_block1_0_conv", strides=[2, 2])],
        r"strides must be those of keras.applications, got others in conv2_block1_0_conv",
    ),
    "a dilation": (
        [INPUT, *BODY, layer("Conv2D", "conv5_block1_2_conv", dilation_rate=[2, 2])],
        "conv5_block1_2_conv must have a dilation_rate of 1, got 2",
    ),
    "a layer inside": (
        [INPUT, BODY[0], layer("Dense"), *BODY[1:]],
        "must not stand inside the netw",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honored_is_refused_by_name(save, case):
    layers, said = REFUSED[case]
    with pytest.raises(ValueError, match=said) as caught:
        load(save(layers))
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) <= 600


def test_weights_alone_do_not_say_what_a_layer_does(save):
    with pytest.raises(
        ValueError, match=r"the layer 'rescaling_1' does to pixels.*load the .keras"
    ):
        load(save(groups=["rescaling_1"]))
    assert load(save(groups=["global_max_pooling2d"])).no_head.startswith("the head is not one lin")


def test_layers_of_two_models_may_have_one_name(save, tmp_path):
    path = save()
    with h5py.File(path, "a") as file:
        for place in ("a", "b"):
            group = file.create_group(f"layers/{place}/layers/norm/vars")
            group.attrs["name"] = "norm"
            group["0"] = np.ones(5, np.float32)
    assert load(path).no_head.startswith("the head is not one linear map, but has the layers")
