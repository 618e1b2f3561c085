"""Parameters and multiply-adds, against those that torchvision publishes and torch counts."""

import functools
import math

import pytest

from flaxtransfer.models.registry import ARCHITECTURES, costs

pytestmark = pytest.mark.parity


def test_published_with_torchvisions_weights(torchvision):
    """`num_params`, and `_ops` in 10^9 multiply-adds with three digits, of every weights file."""
    compared = []
    for name in set(ARCHITECTURES) & set(torchvision.models.list_models(torchvision.models)):
        for weights in torchvision.models.get_model_weights(name):
            counted = costs(ARCHITECTURES[name], 224)
            assert counted.parameters == weights.meta["num_params"], weights
            assert round(counted.multiply_adds / 1e9, 3) == weights.meta["_ops"], weights
            compared.append(name)
    assert len(compared) == 17
    assert len(set(compared)) == 10


def note_size(sizes, path, module, inputs, output):
    sizes[path] = output.shape


def blur_filters(network, sizes):
    """Multiplications of timm's fixed blur filters, which are no weights."""
    import timm

    return sum(
        9 * sizes[name][1] * math.prod(sizes[name][2:])
        for name, module in network.named_modules()
        if isinstance(module, timm.layers.BlurPool2d)
    )


def test_every_name_against_torchs_counter(torch, making):
    """Torch counts while timm's networks run on tensors without numbers."""
    making.declare_operators()
    import timm
    from torch.utils.flop_counter import FlopCounterMode

    for name, config in ARCHITECTURES.items():
        theirs = name if timm.is_model(name) else f"legacy_{name}"
        if config.standardized or not timm.is_model(theirs):
            # Torch's counter does not see standardized kernels, and timm has not all of BiT.
            continue
        sizes: dict = {}
        with torch.device("meta"):
            network = timm.create_model(theirs).eval()
            for path, module in network.named_modules():
                module.register_forward_hook(functools.partial(note_size, sizes, path))
            with FlopCounterMode(display=False) as counter:
                network(torch.empty(1, 3, 224, 224))
        counted = costs(config)
        multiplications = counter.get_total_flops() // 2 - blur_filters(network, sizes)
        assert counted.multiply_adds == multiplications, name
        assert counted.parameters == sum(p.numel() for p in network.parameters()), name
