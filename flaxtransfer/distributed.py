"""Actions on the primary process of several.

A run over several processes hangs if one of them raises while the others wait for it in a
collective operation. Here the outcome itself is the collective operation, so that all processes
raise together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from flaxtransfer.types import PyTree


def on_primary(action: Callable[[], Any], what: str) -> None:
    """Runs ``action`` on process 0; all processes return or raise together.

    Args:
        action: called without arguments, on process 0 alone.
        what: the action as a verb phrase, for the error on the other processes.

    Raises:
        Exception: on process 0, the error of ``action``.
        OSError: on the other processes, if ``action`` raised.

    >>> on_primary(lambda: print("written"), "write the report")
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
        raise OSError(f"process 0 could not {what}; see its error message")


def gather(tree: PyTree) -> PyTree:
    """The arrays of a tree as numpy arrays, rows of all processes one after another.

    Args:
        tree: arrays that are cut over the devices of all processes, or this process's share of the
            rows; in one process simply arrays.

    >>> gather({"rows": jax.numpy.arange(3)})["rows"].tolist()
    [0, 1, 2]
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is true on any process; every process must call it.

    >>> any_process(False)
    False
    """
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
