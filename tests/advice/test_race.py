"""Races of drawn rights and wrongs, where it is known who should win."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flaxtransfer as ft
from flaxtransfer.advice import race as module
from flaxtransfer.advice.race import (
    DELTA,
    Prior,
    checked_gains,
    following,
    on_target,
    prior_of,
    race,
)

PRIORS = {"low": Prior(), "high": Prior(), "scratch": Prior()}
KNOWN = dict.fromkeys(PRIORS, Prior(targets=9))
COSTS = {"head": 10.0, "low": 900.0, "high": 1000.0, "scratch": 1000.0}


def drawn(seed: int, folds: int = 5, images: int = 40, **accuracies: float):
    """Folds in which strategies agree on most images, as networks of one start do."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(folds):
        hardness = random.random(images)
        found.append(
            {
                name: (0.7 * hardness + 0.3 * random.random(images))
                < np.quantile(
                    0.7 * np.sort(random.random(20_000)) + 0.3 * random.random(20_000), acc
                )
                for name, acc in accuracies.items()
            }
        )
    return found


def test_the_posterior_is_that_of_a_normal_mean():
    """By hand: a prior of 0 ± 6 points, and 12 won, 2 lost of 100 once."""
    fold = {"head": np.arange(100) < 70, "low": (np.arange(100) < 82) & (np.arange(100) >= 2)}
    (_, low), prior = race([fold], {"low": Prior()}, COSTS, "head").standings, Prior()
    variance = 16 / 100**2 + prior.noise**2
    precision = prior.deviation**-2 + 1 / variance
    assert low.images == 100
    assert low.mean == pytest.approx(0.10 / variance / precision)
    assert low.deviation == pytest.approx(precision**-0.5)
    assert low.z == pytest.approx(10 / math.sqrt(14))


def test_more_folds_lower_the_error_of_counting_alone():
    """By hand: what folds show differs from what all labels give, however many folds there are."""
    fold = {"head": np.arange(50) < 25, "low": np.arange(50) < 30}
    prior = Prior(noise=0.05, growth=0.03, drawn=0.2)
    (_, low) = race([fold, fold], {"low": prior}, COSTS, "head").standings
    variance = 12 / 100**2 / 0.8**2 + 0.05**2
    precision = prior.deviation**-2 + 1 / variance
    assert low.mean == pytest.approx((0.10 / 0.8 + 0.03) / variance / precision)
    assert low.deviation == pytest.approx(precision**-0.5)


def test_what_a_target_leaves_bounds_what_is_expected():
    """By hand: 40 % of ten classes' labels drawn, so 36 % wrong, and a head right in 90 of 100."""
    left = 1 - (0.6 * 0.9 + 0.4 / 10)
    expected = on_target(Prior(0.15, 0.17, targets=9), left, 0.36, 10)
    assert expected.drawn == pytest.approx(0.4)
    assert expected.mean == pytest.approx(0.1 - 0.18)
    assert expected.deviation == pytest.approx(math.hypot(0.1, 0.36 / math.sqrt(12)))
    assert expected.growth == pytest.approx(0.18 * 0.1)
    # Growth was measured where gains were.
    assert on_target(Prior(0.1, 0.1, targets=9), 0.5).mean == 0.1
    assert on_target(Prior(), 0.5).growth == 0


def test_the_first_is_judged_until_it_is_clear_then_the_next_is_tried():
    def after(*folds, priors=KNOWN):
        state = race(folds, priors, COSTS, "head")
        return following(state, folds, priors, 3, "head")

    right = np.arange(60)
    level = {"head": right < 40, "low": (right < 41) & (right > 0)}
    better = {"head": right < 20, "low": right < 50}
    assert after() == "low"
    assert after(level) == "low"
    assert after(level, level, level) == "high"
    assert after(better) == "high"
    assert after(better | {"high": right < 49}) == "low"
    # Where nothing is known each is tried once, before any is tried again.
    assert after(level, priors=PRIORS) == "high"
    both = level | {"high": level["low"]}
    assert after(both, priors=PRIORS) == "scratch"
    assert after(both | {"scratch": level["low"]}, priors=PRIORS) == "low"
    # Unless it is clear who is best: nothing is left to be judged.
    one = {"low": Prior(targets=9)}
    assert following(race([better] * 3, one, COSTS, "head"), [better] * 3, one, 3, "head") is None


def test_before_any_fold_the_free_head_leads():
    found = race([], PRIORS, COSTS, "head")
    assert found.leader == "head"
    assert not found.over
    assert [one.name for one in found.standings] == ["head", *PRIORS]
    # Prior knowledge alone leaves no free head: nothing was seen on these images.
    sure = race([], {"low": Prior(mean=0.2)}, COSTS, "head")
    assert sure.leader == "head"


