"""One training step of a ResNet in JAX, timed: with our convolution, or with `lax.conv` alone."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from turns import Facts, serve

from flaxtransfer import resnet
from flaxtransfer.models import conv, lax_conv


def prepare(job: Facts) -> tuple[Facts, Any]:
    """Compiles the step and warms it up."""
    cpu = jax.default_backend() == "cpu"
    model = resnet(
        job["model"],
        dtype=None if cpu else jnp.bfloat16,
        convolution={"ours": conv, "lax": lax_conv}[job["contestant"]],
    )
    draw = np.random.default_rng(0)
    shape = (job["batch_size"], job["image_size"], job["image_size"], 3)
    images = jnp.asarray(draw.standard_normal(shape, np.float32))
    labels = jnp.asarray(draw.integers(0, model.config.classes, shape[0]))
    sgd = optax.sgd(1e-3, momentum=0.9)

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, jax.Array]:
        params, batch_stats, moments = state

        def objective(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updated = model.apply(variables, images, norm="batch")
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated

        (loss, updated), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        updates, moments = sgd.update(gradient, moments)
        return (optax.apply_updates(params, updates), updated, moments), loss

    variables = model.init(jax.random.key(0), shape[1:])
    state = (variables["params"], variables["batch_stats"], sgd.init(variables["params"]))
    if job["inference"]:
        step = jax.jit(
            lambda state, images, labels: (
                state,
                model.apply({"params": state[0], "batch_stats": state[1]}, images)[0].mean(),
            ),
            donate_argnums=0,
        )
    start = time.perf_counter()
    compiled = step.lower(state, images, labels).compile()
    compile_seconds = time.perf_counter() - start
    steps = job["steps"] or (1 if cpu else 20)

    def turn() -> Facts:
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state, loss = compiled(state, images, labels)
        jax.block_until_ready((state, loss))
        seconds = (time.perf_counter() - start) / steps
        return {"seconds": seconds, "loss": float(loss), "peak_bytes": _peak_bytes(compiled)}

    for _ in range(2):
        turn()
    facts = {
        "device": jax.devices()[0].device_kind,
        "versions": f"jax {jax.__version__}",
        "dtype": "float32" if cpu else "bfloat16",
        "compile_seconds": compile_seconds,
        "flops": (1 if job["inference"] else 3) * _forward_flops(job["model"], shape),
    }
    return facts, turn


def _peak_bytes(compiled: Any) -> int:
    statistics = jax.devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def _forward_flops(name: str, shape: tuple[int, ...]) -> int:
    """Two for every multiplication in a convolution or the head; the rest does not count.

    The backward pass has two products of the same size for each of these.
    """
    model = resnet(name, convolution=lax_conv)
    program = jax.make_jaxpr(model.apply)(
        model.abstract(), jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    total = 0
    for equation in program.eqns:
        out = equation.outvars[0].aval
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            total += 2 * out.size * int(np.prod(kernel[:3]))
        elif equation.primitive.name == "dot_general":
            total += 2 * out.size * equation.invars[1].aval.shape[0]
    return total


if __name__ == "__main__":
    serve(prepare)
