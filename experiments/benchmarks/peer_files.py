"""Networks of torch's libraries, and the files that training programs make of them.

``SHAPES`` has a function for each shape of file; it writes one for any of ``PEERS``. Weights and
statistics are random, so that one that is lost or exchanged shows in the logits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

if not hasattr(torch.ops.torchvision, "nms"):
    # Lets torchvision be imported beside a torch that its compiled part was not built for.
    _library = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm
import torchvision
import transformers

LIMIT = 5e-6  # of the largest number; float32 sums in another order
CLASSES, SIZE = 7, 64


@dataclass(frozen=True)
class Peer:
    """A network of a peer; ``features`` gives what its head sees."""

    name: str
    make: Callable[[], nn.Module]
    head: str = "fc"
    logits: Callable[[Any], Any] = lambda output: output


def features(peer: Peer, network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The input of the network's head."""
    seen: list[torch.Tensor] = []
    head = network.get_submodule(peer.head)
    hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(images)
    hook.remove()
    return torch.flatten(seen[0], 1)


def randomize(network: nn.Module, seed: int) -> nn.Module:
    """Gives every norm scales, shifts and statistics that are not their initial values."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                shape = module.weight.shape
                module.weight.copy_(0.3 + 0.4 * torch.rand(shape, generator=random))
                module.bias.copy_(0.3 * torch.randn(shape, generator=random))
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(0.3 * torch.randn(shape, generator=random))
                module.running_var.copy_(0.5 + torch.rand(shape, generator=random))
    return network.eval()


def of_torchvision(block: str, **options: Any) -> nn.Module:
    resnet = torchvision.models.resnet
    return resnet.ResNet(getattr(resnet, block), [1, 1, 1, 1], num_classes=CLASSES, **options)


def of_transformers(layer_type: str) -> nn.Module:
    sizes = [16, 32, 64, 128] if layer_type == "basic" else [64, 128, 256, 512]
    config = transformers.ResNetConfig(
        depths=[1, 1, 1, 1],
        embedding_size=16,
        hidden_sizes=sizes,
        layer_type=layer_type,
        num_labels=CLASSES,
    )
    return transformers.ResNetForImageClassification(config)


def of_timm(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, num_classes=CLASSES, **options)


PEERS = (
    Peer("torchvision basic", lambda: of_torchvision("BasicBlock")),
    Peer("torchvision bottleneck", lambda: of_torchvision("Bottleneck")),
    Peer("torchvision grouped", lambda: of_torchvision("Bottleneck", groups=32, width_per_group=4)),
    Peer("timm resnet10t", lambda: of_timm("resnet10t")),
    Peer("timm seresnet18", lambda: of_timm("seresnet18")),
    Peer("timm ecaresnet26t", lambda: of_timm("ecaresnet26t")),
    Peer(
        "transformers basic", lambda: of_transformers("basic"), "classifier.1", lambda o: o.logits
    ),
    Peer(
        "transformers bottleneck",
        lambda: of_transformers("bottleneck"),
        "classifier.1",
        lambda o: o.logits,
    ),
)


@dataclass(frozen=True)
class Written:
    """A file, or a folder, that a peer wrote.

    Args:
        path: what is loaded.
        expected: "logits", "features" or "refused".
        network: whose logits they are; None for those of the peer that was given.
        options: of ``ft.load``.
        limit: of the relative difference.
    """

    path: Path
    expected: str = "logits"
    network: nn.Module | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    limit: float = LIMIT


Shape = Callable[[Peer, nn.Module, Path], Written]
SHAPES: dict[str, Shape] = {}


def shape(name: str) -> Callable[[Shape], Shape]:
    def register(function: Shape) -> Shape:
        SHAPES[name] = function
        return function

    return register


def saved(folder: Path, content: Any, name: str = "weights.pth", **options: Any) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


def prefixed(network: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: tensor for key, tensor in network.state_dict().items()}


def optimizer_of(network: nn.Module) -> dict[str, Any]:
    """The state of an optimizer after a step."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), 0.0)
    output = network(torch.zeros(2, 3, SIZE, SIZE))
    getattr(output, "logits", output).sum().backward()
    kept = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    optimizer.step()
    network.load_state_dict(kept)
    network.zero_grad()
    network.eval()
    return optimizer.state_dict()


