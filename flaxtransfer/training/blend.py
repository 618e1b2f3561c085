"""The rows of a training step: blended with one another (MixUp, CutMix), and taken in parts.

Both are in the compiled step, so that labels stay labels until the loss.

References: H. Zhang, M. Cisse, Y. N. Dauphin, D. Lopez-Paz, "mixup: Beyond Empirical Risk
Minimization", 2018. S. Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers
with Localizable Features", 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxtransfer.data.loader import Batch
from flaxtransfer.paths import Params


class Part(NamedTuple):
    """The rows of a batch that are computed at once.

    Args:
        image: [rows, height, width, channels], or activations.
        label: [rows, ...].
        rows: which rows of the batch they are, int [rows].
        other_image: what each image is blended with; None for nothing.
        other_label: its label.
    """

    image: jax.Array
    label: jax.Array
    rows: jax.Array
    other_image: jax.Array | None = None
    other_label: jax.Array | None = None


def whole_batch(batch: Batch, rows: np.ndarray, *, blended: bool) -> Part:
    """The batch, each example beside the one that it is blended with: that of the mirrored row.

    Orders are random, so that this is as good as another draw, and no example meets itself, but for
    the one in the middle of an odd batch.

    Args:
        batch: placed.
        rows: from ``batch_rows``.
        blended: whether there are others.
    """
    image, label = batch["image"], batch["label"]
    if not blended:
        return Part(image, label, jnp.asarray(rows))
    # Where rows are in order, devices then exchange their halves instead of gathering all.
    in_order = np.array_equal(rows, np.arange(len(rows)))
    others = slice(None, None, -1) if in_order else np.argsort(rows)[len(rows) - 1 - rows]
    return Part(image, label, jnp.asarray(rows), image[others], label[others])


def resized_shape(shape: Sequence[int], side: int | None) -> tuple[int, ...]:
    """The shape of images [batch, height, width, channels] of this side; None leaves it.

    >>> resized_shape((2, 8, 8, 3), 4)
    (2, 4, 4, 3)
    """
    return tuple(shape) if side is None else (shape[0], side, side, shape[3])


class Blend(NamedTuple):
    """How two images become one: by their values (MixUp), or by a rectangle (CutMix).

    Args:
        own: share of each image's own label.
        value: share of its own values outside of the rectangle.
        other: bool [height, width, 1], the rectangle, in which the other image is.
    """

    own: jax.Array
    value: jax.Array
    other: jax.Array

    def of(self, own: jax.Array, other: jax.Array) -> jax.Array:
        """Blends what belongs to the labels, [batch, ...]."""
        return self.own * own + (1 - self.own) * other

    def images(self, own: jax.Array, other: jax.Array) -> jax.Array:
        """Blends images [batch, height, width, channels]."""
        return jnp.where(self.other, other, self.value * own + (1 - self.value) * other)


def draw_blend(key: jax.Array, mixup: float, cutmix: float, size: Sequence[int]) -> Blend:
    """The blend of one step.

    Args:
        key: of this draw.
        mixup: alpha of MixUp, or 0.
        cutmix: alpha of CutMix, or 0; with both, each is drawn with probability 1/2.
        size: height and width of the images, in px.

    >>> blend = draw_blend(jax.random.key(0), 0.0, 1.0, (8, 8))
    >>> float(blend.own) == 1 - float(blend.other.mean())
    True
    """
    choose, first, second, *places = jax.random.split(key, 5)
    cuts = jnp.asarray(cutmix > 0)
    if mixup and cutmix:
        cuts = jax.random.bernoulli(choose)
    value = jax.random.beta(first, mixup, mixup) if mixup else jnp.ones(())
    area = jax.random.beta(second, cutmix, cutmix) if cutmix else jnp.ones(())
    center = [jax.random.randint(k, (), 0, n) for k, n in zip(places, size, strict=True)]
    box = cuts & cut_out(1 - area, center, size)
    return Blend(jnp.where(cuts, 1 - box.mean(), value), jnp.where(cuts, 1.0, value), box)


def cut_out(share: jax.Array, center: Sequence[Any], size: Sequence[int]) -> jax.Array:
    """CutMix's rectangle, bool [height, width, 1]: cut off at the edges of the image.

    Args:
        share: of the area, before it is cut off.
        center: row and column, in px.
        size: height and width of the image, in px.

    >>> int(cut_out(jnp.asarray(0.25), (4, 4), (8, 8)).sum())
    16
    """
    inside = []
    for middle, length in zip(center, size, strict=True):
        side = (length * jnp.sqrt(share)).astype(int)
        place = jnp.arange(length) - (middle - side // 2)
        inside.append((place >= 0) & (place < side))
    rows, columns = inside
    rectangle: jax.Array = rows[:, None, None] & columns[:, None]
    return rectangle


def accumulated(
    differentiate: Callable[..., Any],
    batch_stats: Params,
    whole: Part,
    parts: int,
    key: jax.Array,
    *,
    unrolled: bool,
) -> tuple[Params, tuple[jax.Array, jax.Array, Any]]:
    """Statistics after all parts of a batch, and the means of loss, score and gradient.

    A part takes every ``parts``-th row, so that a batch that is split over devices stays where it
    is.

    Args:
        differentiate: ``(batch_stats, part, key) -> ((loss, (batch_stats, score)), gradient)``.
        batch_stats: before the step.
        whole: the batch.
        parts: how many.
        key: of the loss, from which each part gets its own.
        unrolled: whether the parts are written out: on the CPU a loop with convolutions is slow.

    Raises:
        ValueError: the batch cannot be divided into as many parts.
    """
    count = len(whole.label)
    if count % parts:
        raise ValueError(f"accumulate must divide the batch size {count}, got {parts}")

    def divided(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(count // parts, parts, *leaf.shape[1:]).swapaxes(0, 1)

    def body(carry: Any, given: tuple[Part, jax.Array]) -> tuple[Any, None]:
        stats, sums = carry
        part, number = given
        part = part._replace(image=after(part.image, sums))
        (loss, (stats, score)), gradient = differentiate(
            stats, part, jax.random.fold_in(key, number)
        )
        return (stats, jax.tree.map(jnp.add, sums, (loss, score, gradient))), None

    given = jax.tree.map(divided, whole), jnp.arange(parts)
    first = jax.tree.map(lambda leaf: leaf[0], given)
    shapes = jax.eval_shape(lambda: differentiate(batch_stats, first[0], key))
    (loss, (_, score)), gradient = shapes
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (loss, score, gradient))
    (stats, sums), _ = jax.lax.scan(
        body, (batch_stats, zeros), given, unroll=parts if unrolled else 1
    )
    return stats, jax.tree.map(lambda leaf: leaf / parts, sums)


def after(images: jax.Array, sums: Any) -> jax.Array:
    """The images, as a result of what has to be computed before them.

    A compiler may take independent parts at the same time, which then take their memory at the same
    time. (``optimization_barrier`` says it more plainly, and is dropped on the CPU.)
    """
    none = sum(jnp.minimum(jnp.abs(leaf.ravel()[0]), 0) for leaf in jax.tree.leaves(sums))
    return images + jnp.asarray(none).astype(images.dtype)
