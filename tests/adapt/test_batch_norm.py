"""Adapted BatchNorm statistics: against batch mode, against invariances, and refused in time."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxtransfer as ft
from flaxtransfer.adapt.batch_norm import adapt_batch_norm
from flaxtransfer.adapt.statistics import image_reader, reestimate
from flaxtransfer.batchnorm import modules
from flaxtransfer.models import lax_conv
from flaxtransfer.models.moments import apply_measuring
from flaxtransfer.paths import flatten
from flaxtransfer.weights.preprocessing import normalize
from tests.support.gratings import CONFIG, PREPROCESSING, SIZE, draw, faint
from tests.support.rounding import rounding

EVEN = (1 / 3, 1 / 3, 1 / 3)


@pytest.fixture(scope="module")
def target():
    images, labels = draw(EVEN, 240, 5)
    return faint(images), labels


def adapted(trained, images, **options):
    options = {"batch_size": 240, **options}
    return adapt_batch_norm(
        ft.Classifier(trained.model, trained.variables, PREPROCESSING), images, **options
    )


def largest_difference(one, other):
    first, second = flatten(one), flatten(other)
    return max(np.abs(np.asarray(first[p]) - second[p]).max() for p in first)


def test_running_statistics_then_give_the_outputs_of_batch_mode(trained, target):
    """Of all images together: what flax's own BatchNorm makes of them."""
    normal = normalize(target[0], PREPROCESSING.mean, PREPROCESSING.std)
    by_batch = jax.jit(lambda v, x: trained.model.apply(v, x, norm="batch")[0])
    expected = by_batch(trained.variables, normal)
    variables, report = adapted(trained, target[0])
    assert report.statistics.exact
    found = trained.logits(variables, target[0])
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("mixture", ["moments", "linear"])
def test_a_mixture_is_the_same_in_batch_mode_and_afterwards(trained, target, mixture):
    """Half and half with the source's at every layer: 240 images, and N = 240."""
    normal = normalize(target[0], PREPROCESSING.mean, PREPROCESSING.std)
    chosen = frozenset(modules(trained.variables["batch_stats"]))
    by_batch = jax.jit(
        lambda v, x: apply_measuring(trained.model, v, x, None, chosen, share=0.5, kind=mixture)[0]
    )
    expected = by_batch(trained.variables, normal)
    variables, report = adapted(trained, target[0], source_weight=240, mixture=mixture)
    assert report.statistics.share == 0.5
    found = trained.logits(variables, target[0])
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


