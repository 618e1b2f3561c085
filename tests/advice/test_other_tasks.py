"""Advice on several labels per image and on numbers: targets that are made so that it is known."""

from __future__ import annotations

import json

import jax
import jsonschema
import numpy as np
import pytest
import scipy.stats
from PIL import Image
from sklearn.linear_model import Ridge
from sklearn.metrics import average_precision_score, r2_score

import flaxtransfer as ft
from flaxtransfer.advice.advise import SCHEMA, Candidate
from flaxtransfer.advice.evidence import alignment, gather
from flaxtransfer.analysis.profile import Outputs, probe_profile
from flaxtransfer.cli import run
from flaxtransfer.features.ridge import cross_validate_targets, target_folds
from flaxtransfer.metrics import METRICS, Draws, Skill, compared
from flaxtransfer.report.pages import render_advice, render_understanding
from flaxtransfer.task import MULTI_LABEL, REGRESSION
from tests.support.targets import pretrained, source


def made(name: str, seed: int) -> ft.ArraySource:
    """A target of which it is known what can be learned from this network."""
    random = np.random.default_rng(seed)
    colors = source("colors", 20, seed)
    images, hue = colors.images, colors.labels()
    count, task, labels = len(hue), MULTI_LABEL.name, None
    if name == "random labels":
        labels = random.random((count, 4)) < 0.4
    elif name == "one label of ten":
        labels = random.random((count, 10)) < 0.4
        labels[:, 3] = hue < 4
    elif name == "labels with gaps":
        labels = np.stack([hue < 4, hue % 2 == 0, hue % 4 < 2], axis=1).astype(np.float32)
        labels[random.random(labels.shape) < 0.3] = np.nan
        labels[np.isnan(labels).all(axis=1), 0] = hue[np.isnan(labels).all(axis=1)] < 4
    elif name == "fine gratings":
        fine = source("fine gratings", 20, seed)
        images, labels = fine.images, fine.labels()[:, None] == np.arange(6)
    else:
        task = REGRESSION.name
        if name == "random values":
            labels = random.normal(size=(count, 2))
        elif name == "angle of the hue":
            turn = 2 * np.pi * hue / 8
            labels = 40 + 7 * np.stack([np.cos(turn), np.sin(turn)], axis=1)
        else:
            level = random.random(count)
            noise = random.integers(0, 40, (count, 32, 32, 3))
            images = (noise + 200 * level[:, None, None, None]).astype(np.uint8)
            labels = 0.3 + 1e-4 * level[:, None]
    return ft.ArraySource(images, np.asarray(labels, np.float32), task=task)


KNOWN = {
    "random labels": {"nothing"},
    "one label of ten": {"depth", "early", "train"},
    "labels with gaps": {"depth", "early", "train"},
    "fine gratings": {"early"},
    "random values": {"nothing"},
    "angle of the hue": {"depth"},
    "brightness": {"ceiling"},
}
"""A hue is known at the stem or in the pixels; gratings as fine as pixels get through no stage; and
brightness is linear in the features of every depth."""


