"""Recipes: ways of adapting a pre-trained network, as plans to print, change and compose."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flaxtransfer.lazy import attach, names_from

if TYPE_CHECKING:
    from flaxtransfer.recipes.catalog import RECIPES as RECIPES
    from flaxtransfer.recipes.catalog import batch_norm_only as batch_norm_only
    from flaxtransfer.recipes.catalog import curvature_scaled as curvature_scaled
    from flaxtransfer.recipes.catalog import depth_head as depth_head
    from flaxtransfer.recipes.catalog import depths_head as depths_head
    from flaxtransfer.recipes.catalog import discriminative as discriminative
    from flaxtransfer.recipes.catalog import early_layers as early_layers
    from flaxtransfer.recipes.catalog import feature_extraction as feature_extraction
    from flaxtransfer.recipes.catalog import from_scratch as from_scratch
    from flaxtransfer.recipes.catalog import full_fine_tuning as full_fine_tuning
    from flaxtransfer.recipes.catalog import gradient_scaled as gradient_scaled
    from flaxtransfer.recipes.catalog import head_then_fine_tune as head_then_fine_tune
    from flaxtransfer.recipes.catalog import high_rate_fine_tuning as high_rate_fine_tuning
    from flaxtransfer.recipes.catalog import l2_sp as l2_sp
    from flaxtransfer.recipes.catalog import (
        linear_probe_then_fine_tune as linear_probe_then_fine_tune,
    )
    from flaxtransfer.recipes.catalog import progressive_unfreezing as progressive_unfreezing
    from flaxtransfer.recipes.catalog import solved_head as solved_head
    from flaxtransfer.recipes.catalog import surgical as surgical
    from flaxtransfer.recipes.parts import Measurement as Measurement
    from flaxtransfer.recipes.parts import adamw as adamw
    from flaxtransfer.recipes.parts import measure as measure
    from flaxtransfer.recipes.parts import most_images as most_images
    from flaxtransfer.recipes.parts import units as units

__getattr__, __dir__, __all__ = attach(__name__, __file__)

RECIPE_NAMES = tuple(
    name for name in names_from(__file__, f"{__name__}.catalog") if name != "RECIPES"
)
"""The names of the recipes, for help texts and checks that must not import jax."""
