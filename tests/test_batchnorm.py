"""The BatchNorm policy: frozen means running statistics, and exceptions are spelled out."""

import jax
import optax
import pytest

from flaxtransfer.batchnorm import check, divided_over, mesh_at_hand, mode, modules, policy
from flaxtransfer.groups import FROZEN, trainable_mask
from flaxtransfer.labels import label, rest
from flaxtransfer.masks import batch_norm, everything, glob, head, resolve, stage, stem
from flaxtransfer.paths import unflatten

NORMS = ("bn1", "layer3/0/bn1", "layer3/0/downsample/1", "layer4/0/bn1", "layer4/1/bn1")
CONVOLUTIONS = ("conv1", "layer3/0/conv1", "layer3/0/downsample/0", "layer4/0/conv1", "fc")


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, "float32")


PARAMS = unflatten(
    {f"{module}/kernel": shape(3, 3) for module in CONVOLUTIONS}
    | {f"{module}/{name}": shape(3) for module in NORMS for name in ("scale", "bias")}
)
STATISTICS = unflatten({f"{m}/{name}": shape(3) for m in NORMS for name in ("mean", "var")})


@pytest.mark.parametrize("tree", [PARAMS, STATISTICS], ids=["params", "batch_stats"])
def test_modules_are_the_batch_norms(tree):
    assert set(modules(tree)) == set(NORMS)


def test_statistics_need_no_name():
    assert modules({"a": {"norm": {"mean": 0, "var": 0}}}) == ("a/norm",)
    assert modules({"a": {"norm": {"scale": 0, "bias": 0}}}) == ()


@pytest.mark.parametrize("tree", [PARAMS, STATISTICS], ids=["params", "batch_stats"])
@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        (head(), set()),
        (head() | stage(4) - batch_norm(), set()),
        (head() | stage(4), {"layer4/0/bn1", "layer4/1/bn1"}),
        ("stage(3)", {"layer3/0/bn1", "layer3/0/downsample/1"}),
        (glob("layer4/0/bn1/bias"), {"layer4/0/bn1"}),
        (glob("layer4/1/*/scale") | stem(), {"bn1", "layer4/1/bn1"}),
        (everything(), set(NORMS)),
    ],
    ids=lambda value: repr(sorted(value) if isinstance(value, set) else value),
)
def test_a_batch_norm_uses_batch_statistics_where_a_leaf_of_it_moves(tree, trainable, expected):
    assert policy(tree, trainable) == frozenset(expected)
    assert policy(tree, resolve(trainable, PARAMS)) == frozenset(expected)


def test_booleans_alone_are_enough():
    labels = label(PARAMS, {"late": head() | stage(4), "frozen": rest()})
    booleans = trainable_mask(labels, {"late": optax.sgd(1.0), "frozen": FROZEN})
    assert policy(booleans) == policy(PARAMS, head() | stage(4))


def test_a_module_that_only_begins_alike_is_another():
    params = unflatten({f"bn1{end}/scale": shape(3) for end in ("", "0")})
    assert policy(params, glob("bn10/scale")) == {"bn10"}


def test_overrides_apply_in_order():
    late = {"layer4/0/bn1", "layer4/1/bn1"}
    cases = [
        ({stage(3): "batch"}, late | {"layer3/0/bn1", "layer3/0/downsample/1"}),
        ({"stage(4)": "running"}, set()),
        ({everything(): "batch", "stem()": "running"}, set(NORMS) - {"bn1"}),
        ({"stem()": "running", everything(): "batch"}, set(NORMS)),
        ({glob("layer4/1/**"): "running"}, {"layer4/0/bn1"}),
        ({glob("bn1/mean"): "batch"}, late | {"bn1"}),
        ({}, late),
    ]
    for overrides, expected in cases:
        for tree in (PARAMS, STATISTICS):
            assert policy(tree, resolve(stage(4), PARAMS), overrides=overrides) == expected


