"""What is measured on labelled images before anything is trained."""

import numpy as np
import pytest
from scipy.stats import binomtest

import flaxtransfer as ft
from flaxtransfer.advice.evidence import alignment, gather, wrong_labels
from flaxtransfer.features import cross_validate, standardization
from flaxtransfer.metrics import compared
from tests.support.targets import pretrained, source


def test_alignment_is_in_standard_deviations_of_labels_that_are_shuffled():
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [30, 20, 5])
    scores = random.normal(size=(55, 3)) + 0.7 * np.eye(3)[labels] + [0.5, 0, -2]

    def total(order):
        return scores[np.arange(55), order].sum()

    shuffled = np.array([total(random.permutation(labels)) for _ in range(20_000)])
    wanted = (total(labels) - shuffled.mean()) / shuffled.std()
    assert alignment(scores, labels) == pytest.approx(wanted, abs=0.05)
    assert alignment(np.zeros((55, 3)), labels) == 0


def test_rare_classes_are_seen_where_accuracy_sees_none():
    """The largest class is the best answer for all, and the scores still say which ones differ."""
    random = np.random.default_rng(1)
    labels = np.repeat([0, 1], [190, 10])
    features = random.normal(size=(200, 4)) + 2.0 * labels[:, None] * [1, 1, 0, 0]
    found = cross_validate(standardization(features)(features), labels)
    assert found.accuracy <= 0.955
    assert alignment(found.scores, labels) > 4


def test_two_heads_are_compared_on_the_same_examples():
    first = np.repeat([True, True, False, False], [40, 14, 4, 2])
    second = np.repeat([True, False, True, False], [40, 14, 4, 2])
    gain, error = compared(first, second)
    assert gain == pytest.approx(10 / 60)
    # McNemar's exact test of 14 against 4 agrees that two standard errors are exceeded.
    assert (gain / error) ** 2 == pytest.approx(100 / 18)
    assert binomtest(14, 18).pvalue < 0.05


@pytest.fixture(scope="module")
def classifier():
    return ft.transfer(pretrained(), classes=6)


def test_all_depths_are_judged_on_one_pass(classifier):
    images = source("coarse gratings", 6, 0)
    found = gather(classifier, images)
    assert [head.name for head in found.depths] == ["stem", "layer1", "layer2", "layer3", "layer4"]
    assert (found.examples, found.available, found.outputs, found.smallest) == (36, 36, 6, 6)
    assert found.measure.of_guess == pytest.approx(1 / 6)
    batches = ft.eval_batches(images, np.arange(36), classifier.preprocessing, batch_size=64)
    features, labels = ft.features.segment_features(classifier, batches, ["layer2"])
    scaled = standardization(features["layer2"])(np.float64(features["layer2"]))
    wanted = cross_validate(scaled, labels)
    assert found.depths[2].skill == wanted.accuracy
    assert found.depths[2].degrees_of_freedom == wanted.degrees_of_freedom
    assert list(dict(found.bottleneck.octaves))[-1] == "> 1/4"
    assert found.curve.labels == 36


def test_batches_do_not_matter(classifier):
    images = source("coarse gratings", 6, 0)
    whole, parts = gather(classifier, images), gather(classifier, images, batch_size=7)
    for one, other in zip(whole.depths, parts.depths, strict=True):
        np.testing.assert_array_equal(one.judged, other.judged)
    np.testing.assert_array_equal(whole.reference.judged, parts.reference.judged)


def test_images_that_are_there_twice_are_left_out(classifier):
    """Else one of the two is judged by what was learned from the other."""
    once = source("random labels", 12, 0)
    network = ft.transfer(pretrained(), classes=4)
    order = np.repeat(np.arange(48), 3)
    thrice = ft.ArraySource(once.images[order], once.labels()[order], once.class_names)
    alone, found = gather(network, once), gather(network, thrice)
    assert (found.examples, found.available, found.repeated) == (48, 144, 96)
    assert found.best.skill == alone.best.skill < 0.5


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([0] * 8, "at least 2 classes, got only class 0"),
        (list(range(8)), "every class has one example"),
    ],
)
def test_what_no_head_can_be_judged_on(labels, text):
    images = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3)).astype(np.uint8)
    names = [f"class {n}" for n in range(8)]
    network = ft.transfer(pretrained(), classes=8)
    with pytest.raises(ValueError, match=f"no head can be fitted to stem: .*{text}"):
        gather(network, ft.ArraySource(images, np.array(labels), names))


def test_no_images_and_features_that_are_not_finite(classifier):
    images = source("coarse gratings", 4, 0)
    with pytest.raises(ValueError, match="there must be images to advise on, got none"):
        gather(classifier, images, [])
    same = ft.ArraySource(images.images[:1].repeat(4, axis=0), np.arange(4) % 2, ["a", "b"])
    with pytest.raises(ValueError, match="3 or more different images to advise on, got 1"):
        gather(ft.transfer(pretrained(), classes=2), same)
    kernel = np.full_like(classifier.params["conv1"]["kernel"], np.nan)
    broken = {**classifier.params, "conv1": {"kernel": kernel}}
    network = classifier.with_variables({**classifier.variables, "params": broken})
    with pytest.raises(ValueError, match="fitted to stem: features must be finite"):
        gather(network, images)


def test_wrong_labels_are_counted_and_hard_ones_are_not():
    """Drawn from the model itself: logits are known, and so is the share of labels drawn anew."""
    random = np.random.default_rng(0)

    def share(images: int, size: float, drawn: float, classes: int = 6) -> float:
        scores = size * random.normal(size=(images, classes))
        chance = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        labels = (random.random((images, 1)) > chance.cumsum(axis=1)).sum(axis=1)
        new = random.random(images) < drawn
        return wrong_labels(
            scores / max(size, 1.0), np.where(new, random.integers(0, classes, images), labels)
        )

    # The better the head, the surer the count; a sixth of labels that are drawn are right.
    assert share(1000, 8.0, 0.4) == pytest.approx(0.4 * 5 / 6, abs=0.05)
    assert share(1000, 8.0, 0.1) == pytest.approx(0.1 * 5 / 6, abs=0.03)
    assert np.mean([share(200, 4.0, 0.4) for _ in range(20)]) == pytest.approx(1 / 3, abs=0.06)
    for size in (0.0, 0.5, 1.0, 2.0, 8.0):  # From nothing known to all but a few.
        assert sum(share(150, size, 0.0) > 0 for _ in range(40)) <= 2
