"""The generated targets of the experiments, as sources, and the built-in network at their size."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import flaxtransfer as ft

_FILE = Path(__file__).parents[2] / "experiments" / "targets.py"


def _loaded():
    spec = importlib.util.spec_from_file_location("experiment_targets", _FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Its dataclasses look themselves up there.
    spec.loader.exec_module(module)
    return module


targets = _loaded()


def source(name: str, per_class: int, seed: int) -> ft.ArraySource:
    """A generated target."""
    drawn = targets.draw(name, per_class, seed)
    return ft.ArraySource(drawn.images, drawn.labels, [f"class {n}" for n in range(drawn.classes)])


def pretrained() -> ft.Pretrained:
    """The built-in network for images of the targets' size."""
    found = ft.load("builtin")
    preprocessing = replace(found.preprocessing, size=targets.SIZE, resize=targets.SIZE)
    return replace(found, preprocessing=preprocessing)
