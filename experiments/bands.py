"""Gray and 13-band images before a frozen RGB network: what each input adapter is worth.

    python experiments/bands.py            # about six minutes on 2 CPU cores

Two targets are drawn. "13 bands": a patch whose spectrum differs from that of its surroundings, the
mean over the bands equal everywhere: the class lies in contrast between bands alone. "gray": a disc
whose gray value lies in one of two pairs of windows that interlock, on a surrounding of all gray
values, so that no single threshold tells the classes apart. On both the network is frozen but for
the head and, where there is one, the adapter; all ways get the same images, steps and rates, none
of which were tuned.

Of the stem two numbers are printed for what was learned: the share of its energy that survives, and
the mean share of those filters that are opponent, which is to say silent on replicated gray. Tone
curves are measured by what they make of gray values spread evenly.

Two networks: the built-in one, whose stem has no opponent filter, and one that is pre-trained here
on colored shapes behind a stem that was written down: half of its filters compare brightness, half
compare colors of equal brightness, which replicated gray leaves silent.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import tyro

import flaxtransfer as ft
from flaxtransfer.analysis import StemReport, stem_report
from flaxtransfer.data import band_patches, band_preprocessing, evaluation_transform
from flaxtransfer.models import adapters

SENTINEL_NM = (443, 490, 560, 665, 705, 740, 783, 842, 865, 945, 1375, 1610, 2190)
"""Centers of Sentinel-2's bands (M. Drusch et al., 2012)."""

WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "gray": {
        "replicate": {"adapter": "replicate"},
        "linear": {"adapter": "linear"},
        "curves": {"adapter": "curves"},
    },
    "13 bands": {
        "average": {"adapter": "average"},
        "repeat (timm)": {"adapter": "repeat"},
        "linear from the mean": {"adapter": "linear"},
        "linear from wavelengths": {"adapter": "linear", "wavelengths": SENTINEL_NM},
        "linear from patches": {"adapter": "linear", "patches": True},
        "curves from patches": {"adapter": "curves", "patches": True},
    },
}


@dataclass(frozen=True)
class Bands:
    """How much to draw and to train.

    Args:
      train: images a target, all classes together.
      test: likewise.
      size: of the images, in px.
      steps: optimizer steps of adapter and head.
      learning_rate: peak rate of both.
      pretraining: optimizer steps of the network with a stem that was written down.
      seeds: draws of images.
    """

    train: int = 256
    test: int = 512
    size: int = 32
    steps: int = 100
    learning_rate: float = 1e-2
    pretraining: int = 300
    seeds: tuple[int, ...] = (0, 1, 2)


