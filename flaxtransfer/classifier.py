"""Classifiers: a network with all that is needed to use it, and ``transfer``, which makes one."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flaxtransfer.models.adapters import change_input
from flaxtransfer.models.config import Adapter, Method
from flaxtransfer.models.layout import segment_of
from flaxtransfer.models.model import Model, shape_differences
from flaxtransfer.models.registry import resnet
from flaxtransfer.paths import Params, Variables, flatten, listing, suggest, unflatten
from flaxtransfer.task import SINGLE_LABEL, Task, Units
from flaxtransfer.weights.naming import published
from flaxtransfer.weights.preprocessing import Preprocessing
from flaxtransfer.weights.pretrained import Pretrained

__all__ = ["Classifier", "Head", "TransferReport", "ending_at", "transfer"]


Head = Literal["new", "keep", "resize"]


@dataclasses.dataclass(frozen=True)
class TransferReport:
    """Which leaves came from the checkpoint, which were changed, and which are new.

    Args:
        source: where the checkpoint came from.
        model: the name of the network.
        classes: outputs before and after.
        kept: leaves with the checkpoint's numbers, as "params/stem/kernel".
        adapted: leaves with some of the checkpoint's numbers.
        new: leaves with none of them.
        sizes: how many numbers each leaf holds.
        input: how images of other bands reach the stem; "" where they are RGB as before.
        head: how classes were matched with those of the pre-trained head; "" for a new one.

    >>> report = TransferReport("file", "resnet18", (10, 2), (), (), ("params/head/bias",),
    ...                         {"params/head/bias": 2})
    >>> print(report)
    resnet18 from file, 10 -> 2 classes
      new      params/head/bias                        2 numbers
    """

    source: str
    model: str
    classes: tuple[int, int]
    kept: tuple[str, ...]
    adapted: tuple[str, ...]
    new: tuple[str, ...]
    sizes: Mapping[str, int]
    input: str = ""
    head: str = ""

    def numbers(self, leaves: Iterable[str]) -> int:
        """How many numbers these leaves hold."""
        return sum(self.sizes[leaf] for leaf in leaves)

    def __str__(self) -> str:
        before, after = self.classes
        lines = [f"{self.model} from {self.source}, {before} -> {after} classes"]
        lines += [f"  input    {self.input}"] if self.input else []
        lines += [f"  head     {self.head}"] if self.head else []
        by_segment: dict[str, list[str]] = {}
        for leaf in self.kept:
            by_segment.setdefault(segment_of(leaf.split("/", 1)[1]), []).append(leaf)
        for segment, kept in by_segment.items():
            count = f"{len(kept)} {'leaf' if len(kept) == 1 else 'leaves'}"
            lines.append(_row("kept", segment, count, self.numbers(kept)))
        for state, leaves in (("adapted", self.adapted), ("new", self.new)):
            lines += [_row(state, leaf, "", self.sizes[leaf]) for leaf in leaves]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A network bound to its weights, its preprocessing, its classes and its task.

    ``transfer`` returns one, and training, evaluation, prediction, features, adaptation and export
    take one. It is a value: ``dataclasses.replace(network, variables=...)`` makes another.

    Args:
        model: the network as pure functions.
        variables: its parameters and statistics.
        preprocessing: what is done to an image before the network sees it.
        class_names: a name for each output, where they are known.
        task: what labels are, with the mean and scale of a regression's targets.
        report: which leaves came from where, for a network that ``transfer`` made.

    >>> import flaxtransfer as ft
    >>> model = ft.resnet(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=2, classes=3))
    >>> network = Classifier(model, model.init(jax.random.key(0)), ft.weights.IMAGENET)
    >>> network
    Classifier(resnet10w2, 3 classes, single_label)
    """

    model: Model
    variables: Variables
    preprocessing: Preprocessing
    class_names: tuple[str, ...] = ()
    task: Task = SINGLE_LABEL
    report: TransferReport | None = None

    @classmethod
    def of(cls, pretrained: Pretrained, *, dtype: Any = None) -> "Classifier":
        """Pre-trained weights as they are, their own head included."""
        return cls(
            resnet(pretrained.config, dtype=dtype),
            pretrained.variables,
            pretrained.preprocessing,
            pretrained.class_names or (),
            pretrained.task,
        )

    @property
    def params(self) -> Params:
        """The parameters, what masks and labels are resolved on."""
        params: Params = self.variables["params"]
        return params

    def with_variables(self, variables: Variables) -> "Classifier":
        """The same network with other parameters and statistics."""
        return dataclasses.replace(self, variables=variables)

    def on(self, mesh: Mesh) -> "Classifier":
        """The same network, compiled for the devices of a mesh; see ``Model.on``."""
        return dataclasses.replace(self, model=self.model.on(mesh))

    def __repr__(self) -> str:
        config = self.model.config
        return f"Classifier({config.name}, {config.classes} classes, {self.task.name})"


