"""Saliency with known answers: the logit's decomposition, planted cues, harmonic filling.

The planted cue: a colored patch at a random place of a digit decides the class; chance of pointing
at it is about 6 %. Figures of the trial: exact CAM of a head on the stem points in 100 %.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifierCV

import flaxtransfer as ft
from flaxtransfer.analysis import (
    PooledHead,
    RandomizationTest,
    faithfulness,
    impute,
    logits_function,
    randomization_test,
    saliency_maps,
)
from flaxtransfer.features.inputs import segment_features
from flaxtransfer.models.layers import conv

SIZE, PATCH = 48, 8
SMALL = ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=4, classes=5)
COLORS = np.array([(230, 40, 40), (40, 200, 40), (60, 60, 240), (230, 210, 40)])
GRAY = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, 32, 32)


def planted(count, seed):
    """Digits of 48 px with a colored patch, its class, and where it is."""
    random = np.random.default_rng(seed)
    digits = load_digits().images
    labels = np.arange(count) % 4
    images = np.zeros((count, SIZE, SIZE, 3), np.uint8)
    inside = np.zeros((count, SIZE, SIZE), bool)
    for number, label in enumerate(labels):
        gray = np.kron(digits[random.integers(len(digits))] * 15, np.ones((6, 6)))
        image = np.repeat(gray[..., None], 3, axis=-1)
        y, x = random.integers(0, SIZE - PATCH, 2)
        inside[number, y : y + PATCH, x : x + PATCH] = True
        image[inside[number]] = COLORS[label] + random.normal(0, 15, (PATCH**2, 3))
        images[number] = np.clip(image, 0, 255)
    return images, labels, inside


def pointing(found, inside):
    """How often the largest value of a map lies in the patch."""
    peaks = found.upsampled().reshape(len(inside), -1).argmax(axis=1)
    return inside.reshape(len(inside), -1)[np.arange(len(inside)), peaks].mean()


@pytest.fixture(scope="module")
def builtin():
    return ft.Classifier.of(ft.load("builtin"))


@pytest.fixture(scope="module")
def stem_head(builtin):
    """A solved head on the stem of the built-in network, that knows the patch."""
    images, labels, _ = planted(160, 0)
    batches = [{"image": images, "label": labels}]
    features = segment_features(builtin, batches, ["stem"])[0]["stem"].astype(np.float64)
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    ridge = RidgeClassifierCV(np.logspace(-2, 3, 6)).fit((features - mean) / deviation, labels)
    kernel = 10 * ridge.coef_.T / deviation[:, None]
    bias = 10 * ridge.intercept_ - mean @ kernel
    return PooledHead("stem", kernel.astype(np.float32), bias.astype(np.float32))


def network(seed=0, **changes):
    model = ft.resnet(dataclasses.replace(SMALL, **changes))
    return model, model.init(jax.random.key(seed))


def pictures(count=6, size=64, bands=3):
    draw = np.random.default_rng(1)
    return draw.normal(size=(count, size, size, bands)).astype(np.float32)


@pytest.mark.parametrize("changes", [{}, {"preactivation": True}, {"norm": "group", "width": 32}])
def test_exact_cam_is_the_logit(changes):
    model, variables = network(**changes)
    images = pictures()
    for target in (None, 3, np.arange(6) % 5):
        found = saliency_maps(model, variables, images, targets=target, layer="layer4")
        assert found.method == "cam"
        bias = np.asarray(variables["params"]["fc"]["bias"])[found.targets]
        logits = logits_function(model, variables)(images)
        expected = logits[np.arange(6), found.targets]
        difference = np.abs(found.maps.mean(axis=(1, 2)) + bias - expected).max()
        assert difference <= 1e-5 * np.abs(expected).max()


def test_exact_cam_of_a_head_at_any_depth_is_its_logit(builtin, stem_head):
    images, _, _ = planted(8, 1)
    found = saliency_maps(
        builtin.model, builtin.variables, images, builtin.preprocessing, head=stem_head
    )
    assert (found.layer, found.method, found.maps.shape) == ("stem", "cam", (8, 12, 12))
    features = segment_features(builtin, [{"image": images, "label": np.zeros(8, int)}], ["stem"])
    logits = features[0]["stem"] @ stem_head.kernel + stem_head.bias
    np.testing.assert_array_equal(found.targets, logits.argmax(axis=1))
    ours = found.maps.mean(axis=(1, 2)) + stem_head.bias[found.targets]
    assert np.abs(ours - logits.max(axis=1)).max() <= 1e-5 * np.abs(logits).max()
    run = logits_function(
        builtin.model, builtin.variables, builtin.preprocessing, head=stem_head, batch_size=3
    )
    assert np.abs(run(images) - logits).max() <= 1e-5 * np.abs(logits).max()


def test_at_the_last_map_all_methods_are_exact_cam():
    # Analytic: the gradient there is the head's weight over the number of positions.
    model, variables = network()
    cam, grad, hires = (
        saliency_maps(model, variables, pictures(), layer="layer4", method=method).maps
        for method in ("cam", "grad_cam", "hires_cam")
    )
    positions = np.prod(cam.shape[1:])
    for other in (grad, hires):
        np.testing.assert_allclose(other, np.maximum(cam, 0) / positions, rtol=1e-4, atol=1e-7)


def test_the_gradient_is_that_of_one_logit_by_the_map():
    model, variables = network()
    images, targets = pictures(2), np.array([4, 1])

    @jax.jit
    def gradients(x):
        """The map, and the gradient of each image's target, by JAX on the whole network."""
        maps, _ = model.apply(variables, x, stop="layer3")

        def chosen(maps):
            return model.apply(variables, maps, start="layer3")[0][np.arange(2), targets].sum()

        return maps, jax.grad(chosen)(maps)

    maps, gradient = map(np.asarray, gradients(images))
    weights = {"grad_cam": gradient.mean((1, 2), keepdims=True), "hires_cam": gradient}
    for method, weight in weights.items():
        found = saliency_maps(
            model, variables, images, targets=targets, layer="layer2", method=method
        )
        expected = np.maximum((weight * maps).sum(-1), 0)
        np.testing.assert_allclose(found.maps, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "layer"),
    [(16, "layer1"), (32, "layer1"), (48, "layer1"), (64, "layer2"), (224, "layer4")],
)
def test_the_default_layer(size, layer):
    # The deepest with 7 x 7 positions (48 px: 12, 12, 6, 3, 2), else the deepest of the largest.
    model, variables = network()
    found = saliency_maps(model, variables, pictures(1, size))
    assert found.layer == layer
    assert found.method == ("cam" if layer == "layer4" else "grad_cam")
    assert bool(found.notes) == (size == 16)


