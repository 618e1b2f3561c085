"""Keras Applications: both versions, in each layout of their files, with their own preprocessing.

Keras starts biases at 0; here they are random, and so are the statistics.
"""

import dataclasses
import importlib
import os

import jax
import numpy as np
import pytest

import flaxtransfer as ft
from flaxtransfer.models.model import leaf_shapes
from flaxtransfer.models.registry import resnet
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.weights import Pretrained, export, load
from flaxtransfer.weights.naming import keras as naming
from flaxtransfer.weights.naming import key_map
from flaxtransfer.weights.naming.formats import FORMATS
from flaxtransfer.weights.readers import detect

# Keras warns of its own: of copies of torch's arrays, of legacy files, of unusual channels.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

LIMIT = 5e-6
CLASSES = 7


@pytest.fixture(scope="module")
def keras():
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    assert keras.backend.backend() == "torch"
    return keras


def network(keras, name, bands=3):
    model = getattr(keras.applications, name)(
        weights=None, classes=CLASSES, classifier_activation=None, input_shape=(75, 75, bands)
    )
    rng = np.random.default_rng(0)

    def draw(variable):
        shape, kind = variable.shape, variable.name
        if kind == "kernel":
            return rng.normal(0, np.sqrt(1 / np.prod(shape[:-1])), shape)
        if kind in ("gamma", "moving_variance"):
            return rng.uniform(0.5, 1.5, shape)
        return rng.normal(0, 0.3, shape)

    for layer in model.layers:
        layer.set_weights([draw(weight) for weight in layer.weights])
    return model


def pictures(bands=3):
    return np.random.default_rng(1).integers(0, 256, (2, 75, 75, bands)).astype(np.float32)


@pytest.fixture(scope="module", params=["ResNet50", "ResNet50V2"])
def version(request, keras):
    model = network(keras, request.param)
    module = keras.applications.resnet_v2 if "V2" in request.param else keras.applications.resnet
    images = module.preprocess_input(pictures().copy())
    return request.param, model, np.asarray(model(images).detach())


@pytest.mark.parametrize("suffix", [".weights.h5", ".h5", ".keras"])
def test_logits_in_each_layout(agree, version, tmp_path, suffix):
    name, model, theirs = version
    path = tmp_path / f"net{suffix}"
    (model.save_weights if "weights" in suffix else model.save)(path)
    checkpoint = load(path)
    assert checkpoint.format == "keras"
    config = checkpoint.config
    wanted = (
        {"stride_at": "last", "stem_pool": "zero-padded"} if "V2" in name else {"stride_in": "1x1"}
    )
    assert all(getattr(config, field) == value for field, value in wanted.items())
    pre = checkpoint.preprocessing
    images = (pictures() / 255 - np.float32(pre.mean)) / np.float32(pre.std)
    run = jax.jit(lambda variables, images: resnet(config).apply(variables, images)[0])
    agree(run(checkpoint.variables, images.astype(np.float32)), theirs, LIMIT)


