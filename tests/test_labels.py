"""Labels: each leaf exactly one; and the table of what they mean."""

import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxtransfer.groups import FROZEN, Group
from flaxtransfer.labels import label, rest
from flaxtransfer.masks import batch_norm, biases, everything, head, kernels, selected, stage, stem
from flaxtransfer.overview import parameter_table
from flaxtransfer.paths import flatten, unflatten

SHAPES = {
    "conv1/kernel": (7, 7, 3, 64),
    "bn1/scale": (64,),
    "bn1/bias": (64,),
    "layer4/0/conv1/kernel": (3, 3, 64, 64),
    "layer4/0/bn1/scale": (64,),
    "layer4/0/bn1/bias": (64,),
    "fc/kernel": (64, 10),
    "fc/bias": (10,),
}
PARAMS = unflatten({path: jax.ShapeDtypeStruct(s, "float32") for path, s in SHAPES.items()})
STATISTICS = unflatten(
    {
        f"{module}/{name}": jax.ShapeDtypeStruct((64,), "float32")
        for module in ("bn1", "layer4/0/bn1")
        for name in ("mean", "var")
    }
)
VARIABLES = {"params": PARAMS, "batch_stats": STATISTICS}
RULES = {"head": head(), "late": stage(4) - batch_norm(), "frozen": rest()}


def test_every_leaf_has_the_label_of_its_rule():
    labels = label(PARAMS, RULES)
    assert jax.tree.structure(labels) == jax.tree.structure(PARAMS)
    assert flatten(labels) == {
        "conv1/kernel": "frozen",
        "bn1/scale": "frozen",
        "bn1/bias": "frozen",
        "layer4/0/conv1/kernel": "late",
        "layer4/0/bn1/scale": "frozen",
        "layer4/0/bn1/bias": "frozen",
        "fc/kernel": "head",
        "fc/bias": "head",
    }


def test_rules_may_be_expressions_and_the_rest_spelled_out():
    spelled = {
        "head": "head()",
        "late": "stage(4) - batch_norm()",
        "frozen": everything() - (head() | stage(4) - batch_norm()),
    }
    assert label(PARAMS, spelled) == label(PARAMS, RULES)


def test_the_order_of_rules_does_not_matter():
    assert label(PARAMS, dict(reversed(RULES.items()))) == label(PARAMS, RULES)


def test_an_empty_rest_is_no_mistake():
    assert set(flatten(label(PARAMS, {"all": everything(), "frozen": rest()})).values()) == {"all"}


@given(
    st.lists(st.sampled_from(["head()", "stem()", "biases()", "stage(4)", "kernels()"]), max_size=4)
)
def test_labels_exist_exactly_where_the_masks_are_disjoint(expressions):
    rules = {str(n): expression for n, expression in enumerate(expressions)} | {"rest": rest()}
    taken = [selected(expression, PARAMS) for expression in expressions]
    if sum(map(len, taken)) == len(set().union(*taken)):
        labels = flatten(label(PARAMS, rules))
        for n, paths in enumerate(taken):
            assert {path for path, name in labels.items() if name == str(n)} == paths
    else:
        with pytest.raises(ValueError, match="all take"):
            label(PARAMS, rules)


def test_all_problems_come_at_once_with_leaves_and_nearest_names():
    with pytest.raises(ValueError, match="exactly one label") as caught:
        label(
            PARAMS,
            {
                "a": head(),
                "b": biases() | kernels() & stem(),
                "c": "glob('layer4/0/conv9/kernel')",
                "d": "haed()",
                "e": "adapter()",
            },
        )
    text = str(caught.value)
    assert "'a' and 'b' all take 1 leaf: fc/bias;" in text
    assert "no label takes 3 leaves: bn1/scale, layer4/0/conv1/kernel, layer4/0/bn1/scale;" in text
    assert "label 'c': glob('layer4/0/conv9/kernel') selects none of the 8 leaves" in text
    assert "did you mean 'layer4/0/conv1/kernel'" in text
    assert "label 'd': 'haed()': no function is called 'haed'; did you mean 'head'" in text
    assert "label 'e': adapter() selects none of the 8 leaves" in text


def test_overlaps_of_three_and_of_two_are_told_apart():
    rules = {"a": head(), "b": biases(), "c": "glob('fc/bias')", "d": rest()}
    with pytest.raises(ValueError, match="'a' and 'b' and 'c' all take 1 leaf: fc/bias"):
        label(PARAMS, rules)


