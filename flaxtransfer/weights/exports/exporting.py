"""A checkpoint for other programs: written, read again, compared, and only then given its name."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxtransfer.files import atomic_write, write_file
from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.models.registry import RESNETS, resnet
from flaxtransfer.paths import suggest
from flaxtransfer.weights.exports import huggingface, onnx, stablehlo, timm
from flaxtransfer.weights.exports.prepare import canonicalize, check_file, check_folder
from flaxtransfer.weights.loading import load
from flaxtransfer.weights.preprocessing import OF_BANDS
from flaxtransfer.weights.pretrained import Pretrained
from flaxtransfer.weights.saving import save

__all__ = ["LAYOUTS", "Exported", "export"]


LAYOUTS = ("safetensors", "torchvision", "timm", "huggingface", "onnx", "stablehlo")
TOLERANCE = 1e-5
"""Of the largest logit, in float32; sums in another order."""
_SUFFIXES = {".safetensors": "safetensors", ".onnx": "onnx", ".stablehlo": "stablehlo"}


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        path: the file or folder.
        layout: one of `LAYOUTS`.
        difference: of logits before and after, relative to the largest; 0 is bit for bit.
        notes: what was changed on the way: an adapter folded, channels added.
    """

    path: Path
    layout: str
    difference: float
    notes: tuple[str, ...]

    def __str__(self) -> str:
        equal = f"logits within {self.difference:.1e} of the network's"
        return "\n  ".join([f"{self.path} ({self.layout}): read again, {equal}", *self.notes])


def export(
    checkpoint: Pretrained,
    target: str | os.PathLike[str],
    *,
    to: str | None = None,
    dtype: Any = np.float32,
) -> Exported:
    """Writes a checkpoint for another program, with its preprocessing and labels.

    What was written is read again and compared by its logits before it gets its name: the target
    appears whole and right, or not at all.

    Args:
        checkpoint: from `load`, or made of trained variables.
        target: a file, or a folder for "timm" and "huggingface".
        to: "safetensors" (for this package, torchvision's or timm's names), "torchvision" (the
            same, refused unless torchvision has the network), "timm" (a folder for
            `timm.create_model("local-dir:...", pretrained=True)`), "huggingface" (a folder for
            `AutoModelForImageClassification.from_pretrained`), "onnx" (one file; input
            `[batch, bands, height, width]`), or "stablehlo" (one file for `jax.export.deserialize`
            and its JSON; input `[batch, size, size, bands]`, any of CPU, GPU and TPU). None reads
            it off the target's suffix.
        dtype: float32 or float16, for "safetensors" and "torchvision".

    Raises:
        FileNotFoundError: no folder to write into.
        ImportError: "onnx" without onnx.
        ValueError: an unknown layout, a network that the other program has not, a folder that
            holds other things, or a result that computes something else.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(export(load("builtin"), f"{folder}/net.safetensors").difference)
    0.0
    """
    target = Path(target)
    layout = _layout(target, to)
    if layout not in ("safetensors", "torchvision") and np.dtype(dtype) != np.float32:
        raise ValueError(f"{layout} is written in float32, not {np.dtype(dtype)}")
    if layout in _FOLDERS:
        return _export_folder(checkpoint, target, layout)
    return _export_file(checkpoint, target, layout, np.dtype(dtype))


_FOLDERS: dict[str, Any] = {"timm": timm, "huggingface": huggingface}


def _layout(target: Path, to: str | None) -> str:
    if to is None and target.suffix not in _SUFFIXES:
        raise ValueError(
            f"{target} says not what to write: end it in {', '.join(_SUFFIXES)}, or say to="
            + ", to=".join(LAYOUTS)
        )
    layout = to or _SUFFIXES[target.suffix]
    if layout not in LAYOUTS:
        raise ValueError(
            f"no layout {layout!r}{suggest(layout, LAYOUTS)}; there are: {', '.join(LAYOUTS)}"
        )
    return layout


