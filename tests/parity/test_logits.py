"""Evaluation logits of torchvision, timm and transformers, in float32, through a file.

The peers are the reference: their own networks, with random weights and random BatchNorm
statistics, saved with safetensors and read by `load`.
"""

import functools

import jax
import numpy as np
import pytest

from flaxtransfer.catalogue import RESNETS
from flaxtransfer.models import resnet
from flaxtransfer.weights import load, save

pytestmark = pytest.mark.parity

LIMIT = 5e-6  # of max |logit|; float32 sums in another order


CLASSES = 11


@functools.cache
def forward(config):
    """Compiled once for all peers."""
    model = resnet(config)
    return jax.jit(lambda variables, images: model.apply(variables, images)[0])


def compare(torch, network, path, size, format, logits=lambda output: output):
    from safetensors.torch import save_file

    save_file(network.state_dict(), path)
    checkpoint = load(path)
    assert checkpoint.format == format
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = logits(network(images)).numpy()
    ours = forward(checkpoint.config)(checkpoint.variables, images.permute(0, 2, 3, 1).numpy())
    assert theirs.std() > 1e-3  # of constant logits any network would be a match
    assert np.abs(ours - theirs).max() <= LIMIT * np.abs(theirs).max()
    return checkpoint


@pytest.mark.parametrize(
    ("name", "size"),
    [*((name, 64) for name in RESNETS), ("resnet18", 224), ("resnet50", 224),
     ("wide_resnet50_2", 64), ("resnext50_32x4d", 64)],
)  # fmt: skip
def test_torchvision(torch, torchvision, making, tmp_path, name, size):
    torch.manual_seed(0)
    network = making.randomise(
        torchvision.models.get_model(name, weights=None, num_classes=CLASSES), 0
    )
    checkpoint = compare(torch, network, tmp_path / "w.safetensors", size, "torchvision")
    assert checkpoint.config.name == name


@pytest.mark.parametrize("name", RESNETS)
def test_timm(torch, torchvision, making, tmp_path, name):
    import timm

    torch.manual_seed(0)
    network = making.randomise(timm.create_model(name, pretrained=False, num_classes=CLASSES), 1)
    checkpoint = compare(torch, network, tmp_path / "w.safetensors", 64, "torchvision")
    assert (checkpoint.config.name, checkpoint.config.classes) == (name, CLASSES)


# The depths of microsoft/resnet-18 .. 152, whose configurations these are.
@pytest.mark.parametrize("name", RESNETS)
def test_transformers(torch, torchvision, making, tmp_path, name):
    import transformers

    config = RESNETS[name]
    torch.manual_seed(0)
    network = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            depths=list(config.depths),
            hidden_sizes=[64 * 2**stage * config.expansion for stage in range(4)],
            layer_type=config.block,
            num_labels=CLASSES,
        )
    )
    checkpoint = compare(
        torch,
        making.randomise(network, 2),
        tmp_path / "w.safetensors",
        64,
        "huggingface",
        lambda output: output.logits,
    )
    assert (checkpoint.config.name, checkpoint.config.classes) == (name, CLASSES)


