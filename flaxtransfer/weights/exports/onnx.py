"""Export to ONNX: the network as a graph of operators, and the file with weights and metadata.

The graph follows ``models/resnet.py`` node by node, as inference uses it: BatchNorm is folded into
the convolution before it, or is a factor and a summand where none is. Per-channel quantization then
needs no preparation. In float16 everything between the images and the pooling is float16; images,
pooling, head and logits are float32.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from flaxtransfer.models.config import GROUPS, Adapter, ResNetConfig
from flaxtransfer.models.layers import standardize
from flaxtransfer.paths import flatten
from flaxtransfer.weights.exports.prepare import export_metadata
from flaxtransfer.weights.naming.native import HEADER_KEY
from flaxtransfer.weights.pretrained import Pretrained, write_header
from flaxtransfer.weights.readers import onnx_file
from flaxtransfer.weights.readers.onnx_file import Node, serialize

__all__ = ["OPSET", "Graph", "model_bytes", "network", "runner"]


_BINOMIAL = np.outer([0.25, 0.5, 0.25], [0.25, 0.5, 0.25]).astype(np.float32)


class Graph:
    """An ONNX graph under construction; every method returns the name of its output.

    Args:
        leaves: arrays by path, as ``flatten`` gives those of a checkpoint's variables.
        config: of the network.
        dtype: of the weights and of the computation: float32 or float16.
    """

    def __init__(self, leaves: Mapping[str, Any], config: ResNetConfig, dtype: Any) -> None:
        self.leaves = {path: np.asarray(leaf, np.float32) for path, leaf in leaves.items()}
        self.config = config
        self.dtype = np.dtype(dtype)
        self.nodes: list[Node] = []
        self.constants: dict[str, np.ndarray] = {}

    def node(self, kind: str, inputs: Sequence[str], name: str = "", **attributes: Any) -> str:
        """Adds an operator."""
        name = name or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(Node(kind, tuple(inputs), (name,), attributes, name))
        return name

    def constant(self, name: str, array: Any) -> str:
        """Adds an array, once per name."""
        self.constants[name] = np.asarray(array)
        return name

    def weight(self, name: str, array: np.ndarray) -> str:
        """Adds an array of numbers in the graph's dtype, once per name.

        Raises:
            ValueError: numbers beyond the dtype's range.
        """
        with np.errstate(over="ignore"):
            converted = array.astype(self.dtype)
        if not np.isfinite(converted).all():
            most = np.abs(array).max()
            raise ValueError(
                f"weights must be below {np.finfo(self.dtype).max:.3g} for {self.dtype.name}, got "
                f"{most:.3g} in {name}"
            )
        return self.constant(name, converted)

    def cast(self, x: str, dtype: Any) -> str:
        """Converts a tensor between float32 and the graph's dtype, where they differ."""
        if self.dtype == np.float32:
            return x
        return self.node("Cast", [x], to=1 if np.dtype(dtype) == np.float32 else 10)

    def layer(self, path: str, norm: str | None, x: str, stride: int = 1, groups: int = 1) -> str:
        """Adds the convolution under a path and the norm that follows it.

        Args:
            path: of the convolution.
            norm: path of its norm; None where none follows.
            x: the input.
            stride: in pixels.
            groups: of channels.
        """
        kernel = self.leaves[f"params/{path}/kernel"].astype(np.float64)
        if self.config.standardized is not None:
            standard = standardize(jnp.asarray(kernel, jnp.float32), self.config.standardized)
            kernel = np.asarray(standard, np.float64)
        bias = self.leaves.get(f"params/{path}/bias")
        batch = norm is not None and self.config.norm == "batch"
        if batch:
            scale, shift = self.affine(f"{norm}")
            kernel = kernel * scale
            bias = shift if bias is None else bias * scale + shift
        inputs = [x, self.weight(f"{path}/kernel", kernel.transpose(3, 2, 0, 1))]
        if bias is not None:
            inputs.append(self.weight(f"{path}/bias", bias))
        half, side = kernel.shape[0] // 2, kernel.shape[0]
        x = self.node(
            "Conv",
            inputs,
            kernel_shape=[side, side],
            pads=[half] * 4,
            strides=[stride] * 2,
            group=groups,
        )
        return x if batch or norm is None else self.normalize(norm, x)

    def affine(self, path: str) -> tuple[np.ndarray, np.ndarray]:
        """Factor and summand of the BatchNorm under a path, with running statistics."""
        scale, bias, mean, var = (
            self.leaves[f"{root}/{path}/{leaf}"].astype(np.float64)
            for root, leaf in (
                ("params", "scale"),
                ("params", "bias"),
                ("batch_stats", "mean"),
                ("batch_stats", "var"),
            )
        )
        factor = scale / np.sqrt(var + self.config.epsilon)
        return factor, bias - mean * factor

    def normalize(self, path: str, x: str) -> str:
        """Adds the norm under a path that no convolution precedes, or a GroupNorm."""
        if self.config.norm == "group":
            own = {leaf: self.leaves[f"params/{path}/{leaf}"] for leaf in ("scale", "bias")}
            return self._group_norm(path, x, own)
        factor, summand = self.affine(path)
        return self._scaled(path, x, factor, summand)

    def _scaled(self, path: str, x: str, scale: np.ndarray, bias: np.ndarray) -> str:
        by = self.weight(f"{path}/scale", scale[:, None, None])
        plus = self.weight(f"{path}/bias", bias[:, None, None])
        return self.node("Add", [self.node("Mul", [x, by]), plus])

    def _group_norm(self, path: str, x: str, own: Mapping[str, np.ndarray]) -> str:
        # InstanceNormalization is supported by all versions; GroupNormalization is new and changed.
        grouped = self.node("Reshape", [x, self.constant("groups", np.array([0, GROUPS, -1]))])
        ones = self.weight("ones", np.ones(GROUPS))
        zeros = self.weight("zeros", np.zeros(GROUPS))
        normal = self.node(
            "InstanceNormalization", [grouped, ones, zeros], epsilon=self.config.epsilon
        )
        x = self.node("Reshape", [normal, self.node("Shape", [x])])
        return self._scaled(path, x, own["scale"], own["bias"])

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
            [self.pad(x, "reflect"), self.weight(f"blur_{channels}", kernel)],
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
    x = _stem(graph, graph.cast(x, graph.dtype))
    for stage, depth in enumerate(config.depths, start=1):
        for index in range(depth):
            block = _preactivated if config.preactivation else _block
            x = block(graph, x, stage, index)
    if config.preactivation:
        x = graph.relu(graph.normalize(f"layer4/{_norm(config, 1)}", x))
    x = graph.cast(x, np.float32)
    x = graph.node("Flatten", [graph.node("GlobalAveragePool", [x])])
    kernel, bias = (graph.leaves[f"params/fc/{leaf}"] for leaf in ("kernel", "bias"))
    weights = [graph.constant("fc/kernel", kernel.T), graph.constant("fc/bias", bias)]
    return graph.node("Gemm", [x, *weights], "logits", transB=1)


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
    first, norm = _norm(config, 1), None if config.preactivation else _norm(config, 1)
    if config.stem == "plain":
        x = graph.layer("conv1", norm, x, 2)
    else:
        x = graph.relu(graph.layer("conv1/0", f"conv1/{first}", x, 2))
        x = graph.relu(graph.layer("conv1/3", f"conv1/{_norm(config, 4)}", x))
        x = graph.layer("conv1/6", norm, x)
    if not config.preactivation:
        x = graph.relu(x)
    if config.stem_pool == "zero-padded":
        return graph.max_pool(graph.pad(x, "constant"), before=0, after=0)
    if config.stem_pool == "ceil":
        return graph.max_pool(x, before=0)
    if config.stem_pool == "convolution":
        return graph.relu(graph.layer("maxpool/0", f"maxpool/{first}", x, 2))
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
    after = f"gn{number + 1}" if config.norm == "group" else str(number + 1)
    norm = None if config.preactivation else f"{path}/{after}"
    return graph.layer(f"{path}/{number}", norm, x, stride)


