"""Export to ONNX: the network as a graph of operators, and the file with weights and metadata.

The graph follows ``models/resnet.py`` node by node.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from flaxtransfer.models.config import GROUPS, Adapter, ResNetConfig
from flaxtransfer.models.layers import standardize
from flaxtransfer.paths import flatten
from flaxtransfer.weights.exports.prepare import export_metadata
from flaxtransfer.weights.pretrained import Pretrained

__all__ = ["OPSET", "Graph", "logits", "model_bytes", "network"]


_BINOMIAL = np.outer([0.25, 0.5, 0.25], [0.25, 0.5, 0.25]).astype(np.float32)


class Graph:
    """An ONNX graph under construction; every method returns the name of its output.

    Args:
        leaves: arrays by path, as ``flatten`` gives those of a checkpoint's variables.
        config: of the network.
        helper: ``onnx.helper``.
    """

    def __init__(self, leaves: Mapping[str, Any], config: ResNetConfig, helper: Any) -> None:
        self.leaves = {path: np.asarray(leaf, np.float32) for path, leaf in leaves.items()}
        self.config = config
        self.helper = helper
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}

    def node(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Adds an operator."""
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(self.helper.make_node(kind, list(inputs), [name], name, **attributes))
        return name

    def constant(self, name: str, array: Any) -> str:
        """Adds an array, once per name."""
        self.constants[name] = np.ascontiguousarray(array)
        return name

    def convolve(self, path: str, x: str, stride: int = 1, groups: int = 1) -> str:
        """Adds the convolution with the leaves under a path."""
        kernel = self.leaves[f"params/{path}/kernel"]
        if self.config.standardized is not None:
            kernel = np.asarray(standardize(jnp.asarray(kernel), self.config.standardized))
        inputs = [x, self.constant(f"{path}/kernel", kernel.transpose(3, 2, 0, 1))]
        if f"params/{path}/bias" in self.leaves:
            inputs.append(self.constant(f"{path}/bias", self.leaves[f"params/{path}/bias"]))
        half, side = kernel.shape[0] // 2, kernel.shape[0]
        return self.node(
            "Conv",
            inputs,
            kernel_shape=[side, side],
            pads=[half] * 4,
            strides=[stride] * 2,
            group=groups,
        )

    def normalize(self, path: str, x: str) -> str:
        """Adds the BatchNorm (with running statistics) or GroupNorm under a path."""
        own = {leaf: self.leaves[f"params/{path}/{leaf}"] for leaf in ("scale", "bias")}
        if self.config.norm == "group":
            return self._group_norm(path, x, own)
        own |= {leaf: self.leaves[f"batch_stats/{path}/{leaf}"] for leaf in ("mean", "var")}
        inputs = [x, *(self.constant(f"{path}/{leaf}", array) for leaf, array in own.items())]
        return self.node("BatchNormalization", inputs, epsilon=self.config.epsilon)

    def _group_norm(self, path: str, x: str, own: Mapping[str, np.ndarray]) -> str:
        # InstanceNormalization is supported by all versions; GroupNormalization is new and changed.
        grouped = self.node("Reshape", [x, self.constant("groups", np.array([0, GROUPS, -1]))])
        ones = self.constant("ones", np.ones(GROUPS, np.float32))
        zeros = self.constant("zeros", np.zeros(GROUPS, np.float32))
        normal = self.node(
            "InstanceNormalization", [grouped, ones, zeros], epsilon=self.config.epsilon
        )
        x = self.node("Reshape", [normal, self.node("Shape", [x])])
        scale, bias = (
            self.constant(f"{path}/{leaf}", own[leaf][:, None, None]) for leaf in ("scale", "bias")
        )
        return self.node("Add", [self.node("Mul", [x, scale]), bias])

    def relu(self, x: str) -> str:
        """max(x, 0)."""
        return self.node("Relu", [x])

    def max_pool(self, x: str, stride: int = 2, before: int = 1, after: int = 1) -> str:
        """Adds 3x3 max-pooling, padded with -inf."""
        pads = [before, before, after, after]
        return self.node("MaxPool", [x], kernel_shape=[3, 3], strides=[stride] * 2, pads=pads)

    def average_pool(self, x: str, *, padded: bool = False) -> str:
        """Adds 2x2 average-pooling; if ``padded``, windows at the edge average what is inside."""
        return self.node(
            "AveragePool",
            [x],
            kernel_shape=[2, 2],
            strides=[2, 2],
            ceil_mode=int(padded),
            count_include_pad=0,
        )

    def pad(self, x: str, mode: str) -> str:
        """Adds one pixel of padding on all sides."""
        ends = self.constant("one_pixel", np.array([0, 0, 1, 1, 0, 0, 1, 1]))
        return self.node("Pad", [x, ends], mode=mode)

    def blur_pool(self, x: str, channels: int) -> str:
        """Adds a binomial filter with stride 2 and reflected edges."""
        kernel = np.broadcast_to(_BINOMIAL, (channels, 1, 3, 3))
        return self.node(
            "Conv",
            [self.pad(x, "reflect"), self.constant(f"blur_{channels}", kernel)],
            kernel_shape=[3, 3],
            strides=[2, 2],
            group=channels,
        )

    def anti_aliased(self, x: str, channels: int) -> str:
        """Adds anti-aliased pooling with stride 2."""
        if self.config.anti_alias == "average":
            return self.average_pool(x)
        return self.blur_pool(x, channels)