def test_known_gains_decide_with_the_images_and_not_after_them():
    """One more right of 40 is no proof, and beside a gain of 10 points elsewhere enough."""
    right = np.arange(40)
    fold = {"head": right < 20, "low": (right < 22) & (right > 0)}
    for prior, leader in ((Prior(0.1, 0.15), "head"), (Prior(0.1, 0.15, targets=9), "low")):
        found = race([fold], {"low": prior}, COSTS, "head")
        assert found.standings[1].z < 1
        assert found.leader == leader
    # Far behind on the images, it is left all the same; and what was not tried is not chosen.
    behind = {"head": right < 30, "low": right < 10}
    known = {"low": Prior(0.1, 0.15, targets=9)}
    assert race([behind], known, COSTS, "head").leader == "head"
    assert race([], known, COSTS, "head").leader == "head"


@pytest.mark.parametrize("best", ["low", "high", "scratch"])
def test_who_is_clearly_better_wins(best):
    """200 images, ten points ahead: the best, or one within a point of it, in 95 of 100 races."""
    missed = 0
    for seed in range(40):
        accuracies = dict.fromkeys(COSTS, 0.70) | {best: 0.80}
        missed += race(drawn(seed, **accuracies), PRIORS, COSTS, "head").leader != best
    assert missed <= 2


def test_ties_end_at_the_cheapest():
    wins = [
        race(drawn(seed, **dict.fromkeys(COSTS, 0.7)), PRIORS, COSTS, "head").leader == "head"
        for seed in range(60)
    ]
    assert np.mean(wins) >= 0.6
    worse = dict.fromkeys(COSTS, 0.65) | {"head": 0.7}
    wins = [
        race(drawn(seed, **worse), PRIORS, COSTS, "head").leader == "head" for seed in range(60)
    ]
    assert np.mean(wins) >= 0.9


def test_who_is_far_behind_is_dropped_and_the_free_head_never():
    found = race(drawn(0, head=0.9, low=0.9, high=0.9, scratch=0.5), PRIORS, COSTS, "head")
    out = {one.name: one.dropped for one in found.standings}
    assert out == {"head": False, "low": False, "high": False, "scratch": True}
    behind = race(drawn(0, head=0.4, low=0.9, high=0.9, scratch=0.9), PRIORS, COSTS, "head")
    assert not behind.standings[0].dropped


def test_the_regret_that_it_states_is_that_of_its_draws():
    """With one challenger: the mean of the positive part of a normal variable."""
    fold = {"head": np.arange(100) < 70, "low": np.arange(100) < 66}
    found = race([fold], {"low": Prior()}, COSTS, "head")
    low = found.standings[1]
    ratio = low.mean / low.deviation
    density = math.exp(-(ratio**2) / 2) / math.sqrt(2 * math.pi)
    share = (1 + math.erf(ratio / math.sqrt(2))) / 2
    assert found.leader == "head"
    assert found.regret == pytest.approx(low.mean * share + low.deviation * density, rel=0.05)
    chance = (1 + math.erf((DELTA - low.mean) / low.deviation / math.sqrt(2))) / 2
    assert found.within == pytest.approx(chance, abs=0.02)


