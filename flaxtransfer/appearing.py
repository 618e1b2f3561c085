"""Files and folders that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["appearing", "write"]


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A path beside the target that becomes the target when the block ends without an error.

    What was there before is replaced then, and stays if the block fails.
    """
    beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    made, replaced = beside / target.name, beside / "replaced"
    try:
        yield made
        if made.is_dir() and target.is_dir():
            # A folder with files in it cannot be renamed over.
            target.rename(replaced)
        try:
            made.replace(target)
        except BaseException:
            if replaced.exists():
                replaced.rename(target)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write(path: Path, data: bytes) -> None:
    """Writes a file and waits until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
