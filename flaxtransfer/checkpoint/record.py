"""A JSON document that shows whether it was changed after it was written.

For documents that a program writes and later believes. A changed digit in a plain JSON file is
still a valid file; here it no longer matches the digest beside it. It is a guard against bad
disks and half-done copies, not against people: whoever can write the file can write the digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its digest, ready to be written as JSON.

    >>> sorted(seal({"epoch": 3}))
    ['record', 'sha256']
    """
    return {"sha256": _digest(record), "record": dict(record)}


def unseal(text: str) -> dict[str, Any]:
    """The record in a sealed document.

    Raises:
      ValueError: the text is no sealed document, or the record was changed.

    >>> import json
    >>> unseal(json.dumps(seal({"epoch": 3})))
    {'epoch': 3}
    >>> unseal(json.dumps(seal({"epoch": 3})).replace("3}", "7}"))
    Traceback (most recent call last):
    ValueError: the record was changed after it was written: its digest is another one
    """
    try:
        document = json.loads(text)
        record, digest = document["record"], document["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"this is no sealed record ({type(error).__name__}: {error})") from error
    if digest != _digest(record):
        raise ValueError("the record was changed after it was written: its digest is another one")
    return record


def jsonable(value: Any, name: str) -> Any:
    """A copy of ``value`` as JSON will return it: tuples become lists, all else stays.

    Args:
      value: dictionaries with text as keys, lists, tuples, text, Python numbers, booleans, None.
      name: what the value is called in the error.

    Raises:
      TypeError: anything else in it (numpy and jax numbers too); all of it is listed by place.

    >>> jsonable({"sizes": (224, 256)}, "meta")
    {'sizes': [224, 256]}
    """
    wrong: list[str] = []

    def copy(part: Any, place: str) -> Any:
        if isinstance(part, Mapping):
            wrong.extend(f"{place}: the key {k!r} is no text" for k in part if type(k) is not str)
            return {key: copy(item, f"{place}[{key!r}]") for key, item in part.items()}
        if isinstance(part, list | tuple):
            return [copy(item, f"{place}[{i}]") for i, item in enumerate(part)]
        if part is not None and type(part) not in (str, bool, int, float):
            wrong.append(f"{place}: is a {type(part).__module__}.{type(part).__name__}")
        return part

    result = copy(value, name)
    if wrong:
        raise TypeError(
            f"{name} must hold dictionaries with text as keys, lists, text, Python numbers, "
            "booleans and None:\n  " + "\n  ".join(wrong)
        )
    return result


def _digest(record: Any) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
