"""Networks for other programs: torchvision, timm, transformers, ONNX and StableHLO."""

from flaxtransfer.exports.exporting import LAYOUTS, Exported, export

__all__ = ["LAYOUTS", "Exported", "export"]