def _export_file(
    checkpoint: Pretrained, target: Path, layout: str, dtype: np.dtype[Any]
) -> Exported:
    check_file(target)
    if layout == "torchvision":
        checkpoint = canonicalize(checkpoint, exporting="torchvision")
        _check_torchvision(checkpoint.config)
    with atomic_write(target) as made:
        if layout in ("safetensors", "torchvision"):
            save(made, checkpoint, dtype)
            measure = _difference if dtype == np.float32 else _half
            difference = measure(checkpoint, _loaded(made))
        elif layout == "onnx":
            data = onnx.model_bytes(checkpoint)
            difference = _difference(checkpoint, lambda images: onnx.logits(data, images))
            write_file(made, data)
        else:
            data = stablehlo.artifact(checkpoint)
            difference = _difference(checkpoint, lambda images: stablehlo.logits(data, images))
            write_file(made, data)
            with atomic_write(target.with_name(f"{target.name}.json")) as words:
                write_file(words, stablehlo.words(checkpoint))
    return Exported(target, layout, difference, checkpoint.notes)


def _export_folder(checkpoint: Pretrained, target: Path, layout: str) -> Exported:
    room = _FOLDERS[layout]
    check_folder(target, room.NAMES)
    files, plain = room.files(checkpoint)
    with atomic_write(target) as made:
        made.mkdir()
        for name, data in files.items():
            write_file(made / name, data)
        difference = _difference(checkpoint, _loaded(made))
    return Exported(target, layout, difference, (*plain.notes, *_left_behind(checkpoint, layout)))


def _left_behind(checkpoint: Pretrained, layout: str) -> list[str]:
    """What the other program's records have no place for."""
    said = checkpoint.preprocessing.to_json()
    lost = [f"{name} {said[name]}" for name in OF_BANDS if name in said]
    return [f"{layout} has no place for what the bands are: {'; '.join(lost)}"] if lost else []


def _check_torchvision(config: ResNetConfig) -> None:
    like = dataclasses.replace(
        ResNetConfig(),
        block=config.block,
        depths=config.depths,
        base_width=config.base_width,
        groups=config.groups,
        classes=config.classes,
        in_channels=config.in_channels,
    )
    depths = {(known.block, known.depths) for known in RESNETS.values()}
    if config != like or (config.block, config.depths) not in depths:
        raise ValueError(
            f"torchvision has no {config.name}; --to timm, huggingface, onnx or stablehlo may hold "
            "it"
        )


def _loaded(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    again = load(path)
    return lambda images: _logits(again, images)


def _half(checkpoint: Pretrained, again: Callable[[np.ndarray], np.ndarray]) -> float:
    """How far float16 is from the network, after what was written was compared with float16."""

    def rounded(leaf: Any) -> np.ndarray:
        return np.asarray(leaf).astype(np.float16).astype(np.float32)

    half = dataclasses.replace(checkpoint, variables=jax.tree.map(rounded, checkpoint.variables))
    _difference(half, again)
    images = _images(checkpoint)
    return _largest(_logits(checkpoint, images), again(images))


def _difference(checkpoint: Pretrained, again: Callable[[np.ndarray], np.ndarray]) -> float:
    images = _images(checkpoint)
    # Accelerators round products more coarsely than what is to be noticed here.
    with jax.default_device(_cpu()):
        difference = _largest(_logits(checkpoint, images), again(images))
    if not difference <= TOLERANCE:
        raise ValueError(
            f"what was written computes something else: logits differ by {difference:.1e} of the "
            f"largest, and {TOLERANCE:.0e} is rounding; nothing was kept"
        )
    return difference


def _cpu() -> jax.Device | None:
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        # JAX was told to know other platforms alone.
        return None


def _images(checkpoint: Pretrained) -> np.ndarray:
    size = checkpoint.preprocessing.size
    shape = (2, size, size, checkpoint.config.bands)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _logits(checkpoint: Pretrained, images: np.ndarray) -> np.ndarray:
    model = resnet(checkpoint.config)
    run = jax.jit(lambda variables, images: model.apply(variables, images)[0])
    return np.asarray(run(checkpoint.variables, images))


def _largest(before: np.ndarray, after: np.ndarray) -> float:
    scale = np.abs(before).max()
    return float(np.abs(before - after).max() / (scale if scale > 0 else 1))
