"""The checkpoints that come with the package, each with a card that says what it is."""

import hashlib
import json
from pathlib import Path
from typing import Any

from flaxtransfer.paths import suggest

__all__ = ["DEFAULT", "PREFIX", "card", "locate", "names"]

PREFIX = "builtin"
DEFAULT = "resnet18w32_drawn"
FOLDER = Path(__file__).parent / "builtin"
FIELDS = ("data", "command", "accuracy", "seed", "sha256")


def names() -> list[str]:
    """The checkpoints there are, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def card(name: str = DEFAULT) -> dict[str, Any]:
    """What a checkpoint that comes with the package was made of, how, and how good it is.

    Returns:
        At least data, command, accuracy, seed and sha256.

    Raises:
        ValueError: an unknown name, or a card that lacks a field.
    """
    path = FOLDER / f"{name}.json"
    if name not in names() or not path.is_file():
        raise ValueError(
            f"no built-in checkpoint {name!r}; there are: {', '.join(names()) or 'none'}"
            f"{suggest(name, names())}"
        )
    content = json.loads(path.read_text(encoding="utf-8"))
    missing = [field for field in FIELDS if field not in content]
    if missing:
        raise ValueError(f"the card of the built-in checkpoint {name!r} lacks {missing}: {path}")
    return content


def locate(source: str) -> tuple[str, Path]:
    """The full name and the file of "builtin" or "builtin:<name>", checked against its card.

    Raises:
        ValueError: an unknown name, or a file that is not the one of the card.
    """
    name = source.removeprefix(PREFIX).removeprefix(":") or DEFAULT
    expected = card(name)["sha256"]
    path = FOLDER / f"{name}.safetensors"
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != expected:
        raise ValueError(
            f"the built-in checkpoint {name!r} is not the file of its card: sha256 {actual}, and "
            f"the card says {expected}; install the package again ({path})"
        )
    return f"{PREFIX}:{name}", path
