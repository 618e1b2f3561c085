"""A training script's checkpoint in both layouts of torch.save; its tensors as numpy has them.

Made, from the root of the repository and in an environment with the extra `parity`, by

    python tests/golden/make_torch_files.py

which wrote the folder `torch_files` with torch 2.13.0. Every kind of number, strides, shared and
expanded storages, and what lies beside weights: an optimizer's state, arguments, counters.
"""

import argparse
import collections
from pathlib import Path

FOLDER = Path(__file__).parent / "torch_files"


def tensors():
    """By name, what a state dict may hold."""
    import torch

    torch.manual_seed(0)
    square, row = torch.randn(5, 7), torch.arange(24.0)
    found = collections.OrderedDict(
        float32=torch.randn(2, 3),
        float64=torch.randn(3, dtype=torch.float64),
        float16=torch.randn(4).half(),
        bfloat16=torch.randn(2, 2).bfloat16(),
        int64=torch.tensor([-(2**62), 5]),
        int32=torch.tensor([-7, 2**31 - 1], dtype=torch.int32),
        int16=torch.tensor([-3], dtype=torch.int16),
        int8=torch.tensor([-128, 127], dtype=torch.int8),
        uint8=torch.tensor([0, 255], dtype=torch.uint8),
        uint16=torch.tensor([1, 65535], dtype=torch.uint16),
        bool=torch.tensor([True, False, True]),
        complex64=torch.randn(2, dtype=torch.complex64),
        number=torch.tensor(3.5),
        empty=torch.zeros(0, 3),
        transposed=square.t(),
        every_other=square[1:4:2, ::3],
        shared=square,
        behind=row[5:11].view(2, 3),
        whole_row=row,
        expanded=torch.tensor([[2.0]]).expand(3, 4),
        parameter=torch.nn.Parameter(torch.randn(3)),
        # Signs and conjugates that are noted and not yet applied to the numbers.
        conjugate=torch.randn(2, dtype=torch.complex64).conj(),
        negative=torch.randn(3, dtype=torch.complex64).conj().imag,
        attributed=torch.ones(2),
    )
    found["attributed"].note = "kept as an attribute"
    found._metadata = collections.OrderedDict(version=1)
    return found


def checkpoint():
    """What a training script saves."""
    import torch

    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "best": 0.25,
        "model": tensors(),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1, name="resnet18", size=(224, 224)),
        "seen": collections.Counter(a=1),
        "set": {1, 2},
        "bytes": b"\x00\xff",
        "shape": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "sparse": torch.eye(2).to_sparse(),
    }


def as_numpy(tensor):
    """Any tensor; bfloat16 as the uint16 of its bits, for numpy has no such kind."""
    import torch

    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view("uint16")
    return tensor.numpy()


def main():
    """Writes the folder."""
    import numpy as np
    import torch

    FOLDER.mkdir(exist_ok=True)
    for name, zipped in (("zip", True), ("legacy", False)):
        torch.save(checkpoint(), FOLDER / f"{name}.pth", _use_new_zipfile_serialization=zipped)
    np.savez_compressed(
        FOLDER / "expected.npz", **{name: as_numpy(tensor) for name, tensor in tensors().items()}
    )


if __name__ == "__main__":
    main()
