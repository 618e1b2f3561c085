"""The parts that a plain ResNet does not have; what they compute is compared with timm's in
tests/parity.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxtransfer as ft
from flaxtransfer.batchnorm import modules
from flaxtransfer.models.layers import average_pool, blur_pool
from flaxtransfer.models.layout import RESNET
from flaxtransfer.paths import flatten, unflatten

PLAIN = ft.models.ResNetConfig("bottleneck", (1, 1, 1, 1), width=8, classes=3)
# Each part once, several to a network, for compiling is what takes the time.
PARTS = {
    "deep, blur, se": {
        "stem": "deep",
        "stem_width": 8,
        "shortcut": "average",
        "anti_alias": "blur",
        "attention": "se",
    },
    "tiered, average, eca": {
        "stem": "tiered",
        "stem_width": 8,
        "anti_alias": "average",
        "attention": "eca",
        "reduce_first": 2,
        "shortcut_kernel": 3,
    },
    "stem pool, v1": {"stem_pool": "convolution", "stride_in": "1x1"},
    "group": {"norm": "group", "width": 32},
    "v2, deep": {"preactivation": True, "stem": "deep", "stem_width": 8, "shortcut": "average"},
    "v2, last": {
        "preactivation": True,
        "stride_at": "last",
        "stem_bias": True,
        "stem_pool": "zero-padded",
        "depths": (2, 1, 2, 1),
        "epsilon": 1.001e-5,
    },
    "bit": {
        "preactivation": True,
        "norm": "group",
        "standardized": 1e-10,
        "width": 32,
        "stem_pool": "zero-padded",
    },
}


# The parts of each are of the others as well; comparisons with timm cover every combination.
SOME = [
    part if part in ("deep, blur, se", "bit") else pytest.param(part, marks=pytest.mark.slow)
    for part in PARTS
]


def network(part):
    model = ft.resnet(dataclasses.replace(PLAIN, **PARTS[part]))
    return model, model.init(jax.random.key(0))


def run(model, variables, images, **how):
    return jax.jit(lambda variables, images: model.apply(variables, images, **how))(
        variables, images
    )


def images(size=32):
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, size, size, 3)), jnp.float32)


@pytest.mark.parametrize("part", SOME)
def test_cut_anywhere_it_is_the_same_function(part):
    model, variables = network(part)
    whole, _ = run(model, variables, images())
    assert whole.std() > 0
    first, _ = run(model, variables, images(), stop="layer2")
    second, _ = run(model, variables, first, start="layer2")
    np.testing.assert_allclose(second, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", SOME)
def test_every_leaf_has_a_segment_and_a_gradient(part):
    model, variables = network(part)

    def loss(params):
        return (model.apply({**variables, "params": params}, images())[0] ** 2).sum()

    gradients = flatten(jax.jit(jax.grad(loss))(variables["params"]))
    assert RESNET.present(gradients) == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert [path for path, leaf in gradients.items() if not np.abs(leaf).max() > 0] == []


@pytest.mark.parametrize("part", ["deep, blur, se", "stem pool, v1", "v2, deep", "v2, last"])
def test_the_norms_of_a_stem_are_batch_norms_to_masks_and_policies(part):
    model, variables = network(part)
    statistics = flatten(variables["batch_stats"])
    named = {path for path in statistics if path.endswith("/mean")}
    assert set(modules(variables["params"])) == {path.removesuffix("/mean") for path in named}
    _, updated = run(model, variables, images(), norm="batch")
    assert all((flatten(updated)[path] != statistics[path]).any() for path in named)


def test_group_norms_have_no_statistics_and_no_policy(tmp_path):
    model, variables = network("group")
    assert variables["batch_stats"] == {}
    assert modules(variables["params"]) == ()
    running, _ = run(model, variables, images())
    batch, _ = run(model, variables, images(), norm="batch")
    np.testing.assert_array_equal(running, batch)
    source = ft.ArraySource(np.zeros((8, 32, 32, 3), np.uint8), np.arange(8) % 3)
    preprocessing = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, 32, 32)
    feed = ft.loaders(
        source, ft.data.Splits.of(np.arange(6), np.arange(6, 8)), preprocessing, batch_size=3
    )
    plan = ft.recipes.full_fine_tuning(variables["params"], steps=2)
    fitted = ft.fit(ft.Classifier(model, variables, feed.preprocessing), plan, feed, tmp_path)
    assert fitted.steps == 2


def test_standardized_kernels_may_be_scaled_and_shifted():
    # Weight standardization takes mean and size of each filter out of the function.
    model, variables = network("bit")
    wanted, _ = run(model, variables, images())
    params = flatten(variables["params"])
    changed = {
        path: 3 * leaf + 0.5 if path.endswith("kernel") and not path.startswith("fc") else leaf
        for path, leaf in params.items()
    }
    got, _ = run(model, {**variables, "params": unflatten(changed)}, images())
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-5)


def test_blocks_that_start_as_identities():
    # Then layer1's output is that of its first shortcut, whatever the blocks hold.
    config = dataclasses.replace(PLAIN, **PARTS["v2, last"])
    model = ft.resnet(config, zero_init_residual=True)
    params = flatten(model.init(jax.random.key(0))["params"])
    zeros = [path for path, leaf in params.items() if path.endswith("kernel") and not leaf.any()]
    assert zeros == [
        f"layer{s}/{b}/conv3/kernel"
        for s, depth in enumerate((2, 1, 2, 1), 1)
        for b in range(depth)
    ]


def test_pools_of_odd_sides():
    rows = jnp.arange(5.0)[None, :, None, None] * jnp.ones((1, 5, 2, 1))
    # torch's AvgPool2d(2, ceil_mode=True, count_include_pad=False) and AvgPool2d(2).
    assert average_pool(rows, padded=True)[0, :, 0, 0].tolist() == [0.5, 2.5, 4.0]
    assert average_pool(rows)[0, :, 0, 0].tolist() == [0.5, 2.5]
    # (1, 2, 1) / 4 over 1 0 1, 1 2 3 and 3 4 3: reflected without the edge itself.
    assert blur_pool(rows)[0, :, 0, 0].tolist() == [0.5, 2.0, 3.5]


@pytest.mark.parametrize("side", [12, 13, 14, 15])
def test_a_pool_without_padding_reaches_over_the_edge(side):
    """Windows by hand, as torch's MaxPool2d(3, 2, ceil_mode=True) and Caffe place them."""
    model = ft.resnet(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=3, stem_pool="ceil"))
    ones = {path: np.ones(leaf.shape) for path, leaf in flatten(model.abstract()).items()}
    # A stem that takes every second pixel as it is.
    kernel = np.zeros((7, 7, 3, 3))
    kernel[3, 3] = np.eye(3)
    own = {"params/conv1/kernel": kernel, "params/bn1/bias": np.zeros(3)}
    own |= {"batch_stats/bn1/mean": np.zeros(3), "batch_stats/bn1/var": np.full(3, 1 - 1e-5)}
    variables = unflatten({path: jnp.asarray(a, jnp.float32) for path, a in (ones | own).items()})
    image = np.random.default_rng(0).random((1, side, side, 3), np.float32)
    found = model.apply(variables, jnp.asarray(image), stop="layer1")[0]
    seen = image[0, ::2, ::2]
    starts = range(0, len(seen) - 1, 2)
    expected = [[seen[i : i + 3, j : j + 3].max((0, 1)) for j in starts] for i in starts]
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)