def blobs(random: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Soft discs at random places, in 0..1, [count, size, size]."""
    y, x = np.mgrid[:size, :size] / size
    center = random.uniform(0.3, 0.7, (2, count, 1, 1))
    radius = random.uniform(0.15, 0.3, (count, 1, 1))
    distance = np.sqrt((y - center[0]) ** 2 + (x - center[1]) ** 2)
    return 1 / (1 + np.exp((distance - radius) * size))


def many_bands(random: np.random.Generator, count: int, size: int) -> ft.ArraySource:
    """Four classes of spectra, all of mean 0 over the bands, on a texture common to all bands."""
    labels = np.arange(count) % 4
    spectra = np.random.default_rng(7).normal(size=(4, 13))
    spectra -= spectra.mean(axis=1, keepdims=True)
    spectra *= 18 / spectra.std(axis=1, keepdims=True)
    texture = random.normal(scale=40, size=(count, size // 4, size // 4))
    texture = np.kron(texture, np.ones((4, 4)))[..., None]
    noise = random.normal(scale=20, size=(count, size, size, 13))
    patch = blobs(random, count, size)[..., None] * spectra[labels][:, None, None]
    pixels = np.clip(128 + texture + noise + patch, 0, 255)
    return ft.ArraySource(pixels.astype(np.uint8), labels, ("a", "b", "c", "d"))


def gray(random: np.random.Generator, count: int, size: int) -> ft.ArraySource:
    """A disc at 50 or 170 against one at 110 or 230, each give or take 15, on all gray values."""
    labels = np.arange(count) % 2
    tone = np.array([[50, 170], [110, 230]])[labels, random.integers(0, 2, count)]
    tone = tone + random.uniform(-15, 15, count)
    around = np.kron(random.uniform(0, 255, (count, size // 4, size // 4)), np.ones((4, 4)))
    disc = blobs(random, count, size) > 0.5
    pixels = np.where(disc, tone[:, None, None], around) + random.normal(scale=4, size=disc.shape)
    return ft.ArraySource(np.clip(pixels, 0, 255).astype(np.uint8), labels, ("even", "odd"))


TARGETS = {"gray": (gray, 1), "13 bands": (many_bands, 13)}


def colored_shapes(random: np.random.Generator, count: int, size: int) -> ft.ArraySource:
    """Discs, bars and rings in six hues of one brightness: 18 classes."""
    labels = np.arange(count) % 18
    hue = np.linspace(0, 2 * np.pi, 6, endpoint=False)[labels % 6]
    axes = np.array([[1, -1, 0], [1, 1, -2]]) / np.sqrt([[2], [6]])
    color = np.stack([np.cos(hue), np.sin(hue)], -1) @ axes
    y, x = np.mgrid[:size, :size] / size - 0.5
    shape = np.stack([np.hypot(x, y) < 0.3, np.abs(x) < 0.12, np.abs(np.hypot(x, y) - 0.3) < 0.08])[
        labels // 6
    ]
    shift = random.integers(-5, 6, (count, 2))
    moved = np.stack([np.roll(s, tuple(d), (0, 1)) for s, d in zip(shape, shift, strict=True)])
    strength = random.uniform(40, 90, (count, 1, 1, 1))
    base = random.uniform(70, 180, (count, 1, 1, 1))
    bright = random.uniform(-60, 60, (count, 1, 1, 1)) * moved[..., None]
    pixels = base + bright + strength * moved[..., None] * color[:, None, None]
    pixels = pixels + random.normal(scale=10, size=pixels.shape)
    return ft.ArraySource(np.clip(pixels, 0, 255).astype(np.uint8), labels)


def written_stem() -> np.ndarray:
    """32 Gabor filters, [7, 7, 3, 32]: 16 of brightness, 8 red-green and 8 blue-yellow."""
    y, x = np.mgrid[-3:4, -3:4]
    window = np.exp(-(x**2 + y**2) / 8)
    waves = []
    for angle in np.arange(4) * np.pi / 4:
        along = np.cos(angle) * x + np.sin(angle) * y
        waves += [window * np.cos(k * along + phase) for k in (0.0, 0.9) for phase in (0, 1.57)]
    # A wave of length infinity has no second phase: there a plain blob stands in for it.
    waves = [wave if np.abs(wave).sum() > 0.1 else window for wave in waves]
    opponents = np.array([[1.0, -1.0, 0.0], [-0.5, -0.5, 1.0]])
    colors = [np.ones(3)] * 16 + [opponents[0]] * 8 + [opponents[1]] * 8
    filters = [
        wave[..., None] * color / np.linalg.norm(wave) / np.linalg.norm(color)
        for wave, color in zip((waves * 2)[:32], colors, strict=True)
    ]
    return 0.3 * np.stack(filters, axis=-1).astype(np.float32)


def pretrained_on_color(config: Bands) -> ft.Pretrained:
    """A small network behind the written stem, which stays as it was written."""
    model = ft.resnet(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=32, classes=18))
    variables = model.init(jax.random.key(0))
    variables["params"]["conv1"]["kernel"] = jax.numpy.asarray(written_stem())
    preprocessing = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, config.size, config.size)
    source = colored_shapes(np.random.default_rng(1), 2160, config.size)
    feed = ft.loaders(
        source,
        ft.data.Splits.of(np.arange(1800), np.arange(1800, 2160)),
        preprocessing,
        batch_size=32,
    )
    adamw = (
        ft.recipes.from_scratch(variables["params"], steps=config.pretraining)
        .phases[0]
        .groups["all"]
    )
    rules = {"stem": ft.glob("conv1/**"), "rest": ft.rest()}
    phase = ft.Phase(rules, {"stem": ft.FROZEN, "rest": adamw}, config.pretraining, clip=1.0)
    with tempfile.TemporaryDirectory() as folder:
        options = ft.FitOptions(evaluate_every=config.pretraining)
        fitted = ft.fit(
            ft.Classifier(model, variables, feed.preprocessing),
            ft.Plan([phase]),
            feed,
            folder,
            options=options,
        )
    assert fitted.validation is not None
    print(f"pre-training on color: {100 * fitted.validation.accuracy:.1f} % of 18 classes\n")
    arrays = jax.tree.map(np.asarray, fitted.variables)
    return ft.Pretrained(arrays, model.config, preprocessing, source="colored shapes")


def adapt(
    config: Bands, checkpoint: ft.Pretrained, target: str, way: dict[str, Any], seed: int
) -> tuple[float, StemReport]:
    """Test accuracy, and what of the stem survives what was learned."""
    draw, bands = TARGETS[target]
    random = np.random.default_rng([seed, bands])
    source = draw(random, config.train + config.test, config.size)
    train = np.arange(config.train)
    own = replace(checkpoint.preprocessing, size=config.size, resize=config.size)
    settings: dict[str, Any] = {"bands": bands, **way}
    preprocessing = own
    if way["adapter"] != "replicate":
        preprocessing = band_preprocessing(own, source, train, bands)
    if settings.get("patches"):
        settings["patches"] = band_patches(preprocessing, source, train)
    network = ft.transfer(checkpoint, classes=len(source.class_names), **settings)
    model, variables = network.model, network.variables
    plain = evaluation_transform(preprocessing, channels=len(preprocessing.mean))
    none = np.arange(0)
    feed = ft.loaders(
        source,
        ft.data.Splits.of(train, none),
        preprocessing,
        batch_size=32,
        transform=plain,
        seed=seed,
    )
    plan = ft.recipes.feature_extraction(
        variables["params"], steps=config.steps, learning_rate=config.learning_rate
    )
    with tempfile.TemporaryDirectory() as folder:
        fitted = ft.fit(
            ft.Classifier(model, variables, feed.preprocessing),
            plan,
            feed,
            folder,
            seed=seed,
            cache=ft.Cache("memory"),
            options=ft.FitOptions(evaluate_every=config.steps),
        )
    test = np.arange(config.train, config.train + config.test)
    result = ft.evaluate(
        ft.Classifier(model, fitted.variables, preprocessing),
        ft.eval_batches(source, test, preprocessing),
    )
    stem = checkpoint.variables["params"]["conv1"]["kernel"]
    learned = fitted.variables["params"].get("adapter")
    if learned is not None and model.config.adapter is not None:
        return result.accuracy, stem_report(stem, tones(model.config.adapter, learned))
    channel = np.eye(3)[np.arange(bands) % 3] if way["adapter"] == "repeat" else np.ones((bands, 3))
    return result.accuracy, stem_report(stem, channel[None, None])


def tones(adapter: ft.models.Adapter, params: ft.models.Params) -> np.ndarray:
    """What each band alone makes of 64 gray values, without its mean: ``[1, 1, bands * 64, 3]``.

    Bands that are independent add up in a filter, and so do gray values that are equally frequent:
    of a linear adapter it is the kernel, 64 times over, in other units.
    """
    values = np.linspace(-2, 2, 64, dtype=np.float32)
    pixels = np.einsum("v,bc->bvc", values, np.eye(adapter.bands, dtype=np.float32))
    made = np.asarray(adapters.apply(adapter, params, jax.numpy.asarray(pixels[:, :, None])))
    made = made[:, :, 0] - made[:, :, 0].mean(axis=1, keepdims=True)
    return made.reshape(1, 1, -1, 3)


def main(config: Bands) -> None:
    networks = {"built-in": ft.load("builtin"), "color": pretrained_on_color(config)}
    for name, checkpoint in networks.items():
        report = stem_report(checkpoint.variables["params"]["conv1"]["kernel"])
        print(f"{name}: {report.summary()}")
    print("\n| network | target | way | accuracy | energy that survives | of opponent filters |")
    print("|---|---|---|---|---|---|")
    for name, checkpoint in networks.items():
        opponent = stem_report(checkpoint.variables["params"]["conv1"]["kernel"]).opponent
        for target, ways in WAYS.items():
            for label, way in ways.items():
                found = [adapt(config, checkpoint, target, way, seed) for seed in config.seeds]
                accuracy = 100 * np.array([right for right, _ in found])
                spread = accuracy.std(ddof=1) if len(accuracy) > 1 else 0.0
                energy = np.mean([report.surviving or 0.0 for _, report in found])
                awake = [report.shares[i] for _, report in found for i in opponent]
                woken = f"{100 * np.mean(awake):.1f} %" if awake else "none there"
                print(
                    f"| {name} | {target} | {label} | {accuracy.mean():.1f} ± {spread:.1f} | "
                    f"{100 * energy:.0f} % | {woken} |",
                    flush=True,
                )


if __name__ == "__main__":
    main(tyro.cli(Bands))
