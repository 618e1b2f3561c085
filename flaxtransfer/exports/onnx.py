"""One `.onnx` file: the graph, its weights, and what its input and outputs mean."""

from typing import Any

import numpy as np

from flaxtransfer.exports.onnx_graph import Graph, network
from flaxtransfer.exports.record import record
from flaxtransfer.paths import flatten
from flaxtransfer.weights import Checkpoint

__all__ = ["OPSET", "logits", "model_bytes"]

OPSET = 17
"""Read by onnxruntime since 1.12 (2022); later ones bring nothing that a ResNet needs."""
IR_VERSION = 8
LARGEST = 2_000_000_000
"""Bytes that one file of protocol buffers can have."""


def model_bytes(checkpoint: Checkpoint) -> bytes:
    """The file's content; batch, height and width are open.

    Raises:
        ImportError: onnx is not installed.
        ValueError: more than 2 GB of weights.
    """
    onnx = _onnx()
    config = checkpoint.config
    graph = Graph(flatten(checkpoint.variables), config, onnx.helper)
    output = network(graph, "images")
    size = sum(array.nbytes for array in graph.constants.values())
    if size > LARGEST:
        raise ValueError(
            f"{config.name} has {size:,} bytes of weights, and one .onnx file holds 2 GB"
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
    onnx.helper.set_model_props(proto, record(checkpoint, "[batch, bands, height, width]"))
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


def logits(data: bytes, images: np.ndarray) -> np.ndarray:
    """What the file computes for images `[batch, height, width, bands]`.

    onnxruntime does it where it is installed, and onnx's own evaluator elsewhere.
    """
    fed = {"images": np.ascontiguousarray(images.transpose(0, 3, 1, 2))}
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        outputs: Any = ReferenceEvaluator(_onnx().load_from_string(data)).run(None, fed)
        return outputs[0]
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(None, fed)[0]


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
