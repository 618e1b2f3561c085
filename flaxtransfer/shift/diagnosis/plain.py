"""Values of this room as what JSON knows."""

import dataclasses
import math
from typing import Any

import numpy as np

__all__ = ["plain"]


def plain(value: Any) -> Any:
    """Dataclasses as objects, arrays as lists, and numbers that are none as null.

    >>> from flaxtransfer.shift.diagnosis.verdicts import Verdict
    >>> plain([Verdict("label", "supported", "because"), np.array([1.0, np.nan])])
    [{'kind': 'label', 'status': 'supported', 'evidence': 'because'}, [1.0, None]]
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
