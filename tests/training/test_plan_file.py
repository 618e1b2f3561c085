"""Plans in files: the same plan comes back, and every mistake is named at its place."""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass, replace

import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flaxtransfer as ft
from flaxtransfer.training.plan import Phase
from flaxtransfer.training.plan_yaml import plan_from_yaml, plan_to_yaml
from tests.support.evidence import EVIDENCE

PARAMS = ft.resnet("resnet18", classes=10).abstract()["params"]


@pytest.mark.parametrize("name", ft.recipes.RECIPES)
def test_recipes_come_back_as_they_were(name, tmp_path):
    plan = ft.recipes.RECIPES[name](PARAMS, **EVIDENCE.get(name, {}))
    ft.training.save_plan(tmp_path / "plan.yaml", plan)
    assert ft.training.load_plan(tmp_path / "plan.yaml") == plan


names = st.text(min_size=1, max_size=12).filter(lambda name: name == name.strip())
masks = st.sampled_from([ft.head(), ft.stage(4) - ft.batch_norm(), ~ft.glob("layer1/**")])
rates = st.one_of(
    st.floats(0, 1), st.builds(ft.WarmupCosine, st.floats(0, 1), st.floats(0, 0.9), st.floats(0, 1))
)
optimizers = st.sampled_from(
    [optax.adamw, optax.lion, functools.partial(optax.sgd, momentum=0.9, nesterov=True)]
)
groups = st.builds(
    ft.Group, optimizers, rates, st.floats(0, 1), masks, st.sampled_from(["zero", "start"])
)


@given(
    st.lists(st.tuples(names, masks, groups), min_size=1, max_size=4, unique_by=lambda t: t[0]),
    st.integers(1, 10**6),
    st.none() | st.floats(0.1, 10),
    st.none() | st.floats(0, 0.99),
    st.sampled_from([None, "batch", frozenset({"bn1"}), {ft.stem(): "running"}]),
    st.none() | st.integers(1, 5),
    st.floats(0, 0.99),
    st.floats(0, 5),
)
def test_any_plan_of_named_things_comes_back(rows, steps, clip, smoothing, norm, patience, gain, z):
    loss = None if smoothing is None else ft.training.CrossEntropy(smoothing)
    phases = [
        ft.Phase(
            {"a": mask, "b": ft.rest()},
            {"a": group, "b": ft.FROZEN},
            steps,
            name=name,
            clip=clip,
            norm=norm,
            loss=loss,
            recalibrate=mask,
        )
        for name, mask, group in rows
    ]
    plan = ft.Plan(phases, patience, gain, z)
    again = ft.training.plan_from_yaml(ft.training.plan_to_yaml(plan))
    assert ft.training.plan_to_yaml(again) == ft.training.plan_to_yaml(plan)
    assert (again.patience, again.min_gain, again.min_z) == (patience, gain, z)
    for phase, copy in zip(plan.phases, again.phases, strict=True):
        # A partial equals itself alone; what it is made of is compared by the text above.
        plain = {"a": ft.FROZEN, "b": ft.FROZEN}
        assert replace(copy, groups=plain) == replace(phase, groups=plain)


GOOD = """
phases:
- name: head
  steps: 5
  labels: {new: head(), old: rest()}
  groups:
    new: {optimizer: {name: sgd, momentum: 0.9}, learning_rate: {peak: 0.1}}
    old: frozen
"""


def test_a_plan_written_by_hand():
    (phase,) = ft.training.plan_from_yaml(GOOD).phases
    assert phase.labels == {"new": ft.head(), "old": ft.rest()}
    assert phase.groups["new"].learning_rate == ft.WarmupCosine(0.1)
    assert phase.groups["new"].optimizer.keywords == {"momentum": 0.9}
    assert phase.groups["old"] is ft.FROZEN


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("head()", "hed()", r"phase 'head', label 'new':.*hed.*did you mean 'head'"),
        ("name: sgd", "name: sdg", r"group 'new': optax has no optimizer 'sdg'; did you mean"),
        ("momentum", "momentun", r"sgd takes no momentun; did you mean 'momentum'"),
        ("peak", "peek", r"learning_rate has no setting 'peek'; did you mean 'peak'"),
        (
            "peak: 0.1",
            "peak: -1",
            r"learning_rate: invalid WarmupCosine: peak must be >= 0, got -1",
        ),
        ("steps: 5", "steps: 0", r"phase 'head': steps must be positive, got 0"),
        ("steps: 5", "step: 5", r"phase 1 has no setting 'step'; did you mean 'steps'"),
        ("old: frozen", "old: molten", r"group 'old' must be a mapping.*or 'frozen'"),
        ("frozen", "{optimizer: sgd}", r"group 'old' needs learning_rate"),
        ("phases:", "stages:", r"no setting 'stages'"),
        ("- name", "- {name", r"this is not YAML"),
        ("new: head(), ", "", r"trains nothing"),
    ],
)
def test_mistakes_are_named_at_their_place(old, new, text, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ValueError, match=f"(?s)plan.yaml: .*{text}"):
        ft.training.load_plan(path)


def test_all_mistakes_at_once():
    broken = GOOD.replace("head()", "hed()").replace("peak: 0.1", "peak: -1")
    with pytest.raises(ValueError, match=r"(?s)hed.*peak must be >= 0, got -1"):
        ft.training.plan_from_yaml(broken)


