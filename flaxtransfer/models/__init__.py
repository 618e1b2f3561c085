"""Networks as pairs of pure functions over named segments."""

from flaxtransfer.models.resnet import RESNETS, Model, ResNetConfig, resnet

__all__ = ["RESNETS", "Model", "ResNetConfig", "resnet"]
