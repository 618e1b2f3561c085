"""Evaluation logits of torchvision, timm and transformers, in float32, through a file.

The peers are the reference: their own networks, with random weights and random BatchNorm
statistics, saved with safetensors and read by `load`.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from flaxtransfer.models.registry import RESNETS, resnet
from flaxtransfer.weights import load, save

pytestmark = pytest.mark.parity

LIMIT = 5e-6  # of max |logit|; float32 sums in another order


CLASSES = 11


@functools.cache
def forward(config):
    """Compiled once for all peers."""
    model = resnet(config)
    return jax.jit(lambda variables, images: model.apply(variables, images)[0])


def compare(agree, torch, network, path, size, format, logits=lambda output: output):
    from safetensors.torch import save_file

    save_file(network.state_dict(), path)
    checkpoint = load(path)
    assert checkpoint.format == format
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = logits(network(images)).numpy()
    ours = forward(checkpoint.config)(checkpoint.variables, images.permute(0, 2, 3, 1).numpy())
    agree(ours, theirs, LIMIT)
    return checkpoint


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, 64) for name in RESNETS),
        ("resnet18", 224),
        ("resnet50", 224),
        ("wide_resnet50_2", 64),
        ("resnext50_32x4d", 64),
    ],
)
def test_torchvision(agree, torch, torchvision, making, tmp_path, name, size):
    torch.manual_seed(0)
    network = making.randomize(
        torchvision.models.get_model(name, weights=None, num_classes=CLASSES), 0
    )
    checkpoint = compare(agree, torch, network, tmp_path / "w.safetensors", size, "torchvision")
    assert checkpoint.config.name == name


@pytest.mark.parametrize("name", RESNETS)
def test_timm(agree, torch, torchvision, making, tmp_path, name):
    import timm

    torch.manual_seed(0)
    network = making.randomize(timm.create_model(name, pretrained=False, num_classes=CLASSES), 1)
    checkpoint = compare(agree, torch, network, tmp_path / "w.safetensors", 64, "torchvision")
    assert (checkpoint.config.name, checkpoint.config.classes) == (name, CLASSES)


# The depths of microsoft/resnet-18 .. 152, whose configurations these are.
@pytest.mark.parametrize("name", RESNETS)
def test_transformers(agree, torch, torchvision, making, tmp_path, name):
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
        agree,
        torch,
        making.randomize(network, 2),
        tmp_path / "w.safetensors",
        64,
        "huggingface",
        lambda output: output.logits,
    )
    assert (checkpoint.config.name, checkpoint.config.classes) == (name, CLASSES)


@pytest.mark.parametrize("layer_type", ["bottleneck", "basic"])
def test_transformers_with_the_stride_in_the_first_convolution(
    agree, torch, torchvision, making, tmp_path, layer_type
):
    import transformers

    sizes = [16, 32, 64, 128] if layer_type == "basic" else [64, 128, 256, 512]
    torch.manual_seed(0)
    network = making.randomize(
        transformers.ResNetForImageClassification(
            transformers.ResNetConfig(
                depths=[1, 2, 1, 1],
                embedding_size=16,
                hidden_sizes=sizes,
                layer_type=layer_type,
                downsample_in_bottleneck=True,
                num_labels=CLASSES,
            )
        ),
        2,
    )
    network.save_pretrained(tmp_path)
    checkpoint = load(tmp_path)
    images = torch.randn(2, 3, 75, 75, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = network(images).logits.numpy()
    ours = forward(checkpoint.config)(checkpoint.variables, images.permute(0, 2, 3, 1).numpy())
    agree(ours, theirs, LIMIT)
    # A basic block has no such convolution, and transformers strides as ever.
    assert checkpoint.config.stride_in == ("1x1" if layer_type == "bottleneck" else "3x3")


# Every kind of part at least twice: deep and tiered stems, pooled shortcuts, SE, ECA, blur and
# average anti-aliasing, groups, ResNet-RS; GroupNorm and SENet-154 once.
TIMM = (
    "resnet10t",
    "resnet50t",
    "resnet18d",
    "resnet34d",
    "resnet50d",
    "resnet50c",
    "resnet50s",
    "wide_resnet50_2",
    "resnet50_gn",
    "resnext50d_32x4d",
    "seresnet18",
    "seresnet50t",
    "seresnext26d_32x4d",
    "senet154",
    "ecaresnet26t",
    "ecaresnet50d",
    "ecaresnext26t_32x4d",
    "ecaresnetlight",
    "resnetblur18",
    "resnetblur50d",
    "resnetaa34d",
    "resnetaa50",
    "seresnetaa50d",
    "resnetrs50",
    "resnetv2_18d",
    "resnetv2_50",
    "resnetv2_50t",
    "resnetv2_50d_gn",
    "resnetv2_50x1_bit",
)
SIZES = {
    # timm's own average anti-aliasing cannot take an odd side.
    **{name: 64 for name in TIMM if "resnetaa" in name},
    # Standardized weights and GroupNorms magnify rounding: at 75 px timm itself is 4e-6 to 5e-6
    # away from its own result in float64. In float64 both are equal to 1e-13.
    "resnetv2_50x1_bit": 224,
}


@pytest.mark.parametrize("name", TIMM)
def test_timms_variants(agree, torch, torchvision, making, tmp_path, name):
    import timm
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    # Four blocks of SENet-154 have all of its parts and spare half a minute.
    depths = {"layers": (1, 1, 1, 1)} if name == "senet154" else {}
    network = timm.create_model(name, pretrained=False, num_classes=CLASSES, **depths)
    making.randomize(network, 1)
    path = tmp_path / "w.safetensors"
    save_file(network.state_dict(), path)
    checkpoint = load(path, model=None if depths else name)
    assert depths or checkpoint.config.name == name
    assert checkpoint.config.classes == CLASSES
    # An odd side shows what a pool does with the last row.
    size = SIZES.get(name, 75)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = network(images).numpy()
    ours = forward(checkpoint.config)(checkpoint.variables, images.permute(0, 2, 3, 1).numpy())
    agree(ours, theirs, LIMIT)

    save(tmp_path / "back.safetensors", checkpoint)
    back = load_file(tmp_path / "back.safetensors")
    own = {key: value for key, value in network.state_dict().items() if "num_batches" not in key}
    assert own.keys() == back.keys()
    assert all(torch.equal(own[key], back[key]) for key in own)
    assert load(tmp_path / "back.safetensors").config == checkpoint.config


def test_all_named_architectures_have_timms_leaves(torch, torchvision):
    import timm

    from flaxtransfer.models.model import leaf_shapes
    from flaxtransfer.models.registry import ARCHITECTURES
    from flaxtransfer.weights.naming import timm as naming
    from flaxtransfer.weights.naming.key_map import leaf_of

    for name, config in ARCHITECTURES.items():
        if name not in timm.list_models():
            assert name.endswith("_bit"), name
            continue
        with torch.device("meta"):
            keys = timm.create_model(name, pretrained=False).state_dict()
        keys = {key: value for key, value in keys.items() if "num_batches" not in key}
        table = (naming.v2_table_of if config.preactivation else naming.table_of)(keys)
        theirs = dict(leaf_of(table, key, tuple(value.shape)) for key, value in keys.items())
        assert theirs == leaf_shapes(config), name


def big_transfer_file(arrays):
    """The file of a network as Google wrote it, from timm's names."""
    file = {}

    def put(name, array):
        file[f"resnet/{name}"] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array

    for key, array in arrays.items():
        parts = key.split(".")
        leaf = {"weight": "gamma", "bias": "beta"}[parts[-1]]
        if parts[0] == "stages":
            unit = f"block{int(parts[1]) + 1}/unit{int(parts[3]) + 1:02d}"
            if parts[4] == "downsample":
                put(f"{unit}/a/proj/standardized_conv2d/kernel", array)
            elif parts[4].startswith("conv"):
                put(f"{unit}/{'abc'[int(parts[4][-1]) - 1]}/standardized_conv2d_7/kernel", array)
            else:
                put(f"{unit}/{'abc'[int(parts[4][-1]) - 1]}/group_norm/{leaf}", array)
        elif parts[0] == "stem":
            put("root_block/standardized_conv2d/kernel", array)
        elif parts[0] == "norm":
            put(f"group_norm/{leaf}", array)
        else:
            put(f"head/conv2d/{'kernel' if leaf == 'gamma' else 'bias'}", array)
    return file


