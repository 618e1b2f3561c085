"""Public names, which are written down twice: for type checkers and for Python."""

import ast
from pathlib import Path

import pytest

import flaxtransfer as ft
import flaxtransfer.data

ROOMS = [ft, ft.shift, flaxtransfer.data]


def for_type_checkers(room):
    """Names of the imports that only type checkers see."""
    tree = ast.parse(Path(room.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    return [alias.name for node in guarded.body for alias in node.names]


@pytest.mark.parametrize("room", ROOMS)
def test_both_lists_name_the_same(room):
    assert sorted(for_type_checkers(room)) == room.__all__


@pytest.mark.parametrize("room", ROOMS)
def test_every_name_can_be_used(room):
    assert [name for name in room.__all__ if not hasattr(room, name)] == []


def test_no_name_of_a_room_is_hidden_by_a_file_of_it():
    """A file of the same name becomes the room's attribute once anything imports it."""
    beside = {path.stem for path in Path(ft.shift.__file__).parent.iterdir()}
    assert not beside & set(ft.shift.__all__)
