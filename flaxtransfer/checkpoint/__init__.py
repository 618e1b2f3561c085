"""Checkpoints of any pytree with a JSON-able dictionary, which know when they are damaged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flaxtransfer.lazy import attach

if TYPE_CHECKING:
    from flaxtransfer.checkpoint.errors import Damage as Damage
    from flaxtransfer.checkpoint.errors import DamagedCheckpointError as DamagedCheckpointError
    from flaxtransfer.checkpoint.manager import CheckpointManager as CheckpointManager
    from flaxtransfer.checkpoint.manager import Restored as Restored

__getattr__, __dir__, __all__ = attach(__name__, __file__)
