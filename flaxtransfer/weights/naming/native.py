"""Keys of this package, and the network among the keys of a file.

Training scripts store a network under any name, beside averages, teachers, optimizers and heads,
and wrappers put names of their own into its keys. ``find`` looks for the first convolution of the
first block, whose key each project spells in its own way. What stands before it is the place of the
network. MoCo stores two encoders and a queue; DINO a student and a teacher; SimCLR, BYOL, SwAV,
Barlow Twins and VICReg a backbone with a projector: rules say which of several networks is meant.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flaxtransfer.paths import listing, shortened, suggest
from flaxtransfer.weights.naming import keras_model, timm
from flaxtransfer.weights.naming.key_map import Rule, Table

__all__ = [
    "HEADER_KEY",
    "SELF_SUPERVISED",
    "TABLE",
    "WRAPPERS",
    "Found",
    "candidates",
    "find",
    "prepared",
]


HEADER_KEY = "flaxtransfer"
"""Key of the metadata in which our own files state their network."""

_LEAVES = dict.fromkeys(
    variant.leaf
    for rule in (*timm.TABLE, *timm.V2_TABLE)
    for shortcut in (rule, timm.of_pooled_shortcuts(rule))
    for variant in (shortcut, timm.of_groups(shortcut))
)

TABLE: Table = tuple(Rule(leaf, leaf) for leaf in _LEAVES)
"""Each leaf under its own path, such as "params/layer1/0/conv1/kernel"."""

_AVERAGES = ("ema", "ema_params", "params_ema", "average_params", "avg_params", "swa_params")
"""Names of averages of parameters; the first is that of our runs."""


def prepared(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Parameters and statistics, averages in the place of parameters, and notes; others unchanged.

    Raises:
        ValueError: averages of parameters that are not there.

    >>> prepared({"params/layer1/0/conv1/kernel": 1, "ema/layer1/0/conv1/kernel": 2})
    ({'params/layer1/0/conv1/kernel': 2}, ['1 leaves are averages over steps'])
    """
    if "params/layer1/0/conv1/kernel" not in arrays:
        return dict(arrays), []
    averages = {
        f"params/{key.partition('/')[2]}": array
        for key, array in arrays.items()
        if key.partition("/")[0] in _AVERAGES
    }
    strange = [key for key in averages if key not in arrays]
    if strange:
        raise ValueError(
            f"it holds averages of unknown parameters: {shortened(', '.join(strange), 300)}"
        )
    kept = {key: a for key, a in arrays.items() if key.partition("/")[0] not in _AVERAGES}
    notes = [f"{len(averages)} leaves are averages over steps"] if averages else []
    return kept | averages, notes


WRAPPERS = (
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_fpw_module",
    "_checkpoint_wrapped_module",
)
"""Names that data parallelism, compilation, sharding and checkpointing put into keys."""

_W = rf"(?:(?:{'|'.join(WRAPPERS)})\.)*"


def _anchor(*names: str) -> str:
    return rf"\.{_W}".join(map(re.escape, names))


_PLACES = (
    _anchor("layer1", "0", "conv1", ""),
    _anchor("stages", "0", "blocks", "0", "conv1", ""),
    rf"(?:resnet\.{_W})?"
    + _anchor("encoder", "stages", "0", "layers", "0", "layer", "0", "convolution", ""),
    # The stages of nn.Sequential(*network.children()), of which each has a first block.
    rf"(?P<stage>\d{{1,3}})\.{_W}" + _anchor("0", "conv1", ""),
)
_ANCHOR = re.compile(rf"(|.*?[./])(?:{'|'.join(_PLACES)})(?:weight|parametrizations\.)[^/]*")
_LONGEST, _MOST = 2000, 100
_WRAPPER = re.compile(rf"(?:^|(?<=\.))({'|'.join(WRAPPERS)})\.")

_AVERAGE = re.compile(r"(?i)(^|.*_)(ema|swa|avg|averaged?|shadow)(_.*|\d*)$")
_RIVALS = (
    ("encoder_q", "encoder_k"),  # MoCo: the encoder that learns
    ("base_encoder", "momentum_encoder"),  # MoCo v3
    ("online_encoder", "target_encoder"),  # BYOL
    ("teacher", "student"),  # DINO: the teacher is an average
    ("state_dict", "current_model_state"),  # Lightning's WeightAveraging: the first is the average
)
"""Names in self-supervised training, the preferred one first."""