def test_average_anti_aliasing_says_which_sides_it_takes():
    model, _ = network("tiered, average, eca")
    with pytest.raises(ValueError, match=r"layer2/0 .*the sides of images must be multiples of 32"):
        jax.eval_shape(lambda x: model.apply(model.init(jax.random.key(0)), x)[0], images(75))


@pytest.mark.parametrize("way", ["linear", "repeat"])
def test_bands_before_a_deep_stem(way):
    config = dataclasses.replace(PLAIN, **PARTS["deep, blur, se"])
    variables = jax.tree.map(np.asarray, ft.resnet(config).init(jax.random.key(0)))
    pre = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, 32, 32)
    checkpoint = ft.Pretrained(variables, config, pre)
    network = ft.transfer(checkpoint, classes=2, bands=6, adapter=way, zero_head=False)
    model, start, report = network.model, network.variables, network.report
    pixels = np.random.default_rng(0).normal(size=(2, 32, 32, 6)).astype(np.float32)
    wanted, _ = run(model, start, pixels)
    assert report.adapted == (("params/conv1/0/kernel",) if way == "repeat" else ())
    six = dataclasses.replace(pre, mean=(0.5,) * 6, std=(0.25,) * 6)
    folded = ft.weights.fold_adapter(
        ft.Pretrained(jax.tree.map(np.asarray, start), model.config, six)
    )
    got, _ = run(ft.resnet(folded.config), folded.variables, pixels)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"preactivation": True, "attention": "se"},
            "network must not have attention",
        ),
        (
            {"preactivation": True, "anti_alias": "blur"},
            "network must not have attention",
        ),
        ({"preactivation": True, "stem_pool": "ceil"}, "network must not have attention"),
        ({"preactivation": True, "stride_at": "last"}, "requires bottleneck blocks"),
        (
            {"preactivation": True, "stem_bias": True, "stem_pool": "zero-padded"},
            "stride_at='last' behind a zero-padded pool",
        ),
        ({"stride_at": "last"}, "require preactivation=True"),
        ({"stem_bias": True}, "require preactivation=True"),
        ({"standardized": 0.0}, "standardized must be a float between 0 and 1, got 0.0"),
        ({"epsilon": None}, "epsilon must be a float between 0 and 1, got None"),
        ({"stride_at": "middle"}, "stride_at must be 'first' or 'last', got 'middle'"),
        ({"stem": "deep"}, "stem_width must be an integer >= 4 for a deep stem, got None"),
        ({"stem_width": 0}, "stem_width must be an integer >= 1 or None, got 0"),
        ({"stem_pool": "ceil", "anti_alias": "blur"}, "must be None with stem_pool='ceil'"),
        ({"stem": "deep", "stem_width": 3}, "stem_width must be an integer >= 4 or None, got 3"),
        ({"stem": "wide"}, "stem must be 'plain' or 'deep' or 'tiered', got 'wide'"),
        ({"se_ratio": 0}, "se_ratio must be > 0"),
        ({"anti_alias": "blur", "stem_pool": "convolution"}, "anti_alias must be None"),
        ({"shortcut": "average", "shortcut_kernel": 3}, "shortcut_kernel must be 1 with"),
        ({"norm": "group", "width": 48}, "a multiple of 32 channels .* got 48"),
        ({"reduce_first": 65}, "no channels"),
        ({"stride_in": "1x1"}, "a basic block has no 1x1"),
        ({"block": "bottleneck", "stride_in": "1x1", "anti_alias": "blur"}, "without anti_alias"),
        ({"shortcut_kernel": 2}, "shortcut_kernel must be 1 or 3, got 2"),
    ],
)
def test_a_config_refuses_what_is_no_network(arguments, text):
    with pytest.raises(ValueError, match=text):
        ft.models.ResNetConfig(**arguments)
