"""Export networks to other programs: torchvision, timm, transformers, ONNX and StableHLO."""
