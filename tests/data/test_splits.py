"""Stratified splits: laws for any labels, and the errors of those that cannot be made."""

import json

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flaxtransfer.data import ArraySource, Splits, stratified_split
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


def test_numbers_are_split_by_deciles_and_labels_at_random():
    """A tenth of each decile is tested, so that the parts have nearly the same mean."""
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
