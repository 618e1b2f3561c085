"""Pre-trained weights as a value, and the header that carries it in a file.

A pre-trained network as a value: its arrays, its shape, and what belongs to them.

What this package writes into a file's header, so that weights carry what belongs to them.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.paths import flatten
from flaxtransfer.types import Variables
from flaxtransfer.weights.preprocessing import Preprocessing

__all__ = ["Header", "Pretrained", "read_header", "write_header"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pretrained:
    """Weights together with everything that is needed to use them as they were meant.

    `load` makes one from a file and `save` writes one. It holds numpy arrays, so that it can be
    read and written without a device; `transfer` turns it into a model.

    Args:
        variables: {"params": ..., "batch_stats": ...}, nested dictionaries of float32 arrays;
            kernels are [height, width, in, out] and [in, out].
        config: the shape of the network.
        preprocessing: how an image is prepared for these weights.
        source: where the weights came from, for a person to read.
        format: the naming of the file, a name in `formats.FORMATS`.
        sha256: checksum of the file in hexadecimal; "" for weights that never were in a file.
        class_names: a name for each output of the head, where they are known.
        notes: what was done on the way (conversions, prefixes, assumed preprocessing).

    Raises:
        ValueError: class names or preprocessing that do not fit the config.
    """

    variables: Variables
    config: ResNetConfig
    preprocessing: Preprocessing
    source: str = "memory"
    format: str = "torchvision"
    sha256: str = ""
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.class_names is not None:
            object.__setattr__(self, "class_names", tuple(self.class_names))
            if len(self.class_names) != self.config.classes:
                raise ValueError(
                    f"{len(self.class_names)} class names for a head of {self.config.classes} "
                    f"classes ({self.source})"
                )
        if len(self.preprocessing.mean) != self.config.bands:
            raise ValueError(
                f"the preprocessing has {len(self.preprocessing.mean)} channels and the network "
                f"{self.config.bands} ({self.source})"
            )

    def __repr__(self) -> str:
        parameters = sum(int(np.size(leaf)) for leaf in flatten(self.variables["params"]).values())
        return (
            f"Checkpoint({self.config.name}, {self.config.classes} classes, "
            f"{self.config.bands} channels, {parameters:,} parameters, "
            f"{self.format} names, from {self.source!r}, sha256 {self.sha256[:8] or 'none'})"
        )


HEADER_KEY = "flaxtransfer"
HEADER_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Header:
    """The part of a checkpoint that is not arrays."""

    config: ResNetConfig
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None


def write_header(checkpoint: Pretrained) -> dict[str, str]:
    """Metadata for a safetensors header; "format" is what other readers ask for."""
    content = {
        "version": HEADER_VERSION,
        "config": checkpoint.config.to_json(),
        "preprocessing": checkpoint.preprocessing.to_json(),
        "class_names": checkpoint.class_names,
    }
    return {"format": "pt", HEADER_KEY: json.dumps(content, sort_keys=True)}


def read_header(metadata: Mapping[str, str]) -> Header | None:
    """What `write` wrote; None for a file of somebody else.

    Raises:
        ValueError: a header that is damaged or of a later version.
    """
    if HEADER_KEY not in metadata:
        return None
    try:
        content: dict[str, Any] = json.loads(metadata[HEADER_KEY])
        version = content["version"]
        if version != HEADER_VERSION:
            raise ValueError(
                f"version {version!r}, and this flaxtransfer reads version "
                f"{HEADER_VERSION}: install a "
                "newer one"
            )
        names = content["class_names"]
        return Header(
            ResNetConfig.from_json(content["config"]),
            Preprocessing.from_json(content["preprocessing"]),
            None if names is None else tuple(names),
        )
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"the flaxtransfer header of the file cannot be used: {reason}") from error