def _block(graph: Graph, x: str, stage: int, index: int) -> str:
    config, path = graph.config, f"layer{stage}/{index}"
    stride = config.stride(stage, index)
    convolved = 1 if config.anti_alias else stride

    def layer(number: int, y: str, stride: int = 1, groups: int = 1) -> str:
        norm = f"{path}/{_norm(config, number)}"
        return graph.layer(f"{path}/conv{number}", norm, y, stride, groups)

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
    basic = config.block == "basic"
    strided, last = (1, 2) if basic else (2, 3)
    y = graph.relu(graph.normalize(f"{path}/{_norm(config, 1)}", x))
    if config.has_shortcut(stage, index):
        x = _downsample(graph, y, stage, index)
    elif stride != 1:
        x = graph.node("MaxPool", [x], kernel_shape=[1, 1], strides=[stride] * 2)
    for number in range(1, last + 1):
        norm = f"{path}/{_norm(config, number + 1)}" if number < last else None
        groups = config.groups if not basic and number == 2 else 1
        own = stride if number == strided else 1
        y = graph.layer(f"{path}/conv{number}", norm, y, own, groups)
        y = graph.relu(y) if number < last else y
    return graph.node("Add", [x, y])


def _attention(graph: Graph, y: str, path: str) -> str:
    means = graph.node("GlobalAveragePool", [y])
    if graph.config.attention == "eca":
        kernel = graph.leaves[f"params/{path}/se/conv/kernel"]
        row = graph.node("Reshape", [means, graph.constant("a_row", np.array([0, 1, -1]))])
        weight = graph.weight(f"{path}/se/conv/kernel", kernel.transpose(2, 1, 0))
        half = kernel.shape[0] // 2
        row = graph.node("Conv", [row, weight], kernel_shape=[kernel.shape[0]], pads=[half, half])
        gate = graph.node("Reshape", [row, graph.constant("a_map", np.array([0, -1, 1, 1]))])
    else:
        hidden = graph.relu(_dense(graph, f"{path}/se/fc1", means))
        gate = _dense(graph, f"{path}/se/fc2", hidden)
    return graph.node("Mul", [y, graph.node("Sigmoid", [gate])])


