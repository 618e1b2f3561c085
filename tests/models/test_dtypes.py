"""Types of numbers: what is computed in half precision, and what never is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxtransfer.models.registry import resnet
from tests.support.small_resnet import SMALL, noise


class TestDtypes:
    @pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, np.dtype("bfloat16")])
    def test_one_dtype_has_one_spelling(self, dtype):
        assert resnet(SMALL, dtype=dtype) == resnet(SMALL, dtype=jnp.bfloat16)
        assert hash(resnet(SMALL, dtype=dtype)) == hash(resnet(SMALL, dtype="bfloat16"))

    def test_bfloat16_is_for_the_convolutions_only(self, small):
        model, variables = resnet(SMALL, dtype="bfloat16"), small[1]
        images = noise(8, 16, 16, 3)
        run = jax.jit(lambda model: model.apply(variables, images, norm="batch"), static_argnums=0)
        (logits, updated), (exact, statistics) = run(model), run(small[0])
        # bfloat16 has 8 significant bits; some ten layers on top of each other.
        assert 0 < abs(logits - exact).max() < 0.1 * abs(exact).max()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.02), updated, statistics)

        def loss(params, stop):
            output, updated = model.apply(
                {**variables, "params": params}, images, norm="batch", stop=stop
            )
            return output.sum().astype("float32"), (output, updated)

        for stop, dtype in (("layer1", "bfloat16"), ("pool", "bfloat16"), ("head", "float32")):
            gradients, (output, updated) = jax.eval_shape(
                jax.grad(lambda params, stop=stop: loss(params, stop), has_aux=True),
                variables["params"],
            )
            assert output.dtype == dtype
            kept = jax.tree.leaves((gradients, updated))
            assert {leaf.dtype for leaf in kept} == {jnp.dtype("float32")}

    def test_float64_parameters_compute_in_float64(self, small):
        with jax.enable_x64(True):
            variables = jax.tree.map(lambda leaf: leaf.astype("float64"), small[1])
            result = jax.eval_shape(
                lambda images: small[0].apply(variables, images, norm="batch"),
                jax.ShapeDtypeStruct((2, 16, 16, 3), "float64"),
            )
            assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype("float64")}

    def test_half_precision_features_may_enter_at_a_cut(self, small):
        model, variables = small
        features, _ = model.apply(variables, noise(4, 16, 16, 3), stop="head")
        logits, _ = model.apply(variables, features.astype("float16"), start="head")
        assert logits.dtype == jnp.float32
        wanted, _ = model.apply(variables, features, start="head")
        np.testing.assert_allclose(logits, wanted, rtol=5e-3, atol=5e-3)
