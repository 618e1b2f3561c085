"""The head by declared intent; every other leaf as it was; a report that adds up."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxtransfer.classifier import transfer
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.weights import load

GOLDEN = Path(__file__).parent / "golden" / "torchvision_bottleneck"
HEAD = ("params/fc/bias", "params/fc/kernel")


@pytest.fixture
def checkpoint():
    return load(GOLDEN)


def head_of(variables):
    return variables["params"]["fc"]


# Five classes before: what becomes of the head, and in which list of the report it stands.
@pytest.mark.parametrize(
    ("head", "classes", "listed"),
    [
        ("new", 5, "new"),
        ("new", 3, "new"),
        ("keep", 5, "kept"),
        ("resize", 5, "kept"),
        ("resize", 3, "adapted"),
        ("resize", 8, "adapted"),
    ],
)
def test_the_report_covers_every_leaf_once(checkpoint, head, classes, listed):
    network = transfer(checkpoint, classes=classes, head=head)
    model, variables, report = network.model, network.variables, network.report
    leaves = flatten(variables)
    assert model.config == dataclasses.replace(checkpoint.config, classes=classes)
    assert sorted(report.kept + report.adapted + report.new) == sorted(leaves)
    assert [
        name for name in ("kept", "adapted", "new") if set(HEAD) <= set(getattr(report, name))
    ] == [listed]
    assert report.sizes == {path: leaf.size for path, leaf in leaves.items()}
    assert report.classes == (5, classes)


@pytest.mark.parametrize("head", ["new", "keep", "resize"])
def test_the_backbone_is_the_checkpoint_s_bit_for_bit(checkpoint, head):
    network = transfer(checkpoint, classes=5, head=head)
    variables, report = network.variables, network.report
    before, after = flatten(checkpoint.variables), flatten(variables)
    assert all(np.array_equal(before[path], after[path]) for path in report.kept)
    assert len(report.kept) >= len(after) - 2


def test_the_variables_are_the_model_s_in_float32(checkpoint):
    network = transfer(checkpoint, classes=2)
    model, variables = network.model, network.variables
    expected = flatten(model.abstract())
    leaves = flatten(variables)
    assert {p: leaf.shape for p, leaf in leaves.items()} == {
        p: leaf.shape for p, leaf in expected.items()
    }
    assert all(isinstance(leaf, jax.Array) for leaf in leaves.values())
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype("float32")}


def test_keep_gives_the_logits_of_the_checkpoint(checkpoint):
    peer = np.load(GOLDEN / "logits.npz")
    network = transfer(checkpoint, classes=5, head="keep")
    model, variables = network.model, network.variables
    logits, _ = jax.jit(model.apply)(variables, peer["images"])
    assert np.abs(logits - peer["logits"]).max() <= 5e-6 * np.abs(peer["logits"]).max()


@pytest.mark.parametrize("classes", [2, 8])
def test_resize_gives_the_same_logits_for_the_classes_that_stay(checkpoint, classes):
    peer = np.load(GOLDEN / "logits.npz")
    network = transfer(checkpoint, classes=classes, head="resize")
    model, variables = network.model, network.variables
    logits, _ = jax.jit(model.apply)(variables, peer["images"])
    both = min(classes, 5)
    np.testing.assert_allclose(logits[:, :both], peer["logits"][:, :both], atol=5e-6)
    assert (np.asarray(logits[:, both:]) == 0).all()


def test_a_new_head_is_zero_unless_asked(checkpoint):
    network = transfer(checkpoint, classes=4)
    variables = network.variables
    assert not head_of(variables)["kernel"].any()
    assert not head_of(variables)["bias"].any()


def test_a_random_head_is_reproducible_and_bounded(checkpoint):
    kernels = [
        np.asarray(
            head_of(transfer(checkpoint, classes=400, seed=seed, zero_head=False).variables)[
                "kernel"
            ]
        )
        for seed in (0, 0, 1)
    ]
    assert np.array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], kernels[2])
    bound = 1 / np.sqrt(checkpoint.config.features)
    assert 0.99 * bound < np.abs(kernels[0]).max() <= bound
    # The variance of a uniform distribution within the bound is bound ** 2 / 3.
    assert kernels[0].var() == pytest.approx(bound**2 / 3, rel=0.02)


def test_the_dtype_is_that_of_the_computation_alone(checkpoint):
    images = np.load(GOLDEN / "logits.npz")["images"]
    network = transfer(checkpoint, classes=5, head="keep", dtype=jnp.bfloat16)
    model, variables = network.model, network.variables
    assert {leaf.dtype for leaf in flatten(variables).values()} == {np.dtype("float32")}
    network = transfer(checkpoint, classes=5, head="keep")
    full, full_variables = network.model, network.variables
    halved, _ = jax.jit(model.apply)(variables, images)
    difference = halved - jax.jit(full.apply)(full_variables, images)[0]
    assert 0 < np.abs(difference).max() < 0.1


def test_the_checkpoint_is_not_shared_with_the_variables(checkpoint):
    """Nor does anything write to it: its checksum is that of its arrays."""
    network = transfer(checkpoint, classes=5, head="keep")
    scale = checkpoint.variables["params"]["bn1"]["scale"]
    with pytest.raises(ValueError, match="read-only"):
        scale[:] = 99
    assert not np.shares_memory(np.asarray(network.variables["params"]["bn1"]["scale"]), scale)


def test_the_report_as_text(checkpoint):
    network = transfer(checkpoint, classes=3, head="resize")
    report = network.report
    lines = str(report).splitlines()
    assert lines[0].endswith("5 -> 3 classes")
    assert lines[1] == (
        "  head     classes are matched by position, for they have no names on both sides"
    )
    assert [line.split()[:2] for line in lines[2:]] == [
        ["kept", "stem"],
        ["kept", "layer1"],
        ["kept", "layer2"],
        ["kept", "layer3"],
        ["kept", "layer4"],
        ["adapted", "params/fc/bias"],
        ["adapted", "params/fc/kernel"],
    ]
    assert lines[-1].endswith("384 numbers")
    assert report.numbers(report.kept) + 3 + 384 == sum(report.sizes.values())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"classes": 4, "head": "keep"}, "keeps the 5 classes of .* and classes=4 was asked"),
        ({"classes": 4, "head": "kept"}, "new, keep, resize, got 'kept'; did you mean 'keep'"),
        ({"classes": 0}, "classes must be a positive integer, got 0"),
        ({"classes": 2.0}, "classes must be a positive integer, got 2.0"),
        ({"classes": True}, "classes must be a positive integer, got True"),
    ],
)
def test_refusals(checkpoint, arguments, text):
    with pytest.raises(ValueError, match=text):
        transfer(checkpoint, **arguments)


def test_leaves_that_are_another_network_are_listed(checkpoint):
    leaves = flatten(checkpoint.variables)
    leaves["params/bn9/scale"] = leaves.pop("params/bn1/scale")
    broken = dataclasses.replace(checkpoint, variables=unflatten(leaves))
    with pytest.raises(ValueError, match="do not form resnet-bottleneck") as caught:
        transfer(broken, classes=5)
    assert "missing: params/bn1/scale [4]" in str(caught.value)
    assert "unexpected: params/bn9/scale; did you mean 'params/bn1/scale'" in str(caught.value)


def test_rows_of_a_head_follow_the_names_of_their_classes(checkpoint):
    named = dataclasses.replace(checkpoint, class_names=("a", "b", "c", "d", "e"))
    own = head_of(transfer(named, classes=5, head="keep").variables)
    order = ("c", "a", "e", "b", "d")
    kept = transfer(named, classes=5, head="keep", class_names=order)
    for leaf, found in head_of(kept.variables).items():
        np.testing.assert_array_equal(found, own[leaf][..., [2, 0, 4, 1, 3]])
    resized = transfer(named, classes=3, head="resize", class_names=("e", "new", "b"))
    kernel = head_of(resized.variables)["kernel"]
    np.testing.assert_array_equal(kernel[:, [0, 2]], own["kernel"][:, [4, 1]])
    assert not kernel[:, 1].any()
    assert "2 classes are matched by name; new and zero: new; left out: a, c, d" in str(
        resized.report
    )
    assert transfer(named, classes=5, head="keep").class_names == named.class_names


@pytest.mark.parametrize(
    ("head", "names", "message"),
    [
        (
            "keep",
            ("b", "c", "d", "e", "f"),
            r"does not know 'f' and also has 'a'; use head='resize'",
        ),
        ("keep", ("a", "b"), r"also has 'c', 'd', 'e'"),
        ("resize", ("x", "y"), r"knows none of 'x', 'y'; it has 'a', 'b'"),
        ("new", ("x",), r"class_names must be 2 names, got 1"),
    ],
)
def test_a_head_of_other_classes_is_refused(checkpoint, head, names, message):
    named = dataclasses.replace(checkpoint, class_names=("a", "b", "c", "d", "e"))
    classes = 2 if head == "new" else len(names)
    with pytest.raises(ValueError, match=message):
        transfer(named, classes=classes, head=head, class_names=names)
