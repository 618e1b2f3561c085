"""Grad-CAM and HiResCAM of pytorch-grad-cam, on the same weights and images."""

import numpy as np
import pytest

from flaxtransfer.analysis import saliency_maps
from flaxtransfer.models.model import leaf_shapes
from flaxtransfer.models.registry import ARCHITECTURES, resnet
from flaxtransfer.paths import unflatten
from flaxtransfer.weights.naming import key_map
from flaxtransfer.weights.naming.timm import table_for

pytestmark = pytest.mark.parity

TARGETS = (3, 0, 7, 1, 9, 5, 2, 8)


@pytest.fixture(scope="module")
def peer(torch, torchvision):
    """Imported after torchvision, which it imports too."""
    import pytorch_grad_cam

    return pytorch_grad_cam


@pytest.fixture(scope="module", params=["resnet18", "resnet50"])
def both(request, torch, torchvision, making):
    torch.manual_seed(0)
    network = torchvision.models.get_model(request.param, weights=None)
    network = making.randomize(network, 4).eval()
    config = ARCHITECTURES[request.param]
    arrays = {key: value.detach().numpy() for key, value in network.state_dict().items()}
    leaves = key_map.to_leaves(table_for(config), arrays, leaf_shapes(config), what="torch")
    return network, resnet(config), unflatten(leaves)


@pytest.mark.parametrize("layer", ["layer2", "layer3", "layer4"])
@pytest.mark.parametrize(("method", "name"), [("grad_cam", "GradCAM"), ("hires_cam", "HiResCAM")])
def test_the_same_maps(torch, peer, both, layer, method, name, record_property):
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    network, model, variables = both
    images = torch.randn(len(TARGETS), 3, 96, 96, generator=torch.Generator().manual_seed(3))
    with getattr(peer, name)(network, [getattr(network, layer)]) as cam:
        theirs = cam(images, [ClassifierOutputTarget(target) for target in TARGETS])
    found = saliency_maps(
        model,
        variables,
        images.permute(0, 2, 3, 1).numpy(),
        targets=np.array(TARGETS),
        layer=layer,
        method=method,
    )
    ours = found.upsampled()
    # Where nothing speaks for a class, both maps are zero everywhere.
    marked = ours.any(axis=(1, 2))
    np.testing.assert_array_equal(marked, theirs.any(axis=(1, 2)))
    assert marked.sum() >= 3
    ours, theirs = ours[marked], theirs[marked]
    correlations = correlations_of(ours, theirs)
    record_property("maps", float(1 - min(correlations)))
    assert min(correlations) > 0.999
    # The negative case: the map of another image is another one.
    assert max(correlations_of(ours, np.roll(theirs, 1, axis=0))) < 0.99


def correlations_of(ours, theirs):
    pairs = zip(ours, theirs, strict=True)
    return [np.corrcoef(one.ravel(), other.ravel())[0, 1] for one, other in pairs]
