"""Files and folders that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

__all__ = ["appearing", "check_target", "write"]


def check_target(target: Path, names: Mapping[str, object] | None = None) -> None:
    """Raises unless something may be written there, before any work is done.

    Args:
        target: a file; or a folder, if `names` are those of the files that go into it.
        names: of the files of a folder.

    Raises:
        FileNotFoundError: there is no folder to write into.
        ValueError: a folder that holds other things.
    """
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {target.parent} to write {target.name} into")
    if names is None:
        if target.is_dir():
            raise ValueError(f"{target} is a folder, and a file is to be written")
        return
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, and a folder is to be written")
    foreign = (
        sorted({entry.name for entry in target.iterdir()} - set(names)) if target.is_dir() else []
    )
    if foreign:
        raise ValueError(
            f"the folder {target} holds other files ({', '.join(foreign[:5])}); nothing was "
            "written: name a new folder, or an earlier export, which is replaced"
        )


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A path beside the target that becomes the target when the block ends without an error."""
    beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    made = beside / target.name
    try:
        yield made
        if made.is_dir() and target.is_dir():
            target.rename(beside / "replaced")
        made.replace(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write(path: Path, data: bytes) -> None:
    """Writes a file and waits until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