def test_long_lists_are_cut_with_a_count():
    many = {f"layer{n}": {"kernel": 0} for n in range(1, 30)}
    with pytest.raises(ValueError, match=r"no label takes 28 leaves: .* and 22 more"):
        label(many, {"a": stage(1)})


@pytest.mark.parametrize(
    ("rules", "error", "text"),
    [
        ({"a": rest(), "b": rest()}, ValueError, r"rest\(\) can be given once, not to 'a' and 'b'"),
        ({}, ValueError, "no label takes 8 leaves"),
        ({"a": True}, TypeError, "'a': True"),
        ({"a": {"fc": True}, 3: rest()}, TypeError, r"'a': {'fc': True}, 3: rest\(\)"),
        ({"": rest()}, TypeError, r"'': rest\(\)"),
        ([("a", rest())], TypeError, "rules must be a dict of masks by label"),
    ],
)
def test_rules_that_cannot_be_meant(rules, error, text):
    with pytest.raises(error, match=text):
        label(PARAMS, rules)


def test_variables_in_place_of_parameters_are_recognized():
    with pytest.raises(ValueError, match=r'label variables\["params"\]'):
        label(VARIABLES, {"new": head(), "frozen": rest()})
    with pytest.raises(ValueError, match="the tree has no leaves"):
        label({}, {"frozen": rest()})


GROUPS = {
    "head": Group(optax.adamw, learning_rate=1e-2, weight_decay=1e-4),
    "late": Group(
        functools.partial(optax.sgd, momentum=0.9), optax.linear_schedule(0.5, 0.0, 10), 1e-3
    ),
    "frozen": FROZEN,
}


def test_the_table_says_for_each_leaf_what_happens_to_it():
    report = parameter_table(VARIABLES, label(PARAMS, RULES), GROUPS)
    assert [
        (
            r.path,
            r.shape,
            r.label,
            r.learning_rate,
            r.scheduled,
            r.weight_decay,
            r.trainable,
            r.norm,
        )
        for r in report.rows
    ] == [
        ("bn1/bias", (64,), "frozen", None, False, 0.0, False, "running"),
        ("bn1/scale", (64,), "frozen", None, False, 0.0, False, "running"),
        ("conv1/kernel", (7, 7, 3, 64), "frozen", None, False, 0.0, False, None),
        ("layer4/0/bn1/bias", (64,), "frozen", None, False, 0.0, False, "running"),
        ("layer4/0/bn1/scale", (64,), "frozen", None, False, 0.0, False, "running"),
        ("layer4/0/conv1/kernel", (3, 3, 64, 64), "late", 0.5, True, 1e-3, True, None),
        ("fc/bias", (10,), "head", 0.01, False, 0.0, True, None),
        ("fc/kernel", (64, 10), "head", 0.01, False, 1e-4, True, None),
    ]


def test_the_totals_are_sums():
    report = parameter_table(VARIABLES, label(PARAMS, RULES), GROUPS)
    # By hand: 7*7*3*64 + 4*64 = 9664; 3*3*64*64 = 36864; 64*10 + 10 = 650. Four bytes each.
    assert [(t.label, t.leaves, t.parameters, t.trainable, t.bytes) for t in report.totals] == [
        ("head", 2, 650, 650, 2600),
        ("late", 1, 36864, 36864, 147456),
        ("frozen", 5, 9664, 0, 38656),
        ("total", 8, 47178, 37514, 188712),
    ]


def test_bytes_follow_the_type():
    half = {"params": jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16), PARAMS)}
    report = parameter_table(half, label(PARAMS, RULES), GROUPS)
    assert report.totals[-1].bytes == 2 * 47178


def test_the_batch_norm_policy_is_the_default_one_or_the_one_given():
    def norms(labels, norm=None):
        rows = parameter_table(VARIABLES, labels, GROUPS, norm).rows
        return {row.path.rpartition("/")[0]: row.norm for row in rows if row.norm}

    trained = label(PARAMS, {"head": head(), "late": stage(4), "frozen": rest()})
    assert norms(trained) == {"bn1": "running", "layer4/0/bn1": "batch"}
    assert norms(trained, "running") == {"bn1": "running", "layer4/0/bn1": "running"}
    assert norms(trained, frozenset({"bn1"})) == {"bn1": "batch", "layer4/0/bn1": "running"}
    with pytest.raises(ValueError, match="no BatchNorm at 'bn2'; did you mean 'bn1'"):
        norms(trained, frozenset({"bn2"}))


