"""How orbax is driven: the only module that imports it.

What goes in and comes out are paths, numpy arrays and JSON-able dictionaries. Orbax is told to
work for this process alone and to keep its log to itself; what it raises while it reads comes out
as damage of the files or as an error of the machine.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from flaxtransfer.checkpoint.errors import explained
from flaxtransfer.checkpoint.manifest import named_leaves
from flaxtransfer.types import PyTree

Writer: TypeAlias = ocp.AsyncCheckpointer


class Description(NamedTuple):
    """What a tree holds, before any of it is read.

    Attributes:
      tree: its leaves as orbax describes them.
      sizes: how many numbers each array has, by the path of the leaf.
    """

    tree: PyTree
    sizes: dict[str, int]


def open_writer() -> Writer:
    """Writes steps while the program goes on; to be closed."""
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(
            tree=_tree_handler(_WaitingNumpyHandler()),
            record=ocp.JsonCheckpointHandler(multiprocessing_options=_alone()),
            composite_options=ocp.CompositeOptions(multiprocessing_options=_alone()),
        ),
        multiprocessing_options=_alone(),
    )


def start(
    writer: Writer, step: Path, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]
) -> None:
    """Starts to write the folder of a step; it has another name until it is whole."""
    items: dict[str, Any] = {"record": ocp.args.JsonSave(record)}
    if arrays:
        items["tree"] = ocp.args.PyTreeSave(arrays)
    writer.save(epath.Path(step), args=ocp.args.Composite(**items))


def finish(writer: Writer) -> None:
    """Returns when what was started is written, or raises what kept it from that."""
    writer.wait_until_finished()
    writer.check_for_errors()


def read_step(step: Path, paths: list[str]) -> dict[str, np.ndarray]:
    """The arrays at these paths from the folder of a step that ``start`` wrote.

    Raises:
      Damage: one of them cannot be read.
      OSError: the machine did not allow it.
    """
    arrays = _WaitingNumpyHandler()
    arguments = ocp.args.PyTreeRestore(
        item=dict.fromkeys(paths, 0),
        restore_args=dict.fromkeys(paths, ocp.RestoreArgs(restore_type=np.ndarray)),
    )
    with (
        closing(_tree_handler(arrays)) as handler,
        explained(step, arrays.failed, subject=f"step {step.name}", place=step.parent),
    ):
        return handler.restore(epath.Path(step / "tree"), args=arguments)


def describe(folder: Path) -> Description:
    """What the tree in a folder of anybody's holds.

    Raises:
      Damage: it cannot be read, or two leaves share a path.
      OSError: the machine did not allow it.
    """
    with (
        closing(_describing_handler()) as handler,
        explained(folder, (), subject="it", place=folder),
    ):
        tree = handler.metadata(epath.Path(folder)).tree
        leaves = named_leaves(tree)
        return Description(
            tree,
            {path: math.prod(leaf.shape) for path, leaf in leaves.items() if _is_array(leaf)},
        )


def read_tree(folder: Path, description: Description) -> dict[str, np.ndarray]:
    """The arrays of a tree that was described, by path.

    Raises:
      Damage: one of them cannot be read.
      OSError: the machine did not allow it.
    """
    arrays = _WaitingNumpyHandler()
    # What is not read is left out of the template: text, and nodes without leaves.
    wanted = jax.tree.map(lambda leaf: leaf if _is_array(leaf) else ..., description.tree)
    read = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=read)
    with (
        closing(_tree_handler(arrays)) as handler,
        explained(folder, arrays.failed, subject="it", place=folder),
    ):
        found = named_leaves(handler.restore(epath.Path(folder), args=arguments))
        return {path: np.asarray(found[path]) for path in found if path in description.sizes}


@contextmanager
def quiet() -> Iterator[None]:
    """Drops orbax's log for the length of a block: its errors all reach us as exceptions."""
    logger = logging.getLogger("absl")

    def foreign(record: logging.LogRecord) -> bool:
        return "orbax" not in Path(record.pathname).parts

    logger.addFilter(foreign)
    try:
        yield
    finally:
        logger.removeFilter(foreign)


class _DeferredArray:
    """A coroutine that begins when it is awaited, and leaves no warning when it never is.

    Orbax drops the descriptions that it asked for when it meets a kind of leaf it does not know.
    """

    def __init__(self, begin: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self._begin = begin

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._begin().__await__()


class _WaitingNumpyHandler(ocp.type_handlers.NumpyHandler):
    """Reads and writes numpy arrays, and raises only when no transfer is under way any more.

    Orbax raises at the first failure and closes its event loop, while the transfers of the other
    leaves still report to it: each then prints a traceback ("Event loop is closed") over the one
    message that matters. Waiting also finds every leaf that fails, not only the first.
    """

    def __init__(self, kind: str | None = None) -> None:
        super().__init__()
        self._kind = kind
        self.failed: list[str] = []
        self._under_way = 0
        self._errors: list[Exception] = []

    def typestr(self) -> str:
        """What orbax calls the kind of leaf; another one where arrays are read in its place."""
        return self._kind or super().typestr()

    def metadata(self, infos: Any) -> Any:
        """Shapes and dtypes, once it is awaited."""
        return _DeferredArray(functools.partial(self._describe, infos))

    async def _describe(self, infos: Any) -> Any:
        describe = super().metadata
        results = await asyncio.gather(
            *(describe([info]) for info in infos), return_exceptions=True
        )
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:
            raise errors[0]
        return [result[0] for result in results if not isinstance(result, BaseException)]

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        read = super().deserialize
        results = await asyncio.gather(
            *(read([info], args and [args[i]]) for i, info in enumerate(infos)),
            return_exceptions=True,
        )
        arrays, errors = [], []
        for info, result in zip(infos, results, strict=True):
            if isinstance(result, BaseException):
                self.failed.append(info.name)
                errors.append(result)
            else:
                arrays.append(result[0])
        if errors:
            raise errors[0]
        return arrays

    async def _open_and_write(self, value: Any, tspec: Any, ts_context: Any) -> None:
        self._under_way += 1
        await asyncio.sleep(0)  # until every other write has been counted
        try:
            await super()._open_and_write(value, tspec, ts_context)
        except Exception as error:
            self._errors.append(error)
        finally:
            self._under_way -= 1
        if not self._under_way and self._errors:
            errors, self._errors = self._errors, []
            raise errors[0]


def _tree_handler(arrays: _WaitingNumpyHandler) -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(
        # Trained floating-point numbers shrink by a tenth, for more time than the writing takes.
        use_compression=False,
        multiprocessing_options=_alone(),
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((np.ndarray, arrays)),
    )


def _describing_handler() -> ocp.PyTreeCheckpointHandler:
    """Reads what a tree of anybody's holds; every number in it is an array to us."""
    types = ocp.type_handlers
    registry = types.create_type_handler_registry(
        (np.ndarray, _WaitingNumpyHandler()),
        (jax.Array, _WaitingNumpyHandler(types.ArrayHandler().typestr())),
        (int, _WaitingNumpyHandler(types.ScalarHandler().typestr())),
        (str, types.StringHandler()),
    )
    return ocp.PyTreeCheckpointHandler(
        multiprocessing_options=_alone(), type_handler_registry=registry
    )


def _alone() -> ocp.options.MultiprocessingOptions:
    """Orbax waits for no other process: what process 0 met is told to the others here, once."""
    this = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process{this}"
    )


def _is_array(described: Any) -> bool:
    return hasattr(described, "shape")
