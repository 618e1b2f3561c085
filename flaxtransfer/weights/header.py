"""What this package writes into a file's header, so that weights carry what belongs to them."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from flaxtransfer.architectures import ResNetConfig
from flaxtransfer.weights.checkpoint import Checkpoint
from flaxtransfer.weights.preprocessing import Preprocessing

__all__ = ["Header", "read", "write"]

KEY = "flaxtransfer"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Header:
    """The part of a checkpoint that is not arrays."""

    config: ResNetConfig
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None


def write(checkpoint: Checkpoint) -> dict[str, str]:
    """Metadata for a safetensors header; "format" is what other readers ask for."""
    content = {
        "version": VERSION,
        "config": checkpoint.config.to_json(),
        "preprocessing": checkpoint.preprocessing.to_json(),
        "class_names": checkpoint.class_names,
    }
    return {"format": "pt", KEY: json.dumps(content, sort_keys=True)}


def read(metadata: Mapping[str, str]) -> Header | None:
    """What `write` wrote; None for a file of somebody else.

    Raises:
        ValueError: a header that is damaged or of a later version.
    """
    if KEY not in metadata:
        return None
    try:
        content: dict[str, Any] = json.loads(metadata[KEY])
        version = content["version"]
        if version != VERSION:
            raise ValueError(
                f"version {version!r}, and this flaxtransfer reads version {VERSION}: install a "
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