@pytest.mark.parametrize("bands", [3, 2])
def test_keras_takes_our_file_and_gives_it_back(agree, version, keras, tmp_path, bands):
    """In the order of the layers, by their names, and after a step of training there."""
    name, model, _ = version
    model.save_weights(tmp_path / "theirs.weights.h5")
    before = load(tmp_path / "theirs.weights.h5")
    if bands != 3:
        config = dataclasses.replace(before.config, in_channels=bands)
        stem = before.variables["params"]["conv1"]
        stem = {**stem, "kernel": stem["kernel"][:, :, :bands]}
        params = {**before.variables["params"], "conv1": stem}
        pre = ft.Preprocessing((0.5,) * bands, (0.5,) * bands, 75, 75)
        before = Pretrained({**before.variables, "params": params}, config, pre)
    written = export(before, tmp_path / "net.h5")
    assert any(f"keras.applications.{name} takes it" in note for note in written.notes)
    assert any("preprocess_input" in note for note in written.notes) == (bands == 3)
    build = getattr(keras.applications, name)
    kept = {"classes": CLASSES, "classifier_activation": None, "input_shape": (75, 75, bands)}
    again = build(weights=str(tmp_path / "net.h5"), **kept)
    named = build(weights=None, **kept)
    named.load_weights(tmp_path / "net.h5", by_name=True)
    pre = before.preprocessing
    pixels = pictures(bands)
    images = ((pixels / 255 - np.float32(pre.mean)) / np.float32(pre.std)).astype(np.float32)
    theirs = images[..., ::-1] if bands == 3 and "V2" not in name else images
    run = jax.jit(lambda variables, images: resnet(before.config).apply(variables, images)[0])
    for network in (again, named):
        agree(run(before.variables, images), np.asarray(network(theirs).detach()), LIMIT)
    again.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    again.train_on_batch(theirs, np.arange(2))
    again.save_weights(tmp_path / "trained.weights.h5")
    trained = load(tmp_path / "trained.weights.h5").variables
    assert not np.array_equal(
        trained["params"]["fc"]["kernel"], before.variables["params"]["fc"]["kernel"]
    )
    agree(run(trained, images), np.asarray(again(theirs).detach()), LIMIT)


def other(keras, changes, name="ResNet50"):
    """The network with settings of its layers changed, as a user's clone of it."""

    def clone(layer):
        fields = layer.get_config()
        for kind, field, value in changes:
            if isinstance(layer, getattr(keras.layers, kind)) and field in fields:
                fields[field] = value
        return layer.__class__.from_config(fields)

    plain = network(keras, name)
    model = keras.models.clone_model(plain, clone_function=clone)
    model.set_weights(plain.get_weights())
    return model


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ([("BatchNormalization", "epsilon", 1e-3)], ""),
        ([("Activation", "activation", "silu")], "activation 'relu', got 'silu'"),
        ([("Activation", "activation", "relu6")], "activation 'relu', got 'relu6'"),
        ([("Conv2D", "dilation_rate", [2, 2]), ("Conv2D", "strides", [1, 1])], "dilation_rate"),
        ([("Conv2D", "strides", [1, 1])], "strides must be those of keras.applications"),
    ],
)
def test_the_graph_that_a_file_states(agree, keras, tmp_path, suffix, changes, text):
    model = other(keras, changes)
    model.save(tmp_path / f"net{suffix}")
    if text:
        with pytest.raises(ValueError, match=text) as caught:
            load(tmp_path / f"net{suffix}")
        assert len(str(caught.value)) <= 600
        return
    checkpoint = load(tmp_path / f"net{suffix}")
    assert checkpoint.config.epsilon == changes[0][2]
    images = (pictures() / 255 - np.float32(checkpoint.preprocessing.mean)) * 255
    theirs = model(keras.applications.resnet.preprocess_input(pictures().copy()))
    run = jax.jit(lambda variables, images: resnet(checkpoint.config).apply(variables, images)[0])
    agree(run(checkpoint.variables, images), np.asarray(theirs.detach()), LIMIT)


@pytest.mark.parametrize("suffix", [".h5", ".keras", ".weights.h5"])
@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("name", ["predictions", "species"])
def test_the_pooling_before_a_head_of_ones_own(keras, tmp_path, suffix, pooling, name):
    base = keras.applications.ResNet50(
        weights=None, include_top=False, pooling=pooling, input_shape=(75, 75, 3)
    )
    outputs = keras.layers.Dense(3, name=name)(base.output)
    model = keras.Model(base.input, outputs)
    (model.save_weights if "weights" in suffix else model.save)(tmp_path / f"net{suffix}")
    checkpoint = load(tmp_path / f"net{suffix}")
    # A head behind another pooling is no head of this network: its body loads without it.
    assert checkpoint.config.classes == (3 if pooling == "avg" else 1)
    assert ("max_pool" in checkpoint.no_head) == (pooling == "max")