def ending_at(network: Classifier, segment: str | Sequence[str] | None) -> Classifier:
    """The network that ends at a segment: its head reads the mean of that output over pixels.

    What follows the segment is dropped, so that the network is smaller and faster in use, too. The
    head is zero, for the old one reads other features. A network that ends there already, and None,
    change nothing.

    Args:
        network: from ``transfer``, or made of a model and its weights; not changed.
        segment: its name, as in ``model.segments``; several, whose means the head reads all, and of
            which the network ends at the last; None for the network as it is.

    Raises:
        ValueError: no such segment, or one without a map.

    >>> import flaxtransfer as ft
    >>> model = ft.resnet(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=2, classes=3))
    >>> network = Classifier(model, model.init(jax.random.key(0)), ft.weights.IMAGENET)
    >>> short = ending_at(network, model.segments[2])
    >>> len(model.segments), len(short.model.segments)
    (7, 5)
    >>> short.params[model.layout.head]["kernel"].shape
    (4, 3)
    """
    config = network.model.config
    short = config if segment is None else config.ending_at(segment)
    if short == config:
        return network
    model = dataclasses.replace(network.model, config=short)
    leaves, head = flatten(network.variables), f"params/{model.layout.head}/"
    variables = {
        path: jnp.zeros(leaf.shape, leaf.dtype) if path.startswith(head) else leaves[path]
        for path, leaf in flatten(model.abstract()).items()
    }
    whole = {"params": {}, "batch_stats": {}, **unflatten(variables)}
    return dataclasses.replace(network, model=model, variables=whole, report=None)


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
    preprocessing: Preprocessing | None = None,
    class_names: Sequence[str] = (),
    task: Task | None = None,
) -> Classifier:
    """A network for new classes that starts from pre-trained weights.

    What becomes of the head is said, and not read off whether shapes happen to fit: ten new
    classes are not the ten old ones.

    Images of n bands come as `band_preprocessing` makes them, centered and in the scale of the
    checkpoint's preprocessing, except where a gray image is replicated. What enters the stem then
    has the contrast that a replicated gray image has, and by `patches` that of photographs.

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
            sensor in `published.SENSORS`; an adapter then starts with the visible ones as red,
            green and blue, or as whatever bands the checkpoint says that its stem takes.
        patches: [patches, bands] of normalized training images (`band_patches`); an adapter then
            starts with their main components where photographs have theirs, by least squares.
        head: "new" starts afresh; "keep" takes the pre-trained head, for the same classes;
            "resize" takes its columns for those classes that it knows, and zero for others.
            Columns are matched by name, in whatever order; by position only where the checkpoint
            or ``class_names`` names no classes, and the report says so.
        seed: of a fresh head that is not zero.
        zero_head: whether a fresh head is zero, so that training starts from equal odds and the
            first gradients are the head's alone; else uniform within 1 / sqrt(features).
        dtype: of the computation; None is that of the parameters, which are float32 always.
        preprocessing: of the images, where it is not the checkpoint's: for other bands, that of
            `band_preprocessing`.
        class_names: a name for each output.
        task: what labels are; None for one class per image with a new head, and for what the
            checkpoint says otherwise.

    Returns:
        The network; its variables are nested dictionaries of float32 `jax.Array`, and its report
        says which leaves were kept, adapted and new.

    Raises:
        ValueError: "keep" for other classes, "resize" for none that the head knows, either where
            the file has no head that is one linear map, an unknown `head`, classes below 1,
            a kept head of another task, another number of names than classes, bands, adapter,
            wavelengths and patches that do not fit each other or the network, or a checkpoint whose
            leaves do not form its network.

    >>> import numpy as np
    >>> from flaxtransfer.models.config import ResNetConfig
    >>> from flaxtransfer.weights import IMAGENET
    >>> tiny = ResNetConfig(depths=(1, 1, 1, 1), width=2, classes=9)
    >>> zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), resnet(tiny).abstract())
    >>> network = transfer(Pretrained(zeros, tiny, IMAGENET), classes=3)
    >>> network.params[network.model.layout.head]["kernel"].shape, len(network.report.new)
    ((16, 3), 2)
    """
    if head not in get_args(Head):
        raise ValueError(
            f"head must be one of {', '.join(get_args(Head))}, got {head!r}"
            f"{suggest(str(head), get_args(Head))}"
        )
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
        raise ValueError(f"classes must be a positive integer, got {classes!r}")
    if class_names and len(class_names) != classes:
        raise ValueError(f"class_names must be {classes} names, got {len(class_names)}")
    old = checkpoint.config.classes
    if head == "keep" and not class_names and checkpoint.class_names and classes == old:
        class_names = checkpoint.class_names
    columns = _columns(head, checkpoint, classes, tuple(class_names))
    task = _task(head, checkpoint, task, columns)
    if isinstance(wavelengths, str):
        wavelengths = published.wavelengths(wavelengths)
    leaves = flatten(checkpoint.variables)
    change = change_input(
        checkpoint.config,
        leaves.get(f"params/{checkpoint.config.first_kernel}"),
        bands=bands,
        method=adapter,
        wavelengths=wavelengths,
        patches=patches,
        stem_wavelengths=checkpoint.preprocessing.wavelengths,
        stem_std=checkpoint.preprocessing.std,
    )
    leaves |= {**change.adapted, **change.new}
    config = dataclasses.replace(change.config, classes=classes)
    model = resnet(config, dtype=dtype)
    adapted: tuple[str, ...] = tuple(change.adapted)
    new: tuple[str, ...] = tuple(change.new)
    bias, kernel = (f"params/{model.layout.head}/{name}" for name in ("bias", "kernel"))
    if head == "new":
        new += (bias, kernel)
        fresh = _fresh_kernel(config.features, classes, seed, zero_head)
        leaves |= {kernel: fresh, bias: jnp.zeros((classes,), jnp.float32)}
    elif columns != tuple(range(old)):
        adapted += (bias, kernel)
        leaves |= {leaf: _taken(jnp.asarray(leaves[leaf]), columns) for leaf in (bias, kernel)}

    expected = flatten(model.abstract())
    problems = shape_differences(leaves, {path: leaf.shape for path, leaf in expected.items()})
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
        head=_head_text(head, checkpoint, columns, tuple(class_names)),
    )
    return Classifier(
        model,
        unflatten(arrays),
        preprocessing or checkpoint.preprocessing,
        tuple(class_names),
        task,
        report,
    )


