"""Which sensor a stem was trained on, from names as torchgeo publishes them or from the caller.

What the transforms should give is written down from `torchgeo/models/resnet.py` and
`torchgeo/models/swin.py` (2026), and for SeCo from its authors' `seco_dataset.py`.
"""

import dataclasses
import json

import numpy as np
import pytest

import flaxtransfer as ft
from flaxtransfer.models.band_init import by_wavelength
from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.models.model import leaf_shapes
from flaxtransfer.paths import unflatten
from flaxtransfer.weights import (
    IMAGENET,
    Pretrained,
    load,
    measured_to_pixels,
    normalize_measured,
    save,
)
from flaxtransfer.weights.naming import published, timm
from flaxtransfer.weights.naming.key_map import to_keys

ALL = (443, 490, 560, 665, 705, 740, 783, 842, 865, 945, 1375, 1610, 2190)


def arrays(bands, headless=True):
    config = ResNetConfig(depths=(1, 1, 1, 1), width=4, classes=2, in_channels=bands)
    shapes = leaf_shapes(config)
    keys = to_keys(timm.table_for(config), {p: np.ones(s, np.float32) for p, s in shapes.items()})
    return {key: a for key, a in keys.items() if not (headless and key.startswith("fc."))}


PUBLISHED = {
    "resnet50_sentinel2_all_moco-df8b932e.pth": "sentinel2_all",
    "resnet18_sentinel2_all_moco-59bfdff9.pth": "sentinel2_all",
    "resnet50_sentinel2_all_dino-d6c330e9.pth": "sentinel2_all",
    "rn50_ssl4eo-s12_ms_decur_ep100-fc6b09ff.pth": "sentinel2_all",
    "resnet18_sentinel2_rgb_moco-e3a335e3.pth": "sentinel2_rgb",
    "resnet50_sentinel2_rgb_seco-018bf397.pth": "sentinel2_rgb_seco",
    "sentinel2_resnet152_mi_ms-fd35b4bb.pth": "sentinel2_ms_satlas",
    "sentinel2_resnet50_si_rgb-45fc6972.pth": "sentinel2_rgb_satlas",
    "resnet50_sentinel1_all_moco-906e4356.pth": "sentinel1_all",
    "rn50_ssl4eo-s12_sar_decur_ep100-f0e69ba2.pth": "sentinel1_all",
    "resnet50_landsat_tm_toa_moco-ba1ce753.pth": "landsat_tm_toa",
    "resnet18_landsat_etm_toa_simclr-4d813f79.pth": "landsat_etm_toa",
    "resnet50_landsat_etm_sr_moco-1266cde3.pth": "landsat_etm_sr",
    "resnet18_landsat_oli_tirs_toa_moco-a3002f51.pth": "landsat_oli_tirs_toa",
    "resnet50_landsat_oli_sr_simclr-94f78913.pth": "landsat_oli_sr",
    "resnet50_fmow_rgb_gassl-da43d987.pth": "fmow_rgb",
    "hf://torchgeo/resnet50_sentinel2_all_moco@da4f3c9dbe09:model.safetensors": "sentinel2_all",
    "https://hf.co/torchgeo/x/resolve/main/resnet50_landsat_oli_sr_moco-ff580dad.pth": (
        "landsat_oli_sr"
    ),
}
OTHERS = [
    "resnet50-0676ba61.pth",
    "sentinel2_all.safetensors",
    "my_resnet50_sentinel2_all_moco.pth",
    "resnet50_sentinel2_all_moco_finetuned.pth",
    "resnet50_landsat_tm_toa.pth",
    "resnet50_sentinel2_rgb_satlas.pth",
    "runs/resnet50_sentinel2_all_moco_2/model.safetensors",
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names(name):
    assert published.by_torchgeo(name) == PUBLISHED[name]


@pytest.mark.parametrize("name", OTHERS)
def test_names_that_only_look_like_them(name):
    assert published.by_torchgeo(name) is None


def test_every_sensor_is_the_one_of_some_published_name():
    assert set(published.SENSORS) == set(PUBLISHED.values())


def test_a_published_file_brings_its_bands(write):
    path = write(arrays(13), "resnet18_sentinel2_all_moco-59bfdff9.pth")
    found = load(path)
    own = found.preprocessing
    assert own.bands == (
        "B1",
        "B2",
        "B3",
        "B4",
        "B5",
        "B6",
        "B7",
        "B8",
        "B8A",
        "B9",
        "B10",
        "B11",
        "B12",
    )
    assert own.wavelengths == ALL
    assert (own.black, own.white) == ((0,) * 13, (10_000,) * 13)
    assert (own.size, own.resize, own.interpolation) == (224, 256, "bilinear")
    assert (
        "preprocessing: that of torchgeo's sentinel2_all; bands B1, B2, B3, B4, B5, B6, B7, B8, "
        "B8A, B9, B10, B11, B12; the pixels 0 and 1 are the measurements 0 and 10000"
    ) in found.notes


# Limits of the bands in nm: U.S. Geological Survey, "What are the band designations for the Landsat
# satellites?". The thermal band of ETM+ comes at two gains.
TM = {
    "B1": (450, 520),
    "B2": (520, 600),
    "B3": (630, 690),
    "B4": (760, 900),
    "B5": (1550, 1750),
    "B6": (10_400, 12_500),
    "B7": (2080, 2350),
}
ETM = (
    TM
    | {"B4": (770, 900), "B7": (2090, 2350), "B8": (520, 900)}
    | dict.fromkeys(["B6_VCID_1", "B6_VCID_2"], (10_400, 12_500))
)


@pytest.mark.parametrize(
    ("sensor", "limits"),
    [("landsat_tm_toa", TM), ("landsat_etm_toa", ETM), ("landsat_etm_sr", ETM)],
)
def test_centers_are_the_middles_of_the_bands_limits(sensor, limits):
    found = published.SENSORS[sensor]
    middles = [sum(limits[band]) / 2 for band in found.bands]
    np.testing.assert_array_equal(found.wavelengths, middles)


@pytest.mark.parametrize(
    ("sensor", "measured", "expected"),
    [
        ("sentinel2_all", np.arange(13) * 1000.0, np.arange(13) / 10),
        ("sentinel1_all", [-12.59, -20.26 + 5.91], [0, 1]),
        ("sentinel1_all", [-12.59 + 2 * 5.26, -60], [2, (-60 + 20.26) / 5.91]),
        ("landsat_tm_toa", [0, 51, 102, 153, 204, 255, 255], [0, 0.2, 0.4, 0.6, 0.8, 1, 1]),
        (
            "sentinel2_ms_satlas",
            [255, 0, 51, *[8160] * 3, *[4080] * 3],
            [1, 0, 0.2, 1, 1, 1, 0.5, 0.5, 0.5],
        ),
        # By SeCo's code B4 reaches from 0 to 129, B3 from 2 to 103, B2 from 3 to 88; then ImageNet.
        (
            "sentinel2_rgb_seco",
            [129, 2, 45.5],
            [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.5 - 0.406) / 0.225],
        ),
    ],
)
def test_what_the_network_sees(sensor, measured, expected):
    found = normalize_measured(np.array([[measured]]), published.SENSORS[sensor])
    np.testing.assert_allclose(found[0, 0], expected, atol=2e-6)
    # By way of stored pixels it is the same, but for the rounding and what is beyond the ends.
    own = published.SENSORS[sensor]
    stored = np.round(255 * measured_to_pixels([[measured]], own))[0] / 255
    seen = (stored - own.mean) / own.std
    inside = (np.array(measured) >= own.black) & (np.array(measured) <= own.white)
    np.testing.assert_allclose(seen[0][inside], found[0, 0][inside], atol=0.5 / 255 / min(own.std))


