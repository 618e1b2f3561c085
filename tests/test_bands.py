"""Images of n bands through the whole of it: transfer, training, files, folding, the terminal."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import flaxtransfer as ft
from flaxtransfer.cli import run
from flaxtransfer.data.loader import band_patches, band_preprocessing
from flaxtransfer.models import adapters
from flaxtransfer.models.adapters import change_input
from flaxtransfer.models.band_init import (
    RGB_CORRELATION,
    RGB_DEVIATIONS,
    by_wavelength,
    channel_gains,
    common_scale,
    least_squares,
)
from flaxtransfer.paths import flatten
from tests.support.terminal import train

pytestmark = pytest.mark.once

TINY = ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=4, classes=5)
PREPROCESSING = ft.Preprocessing((0.5, 0.4, 0.3), (0.25, 0.2, 0.3), 16, 16)
RANDOM = np.random.default_rng(0)


def checkpoint(seed: int = 0) -> ft.Pretrained:
    variables = ft.resnet(TINY).init(jax.random.key(seed))
    return ft.Pretrained(jax.tree.map(np.asarray, variables), TINY, PREPROCESSING)


def images(bands: int, count: int = 12) -> ft.ArraySource:
    """The first band is bright in the second class."""
    pixels = RANDOM.integers(0, 90, (count, 16, 16, bands))
    labels = np.arange(count) % 2
    pixels[..., 0] += 120 * labels[:, None, None]
    return ft.ArraySource(pixels.astype(np.uint8), labels, ("dark", "bright"))


def logits(model: ft.Model, variables: ft.models.Variables, pixels: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(model.apply)(variables, jnp.asarray(pixels, jnp.float32))[0])


@pytest.mark.parametrize("bands", [1, 2, 4, 13])
@pytest.mark.parametrize("adapter", ["linear", "curves"])
def test_an_adapter_is_new_and_everything_else_is_kept(bands, adapter):
    network = ft.transfer(checkpoint(), classes=2, bands=bands, adapter=adapter)
    model, variables, report = network.model, network.variables, network.report
    assert model.segments[:2] == ("adapter", "stem")
    assert model.config.bands == bands
    new = {"params/adapter/kernel", "params/fc/kernel", "params/fc/bias"}
    assert set(report.new) == new | ({"params/adapter/curves"} if adapter == "curves" else set())
    assert not report.adapted
    old = flatten(checkpoint().variables)
    for path in report.kept:
        np.testing.assert_array_equal(flatten(variables)[path], old[path])
    pixels = RANDOM.normal(size=(2, 16, 16, bands))
    whole = logits(model, variables, pixels)
    first, _ = model.apply(variables, jnp.asarray(pixels, jnp.float32), stop="stem")
    assert first.shape == (2, 16, 16, 3)
    second, _ = model.apply(variables, first, start="stem")
    np.testing.assert_allclose(second, whole, rtol=1e-5, atol=1e-6)


def test_a_gray_adapter_begins_as_replication():
    network = ft.transfer(checkpoint(), classes=2, head="new", zero_head=False)
    plain, variables = network.model, network.variables
    gray = RANDOM.normal(size=(3, 16, 16, 1))
    std = np.array(PREPROCESSING.std)
    wanted = logits(plain, variables, gray * common_scale(std) / std)
    for adapter in ("linear", "curves", "sum"):
        network = ft.transfer(checkpoint(), classes=2, bands=1, adapter=adapter, zero_head=False)
        model, start = network.model, network.variables
        np.testing.assert_allclose(logits(model, start, gray), wanted, rtol=1e-4, atol=1e-5)


def of_std(std, mean=(0.5,) * 3):
    return dataclasses.replace(PREPROCESSING, mean=mean, std=std)


PRESETS = [
    of_std((0.229, 0.224, 0.225), (0.485, 0.456, 0.406)),
    of_std((1 / 255,) * 3, (0.48, 0.46, 0.41)),  # Keras' first ResNets
    of_std((0.269, 0.261, 0.276), (0.481, 0.458, 0.408)),  # CLIP
    of_std((0.5,) * 3),
    of_std((1 / 2048,) * 3),  # torchxrayvision
    of_std((1.0,) * 3, (0.0,) * 3),
]
DEVIATIONS = st.floats(-3.5, 1.0).map(lambda exponent: 10.0**exponent)
RANDOM_PREPROCESSINGS = st.builds(
    of_std, st.tuples(*[DEVIATIONS] * 3), st.tuples(*[st.floats(0, 1)] * 3)
)
# One gray picture in every band, as bright and as contrasty as it happens to be.
GRAY = np.random.default_rng(7).integers(40, 150, (6, 16, 16, 1)).astype(np.uint8)
CENTERS = {1: [560.0], 3: [660.0, 560.0, 490.0], 4: [490.0, 560.0, 665.0, 842.0]}


def entering(preprocessing, bands, start):
    """What enters the stem at the start, and what a stem of ones makes of it, per channel."""
    source = ft.ArraySource(np.repeat(GRAY, bands, axis=-1), np.arange(6) % 2)
    own = band_preprocessing(preprocessing, source, np.arange(6), bands)
    pixels = (source.images / 255 - own.mean) / own.std
    given = {"method": "linear" if start in ("mean", "wavelengths", "patches") else start}
    if start == "wavelengths":
        given["wavelengths"] = CENTERS[bands]
    if start == "patches":
        given["patches"] = pixels.reshape(-1, bands)
    stem = np.zeros((1, 1, 3, 3), np.float32)
    stem[0, 0] = np.eye(3)
    change = change_input(TINY, stem, bands=bands, stem_std=preprocessing.std, **given)
    if change.config.adapter is None:
        return np.einsum("bhwn,nr->bhwr", pixels, change.adapted["params/conv1/kernel"][0, 0])
    params = {path.split("/")[-1]: leaf for path, leaf in change.new.items()}
    # The span of curves is part of the program: each preprocessing would be compiled.
    with jax.disable_jit():
        return np.asarray(adapters.apply(change.config.adapter, params, jnp.asarray(pixels)))


STARTS = [
    *[(n, start) for n in (1, 3, 4) for start in ("mean", "wavelengths", "average")],
    (1, "curves"),
    (1, "sum"),
    (1, "repeat"),
    (6, "repeat"),
    (1, "patches"),
    (3, "patches"),
]


def off_by(preprocessing, bands, start):
    """How far the contrast of each channel is from what it must be, and its mean from 0.

    That is the contrast of replication, and with least squares that of photographs. The bands are
    centered: the adapter has no bias, and one mean cannot serve three channels.
    """
    found = entering(preprocessing, bands, start)
    replicated = (GRAY / 255 - preprocessing.mean) / preprocessing.std
    wanted = replicated.std(axis=(0, 1, 2))
    if start == "patches":
        wanted = np.divide(RGB_DEVIATIONS, preprocessing.std)
    contrast = np.abs(found.std(axis=(0, 1, 2)) / wanted - 1).max()
    center = np.abs(found.mean(axis=(0, 1, 2)) / wanted).max()
    return float(contrast), float(center)


@pytest.mark.parametrize(("bands", "start"), STARTS)
@given(preprocessing=st.sampled_from(PRESETS) | RANDOM_PREPROCESSINGS)
@settings(deadline=None, max_examples=25)
def test_what_enters_the_stem_has_the_contrast_of_replication(bands, start, preprocessing):
    assert max(off_by(preprocessing, bands, start)) <= 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("bands", "start"), STARTS)
def test_so_it_has_under_a_thousand_preprocessings(bands, start, record_property):
    rng = np.random.default_rng(bands)
    drawn = [
        of_std(tuple(10.0 ** rng.uniform(-3.5, 1, 3)), tuple(rng.uniform(0, 1, 3)))
        for _ in range(1000 - len(PRESETS))
    ]
    worst = max(max(off_by(preprocessing, bands, start)) for preprocessing in (*PRESETS, *drawn))
    record_property("worst", worst)
    assert worst <= 1e-3


def test_bands_of_any_range_are_equally_loud():
    pixels = RANDOM.integers(0, 200, (4, 16, 16, 3)) // [1, 10, 50]
    source = ft.ArraySource(pixels.astype(np.uint8), [0, 1, 0, 1])
    own = band_preprocessing(PRESETS[1], source, np.arange(4), 3)
    deviations = ((source.images / 255 - own.mean) / own.std).std(axis=(0, 1, 2))
    contrast = np.sqrt(np.square(source.images.std(axis=(0, 1, 2))).mean())
    np.testing.assert_allclose(deviations, contrast, rtol=1e-6)


@pytest.mark.parametrize(
    ("std", "span"),
    [((0.229, 0.224, 0.225), (-2.2, 2.7)), ((1 / 255,) * 3, (-126.78, 155.594))],
)
def test_tone_curves_span_the_pixels_of_photographs(std, span):
    change = change_input(TINY, np.ones((7, 7, 3, 4)), bands=1, method="curves", stem_std=std)
    np.testing.assert_allclose(change.config.adapter.span, span, rtol=1e-4)


@pytest.mark.parametrize("way", ["average", "repeat"])
def test_another_stem_is_adapted(way):
    network = ft.transfer(checkpoint(), classes=2, bands=6, adapter=way)
    model, variables, report = network.model, network.variables, network.report
    assert report.adapted == ("params/conv1/kernel",)
    assert model.segments[0] == "stem"
    assert variables["params"]["conv1"]["kernel"].shape == (7, 7, 6, 4)


def test_where_an_adapter_starts():
    centers = [443, 490, 560, 665, 842]
    network = ft.transfer(checkpoint(), classes=2, bands=5, wavelengths=centers)
    variables = network.variables
    kernel = variables["params"]["adapter"]["kernel"]
    gains = channel_gains(PREPROCESSING.std)
    np.testing.assert_allclose(kernel, by_wavelength(centers) * gains, rtol=1e-6)
    patches = RANDOM.normal(size=(80, 5))
    patches -= patches.mean(axis=0)
    network = ft.transfer(checkpoint(), classes=2, bands=5, patches=patches)
    variables = network.variables
    kernel = variables["params"]["adapter"]["kernel"]
    photographs = np.divide(RGB_DEVIATIONS, PREPROCESSING.std)
    wanted = least_squares(patches, RGB_CORRELATION * np.outer(photographs, photographs))
    np.testing.assert_allclose(kernel, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"bands": 0}, "an integer >= 1, got 0"),
        ({"bands": 2, "adapter": "liner"}, "unknown adapter 'liner'; did you mean 'linear'"),
        ({"bands": 4, "adapter": "sum"}, "'sum' requires one gray band, got 4"),
        ({"bands": 4, "wavelengths": [490, 560]}, "one value per band, got 2 for 4 bands"),
        ({"bands": 4, "adapter": "repeat", "wavelengths": [400] * 4}, "does not use wavelengths"),
        ({"bands": 4, "adapter": ft.models.Adapter(5)}, "takes 5 bands, but the images have 4"),
        ({"wavelengths": [490.0]}, "require bands"),
        ({"bands": 4, "patches": np.zeros((99, 3))}, "patches must have 4 bands, got 3"),
    ],
)
def test_what_does_not_fit(settings, text):
    with pytest.raises(ValueError, match=text):
        ft.transfer(checkpoint(), classes=2, **settings)


def test_images_of_other_bands_are_refused():
    network = ft.transfer(checkpoint(), classes=2, bands=4)
    model, variables = network.model, network.variables
    with pytest.raises(ValueError, match=r"adapter takes images .* with 4 channels"):
        logits(model, variables, np.zeros((1, 16, 16, 3)))


def test_statistics_of_bands_are_numpys():
    source = images(4)
    found = band_preprocessing(PREPROCESSING, source, np.arange(12), 4)
    pixels = source.images / 255
    np.testing.assert_allclose(found.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-6)
    std = pixels.std(axis=(0, 1, 2))
    scale = common_scale(PREPROCESSING.std) / np.sqrt(np.square(std).mean())
    np.testing.assert_allclose(found.std, std * scale, rtol=1e-6)
    patches = band_patches(found, source, np.arange(12))
    assert patches.shape == (12 * 16, 4)
    np.testing.assert_allclose(patches.mean(axis=0), 0, atol=1e-6)


@pytest.mark.parametrize(("bands", "adapter"), [(1, "curves"), (4, "linear")])
def test_adapter_and_head_learn_while_the_stem_is_frozen(tmp_path, bands, adapter):
    source = images(bands)
    start = checkpoint()
    preprocessing = band_preprocessing(start.preprocessing, source, np.arange(8), bands)
    network = ft.transfer(start, classes=2, bands=bands, adapter=adapter)
    model, variables = network.model, network.variables
    feed = ft.loaders(
        source, ft.data.Splits.of(np.arange(8), np.arange(8, 12)), preprocessing, batch_size=4
    )
    plan = ft.recipes.feature_extraction(variables["params"], steps=3)
    fitted = ft.fit(
        ft.Classifier(model, variables, feed.preprocessing),
        plan,
        feed,
        tmp_path,
        cache=ft.Cache("memory"),
    )
    before, after = flatten(variables), flatten(fitted.variables)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    # A new head is zero: nothing below it moves in the first step, and the adapter in the next.
    assert "params/adapter/kernel" in moved
    assert {path.split("/")[1] for path in moved} == {"adapter", "fc"}
    again = ft.load(tmp_path / "model.safetensors")
    assert again.config == model.config
    assert again.preprocessing == preprocessing
    for path, leaf in flatten(again.variables).items():
        np.testing.assert_array_equal(leaf, after[path])


def test_folding_is_the_same_function(tmp_path):
    network = ft.transfer(
        checkpoint(), classes=2, bands=6, wavelengths=range(450, 690, 40), zero_head=False
    )
    model, variables = network.model, network.variables
    six = dataclasses.replace(PREPROCESSING, mean=(0.5,) * 6, std=(0.25,) * 6)
    whole = ft.Pretrained(jax.tree.map(np.asarray, variables), model.config, six)
    folded = ft.weights.fold_adapter(whole)
    assert folded.config.adapter is None
    assert folded.config.in_channels == 6
    pixels = RANDOM.normal(size=(2, 17, 17, 6))
    np.testing.assert_allclose(
        logits(ft.resnet(folded.config), folded.variables, pixels),
        logits(model, variables, pixels),
        rtol=1e-4,
        atol=1e-5,
    )
    ft.save(tmp_path / "folded.safetensors", folded)
    assert ft.load(tmp_path / "folded.safetensors").config == folded.config
    network = ft.transfer(checkpoint(), classes=2, bands=6, adapter="curves")
    curved, values = network.model, network.variables
    with pytest.raises(ValueError, match="curves"):
        ft.weights.fold_adapter(ft.Pretrained(values, curved.config, six))


def test_a_span_of_ones_own_comes_back(tmp_path):
    own = ft.models.Adapter(1, "curves", knots=5, span=(-1.0, 4.0))
    network = ft.transfer(checkpoint(), classes=2, bands=1, adapter=own)
    model, variables = network.model, network.variables
    one = dataclasses.replace(PREPROCESSING, mean=(0.5,), std=(0.25,))
    saved = ft.Pretrained(jax.tree.map(np.asarray, variables), model.config, one)
    ft.save(tmp_path / "own.safetensors", saved)
    assert ft.load(tmp_path / "own.safetensors").config.adapter == own


def test_four_bands_from_a_folder_in_the_terminal(tmp_path, capsys):
    for label, name in enumerate(("dark", "bright")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(6):
            pixels = images(4).images[label]
            Image.fromarray(pixels, "RGBA").save(tmp_path / f"images/{name}/{number}.png")
    ft.save(tmp_path / "tiny.safetensors", checkpoint())
    few = ("--bands", 4, "--strategy", "feature_extraction", "--steps", 2, "--batch-size", 4)
    files = (tmp_path / "images", tmp_path / "tiny.safetensors", tmp_path / "run")
    assert run(train(*files, *few)) == 0
    assert "4 bands by a linear adapter" in capsys.readouterr().out
    assert run(["evaluate", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] > 0
    assert run(["predict", str(tmp_path / "run"), str(tmp_path / "images/dark/0.png")]) == 0
    capsys.readouterr()
    picture = tmp_path / "stem.png"
    assert run(["stem", str(tmp_path / "run"), "--out", str(picture)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "survives replication" in shown
    assert "survives an adapter of 4 bands" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    rgb = tmp_path / "rgb.png"
    Image.fromarray(images(3).images[0]).save(rgb)
    capsys.readouterr()
    assert run(["predict", str(tmp_path / "run"), str(rgb)]) != 0
    assert re.search(r"4 bands were asked for and the file holds 3", capsys.readouterr().err)
    assert run(["train", "--adapter", "linear"]) == 2
    assert "belong to --bands" in capsys.readouterr().err
