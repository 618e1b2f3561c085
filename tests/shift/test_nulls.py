"""Values beside their nulls: what every distance and every score owes its reader."""

import numpy as np
import pytest

from flaxtransfer.analysis.distances import frechet_distance, sliced_wasserstein
from flaxtransfer.analysis.similarity import debiased_cka, proxy_a_distance
from flaxtransfer.analysis.transferability import h_score, leep, logme
from flaxtransfer.shift.statistics import Distance, encode_labels, random_folds, random_permutations

DISTANCES = [frechet_distance, proxy_a_distance, sliced_wasserstein]
SCORES = [logme, h_score]


def draw(rows, columns, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, columns))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(
    ("source", "target", "options", "text"),
    [
        (draw(3, 2), draw(9, 2), {}, "source features must have >= 4 rows for a distance, got 3"),
        (
            draw(9, 2),
            draw(9, 3),
            {},
            "must have the same number of columns, got 2 and 3",
        ),
        (
            draw(9, 2),
            np.full((9, 2), np.nan),
            {},
            "must be finite, got 9 of 9 rows with NaN",
        ),
        (
            draw(9, 2),
            draw(9, 2)[:, 0],
            {},
            r"must have shape \[n, features\], got \[9\]",
        ),
        (
            draw(9, 2),
            draw(9, 2),
            {"permutations": 18},
            "must be >= 19 to reach p <= 0.05, got 18",
        ),
    ],
)
def test_samples_that_have_no_distance(distance, source, target, options, text):
    with pytest.raises(ValueError, match=text):
        distance(source, target, **options)


@pytest.mark.parametrize("distance", DISTANCES)
def test_dead_features_are_at_distance_0_and_say_so(distance):
    found = distance(np.full((6, 3), 0.1), np.full((7, 3), 0.1), permutations=19)
    assert found.value == pytest.approx(0, abs=1e-9)
    assert found.p == 1
    assert found.notes == ("all rows of both samples are equal",)


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_large_shift_has_the_smallest_p_and_none_has_no_excess(distance):
    source, target = draw(40, 60, 1), draw(30, 60, 2)
    same, moved = distance(source, target), distance(source, target + 1)
    assert abs(same.excess) < 3 * same.null_sd
    assert moved.p == 1 / 200
    assert moved.excess == moved.value - moved.null_mean > 5 * same.null_sd
    assert (moved.counts, moved.permutations) == ((40, 30), 199)


@pytest.mark.parametrize("distance", [*DISTANCES, debiased_cka])
def test_a_seed_is_a_result(distance):
    source, target = draw(12, 3, 1), draw(12, 3, 2)
    first, again = distance(source, target, seed=3), distance(source, target, seed=3)
    assert first == again
    assert first.null_mean != distance(source, target, seed=4).null_mean


@pytest.mark.parametrize("score", [*SCORES, lambda x, y: leep(x**2 / (x**2).sum(1)[:, None], y)])
@pytest.mark.parametrize(
    ("rows", "labels", "text"),
    [
        (6, [2] * 6, "labels must have >= 2 classes for a score, got 6 labels of class 2"),
        (3, [0, 1, 0], "a score needs >= 4 labeled examples, got 3"),
        (6, [0, 1, 0, 1], r"labels must have shape \[6\], got \[4\]"),
        (6, [0, 1, 0, 1, 0, -1], "first -1 in row 5"),
        (6, [0, 1, 0, 1, 0, 0.5], "labels must be class numbers"),
    ],
)
def test_labels_that_nothing_can_be_told_of(score, rows, labels, text):
    with pytest.raises(ValueError, match=text):
        score(draw(rows, 3), labels)


@pytest.mark.parametrize("score", SCORES)
def test_features_that_tell_nothing_are_refused(score):
    with pytest.raises(ValueError, match="features must not be constant over all examples"):
        score(np.full((6, 3), 0.1), [0, 1] * 3)
    with pytest.raises(ValueError, match="1 of 6 rows with NaN"):
        score(np.where(np.eye(6, 3, -5) > 0, np.nan, draw(6, 3)), [0, 1] * 3)


@pytest.mark.parametrize("score", SCORES)
def test_signal_is_told_from_noise_with_fewer_examples_than_features(score):
    labels = np.arange(40) % 4
    noise = draw(40, 100)
    signal = noise + 3 * np.eye(4)[labels] @ draw(4, 100, seed=1)
    assert score(signal, labels).p == 1 / 200
    assert abs(score(noise, labels).excess) < 3 * score(noise, labels).null_sd
    assert score(signal, 7 * labels + 1) == score(signal, labels)


def test_orders_are_permutations_each_with_its_own_probability():
    seen = [tuple(order) for order in random_permutations(3, 3000, seed=5)]
    counts = np.array([seen.count(order) for order in set(seen)])
    assert len(counts) == 6
    # Chi-squared with 5 degrees of freedom: 20.5 is passed once in a thousand seeds.
    assert ((counts - 500) ** 2 / 500).sum() < 20.5
    assert [o.tolist() for o in random_permutations(4, 19, 0)] == [
        o.tolist() for o in random_permutations(4, 19, 0)
    ]


@pytest.mark.parametrize(("count", "folds"), [(5, 5), (11, 4), (4, 2)])
def test_folds_differ_by_one_at_most(count, folds):
    sizes = np.bincount(random_folds(count, folds, 3), minlength=folds)
    assert sizes.sum() == count
    assert np.ptp(sizes) <= 1


@pytest.mark.parametrize("folds", [1, 6])
def test_folds_that_there_cannot_be(folds):
    with pytest.raises(ValueError, match=f"the number of examples, 5, got {folds}"):
        random_folds(5, folds, 0)


def test_classes_without_examples_are_left_out():
    found, count = encode_labels([9, 3, 3, 9, 5.0], 5)
    assert (found.tolist(), count) == ([2, 0, 0, 2, 1], 3)


def test_excess_is_what_lies_beyond_random_deals():
    assert Distance("d", 5.0, 4.0, 1.0, 0.2, 99, (9, 9)).excess == 1


@pytest.mark.slow
@pytest.mark.parametrize("distance", [*DISTANCES, debiased_cka])
@pytest.mark.parametrize(("rows", "columns"), [((20, 13), 5), ((12, 12), 40)])
def test_p_values_are_uniform_where_nothing_differs(distance, rows, columns):
    """Level at 0.05 over 400 draws: a binomial count, which lies between 9 and 33 in 99.9 %."""
    if distance is debiased_cka:
        rows = (rows[0], rows[0])
    p = []
    for seed in range(400):
        random = np.random.default_rng(seed)
        source, target = (
            random.exponential(size=(rows[0], columns)),
            random.exponential(size=(rows[1], columns)),
        )
        p.append(distance(source, target, permutations=39, seed=seed).p)
    assert 9 <= sum(value <= 0.05 for value in p) <= 33
    assert 0.45 < np.mean(p) < 0.58


@pytest.mark.slow
@pytest.mark.parametrize("score", [*SCORES, leep])
def test_p_values_of_scores_are_uniform_for_random_labels(score):
    p = []
    for seed in range(400):
        random = np.random.default_rng(seed)
        features = random.dirichlet(np.ones(8), size=24)
        p.append(score(features, random.permutation(24) % 3, permutations=39, seed=seed).p)
    assert 9 <= sum(value <= 0.05 for value in p) <= 33
    assert 0.45 < np.mean(p) < 0.58