def other(peer: Peer, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return randomize(peer.make(), seed)


shape("state_dict, zip")(lambda peer, net, to: Written(saved(to, net.state_dict())))
shape("state_dict, as before torch 1.6")(
    lambda peer, net, to: Written(saved(to, net.state_dict(), _use_new_zipfile_serialization=False))
)
shape("state_dict under state_dict")(
    lambda peer, net, to: Written(saved(to, {"state_dict": net.state_dict(), "epoch": 3}))
)
shape("model_state_dict, optimizer_state_dict, epoch, loss")(
    lambda peer, net, to: Written(
        saved(
            to,
            {
                "epoch": 3,
                "loss": 0.25,
                "optimizer_state_dict": optimizer_of(net),
                "model_state_dict": net.state_dict(),
            },
        )
    )
)
shape("model, optimizer, lr_scheduler, args (Namespace)")(
    lambda peer, net, to: Written(
        saved(
            to,
            {
                "model": net.state_dict(),
                "optimizer": optimizer_of(net),
                "lr_scheduler": {"last_epoch": 4},
                "args": argparse.Namespace(lr=0.1),
            },
        )
    )
)
shape("any name: run/best/net")(
    lambda peer, net, to: Written(saved(to, {"run": {"best": {"net": net.state_dict()}}}))
)
shape("Lightning, model.")(
    lambda peer, net, to: Written(
        saved(
            to,
            {
                "epoch": 3,
                "global_step": 40,
                "pytorch-lightning_version": "2.4.0",
                "state_dict": prefixed(net, "model."),
                "loops": {},
                "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": ""}},
                "optimizer_states": [optimizer_of(net)],
                "hyper_parameters": {"lr": 0.001},
            },
            "last.ckpt",
        )
    )
)
shape("Lightning, student.model. beside a metric")(
    lambda peer, net, to: Written(
        saved(
            to,
            {
                "state_dict": {
                    **prefixed(net, "student.model."),
                    "metric.confmat": torch.zeros(7, 7),
                }
            },
        )
    )
)
shape("DataParallel")(lambda peer, net, to: Written(saved(to, nn.DataParallel(net).state_dict())))
shape("torch.compile")(lambda peer, net, to: Written(saved(to, torch.compile(net).state_dict())))
shape("FSDP, _fsdp_wrapped_module.")(
    lambda peer, net, to: Written(saved(to, prefixed(net, "_fsdp_wrapped_module.")))
)


@shape("FSDP, checkpointed blocks inside a compiled network")
def _(peer: Peer, net: nn.Module, to: Path) -> Written:
    named = {}
    for key, tensor in net.state_dict().items():
        parts = key.split(".")
        at = next((n for n, part in enumerate(parts) if part.isdigit()), None)
        if at is not None and len(parts) > at + 2:
            parts.insert(at + 1, "_checkpoint_wrapped_module")
        named[".".join(["_orig_mod", "_fsdp_wrapped_module", *parts])] = tensor
    return Written(saved(to, named))


shape("DeepSpeed, module")(
    lambda peer, net, to: Written(
        saved(
            to,
            {"module": net.state_dict(), "optimizer": None, "global_steps": 3, "dp_world_size": 1},
            "mp_rank_00_model_states.pt",
        )
    )
)


@shape("torchvision's reference script, model and model_ema")
def _(peer: Peer, net: nn.Module, to: Path) -> Written:
    averaged = torch.optim.swa_utils.AveragedModel(net)
    average = other(peer, 11)
    averaged.module.load_state_dict(average.state_dict())
    content = {"model": net.state_dict(), "model_ema": averaged.state_dict(), "epoch": 1}
    return Written(saved(to, content), network=average)


@shape("the same, the plain one by key")
def _(peer: Peer, net: nn.Module, to: Path) -> Written:
    averaged = torch.optim.swa_utils.AveragedModel(other(peer, 11))
    content = {"model": net.state_dict(), "model_ema": averaged.state_dict()}
    return Written(saved(to, content), options={"key": "model"})


@shape("timm's script, state_dict and state_dict_ema")
def _(peer: Peer, net: nn.Module, to: Path) -> Written:
    average = other(peer, 12)
    content = {
        "epoch": 2,
        "arch": "resnet",
        "state_dict": net.state_dict(),
        "state_dict_ema": average.state_dict(),
        "version": 2,
        "metric": 0.5,
    }
    return Written(saved(to, content, "model_best.pth.tar"), network=average)


shape("two networks and no rule")(
    lambda peer, net, to: Written(
        saved(to, {"first": net.state_dict(), "second": other(peer, 13).state_dict()}), "refused"
    )
)


@shape("MoCo, encoder_q, encoder_k and queue")
def _(peer: Peer, net: nn.Module, to: Path) -> Written:
    content = {
        **prefixed(net, "module.encoder_q."),
        **prefixed(other(peer, 14), "module.encoder_k."),
        "module.queue": torch.randn(128, 64),
        "module.queue_ptr": torch.zeros(1, dtype=torch.int64),
    }
    return Written(saved(to, {"state_dict": content, "arch": "resnet"}), "features")


