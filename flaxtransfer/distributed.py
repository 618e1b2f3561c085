"""Acting on one process of several, with all of them hearing how it went.

A run over several processes hangs when one of them raises while the others wait for it in a
collective operation. Here the outcome itself is the collective operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def on_primary(action: Callable[[], Any], what: str) -> None:
    """Runs ``action`` on process 0; every process returns, or raises, with it.

    Args:
      action: called without arguments, on process 0 alone.
      what: the action as a verb phrase, for the error of the other processes.

    Raises:
      Exception: on process 0, what ``action`` raised.
      OSError: on the other processes, when ``action`` raised.

    >>> on_first(lambda: print("written"), "write the report")
    written
    """
    error: Exception | None = None
    if jax.process_index() == 0:
        try:
            action()
        except Exception as raised:
            error = raised
    failed = any_process(error is not None)
    if error is not None:
        raise error
    if failed:
        raise OSError(f"process 0 could not {what}; its own message says why")


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is true on any process. Every process must ask.

    >>> anywhere(False)
    False
    """
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
