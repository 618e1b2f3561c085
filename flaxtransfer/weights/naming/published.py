"""Weights that their publishers know by the names of their files: what such a name states.

torchvision publishes its weights as ``<model>-<first 8 digits of the sha256>.pth``, made by a first
and a second training recipe. torchxrayvision's ResNet-50 for chest radiographs has one input
channel with pixels between -1024 and 1024, and independent outputs with one sigmoid each.

torchgeo's ResNets for satellite images state only in their names what they were trained on, and the
number of bands is ambiguous: seven bands are Landsat 5 with its thermal band or Landsat 8's surface
reflectance. A sensor here is what belongs to such weights: names of the bands, centers in nm, and
the measurements that are black and white. Other weights get theirs by ``load(..., sensor=)``.

References: PyTorch contributors, ``torchvision.models.resnet``, 2016-. J. P. Cohen et al.,
"TorchXRayVision: A library of chest X-ray datasets and models", 2022. A. J. Stewart et al.,
"TorchGeo: Deep Learning With Geospatial Data", 2022, and "SSL4EO-L: Datasets and Foundation Models
for Landsat Imagery", 2023. Y. Wang et al., "SSL4EO-S12", 2022, and "DeCUR", 2023. O. Mañas et al.,
"Seasonal Contrast", 2021. F. Bastani et al., "SatlasPretrain", 2023. M. Drusch et al.,
"Sentinel-2", 2012. U.S. Geological Survey, "What are the band designations for the Landsat
satellites?", 2013-.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping

from flaxtransfer.paths import suggest
from flaxtransfer.weights.preprocessing import IMAGENET, Preprocessing

__all__ = [
    "RADIOGRAPHS",
    "RADIOGRAPH_CLASSES",
    "RESIZE",
    "SENSORS",
    "by_torchgeo",
    "by_torchvision",
    "is_of_radiographs",
    "note",
    "of_sensor",
    "wavelengths",
]


# Shorter side before the 224 px crop, by the digits in the file name. The first recipe resized to
# 256 px, the second to 232 px; 173b62eb is called V1 and was made by the second.
RESIZE: dict[str, int] = {
    **dict.fromkeys(
        (
            "f37072fd",
            "5c106cde",  # resnet18
            "b627a593",
            "333f7ec4",  # resnet34
            "0676ba61",
            "19c8e357",  # resnet50
            "63fe2227",
            "5d3b4d8f",  # resnet101
            "394f9c45",
            "b121ed2d",  # resnet152
            "95faca4d",
            "32ee1156",  # wide_resnet50_2, wide_resnet101_2
            "7cdf4587",
            "8ba56ff5",  # resnext50_32x4d, resnext101_32x8d
        ),
        256,
    ),
    **dict.fromkeys(
        (
            "11ad3fa6",
            "cd907fc2",
            "f82ba261",  # resnet50, resnet101, resnet152
            "9ba9bcbe",
            "d733dc28",  # wide_resnet50_2, wide_resnet101_2
            "1a0047aa",
            "110c445d",
            "173b62eb",  # resnext50_32x4d, 101_32x8d, 101_64x4d
        ),
        232,
    ),
}


def by_torchvision(file_name: str, digest: Callable[[], str]) -> Preprocessing | None:
    """The preprocessing of a file that torchvision published under this name; None for others.

    Args:
        file_name: without the folder.
        digest: gives the SHA-256 of the file's bytes, in hexadecimal; asked for such a name only.

    Raises:
        ValueError: the name is a published one, but the checksum differs.

    >>> by_torchvision("mine.pth", lambda: "00") is None
    True
    """
    found = re.search(r"-([0-9a-f]{8})\.pth$", file_name)
    if found is None or found[1] not in RESIZE:
        return None
    sha256 = digest()
    if not sha256.startswith(found[1]):
        raise ValueError(
            f"{file_name} is damaged or another file: its sha256 must start with {found[1]}, as "
            f"torchvision published it, got {sha256[:8]}; download it again, or rename it if it is "
            "your own"
        )
    return dataclasses.replace(IMAGENET, resize=RESIZE[found[1]])


RADIOGRAPHS = Preprocessing((0.5,), (1 / 2048,), size=512, resize=512)
"""Of torchxrayvision's ResNet-50."""

