"""Masks: what each selects, the laws of their algebra, their text, their errors."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxtransfer.groups import FROZEN, Group
from flaxtransfer.masks import (
    Mask,
    adapter,
    as_mask,
    batch_norm,
    biases,
    everything,
    glob,
    head,
    kernels,
    matrices,
    parse,
    resolve,
    selected,
    stage,
    stages,
    stem,
    to_text,
    up_to,
    where,
)
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.training.plan import Phase, Plan
from flaxtransfer.training.plan_yaml import plan_to_yaml

SHAPES = {
    "conv1/kernel": (7, 7, 3, 64),
    "bn1/scale": (64,),
    "bn1/bias": (64,),
    "layer1/0/conv1/kernel": (3, 3, 64, 64),
    "layer1/0/bn1/scale": (64,),
    "layer2/0/conv1/kernel": (3, 3, 64, 128),
    "layer2/0/downsample/0/kernel": (1, 1, 64, 128),
    "layer2/0/downsample/1/scale": (128,),
    "layer2/0/downsample/1/bias": (128,),
    "layer3/0/bn2/bias": (256,),
    "layer4/0/conv2/kernel": (3, 3, 512, 512),
    "layer4/1/bn2/scale": (512,),
    "fc/kernel": (512, 10),
    "fc/bias": (10,),
}
TREE = unflatten({path: jax.ShapeDtypeStruct(s, "float32") for path, s in SHAPES.items()})
NORMS = {path for path in SHAPES if "bn" in path or "downsample/1" in path}


def starting(*prefixes):
    return {path for path in SHAPES if path.startswith(prefixes)}


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (everything(), set(SHAPES)),
        (stem(), starting("conv1/", "bn1/")),
        (stage(4), starting("layer4/")),
        (stages(3, 4), starting("layer3/", "layer4/")),
        (stages(4, 3, 3), starting("layer3/", "layer4/")),
        (head(), {"fc/kernel", "fc/bias"}),
        (head() | adapter(), {"fc/kernel", "fc/bias"}),
        (batch_norm(), NORMS),
        (kernels(), {path for path in SHAPES if path.endswith("/kernel")}),
        (biases(), {path for path in SHAPES if path.endswith("/bias")}),
        (matrices(), {path for path, shape in SHAPES.items() if len(shape) > 1}),
        (up_to("stem"), starting("conv1/", "bn1/")),
        (up_to("layer2"), starting("conv1/", "bn1/", "layer1/", "layer2/")),
        (up_to("pool"), set(SHAPES) - starting("fc/")),
        (up_to("head"), set(SHAPES)),
        (glob("layer4/*/conv?/kernel"), {"layer4/0/conv2/kernel"}),
        (glob("**/{scale,bias}") - batch_norm(), {"fc/bias"}),
        (stage(4) - batch_norm(), {"layer4/0/conv2/kernel"}),
        (stage(4) & batch_norm(), {"layer4/1/bn2/scale"}),
        (~up_to("layer4"), {"fc/kernel", "fc/bias"}),
        (head() | stage(4) - batch_norm(), {"fc/kernel", "fc/bias", "layer4/0/conv2/kernel"}),
        ((head() | stage(4)) - biases(), starting("layer4/") | {"fc/kernel"}),
    ],
    ids=lambda value: repr(sorted(value) if isinstance(value, set) else value),
)
def test_what_a_mask_selects(mask, expected):
    assert selected(mask, TREE) == expected
    resolved = resolve(mask, TREE)
    assert {path for path, taken in flatten(resolved).items() if taken is True} == expected
    assert jax.tree.structure(resolved) == jax.tree.structure(TREE)
    assert mask(TREE) == resolved
    assert resolve(repr(mask), TREE) == resolved


def test_arrays_and_shapes_resolve_alike():
    arrays = jax.tree.map(lambda leaf: np.zeros((1,) * len(leaf.shape)), TREE)
    for mask in (matrices(), batch_norm(), glob("**/kernel")):
        assert resolve(mask, arrays) == resolve(mask, TREE)


def test_batch_statistics_are_selected_by_the_same_masks():
    statistics = unflatten(
        {
            f"{module}/{name}": jax.ShapeDtypeStruct((4,), "float32")
            for module in ("bn1", "layer2/0/downsample/1", "layer4/0/bn1")
            for name in ("mean", "var")
        }
    )
    assert selected(batch_norm(), statistics) == set(flatten(statistics))
    assert selected(stage(4), statistics) == {"layer4/0/bn1/mean", "layer4/0/bn1/var"}


@pytest.mark.parametrize(
    ("path", "is_batch_norm"),
    [
        ("bn1/scale", True),
        ("bn/scale", True),
        ("bn_init/bias", True),
        ("stage1/conv1_bn/mean", True),
        ("BatchNorm_0/scale", True),
        ("block/batch_norm/var", True),
        ("layer2/0/downsample/1/scale", True),
        ("layer2/0/downsample/2/bias", True),
        ("layer2/0/downsample/1/kernel", False),
        ("layer2/0/downsample/0/kernel", False),
        ("block/downsample/kernel", False),
        ("norm1/scale", False),
        ("LayerNorm_0/scale", False),
        ("GroupNorm_0/scale", False),
        ("bnet/kernel", False),
        ("urbn1/scale", False),
        ("conv1/kernel", False),
    ],
)
def test_batch_norm_goes_by_names(path, is_batch_norm):
    tree = unflatten({path: 0, "other": 0})
    assert resolve(batch_norm(), tree, allow_empty=True) == unflatten(
        {path: is_batch_norm, "other": False}
    )


def test_the_head_is_fc_at_the_root_and_nothing_that_contains_its_name():
    tree = unflatten({"fc/kernel": 0, "overhead/kernel": 0, "layer1/0/fc/kernel": 0, "fc2/bias": 0})
    assert selected(head(), tree) == {"fc/kernel"}
    assert selected(glob("head/**"), {"overhead": {"a": 0}, "head": {"a": 0}}) == {"head/a"}


def test_foreign_trees_work_with_the_general_masks():
    tree = unflatten(
        {
            "encoder/l0/kernel": jnp.ones((2, 2)),
            "decoder/kernel": jnp.ones((2, 3)),
            "t": jnp.ones(()),
        }
    )
    assert selected(glob("decoder/**") | ~matrices(), tree) == {"decoder/kernel", "t"}
    assert selected(kernels(), tree) == {"encoder/l0/kernel", "decoder/kernel"}


# The laws, over random trees and random expressions.

names = st.sampled_from(
    [
        "conv1",
        "bn1",
        "layer1",
        "layer4",
        "fc",
        "adapter",
        "overhead",
        "kernel",
        "bias",
        "0",
        "scale",
    ]
)
random_trees = st.recursive(
    st.sampled_from([jax.ShapeDtypeStruct(shape, "float32") for shape in ((), (3,), (3, 3))]),
    lambda inner: st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
).filter(lambda tree: isinstance(tree, dict))
atoms = st.sampled_from(
    [
        *(make() for make in (stem, head, adapter, batch_norm, kernels, biases, matrices)),
        *(everything(), stage(1), stages(1, 4), up_to("layer1"), up_to("head")),
        *map(glob, ("**/bias", "*", "layer[1-4]/**", "{fc,bn1}/*", "a'b\"c\\")),
    ]
)
masks = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.builds(Mask.__invert__, inner),
        st.builds(Mask.__and__, inner, inner),
        st.builds(Mask.__or__, inner, inner),
        st.builds(Mask.__sub__, inner, inner),
    ),
    max_leaves=8,
)
nothing = ~everything()


@pytest.mark.parametrize(
    "law",
    [
        lambda a, b, c: (~(a & b), ~a | ~b),
        lambda a, b, c: (~(a | b), ~a & ~b),
        lambda a, b, c: (a & a, a),
        lambda a, b, c: (a | a, a),
        lambda a, b, c: (a | (a & b), a),
        lambda a, b, c: (a & (a | b), a),
        lambda a, b, c: (~~a, a),
        lambda a, b, c: (a & (b | c), (a & b) | (a & c)),
        lambda a, b, c: (a | (b & c), (a | b) & (a | c)),
        lambda a, b, c: (a & b, b & a),
        lambda a, b, c: (a | b, b | a),
        lambda a, b, c: (a & (b & c), (a & b) & c),
        lambda a, b, c: (a | (b | c), (a | b) | c),
        lambda a, b, c: (a - b, a & ~b),
        lambda a, b, c: (a - (b | c), a - b - c),
        lambda a, b, c: (a & everything(), a),
        lambda a, b, c: (a | nothing, a),
        lambda a, b, c: (a | ~a, everything()),
        lambda a, b, c: (a & ~a, nothing),
        lambda a, b, c: (a & nothing, nothing),
        lambda a, b, c: (a - a, nothing),
    ],
)
@given(tree=random_trees, a=masks, b=masks, c=masks)
def test_laws(law, tree, a, b, c):
    left, right = law(a, b, c)
    assert resolve(left, tree, allow_empty=True) == resolve(right, tree, allow_empty=True)


@given(tree=random_trees, a=masks, b=masks)
def test_operators_are_those_of_booleans_leaf_by_leaf(tree, a, b):
    def flat(mask):
        return flatten(resolve(mask, tree, allow_empty=True))

    for path, (x, y) in {path: (x, flat(b)[path]) for path, x in flat(a).items()}.items():
        assert flat(a & b)[path] == (x and y)
        assert flat(a | b)[path] == (x or y)
        assert flat(a - b)[path] == (x and not y)
        assert flat(~a)[path] == (not x)


@given(masks)
def test_repr_is_an_expression_that_parses_to_the_same_mask(mask):
    assert parse(repr(mask)) == mask
    assert hash(parse(repr(mask))) == hash(mask)
    # Peer: Python itself reads the same expression.
    functions = (stem, head, adapter, batch_norm, kernels, biases, matrices, everything)
    more = (stage, stages, up_to, glob)
    assert eval(repr(mask), {f.__name__: f for f in (*functions, *more)}) == mask


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (stage(4) - batch_norm() | head(), "stage(4) - batch_norm() | head()"),
        (stage(4) - (batch_norm() | head()), "stage(4) - (batch_norm() | head())"),
        (stem() - head() - biases(), "stem() - head() - biases()"),
        (stem() - (head() - biases()), "stem() - (head() - biases())"),
        (~(stem() & head()), "~(stem() & head())"),
        (~~stem(), "~~stem()"),
        ((stem() | head()) & biases(), "(stem() | head()) & biases()"),
        (stages(4, 3), "stages(3, 4)"),
        (glob("a/*") | up_to("layer2"), "glob('a/*') | up_to('layer2')"),
    ],
)
def test_repr_has_the_brackets_it_needs_and_no_more(mask, text):
    assert repr(mask) == text


def test_masks_are_values():
    a, b = stage(4) - batch_norm(), stage(4) - batch_norm()
    assert a == b
    assert len({a, b, stage(4), stage(3), batch_norm() - stage(4)}) == 4
    assert (stem() & head()) != (stem() | head())
    assert pickle.loads(pickle.dumps(a)) == a
    with pytest.raises(AttributeError):
        a.operator = "|"
    assert not jax.tree.structure(a).num_nodes > 1  # A leaf to JAX, so optax may hold one.


def test_optax_takes_a_mask_where_it_takes_a_function():
    params = {"fc": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = optax.add_decayed_weights(0.5, mask=matrices())
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_array_equal(updates["fc"]["kernel"], 0.5)
    np.testing.assert_array_equal(updates["fc"]["bias"], 0.0)


@pytest.mark.parametrize(
    "misuse", [lambda: stem() and head(), lambda: not stem(), lambda: bool(everything())]
)
def test_and_or_not_are_refused_for_they_would_drop_a_side(misuse):
    with pytest.raises(TypeError, match="compose masks with & | - ~".replace("|", r"\|")):
        misuse()


@pytest.mark.parametrize("other", ["head()", True, {"fc": True}, None])
def test_operators_take_masks_alone(other):
    for operator in (Mask.__and__, Mask.__or__, Mask.__sub__):
        assert operator(stem(), other) is NotImplemented
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = stem() | other


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: stage(0), ValueError, "a stage must be an int >= 1, got 0"),
        (lambda: stage(-1), ValueError, "a stage must be an int >= 1, got -1"),
        (lambda: stage("4"), TypeError, "a stage must be an int >= 1, got '4'"),
        (lambda: stage(True), TypeError, "got True"),
        (lambda: stages(), ValueError, "needs the numbers"),
        (lambda: up_to("layr2"), ValueError, "no segment is called 'layr2'.*mean 'layer2'"),
        (lambda: up_to("layer9"), ValueError, "no segment is called 'layer9'; there are adapter"),
        (lambda: up_to(2), ValueError, "no segment is called 2"),
        (lambda: glob("a["), ValueError, "never closes"),
        (lambda: glob(3), TypeError, "pattern must be a string, got 3"),
        (lambda: as_mask(3), TypeError, "a mask must be a Mask or its expression, got 3"),
    ],
)
def test_masks_that_can_never_be_meant_are_refused_at_once(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (
            adapter(),
            r"adapter\(\) selects none of the 14 leaves. The tree has segments stem, layer1",
        ),
        (stage(9), r"stage\(9\): there is no layer9. The tree has segments stem, .*layer4, head"),
        (stages(4, 5, 6), r"there is no layer5 and no layer6"),
        (head() | stage(9), r"stage\(9\): there is no layer9"),
        (glob("layer4/*/conv9/kernel"), "did you mean 'layer4/0/conv2/kernel'"),
        (glob("fc/weight"), "matches nothing; did you mean 'fc/kernel'|did you mean 'fc/bias'"),
        (
            glob("fc/krnel") | stem(),
            r"glob\('fc/krnel'\) matches nothing; did you mean 'fc/kernel'",
        ),
        (head() & batch_norm(), r"head\(\) & batch_norm\(\) selects none of the 14 leaves"),
        (everything() - ~adapter(), "selects none"),
    ],
    ids=repr,
)
def test_a_mask_that_selects_nothing_is_an_error_and_can_be_permitted(mask, text):
    with pytest.raises(ValueError, match=text):
        resolve(mask, TREE)
    permitted = resolve(mask, TREE, allow_empty=True)
    assert jax.tree.structure(permitted) == jax.tree.structure(TREE)


def test_a_tree_without_leaves_or_shapes_says_so():
    with pytest.raises(ValueError, match="The tree has no leaves"):
        resolve(everything(), {})
    with pytest.raises(ValueError, match="no segment of a ResNet; its leaves are decoder/kernel"):
        resolve(head(), {"decoder": {"kernel": 0}})
    with pytest.raises(TypeError, match=r"matrices\(\) needs shapes, but 'fc' is True"):
        resolve(matrices(), {"fc": True})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("haed()", "no function is called 'haed'; did you mean 'head'"),
        ("head", r"head must be called, as in head\(\); did you mean 'head'"),
        ("head() +  stem()", "is none of: a call of adapter, batch_norm"),
        ("head() and stem()", "is none of"),
        ("stage(n=4)", "is none of"),
        ("stage(-1)", "arguments must be ints and strings, got '-1'"),
        ("stage(True)", "arguments must be ints and strings, got 'True'"),
        ("stage(4.0)", "arguments must be ints"),
        ("glob(f'{x}')", "arguments must be ints"),
        ("stage(0)", "must be an int >= 1"),
        ("stage()", "missing 1 required positional argument"),
        ("head(1)", "takes 0 positional arguments"),
        ("up_to('layr2')", "did you mean 'layer2'"),
        ("glob('a[')", "never closes"),
        ("__import__('os').system('true')", "is none of"),
        ("(lambda: head())()", "is none of"),
        ("head.__class__()", "is none of"),
        ("head(); stem()", "not an expression"),
        ("", "not an expression"),
        ("head() |", "not an expression"),
        ("head()\0", "null bytes|not an expression"),
        ("~" * 15_000 + "head()", "deep|not an expression"),
        ("~" * 300 + "head()", "nested more than 200 deep"),
        (" - ".join(["head()"] * 1000), "nested more than 200 deep"),
        ("(" * 5000 + "head()" + ")" * 5000, "deep|not an expression"),
        ("~" * 100_000 + "head()", "at most 20,000 characters, got 100,006"),
        ("stage(" + "7" * 5000 + ")", "not an expression .a number of too many digits"),
        ("stage(0x" + "f" * 5000 + ")", "an int must be at most 1,000,000,000"),
        ("head()\udcff", "not an expression"),
        ("1()", "is none of"),
    ],
)
def test_text_that_is_no_mask_is_refused(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse(text)


def test_parse_reads_layout_as_python_does():
    assert parse("  stage( 4 )-( batch_norm( )|head() )  ") == stage(4) - (batch_norm() | head())
    assert parse("glob('a' '/b')") == glob("a/b")
    with pytest.raises(ValueError, match="must be a string, got 3"):
        parse(3)


def large(path, leaf):
    return leaf.size > 100


LARGE = where(large)


def test_a_predicate_of_ones_own_composes_and_is_a_value():
    big = {path for path, shape in SHAPES.items() if np.prod(shape) > 100}
    assert selected(LARGE, TREE) == big
    assert selected(LARGE - kernels(), TREE) == big - selected(kernels(), TREE)
    assert selected(~LARGE & head(), TREE) == {"fc/bias"}
    assert repr(stage(4) - LARGE | head()) == "stage(4) - where('large') | head()"
    assert where(large, name="large") == LARGE
    assert hash(where(large)) == hash(LARGE)
    assert where(large, name="big") != LARGE
    assert where(lambda path, leaf: leaf.size > 100, name="large") != LARGE
    assert pickle.loads(pickle.dumps(LARGE | head())) == LARGE | head()


def test_a_predicate_sees_the_path_and_the_leaf():
    seen = {}
    selected(where(lambda path, leaf: bool(seen.update({path: leaf.shape}) or 1), "spy"), TREE)
    assert seen == SHAPES


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: where("large"), TypeError, "predicate must be a function .*, got 'large'"),
        (lambda: where(head()), TypeError, r"predicate must be a function .*, got head\(\)"),
        (lambda: where(lambda path, leaf: True), ValueError, "name='large'"),
        (lambda: where(large, name=""), ValueError, "prints by the name"),
        (lambda: where(large, name=3), TypeError, "name must be a string, got 3"),
        (
            lambda: selected(where(lambda path, leaf: None, "none"), TREE),
            TypeError,
            r"where\('none'\) must return True or False, got None for 'conv1/kernel'",
        ),
        (
            lambda: selected(where(lambda path, leaf: False, "no"), TREE),
            ValueError,
            r"where\('no'\) selects none of the 14 leaves",
        ),
        (
            lambda: to_text(head() | LARGE),
            ValueError,
            r"cannot be written: where\('large'\) is a function of the program",
        ),
        (
            lambda: parse("head() | where('large')"),
            ValueError,
            r"where\('large'\) is a function of a program and cannot be read from text",
        ),
    ],
)
def test_predicates_that_cannot_be_meant_or_written_are_refused_by_name(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_a_tree_of_no_known_family_points_to_glob_and_where():
    for mask in (stem(), stage(1), head() & everything()):
        with pytest.raises(ValueError, match=r"no segment of a ResNet.*ft\.glob or ft\.where"):
            resolve(mask, {"decoder": [0]})
    with pytest.raises(ValueError, match="selects none") as caught:
        resolve(biases(), {"decoder": [0]})
    assert "ft.glob" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"labels": {"a": LARGE, "b": ~LARGE}},
        {"norm": {LARGE: "batch"}},
        {"recalibrate": LARGE | batch_norm()},
        {"groups": {"a": Group(optax.sgd, 0.1, 0.1, decay_mask=LARGE), "b": FROZEN}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_plan_with_a_predicate_cannot_be_written(change):
    phase = {
        "labels": {"a": head(), "b": ~head()},
        "groups": {"a": Group(optax.sgd, 0.1), "b": FROZEN},
    }
    plan_to_yaml(Plan([Phase(**phase, steps=1)]))
    with pytest.raises(TypeError, match=r"where\('large'\) is a function of the program"):
        plan_to_yaml(Plan([Phase(**(phase | change), steps=1)]))
