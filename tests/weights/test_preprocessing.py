"""Preprocessing as a value, and as timm, Hugging Face and torchvision record it."""

import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxtransfer.weights import IMAGENET, Preprocessing, load, sidecar
from flaxtransfer.weights.naming import huggingface, published
from flaxtransfer.weights.preprocessing import CROP_MODES, INTERPOLATIONS, PROCESSORS

HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}


@given(
    st.lists(st.tuples(st.floats(-10, 10), st.floats(1e-3, 10)), min_size=1, max_size=13),
    st.integers(1, 1024),
    st.integers(0, 200),
    st.tuples(*map(st.sampled_from, (INTERPOLATIONS, CROP_MODES, PROCESSORS))),
)
def test_json_keeps_every_bit(channels, size, border, words):
    mean, std = zip(*channels, strict=True)
    value = Preprocessing(mean, std, size, size + border, *words)
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
        ({"crop_mode": "border"}, "crop_mode must be one of center, squash, got 'border'"),
        ({"processor": "timm"}, "processor must be one of torchvision, huggingface, got 'timm'"),
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
    assert str(caught.value).count("; ") == 2
    assert "\n" not in str(caught.value)


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


FULL = {"input_size": [3, 224, 224], "crop_pct": 0.875, "interpolation": "bilinear"} | HALF


# Sides as timm computes them (floor(size / crop_pct)) and as torchvision publishes them; defaults
# are those of timm.data.resolve_data_config.
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (224, 256, "bilinear")),
        ({"crop_pct": 0.95, "interpolation": "bicubic"}, (224, 235, "bicubic")),
        ({"crop_pct": 0.965}, (224, 232, "bilinear")),
        ({"input_size": [3, 160, 160], "crop_pct": 1.0}, (160, 160, "bilinear")),
        ({"crop_mode": "squash", "crop_pct": 1.0}, (224, 224, "bilinear", "squash")),
    ],
)
def test_timm(fields, expected):
    found, notes = sidecar.timm_preprocessing({"pretrained_cfg": FULL | fields})
    assert found == Preprocessing((0.5,) * 3, (0.5,) * 3, *expected)
    assert notes == []


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"interpolation": None}, "timm's default interpolation"),
        ({"mean": None, "std": None}, "timm's default mean, std"),
        ({"test_input_size": [3, 288, 288], "test_crop_pct": 1.0}, "use_test_size"),
    ],
)
def test_what_timms_record_leaves_open_is_said(fields, note):
    found, (text,) = sidecar.timm_preprocessing({"pretrained_cfg": FULL | fields})
    assert note in text
    assert (found.size, found.resize) == (224, 256)
    if "mean" in fields:
        assert found.mean == IMAGENET.mean
    if "interpolation" in fields:
        assert found.interpolation == "bicubic"


def processor(name, **fields):
    usual = {"image_processor_type": f"{name}ImageProcessor", "resample": 3}
    return usual | {"image_mean": [0.5], "image_std": [0.5]} | fields


SHORTEST, SQUARE = {"shortest_edge": 224}, {"height": 256, "width": 256}


# Sides as transformers' processors compute them; older files write the size as a number, and leave
# crop_pct out.
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (processor("ConvNext", size=SHORTEST, crop_pct=0.875), (224, 256, "bicubic")),
        (processor("ConvNext", size=224, resample=2), (224, 256, "bilinear")),
        (processor("ConvNext", size={"shortest_edge": 288}, crop_pct=0.95), (288, 303, "bicubic")),
        (processor("ConvNext", size={"shortest_edge": 384}), (384, 384, "bicubic", "squash")),
        (processor("Bit", size={"shortest_edge": 256}, crop_size=224), (224, 256, "bicubic")),
        (processor("Bit", size=SHORTEST, resample="box"), (224, 224, "box")),
        (processor("Bit", size=SQUARE), (224, 256, "bicubic", "squash")),
        (processor("ViT", size=96, resample=0), (96, 96, "nearest", "squash")),
        (processor("DeiT", size=256, crop_size=SQUARE), (256, 256, "bicubic", "squash")),
        (processor("CLIP", size=[256, 256]), (224, 256, "bicubic", "squash")),
        (
            processor("ViT", size=9, default_to_square=False, do_center_crop=True, crop_size=8),
            (8, 9, "bicubic"),
        ),
    ],
)
def test_hugging_face(fields, expected):
    found, notes = huggingface.preprocessing(fields)
    assert found == Preprocessing((0.5,), (0.5,), *expected, processor="huggingface")
    assert notes == []


def test_the_processor_of_older_files_is_assumed_and_said():
    plain = {"image_mean": [0.5], "image_std": [0.5]}
    for fields, name in (
        ({"size": 224, "crop_pct": None, "resample": 2}, "convnext"),
        ({"size": 224, "do_center_crop": True, "crop_size": 224}, "bit"),
        ({"size": {"height": 224, "width": 224}}, "vit"),
    ):
        (note,) = huggingface.preprocessing(plain | fields)[1]
        assert f"that of {name} is assumed" in note
    assert huggingface.preprocessing(
        plain | {"size": 224, "feature_extractor_type": "ConvNextFeatureExtractor"}
    ) == (Preprocessing((0.5,), (0.5,), 224, 256, "bicubic", processor="huggingface"), [])


