"""Test-time adaptation: adapt a trained network to unlabeled images of another domain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flaxtransfer.lazy import attach

if TYPE_CHECKING:
    from flaxtransfer.adapt.batch_norm import adapt_batch_norm as adapt_batch_norm
    from flaxtransfer.adapt.batch_norm import adapt_batch_norm_balanced as adapt_batch_norm_balanced
    from flaxtransfer.adapt.entropy import tent as tent
    from flaxtransfer.adapt.scores import ModelOutputs as ModelOutputs
    from flaxtransfer.adapt.scores import model_outputs as model_outputs
    from flaxtransfer.adapt.statistics import image_reader as image_reader
    from flaxtransfer.adapt.statistics import predict_logits as predict_logits

__getattr__, __dir__, __all__ = attach(__name__, __file__)
