"""Small networks of torchvision and Hugging Face, with the logits that they give.

Made, from the root of the repository and in an environment with the extra `parity`, by

    python tests/golden/make_golden.py

which wrote the folders beside this file with torch 2.13.0, torchvision 0.28.0, timm 1.0.31 and
transformers 5.23.0. BatchNorm statistics are random, so that a statistic that is lost, exchanged
or left at its initial value shows in the logits.
"""

from pathlib import Path

FOLDER = Path(__file__).parent

# name: block, depths, width, width_per_group, groups, channels, classes
TORCHVISION = {
    "torchvision_basic": ("BasicBlock", (1, 2, 1, 1), 4, 64, 1, 3, 7),
    "torchvision_bottleneck": ("Bottleneck", (2, 1, 1, 1), 4, 64, 1, 3, 5),
    "torchvision_grouped": ("Bottleneck", (1, 1, 1, 1), 4, 32, 4, 2, 6),
}
# name: layer_type, depths, hidden sizes
HUGGINGFACE = {
    "huggingface_basic": ("basic", (1, 1, 2, 1), (4, 8, 16, 32)),
    "huggingface_bottleneck": ("bottleneck", (1, 2, 1, 1), (16, 32, 64, 128)),
}
LABELS = ("anther", "bract", "calyx")

_library = None


def declare_operators():
    """Lets torchvision be imported beside a torch that its compiled part was not built for."""
    global _library
    import torch

    if _library is None and not hasattr(torch.ops.torchvision, "nms"):
        _library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def randomize(network, seed):
    """Gives every BatchNorm statistics and parameters that are not their initial values.

    The last scale of a block is small, as in a trained network: the sum of many blocks stays of
    the size of one.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.GroupNorm):
            shape = module.weight.shape
            scale = 0.4 if name.endswith(("bn3", "layer.2.normalization")) else 1.0
            with torch.no_grad():
                module.weight.copy_(scale * (0.5 + torch.rand(shape, generator=generator)))
                module.bias.copy_(0.3 * torch.randn(shape, generator=generator))
        if isinstance(module, torch.nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.copy_(0.3 * torch.randn(shape, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(shape, generator=generator))
    return network.eval()


def narrow(block, depths, width, width_per_group, groups, channels, classes):
    """Torchvision's own blocks and forward pass, at a width that its constructor does not offer."""
    import torch
    from torchvision.models import resnet

    block = getattr(resnet, block)
    network = resnet.ResNet(
        block, [1, 1, 1, 1], num_classes=classes, groups=groups, width_per_group=width_per_group
    )
    network.inplanes = width
    network.conv1 = torch.nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
    network.bn1 = torch.nn.BatchNorm2d(width)
    for stage, depth in enumerate(depths):
        layer = network._make_layer(block, width * 2**stage, depth, stride=1 + (stage > 0))
        setattr(network, f"layer{stage + 1}", layer)
    network.fc = torch.nn.Linear(width * 8 * block.expansion, classes)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def _write(name, network, channels, logits):
    import numpy as np
    import torch

    folder = FOLDER / name
    folder.mkdir(exist_ok=True)
    images = torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = logits(network, images).numpy()
    np.savez_compressed(
        folder / "logits.npz", images=images.permute(0, 2, 3, 1).numpy(), logits=expected
    )
    return folder


def main():
    """Writes all folders."""
    import torch

    declare_operators()
    import timm
    import transformers
    from safetensors.torch import save_file
    from timm.models import save_for_hf

    torch.set_num_threads(1)
    for seed, (name, arguments) in enumerate(TORCHVISION.items()):
        torch.manual_seed(seed)
        network = randomize(narrow(*arguments), seed)
        folder = _write(name, network, arguments[-2], lambda network, images: network(images))
        save_file(network.state_dict(), folder / "model.safetensors")

    for seed, (name, (layer_type, depths, sizes)) in enumerate(HUGGINGFACE.items(), 10):
        torch.manual_seed(seed)
        config = transformers.ResNetConfig(
            embedding_size=4,
            hidden_sizes=list(sizes),
            depths=list(depths),
            layer_type=layer_type,
            id2label=dict(enumerate(LABELS)),
            label2id={label: number for number, label in enumerate(LABELS)},
        )
        network = randomize(transformers.ResNetForImageClassification(config), seed)
        folder = _write(name, network, 3, lambda network, images: network(images).logits)
        network.save_pretrained(folder)
        transformers.ConvNextImageProcessor(
            size={"shortest_edge": 224},
            crop_pct=0.875,
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ).save_pretrained(folder)

    # timm's own description of its plain resnet50, as its repositories have it beside the weights.
    reference = timm.create_model("resnet50.a1_in1k", pretrained=False)
    torch.manual_seed(20)
    network = randomize(narrow("Bottleneck", (1, 1, 1, 1), 4, 64, 1, 3, 8), 20)
    network.pretrained_cfg = reference.pretrained_cfg
    network.num_classes, network.num_features = 8, 128
    folder = _write("timm", network, 3, lambda network, images: network(images))
    shape = {"layers": [1, 1, 1, 1], "channels": [4, 8, 16, 32]}
    save_for_hf(network, folder, model_args=shape, safe_serialization=True)


if __name__ == "__main__":
    main()
