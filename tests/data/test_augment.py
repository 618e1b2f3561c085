"""Augmentation policies: their operations in closed form, their draws, and what they leave alone.

Agreement with torchvision is in tests/parity/test_augment.py.
"""

import numpy as np
import pytest

from flaxtransfer.data import (
    ArraySource,
    RandAugment,
    RandomErasing,
    TrivialAugment,
    train_batches,
    training_transform,
)
from flaxtransfer.data.augment import BANDS, LEVELS, OPERATIONS, RGB, apply_operation
from flaxtransfer.data.transforms import is_random
from flaxtransfer.weights import Preprocessing

SMALL = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
ALL = sorted(OPERATIONS)


def one(name, magnitude, image=SMALL, rgb=False, **more):
    return apply_operation(image, name, magnitude, rgb=rgb, **more)


def near(found, wanted):
    np.testing.assert_allclose(found.astype(int), wanted, atol=1)


def test_operations_are_what_they_are_called():
    """In closed form, to one level; bands each by itself."""
    image = SMALL.astype(float)
    near(one("brightness", -0.5), np.clip(0.5 * image, 0, 255))
    means = image.mean((0, 1))
    near(one("contrast", 0.5), np.clip(means + 1.5 * (image - means), 0, 255))
    near(one("gamma", 1.0), 255 * (image / 255) ** 2)
    near(one("posterize", 4), SMALL & 0b11110000)
    near(one("solarize", 128), np.where(SMALL >= 128, 255 - image, image))
    shifted = np.pad(image, ((0, 0), (3, 0), (0, 0)))[:, :9]
    near(one("translate_x", 3 / 9 + 1e-6, interpolation="nearest"), shifted)
    turned = np.rot90(SMALL[:9], 1)
    near(one("rotate", 90, SMALL[:9], interpolation="nearest"), turned)
    luma = image @ (0.299, 0.587, 0.114)
    near(one("color", -1.0, rgb=True), np.stack([luma] * 3, axis=-1))
    ramp = np.repeat(np.linspace(50, 150, 11).astype(np.uint8), 5).reshape(11, 5, 1)
    near(one("autocontrast", 0, ramp), np.rint((ramp.astype(float) - 50) * 255 / 100))


@pytest.mark.parametrize("name", ALL)
def test_strength_zero_changes_nothing_or_has_no_strength(name):
    found = one(name, OPERATIONS[name].magnitude(0, narrow=False))
    if name in ("autocontrast", "equalize"):
        assert OPERATIONS[name].wide == (0.0, 0.0)
    elif name == "solarize":  # The last level is inverted: 255 becomes 0.
        np.testing.assert_array_equal(found[SMALL < 255], SMALL[SMALL < 255])
    else:
        np.testing.assert_array_equal(found, SMALL)


@pytest.mark.parametrize("name", BANDS)
def test_operations_for_bands_do_not_mix_them(name):
    """A band's result is what it is alone, whatever the other bands are."""
    level = OPERATIONS[name].magnitude(LEVELS - 1, narrow=False)
    bands = np.concatenate([SMALL, 255 - SMALL], axis=-1)

    def of(image):
        return one(name, level, image, rng=np.random.default_rng(3))

    np.testing.assert_array_equal(of(bands)[..., :1], of(bands[..., :1]))
    if name != "identity":
        assert (of(bands) != bands).any()


def test_bands_keep_their_meaning():
    assert not {"color", "equalize", "posterize", "solarize", "autocontrast"} & set(BANDS)
    assert len(RGB) == 14  # as many as torchvision has
    assert set(RGB) | set(BANDS) == set(OPERATIONS)


@pytest.mark.parametrize(
    ("image", "rgb", "names"),
    [(SMALL, True, RGB), (SMALL, False, BANDS), (SMALL[..., :1], True, BANDS)],
)
def test_every_operation_is_drawn_as_often(image, rgb, names, monkeypatch):
    drawn = []

    def record(image, name, magnitude, **how):
        drawn.append((name, magnitude))
        return image

    monkeypatch.setattr("flaxtransfer.data.augment.apply_operation", record)
    generator = np.random.default_rng(0)
    for _ in range(4000):
        TrivialAugment(rgb=rgb)(image, generator)
    counts = {name: sum(name == each for each, _ in drawn) for name in names}
    assert sum(counts.values()) == 4000
    expected = 4000 / len(names)
    assert max(abs(count - expected) for count in counts.values()) < 5 * expected**0.5
    turns = {round(value / 4.5) for name, value in drawn if name == "rotate"}
    assert turns <= set(range(-30, 31))
    assert len(turns) > 50  # of 31 strengths of both signs; some 290 draws
    drawn.clear()
    RandAugment(count=3, strength=15)(image, generator)
    assert len(drawn) == 3
    spans = {name: OPERATIONS[name].narrow for name, _ in drawn}
    assert all(abs(value) == sum(spans[name]) / 2 for name, value in drawn)


