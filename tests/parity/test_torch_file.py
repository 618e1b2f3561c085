"""The reader of torch's files against torch's own restricted one, bit for bit."""

import importlib.util
import io
import random
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from flaxtransfer.weights.readers.torch_file import read_torch

pytestmark = pytest.mark.parity
MAKING = Path(__file__).parents[1] / "golden" / "make_torch_files.py"


@pytest.fixture(scope="module")
def files():
    """The functions that made the golden files."""
    spec = importlib.util.spec_from_file_location("make_torch_files", MAKING)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def saved(torch, content, **options):
    data = io.BytesIO()
    torch.save(content, data, **options)
    return data.getvalue()


def same_as_torch(torch, files, data, key=None):
    """How many arrays there are; each has torch's dtype, shape and bytes."""
    theirs = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    theirs = theirs[key] if key else theirs
    ours, _, _ = read_torch(data)
    if key:
        ours = {n.removeprefix(f"{key}/"): a for n, a in ours.items() if n.startswith(f"{key}/")}
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        array = ours[name].view("u2") if tensor.dtype == torch.bfloat16 else ours[name]
        expected = files.as_numpy(tensor)
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape), name
        assert array.tobytes() == expected.tobytes(), name
    return len(ours)


def of_layout(tensors, zipped):
    """Torch cannot read back the uint16 that it wrote in its former layout; we can."""
    kinds = {name: t for name, t in tensors.items() if zipped or name != "uint16"}
    assert len(kinds) == (24 if zipped else 23)
    return kinds


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_kind_of_tensor_in_every_protocol(torch, files, zipped, protocol):
    options = {"_use_new_zipfile_serialization": zipped, "pickle_protocol": protocol}
    tensors = of_layout(files.tensors(), zipped)
    data = saved(torch, tensors, **options)
    if protocol == 2:
        assert same_as_torch(torch, files, data) == len(tensors)
        return
    # torch's restricted reader knows protocol 2 alone.
    expected, _, _ = read_torch(saved(torch, tensors))
    found, _, _ = read_torch(data)
    assert {k: a.tobytes() for k, a in found.items()} == {
        k: a.tobytes() for k, a in expected.items()
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_training_scripts_checkpoint(torch, files, zipped):
    import argparse

    content = files.checkpoint()
    content["model"] = of_layout(content["model"], zipped)
    with torch.serialization.safe_globals([argparse.Namespace]):
        data = saved(torch, content, _use_new_zipfile_serialization=zipped)
        assert same_as_torch(torch, files, data, "model") == len(content["model"])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_two_hundred_random_views(torch, files, zipped):
    chance, tensors = random.Random(0), {}
    kinds = [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.int16,
    ]
    bases = [(torch.randn(500) * 50).to(kind) for kind in kinds]
    for number in range(200):
        base = chance.choice(bases)
        shape = [chance.randrange(0, 5) for _ in range(chance.randrange(0, 5))]
        strides = [chance.randrange(0, 20) for _ in shape]
        tensors[f"t{number}"] = base.as_strided(shape, strides, chance.randrange(0, 100))
    assert (
        same_as_torch(torch, files, saved(torch, tensors, _use_new_zipfile_serialization=zipped))
        == 200
    )


def test_a_whole_network_with_its_optimizer(torch, torchvision, files):
    network = torchvision.models.resnet18(num_classes=3)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    content = {
        "state_dict": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"_step_count": 3, "_last_lr": [0.1]},
        "seed": torch.get_rng_state(),
    }
    for zipped in (True, False):
        data = saved(torch, content, _use_new_zipfile_serialization=zipped)
        assert same_as_torch(torch, files, data, "state_dict") == 122


def test_other_order_of_bytes(torch, files):
    tensors = {
        "a": torch.randn(5),
        "b": torch.arange(3),
        "c": torch.randn(2).bfloat16(),
        "d": torch.randn(2, dtype=torch.complex64),
        "e": torch.tensor([True]),
    }
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(torch, tensors))) as archive,
        zipfile.ZipFile(out, "w") as other,
    ):
        for name in archive.namelist():
            other.writestr(name, b"big" if name.endswith("byteorder") else archive.read(name))
    assert same_as_torch(torch, files, out.getvalue()) == 5


def test_without_checksums(torch, files):
    torch.serialization.set_crc32_options(False)
    try:
        data = saved(torch, files.tensors())
    finally:
        torch.serialization.set_crc32_options(True)
    assert same_as_torch(torch, files, data) == 24


def test_programs_and_networks_are_refused(torch):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    for zipped in (True, False):
        data = saved(torch, network, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"a whole network, pickled with its code"):
            read_torch(data)
    program = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(network), program)
    with pytest.raises(ValueError, match="a TorchScript program"):
        read_torch(program.getvalue())


def test_what_is_not_dense_is_refused_where_a_weight_should_be(torch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    for odd in (torch.eye(2).to_sparse(), quantized, torch.empty(2, device="meta")):
        with pytest.raises(ValueError, match=r"w \(sparse, quantized or empty tensor\)"):
            read_torch(saved(torch, {"w": odd}))
    arrays, _, _ = read_torch(saved(torch, {"w": torch.ones(2).to(torch.float8_e4m3fn)}))
    assert np.asarray(arrays["w"], np.float32).tolist() == [1, 1]
