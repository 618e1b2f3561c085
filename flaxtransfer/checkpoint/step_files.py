"""The files of one step: written, and read back only when they are what was written."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from flaxtransfer.checkpoint import orbax_driver
from flaxtransfer.checkpoint.failures import Damage, error_number, first_line
from flaxtransfer.checkpoint.inventory import Inventory, corrupted, stored
from flaxtransfer.checkpoint.record import seal, unseal
from flaxtransfer.checkpoint.steps import clean, flush, numbered


def start(
    writer: orbax_driver.Writer,
    folder: Path,
    step: int,
    arrays: dict[str, np.ndarray],
    record: dict[str, Any],
) -> None:
    """Starts to write a step with its record.

    Raises:
      OSError: it could not be written; what of it was there is removed.
    """
    try:
        orbax_driver.start(writer, folder / str(step), arrays, seal(record))
    except Exception as error:
        raise _not_written(folder, step, error) from error


def finish(writer: orbax_driver.Writer, folder: Path, step: int) -> None:
    """Returns when the step that was started is on the disk.

    Raises:
      OSError: it could not be written; what of it was there is removed.
    """
    try:
        orbax_driver.finish(writer)
        flush(folder, step)
    except Exception as error:
        raise _not_written(folder, step, error) from error


def read_record(folder: Path, step: int) -> dict[str, Any]:
    """The record of a step.

    Raises:
      Damage: there is none, it was changed, or it is of another step.
    """
    path = folder / str(step) / "record" / "metadata"
    try:
        record = unseal(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Damage("record/metadata is missing") from error
    except ValueError as error:
        raise Damage(f"record/metadata cannot be used: {first_line(error)}") from error
    if record["step"] != step:
        raise Damage(f"the folder of step {step} holds step {record['step']}")
    return record


def read_arrays(folder: Path, step: int, inventory: Inventory) -> dict[str, np.ndarray]:
    """The arrays of a step, each compared with its checksum in the inventory.

    Raises:
      Damage: one of them cannot be read, or is not what was saved.
      OSError: the machine did not allow it.
    """
    wanted = stored(inventory)
    if not wanted:
        return {}
    arrays = orbax_driver.read_step(folder / str(step), wanted)
    wrong = corrupted(inventory, arrays)
    if wrong:
        raise Damage(f"the content differs from the checksum of {', '.join(wrong)}")
    return arrays


def _not_written(folder: Path, step: int, error: Exception) -> OSError:
    with suppress(OSError):
        clean(folder)
    number = error_number(error)
    if number is None:
        reason = f"{type(error).__name__}: {first_line(error)}"
    else:
        reason = os.strerror(number).lower()
    free = ""
    if number in (errno.ENOSPC, errno.EDQUOT):
        free = f", {shutil.disk_usage(folder).free / 1e6:.1f} MB free"
    intact = numbered(folder)
    return OSError(
        number or errno.EIO,
        f"step {step} was not written ({reason}{free}); "
        f"{f'steps {intact} are intact' if intact else 'there is no older step'}",
        str(folder),
    )
