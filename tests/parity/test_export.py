"""What we write, loaded strictly by the programs that it is for."""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import flaxtransfer as ft
from flaxtransfer.models.model import leaf_shapes
from flaxtransfer.models.registry import ARCHITECTURES, resnet
from flaxtransfer.paths import unflatten
from flaxtransfer.weights import Preprocessing, Pretrained, export, load

pytestmark = pytest.mark.parity

LIMIT = 1e-5
PREPROCESSING = Preprocessing((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 75, 86, "bicubic")
NAMES = ("cat", "dog", "owl")
BOTTLENECK = ft.models.ResNetConfig("bottleneck", (1, 1, 1, 1), classes=3)
PLAIN = dataclasses.replace(BOTTLENECK, block="basic")


def checkpoint_of(config, preprocessing=PREPROCESSING):
    """Random leaves of a size that keeps maps at the size of 1."""
    rng = np.random.default_rng(0)

    def draw(path, shape):
        if path.endswith("kernel"):
            return rng.normal(0, 1 / np.sqrt(np.prod(shape[:-1])), shape)
        if path.endswith(("scale", "var")):
            return rng.uniform(0.5, 1.5, shape)
        return rng.normal(0, 0.3, shape)

    leaves = {
        path: draw(path, shape).astype(np.float32) for path, shape in leaf_shapes(config).items()
    }
    bands = config.bands
    preprocessing = dataclasses.replace(
        preprocessing, mean=(0.4, 0.5, 0.6, 0.7)[:bands], std=(0.2, 0.25, 0.3, 0.35)[:bands]
    )
    return Pretrained(
        {"batch_stats": {}, **unflatten(leaves)}, config, preprocessing, class_names=NAMES
    )


@functools.lru_cache(2)
def compiled(config):
    model = resnet(config)
    return jax.jit(lambda variables, images: model.apply(variables, images)[0])


def logits_of(checkpoint, images):
    return np.asarray(compiled(checkpoint.config)(checkpoint.variables, images))


def images_of(checkpoint, batch=2, size=75):
    shape = (batch, size, size, checkpoint.config.bands)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def torch_logits(torch, network, images):
    with torch.no_grad():
        output = network.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    return getattr(output, "logits", output).numpy()


FOR_TIMM = {
    "named": ARCHITECTURES["resnet18"],
    "narrow": dataclasses.replace(PLAIN, width=8),
    "narrow bottlenecks": dataclasses.replace(BOTTLENECK, width=8),
    "two bands": dataclasses.replace(PLAIN, in_channels=2),
    "adapter": dataclasses.replace(PLAIN, adapter=ft.models.Adapter(4)),
    "wide, groups": dataclasses.replace(BOTTLENECK, base_width=8, groups=4),
    "d, se": dataclasses.replace(
        BOTTLENECK, stem="deep", stem_width=16, shortcut="average", attention="se"
    ),
    "t, eca": dataclasses.replace(
        BOTTLENECK, stem="tiered", stem_width=16, shortcut="average", attention="eca"
    ),
    "blur": dataclasses.replace(PLAIN, anti_alias="blur"),
    "group": dataclasses.replace(BOTTLENECK, norm="group"),
    "rs": dataclasses.replace(
        BOTTLENECK,
        stem="deep",
        stem_width=16,
        shortcut="average",
        attention="se",
        se_ratio=0.25,
        stem_pool="convolution",
    ),
    "first 2, down 3": dataclasses.replace(
        BOTTLENECK, attention="se", reduce_first=2, shortcut_kernel=3
    ),
    "v2": dataclasses.replace(BOTTLENECK, preactivation=True, width=8),
    "v2, d, group": dataclasses.replace(
        BOTTLENECK,
        preactivation=True,
        width=32,
        norm="group",
        stem="deep",
        stem_width=32,
        shortcut="average",
    ),
    "v2, d without pooled shortcuts": dataclasses.replace(
        PLAIN, preactivation=True, width=8, stem="deep", stem_width=8
    ),
    "v2, pooled shortcuts": dataclasses.replace(
        BOTTLENECK, preactivation=True, width=8, shortcut="average"
    ),
    "v2, bias": dataclasses.replace(
        PLAIN, depths=(2, 1, 1, 1), preactivation=True, width=8, stem_bias=True
    ),
    "other epsilon": dataclasses.replace(PLAIN, epsilon=1e-3),
    "other epsilon, group": dataclasses.replace(BOTTLENECK, norm="group", epsilon=1e-3),
    "v2, other epsilon, group, standardized": dataclasses.replace(
        PLAIN, preactivation=True, width=32, norm="group", epsilon=1e-3, standardized=1e-10
    ),
    "bit": ARCHITECTURES["resnetv2_50x1_bit"],
}


@pytest.mark.parametrize("kind", FOR_TIMM)
def test_timm_takes_the_folder(agree, torch, torchvision, tmp_path, kind):
    import timm

    before = checkpoint_of(dataclasses.replace(FOR_TIMM[kind], classes=3))
    if kind == "bit":
        size = dataclasses.replace(PREPROCESSING, size=224, resize=256)
        before = checkpoint_of(before.config, size)
    written = export(before, tmp_path / "net", to="timm")
    network = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True)
    images = images_of(before, size=before.preprocessing.size)
    agree(torch_logits(torch, network, images), logits_of(before, images), LIMIT)
    data = timm.data.resolve_model_data_config(network)
    assert tuple(data["mean"]) == before.preprocessing.mean
    assert tuple(data["input_size"][1:]) == (before.preprocessing.size,) * 2
    transform = timm.data.create_transform(**data, is_training=False)
    assert transform.transforms[0].size == before.preprocessing.resize
    assert network.pretrained_cfg["label_names"] == list(NAMES)
    assert written.difference <= LIMIT