def _dense(graph: Graph, path: str, x: str) -> str:
    kernel, bias = (graph.leaves[f"params/{path}/{leaf}"] for leaf in ("kernel", "bias"))
    weight = graph.weight(f"{path}/kernel", kernel.transpose(3, 2, 0, 1))
    inputs = [x, weight, graph.weight(f"{path}/bias", bias)]
    return graph.node("Conv", inputs, kernel_shape=[1, 1])


OPSET = 17
"""Supported by onnxruntime since 1.12 (2022); a ResNet needs nothing newer."""
LARGEST = 2_000_000_000
"""Maximum number of bytes of one protocol buffer file."""


def model_bytes(checkpoint: Pretrained, dtype: Any = np.float32) -> bytes:
    """The bytes of the file; batch size, height and width are free.

    Args:
        checkpoint: the network.
        dtype: of the weights and the computation, float32 or float16; images and logits are
            float32.

    Raises:
        ValueError: the weights have more than 2 GB, or are too large for float16; a network that
            ends at its stem, or a pre-activation one that ends before layer4.
    """
    config = checkpoint.config
    if not config.depths or (config.preactivation and len(config.depths) < 4):
        kind = (
            "a pre-activation network of fewer than 4 stages" if config.depths else "a stem alone"
        )
        raise ValueError(f"an .onnx file cannot hold {kind}, {config.name}; use --to stablehlo")
    graph = Graph(flatten(checkpoint.variables), config, dtype)
    network(graph, "images")
    size = sum(array.nbytes for array in graph.constants.values())
    if size > LARGEST:
        raise ValueError(
            f"the weights of an .onnx file must have <= 2 GB, got {size:,} bytes for {config.name}"
        )
    metadata = export_metadata(checkpoint, "[batch, bands, height, width]")
    metadata["computation"] = graph.dtype.name
    metadata[HEADER_KEY] = write_header(checkpoint)[HEADER_KEY]
    return serialize(
        onnx_file.Graph(
            tuple(graph.nodes),
            graph.constants,
            {"images": ("batch", config.bands, "height", "width")},
            {"logits": ("batch", config.classes)},
            metadata,
            config.name,
        ),
        OPSET,
    )


def runner(data: bytes) -> Callable[[np.ndarray], np.ndarray] | None:
    """A function from images ``[batch, height, width, bands]`` to the logits of onnxruntime.

    None where onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(images: np.ndarray) -> np.ndarray:
        fed = {"images": np.ascontiguousarray(images.transpose(0, 3, 1, 2))}
        return np.asarray(session.run(None, fed)[0])

    return run
