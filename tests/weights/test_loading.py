"""What is tolerated in a file, and said; and what does not fit a network is refused by name."""

import copy
import hashlib
import re
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.models.model import leaf_shapes
from flaxtransfer.models.registry import RESNETS
from flaxtransfer.paths import flatten
from flaxtransfer.weights import load
from flaxtransfer.weights.infer import infer
from flaxtransfer.weights.loading import collect_metadata
from flaxtransfer.weights.readers import array_files, detect
from flaxtransfer.weights.readers.detect import Tensors


def same(a, b):
    a, b = flatten(a), flatten(b)
    return list(a) == list(b) and all(np.array_equal(a[path], b[path]) for path in a)


def test_the_result_is_complete_float32_and_of_this_file(golden):
    path = golden / "torchvision_basic" / "model.safetensors"
    checkpoint = load(str(path))
    assert {leaf.dtype for leaf in flatten(checkpoint.variables).values()} == {np.dtype("f4")}
    assert set(checkpoint.variables) == {"params", "batch_stats"}
    assert len(checkpoint.sha256) == 64
    assert checkpoint.source == str(path)


@pytest.mark.parametrize("ratio", [1 / 16, 1 / 3, 0.3, 0.07, 1.0])
def test_a_ratio_that_no_layer_shows_exactly_fits_all_layers(ratio):
    """Of some, the ratios that single layers show fit these layers only."""
    config = ResNetConfig("bottleneck", (1, 1, 2, 1), width=32, attention="se", se_ratio=ratio)
    shapes = leaf_shapes(config)
    assert leaf_shapes(infer(shapes)) == shapes


@pytest.fixture
def held_checksum(monkeypatch):
    """The checksum of a file begins when this is called; with an error, it raises that."""
    checksum, begin, errors = detect._checksum, threading.Event(), []

    def waiting(*arguments):
        assert begin.wait(60)
        if errors:
            raise errors[0]
        return checksum(*arguments)

    def started(error=None):
        errors.extend([error] if error else [])
        begin.set()

    monkeypatch.setattr(detect, "_checksum", waiting)
    yield started
    begin.set()


@pytest.mark.parametrize("read", [lambda c: c.sha256, lambda c: repr(c), copy.deepcopy])
def test_the_checksum_is_waited_for_where_it_is_read(basic, write, held_checksum, read):
    path = write(basic)
    checkpoint = load(path)
    assert callable(vars(checkpoint)["sha256"])
    held_checksum()
    read(checkpoint)
    wanted = hashlib.sha256(path.read_bytes()).hexdigest()
    assert vars(checkpoint)["sha256"] == checkpoint.sha256 == wanted


def test_what_is_hashed_is_what_the_arrays_hold(basic, write, held_checksum):
    """Neither the file, nor who has the arrays, can change the bytes before they are hashed."""
    path = write(basic)
    wanted = hashlib.sha256(path.read_bytes()).hexdigest()
    checkpoint = load(path)
    write({**basic, "fc.bias": basic["fc.bias"] + 1})
    leaves = flatten(checkpoint.variables)
    for leaf in leaves.values():
        with pytest.raises(ValueError, match="read-only"):
            leaf[...] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            leaf.flags.writeable = True
    held_checksum()
    assert checkpoint.sha256 == wanted
    np.testing.assert_array_equal(leaves["params/fc/bias"], basic["fc.bias"])


def test_an_error_of_the_checksum_is_raised_where_it_is_read(basic, write, held_checksum):
    checkpoint = load(write(basic))
    held_checksum(MemoryError("no room"))
    for _ in range(2):
        with pytest.raises(MemoryError, match="no room"):
            checkpoint.sha256  # noqa: B018 -- reading it is the test


