"""Files that training programs write, added to ``PROGRAMS``.

Where the program itself is not needed to write one, its keys are those of its source: MMEngine,
MMDetection, Detectron2, solo-learn, lightly, SwAV, VICReg, Lightning, DeepSpeed, accelerate, peft.
"""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from peer_files import CLASSES, SIZE, Written, of_torchvision, prefixed, saved, timm, transformers
from peer_programs import basic, bottleneck, program, seeded
from torch import nn

import flaxtransfer as ft

Arrays = dict[str, torch.Tensor]


def another() -> nn.Module:
    return seeded(lambda: of_torchvision("Bottleneck"), 1)


def body(net: nn.Module, prefix: str = "backbone.") -> Arrays:
    return {prefix + k: t for k, t in net.state_dict().items() if not k.startswith("fc.")}


def headed(net: nn.Module) -> Arrays:
    """As MMPretrain and others name a backbone and its head."""
    head = {f"head.{k}": t for k, t in net.state_dict().items() if k.startswith("fc.")}
    return body(net) | head


def numbered(net: nn.Module, prefix: str) -> Arrays:
    layers = nn.Sequential(*list(net.children())[:-1]).state_dict()
    return {prefix + key: tensor for key, tensor in layers.items()}


def linear(name: str, outputs: int, inputs: int) -> Arrays:
    return {f"{name}.weight": torch.randn(outputs, inputs), f"{name}.bias": torch.randn(outputs)}


def norm(name: str, size: int) -> Arrays:
    leaves = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{leaf}": torch.ones(size) for leaf in leaves}


@program("MMEngine with its hook for averages: the average is in state_dict")
def _(to: Path) -> Written:
    net = bottleneck()
    plain = {f"module.{key}": tensor for key, tensor in headed(another()).items()}
    content = {
        "meta": {"mmengine_version": "0.10.4", "dataset_meta": {"classes": list("abcdefg")}},
        "state_dict": headed(net),
        "message_hub": {"runtime_info": {}},
        "ema_state_dict": {"steps": torch.tensor(9), **plain},
    }
    return Written(saved(to, content), network=net)


@program("mmcv with its hook for averages: the plain weights under ema_ names")
def _(to: Path) -> Written:
    net = bottleneck()
    plain = {f"ema_{key.replace('.', '_')}": t for key, t in headed(another()).items()}
    return Written(saved(to, {"meta": {}, "state_dict": headed(net) | plain}), network=net)


@program("MMSelfSup SimCLR, backbone. and neck.")
def _(to: Path) -> Written:
    net = bottleneck()
    neck = linear("neck.fc0", 512, 2048) | norm("neck.bn0", 512) | linear("neck.fc1", 128, 512)
    scale = {f"data_preprocessor.{name}": torch.ones(3, 1, 1) for name in ("mean", "std")}
    content = {"meta": {}, "state_dict": body(net) | neck | scale}
    return Written(saved(to, content), "features", net)


@program("MMDetection Mask R-CNN, backbone., neck., rpn_head. and roi_head.")
def _(to: Path) -> Written:
    net = bottleneck()
    more = {
        "neck.lateral_convs.0.conv.weight": torch.randn(256, 256, 1, 1),
        "neck.fpn_convs.0.conv.weight": torch.randn(256, 256, 3, 3),
        "rpn_head.rpn_cls.weight": torch.randn(3, 256, 1, 1),
        **linear("roi_head.bbox_head.fc_cls", 81, 1024),
    }
    return Written(saved(to, {"meta": {}, "state_dict": body(net) | more}), "features", net)


def as_detectron(net: nn.Module, prefix: str = "") -> Arrays:
    found = {}
    for key, tensor in net.state_dict().items():
        name = re.sub(r"layer(\d)", lambda match: f"res{int(match[1]) + 1}", key)
        name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
        name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name).replace("fc.", "linear.")
        if not key.endswith("num_batches_tracked"):
            found[prefix + ("stem." + name if name.startswith("conv1.") else name)] = tensor
    return found


@program("Detectron2, a backbone")
def _(to: Path) -> Written:
    content = {"model": as_detectron(bottleneck()), "matching_heuristics": True}
    return Written(saved(to, content), "refused")


@program("Detectron2, a trained detector")
def _(to: Path) -> Written:
    content = as_detectron(bottleneck(), "backbone.bottom_up.") | linear("roi_heads.box_head", 4, 4)
    return Written(saved(to, {"model": content, "iteration": 9}, "model_final.pth"), "refused")


