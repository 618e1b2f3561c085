"""The run folder: configuration, split, environment, metrics, audit and result."""

from __future__ import annotations

import hashlib
import io
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxtransfer.classifier import Classifier
from flaxtransfer.data.source import Source
from flaxtransfer.data.splits import Split, Splits
from flaxtransfer.files import (
    MAKE_AGAIN,
    MANIFEST_FILE,
    atomic_write,
    check_regular,
    read_json,
    seal,
    seal_problems,
    sealed,
    sha256_of,
    write_file,
    write_json,
)
from flaxtransfer.paths import Params, flatten
from flaxtransfer.task import SINGLE_LABEL, Task, Units, task_named
from flaxtransfer.training.console import METRICS_FILE
from flaxtransfer.training.evaluation import Evaluation, Predictions
from flaxtransfer.training.plan import Phase
from flaxtransfer.weights.pretrained import Pretrained, save
from flaxtransfer.weights.readers.archives import read_npz


@dataclass(frozen=True)
class Audit:
    """The frozen leaves and frozen BatchNorm statistics of one phase, at its start and end.

    Args:
        phase: the phase's name.
        leaves: how many were compared.
        moved: paths of those that are not bit for bit what they were.
    """

    phase: str
    leaves: int
    moved: tuple[str, ...]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Audit:
        """The audit that ``dataclasses.asdict`` wrote."""
        return cls(value["phase"], value["leaves"], tuple(value["moved"]))

    def __str__(self) -> str:
        if self.moved:
            return f"{self.phase}: {len(self.moved)} frozen leaves MOVED: {', '.join(self.moved)}"
        return f"{self.phase}: all {self.leaves} frozen leaves are bit-identical to their start"


def frozen_digests(params: Params, batch_stats: Params, phase: Phase) -> dict[str, str]:
    """SHA-256 of shape, dtype and bytes of every leaf that ``phase`` may not move."""
    digests = {
        f"params/{path}": digest(leaf)
        for path, leaf in flatten(phase.param_groups.frozen(params)).items()
    }
    norm = phase.batch_norm_policy()
    for path, leaf in flatten(batch_stats).items():
        module = path.rpartition("/")[0]
        if norm == "running" or (norm != "batch" and module not in norm):
            digests[f"batch_stats/{path}"] = digest(leaf)
    return digests


def compare(phase: Phase, before: Mapping[str, str], after: Mapping[str, str]) -> Audit:
    """Compares the digests of a phase's start and end."""
    moved = sorted(path for path in before if before[path] != after.get(path))
    return Audit(phase.name, len(before), tuple(moved))


def digest(leaf: Any) -> str:
    """SHA-256 over dtype, shape and bytes: equal exactly when the arrays are bit-identical."""
    array = np.asarray(jax.device_get(leaf))
    header = f"{array.dtype} {array.shape} ".encode()
    return hashlib.sha256(header + array.tobytes()).hexdigest()


CHECKPOINTS = "checkpoints"
FEATURES = "features"
TENSORBOARD = "tensorboard"
RACE = "race"
CONFIG_FILE = "config.json"
SPLIT_FILE = "split.json"
ENVIRONMENT_FILE = "environment.json"
AUDIT_FILE = "audit.json"
RESULT_FILE = "result.json"
WEIGHTS_FILE = "model.safetensors"
VALIDATION_FILE = "validation.npz"

_SEALED = (
    CONFIG_FILE,
    SPLIT_FILE,
    ENVIRONMENT_FILE,
    AUDIT_FILE,
    METRICS_FILE,
    VALIDATION_FILE,
    WEIGHTS_FILE,
    RESULT_FILE,
)
"""What the manifest of a finished run covers, besides the digests of frozen leaves. Checkpoints
have checksums of their own, and seal what is written before the run has finished."""

_LEFTOVER = re.compile(r"\..+\.([a-z0-9_]{8}|tmp)")
"""What ``atomic_write`` calls its temporary folders, and ``replace_file`` its files."""


def frozen_file(phase: int) -> str:
    """The file with the digests of the leaves that do not move in a phase."""
    return f"frozen-{phase}.json"


def matches(path: Path, sha256: str) -> bool:
    try:
        return sha256_of(path) == sha256
    except (FileNotFoundError, ValueError):
        return False


def write_frozen(folder: Path, name: str, digests: Mapping[str, str]) -> str:
    """Writes digests of frozen leaves; returns the digest of the file."""
    write_json(folder / name, dict(digests))
    return sha256_of(folder / name)


def read_frozen(folder: Path, name: str, sha256: str | None) -> dict[str, str] | None:
    """The digests of frozen leaves, or None where the file is not the one that was written."""
    if sha256 is None or not matches(folder / name, sha256):
        return None
    kept: dict[str, str] = read_json(folder / name)
    return kept


