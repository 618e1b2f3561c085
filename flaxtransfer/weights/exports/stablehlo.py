"""Export to StableHLO, which ``jax.export`` reads without this package.

The artifact cannot hold metadata, so a JSON file next to it describes its input and outputs.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from flaxtransfer.models.convolution import lax_conv
from flaxtransfer.models.registry import resnet
from flaxtransfer.weights.exports.prepare import export_metadata
from flaxtransfer.weights.pretrained import Pretrained

__all__ = ["PLATFORMS", "artifact", "logits", "metadata"]


PLATFORMS = ("cpu", "cuda", "tpu")


def artifact(checkpoint: Pretrained) -> bytes:
    """The serialized function from images ``[batch, size, size, bands]`` to logits, weights inside.

    The batch size is free; height and width are those of the preprocessing.
    """
    # `conv` is tuned for the current CPU; the artifact runs on any platform.
    model = resnet(checkpoint.config, convolution=lax_conv)
    variables = jax.tree.map(jnp.asarray, checkpoint.variables)

    def network(images: jax.Array) -> jax.Array:
        return model.apply(variables, images)[0]

    (batch,) = export.symbolic_shape("batch")
    size = checkpoint.preprocessing.size
    images = jax.ShapeDtypeStruct((batch, size, size, checkpoint.config.bands), jnp.float32)  # type: ignore[no-untyped-call]
    return bytes(export.export(jax.jit(network), platforms=PLATFORMS)(images).serialize())


def metadata(checkpoint: Pretrained) -> bytes:
    """The JSON file next to the artifact."""
    size = checkpoint.preprocessing.size
    content = {
        **export_metadata(checkpoint, f"[batch, {size}, {size}, bands]"),
        "preprocessing": checkpoint.preprocessing.to_json(),
        "class_names": checkpoint.class_names,
        "config": checkpoint.config.to_json(),
        "platforms": PLATFORMS,
        "jax": jax.__version__,
        "use": "jax.export.deserialize(bytearray(open(path, 'rb').read())).call(images)",
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def logits(data: bytes, images: np.ndarray) -> np.ndarray:
    """Runs the artifact."""
    return np.asarray(export.deserialize(bytearray(data)).call(images))  # type: ignore[no-untyped-call]
