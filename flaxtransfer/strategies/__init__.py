"""Ways of adapting a pre-trained network, as plans that can be printed, changed and composed.

A recipe is a function of the parameters (or their shapes) and a few numbers; what it returns is a
plan like any other.
"""

from collections.abc import Callable

from flaxtransfer.strategies.measured import curvature_scaled, gradient_scaled
from flaxtransfer.strategies.recipes import (
    batch_norm_only,
    discriminative,
    feature_extraction,
    from_scratch,
    full_fine_tuning,
    head_then_fine_tune,
    l2_sp,
    linear_probe_then_fine_tune,
    progressive_unfreezing,
    surgical,
)
from flaxtransfer.training.plan import Plan

__all__ = [
    "RECIPES",
    "batch_norm_only",
    "curvature_scaled",
    "discriminative",
    "feature_extraction",
    "from_scratch",
    "full_fine_tuning",
    "gradient_scaled",
    "head_then_fine_tune",
    "l2_sp",
    "linear_probe_then_fine_tune",
    "progressive_unfreezing",
    "surgical",
]

RECIPES: dict[str, Callable[..., Plan]] = {
    recipe.__name__: recipe
    for recipe in (
        feature_extraction,
        batch_norm_only,
        head_then_fine_tune,
        linear_probe_then_fine_tune,
        progressive_unfreezing,
        discriminative,
        curvature_scaled,
        gradient_scaled,
        surgical,
        l2_sp,
        full_fine_tuning,
        from_scratch,
    )
}
"""The recipes by name, those that move least first."""
