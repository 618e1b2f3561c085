"""Pre-trained weights: the value, its header in a file, and saving it.

A ``Pretrained`` holds numpy arrays, the network's configuration, the preprocessing, the class names
and the task. ``write_header`` and ``read_header`` convert everything but the arrays to and from the
metadata of a safetensors file. ``save`` writes one that this package, torchvision and timm load
strictly; ``fold_adapter`` first removes a linear input adapter, which other programs do not have.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flaxtransfer.files import atomic_write, parse_json, write_file
from flaxtransfer.models.adapters import fold
from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.models.model import leaf_shapes, shape_differences
from flaxtransfer.paths import Variables, flatten, shortened, unflatten
from flaxtransfer.task import SINGLE_LABEL, Task, Units, task_named
from flaxtransfer.weights.naming import key_map
from flaxtransfer.weights.naming.native import HEADER_KEY
from flaxtransfer.weights.naming.timm import table_for
from flaxtransfer.weights.preprocessing import Preprocessing
from flaxtransfer.weights.readers import array_files

__all__ = ["Header", "Pretrained", "fold_adapter", "read_header", "save", "write_header"]


class _Digest:
    """A text, or a function that waits for it: called once, when the text is first read."""

    def __get__(self, instance: Pretrained | None, owner: type) -> str:
        if instance is None:
            return ""  # the default
        held = vars(instance)["sha256"]
        if callable(held):
            held = vars(instance)["sha256"] = held()
        text: str = held
        return text

    def __set__(self, instance: Pretrained, given: str | Callable[[], str]) -> None:
        vars(instance)["sha256"] = given


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pretrained:
    """Pre-trained weights with the metadata that is needed to use them.

    ``load`` reads one from a file and ``save`` writes one. It holds numpy arrays, so that it can be
    read and written without a device. ``transfer`` converts it to a model for your classes.

    Args:
        variables: {"params": ..., "batch_stats": ...}, nested dictionaries of float32 arrays;
            kernels are [height, width, in, out] and [in, out]. Those that ``load`` gives may be
            views of the bytes of the file, and then cannot be written to.
        config: configuration of the network.
        preprocessing: how an image is prepared for these weights.
        source: where the weights came from, for a person to read.
        format: the naming of the file, a name in ``formats.FORMATS``.
        sha256: checksum of the file in hexadecimal; "" for weights that are not from a file. A
            function that gives it is called when it is first read: ``load`` returns before the
            checksum of the bytes is complete, and what goes wrong with it is raised then.
        class_names: a name per output of the head; None if unknown.
        task: what the outputs of the head mean; one class per image where no file says it.
        notes: what was changed or assumed (conversions, prefixes, preprocessing).
        no_head: why the head is one output that is always 0; "" for a head from the file.

    Raises:
        ValueError: class names or preprocessing that do not fit the config.
    """

    variables: Variables
    config: ResNetConfig
    preprocessing: Preprocessing
    source: str = "memory"
    format: str = "torchvision"
    sha256: _Digest = _Digest()
    class_names: tuple[str, ...] | None = None
    task: Task = SINGLE_LABEL
    notes: tuple[str, ...] = ()
    no_head: str = ""

    def __post_init__(self) -> None:
        if self.class_names is not None:
            object.__setattr__(self, "class_names", tuple(self.class_names))
            if len(self.class_names) != self.config.classes:
                raise ValueError(
                    f"class_names must have {self.config.classes} names, one per output, got "
                    f"{len(self.class_names)} ({self.source})"
                )
        if len(self.preprocessing.mean) != self.config.bands:
            raise ValueError(
                f"preprocessing must have {self.config.bands} channels, as the network has, got "
                f"{len(self.preprocessing.mean)} ({self.source})"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "sha256": self.sha256}  # a copy holds the text

    def __repr__(self) -> str:
        parameters = sum(int(np.size(leaf)) for leaf in flatten(self.variables["params"]).values())
        return (
            f"Pretrained({self.config.name}, {self.config.classes} classes, "
            f"{self.config.bands} channels, {parameters:,} parameters, "
            f"{self.format} names, from {self.source!r}, sha256 {self.sha256[:8] or 'none'})"
        )


HEADER_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Header:
    """The metadata of pre-trained weights in a file header."""

    config: ResNetConfig
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    task: Task = SINGLE_LABEL
    no_head: str = ""


def write_header(checkpoint: Pretrained) -> dict[str, str]:
    """Metadata for a safetensors header; other readers require "format"."""
    content = {
        "version": HEADER_VERSION,
        "config": checkpoint.config.to_json(),
        "preprocessing": checkpoint.preprocessing.to_json(),
        "class_names": checkpoint.class_names,
        "task": checkpoint.task.name,
    } | ({"no_head": checkpoint.no_head} if checkpoint.no_head else {})
    if checkpoint.task.units is not None:
        content["targets"] = dataclasses.asdict(checkpoint.task.units)
    return {"format": "pt", HEADER_KEY: json.dumps(content, sort_keys=True)}


def read_header(metadata: Mapping[str, str]) -> Header | None:
    """Reads the header that ``write_header`` wrote; None for files of other programs.

    Raises:
        ValueError: a header that is damaged or has a later version.
    """
    if HEADER_KEY not in metadata:
        return None
    try:
        content: dict[str, Any] = parse_json(metadata[HEADER_KEY].encode(), "it")
        version = content["version"]
        if version != HEADER_VERSION:
            raise ValueError(
                f"version must be {HEADER_VERSION} for this flaxtransfer, got {version!r}; install "
                f"a "
                "newer release"
            )
        names, targets = content["class_names"], content.get("targets")
        if names is not None and not _are_names(names):
            raise ValueError(f"class_names must be a list of names, got {names!r}")
        task = task_named(content.get("task", SINGLE_LABEL.name))
        config = ResNetConfig.from_json(content["config"])
        if targets is not None:
            task = task.with_units(Units(targets["mean"], targets["scale"]))
            if not task.standardizes or len(targets["mean"]) != config.classes:
                raise ValueError(
                    f"targets must be those of a regression of {config.classes} outputs, got "
                    f"{len(targets['mean'])} for the task {task.name}"
                )
        return Header(
            config,
            Preprocessing.from_json(content["preprocessing"]),
            None if names is None else tuple(names),
            task,
            str(content.get("no_head", "")),
        )
    except (ValueError, KeyError, TypeError) as error:
        reason = shortened(f"missing {error}" if isinstance(error, KeyError) else str(error), 400)
        raise ValueError(f"the flaxtransfer header of the file is invalid: {reason}") from error


def _are_names(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def fold_adapter(checkpoint: Pretrained) -> Pretrained:
    """Folds the linear adapter of a checkpoint into the stem's kernel.

    Use it before export to a program without adapters, such as torchvision, whose ``conv1`` then
    takes the n bands. The images are normalized before the adapter, and the adapter has no bias, so
    the folded network is the same function up to rounding, including at the borders.

    Args:
        checkpoint: with or without an adapter; without one it is returned unchanged.

    Returns:
        A checkpoint of the network whose stem takes the bands.

    Raises:
        ValueError: an adapter with tone curves, which is not linear.

    >>> from flaxtransfer.weights import load
    >>> plain = load("builtin")
    >>> fold_adapter(plain) is plain
    True
    """
    adapter = checkpoint.config.adapter
    if adapter is None:
        return checkpoint
    params = dict(checkpoint.variables["params"])
    own = params.pop("adapter")
    flat, first = flatten(params), checkpoint.config.first_kernel
    params = unflatten({**flat, first: np.asarray(fold(own, flat[first]))})
    return dataclasses.replace(
        checkpoint,
        variables={**checkpoint.variables, "params": params},
        config=dataclasses.replace(checkpoint.config, in_channels=adapter.bands, adapter=None),
        sha256="",
        notes=(
            *checkpoint.notes,
            f"a linear adapter of {adapter.bands} bands was folded into the stem",
        ),
    )


DTYPES = ("float32", "float16")


def save(path: str | os.PathLike[str], checkpoint: Pretrained, dtype: Any = np.float32) -> str:
    """Saves weights, configuration, preprocessing and class names in one ``.safetensors`` file.

    The names and axes are torchvision's, so that
    ``torchvision.models.resnet50().load_state_dict(..., strict=True)`` accepts them, or timm's for
    networks that only timm has. An input adapter has no name there; ``fold_adapter`` first folds a
    linear one into the stem. The write is atomic, and the same checkpoint gives the same bytes.

    Args:
        path: of the file, in an existing folder. An existing file is replaced.
        checkpoint: the weights to write, as numpy or JAX arrays.
        dtype: float32, or float16 for half the size.

    Returns:
        The sha256 of the file in hexadecimal.

    Raises:
        ValueError: another suffix or dtype, leaves that do not form the checkpoint's network, or
            numbers that are not finite in the dtype.
        FileNotFoundError: the folder does not exist.

    >>> import tempfile
    >>> from flaxtransfer.models.config import ResNetConfig
    >>> from flaxtransfer.paths import unflatten
    >>> from flaxtransfer.weights.preprocessing import IMAGENET
    >>> tiny = ResNetConfig(depths=(1, 1, 1, 1), width=2, classes=2)
    >>> ones = unflatten({path: np.ones(s, np.float32) for path, s in leaf_shapes(tiny).items()})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     digest = save(f"{folder}/tiny.safetensors", Pretrained(ones, tiny, IMAGENET))
    >>> len(digest)
    64
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path.name!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} for {path.name} does not exist")
    try:
        kind = np.dtype(dtype).name
    except TypeError:
        kind = str(dtype)
    if kind not in DTYPES:
        raise ValueError(f"dtype must be {' or '.join(DTYPES)}, got {kind}")

    leaves = {name: np.asarray(leaf) for name, leaf in flatten(checkpoint.variables).items()}
    problems = shape_differences(leaves, leaf_shapes(checkpoint.config))
    if problems:
        raise ValueError(
            f"the variables do not fit {checkpoint.config.name}:\n  " + "\n  ".join(problems)
        )
    with np.errstate(over="ignore"):
        leaves = {name: leaf.astype(kind) for name, leaf in leaves.items()}
    broken = [name for name, leaf in leaves.items() if not np.isfinite(leaf).all()]
    if broken:
        raise ValueError(
            f"variables must be finite as {kind}, got NaN or infinite numbers in: {broken}"
        )
    data = array_files.write_safetensors(
        key_map.to_keys(table_for(checkpoint.config), leaves), write_header(checkpoint)
    )
    with atomic_write(path) as made:
        write_file(made, data)
    return hashlib.sha256(data).hexdigest()
