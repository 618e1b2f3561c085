"""A race whose runs are killed and go on, and a choice that is trained on all labels."""

import json

import jax
import numpy as np
import pytest

import flaxtransfer as ft
from flaxtransfer.advice import auto as module
from flaxtransfer.advice.auto import budget_runs, choose
from flaxtransfer.cli import run
from flaxtransfer.paths import flatten
from flaxtransfer.training.run_folder import split_of
from tests.support.targets import source

STEPS = 3


@pytest.fixture(scope="module")
def setting():
    """Colors and random features: no head is sure of them, so that there is a race."""
    images = source("colors", 9, 1)
    model = ft.resnet(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=4, classes=8))
    preprocessing = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, 32, 32)
    network = ft.Classifier(model, model.init(jax.random.key(0)), preprocessing)
    return network, images, ft.stratified_split(images.labels(), test_fraction=0.2)


def short(strategy: str) -> dict[str, int]:
    return {} if strategy in ("solved_head", "depth_head") else {"steps": STEPS}


def chosen(setting, folder, **changes):
    arguments = {"budget": "3x", "batch_size": 16, "lengths": short} | changes
    return choose(*setting, folder, **arguments)


@pytest.fixture(scope="module")
def undisturbed(setting, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return chosen(setting, folder), folder


def test_the_race_keeps_to_its_budget_and_to_the_training_part(setting, undisturbed):
    choice, folder = undisturbed
    assert choice.race is not None
    runs = sorted(path.name for path in folder.iterdir() if path.is_dir())
    costly = [name for name in runs if not name.endswith("_head")]
    assert len(costly) == choice.runs == 2  # and one is left for the choice
    _, images, splits = setting
    for name in runs:
        seen = split_of(folder / name).positions(images)
        assert set(seen.train) <= set(splits.train)
        assert set(seen.test) <= set(splits.train)
        assert not set(seen.train) & set(seen.test)
    content = json.loads((folder / "choice.json").read_text())
    assert content == json.loads(json.dumps(choice.to_json()))
    assert content["race"]["leader"] == choice.candidate.strategy


@pytest.mark.parametrize("stop", [1, 2])
def test_a_race_that_was_killed_decides_the_same(setting, undisturbed, tmp_path, monkeypatch, stop):
    calls, real = [], module.fit

    def breaking(*args, **kwargs):
        calls.append(args[3].name)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "fit", breaking)
    with pytest.raises(KeyboardInterrupt):
        chosen(setting, tmp_path)
    monkeypatch.setattr(module, "fit", real)
    again = chosen(setting, tmp_path)
    assert json.dumps(again.to_json()["race"]) == json.dumps(undisturbed[0].to_json()["race"])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in undisturbed[1].iterdir()}
    for path in undisturbed[1].glob("*/model.safetensors"):
        assert (tmp_path / path.relative_to(undisturbed[1])).read_bytes() == path.read_bytes()


def test_auto_trains_the_choice_on_all_labels(setting, tmp_path, monkeypatch):
    network, images, splits = setting
    monkeypatch.setattr(module.Candidate, "plan", _short_plan(module.Candidate.plan))
    found = ft.auto(network, images, splits, tmp_path / "a", budget="2x", batch_size=16)
    plan = found.choice.candidate.plan(network.params)
    start = module.beginning(found.choice.candidate.strategy, network, 0)
    data = ft.loaders(images, splits, network.preprocessing, batch_size=16)
    alone = ft.fit(start, plan, data, tmp_path / "b", config={"budget": "2x"})
    for path, leaf in flatten(alone.variables).items():
        np.testing.assert_array_equal(flatten(found.fitted.variables)[path], leaf, err_msg=path)
    again = ft.auto(
        network, images, splits, tmp_path / "a", budget="2x", batch_size=16, resume=True
    )
    assert again.choice.to_json()["race"] == found.choice.to_json()["race"]
    assert again.advice.verdict == found.advice.verdict