def undifferentiable_stem(x, kernel, **options):
    """A convolution that cannot be differentiated where it reads the image."""

    @jax.custom_vjp
    def first(x, kernel):
        return conv(x, kernel, **options)

    def backward(_, cotangent):
        raise AssertionError("the stem is differentiated")

    first.defvjp(lambda x, kernel: (first(x, kernel), ()), backward)
    return first(x, kernel) if kernel.shape[2] == 3 else conv(x, kernel, **options)


def test_nothing_is_differentiated_below_the_layer():
    model, variables = network()
    guarded = dataclasses.replace(model, convolution=undifferentiable_stem)
    ours, theirs = (
        saliency_maps(each, variables, pictures(), layer="stem", method="grad_cam").maps
        for each in (guarded, model)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-8)
    # The guard works: the gradient by the image does go through the stem.
    with pytest.raises(AssertionError, match="the stem is differentiated"):
        jax.eval_shape(jax.grad(lambda x: guarded.apply(variables, x)[0].sum()), pictures())


def test_a_planted_cue_is_found_and_its_removal_noticed(builtin, stem_head):
    images, labels, inside = planted(100, 2)
    asked = (builtin.model, builtin.variables)
    found = saliency_maps(*asked, images, builtin.preprocessing, targets=labels, head=stem_head)
    assert pointing(found, inside) >= 0.8
    run = logits_function(*asked, builtin.preprocessing, head=stem_head)
    measured = faithfulness(run, images, found.maps, labels, fractions=(0.1,))
    assert measured.better
    most, least = measured.rows
    assert most.accuracy["map"] <= most.accuracy["blobs"] - 0.2
    assert least.accuracy["map"] >= most.accuracy["map"] + 0.2
    # The negative case: maps of other images mark nothing here, and it is said.
    other = faithfulness(run, images, found.maps[::-1], labels, fractions=(0.1,))
    assert other.better is False
    assert "no better than random blobs" in other.summary()
    assert pointing(dataclasses.replace(found, maps=found.maps[::-1]), inside) < 0.3