def network(graph: Graph, images: str) -> str:
    """Adds the whole network.

    Args:
        graph: with the leaves of the network.
        images: name of the input, ``[batch, bands, height, width]``, normalized.

    Returns:
        The name of the logits ``[batch, classes]``.
    """
    config, x = graph.config, images
    if config.adapter is not None:
        x = _adapter(graph, config.adapter, x)
    x = _stem(graph, x)
    for stage, depth in enumerate(config.depths, start=1):
        for index in range(depth):
            block = _preactivated if config.preactivation else _block
            x = block(graph, x, stage, index)
    if config.preactivation:
        x = graph.relu(graph.normalize(f"layer4/{_norm(config, 1)}", x))
    x = graph.node("Flatten", [graph.node("GlobalAveragePool", [x])])
    kernel, bias = (
        graph.constant(f"fc/{leaf}", graph.leaves[f"params/fc/{leaf}"])
        for leaf in ("kernel", "bias")
    )
    return graph.node("Gemm", [x, kernel, bias])


def _norm(config: ResNetConfig, number: int) -> str:
    return f"{'gn' if config.norm == 'group' else 'bn'}{number}"


def _adapter(graph: Graph, adapter: Adapter, x: str) -> str:
    kernel = graph.leaves["params/adapter/kernel"]
    weight = graph.constant("adapter/kernel", kernel.transpose(3, 2, 0, 1))
    linear = graph.node("Conv", [x, weight], kernel_shape=[1, 1])
    if adapter.kind == "linear":
        return linear
    (low, high), curves = adapter.span, graph.leaves["params/adapter/curves"]
    scale = (adapter.knots - 1) / (high - low)

    def number(name: str, value: float) -> str:
        return graph.constant(name, np.float32(value))

    inside = graph.node("Clip", [x, number("low", low), number("high", high)])
    position = graph.node("Sub", [inside, number("low", low)])
    position = graph.node("Mul", [position, number("knots_a_unit", scale)])
    hats = []
    for knot in range(adapter.knots):
        away = graph.node("Abs", [graph.node("Sub", [position, number(f"knot_{knot}", knot)])])
        hats.append(graph.relu(graph.node("Sub", [number("one", 1), away])))
    # [bands, knots, 3] as a 1x1 convolution over the hats of all bands, knot after knot.
    bends = graph.constant("adapter/curves", curves.transpose(2, 1, 0).reshape(3, -1, 1, 1))
    zero = (np.clip(0, low, high) - low) * scale
    at_zero = np.maximum(0, 1 - np.abs(zero - np.arange(adapter.knots)))
    bias = -np.einsum("k,nkr->r", at_zero, curves.astype(np.float64)).astype(np.float32)
    bent = graph.node(
        "Conv",
        [graph.node("Concat", hats, axis=1), bends, graph.constant("adapter/at_zero", bias)],
        kernel_shape=[1, 1],
    )
    return graph.node("Add", [linear, bent])


