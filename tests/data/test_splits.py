"""Stratified splits and folds: laws for any labels and groups, and what cannot be made."""

import json

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold

from flaxtransfer.data import ArraySource, Splits, stratified_folds, stratified_split
from flaxtransfer.data.splits import Split

SEEDS = st.integers(0, 2**40)


@st.composite
def labelings(draw, least=4, most=30):
    counts = draw(st.lists(st.integers(least, most), min_size=2, max_size=5))
    labels = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(draw(SEEDS)).permutation(labels)


def per_class(part, labels):
    return np.bincount(labels[part], minlength=labels.max() + 1).tolist()


def as_sets(splits):
    return [set(part.tolist()) for part in splits]


@given(labelings(), SEEDS, st.integers(1, 3), st.data())
def test_parts_are_disjoint_and_together_everything(labels, seed, n, data):
    options = data.draw(
        st.sampled_from(
            [
                {},
                {"labels_per_class": n},
                {"labels_per_class": n, "val_per_class": n - 1},
                {"labels_per_class": n, "test_fraction": 0.25},
                {"val_per_class": n, "test_fraction": 0.0},
                {"val_fraction": 0.3, "test_fraction": 0.2},
            ]
        )
    )
    splits = stratified_split(labels, seed=seed, **options)
    joined = np.concatenate(splits)
    assert sorted(joined.tolist()) == list(range(len(labels)))
    for part in splits:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()


@given(labelings(), SEEDS, st.integers(1, 3), st.integers(0, 2))
def test_no_more_than_n_labels_of_a_class_are_used(labels, seed, n, val):
    assume(val < n)
    splits = stratified_split(labels, labels_per_class=n, val_per_class=val, seed=seed)
    classes = labels.max() + 1
    assert per_class(splits.train, labels) == [n - val] * classes
    assert per_class(splits.val, labels) == [val] * classes
    assert len(splits.test) == len(labels) - n * classes  # all the remaining ones
    assert len(splits.rest) == 0


@given(labelings(), SEEDS, st.data())
def test_fewer_labels_are_among_more_labels(labels, seed, data):
    few, many = sorted(data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=2, unique=True)))
    small, large = (stratified_split(labels, labels_per_class=n, seed=seed) for n in (few, many))
    assert set(small.train) < set(large.train)
    assert set(small.test) > set(large.test)
    with_val = stratified_split(labels, labels_per_class=many, val_per_class=many - few, seed=seed)
    assert as_sets(with_val)[0] == set(small.train.tolist())
    assert set(with_val.train) | set(with_val.val) == set(large.train)


@given(labelings(), SEEDS, st.floats(0.05, 0.25))
def test_with_a_test_fraction_the_test_set_is_the_same_for_every_other_setting(
    labels, seed, fraction
):
    wanted = stratified_split(labels, test_fraction=fraction, seed=seed).test.tolist()
    for options in (
        {"labels_per_class": 1},
        {"labels_per_class": 2, "val_per_class": 1},
        {"val_fraction": 0.5},
        {"val_per_class": 1},
    ):
        found = stratified_split(labels, test_fraction=fraction, seed=seed, **options)
        assert found.test.tolist() == wanted


@given(labelings(), SEEDS, st.integers(1, 20))
def test_another_class_changes_nothing_for_the_others(labels, seed, more):
    before = stratified_split(labels, labels_per_class=2, seed=seed)
    grown = np.concatenate([labels, np.full(more + 2, labels.max() + 1)])
    after = stratified_split(grown, labels_per_class=2, seed=seed)
    assert [i for i in after.train if i < len(labels)] == before.train.tolist()


@given(labelings(least=10), st.floats(0.05, 0.4), st.floats(0.05, 0.4), SEEDS)
def test_shares_are_of_each_class(labels, val, test, seed):
    splits = stratified_split(labels, val_fraction=val, test_fraction=test, seed=seed)
    for count, tested, validated in zip(
        np.bincount(labels),
        per_class(splits.test, labels),
        per_class(splits.val, labels),
        strict=True,
    ):
        assert abs(tested - test * count) <= 1
        assert abs(validated - val * (count - tested)) <= 1
        assert tested > 0
        assert validated > 0


def test_the_defaults_are_a_fifth_to_test_and_a_tenth_of_the_rest_to_validate():
    labels = np.repeat([0, 1], 100)
    assert [len(part) for part in stratified_split(labels)] == [144, 16, 40, 0]


def test_a_fixed_test_set_leaves_a_rest_that_nobody_looked_at():
    labels = np.repeat([0, 1], 100)
    splits = stratified_split(labels, labels_per_class=5, val_per_class=1, test_fraction=0.5)
    assert [len(part) for part in splits] == [8, 2, 100, 90]


