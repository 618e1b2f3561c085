"""The tensors of an ONNX graph, and the layers that a ResNet has between them.

``Flow`` knows which tensors are constant, which are copies of others, and who uses them. ``Layers``
reads one layer at a time: a convolution with all that normalizes it, pooling, channel attention, a
linear map. What has another form than in a ResNet is refused by its name.

References: the ONNX authors, ``docs/Operators.md``, 2017-.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flaxtransfer.models.config import GROUPS
from flaxtransfer.paths import shortened, visible
from flaxtransfer.weights.readers.onnx_file import FLOATS, Graph, Node

__all__ = ["SHAPES", "Flow", "Layer", "Layers", "Leaves", "Norm", "kinds_of", "unfit"]


Leaves = dict[str, np.ndarray]

SHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze", "Expand")
"""Operators on means that only change the shape."""

_SMALL = 4096
"""Numbers of an array of sizes, axes or pads, with which anything may be computed."""

_ROUNDS = 12
"""Times that all weights may be used in arithmetic; weight standardization needs 6."""

_ORDERS = {False: (0, 2, 3, 1), True: (0, 3, 1, 2)}
"""Transpositions that put the channels last, and first again."""

_BINOMIAL = np.outer([0.25, 0.5, 0.25], [0.25, 0.5, 0.25]).ravel()


def unfit(node: Node, why: str) -> ValueError:
    """The error for a node that is no part of a ResNet."""
    name = visible(shortened(node.name or "/".join(node.outputs), 60))
    kind = visible(shortened(node.kind, 40))
    return ValueError(f"an ONNX model must be a ResNet, but its node {name!r} ({kind}) {why}")


def kinds_of(nodes: Sequence[Node]) -> str:
    """The kinds of some nodes, for an error text."""
    return visible(shortened(", ".join(sorted(node.kind for node in nodes[:9])), 60)) or "nothing"


class Flow:
    """The tensors of a graph, with constants computed and copies resolved.

    Raises:
        ValueError: nodes that are out of order, of a quantized network, or invalid.
    """

    def __init__(self, graph: Graph) -> None:
        self.arrays = dict(graph.arrays)
        self.room = _ROUNDS * sum(array.size for array in self.arrays.values()) + _SMALL
        self.copies: dict[str, str] = {}
        # Whether the channels are the last axis of a tensor.
        self.last: dict[str, bool] = {}
        # Shapes, 0 for the number of images, as far as images of a fixed size give them; and which
        # tensors are the shapes of others.
        self.sides: dict[str, Sequence[int]] = {}
        self.measured: dict[str, str] = {}
        self.used: dict[str, list[Node]] = {}
        given = {name: shape for name, shape in graph.inputs.items() if name not in self.arrays}
        for name, shape in given.items():
            sizes = [size if isinstance(size, int) else 0 for size in shape]
            self.last[name] = len(shape) == 4 and 0 < sizes[3] <= 16 and not 0 < sizes[1] <= 16
            if len(shape) == 4 and min(sizes[1:]) > 0:
                self.sides[name] = (0, *sizes[1:])
        for node in graph.nodes:
            if "Quantize" in node.kind or node.kind.startswith("QLinear") or "Integer" in node.kind:
                raise unfit(node, "is of a quantized network; give the float one")
            if not self._constant(node):
                self._tensor(node)
        self.inputs = {name: shape for name, shape in given.items() if self.users(name)}

    def _constant(self, node: Node) -> bool:
        """Computes a node whose inputs are constant, if that is cheap."""
        inputs = [self.arrays[name] for name in node.inputs if name in self.arrays]
        if node.kind == "CastLike" and inputs and node.inputs[0] in self.arrays:
            self.arrays[node.output] = inputs[0]
            return True
        if node.kind == "Gather" and (side := self._side(node)) is not None:
            self.arrays[node.output] = side
            return True
        if len(inputs) < len([name for name in node.inputs if name]) or not node.outputs:
            return False
        try:
            value = _viewed(node, inputs)
            if value is None and inputs:
                shapes = [array.shape for array in inputs[: 2 if node.kind in _ARITHMETIC else 1]]
                size = math.prod(np.broadcast_shapes(*shapes))
                if size <= self.room:
                    value = _calculated(node, inputs)
                    self.room -= size
        except (ValueError, IndexError, TypeError, KeyError, OverflowError, MemoryError):
            raise unfit(node, "has inputs or attributes that it cannot have") from None
        if value is not None:
            self.arrays[node.output] = value
        return value is not None

    def _side(self, node: Node) -> np.ndarray | None:
        """Height or width that a node takes from the shape of a tensor; None if it is not fixed."""
        sides = self.sides.get(self.measured.get(node.inputs[0] if node.inputs else "", ""), ())
        place = self.arrays.get(node.inputs[1]) if len(node.inputs) == 2 else None
        if (
            place is None
            or place.size != 1
            or not -len(sides) <= int(place.ravel()[0]) < len(sides)
        ):
            return None
        side = sides[int(place.ravel()[0])]
        return np.full(place.shape, side, np.int64) if side else None

    def _sides_of(self, node: Node, moving: Sequence[str]) -> Sequence[int] | None:
        """The shape of what a node of a stem gives; None for others, and where it is not fixed."""
        sides = self.sides.get(moving[0]) if len(moving) == 1 else None
        if sides is None or node.kind in ("Relu", "Clip", "BatchNormalization"):
            return sides
        if node.kind in _ARITHMETIC:
            shape = np.broadcast_shapes(
                *(self.arrays[n].shape for n in node.inputs if n != moving[0])
            )
            own = tuple(reversed(sides))[: len(shape)]
            fits = len(shape) <= 4 and all(
                size in (1, side) for size, side in zip(reversed(shape), own, strict=True)
            )
            return sides if fits else None
        last = self.last[moving[0]]
        if node.kind == "Pad" and len(node.inputs) > 1 and node.inputs[1] in self.arrays:
            pads = [int(pad) for pad in self.arrays[node.inputs[1]].ravel()]
            grown = [side + pads[n] + pads[n + 4] for n, side in enumerate(sides) if len(pads) == 8]
            return (0, *grown[1:]) if grown else None
        if node.kind not in ("Conv", "MaxPool", "AveragePool") or last:
            return None
        weight = self.arrays.get(node.inputs[1]) if node.kind == "Conv" else None
        kernel = node.attributes.get("kernel_shape", () if weight is None else weight.shape[2:])
        strides, dilations = (node.attributes.get(n, (1, 1)) for n in ("strides", "dilations"))
        pads = node.attributes.get("pads", (0,) * 4)
        known = len(kernel) == len(strides) == 2 and len(pads) == 4 and min(strides) > 0
        fixed = node.attributes.get("auto_pad", "NOTSET") == "NOTSET" and set(dilations) == {1}
        if not known or not fixed or node.attributes.get("ceil_mode", 0):
            return None
        outputs = sides[1] if weight is None else weight.shape[0]
        ends = [
            (side + pads[n] + pads[n + 2] - kernel[n]) // strides[n] + 1
            for n, side in enumerate(sides[2:])
        ]
        return (0, outputs, *ends) if min(ends) > 0 else None

    def _tensor(self, node: Node) -> None:
        moving = [name for name in node.inputs if name and name not in self.arrays]
        if any(name not in self.last for name in moving):
            raise unfit(node, "uses a tensor that does not exist before it")
        if any(name in self.last or name in self.arrays for name in node.outputs):
            raise unfit(node, "gives a name to a second tensor")
        last = self.last[moving[0]] if moving else False
        self.last |= dict.fromkeys(node.outputs, last)
        if not moving or not node.outputs:
            return
        turned = node.kind == "Transpose" and node.attributes.get("perm") == _ORDERS[last]
        cast = node.kind == "Cast" and node.attributes.get("to") in FLOATS
        if turned or cast or node.kind in ("Identity", "Dropout"):
            self.copies[node.output] = self.base(moving[0])
            self.last[node.output] = last != turned
            if (sides := self.sides.get(moving[0])) is not None:
                self.sides[node.output] = [sides[n] for n in _ORDERS[last]] if turned else sides
            return
        if node.kind == "Shape" and not node.attributes:
            self.measured[node.output] = moving[0]
        elif (sides := self._sides_of(node, moving)) is not None:
            self.sides[node.output] = sides
        for name in dict.fromkeys(map(self.base, moving)):
            self.used.setdefault(name, []).append(node)

    def base(self, name: str) -> str:
        """The tensor that this one is a copy of."""
        return self.copies.get(name, name)

    def users(self, x: str) -> list[Node]:
        """The nodes that use a tensor; its shape alone does not count."""
        return [node for node in self.used.get(x, ()) if node.kind != "Shape"]

    def one(self, x: str, before: Node, *kinds: str) -> Node:
        """The only node that uses a tensor.

        Args:
            x: the tensor.
            before: the node that it comes from, for the error text.
            kinds: that the node may have; none for any.
        """
        nodes, wanted = self.users(x), " or ".join(kinds)
        if len(nodes) != 1:
            told = f"where {wanted} must follow" if wanted else "where a ResNet has one node"
            raise unfit(before, f"is followed by {kinds_of(nodes)} {told}")
        if wanted and nodes[0].kind not in kinds:
            raise unfit(nodes[0], f"stands where {wanted} must be")
        return nodes[0]

    def computing(self, x: str, before: Node, *kinds: str) -> Node:
        """The only node that uses a tensor, behind those that only change its shape."""
        node = self.one(x, before)
        while node.kind in SHAPES:
            before, node = node, self.one(node.output, node)
        if kinds and node.kind not in kinds:
            raise unfit(node, f"stands where {' or '.join(kinds)} must be")
        return node

    def constant(self, node: Node, number: int) -> np.ndarray:
        """An input that must be constant."""
        name = node.inputs[number] if number < len(node.inputs) else ""
        if name not in self.arrays:
            raise unfit(node, f"must have a constant as input {number}")
        return self.arrays[name]

    def optional(self, node: Node, number: int) -> np.ndarray | None:
        """An input that is constant, or left out."""
        given = number < len(node.inputs) and node.inputs[number]
        return self.constant(node, number) if given else None

    def number(self, node: Node, number: int) -> float:
        """An input that must be a constant number."""
        array = self.constant(node, number)
        if array.size != 1:
            raise unfit(node, f"must have a number as input {number}")
        return float(array.reshape(-1)[0])

    def listed(self, node: Node, attribute: str, number: int) -> tuple[int, ...]:
        """Integers that are an attribute or, in later versions, an input; () if neither."""
        if attribute in node.attributes:
            return tuple(node.attributes[attribute])
        array = self.optional(node, number)
        return () if array is None or array.size > _SMALL else tuple(map(int, array.ravel()))

    def by_channel(self, node: Node) -> np.ndarray | None:
        """The constant of an operator on two tensors, by channel; None if both are tensors."""
        numbers = [n for n, name in enumerate(node.inputs) if name in self.arrays]
        if len(node.inputs) != 2 or not numbers:
            return None
        array = self.constant(node, numbers[0])
        axis = -1 if self.last[node.inputs[1 - numbers[0]]] else -3
        kept = array.shape[axis] if array.ndim >= -axis else 1
        if array.size != kept or (numbers[0] == 0 and node.kind in ("Sub", "Div")):
            raise unfit(node, "must have one constant per channel, behind the tensor")
        return array.reshape(-1)


_DTYPES = {1: np.float32, 6: np.int32, 7: np.int64, 10: np.float16, 11: np.float64}


def _quotient(x: np.ndarray, y: np.ndarray) -> Any:
    """Of whole numbers without the rest, as the operator is defined."""
    whole = x.dtype.kind in "iu" and y.dtype.kind in "iu"
    return (np.abs(x) // np.abs(y)) * np.sign(x) * np.sign(y) if whole else np.divide(x, y)


_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": _quotient,
}


def _viewed(node: Node, inputs: list[np.ndarray]) -> np.ndarray | None:
    """The value of a node that is a view, or small; None for others."""
    attributes, kind = node.attributes, node.kind
    if kind == "Constant":
        (value,) = attributes.values()
        return np.asarray(value)
    if not inputs:
        return None
    x, small = inputs[0], sum(array.size for array in inputs) <= _SMALL
    if kind == "Identity" or (kind == "Cast" and x.dtype.kind in "fV"):
        return x
    if kind == "Shape":
        return np.array(x.shape[attributes.get("start", 0) : attributes.get("end")], np.int64)
    if kind == "Expand" and np.prod(inputs[1], dtype=np.float64) <= _SMALL:
        return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(inputs[1])))
    if kind == "Transpose":
        return np.transpose(x, attributes.get("perm"))
    if kind == "Unsqueeze":
        return np.expand_dims(x, _axes(node, inputs) or ())
    if kind == "Squeeze":
        return np.squeeze(x, _axes(node, inputs))
    if not small:
        return None
    if kind == "Cast":
        return x.astype(_DTYPES[attributes["to"]])
    if kind == "Concat":
        return np.concatenate(inputs, attributes["axis"])
    if kind == "ConstantOfShape" and np.prod(x, dtype=np.float64) <= _SMALL:
        return np.full(x, attributes.get("value", np.zeros(1))[0])
    if kind == "Gather" and x.ndim == 1:
        return np.take(x, inputs[1])
    if kind == "Slice" and len(inputs) == 5 and inputs[3].size == 1:
        begin, end, axis, step = (int(array.ravel()[0]) for array in inputs[1:])
        index = [slice(None)] * x.ndim
        # An end far below 0 stands for "to the front".
        index[axis] = slice(begin, None if end < -x.shape[axis] else end, step)
        return x[tuple(index)]
    return None


def _calculated(node: Node, inputs: list[np.ndarray]) -> np.ndarray | None:
    """The value of arithmetic on weights, such as their standardization; None for others."""
    x, kind = inputs[0], node.kind
    result: np.ndarray
    if kind in _ARITHMETIC and len(inputs) == 2:
        result = _ARITHMETIC[kind](*inputs)
        return result
    if kind == "Reshape":
        return x.reshape([x.shape[i] if n == 0 else int(n) for i, n in enumerate(inputs[1])])
    if kind == "ReduceMean":
        keep = bool(node.attributes.get("keepdims", 1))
        return np.asarray(x.mean(_axes(node, inputs), np.float64, keepdims=keep), x.dtype)
    if kind == "BatchNormalization":
        wide = x.astype(np.float64)
        sizes = [1, -1] + [1] * (x.ndim - 2)
        scale, bias, mean, var = (array.reshape(sizes) for array in inputs[1:])
        if node.attributes.get("training_mode", 0):
            axes = (0, *range(2, x.ndim))
            mean, var = wide.mean(axes, keepdims=True), wide.var(axes, keepdims=True)
        deviation = np.sqrt(var.astype(np.float64) + _epsilon(node))
        result = ((wide - mean) / deviation * scale + bias).astype(x.dtype)
        return result
    return None


def _axes(node: Node, inputs: list[np.ndarray]) -> tuple[int, ...] | None:
    if len(inputs) > 1:
        return tuple(map(int, inputs[1].ravel()))
    axes: tuple[int, ...] | None = node.attributes.get("axes")
    return axes


def _epsilon(node: Node) -> float:
    return float(node.attributes.get("epsilon", 1e-5))


@dataclasses.dataclass
class Norm:
    """What normalizes a tensor by channel.

    Args:
        kind: "batch" or "group" for a layer of that name; "bias" for summands alone, where a
            BatchNorm is folded into the convolution; "affine" for other factors and summands.
        leaves: by name: scale, bias, and of "batch" mean and var.
        epsilon: of "batch" and "group".
    """

    kind: str
    leaves: Leaves
    epsilon: float | None = None


@dataclasses.dataclass
class Layer:
    """A convolution, what normalizes it, and whether an activation follows.

    Args:
        node: the convolution.
        kernel: ``[height, width, in, out]``.
        stride: in pixels.
        groups: of channels.
        norm: what follows.
        activated: whether a Relu follows that.
    """

    node: Node
    kernel: np.ndarray
    stride: int
    groups: int
    norm: Norm
    activated: bool = False

    def check(self, side: int, stride: int, groups: int | None = 1) -> None:
        """Refuses another size, stride or, unless it is None, number of groups."""
        if (self.kernel.shape[0], self.stride) != (side, stride) or groups not in (
            None,
            self.groups,
        ):
            raise unfit(
                self.node,
                f"must be a {side}x{side} convolution with stride {stride}, got "
                f"{self.kernel.shape[0]}x{self.kernel.shape[0]} with stride {self.stride}"
                + (f" and {self.groups} groups" if self.groups > 1 else ""),
            )


class Layers(Flow):
    """Reads the layers of a graph, one at a time.

    Every method takes the node that a layer starts with, and returns what it is and its output.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.shifted = 0

    def window(
        self, node: Node, padded: Sequence[int] = (0,) * 4
    ) -> tuple[int, Sequence[int], tuple[int, ...]]:
        """Stride, sides and pads of a convolution or pooling; -1 for pads that depend on sizes."""
        attributes = node.attributes
        if self.last[node.inputs[0]]:
            raise unfit(node, "must have the channels on the second axis")
        strides, dilations = (attributes.get(name, (1, 1)) for name in ("strides", "dilations"))
        if set(dilations) != {1}:
            raise unfit(node, "is dilated, which is not supported")
        if len(set(strides)) != 1:
            raise unfit(node, f"must have one stride, got {list(strides)}")
        own = attributes.get("pads", (0,) * 4)
        if len(own) != 4:
            raise unfit(node, f"must have pads on two axes, got {list(own)[:9]}")
        pads = tuple(int(pad) + more for pad, more in zip(own, padded, strict=True))
        automatic = attributes.get("auto_pad", "NOTSET")
        if automatic not in ("NOTSET", "VALID"):
            pads = (-1,)
        return int(strides[0]), attributes.get("kernel_shape", ()), pads

    def convolution(
        self, node: Node, padded: Sequence[int] = (0,) * 4
    ) -> tuple[np.ndarray, int, int]:
        """Kernel ``[height, width, in, out]``, stride and groups of a square convolution.

        Args:
            node: a Conv.
            padded: pixels that a Pad has added before it at the top, left, bottom and right.
        """
        weight = self.constant(node, 1)
        if weight.ndim != 4 or weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
            raise unfit(node, f"must have square kernels of odd sides, got {list(weight.shape)}")
        stride, _, pads = self.window(node, padded)
        half = weight.shape[2] // 2
        if set(pads) != {half} and not (pads == (-1,) and stride == 1):
            given = "other sides" if pads == (-1,) else list(pads)
            raise unfit(node, f"must be padded by {half} on all sides, got {given}")
        return weight.transpose(2, 3, 1, 0), stride, int(node.attributes.get("group", 1))

    def padding(self, node: Node) -> tuple[tuple[int, ...], str]:
        """Pixels that a Pad adds at the top, left, bottom and right, and its mode."""
        mode = str(node.attributes.get("mode", "constant"))
        value = node.attributes.get("value", 0.0)
        if self.optional(node, 2) is not None:
            value = self.number(node, 2)
        pads = self.listed(node, "pads", 1)
        spatial = (1, 2) if self.last[node.inputs[0]] else (2, 3)
        ends = tuple(pads[axis + side] for side in (0, 4) for axis in spatial if len(pads) == 8)
        if not ends or min(ends) < 0 or sum(pads) != sum(ends) or (mode == "constant" and value):
            raise unfit(node, f"must add rows and columns, got {visible(mode[:40])} {list(pads)}")
        return ends, mode

    def layer(self, node: Node) -> tuple[Layer, str]:
        """A convolution, with zeros that a Pad puts around it, and what normalizes it."""
        padded: Sequence[int] = (0,) * 4
        if node.kind == "Pad":
            padded, mode = self.padding(node)
            if mode != "constant":
                raise unfit(node, "must pad with 0")
            node = self.one(node.output, node, "Conv")
        kernel, stride, groups = self.convolution(node, padded)
        norm, x = self.norm(node.output, kernel.shape[3], node, bias=self.optional(node, 2))
        return Layer(node, kernel, stride, groups, norm), x

    def norm(
        self,
        x: str,
        channels: int,
        before: Node,
        *,
        bias: np.ndarray | None = None,
        first: Node | None = None,
    ) -> tuple[Norm, str]:
        """All that acts by channel on a tensor: norms, factors and summands, in any number.

        Args:
            x: the tensor.
            channels: of it.
            before: the node that it comes from.
            bias: of the convolution that it comes from.
            first: the node to start with; None where only one follows.
        """

        def vector(array: np.ndarray) -> np.ndarray:
            if array.size not in (1, channels):
                raise unfit(node or before, f"must have {channels} constants, got {array.size}")
            return np.broadcast_to(array.reshape(-1).astype(np.float64), channels)

        node = first
        ones, zeros = np.ones(channels), np.zeros(channels)
        # What acts before the leaves of a norm, and afterwards what acts behind them.
        scale, shift = ones, zeros if bias is None else vector(bias)
        found = Norm("bias", {})
        while True:
            followers = self.users(x)
            node = node or (followers[0] if len(followers) == 1 else None)
            if node is None:
                break
            neutral = not shift.any() and bool((scale == 1).all())
            if node.kind == "BatchNormalization":
                names = ("scale", "bias", "mean", "var")
                own = {name: self.constant(node, n) for n, name in enumerate(names, 1)}
                given = {name: vector(array) for name, array in own.items()}
                if node.attributes.get("training_mode", 0):
                    raise unfit(node, "must use running statistics")
                if not found.leaves and scale.all():
                    if not neutral:
                        own["mean"] = (given["mean"] - shift) / scale
                        own["scale"] = given["scale"] * scale
                        self.shifted += 1
                    found, scale, shift = Norm("batch", own, _epsilon(node)), ones, zeros
                else:
                    factor = given["scale"] / np.sqrt(given["var"] + _epsilon(node))
                    scale, shift = scale * factor, (shift - given["mean"]) * factor + given["bias"]
            elif node.kind in _ARITHMETIC:
                constant = self.by_channel(node)
                if constant is None:
                    break
                by = vector(constant)
                if node.kind in ("Add", "Sub"):
                    shift = shift + (by if node.kind == "Add" else -by)
                else:
                    factor = by if node.kind == "Mul" else 1 / by
                    scale, shift = scale * factor, shift * factor
                found.kind = "affine" if found.kind == "bias" else found.kind
            elif (group := self._grouped(node)) is not None:
                if found.leaves or not neutral:
                    raise unfit(node, "must follow a convolution without a bias")
                epsilon, node, constants = group
                pair = constants or [ones, zeros]
                found = Norm("group", dict(zip(("scale", "bias"), pair, strict=True)), epsilon)
            else:
                break
            x, node = node.output, None
        if not found.leaves:
            found.leaves = {"scale": scale, "bias": shift}
        elif shift.any() or (scale != 1).any():
            found.leaves["scale"] = found.leaves["scale"] * scale
            found.leaves["bias"] = found.leaves["bias"] * scale + shift
        return found, x

    def _grouped(self, node: Node) -> tuple[float, Node, list[np.ndarray]] | None:
        """Epsilon, last node and constants of a GroupNorm that starts here; None for others."""
        if node.kind == "GroupNormalization":
            groups = int(node.attributes["num_groups"])
            inner, last = node, node
        elif node.kind == "Reshape":
            inner = self.one(node.output, node)
            if inner.kind != "InstanceNormalization":
                return None
            last = self.one(inner.output, inner, "Reshape")
            groups = self.constant(inner, 1).size
            sizes = self.listed(node, "shape", 1)
            if len(sizes) != 3 or sizes[1] != groups:
                raise unfit(node, f"must make {groups} groups, got {list(sizes)}")
        else:
            return None
        if groups != GROUPS:
            raise unfit(inner, f"must have {GROUPS} groups, got {groups}")
        scale, bias = (self.constant(inner, number).reshape(-1) for number in (1, 2))
        if scale.size == groups and (scale == 1).all() and not bias.any():
            return _epsilon(inner), last, []
        if inner is not last:
            raise unfit(inner, "must have no factors of its own")
        return _epsilon(inner), last, [scale, bias]

    def lowering(self, node: Node) -> tuple[str, str]:
        """Anti-aliased pooling: "average" or "blur", and its output."""
        attributes = node.attributes
        if node.kind == "AveragePool":
            stride, sides, pads = self.window(node)
            # What is beyond the image must not count, so that odd sides end with a smaller average.
            beyond = attributes.get("ceil_mode", 0) or any(pads)
            counted = beyond and attributes.get("count_include_pad", 0)
            sound = pads in ((0, 0, 0, 0), (0, 0, 1, 1)) and not counted
            if tuple(sides) != (2, 2) or stride != 2 or not sound:
                raise unfit(node, "must average 2x2 pixels with stride 2")
            return "average", node.output
        if node.kind != "Pad":
            raise unfit(node, "stands where pooling must be")
        padded, mode = self.padding(node)
        node = self.one(node.output, node, "Conv")
        kernel, stride, groups = self.convolution(node, padded)
        sound = mode == "reflect" and kernel.shape[:3] == (3, 3, 1) and stride == 2
        filters = kernel.reshape(-1, kernel.shape[3]).T
        if not sound or groups != len(filters) or not np.allclose(filters, _BINOMIAL, atol=1e-6):
            raise unfit(node, "must be a binomial blur with reflected edges")
        return "blur", node.output

    def averages(self, node: Node, size: int | None = None) -> bool:
        """Whether a node averages over all pixels.

        Args:
            node: any.
            size: side of the images, where it is fixed.
        """
        if node.kind == "AveragePool" and size is not None:
            _, sides, pads = self.window(node)
            return size % 32 == 0 and set(sides) == {size // 32} and set(pads) == {0}
        if node.kind == "ReduceMean":
            axes = {axis % 4 for axis in self.listed(node, "axes", 1)}
            return axes == ({1, 2} if self.last[node.inputs[0]] else {2, 3})
        return node.kind == "GlobalAveragePool"

    def dense(self, node: Node) -> tuple[np.ndarray, np.ndarray, str]:
        """Matrix ``[in, out]``, bias ``[out]`` and output of a linear map on channels."""
        if node.kind == "Conv":
            kernel, stride, groups = self.convolution(node)
            if kernel.shape[:2] != (1, 1) or stride != 1 or groups != 1:
                raise unfit(node, "must be a 1x1 convolution")
            matrix = kernel[0, 0]
        elif node.kind in ("Gemm", "MatMul"):
            matrix = self.constant(node, 1)
            if matrix.ndim != 2 or node.attributes.get("transA", 0):
                raise unfit(node, "must be a linear map of each image")
            matrix = matrix.T if node.attributes.get("transB", 0) else matrix
        else:
            raise unfit(node, "stands where a linear map must be")
        bias, x, outputs = self.optional(node, 2), node.output, matrix.shape[1]
        following = self.users(x)
        if node.kind == "MatMul" and len(following) == 1 and following[0].kind == "Add":
            constants = [name for name in following[0].inputs if name in self.arrays]
            if constants:
                bias, x = self.arrays[constants[0]], following[0].output
        bias = np.zeros(outputs, np.float32) if bias is None else bias.reshape(-1)
        if bias.size not in (1, outputs):
            raise unfit(node, f"must have {outputs} biases, got {bias.size}")
        bias = np.broadcast_to(bias, outputs)
        by, plus = (float(node.attributes.get(name, 1.0)) for name in ("alpha", "beta"))
        return (matrix * by, bias * plus, x) if (by, plus) != (1, 1) else (matrix, bias, x)

    def attention(self, x: str) -> tuple[Leaves, str]:
        """Channel attention on a tensor: its leaves, {} if there is none, and its output."""
        nodes = sorted(self.users(x), key=lambda node: node.kind != "Mul")
        if len(nodes) != 2:
            return {}, x
        product, mean = nodes
        if product.kind != "Mul" or not self.averages(mean):
            raise unfit(mean, "must be the mean of channel attention")
        node = self.computing(mean.output, mean)
        weight = self.constant(node, 1)
        if node.kind == "Conv" and weight.ndim == 3:
            size = weight.shape[2]
            padded = set(node.attributes.get("pads", ())) == {size // 2}
            if weight.shape[:2] != (1, 1) or not padded or self.optional(node, 2) is not None:
                raise unfit(node, "must be a filter along the channels, without a bias")
            leaves, x = {"se/conv/kernel": weight.transpose(2, 1, 0)}, node.output
        else:
            leaves = {}
            for number in (1, 2):
                matrix, bias, x = self.dense(node)
                own = {"kernel": matrix[None, None], "bias": bias}
                leaves |= {f"se/fc{number}/{name}": array for name, array in own.items()}
                if number == 1:
                    relu = self.computing(x, node, "Relu")
                    node = self.computing(relu.output, relu)
        gate = self.computing(x, node, "Sigmoid")
        last = self.computing(gate.output, gate)
        if last is not product:
            raise unfit(last, "must multiply the output of the block")
        return leaves, product.output
