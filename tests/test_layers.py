"""The house: imports point down, no circle anywhere, and every room has an ``__init__.py``.

Imports inside of functions count like those at the top of a file; imports for type checkers alone
do not, nor do the lazy public names of a room.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

PACKAGE = Path(__file__).parents[1] / "flaxtransfer"

FLOORS = (
    ("lazy", "models.layout"),
    ("paths", "files", "shift"),
    ("distributed",),
    ("mask_algebra",),
    ("masks",),
    ("groups", "batchnorm"),
    ("optimizers", "overview"),
    ("labels", "losses", "metrics"),
    ("sharding", "task"),
    ("checkpoint",),
    ("models",),
    ("averaging", "weights"),
    ("classifier",),
    ("data",),
    ("features",),
    ("training",),
    ("adapt", "analysis"),
    ("recipes",),
    ("advice",),
    ("report",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
"""From the ground up; a file or room may import what stands on a lower floor."""


def modules():
    """Every file of the package by its name below ``flaxtransfer``; a room by its folder's."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name:
            found[name] = path
    return found


MODULES = modules()


def imported(path):
    """Names below ``flaxtransfer`` of the files that a file imports, anywhere in it."""
    tree = ast.parse(path.read_text())
    for_type_checkers = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in for_type_checkers:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flaxtransfer"):
            room = node.module.removeprefix("flaxtransfer").lstrip(".")
            for alias in node.names:
                inner = f"{room}.{alias.name}".lstrip(".")
                yield inner if inner in MODULES else room
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("flaxtransfer."):
                    yield alias.name.removeprefix("flaxtransfer.")


ARROWS = {name: {i for i in imported(path) if i} - {name} for name, path in MODULES.items()}


def floor_of(name):
    places = [
        (len(member), number)
        for number, floor in enumerate(FLOORS)
        for member in floor
        if name == member or name.startswith(f"{member}.")
    ]
    return max(places)[1] if places else None


def room_of(name):
    return name.split(".")[0]


def test_every_file_stands_on_a_floor():
    assert [name for name in MODULES if floor_of(name) is None] == []
    standing = [member for floor in FLOORS for member in floor]
    assert [member for member in standing if member not in MODULES] == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name):
    wrong = [
        other
        for other in ARROWS[name]
        if floor_of(other) >= floor_of(name) and room_of(other) != room_of(name)
    ]
    assert wrong == [], f"{name} may not import {', '.join(wrong)}"


def test_no_circle_deferred_imports_included():
    done, path = set(), []

    def walk(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(ARROWS.get(name, ())):
            walk(other)
        path.pop()
        done.add(name)

    for name in sorted(MODULES):
        walk(name)


def test_every_room_has_an_init():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_no_route_is_chosen_by_the_device_of_the_process():
    """A mesh may have others: its platform decides (``Model.on``)."""

    def asks(text):
        names = {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}
        return bool(names & {"default_backend", "get_backend"})

    assert asks("import jax\nif jax.default_backend() == 'cpu':\n    pass")  # the control
    assert [name for name, path in MODULES.items() if asks(path.read_text())] == []


def test_there_are_at_most_160_files():
    assert len(MODULES) + 1 <= 160


def heavy_imports(name):
    tree = ast.parse(MODULES[name].read_text())
    for node in ast.walk(tree):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (each.split(".")[0] for each in names)


@pytest.mark.parametrize(
    ("library", "rooms"),
    [
        ("flax", ("models",)),
        ("orbax", ("checkpoint",)),
        ("grain", ("data",)),
        ("tensorflow_datasets", ("data",)),
        ("PIL", ("data",)),
        ("pyarrow", ("data",)),
        ("pydicom", ("data",)),
        ("tifffile", ("data",)),
        ("nibabel", ("data",)),
        ("datasets", ("data",)),
        ("matplotlib", ("report",)),
        ("tyro", ("commands", "cli")),
    ],
)
def test_a_library_is_driven_from_one_room(library, rooms):
    found = {room_of(name) for name in MODULES if library in heavy_imports(name)}
    assert found <= set(rooms)
    assert found, f"nothing imports {library}; take it off this table"


def test_a_small_file_is_shared_or_a_chapter_of_its_own():
    """Formats, commands and entry points may be small; anything else joins its only importer."""
    importers = {name: {o for o in ARROWS if name in ARROWS[o]} for name in MODULES}
    small = [
        name
        for name, path in MODULES.items()
        if path.name != "__init__.py"
        and len(path.read_text().splitlines()) < 80
        and len(importers[name]) <= 1
        and room_of(name) not in ("commands", "weights", "__main__")
    ]
    assert small == []
