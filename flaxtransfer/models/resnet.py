"""ResNets by name, as torchvision defines them."""

from dataclasses import replace
from typing import Any

from flaxtransfer.architectures import ResNetConfig
from flaxtransfer.catalogue import ARCHITECTURES
from flaxtransfer.models.convolution import conv
from flaxtransfer.models.layers import Convolution
from flaxtransfer.models.model import Model
from flaxtransfer.paths import suggest

__all__ = ["resnet"]


def resnet(
    architecture: str | ResNetConfig,
    *,
    classes: int | None = None,
    dtype: Any = None,
    zero_head: bool = False,
    zero_init_residual: bool = False,
    convolution: Convolution = conv,
) -> Model:
    """A ResNet of the v1.5 family, with torchvision's layers, paddings and names.

    It is the network alone. For pre-trained numbers, `flaxtransfer.load` reads a checkpoint and
    `flaxtransfer.pretrained` makes the model that fits it and your classes.

    Args:
      architecture: "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", a wide or ResNeXt
        form such as "wide_resnet50_2" and "resnext50_32x4d", or a config of your own.
      classes: outputs of the head; None keeps the config's.
      dtype: of the convolutions; None is that of the parameters. See `Model`.
      zero_head: whether `init` sets the head's kernel to 0.
      zero_init_residual: whether `init` makes every block start as an identity.
      convolution: the function that convolves; `lax_conv` gives the same network without the
        remedies for CPU.

    Raises:
      ValueError: an unknown name, with the nearest; numbers that describe no network.

    >>> import jax
    >>> model = resnet("resnet18", classes=10)
    >>> sum(leaf.size for leaf in jax.tree.leaves(model.abstract()["params"]))
    11181642

    References:
      K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", 2016.
      P. Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017 (stride
      in the 3x3 convolution; zero-initialised last scale of each block).
    """
    config = _by_name(architecture) if isinstance(architecture, str) else architecture
    if classes is not None:
        config = replace(config, classes=classes)
    return Model(config, dtype, zero_head, zero_init_residual, convolution)


def _by_name(name: str) -> ResNetConfig:
    if name not in ARCHITECTURES:
        raise ValueError(
            f"no network {name!r}{suggest(name, ARCHITECTURES)}; there are "
            f"{', '.join(ARCHITECTURES)}, and any other shape as a ResNetConfig"
        )
    return ARCHITECTURES[name]