def test_the_learning_rate_of_an_optax_transformation_is_not_guessed():
    groups = GROUPS | {"head": optax.adamw(1e-2)}
    row = parameter_table(VARIABLES, label(PARAMS, RULES), groups).rows[-1]
    assert (row.learning_rate, row.weight_decay, row.trainable) == (None, None, True)


def test_printed_every_leaf_and_every_total_is_there():
    report = parameter_table(VARIABLES, label(PARAMS, RULES), GROUPS)
    text = str(report)
    lines = text.splitlines()

    def cells(start):
        line = next(line for line in lines if start in line)
        return [cell.strip() for cell in line.strip("│┃").split("│")]

    assert all(path in text for path in SHAPES)
    late = ["layer4/0/conv1/kernel", "3 × 3 × 64 × 64", "late", "0.5 schedule", "0.001", "yes", ""]
    assert cells("layer4/0/conv1/kernel") == late
    assert cells("bn1/scale") == ["bn1/scale", "64", "frozen", "–", "–", "no", "running"]
    assert cells("total") == ["total", "8", "47,178", "37,514", "0.19"]
    hidden = parameter_table(VARIABLES, label(PARAMS, RULES), GROUPS | {"head": optax.sgd(1.0)})
    assert " – " in next(line for line in str(hidden).splitlines() if "fc/kernel" in line)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"variables": PARAMS}, "variables must be .*got 'conv1', 'bn1'"),
        ({"labels": {"fc": {"kernel": "head", "bias": "late"}}}, "they differ in bn1/bias, "),
        (
            {"groups": {"haed": GROUPS["head"], "late": GROUPS["late"], "frozen": FROZEN}},
            "label 'head' has no group; did you mean 'haed'.*group 'haed' has no leaves",
        ),
        (
            {"groups": GROUPS | {"head": Group(optax.sgd, 0.1, 0.1, "glob('fc/kernl')")}},
            "decay_mask of group 'head': .*did you mean 'fc/kernel'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, text):
    arguments = {"variables": VARIABLES, "labels": label(PARAMS, RULES), "groups": GROUPS} | change
    with pytest.raises(ValueError, match=text):
        parameter_table(**arguments)


def test_rows_go_from_the_input_to_the_output_and_blocks_by_number():
    paths = [
        "fc/bias",
        "layer2/0/conv1/kernel",
        "layer1/10/bn1/bias",
        "layer1/9/bn1/bias",
        "conv1/b",
    ]
    params = unflatten({path: jax.ShapeDtypeStruct((2,), "float32") for path in paths})
    rows = parameter_table(
        {"params": params}, label(params, {"a": rest()}), {"a": optax.sgd(0.1)}
    ).rows
    assert [row.path for row in rows] == [paths[i] for i in (4, 3, 2, 1, 0)]


def test_real_arrays_in_the_order_of_jit_give_the_same_table():
    arrays = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), VARIABLES)
    labels = label(PARAMS, RULES)
    assert parameter_table(arrays, labels, GROUPS) == parameter_table(VARIABLES, labels, GROUPS)


def python(program):
    """What a program prints that a new interpreter runs in the root of the repository."""
    root = pathlib.Path(__file__).parents[1]
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout


def test_the_core_imports_neither_flax_nor_rich():
    modules = ["paths", "masks", "labels", "optimizers", "batchnorm"]
    program = "; ".join(
        [
            "import sys, types, importlib.util",
            # The package's own __init__ is not the core's business.
            "package = types.ModuleType('flaxtransfer')",
            "package.__path__ = ['flaxtransfer']",
            "sys.modules['flaxtransfer'] = package",
            *(f"import flaxtransfer.{name}" for name in modules),
            "print(*sorted({m.split('.')[0] for m in sys.modules}))",
        ]
    )
    loaded = set(python(program).split())
    assert {"jax", "optax"} <= loaded
    assert not loaded & {"flax", "rich", "orbax", "grain", "tensorflow_datasets", "matplotlib"}


def test_the_table_is_a_function_also_after_the_labels_were_imported():
    # A module called as its function would take its place in the package.
    program = "import flaxtransfer as ft; ft.label, ft.Group; print(callable(ft.parameter_table))"
    assert python(program).strip() == "True"
