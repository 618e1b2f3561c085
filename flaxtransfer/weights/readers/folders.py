"""Folders of checkpoints, and which of several is meant: the best or the newest by name.

What training saves beside networks (optimizers, schedulers, random states) is passed over. The only
network is taken, or the best (``best`` in its name), or the one called ``model``, or the newest:
``last``, or the highest of names that differ in numbers alone. Of steps, which are folders such as
``checkpoint-500``, the newest is taken. Where no name says it, all are listed.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxtransfer.files import read_json
from flaxtransfer.paths import shortened, suggest

__all__ = [
    "INDEX",
    "IN_A_FOLDER",
    "find",
    "is_part_name",
    "nothing_in",
    "originals",
    "weight_map",
    "weights_in",
]


INDEX = ".index.json"
"""End of the name of a file that says in which files the arrays are."""

IN_A_FOLDER = (
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
    "flax_model.msgpack",
)
_PART = re.compile(r"(.+)-(\d+)-of-(\d+)(\.\w+)")
_COUNTED = re.compile(
    r"(?i)(?<![a-z])(epoch|ep|steps?|iter|iteration|checkpoint|ckpt|model)[-_=]?(\d+)(?![a-z])"
)
_STEP = re.compile(r"(?i)((global_)?(epoch|ep|steps?|iter|iteration|checkpoint|ckpt)[-_=]?)?\d+")
_PART_NAME, _LONGEST_NAME = re.compile(r"(?!\.)[\w.+ -]+"), 255
_BEST = re.compile(r"(?i)(?<![a-z])best(?![a-z])")
_LAST = re.compile(r"(?i)(?<![a-z])(last|latest|final)(?![a-z])")
_NO_NETWORK = re.compile(
    r"(?i)(optimizers?|optim|schedulers?|lr_schedulers?|scaler|rng_state|random_states?|"
    r"training_args|trainer_state|sampler)([-_.\d].*|\.\w+)|.*optim_states\.\w+|"
    r".*\.distcp"
)
"""What training saves beside a network."""
_PLACES = ("checkpoints", "models", "weights")
"""Folders in which Lightning, fastai and others keep the checkpoints of a run."""

Suffixes = tuple[str, ...]


def is_part_name(name: str) -> bool:
    """Whether a file of this name is in the folder that it is looked for in, and can be there.

    >>> is_part_name("model-00001-of-00002.bin"), is_part_name("../w.bin"), is_part_name("a" * 256)
    (True, False, False)
    """
    return bool(_PART_NAME.fullmatch(name)) and len(name.encode()) <= _LONGEST_NAME


def weight_map(index: Path) -> dict[str, str]:
    """The file of each array, by the array's key, as an index states it.

    Raises:
        ValueError: no index, or one that names files outside its folder.
    """
    content = read_json(index)
    found = content.get("weight_map") if isinstance(content, dict) else None
    places = found if isinstance(found, dict) else {}
    if not places or not all(isinstance(place, str) for place in places.values()):
        raise ValueError("an index must have a weight_map with the file of each array")
    strange = [name for name in places.values() if not is_part_name(name)]
    if strange:
        raise ValueError(
            f"an index must name files in its own folder, got {shortened(repr(strange[0]), 100)}"
        )
    return places


def find(path: Path, suffixes: Suffixes) -> tuple[Path, list[str]]:
    """The file that a path means, and a note where a folder holds several.

    Args:
        path: a file or folder.
        suffixes: of files that are checkpoints.

    Raises:
        FileNotFoundError: no file, or several of which no name says which is meant.
        ValueError: one part of a checkpoint in several files.
    """
    if path.is_dir():
        return _in_folder(path, suffixes)
    if not path.exists():
        folder = path.parent
        if not folder.is_dir():
            raise FileNotFoundError(f"no file {path}: the folder {folder} does not exist")
        nearest = suggest(path.name, sorted(entry.name for entry in folder.iterdir()))
        there = shortened(", ".join(weights_in(folder, suffixes)) or "none", 300)
        raise FileNotFoundError(
            f"no file {path.name!r} in {folder.resolve()}"
            + (nearest or f"; checkpoints there: {there}")
        )
    part = _PART.fullmatch(path.name)
    if part and int(part[3]) > 1:
        index = f"{part[1]}{part[4]}{INDEX}"
        raise ValueError(
            f"{path} must be a whole checkpoint, got one of {int(part[3])} parts"
            + (f"; did you mean {index!r}?" if path.with_name(index).is_file() else "")
        )
    return path, []


def _in_folder(path: Path, suffixes: Suffixes) -> tuple[Path, list[str]]:
    files = weights_in(path, suffixes)
    if not files:
        return _in_steps(path, suffixes)
    preferred = [name for name in IN_A_FOLDER if name in files] or files
    # Other programs keep old formats beside safetensors.
    if preferred[0] in IN_A_FOLDER[:2] or len(preferred) == 1:
        return path / preferred[0], []
    name, why = _outstanding(preferred)
    if name is None:
        raise FileNotFoundError(
            f"the folder {shortened(str(path), 120)} holds {len(files)} checkpoints, name one: "
            f"{shortened(', '.join(files), 400)}"
        )
    return path / name, [f"{name} is {why} of {len(files)} checkpoints in the folder, by name"]


def _in_steps(folder: Path, suffixes: Suffixes) -> tuple[Path, list[str]]:
    """The newest of the folders of steps, or what is in a folder of checkpoints."""
    if (folder / "_METADATA").is_file():
        return folder, []
    inner = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    steps = [
        entry.name
        for entry in inner
        if _STEP.fullmatch(entry.name) and (weights_in(entry, suffixes) or _of_orbax(entry))
    ]
    if steps:
        name, why = max(steps, key=_count), "the newest"
        best = _best_step(folder / name)
        if best in steps:
            name, why = best, "the best"
        path, notes = find(folder / name, suffixes)
        said = "as trainer_state.json says" if best == name else "by name"
        return path, [f"{name} is {why} of {len(steps)} steps in the folder, {said}", *notes]
    places = [entry for entry in inner if entry.name in _PLACES and weights_in(entry, suffixes)]
    if len(places) == 1:
        path, notes = find(places[0], suffixes)
        return path, [f"taken from its folder {places[0].name!r}", *notes]
    return folder, []


def _of_orbax(folder: Path) -> bool:
    return any(
        path.is_file() for glob in ("_METADATA", "*/_METADATA") for path in folder.glob(glob)
    )


def _best_step(step: Path) -> str | None:
    """The name of the best step, as Hugging Face's trainer writes it into each step."""
    path = step / "trainer_state.json"
    content: Any = read_json(path) if path.is_file() else None
    best = content.get("best_model_checkpoint") if isinstance(content, Mapping) else None
    return re.split(r"[/\\]", best)[-1] if isinstance(best, str) else None


