"""Network models: configurations, layers, input adapters and the NNX interface."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flaxtransfer.lazy import attach

if TYPE_CHECKING:
    from flaxtransfer.masks import selected as selected
    from flaxtransfer.models import adapters as adapters
    from flaxtransfer.models import nnx as nnx
    from flaxtransfer.models.config import Adapter as Adapter
    from flaxtransfer.models.config import ResNetConfig as ResNetConfig
    from flaxtransfer.models.layers import conv as conv
    from flaxtransfer.models.layers import lax_conv as lax_conv
    from flaxtransfer.models.model import Model as Model
    from flaxtransfer.models.model import leaf_shapes as leaf_shapes
    from flaxtransfer.models.registry import ARCHITECTURES as ARCHITECTURES
    from flaxtransfer.models.registry import RESNETS as RESNETS
    from flaxtransfer.paths import Params as Params
    from flaxtransfer.paths import Variables as Variables
    from flaxtransfer.paths import flatten as flatten
    from flaxtransfer.paths import unflatten as unflatten

__getattr__, __dir__, __all__ = attach(__name__, __file__)
