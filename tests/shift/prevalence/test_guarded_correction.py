"""A correction that helps under label shift and is refused everywhere else."""

import numpy as np
import pytest

from flaxtransfer.shift.calibration import Calibration, calibrate
from flaxtransfer.shift.prior_correction import correct_prior

MEANS = np.array([[1.5, 0.0, 0.0], [0.0, 1.5, 0.0], [0.0, 0.0, 1.5]])


def draw(shares, count, seed, shift=0.0):
    """Three Gaussian classes; their logits for equal shares are those of Bayes' rule."""
    random = np.random.default_rng(seed)
    labels = random.choice(3, count, p=shares)
    x = random.normal(MEANS[labels]) + shift
    return x @ MEANS.T - (MEANS**2).sum(1) / 2, labels


@pytest.fixture(scope="module")
def source():
    return calibrate(*draw(np.full(3, 1 / 3), 600, 0))


def accuracy(probabilities, labels):
    return (probabilities.argmax(1) == labels).mean()


def test_label_shift_is_corrected(source):
    """By nearly as much as with the true shares."""
    shares = [0.8, 0.15, 0.05]
    logits, labels = draw(shares, 1000, 1)
    found = correct_prior(logits, source)
    assert found.adjusted
    assert found.refusals == ()
    oracle = source.apply(logits) * shares
    best, before = accuracy(oracle, labels), accuracy(found.calibrated, labels)
    assert before < accuracy(found.probabilities, labels) - 0.03
    assert abs(accuracy(found.probabilities, labels) - best) < 0.02
    assert found.changed == (found.probabilities.argmax(1) != found.calibrated.argmax(1)).sum() > 0
    assert f"{found.changed} of 1000 predictions changed" in str(found)


def test_without_a_shift_nothing_changes_much(source):
    logits, labels = draw(np.full(3, 1 / 3), 1000, 2)
    found = correct_prior(logits, source)
    assert found.adjusted
    before, after = (accuracy(p, labels) for p in (found.calibrated, found.probabilities))
    assert after == pytest.approx(before, abs=0.02)


def test_changed_images_are_refused_and_what_the_correction_would_have_done(source):
    """Every class moves towards the third: the shares look different and are not."""
    logits, labels = draw(np.full(3, 1 / 3), 600, 3, shift=np.array([0.0, -1.5, 2.0]))
    found = correct_prior(logits, source)
    assert not found.adjusted
    assert "no mixture of the source's classes explains these predictions" in found.refusals[0]
    assert "not corrected: " in str(found)
    assert found.probabilities is found.calibrated
    forced = correct_prior(logits, source, guard="warn")
    assert forced.adjusted
    assert forced.refusals == found.refusals
    assert accuracy(forced.probabilities, labels) < accuracy(found.probabilities, labels)


def test_features_show_what_predictions_hide(source):
    """Images differ where the model does not look: its logits are those of a label shift."""
    logits, _ = draw([0.8, 0.15, 0.05], 400, 5)
    random = np.random.default_rng(6)
    held, same = random.normal(size=(600, 4)), random.normal(size=(400, 4))
    found = correct_prior(logits, source, features=(held, same))
    assert found.adjusted
    assert len(found.residuals) == 2
    assert found.residuals[0].adjusted_p == min(1, 2 * min(test.p for test in found.residuals))
    assert str(found).count("H0, the target's features are a mixture") == 2
    found = correct_prior(logits, source, features=(held, same + np.eye(4)[0] / 2))
    (reason,) = found.refusals
    assert "no mixture of the source's classes explains these features" in reason
    assert not found.adjusted
    with pytest.raises(
        ValueError,
        match=r"source features and source prob.*, got 599 and 600 rows",
    ):
        correct_prior(logits, source, features=(held[1:], same))


@pytest.mark.parametrize(
    ("count", "text"),
    [(29, "29 examples are too few to estimate the prevalence of 3 classes: use 30"), (30, None)],
)
def test_too_few(source, count, text):
    found = correct_prior(draw(np.full(3, 1 / 3), count, 4)[0], source)
    assert found.adjusted == (text is None)
    if text:
        assert text in found.refusals[0]
        assert found.prevalence is None


def test_too_few_for_the_number_of_classes():
    # Five for each of eight classes are 40, more than the 30 that any number of classes needs.
    labels = np.arange(80) % 8
    source = Calibration("none", np.ones(8), np.zeros(8), np.eye(8)[labels], labels)
    found = correct_prior(np.eye(8)[labels[:39]], source)
    assert (
        "39 examples are too few to estimate the prevalence of 8 classes: use 40"
        in found.refusals[0]
    )


def test_a_model_that_always_says_the_same_is_refused(source):
    found = correct_prior(np.tile([1.0, 0.5, 0.0], (200, 1)), source, level=0)
    assert "do not determine the prevalence" in found.refusals[0]
    assert found.residuals == ()


def test_what_is_no_guard_and_what_are_no_features(source):
    with pytest.raises(ValueError, match="guard must be 'refuse' or 'warn', got 'ask'"):
        correct_prior(np.zeros((30, 3)), source, guard="ask")
    with pytest.raises(ValueError, match="features must be a pair"):
        correct_prior(np.zeros((30, 3)), source, features=np.zeros((600, 4)))


def test_too_few_simulations_to_refuse_anything(source):
    logits, labels = draw(np.full(3, 1 / 3), 60, 7)
    features = (np.ones((600, 1)) * source.labels[:, None], labels[:, None])
    for given, number in ((None, 99), (features, 199)):
        text = rf"simulations must be >= {number} to reject at level 0.01, got {number - 1}"
        with pytest.raises(ValueError, match=text):
            correct_prior(logits, source, features=given, simulations=number - 1)
        assert correct_prior(logits, source, features=given, simulations=number).residuals