@pytest.mark.slow
def test_a_planted_cue_is_found_in_a_trained_network(builtin, tmp_path):
    """Default layer and method of a fine-tuned network."""
    images, labels, _ = planted(240, 0)

    def batches(start):
        for step in range(start, 10_000):
            chosen = np.random.default_rng([7, step]).permutation(240)[:24]
            yield {"image": images[chosen], "label": labels[chosen].astype(np.int32)}

    tuned = ft.transfer(ft.load("builtin"), classes=4)
    plan = ft.recipes.full_fine_tuning(tuned.params, steps=240, learning_rate=3e-3)
    feed = ft.data.DataLoaders(
        train=batches,
        steps_per_epoch=10,
        validation=None,
        preprocessing=builtin.preprocessing,
        class_names=tuple("abcd"),
    )
    tuned = ft.fit(tuned, plan, feed, tmp_path / "run").network
    held, known, inside = planted(100, 3)
    asked = (tuned.model, tuned.variables)
    found = saliency_maps(*asked, held, tuned.preprocessing, targets=known)
    assert (found.layer, found.method) == ("layer1", "grad_cam")
    run = logits_function(*asked, tuned.preprocessing)
    measured = faithfulness(run, held, found.maps, known, fractions=(0.1,))
    assert measured.accuracy >= 0.7
    assert pointing(found, inside) >= 0.8
    assert measured.rows[0].accuracy["map"] <= measured.rows[0].accuracy["blobs"] - 0.2


def test_maps_depend_on_the_weights(builtin):
    images, _, _ = planted(24, 4)
    asked = (builtin.model, builtin.variables, images, builtin.preprocessing)
    found = randomization_test(*asked, layer="layer2")
    assert [row[0] for row in found.rows] == [
        "head",
        "layer4",
        "layer3",
        "layer2",
        "layer1",
        "stem",
    ]
    assert found.passed
    assert found.other_class < 0.5
    json.dumps(found.to_json(), allow_nan=False)
    assert max(map(len, str(found).splitlines())) <= 80
    # A network compared with itself has maps that are alike.
    ours = saliency_maps(*asked, layer="layer2").maps
    assert scipy.stats.spearmanr(ours[0].ravel(), ours[0].ravel()).statistic == pytest.approx(1)


def test_the_head_at_a_depth_becomes_random_too(builtin, stem_head):
    images, _, _ = planted(8, 5)
    asked = (builtin.model, builtin.variables, images, builtin.preprocessing)
    found = randomization_test(*asked, head=stem_head)
    assert [row[0] for row in found.rows] == ["head", "stem"]
    assert found.rows[0][1] < 0.9


def test_a_map_that_ignores_the_weights_says_so():
    found = RandomizationTest(10, (("head", 0.9, 0.1), ("stem", 0.6, 0.1)), 0.99)
    assert not found.passed
    assert "do no better than those of a random network" in found.summary()
    assert "second class" in str(found)