@program("Detectron2 R-50.pkl, a pickle of numpy's arrays")
def _(to: Path) -> Written:
    arrays = {key: tensor.numpy() for key, tensor in as_detectron(bottleneck()).items()}
    (to / "R-50.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "Caffe2"}))
    return Written(to / "R-50.pkl", "refused")


@program("solo-learn SimCLR, with its online classifier")
def _(to: Path) -> Written:
    net = bottleneck()
    head = {f"classifier.{name}": t for name, t in net.fc.state_dict().items()}
    more = linear("projector.0", 2048, 2048) | linear("projector.2", 128, 2048)
    content = {"state_dict": body(net) | head | more, "pytorch-lightning_version": "1.9"}
    return Written(saved(to, content, "last.ckpt"), network=net)


@program("solo-learn BYOL, backbone and momentum_backbone")
def _(to: Path) -> Written:
    net = bottleneck()
    more = linear("projector.0", 4096, 2048) | linear("momentum_projector.0", 4096, 2048)
    content = body(net) | body(another(), "momentum_backbone.") | more
    return Written(saved(to, {"state_dict": content}, "last.ckpt"), "features", net)


@program("lightly SimCLR, numbered backbone. and projection_head.")
def _(to: Path) -> Written:
    net = bottleneck()
    more = linear("projection_head.layers.0", 2048, 2048) | norm("projection_head.layers.1", 2048)
    content = {"state_dict": numbered(net, "backbone.") | more}
    return Written(saved(to, content, "last.ckpt"), "features", net)


@program("lightly MoCo, numbered backbone and backbone_momentum")
def _(to: Path) -> Written:
    net = bottleneck()
    content = numbered(net, "backbone.") | numbered(another(), "backbone_momentum.")
    return Written(saved(to, {"state_dict": content}, "last.ckpt"), "features", net)


@program("BYOL of lucidrains, the network twice and its target")
def _(to: Path) -> Written:
    net = bottleneck()
    content = prefixed(net, "net.") | prefixed(net, "online_encoder.net.")
    content |= prefixed(another(), "target_encoder.net.")
    content |= linear("online_encoder.projector.0", 4096, 2048)
    return Written(saved(to, content), "features", net)


@program("SwAV, projection_head and prototypes")
def _(to: Path) -> Written:
    net = bottleneck()
    more = linear("module.projection_head.0", 2048, 2048) | norm("module.projection_head.1", 2048)
    more |= {"module.prototypes.weight": torch.randn(3000, 128)}
    content = {"epoch": 3, "state_dict": body(net, "module.") | more}
    return Written(saved(to, content, "ckp-3.pth"), "features", net)


@program("VICReg, model with its projector")
def _(to: Path) -> Written:
    net = bottleneck()
    more = linear("module.projector.0", 4096, 2048) | norm("module.projector.1", 4096)
    content = {"model": body(net, "module.backbone.") | more, "optimizer": {"state": {}}}
    return Written(saved(to, content), "features", net)


for _name, _prefix in (
    ("torch.compile under DistributedDataParallel", "module._orig_mod."),
    ("DistributedDataParallel under torch.compile", "_orig_mod.module."),
):

    @program(_name)
    def _(to: Path, prefix: str = _prefix) -> Written:
        net = bottleneck()
        return Written(saved(to, {"state_dict": prefixed(net, prefix)}), network=net)


@program("Lightning, the average in the state of a callback")
def _(to: Path) -> Written:
    net = bottleneck()
    average = {"ema_state_dict": prefixed(net, "model."), "ema_decay": 0.99}
    content = {"state_dict": prefixed(another(), "model."), "callbacks": {"EMACallback": average}}
    return Written(saved(to, content, "last.ckpt"), network=net)


@program("torch-ema, the average as a list without names")
def _(to: Path) -> Written:
    net = bottleneck()
    average = {"decay": 0.99, "num_updates": 3, "shadow_params": list(another().parameters())}
    return Written(saved(to, {"model": net.state_dict(), "ema": average}), network=net)


@program("transformers Trainer, a folder of steps")
def _(to: Path) -> Written:
    config = transformers.ResNetConfig(
        num_labels=CLASSES,
        depths=[1, 1, 1, 1],
        embedding_size=16,
        hidden_sizes=[32, 64, 128, 256],
    )
    nets = [
        seeded(lambda: transformers.ResNetForImageClassification(config), seed) for seed in (1, 0)
    ]
    for step, net in zip((500, 1000), nets, strict=True):
        folder = to / f"checkpoint-{step}"
        net.save_pretrained(folder)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            torch.save({"state": torch.ones(2)}, folder / name)
        (folder / "trainer_state.json").write_text('{"best_model_checkpoint": null}')
    return Written(to, network=nets[1])


@program("accelerate save_state, a folder")
def _(to: Path) -> Written:
    net = bottleneck()
    for name in ("optimizer.bin", "scheduler.bin", "sampler.bin", "random_states_0.pkl"):
        torch.save({"state": torch.ones(2)}, to / name)
    return Written(saved(to, net.state_dict(), "pytorch_model.bin").parent, network=net)


@program("DeepSpeed ZeRO-2, a folder with latest")
def _(to: Path) -> Written:
    net, folder = bottleneck(), to / "global_step9"
    folder.mkdir()
    content = {"module": net.state_dict(), "optimizer": None, "ds_version": "0.14"}
    saved(folder, content, "mp_rank_00_model_states.pt")
    parts = {"optimizer_state_dict": {"single_partition_of_fp32_groups": [torch.ones(9)]}}
    saved(folder, parts, "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (to / "latest").write_text("global_step9")
    return Written(to, network=net)


@program("DeepSpeed ZeRO-3, a folder with latest")
def _(to: Path) -> Written:
    folder = to / "global_step9"
    folder.mkdir()
    content = {"module": {key: torch.empty(0) for key in bottleneck().state_dict()}}
    saved(folder, content, "zero_pp_rank_0_mp_rank_00_model_states.pt")
    (to / "latest").write_text("global_step9")
    return Written(to, "refused")


@program("torch.distributed.checkpoint, a folder")
def _(to: Path) -> Written:
    (to / ".metadata").write_bytes(pickle.dumps(None))
    (to / "__0_0.distcp").write_bytes(bytes(9))
    return Written(to, "refused")


@program("fastai Learner.save with its optimizer")
def _(to: Path) -> Written:
    from fastai.learner import save_model
    from fastai.optimizer import Adam
    from fastai.vision import learner

    net = basic()
    whole = nn.Sequential(
        learner.create_body(net, pretrained=False), learner.create_head(512, CLASSES)
    )
    before, optimizer = copy.deepcopy(whole.state_dict()), Adam(list(whole.parameters()), lr=1e-3)
    whole.train()(torch.randn(2, 3, SIZE, SIZE)).sum().backward()
    optimizer.step()
    whole.load_state_dict(before)
    save_model(to / "net.pth", whole, optimizer)
    return Written(to / "net.pth", "features", net.eval())


@program("segmentation_models_pytorch Unet, encoder., decoder. and segmentation_head.")
def _(to: Path) -> Written:
    net = bottleneck()
    more = {
        "decoder.blocks.0.conv1.0.weight": torch.randn(256, 3072, 3, 3),
        "segmentation_head.0.weight": torch.randn(1, 16, 3, 3),
    }
    return Written(saved(to, body(net, "encoder.") | more), "features", net)


@program("peft LoRA, not merged")
def _(to: Path) -> Written:
    named = {
        f"base_model.model.{key.replace('conv2.weight', 'conv2.base_layer.weight')}": tensor
        for key, tensor in bottleneck().state_dict().items()
    }
    first = "base_model.model.layer1.0.conv2.lora_A.default.weight"
    return Written(saved(to, named | {first: torch.randn(4, 64, 3, 3)}), "refused")


@program("Composer, state.model under module.")
def _(to: Path) -> Written:
    net = bottleneck()
    content = {"state": {"model": prefixed(net, "module."), "optimizers": {}}, "rng": [{"x": 1}]}
    return Written(saved(to, content, "ep3.pt"), network=net)


@program("two heads for two tasks")
def _(to: Path) -> Written:
    net = bottleneck()
    return Written(
        saved(to, body(net) | linear("head_a", 3, 2048) | linear("head_b", 4, 2048)),
        "features",
        net,
    )


def _train_state(kind: str) -> None:
    @program(f"flax TrainState with batch_stats and Adam, {kind}")
    def _(to: Path) -> Written:
        import optax
        import orbax.checkpoint
        from flax import serialization
        from flax.training import train_state

        class State(train_state.TrainState):
            batch_stats: Any = None

        net = bottleneck()
        file = saved(to, net.state_dict())
        variables = ft.load(file).variables
        file.unlink()
        state = State.create(
            apply_fn=lambda: None,
            params=variables["params"],
            tx=optax.adam(1e-3),
            batch_stats=variables["batch_stats"],
        )
        if kind == "msgpack":
            (to / "checkpoint_300").write_bytes(serialization.to_bytes(state))
            return Written(to / "checkpoint_300", network=net)
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(to / "300" / "default", state)
        return Written(to, network=net)


for _kind in ("msgpack", "orbax"):
    _train_state(_kind)

for _family in ("dla34", "hrnet_w18_small"):

    @program(f"another family: timm {_family} under backbone.")
    def _(to: Path, family: str = _family) -> Written:
        net = timm.create_model(family, num_classes=CLASSES)
        return Written(saved(to, prefixed(net, "backbone.")), "refused")