ALIASES = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 10)]
)
ROW = "  groups: {a: {optimizer: sgd, learning_rate: 0.1}}\n"
HOSTILE = {
    "aliases": (ALIASES, r"without anchors \(&\) and aliases"),
    "open brackets": ("[" * 5000, "at most 20 levels"),
    "open braces": ("{a: " * 5000, "at most 20 levels"),
    "deep lists": ("- " * 3000 + "x", "at most 20 levels"),
    "digits": ("phases: " + "7" * 5000, "a whole number of 5,000 digits"),
    "hexadecimal digits": ("phases: 0x" + "f" * 5000, "a whole number of 5,002 digits"),
    "base 60": ("phases: " + ":".join(["1"] * 5000), "a whole number of 9,999 digits"),
    "no integer": ("phases: !!int ''", "does not fit its type"),
    "no date": ("phases: 2001-99-99", "does not fit its type"),
    "no truth": ("phases: !!bool x", "does not fit its type"),
    "python": ("phases: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "many values": ("phases: [" + "1," * 30_000 + "]", "at most 20,000 values"),
    "large": ("# " + "x" * 300_000, "at most 262,144 bytes, got 300,002"),
    "many settings": ("\n".join(f"s{n}: 1" for n in range(9_000)), "and|has 8995 more"),
    "a long name": ("x" * 100_000 + ": 1", "this is not YAML|has no setting"),
    "a long quoted name": ("'" + "x" * 100_000 + "': 1", "this is not YAML|has no setting"),
    "many labels": (
        "phases:\n- steps: 1\n" + ROW + "  labels:\n"
        "" + "\n".join(f"    l{n}: nothing{n}()" for n in range(6_000)),
        "no function is called 'nothing0'",
    ),
    "many groups": (
        "phases:\n- steps: 1\n  labels: {a: head()}\n  groups:\n"
        "" + "\n".join(f"    g{n}: {{optimizer: agd, learning_rate: 1}}" for n in range(3_000)),
        "optax has no optimizer 'agd'",
    ),
    "long label": (f"phases:\n- steps: 1\n{ROW}  labels: {{a: '{'~' * 50_000}head()'}}", "20,000"),
    "zero": ("phases: \0", "this is not YAML"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_plans_end_soon_in_one_short_line(name, tmp_path):
    text, said = HOSTILE[name]
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    start = time.process_time()
    with pytest.raises(ValueError, match=said) as caught:
        ft.training.load_plan(path)
    assert time.process_time() - start < 4
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 600


def test_a_plan_must_be_a_file_of_text(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ValueError, match=r"pipe.yaml must be a regular file, got a named pipe"):
        ft.training.load_plan(tmp_path / "pipe.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"phases: \xff")
    with pytest.raises(ValueError, match="must be text in UTF-8, got the byte 0xff at 8"):
        ft.training.load_plan(tmp_path / "bytes.yaml")


def test_a_plan_is_not_written_through_a_planted_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in (".plan.yaml.tmp", "plan.yaml"):
        (tmp_path / name).symlink_to(victim)
    plan = ft.Plan([ft.Phase({"all": ft.everything()}, {"all": ft.Group(optax.sgd, 0.1)}, 5)])
    ft.training.save_plan(tmp_path / "plan.yaml", plan)
    assert victim.read_text() == "mine"
    assert ft.training.load_plan(tmp_path / "plan.yaml") == plan


def test_a_missing_file_names_those_beside_it(tmp_path):
    (tmp_path / "mine.yaml").write_text(GOOD)
    with pytest.raises(FileNotFoundError, match=r"no plan .*theirs\.yaml; beside it: .*mine\.yaml"):
        ft.training.load_plan(tmp_path / "theirs.yaml")


def test_what_has_no_name_is_refused_and_nothing_is_written(tmp_path):
    phase = ft.Phase(
        ft.label(PARAMS, {"new": ft.head(), "old": ft.rest()}),
        {
            "new": ft.Group(lambda learning_rate: optax.sgd(learning_rate), lambda step: 0.1),
            "old": optax.sgd(0.1),
        },
        steps=1,
        loss=lambda logits, labels, key: logits.sum(-1),
    )
    with pytest.raises(
        TypeError,
        match=r"(?s)labels of one network.*not optax's.*schedule without"
        r".*bare optax transformation.*loss of its own",
    ):
        ft.training.save_plan(tmp_path / "plan.yaml", ft.Plan([phase]))
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True)
class Repeating(Phase):
    """A phase with one more field, as a later version could have."""

    repeats: int = 1


def test_a_new_field_is_part_of_everything_that_derives_from_the_fields():
    rules = {"new": ft.head(), "frozen": ft.rest()}
    groups = {"new": ft.Group(optax.adamw, 1e-3), "frozen": ft.FROZEN}
    one, two = (Repeating(rules, groups, steps=5, repeats=n) for n in (1, 2))
    params = ft.resnet(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=4)).abstract()["params"]
    # The file, in both directions; the default is not written.
    text = plan_to_yaml(ft.Plan([two]))
    assert "repeats: 2" in text
    assert "repeats" not in plan_to_yaml(ft.Plan([one]))
    assert plan_from_yaml(text, Repeating).phases == (two,)
    with pytest.raises(ValueError, match="has no setting 'repeats'"):
        plan_from_yaml(text)
    # The table.
    assert "repeats 2" in str(ft.Plan([two]))
    # The identity of a run, and of a compiled step.
    assert [phase.resolve(params).identity()["repeats"] for phase in (one, two)] == [1, 2]
    assert one.resolve(params).in_step() != two.resolve(params).in_step()
    # Validation may decide about a phase that differs in it alone.
    again = replace(two, name="again")
    ft.Plan([replace(one, name="first"), again], patience=1).resolve(params)
    with pytest.raises(ValueError, match="unfreezes nothing new"):
        ft.Plan([two, again], patience=1).resolve(params)
