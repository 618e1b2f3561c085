"""Networks inside of self-supervised training: the encoder alone, without what it was trained with.

MoCo keeps two encoders and a queue, DINO a student and a teacher, SimCLR, BYOL, SwAV, Barlow Twins
and VICReg a backbone with a projector. What is left out is said.
"""

from collections.abc import Mapping

import numpy as np

__all__ = ["PREFIXES", "encoder_of"]

PREFIXES = (
    "encoder_q.",  # MoCo, the encoder that learns
    "base_encoder.",  # MoCo v3
    "online_encoder.",  # BYOL
    "backbone.",  # DINO, SwAV, Barlow Twins, VICReg
    "encoder.",  # SimCLR
    "encoder_k.",
    "momentum_encoder.",
)
"""What stands before the keys of an encoder; the first that is there is taken."""

_FIRST = ("conv1.weight", "conv1.0.weight", "stem.conv.weight")
_HEADS = ("fc.", "head.", "projector.", "projection_head.", "contrastive_head.")


def encoder_of(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays of the encoder under its own keys, and notes; other files as they are.

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
        f"the network is what lies under {prefix!r}"
        + (f"; left out: {', '.join(left_out)}" if left_out else "")
    ]