@pytest.fixture(scope="module")
def advice():
    return {name: ft.advise(pretrained(), made(name, 0)) for name in KNOWN}


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_of_a_target_is_said(advice, name):
    assert advice[name].verdict in KNOWN[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_it_is_said_of_every_draw(name):
    found = [ft.advise(pretrained(), made(name, seed), seed=seed) for seed in range(100, 120)]
    assert [each.verdict for each in found if each.verdict not in KNOWN[name]] == []


def test_all_numbers_have_their_unit(advice):
    labels, values = advice["labels with gaps"], advice["angle of the hue"]
    assert "1 point is a hundredth of average precision" in "\n".join(labels.reasons)
    assert "1 point is a hundredth of R2, and a guess has 0.000" in "\n".join(values.reasons)
    assert "average precision, 5 folds" in " ".join(str(labels).split())
    assert "R2, 5 folds" in str(values)
    for found in advice.values():
        assert "measured for classes alone" in " ".join(found.unknown)
        assert "accuracy" not in str(found)
        assert "classes are" not in str(found)
        assert max(map(len, str(found).splitlines())) <= 80


def test_json_page_and_plan(advice):
    for name, found in advice.items():
        jsonschema.validate(json.loads(json.dumps(found.to_json(), allow_nan=False)), SCHEMA)
        page = render_advice(found, data=name, weights="w")
        assert f"{found.evidence.measure.name}, held out" in page
        assert (found.plan is None) == (found.verdict == "nothing")


@pytest.mark.slow
def test_an_error_that_ranks_is_told_as_a_share_of_that_of_a_guess():
    network = ft.transfer(pretrained(), classes=2, task=REGRESSION.ranked_by("rmse"))
    found = ft.advise(network, made("angle of the hue", 0))
    assert found.verdict == "depth"
    text = " ".join(str(found).split())
    assert "a hundredth of the RMSE of a guess that looks at no image" in text
    assert "% below a guess" in text
    # R2 is 1 - RMSE^2 over that of a guess: both say the same of one target.
    stem = found.evidence.depths[0]
    by_r2 = ft.advise(pretrained(), made("angle of the hue", 0)).evidence.depths[0]
    assert 1 - (1 - stem.skill) ** 2 == pytest.approx(by_r2.skill, abs=0.02)


def test_a_network_of_another_task_is_refused():
    with pytest.raises(ValueError, match="the task of the data, multi_label, got single_label"):
        ft.advise(ft.transfer(pretrained(), classes=4), made("random labels", 0))


def test_labels_of_one_value_are_left_out_and_said():
    colors = source("colors", 6, 0)
    labels = np.stack([colors.labels() < 4, np.ones(48), colors.labels() % 2], axis=1)
    images = ft.ArraySource(colors.images, labels, ("warm", "all", "odd"), task="multi_label")
    found = ft.advise(pretrained(), images)
    assert (found.evidence.outputs, found.evidence.constant) == (2, ("all",))
    assert "Anything of 'all', of which all images have one value: left out." in found.unknown
    alone = ft.ArraySource(colors.images, labels[:, 1:2], ("all",), task="multi_label")
    with pytest.raises(ValueError, match="a label or target with two different values"):
        ft.advise(pretrained(), alone)


@pytest.mark.parametrize("task", [MULTI_LABEL, REGRESSION])
def test_heads_are_those_of_scikit_learn_fold_by_fold(task):
    """Of each output its own penalty, fitted to the examples that know it; metrics likewise."""
    random = np.random.default_rng(2)
    features = random.normal(size=(120, 20))
    values = features[:, :3] + random.normal(size=(120, 3))
    values = (values > 0.3).astype(float) if task is MULTI_LABEL else 50 + 9 * values
    values[random.random(values.shape) < 0.2] = np.nan
    values[np.isnan(values).all(axis=1), 0] = 0 if task is MULTI_LABEL else 50
    outputs = Outputs.of(values, task)
    found = outputs.head(features)
    scaled = (features - features.mean(axis=0)) / features.std(axis=0)
    peers = []
    for k in range(3):
        known = ~np.isnan(values[:, k])
        target = 2 * values[:, k] - 1
        if task is REGRESSION:
            target = (values[:, k] - np.nanmean(values[:, k])) / np.nanstd(values[:, k])
        said = np.zeros(120)
        for fold in range(5):
            used = known & (outputs.fold_of != fold)
            peer = Ridge(found.solved.strengths[k]).fit(scaled[used], target[used])
            # The intercept of all, held-out ones too.
            shift = np.nanmean(target) - target[used].mean()
            said[outputs.fold_of == fold] = peer.predict(scaled[outputs.fold_of == fold]) + shift
        np.testing.assert_allclose(found.solved.scores[:, k], said, rtol=1e-8, atol=1e-10)
        of = average_precision_score if task is MULTI_LABEL else r2_score
        peers.append(of(values[known, k], found.predictions[known, k]))
    assert found.judged.value == pytest.approx(np.mean(peers))
    profile = probe_profile({"stem": features}, values, task=task)
    assert profile.best.skill == found.judged.value
    assert profile.measure.name in str(profile)
    with pytest.raises(ValueError, match=f"kind must be 'ridge' for the task {task.name}"):
        probe_profile({"stem": features}, values, task=task, kind="logistic")


def test_alignment_of_several_labels_is_that_of_shuffled_rows():
    random = np.random.default_rng(0)
    labels = (random.random((60, 3)) < 0.3).astype(float)
    labels[:, 1] = labels[:, 0]  # Two that go together count as one.
    scores = random.normal(size=(60, 3)) + labels
    wanted = (labels - labels.mean(axis=0)) / labels.std(axis=0)

    def total(order):
        return (scores * wanted[order]).sum()

    drawn = np.array([total(random.permutation(60)) for _ in range(20_000)])
    expected = (total(np.arange(60)) - drawn.mean()) / drawn.std()
    assert alignment(scores, labels) == pytest.approx(expected, abs=0.05)


def test_alignment_with_groups_is_that_of_shuffled_groups():
    """Where labels and scores are constant within groups, groups are what is shuffled."""
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(25), 6)
    values = random.normal(size=25)
    scores = (0.5 * values + random.normal(size=25))[groups][:, None]
    expected = scipy.stats.pearsonr(scores[::6, 0], values).statistic * np.sqrt(24)
    found = alignment(scores, values[groups][:, None], groups)
    assert found == pytest.approx(expected, rel=0.03)
    assert alignment(scores, values[groups][:, None]) > 2 * found
    # Labels that differ within groups lose nothing.
    mixed = random.permutation(values[groups])[:, None]
    near = mixed + random.normal(size=(150, 1))
    assert alignment(near, mixed, groups) > 0.8 * alignment(near, mixed)


