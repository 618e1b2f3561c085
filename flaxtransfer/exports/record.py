"""What travels with an exported network: what its input is and what its outputs mean."""

import json

from flaxtransfer.weights import Checkpoint

__all__ = ["record"]


def record(checkpoint: Checkpoint, layout: str) -> dict[str, str]:
    """Text by name.

    Args:
        checkpoint: that is exported.
        layout: of the axes of the input, "[batch, bands, height, width]".
    """
    return {
        "input": f"float32 {layout}, normalised as preprocessing says",
        "output": "logits [batch, classes]",
        "preprocessing": json.dumps(checkpoint.preprocessing.to_json()),
        "class_names": json.dumps(checkpoint.class_names),
        "architecture": checkpoint.config.name,
        "config": json.dumps(checkpoint.config.to_json()),
        "weights_sha256": checkpoint.sha256,
        "source": checkpoint.source,
    }