@pytest.mark.parametrize(
    ("prefixes", "notes"),
    [
        (("module.",), {"the prefix 'module.' was removed from the keys"}),
        (("_orig_mod.",), {"the prefix '_orig_mod.' was removed from the keys"}),
        (
            ("module.", "_orig_mod."),
            {
                "the prefix 'module.' was removed from the keys",
                "the prefix '_orig_mod.' was removed from the keys",
            },
        ),
    ],
)
def test_prefixes_are_removed_and_said(basic, write, prefixes, notes):
    plain = load(write(basic, "plain.safetensors"))
    wrapped = load(write({"".join(prefixes) + key: basic[key] for key in basic}))
    assert same(wrapped.variables, plain.variables)
    assert notes <= set(wrapped.notes)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_other_precisions_become_float32_and_that_is_said(basic, tmp_path, kind):
    dtype = jnp.bfloat16 if kind == "bfloat16" else kind
    stored = {
        key: array.astype(dtype) if array.dtype == np.float32 else array
        for key, array in basic.items()
    }
    path = tmp_path / "other.safetensors"
    path.write_bytes(array_files.write_safetensors(stored, {}))
    checkpoint = load(path)
    leaves = flatten(checkpoint.variables)
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype("f4")}
    bias = np.asarray(stored["fc.bias"], np.float32)
    np.testing.assert_array_equal(leaves["params/fc/bias"], bias)
    assert f"{len(leaves)} leaves were converted from {kind} to float32" in checkpoint.notes


@pytest.mark.parametrize("form", ["torchvision", "huggingface"])
def test_the_format_may_be_said(golden, form):
    assert load(golden / f"{form}_basic", format=form).format == form


@pytest.mark.parametrize(
    "model",
    [
        None,
        "resnet-basic-1-2-1-1w4",
        ResNetConfig("basic", (1, 2, 1, 1), 4, classes=999, in_channels=9),
    ],
)
def test_the_model_may_be_said_without_classes_and_channels(golden, model):
    assert load(golden / "torchvision_basic", model=model).config.classes == 7


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (
            "resnet50",
            ["holds resnet-basic-1-2-1-1w4", "basic blocks (1, 2, 1, 1), width 4", "not resnet50"],
        ),
        (
            RESNETS["resnet18"],
            ["holds resnet-basic-1-2-1-1w4", "not resnet18 (basic blocks", "width 64"],
        ),
        ("resnet51", ["`model` (--model) must be", "got 'resnet51'", "'resnet50'"]),
    ],
)
def test_another_model_than_the_file_is_refused(golden, model, parts):
    with pytest.raises(ValueError, match="resnet") as caught:
        load(golden / "torchvision_basic", model=model)
    assert [part for part in parts if part not in str(caught.value)] == []


# --- keys and numbers --------------------------------------------------------------------------
def without_block(arrays):
    return {key: array for key, array in arrays.items() if not key.startswith("layer1.0.conv2")}


def with_nan(arrays):
    arrays["layer2.0.conv1.weight"][0, 0, 0, 0] = np.nan
    arrays["fc.bias"][:2] = np.inf
    return arrays


def negative_variance(arrays):
    arrays["bn1.running_var"][1] = -1e-3
    return arrays


def too_large(arrays):
    return arrays | {"fc.bias": np.full(7, 1e300)}


def integers(arrays):
    return arrays | {"fc.bias": np.zeros(7, np.int32)}


def deep_stem(arrays):
    arrays["conv1.0.weight"] = arrays.pop("conv1.weight")
    return arrays


def attention(arrays):
    return arrays | {"layer1.0.se.fc1.weight": np.zeros((1, 4, 1, 1), np.float32)}


def headless(arrays):
    return {key: array for key, array in arrays.items() if not key.startswith("fc.")}


def other_network(arrays):
    del arrays
    return {"features.0.weight": np.zeros(3, np.float32), "conv1.weight": np.zeros(3, np.float32)}


def pre_activation(arrays):
    del arrays
    return {"stages.0.blocks.0.conv1.weight": np.zeros(3, np.float32)}


