"""Checkpoints of any pytree with a JSON-able dictionary, verified by checksum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flaxtransfer.lazy import attach

if TYPE_CHECKING:
    from flaxtransfer.checkpoint.manager import CheckpointManager as CheckpointManager
    from flaxtransfer.checkpoint.manager import Restored as Restored
    from flaxtransfer.checkpoint.manifest import Damage as Damage
    from flaxtransfer.checkpoint.manifest import DamagedCheckpointError as DamagedCheckpointError

__getattr__, __dir__, __all__ = attach(__name__, __file__)
