"""Convolution: equal to `lax.conv_general_dilated`, the peer here, by every way it is computed."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from flaxtransfer.models import ResNetConfig, layers
from flaxtransfer.models.layers import by_taps, conv, conv_by_patches, for_platform, lax_conv
from flaxtransfer.models.registry import resnet
from tests.support.rounding import rounding

NONE = ((0, 0), (0, 0))
ONE = ((1, 1), (1, 1))


def arrays(image, kernel, dtype="float64"):
    draw = np.random.default_rng(0)
    return tuple(jnp.asarray(draw.standard_normal(shape), dtype) for shape in (image, kernel))


def output_and_gradients(function, x, kernel, **how):
    """The output, and the gradients of its product with fixed noise."""
    y, back = jax.vjp(lambda x, kernel: function(x, kernel, **how), x, kernel)
    noise = jnp.asarray(np.random.default_rng(1).standard_normal(y.shape), y.dtype)
    return y, *back(noise)


def assert_equals_lax(function, x, kernel, **how):
    functions = (function, lax_conv)
    run = jax.jit(lambda x, kernel: [output_and_gradients(f, x, kernel, **how) for f in functions])
    assert_same(*run(x, kernel), 1e-12)


def assert_same(found, wanted, tolerance):
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        largest = np.abs(other).max(initial=1e-300)
        assert np.abs(one - other).max(initial=0.0) <= tolerance * largest


def primitives(function, *arguments):
    """The names of all primitives in the program of a function and what it calls."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield equation.primitive.name
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else (value,):
                    if hasattr(inner, "jaxpr"):
                        yield from walk(inner.jaxpr)
                    elif hasattr(inner, "eqns"):
                        yield from walk(inner)

    return set(walk(jax.make_jaxpr(function)(*arguments).jaxpr))


# Image, kernel, stride, padding, groups; by taps or not. The first ones are ResNet-18's and
# ResNeXt-50's on 64 px images.
ROUTES = [
    ((4, 64, 64, 3), (7, 7, 3, 64), 2, ((3, 3), (3, 3)), 1, False),
    ((4, 16, 16, 64), (3, 3, 64, 64), 1, ONE, 1, False),
    ((4, 16, 16, 64), (1, 1, 64, 128), 2, NONE, 1, True),
    ((4, 8, 8, 128), (3, 3, 128, 256), 2, ONE, 1, True),
    ((4, 4, 4, 256), (3, 3, 256, 256), 1, ONE, 1, True),
    ((4, 4, 4, 256), (3, 3, 256, 512), 2, ONE, 1, True),
    ((4, 2, 2, 512), (3, 3, 512, 512), 1, ONE, 1, True),
    ((4, 16, 16, 128), (3, 3, 4, 128), 1, ONE, 32, True),
    ((4, 7, 7, 256), (3, 3, 256, 512), 1, ONE, 1, True),
    # Next to a limit: 20 positions instead of 16, 56 instead of 49, 15 channels instead of 16.
    ((4, 4, 5, 255), (3, 3, 255, 256), 1, ONE, 1, False),
    ((4, 7, 8, 256), (3, 3, 256, 256), 1, ONE, 1, False),
    ((4, 4, 4, 15), (3, 3, 15, 16), 1, ONE, 1, False),
    ((4, 8, 8, 16), (1, 1, 16, 15), 1, NONE, 1, False),
]


@pytest.mark.parametrize(("image", "kernel", "stride", "padding", "groups", "taps"), ROUTES)
def test_on_cpu_the_slow_shapes_are_summed_over_taps(image, kernel, stride, padding, groups, taps):
    strides = (stride, stride)
    how = {"strides": strides, "padding": padding, "groups": groups}
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (image, kernel))
    found = primitives(lambda x, w: output_and_gradients(conv, x, w, **how), x, w)
    assert by_taps(image, kernel, strides, padding, groups) is taps
    assert ("conv_general_dilated" in found, "dot_general" in found) == (not taps, taps)


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
@pytest.mark.parametrize(("image", "kernel", "stride", "padding", "groups", "taps"), ROUTES)
def test_on_accelerators_it_is_lax(image, kernel, stride, padding, groups, taps, backend):
    del taps
    how = {"strides": (stride, stride), "padding": padding, "groups": groups}
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (image, kernel))
    plain = jax.make_jaxpr(lambda x, w: lax_conv(x, w, **how))(x, w)
    with for_platform(backend):
        assert str(jax.make_jaxpr(lambda x, w: conv(x, w, **how))(x, w)) == str(plain)


