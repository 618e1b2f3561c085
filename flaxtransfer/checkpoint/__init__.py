"""Checkpoints of any pytree with a JSON-able dictionary, which know when they are damaged.

Orbax writes and reads the arrays, and makes a step appear all at once or not at all. What it does
not do is notice that a file has changed since: a flipped bit is restored without a word. So each
step carries a record beside its arrays, with a checksum for every leaf and one for the record
itself, and a step that does not match its record is never returned.

On disk: ``<folder>/<step>/tree`` (the leaves by path, uncompressed zarr in OCDBT) and
``<folder>/<step>/record`` (JSON). Any orbax can open them as a Composite of ``tree`` and
``record``. Only ``orbax_driver`` imports orbax.
"""

from flaxtransfer.checkpoint.errors import DamagedCheckpointError
from flaxtransfer.checkpoint.manager import Checkpoints, Restored
from flaxtransfer.checkpoint.step_files import Arrays, folder_of_arrays, read_any_arrays

__all__ = [
    "Arrays",
    "Checkpoints",
    "DamagedCheckpointError",
    "Restored",
    "folder_of_arrays",
    "read_arrays",
]
