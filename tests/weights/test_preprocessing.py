"""Preprocessing as a value, and as timm, Hugging Face and torchvision record it."""

import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxtransfer.weights import IMAGENET, Preprocessing, load, sidecar
from flaxtransfer.weights.naming import torchvision
from flaxtransfer.weights.preprocessing import INTERPOLATIONS

HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}


@given(
    st.lists(st.tuples(st.floats(-10, 10), st.floats(1e-3, 10)), min_size=1, max_size=13),
    st.integers(1, 1024),
    st.integers(0, 200),
    st.sampled_from(INTERPOLATIONS),
)
def test_json_keeps_every_bit(channels, size, border, interpolation):
    mean, std = zip(*channels, strict=True)
    value = Preprocessing(mean, std, size, size + border, interpolation)
    assert Preprocessing.from_json(json.dumps(value.to_json())) == value
    assert Preprocessing.from_json(value.to_json()) == value
    assert hash(Preprocessing.from_json(value.to_json())) == hash(value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mean": ()}, "one value per channel, got 0 and 3"),
        ({"std": (1.0, 1.0)}, "one value per channel, got 3 and 2"),
        ({"mean": (0.0, float("nan"), 0.0)}, "mean must be finite"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be > 0"),
        ({"size": 0}, "size must be an integer >= 1 \\(pixels\\), got 0"),
        ({"size": 224.5}, "size must be an integer >= 1"),
        ({"resize": 223}, "resize must be an integer >= size, 224 pixels, got 223"),
        ({"interpolation": "cubic"}, "bilinear, bicubic, .* got 'cubic'"),
        ({"bands": ("B1", "B2")}, "bands must have one value per channel, 3, or none, got 2"),
        ({"bands": ("B1", "B2", "B1")}, "bands must have different names"),
        ({"bands": (1, 2, 3)}, "bands must be names"),
        ({"wavelengths": (0.49, 0.56, 0.66)}, "wavelengths must be >= 100 nm"),
        ({"white": (255,) * 3}, "black and white must be given together"),
        ({"black": (0,) * 3, "white": (255, 0, 255)}, "white must be above black"),
    ],
)
def test_what_is_no_preprocessing_is_refused(change, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(IMAGENET, **change)


def test_json_keeps_what_is_known_of_the_bands():
    value = Preprocessing(
        (0.5, 0.25), (1, 2), 8, 9, bands=("VV", "VH"), black=(-50, -50.5), white=(0, 1)
    )
    assert Preprocessing.from_json(json.dumps(value.to_json())) == value
    assert "black=(-50.0, -50.5)" in repr(value)
    assert "wavelengths" not in value.to_json()
    other = value.of_other_bands([0.5], [0.25])
    assert other == Preprocessing((0.5,), (0.25,), 8, 9)
    assert repr(other) == (
        "Preprocessing(mean=(0.5,), std=(0.25,), size=8, resize=9, interpolation='bilinear')"
    )


def test_all_problems_are_listed_at_once():
    with pytest.raises(ValueError, match="invalid Preprocessing") as caught:
        Preprocessing((0.0,), (-1.0,), 0, 0, "none")
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[]", "must be a JSON object, got []"),
        ('{"mean": [0], "std": [1], "resize": 3, "sise": 3}', "missing: size; unknown: sise"),
        ('{"mean": 0, "std": [1], "resize": 3, "size": 3}', "invalid Preprocessing"),
    ],
)
def test_foreign_json_is_refused(text, part):
    with pytest.raises(ValueError, match=re.escape(part)):
        Preprocessing.from_json(text)


# Resize sides as timm computes them (floor(size / crop_pct)) and as torchvision publishes them.
@pytest.mark.parametrize(
    ("fields", "size", "resize", "interpolation"),
    [
        (
            {"input_size": [3, 224, 224], "crop_pct": 0.875, "interpolation": "bilinear"},
            224,
            256,
            "bilinear",
        ),
        (
            {"input_size": [3, 224, 224], "crop_pct": 0.95, "interpolation": "bicubic"},
            224,
            235,
            "bicubic",
        ),
        (
            {"input_size": [3, 224, 224], "crop_pct": 0.965, "interpolation": "bilinear"},
            224,
            232,
            "bilinear",
        ),
        ({"input_size": [3, 176, 176], "crop_pct": 0.9}, 176, 195, "bicubic"),
        ({"input_size": [3, 160, 160], "crop_pct": 1.0}, 160, 160, "bicubic"),
        ({"input_size": [3, 224, 224]}, 224, 256, "bicubic"),
    ],
)
def test_timm(fields, size, resize, interpolation):
    found, notes = sidecar.timm_preprocessing({"pretrained_cfg": HALF | fields})
    assert found == Preprocessing((0.5,) * 3, (0.5,) * 3, size, resize, interpolation)
    assert notes == []


