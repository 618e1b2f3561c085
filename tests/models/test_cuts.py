"""A network cut in two is the whole, and its parts ask for their own leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxtransfer.models.registry import resnet
from tests.support.small_resnet import SMALL, SMALL_BOTTLENECK, noise


class TestCuts:
    @pytest.mark.parametrize("cut", resnet(SMALL).segments)
    @pytest.mark.parametrize("norm", ["running", "batch"])
    def test_two_parts_are_the_whole(self, small, cut, norm):
        model, variables = small
        images = noise(4, 16, 16, 3)
        whole, statistics = model.apply(variables, images, norm=norm)
        middle, first = model.apply(variables, images, norm=norm, stop=cut)
        variables = {**variables, "batch_stats": first}
        logits, second = model.apply(variables, middle, norm=norm, start=cut)
        np.testing.assert_allclose(logits, whole, rtol=1e-6, atol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, second, statistics)

    def test_a_head_that_reads_several_depths_reads_their_means(self, small):
        """By definition: means of the maps that the cuts give, one after the other."""
        model, variables = small
        several = resnet(model.config.ending_at(["layer3", "stem", "layer2"]))
        assert several.config.head_reads == ("stem", "layer2")
        assert several.segments[-3:] == ("layer3", "pool", "head")
        assert several.abstract()["params"]["fc"]["kernel"].shape == (16 + 32 + 64, 3)
        images = noise(4, 16, 16, 3)
        body = {k: {n: t for n, t in v.items() if n not in ("fc", "layer4")}
                for k, v in variables.items()}  # fmt: skip
        means = [
            model.apply(variables, images, stop=following)[0].mean((1, 2))
            for following in ("layer1", "layer3", "layer4")
        ]
        features, _ = several.apply(body, images, stop="head")
        np.testing.assert_allclose(features, np.concatenate(means, axis=1), rtol=1e-5, atol=1e-6)
        stem, _ = several.apply(body, images, stop="stem")
        np.testing.assert_array_equal(
            several.apply(body, stem, start="stem", stop="head")[0], features
        )
        late, _ = several.apply(body, images, stop="layer1")
        with pytest.raises(ValueError, match="start must be at most stem, or 'head', for a net"):
            several.apply(body, late, start="layer1", stop="head")

    @pytest.mark.parametrize("reads", [("layer4",), ("layer2", "stem"), ("stem", "stem"), "stem"])
    def test_what_a_head_cannot_read_beside_the_last(self, reads):
        with pytest.raises(ValueError, match="head_reads must be some of stem, layer1, layer2, la"):
            dataclasses.replace(SMALL, head_reads=reads)

    @pytest.mark.parametrize(
        ("stop", "shape"),
        # 40 x 24 px: the stem divides by 4, each later stage by 2, rounding up.
        [
            ("stem", (2, 40, 24, 3)),
            ("layer1", (2, 10, 6, 16)),
            ("layer2", (2, 10, 6, 64)),
            ("layer3", (2, 5, 3, 128)),
            ("layer4", (2, 3, 2, 256)),
            ("pool", (2, 2, 1, 512)),
            ("head", (2, 512)),
            (None, (2, 3)),
        ],
    )
    def test_shapes_at_every_cut(self, stop, shape):
        model = resnet(SMALL_BOTTLENECK)
        images = jax.ShapeDtypeStruct((2, 40, 24, 3), jnp.float32)
        y, _ = jax.eval_shape(lambda v, x: model.apply(v, x, stop=stop), model.abstract(), images)
        assert y.shape == shape

    def test_segments_that_do_not_run_may_be_absent(self, small):
        model, variables = small
        prefix = {
            name: {key: tree[key] for key in tree if key in ("conv1", "bn1", "layer1")}
            for name, tree in variables.items()
        }
        images = noise(4, 16, 16, 3)
        found, _ = model.apply(prefix, images, stop="layer2")
        np.testing.assert_array_equal(found, model.apply(variables, images, stop="layer2")[0])
        with pytest.raises(ValueError, match=r"params lacks fc/bias, .*layer2/0/.* more"):
            model.apply(prefix, images)
