"""Lazy public names: each is written down once, as an import that type checkers read.

A package lists its public names in an ``if TYPE_CHECKING:`` block. At run time the same block says
where each name lives, and the module is imported when the name is first used (PEP 562), so that
importing a package costs nothing of what its names need.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["attach", "names_from"]


def attach(
    package: str, file: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package whose names are lazy.

    Args:
        package: The package's ``__name__``.
        file: The package's ``__file__``; its ``if TYPE_CHECKING:`` block holds the names, each as
            ``from module import name as name``. ``from package import module as module`` makes a
            module public.
    """
    homes = _homes(Path(file).read_text(encoding="utf-8"))

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home, original = homes[name]
        if home == package:
            return importlib.import_module(f"{package}.{original}")
        return getattr(importlib.import_module(home), original)

    return get, lambda: sorted(homes), sorted(homes)


def names_from(file: str, module: str) -> tuple[str, ...]:
    """The lazy names of a package that live in this module, in the order of the list."""
    homes = _homes(Path(file).read_text(encoding="utf-8"))
    return tuple(name for name, (home, _) in homes.items() if home == module)


def _homes(source: str) -> dict[str, tuple[str, str]]:
    """The names of the ``if TYPE_CHECKING:`` block: module and name there."""
    guarded = [
        statement
        for node in ast.parse(source).body
        if isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
        for statement in node.body
    ]
    return {
        alias.asname or alias.name: (statement.module or "", alias.name)
        for statement in guarded
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
