"""torchxrayvision's ResNet-50 of chest radiographs: torchvision's keys, one channel.

Reference: J. P. Cohen et al., "TorchXRayVision: A library of chest X-ray datasets and models",
2022. Its pixels lie between -1024 and 1024, and its outputs are independent: a sigmoid each.
"""

from flaxtransfer.weights.preprocessing import Preprocessing

__all__ = ["CLASS_NAMES", "PREPROCESSING", "is_published"]

PREPROCESSING = Preprocessing((0.5,), (1 / 2048,), size=512, resize=512)

CLASS_NAMES = (
    "Atelectasis", "Consolidation", "Infiltration", "Pneumothorax", "Edema", "Emphysema",
    "Fibrosis", "Effusion", "Pneumonia", "Pleural_Thickening", "Cardiomegaly", "Nodule", "Mass",
    "Hernia", "Lung Lesion", "Fracture", "Lung Opacity", "Enlarged Cardiomediastinum",
)  # fmt: skip


def is_published(file_name: str) -> bool:
    """Whether a file has the name under which the weights are published.

    >>> is_published("pc-nih-rsna-siim-vin-resnet50-test512-e400-state.pt")
    True
    """
    return file_name == "pc-nih-rsna-siim-vin-resnet50-test512-e400-state.pt"
