"""The procedure on worlds whose shift is known, and on arrays that are wrong."""

import dataclasses
import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest

import flaxtransfer.shift.diagnosis
from flaxtransfer.report.pages import HEADLINES, render_html
from flaxtransfer.shift.calibration import Calibration, calibrate
from flaxtransfer.shift.diagnosis import (
    _preferred,
    _small_sample_notes,
    any_rejected,
    diagnose,
    labeled_tests,
    unlabeled_tests,
)
from flaxtransfer.shift.report import joint_projection
from flaxtransfer.shift.statistics import HypothesisTest

SCHEMA = json.loads(
    Path(flaxtransfer.shift.diagnosis.__file__).with_name("report.schema.json").read_text()
)
MEANS = 2.5 * np.eye(3, 6)


def world(seed, count, prevalence, *, nuisance=0.0):
    """Three Gaussian classes in six dimensions: exact logits, labels, features."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, size=count, p=prevalence)
    features = MEANS[labels] + rng.normal(size=(count, 6))
    features[:, 3:] += nuisance
    return features @ MEANS.T, labels, features


SOURCE = world(0, 300, [1 / 3] * 3)
EVEN, FEW_OF_ONE = [1 / 3] * 3, [0.7, 0.2, 0.1]


def report(target, **settings):
    logits, _, features = target
    return diagnose(*SOURCE, logits, features, permutations=99, **settings)


@pytest.fixture(scope="module")
def label_shift():
    target = world(1, 200, FEW_OF_ONE)
    return report(target, labeled=(np.arange(40), target[1][:40]), class_names=("a", "b & c", "d"))


def test_a_label_shift(label_shift):
    assert label_shift.conclusion == "label"
    assert label_shift.verdict("label").status == "supported"
    assert label_shift.verdict("concept").status == "rejected"
    likeliest = label_shift.prevalences[0]
    assert np.abs(likeliest.estimate - FEW_OF_ONE).max() < 0.08
    assert label_shift.counts == (300, 200, 40)
    printed = str(label_shift)
    assert printed.startswith("shift: label (300 held-out examples of the source, 200 of the targ")
    assert "covariate shift: " in printed
    assert f"likelihood ratio of the prior: p {label_shift.tests[4].p:.3g} (adjusted" in printed
    assert label_shift.actions[0].expected.startswith("+")
    with pytest.raises(ValueError, match="must be one of label, covariate, concept, got 'prior'"):
        label_shift.verdict("prior")
    # With labels, the first sentence (no one can see a concept shift) is not true any more.
    assert len(label_shift.not_identifiable) == 4


def test_the_questions_and_their_tests():
    logits, labels, features = world(1, 200, FEW_OF_ONE)
    source = calibrate(*SOURCE[:2])
    probabilities = source.apply(logits)
    settings = {"permutations": 19, "seed": 0}
    found = unlabeled_tests(source, SOURCE[2], probabilities, features, settings)
    assert [test.name for test in found.any_shift] == [
        "maximum mean discrepancy",
        "classifier two-sample test",
        "Kolmogorov-Smirnov",
    ]
    assert [test.name for test in found.prior] == [
        "predicted labels",
        "likelihood ratio of the prior",
    ]
    # Under label shift labels follow the adjusted probabilities, and not those that were.
    asked = labeled_tests(source, probabilities, (np.arange(200), labels), 0)
    assert any_rejected(asked.source_posteriors, 0.05)
    assert not any_rejected(asked.adjusted_posteriors, 0.05)
    assert [test.rejected() for test in asked.ratios] == [True, False]


@pytest.mark.parametrize(
    ("covariate", "label", "preferred"),
    [(0.01, 0.5, "label"), (0.5, 0.01, "covariate"), (0.01, 0.01, None), (0.5, 0.5, None)],
)
def test_the_hypothesis_that_stands_is_preferred(covariate, label, preferred):
    ratios = [HypothesisTest("", "", 0.0, p, 0.0, "", None, (9,)) for p in (covariate, label)]
    assert _preferred(ratios, 0.05) == preferred
    assert _preferred((), 0.05) is None


@pytest.mark.parametrize(
    ("rare", "count", "notes"),
    [
        (5, 50, ()),
        (4, 50, ("fewer than 5 held-out examples at the source: b",)),
        (5, 49, ("49 target examples show large shifts only; use 50 or more",)),
    ],
)
def test_what_is_too_little(rare, count, notes):
    labels = np.repeat([0, 1], [9, rare])
    source = Calibration("none", np.ones(2), np.zeros(2), np.eye(2)[labels], labels)
    assert _small_sample_notes(source, count, ("a", "b")) == notes


@pytest.mark.parametrize("width", [3, 80])
def test_features_are_projected_into_units_of_their_spread(width):
    rng = np.random.default_rng(0)
    source, target = 7 * rng.normal(size=(60, width)) + 3, 7 * rng.normal(size=(50, width))
    both = np.concatenate(joint_projection(source, target))
    assert both.shape == (110, min(width, 64))
    np.testing.assert_allclose(both.mean(0), 0, atol=1e-12)
    assert np.square(both).sum(1).mean() == pytest.approx(min(width, 64))


def test_a_covariate_shift():
    found = report(world(2, 200, EVEN, nuisance=0.8))
    assert found.conclusion == "covariate"
    assert found.verdict("concept").status == "not testable"


def test_a_concept_shift_is_seen_in_labels_alone():
    logits, labels, features = world(3, 200, EVEN)
    renamed = (labels + 1) % 3
    unseen = report((logits, None, features))
    assert unseen.conclusion == "none detected"
    smallest = unseen.tests[4].minimum_detectable
    assert f"a change of {smallest:.2f} in total variation" in unseen.verdict("label").evidence
    found = report((logits, None, features), labeled=(np.arange(30), renamed[:30]))
    assert found.conclusion == "concept"


def test_one_class_that_is_left(label_shift):
    found = report(world(4, 60, [0, 1, 0]))
    assert found.conclusion == "label"
    assert found.prevalences[0].estimate[1] > 0.95
    assert found.prevalences[0].effective_classes < label_shift.prevalences[0].effective_classes


def test_samples_too_small_sample_notes_for_any_test_settle_nothing():
    found = report(world(5, 4, EVEN))
    assert found.conclusion == "undetermined"
    assert all(test.not_testable for test in found.tests if test.p is None)
    assert any("4 target examples" in note for note in found.notes)
    jsonschema.validate(found.to_json(), SCHEMA)


def test_a_model_that_knows_nothing_does_not_say_that_shares_stayed():
    rng = np.random.default_rng(7)
    labels = np.arange(300) % 3
    noise, features = rng.normal(size=(500, 3)), rng.normal(size=(500, 6))
    found = diagnose(
        noise[:300], labels, features[:300], noise[300:], features[300:], permutations=99
    )
    assert found.verdict("label").status == "not testable"
    assert found.conclusion == "undetermined"


@pytest.mark.slow
def test_the_same_seed_says_the_same_of_classes_in_another_order():
    logits, _, features = world(6, 100, FEW_OF_ONE)
    order = [2, 0, 1]
    first = report((logits, None, features))
    source_logits, labels, source_features = SOURCE
    second = diagnose(
        source_logits[:, order],
        np.argsort(order)[labels],
        source_features,
        logits[:, order],
        features,
        permutations=99,
    )
    assert first.conclusion == second.conclusion
    np.testing.assert_allclose(
        first.prevalences[0].estimate[order], second.prevalences[0].estimate, atol=1e-6
    )


def test_json_is_of_the_schema_and_has_no_nan(label_shift):
    written = json.dumps(label_shift.to_json(), allow_nan=False)
    jsonschema.validate(json.loads(written), SCHEMA)
    broken = {**label_shift.to_json(), "conclusion": "maybe"}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SCHEMA)


def test_the_page_has_everything_and_escapes_it(label_shift):
    figures = {"a <figure>": b"png"}
    page = render_html(label_shift, figures, source="runs/x", target="folder:<there>")
    assert HEADLINES["label"] in page
    assert "b &amp; c" in page
    assert "<there>" not in page
    assert 'src="data:image/png;base64,cG5n"' in page
    for test in label_shift.tests:
        assert test.name in page
    assert "http" not in page  # nothing is fetched from elsewhere
    assert "(300 held-out examples) against" in page
    assert "(200 examples, 40 of them with labels); tests at level 0.05" in page
    # A share with its interval, and numbers of tests to the right, the hypothesis to the left.
    likeliest, test = label_shift.prevalences[0], label_shift.tests[0]
    ends = f"{likeliest.low[0]:.3f} to {likeliest.high[0]:.3f}"
    number = '<td class="number">'
    assert f"{number}{likeliest.estimate[0]:.3f} <small>{ends}</small></td>" in page
    assert f"<td>{test.hypothesis}</td>{number}{test.p:.3g}</td>" in page
    bare = dataclasses.replace(
        label_shift,
        counts=(300, 200, 0),
        prevalences=(
            dataclasses.replace(likeliest, low=np.full(3, np.nan), high=np.full(3, np.nan)),
        ),
    )
    page = render_html(bare, {}, source="runs/x", target="y")
    assert "(200 examples, none with labels)" in page
    assert f"{number}{likeliest.estimate[0]:.3f}</td>" in page


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"level": 0}, "level must be between 0 and 1, got 0"),
        ({"class_names": ("a", "b")}, "class_names must have 3 names, got 2"),
        ({"labeled": ([0, 0], [1, 1])}, "positions of labels must be different"),
        ({"labeled": ([500], [1])}, "positions of labels"),
        ({"labeled": ([0], [3])}, r"within 0 \.\. 2, got 1 outside"),
    ],
)
def test_what_is_wrong_is_said(settings, text):
    with pytest.raises(ValueError, match=text):
        report(world(7, 30, EVEN), **settings)


def test_arrays_that_do_not_belong_together():
    logits, labels, features = SOURCE
    with pytest.raises(ValueError, match="same model"):
        diagnose(logits, labels, features, logits, features[:, :4])
    with pytest.raises(ValueError, match=r"200|300"):
        diagnose(logits, labels, features[:200], logits, features)
    with pytest.raises(ValueError, match="50"):
        diagnose(logits, labels, features, logits[:50], features)
