"""Loss, gradients and BatchNorm statistics on one device and on eight; run in its own process.

Prints the largest differences, relative to the largest value of each array.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flaxtransfer.models import ResNetConfig
from flaxtransfer.models.layers import by_taps
from flaxtransfer.models.registry import resnet


def main():
    jax.config.update("jax_enable_x64", True)
    # The last stage reads a 2 x 2 map: the convolution by taps is among what is run.
    assert by_taps((16, 2, 2, 128), (3, 3, 128, 128), (2, 2), ((1, 1), (1, 1)), 1)
    model = resnet(ResNetConfig("bottleneck", (1, 1, 1, 1), width=16, classes=5))
    variables = jax.tree.map(lambda leaf: leaf.astype("float64"), model.init(jax.random.key(0)))
    draw = np.random.default_rng(0)
    images = draw.standard_normal((16, 32, 32, 3))
    labels = draw.integers(0, 5, 16)

    @jax.jit
    def run(variables, images, labels):
        def loss(params):
            logits, updated = model.apply({**variables, "params": params}, images, norm="batch")
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
            return -chosen.mean(), updated

        (value, updated), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return {"loss": value, "gradients": gradients, "batch_stats": updated}

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    batch, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    one = run(variables, images, labels)
    eight = run(
        jax.device_put(variables, everywhere),
        jax.device_put(images, batch),
        jax.device_put(labels, batch),
    )
    assert len(eight["loss"].sharding.device_set) == 8
    pairs = {
        name: zip(*map(jax.tree.leaves, (one[name], eight[name])), strict=True) for name in one
    }
    print(json.dumps({name: max(difference(a, b) for a, b in pairs[name]) for name in pairs}))


def difference(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-300))


if __name__ == "__main__":
    main()