def test_what_does_not_matter(trained, target):
    """Order, padding, an array or a feed: the same."""
    images = target[0]
    variables, report = adapted(trained, images)
    assert variables["params"] is trained.variables["params"]
    # Sums over all positions of all images, in another order or by a program for more rows.
    size = max(np.abs(leaf).max() for leaf in jax.tree.leaves(variables["batch_stats"]))
    turned, _ = adapted(trained, images[::-1])
    tolerance = rounding(240 * (SIZE // 2) ** 2) * size
    assert largest_difference(turned["batch_stats"], variables["batch_stats"]) < tolerance
    padded = {
        "image": np.concatenate([images, images[:8]]),
        "weight": np.repeat([1.0, 0.0], [240, 8]),
    }
    fed, _ = adapted(trained, lambda: iter([padded]))
    assert largest_difference(fed["batch_stats"], variables["batch_stats"]) < tolerance
    assert report.farthest.distance > 0.5
    assert report.statistics.layers[0].path == "bn1"
    assert report.statistics.layers[0].values == 240 * (SIZE // 2) ** 2


def test_images_of_the_source_change_nothing(trained):
    variables, report = adapted(trained, trained.train, source=trained.source)
    assert report.adapted
    assert report.farthest.distance < 1e-3
    before = trained.variables["batch_stats"]
    assert largest_difference(variables["batch_stats"], before) < 1e-4


def test_contrast_is_undone_with_its_evidence(trained, target):
    variables, report = adapted(trained, target[0], source=trained.source)
    assert report.adapted
    assert report.refusals == ()
    assert report.after.accuracy > report.before.accuracy + 0.05
    assert trained.accuracy(trained.variables, *target) < 0.5
    assert trained.accuracy(variables, *target) > 0.85
    assert "target statistics (returned): mean confidence" in str(report)


@pytest.mark.parametrize(
    ("shares", "change", "reason"),
    [
        ((1.0, 0.0, 0.0), lambda x: x, "class 0 is estimated at 100 % of the target"),
        ((0.8, 0.15, 0.05), lambda x: x, "effective classes, and the estimated accuracy does not"),
        ((1.0, 0.0, 0.0), faint, "label shift and covariate shift cannot be told apart"),
    ],
)
def test_label_shift_is_refused_and_what_it_would_have_done(trained, shares, change, reason):
    """On the very images: without the guard, the right answers of the source are lost."""
    images, labels = draw(shares, 240, 5)
    images = change(images)
    variables, report = adapted(trained, images, source=trained.source)
    assert variables is trained.variables
    assert not report.adapted
    assert reason in " ".join(report.refusals)
    assert "not adapted: " in str(report)
    forced, warned = adapted(trained, images, source=trained.source, guard="warn")
    assert warned.adapted
    assert warned.refusals == report.refusals
    if change is not faint:
        assert trained.accuracy(variables, images, labels) > 0.9
        assert trained.accuracy(forced, images, labels) < 0.7


def test_nothing_to_adapt_is_an_error(trained, target):
    def fails(match, images=target[0], kind=ValueError, model=trained.model, **options):
        with pytest.raises(kind, match=match):
            adapt_batch_norm(
                ft.Classifier(model, trained.variables, PREPROCESSING), images, **options
            )

    grouped = ft.Model(replace(CONFIG, width=32, norm="group"))
    fails(r"GroupNorm.*there is nothing to adapt", model=grouped)
    fails("selects no BatchNorm", where=ft.head())
    fails(
        r"8 target images give 8 at layer4/.*adapt to at least 32 images",
        images=target[0][:8],
    )
    fails("must be an array of uint8", images=target[0] / 255, kind=TypeError)
    fails(r"must have shape .*, got \(240, 32, 32\)", images=target[0][..., 0])
    fails("no target images", images=lambda: iter([]))
    fails("must be 'refuse' or 'warn', got 'ask'", guard="ask")
    fails("source_weight must be >= 0", source_weight=-1)
    with pytest.raises(ValueError, match=r"must be one per image \(64\), got 3"):
        reestimate(
            ft.Classifier(trained.model, trained.variables, PREPROCESSING),
            image_reader(target[0][:64], 64),
            frozenset(modules(trained.variables["batch_stats"])),
            weights=np.ones(3),
        )


@pytest.mark.slow
def test_n_without_end_is_the_source_to_the_bit(trained, target):
    """What was measured is still said, and how far it is from the source."""
    variables, report = adapted(trained, target[0], source_weight=math.inf)
    assert largest_difference(variables["batch_stats"], trained.variables["batch_stats"]) == 0
    assert report.farthest.distance > 0.5


@pytest.mark.slow
def test_passes_make_one_layer_after_the_other_exact(trained, target):
    """In batches of one class each, the worst there are; in the end batches do not matter."""
    images = target[0][np.argsort(target[1], kind="stable")]
    whole = flatten(adapted(trained, images)[0]["batch_stats"])
    parts = [{"image": images[n : n + 80]} for n in range(0, 240, 80)]

    def distances(passes):
        variables, report = adapted(trained, lambda: iter(parts), passes=passes)
        found = flatten(variables["batch_stats"])
        return report.statistics, {p: np.abs(found[p] - whole[p]).max() for p in whole}

    for passes, exact in enumerate(("bn1/mean", "layer1/0/bn1/var", "layer1/0/bn2/var"), start=1):
        statistics, apart = distances(passes)
        assert not statistics.exact
        assert apart[exact] < 1e-4
        assert apart["layer4/0/bn2/var"] > 0.01
    statistics, apart = distances(20)
    assert statistics.exact
    assert statistics.passes < 20
    assert max(apart.values()) < 1e-3
    # An array is dealt out, and one pass is nearly enough.
    dealt = flatten(adapted(trained, images, batch_size=80)[0]["batch_stats"])
    once = distances(1)[1]
    for path in ("layer4/0/bn2/mean", "layer4/0/bn2/var"):
        assert np.abs(dealt[path] - whole[path]).max() < once[path] / 3


@pytest.mark.slow
def test_brightness_and_contrast_are_invisible_where_borders_are(trained):
    """Where padding repeats the border, a x + c passes the stem as itself: nothing changes.

    With zeros around the images it is not exact, for zeros do not change with them.
    """

    def repeated(x, kernel, *, strides, padding, groups):
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)), mode="edge")
        return lax_conv(x, kernel, strides=strides, padding=((0, 0), (0, 0)), groups=groups)

    images, _ = draw(EVEN, 240, 5)
    changed = (images // 2 + 20).astype(np.uint8)
    found = {}
    for name, convolution in (("repeated", repeated), ("zeros", lax_conv)):
        network = replace(trained, model=ft.Model(CONFIG, convolution=convolution))
        both = [network.logits(adapted(network, some)[0], some) for some in (images, changed)]
        found[name] = np.abs(both[0] - both[1]).max() / np.abs(both[0]).max()
    assert found["repeated"] < 2e-3
    assert found["zeros"] > 0.05


@pytest.mark.slow
def test_weights_are_repetitions(trained, target):
    """Statistics of weighted images against those of an array that holds them so many times."""
    images = target[0][:64]
    weights = np.arange(64) % 3
    chosen = frozenset(modules(trained.variables["batch_stats"]))
    network = ft.Classifier(trained.model, trained.variables, PREPROCESSING)
    weighed = reestimate(network, image_reader(images, 64), chosen, weights=weights)
    many = reestimate(network, image_reader(np.repeat(images, weights, 0), 64), chosen)
    assert weighed.effective_images == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    assert largest_difference(weighed.batch_stats, many.batch_stats) < 1e-4