@pytest.mark.parametrize("task", ["single_label", "multi_label", "regression"])
def test_patients_are_held_out_whole(task):
    """Each patient has a hue and labels of his own: of a new patient nothing is known."""

    class Grouped(ft.ArraySource):
        def groups(self):
            return [f"patient {label}" for label in patients]

    random = np.random.default_rng(5)
    patients = np.repeat(np.arange(20), 6)
    hues = random.random((20, 3))[patients]
    images = 60 + 120 * hues[:, None, None] + random.normal(0, 6, (120, 32, 32, 3))
    drawn = random.permutation(np.arange(20) % 2)[patients]
    labels = {
        "single_label": drawn,
        "multi_label": np.stack([drawn, drawn[::-1]], axis=1).astype(np.float32),
        "regression": random.normal(size=(20, 1))[patients].astype(np.float32),
    }[task]
    names = ("a", "b") if task != "regression" else ("value",)
    alone = ft.ArraySource(images.clip(0, 255).astype(np.uint8), labels, names, task=task)
    together = Grouped(alone.images, labels, names, task=task)
    assert ft.advise(pretrained(), alone).evidence.best.skill > 0.7
    found = ft.advise(pretrained(), together)
    assert found.verdict == "nothing"
    assert found.evidence.grouped


def test_folds_have_alike_distributions_and_whole_groups():
    random = np.random.default_rng(0)
    values = random.normal(size=(100, 2))
    groups = [f"g{i // 4}" for i in range(100)]
    fold_of = target_folds(values, 5, 0, groups)
    assert all(len(set(fold_of[4 * g : 4 * g + 4].tolist())) == 1 for g in range(25))
    assert np.bincount(fold_of).tolist() == [20] * 5
    rare = np.zeros((100, 1))
    rare[:10] = 1
    assert np.bincount(target_folds(rare), rare[:, 0]).tolist() == [2.0] * 5
    with pytest.raises(ValueError, match="2 groups or more"):
        target_folds(values, 5, 0, ["one"] * 100)
    with pytest.raises(ValueError, match="features must be finite; 1 of 100"):
        cross_validate_targets(np.where(np.arange(100)[:, None] == 3, np.nan, 1), values, fold_of)


def test_two_predictors_are_compared_on_the_same_samples():
    random = np.random.default_rng(0)
    truth = random.normal(size=(200, 1))
    near, far = (truth + scale * random.normal(size=(200, 1)) for scale in (0.3, 0.5))
    skill = Skill(METRICS["regression"]["r2"])
    first, second = (skill.judged(said, truth) for said in (near, far))
    assert isinstance(first, Draws)
    gain, error = compared(first, second)
    assert gain == pytest.approx(r2_score(truth, near) - r2_score(truth, far))
    again = [
        r2_score(truth[rows], near[rows]) - r2_score(truth[rows], far[rows])
        for rows in random.integers(0, 200, (2000, 200))
    ]
    assert error == pytest.approx(np.std(again), rel=0.25)


