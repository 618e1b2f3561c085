"""What a run measured, as JSON lines that survive a kill, and as TensorBoard events."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(_line(row) for row in kept))
        temporary.replace(self._path)
        self._file = self._path.open("a")
        self._events = _event_writer(folder / "tensorboard", step) if tensorboard else None

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