SELF_SUPERVISED = frozenset(name for pair in _RIVALS[:3] for name in pair)
"""Names of encoders that are trained without labels: what follows them is no classifier."""

_SWAPPED = "ema_state_dict/steps"
"""The counter of MMEngine's hook for averages. Its files have the average in the place of the
network, "state_dict", and the network in that of the average."""

_MOMENTUM = re.compile(r"(?i)(?<![a-z])momentum_|_momentum(?![a-z])")
"""In the name of a copy that follows an encoder: solo-learn, lightly."""

_BODY = re.compile(r"(conv1|bn1|layer\d|maxpool|stem|stages|norm|resnet)\.")
_STAGE = re.compile(r"layer[1-4]\.")
_STUBS = re.compile(
    r"(.*\.)?(parametrizations\..*|weight_(orig|mask|g|v)|weight_fake_quant\..*|"
    r"activation_post_process\..*|_packed_params.*|zero_point|base_layer\..*|lora_.*)"
)


@dataclasses.dataclass(frozen=True)
class Found:
    """The network in a file.

    Args:
        keys: the key of each of its arrays, by the file's key.
        beside: the key of each array that stands around it, by the file's key; a head may be there.
        place: the names that lead to the network, without those of wrappers.
        notes: where it was found, and what was left out.
    """

    keys: Mapping[str, str]
    beside: Mapping[str, str]
    place: tuple[str, ...]
    notes: tuple[str, ...]


def find(
    arrays: Mapping[str, Any],
    key: str | None = None,
    same: Callable[[Any, Any], bool] = np.array_equal,
) -> Found:
    """Finds the network among the keys of a file; all keys where none is recognized.

    Args:
        arrays: anything with a shape, by key; "/" separates containers, "." modules.
        key: the place of the network, where the file holds several; None goes by rules.
        same: whether two of the arrays hold the same numbers.

    Raises:
        ValueError: several networks and no rule, with their places; an unknown ``key``; layers in
            the form that parametrizations and quantization leave; or keys that become equal.

    >>> keys = ["state_dict/net.layer1.0.conv1.weight", "state_dict/head.weight", "optimizer/0"]
    >>> found = find(dict.fromkeys(keys, np.zeros(1)))
    >>> list(found.keys.values()), list(found.beside.values())
    (['layer1.0.conv1.weight'], ['head.weight'])
    >>> keys = ["state/params/layer1/0/conv1/kernel", "state/step", "seed"]
    >>> found = find(dict.fromkeys(keys, np.zeros(1)))
    >>> list(found.keys.values()), found.notes
    (['params/layer1/0/conv1/kernel'], ("the network is under 'state/'; left out: seed, step",))
    """
    places = _places(arrays)
    if not places:
        if key is None and (parts := keras_model.split(arrays)):
            return Found(*parts, (), ())
        return _tree(arrays, key, same) or _subtree(arrays, key)
    networks = {place: _own(arrays, place, places) for place in places}
    place, notes = _chosen(arrays, networks, key, same)
    keys = networks[place]
    container = place[: place.rfind("/") + 1]
    inner = place.removeprefix(container)
    others = [other for other in places if other != place]
    beside: dict[str, str] = {}
    left_out: list[str] = []
    for name in arrays:
        if name in keys:
            continue
        path = name.removeprefix(container)
        if not name.startswith(container) or "/" in path:
            left_out.append(name.split("/")[0])
            continue
        short = _plain(path)
        ahead, rest = _plain(inner).split("."), short.split(".")
        while len(rest) > 1 and ahead and rest[0] == ahead[0]:
            ahead, rest = ahead[1:], rest[1:]
        if any(name.startswith(other) for other in others if other not in container):
            left_out.append(rest[0])
        else:
            beside[name] = ".".join(rest)
    keys, stem = _with_stem(arrays, keys, beside)
    beside = {name: short for name, short in beside.items() if name not in keys}
    stubs = [name for name in keys.values() if _BODY.match(name) and _STUBS.fullmatch(name)]
    if stubs:
        first = shortened(stubs[0], 100)
        raise ValueError(
            f"its layers must be plain, got {first!r}, which a parametrization, a "
            "pruning mask, quantization or an adapter leaves; remove it in torch (parametrize."
            "remove_parametrizations, prune.remove, the float network, peft's merge_and_unload) "
            "and save the weights again"
        )
    if any(arrays[name].shape == (0,) for name in keys):
        raise ValueError(
            "its arrays are empty, as where DeepSpeed keeps them in parts; its own "
            "zero_to_fp32.py, which lies beside them, makes one file of the parts"
        )
    named = tuple(name for name in re.split(r"[./]", _plain(inner)) if name)
    notes = [*_said(arrays, place, keys), *notes]
    named = (*filter(None, container.split("/")), *named)
    return Found(keys, beside, named, (*notes, *stem, *_left_out(left_out)))


