"""From a file to a `Checkpoint`: every key used or excused, every leaf filled, or an error."""

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from flaxtransfer.architectures import RESNETS, VARIANTS, ResNetConfig
from flaxtransfer.paths import suggest, unflatten
from flaxtransfer.weights import huggingface, rename, shipped, tensors, torchvision
from flaxtransfer.weights.architecture import infer, leaf_shapes
from flaxtransfer.weights.checkpoint import Checkpoint
from flaxtransfer.weights.companions import companions

__all__ = ["load"]

FORMATS: dict[str, rename.Table] = {
    "torchvision": torchvision.TABLE,
    "huggingface": huggingface.TABLE,
}

# What keys of networks that are near a ResNet, and are none of ours, look like.
_RELATIVES = {
    r"conv1\.\d+\.weight": "a deep stem (resnet50d and its relatives)",
    r".*\.se\..*": "attention over channels (SE or ECA)",
    r"stages\.\d+\.blocks\..*": "a pre-activation ResNet (ResNetV2 or BiT)",
    r".*\.downsample\.2\..*": "average-pooled shortcuts (resnet50d and its relatives)",
    r"maxpool\..*": "a convolution for the pool (ResNet-RS)",
}


def load(
    source: str | os.PathLike[str],
    *,
    model: str | ResNetConfig | None = None,
    format: str | None = None,
) -> Checkpoint:
    """A pre-trained ResNet from a file, complete or not at all.

    The naming, and from it the network, are read off the keys and shapes; the preprocessing comes
    from the file's header, from `config.json` or `preprocessor_config.json` beside it, or from
    the name that torchvision gave the file, and is ImageNet's first recipe otherwise; `notes` of
    the result say which. Nothing is fetched, and nothing in the file is run.

    Args:
        source: a `.safetensors` file, or a `.pth`, `.pt` or `.bin` file of `torch.save` (needs
            the extra `torch`); or a folder with one; or "builtin", or "builtin:<name>".
        model: what you expect it to be, "resnet50" or a config; classes and image channels are
            the file's own.
        format: "torchvision" (timm's plain ResNets too) or "huggingface"; None reads it off.

    Returns:
        A `Checkpoint` of float32 numpy arrays.

    Raises:
        FileNotFoundError: no such file; the text names the nearest.
        ImportError: the file needs torch.
        ValueError: a file that is damaged, unsafe or of another kind; keys that are missing,
            unexpected or of another shape, all in one text; numbers that are not finite; a
            network other than `model`.

    >>> load("resnet50.onnx")
    Traceback (most recent call last):
    FileNotFoundError: no file 'resnet50.onnx' in ...
    """
    name, path = _locate(source)
    if format is not None and format not in FORMATS:
        raise ValueError(f"no format {format!r}; there are: {', '.join(FORMATS)}")
    file = tensors.read(path)
    chosen = format or _format_of(file)
    shapes = dict(
        found
        for key, array in file.arrays.items()
        if (found := rename.leaf_of(FORMATS[chosen], key, array.shape)) is not None
    )
    if not any(leaf.startswith("params/layer") for leaf in shapes):
        raise ValueError(_no_resnet(file, format))
    config = infer(shapes)
    _check_model(model, config, file.path)
    try:
        leaves = rename.to_leaves(
            FORMATS[chosen],
            file.arrays,
            leaf_shapes(config),
            what=f"{file.path} does not fit {config.name} under {chosen}'s names",
        )
    except ValueError as error:
        raise ValueError(f"{error}{_relatives(file.arrays)}") from None
    leaves, notes = _as_float32(leaves, file.path)
    beside = companions(file, config, chosen)
    return Checkpoint(
        variables=unflatten(leaves),
        config=beside.config,
        preprocessing=beside.preprocessing,
        source=name,
        format=chosen,
        sha256=file.sha256,
        class_names=beside.class_names,
        notes=(*file.notes, *notes, *beside.notes),
    )