@given(st.integers(0, 10_000), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_the_order_of_folds_and_images_does_not_matter(seed, count):
    folds = drawn(seed, folds=count, head=0.7, low=0.75, high=0.6, scratch=0.5)
    turned = [{name: right[::-1] for name, right in fold.items()} for fold in folds[::-1]]
    one, other = (race(each, PRIORS, COSTS, "head") for each in (folds, turned))
    assert one.leader == other.leader
    for a, b in zip(one.standings, other.standings, strict=True):
        assert a.mean == pytest.approx(b.mean)
        assert a.z == pytest.approx(b.z)


def test_a_strategy_may_be_missing_from_a_fold_and_the_free_head_may_not():
    folds = drawn(3, folds=2, head=0.7, low=0.8)
    del folds[1]["low"]
    assert race(folds, PRIORS, COSTS, "head").standings[1].images == 40
    del folds[1]["head"]
    with pytest.raises(ValueError, match="fold 1 must have 'head'"):
        race(folds, PRIORS, COSTS, "head")
    short = [{"head": np.ones(4, bool), "low": np.ones(3, bool)}]
    with pytest.raises(ValueError, match=r"right on the same images, got \(3,\) and \(4,\)"):
        race(short, PRIORS, COSTS, "head")


def test_what_is_known_of_gains_is_shared_with_the_package():
    for verdict in ("early", "depth", "train"):
        for strategy in ("high_rate_fine_tuning", "discriminative", "from_scratch"):
            prior = prior_of(verdict, strategy, "resnet18w32")
            assert -1 < prior.mean < 1
            assert prior.deviation >= 0.03
    assert prior_of("train", "from_scratch", "resnet50").noise > 4 * Prior().noise
    text = str(race(drawn(1, head=0.6, low=0.9), {"low": Prior()}, COSTS, "head"))
    assert "is chosen: expected regret" in text
    assert max(map(len, text.splitlines())) <= 110


ROW = {"mean": 0.02, "deviation": 0.05, "targets": 10}


def known(network="mine", **rows):
    return {"network": network, "gains": {"all": {"surgical": ROW} | rows}}


def test_gains_are_taken_as_they_are_or_from_a_file(tmp_path):
    file = tmp_path / "gains.json"
    file.write_text(json.dumps(known()))
    for given_ in (known(), file, str(file)):
        found = checked_gains(given_, "mine")
        assert prior_of("depth", "surgical", "mine", found) == Prior(0.02, 0.05, targets=10)
    # The package's own are of that form, too, with every verdict that advice can come to.
    own = Path(module.__file__).with_name("gains.json")
    assert checked_gains(own, ft.load("builtin").config.name)["made_by"]


@pytest.mark.parametrize(
    ("given_", "text"),
    [
        ({}, "must have 'network' and 'gains', got nothing"),
        ({"netwrk": "mine", "gains": {}}, "got 'netwrk', 'gains'; did you mean 'network'?"),
        (known("other"), "advised on, mine, got gains of 'other'"),
        ({"network": "mine", "gains": []}, r"must have \['gains'\]\['all'\], .*, got \[\]"),
        ({"network": "mine", "gains": {"depth": {}}}, "got 'depth'"),
        ({"network": "mine", "gains": {"all": {}, "dept": {}}}, "'dept'; did you mean 'depth'"),
        ({"network": "mine", "gains": {"all": [1]}}, r"must have strategies in \['all'\], got"),
        (known(surgicl=ROW), "must be of recipes, got 'surgicl'; did you mean 'surgical'"),
        (known(surgical={"mean": 0.1}), "must have 'mean', 'deviation', 'targets' in .*'mean'$"),
        (
            known(surgical={"deviatoin": 0.1, "mean": 0, "targets": 9}),
            "got 'deviatoin', 'mean', 'targets'; did you mean 'deviation'",
        ),
        (known(surgical=ROW | {"mean": math.nan}), "'mean' in .* must be a share .*, got nan"),
        (known(surgical=ROW | {"mean": 15.3}), "got 15.3; did you mean 0.153"),
        (known(surgical=ROW | {"deviation": -0.1}), "must be a share from 0 to 1.*got -0.1"),
        (known(surgical=ROW | {"mean": "0.1"}), "got '0.1'"),
        (known(surgical=ROW | {"targets": True}), "must be an integer >= 0, got True"),
        (known(surgical=None), "must have .*, got None"),
    ],
)
def test_gains_that_are_none_are_refused_in_one_line(given_, text):
    with pytest.raises(ValueError, match=text) as refused:
        checked_gains(given_, "mine")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) <= 600


def test_all_that_is_wrong_with_gains_is_said_at_once():
    rows = {f"strategy {number}": ROW for number in range(500)}
    with pytest.raises(ValueError, match=r"'other'.* and 498 more") as refused:
        checked_gains(known("other", **rows), "mine")
    assert len(str(refused.value)) <= 600


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[1]", r"gains.json must hold a JSON object, got \[1\]"),
        ("NaN", "gains.json must hold a JSON object, got nan"),
        ("{", "gains.json is damaged: it is not JSON"),
        ("", "gains.json is damaged: it is empty"),
    ],
)
def test_a_file_that_holds_no_gains_is_refused_by_its_name(content, text, tmp_path):
    (tmp_path / "gains.json").write_text(content)
    with pytest.raises(ValueError, match=text):
        checked_gains(tmp_path / "gains.json", "mine")


def test_gains_of_another_type_and_a_file_that_there_is_not():
    with pytest.raises(TypeError, match="`gains` must be a mapping or the path of a JSON file"):
        checked_gains(3, "mine")
    with pytest.raises(FileNotFoundError, match=r"`gains` must name a file, got nowhere\.json"):
        checked_gains("nowhere.json", "mine")
