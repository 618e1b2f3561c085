"""Networks as pairs of pure functions over named segments."""

from flaxtransfer.architectures import ResNetConfig
from flaxtransfer.catalogue import ARCHITECTURES, RESNETS
from flaxtransfer.models.convolution import conv, lax_conv
from flaxtransfer.models.model import Model
from flaxtransfer.models.resnet import resnet

__all__ = ["ARCHITECTURES", "RESNETS", "Model", "ResNetConfig", "conv", "lax_conv", "resnet"]
