"""ResNets: names, sizes, arithmetic, initial values and errors.

Logits and gradients are compared with torch's in `tests/parity`; here nothing but JAX is needed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxtransfer.models import ARCHITECTURES, Model, ResNetConfig, lax_conv
from flaxtransfer.models.registry import resnet
from flaxtransfer.paths import flatten, unflatten
from tests.support.rounding import rounding
from tests.support.small_resnet import SMALL, SMALL_BOTTLENECK, noise

# Parameters, and 10^9 multiplications for a 224 px image, as torchvision publishes them with its
# weights (`num_params`, `_ops`).
PUBLISHED = {
    "resnet18": (11_689_512, 1.814),
    "resnet34": (21_797_672, 3.664),
    "resnet50": (25_557_032, 4.089),
    "resnet101": (44_549_160, 7.801),
    "resnet152": (60_192_808, 11.514),
    "wide_resnet50_2": (68_883_240, 11.398),
    "wide_resnet101_2": (126_886_696, 22.753),
    "resnext50_32x4d": (25_028_904, 4.23),
    "resnext101_32x8d": (88_791_336, 16.414),
    "resnext101_64x4d": (83_455_272, 15.46),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_multiplications_are_torchvisions(name):
    """The second number tells v1.5 from v1, whose stride is elsewhere: 4.1 against 3.8."""
    model = resnet(name, convolution=lax_conv)
    abstract = model.abstract()
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    multiplications = 0
    for equation in jax.make_jaxpr(model.apply)(abstract, images).eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            weights = equation.invars[1].aval.shape
            multiplications += equation.outvars[0].aval.size * int(np.prod(weights[:-1]))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract["params"]))
    assert parameters == PUBLISHED[name][0]
    assert multiplications / 1e9 == pytest.approx(PUBLISHED[name][1], abs=6e-4)
    assert set(PUBLISHED) <= set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("name", "path", "shape"),
    [
        ("resnet18", "params/conv1/kernel", (7, 7, 3, 64)),
        ("resnet18", "params/bn1/scale", (64,)),
        ("resnet18", "batch_stats/bn1/mean", (64,)),
        ("resnet18", "params/layer1/0/conv1/kernel", (3, 3, 64, 64)),
        ("resnet18", "params/layer2/0/downsample/0/kernel", (1, 1, 64, 128)),
        ("resnet18", "params/layer2/0/downsample/1/bias", (128,)),
        ("resnet18", "batch_stats/layer4/1/bn2/var", (512,)),
        ("resnet18", "params/fc/kernel", (512, 1000)),
        ("resnet50", "params/layer1/0/downsample/0/kernel", (1, 1, 64, 256)),
        ("resnet50", "params/layer2/0/conv1/kernel", (1, 1, 256, 128)),
        ("resnet50", "batch_stats/layer4/2/bn3/mean", (2048,)),
        ("resnet50", "params/fc/bias", (1000,)),
        ("resnext50_32x4d", "params/layer1/0/conv2/kernel", (3, 3, 4, 128)),
        ("wide_resnet50_2", "params/layer1/0/conv2/kernel", (3, 3, 128, 128)),
    ],
)
def test_leaves_have_torchvisions_names(name, path, shape):
    assert flatten(resnet(name).abstract())[path].shape == shape


@pytest.mark.parametrize(
    ("name", "params", "statistics"),
    # torchvision's state dict has 122, 218 and 320 entries, one `num_batches_tracked` for each of
    # the 20, 36 and 53 BatchNorms among them.
    [("resnet18", 62, 40), ("resnet34", 110, 72), ("resnet50", 161, 106)],
)
def test_there_are_no_other_leaves(name, params, statistics):
    abstract = resnet(name).abstract()
    assert len(flatten(abstract["params"])) == params
    assert len(flatten(abstract["batch_stats"])) == statistics
    # Basic blocks of the first stage have no downsample; bottlenecks do.
    assert ("downsample" in abstract["params"]["layer1"]["0"]) == (name == "resnet50")


class TestInitialValues:
    def test_abstract_is_what_init_gives(self, small):
        model, variables = small
        abstract = model.abstract()
        assert jax.tree.map(lambda x: (x.shape, x.dtype), variables) == jax.tree.map(
            lambda x: (x.shape, x.dtype), abstract
        )
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))

    def test_a_caller_cannot_spoil_the_next_abstract(self):
        resnet(SMALL).abstract()["params"].pop("fc")
        assert "fc" in resnet(SMALL).abstract()["params"]

    @pytest.mark.parametrize(
        ("path", "deviation"),
        [
            # sqrt(2 / (kernel area * outputs)), and sqrt(1 / inputs) for the head.
            ("conv1/kernel", (2 / (49 * 64)) ** 0.5),
            ("layer2/0/conv1/kernel", (2 / (9 * 128)) ** 0.5),
            ("layer3/0/downsample/0/kernel", (2 / 256) ** 0.5),
            ("fc/kernel", (1 / 512) ** 0.5),
        ],
    )
    def test_kernels_are_normal_with_the_published_deviations(self, path, deviation):
        kernel = flatten(resnet("resnet18").init(jax.random.key(3))["params"])[path]
        z = np.asarray(kernel).ravel() / deviation
        # Five standard errors of the mean, of the variance and of the fourth moment.
        for moment, value, spread in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
            assert abs((z**moment).mean() - value) < 5 * (spread / z.size) ** 0.5

    def test_scales_biases_and_statistics_are_neutral(self, small):
        _, variables = small
        for path, leaf in flatten(variables).items():
            if not path.endswith("kernel"):
                assert (leaf == (1 if path.endswith(("scale", "var")) else 0)).all(), path

    def test_a_leaf_depends_on_key_and_path_alone(self, small):
        _, variables = small
        other = resnet(ResNetConfig("basic", (2, 1, 1, 1), width=16, classes=7))
        same = flatten(other.init(jax.random.key(0), (64, 48, 3)))
        changed = flatten(other.init(jax.random.key(1)))
        seen = {}
        for path, leaf in flatten(variables).items():
            if path.endswith("kernel") and not path.startswith("params/fc"):
                assert (leaf == same[path]).all(), path
                assert not (leaf == changed[path]).any(), path
                first = float(leaf.ravel()[0] / leaf.std())
                assert first not in seen, (path, seen[first])
                seen[first] = path

    @pytest.mark.parametrize("config", [SMALL, SMALL_BOTTLENECK])
    def test_zero_init_residual_makes_blocks_identities(self, config):
        model = resnet(config, zero_init_residual=True)
        variables = model.init(jax.random.key(0))
        last = "bn2" if config.block == "basic" else "bn3"
        zero = {p for p, x in flatten(variables["params"]).items() if "scale" in p and not x.any()}
        assert zero == {f"layer{n}/0/{last}/scale" for n in (1, 2, 3, 4)}
        if config.block == "basic":
            x = abs(noise(2, 8, 8, 16))
            y, _ = model.apply(variables, x, start="layer1", stop="layer2")
            np.testing.assert_array_equal(y, x)

    def test_zero_head_gives_every_class_the_same_logit(self):
        model = resnet(SMALL, zero_head=True)
        logits, _ = model.apply(model.init(jax.random.key(0)), noise(2, 128), start="head")
        assert (logits == 0).all()

    def test_works_inside_jit(self, small):
        model, variables = small
        jitted = jax.jit(model.init, static_argnums=1)(jax.random.key(0), (32, 32, 3))
        # Another program: some ten operations, fused as the compiler likes.
        for one, other in zip(jax.tree.leaves(jitted), jax.tree.leaves(variables), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=rounding(10) * abs(other).max())


@pytest.mark.slow
def test_the_convolution_of_choice_is_the_same_network(small):
    """`conv` and `lax_conv` in float64, to rounding: logits, gradients, statistics.

    From layer3 on, where at this size every convolution is a sum over taps.
    """
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda leaf: leaf.astype("float64"), small[1])
        maps = noise(4, 4, 4, 32, dtype="float64")

        def run(model):
            def loss(params):
                logits, updated = model.apply(
                    {**variables, "params": params}, maps, norm="batch", start="layer3"
                )
                return (logits**3).sum(), (logits, updated)

            return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

        found, wanted = run(resnet(SMALL)), run(resnet(SMALL, convolution=lax_conv))
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert abs(one - other).max() <= 1e-11 * abs(other).max()


def test_one_device_equals_eight():
    """In float64, with BatchNorm over the global batch."""
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        # The thread pool must outnumber the devices, or they wait for each other forever.
        "NPROC": "16",
        "PYTHONPATH": str(root),
    }
    script = root / "tests/support/eight_devices.py"
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout)
    assert set(differences) == {"loss", "gradients", "batch_stats"}
    assert max(differences.values()) < 1e-12, differences


def test_a_model_is_a_static_value(small):
    model, variables = small
    traces = []

    def run(model, variables, images):
        traces.append(model)
        return model.apply(variables, images)[0]

    run = jax.jit(run, static_argnums=0)
    images = noise(4, 16, 16, 3)
    first = run(model, variables, images)
    second = run(Model(ResNetConfig("basic", (1, 1, 1, 1), width=16, classes=3)), variables, images)
    assert (first == second).all()
    assert len(traces) == 1
    assert model != resnet(SMALL, zero_head=True)
    with pytest.raises(AttributeError):
        model.dtype = jnp.float32


class TestErrors:
    @pytest.mark.parametrize(
        ("asked", "words"),
        [
            (
                "resnet52",
                ["got 'resnet52'", "depth must be one of 10, 14, 18", "did you mean 'resnet152'"],
            ),
            ("ResNet18", ["got 'ResNet18'", "did you mean 'resnet18'"]),
        ],
    )
    def test_unknown_networks(self, asked, words):
        with pytest.raises(
            ValueError, match="`architecture` must be the name of a network"
        ) as error:
            resnet(asked)
        assert all(word in str(error.value) for word in words)

    @pytest.mark.parametrize(
        ("make", "kind", "text"),
        [
            (lambda: resnet("resnet18", classes=0), ValueError, "classes must be an integer >= 1"),
            (lambda: resnet(18), TypeError, "config must be a ResNetConfig, got 18"),
            (lambda: resnet(SMALL, dtype="int8"), TypeError, "floating dtype, got int8"),
            (lambda: resnet(SMALL, dtype="float31"), TypeError, "dtype must be .*got 'float31'"),
            (lambda: resnet(SMALL, convolution="lax"), TypeError, "must be a function, got 'lax'"),
        ],
    )
    def test_what_makes_no_model(self, make, kind, text):
        with pytest.raises(kind, match=text):
            make()

    @pytest.mark.parametrize(
        ("how", "text"),
        [
            ({"start": "layr2"}, "unknown segment 'layr2'; did you mean 'layer2'"),
            ({"stop": "fc"}, "unknown segment 'fc'.*the segments are stem, layer1"),
            (
                {"start": "layer4", "stop": "layer2"},
                "start must not come after stop, got start='layer4'",
            ),
            ({"norm": "runing"}, "got 'runing'; did you mean 'running'"),
            (
                {"norm": frozenset({"layer4/0/bn3", "bn1"})},
                "no BatchNorm at 'layer4/0/bn3'; did you mean 'layer4/0/bn",
            ),
        ],
    )
    def test_segments_and_policies(self, small, how, text):
        with pytest.raises(ValueError, match=text):
            small[0].apply(small[1], noise(4, 16, 16, 3), **how)

    def test_a_policy_must_be_hashable(self, small):
        with pytest.raises(TypeError, match="frozenset"):
            small[0].apply(small[1], noise(4, 16, 16, 3), norm={"bn1"})

    @pytest.mark.parametrize(
        ("shape", "start", "text"),
        [
            ((2, 16, 16, 4), None, r"stem takes images .* with 3 channels, got .*\(2, 16, 16, 4\)"),
            ((16, 16, 3), None, r"stem takes images \[batch, height, width, channels\].*16, 16, 3"),
            ((2, 0, 16, 3), None, "has no pixels"),
            ((2, 8, 8, 32), "layer2", "layer2 takes the output of layer1 .* with 16 channels"),
            ((2, 8, 8, 128), "head", r"head takes .*\[batch, features\] with 128 features"),
            ((2, 128), "pool", "pool takes .* with 128 channels"),
        ],
    )
    def test_shapes_that_do_not_enter(self, small, shape, start, text):
        with pytest.raises(ValueError, match=text):
            small[0].apply(small[1], jnp.zeros(shape), start=start)

    def test_integer_images(self, small):
        with pytest.raises(TypeError, match=r"floating and normalized .* got uint8"):
            small[0].apply(small[1], jnp.zeros((2, 16, 16, 3), "uint8"))

    @pytest.mark.parametrize("shape", [(32, 32), (32, 32, 1), (1, 32, 32, 3)])
    def test_image_shapes_for_init(self, shape):
        with pytest.raises(ValueError, match="with 3 channels"):
            resnet(SMALL).init(jax.random.key(0), shape)

    def test_foreign_variables_are_listed_together(self, small):
        model, variables = small
        flat = flatten(variables)
        flat["params/fc/weight"] = flat.pop("params/fc/kernel")
        flat["params/conv1/kernel"] = jnp.zeros((7, 7, 1, 16))
        flat.pop("batch_stats/layer3/0/bn1/mean")
        with pytest.raises(ValueError, match="do not fit the network") as error:
            model.apply(unflatten(flat), noise(4, 16, 16, 3))
        for words in (
            "params lacks fc/kernel",
            "params has unknown leaves fc/weight",
            "conv1/kernel must be (7, 7, 3, 16), got (7, 7, 1, 16)",
            "batch_stats lacks layer3/0/bn1/mean",
        ):
            assert words in str(error.value)

    @pytest.mark.parametrize("which", ["params", "nothing"])
    def test_the_pair_is_needed(self, small, which):
        given = small[1]["params"] if which == "params" else None
        with pytest.raises(ValueError, match=r"variables must be \{'params'"):
            small[0].apply(given, noise(4, 16, 16, 3))


def test_a_seed_is_no_key():
    with pytest.raises(TypeError, match=r"`rng` must be a key, such as jax.random.key\(0\), got 7"):
        resnet(SMALL).init(7)