_LEAF = re.compile(
    r"(|.*/)(?:layer1/0/conv1|resnet/encoder/stages/0/layers/0/layer/(?:layer_)?0/convolution)"
    r"/kernel(/value)?"
)
_MOMENTS = re.compile(r"(.*/)?(opt_state|optimizer|opt|mu|nu|trace)/.*")


def _tree(
    arrays: Mapping[str, Any], key: str | None, same: Callable[[Any, Any], bool]
) -> Found | None:
    """The network in the tree of a JAX program, such as a train state; None for other files.

    Parameters and statistics are collections ("params", "batch_stats"), or one tree as in NNX,
    whose leaves may have a "value". The state of an optimizer is no network.
    """
    networks = _trees(arrays)
    if not networks:
        return None
    place, notes = _chosen(arrays, networks, key, same)
    keys = networks[place]
    left_out = {
        path.removeprefix(place).split("/")[0]
        for name, path in _paths(arrays).items()
        if name not in keys
    }
    said = [f"the network is under {place!r}"] if place else []
    said += [f"left out: {shortened(', '.join(sorted(left_out)), 200)}"] if left_out else []
    named = tuple(name for name in place.split("/") if name)
    return Found(keys, {}, named, (*(["; ".join(said)] if said else []), *notes))


def _paths(arrays: Mapping[str, Any]) -> dict[str, str]:
    """The path of each array in the tree; some programs join names by dots."""
    return {name: name if "/" in name else name.replace(".", "/") for name in arrays}