def _stem(graph: Graph, x: str) -> str:
    config = graph.config
    if config.stem == "plain":
        x = graph.convolve("conv1", x, 2)
    else:
        x = graph.convolve("conv1/0", x, 2)
        x = graph.relu(graph.normalize(f"conv1/{_norm(config, 1)}", x))
        x = graph.convolve("conv1/3", x)
        x = graph.relu(graph.normalize(f"conv1/{_norm(config, 4)}", x))
        x = graph.convolve("conv1/6", x)
    if not config.preactivation:
        x = graph.relu(graph.normalize(_norm(config, 1), x))
    if config.stem_pool == "zero-padded":
        return graph.max_pool(graph.pad(x, "constant"), before=0, after=0)
    if config.stem_pool == "ceil":
        return graph.max_pool(x, before=0)
    if config.stem_pool == "convolution":
        x = graph.convolve("maxpool/0", x, 2)
        return graph.relu(graph.normalize(f"maxpool/{_norm(config, 1)}", x))
    if config.anti_alias == "average":
        return graph.average_pool(x)
    if config.anti_alias == "blur":
        return graph.blur_pool(graph.max_pool(x, stride=1), config.stem_channels[-1])
    return graph.max_pool(x)


def _downsample(graph: Graph, x: str, stage: int, index: int) -> str:
    config, path = graph.config, f"layer{stage}/{index}/downsample"
    stride = config.stride(stage, index)
    number = 0
    if config.shortcut == "average":
        number = 1
        x = graph.average_pool(x, padded=True) if stride != 1 else x
        stride = 1
    x = graph.convolve(f"{path}/{number}", x, stride)
    if config.preactivation:
        return x
    after = f"gn{number + 1}" if config.norm == "group" else str(number + 1)
    return graph.normalize(f"{path}/{after}", x)


def _block(graph: Graph, x: str, stage: int, index: int) -> str:
    config, path = graph.config, f"layer{stage}/{index}"
    stride = config.stride(stage, index)
    convolved = 1 if config.anti_alias else stride

    def layer(number: int, y: str, stride: int = 1, groups: int = 1) -> str:
        y = graph.convolve(f"{path}/conv{number}", y, stride, groups)
        return graph.normalize(f"{path}/{_norm(config, number)}", y)

    def lower(y: str, channels: int) -> str:
        return graph.anti_aliased(y, channels) if config.anti_alias and stride != 1 else y

    if config.block == "basic":
        channels = config.width * 2 ** (stage - 1) // config.reduce_first
        y = layer(2, lower(graph.relu(layer(1, x, convolved)), channels))
    else:
        first, second = (stride, 1) if config.stride_in == "1x1" else (1, convolved)
        y = graph.relu(layer(1, x, first))
        y = graph.relu(layer(2, y, second, config.groups))
        y = layer(3, lower(y, config.inner(stage)))
    if config.attention is not None:
        y = _attention(graph, y, path)
    if config.has_shortcut(stage, index):
        x = _downsample(graph, x, stage, index)
    return graph.relu(graph.node("Add", [x, y]))


def _preactivated(graph: Graph, x: str, stage: int, index: int) -> str:
    config, path = graph.config, f"layer{stage}/{index}"
    stride = config.stride(stage, index)
    strided = 1 if config.block == "basic" else 2
    y = graph.relu(graph.normalize(f"{path}/{_norm(config, 1)}", x))
    if config.has_shortcut(stage, index):
        x = _downsample(graph, y, stage, index)
    elif stride != 1:
        x = graph.node("MaxPool", [x], kernel_shape=[1, 1], strides=[stride] * 2)
    for number in range(1, 3 if config.block == "basic" else 4):
        if number > 1:
            y = graph.relu(graph.normalize(f"{path}/{_norm(config, number)}", y))
        groups = config.groups if config.block == "bottleneck" and number == 2 else 1
        y = graph.convolve(f"{path}/conv{number}", y, stride if number == strided else 1, groups)
    return graph.node("Add", [x, y])


