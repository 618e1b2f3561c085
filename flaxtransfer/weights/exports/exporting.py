"""Export weights to other programs, verified before they replace anything.

``export`` writes a file or folder, reads it again, compares the logits, and only then gives it its
final name. StableHLO, which ``jax.export`` reads without this package, and the networks of
``keras.applications`` are written here.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from flaxtransfer.files import atomic_write, write_file
from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.models.layers import lax_conv
from flaxtransfer.models.layout import DEPTHS
from flaxtransfer.models.registry import RESNETS, resnet
from flaxtransfer.paths import flatten, suggest, unflatten
from flaxtransfer.weights.exports import hub, onnx
from flaxtransfer.weights.exports.prepare import (
    canonicalize,
    check_file,
    check_folder,
    export_metadata,
    in_units,
)
from flaxtransfer.weights.loading import load
from flaxtransfer.weights.naming import keras
from flaxtransfer.weights.naming.native import HEADER_KEY
from flaxtransfer.weights.preprocessing import OF_BANDS
from flaxtransfer.weights.pretrained import Pretrained, save, write_header
from flaxtransfer.weights.readers import array_files

__all__ = [
    "LAYOUTS",
    "Exported",
    "export",
    "stablehlo_bytes",
    "stablehlo_logits",
    "stablehlo_metadata",
]


LAYOUTS = ("safetensors", "torchvision", "timm", "huggingface", "keras", "onnx", "stablehlo")
TOLERANCE = 5e-5
"""Relative to the largest logit, in float32; the order of sums differs. Of random networks one with
group normalization had 1.2e-5 in onnxruntime."""
HALF_TOLERANCE = 5e-2
"""The same for a computation in float16, whose numbers have 3 digits; usual are 1e-3 to 5e-3."""
_HALF = ("safetensors", "torchvision", "onnx")
"""Layouts that may be float16."""
_SUFFIXES = {
    ".safetensors": "safetensors",
    ".onnx": "onnx",
    ".stablehlo": "stablehlo",
    ".h5": "keras",
}


@dataclasses.dataclass(frozen=True)
class Exported:
    """The result of ``export``.

    Args:
        path: the file or folder.
        layout: one of ``LAYOUTS``.
        difference: of the logits before and after, relative to the largest; 0 is bit-identical.
        notes: what was changed: an adapter folded, channels added.
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
    """Exports a checkpoint to another program, with its preprocessing and labels.

    The result is read again and its logits are compared before it gets its name: the target is
    complete and verified, or absent. A regression's mean and scale are folded into the head, so
    that every program gets values in the units of the targets; a network of several labels gives
    logits, whose sigmoids are the probabilities.

    Args:
        checkpoint: from ``load``, or built from trained variables.
        target: a file, or a folder for "timm" and "huggingface".
        to: "safetensors" (for this package, torchvision's or timm's names), "torchvision" (the
            same, refused unless torchvision has the network), "timm" (a folder for
            ``timm.create_model("local-dir:...", pretrained=True)``, with a Python file to import
            before it where timm's arguments do not suffice; the notes say so), "huggingface" (a
            folder for
            ``AutoModelForImageClassification.from_pretrained``), "keras" (an ``.h5`` file for
            ``load_weights`` of ``keras.applications.ResNet50`` and similar; needs the extra
            ``keras``), "onnx" (one file with BatchNorm folded; input ``[batch, bands, height,
            width]``), or "stablehlo" (one file for ``jax.export.deserialize`` and its JSON; input
            ``[batch, size, size, bands]``, any of CPU, GPU and TPU). None reads it off the target's
            suffix.
        dtype: float32 or float16, for "safetensors", "torchvision" and "onnx", which then also
            computes in float16; its input and logits stay float32.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: an unknown layout, a network that the other program lacks, a folder that holds
            other files, or a result with other logits.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(export(load("builtin"), f"{folder}/net.safetensors").difference)
    0.0
    """
    target = Path(target)
    layout = _layout(target, to)
    kinds = ("float32", "float16") if layout in _HALF else ("float32",)
    if np.dtype(dtype).name not in kinds:
        raise ValueError(f"dtype must be {' or '.join(kinds)} for {layout}, got {np.dtype(dtype)}")
    if checkpoint.config.head_reads and layout not in ("safetensors", "stablehlo"):
        raise ValueError(
            f"{layout} files are of networks whose head reads one depth, and the head of "
            f"{checkpoint.config.name} reads several; use --to safetensors or stablehlo, or train "
            "depth_head or solved_head"
        )
    checkpoint = in_units(checkpoint)
    if layout in _FOLDERS:
        return _export_folder(checkpoint, target, layout)
    return _export_file(checkpoint, target, layout, np.dtype(dtype))


_FOLDERS: dict[str, tuple[Sequence[str], Callable[[Pretrained], Any]]] = {
    "timm": (hub.TIMM_FILES, hub.timm_files),
    "huggingface": (hub.HUGGINGFACE_FILES, hub.huggingface_files),
}
"""The names of the files of a folder, and what makes them."""


