"""ONNX files of torch's exporters, read; and files of ours, quantized and run by onnxruntime."""

import contextlib
import dataclasses
import io
import warnings

import numpy as np
import pytest
from sklearn.datasets import load_digits

import flaxtransfer as ft
from flaxtransfer.weights import export, load
from flaxtransfer.weights.preprocessing import IMAGENET
from tests.parity.test_export import checkpoint_of, images_of, logits_of, torch_logits

pytestmark = pytest.mark.parity

LIMIT = 5e-6
SIZE = 64


def written(torch, network, path, *, dynamo=False, **options):
    """The file that an exporter of torch writes, which also prints."""
    images = torch.randn(1, 3, SIZE, SIZE)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (images,), path, dynamo=dynamo, **options)
    return path


def small(timm, block, **options):
    kind = getattr(timm.models.resnet, block)
    return timm.models.resnet.ResNet(kind, [1, 1, 1, 1], num_classes=5, **options)


NETWORKS = {
    "basic": lambda t, m: small(m, "BasicBlock"),
    "bottleneck": lambda t, m: small(m, "Bottleneck"),
    "groups": lambda t, m: small(m, "Bottleneck", cardinality=32, base_width=4),
    "d": lambda t, m: small(m, "Bottleneck", stem_width=32, stem_type="deep", avg_down=True),
    "t, se": lambda t, m: small(
        m,
        "Bottleneck",
        stem_width=32,
        stem_type="deep_tiered",
        avg_down=True,
        block_args={"attn_layer": "se"},
    ),
    "eca": lambda t, m: small(m, "BasicBlock", block_args={"attn_layer": "eca"}),
    "rs": lambda t, m: small(
        m,
        "Bottleneck",
        stem_width=32,
        stem_type="deep",
        replace_stem_pool=True,
        avg_down=True,
        block_args={"attn_layer": "se"},
    ),
    "blur": lambda t, m: small(m, "BasicBlock", aa_layer=m.layers.BlurPool2d),
    "average": lambda t, m: small(m, "Bottleneck", aa_layer=t.nn.AvgPool2d),
    "group norm": lambda t, m: m.create_model("resnet50_gn", num_classes=5),
    "v2": lambda t, m: m.models.resnetv2.ResNetV2([1, 1, 1, 1], num_classes=5),
}


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("kind", NETWORKS)
def test_torchs_exporters(agree, torch, torchvision, making, tmp_path, kind, dynamo):
    import timm

    if dynamo:
        pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    network = making.randomize(NETWORKS[kind](torch, timm), 0)
    path = written(torch, network, tmp_path / "net.onnx", dynamo=dynamo)
    found = load(path)
    images = np.random.default_rng(1).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)
    agree(logits_of(found, images), torch_logits(torch, network, images), LIMIT)
    assert found.format == "onnx"


@pytest.mark.parametrize("opset", [9, 13, 18])
@pytest.mark.parametrize("folded", [True, False])
def test_versions_of_operators(agree, torch, torchvision, making, tmp_path, opset, folded):
    import timm

    network = making.randomize(NETWORKS["d"](torch, timm), 0)
    path = written(
        torch,
        network,
        tmp_path / "net.onnx",
        opset_version=opset,
        do_constant_folding=folded,
        training=torch.onnx.TrainingMode.EVAL if folded else torch.onnx.TrainingMode.PRESERVE,
        # At first, exporters computed with the sizes of what they had traced.
        dynamic_axes={"images": {0: "batch", 2: "height", 3: "width"}} if opset > 9 else {},
        input_names=["images"],
    )
    found = load(path)
    images = np.random.default_rng(1).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)
    agree(logits_of(found, images), torch_logits(torch, network, images), LIMIT)
    assert any("are folded into convolutions" in note for note in found.notes) == folded


@pytest.mark.parametrize("strided", ["1x1", "3x3"])
def test_transformers_network(agree, torch, torchvision, making, tmp_path, strided):
    import transformers

    config = transformers.ResNetConfig(
        embedding_size=64,
        hidden_sizes=[256, 512, 1024, 2048],
        depths=[1, 1, 1, 1],
        downsample_in_bottleneck=strided == "1x1",
        num_labels=5,
    )
    network = making.randomize(transformers.ResNetForImageClassification(config), 0)
    found = load(written(torch, network, tmp_path / "net.onnx"))
    images = np.random.default_rng(1).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)
    agree(logits_of(found, images), torch_logits(torch, network, images), LIMIT)
    assert found.config.stride_in == strided


def normalized(torch, network, scale):
    """A network that takes pixels from 0 to ``scale``."""

    class Normalized(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network
            self.mean = torch.tensor(IMAGENET.mean)[:, None, None]
            self.std = torch.tensor(IMAGENET.std)[:, None, None]

        def forward(self, pixels):
            return self.network((pixels / scale - self.mean) / self.std).softmax(-1)

    return Normalized().eval()


@pytest.mark.parametrize("scale", [1, 255])
def test_a_network_that_normalizes(agree, torch, torchvision, making, tmp_path, scale):
    import timm

    network = making.randomize(NETWORKS["basic"](torch, timm), 0)
    found = load(written(torch, normalized(torch, network, scale), tmp_path / "net.onnx"))
    np.testing.assert_allclose(found.preprocessing.mean, IMAGENET.mean, rtol=1e-5)
    np.testing.assert_allclose(found.preprocessing.std, IMAGENET.std, rtol=1e-5)
    assert "the Softmax at the end is left out" in found.notes
    images = np.random.default_rng(1).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)
    agree(logits_of(found, images), torch_logits(torch, network, images), LIMIT)


