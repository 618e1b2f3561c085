"""The ResNet family: channel attention, residual blocks, stems and the whole network.

The layers have the names that torchvision and timm give them. ``Network`` is a Linen module that
runs any slice of its segments. ``models.model.Model`` is the interface to it.
"""

import zlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from flaxtransfer.batchnorm import Norm
from flaxtransfer.models import adapters
from flaxtransfer.models.config import Adapter, ResNetConfig, eca_size, squeezed
from flaxtransfer.models.layers import Layers, anti_aliased, average_pool, blur_pool, max_pool

__all__ = ["Network", "Noise", "attention", "block_of", "depth_rates", "segments_of"]


class Noise(NamedTuple):
    """What is dropped at random in training: features before the head, and whole blocks.

    Numbers are drawn for the whole batch, by the name of the place, so that an example loses the
    same whether the batch is computed at once, in parts, on several devices, or from a cut on.

    Args:
        key: of the step.
        rows: which rows of the batch are computed, int ``[rows]``.
        batch_size: rows of the whole batch.
        dropout: share of the features before the head that become 0.
        depth: with which probability an example passes a block by its shortcut alone, by the
            block's path ("layer4/0"); see ``depth_rates``.

    References:
        N. Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting",
        2014. G. Huang et al., "Deep Networks with Stochastic Depth", 2016.
    """

    key: jax.Array
    rows: jax.Array
    batch_size: int
    dropout: float = 0.0
    depth: Mapping[str, float] = {}

    def features(self, x: jax.Array) -> jax.Array:
        """``x`` [rows, features] with some of them 0 and the others as much larger."""
        if not self.dropout:
            return x
        kept = self._kept("head", self.dropout, (x.shape[-1],))
        return jnp.where(kept, x / (1 - self.dropout), 0)

    def factor(self, block: str, dtype: jnp.dtype) -> jax.Array | None:
        """What a block's output is multiplied with, [rows, 1, 1, 1]; None for a factor of 1."""
        rate = self.depth.get(block, 0.0)
        if not rate:
            return None
        kept = self._kept(block, rate, (1, 1, 1))
        return (kept / (1 - rate)).astype(dtype)

    def _kept(self, place: str, rate: float, shape: tuple[int, ...]) -> jax.Array:
        key = jax.random.fold_in(self.key, zlib.crc32(place.encode()))
        return jax.random.bernoulli(key, 1 - rate, (self.batch_size, *shape))[self.rows]


def depth_rates(config: ResNetConfig, rate: float, moving: Iterable[str]) -> dict[str, float]:
    """With which probability each block is dropped: linear in its depth, up to ``rate``.

    A block without a trainable leaf computes as in evaluation and is never dropped.

    Args:
        config: of the network.
        rate: of the last block.
        moving: paths of the trainable leaves.

    >>> depth_rates(ResNetConfig(depths=(1, 1, 1, 1)), 0.2, ["layer2/0/bn1/scale", "fc/bias"])
    {'layer2/0': 0.1}
    """
    stages = enumerate(config.depths, start=1)
    blocks = [f"layer{stage}/{index}" for stage, depth in stages for index in range(depth)]
    moved = {"/".join(path.split("/")[:2]) for path in moving}
    return {
        block: rate * number / len(blocks)
        for number, block in enumerate(blocks, start=1)
        if block in moved and rate
    }


class Dense1x1(nn.Module):
    """A dense layer with a bias whose kernel has the shape of a 1x1 convolution, as in torch."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # `Model.init` draws the kernel.
        shape = (1, 1, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.zeros, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        kernel, bias = kernel.astype(x.dtype), bias.astype(x.dtype)
        return jnp.dot(x, kernel[0, 0], precision=lax.Precision.HIGHEST) + bias


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: two dense layers on the channel means."""

    ratio: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        means = nn.relu(Dense1x1(squeezed(channels, self.ratio), name="fc1")(x.mean((1, 2))))
        return x * nn.sigmoid(Dense1x1(channels, name="fc2")(means))[:, None, None]