def test_minutes_become_runs_once(setting, tmp_path, monkeypatch):
    """A race that goes on has the runs that it began with, on a machine of any speed."""
    said, speed = [], [25.0]
    monkeypatch.setattr(module, "run_seconds", lambda *args: speed[0])
    first = chosen(setting, tmp_path, budget="1m", say=said.append)
    assert first.runs == 1
    assert any("a full run takes about 0.4 minutes; 1m are 2 full runs" in text for text in said)
    speed[0] = 1.0
    again = chosen(setting, tmp_path, budget="1m")
    assert json.dumps(again.to_json()["race"]) == json.dumps(first.to_json()["race"])
    speed[0] = 90.0
    small = chosen(setting, tmp_path / "small", budget="1m", say=said.append)
    assert (small.race, small.candidate.cost) == (None, 0)
    assert "no full run: the free head is taken" in said[-1]


def test_a_run_is_as_long_as_its_steps(setting):
    """By the clock of this machine, which others use too: the steps go in by their number."""
    network, images, splits = setting
    data = ft.loaders(images, splits, network.preprocessing, batch_size=16)
    plans = [ft.recipes.feature_extraction(network.params, steps=steps) for steps in (10, 1000)]
    one, hundred = (module.run_seconds(network, plan, data) for plan in plans)
    assert 5 < hundred / one < 2000
    assert module.run_seconds(network, ft.recipes.solved_head(network.params), data) == 0


def _short_plan(real):
    def plan(self, params, lengths=None):
        return real(self, params, short(self.strategy) | dict(lengths or {}))

    return plan


def test_there_is_no_race_where_a_head_leaves_nothing_to_gain(setting, tmp_path):
    easy = source("coarse gratings", 20, 0)
    from tests.support.targets import pretrained

    network = ft.transfer(pretrained(), classes=6)
    found = choose(network, easy, ft.data.Splits.of(np.arange(120)), tmp_path)
    assert found.race is None
    assert found.runs == 0
    assert found.candidate.cost == 0
    assert not list(tmp_path.iterdir())


def test_labels_that_say_nothing_are_not_raced_for(setting, tmp_path):
    network, _, _ = setting
    drawn = source("random labels", 12, 0)
    with pytest.raises(ValueError, match=r"Nothing is learnable .* name a strategy"):
        choose(network, drawn, ft.data.Splits.of(np.arange(48)), tmp_path)


def test_budgets():
    assert budget_runs("4x") == 4
    assert budget_runs("10m", lambda: 130.0) == 4
    assert budget_runs("1m", lambda: 61.0) == 0
    for text in ("0x", "4", "x", "0m", "10s", "-1x", "4.5x"):
        with pytest.raises(ValueError, match="budget must be a number of full runs"):
            budget_runs(text)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["train", "--strategy", "auto", "--budget", "0x"],
            "--budget must be a number of full runs",
        ),
        (["train", "--strategy", "auto", "--steps", "5"], "chooses --steps itself"),
        (["train", "--strategy", "autp"], "did you mean 'auto'"),
        (["train", "--gains", "README.md"], "--gains belongs to --strategy auto"),
        (["find-rate", "--strategy", "auto"], "is for flaxtransfer train"),
        (["plan", "--strategy", "auto"], "--strategy must be a recipe"),
    ],
)
def test_what_auto_does_not_take_is_one_line(words, text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(words) == 2
    printed = capsys.readouterr().err
    assert text in printed
    assert "Traceback" not in printed


class Patients(ft.ArraySource):
    """Three images of each."""

    def groups(self):
        return [f"p{i // 3}" for i in range(len(self))]


def test_the_folds_of_the_race_hold_groups_out_as_a_whole(setting, tmp_path, monkeypatch):
    network, images, splits = setting
    source = Patients(images.images, images.labels(), images.class_names)
    seen = []

    def stop(*arguments):
        seen.append(arguments[3])
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "folds_with_singletons", stop)
    with pytest.raises(KeyboardInterrupt):
        chosen((network, source, splits), tmp_path)
    assert seen == [[f"p{i // 3}" for i in splits.train.tolist()]]