def test_a_model_takes_the_routes_of_its_mesh_and_not_of_the_process():
    """A mesh of another platform, as a process that also has a CPU can make one."""
    model = resnet(ResNetConfig(depths=(1, 1, 1, 1), width=16))
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), model.abstract())

    def program(model):
        return primitives(lambda v, x: model.apply(v, x)[0], variables, jnp.zeros((1, 32, 32, 3)))

    def mesh(platform, count=1):
        return SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)] * count))

    assert "reduce_window_max" in program(model.on(mesh("tpu")))
    assert "reduce_window_max" not in program(model.on(mesh("cpu")))
    assert program(model) == program(model.on(mesh("cpu")))
    with jax.default_device(jax.devices()[0]):
        assert program(model) == program(model.on(mesh("cpu")))
    assert model.on(mesh("tpu")) != model  # Or they would share a compiled program.
    assert model.on(mesh("tpu")).on(mesh("cpu")) == model.on(mesh("cpu"))
    assert (model.on(mesh("cpu", 4)).devices, model.on(mesh("tpu", 4)).devices) == (4, 1)


@pytest.mark.parametrize(
    ("image", "kernel", "how"),
    [
        # 1x1 with a stride larger than itself, on odd sizes, and with padding.
        ((2, 5, 7, 16), (1, 1, 16, 32), {"strides": (2, 3)}),
        ((2, 3, 2, 16), (1, 1, 16, 16), {"padding": ((1, 0), (2, 1)), "strides": (2, 2)}),
        # Maps smaller than the kernel.
        ((3, 1, 1, 16), (3, 3, 16, 16), {"padding": ONE}),
        ((3, 2, 2, 16), (3, 3, 16, 32), {"padding": ONE, "strides": (2, 2)}),
        ((3, 1, 4, 16), (5, 3, 16, 16), {"padding": ((3, 1), (0, 2)), "strides": (1, 3)}),
        # A border so wide that some outputs see nothing but padding.
        ((2, 2, 2, 16), (2, 2, 16, 16), {"padding": ((3, 0), (0, 3))}),
        # Groups: of few channels, and one to a channel.
        ((2, 6, 5, 12), (3, 3, 3, 8), {"padding": ONE, "strides": (2, 1), "groups": 4}),
        ((2, 2, 2, 16), (3, 3, 1, 32), {"padding": ONE, "groups": 16}),
    ],
)
def test_equals_lax_where_it_is_summed_over_taps(image, kernel, how):
    strides, padding, groups = ((1, 1), NONE, 1)
    assert by_taps(
        image,
        kernel,
        how.get("strides", strides),
        how.get("padding", padding),
        how.get("groups", groups),
    )
    with jax.enable_x64(True):
        x, w = arrays(image, kernel)
        assert_equals_lax(conv, x, w, **how)
        assert_equals_lax(conv_by_patches, x, w, **how)


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    taps=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strides=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    padding=st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2),
    channels=st.integers(1, 3),
    groups=st.integers(1, 3),
)
@example((1, 1), (3, 3), (1, 1), ONE, 2, 1)
@example((2, 3), (1, 1), (3, 2), ((2, 1), (0, 1)), 3, 2)
def test_the_sum_over_taps_is_the_convolution(size, taps, strides, padding, channels, groups):
    """Whatever the shape; `conv` itself takes this way only where it is faster."""
    assume(all(n + sum(p) >= k for n, p, k in zip(size, padding, taps, strict=True)))
    with jax.enable_x64(True):
        x, w = arrays((2, *size, channels * groups), (*taps, channels, 2 * groups))
        how = {"strides": strides, "padding": padding, "groups": groups}
        assert_equals_lax(layers._sum_over_taps, x, w, **how)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("taps", [True, False])