class EfficientAttention(nn.Module):
    """Efficient channel attention (ECA): one short filter along the channel means."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        filtered = Filter(eca_size(x.shape[-1]), name="conv")(x.mean((1, 2)))
        return x * nn.sigmoid(filtered)[:, None, None]


class Filter(nn.Module):
    """A one-dimensional convolution along the channels, padded with zeros."""

    size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.zeros, (self.size, 1, 1), jnp.float32)
        kernel = kernel.astype(x.dtype)
        padded = jnp.pad(x, ((0, 0), (self.size // 2, self.size // 2)))
        taps = [padded[:, i : i + x.shape[1]] * kernel[i, 0, 0] for i in range(self.size)]
        return sum(taps[1:], start=taps[0])


def attention(config: ResNetConfig, name: str) -> nn.Module | None:
    """The attention module of a configuration; None without attention."""
    if config.attention == "se":
        return SqueezeExcite(config.se_ratio, name=name)
    return EfficientAttention(name=name) if config.attention == "eca" else None


class Downsample(Layers):
    """The projection shortcut of a block.

    Its parts are numbered as in torch: an average-pool before the convolution is number 0. In a
    pre-activation network it has no norm.
    """

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm) -> jax.Array:
        pooled = self.config.shortcut == "average"
        if pooled:
            if self.stride != 1:
                x = average_pool(x, padded=True)
            x = self.convolve("1", x, self.features, 1)
        else:
            size = self.config.shortcut_kernel if self.stride != 1 else 1
            x = self.convolve("0", x, self.features, size, self.stride)
        return x if self.config.preactivation else self.normalize(str(1 + pooled), x, norm)


class Block(Layers):
    """Base class of the residual blocks.

    Args:
        stage: 1 to 4.
        index: in the stage, from 0.
    """

    stage: int
    index: int

    @property
    def stride(self) -> int:
        """Stride of the block."""
        return self.config.stride(self.stage, self.index)

    @property
    def planes(self) -> int:
        """Output channels before expansion."""
        result: int = self.config.width * 2 ** (self.stage - 1)
        return result

    @property
    def convolved(self) -> int:
        """Stride of the convolutions; anti-aliased blocks lower the resolution by pooling."""
        return 1 if self.config.anti_alias else self.stride

    def lower(self, x: jax.Array) -> jax.Array:
        """Lowers the resolution by anti-aliased pooling where the block has a stride."""
        alias = self.config.anti_alias
        return anti_aliased(x, alias) if alias and self.stride != 1 else x

    def join(self, x: jax.Array, y: jax.Array, norm: Norm, factor: jax.Array | None) -> jax.Array:
        """Adds the shortcut of the input ``x`` to the output ``y``, times ``factor``."""
        if (scaled := attention(self.config, "se")) is not None:
            y = scaled(y)
        if self.config.has_shortcut(self.stage, self.index):
            x = self.downsample(x, norm)
        if x.shape != y.shape:
            raise ValueError(
                f"at {'/'.join(self.path)} the shortcut has {x.shape[1]}x{x.shape[2]} positions "
                f"and the block {y.shape[1]}x{y.shape[2]}: with average anti-aliasing, the sides "
                "of images must be multiples of 32"
            )
        return nn.relu(x + (y if factor is None else y * factor))

    def downsample(self, x: jax.Array, norm: Norm) -> jax.Array:
        """Projects ``x`` to the shape of the block's output."""
        features = self.planes * self.config.expansion
        parts = (self.dtype, self.convolution, self.config, features, self.stride)
        return Downsample(*parts, name="downsample")(x, norm)


class Basic(Block):
    """Basic block: two 3x3 convolutions; the first one has the stride."""

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm, factor: jax.Array | None = None) -> jax.Array:
        y = self.convolve("conv1", x, self.planes // self.config.reduce_first, 3, self.convolved)
        y = self.lower(nn.relu(self.normalize("bn1", y, norm)))
        y = self.convolve("conv2", y, self.planes, 3)
        y = self.normalize("bn2", y, norm)
        return self.join(x, y, norm, factor)


class Bottleneck(Block):
    """Bottleneck block: 1x1, 3x3 and 1x1 convolutions; one of the first two has the stride."""

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm, factor: jax.Array | None = None) -> jax.Array:
        config = self.config
        inner = config.inner(self.stage)
        first, second = (self.stride, 1) if config.stride_in == "1x1" else (1, self.convolved)
        y = self.convolve("conv1", x, inner // config.reduce_first, 1, first)
        y = nn.relu(self.normalize("bn1", y, norm))
        y = self.convolve("conv2", y, inner, 3, second, config.groups)
        y = self.lower(nn.relu(self.normalize("bn2", y, norm)))
        y = self.convolve("conv3", y, 4 * self.planes, 1)
        y = self.normalize("bn3", y, norm)
        return self.join(x, y, norm, factor)


class Preactivated(Block):
    """Pre-activation block: norm and activation precede each convolution, and none follows."""

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm, factor: jax.Array | None = None) -> jax.Array:
        inner, stride = self.config.inner(self.stage), self.stride
        first = inner // self.config.reduce_first
        if self.config.block == "basic":
            layers = [(first, 3, stride, 1), (self.planes, 3, 1, 1)]
        else:
            layers = [
                (first, 1, 1, 1),
                (inner, 3, stride, self.config.groups),
                (4 * self.planes, 1, 1, 1),
            ]
        y = nn.relu(self.normalize("bn1", x, norm))
        if self.config.has_shortcut(self.stage, self.index):
            x = self.downsample(y, norm)
        elif stride != 1:
            x = x[:, ::stride, ::stride]
        for number, layer in enumerate(layers, start=1):
            if number > 1:
                y = nn.relu(self.normalize(f"bn{number}", y, norm))
            y = self.convolve(f"conv{number}", y, *layer)
        return x + (y if factor is None else y * factor)