def _fresh_kernel(features: int, classes: int, seed: int, zero: bool) -> jax.Array:
    if zero:
        return jnp.zeros((features, classes), jnp.float32)
    bound = 1 / math.sqrt(features)
    return jax.random.uniform(
        jax.random.key(seed), (features, classes), jnp.float32, minval=-bound, maxval=bound
    )


def _columns(
    head: Head, checkpoint: Pretrained, classes: int, names: tuple[str, ...]
) -> tuple[int | None, ...]:
    """For each class, its column of the pre-trained head; None for one that it does not know."""
    old, known = checkpoint.config.classes, checkpoint.class_names or ()
    if head == "new":
        return (None,) * classes
    if checkpoint.no_head:
        raise ValueError(
            f"head must be 'new' for {checkpoint.source}, got {head!r}: {checkpoint.no_head}"
        )
    if not (names and known):
        if head == "keep" and classes != old:
            raise ValueError(
                f"head='keep' keeps the {old} classes of {checkpoint.source}, and classes={classes}"
                " was asked for; use head='new', or head='resize' if the first classes are the same"
            )
        return tuple(n if n < old else None for n in range(classes))
    place = {name: number for number, name in enumerate(known)}
    unknown = [name for name in names if name not in place]
    missing = [name for name in known if name not in names]
    if head == "keep" and (unknown or missing):
        texts = [f"does not know {listing(map(repr, unknown))}"] if unknown else []
        texts += [f"also has {listing(map(repr, missing))}"] if missing else []
        raise ValueError(
            f"head='keep' must have the classes of {checkpoint.source}, whose head "
            f"{' and '.join(texts)}; use head='resize' to keep those of the same name, or 'new'"
        )
    if len(unknown) == len(names):
        raise ValueError(
            f"head='resize' must keep at least one class, and the head of {checkpoint.source} knows"
            f" none of {listing(map(repr, names))}; it has {listing(map(repr, known))}; use 'new'"
        )
    return tuple(place.get(name) for name in names)


def _task(
    head: Head, checkpoint: Pretrained, task: Task | None, columns: tuple[int | None, ...]
) -> Task:
    """The task of the network: a kept head goes on with the checkpoint's, units included."""
    own = checkpoint.task
    if head == "new":
        return task or SINGLE_LABEL
    if task is not None and task.name != own.name:
        raise ValueError(
            f"head={head!r} must go on with the task of {checkpoint.source}, {own.name}, got "
            f"{task.name}; use head='new'"
        )
    if own.units is None:
        return task or own
    if None in columns:
        raise ValueError(
            f"head={head!r} must have the targets of {checkpoint.source}, whose units it keeps; "
            "use head='new'"
        )
    places = [column for column in columns if column is not None]
    mean, scale = (tuple(each[n] for n in places) for each in (own.units.mean, own.units.scale))
    return (task or own).with_units(Units(mean, scale))


def _head_text(
    head: Head, checkpoint: Pretrained, columns: tuple[int | None, ...], names: tuple[str, ...]
) -> str:
    if head == "new":
        return ""
    if not (names and checkpoint.class_names):
        return "classes are matched by position, for they have no names on both sides"
    fresh = [name for name, column in zip(names, columns, strict=True) if column is None]
    gone = [name for name in checkpoint.class_names if name not in names]
    text = f"{len(names) - len(fresh)} classes are matched by name"
    text += f"; new and zero: {listing(fresh)}" if fresh else ""
    return text + (f"; left out: {listing(gone)}" if gone else "")


def _taken(leaf: jax.Array, columns: tuple[int | None, ...]) -> jax.Array:
    """These columns of a leaf; zero where there is none."""
    taken = leaf[..., jnp.array([0 if column is None else column for column in columns])]
    return jnp.where(jnp.array([column is not None for column in columns]), taken, 0)