def _layout(target: Path, to: str | None) -> str:
    if to is None and target.suffix not in _SUFFIXES:
        raise ValueError(
            f"target must end in {', '.join(_SUFFIXES)}, or give to="
            + ", to=".join(LAYOUTS)
            + f"; got {target}"
        )
    layout = to or _SUFFIXES[target.suffix]
    if layout not in LAYOUTS:
        raise ValueError(
            f"unknown layout {layout!r}{suggest(layout, LAYOUTS)}; known: {', '.join(LAYOUTS)}"
        )
    return layout


def _export_file(
    checkpoint: Pretrained, target: Path, layout: str, dtype: np.dtype[Any]
) -> Exported:
    check_file(target)
    if layout == "torchvision":
        checkpoint = canonicalize(checkpoint, exporting="torchvision")
        _check_torchvision(checkpoint.config)
    if layout == "keras":
        if target.suffix != ".h5" or target.name.endswith(".weights.h5"):
            # Keras goes by the name of a file, and calls its own layout so.
            raise ValueError(f"target must end in .h5 and not in .weights.h5, got {target.name!r}")
        checkpoint = _as_keras(checkpoint)
    notes = checkpoint.notes
    with atomic_write(target) as made:
        if layout in ("safetensors", "torchvision"):
            save(made, checkpoint, dtype)
            measure = _difference if dtype == np.float32 else _half
            difference = measure(checkpoint, _loaded(made))
        elif layout == "keras":
            arrays = keras.to_keras(flatten(checkpoint.variables), checkpoint.config)
            header = {HEADER_KEY: write_header(checkpoint)[HEADER_KEY]}
            write_file(made, array_files.write_hdf5(arrays, header))
            difference = _difference(checkpoint, _loaded(made))
            notes = (*checkpoint.notes, _in_keras(checkpoint))
        elif layout == "onnx":
            data = onnx.model_bytes(checkpoint, dtype)
            write_file(made, data)
            run = onnx.runner(data)
            limit = TOLERANCE if dtype == np.float32 else HALF_TOLERANCE
            difference = _difference(checkpoint, run or _loaded(made), limit)
            notes = (*notes, *_about_onnx(dtype, ran=run is not None))
        else:
            data = stablehlo_bytes(checkpoint)
            difference = _difference(checkpoint, lambda images: stablehlo_logits(data, images))
            write_file(made, data)
            with atomic_write(target.with_name(f"{target.name}.json")) as sidecar:
                write_file(sidecar, stablehlo_metadata(checkpoint))
    return Exported(target, layout, difference, notes)


def _about_onnx(dtype: np.dtype[Any], *, ran: bool) -> list[str]:
    how = "" if dtype == np.float32 else "computes in float16; images and logits are float32"
    told = (
        "run by onnxruntime"
        if ran
        else "compared by this package, because onnxruntime is not installed"
    )
    return [note for note in (how, told) if note]


def _export_folder(checkpoint: Pretrained, target: Path, layout: str) -> Exported:
    names, files_of = _FOLDERS[layout]
    check_folder(target, names)
    files, plain = files_of(checkpoint)
    with atomic_write(target) as made:
        made.mkdir()
        for name, data in files.items():
            write_file(made / name, data)
        difference = _difference(checkpoint, _loaded(made))
    return Exported(target, layout, difference, (*plain.notes, *_left_behind(checkpoint, layout)))


def _left_behind(checkpoint: Pretrained, layout: str) -> list[str]:
    """The metadata that the other program's files cannot hold."""
    fields = checkpoint.preprocessing.to_json()
    lost = [f"{name} {fields[name]}" for name in OF_BANDS if name in fields]
    notes = []
    if lost:
        notes.append(f"{layout} cannot store the description of the bands: {'; '.join(lost)}")
    theirs, rule = (
        ("huggingface", "down") if layout == "huggingface" else ("torchvision", "to even")
    )
    if checkpoint.preprocessing.processor != theirs:
        notes.append(f"{layout} rounds crops {rule}: some images are shifted by one pixel")
    return notes


_PLATFORMS = ("cpu", "cuda", "tpu")


def stablehlo_bytes(checkpoint: Pretrained) -> bytes:
    """The serialized function from images ``[batch, size, size, bands]`` to logits, weights inside.

    The batch size is free; height and width are those of the preprocessing.
    """
    # `conv` is tuned for the current CPU; the artifact runs on any platform.
    model = resnet(checkpoint.config, convolution=lax_conv)
    variables = jax.tree.map(jnp.asarray, checkpoint.variables)

    def network(images: jax.Array) -> jax.Array:
        return model.apply(variables, images)[0]

    (batch,) = jax_export.symbolic_shape("batch")
    size = checkpoint.preprocessing.size
    images = jax.ShapeDtypeStruct((batch, size, size, checkpoint.config.bands), jnp.float32)  # type: ignore[no-untyped-call]
    return bytes(jax_export.export(jax.jit(network), platforms=_PLATFORMS)(images).serialize())


