"""Read a ResNet off an ONNX graph: exporters and simplifiers rename everything but the operators.

The graph is followed from its input to its output, and what may stand at each place is known: stem,
residual blocks, pooling, head. The first node that does not fit is named in the error. BatchNorm
may be folded into convolutions, or be constants that multiply and add. Strides, padding, groups and
epsilon are those of the graph, so that nothing has to be assumed.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flaxtransfer.files import parse_json
from flaxtransfer.models.config import Adapter, ResNetConfig
from flaxtransfer.paths import shortened, visible
from flaxtransfer.weights.naming import native
from flaxtransfer.weights.naming.key_map import Rule, Table
from flaxtransfer.weights.naming.native import HEADER_KEY
from flaxtransfer.weights.naming.onnx_layers import (
    SHAPES,
    Layer,
    Layers,
    Leaves,
    Norm,
    kinds_of,
    unfit,
)
from flaxtransfer.weights.preprocessing import Preprocessing
from flaxtransfer.weights.readers import archives, onnx_file
from flaxtransfer.weights.readers.onnx_file import Node

__all__ = ["TABLE", "Stated", "read_onnx", "stated"]


_OWN = "onnx:"
TABLE: Table = tuple(Rule(_OWN + rule.leaf.split("/", 1)[1], rule.leaf) for rule in native.TABLE)
"""The names that ``read_onnx`` gives: our paths without "params" and "batch_stats", marked."""

GRAPH = f"{archives.FOUND}graph"
"""Key of the metadata with what the graph shows beyond its arrays, as JSON."""

_CEIL = (0, 0, 1, 1)
"""Pads of a pooling whose last window reaches over the edge."""

_OUTPUTS = ("Softmax", "LogSoftmax", "Sigmoid")


@dataclasses.dataclass(frozen=True)
class Stated:
    """What a graph shows beyond its arrays.

    Args:
        fields: of the configuration, those that no leaf shows.
        size: side of the images in pixels; None if it is free.
        mean: subtracted from pixels from 0 to 1 by the graph itself; () if it normalizes nothing.
        std: divides them afterwards.
        no_head: why the head is left out; "" where it is one linear map, or there is none.
    """

    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    size: int | None = None
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    no_head: str = ""

    def of(self, seen: ResNetConfig) -> ResNetConfig:
        """The configuration that the leaves show, with the fields of the graph."""
        fields = dict(self.fields)
        if "adapter" in fields:
            fields["adapter"] = Adapter(**fields["adapter"])
        return dataclasses.replace(seen, **fields)

    def sized(self, usual: Preprocessing) -> Preprocessing:
        """A preprocessing for images of the graph's size, cropped as much as usually."""
        if self.size is None or self.size == usual.size:
            return usual
        resize = round(self.size * usual.resize / usual.size)
        return dataclasses.replace(usual, size=self.size, resize=resize)


def stated(metadata: Mapping[str, str]) -> Stated | None:
    """What the graph of a file shows; None for files that hold no graph."""
    text = metadata.get(GRAPH)
    return None if text is None else Stated(**json.loads(text))


def read_onnx(
    data: bytes | memoryview, beside: Callable[[str], bytes | memoryview] | None = None
) -> tuple[Leaves, dict[str, str], list[str]]:
    """Reads the bytes of an ONNX file: arrays by our paths, metadata, and notes.

    Args:
        data: the whole file.
        beside: returns the bytes of another file by its name, for arrays that lie there.

    Raises:
        ValueError: a damaged file, or a graph that is no ResNet, with the first node that does not
            fit.
    """
    graph = onnx_file.parse(data, beside)
    try:
        # What overflows is refused as infinite when it is loaded.
        with np.errstate(all="ignore"):
            network = _Network(graph)
            leaves = network.read()
    except (IndexError, TypeError, KeyError, AttributeError, OverflowError) as error:
        # Attributes and constants of other types than the operator has.
        reason = visible(shortened(f"{type(error).__name__} {error}", 100))
        raise ValueError(f"an ONNX model must have valid operators, got {reason}") from error
    metadata = archives.stated(graph.metadata)
    said = network.said
    if HEADER_KEY in metadata:
        if said.mean:
            raise ValueError(
                "an ONNX model must state its preprocessing once, got a header with one, and a "
                "graph that normalizes its input"
            )
        metadata[HEADER_KEY] = _with_fields(metadata[HEADER_KEY], said.fields)
    metadata[GRAPH] = json.dumps(dataclasses.asdict(said))
    if len(graph.outputs) > 1:
        network.told.append(f"{len(graph.outputs)} outputs: all but those of the head are left out")
    return {_OWN + path: leaf for path, leaf in leaves.items()}, metadata, network.notes()