class Around(nn.Module):
    """A network of the user's around a backbone."""

    def __init__(self, backbone: nn.Module, **heads: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        for name, head in heads.items():
            setattr(self, name, head)


def with_head(peer: Peer, net: nn.Module, head: nn.Module) -> nn.Module:
    parent, _, name = peer.head.rpartition(".")
    setattr(net.get_submodule(parent), name, head)
    return net.eval()


def width_of(peer: Peer, net: nn.Module) -> int:
    head = net.get_submodule(peer.head)
    assert isinstance(head, nn.Linear)
    return head.in_features


@shape("self.backbone and self.classifier beside it")
def _(peer: Peer, net: nn.Module, to: Path) -> Written:
    head = nn.Linear(width_of(peer, net), CLASSES)
    body = with_head(peer, other(peer, 15), nn.Identity())
    around = Around(body, classifier=head)
    return Written(saved(to, around.state_dict()), network=with_head(peer, body, head))


@shape("self.net whose own head is the classifier")
def _(peer: Peer, net: nn.Module, to: Path) -> Written:
    return Written(saved(to, prefixed(net, "net.")))


@shape("a head behind a dropout")
def _(peer: Peer, net: nn.Module, to: Path) -> Written:
    linear = nn.Linear(width_of(peer, net), CLASSES)
    net = with_head(peer, net, nn.Sequential(nn.Dropout(0.5), linear))
    return Written(saved(to, net.state_dict()), network=net)


@shape("a head of two layers")
def _(peer: Peer, net: nn.Module, to: Path) -> Written:
    width = width_of(peer, net)
    layers = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    return Written(saved(to, with_head(peer, net, layers).state_dict()), "features", net)


@shape("a head without a bias")
def _(peer: Peer, net: nn.Module, to: Path) -> Written:
    net = with_head(peer, net, nn.Linear(width_of(peer, net), CLASSES, bias=False))
    return Written(saved(to, net.state_dict()), network=net)


@shape("no head")
def _(peer: Peer, net: nn.Module, to: Path) -> Written:
    without = {k: t for k, t in net.state_dict().items() if not k.startswith(f"{peer.head}.")}
    return Written(saved(to, without), "features")


@shape("float16")
def _(peer: Peer, net: nn.Module, to: Path) -> Written:
    half = {k: t.half() if t.is_floating_point() else t for k, t in net.state_dict().items()}
    net.load_state_dict({k: t.float() for k, t in half.items()})
    return Written(saved(to, half))


@shape("bfloat16 in safetensors")
def _(peer: Peer, net: nn.Module, to: Path) -> Written:
    from safetensors.torch import save_file

    half = {k: t.bfloat16() if t.is_floating_point() else t for k, t in net.state_dict().items()}
    net.load_state_dict({k: t.float() for k, t in half.items()})
    save_file(half, to / "model.safetensors")
    return Written(to / "model.safetensors")


@shape("safetensors")
def _(peer: Peer, net: nn.Module, to: Path) -> Written:
    from safetensors.torch import save_file

    save_file(net.state_dict(), to / "model.safetensors")
    return Written(to / "model.safetensors")


def third_of(net: nn.Module) -> int:
    """A third of a network's bytes."""
    return sum(tensor.nbytes for tensor in net.state_dict().values()) // 3


@shape("safetensors in shards, with an index")
def _(peer: Peer, net: nn.Module, to: Path) -> Written:
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(net.state_dict(), to, max_shard_size=third_of(net))
    assert len(list(to.glob("*.safetensors"))) > 1
    return Written(to)


@shape(".bin in shards, with an index")
def _(peer: Peer, net: nn.Module, to: Path) -> Written:
    from huggingface_hub import save_torch_state_dict

    content, most = net.state_dict(), third_of(net)
    save_torch_state_dict(content, to, max_shard_size=most, safe_serialization=False)
    return Written(to)


@shape("a damaged file: cut in half")
def _(peer: Peer, net: nn.Module, to: Path) -> Written:
    path = saved(to, net.state_dict())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return Written(path, "refused")


@shape("parameters without running statistics")
def _(peer: Peer, net: nn.Module, to: Path) -> Written:
    return Written(saved(to, dict(net.named_parameters())), "refused")


@shape("one layer missing")
def _(peer: Peer, net: nn.Module, to: Path) -> Written:
    content = net.state_dict()
    content.pop(next(key for key in content if "running_mean" in key))
    return Written(saved(to, content), "refused")


@shape("pruned, not made plain")
def _(peer: Peer, net: nn.Module, to: Path) -> Written:
    from torch.nn.utils import prune

    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            prune.l1_unstructured(module, "weight", amount=0.3)
    return Written(saved(to, net.state_dict()), "refused")


@shape("weight norm, not made plain")
def _(peer: Peer, net: nn.Module, to: Path) -> Written:
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            nn.utils.parametrizations.weight_norm(module)
    return Written(saved(to, net.state_dict()), "refused")


shape("the whole network, pickled")(lambda peer, net, to: Written(saved(to, net), "refused"))


@shape("TorchScript")
def _(peer: Peer, net: nn.Module, to: Path) -> Written:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return peer.logits(self.net(images))

    torch.jit.trace(Plain(), torch.zeros(1, 3, SIZE, SIZE)).save(str(to / "net.pt"))
    return Written(to / "net.pt", "refused")


@shape("ONNX, torch's exporter")
def _(peer: Peer, net: nn.Module, to: Path) -> Written:
    torch.onnx.export(net, torch.zeros(1, 3, SIZE, SIZE), str(to / "net.onnx"), dynamo=False)
    return Written(to / "net.onnx")