def stablehlo_metadata(checkpoint: Pretrained) -> bytes:
    """The JSON file next to it, because StableHLO holds no metadata."""
    size = checkpoint.preprocessing.size
    content = {
        **export_metadata(checkpoint, f"[batch, {size}, {size}, bands]"),
        "preprocessing": checkpoint.preprocessing.to_json(),
        "class_names": checkpoint.class_names,
        "config": checkpoint.config.to_json(),
        "platforms": _PLATFORMS,
        "jax": jax.__version__,
        "use": "jax.export.deserialize(bytearray(open(path, 'rb').read())).call(images)",
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def stablehlo_logits(data: bytes, images: np.ndarray) -> np.ndarray:
    """Runs it on images ``[batch, size, size, bands]``."""
    return np.asarray(jax_export.deserialize(bytearray(data)).call(images))  # type: ignore[no-untyped-call]


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
            f"torchvision has no {config.name}; use --to timm, huggingface, onnx or stablehlo"
        )


def _as_keras(checkpoint: Pretrained) -> Pretrained:
    """The network as ``keras.applications`` builds it: the same function.

    Raises:
        ValueError: a network that its functions cannot build, by the fields that differ.
    """
    checkpoint = canonicalize(checkpoint, exporting="keras.applications", epsilon=keras.EPSILON)
    config = checkpoint.config
    second = config.preactivation
    if second and config.stem == "plain" and not config.stem_bias:
        flat = flatten(checkpoint.variables)
        flat["params/conv1/bias"] = np.zeros(config.stem_channels, np.float32)
        config = dataclasses.replace(config, stem_bias=True)
        checkpoint = dataclasses.replace(
            checkpoint, variables=unflatten(flat), config=config, sha256=""
        )
    free = ("depths", "width", "classes", "in_channels", "stem_bias", "preactivation", "epsilon")
    like = ResNetConfig(
        "bottleneck",
        stem_width=64,
        stride_in="3x3" if second else "1x1",
        stride_at="last" if second else "first",
        stem_pool="zero-padded" if second else "max",
        **{name: getattr(config, name) for name in free},
    )
    odd = [
        f"{name} must be {getattr(like, name)!r}, got {value!r}"
        for name, value in vars(config).items()
        if value != getattr(like, name)
    ]
    if second and min(config.depths) < 2:
        odd.append(f"depths must be at least 2, got {config.depths}")
    if not second and config.width * config.expansion == 64:
        odd.append("width must not be 16, at which its first block alone has a shortcut")
    if odd:
        raise ValueError(
            f"keras.applications has no {config.name}: {'; '.join(odd)}; use --to onnx, stablehlo "
            "or timm"
        )
    return checkpoint


def _in_keras(checkpoint: Pretrained) -> str:
    """How a Keras user builds the network, and prepares images for it."""
    config, own = checkpoint.config, checkpoint.preprocessing
    known = {depths: depth for depth, (block, depths) in DEPTHS.items() if block == "bottleneck"}
    version = "V2" if config.preactivation else ""
    network = f"stacks of {config.depths} blocks from {config.width} filters"
    if config.depths in known and known[config.depths] >= 50 and config.width == 64:
        network = f"keras.applications.ResNet{known[config.depths]}{version}"
    usual = keras.TF if config.preactivation else keras.CAFFE
    reverse = not config.preactivation and config.bands == 3
    told = f"{'BGR ' if reverse else ''}images as (pixels / 255 - mean) / std of the header"
    if len(own.mean) == 3 and np.allclose((own.mean, own.std), (usual.mean, usual.std), atol=1e-6):
        told = f"images from its preprocess_input, of {own.size} pixels"
    return (
        f"{network} takes it with load_weights, built with weights=None, classes={config.classes} "
        f"and classifier_activation=None for logits; {told}"
    )


def _loaded(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    again = load(path)
    return lambda images: _logits(again, images)


def _half(checkpoint: Pretrained, again: Callable[[np.ndarray], np.ndarray]) -> float:
    """The error of float16, after the file was compared with the rounded network."""

    def rounded(leaf: Any) -> np.ndarray:
        return np.asarray(leaf).astype(np.float16).astype(np.float32)

    half = dataclasses.replace(checkpoint, variables=jax.tree.map(rounded, checkpoint.variables))
    _difference(half, again)
    images = _images(checkpoint)
    return _largest(_logits(checkpoint, images), again(images))


def _difference(
    checkpoint: Pretrained,
    again: Callable[[np.ndarray], np.ndarray],
    limit: float = TOLERANCE,
) -> float:
    images = _images(checkpoint)
    # Accelerators round products more coarsely than the tolerance.
    with jax.default_device(_cpu()):
        difference = _largest(_logits(checkpoint, images), again(images))
    if not difference <= limit:
        raise ValueError(
            f"the logits of the export must be within {limit:.0e} of the largest logit, got a "
            f"difference of {difference:.1e}; nothing was kept"
        )
    return difference


def _cpu() -> jax.Device | None:
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        # JAX is configured for other platforms only.
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
