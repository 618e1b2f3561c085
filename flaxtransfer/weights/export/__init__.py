"""Networks for other programs: torchvision, timm, transformers, ONNX and StableHLO."""

from flaxtransfer.weights.export.export import LAYOUTS, Exported, export

__all__ = ["LAYOUTS", "Exported", "export"]