def corner(images):
    """A network that looks at nothing but the corner."""
    bright = 30 * (np.asarray(images)[:, 4:10, 4:10].mean(axis=(1, 2, 3)) / 255 - 0.3)
    return np.stack([-bright, bright], axis=1)


def corner_images(count=12):
    images = np.random.default_rng(0).integers(0, 40, (count, 32, 32, 3), np.uint8)
    images[:, 4:10, 4:10] = 220
    return images


def test_deletion_and_insertion_of_what_decides():
    images = corner_images()
    right = np.zeros((12, 32, 32))
    right[:, 4:10, 4:10] = 1
    found = faithfulness(corner, images, right, fractions=(0.05, 0.5, 0.9))
    assert (found.accuracy, found.better) == (1, True)
    by_row = {(row.fraction, row.order): row.accuracy["map"] for row in found.rows}
    assert by_row[0.05, "most"] == 0
    assert by_row[0.05, "least"] == by_row[0.5, "least"] == by_row[0.9, "least"] == 1
    wrong = faithfulness(corner, images, right[:, ::-1, ::-1], fractions=(0.05,))
    assert wrong.better is False
    text = str(wrong)
    assert "no better than random blobs" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    assert json.loads(json.dumps(wrong.to_json(), allow_nan=False))["better"] is False


def test_random_maps_are_no_better_than_random_blobs():
    images = corner_images()
    better = []
    for seed in range(10):
        maps = np.random.default_rng(100 + seed).normal(size=(12, 8, 8))
        better.append(faithfulness(corner, images, maps, fractions=(0.2,), seed=seed).better)
    # Two standard errors on one side are exceeded in about 1 of 40 draws.
    assert sum(better) <= 2


def test_few_images_decide_nothing():
    found = faithfulness(corner, corner_images(1), np.ones((1, 4, 4)), fractions=(0.1,))
    assert found.better is None
    assert found.summary().startswith("Not decided with 1 images")
    json.dumps(found.to_json(), allow_nan=False)


def test_holes_are_filled_harmonically():
    # Analytic: a linear function is the mean of its neighbors.
    rows, columns = np.indices((24, 24)) / 24
    ramp = np.stack([rows, 0.5 * columns + 0.2], axis=-1)[None]
    hole = np.zeros((1, 24, 24), bool)
    hole[0, 5:15, 8:20] = True
    broken = np.where(hole[..., None], 7.0, ramp)
    filled = impute(broken, hole)
    assert 0 < np.abs(filled - ramp).max() < 0.05  # noise of 0.01
    np.testing.assert_array_equal(filled[~hole], ramp[~hole])
    whole = (255 * ramp).round().astype(np.uint8)
    again = impute(whole, hole)
    assert again.dtype == np.uint8
    assert np.abs(again.astype(int) - whole).max() <= 14
    np.testing.assert_array_equal(impute(whole, hole), again)
    border = np.zeros((1, 24, 24), bool)
    border[0, :, :4] = True
    assert np.isfinite(impute(ramp, border)).all()


def test_what_is_printed_and_kept():
    model, variables = network()
    found = saliency_maps(model, variables, pictures(), targets=2, batch_size=4)
    text = str(found)
    assert "Grad-CAM at layer2: 6 maps of 8 x 8" in text
    assert "is not known before faithfulness()" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    loaded = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert np.shape(loaded["maps"]) == (6, 8, 8)
    constant = saliency_maps(model, jax.tree.map(jnp.zeros_like, variables), pictures(1))
    assert "1 of 1 maps are constant" in str(constant)


