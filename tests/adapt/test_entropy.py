"""Entropy minimization: what moves, what it gains, when it is refused, set back or nonsense."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from flaxtransfer.adapt.entropy import _adapt_batches, _TentFunctions, tent
from flaxtransfer.classifier import Classifier
from flaxtransfer.paths import flatten
from flaxtransfer.sharding import make_mesh
from tests.support.gratings import PREPROCESSING, draw, faint

EVEN = (1 / 3, 1 / 3, 1 / 3)


def minimized(trained, images, **options):
    options = {"batch_size": 80, **options}
    return tent(Classifier(trained.model, trained.variables, PREPROCESSING), images, **options)


@pytest.mark.slow
def test_only_scales_and_biases_move_and_entropy_falls(trained):
    images, labels = draw(EVEN, 240, 5)
    images = faint(images)
    variables, report = minimized(
        trained, images, source=trained.source, steps=5, learning_rate=3e-3
    )
    before, after = flatten(trained.variables["params"]), flatten(variables["params"])
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    norms = {path for path in before if path.rpartition("/")[2] in ("scale", "bias")}
    assert moved == norms - {"fc/bias"}
    assert report.adapted
    assert report.collapses == 0
    assert report.entropies[-1] < report.entropies[0]
    assert report.logits.shape == (240, 3)
    assert str(report).startswith("entropy minimized on 240 target images in ")
    # The logits are in the images' order, though an array is shuffled.
    assert (report.logits.argmax(1) == labels).mean() > 0.85
    assert trained.accuracy(variables, images, labels) > 0.85


@pytest.mark.slow
def test_an_episode_leaves_nothing_behind(trained):
    """Each batch starts anew: alone or after others, its logits are the same."""
    images = faint(draw(EVEN, 160, 5)[0])
    parts = [{"image": images[:80]}, {"image": images[80:]}]
    options = {"episodic": True, "steps": 2, "learning_rate": 1e-2}
    variables, both = minimized(trained, lambda: iter(parts), **options)
    assert variables is trained.variables
    _, alone = minimized(trained, lambda: iter(parts[1:]), **options)
    np.testing.assert_allclose(both.logits[80:], alone.logits, atol=1e-5)
    _, continual = minimized(trained, lambda: iter(parts), **{**options, "episodic": False})
    np.testing.assert_allclose(continual.logits[:80], both.logits[:80], atol=1e-5)
    assert np.abs(continual.logits[80:] - both.logits[80:]).max() > 0.01


@pytest.mark.slow
def test_a_collapse_is_seen_and_set_back(trained):
    images = faint(draw(EVEN, 240, 5)[0])
    # At which rate predictions collapse depends on the last digits of a processor's sums.
    report = next(
        report
        for rate in (1.0, 2.0, 3.0, 4.0, 5.0)
        if (report := minimized(trained, images, learning_rate=rate, steps=5)[1]).collapses
    )
    assert report.collapses == sum("collapsed from" in note for note in report.notes)
    assert min(report.effective_classes) < 1.5
    # What is returned for those images is what was before.
    shares = softmax(report.logits, axis=1)
    assert shares.mean(0).min() > 0.1


def test_after_a_collapse_nothing_is_left_of_it_not_even_in_the_optimizer():
    """Functions that count their steps, and give one class to bright images once one was made."""
    met = []

    def step(moving, state, variables, pixels):
        met.append((moving, state))
        return moving + 1, state + 1, 1.0

    def predict(moving, variables, pixels):
        logits = np.tile(np.eye(3), (pixels.shape[0] // 3, 1))
        return logits * 0 + [9.0, 0, 0] if moving and pixels.mean() > 128 else logits

    parts = [np.full((6, 8, 8, 3), value, np.uint8) for value in (0, 255, 0)]
    even = np.tile(np.eye(3), (6, 1))
    tent = _TentFunctions(lambda params: (0, 0), step, predict)
    course = _adapt_batches(tent, {"params": {}}, parts, even, 1, False, make_mesh())
    assert met == [(0, 0), (1, 1), (0, 0)]
    assert ["batch 1 collapsed" in note for note in course.notes] == [True]
    np.testing.assert_array_equal(np.concatenate(course.logits), even)


@pytest.mark.slow
def test_label_shift_is_refused(trained):
    images, labels = draw((1.0, 0.0, 0.0), 240, 5)
    variables, report = minimized(trained, images, source=trained.source)
    assert variables is trained.variables
    assert not report.adapted
    assert "not adapted: class 0 is estimated at 100 %" in str(report)
    assert (report.logits.argmax(1) == labels).mean() > 0.9
    expected = trained.logits(trained.variables, images)
    np.testing.assert_allclose(report.logits, expected, atol=1e-4)
    _, forced = minimized(trained, images, source=trained.source, guard="warn")
    assert forced.adapted
    assert (forced.logits.argmax(1) == labels).mean() < 0.7


@pytest.mark.parametrize(
    ("count", "options", "text"),
    [
        (31, {}, r"must have at least 32 images, got \[31\]"),
        (64, {"batch_size": 16}, r"got \[16, 16, 16, 16\]"),
        (64, {"steps": 0}, "steps must be >= 1 and learning_rate > 0, got 0 and 0.001"),
        (64, {"guard": "ask"}, "'refuse' or 'warn'"),
    ],
)
def test_what_is_refused_before_anything_runs(trained, count, options, text):
    with pytest.raises(ValueError, match=text):
        minimized(trained, draw(EVEN, count, 0)[0], **options)
