"""Public names: each room lists its own once, and each can be used."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import flaxtransfer as ft

ROOMS = [
    ft,
    *(
        importlib.import_module(f"flaxtransfer.{room}")
        for room in (
            "adapt",
            "analysis",
            "checkpoint",
            "data",
            "features",
            "models",
            "recipes",
            "shift",
            "training",
            "weights",
        )
    ),
]


def name_of(room):
    return room.__name__


def test_the_top_level_is_short():
    assert len(ft.__all__) <= 60


@pytest.mark.parametrize("room", ROOMS, ids=name_of)
def test_every_name_can_be_used(room):
    assert [name for name in room.__all__ if not hasattr(room, name)] == []


@pytest.mark.parametrize("room", ROOMS, ids=name_of)
def test_an_unknown_name_is_an_attribute_error(room):
    with pytest.raises(AttributeError, match="no_such_name"):
        room.no_such_name  # noqa: B018


@pytest.mark.parametrize("room", ROOMS, ids=name_of)
def test_no_name_of_a_room_is_hidden_by_a_file_of_it(room):
    """A file of the same name becomes the room's attribute once anything imports it."""
    beside = {path.stem for path in Path(room.__file__).parent.iterdir()}
    hidden = beside & set(room.__all__)
    assert {name for name in hidden if not hasattr(getattr(room, name), "__path__")} <= {
        # Modules that are public as modules.
        "adapters",
        "task",
        "nnx",
    }


def test_the_recipes_have_one_list():
    assert sorted(ft.recipes.RECIPE_NAMES) == sorted(ft.recipes.RECIPES)


def test_every_top_level_name_is_used_in_the_readme_the_guide_or_an_experiment():
    root = Path(__file__).parents[1]
    text = (root / "README.md").read_text() + (root / "experiments/guide.md").read_text()
    text += "".join(path.read_text() for path in (root / "experiments").rglob("*.py"))
    words = set(re.findall(r"\w+", text))
    assert [name for name in ft.__all__ if name not in words] == []


def test_experiments_import_public_names_alone():
    rooms = {room.__name__: set(room.__all__) for room in ROOMS}
    wrong = []
    for path in (Path(__file__).parents[1] / "experiments").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flaxtransfer"):
                public = rooms.get(node.module, set())
                wrong += [
                    f"{path.name}: {node.module}.{name.name}"
                    for name in node.names
                    if name.name not in public
                ]
    assert wrong == []