def test_timms_own_file_comes_back_byte_for_byte(torch, torchvision, making, tmp_path):
    import timm
    from safetensors.torch import load_file, save_file

    network = making.randomize(timm.create_model("seresnet50t", num_classes=3), 1)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    export(load(tmp_path / "model.safetensors"), tmp_path / "net", to="timm")
    back = load_file(tmp_path / "net" / "model.safetensors")
    own = {key: value for key, value in network.state_dict().items() if "num_batches" not in key}
    assert back.keys() == own.keys()
    assert all(back[key].numpy().tobytes() == own[key].numpy().tobytes() for key in own)
    again = timm.create_model("seresnet50t", num_classes=3)
    again.load_state_dict(back, strict=True)


FOR_TRANSFORMERS = {
    "basic": ft.models.ResNetConfig(depths=(1, 2, 1, 1), width=8, classes=3),
    "bottleneck": dataclasses.replace(BOTTLENECK, width=8),
    "v1": dataclasses.replace(BOTTLENECK, width=8, stride_in="1x1"),
    "adapter": dataclasses.replace(PLAIN, width=8, adapter=ft.models.Adapter(4)),
}


@pytest.mark.parametrize("kind", FOR_TRANSFORMERS)
def test_transformers_takes_the_folder(agree, torch, torchvision, tmp_path, kind):
    import transformers

    before = checkpoint_of(FOR_TRANSFORMERS[kind])
    export(before, tmp_path / "net", to="huggingface")
    network, said = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "net", output_loading_info=True
    )
    assert not any(said[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images = images_of(before)
    agree(torch_logits(torch, network, images), logits_of(before, images), LIMIT)
    assert network.config.id2label == dict(enumerate(NAMES))
    again = load(tmp_path / "net")
    theirs = dataclasses.replace(before.preprocessing, processor="huggingface")
    assert again.preprocessing == theirs
    assert again.class_names == NAMES
    if before.config.bands == 3:
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "net")
        picture = np.random.default_rng(0).integers(0, 256, (100, 130, 3), np.uint8)
        theirs = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        assert theirs.shape == (75, 75, 3)
        mean, std = before.preprocessing.mean, before.preprocessing.std
        back = theirs * std + mean
        assert back.min() > -1e-5
        assert back.max() < 1 + 1e-5


def test_torchvision_takes_the_file(agree, torch, torchvision, tmp_path):
    from safetensors.torch import load_file

    before = checkpoint_of(dataclasses.replace(ARCHITECTURES["resnet50"], classes=3))
    export(before, tmp_path / "net.safetensors", to="torchvision")
    network = torchvision.models.resnet50(num_classes=3)
    network.load_state_dict(load_file(tmp_path / "net.safetensors"), strict=True)
    images = images_of(before)
    agree(torch_logits(torch, network, images), logits_of(before, images), LIMIT)


CURVES = dataclasses.replace(PLAIN, width=8, adapter=ft.models.Adapter(2, "curves"))
FOR_ALL = {
    **{
        kind: dataclasses.replace(config, classes=3)
        for kind, config in FOR_TIMM.items()
        if kind not in ("named", "adapter", "bit")
    },
    **FOR_TRANSFORMERS,
    "average": dataclasses.replace(BOTTLENECK, width=8, anti_alias="average"),
    "curves": CURVES,
    "bit": dataclasses.replace(
        BOTTLENECK,
        preactivation=True,
        norm="group",
        width=32,
        standardized=1e-10,
        stem_pool="zero-padded",
    ),
    "v2, last": dataclasses.replace(
        BOTTLENECK,
        preactivation=True,
        depths=(2, 1, 2, 1),
        width=8,
        stride_at="last",
        stem_bias=True,
        stem_pool="zero-padded",
        epsilon=1.001e-5,
    ),
}


@pytest.mark.parametrize("kind", FOR_ALL)
def test_onnxruntime_computes_the_same(agree, tmp_path, kind):
    import onnx
    import onnxruntime

    size = 64 if kind == "average" else 43
    before = checkpoint_of(
        FOR_ALL[kind], dataclasses.replace(PREPROCESSING, size=size, resize=size)
    )
    export(before, tmp_path / "net.onnx")
    onnx.checker.check_model(str(tmp_path / "net.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(
        tmp_path / "net.onnx", providers=["CPUExecutionProvider"]
    )
    # What a network says of one image does not depend on the others.
    images = images_of(before, 64, size)
    expected = logits_of(before, images)
    for batch in (1, 7, 64):
        ours = session.run(None, {"images": images[:batch].transpose(0, 3, 1, 2)})[0]
        agree(ours, expected[:batch], LIMIT, f"{batch} images")
    larger = images_of(before, 2, 96)
    ours = session.run(None, {"images": larger.transpose(0, 3, 1, 2)})[0]
    agree(ours, logits_of(before, larger), LIMIT, "96 px")
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["class_names"]) == list(NAMES)
    assert Preprocessing.from_json(said["preprocessing"]) == before.preprocessing


ALONE = """
import json, sys
import jax, numpy as np
from jax import export
function = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
images = np.load(sys.argv[2])
for batch in (1, 7, 64):
    np.save(f"{sys.argv[3]}/{batch}.npy", function.call(images[:batch]))
assert not any(name.startswith(("flaxtransfer", "flax")) for name in sys.modules)
print(json.load(open(sys.argv[1] + ".json"))["class_names"])
"""


@pytest.mark.parametrize("kind", ["basic", "curves", "bit", "v2, last", "d, se", "blur"])
def test_stablehlo_runs_in_a_fresh_process_without_us(agree, tmp_path, kind):
    before = checkpoint_of(FOR_ALL[kind])
    export(before, tmp_path / "net.stablehlo")
    images = images_of(before, 64)
    np.save(tmp_path / "images.npy", images)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            ALONE,
            str(tmp_path / "net.stablehlo"),
            str(tmp_path / "images.npy"),
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(list(NAMES))
    expected = logits_of(before, images)
    for batch in (1, 7, 64):
        agree(np.load(tmp_path / f"{batch}.npy"), expected[:batch], LIMIT, f"{batch} images")


def test_digits_are_told_apart_by_timm_as_by_us(torch, torchvision, tmp_path):
    import timm

    source, checkpoint = ft.open_source("digits"), ft.load("builtin")
    network = ft.transfer(checkpoint, classes=10)
    model, variables = network.model, network.variables
    splits = ft.stratified_split(source.labels(), labels_per_class=5)
    pre = checkpoint.preprocessing
    feed = ft.loaders(source, splits, pre, batch_size=50)
    plan = ft.recipes.head_then_fine_tune(variables["params"], head_steps=20, fine_tune_steps=10)
    fitted = ft.fit(
        ft.Classifier(model, variables, feed.preprocessing), plan, feed, tmp_path / "run"
    )
    tuned = Pretrained(
        jax.tree.map(np.asarray, fitted.variables),
        model.config,
        pre,
        class_names=tuple(source.class_names),
    )
    export(tuned, tmp_path / "net", to="timm")
    network = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(network)
    transform = timm.data.create_transform(**data, is_training=False)

    from PIL import Image

    model_logits = jax.jit(lambda variables, images: model.apply(variables, images)[0])
    theirs, ours, same = [], [], []
    for positions in np.array_split(splits.test, 12):
        pictures = [
            Image.fromarray(np.asarray(source[i]["image"])[..., 0]).convert("RGB")
            for i in positions
        ]
        batch = torch.stack([transform(picture) for picture in pictures])
        with torch.no_grad():
            theirs.append(network(batch).argmax(1).numpy())
        images = batch.permute(0, 2, 3, 1).numpy()
        ours.append(np.asarray(model_logits(tuned.variables, images)).argmax(1))
        same.append(np.asarray([source[i]["label"] for i in positions]))
    theirs, ours, labels = map(np.concatenate, (theirs, ours, same))
    assert len(ours) == len(splits.test) > 1700
    np.testing.assert_array_equal(theirs, ours)
    assert (theirs == labels).mean() > 0.85
