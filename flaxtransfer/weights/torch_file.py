"""Files of `torch.save`, read without running what they may carry.

Such a file is a pickle, and a pickle can call any function when it is read. Only torch's
restricted reader is used (`weights_only=True`), which knows tensors and plain containers; what it
refuses is refused here.
"""

import argparse
import io
import pickle
import re
import warnings
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from flaxtransfer.weights import archive

__all__ = ["read", "unwrap"]

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "student")
"""Where training scripts keep the weights, best first: an average before what it averages."""


_DAMAGED = "torch cannot read it; it is truncated, damaged or no checkpoint: "


def read(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """Arrays, no metadata, and notes of a whole file.

    Raises:
        ImportError: torch is not installed.
        ValueError: a file that wants to run code, is damaged, or holds no named tensors.
    """
    if data.startswith(b"PK"):
        try:
            archive.check(data)
        except ValueError as error:
            raise ValueError(f"{_DAMAGED}{error}") from error
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "reading .pth, .pt and .bin files needs torch: pip install 'flaxtransfer[torch]'; "
            "or convert the file to .safetensors, which needs nothing"
        ) from error

    try:
        # Training scripts keep their parsed arguments beside the weights: a bag of attributes.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(str(error))) from error
    except Exception as error:
        # What a damaged pickle raises depends on the byte that is wrong: no list is complete.
        raise ValueError(_DAMAGED + f"{type(error).__name__} {error}".splitlines()[0]) from error

    weights, notes = unwrap(content)
    foreign = [
        f"{key} ({type(value).__name__})"
        for key, value in weights.items()
        if not isinstance(key, str) or not isinstance(value, torch.Tensor)
    ]
    if foreign:
        raise ValueError(f"it holds other things than tensors by name: {', '.join(foreign)}")
    return {key: _to_numpy(value, torch) for key, value in weights.items()}, {}, notes


def unwrap(content: Any) -> tuple[Mapping[Any, Any], list[str]]:
    """The weights inside of what a training script saved, and a note on which were taken.

    Raises:
        ValueError: no mapping.

    >>> unwrap({"epoch": 3, "model": {"fc.bias": 0}})
    ({'fc.bias': 0}, ["the weights are those under 'model'"])
    """
    notes: list[str] = []
    while isinstance(content, Mapping):
        present = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if not present:
            return content, notes
        others = f" (not those under {', '.join(map(repr, present[1:]))})" if present[1:] else ""
        notes.append(f"the weights are those under {present[0]!r}{others}")
        content = content[present[0]]
    raise ValueError(f"it holds a {type(content).__name__} and no tensors by name")


def _to_numpy(tensor: Any, torch: Any) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError("it holds sparse or quantised tensors, and weights are dense")
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.resolve_conj().numpy()


def _refusal(reason: str) -> str:
    wanted = re.search(r"GLOBAL\s+(\S+)", reason)
    if wanted is None:
        detail = re.search(r"Unsupported \w+ \S+", reason)
        return _DAMAGED + (detail[0] if detail else reason.splitlines()[0])
    return (
        f"it is refused, and nothing in it was run, because it wants to call {wanted[1]} and "
        "weights are tensors alone. If you trust its author, load it in torch and save "
        "model.state_dict(), best as .safetensors"
    )