RADIOGRAPH_CLASSES = (
    "Atelectasis",
    "Consolidation",
    "Infiltration",
    "Pneumothorax",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Effusion",
    "Pneumonia",
    "Pleural_Thickening",
    "Cardiomegaly",
    "Nodule",
    "Mass",
    "Hernia",
    "Lung Lesion",
    "Fracture",
    "Lung Opacity",
    "Enlarged Cardiomediastinum",
)


def is_of_radiographs(file_name: str) -> bool:
    """Whether a file has the name of torchxrayvision's published ResNet-50.

    >>> is_of_radiographs("pc-nih-rsna-siim-vin-resnet50-test512-e400-state.pt")
    True
    """
    return file_name == "pc-nih-rsna-siim-vin-resnet50-test512-e400-state.pt"


SENTINEL_2 = {
    "B1": 443,
    "B2": 490,
    "B3": 560,
    "B4": 665,
    "B5": 705,
    "B6": 740,
    "B7": 783,
    "B8": 842,
    "B8A": 865,
    "B9": 945,
    "B10": 1375,
    "B11": 1610,
    "B12": 2190,
}
# Middles of the bands' limits; B6 is thermal, and ETM's B8 and OLI's B8 panchromatic.
_TM = {"B1": 485, "B2": 560, "B3": 660, "B4": 830, "B5": 1650, "B6": 11450, "B7": 2215}
_ETM = {
    "B1": 485,
    "B2": 560,
    "B3": 660,
    "B4": 835,
    "B5": 1650,
    "B6_VCID_1": 11450,
    "B6_VCID_2": 11450,
    "B7": 2220,
    "B8": 710,
}
_OLI = {
    "B1": 443,
    "B2": 482,
    "B3": 561,
    "B4": 655,
    "B5": 865,
    "B6": 1609,
    "B7": 2201,
    "B8": 590,
    "B9": 1373,
    "B10": 10895,
    "B11": 12005,
}
_RGB = ("B4", "B3", "B2")
_SATLAS = ("B4", "B3", "B2", "B5", "B6", "B7", "B8", "B11", "B12")


def _sensor(
    bands: Iterable[str],
    centers: Mapping[str, float],
    white: float | tuple[float, ...],
    *,
    black: tuple[float, ...] = (),
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    size: int = 224,
    resize: int = 256,
) -> Preprocessing:
    bands = tuple(bands)
    count = len(bands)
    return Preprocessing(
        mean or (0.0,) * count,
        std or (1.0,) * count,
        size,
        resize,
        bands=bands,
        wavelengths=tuple(centers[band] for band in bands if band in centers),
        black=black or (0.0,) * count,
        white=white if isinstance(white, tuple) else (white,) * count,
    )


def _landsat(bands: Iterable[str], centers: Mapping[str, float]) -> Preprocessing:
    # SSL4EO-L's images have 8 bits and 264 px, of which the middle 224 are seen.
    return _sensor(bands, centers, 255, resize=264)


def _radar() -> Preprocessing:
    """SSL4EO-S12's statistics, in dB, over a range with 5 standard deviations at both ends."""
    black, white = -50.0, 14.0
    means, stds, span = (-12.59, -20.26), (5.26, 5.91), white - black
    return _sensor(
        ("VV", "VH"),
        {},
        white,
        black=(black, black),
        mean=tuple((mean - black) / span for mean in means),
        std=tuple(std / span for std in stds),
    )


SENSORS: dict[str, Preprocessing] = {
    "sentinel2_all": _sensor(SENTINEL_2, SENTINEL_2, 10_000),
    "sentinel2_rgb": _sensor(_RGB, SENTINEL_2, 10_000),
    # By SeCo's own code, in the order of these bands.
    "sentinel2_rgb_seco": _sensor(
        _RGB,
        SENTINEL_2,
        (129.0, 103.0, 88.0),
        black=(0.0, 2.0, 3.0),
        mean=IMAGENET.mean,
        std=IMAGENET.std,
    ),
    # The three visible ones are those of the 8-bit picture that comes with each scene.
    "sentinel2_ms_satlas": _sensor(
        _SATLAS, SENTINEL_2, (255,) * 3 + (8160,) * 6, size=256, resize=256
    ),
    "sentinel2_rgb_satlas": _sensor(_RGB, SENTINEL_2, 255, size=256, resize=256),
    "sentinel1_all": _radar(),
    # Color pictures of many satellites: pixels like those of photographs.
    "fmow_rgb": Preprocessing(
        IMAGENET.mean, IMAGENET.std, size=224, resize=224, bands=("red", "green", "blue")
    ),
    "landsat_tm_toa": _landsat(_TM, _TM),
    "landsat_etm_toa": _landsat(_ETM, _ETM),
    "landsat_etm_sr": _landsat([name for name in _TM if name != "B6"], _ETM),
    "landsat_oli_tirs_toa": _landsat(_OLI, _OLI),
    "landsat_oli_sr": _landsat([f"B{number}" for number in range(1, 8)], _OLI),
}
"""Sensors by the middle part of the names under which torchgeo publishes weights."""

