"""The names of the package, which are written down twice: for type checkers and for Python."""

import ast
from pathlib import Path

import flaxtransfer as ft


def for_type_checkers():
    """{name: module} of the imports that only type checkers see."""
    tree = ast.parse(Path(ft.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    return {alias.name: node.module for node in guarded.body for alias in node.names}


def test_both_lists_name_the_same():
    assert sorted(for_type_checkers()) == ft.__all__


def test_every_name_can_be_used():
    assert [name for name in ft.__all__ if not hasattr(ft, name)] == []