def remove_leftovers(folder: Path) -> None:
    """Removes what killed writers left half-written; only for the holder of the folder's lock."""
    for path in folder.iterdir():
        if not _LEFTOVER.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.suffix == ".tmp":
            path.unlink(missing_ok=True)


def seal_run(folder: Path, *others: str) -> None:
    """Writes the manifest of a finished run, with files that were written beside it."""
    frozen = sorted(path.name for path in folder.glob("frozen-*.json"))
    seal(folder, (*_SEALED, *frozen, *others))


def check_sealed(folder: Path, name: str) -> Path:
    """The path of a file of a finished run, if it is what the run wrote.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it, or the manifest that tells, was damaged or changed.
    """
    _manifest_for(folder, name)
    if problems := seal_problems(folder, [name]):
        raise ValueError(f"{folder / name} {problems[name]}; {MAKE_AGAIN}")
    return folder / name


def _manifest_for(folder: Path, name: str) -> dict[str, str]:
    """The digests of a run's files, of which one is to be read."""
    try:
        return sealed(folder)
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder / MANIFEST_FILE} is missing, so that {name} cannot be trusted; {MAKE_AGAIN}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{error}, so that {name} cannot be trusted; {MAKE_AGAIN}") from error


def run_problems(folder: Path, names: Sequence[str] | None = None) -> list[str]:
    """What of a finished run is damaged, each with its file; none if all is as it was written.

    Args:
        folder: of the run.
        names: of the files to look at, where the run has them; by default all.
    """
    try:
        found = seal_problems(folder)
        if names is not None:
            found = {name: text for name, text in found.items() if name in names}
    except (FileNotFoundError, ValueError) as error:
        text = str(error)
        return [text if isinstance(error, ValueError) else f"{folder / MANIFEST_FILE} is missing"]
    return [f"{folder / name} {problem}" for name, problem in found.items()]


def split_of(folder: Path) -> Split:
    """Which examples a run trained, validated and tested on.

    Raises:
        FileNotFoundError: the folder keeps none.
        ValueError: the file is damaged.
    """
    path = folder / SPLIT_FILE
    if not path.is_file() and not _is_sealed(folder, SPLIT_FILE):
        raise FileNotFoundError(
            f"the run in {folder} keeps no split (no {SPLIT_FILE}): its batches were not made by "
            "ft.loaders; say with --data what to use instead"
        )
    if (folder / MANIFEST_FILE).exists():
        check_sealed(folder, SPLIT_FILE)
    value = read_json(path)
    try:
        return Split.from_json(value)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: it is no record of a split ({error!r})") from error


def kept_splits(folder: str | os.PathLike[str], source: Source) -> Splits:
    """The split of a run, as positions in a source; for ``ft.loaders`` when the run is resumed.

    Examples that are new since are in ``rest``.

    Raises:
        FileNotFoundError: the folder keeps no split.
        ValueError: the file is damaged, or examples of the run are missing from the source.
    """
    return split_of(Path(folder)).positions(source)


def _is_sealed(folder: Path, name: str) -> bool:
    """Whether a finished run wrote this file."""
    return (folder / MANIFEST_FILE).exists() and name in sealed(folder)


def task_of(folder: Path) -> Task:
    """The task of a run, with its metric and the units of its targets.

    Raises:
        FileNotFoundError: it is not a run folder.
        ValueError: the task is unknown, or the configuration is damaged.
    """
    path = folder / CONFIG_FILE
    config = _config_of(folder)
    name = config.get("task") if isinstance(config, dict) else None
    if not isinstance(name, str):
        raise ValueError(f"{path} is damaged: it names no task")
    task, targets = task_named(name), config.get("targets")
    try:
        if targets is not None:
            task = task.with_units(Units(targets["mean"], targets["scale"]))
        return task.ranked_by(config.get("metric", task.ranking))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def compute_of(folder: Path) -> str:
    """The number type that a run's network computes in, such as bfloat16.

    Raises:
        FileNotFoundError: it is not a run folder.
        ValueError: the configuration is damaged.
    """
    path = folder / CONFIG_FILE
    config = _config_of(folder)
    name = config.get("compute") if isinstance(config, dict) else None
    try:
        if isinstance(name, str) and jnp.issubdtype(jnp.dtype(name), jnp.floating):
            return name
    except TypeError:
        pass
    raise ValueError(f"{path} is damaged: it names no number type to compute in")


def _config_of(folder: Path) -> Any:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder (it has no {CONFIG_FILE})")
    return read_json(path)


