"""numpy's archives of named arrays, read without unpickling."""

import io
import math
import re

import numpy as np
from numpy.lib import format as npy

from flaxtransfer.weights import archive

__all__ = ["read"]


def read(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """Arrays, no metadata and no notes of a whole file.

    Raises:
        ValueError: bytes that are no such archive, or arrays of Python objects, which would have
            to be unpickled.

    >>> file = io.BytesIO()
    >>> np.savez(file, **{"resnet/head/conv2d/bias": np.zeros(2)})
    >>> list(read(file.getvalue())[0])
    ['resnet/head/conv2d/bias']
    """
    arrays = {}
    for name, content in archive.members(data).items():
        try:
            arrays[name.removesuffix(".npy")] = _array(content)
        except Exception as error:
            # What numpy raises for a damaged header depends on the byte that is wrong.
            raise ValueError(f"{name!r} in it is no array: {error}") from error
    return arrays, {}, []


def _array(content: bytes) -> np.ndarray:
    """The array, whose header is compared with its bytes before anything is allocated."""
    file = io.BytesIO(content)
    version = npy.read_magic(file)
    if version == (1, 0):
        shape, by_columns, dtype = npy.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, by_columns, dtype = npy.read_array_header_2_0(file)
    else:
        raise ValueError(f"version {version} of numpy's format, and weights need 1 or 2")
    if dtype.hasobject or dtype.fields or dtype.subdtype:
        raise ValueError(f"it holds {_plain(dtype)} and weights are numbers")
    held, wanted = len(content) - file.tell(), math.prod(shape) * dtype.itemsize
    if held != wanted or min(shape, default=1) < 0:
        raise ValueError(f"by its header it has {wanted:,} bytes, and there are {held:,}")
    array = np.frombuffer(content, dtype, offset=file.tell())
    return array.reshape(shape, order="F" if by_columns else "C")


def _plain(dtype: np.dtype) -> str:
    return re.sub(r"\s+", " ", str(dtype))[:80]