DAMAGES = {
    without_block: [
        "does not fit resnet-basic-1-2-1-1w4 under torchvision's names",
        "1 missing, 0 unexpected",
        "missing: layer1.0.conv2.weight [4, 4, 3, 3]",
    ],
    with_nan: [
        "NaN or infinite numbers (as float32) in 2 leaves",
        "params/layer2/0/conv1/kernel: 1 of 288",
        "params/fc/bias: 2 of 7",
    ],
    negative_variance: ["negative ones in: batch_stats/bn1/var"],
    too_large: ["NaN or infinite numbers (as float32) in 1 leaves", "params/fc/bias: 7 of 7"],
    integers: ["must hold floating-point weights", "params/fc/bias", "int32"],
    deep_stem: ["under timm's names", "missing: conv1.3.weight", "missing: conv1.6.weight"],
    attention: ["under timm's names", "missing: layer1.0.se.fc2.weight"],
    other_network: [
        "holds a VGG or AlexNet",
        "features.0.weight",
    ],
    pre_activation: ["under timm-v2's names", "missing: stem.conv.weight"],
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_does_not_fit_is_refused_by_name(basic, write, damage):
    path = write(damage(basic))
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load(path)
    assert [part for part in DAMAGES[damage] if part not in str(caught.value)] == []


def test_a_file_without_a_head_gets_one_that_says_nothing(basic, write):
    checkpoint = load(write(headless(basic)))
    leaves = flatten(checkpoint.variables)
    assert leaves["params/fc/kernel"].shape == (32, 1)
    assert not leaves["params/fc/kernel"].any()
    assert "the file has no head: one output that is always 0 replaces it" in checkpoint.notes


@pytest.mark.parametrize(
    ("prefix", "others", "said"),
    [
        (
            "module.encoder_q.",
            ["module.encoder_k.conv1.weight", "module.queue"],
            "left out: encoder_k, fc, queue",
        ),
        (
            "module.base_encoder.",
            ["module.predictor.0.weight"],
            "left out: fc, predictor",
        ),
        (
            "backbone.",
            ["projector.0.weight"],
            "left out: fc, projector",
        ),
        ("encoder.", [], "left out: fc"),
    ],
)
def test_the_encoder_of_self_supervised_training(basic, write, prefix, others, said):
    arrays = {prefix + key: array for key, array in headless(basic).items()}
    arrays |= {name: np.zeros(2, np.float32) for name in [*others, f"{prefix}fc.0.weight"]}
    checkpoint = load(write(arrays))
    assert any(said in note for note in checkpoint.notes)
    expected = np.transpose(basic["conv1.weight"], (2, 3, 1, 0))
    np.testing.assert_array_equal(checkpoint.variables["params"]["conv1"]["kernel"], expected)


def test_torchxrayvisions_file_knows_its_findings(tmp_path):
    path = tmp_path / "pc-nih-rsna-siim-vin-resnet50-test512-e400-state.pt"
    config = ResNetConfig("bottleneck", (3, 4, 6, 3), classes=18, in_channels=1)
    found = collect_metadata(Tensors(path, {}, {}, str, ()), config, "torchvision")
    (mean,), (std,) = found.preprocessing.mean, found.preprocessing.std
    # The darkest and the brightest pixel become -1024 and 1024.
    assert [(pixel - mean) / std for pixel in (0, 1)] == [-1024, 1024]
    assert found.class_names[3] == "Pneumothorax"
    assert "with one sigmoid each" in found.notes[0]


def test_a_format_that_does_not_fit_names_the_one_that_does(golden):
    with pytest.raises(ValueError, match="keys of huggingface; format='torchvision' fits better"):
        load(golden / "torchvision_basic", format="huggingface")
    with pytest.raises(
        ValueError, match="unknown format 'caffe'; known: torchvision, timm, timm-v2"
    ):
        load(golden / "torchvision_basic", format="caffe")
