"""Made-up measurements for the recipes that cannot do without."""

_PARTS = {"stem": 4.0, "layer1": 3.0, "layer2": 2.0, "layer3": 1.0, "layer4": 0.5}

EVIDENCE = {
    "curvature_scaled": {"curvature": _PARTS, "examples": 100},
    "depth_head": {"segment": "layer2"},
    "depths_head": {"segments": ("stem", "layer2")},
    "gradient_scaled": {"gradients": _PARTS},
}