def _trees(arrays: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The keys of each network in a tree, by its place."""
    paths = _paths(arrays)
    places: dict[str, bool] = {}
    for path in paths.values():
        found = _LEAF.fullmatch(path) if len(path) <= _LONGEST else None
        if found is None or _MOMENTS.fullmatch(path):
            continue
        *above, last = ("/" + found[1]).rstrip("/").split("/")
        if last in ("params", *_AVERAGES):
            places["".join(f"{name}/" for name in above if name)] = True
        else:
            places.setdefault(found[1], False)
    if len(places) > _MOST:
        raise ValueError(f"it must hold at most {_MOST} networks, got {len(places):,}")
    return {
        place: _leaves(paths, place, [p for p in places if p != place], apart)
        for place, apart in places.items()
    }


def _leaves(paths: Mapping[str, str], place: str, others: list[str], apart: bool) -> dict[str, str]:
    """The keys of the network at a place of a tree, under the names of collections."""
    inner = tuple(other for other in others if other.startswith(place) and other != place)
    collections = ("params", "batch_stats", *_AVERAGES)
    keys: dict[str, str] = {}
    for name, path in paths.items():
        if not path.startswith(place) or (inner and path.startswith(inner)):
            continue
        short = path.removeprefix(place).removesuffix("/value")
        if apart and short.split("/")[0] in collections:
            keys[name] = short
        elif not apart and not _MOMENTS.fullmatch(path):
            statistic = short.endswith(("/mean", "/var"))
            keys[name] = f"{'batch_stats' if statistic else 'params'}/{short}"
    return keys


def candidates(arrays: Mapping[str, Any]) -> dict[str, int]:
    """The networks in a file: the number of their arrays, by the place that ``key`` takes.

    >>> kernels = ("teacher/layer1.0.conv1.weight", "student/layer1.0.conv1.weight")
    >>> candidates(dict.fromkeys(kernels, np.zeros(1)))
    {'teacher': 1, 'student': 1}
    """
    if places := _places(arrays):
        return {_shown(place): len(_own(arrays, place, places)) for place in places}
    if parts := keras_model.split(arrays):
        return {".": len(parts[0])}
    return {_shown(place): len(keys) for place, keys in _trees(arrays).items()}


def _places(arrays: Mapping[str, Any]) -> list[str]:
    """The places of networks under names of torch's programs."""
    stages: dict[str, dict[str | None, str]] = {}
    for name in arrays:
        # The pattern is slow, above all in long names, and most keys are others.
        likely = len(name) <= _LONGEST and ("conv1." in name or "convolution." in name)
        if likely and (found := _ANCHOR.fullmatch(name)):
            stages.setdefault(found[1], {})[found["stage"]] = name
    places = [
        place
        for place, first in stages.items()
        if None in first or (len(first) == 4 and _follow(arrays, first))
    ]
    if len(places) > _MOST:
        raise ValueError(f"it must hold at most {_MOST} networks, got {len(places):,}")
    return places


def _follow(arrays: Mapping[str, Any], first: Mapping[str | None, str]) -> bool:
    """Whether numbered stages take each other's channels; the branches of an HRNet do not.

    Args:
        arrays: by name.
        first: the name of the first convolution of each stage, by its number.
    """
    names = [first[number] for number in sorted(first, key=lambda number: int(number or 0))]
    inputs, outputs = [], []
    for name in names:
        block = name[: name.rindex("conv1.")]
        last = [arrays.get(f"{block}conv{k}.weight") for k in (3, 2)]
        shapes = [array.shape for array in (arrays[name], *last) if array is not None]
        if len(shapes) < 2 or any(len(shape) != 4 for shape in shapes):
            return True  # under names of wrappers, or damaged: that is told later
        inputs.append(shapes[0][1])
        outputs.append(shapes[1][0])
    return inputs[1:] == outputs[:-1]


def _with_stem(
    arrays: Mapping[str, Any], keys: dict[str, str], beside: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """The keys with those of a stem that is a sequence of its own, such as ``layer0``, and a note.

    It is the only group of layers with one convolution into the first block, and its norm.
    """
    shapes = {short: arrays[name].shape for name, short in keys.items()}
    first = shapes.get("layer1.0.conv1.weight", ())
    if len(first) != 4 or any(re.match(r"(conv1|stem)\.", short) for short in shapes):
        return keys, []
    groups: dict[str, dict[str, str]] = {}
    for name, short in (*keys.items(), *beside.items()):
        if not _STAGE.match(short):
            groups.setdefault(short.split(".")[0], {})[name] = short
    found = []
    for group, names in groups.items():
        layers: dict[str, set[tuple[int, ...]]] = {}
        for name, short in names.items():
            layers.setdefault(short.rpartition(".")[0], set()).add(arrays[name].shape)
        kernels = [layer for layer, held in layers.items() if any(len(s) == 4 for s in held)]
        norms = [layer for layer, held in layers.items() if held <= {(first[1],), ()}]
        into = {s[0] for layer in kernels for s in layers[layer] if len(s) == 4}
        if len(kernels) == len(norms) == 1 and len(layers) == 2 and into == {first[1]}:
            found.append((group, {kernels[0]: "conv1", norms[0]: "bn1"}))
    if len(found) != 1:
        return keys, []
    ((group, layers_of),) = found
    stem = {
        name: f"{layers_of[layer]}.{leaf}"
        for name, short in groups[group].items()
        for layer, _, leaf in [short.rpartition(".")]
    }
    return keys | stem, [f"the stem is {group!r}, of one convolution and its norm"]


def _left_out(names: list[str]) -> list[str]:
    text = shortened(", ".join(sorted(set(names))), 200)
    return [f"beside the network, left out: {text}"] if names else []


def _plain(path: str) -> str:
    return _WRAPPER.sub("", path)


def _own(arrays: Mapping[str, Any], place: str, places: list[str]) -> dict[str, str]:
    """The keys of the network at a place, without the names of wrappers."""
    inner = [other for other in places if other.startswith(place) and other != place]
    keys: dict[str, str] = {}
    taken: set[str] = set()
    for name in arrays:
        path = name[len(place) :]
        if not name.startswith(place) or "/" in path or any(map(name.startswith, inner)):
            continue
        short = _plain(path)
        # Hugging Face's network without a head has no "resnet." before its keys.
        if short.startswith(("embedder.embedder.", "encoder.stages.")):
            short = f"resnet.{short}"
        if short in taken:
            raise ValueError(f"two keys become {short!r} after the names of wrappers are removed")
        taken.add(short)
        keys[name] = short
    numbered = _numbered({short: arrays[name].shape for name, short in keys.items()})
    return {name: _renamed(short, numbered) for name, short in keys.items()}


def _numbered(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The names of the layers of a sequence, by their numbers; empty for other networks.

    >>> stages = {f"{n}.0.conv1.weight": (4, 4, 3, 3) for n in (4, 5, 6, 7)}
    >>> _numbered({"0.weight": (4, 3, 7, 7), "1.weight": (4,), **stages})
    {'4': 'layer1', '5': 'layer2', '6': 'layer3', '7': 'layer4', '0': 'conv1', '1': 'bn1'}
    """
    stages = sorted(
        int(found[1])
        for key in shapes
        if (found := re.fullmatch(r"(\d{1,3})\.0\.conv1\.weight", key))
    )
    names = {str(number): f"layer{stage}" for stage, number in enumerate(stages, 1)}
    if len(names) != 4:
        return {}
    found_ranks: dict[str, set[int]] = {}
    for key, shape in shapes.items():
        found_ranks.setdefault(key.split(".")[0], set()).add(len(shape))
    for number in range(stages[0]):
        ranks = found_ranks.get(str(number), set())
        name = "conv1" if 4 in ranks else "bn1"
        if ranks and name not in names.values():
            names[str(number)] = name
    return names


def _renamed(key: str, names: Mapping[str, str]) -> str:
    first, dot, rest = key.partition(".")
    return names.get(first, first) + dot + rest


def _chosen(
    arrays: Mapping[str, Any],
    networks: Mapping[str, dict[str, str]],
    key: str | None,
    same: Callable[[Any, Any], bool],
) -> tuple[str, list[str]]:
    """The place of the network that is meant, and a note where there are several."""
    places = list(networks)
    if key is not None:
        wanted = _spelled(key)
        fitting = [place for place in places if f"{_spelled(place)}.".startswith(f"{wanted}.")]
        exact = [place for place in places if _spelled(place) == wanted]
        if not fitting:
            known, given = [_shown(place) for place in places], shortened(key, 60)
            raise ValueError(
                f"`key` (--weights-key) must be a place of a network in the file "
                f"({_listed(places)}), got {given!r}{suggest(given, known)}"
            )
        places = exact or fitting
    shapes = {
        place: {(short, arrays[name].shape) for name, short in networks[place].items()}
        for place in places
    }
    # The state of an optimizer, by name, has no running statistics.
    whole = [
        place
        for place in places
        if _averaged(place)
        or any(short.endswith(("running_var", "/var")) for short, _ in shapes[place])
        or not any(shapes[place] < shapes[other] for other in places)
    ]
    alike: dict[str, list[str]] = {}
    for place in whole:
        equal = (q for q in alike if _equal(arrays, networks[place], networks[q], same))
        alike.setdefault(next(equal, place), []).append(place)
    place = whole[0] if len(alike) == 1 else _preferred(alike, shapes, _SWAPPED in arrays)
    others = [other for other in places if other != place]
    if key is not None or not others:
        return place, []
    why = ": MMEngine keeps its average under 'state_dict'" if _SWAPPED in arrays else ""
    return place, [f"the file holds several networks; not those under {_listed(others)}{why}"]


def _preferred(
    alike: Mapping[str, list[str]], shapes: Mapping[str, set[Any]], swapped: bool
) -> str:
    """The average or the preferred of two rivals.

    Args:
        alike: by place, all places with the same numbers.
        shapes: of the arrays of a network, by place.
        swapped: whether the average is in the place of the other network.

    Raises:
        ValueError: no rule says which network is meant.
    """
    places = list(alike)
    averages = [place for place in places if _averaged(place)]
    plain = [place for place in places if place not in averages]
    if len(averages) == len(plain) == 1 and not shapes[averages[0]] < shapes[plain[0]]:
        return plain[0] if swapped else averages[0]
    if len(places) == 2:
        for place, follower in (places, places[::-1]):
            if _MOMENTUM.sub("", follower) == place != follower:
                return place
        for first, second in _RIVALS:
            ours, theirs = (
                {p: q for p in places for q in alike[p] if name in _names(q)}
                for name in (first, second)
            )
            # A teacher with a classifier may be another network, not an average of the student.
            classify = first == "teacher" and any(_classifies(shapes[p]) for p in places)
            if len(ours) == len(theirs) == 1 and ours.keys() != theirs.keys() and not classify:
                return next(iter(ours.values()))
    raise ValueError(
        f"`key` (--weights-key) must name one of {len(places)} networks, got none; their places: "
        f"{_listed(places)}"
    )


def _classifies(shapes: set[Any]) -> bool:
    return any(len(shape) == 2 for _, shape in shapes)


def _equal(
    arrays: Mapping[str, Any],
    ours: dict[str, str],
    theirs: dict[str, str],
    same: Callable[[Any, Any], bool],
) -> bool:
    others = {short: name for name, short in theirs.items()}
    return others.keys() == set(ours.values()) and all(
        same(arrays[name], arrays[others[short]]) for name, short in ours.items()
    )


def _names(place: str) -> list[str]:
    return [name for name in re.split(r"[./]", place) if name]


def _averaged(place: str) -> bool:
    return any(map(_AVERAGE.fullmatch, _names(place)))


def _spelled(place: str) -> str:
    return ".".join(_names(place))


def _shown(place: str) -> str:
    return place.rstrip("./") or "."


def _listed(places: list[str]) -> str:
    return shortened(", ".join(repr(_shown(place)) for place in places), 300)


def _said(arrays: Mapping[str, Any], place: str, keys: Mapping[str, str]) -> list[str]:
    """Notes on how the network was found."""
    container, _, inner = place.rpartition("/")
    notes = [f"the weights are those under {container!r}"] if container else []
    removed: dict[str, str] = {}
    for name in keys:
        path = name[len(container) + bool(container) :]
        for found in _WRAPPER.finditer(path):
            start = _plain(path[: found.start()]) == ""
            removed.setdefault(found[1], "the prefix " if start else "")
    notes += [
        f"{what}{wrapper + '.'!r} was removed from the keys" for wrapper, what in removed.items()
    ]
    plain = _plain(inner)
    notes += [f"the network is under {plain!r}"] if plain else []
    pairs = {
        (_plain(name[len(place) :]).split(".")[0], short.split(".")[0])
        for name, short in keys.items()
    }
    told = sorted((int(old), new) for old, new in pairs if old.isdigit() and old != new)
    text = ", ".join(f"{number} as {name}" for number, name in told)
    return notes + ([f"the layers have numbers: {text}"] if text else [])


def _subtree(arrays: Mapping[str, Any], key: str | None) -> Found:
    """The keys below ``key``, or all; no network was recognized."""
    if key is None:
        return Found({name: name for name in arrays}, {}, (), ())
    below = f"{key.rstrip('./')}/"
    keys = {name: name.removeprefix(below) for name in arrays if name.startswith(below)}
    if not keys:
        tops = {name.split("/")[0] for name in arrays}
        raise ValueError(
            f"`key` (--weights-key) must be a place in the file ({listing(sorted(tops))}), got "
            f"{shortened(key, 60)!r}{suggest(shortened(key, 60), tops)}"
        )
    return Found(keys, {}, (key,), (f"the weights are those under {key!r}, as requested",))