def test_bands_that_do_not_fit_name_the_sensors_that_do(write):
    path = write(arrays(7), "resnet50_landsat_etm_sr_moco-1266cde3.pth")
    fitting = r"sensors with 7 bands: landsat_tm_toa, landsat_oli_sr; give sensor="
    with pytest.raises(ValueError, match=rf"etm_sr has 6 bands, but the stem takes 7; {fitting}"):
        load(path)
    assert load(path, sensor="landsat_oli_sr").preprocessing.wavelengths[0] == 443
    with pytest.raises(ValueError, match="sentinel1_all has 2 bands, but the stem takes 7"):
        load(path, sensor="sentinel1_all")
    with pytest.raises(
        ValueError, match=r"unknown sensor 'landsat_oli'; did you mean 'landsat_oli_sr'"
    ):
        load("nowhere.pth", sensor="landsat_oli")


def test_where_the_name_says_nothing_the_caller_does(write):
    path = write(arrays(7), "landsat.pth")
    assert load(path).preprocessing.bands == ()
    assert any("sensor= supports landsat_tm_toa, landsat_oli_sr" in n for n in load(path).notes)
    found = load(path, sensor="landsat_tm_toa")
    assert found.preprocessing == published.SENSORS["landsat_tm_toa"]
    assert any("that of landsat_tm_toa, as requested" in note for note in found.notes)


