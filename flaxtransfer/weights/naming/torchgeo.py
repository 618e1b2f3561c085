"""Sensors of torchgeo: bands, wavelengths and pixel scale of its ResNets for satellite images.

The keys are timm's. What a file was trained on is stated only in its name, and the number of bands
is ambiguous: seven bands are Landsat 5 with its thermal band or Landsat 8's surface reflectance. A
sensor here is what belongs to such weights: names of the bands, centers in nm, and the measurements
that are black and white. Published weights are recognized by their names, others by
``load(..., sensor=)``.

References: A. J. Stewart et al., "TorchGeo: Deep Learning With Geospatial Data", 2022, and
"SSL4EO-L: Datasets and Foundation Models for Landsat Imagery", 2023. Y. Wang et al.,
"SSL4EO-S12", 2022, and "DeCUR", 2023. O. Mañas et al., "Seasonal Contrast", 2021. F. Bastani et
al., "SatlasPretrain", 2023. M. Drusch et al., "Sentinel-2", 2012. U.S. Geological Survey, "What
are the band designations for the Landsat satellites?", 2013-.
"""

import re
from collections.abc import Iterable, Mapping

from flaxtransfer.paths import suggest
from flaxtransfer.weights.preprocessing import IMAGENET, Preprocessing

__all__ = ["SENSORS", "check", "note", "published", "wavelengths"]


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


def published(*names: str) -> str | None:
    """The sensor of weights, by the name of their file or repository; None for other names.

    >>> published("resnet50_landsat_tm_toa_moco-ba1ce753.pth")
    'landsat_tm_toa'
    >>> published("model.safetensors", "hf://torchgeo/resnet50_sentinel2_all_moco@main")
    'sentinel2_all'
    >>> published("sentinel2_all_and_mine.pth") is None
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


def check(sensor: str, bands: int) -> Preprocessing:
    """The preprocessing of a sensor, checked against the number of bands of a stem.

    Raises:
        ValueError: an unknown sensor, or one with another number of bands.

    >>> check("landsat_oli_sr", 7).bands
    ('B1', 'B2', 'B3', 'B4', 'B5', 'B6', 'B7')
    >>> check("sentinel2_all", 12)
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
