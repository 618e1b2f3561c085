"""Why a checkpoint cannot be used: damage of its files, or a shortage of the machine.

The difference decides what happens next. A damaged step is passed over for an older one; a step
that cannot be read now is as good as it was, and an older one in its place would be a quiet loss.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# Errors of the machine, not of the files: a step is not damaged because it cannot be read now.
_NOT_DAMAGE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class DamagedCheckpointError(ValueError):
    """No sound checkpoint is left among those asked for; the text lists each with its reason."""


class Damage(Exception):
    """Why one step cannot be used."""


@contextmanager
def explained(
    folder: Path,
    leaves: Sequence[str],
    *,
    subject: str,
    place: Path,
) -> Iterator[None]:
    """Says of whatever is raised in the block whether the files or the machine are to blame.

    Args:
      folder: what is being read; files are named relative to it.
      leaves: those that could not be read, filled in while the block runs.
      subject: what the error of the machine calls it.
      place: the path that the error of the machine names.

    Raises:
      Damage: the files are to blame.
      OSError: the machine is.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        number = error_number(error)
        if number in _NOT_DAMAGE:
            reason = os.strerror(number).lower()
            raise OSError(number, f"{subject} cannot be read now ({reason})", str(place)) from error
        raise Damage(_unreadable(error, leaves, folder)) from error


def error_number(error: BaseException | None) -> int | None:
    """The system's number for an error, or for what caused it; None without one.

    >>> error_number(ValueError("Error opening file [os_error_code='24']"))
    24
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code:
            return int(code.group(1))
        error = error.__cause__ or error.__context__
    return None


def first_line(error: BaseException, length: int = 200) -> str:
    """The first line of an error's text, cut to a length.

    >>> first_line(ValueError("no such file: there, and nowhere else"), 15)
    'no such file...'
    """
    text = (str(error).strip().splitlines() or [""])[0]
    return text if len(text) <= length else text[: length - 3] + "..."


def _unreadable(error: Exception, leaves: Sequence[str], folder: Path) -> str:
    """One line that names the unreadable leaves, and the file where the error says which."""
    named = re.findall(re.escape(str(folder)) + r"""/([^\s"'\\]+)""", str(error))
    files = [name for name in (name.rstrip(":,.") for name in named) if (folder / name).is_file()]
    where = f" (in {files[-1]})" if files else ""
    if leaves:
        return f"these leaves cannot be read{where}: {', '.join(sorted(leaves))}"
    return f"its arrays cannot be read{where}: {type(error).__name__}: {first_line(error)}"
