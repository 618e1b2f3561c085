"""Pre-trained weights into a model with the head that the new task needs."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from flaxtransfer.models.config import Adapter
from flaxtransfer.models.input_channels import Method, change_input
from flaxtransfer.models.model import Model
from flaxtransfer.models.registry import resnet
from flaxtransfer.paths import flatten, segment_of, suggest, unflatten
from flaxtransfer.types import Variables
from flaxtransfer.weights.infer import differences
from flaxtransfer.weights.naming import torchgeo
from flaxtransfer.weights.pretrained import Pretrained

__all__ = ["Head", "TransferReport", "transfer"]


Head = Literal["new", "keep", "resize"]

_KERNEL = "params/fc/kernel"
_BIAS = "params/fc/bias"


@dataclasses.dataclass(frozen=True)
class TransferReport:
    """Which leaves came from the checkpoint, which were changed, and which are new.

    Args:
        source: where the checkpoint came from.
        model: the name of the network.
        classes: outputs before and after.
        kept: leaves with the checkpoint's numbers, as "params/conv1/kernel".
        adapted: leaves with some of the checkpoint's numbers.
        new: leaves with none of them.
        sizes: how many numbers each leaf holds.
        input: how images of other bands reach the stem; "" where they are RGB as before.

    >>> sizes = {"params/conv1/kernel": 9408, "params/fc/bias": 2}
    >>> kept, adapted, new = ("params/conv1/kernel",), (), ("params/fc/bias",)
    >>> report = TransferReport("file", "resnet18", (10, 2), kept, adapted, new, sizes)
    >>> print(report)
    resnet18 from file, 10 -> 2 classes
      kept     stem                  1 leaf        9,408 numbers
      new      params/fc/bias                          2 numbers
    """

    source: str
    model: str
    classes: tuple[int, int]
    kept: tuple[str, ...]
    adapted: tuple[str, ...]
    new: tuple[str, ...]
    sizes: Mapping[str, int]
    input: str = ""

    def numbers(self, leaves: Iterable[str]) -> int:
        """How many numbers these leaves hold."""
        return sum(self.sizes[leaf] for leaf in leaves)

    def __str__(self) -> str:
        before, after = self.classes
        lines = [f"{self.model} from {self.source}, {before} -> {after} classes"]
        lines += [f"  input    {self.input}"] if self.input else []
        by_segment: dict[str, list[str]] = {}
        for leaf in self.kept:
            by_segment.setdefault(segment_of(leaf.split("/", 1)[1]), []).append(leaf)
        for segment, kept in by_segment.items():
            count = f"{len(kept)} {'leaf' if len(kept) == 1 else 'leaves'}"
            lines.append(_row("kept", segment, count, self.numbers(kept)))
        for state, leaves in (("adapted", self.adapted), ("new", self.new)):
            lines += [_row(state, leaf, "", self.sizes[leaf]) for leaf in leaves]
        return "\n".join(lines)


def _row(state: str, what: str, count: str, numbers: int) -> str:
    return f"  {state:<8} {what:<17} {count:>10} {numbers:>12,} numbers"


def transfer(
    checkpoint: Pretrained,
    *,
    classes: int,
    bands: int | None = None,
    adapter: Method | Adapter | None = None,
    wavelengths: Sequence[float] | str | None = None,
    patches: Any = None,
    head: Head = "new",
    seed: int = 0,
    zero_head: bool = True,
    dtype: Any = None,
) -> tuple[Model, Variables, TransferReport]:
    """A model for a new task that starts from a checkpoint.

    What becomes of the head is said, and not read off whether shapes happen to fit: ten new
    classes are not the ten old ones.

    Images of n bands come normalized band by band, by their own statistics
    (`band_preprocessing`), except where a gray image is replicated.

    Args:
        checkpoint: from `load`.
        classes: outputs of the new head.
        bands: channels of the images; None for what the checkpoint takes.
        adapter: "linear", a learnable 1x1 convolution before the stem, is the default for other
            bands than the checkpoint's; "curves" adds tone curves to it, so that the three
            channels can show different content of one gray band; "sum", "average" and "repeat"
            change the stem's kernel instead, and "replicate" copies gray to three channels. Or
            an `Adapter` with knots and span of your own.
        wavelengths: center of each band in nm, in the order of the bands, or the name of their
            sensor in `torchgeo.SENSORS`; an adapter then starts with the visible ones as red,
            green and blue, or as whatever bands the checkpoint says that its stem takes.
        patches: [patches, bands] of normalized training images (`band_patches`); an adapter then
            starts with their main components where photographs have theirs, by least squares.
        head: "new" starts afresh; "keep" takes the pre-trained head, for the same classes in the
            same order; "resize" takes its first columns, for a list of classes that was
            lengthened or shortened at its end (further columns are zero).
        seed: of a fresh head that is not zero.
        zero_head: whether a fresh head is zero, so that training starts from equal odds and the
            first gradients are the head's alone; else uniform within 1 / sqrt(features).
        dtype: of the computation; None is that of the parameters, which are float32 always.

    Returns:
        The model, its variables (nested dictionaries of float32 `jax.Array`) and the report.

    Raises:
        ValueError: "keep" for another number of classes, an unknown `head`, classes below 1,
            bands, adapter, wavelengths and patches that do not fit each other or the network, or
            a checkpoint whose leaves do not form its network.

    >>> import numpy as np
    >>> from flaxtransfer.models.config import ResNetConfig
    >>> from flaxtransfer.weights import IMAGENET
    >>> tiny = ResNetConfig(depths=(1, 1, 1, 1), width=2, classes=9)
    >>> zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), resnet(tiny).abstract())
    >>> _, variables, report = transfer(Checkpoint(zeros, tiny, IMAGENET), classes=3)
    >>> variables["params"]["fc"]["kernel"].shape, report.new
    ((16, 3), ('params/fc/bias', 'params/fc/kernel'))
    """
    if head not in get_args(Head):
        raise ValueError(
            f"head must be one of {', '.join(get_args(Head))}, not {head!r}"
            f"{suggest(str(head), get_args(Head))}"
        )
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
        raise ValueError(f"classes must be a positive integer, not {classes!r}")
    old = checkpoint.config.classes
    if head == "keep" and classes != old:
        raise ValueError(
            f"head='keep' keeps the {old} classes of {checkpoint.source}, and classes={classes} "
            "was asked for; use head='new', or head='resize' if the first classes are the same"
        )
    if isinstance(wavelengths, str):
        wavelengths = torchgeo.wavelengths(wavelengths)
    leaves = flatten(checkpoint.variables)
    change = change_input(
        checkpoint.config,
        leaves.get(f"params/{checkpoint.config.first_kernel}"),
        bands=bands,
        way=adapter,
        wavelengths=wavelengths,
        patches=patches,
        stem_wavelengths=checkpoint.preprocessing.wavelengths,
    )
    leaves |= {**change.adapted, **change.new}
    config = dataclasses.replace(change.config, classes=classes)
    model = resnet(config, dtype=dtype)
    adapted: tuple[str, ...] = tuple(change.adapted)
    new: tuple[str, ...] = tuple(change.new)
    if head == "new":
        new += (_BIAS, _KERNEL)
        leaves |= _fresh_head(config.features, classes, seed, zero_head)
    elif head == "resize" and classes != old:
        adapted += (_BIAS, _KERNEL)
        leaves |= {leaf: _resized(jnp.asarray(leaves[leaf]), classes) for leaf in (_BIAS, _KERNEL)}

    expected = flatten(model.abstract())
    problems = differences(leaves, {path: leaf.shape for path, leaf in expected.items()})
    if problems:
        raise ValueError(
            f"the leaves of {checkpoint.source} do not form {config.name}:\n  "
            + "\n  ".join(problems)
        )
    # A copy: the arrays of a checkpoint are the caller's, and training gives its buffers away.
    arrays = {path: jnp.array(leaves[path], jnp.float32) for path in expected}
    report = TransferReport(
        source=checkpoint.source,
        model=config.name,
        classes=(old, classes),
        kept=tuple(path for path in arrays if path not in (*adapted, *new)),
        adapted=adapted,
        new=new,
        sizes={path: array.size for path, array in arrays.items()},
        input=change.text,
    )
    return model, unflatten(arrays), report


def _fresh_head(features: int, classes: int, seed: int, zero: bool) -> dict[str, jax.Array]:
    kernel = jnp.zeros((features, classes), jnp.float32)
    if not zero:
        bound = 1 / math.sqrt(features)
        kernel = jax.random.uniform(
            jax.random.key(seed), kernel.shape, jnp.float32, minval=-bound, maxval=bound
        )
    return {_KERNEL: kernel, _BIAS: jnp.zeros((classes,), jnp.float32)}


def _resized(leaf: jax.Array, classes: int) -> jax.Array:
    kept = leaf[..., :classes]
    return jnp.pad(kept, [(0, 0)] * (leaf.ndim - 1) + [(0, classes - kept.shape[-1])])
