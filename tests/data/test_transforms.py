"""Steps and recipes: what each does, that it obeys its generator, and how fast it is."""

import pickle
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxtransfer.data import (
    Channels,
    Compose,
    HorizontalFlip,
    Jitter,
    RandomAffine,
    RandomResizedCrop,
    ResizeCrop,
    evaluation_transform,
    flip_keeps_labels,
    training_transform,
)
from flaxtransfer.data.geometry import affine, resize_crop
from flaxtransfer.data.transforms import is_random
from flaxtransfer.weights import Preprocessing

PREPROCESSING = Preprocessing((0.5,), (0.25,), size=48, resize=48, interpolation="bilinear")
GRAY = np.random.default_rng(0).integers(0, 256, (8, 8, 1), dtype=np.uint8)
PHOTO = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
RANDOM = [
    RandomAffine(16, 20, shear=5.0),
    RandomResizedCrop(16),
    HorizontalFlip(),
    Jitter(),
]


def rng(seed=0):
    return np.random.default_rng(seed)


class FixedDraws:
    """A generator whose every number is the same share of its range."""

    def __init__(self, value):
        self.value = value

    def random(self, count=None):
        return self.value if count is None else np.full(count, self.value)

    def uniform(self, low, high):
        return low + (high - low) * self.value

    def integers(self, high):
        return int(high * self.value)


