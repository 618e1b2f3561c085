"""Networks as pairs of pure functions over named segments."""

import importlib
from typing import TYPE_CHECKING, Any

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.models.convolution import conv, lax_conv
from flaxtransfer.models.model import Model
from flaxtransfer.models.registry import ARCHITECTURES, RESNETS, resnet

if TYPE_CHECKING:
    from flaxtransfer.models import nnx

__all__ = ["ARCHITECTURES", "RESNETS", "Model", "ResNetConfig", "conv", "lax_conv", "nnx", "resnet"]


def __getattr__(name: str) -> Any:
    if name == "nnx":  # Imported when asked for: who uses no NNX need not wait for it.
        return importlib.import_module("flaxtransfer.models.nnx")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