def test_timm_crop_modes_that_are_not_ours_are_said():
    fields = HALF | {"input_size": [3, 8, 8], "crop_mode": "squash"}
    assert "'squash'" in sidecar.timm_preprocessing({"pretrained_cfg": fields})[1][0]


# Sides as transformers' ConvNextImageProcessor computes them; older files write the size as a
# number, and leave crop_pct out.
@pytest.mark.parametrize(
    ("fields", "size", "resize", "interpolation"),
    [
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 3}, 224, 256, "bicubic"),
        ({"size": 224, "crop_pct": None, "resample": 2}, 224, 256, "bilinear"),
        ({"size": {"shortest_edge": 288}, "crop_pct": 0.95}, 288, 303, "bicubic"),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, 384, 384, "bicubic"),
        (
            {
                "size": {"shortest_edge": 256},
                "do_center_crop": True,
                "crop_size": {"height": 224, "width": 224},
                "resample": 2,
            },
            224,
            256,
            "bilinear",
        ),
        ({"size": {"height": 96, "width": 96}, "crop_pct": 1.0, "resample": 0}, 96, 96, "nearest"),
    ],
)
def test_hugging_face(fields, size, resize, interpolation):
    found, _ = sidecar.hf_preprocessing({"image_mean": [0.5], "image_std": [0.5]} | fields)
    assert found == Preprocessing((0.5,), (0.5,), size, resize, interpolation)


def test_hugging_face_without_normalization():
    fields = {"size": 8, "image_mean": [0.5], "image_std": [0.5], "do_normalize": False}
    found, _ = sidecar.hf_preprocessing(fields)
    assert (found.mean, found.std) == ((0.0,), (1.0,))


@pytest.mark.parametrize(
    ("read", "fields", "text"),
    [
        (
            sidecar.timm_preprocessing,
            {"pretrained_cfg": {"mean": [0.5], "std": None}},
            "pretrained_cfg next to the weights lacks input_size, std",
        ),
        (sidecar.hf_preprocessing, {"size": 224}, "lacks image_mean, image_std"),
        (
            sidecar.hf_preprocessing,
            {"size": {"longest_edge": 3}, "image_mean": [0], "image_std": [1]},
            "must have shortest_edge or height",
        ),
        (
            sidecar.hf_preprocessing,
            {"size": 8, "image_mean": [0], "image_std": [1], "resample": 9},
            "interpolation must be one of .* got '9'",
        ),
    ],
)
def test_half_a_record_is_refused(read, fields, text):
    with pytest.raises(ValueError, match=text):
        read(fields)


@pytest.mark.parametrize("read", [sidecar.timm_preprocessing, sidecar.hf_preprocessing])
def test_a_record_of_something_else_is_none(read):
    assert read({}) is None
    assert read({"learning_rate": 0.1}) is None


@pytest.mark.parametrize(("digits", "resize"), [("f37072fd", 256), ("11ad3fa6", 232)])
def test_a_published_file_name_brings_its_recipe(digits, resize):
    name = f"resnet-{digits}.pth"
    assert torchvision.published(name, digits + "0" * 56) == dataclasses.replace(
        IMAGENET, resize=resize
    )
    with pytest.raises(
        ValueError, match=f"must start with {digits}, as torchvision published it, got 00000000"
    ):
        torchvision.published(name, "0" * 64)
    assert torchvision.published(f"resnet-{digits}.safetensors", "0" * 64) is None


# --- in order of trust ---------------------------------------------------------------------------


def test_one_value_stands_for_all_channels(basic, write):
    path = write(basic)
    record = {"size": 64, "image_mean": [0.25], "image_std": [0.5], "resample": 2}
    (path.parent / "preprocessor_config.json").write_text(json.dumps(record))
    assert load(path).preprocessing == Preprocessing((0.25,) * 3, (0.5,) * 3, 64, 73)


def test_a_record_for_other_channels_is_refused(basic, write):
    path = write(basic)
    record = {"size": 64, "image_mean": [0.25] * 4, "image_std": [0.5] * 4}
    (path.parent / "preprocessor_config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="must have 3 channels, as the network, got 4"):
        load(path)


def test_what_is_assumed_is_said(golden):
    notes = {
        "torchvision_basic": "not recorded, ImageNet's is assumed",
        "torchvision_grouped": "not recorded for 2 channels, which stay in 0..1; "
        "sensor= supports sentinel1_all",
        "timm": "from config.json next to the file",
        "huggingface_basic": "from preprocessor_config.json next to the file",
    }
    for name, note in notes.items():
        preprocessing, *others = load(golden / name).notes
        assert preprocessing == f"preprocessing: {note}"
        # Where no file says which network it is.
        assert [other[:7] for other in others] == ["assumed"] * name.startswith("torchvision")
