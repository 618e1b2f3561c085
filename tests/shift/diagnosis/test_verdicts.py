"""The decision table, a row a case, and what no combination of findings may say."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxtransfer.shift.report import Findings, actions, conclude

YES, NO, ASKED_NOTHING = True, False, None


@pytest.mark.parametrize(
    ("any_shift", "prior", "residual", "conclusion", "label", "covariate"),
    [
        (NO, NO, NO, "none detected", "rejected", "rejected"),
        (YES, YES, NO, "label", "supported", "not testable"),
        (NO, YES, NO, "label", "supported", "not testable"),
        (YES, NO, YES, "covariate", "rejected", "supported"),
        (NO, NO, YES, "covariate", "rejected", "supported"),
        (YES, YES, YES, "label and covariate", "not testable", "supported"),
        (YES, NO, NO, "undetermined", "rejected", "not testable"),
        (YES, YES, ASKED_NOTHING, "undetermined", "not testable", "not testable"),
        (
            ASKED_NOTHING,
            ASKED_NOTHING,
            ASKED_NOTHING,
            "undetermined",
            "not testable",
            "not testable",
        ),
    ],
)
def test_without_labels(any_shift, prior, residual, conclusion, label, covariate):
    found, verdicts = conclude(Findings(any_shift, prior, residual))
    assert found == conclusion
    assert [verdict.status for verdict in verdicts] == [label, covariate, "not testable"]


@pytest.mark.parametrize(
    ("unlabeled", "source_posteriors", "adjusted_posteriors", "preferred", "conclusion"),
    [
        # Concept shift shows in labels alone.
        ((NO, NO, NO), YES, YES, None, "concept"),
        ((YES, YES, NO), YES, YES, None, "concept"),
        # Labels unmask a covariate shift that looked like a label shift.
        ((YES, YES, NO), NO, YES, None, "covariate"),
        ((YES, YES, NO), NO, NO, "covariate", "covariate"),
        ((YES, YES, NO), YES, NO, None, "label"),
        ((YES, YES, NO), NO, NO, None, "label"),
        # p(y | x) unchanged: the features moved, and the outputs with them.
        ((YES, YES, YES), NO, YES, None, "covariate"),
        ((YES, YES, YES), YES, NO, None, "label and covariate"),
        # They decide what features left open.
        ((YES, NO, NO), YES, NO, None, "label"),
        ((YES, NO, NO), NO, NO, "covariate", "covariate"),
        ((YES, NO, NO), NO, NO, None, "undetermined"),
        # A change that the features did not show and one test of two saw.
        ((NO, NO, NO), YES, NO, None, "undetermined"),
        ((NO, NO, NO), NO, NO, None, "none detected"),
    ],
)
def test_with_labels(unlabeled, source_posteriors, adjusted_posteriors, preferred, conclusion):
    assert (
        conclude(Findings(*unlabeled, source_posteriors, adjusted_posteriors, preferred))[0]
        == conclusion
    )


def test_labels_for_a_label_shift_leave_nothing_to_covariates():
    verdicts = conclude(Findings(YES, YES, NO, YES, NO))[1]
    assert [verdict.status for verdict in verdicts] == ["supported", "rejected", "rejected"]


@given(st.tuples(*[st.sampled_from([True, False, None])] * 5))
def test_laws_of_all_findings(answers):
    findings = Findings(*answers)
    conclusion, verdicts = conclude(findings)
    status = {verdict.kind: verdict.status for verdict in verdicts}
    assert list(status) == ["label", "covariate", "concept"]
    # Nobody sees a concept shift without labels, and what was not asked is not rejected.
    assert (status["concept"] == "not testable") == (not findings.labeled)
    if conclusion == "concept":
        assert findings.labeled
    if not any(answers[:3]) and None in answers[:2]:
        assert conclusion != "none detected"
    if findings.residual:
        assert status["covariate"] == "supported"
    assert actions(conclusion)


def test_every_conclusion_asks_for_something_with_a_guard():
    conclusions = {
        conclude(Findings(*answers))[0]
        for answers in itertools.product([True, False, None], repeat=5)
    }
    assert conclusions == {
        "none detected",
        "label",
        "covariate",
        "label and covariate",
        "concept",
        "undetermined",
    }
    for conclusion in conclusions:
        assert all(action.what and action.guard for action in actions(conclusion))


def test_figures_appear_in_the_actions():
    correct, label = actions("label", gain=0.034, labels_needed=120)
    assert correct.expected.startswith("+3.4 points")
    assert "about 120" in label.what
