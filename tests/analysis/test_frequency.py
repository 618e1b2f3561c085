"""Frequency responses with known answers: linear stems, finite differences, the built-in network.

Transfer functions are analytic. The figures of the built-in network are from a trial with other
images and seeds.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxtransfer as ft
from flaxtransfer.analysis import filter_transfer, frequency_response
from flaxtransfer.models.layout import RESNET
from flaxtransfer.paths import flatten, unflatten

SIZE = 32
SMALL = ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=2, classes=3)
MAPS = RESNET.segments[1:6]


def linear_stem(kernel):
    """A network whose stem is this kernel ``[7, 7, 3, filters]``: ReLU passes everything."""
    config = ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=kernel.shape[-1], classes=2)
    model = ft.resnet(config)
    flat = flatten(model.init(jax.random.key(0)))
    flat["params/conv1/kernel"] = jnp.asarray(kernel, jnp.float32)
    flat["params/bn1/bias"] = jnp.full(kernel.shape[-1:], 1e3)
    # 1 / sqrt(variance + epsilon) is 1.
    flat["batch_stats/bn1/var"] = jnp.full(kernel.shape[-1:], 1 - config.epsilon)
    return model, unflatten(flat)


def unit(channel, channels, size=SIZE):
    """One unit in the middle of the stem's output, where no border is seen."""
    cotangent = np.zeros((1, size // 4, size // 4, channels))
    cotangent[0, size // 8, size // 8, channel] = 1
    return {"stem": cotangent}


def gaussian(sigma):
    line = np.exp(-np.square(np.arange(-3, 4)) / (2 * sigma**2))
    line /= line.sum()
    return np.outer(line, line)


def of_one_filter(kernel, **options):
    """The response of a stem with one gray filter, the same in all bands."""
    stem = np.repeat(kernel[..., None, None] / 3, 3, axis=2)
    model, variables = linear_stem(np.repeat(stem, 2, axis=3))
    images = np.random.default_rng(0).normal(size=(64, SIZE, SIZE, 3)).astype(np.float32)
    return frequency_response(model, variables, images, segments=["stem"], **options)


def test_a_linear_stem_has_its_transfer_function():
    random = np.random.default_rng(0)
    kernel = random.normal(size=(7, 7, 3, 4))
    model, variables = linear_stem(kernel)
    images = random.normal(size=(3, SIZE, SIZE, 3)).astype(np.float32)
    analytic = filter_transfer(kernel, (SIZE, SIZE))
    for channel in range(4):
        found = frequency_response(
            model, variables, images, segments=["stem"], cotangents=unit(channel, 4)
        )
        difference = np.abs(found.spectrum[0] - analytic[channel]).max()
        assert difference <= 1e-4 * analytic[channel].max()
        # A negative case: the transfer function of another filter is another one.
        other = np.abs(found.spectrum[0] - analytic[channel - 1]).max()
        assert other > 0.1 * analytic[channel].max()


def test_the_transfer_function_by_its_definition():
    # Analytic: the filter on a complex wave, in the middle of an image.
    kernel = np.random.default_rng(1).normal(size=(3, 5, 1, 2))
    found = filter_transfer(kernel, (16, 16))
    rows, columns = np.indices((3, 5))
    for k in ((0, 0), (3, 0), (5, 11), (8, 8)):
        wave = np.exp(2j * np.pi * (k[0] * rows + k[1] * columns) / 16)
        expected = np.abs(np.einsum("hw,hwf->f", wave, kernel[:, :, 0])) ** 2
        np.testing.assert_allclose(found[:, 0, k[0], k[1]], expected, rtol=1e-9)


def test_it_is_the_response_to_small_sinusoids_at_every_segment():
    """Finite differences of amplitude 1e-3, by a cosine and a sine; 0.5 % was measured."""
    size, amplitude = 32, 1e-3
    with jax.enable_x64(True):
        model = ft.resnet(SMALL)
        variables = jax.tree.map(lambda x: x.astype("float64"), model.init(jax.random.key(3)))
        images = np.random.default_rng(0).normal(size=(2, size, size, 3))
        maps = jax.jit(lambda x: all_maps(model, variables, x))
        found = maps(images)  # sorted by name, as jax keeps a dictionary
        units = {name: found[name].shape[1:] for name in MAPS}
        every = {
            name: np.eye(int(np.prod(shape))).reshape(-1, *shape) for name, shape in units.items()
        }
        found = frequency_response(model, variables, images, cotangents=every)
        rows, columns = np.indices((size, size))
        gray = np.full(3, 3**-0.5)
        for vertical, horizontal in ((0, 1), (1, 2), (4, 0), (3, -7), (12, 9)):
            phase = 2 * np.pi * (vertical * rows + horizontal * columns) / size
            measured = dict.fromkeys(units, 0.0)
            for wave in (np.cos(phase), np.sin(phase)):
                step = amplitude * wave[..., None] * gray
                up, down = maps(images + step), maps(images - step)
                for name in units:
                    slope = (up[name] - down[name]) / (2 * amplitude)
                    measured[name] += float(jnp.square(slope).sum(axis=(1, 2, 3)).mean())
            for index, name in enumerate(units):
                ours = found.spectrum[index, 0, vertical, horizontal]
                theirs = measured[name] / np.prod(units[name])
                assert ours == pytest.approx(theirs, rel=0.02), (name, vertical, horizontal)


def all_maps(model, variables, images):
    return {
        name: model.apply(variables, images, stop=after)[0]
        for name, after in zip(MAPS, (*MAPS[1:], "pool"), strict=True)
    }


def test_random_signs_estimate_the_exact_response():
    # Hutchinson: 64 cotangents on 8 images are within a few per cent of all units.
    model = ft.resnet(SMALL)
    variables = model.init(jax.random.key(3))
    images = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype(np.float32)
    names = ("stem", "layer2")
    every = {"stem": np.eye(128).reshape(-1, 8, 8, 2), "layer2": np.eye(64).reshape(-1, 4, 4, 4)}
    exact = frequency_response(model, variables, images, segments=names, cotangents=every)
    drawn = frequency_response(model, variables, images, segments=names, cotangents=64)
    for one, other in zip(exact.stages, drawn.stages, strict=True):
        for ours, theirs in zip(one.gains, other.gains, strict=True):
            assert ours is theirs is None or ours == pytest.approx(theirs, rel=0.15)
    assert exact.cotangents == {"stem": 128, "layer2": 64}


@pytest.mark.parametrize("sigma", [0.8, 1.1, 1.4])
def test_a_low_pass_stem_is_called_so(sigma):
    found = of_one_filter(gaussian(sigma), cotangents=unit(0, 2)).stages[0]
    assert found.kind == "low-pass"
    # Analytic: exp(-4 pi² sigma² f²) is one half.
    edge = np.sqrt(np.log(2)) / (2 * np.pi * sigma)
    assert found.band[0] == 0
    assert edge / 2 <= found.band[1] <= 2 * edge


@pytest.mark.parametrize("sigma", [1.0, 1.4])
def test_a_high_pass_stem_is_called_so(sigma):
    kernel = -gaussian(sigma)
    kernel[3, 3] += 1
    found = of_one_filter(kernel, cotangents=unit(0, 2)).stages[0]
    assert found.kind == "high-pass"
    # Analytic: 1 - exp(-2 pi² sigma² f²) is the root of one half.
    edge = np.sqrt(-np.log(1 - np.sqrt(0.5)) / 2) / (np.pi * sigma)
    assert edge / 2 <= found.band[0] <= 2 * edge
    assert found.band[1] == pytest.approx(np.sqrt(0.5))


def test_a_delta_is_flat():
    kernel = np.zeros((7, 7))
    kernel[3, 3] = 1
    exact = of_one_filter(kernel, cotangents=unit(0, 2)).stages[0]
    assert exact.decibels[0] == pytest.approx(0, abs=1e-4)
    drawn = of_one_filter(kernel, cotangents=16).stages[0]
    for stage in (exact, drawn):
        assert stage.kind == "flat"
        assert max(abs(value) for value in stage.decibels if value is not None) <= 0.5
    assert exact.band == (0, pytest.approx(np.sqrt(0.5)))


def test_the_built_in_network_is_band_pass():
    # In the trial -7.3, -3.5, 0, -3.8, -14.6 dB; other images within 2.5 dB above 1/16.
    network = ft.Classifier.of(ft.load("builtin"))
    random = np.random.default_rng(2)
    images = random.integers(60, 200, (24, SIZE, SIZE, 3), np.uint8)
    images = np.repeat(images.mean(axis=3, keepdims=True), 3, axis=3).astype(np.uint8)
    found = frequency_response(
        network.model, network.variables, images, network.preprocessing, segments=["stem"]
    )
    stage = found.stages[0]
    assert stage.kind == "band-pass"
    assert stage.decibels[2] == 0
    assert stage.decibels[3] == pytest.approx(-3.8, abs=2.5)
    assert stage.decibels[4] == pytest.approx(-14.6, abs=2.5)
    assert stage.decibels[0] < -3


def test_what_is_printed_and_kept():
    model = ft.resnet(SMALL)
    images = np.random.default_rng(0).integers(0, 255, (3, 32, 48, 3), np.uint8)
    found = frequency_response(
        model,
        model.init(jax.random.key(0)),
        images,
        ft.Preprocessing((0.5,) * 3, (0.25,) * 3, 32, 40),
        random_weights=True,
        shorter_side=100,
    )
    assert [stage.segment for stage in found.stages] == list(MAPS)
    assert [stage.segment for stage in found.random] == list(MAPS)
    assert found.file_scale == pytest.approx(0.4)
    assert found.spectrum.shape == (5, 3, 32, 48)
    # Power is symmetric, and what arrives are fractions.
    np.testing.assert_allclose(found.spectrum[:, :, 3, 5], found.spectrum[:, :, -3, -5], rtol=1e-9)
    assert sum(found.power) == pytest.approx(1)
    for stage in found.stages:
        assert sum(stage.arrives) == pytest.approx(1)
        assert sum(share for _, share in stage.shares) == pytest.approx(1)
        assert max(value for value in stage.decibels if value is not None) == 0
    text = str(found)
    assert max(map(len, text.splitlines())) <= 80
    assert "finer than 0.2 cycles per pixel of the files" in " ".join(text.split())
    loaded = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert loaded["cotangents"] == dict.fromkeys(MAPS, 4)
    assert found.stage("layer2").segment == "layer2"
    with pytest.raises(ValueError, match=r"got 'layer9'; did you mean"):
        found.stage("layer9")


def test_batches_make_no_difference():
    model = ft.resnet(SMALL)
    variables = model.init(jax.random.key(0))
    images = np.random.default_rng(0).normal(size=(5, 32, 32, 3)).astype(np.float32)
    units = unit(0, 2)
    one, other = (
        frequency_response(
            model, variables, images, segments=["stem"], cotangents=units, batch_size=size
        )
        for size in (5, 2)
    )
    np.testing.assert_allclose(one.spectrum, other.spectrum, rtol=1e-5, atol=1e-9)
    assert one.stages[0].errors == pytest.approx(other.stages[0].errors, nan_ok=True)


@pytest.mark.parametrize("bands", [1, 5])
def test_other_bands_and_vectors(bands):
    config = ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=2, classes=3, in_channels=bands)
    model = ft.resnet(config)
    images = np.random.default_rng(0).normal(size=(1, 32, 32, bands)).astype(np.float32)
    found = frequency_response(
        model, model.init(jax.random.key(0)), images, segments=["stem", "pool", "head"]
    )
    assert found.spectrum.shape == (3, bands, 32, 32)
    assert found.stages[0].errors == (None,) * 5
    assert len(found.channels) == bands
    assert "head" in str(found)


@pytest.mark.parametrize("weight", [0.0, np.nan])
def test_weights_that_see_nothing(weight):
    model, variables = linear_stem(np.full((7, 7, 3, 2), weight))
    images = np.zeros((1, 32, 32, 3), np.float32)
    with pytest.raises(ValueError, match="stem must depend on the pixels"):
        frequency_response(model, variables, images, segments=["stem"])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"segments": ["stm"]}, ValueError, "must be of stem, .*got 'stm'; did you mean 'stem'"),
        ({"segments": []}, ValueError, "at least one of"),
        ({"segments": "stem"}, ValueError, r"must be names, such as \('stem',\)"),
        ({"cotangents": 0}, ValueError, "cotangents must be >= 1, got 0"),
        ({"cotangents": {}}, ValueError, "must have an array for stem"),
        (
            {"cotangents": {"stem": np.ones((1, 3))}, "segments": ["stem"]},
            ValueError,
            r"cotangents of stem must be \['number', 8, 8, 2\], got \[1, 3\]",
        ),
        (
            {"cotangents": {"stem": np.zeros((1, 8, 8, 2))}, "segments": ["stem"]},
            ValueError,
            "none of them all zeros",
        ),
        ({"batch_size": 0}, ValueError, "batch_size must be >= 1"),
        ({"shorter_side": 100}, ValueError, "come with a preprocessing"),
        ({"images": np.zeros((1, 32, 32, 3), np.uint8)}, TypeError, "give the preprocessing"),
        ({"images": np.full((1, 32, 32, 3), np.nan)}, ValueError, "must be finite"),
        ({"images": np.zeros((32, 32, 3))}, ValueError, "must be"),
    ],
)
def test_what_cannot_be_measured(options, error, text):
    model = ft.resnet(SMALL)
    options = {"images": np.zeros((1, 32, 32, 3), np.float32), **options}
    with pytest.raises(error, match=text):
        frequency_response(model, model.init(jax.random.key(0)), **options)


@pytest.mark.parametrize(
    ("kernel", "size", "text"),
    [
        (np.ones((3, 3)), (8, 8), "kernel must be finite and"),
        (np.full((3, 3, 1, 1), np.inf), (8, 8), "kernel must be finite and"),
        (np.ones((3, 3, 1, 1)), (2, 8), "at least that of the kernel, 3 x 3, got 2 x 8"),
    ],
)
def test_what_is_no_filter(kernel, size, text):
    with pytest.raises(ValueError, match=text):
        filter_transfer(kernel, size)