def test_keeps_its_dtype_and_adds_up_in_float32(dtype, taps):
    """Up to the rounding of the sum, and of the result to its own dtype: half an eps."""
    side = 2 if taps else 6
    tolerance = rounding(3 * 3 * 64) + float(jnp.finfo(dtype).eps) / 2
    with jax.enable_x64(True):
        x, w = arrays((4, side, side, 64), (3, 3, 64, 32), dtype)
        exact = lax_conv(x.astype("float64"), w.astype("float64"), padding=ONE)
        y = conv(x, w, padding=ONE)
        assert y.dtype == dtype
        assert float(jnp.abs(y - exact).max() / jnp.abs(exact).max()) < tolerance


@pytest.mark.parametrize("size", [2, 6])
def test_forward_mode_second_derivatives_and_vmap(size):
    """2 px is summed over taps, 6 px is not."""
    with jax.enable_x64(True):
        x, w = arrays((2, size, size, 16), (3, 3, 16, 16))

        def values(function):
            def energy(x, w):
                return (function(x, w, padding=ONE) ** 3).sum()

            tangent = jax.jvp(energy, (x, w), (w.sum() * x, w))
            second = jax.grad(lambda w: (jax.grad(energy, 1)(x, w) ** 2).sum())(w)
            forward_over_reverse = jax.jvp(jax.grad(energy), (x, w), (x, w))[1]
            mapped = jax.vmap(lambda x, w: function(x, w, padding=ONE))(x[None], w[None])
            return *tangent, second, forward_over_reverse, mapped

        run = jax.jit(values, static_argnums=0)
        assert_same(run(conv), run(lax_conv), 1e-12)


