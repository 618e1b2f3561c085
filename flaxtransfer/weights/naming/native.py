"""Keys of this package, and encoders inside self-supervised training states.

MoCo stores two encoders and a queue; DINO a student and a teacher; SimCLR, BYOL, SwAV, Barlow Twins
and VICReg a backbone with a projector. Only the encoder is kept, and a note lists what is omitted.
"""

import re
from collections.abc import Mapping

import numpy as np

from flaxtransfer.weights.naming import timm
from flaxtransfer.weights.naming.key_map import Rule, Table

__all__ = ["PREFIXES", "TABLE", "encoder_of", "prepared"]


_LEAVES = dict.fromkeys(
    variant.leaf
    for rule in (*timm.TABLE, *timm.V2_TABLE)
    for shortcut in (rule, timm.of_pooled_shortcuts(rule))
    for variant in (shortcut, timm.of_groups(shortcut))
)

TABLE: Table = tuple(Rule(leaf, leaf) for leaf in _LEAVES)
"""Each leaf under its own path, such as "params/layer1/0/conv1/kernel"."""

_FIRST_KERNEL = re.compile(r"(|.*/)params/layer1/0/conv1/kernel")
_WEIGHTS = ("params/", "batch_stats/")


def prepared(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Parameters and statistics without other state of a run, and notes; other files unchanged.

    Averages of parameters, which our runs store under "ema", replace the parameters.

    Raises:
        ValueError: the file holds several networks.

    >>> layer = "params/layer1/0/conv1/kernel"
    >>> prepared({f"state/{layer}": 1, "state/step": 2, "seed": 3})
    ({'params/layer1/0/conv1/kernel': 1}, ["the network is under 'state/'; left out: \
seed, step"])
    """
    places = sorted(found[1] for key in arrays if (found := _FIRST_KERNEL.fullmatch(key)))
    if not places:
        return dict(arrays), []
    if len(places) > 1:
        raise ValueError(
            f"it must hold one network, got several under {', '.join(map(repr, places))}"
        )
    (place,) = places
    own = {key.removeprefix(place): a for key, a in arrays.items() if key.startswith(place)}
    kept = {key: array for key, array in own.items() if key.startswith(_WEIGHTS)}
    averages = {f"params/{k[4:]}": a for k, a in own.items() if k.startswith("ema/")}
    strange = [key for key in averages if key not in kept]
    if strange:
        raise ValueError(f"it holds averages of unknown parameters: {', '.join(strange)}")
    left_out = {key.split("/")[0] for key in own if key not in kept and not key.startswith("ema/")}
    left_out |= {key.split("/")[0] for key in arrays if not key.startswith(place)}
    notes = [f"the network is under {place!r}"] if place else []
    omitted = f"left out: {', '.join(sorted(left_out))}" if left_out else ""
    text = "; ".join(filter(None, (*notes, omitted)))
    averaged = f"{len(averages)} leaves are averages over steps" if averages else ""
    return kept | averages, [note for note in (text, averaged) if note]


PREFIXES = (
    "encoder_q.",  # MoCo, the encoder that learns
    "base_encoder.",  # MoCo v3
    "online_encoder.",  # BYOL
    "backbone.",  # DINO, SwAV, Barlow Twins, VICReg
    "encoder.",  # SimCLR
    "encoder_k.",
    "momentum_encoder.",
)
"""Prefixes of the keys of an encoder; the first one that is present is used."""

_FIRST = ("conv1.weight", "conv1.0.weight", "stem.conv.weight")
_HEADS = ("fc.", "head.", "projector.", "projection_head.", "contrastive_head.")


def encoder_of(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays of the encoder without their prefix, and notes; other files unchanged.

    >>> keys = ["encoder_q.conv1.weight", "encoder_q.fc.0.weight", "encoder_k.conv1.weight"]
    >>> encoder_of(dict.fromkeys(keys, 0))[0]
    {'conv1.weight': 0}
    """
    if any(key in arrays for key in _FIRST):
        return dict(arrays), []
    for prefix in PREFIXES:
        if any(prefix + key in arrays for key in _FIRST):
            break
    else:
        return dict(arrays), []
    own = {key.removeprefix(prefix): a for key, a in arrays.items() if key.startswith(prefix)}
    encoder = {key: array for key, array in own.items() if not key.startswith(_HEADS)}
    others = sorted({key.split(".")[0] for key in arrays if not key.startswith(prefix)})
    heads = sorted({key.split(".")[0] for key in own if key not in encoder})
    left_out = [*others, *(prefix + name for name in heads)]
    return encoder, [
        f"the network is under {prefix!r}"
        + (f"; left out: {', '.join(left_out)}" if left_out else "")
    ]