@pytest.mark.parametrize("numbered", [False, True])
def test_the_files_of_big_transfer(agree, torch, torchvision, making, tmp_path, numbered):
    import timm

    name = "resnetv2_50x1_bit"
    torch.manual_seed(0)
    source = making.randomize(timm.create_model(name, pretrained=False, num_classes=CLASSES), 1)
    file = big_transfer_file({key: value.numpy() for key, value in source.state_dict().items()})
    if not numbered:
        file = {key.replace("conv2d_7", "conv2d"): array for key, array in file.items()}
    np.savez(tmp_path / "BiT-M-R50x1.npz", **file)
    checkpoint = load(tmp_path / "BiT-M-R50x1.npz")
    assert (checkpoint.config.name, checkpoint.format) == (name, "bit")
    assert checkpoint.config.standardized == 1e-10
    assert checkpoint.preprocessing.mean == checkpoint.preprocessing.std == (0.5, 0.5, 0.5)
    if numbered:  # which timm does not read
        return
    network = timm.create_model(name, pretrained=False, num_classes=CLASSES).eval()
    network.load_pretrained(str(tmp_path / "BiT-M-R50x1.npz"))
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = network(images).numpy()
    # timm adds 1e-8 to the variances of these files' filters, for which BiT has 1e-10.
    config = dataclasses.replace(checkpoint.config, standardized=1e-8)
    ours = forward(config)(checkpoint.variables, images.permute(0, 2, 3, 1).numpy())
    agree(ours, theirs, LIMIT)


@pytest.mark.parametrize("name", ["densenet121", "resnetv2_50d_evos"])
def test_timms_other_networks_are_refused(torch, torchvision, tmp_path, name):
    import timm
    from safetensors.torch import save_file

    network = timm.create_model(name, pretrained=False)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"which cannot be loaded|\d+ missing|running statistics"):
        load(tmp_path / "w.safetensors")


def test_published_names_bring_torchvisions_preprocessing(torchvision):
    from flaxtransfer.weights.naming.published import RESIZE

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