def weights_of(folder: Path) -> Path:
    """The weights of a finished run; ``load`` compares them with the manifest.

    Raises:
        FileNotFoundError: there is no such folder, or the run in it has not finished.
        ValueError: they are missing from a finished run, or its manifest is damaged.
    """
    path = folder / WEIGHTS_FILE
    if path.is_file() or (folder / MANIFEST_FILE).is_file():
        if WEIGHTS_FILE not in _manifest_for(folder, WEIGHTS_FILE):
            raise ValueError(f"{path} is not in the manifest; {MAKE_AGAIN}")
        if not path.is_file():
            raise ValueError(f"{path} is missing; {MAKE_AGAIN}")
        return path
    if (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"the run in {folder} has not finished (no {WEIGHTS_FILE}); "
            "continue it with flaxtransfer train --resume"
        )
    runs = sorted(str(p.parent) for p in folder.parent.glob(f"*/{WEIGHTS_FILE}"))
    raise FileNotFoundError(
        f"{folder} is not a run folder"
        + (f"; runs beside it: {', '.join(runs)}" if runs else " (it has no config.json)")
    )


def write_audits(folder: Path, audits: Sequence[Audit]) -> None:
    """Writes what the audits of the phases so far have found."""
    write_json(folder / AUDIT_FILE, [asdict(audit) for audit in audits])


def finish(
    folder: Path,
    network: Classifier,
    steps: int,
    predicted: Predictions | None,
    validation: Evaluation | None,
    damage: Sequence[str] = (),
) -> None:
    """Writes the weights with their preprocessing, the result, and the manifest that ends the run.

    What the network says about the validation examples stays with it: calibration, and all that
    is estimated about other images later, needs them.

    Args:
        folder: of the run.
        network: as it was trained.
        steps: that were made.
        predicted: of the validation examples, with features, which are kept in half precision;
            None where there are none.
        validation: the means over them.
        damage: what the run lost on its way.
    """
    checkpoint = Pretrained(
        variables=jax.tree.map(np.asarray, jax.device_get(network.variables)),
        config=network.model.config,
        preprocessing=network.preprocessing,
        source=str(folder),
        format="flaxtransfer",
        sha256="",
        class_names=network.class_names or None,
        task=network.task,
    )
    save(folder / WEIGHTS_FILE, checkpoint)
    if predicted is not None:
        arrays = io.BytesIO()
        np.savez(arrays, allow_pickle=False, **_arrays(predicted))
        with atomic_write(folder / VALIDATION_FILE) as path:
            write_file(path, arrays.getvalue())
    result = {
        "steps": steps,
        "validation": None if validation is None else validation.to_json(),
        "environment": environment(),
        "determinism": DETERMINISM,
    }
    write_json(folder / RESULT_FILE, result | ({"damage": list(damage)} if damage else {}))
    seal_run(folder)


def validation_of(folder: Path) -> Predictions:
    """What a finished run's network says about its validation examples.

    Raises:
        FileNotFoundError: the run had none, or has not finished.
        ValueError: the file is damaged.
    """
    weights_of(folder)
    path = folder / VALIDATION_FILE
    if not path.is_file() and not _is_sealed(folder, VALIDATION_FILE):
        raise FileNotFoundError(
            f"the run in {folder} keeps no validation examples (no {VALIDATION_FILE}); train with "
            "--val-per-class or --val-fraction to have some"
        )
    check_sealed(folder, VALIDATION_FILE)
    try:
        check_regular(path)
        found, *_ = read_npz(path.read_bytes())
        logits, labels, features = (found["logits"], found["labels"], found.get("features"))
        task = SINGLE_LABEL if labels.ndim == 1 else task_of(folder)
        kept = Predictions(logits, labels, features, task=task)
        rows = {len(a) for a in (kept.logits, kept.labels, kept.features) if a is not None}
        if len(rows) > 1:
            raise ValueError(f"its arrays have {', '.join(map(str, sorted(rows)))} rows")
        return kept
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


DETERMINISM = {
    "same bits": [
        "another process",
        "interrupted and resumed",
        "compilation cache full or empty",
        "cached activations found or made anew",
    ],
    "to rounding": [
        "number of cores",
        "number of devices",
        "kind of device",
        "versions of jax and jaxlib",
        "activations cached or not",
        "large parameters split or not",
    ],
}
"""Which changes keep the bits of a result; README says the same."""


def environment() -> dict[str, Any]:
    """The versions, cores and devices that a run saw."""
    packages = (
        "flaxtransfer",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "numpy",
    )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages},
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "devices": [str(device) for device in jax.devices()],
    }


def _arrays(validation: Predictions) -> dict[str, np.ndarray]:
    found = {"logits": validation.logits, "labels": validation.labels}
    if validation.features is not None:
        # Half of it is enough for a test, unless a number is too large for it.
        small = bool((np.abs(validation.features) < np.finfo(np.float16).max).all())
        found["features"] = validation.features.astype(np.float16 if small else np.float32)
    return found


def has_checkpoint(folder: Path) -> bool:
    return any(path.name.isdecimal() for path in (folder / CHECKPOINTS).glob("*"))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