def test_layers_in_front_of_the_network_become_its_preprocessing(agree, keras, tmp_path):
    plain = network(keras, "ResNet50V2")
    inputs = keras.Input((75, 75, 3))
    base = keras.applications.ResNet50V2(
        weights=None,
        classes=CLASSES,
        classifier_activation=None,
        input_tensor=keras.layers.Rescaling(1 / 100, -1.2)(inputs),
    )
    base.set_weights(plain.get_weights())
    keras.Model(inputs, base.output).save(tmp_path / "net.keras")
    checkpoint = load(tmp_path / "net.keras")
    pre = checkpoint.preprocessing
    images = (pictures() / 255 - np.float32(pre.mean)) / np.float32(pre.std)
    run = jax.jit(lambda variables, images: resnet(checkpoint.config).apply(variables, images)[0])
    theirs = np.asarray(base(pictures()).detach())
    agree(run(checkpoint.variables, images.astype(np.float32)), theirs, LIMIT)


@pytest.mark.parametrize("name", ["ResNet101", "ResNet152", "ResNet101V2", "ResNet152V2"])
def test_deeper_ones_have_the_same_leaves(keras, tmp_path, name):
    model = getattr(keras.applications, name)(
        weights=None, classes=CLASSES, classifier_activation=None, input_shape=(75, 75, 3)
    )
    model.save_weights(tmp_path / "net.weights.h5")
    checkpoint = load(tmp_path / "net.weights.h5")
    shapes = {path: leaf.shape for path, leaf in flatten(checkpoint.variables).items()}
    assert shapes == leaf_shapes(checkpoint.config)
    depth = {"101": (3, 4, 23, 3), "152": (3, 8, 36, 3)}[name[6:9]]
    assert checkpoint.config.depths == depth


def test_five_bands_keep_their_order(agree, keras, tmp_path):
    model = network(keras, "ResNet50", bands=5)
    model.save_weights(tmp_path / "net.weights.h5")
    checkpoint = load(tmp_path / "net.weights.h5")
    images = pictures(5) / 255
    model_ours = resnet(checkpoint.config)
    run = jax.jit(lambda variables, images: model_ours.apply(variables, images)[0])
    agree(run(checkpoint.variables, images), np.asarray(model(images).detach()), LIMIT)


@pytest.mark.parametrize("name", ["ResNet50", "ResNet50V2"])
def test_gradients_in_float64(record_property, keras, tmp_path, monkeypatch, name):
    import torch

    # Keras' BatchNorms and means cast float64 to the precision that they want, float32.
    for place in ("keras.src.backend", "keras.src.backend.common.dtypes"):
        module = importlib.import_module(place)
        monkeypatch.setattr(module, "result_type", lambda *dtypes: "float64")
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        model = network(keras, name)
        model.save_weights(tmp_path / "net.weights.h5")
        images = torch.from_numpy(np.random.default_rng(2).normal(size=(2, 75, 75, 3)))
        images.requires_grad_(True)
        weights = np.random.default_rng(3).normal(size=(2, CLASSES))
        for variable in model.variables:
            variable.value.grad = None
        (model(images, training=False) * torch.from_numpy(weights)).sum().backward()
        wanted = {
            variable.path: variable.value.grad.numpy() for variable in model.trainable_variables
        }
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")
    checkpoint = load(tmp_path / "net.weights.h5")
    # In float64 as they were: `load` gives float32.
    arrays, _ = FORMATS["keras"].prepare(detect.read_tensors(tmp_path / "net.weights.h5").arrays)
    table = naming.table(arrays)
    leaves = key_map.to_leaves(table, arrays, leaf_shapes(checkpoint.config), what="keras")
    flip = name == "ResNet50"
    with jax.enable_x64(True):
        variables = unflatten({path: np.asarray(leaf, np.float64) for path, leaf in leaves.items()})
        model_ours = resnet(checkpoint.config)
        shown = images.detach().numpy()[..., ::-1] if flip else images.detach().numpy()

        def loss(params):
            logits, _ = model_ours.apply({**variables, "params": params}, shown)
            return (logits * weights).sum()

        ours = flatten(jax.jit(jax.grad(loss))(variables["params"]))
    worst = 0.0
    for key, array in wanted.items():
        layer, variable = key.split("/")[-2:]
        found = key_map.leaf_of(table, f"{layer}/{variable}", array.shape)
        if found is None or found[0].removeprefix("params/") not in ours:
            continue  # a bias that was folded
        leaf = np.asarray(ours[found[0].removeprefix("params/")])
        if flip and layer == "conv1_conv":
            leaf = leaf[:, :, ::-1]
        worst = max(worst, float(np.abs(leaf - array).max() / np.abs(array).max()))
    record_property("gradients", worst)
    assert worst <= 1e-10