@pytest.mark.parametrize("layer_type", ["bottleneck", "basic"])
def test_transformers_with_the_stride_in_the_first_convolution(
    torch, torchvision, making, tmp_path, layer_type
):
    import transformers

    sizes = [16, 32, 64, 128] if layer_type == "basic" else [64, 128, 256, 512]
    torch.manual_seed(0)
    network = making.randomise(
        transformers.ResNetForImageClassification(
            transformers.ResNetConfig(
                depths=[1, 2, 1, 1], embedding_size=16, hidden_sizes=sizes,
                layer_type=layer_type, downsample_in_bottleneck=True, num_labels=CLASSES,
            )
        ), 2,
    )  # fmt: skip
    network.save_pretrained(tmp_path)
    checkpoint = load(tmp_path)
    images = torch.randn(2, 3, 75, 75, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = network(images).logits.numpy()
    ours = forward(checkpoint.config)(checkpoint.variables, images.permute(0, 2, 3, 1).numpy())
    assert np.abs(ours - theirs).max() <= LIMIT * np.abs(theirs).max()
    # A basic block has no such convolution, and transformers strides as ever.
    assert checkpoint.config.stride_in == ("1x1" if layer_type == "bottleneck" else "3x3")


# Every kind of part at least twice: deep and tiered stems, pooled shortcuts, SE, ECA, blur and
# average anti-aliasing, groups, ResNet-RS; GroupNorm and SENet-154 once.
TIMM = (
    "resnet10t", "resnet14t", "resnet26t", "resnet50t", "resnet18d", "resnet34d", "resnet50d",
    "resnet50c", "resnet50s", "resnet26", "wide_resnet50_2", "resnet50_gn",
    "resnext50d_32x4d", "seresnet18", "seresnet50", "seresnet50t", "seresnext26d_32x4d",
    "seresnext26t_32x4d", "senet154", "ecaresnet26t", "ecaresnet50d", "ecaresnext26t_32x4d",
    "ecaresnetlight", "resnetblur18", "resnetblur50d", "resnetaa34d", "resnetaa50", "resnetaa50d",
    "seresnetaa50d", "resnetrs50",
)  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_timms_variants(torch, torchvision, making, tmp_path, name):
    import timm
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    network = making.randomise(timm.create_model(name, pretrained=False, num_classes=CLASSES), 1)
    path = tmp_path / "w.safetensors"
    save_file(network.state_dict(), path)
    checkpoint = load(path, model=name)
    assert (checkpoint.config.name, checkpoint.config.classes) == (name, CLASSES)
    # An odd side shows what a pool does with the last row; timm's own "aa" cannot take one.
    size = 64 if "resnetaa" in name else 75
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = network(images).numpy()
    ours = forward(checkpoint.config)(checkpoint.variables, images.permute(0, 2, 3, 1).numpy())
    assert theirs.std() > 1e-3
    assert np.abs(ours - theirs).max() <= LIMIT * np.abs(theirs).max()

    save(tmp_path / "back.safetensors", checkpoint)
    back = load_file(tmp_path / "back.safetensors")
    own = {key: value for key, value in network.state_dict().items() if "num_batches" not in key}
    assert own.keys() == back.keys()
    assert all(torch.equal(own[key], back[key]) for key in own)
    assert load(tmp_path / "back.safetensors").config == checkpoint.config


def test_all_named_architectures_have_timms_leaves(torch, torchvision):
    import timm

    from flaxtransfer.catalogue import ARCHITECTURES
    from flaxtransfer.weights.architecture import leaf_shapes
    from flaxtransfer.weights.rename import leaf_of
    from flaxtransfer.weights.timm import table_of

    for name, config in ARCHITECTURES.items():
        with torch.device("meta"):
            keys = timm.create_model(name, pretrained=False).state_dict()
        keys = {key: value for key, value in keys.items() if "num_batches" not in key}
        table = table_of(keys)
        theirs = dict(leaf_of(table, key, tuple(value.shape)) for key, value in keys.items())
        assert theirs == leaf_shapes(config), name


@pytest.mark.parametrize("name", ["resnetv2_50", "densenet121"])
def test_timms_other_networks_are_refused(torch, torchvision, tmp_path, name):
    import timm
    from safetensors.torch import save_file

    network = timm.create_model(name, pretrained=False)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="which is not supported"):
        load(tmp_path / "w.safetensors")


def test_published_names_bring_torchvisions_preprocessing(torchvision):
    from flaxtransfer.weights.torchvision import RESIZE

    published = {}
    for name in torchvision.models.list_models(include=["resnet*", "wide_resnet*", "resnext*"]):
        for weights in torchvision.models.get_model_weights(name):
            digits = weights.url.rsplit("-", 1)[1].removesuffix(".pth")
            transform = weights.transforms()
            published[digits] = transform.resize_size[0]
            assert (transform.crop_size, transform.interpolation.value) == ([224], "bilinear")
            assert transform.mean == [0.485, 0.456, 0.406]
            assert transform.std == [0.229, 0.224, 0.225]
    assert published.items() <= RESIZE.items()