def test_erasing_replaces_one_rectangle_of_the_stated_size():
    image = np.zeros((60, 80, 2), np.uint8)
    step, generator = RandomErasing(1.0, scale=(0.1, 0.2), ratio=(0.5, 2.0)), np.random.default_rng
    for seed in range(50):
        top, left, height, width = step.box(60, 80, generator(seed))
        assert 0.1 * 4800 - 80 <= height * width <= 0.2 * 4800 + 80  # rounded sides
        assert 0.45 <= height / width <= 2.2
        assert 0 <= top <= 60 - height
        assert 0 <= left <= 80 - width
        erased = step(image, generator(seed)).any(-1)
        rows, columns = np.flatnonzero(erased.any(1)), np.flatnonzero(erased.any(0))
        assert len(rows) <= 60
        inside = erased[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert inside.mean() > 0.98  # 1 pixel of 65,536 is black by chance
        assert erased.sum() == inside.sum()
    assert not image.any()
    changed = sum(RandomErasing(0.25)(image, generator(n)) is not image for n in range(1000))
    assert abs(changed - 250) < 5 * 13.7  # five standard deviations


def test_the_recipes_take_policies_for_every_number_of_bands():
    weights = Preprocessing((0.5,), (0.25,), size=24, resize=28, interpolation="bicubic")
    for policy in ("trivial", "randaugment"):
        for channels in (1, 3, 5):
            transform = training_transform(
                weights, geometry="none", policy=policy, erasing=0.5, channels=channels
            )
            image = np.full((30, 40, channels), 99, np.uint8)
            assert is_random(transform)
            results = [transform(image, np.random.default_rng(n)) for n in (0, 0, 1, 2, 3)]
            assert results[0].shape == (24, 24, channels)
            np.testing.assert_array_equal(results[0], results[1])
            assert any((results[0] != other).any() for other in results[2:])


def test_batches_with_a_policy_depend_on_seed_and_step_alone():
    weights = Preprocessing((0.5,), (0.25,), size=8, resize=8)
    transform = training_transform(weights, policy="trivial", erasing=0.5)
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8)
    source = ArraySource(images, [0] * 10)

    def batch(start, threads, shard=(0, 1)):
        batches = train_batches(
            source,
            range(10),
            batch_size=4,
            transform=transform,
            seed=5,
            start_step=start,
            num_threads=threads,
            shard=shard,
        )
        images = [next(batches)["image"] for _ in range(3 - start)][-1]
        batches.close()
        return images

    np.testing.assert_array_equal(batch(0, 2), batch(2, 0))
    halves = np.concatenate([batch(2, 0, (0, 2)), batch(2, 0, (1, 2))])
    np.testing.assert_array_equal(halves, batch(2, 0))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: RandAugment(0, 31, fill=256, interpolation="box"),
            "RandAugment: count must be >= 1, got 0; strength must be 0 to 30, got 31; fill must "
            "be 0 to 255, got 256; interpolation must be nearest or bilinear or bicubic, got 'box",
        ),
        (lambda: TrivialAugment(fill=-1), "TrivialAugment: fill must be 0 to 255, got -1"),
        (
            lambda: RandomErasing(1.5, (0, 0.1), (2, 1)),
            r"probability must be 0 to 1, got 1\.5; scale must be .*; ratio must be",
        ),
        (
            lambda: training_transform(Preprocessing((0.5,), (0.2,), 8, 8), policy="trivail"),
            "policy must be one of none, trivial, randaugment, got 'trivail'; did you mean 'triv",
        ),
    ],
)
def test_wrong_settings_are_refused_when_they_are_made(make, text):
    with pytest.raises(ValueError, match=text):
        make()