@pytest.mark.parametrize("step", RANDOM, ids=lambda step: type(step).__name__)
def test_random_steps_depend_on_the_generator_alone(step):
    draws = [step(PHOTO, rng(seed)) for seed in (0, 0, 1, 2, 3, 4, 5)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert any((draws[0] != other).any() for other in draws[2:])
    assert is_random(step)
    assert is_random(Compose((Channels(), step)))
    assert draws[0].dtype == np.uint8
    assert hash(step) == hash(pickle.loads(pickle.dumps(step)))


def test_deterministic_steps_draw_nothing():
    step = evaluation_transform(PREPROCESSING)
    assert not is_random(step)
    np.testing.assert_array_equal(step(GRAY, None), step(GRAY, rng(3)))


def test_a_plain_function_is_a_transform_and_not_called_random():
    assert not is_random(lambda image, rng: image)


def test_the_affine_step_covers_its_ranges():
    step = RandomAffine(16, 20, degrees=30, shift=0.25, scale=(0.5, 2.0), shear=10, fill=9)
    for draw, degrees, shift, scale, shear in [
        (0.0, -30, -4, 0.5, -10),
        (0.5, 0, 0, 1.25, 0),
        (1.0, 30, 4, 2.0, 10),
    ]:
        wanted = affine(
            PHOTO,
            size=16,
            resize=20,
            degrees=degrees,
            shift=(shift, shift),
            scale=scale,
            shear=shear,
            fill=9,
        )
        np.testing.assert_array_equal(step(PHOTO, FixedDraws(draw)), wanted)


@given(st.integers(1, 80), st.integers(1, 80), st.integers(0, 2**32))
def test_random_crops_lie_inside_and_keep_their_shares(height, width, seed):
    step = RandomResizedCrop(8, scale=(0.2, 0.8))
    left, top, right, bottom = step._box(height, width, rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if height >= 20 and 3 / 4 <= width / height <= 4 / 3:
        assert 0.15 < (right - left) * (bottom - top) / (height * width) < 0.85
        assert 0.7 < (right - left) / (bottom - top) < 1.42


def test_a_very_long_image_is_cropped_in_the_middle():
    # No box of 3/4 .. 4/3 with the full area exists; the nearest ratio is 4/3 of the height.
    assert RandomResizedCrop(8, scale=(1.0, 1.0))._box(30, 300, rng()) == (130, 0, 170, 30)
    assert RandomResizedCrop(8, scale=(1.0, 1.0))._box(300, 30, rng()) == (0, 130, 30, 170)


def test_flips_mirror_left_and_right_half_of_the_time():
    for image in (GRAY, PHOTO, PHOTO[::2, 1:], np.broadcast_to(GRAY, (8, 8, 3))):
        assert (HorizontalFlip(1.0)(image, rng()) == image[:, ::-1]).all()
        assert (HorizontalFlip(0.0)(image, rng()) == image).all()
    generator = rng()
    count = sum((HorizontalFlip()(GRAY, generator) != GRAY).any() for _ in range(1000))
    assert abs(count - 500) < 5 * 15.8  # five standard deviations


@pytest.mark.parametrize(
    ("draw", "bright", "contrast"), [(0.0, 0.5, 0.75), (0.5, 1.0, 1.0), (1.0, 1.5, 1.25)]
)
def test_jitter_is_brightness_times_contrast_about_the_mean_luma(draw, bright, contrast):
    # Analytic, in floats; luma of ITU-R 601-2.
    found = Jitter(0.5, 0.25)(PHOTO, FixedDraws(draw))
    mean = (PHOTO * (0.299, 0.587, 0.114)).sum(axis=2).mean()
    wanted = np.clip(bright * (mean + contrast * (PHOTO - mean)), 0, 255)
    np.testing.assert_allclose(found, wanted, atol=0.5001)


def test_gray_is_replicated_and_nothing_else():
    found = Channels(3)(GRAY, None)
    assert found.shape == (8, 8, 3)
    assert (found == GRAY).all()
    assert Channels(3)(PHOTO, None) is PHOTO
    assert Channels(1)(GRAY, None) is GRAY
    with pytest.raises(ValueError, match=r"must have 3 channels, got 13 .* bands=13"):
        Channels(3)(np.zeros((2, 2, 13), np.uint8), None)
    with pytest.raises(ValueError, match=r"must have 13 channels, got 1 .*only gray"):
        Channels(13)(GRAY, None)


def test_the_recipes_end_in_the_networks_size_and_channels():
    weights = Preprocessing((0.5,), (0.25,), size=24, resize=28, interpolation="bicubic")
    for image in (GRAY, PHOTO):
        plain = evaluation_transform(weights)(image, rng())
        np.testing.assert_array_equal(
            plain, np.broadcast_to(resize_crop(image, 24, 28, "bicubic"), (24, 24, 3))
        )
        for geometry in ("affine", "crop", "none"):
            transform = training_transform(weights, geometry=geometry, flip=True, jitter=True)
            assert transform(image, rng()).shape == (24, 24, 3)
    assert evaluation_transform(weights, channels=1)(GRAY, rng()).shape == (24, 24, 1)


def test_mirroring_is_off_unless_it_is_asked_for():
    assert HorizontalFlip() not in training_transform(PREPROCESSING).steps
    assert HorizontalFlip() in training_transform(PREPROCESSING, flip=True).steps
    assert not is_random(training_transform(PREPROCESSING, geometry="none"))


@pytest.mark.parametrize(
    ("names", "keeps"),
    [
        (["0", "1", "2"], False),
        (["A", "b", "ü"], False),
        (["10", "11"], False),
        (["Zero", "one"], False),
        (["left", "straight"], False),
        (["kidney_right", "kidney_left"], False),
        (["cat", "dog"], True),
        (["rightful", "bright", "cleft"], True),
        (["0", "cat", "dog"], True),
        (["tench", "zone", "one"], True),
    ],
)
def test_names_that_speak_of_glyphs_or_sides_forbid_mirroring(names, keeps):
    assert flip_keeps_labels(names) is keeps


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ResizeCrop(9, 8), r"ResizeCrop: resize must be >= size \(9 px\), got 8 px"),
        (lambda: ResizeCrop(0, 8), "ResizeCrop: size must be >= 1 px, got 0"),
        (lambda: ResizeCrop(8, 8, "cubic"), "unknown interpolation 'cubic'; did you mean 'bicub"),
        (
            lambda: RandomAffine(8, 8, degrees=-1, shift=-1, scale=(0, 1), fill=256),
            r"RandomAffine: scale must be 0 < low <= high, got \(0, 1\); "
            r"degrees must be >= 0, got -1"
            r"; shift must be >= 0, got -1; fill must be 0 to 255, got 256",
        ),
        (lambda: RandomAffine(8, 8, shear=90), "shear must be < 90 degrees, got 90"),
        (
            lambda: RandomResizedCrop(8, scale=(0.5, 1.5), ratio=(2, 1)),
            r"scale must be 0 < low <= high <= 1, got \(0\.5, 1\.5\); ratio .*got \(2, 1\)",
        ),
        (lambda: HorizontalFlip(1.5), r"probability must be 0 to 1, got 1\.5"),
        (
            lambda: Jitter(2, -1),
            "brightness must be 0 to 1, got 2; contrast must be 0 to 1, got -1",
        ),
        (
            lambda: training_transform(PREPROCESSING, geometry="warp"),
            "unknown geometry 'warp'; known: affine, crop, none",
        ),
    ],
)
def test_wrong_settings_are_refused_when_they_are_made(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_small_images_are_augmented_faster_than_two_thousand_a_second(interpolation):
    weights = Preprocessing((0.5,), (0.25,), size=48, resize=48, interpolation=interpolation)
    transform = training_transform(weights)
    generator = rng()
    seconds = []
    for _ in range(12):
        start = time.process_time()  # of this process: a busy machine does not count
        for _ in range(50):
            transform(GRAY, generator)
        seconds.append((time.process_time() - start) / 50)
    assert min(seconds) < 1 / 2000
