"""ONNX files: graphs of ours in every form that exporters and simplifiers give them.

The expected leaves are those that the graph was written from, or follow from them by hand. Torch's
exporters and onnxruntime are asked in tests/parity.
"""

import dataclasses
import re

import jax
import numpy as np
import pytest

import flaxtransfer as ft
from flaxtransfer.models.model import leaf_shapes
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.weights import Pretrained, load
from flaxtransfer.weights.exports import exporting, onnx
from flaxtransfer.weights.naming.onnx import GRAPH, read_onnx
from flaxtransfer.weights.readers import onnx_file
from flaxtransfer.weights.readers.onnx_file import Graph, Node

TINY = ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=4, classes=3)
DEEP = dataclasses.replace(TINY, block="bottleneck", depths=(1, 2, 1, 1))
PREPROCESSING = ft.Preprocessing((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 32, 37)


def checkpoint_of(config, seed=0):
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, shape in leaf_shapes(config).items():
        leaf = rng.normal(0, 0.3, shape)
        if path.endswith(("scale", "var")):
            leaf = rng.uniform(0.5, 1.5, shape)
        leaves[path] = leaf.astype(np.float32)
    bands = config.bands
    fields = {"mean": (0.5,) * bands, "std": (0.25,) * bands} if bands != 3 else {}
    return Pretrained(
        {"batch_stats": {}, **unflatten(leaves)},
        config,
        dataclasses.replace(PREPROCESSING, **fields),
        class_names=("cat", "dog", "owl"),
    )


def plain(checkpoint=None):
    """A graph of ours without the metadata that only we write."""
    graph = onnx_file.parse(onnx.model_bytes(checkpoint or checkpoint_of(TINY)))
    return dataclasses.replace(graph, metadata={})


def data_of(graph):
    return onnx_file.serialize(graph, 17)


def saved(graph, path):
    path.write_bytes(data_of(graph))
    return path


def edited(graph, change, arrays=()):
    """The graph with every node replaced by the nodes that ``change`` gives; None keeps it."""
    nodes = []
    for node in graph.nodes:
        new = change(node)
        nodes += [node] if new is None else new
    return dataclasses.replace(graph, nodes=tuple(nodes), arrays={**graph.arrays, **dict(arrays)})


def changed(node, **attributes):
    return dataclasses.replace(node, attributes={**node.attributes, **attributes})


VARIANTS = {
    "plain": {},
    "bottlenecks": {"block": "bottleneck", "depths": (1, 2, 1, 1)},
    "v1": {"block": "bottleneck", "stride_in": "1x1"},
    "groups": {"block": "bottleneck", "base_width": 64, "groups": 2},
    "tiered, se": {
        "block": "bottleneck",
        "stem": "tiered",
        "stem_width": 8,
        "shortcut": "average",
        "attention": "se",
    },
    "eca, blur": {"attention": "eca", "anti_alias": "blur"},
    "average": {"block": "bottleneck", "anti_alias": "average"},
    "rs": {"stem": "deep", "stem_width": 8, "stem_pool": "convolution", "shortcut_kernel": 3},
    "group norm": {"norm": "group", "width": 32},
    "v2": {"preactivation": True, "block": "bottleneck", "stem_pool": "zero-padded"},
    "v2, last": {
        "preactivation": True,
        "block": "bottleneck",
        "depths": (2, 1, 1, 1),
        "stride_at": "last",
        "stem_bias": True,
    },
    "v2, groups": {"preactivation": True, "norm": "group", "width": 32},
    "linear adapter": {"adapter": ft.models.Adapter(5)},
    "curves": {"adapter": ft.models.Adapter(2, "curves", 5, (-1.5, 2.25))},
    "two bands": {"in_channels": 2},
    "wide stem": {"stem_width": 12},
    "ceil": {"block": "bottleneck", "stem_pool": "ceil", "stride_in": "1x1"},
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_our_graphs_come_back_as_the_networks_they_were(tmp_path, kind):
    before = checkpoint_of(dataclasses.replace(TINY, **VARIANTS[kind]))
    (tmp_path / "net.onnx").write_bytes(onnx.model_bytes(before))
    after = load(tmp_path / "net.onnx")
    assert after.config == before.config
    assert (after.preprocessing, after.class_names) == (before.preprocessing, before.class_names)
    assert after.format == "onnx"
    # Without the header, the graph shows the same network.
    again = load(saved(plain(before), tmp_path / "foreign.onnx"))
    assert again.config == before.config
    own, back = flatten(before.variables), flatten(again.variables)
    assert own.keys() == back.keys()
    np.testing.assert_array_equal(own["params/fc/kernel"], back["params/fc/kernel"])
    if before.config.norm == "group":
        assert all(np.array_equal(own[path], back[path]) for path in own)
        return
    # A norm and the convolution before it, by hand: both files hold scale * (kernel * x - mean)
    # / sqrt(var + epsilon) + bias.
    first, norm = ("conv1/0", "conv1/bn1") if before.config.stem != "plain" else ("conv1", "bn1")
    if before.config.preactivation:
        first, norm = "layer1/0/conv1", "layer1/0/bn2"
    for leaves in (own, back):
        scale, bias = (leaves[f"params/{norm}/{name}"].astype(float) for name in ("scale", "bias"))
        mean, var = (leaves[f"batch_stats/{norm}/{name}"] for name in ("mean", "var"))
        factor = scale / np.sqrt(var.astype(float) + 1e-5)
        leaves["kernel"] = leaves[f"params/{first}/kernel"] * factor
        leaves["bias"] = bias - mean * factor
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(own[name], back[name], rtol=1e-6, atol=1e-6)
    assert any("BatchNorms are folded into convolutions" in note for note in again.notes)


@pytest.mark.parametrize("kind", ["bottlenecks", "v2, last", "curves"])
def test_an_export_is_compared_without_onnxruntime(monkeypatch, tmp_path, kind):
    monkeypatch.setattr(onnx, "runner", lambda data: None)
    before = checkpoint_of(dataclasses.replace(TINY, **VARIANTS[kind]))
    written = exporting.export(before, tmp_path / "net.onnx")
    assert 0 < written.difference <= 5e-6
    assert "onnxruntime is not installed" in written.notes[-1]
    if kind == "bottlenecks":
        half = exporting.export(before, tmp_path / "half.onnx", dtype=np.float16)
        assert 1e-5 < half.difference < 1e-2
        assert "computes in float16; images and logits are float32" in half.notes
        sizes = [(tmp_path / name).stat().st_size for name in ("net.onnx", "half.onnx")]
        assert sizes[1] < 0.6 * sizes[0]


def test_what_float16_cannot_hold_is_refused(tmp_path):
    before = checkpoint_of(TINY)
    before.variables["batch_stats"]["bn1"]["var"][:] = 0
    before.variables["params"]["bn1"]["scale"][:] = 1000
    with pytest.raises(ValueError, match=r"weights must be below 6.55e\+04 for float16, got"):
        exporting.export(before, tmp_path / "net.onnx", dtype=np.float16)
    with pytest.raises(ValueError, match="dtype must be float32 or float16 for onnx, got int8"):
        exporting.export(before, tmp_path / "net.onnx", dtype=np.int8)
    assert list(tmp_path.iterdir()) == []


# ---- the same function in other words -----------------------------------------------------------


def renamed(graph):
    """As a simplifier renames everything."""
    names = {}

    def number(name):
        return names.setdefault(name, f"onnx::{len(names)}") if name else ""

    nodes = [
        dataclasses.replace(
            node,
            inputs=tuple(map(number, node.inputs)),
            outputs=tuple(map(number, node.outputs)),
            name="",
        )
        for node in graph.nodes
    ]
    arrays, inputs, outputs = (
        {number(name): value for name, value in part.items()}
        for part in (graph.arrays, graph.inputs, graph.outputs)
    )
    return Graph(tuple(nodes), arrays, inputs, outputs)


def as_matmul(graph):
    """MatMul and Add for Gemm, ReduceMean and Reshape for pooling, and copies between them."""

    def change(node):
        if node.kind == "Gemm":
            x, weight, bias = node.inputs
            turned = Node("Transpose", (weight,), ("turned",), {"perm": (1, 0)})
            return [
                turned,
                Node("MatMul", (x, "turned"), ("product",)),
                Node("Add", (bias, "product"), node.outputs),
            ]
        if node.kind == "GlobalAveragePool":
            copy = Node("Identity", node.inputs, ("copy",))
            return [copy, Node("ReduceMean", ("copy",), node.outputs, {"axes": (-1, 2)})]
        if node.kind == "Flatten":
            shape = Node("Shape", node.inputs, ("shape",))
            return [shape, Node("Reshape", (*node.inputs, "two"), node.outputs)]
        return None

    return edited(graph, change, {"two": np.array([-1, 32])})


def as_convolution(graph):
    """A 1x1 convolution as head, before the pixels are flattened."""
    weight, bias = graph.arrays["fc/kernel"], graph.arrays["fc/bias"]

    def change(node):
        if node.kind == "Flatten":
            inputs = (*node.inputs, "head", "fc/bias")
            return [Node("Conv", inputs, ("dense",), {"kernel_shape": (1, 1)})]
        if node.kind == "Gemm":
            return [Node("Flatten", ("dense",), node.outputs, {"axis": 1})]
        return None

    assert bias.shape == (3,)
    return edited(graph, change, {"head": weight[:, :, None, None]})


def channels_last(graph):
    """Images with the channels last, biases added there, and copies that turn them."""

    def change(node):
        if node.name != "conv_0":
            return None
        first, last = {"perm": (0, 3, 1, 2)}, {"perm": (0, 2, 3, 1)}
        return [
            Node("Transpose", ("images",), ("first",), first),
            Node("Conv", ("first", node.inputs[1]), ("bare",), node.attributes),
            Node("Transpose", ("bare",), ("last",), last),
            Node("Add", ("last", "by channel"), ("sum",)),
            Node("Transpose", ("sum",), node.outputs, first),
        ]

    bias = graph.arrays["conv1/bias"].reshape(1, 1, 1, -1)
    found = edited(graph, change, {"by channel": bias})
    return dataclasses.replace(found, inputs={"images": ("batch", 64, 64, 3)})


def with_pads(graph):
    """Zeros in front of the stem's convolution and pooling, as TensorFlow writes them."""

    def change(node):
        if node.name not in ("conv_0", "maxpool_2"):
            return None
        ends = "three" if node.kind == "Conv" else "one"
        pad = Node("Pad", (node.inputs[0], ends), (f"{node.name} padded",), {"mode": "constant"})
        inner = dataclasses.replace(node, inputs=(pad.output, *node.inputs[1:]))
        return [pad, changed(inner, pads=(0, 0, 0, 0))]

    sides = {name: np.array([0, 0, n, n] * 2) for name, n in (("three", 3), ("one", 1))}
    return edited(graph, change, sides)


def with_norms(graph):
    """A BatchNorm behind the stem's bias, and factors and summands in the first block."""

    def change(node):
        if node.name == "conv_0":
            norm = Node("BatchNormalization", ("raw", *"sbmv"), node.outputs, {"epsilon": 1e-3})
            return [dataclasses.replace(node, outputs=("raw",)), norm]
        if node.inputs[1:2] == ("layer1/0/conv1/kernel",):
            x, weight, _ = node.inputs
            return [
                Node("Conv", (x, weight), ("b1",), node.attributes),
                Node("Sub", ("b1", "mean"), ("b2",)),
                Node("Mul", ("factor", "b2"), ("b3",)),
                Node("Add", ("b3", "mean"), node.outputs),
            ]
        return None

    four = np.arange(1, 5, dtype=np.float32)
    constants = {name: four + n for n, name in enumerate("sbmv")}
    constants |= {"mean": four[:, None, None], "factor": (four / 8)[None, :, None, None]}
    return edited(graph, change, constants)


@pytest.mark.parametrize("form", [renamed, as_matmul, as_convolution, channels_last, with_pads])
def test_the_same_function_in_other_words(form):
    graph = plain()
    expected, metadata, _ = read_onnx(data_of(graph))
    leaves, other, _ = read_onnx(data_of(form(graph)))
    if form is not channels_last:
        assert other == metadata
    assert leaves.keys() == expected.keys()
    assert all(np.array_equal(leaves[path], expected[path]) for path in expected)


def test_norms_of_every_form_are_computed():
    graph = plain()
    leaves, metadata, notes = read_onnx(data_of(with_norms(graph)))
    bias, four = graph.arrays["conv1/bias"], np.arange(1, 5)
    assert '"epsilon": 0.001' in metadata[GRAPH]
    np.testing.assert_allclose(leaves["onnx:bn1/mean"], four + 2 - bias, rtol=1e-6)
    np.testing.assert_array_equal(leaves["onnx:bn1/scale"], four)
    np.testing.assert_array_equal(leaves["onnx:bn1/var"], four + 3)
    # factor * (x - mean) + mean
    np.testing.assert_allclose(leaves["onnx:layer1/0/bn1/scale"], four / 8, rtol=1e-6)
    np.testing.assert_allclose(leaves["onnx:layer1/0/bn1/bias"], four - four / 8 * four, rtol=1e-6)
    np.testing.assert_allclose(leaves["onnx:layer1/0/bn2/var"], 1 - 1e-3, rtol=1e-6)
    assert "1 biases of convolutions were folded into running means" in notes


@pytest.mark.parametrize("form", ["ceil_mode", "edge", "zeros"])
def test_pooling_over_the_edge(tmp_path, form):
    before = checkpoint_of(dataclasses.replace(TINY, stem_pool="ceil"))

    def change(node):
        if node.kind != "MaxPool":
            return None
        if form == "ceil_mode":
            return [changed(node, pads=(0, 0, 0, 0), ceil_mode=1)]
        mode = {"mode": "edge" if form == "edge" else "constant"}
        pad = Node("Pad", (node.inputs[0], "after"), ("padded",), mode)
        return [pad, changed(dataclasses.replace(node, inputs=("padded",)), pads=(0, 0, 0, 0))]

    ends = {"after": np.array([0, 0, 0, 0, 0, 0, 1, 1])}
    graph = edited(plain(before), change, ends)
    assert load(saved(graph, tmp_path / "net.onnx")).config == before.config


def with_computed_pads(graph, side):
    """The padding SAME of TensorFlow before the stem's pooling, computed from its input's shape."""
    constants = {name: np.array(n) for n, name in enumerate(("0", "1", "2", "3"))}
    constants |= {"front": np.zeros(1, np.int64), "rest": np.zeros(2, np.int64)}

    def ends(size, axis):
        def then(kind, x, y):
            nodes.append(Node(kind, (x, y), (f"{axis} {len(nodes)}",)))
            return nodes[-1].output

        nodes = [Node("Gather", (size, axis), (f"side {axis}",), {"axis": 0})]
        side = nodes[-1].output
        outputs = then("Div", then("Add", side, "1"), "2")
        last = then("Add", then("Mul", then("Sub", outputs, "1"), "2"), "3")
        total = then("Sub", last, side)
        begin = then("Div", total, "2")
        pair = begin, then("Sub", total, begin)
        return nodes, [then("Unsqueeze", end, "front") for end in pair]

    def change(node):
        if node.kind != "MaxPool":
            return None
        rows, (top, bottom) = ends("size", "2")
        columns, (left, right) = ends("size", "3")
        return [
            Node("Shape", (node.inputs[0],), ("size",)),
            *rows,
            *columns,
            Node("Concat", ("rest", top, left, "rest", bottom, right), ("pads",), {"axis": 0}),
            Node("Pad", (node.inputs[0], "pads"), ("padded",), {"mode": "edge"}),
            changed(dataclasses.replace(node, inputs=("padded",)), pads=(0, 0, 0, 0)),
        ]

    found = edited(graph, change, constants)
    return dataclasses.replace(found, inputs={"images": ("batch", 3, side, side)})


@pytest.mark.parametrize(("side", "pool"), [(64, "ceil"), (62, "max"), (224, "ceil")])
def test_pads_that_are_computed_from_a_fixed_size(side, pool):
    """SAME pads an even number of pixels at the end alone, an odd number on both sides."""
    graph = plain(checkpoint_of(TINY))
    leaves, metadata, _ = read_onnx(data_of(with_computed_pads(graph, side)))
    assert f'"stem_pool": "{pool}"' in metadata[GRAPH]
    expected, _, _ = read_onnx(data_of(graph))
    assert all(np.array_equal(leaves[path], expected[path]) for path in expected)


def test_pads_that_depend_on_the_images_are_refused():
    graph = with_computed_pads(plain(checkpoint_of(TINY)), "side")
    with pytest.raises(ValueError, match=r"\(Pad\) must have a constant as input 1") as caught:
        read_onnx(data_of(graph))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("low", "high", "most"),
    [(0.2, 0.25, 1), (123.7, 58.4, 255), (0, 255, 255), (127.5, 127.5, 255)],
)
def test_a_normalization_in_the_graph_becomes_the_preprocessing(tmp_path, low, high, most):
    def change(node):
        if node.name != "conv_0":
            return None
        first = Node("Sub", ("images", "low"), ("a",))
        second = Node("Div", ("a", "high"), ("b",))
        return [first, second, dataclasses.replace(node, inputs=("b", *node.inputs[1:]))]

    ends = {"low": np.full((1, 3, 1, 1), low, "f4"), "high": np.float32(high)}
    graph = dataclasses.replace(
        edited(plain(), change, ends), inputs={"images": ("batch", 3, 64, 64)}
    )
    after = load(saved(graph, tmp_path / "net.onnx"))
    np.testing.assert_allclose(after.preprocessing.mean, low / most, rtol=1e-6)
    np.testing.assert_allclose(after.preprocessing.std, high / most, rtol=1e-6)
    assert (after.preprocessing.size, after.preprocessing.resize) == (64, 73)
    assert (
        f"the graph normalizes pixels from 0 to {most}: that is preprocessing here" in after.notes
    )


# ---- heads --------------------------------------------------------------------------------------


def ended(graph, *nodes):
    """The graph with other nodes behind the pooling."""
    kept = tuple(node for node in graph.nodes if node.kind not in ("Gemm", *nodes[:0]))
    return dataclasses.replace(graph, nodes=(*kept, *nodes))


def test_heads(tmp_path):
    graph = plain()
    (head,) = [node for node in graph.nodes if node.kind == "Gemm"]
    deep = dataclasses.replace(head, outputs=("hidden",))
    matrix = {"m": np.ones((2, 3), np.float32)}
    two = ended(
        dataclasses.replace(graph, arrays={**graph.arrays, **matrix}),
        deep,
        Node("Relu", ("hidden",), ("h",)),
        Node("Gemm", ("h", "m"), ("logits",), {"transB": 1}),
    )
    after = load(saved(two, tmp_path / "net.onnx"))
    assert after.no_head == "the head is not one linear map, but Gemm, Relu, Gemm"
    assert after.config.classes == 1
    none = load(saved(ended(graph), tmp_path / "net.onnx"))
    assert none.no_head == "the file has no head"
    soft = ended(graph, deep, Node("Softmax", ("hidden",), ("logits",)))
    after = load(saved(soft, tmp_path / "net.onnx"))
    assert "the Softmax at the end is left out" in after.notes
    scaled = ended(graph, changed(head, alpha=2.0, beta=0.5))
    after = load(saved(scaled, tmp_path / "net.onnx"))
    np.testing.assert_allclose(
        after.variables["params"]["fc"]["kernel"].T, 2 * graph.arrays["fc/kernel"]
    )
    np.testing.assert_allclose(after.variables["params"]["fc"]["bias"], graph.arrays["fc/bias"] / 2)


# ---- what is no ResNet --------------------------------------------------------------------------


def kind_for(name, kind, **attributes):
    """Replaces the kind, or some attributes, of a node."""
    return lambda node: (
        [dataclasses.replace(changed(node, **attributes), kind=kind or node.kind)]
        if node.name == name
        else None
    )


REFUSALS = {
    "activation": (kind_for("relu_4", "LeakyRelu"), r"'relu_4' \(LeakyRelu\) stands where a Relu"),
    "stem's activation": (kind_for("relu_1", "Sigmoid"), r"'relu_1' \(Sigmoid\) stands where"),
    "pooling": (kind_for("maxpool_2", None, kernel_shape=(2, 2)), "'maxpool_2' .* must pool 3x3"),
    "pads": (
        kind_for("conv_0", None, pads=(2, 2, 3, 3)),
        r"padded by 3 on all sides, got \[2, 2, 3",
    ),
    "dilation": (kind_for("conv_3", None, dilations=(2, 2)), r"'conv_3' \(Conv\) is dilated"),
    "stride": (kind_for("conv_10", None, strides=(2, 2)), "with stride 1, got 3x3 with stride 2"),
    "groups": (
        kind_for("conv_3", None, group=2),
        "with stride 1, got 3x3 with stride 1 and 2 groups",
    ),
    "last pooling": (
        kind_for("globalaveragepool_26", "GlobalMaxPool"),
        "the average over all pixels",
    ),
    "sum": (kind_for("add_6", "Mul"), r"\(Mul\)|channel attention"),
    "quantized": (
        kind_for("conv_3", "QLinearConv"),
        "is of a quantized network; give the float one",
    ),
    "domain": (kind_for("conv_3", "com.microsoft.FusedConv"), "FusedConv"),
    "loop": (kind_for("relu_4", "If"), r"\(If\)"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_does_not_fit_is_named(tmp_path, kind):
    change, said = REFUSALS[kind]
    path = saved(edited(plain(), change), tmp_path / "net.onnx")
    with pytest.raises(
        ValueError, match=f"net.onnx: an ONNX model must be a ResNet, .*{said}"
    ) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 600


LAST_STAGE = ("relu_21", "add_24", "relu_25")


def test_other_numbers_of_stages_are_named():
    wide = dataclasses.replace(TINY, width=8)
    graph = plain(checkpoint_of(wide))

    def change(node):
        # The last stage is left out: pooling follows the third.
        if any(name.startswith("layer4/") for name in node.inputs) or node.name in LAST_STAGE:
            return []
        inputs = tuple("relu_19" if name == "relu_25" else name for name in node.inputs)
        return [dataclasses.replace(node, inputs=inputs)]

    with pytest.raises(ValueError, match="ResNet of 4 stages, got 3 with 8, 16, 32 channels"):
        read_onnx(data_of(edited(graph, change)))


def test_an_expected_model_must_be_that_of_the_graph(tmp_path):
    path = saved(plain(checkpoint_of(DEEP)), tmp_path / "net.onnx")
    assert load(path, model=DEEP).config == DEEP
    with pytest.raises(ValueError, match="its graph has stride_in '3x3'"):
        load(path, model=dataclasses.replace(DEEP, stride_in="1x1"))
    with pytest.raises(ValueError, match=r"holds resnet.*, not resnet18"):
        load(path, model="resnet18")


# ---- files --------------------------------------------------------------------------------------


def entry(number, content):
    size, head = len(content), number << 3 | 2
    digits = bytes([head]) + (bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7]))
    return digits + content


def outside(location, size, offset=0):
    """A model with one array of two numbers that lies in another file."""
    said = {"location": location, "offset": str(offset), "length": str(size)}
    entries = b"".join(
        entry(13, entry(1, key.encode()) + entry(2, text.encode())) for key, text in said.items()
    )
    tensor = b"\x08\x02\x10\x01" + entry(8, b"x") + entries + b"\x70\x01"
    return b"\x08\x08" + entry(7, entry(5, tensor))


def test_arrays_in_another_file_of_the_folder(tmp_path):
    (tmp_path / "w").write_bytes(bytes(4) + np.array([1.5, -2], "f4").tobytes())
    found = onnx_file.parse(outside("w", 8, 4), lambda name: (tmp_path / name).read_bytes())
    assert found.arrays["x"].tolist() == [1.5, -2]
    net = tmp_path / "net.onnx"
    for data, said in (
        (outside("../w", 8), r"must name files in its own folder, got '\.\./w'"),
        (outside("missing", 8), "needs 'missing' in the same folder, which is not there"),
        (outside("w", 8, 8), "must end within 'w', which has 12 bytes, got 8 [+] 8"),
        (outside("w", 4), "the bytes of array 'x' must fit|the bytes of .* must fit float32"),
        (outside("w", 10**30), "must state|must end within"),
    ):
        net.write_bytes(data)
        with pytest.raises(ValueError, match=f"{re.escape(str(net))}.*{said}"):
            load(net)


def test_the_checksum_is_of_all_bytes(tmp_path):
    net = saved(plain(), tmp_path / "net.onnx")
    first = load(net).sha256
    assert len(first) == 64
    saved(plain(checkpoint_of(TINY, 1)), net)
    assert load(net).sha256 != first


@pytest.mark.parametrize("length", [1, 2, 3, 40, 3000, -5000, -1])
def test_a_cut_file_is_refused(tmp_path, length):
    net = tmp_path / "net.onnx"
    net.write_bytes(onnx.model_bytes(checkpoint_of(TINY))[:length])
    with pytest.raises(ValueError, match=f"{re.escape(str(net))}: (.*ONNX model|.* must fit)"):
        load(net)


def test_another_format_beside_it_is_preferred(tmp_path):
    before = checkpoint_of(TINY)
    (tmp_path / "net.onnx").write_bytes(onnx.model_bytes(before))
    assert load(tmp_path).format == "onnx"
    ft.save(tmp_path / "net.safetensors", before)
    assert load(tmp_path).format != "onnx"


def test_numbers_of_every_type_are_read():
    arrays = {
        str(np.dtype(kind)): np.arange(3).astype(kind)
        for kind in ("f4", "f2", "f8", "i8", "i4", "u1", "?", jax.numpy.bfloat16)
    }
    back = onnx_file.parse(data_of(Graph((), arrays, {}, {}))).arrays
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        assert back[name].tolist() == array.tolist()
    # Half-precision numbers may be stored by their bits as integers, packed: 1.5 is 0x3e00.
    tensor = b"\x08\x01\x10\x0a" + entry(5, b"\x80\x7c") + entry(8, b"x")
    assert onnx_file.parse(entry(7, entry(5, tensor))).arrays["x"].tolist() == [1.5]