@pytest.mark.slow
def test_understanding_says_what_it_leaves_out():
    found = ft.advice.understand(ft.transfer(pretrained(), classes=2, task=REGRESSION),
                                 made("angle of the hue", 0))  # fmt: skip
    assert found.suspects is None
    assert found.split is None
    text = "\n".join(found.findings())
    assert "A head on stem has R2 0." in text
    assert "is said for one class per image alone, not for the task regression" in text
    json.dumps(found.to_json(), allow_nan=False)
    assert "Labels that a held-out head confirms" not in render_understanding(
        found, data="d", weights="w"
    )


def test_many_missing_labels_are_looked_at_in_fewer_images(monkeypatch):
    monkeypatch.setattr("flaxtransfer.advice.evidence.MOST_WITH_GAPS", 60)
    network = ft.transfer(pretrained(), classes=3, task=MULTI_LABEL)
    found = gather(network, made("labels with gaps", 0))
    assert (found.examples, found.available) == (60, 160)


def small_network(outputs, task):
    """Random features, so that no head is sure and there is a race."""
    model = ft.resnet(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=4, classes=outputs))
    preprocessing = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, 32, 32)
    return ft.Classifier(model, model.init(jax.random.key(0)), preprocessing, task=task)


@pytest.mark.parametrize("task", [MULTI_LABEL, pytest.param(REGRESSION, marks=pytest.mark.slow)])
def test_auto_races_by_the_metric_that_ranks_and_trains_the_choice(tmp_path, monkeypatch, task):
    real = Candidate.plan

    def short(candidate, params, lengths=None):
        costly = candidate.strategy not in ("solved_head", "depth_head")
        return real(candidate, params, {"steps": 2} if costly else lengths)

    monkeypatch.setattr(Candidate, "plan", short)
    colors = source("colors", 20, 1)
    hue = colors.labels()
    labels = np.stack([hue < 4, hue % 2], axis=1) if task is MULTI_LABEL else hue[:, None] / 3
    images = ft.ArraySource(colors.images, labels.astype(np.float32), task=task.name)
    splits = ft.stratified_split(images.labels(), test_fraction=0.2)
    network = small_network(labels.shape[1], task)
    found = ft.auto(network, images, splits, tmp_path / "a", budget="2x", batch_size=16)
    race = found.choice.race
    assert race is not None
    tried = [one for one in race.standings if one.images]
    assert len(tried) == 1
    assert 0 < tried[0].images < len(splits.train)
    # Nothing is known of gains for this task: the prior is that of a strategy never tried.
    assert {one.deviation for one in race.standings[1:] if not one.images} <= {0.06}
    assert found.fitted.network.task.name == task.name
    again = ft.auto(
        network, images, splits, tmp_path / "a", budget="2x", batch_size=16, resume=True
    )
    assert again.choice.to_json()["race"] == found.choice.to_json()["race"]


def test_in_the_terminal(tmp_path, capsys):
    colors = source("colors", 16, 4)
    rows = ["image,warm,odd"]
    for number, (image, hue) in enumerate(zip(colors.images, colors.labels(), strict=True)):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{int(hue < 4)},{hue % 2}")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    data = ["--data", f"csv:{tmp_path / 'table.csv'}", "--label-column", "warm", "odd"]
    pages = ["--html", str(tmp_path / "a.html"), "--plan", str(tmp_path / "plan.yaml")]
    assert run(["advise", *data, *pages]) == 0
    printed = capsys.readouterr().out
    assert "training images, 2 labels" in printed
    assert "average precision" in printed
    assert "2 labels" in (tmp_path / "a.html").read_text()
    assert ft.training.load_plan(tmp_path / "plan.yaml").phases
    assert run(["probe", *data, "--out", str(tmp_path / "p.png")]) == 0
    printed = capsys.readouterr().out
    assert "average precision" in printed
    assert "a guess 50" in printed
    assert run(["probe", *data, "--kind", "logistic"]) == 2
    assert "kind must be 'ridge' for the task multi_label" in capsys.readouterr().err