_NAMES: dict[str, str] = {
    r"resnet\d+_(sentinel2_all)_(?:moco|dino)": "",
    r"resnet\d+_(sentinel2_rgb)_moco": "",
    r"resnet\d+_(sentinel2_rgb_seco)": "",
    r"sentinel2_resnet\d+_[ms]i_ms": "sentinel2_ms_satlas",
    r"sentinel2_resnet\d+_[ms]i_rgb": "sentinel2_rgb_satlas",
    r"resnet\d+_(sentinel1_all)_moco": "",
    r"resnet\d+_(fmow_rgb)_gassl": "",
    r"rn\d+_ssl4eo-s12_sar_decur_ep\d+": "sentinel1_all",
    r"rn\d+_ssl4eo-s12_ms_decur_ep\d+": "sentinel2_all",
    r"resnet\d+_(landsat_(?:tm_toa|etm_toa|etm_sr|oli_tirs_toa|oli_sr))_(?:moco|simclr)": "",
}


def by_torchgeo(*names: str) -> str | None:
    """The sensor of weights, by the name of their file or repository; None for other names.

    >>> by_torchgeo("resnet50_landsat_tm_toa_moco-ba1ce753.pth")
    'landsat_tm_toa'
    >>> by_torchgeo("model.safetensors", "hf://torchgeo/resnet50_sentinel2_all_moco@main")
    'sentinel2_all'
    >>> by_torchgeo("sentinel2_all_and_mine.pth") is None
    True
    """
    for name in names:
        for pattern, sensor in _NAMES.items():
            if found := re.search(rf"(?:^|/){pattern}(?=$|[-.@:/])", name):
                return sensor or found[1]
    return None


def note(sensor: str) -> str:
    """A description of the images that a sensor's weights take.

    >>> note("sentinel2_rgb")
    'bands B4, B3, B2; the pixels 0 and 1 are the measurements 0 and 10000'
    """
    found = _known(sensor)
    text = f"bands {', '.join(found.bands)}"
    if not found.black:
        return text
    black, white = (_brief(values) for values in (found.black, found.white))
    return f"{text}; the pixels 0 and 1 are the measurements {black} and {white}"


def of_sensor(sensor: str, bands: int) -> Preprocessing:
    """The preprocessing of a sensor, checked against the number of bands of a stem.

    Raises:
        ValueError: an unknown sensor, or one with another number of bands.

    >>> of_sensor("landsat_oli_sr", 7).bands
    ('B1', 'B2', 'B3', 'B4', 'B5', 'B6', 'B7')
    >>> of_sensor("sentinel2_all", 12)
    Traceback (most recent call last):
    ValueError: sentinel2_all has 13 bands, but the stem takes 12; sensors with 12 bands: none
    """
    found = _known(sensor)
    if len(found.bands) != bands:
        fitting = [name for name, other in SENSORS.items() if len(other.bands) == bands]
        raise ValueError(
            f"{sensor} has {len(found.bands)} bands, but the stem takes {bands}; sensors with "
            f"{bands} bands: {', '.join(fitting) or 'none'}"
        )
    return found


def wavelengths(sensor: str) -> tuple[float, ...]:
    """Center of each band in nm.

    Raises:
        ValueError: an unknown sensor, or a radar without wavelengths.

    >>> wavelengths("sentinel2_rgb")
    (665.0, 560.0, 490.0)
    """
    found = _known(sensor)
    if not found.wavelengths:
        raise ValueError(f"{sensor} has no wavelengths: its bands are {', '.join(found.bands)}")
    return found.wavelengths


def _brief(values: tuple[float, ...]) -> str:
    return f"{values[0]:g}" if len(set(values)) == 1 else ", ".join(f"{v:g}" for v in values)


def _known(sensor: str) -> Preprocessing:
    if sensor not in SENSORS:
        raise ValueError(
            f"unknown sensor {sensor!r}{suggest(str(sensor), SENSORS)}; known: {', '.join(SENSORS)}"
        )
    return SENSORS[sensor]