def test_one_seed_is_one_split_and_another_is_another():
    labels = np.repeat([0, 1, 2], 50)
    first, again, other = (
        stratified_split(labels, labels_per_class=5, seed=seed).train.tolist() for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other
    # Classes do not share an order either.
    assert [i for i in first if i < 50] != [i - 50 for i in first if 50 <= i < 100]


def test_positions_are_chosen_evenly():
    # 2000 seeds choose 1 of 10: each about 200 times, standard deviation 13.4.
    labels = np.repeat([0, 1], 10)
    chosen = [stratified_split(labels, labels_per_class=1, seed=s).train[0] for s in range(2000)]
    assert np.abs(np.bincount(chosen, minlength=10) - 200).max() < 5 * 13.4


def test_the_digits_with_five_labels_a_class(digits):
    labels = digits.labels()
    splits = stratified_split(labels, labels_per_class=5, val_per_class=1, seed=0)
    assert [len(part) for part in splits] == [40, 10, 1747, 0]
    # Recorded once: runs under any release of NumPy must find this pool again.
    assert splits.val.tolist() == [30, 241, 427, 740, 829, 971, 1310, 1353, 1380, 1713]
    assert splits.train[:8].tolist() == [80, 93, 101, 230, 242, 285, 346, 374]


@pytest.mark.parametrize(
    ("labels", "options", "text"),
    [
        ([0, 0, 0], {}, "there must be at least 2 classes, got only '0'"),
        (
            [0] * 9 + [1] * 3,
            {"labels_per_class": 5},
            "class '1' must have 5 examples, got 3$",
        ),
        (
            [0] * 3 + [1] * 2,
            {"labels_per_class": 5, "class_names": ("cat", "dog")},
            r"class 'cat' must .*got 3; class 'dog' must .*got 2",
        ),
        (
            [0] * 9 + [1] * 5,
            {"labels_per_class": 5},
            r"class '1' has 5 examples, all of which would be used.*test_fraction=0\.0",
        ),
        (
            [0] * 9 + [1] * 6,
            {"labels_per_class": 5, "test_fraction": 0.5},
            "class '1' must have 5 examples after 3 for testing, got 3 of 6",
        ),
        ([0] * 9 + [2] * 9, {}, "class '1' has no examples"),
        ([0] * 9 + [1] * 9, {"class_names": ("a", "b", "c")}, "class 'c' has no examples"),
        (
            [0] * 9 + [1] * 9 + [2] * 9,
            {"class_names": ("a", "b")},
            "class_names must have one name per class, got 2 names and labels up to 2",
        ),
        ([0] * 9 + [1] * 2, {}, "class '1' must have 2 examples after 1 for testing, got 1 of 2"),
        ([0, 1] * 9, {"labels_per_class": 0}, "labels_per_class must be >= 1, got 0"),
        (
            [0, 1] * 9,
            {"labels_per_class": 5, "val_per_class": 5},
            r"val_per_class must be < labels_per_class \(5\), got 5, which leaves none to train on",
        ),
        ([0, 1] * 9, {"val_per_class": -1}, "val_per_class must be >= 0, got -1"),
        (
            [0, 1] * 9,
            {"val_per_class": 1, "val_fraction": 0.1},
            "val_fraction and val_per_class are both given",
        ),
        (
            [0, 1] * 9,
            {"labels_per_class": 2, "val_fraction": 0.1},
            "val_fraction cannot be combined with labels_per_class.*give val_per_class",
        ),
        (
            [0, 1] * 9,
            {"test_fraction": 1.0, "val_fraction": -0.1, "seed": -1},
            r"val_fraction .*got -0\.1; test_fraction must be .* < 1, got 1\.0; seed .*got -1",
        ),
        ([], {}, r"labels must have shape .*, got \(0,\)"),
        ([[0, 1]], {}, r"labels must have shape \[examples\].*, got \(1, 2\)"),
        ([0, -1], {}, "labels must be >= 0, got -1"),
    ],
)
def test_a_split_that_cannot_be_made_says_why(labels, options, text):
    with pytest.raises(ValueError, match=text):
        stratified_split(labels, **options)


def test_labels_are_integers():
    with pytest.raises(TypeError, match="labels must be integers, got float64"):
        stratified_split([0.0, 1.0])


def test_all_may_be_used_when_no_test_set_is_wanted():
    splits = stratified_split([0, 0, 1, 1], labels_per_class=2, test_fraction=0.0)
    assert [len(part) for part in splits] == [4, 0, 0, 0]


@st.composite
def grouped(draw, least=6):
    """Labels of two to four classes, each in at least ``least`` groups of one to five examples."""
    random = np.random.default_rng(draw(SEEDS))
    classes = draw(st.integers(2, 4))
    kinds = np.concatenate([np.repeat(np.arange(classes), least), random.integers(0, classes, 9)])
    groups = np.repeat(np.arange(len(kinds)), random.integers(1, 6, len(kinds)))
    labels = kinds[groups]
    # Half of the further examples are of any class, as patients with several findings are.
    mixed = (random.random(len(labels)) < 0.5) & np.r_[False, groups[1:] == groups[:-1]]
    labels[mixed] = random.integers(0, classes, mixed.sum())
    order = random.permutation(len(labels))
    return labels[order], groups[order]


def groups_of(splits, groups):
    return [set(groups[part].tolist()) for part in splits]


@given(grouped(), SEEDS, st.sampled_from([(0.1, 0.2), (0.3, 0.3), (0.2, 0.0), (0.0, 0.4)]))
def test_no_group_is_in_two_parts(data, seed, fractions):
    labels, groups = data
    val, test = fractions
    splits = stratified_split(
        labels, groups=groups, val_fraction=val, test_fraction=test, seed=seed
    )
    assert sorted(np.concatenate(splits).tolist()) == list(range(len(labels)))
    found = groups_of(splits, groups)
    assert sum(map(len, found)) == len(set(groups.tolist()))
    assert set(labels[splits.train]) == set(labels)
    for part, share in zip(splits, (1, val, test, 0), strict=True):
        assert set(labels[part]) == (set(labels) if share else set())


@given(grouped(), SEEDS, st.integers(2, 5), st.booleans(), st.sampled_from([0.0, 0.1, 0.3]))
def test_each_example_is_tested_in_one_fold(data, seed, folds, whole, val):
    labels, groups = data
    given_groups = groups if whole else None
    parts = stratified_folds(labels, folds, groups=given_groups, val_fraction=val, seed=seed)
    assert len(parts) == folds
    tested = np.concatenate([splits.test for splits in parts])
    assert sorted(tested.tolist()) == list(range(len(labels)))
    for splits in parts:
        assert sorted(np.concatenate(splits).tolist()) == list(range(len(labels)))
        assert set(labels[splits.train]) == set(labels)
        if whole:
            assert sum(map(len, groups_of(splits, groups))) == len(set(groups.tolist()))
        assert bool(len(splits.val)) == (val > 0)
    if not whole:
        counts = np.array([per_class(splits.test, labels) for splits in parts])
        assert (np.ptp(counts, axis=0) <= 1).all()
        assert np.ptp(counts.sum(axis=1)) <= 1


def test_groups_are_allotted_as_evenly_as_scikit_learns():
    """Mean standard deviation over folds of the shares of classes, and of examples."""
    random, ours, theirs = np.random.default_rng(0), [], []
    for trial in range(20):
        count, classes, folds = random.integers((12, 2, 2), (80, 5, 6))
        groups = np.repeat(np.arange(count), random.geometric(0.2, count))
        shares = random.dirichlet(np.ones(classes), count)
        labels = np.array([random.choice(classes, p=shares[group]) for group in groups])
        peer = StratifiedGroupKFold(int(folds), shuffle=True, random_state=trial)
        for found, tests in (
            (ours, [s.test for s in stratified_folds(labels, int(folds), groups=groups)]),
            (theirs, [test for _, test in peer.split(labels, labels, groups)]),
        ):
            counts = np.array([np.bincount(labels[t], minlength=classes) for t in tests])
            of_classes = (counts / np.bincount(labels, minlength=classes)).std(axis=0).mean()
            found.append((of_classes, counts.sum(axis=1).std() / len(labels)))
    ours, theirs = np.mean(ours, axis=0), np.mean(theirs, axis=0)
    assert (ours < theirs).all()
    assert ours[0] < 0.02


@pytest.mark.parametrize("kind", ["labels", "values"])
def test_labels_of_several_outputs_have_about_their_shares_in_each_part(kind):
    random = np.random.default_rng(0)
    values = random.normal(size=(600, 3))
    labels = (values > (0.0, 1.0, 1.5)).astype(np.float32) if kind == "labels" else values
    labels[random.random(labels.shape) < 0.1] = np.nan
    groups = np.arange(600) // 3
    splits = stratified_split(labels, groups=groups, val_fraction=0.25, test_fraction=0.2)
    assert sum(map(len, groups_of(splits, groups))) == 200
    assert [len(part) for part in splits] == pytest.approx([360, 120, 120, 0], abs=6)
    for part in splits[:3]:
        found = np.nanmean(labels[part], axis=0)
        # Three standard errors of a random part would be 0.14 and 0.27.
        np.testing.assert_allclose(
            found, np.nanmean(labels, axis=0), atol=0.02 if kind == "labels" else 0.12
        )
        assert np.isnan(labels[part]).mean() == pytest.approx(0.1, abs=0.02)


@given(SEEDS, st.integers(2, 4), st.booleans(), st.booleans(), st.integers(1, 3))
def test_folds_of_several_outputs_test_each_example_once(seed, folds, whole, flags, outputs):
    random = np.random.default_rng(seed)
    labels = random.normal(size=(random.integers(12, 40), outputs))
    labels = (labels > 1).astype(np.float32) if flags else labels
    labels[random.random(labels.shape) < 0.2] = np.nan
    groups = np.arange(len(labels)) // 2 if whole else np.arange(len(labels))
    parts = stratified_folds(labels, folds, groups=groups if whole else None, seed=seed)
    tested = np.concatenate([splits.test for splits in parts])
    assert sorted(tested.tolist()) == list(range(len(labels)))
    for splits in parts:
        assert sorted(np.concatenate(splits).tolist()) == list(range(len(labels)))
        assert sum(map(len, groups_of(splits, groups))) == len(set(groups.tolist()))
        assert len(splits.train)
        assert len(splits.test)


PATIENTS = ["a", "a", "b", "b", "c", "c"]


@pytest.mark.parametrize(
    ("labels", "options", "text"),
    [
        ([0, 0, 0, 0, 1, 1], {}, r"each class must be in at least 3 groups, .*'0' \(2\), '1' \(1"),
        ([0, 1] * 3, {"groups": ["a"] * 6}, "a split of 3 parts needs as many groups, got 1"),
        ([0, 1] * 3, {"groups": PATIENTS[:5]}, "groups must have one value per example, 6, got 5"),
        (
            [0, 1] * 3,
            {"labels_per_class": 1},
            "labels_per_class and val_per_class must be left out",
        ),
        ([0, 1] * 3, {"val_fraction": 1.5}, r"val_fraction must be >= 0 and < 1, got 1\.5"),
        ([0, 1] * 3, {"class_names": ["x"]}, "got 1 names and labels up to 1"),
        ([0] * 6, {}, "at least 2 classes, got only '0'"),
    ],
)
def test_groups_that_make_a_split_impossible(labels, options, text):
    with pytest.raises(ValueError, match=text):
        stratified_split(labels, **{"groups": PATIENTS, **options})


@pytest.mark.parametrize(
    ("labels", "folds", "groups", "text"),
    [
        ([0, 1] * 3, 1, None, "folds must be >= 2, got 1"),
        ([0, 1] * 3, 7, None, "7 folds need at least 7 examples, got 6"),
        ([0, 1] * 3, 4, PATIENTS, "4 folds need at least 4 groups, got 3"),
        ([0, 0, 0, 0, 0, 1], 2, None, r"at least 2 examples, one per part, got '1' \(1\)"),
        ([0, 0, 0, 0, 1, 1], 2, PATIENTS, r"at least 2 groups, one per part, got '1' \(1\)"),
    ],
)
def test_folds_that_cannot_be_made(labels, folds, groups, text):
    with pytest.raises(ValueError, match=text):
        stratified_folds(labels, folds, groups=groups)


def test_numbers_are_split_by_quantiles():
    """A fifth of each decile is tested, so that the parts have nearly the same mean."""
    values = np.random.default_rng(0).lognormal(size=(500, 1)).astype(np.float32)
    splits = stratified_split(values, val_fraction=0.2, test_fraction=0.2)
    assert sorted(np.concatenate(splits)) == list(range(500))
    assert [len(part) for part in splits] == [320, 80, 100, 0]
    edges = np.quantile(values, np.linspace(0, 1, 11)[1:-1])
    assert set(np.bincount(np.digitize(values[splits.test, 0], edges))) == {10}
    labels = (values > 1) * np.ones((1, 3), np.float32)
    again = [stratified_split(labels, seed=seed).test for seed in (0, 0, 1)]
    np.testing.assert_array_equal(again[0], again[1])
    assert not np.array_equal(again[0], again[2])
    with pytest.raises(ValueError, match="labels_per_class and val_per_class must be left out"):
        stratified_split(labels, labels_per_class=3)


def test_the_record_of_several_labels_says_what_was_relabeled():
    images = np.zeros((3, 4, 4), np.uint8)
    labels = [[0.0, np.nan], [1.5, 2.0], [0.0, 1.0]]
    source = ArraySource(images, labels, ("a", "b"), task="regression")
    splits = Splits.of([0, 1], [2])
    before = Split.of(source, splits)
    kept = Split.from_json(json.loads(json.dumps(before.to_json(), allow_nan=False)))
    assert kept.differences(before) == []
    changed = ArraySource(images, [[0.0, 3.0], *labels[1:]], ("a", "b"), task="regression")
    said = kept.differences(Split.of(changed, splits))
    assert said == ["1 example is relabeled: example 0 (a=0 b=?, now a=0 b=3)"]