def _count(name: str) -> list[int]:
    return [int(count) for count in re.findall(r"\d+", name)]


def _outstanding(names: Sequence[str]) -> tuple[str | None, str]:
    """The best or the newest of several checkpoints by their names; None if no name says it.

    >>> _outstanding(["last.pth.tar", "model_best.pth.tar"])
    ('model_best.pth.tar', 'the best')
    >>> _outstanding(["epoch=9-step=90.ckpt", "epoch=10-step=100.ckpt", "last.ckpt"])
    ('last.ckpt', 'the newest')
    >>> _outstanding(["resnet18.pth", "resnet50.pth"])
    (None, '')
    """
    best = [name for name in names if _BEST.search(name)]
    if len(best) == 1:
        return best[0], "the best"
    called = [name for name in names if name.split(".")[0] in ("model", "pytorch_model")]
    if len(called) == 1 and not best:
        return called[0], "the model"
    names = best or names
    last = [name for name in names if _LAST.search(name)]
    counts = {
        name: [int(count) for _, count in _COUNTED.findall(name)]
        for name in names
        if name not in last
    }
    if not all(counts.values()):
        return None, ""
    if len(last) == 1:
        return last[0], "the newest"
    if last or len({re.sub(r"\d+(\.\d+)?", "#", name) for name in names}) > 1:
        return None, ""
    return max(names, key=lambda name: counts[name]), "the newest"


def originals(names: Iterable[str]) -> list[str]:
    """The names of weight files, sorted; ONNX models only where there is nothing else.

    They are exports of the other files, with less in them.

    >>> originals(["net.onnx", "net.pth"])
    ['net.pth']
    """
    found = sorted(names)
    return [name for name in found if not name.endswith(".onnx")] or found


def weights_in(folder: Path, suffixes: Suffixes) -> list[str]:
    """The names of checkpoints in a folder; the parts of one with an index are left out.

    A file of flax's ``save_checkpoint``, such as ``checkpoint_500``, has no suffix.
    """
    names = [entry.name for entry in folder.iterdir() if not entry.is_dir()]
    names = [name for name in names if not _NO_NETWORK.fullmatch(name)]
    indices = [
        name
        for name in names
        if name.removesuffix(INDEX).endswith(suffixes) and name.endswith(INDEX)
    ]
    whole = {name.removesuffix(INDEX) for name in indices}
    files = [
        name
        for name in names
        if (name.endswith(suffixes) or ("." not in name and _COUNTED.fullmatch(name)))
        and not ((part := _PART.fullmatch(name)) and f"{part[1]}{part[4]}" in whole)
    ]
    return originals([*files, *indices])


_FOREIGN = (
    ("saved_model.pb", "TensorFlow's SavedModel, a program; save the weights of the Keras model"),
    (
        ".metadata",
        "a distributed checkpoint of torch; convert it with dcp_to_torch_save of "
        "torch.distributed.checkpoint.format_utils",
    ),
    ("*.ckpt.index", "a checkpoint of TensorFlow, which is not read; save the weights from Keras"),
    ("*.data-00000-of-*", "a checkpoint of TensorFlow; save the weights from Keras"),
)
"""Files that say what a folder is that is not read, and what to do instead."""


def nothing_in(folder: Path, suffixes: Suffixes) -> str:
    """The error for a folder without a checkpoint: what it is, or where checkpoints are."""
    for pattern, what in _FOREIGN:
        if any(folder.glob(pattern)):
            return f"the folder {shortened(str(folder), 150)} is {what}"
    steps = sorted(map(str, folder.glob("checkpoints/[0-9]*")))
    below = sorted(
        str(path.relative_to(folder))
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.is_symlink()
        for path in (entry, *(inner for inner in entry.iterdir() if inner.is_dir()))
        if weights_in(path, suffixes)
    )
    return (
        f"the folder {shortened(str(folder), 150)} holds 0 checkpoints: no "
        f"{', '.join(suffixes)} file, and nothing that orbax wrote"
        + (
            f"; the steps of an unfinished run are {shortened(', '.join(steps), 200)}"
            if steps
            else ""
        )
        + (f"; folders below with some: {shortened(', '.join(below), 200)}" if below else "")
    )