def _with_fields(header: str, fields: Mapping[str, Any]) -> str:
    """A header with the fields of the graph, which decides where they differ."""
    content = parse_json(header.encode(), "the header of the file")
    if isinstance(content, dict) and isinstance(content.get("config"), dict):
        content["config"] |= fields
    return json.dumps(content)


@dataclasses.dataclass
class _Block:
    """A residual block before it has a name.

    Args:
        join: the sum that ends it.
        layers: its two or three convolutions.
        shortcut: the convolution of the shortcut, if there is one.
        pooled: whether an average of 2x2 pixels precedes that.
        lowered: anti-aliased pooling by the number of layers before it.
        attention: leaves of the channel attention.
        before: the norm at the start of a pre-activation block.
        skipped: stride of a shortcut without a convolution.
    """

    join: Node
    layers: list[Layer]
    shortcut: Layer | None
    pooled: bool
    lowered: dict[int, str]
    attention: Leaves
    before: Norm | None = None
    skipped: int = 1

    def stride(self) -> tuple[int, int]:
        """The stride of the block, and the number of the layer that has it."""
        for number, layer in enumerate(self.layers):
            if layer.stride != 1:
                return layer.stride, number
        return (2, -1) if self.lowered else (1, -1)


class _Network(Layers):
    """Follows a graph from its input to its output, and names what it reads."""

    def __init__(self, graph: onnx_file.Graph) -> None:
        super().__init__(graph)
        self.said = Stated()
        self.told: list[str] = []
        self.leaves: Leaves = {}
        self.norms: dict[str, Norm] = {}
        self.preactivation = False
        # Of ours, the header says how many stages there are.
        self.fewest = 1 if HEADER_KEY in graph.metadata else 4

    def notes(self) -> list[str]:
        """What the graph has in another form than we."""
        kinds = Counter(norm.kind for norm in self.norms.values())
        rest = "here they have mean 0 and variance 1, and no statistics of images"
        texts = {
            f"BatchNorms are folded into convolutions: {rest}": kinds["bias"],
            f"BatchNorms are folded into factors and summands: {rest}": kinds["affine"],
            "biases of convolutions were folded into running means": self.shifted,
        }
        return [*(f"{count} {text}" for text, count in texts.items() if count), *self.told]

    def read(self) -> Leaves:
        """Reads the whole graph; returns its leaves by path.

        Raises:
            ValueError: the first node that does not fit.
        """
        if len(self.inputs) != 1:
            raise ValueError(
                "an ONNX model must be a network on one tensor of images, got "
                f"{len(self.inputs)} inputs that are used"
            )
        ((name, shape),) = self.inputs.items()
        sides = (shape[1:3] if self.last[name] else shape[2:4]) if len(shape) == 4 else ()
        size = sides[0] if sides and isinstance(sides[0], int) and sides[0] == sides[1] else None
        first, x = self._image(name)
        last, x, fields = self._stem(first, x)
        blocks: list[_Block] = []
        # The sum of a pre-activation block has no activation behind it.
        found = self._preactivated if self.preactivation else self._residual
        while (block := found(x, last)) is not None:
            blocks.append(block)
            last, x = block.layers[-1], block.join.output
            x = x if self.preactivation else self.one(x, block.join, "Relu").output
        if self.preactivation:
            norm, x = self.norm(x, last.kernel.shape[3], last.node)
            self.norms["layer4/bn1"] = norm
            x = self.one(x, last.node, "Relu").output
        fields |= self._named(blocks, last.node)
        no_head = self._head(x, last.node, size)
        fields["epsilon"] = self._normalized()
        self.said = dataclasses.replace(
            self.said, fields={**fields, **self.said.fields}, size=size, no_head=no_head
        )
        return self.leaves

    # ---- input and stem -------------------------------------------------------------------------

    def _image(self, x: str) -> tuple[Node, str]:
        """Reads a normalization and an adapter; returns the stem's first node and its input."""
        convolutions = [n for nodes in self.used.values() for n in nodes if n.kind == "Conv"]
        if not convolutions:
            raise ValueError("an ONNX model must be a ResNet, but it has no convolution")
        bands = int(self.constant(convolutions[0], 1).shape[1])
        nodes = self.users(x)
        if nodes[0].kind in ("Add", "Sub", "Mul", "Div", "BatchNormalization"):
            norm, x = self.norm(x, bands, nodes[0])
            self._normalizes(nodes[0], norm)
            nodes = self.users(x)
        if {node.kind for node in nodes} == {"Conv", "Clip"}:
            end = self._curves(*sorted(nodes, key=lambda node: node.kind))
            return self.one(end.output, end), end.output
        if len(nodes) != 1:
            raise unfit(convolutions[0], "must be the only node that takes the images")
        (node,) = nodes
        if node.kind == "Conv" and self.optional(node, 2) is None:
            following = self.users(node.output)
            kernel = self.constant(node, 1)
            if len(following) == 1 and following[0].kind == "Conv" and kernel.shape[2:] == (1, 1):
                self.leaves["adapter/kernel"] = self.convolution(node)[0]
                return following[0], node.output
        return node, x

    def _normalizes(self, node: Node, norm: Norm) -> None:
        """Keeps a normalization of the graph itself, for pixels from 0 to 1."""
        scale, bias = (norm.leaves[name].astype(np.float64) for name in ("scale", "bias"))
        mean = np.zeros(len(bias))
        if norm.epsilon is not None:
            mean = norm.leaves["mean"].astype(np.float64)
            scale = scale / np.sqrt(norm.leaves["var"].astype(np.float64) + norm.epsilon)
        if norm.kind == "group" or not (scale > 0).all():
            raise unfit(node, "must normalize the images by positive factors")
        numbers = np.stack([mean - bias / scale, 1 / scale])
        # Pixels from 0 to 255 have a mean or a deviation above 1.
        most = 255 if np.abs(numbers).max() > 1 + 1e-6 else 1
        means, deviations = ([float(f"{value:.7g}") for value in row] for row in numbers / most)
        self.said = dataclasses.replace(self.said, mean=means, std=deviations)
        self.told.append(
            f"the graph normalizes pixels from 0 to {most}: that is preprocessing here"
        )

    def _curves(self, clip: Node, linear: Node) -> Node:
        """Reads an adapter with tone curves, as ``exports.onnx`` writes it; returns its end."""
        low, high = self.number(clip, 1), self.number(clip, 2)
        inside = self.one(clip.output, clip, "Sub")
        position = self.one(inside.output, inside, "Mul")
        tops: list[Node] = []
        for hat in self.users(position.output):
            away = self.one(hat.output, hat, "Abs")
            top = self.one(away.output, away, "Sub")
            if self.number(hat, 1) != len(tops) or self.number(top, 0) != 1:
                raise unfit(hat, "must be a hat of a tone curve")
            tops.append(self.one(top.output, top, "Relu"))
        joined = self.one(tops[0].output, tops[0], "Concat")
        bend = self.one(joined.output, joined, "Conv")
        end = self.one(bend.output, bend, "Add")
        steps = self.number(position, 1) * (high - low)
        if (
            self.one(linear.output, linear) is not end
            or [self.base(name) for name in joined.inputs] != [top.output for top in tops]
            or not np.isclose(steps, len(tops) - 1, rtol=1e-4)
            or self.number(inside, 1) != low
        ):
            raise unfit(bend, "must sum the hats of tone curves")
        bends = self.convolution(bend)[0][0, 0]
        curves = bends.reshape(len(tops), -1, bends.shape[1]).transpose(1, 0, 2)
        self.leaves["adapter/kernel"] = self.convolution(linear)[0]
        self.leaves["adapter/curves"] = curves
        span = [float(str(np.float32(number))) for number in (low, high)]
        adapter = {"bands": len(curves), "kind": "curves", "knots": len(tops), "span": span}
        self.said = dataclasses.replace(self.said, fields={"adapter": adapter})
        return end

    def _stem(self, node: Node, x: str) -> tuple[Layer, str, dict[str, Any]]:
        """Reads the stem; returns its last layer, its output, and fields that no leaf shows."""
        if node.kind not in ("Conv", "Pad"):
            raise unfit(node, "stands where the stem's convolution must be")
        layer, x = self.layer(node)
        places = [(layer, "conv1", "bn1")]
        if layer.kernel.shape[0] == 3:
            places = [(layer, "conv1/0", "conv1/bn1")]
            for path, norm in (("conv1/3", "conv1/bn4"), ("conv1/6", "bn1")):
                relu = self.one(x, layer.node, "Relu")
                layer, x = self.layer(self.one(relu.output, relu))
                places.append((layer, path, norm))
        node = self.one(x, layer.node)
        self.preactivation = node.kind != "Relu"
        for number, (each, path, norm) in enumerate(places):
            each.check(7 if len(places) == 1 else 3, 2 if number == 0 else 1)
            self.leaves[f"{path}/kernel"] = each.kernel
            if each is not layer or not self.preactivation:
                self.norms[norm] = each.norm
            elif (bias := _bias(each)).any():
                self.leaves[f"{path}/bias"] = bias.astype(np.float32)
        if not self.preactivation:
            x, node = node.output, self.one(node.output, node)
        fields: dict[str, Any] = {
            "anti_alias": None,
            "stem_pool": "max",
            "standardized": None,
            "stride_in": "3x3",
            "stride_at": "first",
        }
        return layer, self._stem_pool(node, fields), fields

    def _stem_pool(self, node: Node, fields: dict[str, Any]) -> str:
        if node.kind == "Conv":
            layer, x = self.layer(node)
            layer.check(3, 2)
            fields["stem_pool"] = "convolution"
            self.leaves["maxpool/0/kernel"] = layer.kernel
            self.norms["maxpool/bn1"] = layer.norm
            return self.one(x, node, "Relu").output
        if node.kind == "AveragePool":
            fields["anti_alias"], x = self.lowering(node)
            return x
        padded: tuple[int, ...] = (0,) * 4
        before = node
        if node.kind == "Pad":
            padded, mode = self.padding(node)
            node = self.one(node.output, node, "MaxPool")
            # After an activation, 0 is as low as what pooling itself pads with, and pixels of the
            # edge are in the window anyway.
            if mode == "constant" and self.preactivation:
                fields["stem_pool"] = "zero-padded"
            elif mode not in ("constant", "edge") or (mode == "edge" and max(padded) > 1):
                raise unfit(before, "must pad with 0 before the stem's pooling")
        if node.kind != "MaxPool":
            raise unfit(node, "stands where the stem's pooling must be")
        stride, sides, pads = self.window(node, padded)
        if node.attributes.get("ceil_mode", 0) and set(pads) == {0}:
            pads = _CEIL
        usual = set(pads) == {1} and not node.attributes.get("ceil_mode", 0)
        ceil = pads == _CEIL and stride == 2 and fields["stem_pool"] == "max"
        if tuple(sides) != (3, 3) or not (usual or ceil) or stride not in (1, 2):
            shown = f"{'x'.join(map(str, sides))} padded by {list(pads)}"
            raise unfit(node, f"must pool 3x3 pixels, padded by 1 on all sides, got {shown}")
        if ceil:
            fields["stem_pool"] = "ceil"
        if stride == 2:
            return node.output
        fields["anti_alias"], x = self.lowering(self.one(node.output, node))
        return x

    # ---- residual blocks ------------------------------------------------------------------------

    def _joins(self, node: Node) -> bool:
        return node.kind == "Add" and self.by_channel(node) is None

    def _residual(self, x: str, last: Layer) -> _Block | None:
        """Reads a block whose activations follow the norms; None if none starts at a tensor."""
        nodes = self.users(x)
        if len(nodes) < 2:
            return None
        starts = [node for node in nodes if not self._joins(node)]
        if len(nodes) > 2 or not starts:
            raise unfit(nodes[-1], "is part of a residual block in another way than ResNets have")
        return self._joined(x, starts)

    def _preactivated(self, x: str, last: Layer) -> _Block | None:
        """Reads a block that starts with a norm and an activation; None if none starts there."""
        nodes = self.users(x)
        around = [node for node in nodes if self._joins(node) or node.kind == "MaxPool"]
        first = [node for node in nodes if node not in around]
        if len(first) != 1 or len(around) > 1:
            raise unfit(last.node, f"is followed by {kinds_of(nodes)} where a block must start")
        before, y = self.norm(x, last.kernel.shape[3], last.node, first=first[0])
        relu = self.one(y, first[0], "Relu")
        starts = self.users(relu.output)
        if not around and len(starts) < 2:
            return None
        if len(starts) + len(around) != 2:
            raise unfit(relu, f"is followed by {kinds_of(starts)} where a block must start")
        skipped = 1
        if around and around[0].kind == "MaxPool":
            (pool,) = around
            skipped, sides, pads = self.window(pool)
            if set(sides) != {1} or set(pads) != {0}:
                raise unfit(pool, "must leave out rows and columns, without a window")
            x = pool.output
        block = self._joined(x if around else relu.output, starts)
        block.before, block.skipped = before, skipped
        return block

    def _joined(self, x: str, starts: list[Node]) -> _Block:
        """Reads the ways from a tensor to the sum that ends a block."""
        ways = sorted(map(self._way, starts), key=lambda way: -len(way[0]))
        layers, lowered, attention, end = ways[0]
        shortcut, pooled, other = None, False, x
        if len(ways) > 1:
            short, low, gate, other = ways[1]
            if len(short) != 1 or gate or low not in ({}, {0: "average"}) or short[0].activated:
                raise unfit(short[0].node, "must be the only convolution of a shortcut")
            shortcut, pooled = short[0], bool(low)
        join = self.one(end, layers[-1].node, "Add")
        activated = [layer.activated for layer in layers]
        if {self.base(name) for name in join.inputs} != {end, other}:
            raise unfit(join, "must add a block and its shortcut")
        if len(layers) not in (2, 3) or activated != [True] * (len(layers) - 1) + [False]:
            raise unfit(join, f"must end a block of 2 or 3 convolutions, got {len(layers)}")
        return _Block(join, layers, shortcut, pooled, lowered, attention)

    def _way(self, node: Node) -> tuple[list[Layer], dict[int, str], Leaves, str]:
        """Layers, poolings by the number of layers before them, attention and end of one way."""
        layers: list[Layer] = []
        lowered: dict[int, str] = {}
        while True:
            reflected = node.kind == "Pad" and self.padding(node)[1] != "constant"
            if node.kind == "AveragePool" or reflected:
                lowered[len(layers)], x = self.lowering(node)
                node = self.one(x, node)
            if node.kind not in ("Conv", "Pad"):
                raise unfit(node, "stands where a residual block has a convolution")
            layer, x = self.layer(node)
            layers.append(layer)
            attention, x = self.attention(x)
            node = self.one(x, layer.node)
            if self._joins(node):
                return layers, lowered, attention, x
            if node.kind != "Relu" or attention:
                raise unfit(node, "stands where a Relu or the sum of a block must be")
            layer.activated = True
            node = self.one(node.output, node)

    # ---- names ----------------------------------------------------------------------------------

    def _named(self, blocks: list[_Block], last: Node) -> dict[str, Any]:
        """Names the leaves of the blocks; returns the fields that strides and poolings show."""
        if not blocks:
            raise unfit(last, "is followed by no residual block")
        outputs = [block.layers[-1].kernel.shape[3] for block in blocks]
        stages: list[list[_Block]] = []
        for number, block in enumerate(blocks):
            if number == 0 or outputs[number] != outputs[number - 1]:
                stages.append([])
            stages[-1].append(block)
        if not self.fewest <= len(stages) <= 4:
            counts = ", ".join(map(str, list(dict.fromkeys(outputs))[:8]))
            raise ValueError(
                f"an ONNX model must be a ResNet of 4 stages, got {len(stages)} with {counts} "
                "channels"
            )
        fields: dict[str, Any] = {}
        at_last = stages[0][-1].stride()[0] == 2
        if at_last:
            fields["stride_at"] = "last"
        deep = len(blocks[0].layers) == 3
        if deep and not self.preactivation and any(block.stride()[1] == 0 for block in blocks):
            fields["stride_in"] = "1x1"
        if kinds := [kind for block in blocks for kind in block.lowered.values()]:
            fields["anti_alias"] = kinds[0]
        pooled = any(block.pooled for block in blocks)
        added = np.zeros(())
        for stage, members in enumerate(stages, 1):
            lowers = len(members) - 1 if at_last else 0
            for index, block in enumerate(members):
                here = index == lowers and (stage < 4 if at_last else stage > 1)
                self._check(block, 2 if here else 1, fields, pooled)
                added = self._name(f"layer{stage}/{index}", block, pooled, added)
        if self.preactivation:
            self._shift("layer4/bn1", added)
        if all(_centered(layer.kernel) for block in blocks for layer in block.layers):
            self.told.append(
                "filters are standardized in the file: training here does not standardize again"
            )
        return fields

    def _check(self, block: _Block, stride: int, fields: Mapping[str, Any], pooled: bool) -> None:
        """Refuses strides, sizes and groups that no block of ours has."""
        deep = len(block.layers) == 3
        strided = int(deep and fields.get("stride_in") != "1x1")
        kind = fields.get("anti_alias") if stride == 2 else None
        for number, layer in enumerate(block.layers):
            own = stride if number == strided and kind is None else 1
            middle = deep and number == 1
            layer.check(3 if middle or not deep else 1, own, None if middle else 1)
        if block.lowered != ({} if kind is None else {strided + 1: kind}):
            raise unfit(block.join, f"must end a block with {kind or 'no'} anti-aliasing")
        short = block.shortcut
        if short is None:
            if block.skipped != stride:
                raise unfit(block.join, f"must add a shortcut with stride {stride}")
            return
        if block.pooled != (pooled and stride == 2):
            raise unfit(short.node, "must follow an average of 2x2 pixels, as other shortcuts do")
        wide = short.kernel.shape[0] == 3 and stride == 2
        short.check(3 if wide else 1, 1 if block.pooled else stride)

    def _name(self, path: str, block: _Block, pooled: bool, added: np.ndarray) -> np.ndarray:
        """Names the leaves of a block.

        Args:
            path: of the block.
            block: what was read.
            pooled: whether shortcuts are numbered as behind an average.
            added: what biases add to the input of a pre-activation block. Our blocks have no such
                biases: they are folded into the norms that follow.

        Returns:
            The same for its output.
        """
        if block.before is not None:
            self.norms[f"{path}/bn1"] = block.before
            self._shift(f"{path}/bn1", added)
        for number, layer in enumerate(block.layers, 1):
            self.leaves[f"{path}/conv{number}/kernel"] = layer.kernel
            if not self.preactivation:
                self.norms[f"{path}/bn{number}"] = layer.norm
            elif layer.activated:
                self.norms[f"{path}/bn{number + 1}"] = layer.norm
        short, number = block.shortcut, int(pooled)
        if short is not None:
            self.leaves[f"{path}/downsample/{number}/kernel"] = short.kernel
            if not self.preactivation:
                self.norms[f"{path}/downsample/{number + 1}"] = short.norm
        self.leaves |= {f"{path}/{leaf}": array for leaf, array in block.attention.items()}
        if not self.preactivation:
            return added
        total: np.ndarray = _bias(block.layers[-1])
        total = total + (added if short is None else _bias(short))
        return total

    def _shift(self, path: str, added: np.ndarray) -> None:
        """Folds what biases have added to the input of a norm into it."""
        if not added.any():
            return
        norm = self.norms[path]
        if norm.kind == "group":
            raise ValueError("an ONNX model must have no biases in front of GroupNorms")
        if norm.kind == "batch":
            norm.leaves["mean"] = norm.leaves["mean"] - added
        else:
            norm.leaves["bias"] = norm.leaves["bias"] + norm.leaves["scale"] * added
        self.shifted += 1

    def _normalized(self) -> float:
        """Adds the leaves of all norms; returns their epsilon."""
        known = Counter(norm.epsilon for norm in self.norms.values() if norm.epsilon is not None)
        epsilon = known.most_common(1)[0][0] if known else 1e-5
        for path, norm in self.norms.items():
            leaves = dict(norm.leaves)
            if norm.kind == "group":
                path = re.sub(r"(?:bn|(downsample/))(\d)$", r"\1gn\2", path)
            if norm.epsilon is None:
                size = len(leaves["scale"])
                leaves |= {"mean": np.zeros(size), "var": np.full(size, 1 - epsilon)}
            elif norm.epsilon != epsilon:
                if norm.kind == "group":
                    raise ValueError("the GroupNorms of an ONNX model must have one epsilon")
                # A BatchNorm only depends on the sum.
                leaves["var"] = leaves["var"].astype(np.float64) + (norm.epsilon - epsilon)
            for name, array in leaves.items():
                # What was computed here is float64.
                kept = array if norm.kind == "batch" and array is norm.leaves.get(name) else None
                self.leaves[f"{path}/{name}"] = array.astype(np.float32) if kept is None else kept
        return epsilon

    # ---- head -----------------------------------------------------------------------------------

    def _head(self, x: str, last: Node, size: int | None) -> str:
        """Reads pooling and head; returns why the head is left out, if it is."""
        if not self.users(x):
            return ""
        pool = self.one(x, last)
        if not self.averages(pool, size):
            raise unfit(pool, "stands where the average over all pixels must be")
        rest = self._rest(pool.output)
        if rest and rest[0].kind in ("Conv", "Gemm", "MatMul"):
            matrix, bias, x = self.dense(rest[0])
            behind = self._rest(x)
            if [node.kind for node in behind] in ([], *([kind] for kind in _OUTPUTS)):
                self.leaves |= {"fc/kernel": matrix, "fc/bias": bias}
                self.told += [f"the {node.kind} at the end is left out" for node in behind]
                return ""
        kinds = visible(shortened(", ".join(node.kind for node in rest), 100))
        return f"the head is not one linear map, but {kinds}" if rest else ""

    def _rest(self, x: str) -> list[Node]:
        """The nodes that compute, from a tensor to the end of the graph."""
        found: dict[int, Node] = {}
        waiting, seen = [x], {x}
        while waiting:
            for node in self.users(waiting.pop()):
                found |= {} if node.kind in SHAPES else {id(node): node}
                waiting += [name for name in node.outputs if name not in seen]
                seen |= set(node.outputs)
        return list(found.values())


def _bias(layer: Layer) -> np.ndarray:
    """The bias of a convolution that neither a norm nor an activation follows."""
    if layer.norm.kind != "bias":
        raise unfit(layer.node, "must not be followed by a norm")
    return layer.norm.leaves["bias"]


def _centered(kernel: np.ndarray) -> bool:
    """Whether every filter has mean 0 and variance 1."""
    filters = kernel.reshape(-1, kernel.shape[3]).astype(np.float64)
    return bool(
        (np.abs(filters.mean(0)) < 1e-4).all() and (np.abs(filters.var(0) - 1) < 1e-2).all()
    )
