"""The run folder: configuration, split, environment, metrics, audit and result."""

from __future__ import annotations

import hashlib
import io
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxtransfer.classifier import Classifier
from flaxtransfer.data.splits import Split
from flaxtransfer.files import atomic_write, check_regular, refuse_link, replace_file, write_file
from flaxtransfer.paths import flatten
from flaxtransfer.task import Task, task_named
from flaxtransfer.training.evaluation import Evaluation, Predictions
from flaxtransfer.training.plan import Phase, Plan
from flaxtransfer.training.step import State
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

    def __str__(self) -> str:
        if self.moved:
            return f"{self.phase}: {len(self.moved)} frozen leaves MOVED: {', '.join(self.moved)}"
        return f"{self.phase}: all {self.leaves} frozen leaves are bit-identical to their start"


def frozen_digests(state: State, phase: Phase) -> dict[str, str]:
    """SHA-256 of shape, dtype and bytes of every leaf that ``phase`` may not move."""
    digests = {
        f"params/{path}": digest(leaf)
        for path, leaf in flatten(phase.param_groups.frozen(state.params)).items()
    }
    norm = phase.batch_norm_policy()
    for path, leaf in flatten(state.batch_stats).items():
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


METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends one JSON object a line to ``<folder>/metrics.jsonl``.

    Opening it for a run that continues at ``step`` drops the lines that an interrupted process
    wrote after its last checkpoint (they will be written again), and a torn last line.

    Args:
        folder: the run folder.
        step: the step the run continues at; 0 for a new run.
        tensorboard: also write events to ``<folder>/tensorboard`` (extra ``tb``).

    Raises:
        ValueError: ``tensorboard`` without the extra.
    """

    def __init__(self, folder: Path, *, step: int = 0, tensorboard: bool = False) -> None:
        self._path = folder / METRICS_FILE
        kept = [row for row in read_metrics(folder) if _happened(row, step)]
        replace_file(self._path, "".join(_line(row) for row in kept).encode())
        self._file = self._path.open("a")
        self._events = _event_writer(folder / TENSORBOARD, step) if tensorboard else None

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Appends ``{"kind": ..., "step": ..., **values}``; NaN and infinities become null."""
        self._file.write(_line({"kind": kind, "step": step, **values}))
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All complete lines of a run's metrics, in order; an empty list if there are none."""
    path = folder / METRICS_FILE
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _happened(row: Mapping[str, Any], step: int) -> bool:
    """Whether a run that continues at this step will not write the row again."""
    # A decision follows the checkpoint of its step, and is taken again from it.
    return step > 0 and (row["step"] < step or (row["step"] == step and row["kind"] != "decision"))