# What reaches the network is (pixel * factor - mean) / std.
@pytest.mark.parametrize(
    ("fields", "mean", "std"),
    [
        ({"do_normalize": False}, 0, 1),
        ({"rescale_factor": 1 / 128}, 0.5 * 128 / 255, 0.5 * 128 / 255),
        ({"do_rescale": False}, 0.5 / 255, 0.5 / 255),
        ({"do_rescale": False, "do_normalize": False}, 0, 1 / 255),
        ({"rescale_factor": 2 / 255, "do_normalize": False}, 0, 0.5),
    ],
)
def test_hugging_faces_scale_is_that_of_mean_and_std(fields, mean, std):
    found, _ = huggingface.preprocessing(processor("ViT", size=8, **fields))
    assert (found.mean, found.std) == (pytest.approx((mean,)), pytest.approx((std,)))


def test_fields_of_a_processor_that_were_not_used_are_said():
    _, (note,) = huggingface.preprocessing(processor("ViT", size=8, crop_pct=0.9, mine=[1]))
    assert note == "fields of preprocessor_config.json were not used: crop_pct, mine"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"mean": [0.5], "std": ["a"]}, "std must be one number above 0 per channel, got"),
        ({"std": [0.5, 0.0]}, "std must be one number above 0 per channel"),
        ({"input_size": [3, 224, 288]}, r"input_size must be .* a square, got \[3, 224, 288\]"),
        ({"input_size": 224}, "input_size must be .* got 224"),
        ({"crop_mode": "border"}, "crop_mode must be center or squash, got 'border'"),
        ({"crop_pct": 1.1}, "crop_pct must be above 0 and at most 1, got 1.1"),
        ({"interpolation": "random"}, "interpolation must be nearest, .* got 'random'"),
        ({"crop_pct": 0, "mean": []}, "crop_pct .*; mean must be"),
    ],
)
def test_a_timm_record_of_other_pixels_is_refused_by_field(fields, text):
    with pytest.raises(ValueError, match=rf"^config\.json next to the weights .*{text}") as caught:
        sidecar.timm_preprocessing({"pretrained_cfg": FULL | fields})
    assert len(str(caught.value)) <= 600


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (processor("Bit", size=None), "lacks size"),
        ({"size": 224}, "lacks image_mean, image_std"),
        (processor("Levit", size=224), "image_processor_type must be that of .* 'LevitImage"),
        (processor("Bit", size={"longest_edge": 3}), "size must be a shortest_edge, or a square"),
        (processor("Bit", size=SHORTEST | {"longest_edge": 300}), "size must be"),
        (processor("Bit", size={"height": 3, "width": 4}), "size must be"),
        (processor("ConvNext", size=SQUARE), "size must be a shortest_edge, got"),
        (processor("Bit", size=224, crop_size={"height": 3, "width": 4}), "crop_size must be"),
        (processor("Bit", size=200), "crop_size must be a square within size"),
        (processor("ConvNext", size=224, do_center_crop=True, crop_size=192), "crop_size must be"),
        (processor("Bit", size=224, do_center_crop=False), "do_center_crop must be true where"),
        (processor("Bit", size=224, do_resize=False), "do_resize must be true, got False"),
        (processor("Bit", size=224, do_pad=True), "do_pad must be false or absent, got True"),
        (processor("Bit", size=224, do_flip_channel_order=True), "do_flip_channel_order must"),
        (processor("ViT", size=224, rescale_offset=True), "rescale_offset must be false"),
        (processor("ViT", size=224, rescale_factor=0), "rescale_factor must be above 0, got 0"),
        (processor("ViT", size=224, resample=9), "resample must be one of .* got 9"),
        (processor("ViT", size=224, resample=[3]), "resample must be one of"),
        (processor("ViT", size=224, image_std=[0.5, 0]), "image_std must be one number above 0"),
        (processor("ViT", size=224, image_mean="x"), "image_mean must be one number per channel"),
        (processor("ConvNext", size=224, crop_pct=1.5), "crop_pct must be above 0 and at most 1"),
    ],
)
def test_a_processor_of_other_pixels_is_refused_by_field(fields, text):
    with pytest.raises(ValueError, match=rf"^preprocessor_config\.json next to .*{text}") as caught:
        huggingface.preprocessing(fields)
    assert len(str(caught.value)) <= 600
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [sidecar.timm_preprocessing, huggingface.preprocessing])
def test_a_record_of_something_else_is_none(read):
    assert read({}) is None
    assert read({"learning_rate": 0.1}) is None


@pytest.mark.parametrize(("digits", "resize"), [("f37072fd", 256), ("11ad3fa6", 232)])
def test_a_published_file_name_brings_its_recipe(digits, resize):
    name = f"resnet-{digits}.pth"
    assert published.by_torchvision(name, lambda: digits + "0" * 56) == dataclasses.replace(
        IMAGENET, resize=resize
    )
    with pytest.raises(
        ValueError, match=f"must start with {digits}, as torchvision published it, got 00000000"
    ):
        published.by_torchvision(name, lambda: "0" * 64)
    assert published.by_torchvision(f"resnet-{digits}.safetensors", lambda: "0" * 64) is None


# --- in order of trust ---------------------------------------------------------------------------


def test_one_value_stands_for_all_channels(basic, write):
    path = write(basic)
    record = {"size": 64, "image_mean": [0.25], "image_std": [0.5], "resample": 2}
    (path.parent / "preprocessor_config.json").write_text(json.dumps(record))
    assert load(path).preprocessing == Preprocessing(
        (0.25,) * 3, (0.5,) * 3, 64, 73, processor="huggingface"
    )


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
        # Where no file says which network it is; timm's has sizes for evaluation on request.
        expected = {"timm": ["timm's "], "huggingface_basic": []}
        assert [other[:7] for other in others] == expected.get(name, ["assumed"])
