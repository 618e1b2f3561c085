"""A phase that begins with a linear probe begins with the optimum on the features as they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import optax
import pytest

import flaxtransfer as ft
from flaxtransfer.features import fit_linear_probe
from flaxtransfer.paths import flatten
from tests.support.small import network
from tests.training.test_caching import feed


def plan(rate: float, steps: int = 2, **changes: object) -> ft.Plan:
    group = ft.Group(optax.sgd, rate)
    return ft.Plan(
        [
            ft.Phase(
                {"all": ft.everything()},
                {"all": group},
                steps,
                norm="running",
                probe="logistic",
                **changes,
            )
        ]
    )


def test_the_head_is_the_solved_one(tmp_path):
    """At a rate of 0 nothing else happens."""
    model, variables = network()
    data = feed()
    fitted = ft.fit(
        ft.Classifier(model, variables, data.preprocessing), plan(0.0, ema=0.5), data, tmp_path
    )
    pooled, labels = ft.features.pooled_features(
        ft.Classifier(model, variables, data.preprocessing), data.calibration()
    )
    assert pooled.shape == (14, 32)
    head = fit_linear_probe(pooled, labels, 3)
    np.testing.assert_allclose(fitted.variables["params"]["fc"]["kernel"], head.kernel, rtol=1e-6)
    np.testing.assert_allclose(fitted.variables["params"]["fc"]["bias"], head.bias, rtol=1e-6)
    conv = fitted.variables["params"]["conv1"]["kernel"]
    np.testing.assert_array_equal(conv, variables["params"]["conv1"]["kernel"])
    assert fitted.notes[0].startswith("phase 'fine-tune' begins with logistic regression on 14")


def test_an_interrupted_run_does_not_probe_again(tmp_path):
    model, variables = network()
    options = ft.FitOptions(evaluate_every=1)
    data = feed()
    whole = ft.fit(
        ft.Classifier(model, variables, data.preprocessing),
        plan(1e-2, 6),
        data,
        tmp_path / "whole",
        options=options,
    )

    def stopping(start: int):
        for step, batch in enumerate(data.train(start), start):
            if step == 3:
                raise RuntimeError("stop here")
            yield batch

    with pytest.raises(RuntimeError, match="stop here"):
        ft.fit(
            ft.Classifier(model, variables, replace(data, train=stopping).preprocessing),
            plan(1e-2, 6),
            replace(data, train=stopping),
            tmp_path / "cut",
            options=options,
        )
    resumed = ft.fit(
        ft.Classifier(model, variables, data.preprocessing),
        plan(1e-2, 6),
        data,
        tmp_path / "cut",
        resume=True,
        options=options,
    )
    for path, leaf in flatten(whole.variables).items():
        np.testing.assert_array_equal(flatten(resumed.variables)[path], leaf, err_msg=path)


def test_it_needs_a_pass_over_the_images(tmp_path):
    model, variables = network()
    with pytest.raises(ValueError, match="begins with a probe, but the feed has no pass"):
        ft.fit(
            ft.Classifier(model, variables, replace(feed(), calibration=None).preprocessing),
            plan(0.1),
            replace(feed(), calibration=None),
            tmp_path,
        )


def solved(kind: str, **changes: object) -> ft.Plan:
    params = network()[0].abstract()["params"]
    return replace(ft.recipes.solved_head(params, kind=kind), **changes)


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
@pytest.mark.parametrize(
    "segment", [None, "layer1", "stem", ("stem", "layer2"), ("layer1", "layer3", "layer4")]
)
def test_a_run_can_end_with_a_solved_head_at_any_depth(tmp_path, kind, segment):
    model, variables = network()
    data = feed()
    start = ft.Classifier(model, variables, data.preprocessing)
    fitted = ft.fit(start, solved(kind, ends_at=segment), data, tmp_path)
    reads = segment if isinstance(segment, tuple) else (segment or "layer4",)
    features, labels = ft.features.segment_features(start, data.calibration(), reads)
    matrix = np.concatenate([features[name] for name in reads], axis=1)
    head = fit_linear_probe(matrix, labels, 3, kind=kind)
    for name in ("kernel", "bias"):
        wanted, found = getattr(head, name), fitted.variables["params"]["fc"][name]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
    names = [n for n in fitted.network.model.segments if n not in ("pool", "head")]
    assert names[-1] == reads[-1]
    body = flatten(start.variables)
    for path, leaf in flatten(fitted.variables).items():
        if "/fc/" not in path:
            np.testing.assert_array_equal(leaf, body[path], err_msg=path)
    assert (fitted.steps, len(fitted.audits)) == (1, 1)
    assert f"phase 'head' is {kind} regression on 14 examples" in fitted.notes[0]
    loaded = ft.Classifier.of(ft.load(tmp_path))
    assert loaded.model.config == fitted.network.model.config
    assert ft.evaluate(loaded, data.validation()) == fitted.validation
    again = ft.fit(start, solved(kind, ends_at=segment), data, tmp_path, resume=True)
    assert again.validation == fitted.validation
    for path, leaf in flatten(again.variables).items():
        np.testing.assert_array_equal(leaf, flatten(fitted.variables)[path], err_msg=path)


def unread() -> object:
    raise AssertionError("the images are read for nothing")


@pytest.mark.parametrize("segment", [None, "layer1"])
def test_known_features_spare_the_pass_over_the_images(tmp_path, segment):
    """The same bits: a head on the features that the pass would have made."""
    model, variables = network()
    data = feed()
    start = ft.Classifier(model, variables, data.preprocessing)
    last = segment or "layer4"
    found, labels = ft.features.segment_features(start, data.calibration(), ["layer1", last])
    wanted = ft.fit(start, solved("ridge", ends_at=segment), data, tmp_path / "pass")
    fitted = ft.fit(
        start,
        solved("ridge", ends_at=segment),
        replace(data, calibration=unread),
        tmp_path / "known",
        pooled=(found[last], labels),
    )
    assert fitted.notes == wanted.notes
    for name in ("kernel", "bias"):
        head, other = (each.variables["params"]["fc"][name] for each in (fitted, wanted))
        np.testing.assert_array_equal(head, other)


def test_features_from_before_a_recalibration_are_not_used(tmp_path):
    model, variables = network()
    data = feed()
    start = ft.Classifier(model, variables, data.preprocessing)
    (phase,) = plan(0.0).phases
    measured = ft.Plan([replace(phase, recalibrate=ft.everything())])
    labels = data.examples.labels
    wrong = np.random.default_rng(0).normal(size=(len(labels), 32))
    heads = [
        ft.fit(start, each, data, tmp_path / f"{number}", pooled=pooled).network.params["fc"]
        for number, (each, pooled) in enumerate(
            [(measured, None), (measured, (wrong, labels)), (plan(0.0), (wrong, labels))]
        )
    ]
    np.testing.assert_array_equal(heads[0]["kernel"], heads[1]["kernel"])
    assert not np.allclose(heads[0]["kernel"], heads[2]["kernel"])


@pytest.mark.parametrize(
    ("pooled", "text"),
    [
        (lambda x, y: (x[:, :8], y), r"shape \[14, 32\] .*, got shape \[14, 8\]$"),
        (lambda x, y: (x[1:], y[1:]), r"shape \[14, 32\] .*, got shape \[13, 32\]$"),
        (lambda x, y: (x, y[::-1]), r"shape \[14, 32\] .*, got shape \[14, 32\] and other labels$"),
    ],
)
def test_features_of_other_examples_are_refused(tmp_path, pooled, text):
    model, variables = network()
    data = feed()
    known = pooled(np.zeros((14, 32)), data.examples.labels)
    start = ft.Classifier(model, variables, data.preprocessing)
    with pytest.raises(ValueError, match=f"pooled must be features of {text}"):
        ft.fit(start, solved("ridge"), data, tmp_path, pooled=known)
    assert not list(tmp_path.iterdir())


def test_training_goes_on_from_a_solved_head(tmp_path):
    """Two phases with a solved head between them: what is solved is what the next one starts at."""
    model, variables = network()
    data = feed()
    (phase,) = solved("ridge").phases
    (still,) = plan(0.0).phases
    both = ft.Plan([phase, replace(still, probe=None, steps=3)])
    fitted = ft.fit(ft.Classifier(model, variables, data.preprocessing), both, data, tmp_path / "a")
    alone = ft.fit(
        ft.Classifier(model, variables, data.preprocessing), solved("ridge"), data, tmp_path / "b"
    )
    assert fitted.steps == 4
    np.testing.assert_array_equal(
        fitted.network.params["fc"]["kernel"], alone.network.params["fc"]["kernel"]
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"probe": True}, "probe must be 'logistic' or 'ridge', got True"),
        ({"probe": "svm"}, "probe must be 'logistic' or 'ridge', got 'svm'"),
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"steps": -1, "probe": "ridge"}, "steps must be positive, got -1"),
    ],
)
def test_what_is_no_answer(changes, text):
    settings = {"labels": {"a": ft.everything()}, "groups": {"a": optax.sgd(1)}, "steps": 1}
    with pytest.raises(ValueError, match=text):
        ft.Phase(**settings | changes)


def test_a_network_that_cannot_end_there(tmp_path):
    model, variables = network()
    start = ft.Classifier(model, variables, feed().preprocessing)
    with pytest.raises(ValueError, match=r"can end at stem, layer1, .*, got 'layer9'"):
        ft.fit(start, solved("ridge", ends_at="layer9"), feed(), tmp_path)
    with pytest.raises(ValueError, match=r"can end at stem, .*, got 'layer9'; did you mean"):
        ft.fit(start, solved("ridge", ends_at=("stem", "layer9")), feed(), tmp_path)
    for wrong in (3, (), ("stem", 3)):
        with pytest.raises(ValueError, match="ends_at must be the name of a segment, or several"):
            solved("ridge", ends_at=wrong)


def test_layers_between_the_depths_that_a_head_reads_can_be_trained_on(tmp_path, capsys):
    """A cut would lose what is read before it: cached from the first of them, or not at all."""
    model, variables = network()
    data = feed()
    start = ft.Classifier(model, variables, data.preprocessing)
    labels = {"all": ft.stage(2) | ft.head(), "frozen": ft.rest()}
    groups = {"all": ft.Group(optax.sgd, 1e-2), "frozen": ft.FROZEN}
    moved = ft.Phase(labels, groups, 4, norm="running", name="layer2", probe="ridge")
    found = []
    for where, reads in (("memory", "layer1"), ("off", "layer1"), ("auto", "stem")):
        plan = ft.Plan([moved], ends_at=(reads, "layer2"))
        cache = ft.Cache(where, dtype="float32")
        found.append(flatten(ft.fit(start, plan, data, tmp_path / where, cache=cache).variables))
        said = capsys.readouterr().err
        if where != "off":
            wanted = {
                "layer1": "20 activations",
                "stem": "nothing is cached, for the head reads stem, before which nothing is",
            }
            assert wanted[reads] in said
            assert ("cache before layer1" in said) == (reads == "layer1")
    cached, plain, _ = found
    before = flatten(variables)
    for path, leaf in plain.items():
        np.testing.assert_allclose(cached[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)
        if "/fc/" not in path:
            moves = path.startswith("params/layer2/")
            assert np.array_equal(leaf, before[path]) != moves, path
