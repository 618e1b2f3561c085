"""Files of torch: read without running them, and written so that torchvision takes them."""

import argparse
import pickle
from collections import OrderedDict

import numpy as np
import pytest

from flaxtransfer.classifier import transfer
from flaxtransfer.models.registry import RESNETS, resnet
from flaxtransfer.paths import flatten
from flaxtransfer.weights import load, save

pytestmark = pytest.mark.parity


class Creates:
    """A pickle that makes a file when it is read the trusting way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def network(torch, torchvision, making):
    torch.manual_seed(0)
    return making.randomize(making.narrow("BasicBlock", (1, 1, 1, 1), 4, 64, 1, 3, 6), 0)


def logits_of(checkpoint, images):
    return np.asarray(resnet(checkpoint.config).apply(checkpoint.variables, images)[0])


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_both_layouts_of_torch_save(torch, network, tmp_path, suffix, zipped):
    path = tmp_path / f"w{suffix}"
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=zipped)
    expected = {key: value.numpy() for key, value in network.state_dict().items()}
    leaves = flatten(load(path).variables)
    np.testing.assert_array_equal(leaves["params/fc/kernel"], expected["fc.weight"].T)
    np.testing.assert_array_equal(leaves["batch_stats/bn1/var"], expected["bn1.running_var"])


def training_script(network):
    """What torchvision's reference script saves."""
    return {
        "model": OrderedDict((f"module.{k}", v) for k, v in network.state_dict().items()),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, model="resnet18"),
    }


def test_a_training_scripts_checkpoint(torch, network, tmp_path):
    torch.save(training_script(network), tmp_path / "checkpoint.pth")
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    wrapped, plain = load(tmp_path / "checkpoint.pth"), load(tmp_path / "plain.pth")
    a, b = flatten(wrapped.variables), flatten(plain.variables)
    assert all(np.array_equal(a[path], b[path]) for path in b)
    assert "the weights are those under 'model'" in wrapped.notes
    assert "the prefix 'module.' was removed from the keys" in wrapped.notes


def test_a_compiled_networks_prefix(torch, network, tmp_path):
    compiled = {f"_orig_mod.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": compiled}, tmp_path / "w.pth")
    assert load(tmp_path / "w.pth").config.width == 4


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_other_precisions(torch, network, tmp_path, kind):
    arrays = {
        key: value.to(getattr(torch, kind)) if value.is_floating_point() else value
        for key, value in network.state_dict().items()
    }
    torch.save(arrays, tmp_path / "w.pth")
    checkpoint = load(tmp_path / "w.pth")
    leaf = flatten(checkpoint.variables)["params/conv1/kernel"]
    np.testing.assert_array_equal(leaf, arrays["conv1.weight"].float().permute(2, 3, 1, 0).numpy())
    assert any(f"leaves were converted from {kind} to float32" in note for note in checkpoint.notes)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle 2", "pickle 4"])
def test_a_pickle_that_wants_to_run_code_is_refused_and_runs_nothing(torch, tmp_path, how):
    trap, path = tmp_path / "executed", tmp_path / "evil.pth"
    content = {"conv1.weight": torch.ones(2), "epoch": Creates(trap)}
    if how.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, protocol=int(how[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ValueError, match=r"refused, and no code in it was run, because it calls"):
        load(path)
    assert not trap.exists()
    # The same file does make one for whoever trusts it: the trap is a trap.
    if how.startswith("pickle"):
        pickle.loads(path.read_bytes())["epoch"].close()
    else:
        torch.load(path, weights_only=False)["epoch"].close()
    assert trap.exists()


def test_a_pickled_network_is_refused(torch, network, tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "network.pth")
    with pytest.raises(ValueError, match=r"it calls torch\.nn\.modules.*state_dict\(\)"):
        load(tmp_path / "network.pth")


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (
            lambda data: data[: len(data) // 2],
            "damaged or not a torch checkpoint|damaged zip archive",
        ),
        (lambda data: data[:100], "damaged or not a torch checkpoint|damaged zip archive"),
        (lambda data: b"\x80\x02" + bytes(100), "truncated, damaged or not a torch checkpoint"),
        (lambda data: b"\x80\x02", "truncated, damaged or not a torch checkpoint"),
        (lambda data: b"XX" + data, "unknown format"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_damaged_files(torch, network, tmp_path, damage, text, zipped):
    path = tmp_path / "w.pth"
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=text):
        load(path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (lambda torch: [torch.ones(2)], "must hold tensors by name, got a list"),
        (lambda torch: torch.ones(2), "must hold tensors by name, got a Tensor"),
        (
            lambda torch: {"conv1.weight": torch.ones(2), "epoch": 3},
            "its 1 keys are like conv1.weight",
        ),
        (lambda torch: {}, "must hold tensors by name, got a dict"),
        (lambda torch: {"w": torch.ones(2, 2).to_sparse()}, r"w \(sparse, quantized"),
    ],
)
def test_what_is_no_dictionary_of_tensors(torch, tmp_path, content, text):
    torch.save(content(torch), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=text):
        load(tmp_path / "w.pth")


@pytest.mark.parametrize("name", RESNETS)
def test_torchvision_loads_what_we_write_and_gives_the_same_logits(
    torch, torchvision, making, tmp_path, name
):
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    network = making.randomize(torchvision.models.get_model(name, weights=None), 6)
    save_file(network.state_dict(), tmp_path / "theirs.safetensors")
    save(tmp_path / "ours.safetensors", load(tmp_path / "theirs.safetensors"))

    other = torchvision.models.get_model(name, weights=None)
    other.load_state_dict(load_file(tmp_path / "ours.safetensors"), strict=True)
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        assert torch.equal(network(images), other.eval()(images))


def test_a_new_head_goes_back_to_torchvision(torch, torchvision, network, making, tmp_path):
    # What a user does after training: another number of classes, then strictly into torchvision.
    from safetensors.torch import load_file, save_file

    save_file(network.state_dict(), tmp_path / "theirs.safetensors")
    checkpoint = load(tmp_path / "theirs.safetensors")
    network = transfer(checkpoint, classes=2, zero_head=False, seed=1)
    model, variables = network.model, network.variables
    trained = type(checkpoint)(variables, model.config, checkpoint.preprocessing)
    save(tmp_path / "trained.safetensors", trained)

    other = making.narrow("BasicBlock", (1, 1, 1, 1), 4, 64, 1, 3, 2)
    other.load_state_dict(load_file(tmp_path / "trained.safetensors"), strict=True)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        theirs = other.eval()(images).numpy()
    ours = logits_of(load(tmp_path / "trained.safetensors"), images.permute(0, 2, 3, 1).numpy())
    assert np.abs(ours - theirs).max() <= 5e-6 * np.abs(theirs).max()