def _attention(graph: Graph, y: str, path: str) -> str:
    means = graph.node("GlobalAveragePool", [y])
    if graph.config.attention == "eca":
        kernel = graph.leaves[f"params/{path}/se/conv/kernel"]
        row = graph.node("Reshape", [means, graph.constant("a_row", np.array([0, 1, -1]))])
        weight = graph.constant(f"{path}/se/conv/kernel", kernel.transpose(2, 1, 0))
        half = kernel.shape[0] // 2
        row = graph.node("Conv", [row, weight], kernel_shape=[kernel.shape[0]], pads=[half, half])
        gate = graph.node("Reshape", [row, graph.constant("a_map", np.array([0, -1, 1, 1]))])
    else:
        hidden = graph.relu(_dense(graph, f"{path}/se/fc1", means))
        gate = _dense(graph, f"{path}/se/fc2", hidden)
    return graph.node("Mul", [y, graph.node("Sigmoid", [gate])])


def _dense(graph: Graph, path: str, x: str) -> str:
    kernel, bias = (graph.leaves[f"params/{path}/{leaf}"] for leaf in ("kernel", "bias"))
    inputs = [
        x,
        graph.constant(f"{path}/kernel", kernel.transpose(3, 2, 0, 1)),
        graph.constant(f"{path}/bias", bias),
    ]
    return graph.node("Conv", inputs, kernel_shape=[1, 1])


OPSET = 17
"""Supported by onnxruntime since 1.12 (2022); a ResNet needs nothing newer."""
IR_VERSION = 8
LARGEST = 2_000_000_000
"""Maximum number of bytes of one protocol buffer file."""


def model_bytes(checkpoint: Pretrained) -> bytes:
    """The bytes of the file; batch size, height and width are free.

    Raises:
        ImportError: onnx is not installed.
        ValueError: the weights have more than 2 GB.
    """
    onnx = _onnx()
    config = checkpoint.config
    graph = Graph(flatten(checkpoint.variables), config, onnx.helper)
    output = network(graph, "images")
    size = sum(array.nbytes for array in graph.constants.values())
    if size > LARGEST:
        raise ValueError(
            f"the weights of an .onnx file must have <= 2 GB, got {size:,} bytes for {config.name}"
        )
    float32 = onnx.TensorProto.FLOAT
    shape = ["batch", config.bands, "height", "width"]
    graph.nodes.append(onnx.helper.make_node("Identity", [output], ["logits"], "logits"))
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes,
            config.name,
            [onnx.helper.make_tensor_value_info("images", float32, shape)],
            [onnx.helper.make_tensor_value_info("logits", float32, ["batch", config.classes])],
            [onnx.numpy_helper.from_array(array, name) for name, array in graph.constants.items()],
        ),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        producer_name="flaxtransfer",
        ir_version=IR_VERSION,
    )
    onnx.helper.set_model_props(proto, export_metadata(checkpoint, "[batch, bands, height, width]"))
    onnx.checker.check_model(proto, full_check=True)
    result: bytes = proto.SerializeToString()
    return result


def logits(data: bytes, images: np.ndarray) -> np.ndarray:
    """Runs the file on images ``[batch, height, width, bands]``.

    It uses onnxruntime if it is installed, otherwise onnx's reference evaluator.
    """
    fed = {"images": np.ascontiguousarray(images.transpose(0, 3, 1, 2))}
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        outputs: Any = ReferenceEvaluator(_onnx().load_from_string(data)).run(None, fed)
        return np.asarray(outputs[0])
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, fed)[0])


def _onnx() -> Any:
    try:
        import onnx
        import onnx.checker
        import onnx.helper
        import onnx.numpy_helper
    except ImportError as error:
        raise ImportError(
            "writing .onnx files needs onnx: pip install 'flaxtransfer[onnx]'"
        ) from error
    return onnx
