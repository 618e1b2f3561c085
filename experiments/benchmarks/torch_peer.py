"""One training step of torchvision's ResNet, timed."""

from __future__ import annotations

import contextlib
import sys
import time
from types import ModuleType
from typing import Any

import numpy as np
import torch
from turns import Facts, serve

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_torchvision() -> tuple[ModuleType, Any]:
    """torchvision, and what must be kept alive for it.

    Beside a CPU build of torch, torchvision's compiled operators may be absent, and its import
    fails because it looks two of them up. Declaring them is enough: its networks do not use them.
    """
    try:
        import torchvision

        return torchvision, None
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(operator + _SIGNATURE)
    import torchvision

    return torchvision, library


def prepare(job: Facts) -> tuple[Facts, Any]:
    """Builds the network and warms the step up."""
    torchvision, library = import_torchvision()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    model = getattr(torchvision.models, job["model"])()
    model = model.to(device, memory_format=torch.channels_last).train(not job["inference"])
    forward = torch.compile(model) if cuda else model
    draw = np.random.default_rng(0)
    shape = (job["batch_size"], 3, job["image_size"], job["image_size"])
    images = torch.from_numpy(draw.standard_normal(shape, np.float32)).to(
        device, memory_format=torch.channels_last
    )
    labels = torch.from_numpy(draw.integers(0, 1000, shape[0])).to(device)
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    cross_entropy = torch.nn.CrossEntropyLoss()
    steps = job["steps"] or (20 if cuda else 1)

    @torch.inference_mode()
    def infer() -> torch.Tensor:
        half = torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext()
        with half:
            return forward(images).mean()

    def train() -> torch.Tensor:
        sgd.zero_grad(set_to_none=True)
        half = torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext()
        with half:
            loss = cross_entropy(forward(images), labels)
        loss.backward()
        sgd.step()
        return loss

    step = infer if job["inference"] else train

    def turn() -> Facts:
        start = time.perf_counter()
        for _ in range(steps):
            loss = step()
        if cuda:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / steps
        peak = torch.cuda.max_memory_allocated() if cuda else None
        return {"seconds": seconds, "loss": loss.item(), "peak_bytes": peak}

    start = time.perf_counter()
    turn()
    compile_seconds = time.perf_counter() - start
    turn()
    facts = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": f"torch {torch.__version__}, torchvision {torchvision.__version__}",
        "dtype": "bfloat16" if cuda else "float32",
        "compile_seconds": compile_seconds if cuda else 0.0,
        "declared_operators": library is not None,
    }
    return facts, turn


if __name__ == "__main__":
    serve(prepare)