def test_bands_travel_in_our_files_and_outrank_names(write, tmp_path):
    found = load(write(arrays(13), "a.pth"), sensor="sentinel2_all")
    scaled = dataclasses.replace(found.preprocessing, white=(8000.0,) * 13)
    path = tmp_path / "resnet18_sentinel2_all_moco.safetensors"
    save(path, dataclasses.replace(found, preprocessing=scaled))
    assert load(path).preprocessing == scaled
    assert load(path, sensor="sentinel2_all").preprocessing == found.preprocessing


def test_a_file_from_before_there_were_bands(basic, write, tmp_path):
    plain = load(write(basic))
    save(tmp_path / "own.safetensors", plain)
    data = (tmp_path / "own.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    said = json.loads(json.loads(data[8:start])["__metadata__"]["flaxtransfer"])
    assert sorted(said["preprocessing"]) == ["interpolation", "mean", "resize", "size", "std"]
    assert load(tmp_path / "own.safetensors").preprocessing == plain.preprocessing


def test_measurements_that_do_not_fit():
    sensor = published.SENSORS["sentinel1_all"]
    with pytest.raises(ValueError, match=r"shape \[..., 2\], got \[4, 3\]; .* bands VV, VH"):
        measured_to_pixels(np.zeros((4, 3)), sensor)
    with pytest.raises(ValueError, match="finite numbers"):
        measured_to_pixels([[np.nan, 0]], sensor)
    with pytest.raises(ValueError, match="for photographs"):
        normalize_measured(np.zeros((4, 3)), IMAGENET)


# --- adapters by wavelength --------------------------------------------------------------------


def rgb(preprocessing):
    config = ResNetConfig(depths=(1, 1, 1, 1), width=4, classes=2)
    ones = {path: np.ones(shape, np.float32) for path, shape in leaf_shapes(config).items()}
    return Pretrained(unflatten(ones), config, preprocessing)


def test_a_sensors_name_stands_for_its_wavelengths():
    kernels = [
        ft.transfer(rgb(IMAGENET), classes=2, bands=13, wavelengths=given).params["adapter"][
            "kernel"
        ]
        for given in ("sentinel2_all", ALL)
    ]
    np.testing.assert_array_equal(*kernels)
    with pytest.raises(ValueError, match="sentinel1_all has no wavelengths: its bands are VV, VH"):
        ft.transfer(rgb(IMAGENET), classes=2, bands=2, wavelengths="sentinel1_all")


def test_the_stems_own_wavelengths_are_used_where_they_are_known():
    infrared = ft.Preprocessing(
        (0.5,) * 3, (0.5,) * 3, 32, 32, bands=("B8", "B4", "B3"), wavelengths=(842, 665, 560)
    )
    found = ft.transfer(rgb(infrared), classes=2, bands=4, wavelengths=(490, 560, 665, 842))
    kernel = np.asarray(found.params["adapter"]["kernel"])[0, 0]
    # The channel that was near infrared is that again, and so are red and green.
    assert kernel.argmax(axis=0).tolist() == [3, 2, 1]
    assert kernel[3, 0] > 0.99
    np.testing.assert_allclose(kernel.sum(axis=0), 1, rtol=1e-6)
    photographs = by_wavelength((490, 560, 665, 842))
    np.testing.assert_allclose(
        by_wavelength((490, 560, 665, 842), channels_nm=(660, 560, 490)), photographs
    )
    with pytest.raises(ValueError, match="channels_nm must be three wavelengths in nm"):
        by_wavelength((490, 560), channels_nm=(0.66, 0.56, 0.49))