OTHERS = {
    "squeezenet1_0": "Conv",
    "efficientnet_b0": "is followed by Mul, Sigmoid where Relu must follow",
    "mobilenet_v2": "Clip|Conv",
    "densenet121": "BatchNormalization|Concat|nodes",
    "convnext_tiny": "Conv",
    "regnet_y_400mf": "is followed by Conv, Conv where",
    "vit_b_32": "Conv|Reshape",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_are_refused_by_a_node(torch, torchvision, tmp_path, name):
    options = {"image_size": SIZE} if name.startswith("vit") else {}
    network = getattr(torchvision.models, name)(num_classes=5, **options).eval()
    path = written(torch, network, tmp_path / "net.onnx")
    with pytest.raises(
        ValueError, match=f"must be a ResNet, but its node .*({OTHERS[name]})"
    ) as caught:
        load(path)
    assert len(str(caught.value)) <= 600


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"replace_stride_with_dilation": [False, True, True]}, r"\(Conv\) is dilated"),
        ({"norm_layer": 16}, "must have 32 groups, got 16"),
    ],
)
def test_other_resnets_are_refused_by_a_node(torch, torchvision, tmp_path, change, said):
    if "norm_layer" in change:
        change = {"norm_layer": lambda channels: torch.nn.GroupNorm(16, channels)}
    network = torchvision.models.resnet50(num_classes=5, **change).eval()
    with pytest.raises(ValueError, match=said):
        load(written(torch, network, tmp_path / "net.onnx"))


# ---- quantized and half -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """The built-in network with a ridge head for digits, and images that it was not fitted to."""
    size = 32
    images, labels = load_digits(return_X_y=True)
    pixels = np.kron(images.reshape(-1, 8, 8) / 16, np.ones((size // 8, size // 8)))
    start = load("builtin")
    mean, std = start.preprocessing.mean, start.preprocessing.std
    inputs = ((pixels[..., None] - mean) / std).astype(np.float32)
    identity = dataclasses.replace(start.config, classes=start.config.features)
    head = {
        "kernel": np.eye(identity.features, dtype=np.float32),
        "bias": np.zeros(identity.features, np.float32),
    }
    variables = {**start.variables, "params": {**start.variables["params"], "fc": head}}
    through = dataclasses.replace(start, config=identity, variables=variables, class_names=None)
    features = logits_of(through, inputs)
    x = np.hstack([features[:1000], np.ones((1000, 1))]).astype(np.float64)
    targets = np.eye(10)[labels[:1000]]
    weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ targets).astype(np.float32)
    own = {"kernel": weights[:-1], "bias": weights[-1]}
    config = dataclasses.replace(start.config, classes=10)
    fitted = dataclasses.replace(
        start,
        config=config,
        variables={**start.variables, "params": {**start.variables["params"], "fc": own}},
        class_names=tuple("0123456789"),
        preprocessing=dataclasses.replace(start.preprocessing, size=size, resize=size),
    )
    return fitted, inputs[1000:], labels[1000:]


def ran(path, images):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.transpose(0, 3, 1, 2)})[0]


def test_static_quantization_by_channel_needs_no_preparation(digits, tmp_path, record_property):
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    fitted, images, labels = digits
    export(fitted, tmp_path / "float.onnx")

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter(images[:128].transpose(0, 3, 1, 2).reshape(8, 16, 3, 32, 32))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "int8.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
    )
    test, labels = images[128:], labels[128:]
    before, after = ran(tmp_path / "float.onnx", test), ran(tmp_path / "int8.onnx", test)
    agreement = (before.argmax(1) == after.argmax(1)).mean()
    accuracy = [(each.argmax(1) == labels).mean() for each in (before, after)]
    record_property("top-1 of int8 that differs", float(1 - agreement))
    record_property("logits of int8", float(np.abs(before - after).max() / np.abs(before).max()))
    record_property("accuracy that int8 loses", float(accuracy[0] - accuracy[1]))
    assert agreement >= 0.98
    assert accuracy[1] >= accuracy[0] - 0.01
    sizes = [(tmp_path / name).stat().st_size for name in ("float.onnx", "int8.onnx")]
    assert sizes[1] < 0.3 * sizes[0]
    with pytest.raises(ValueError, match="is of a quantized network; give the float one"):
        load(tmp_path / "int8.onnx")


def test_float16_is_run_by_onnxruntime(digits, tmp_path, record_property):
    import onnx

    fitted, images, _ = digits
    done = export(fitted, tmp_path / "half.onnx", dtype=np.float16)
    onnx.checker.check_model(str(tmp_path / "half.onnx"), full_check=True)
    model = onnx.load(tmp_path / "half.onnx")
    float32 = onnx.TensorProto.FLOAT
    assert [
        end.type.tensor_type.elem_type for end in (*model.graph.input, *model.graph.output)
    ] == [
        float32,
        float32,
    ]
    before, after = logits_of(fitted, images), ran(tmp_path / "half.onnx", images)
    difference = np.abs(before - after).max() / np.abs(before).max()
    record_property("logits of float16", float(difference))
    assert difference < 1e-2
    assert done.difference < 1e-2
    assert (before.argmax(1) == after.argmax(1)).mean() >= 0.995
    again = load(tmp_path / "half.onnx")
    assert again.config == fitted.config


def test_a_random_network_of_ours_in_float16(tmp_path):
    before = checkpoint_of(ft.models.ResNetConfig("bottleneck", (1, 1, 1, 1), width=16, classes=3))
    export(before, tmp_path / "half.onnx", dtype=np.float16)
    images = images_of(before)
    expected = logits_of(before, images)
    found = ran(tmp_path / "half.onnx", images)
    assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()
