"""Gradients of torchvision, in float64, where rounding does not hide a wrong formula.

In float32 torch's gradient of a whole network differs from its own float64 one by up to a per
cent, so that a tolerance there would have no power.
"""

import dataclasses

import jax
import numpy as np
import pytest

from flaxtransfer.models.model import leaf_shapes
from flaxtransfer.models.registry import ARCHITECTURES, RESNETS, resnet
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.weights.naming import key_map
from flaxtransfer.weights.naming import timm as names
from flaxtransfer.weights.naming.timm import table_for

pytestmark = pytest.mark.parity

LIMIT = 1e-10  # of the largest entry of each leaf's gradient


def leaves_from(tensors, config):
    shapes = leaf_shapes(config)
    arrays = {key: tensor.detach().numpy() for key, tensor in tensors.items()}
    return key_map.to_leaves(table_for(config), arrays, shapes, what="torch")


def both(torch, network, config, norm):
    """Gradients of a random linear function of the logits, and the new statistics."""
    network = network.double().train(norm == "batch")
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(3, 3, 64, 64, generator=generator, dtype=torch.float64)
    weights = torch.randn(3, config.classes, generator=generator, dtype=torch.float64)
    before = leaves_from(network.state_dict(), config)
    copies = {path: leaf.copy() for path, leaf in before.items()}
    before = {"batch_stats": {}, **unflatten(copies)}

    (network(images) * weights).sum().backward()
    gradients = {key: value.grad for key, value in network.named_parameters()}
    theirs = leaves_from({**network.state_dict(), **gradients}, config)

    with jax.enable_x64(True):
        model = resnet(config)

        def loss(params, statistics, x):
            variables = {"params": params, "batch_stats": statistics}
            logits, new = model.apply(variables, x, norm=norm)
            return (logits * weights.numpy()).sum(), new

        ours, new = jax.jit(jax.grad(loss, has_aux=True))(
            before["params"], before["batch_stats"], images.permute(0, 2, 3, 1).numpy()
        )
        ours = flatten({"params": ours, "batch_stats": new})
        return {path: np.asarray(leaf) for path, leaf in ours.items()}, theirs


@pytest.fixture
def differing(record_property):
    """Leaves that differ by more than the limit; the largest difference goes into the table."""

    def differing(ours, theirs, kind):
        found = {
            path: float(np.abs(ours[path] - leaf).max() / (np.abs(leaf).max() or 1))
            for path, leaf in theirs.items()
            if path.startswith(kind)
        }
        if kind == "params/":
            record_property("gradients", max(found.values()))
        return {path: difference for path, difference in found.items() if not difference <= LIMIT}

    return differing


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_with_running_statistics(differing, torch, torchvision, making, name):
    torch.manual_seed(0)
    network = making.randomize(torchvision.models.get_model(name, weights=None), 4)
    ours, theirs = both(torch, network, RESNETS[name], "running")
    assert len(ours) == len(theirs)
    assert differing(ours, theirs, "params/") == {}
    assert differing(ours, theirs, "batch_stats/") == {}  # which nothing may have moved


# One of each kind of part that torchvision has not.
@pytest.mark.parametrize(
    "name",
    [
        "resnet18d",
        "seresnet18",
        "ecaresnet26t",
        "resnetblur18",
        "resnetaa34d",
        "resnet50_gn",
        "resnetv2_18d",
        "resnetv2_50x1_bit",
    ],
)
def test_of_timms_variants(differing, torch, torchvision, making, name):
    import timm

    torch.manual_seed(0)
    network = making.randomize(timm.create_model(name, pretrained=False, num_classes=7), 4)
    config = dataclasses.replace(ARCHITECTURES[name], classes=7)
    if config.standardized is not None:
        config = dataclasses.replace(config, standardized=names.V2_EPSILON)
    ours, theirs = both(torch, network, config, "running")
    assert len(ours) == len(theirs)
    assert differing(ours, theirs, "params/") == {}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_with_batch_statistics(differing, torch, torchvision, making, name):
    torch.manual_seed(0)
    network = making.randomize(torchvision.models.get_model(name, weights=None), 5)
    ours, theirs = both(torch, network, RESNETS[name], "batch")
    assert differing(ours, theirs, "params/") == {}
    means = {path: leaf for path, leaf in theirs.items() if path.endswith("/mean")}
    assert differing(ours, means, "batch_stats/") == {}
