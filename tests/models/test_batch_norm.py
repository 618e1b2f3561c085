"""BatchNorm in a ResNet: which statistics normalize, and which are updated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxtransfer.models import lax_conv
from flaxtransfer.models.registry import resnet
from flaxtransfer.paths import flatten
from tests.support.small_resnet import SMALL, noise


class TestBatchNorm:
    images = noise(4, 16, 16, 3)

    def test_running_statistics_are_the_very_same_arrays(self, small):
        model, variables = small
        _, kept = model.apply(variables, self.images, stop="layer2")
        assert kept is variables["batch_stats"]
        _, kept = model.apply(variables, self.images, norm=frozenset(), stop="layer2")
        assert all(
            a is b
            for a, b in zip(
                jax.tree.leaves(kept), jax.tree.leaves(variables["batch_stats"]), strict=True
            )
        )

    def test_the_policy_decides_for_each_one(self, small):
        model, variables = small
        norm = frozenset({"bn1", "layer2/0/downsample/1"})
        _, updated = model.apply(variables, self.images, norm=norm, stop="layer3")
        before = flatten(variables["batch_stats"])
        for path, leaf in flatten(updated).items():
            moved = path.rpartition("/")[0] in norm
            assert (leaf is before[path]) != moved
            assert bool((leaf == before[path]).all()) != moved

    def test_batch_statistics_follow_the_rule(self, small):
        """It is 0.9 old + 0.1 batch, with the biased variance, by numpy from the convolution."""
        model, variables = small
        variables = jax.tree.map(lambda leaf: leaf, variables)
        variables["batch_stats"]["bn1"] = {"mean": jnp.arange(16.0), "var": 2 + jnp.arange(16.0)}
        kernel = variables["params"]["conv1"]["kernel"]
        x = lax_conv(self.images, kernel, strides=(2, 2), padding=((3, 3), (3, 3)))
        x = np.asarray(x, np.float64)
        _, updated = model.apply(variables, self.images, norm="batch", stop="layer1")
        found = updated["bn1"]
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        np.testing.assert_allclose(found["mean"], 0.9 * np.arange(16) + 0.1 * mean, rtol=1e-5)
        np.testing.assert_allclose(found["var"], 0.9 * (2 + np.arange(16)) + 0.1 * var, rtol=1e-5)

    def test_the_output_is_normalized_by_the_right_statistics(self, small):
        """Both modes by numpy, through the stem: normalize, ReLU, largest of 3 x 3."""
        model, variables = small
        variables = jax.tree.map(lambda leaf: leaf, variables)
        variables["params"]["bn1"] = {"scale": 1 + noise(16) ** 2, "bias": noise(16)}
        variables["batch_stats"]["bn1"] = {"mean": noise(16), "var": 1 + noise(16) ** 2}
        kernel, bn = variables["params"]["conv1"]["kernel"], variables["params"]["bn1"]
        x = lax_conv(self.images, kernel, strides=(2, 2), padding=((3, 3), (3, 3)))
        x = np.asarray(x, np.float64)
        running = variables["batch_stats"]["bn1"]
        batch = {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))}
        for norm, by in (("running", running), ("batch", batch)):
            y = (x - by["mean"]) / np.sqrt(by["var"] + 1e-5) * bn["scale"] + bn["bias"]
            y = np.pad(np.maximum(y, 0), ((0, 0), (1, 1), (1, 1), (0, 0)))
            wanted = np.max(
                [y[:, i : i + 8 : 2, j : j + 8 : 2] for i in range(3) for j in range(3)], axis=0
            )
            found, _ = model.apply(variables, self.images, norm=norm, stop="layer1")
            np.testing.assert_allclose(found, wanted, atol=2e-5)

    def test_the_variance_of_a_large_mean_survives(self):
        """A mean 3000 times the deviation: the fast formula keeps no digit of it in float32."""
        model = resnet(SMALL)
        variables = model.init(jax.random.key(0))
        kernel = jnp.zeros((7, 7, 3, 16)).at[3, 3, 0].set(1.0)
        variables["params"]["conv1"]["kernel"] = kernel
        images = 3000 + noise(4, 16, 16, 3)
        _, updated = model.apply(variables, images, norm=frozenset({"bn1"}), stop="layer1")
        wanted = 0.9 + 0.1 * np.asarray(images, np.float64)[:, ::2, ::2, 0].var()
        np.testing.assert_allclose(updated["bn1"]["var"], wanted, rtol=1e-4)

    def test_one_value_in_a_channel_is_refused(self, small):
        model, variables = small
        with pytest.raises(ValueError, match=r"layer\d/0/.* at least 2 values .* larger images"):
            jax.eval_shape(lambda x: model.apply(variables, x, norm="batch"), noise(1, 16, 16, 3))
        jax.eval_shape(lambda x: model.apply(variables, x), noise(1, 1, 1, 3))
