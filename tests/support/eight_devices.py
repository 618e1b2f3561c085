"""Loss, gradients and BatchNorm statistics on one device and on eight; run in its own process.

On eight also with the convolutions of processors without AVX-512, where each device takes its own
images: none may be fetched from another. Prints the largest differences, relative to the largest
value of each array.
"""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flaxtransfer.models import ResNetConfig, layers
from flaxtransfer.models.registry import resnet


def main():
    jax.config.update("jax_enable_x64", True)
    # The last stage reads a 2 x 2 map: the convolution by taps is among what is run.
    assert layers.by_taps((32, 2, 2, 128), (3, 3, 128, 128), (2, 2), ((1, 1), (1, 1)), 1)
    model = resnet(ResNetConfig("bottleneck", (1, 1, 1, 1), width=16, classes=5))
    variables = jax.tree.map(lambda leaf: leaf.astype("float64"), model.init(jax.random.key(0)))
    draw = np.random.default_rng(0)
    images = draw.standard_normal((32, 32, 32, 3))
    labels = draw.integers(0, 5, 32)

    @partial(jax.jit, static_argnums=0)
    def run(model, variables, images, labels):
        def loss(params):
            logits, updated = model.apply({**variables, "params": params}, images, norm="batch")
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
            return -chosen.mean(), updated

        (value, updated), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return {"loss": value, "gradients": gradients, "batch_stats": updated}

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    batch, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    one = run(model, variables, images, labels)
    divided = (
        jax.device_put(variables, everywhere),
        jax.device_put(images, batch),
        jax.device_put(labels, batch),
    )
    eight = run(model, *divided)
    assert len(eight["loss"].sharding.device_set) == 8
    layers._LARGE, layers.has_wide_registers = 1, lambda: False
    jax.clear_caches()
    lowered = run.lower(model.on(mesh), *divided)
    assert "stablehlo.while" in lowered.as_text(), "no convolution is a sum over rows"
    rows = lowered.compile()
    messages = set(re.findall(r"(all-\w+|collective-\w+|reduce-scatter)", rows.as_text()))
    assert messages == {"all-reduce"}, f"images go from one device to another: {messages}"
    differences = [
        {
            name: max(map(difference, *map(jax.tree.leaves, (one[name], found[name]))))
            for name in one
        }
        for found in (eight, rows(*divided))
    ]
    print(json.dumps({name: max(each[name] for each in differences) for name in one}))


def difference(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-300))


if __name__ == "__main__":
    main()