def test_a_network_without_batch_norm_has_an_empty_policy():
    assert policy({"fc": {"kernel": shape(3, 3)}}, head()) == frozenset()
    assert policy({}, resolve(head(), PARAMS)) == frozenset()


def test_the_result_is_static():
    assert hash(policy(PARAMS, stage(4))) == hash(policy(STATISTICS, stage(4)))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            (PARAMS, {"fc": {"kernel": True}}),
            ValueError,
            r"of another tree; they differ in bn1/bias",
        ),
        ((STATISTICS, {"a": {"scale": True}}), ValueError, "of another tree; they differ in bn1, "),
        ((PARAMS, ["fc"]), TypeError, r"a tree of booleans or a mask, got other leaves: 0"),
        ((PARAMS, PARAMS), TypeError, "got other leaves: conv1/kernel, layer3/0/conv1/kernel"),
        ((PARAMS,), TypeError, "got other leaves"),
        ((PARAMS, stage(9)), ValueError, "there is no layer9"),
        ((PARAMS, "haed()"), ValueError, "did you mean 'head'"),
    ],
)
def test_what_is_not_about_this_tree_is_refused(arguments, error, text):
    with pytest.raises(error, match=text):
        policy(*arguments)


def test_all_wrong_overrides_come_at_once():
    overrides = {"head()": "batch", stem(): "frozen", "glob('layer4/0/bn2/**')": "running"}
    with pytest.raises(ValueError, match="overrides of the BatchNorm policy") as caught:
        policy(PARAMS, stage(4), overrides=overrides)
    text = str(caught.value)
    assert "'head()' touches no BatchNorm" in text
    assert "stem() must be 'running' or 'batch', got 'frozen'" in text
    assert "did you mean 'layer4/0/bn1/" in text


@pytest.mark.parametrize(
    "norm", ["running", "batch", frozenset(), frozenset({"layer4/0/bn1", "bn1"})]
)
def test_check_returns_a_policy_that_fits(norm):
    assert check(norm, PARAMS) == norm
    assert check(norm, STATISTICS) == norm


@pytest.mark.parametrize(
    ("norm", "error", "text"),
    [
        ("runing", ValueError, "got 'runing'; did you mean 'running'"),
        ({"bn1"}, TypeError, "it is hashed.*got a set"),
        (None, TypeError, "got a NoneType"),
        (
            frozenset({"layer4/0/bn2", "xyz"}),
            ValueError,
            "no BatchNorm at 'layer4/0/bn2'; did you mean 'layer4/0/bn1'.*no BatchNorm at 'xyz'.*"
            "the BatchNorms are .*bn1",
        ),
        (frozenset({"fc"}), ValueError, "no BatchNorm at 'fc'"),
    ],
)
def test_check_refuses_what_does_not_fit(norm, error, text):
    with pytest.raises(error, match=text):
        check(norm, PARAMS)


@pytest.mark.parametrize(
    ("norm", "module", "expected"),
    [
        ("running", "bn1", "running"),
        ("batch", "bn1", "batch"),
        (frozenset({"bn1"}), "bn1", "batch"),
        (frozenset({"bn1"}), "layer4/0/bn1", "running"),
        (frozenset(), "bn1", "running"),
    ],
)
def test_mode_of_one_batch_norm(norm, module, expected):
    assert mode(norm, module) == expected


@pytest.mark.parametrize(
    ("devices", "rows", "divided"), [(4, 8, True), (4, 6, False), (1, 8, False)]
)
def test_rows_are_divided_where_each_device_has_as_many(devices, rows, divided):
    """Otherwise the BatchNorm is flax's; what it computes is compared in ``test_sharding``."""
    mesh = jax.sharding.AbstractMesh((devices,), ("data",))
    with divided_over(mesh):
        assert mesh_at_hand(rows) == (mesh if divided else None)
    assert mesh_at_hand(rows) is None