def _locate(source: str | os.PathLike[str]) -> tuple[str, Path]:
    text = os.fspath(source)
    if not text:
        raise ValueError("the source is empty: give a file, a folder or 'builtin'")
    if text == shipped.PREFIX or text.startswith(shipped.PREFIX + ":"):
        return shipped.locate(text)
    if "://" in text:
        raise ValueError(
            f"{text}: addresses are not fetched; download the file (for a Hugging Face repository "
            "with `hf download`) and give its path"
        )
    return text, Path(text)


def _format_of(file: tensors.Tensors) -> str:
    """The naming that most keys follow."""

    def known(name: str) -> int:
        return sum(
            rename.leaf_of(FORMATS[name], key, array.shape) is not None
            for key, array in file.arrays.items()
        )

    return max(FORMATS, key=known)


def _no_resnet(file: tensors.Tensors, asked: str | None) -> str:
    likely = _format_of(file)
    hint = f"; format={likely!r} fits better" if asked and likely != asked else ""
    return (
        f"{file.path} holds no ResNet under the names of {asked or ' or '.join(FORMATS)}{hint}; "
        f"its {len(file.arrays)} keys are like {', '.join(list(file.arrays)[:3])}"
        f"{_relatives(file.arrays)}"
    )


def _check_model(model: str | ResNetConfig | None, config: ResNetConfig, path: Path) -> None:
    known = {**RESNETS, **VARIANTS}
    if model is None or model == config.name:
        return
    if isinstance(model, str):
        if re.sub(r"w\d+$", "", model) not in known:
            raise ValueError(
                f"no model {model!r}{suggest(model, known)}; there are: {', '.join(known)}"
            )
        raise ValueError(f"{path} holds {config.name} ({_describe(config)}), not {model}")
    if _describe(model) != _describe(config):
        raise ValueError(
            f"{path} holds {config.name} ({_describe(config)}), not {model.name} "
            f"({_describe(model)})"
        )


def _describe(config: ResNetConfig) -> str:
    return (
        f"{config.block} blocks {config.depths}, width {config.width}, "
        f"base width {config.base_width}, groups {config.groups}"
    )


def _as_float32(
    leaves: Mapping[str, np.ndarray], path: Path
) -> tuple[dict[str, np.ndarray], list[str]]:
    stored = {leaf: array.dtype.name for leaf, array in leaves.items()}
    foreign = {
        leaf: kind
        for leaf, kind in stored.items()
        if kind not in ("float16", "bfloat16", "float32", "float64")
    }
    if foreign:
        raise ValueError(f"{path} holds weights that are no floating-point numbers: {foreign}")
    with np.errstate(over="ignore"):
        converted = {
            leaf: np.ascontiguousarray(array, dtype=np.float32) for leaf, array in leaves.items()
        }
    problems = [
        f"{leaf}: {_count(array)} of {array.size}"
        for leaf, array in converted.items()
        if not np.isfinite(array).all()
    ]
    if problems:
        raise ValueError(
            f"{path} holds numbers that are NaN or infinite (as float32) in {len(problems)} "
            "leaves:\n  " + "\n  ".join(problems)
        )
    negative = [
        leaf for leaf, array in converted.items() if leaf.endswith("/var") and (array < 0).any()
    ]
    if negative:
        raise ValueError(f"{path} holds running variances below 0: {', '.join(negative)}")
    kinds = Counter(kind for kind in stored.values() if kind != "float32")
    return converted, [f"{n} leaves were {kind} and are float32 now" for kind, n in kinds.items()]


def _count(array: np.ndarray) -> int:
    return int(array.size - np.isfinite(array).sum())


def _relatives(keys: Mapping[str, np.ndarray]) -> str:
    found = [
        what
        for pattern, what in _RELATIVES.items()
        if any(re.fullmatch(pattern, key) for key in keys)
    ]
    return f"\n  the keys show {' and '.join(found)}, which is not supported" if found else ""
