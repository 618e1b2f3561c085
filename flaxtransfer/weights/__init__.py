"""Pre-trained weights: loading, saving, preprocessing and export, all strict."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flaxtransfer.lazy import attach

if TYPE_CHECKING:
    from flaxtransfer.weights.exports.exporting import Exported as Exported
    from flaxtransfer.weights.exports.exporting import export as export
    from flaxtransfer.weights.loading import load as load
    from flaxtransfer.weights.locations import card as card
    from flaxtransfer.weights.preprocessing import IMAGENET as IMAGENET
    from flaxtransfer.weights.preprocessing import Preprocessing as Preprocessing
    from flaxtransfer.weights.preprocessing import measured_to_pixels as measured_to_pixels
    from flaxtransfer.weights.preprocessing import normalize as normalize
    from flaxtransfer.weights.preprocessing import normalize_measured as normalize_measured
    from flaxtransfer.weights.pretrained import Pretrained as Pretrained
    from flaxtransfer.weights.pretrained import fold_adapter as fold_adapter
    from flaxtransfer.weights.pretrained import save as save

__getattr__, __dir__, __all__ = attach(__name__, __file__)
