"""Balanced statistics where classes and images have both changed, and where they must not be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from flaxtransfer.adapt.batch_norm import adapt_batch_norm, adapt_batch_norm_balanced
from flaxtransfer.classifier import Classifier
from tests.support.gratings import PREPROCESSING, draw, faint


def balanced(trained, images, source=None, **options):
    return adapt_batch_norm_balanced(
        Classifier(trained.model, trained.variables, PREPROCESSING),
        images,
        source or trained.source,
        batch_size=240,
        **options,
    )


def test_both_shifts_at_once(trained):
    """0.05 as is, 0.63 with plain statistics, 0.78 with balanced ones."""
    images, labels = draw((0.8, 0.15, 0.05), 240, 5)
    images = faint(images)
    variables, report = balanced(trained, images)
    plain, _ = adapt_batch_norm(
        Classifier(trained.model, trained.variables, PREPROCESSING), images, batch_size=240
    )
    source, target, best = (
        trained.accuracy(v, images, labels) for v in (trained.variables, plain, variables)
    )
    assert report.adapted
    assert report.chosen.startswith("balanced, round")
    assert source < target < best - 0.05
    names = [one.name for one in report.candidates]
    assert names[:3] == ["source", "target statistics", "balanced, round 1"]
    assert report.candidates[0].effective_images is None
    assert report.candidates[2].effective_images < report.candidates[1].effective_images == 240


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shares", "reason"),
    [
        ((1.0, 0.0, 0.0), "class 0 is estimated at 100 %"),
        (
            (0.8, 0.15, 0.05),
            "no new statistics have a higher estimated accuracy than those of the source",
        ),
    ],
)
def test_where_the_source_is_best_it_stays(trained, shares, reason):
    images, labels = draw(shares, 240, 5)
    variables, report = balanced(trained, images)
    assert variables is trained.variables
    assert report.chosen == "source"
    assert reason in " ".join(report.refusals)
    forced, warned = balanced(trained, images, guard="warn")
    assert warned.chosen.startswith("balanced")
    lost = trained.accuracy(variables, images, labels) - trained.accuracy(forced, images, labels)
    assert lost > (0.5 if 1 in shares else 0.01)


@pytest.mark.slow
def test_predictions_that_say_little_weigh_nothing(trained):
    """A source that was sure of everything and always right: beside it, this target is guesses."""
    sure = np.eye(3)[trained.source.labels] * 0.998 + 0.002 / 3
    source = replace(trained.source, probabilities=sure)
    images = faint(draw((0.8, 0.15, 0.05), 240, 5)[0])
    variables, report = balanced(trained, images, source)
    assert variables is trained.variables
    assert "against 100 % on the source, and no other is better" in " ".join(report.refusals)


def test_no_rounds(trained):
    with pytest.raises(ValueError, match="rounds must be >= 1, got 0"):
        balanced(trained, draw((1, 0, 0), 32, 0)[0], rounds=0)