def _line(row: Mapping[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite) + "\n"


def _event_writer(folder: Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "TensorBoard events need the extra 'tb': pip install 'flaxtransfer[tb]'"
        ) from error
    return SummaryWriter(str(folder), purge_step=step or None)


CHECKPOINTS = "checkpoints"
FEATURES = "features"
TENSORBOARD = "tensorboard"
CONFIG_FILE = "config.json"
SPLIT_FILE = "split.json"
ENVIRONMENT_FILE = "environment.json"
AUDIT_FILE = "audit.json"
RESULT_FILE = "result.json"
WEIGHTS_FILE = "model.safetensors"
VALIDATION_FILE = "validation.npz"


def identity(
    network: Classifier, plan: Plan, seed: int, config: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What makes a run this run and no other, as plain JSON."""
    raw = {
        "model": network.model.config.to_json(),
        "task": network.task.name,
        "seed": seed,
        **plan.identity(),
        **(config or {}),
    }
    plain: dict[str, Any] = json.loads(json.dumps(raw))
    return plain


def check(folder: Path, wanted: Mapping[str, Any], *, resume: bool) -> None:
    """Refuses a folder that holds another run, or an unfinished one that is not to be resumed.

    Raises:
        ValueError: see above; the text lists every setting that differs.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        others = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        if [name for name in others if not name.startswith(".")]:
            raise ValueError(
                f"{folder} is not a run folder (it has no {CONFIG_FILE}, but "
                f"{', '.join(others[:3])}{', ...' if len(others) > 3 else ''}); give a new folder"
            )
        return
    try:
        existing = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not readable as JSON ({error}); give a new folder") from error
    if not _has_checkpoint(folder):
        return  # It never got anywhere: there is nothing to lose and nothing to continue.
    differences = list(_differences(existing, wanted))
    if differences:
        raise ValueError(
            f"{folder} belongs to another run: {'; '.join(differences)}; give a new folder"
        )
    if not resume:
        state = "a finished" if (folder / RESULT_FILE).exists() else "an unfinished"
        raise ValueError(
            f"{folder} holds {state} run of this very configuration; add --resume (resume=True) "
            "to continue it, or give a new folder"
        )


def prepare(folder: Path, wanted: Mapping[str, Any], split: Split | None = None) -> None:
    """Writes configuration, environment and split of a run before its first checkpoint.

    Raises:
        ValueError: a folder in it, such as that of the checkpoints, is a symbolic link.
    """
    for name in (CHECKPOINTS, FEATURES, TENSORBOARD):
        refuse_link(folder / name)
    if not _has_checkpoint(folder):
        write_json(folder / ENVIRONMENT_FILE, environment())
        if split is not None:
            write_json(folder / SPLIT_FILE, split.to_json())
        write_json(folder / CONFIG_FILE, wanted)


def split_of(folder: Path) -> Split:
    """Which examples a run trained, validated and tested on.

    Raises:
        FileNotFoundError: the folder keeps none.
        ValueError: the file is damaged.
    """
    path = folder / SPLIT_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"the run in {folder} keeps no split (no {SPLIT_FILE}): its batches were not made by "
            "ft.loaders; say with --data what to use instead"
        )
    try:
        return Split.from_json(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def task_of(folder: Path) -> Task:
    """The task of a run.

    Raises:
        FileNotFoundError: it is not a run folder.
        ValueError: the task is unknown, or the configuration is damaged.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder (it has no {CONFIG_FILE})")
    try:
        return task_named(json.loads(path.read_text())["task"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: no readable task ({error})") from error


def weights_of(folder: Path) -> Path:
    """The weights of a finished run.

    Raises:
        FileNotFoundError: there is no such folder, or the run in it has not finished.
    """
    path = folder / WEIGHTS_FILE
    if path.is_file():
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


def read_audits(folder: Path) -> list[Audit]:
    """The audits of the phases that have ended, in order; none for a new run."""
    path = folder / AUDIT_FILE
    rows = json.loads(path.read_text()) if path.exists() else []
    return [Audit(**{**row, "moved": tuple(row["moved"])}) for row in rows]


def finish(
    folder: Path,
    network: Classifier,
    steps: int,
    predicted: Predictions | None,
    validation: Evaluation | None,
) -> None:
    """Writes the weights with their preprocessing, then the result that marks the run as done.

    What the network says about the validation examples stays with it: calibration, and all that
    is estimated about other images later, needs them.

    Args:
        folder: of the run.
        network: as it was trained.
        steps: that were made.
        predicted: of the validation examples, with features, which are kept in half precision;
            None where there are none.
        validation: the means over them.
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
    measured = None if validation is None else validation.to_json()
    write_json(folder / RESULT_FILE, {"steps": steps, "validation": measured})


def validation_of(folder: Path) -> Predictions:
    """What a finished run's network says about its validation examples.

    Features are None where the run is older than they are.

    Raises:
        FileNotFoundError: the run had none, or is older than this file, or has not finished.
        ValueError: the file is damaged.
    """
    weights_of(folder)
    path = folder / VALIDATION_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"the run in {folder} keeps no validation examples (no {VALIDATION_FILE}); train with "
            "--val-per-class or --val-fraction to have some"
        )
    try:
        check_regular(path)
        found, *_ = read_npz(path.read_bytes())
        kept = Predictions(found["logits"], found["labels"], found.get("features"))
        rows = {len(a) for a in (kept.logits, kept.labels, kept.features) if a is not None}
        if len(rows) > 1:
            raise ValueError(f"its arrays have {', '.join(map(str, sorted(rows)))} rows")
        return kept
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader, or a killed writer, sees the old file or the new one."""
    replace_file(path, (json.dumps(value, indent=2) + "\n").encode())


def environment() -> dict[str, Any]:
    """The versions and devices that a run saw."""
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
        "devices": [str(device) for device in jax.devices()],
    }


def _arrays(validation: Predictions) -> dict[str, np.ndarray]:
    found = {"logits": validation.logits, "labels": validation.labels}
    if validation.features is not None:
        # Half of it is enough for a test, unless a number is too large for it.
        small = bool((np.abs(validation.features) < np.finfo(np.float16).max).all())
        found["features"] = validation.features.astype(np.float16 if small else np.float32)
    return found


def _has_checkpoint(folder: Path) -> bool:
    return any(path.name.isdecimal() for path in (folder / CHECKPOINTS).glob("*"))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _differences(existing: Any, wanted: Any, path: str = "") -> Iterator[str]:
    if isinstance(existing, Mapping) and isinstance(wanted, Mapping):
        for name in [*existing, *(n for n in wanted if n not in existing)]:
            inner = f"{path}.{name}" if path else name
            yield from _differences(existing.get(name), wanted.get(name), inner)
    elif existing != wanted:
        yield f"{path} is {existing!r} there and {wanted!r} here"