@pytest.mark.parametrize("function", [conv, lax_conv])
@pytest.mark.parametrize(
    ("image", "kernel", "how", "words"),
    [
        (
            (2, 4, 4),
            (3, 3, 1, 1),
            {},
            ["images must be [batch, height, width, channels]", "(2, 4, 4)"],
        ),
        ((2, 4, 4, 1), (3, 1, 1), {}, ["kernel must be [height, width, channels", "(3, 1, 1)"]),
        ((2, 4, 4, 3), (3, 3, 4, 8), {}, ["3 channels", "the kernel takes 4"]),
        ((2, 4, 4, 4), (3, 3, 2, 3), {"groups": 2}, ["3 outputs do not divide into 2 groups"]),
        ((2, 4, 4, 4), (3, 3, 4, 4), {"groups": 0}, ["groups must be >= 1, got 0"]),
        ((2, 2, 2, 3), (5, 5, 3, 3), {"padding": ONE}, ["2 x 2 px", "too small", "5 x 5"]),
        ((2, 4, 4, 3), (3, 3, 3, 3), {"padding": "SAME"}, ["all integers", "'SAME'"]),
        ((2, 4, 4, 3), (3, 3, 3, 3), {"strides": 2}, ["(vertical, horizontal)", "got 2"]),
        # Both at once.
        (
            (2, 4, 4, 3),
            (3, 3, 3, 3),
            {"strides": (0, 1), "padding": ((-1, 0), (0, 0))},
            ["strides must be >= 1, got (0, 1)", "padding must be >= 0"],
        ),
    ],
)
def test_what_does_not_fit_is_said(function, image, kernel, how, words):
    x, w = arrays(image, kernel, "float32")
    with pytest.raises(ValueError, match=r"convolution|strides") as error:
        function(x, w, **how)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("image", "kernel"), [("float32", "bfloat16"), ("uint8", "float32"), ("int32", "int32")]
)
def test_mixed_and_integer_dtypes_are_refused(image, kernel):
    x, w = jnp.ones((1, 4, 4, 1), image), jnp.ones((3, 3, 1, 1), kernel)
    with pytest.raises(TypeError, match=f"got {image} and {kernel}"):
        conv(x, w)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize(
    ("image", "kernel", "stride", "padding"),
    [
        ((8, 9, 7, 3), (7, 7, 3, 4), 2, ((3, 3), (3, 3))),
        ((4, 6, 5, 4), (3, 3, 4, 2), 1, ONE),
        ((12, 6, 5, 2), (3, 3, 2, 3), 2, ONE),
        ((4, 5, 6, 2), (3, 2, 2, 3), 1, ((2, 0), (0, 1))),
    ],
)
def test_equals_lax_where_it_is_summed_over_rows(
    image, kernel, stride, padding, devices, monkeypatch
):
    monkeypatch.setattr(layers, "_LARGE", 1)
    monkeypatch.setattr(layers, "has_wide_registers", lambda: False)
    how = {"strides": (stride, stride), "padding": padding}
    static = ((stride, stride), padding, 1)
    assert layers.images_at_a_time(image, kernel, *static, devices)

    def by_rows(x, w, **how):
        with for_platform(None, devices):
            return conv(x, w, **how)

    with jax.enable_x64(True):
        x, w = arrays(image, kernel)
        assert_equals_lax(by_rows, x, w, **how)
        jacobians = [
            jax.jit(jax.jacfwd(lambda w, f=f: f(x, w, **how).sum(-1)))(w)
            for f in (by_rows, lax_conv)
        ]
        assert_same(*([each] for each in jacobians), 1e-12)
        # Not linear in what it differentiates, so that second derivatives are not zero.
        hessians = [
            jax.jit(
                jax.jvp,
                static_argnums=0,
            )(jax.grad(lambda w, f=f: (f(jnp.sin(x * w.sum()), w, **how) ** 3).sum()), (w,), (w,))
            for f in (by_rows, lax_conv)
        ]
        assert_same(*hessians, 1e-10)
        batched = [
            jax.jit(jax.vmap(jax.grad(lambda w, x, f=f: (f(x, w, **how) ** 2).sum()), (None, 0)))(
                w, jnp.stack([x, 2 * x])
            )
            for f in (by_rows, lax_conv)
        ]
        assert_same(*([each] for each in batched), 1e-12)


def test_only_large_convolutions_of_a_whole_share_are_summed_over_rows(monkeypatch):
    image, kernel, one = (32, 32, 32, 64), (3, 3, 64, 64), ((1, 1), ONE)
    chosen = layers.images_at_a_time
    monkeypatch.setattr(layers, "has_wide_registers", lambda: True)
    assert chosen(image, kernel, *one, 1) == 0
    monkeypatch.setattr(layers, "has_wide_registers", lambda: False)
    assert chosen(image, kernel, *one, 1) == 2
    assert chosen((33, *image[1:]), kernel, *one, 1) == 1
    assert chosen(image, kernel, *one, 1, 2) == 2
    # Three devices do not share 32 images evenly; one of 32 devices has too little to do.
    assert [chosen(image, kernel, *one, 1, devices) for devices in (3, 32)] == [0, 0]
    assert chosen(image, (1, 1, 64, 4096), (1, 1), NONE, 1) == 0
    assert chosen((32, 8, 8, 64), kernel, *one, 1) == 0
    assert chosen((32, 32, 32, 128), kernel, *one, 2) == 0


@pytest.mark.parametrize(
    ("flags", "wide"),
    [
        ("fpu sse2 avx2 avx512f", True),
        ("fpu sse2 avx2", False),
        # Arm, where nothing of the kind was measured.
        ("asimd sve2", True),
    ],
)
def test_the_processor_is_looked_up(flags, wide, monkeypatch):
    monkeypatch.setattr(layers.Path, "read_text", lambda self, **how: f"flags\t: {flags}\n")
    assert layers.has_wide_registers.__wrapped__() is wide