def test_upsampling_is_bilinear_with_half_pixel_centers():
    model, variables = network()
    found = saliency_maps(model, variables, pictures(2, 64), layer="layer1")
    expected = jax.image.resize(found.maps, (2, 64, 64), "bilinear")
    np.testing.assert_allclose(found.upsampled(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"layer": "layer9"}, ValueError, "got 'layer9'; did you mean"),
        ({"layer": "pool"}, ValueError, "layer must be one of stem, layer1"),
        ({"method": "gradcam"}, ValueError, "got 'gradcam'; did you mean 'grad_cam'"),
        ({"method": "cam", "layer": "layer1"}, ValueError, "'cam' must be at layer4"),
        ({"targets": 5}, ValueError, "from 0 to 4"),
        ({"targets": [0, 1, 2]}, ValueError, "targets must be 2 classes"),
        ({"targets": 0.5}, TypeError, "must be integers"),
        ({"batch_size": 0}, ValueError, "batch_size must be >= 1"),
        ({"head": PooledHead("pool", np.ones((4, 2)), np.ones(2))}, ValueError, "head's segment"),
        (
            {"head": PooledHead("stem", np.ones((5, 2)), np.ones(2))},
            ValueError,
            r"a head on stem must have a kernel \[4, classes\].*got \[5, 2\] and \[2\]",
        ),
        (
            {"head": PooledHead("stem", np.ones((4, 2)), np.ones(2)), "layer": "layer1"},
            ValueError,
            "layer must be one of stem, got 'layer1'",
        ),
        ({"images": np.zeros((1, 32, 32, 3), np.uint8)}, TypeError, "give the preprocessing"),
        ({"images": np.zeros((1, 32, 32, 3)), "preprocessing": GRAY}, TypeError, "must be uint8"),
    ],
)
def test_what_has_no_map(options, error, text):
    model, variables = network()
    options = {"images": pictures(2, 32), **options}
    with pytest.raises(error, match=text):
        saliency_maps(model, variables, **options)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"maps": np.zeros((3, 4, 4))}, ValueError, r"\[12 images, height, width\], got"),
        ({"maps": np.full((12, 4, 4), np.nan)}, ValueError, "must be finite"),
        ({"maps": np.zeros((12, 64, 64))}, ValueError, "at most of the size of the images"),
        ({"fractions": (0.0,)}, ValueError, "above 0 and below 1"),
        ({"fractions": ()}, ValueError, "above 0 and below 1"),
        ({"draws": 0}, ValueError, "draws must be >= 1"),
        ({"targets": np.full(12, 2)}, ValueError, "from 0 to 1"),
    ],
)
def test_what_cannot_be_judged(options, error, text):
    options = {"images": corner_images(), "maps": np.zeros((12, 4, 4)), **options}
    with pytest.raises(error, match=text):
        faithfulness(corner, **options)


@pytest.mark.parametrize("logits", [np.zeros(12), np.zeros((3, 2)), np.full((12, 2), np.nan)])
def test_what_is_no_network(logits):
    with pytest.raises(ValueError, match=r"finite logits \[12 images, classes\], got shape"):
        faithfulness(lambda images: logits, corner_images(), np.ones((12, 4, 4)))


def test_a_head_that_reads_several_depths_has_no_map():
    model, _ = network()
    several = ft.resnet(model.config.ending_at(["stem", "layer2"]))
    with pytest.raises(ValueError, match=r"of a head that reads one depth .*, layer2$"):
        saliency_maps(several, several.init(jax.random.key(0)), pictures(1))


def test_weights_that_are_not_finite():
    model, variables = network()
    broken = jax.tree.map(lambda leaf: leaf * np.nan, variables)
    with pytest.raises(ValueError, match="saliency must be finite"):
        saliency_maps(model, broken, pictures(1))


@pytest.mark.parametrize(
    ("removed", "text"),
    [
        (np.ones((1, 8, 8), bool), "must leave a pixel"),
        (np.zeros((1, 8, 8)), r"must be booleans \[1, 8, 8\], got float64"),
        (np.zeros((2, 8, 8), bool), r"must be booleans \[1, 8, 8\], got bool \[2, 8, 8\]"),
    ],
)
def test_what_cannot_be_filled(removed, text):
    with pytest.raises(ValueError, match=text):
        impute(np.zeros((1, 8, 8, 1)), removed)