def small(keras, preactivation, **more):
    """A ResNet of Keras' own blocks, with as few as its names allow, and no head."""
    from keras.src.applications import resnet as peer

    stacked = peer.stack_residual_blocks_v2 if preactivation else peer.stack_residual_blocks_v1
    blocks = 2 if preactivation else 1

    def stack(x):
        for stage, planes in enumerate((64, 128, 256, 512), 2):
            stride = 1 if stage == (5 if preactivation else 2) else 2
            x = stacked(x, planes, blocks, stride1=stride, name=f"conv{stage}")
        return x

    options = {"include_top": False, "weights": None, "input_shape": (64, 64, 3), **more}
    return peer.ResNet(stack, preactivation, True, name="base", weights_name="base", **options)


def before(keras):
    """Layers before a network, and whether the network is of the first version."""
    layers, apps = keras.layers, keras.applications
    return {
        "rescaling": (True, lambda x: layers.Rescaling(1 / 127.5, offset=-1)(x)),
        "rescaling, first version": (False, lambda x: layers.Rescaling(1 / 255)(x)),
        "normalization": (
            True,
            lambda x: layers.Normalization(mean=[120, 110, 100], variance=[2500, 2000, 1500])(x),
        ),
        "preprocess_input": (False, apps.resnet.preprocess_input),
        "preprocess_input, second version": (True, apps.resnet_v2.preprocess_input),
        "augmentation": (
            True,
            lambda x: layers.Rescaling(1 / 127.5, -1)(
                keras.Sequential([layers.RandomFlip(), layers.RandomRotation(0.1)])(x)
            ),
        ),
    }


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
@pytest.mark.parametrize("case", range(6))
def test_a_model_around_a_network(agree, keras, tmp_path, case, suffix):
    preactivation, prepared = list(before(keras).values())[case]
    keras.utils.clear_session()
    inputs = keras.Input((64, 64, 3))
    features = small(keras, preactivation)(prepared(inputs), training=False)
    pooled = keras.layers.Dropout(0.3)(keras.layers.GlobalAveragePooling2D()(features))
    model = keras.Model(inputs, keras.layers.Dense(CLASSES, name="species")(pooled))
    draw_all(model)
    shown = np.random.default_rng(1).integers(0, 256, (2, 64, 64, 3)).astype(np.float32)
    logits = np.asarray(model(shown, training=False).detach())
    path = tmp_path / f"net{suffix}"
    model.save(path)
    checkpoint = load(path)
    pre = checkpoint.preprocessing
    images = ((shown / 255 - np.float32(pre.mean)) / np.float32(pre.std)).astype(np.float32)
    net = resnet(checkpoint.config)
    run = jax.jit(lambda variables, images: net.apply(variables, images)[0])
    agree(run(checkpoint.variables, images), logits, LIMIT)
    assert "the head is the linear layer 'species'" in checkpoint.notes


def draw_all(model):
    rng = np.random.default_rng(0)
    for variable in model.variables:
        kind, shape = variable.name, variable.shape
        if kind == "kernel":
            variable.assign(rng.normal(0, np.sqrt(1 / np.prod(shape[:-1])), shape))
        elif kind in ("gamma", "moving_variance"):
            variable.assign(rng.uniform(0.5, 1.5, shape))
        elif kind in ("bias", "beta", "moving_mean"):
            variable.assign(rng.normal(0, 0.3, shape))