def block_of(config: ResNetConfig) -> type[Block]:
    """The block class of a configuration."""
    if config.preactivation:
        return Preactivated
    return Basic if config.block == "basic" else Bottleneck


def segments_of(config: ResNetConfig) -> tuple[str, ...]:
    """Names of the segments, from input to output."""
    first = ("stem",) if config.adapter is None else ("adapter", "stem")
    stages = (f"layer{number}" for number in range(1, len(config.depths) + 1))
    return (*first, *stages, "pool", "head")


class InputAdapter(nn.Module):
    """The input adapter of n bands, in the dtype of the images."""

    adapter: Adapter

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shapes = adapters.shapes(self.adapter)
        # `Model.init` and `transfer` set the values.
        params = {
            name: self.param(name, nn.initializers.zeros, shape, jnp.float32)
            for name, shape in shapes.items()
        }
        return adapters.apply(self.adapter, params, x)


class DeepStem(Layers):
    """Deep stem: three 3x3 convolutions instead of one 7x7; the last norm follows outside.

    The convolutions are numbered as in torch, where norms and activations count.
    """

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm) -> jax.Array:
        first, second, third = self.config.stem_channels
        x = nn.relu(self.normalize("bn1", self.convolve("0", x, first, 3, 2), norm))
        x = nn.relu(self.normalize("bn4", self.convolve("3", x, second, 3), norm))
        return self.convolve("6", x, third, 3)


class Pool(Layers):
    """A convolution with stride 2 instead of the stem's max-pooling."""

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm) -> jax.Array:
        x = self.convolve("0", x, x.shape[-1], 3, 2)
        return nn.relu(self.normalize("bn1", x, norm))


class Stage(Layers):
    """The blocks of one resolution; after the last pre-activation block follows one more norm.

    A network that ends before layer4 has no such norm: nobody has trained one there.
    """

    number: int

    @nn.compact
    def __call__(
        self, x: jax.Array, norm: Norm, noise: Noise | None = None, remat: bool = False
    ) -> jax.Array:
        config = self.config
        kind = block_of(config)
        if remat:
            # What a block computes is not kept for the backward pass, but computed again there.
            kind = nn.remat(kind, static_argnums=(2,))
        for index in range(config.depths[self.number - 1]):
            parts = (self.dtype, self.convolution, config, self.number, index)
            factor = None if noise is None else noise.factor(f"layer{self.number}/{index}", x.dtype)
            x = kind(*parts, name=str(index))(x, norm, factor)
        if config.preactivation and self.number == 4:
            x = nn.relu(self.normalize("bn1", x, norm))
        return x


class Network(Layers):
    """The whole network; pooling and head compute in float32 for every dtype."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        norm: Norm,
        segments: tuple[str, ...] | None = None,
        noise: Noise | None = None,
        remat: bool = False,
    ) -> jax.Array:
        means: list[jax.Array] = []  # of earlier segments, for the head
        for segment in segments_of(self.config) if segments is None else segments:
            if segment == "adapter" and self.config.adapter is not None:
                x = InputAdapter(self.config.adapter, name="adapter")(x)
            elif segment == "stem":
                x = self._stem(x, norm)
            elif segment == "pool":
                means.append(_wide(x).mean((1, 2)))
                x = means[0] if len(means) == 1 else jnp.concatenate(means, axis=-1)
            elif segment == "head":
                # `Model.init` draws the kernel.
                head = nn.Dense(self.config.classes, kernel_init=nn.initializers.zeros, name="fc")
                x = head(_wide(x) if noise is None else noise.features(_wide(x)))
            else:
                number = int(segment.removeprefix("layer"))
                stage = Stage(self.dtype, self.convolution, self.config, number, name=segment)
                x = stage(x, norm, noise, remat)
            if segment in self.config.head_reads:
                means.append(_wide(x).mean((1, 2)))
        return x

    def _stem(self, x: jax.Array, norm: Norm) -> jax.Array:
        config, parts = self.config, (self.dtype, self.convolution, self.config)
        if config.stem == "plain":
            (channels,) = config.stem_channels
            x = self.convolve("conv1", x, channels, 7, 2, bias=config.stem_bias)
        else:
            x = DeepStem(*parts, name="conv1")(x, norm)
        if not config.preactivation:
            x = nn.relu(self.normalize("bn1", x, norm))
        if config.stem_pool == "zero-padded":
            return max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), padding=0)
        if config.stem_pool == "ceil":
            edges = ((0, 0), (0, 1), (0, 1), (0, 0))
            return max_pool(jnp.pad(x, edges, constant_values=-jnp.inf), padding=0)
        if config.stem_pool == "convolution":
            return Pool(*parts, name="maxpool")(x, norm)
        if config.anti_alias == "average":
            return average_pool(x)
        return blur_pool(max_pool(x, stride=1)) if config.anti_alias == "blur" else max_pool(x)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
