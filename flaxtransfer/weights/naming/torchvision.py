"""Keys of torchvision, and of torchxrayvision's ResNet-50 for chest radiographs.

timm's plain ResNets have the same keys. torchvision publishes its weights as ``<model>-<first 8
digits of the sha256>.pth``, made by a first and a second training recipe. torchxrayvision's network
has one input channel with pixels between -1024 and 1024, and independent outputs with one sigmoid
each.

References: PyTorch contributors, ``torchvision.models.resnet``, 2016-. J. P. Cohen et al.,
"TorchXRayVision: A library of chest X-ray datasets and models", 2022.
"""

import dataclasses
import re
from collections.abc import Callable

from flaxtransfer.weights.naming.key_map import CONV, DENSE, Rule, Table, batch_norm
from flaxtransfer.weights.preprocessing import IMAGENET, Preprocessing

__all__ = ["CLASS_NAMES", "PREPROCESSING", "RESIZE", "TABLE", "is_published", "published"]


TABLE: Table = (
    # torchvision has no adapters; `fold_adapter` removes a linear one before a file is written.
    Rule("adapter.weight", "params/adapter/kernel", CONV),
    Rule("adapter.curves", "params/adapter/curves"),
    Rule("conv1.weight", "params/conv1/kernel", CONV),
    *batch_norm("bn1", "bn1"),
    Rule("layer{s}.{b}.conv{k}.weight", "params/layer{s}/{b}/conv{k}/kernel", CONV),
    *batch_norm("layer{s}.{b}.bn{k}", "layer{s}/{b}/bn{k}"),
    Rule("layer{s}.{b}.downsample.0.weight", "params/layer{s}/{b}/downsample/0/kernel", CONV),
    *batch_norm("layer{s}.{b}.downsample.1", "layer{s}/{b}/downsample/1"),
    Rule("fc.weight", "params/fc/kernel", DENSE),
    Rule("fc.bias", "params/fc/bias"),
)

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


def published(file_name: str, digest: Callable[[], str]) -> Preprocessing | None:
    """The preprocessing of a file that torchvision published under this name; None for others.

    Args:
        file_name: without the folder.
        digest: gives the SHA-256 of the file's bytes, in hexadecimal; asked for such a name only.

    Raises:
        ValueError: the name is a published one, but the checksum differs.

    >>> published("mine.pth", lambda: "00") is None
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


PREPROCESSING = Preprocessing((0.5,), (1 / 2048,), size=512, resize=512)
"""Of torchxrayvision's ResNet-50."""

CLASS_NAMES = (
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


def is_published(file_name: str) -> bool:
    """Whether a file has the name of torchxrayvision's published ResNet-50.

    >>> is_published("pc-nih-rsna-siim-vin-resnet50-test512-e400-state.pt")
    True
    """
    return file_name == "pc-nih-rsna-siim-vin-resnet50-test512-e400-state.pt"
