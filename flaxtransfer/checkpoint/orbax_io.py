"""Orbax interface: the only module that imports orbax.

It takes and returns paths, numpy arrays and JSON-able dictionaries. Orbax works for this process
alone and without its log; its errors while reading become damage of the files or an error of the
machine.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from flaxtransfer.checkpoint.manifest import classify_errors, named_leaves
from flaxtransfer.paths import PyTree

Writer: TypeAlias = ocp.AsyncCheckpointer


class Description(NamedTuple):
    """Contents of a stored tree, before its arrays are read.

    Args:
        tree: the leaves as orbax describes them.
        sizes: number of elements of each array, by the path of the leaf.
    """

    tree: PyTree
    sizes: dict[str, int]


def open_writer() -> Writer:
    """An asynchronous writer of steps, which must be closed."""
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(
            tree=_tree_handler(_WaitingNumpyHandler()),
            record=ocp.JsonCheckpointHandler(multiprocessing_options=_this_process_only()),
            composite_options=ocp.CompositeOptions(multiprocessing_options=_this_process_only()),
        ),
        multiprocessing_options=_this_process_only(),
    )


def start(
    writer: Writer, step: Path, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]
) -> None:
    """Starts to write the folder of a step; it has a temporary name until it is complete."""
    items: dict[str, Any] = {"record": ocp.args.JsonSave(record)}
    if arrays:
        items["tree"] = ocp.args.PyTreeSave(arrays)
    writer.save(_place(step), args=ocp.args.Composite(**items))


def finish(writer: Writer) -> None:
    """Waits until the started step is written, or raises the error of the write."""
    writer.wait_until_finished()
    writer.check_for_errors()


def read_step(step: Path, paths: list[str]) -> dict[str, np.ndarray]:
    """Reads the arrays at these paths from the folder of a step that ``start`` wrote.

    Raises:
        Damage: one of them cannot be read.
        OSError: the machine failed.
    """
    arrays = _WaitingNumpyHandler()
    arguments = ocp.args.PyTreeRestore(
        item=dict.fromkeys(paths, 0),
        restore_args=dict.fromkeys(paths, ocp.RestoreArgs(restore_type=np.ndarray)),
    )
    with (
        closing(_tree_handler(arrays)) as handler,
        classify_errors(step, arrays.failed, subject=f"step {step.name}", place=step.parent),
    ):
        found: dict[str, np.ndarray] = handler.restore(_place(step) / "tree", args=arguments)
        return found


def describe(folder: Path) -> Description:
    """Describes the tree in any orbax folder.

    Raises:
        Damage: it cannot be read, or two leaves share a path.
        OSError: the machine failed.
    """
    with (
        closing(_describing_handler()) as handler,
        classify_errors(folder, (), subject="it", place=folder),
    ):
        tree = handler.metadata(_place(folder)).tree
        leaves = named_leaves(tree)
        return Description(
            tree,
            {path: math.prod(leaf.shape) for path, leaf in leaves.items() if _is_array(leaf)},
        )


def read_tree(folder: Path, description: Description) -> dict[str, np.ndarray]:
    """Reads the arrays of a described tree, by path.

    Raises:
        Damage: one of them cannot be read.
        OSError: the machine failed.
    """
    arrays = _WaitingNumpyHandler()
    # Text and empty nodes are left out of the template, so that they are not read.
    template = jax.tree.map(lambda leaf: leaf if _is_array(leaf) else ..., description.tree)
    read = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), template)
    arguments = ocp.args.PyTreeRestore(item=template, restore_args=read)
    with (
        closing(_tree_handler(arrays)) as handler,
        classify_errors(folder, arrays.failed, subject="it", place=folder),
    ):
        found = named_leaves(handler.restore(_place(folder), args=arguments))
        return {path: np.asarray(found[path]) for path in found if path in description.sizes}


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the log of orbax during a block; all its errors are raised as exceptions."""
    logger = logging.getLogger("absl")

    def not_orbax(record: logging.LogRecord) -> bool:
        return "orbax" not in Path(record.pathname).parts

    logger.addFilter(not_orbax)
    try:
        yield
    finally:
        logger.removeFilter(not_orbax)


def _place(path: Path) -> epath.Path:
    """The path as orbax can have it: its C++ takes no name of bytes that are not UTF-8."""
    if _is_text(path):
        return epath.Path(path)
    # A step that is yet to be written has no folder for a link to lead to; its parent has.
    through = path.parent if _is_text(Path(path.name)) else path
    return epath.Path(_link_to(through) / path.relative_to(through))


def _is_text(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


@functools.cache
def _link_to(folder: Path) -> Path:
    """A symbolic link of plain name to a folder, for as long as the process lives."""
    place = Path(tempfile.mkdtemp(prefix="flaxtransfer-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    link = place / "folder"
    link.symlink_to(folder.absolute())
    return link


class _DeferredArray:
    """A coroutine that starts when it is awaited, without a warning if it never is.

    Orbax drops pending descriptions when it finds a leaf of an unknown type.
    """

    def __init__(self, start: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self._start = start

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._start().__await__()


class _WaitingNumpyHandler(ocp.type_handlers.NumpyHandler):  # type: ignore[misc]  # untyped
    """Reads and writes numpy arrays, and raises only after all transfers have ended.

    Orbax raises at the first failure and closes its event loop while transfers of other leaves
    still run: each then prints a traceback ("Event loop is closed") that hides the actual error.
    Waiting also finds every leaf that fails, not only the first.
    """

    def __init__(self, kind: str | None = None) -> None:
        super().__init__()
        self._kind = kind
        self.failed: list[str] = []
        self._running = 0
        self._errors: list[Exception] = []

    def typestr(self) -> str:
        """Orbax's name for the type of a leaf; another type's if arrays are read in its place."""
        return self._kind or super().typestr()

    def metadata(self, infos: Any) -> Any:
        """Shapes and dtypes, when awaited."""
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
        self._running += 1
        await asyncio.sleep(0)  # until all other writes are counted
        try:
            await super()._open_and_write(value, tspec, ts_context)
        except Exception as error:
            self._errors.append(error)
        finally:
            self._running -= 1
        if not self._running and self._errors:
            errors, self._errors = self._errors, []
            raise errors[0]


def _tree_handler(arrays: _WaitingNumpyHandler) -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(
        # Trained weights shrink by a tenth, which takes longer than writing them.
        use_compression=False,
        multiprocessing_options=_this_process_only(),
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((np.ndarray, arrays)),
    )


def _describing_handler() -> ocp.PyTreeCheckpointHandler:
    """Describes any orbax tree; every number in it is treated as an array."""
    types = ocp.type_handlers
    registry = types.create_type_handler_registry(
        (np.ndarray, _WaitingNumpyHandler()),
        (jax.Array, _WaitingNumpyHandler(types.ArrayHandler().typestr())),
        (int, _WaitingNumpyHandler(types.ScalarHandler().typestr())),
        (str, types.StringHandler()),
    )
    return ocp.PyTreeCheckpointHandler(
        multiprocessing_options=_this_process_only(), type_handler_registry=registry
    )


def _this_process_only() -> ocp.options.MultiprocessingOptions:
    """Orbax does not wait for other processes; ``distributed.from_first`` synchronizes them."""
    this = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process{this}"
    )


def _is_array(described: Any) -> bool:
    return hasattr(described, "shape")
