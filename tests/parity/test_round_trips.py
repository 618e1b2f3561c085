"""Random networks on their way through other programs and back, trained there by one step.

310 networks in all, drawn from every field of ``ResNetConfig``; to timm, ONNX and StableHLO every
one has to go.
"""

import dataclasses
import importlib
import os
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import flaxtransfer as ft
from flaxtransfer.models.layout import DEPTHS
from flaxtransfer.paths import flatten
from flaxtransfer.weights import export, load
from tests.parity.test_export import checkpoint_of, logits_of, torch_logits
from tests.support.random_networks import networks

# Keras warns of its own.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

LIMIT = 2e-5
"""Of the largest logit; networks with group normalization have up to 1.2e-5 in onnxruntime."""
SIZE = 64
"""Of images: a multiple of 32, as average anti-aliasing needs, of which layer4 sees 2 x 2."""

PREPROCESSING = ft.Preprocessing((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), SIZE, SIZE + 8, "bicubic")


def trips(count):
    """Derandomized, so that a run can be repeated."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        # Smaller networks than a failing one take as long to build.
        phases=[Phase.generate],
    )


SMALL = networks(most_blocks=2, widths=(8, 16, 32, 64))
"""Networks as ``test_names`` draws them, narrower."""

FOR_TIMM = networks(most_blocks=2, widths=(8, 10, 16, 32, 64))
"""The same, also with channels that timm would round."""

PLAIN = st.builds(
    ft.models.ResNetConfig,
    st.sampled_from(["basic", "bottleneck"]),
    st.tuples(*[st.integers(1, 2)] * 4),
    st.sampled_from([4, 8, 24, 64]),
    stem_width=st.sampled_from([None, 8, 16, 40, 64, 96]),
    in_channels=st.integers(1, 4),
)
"""Networks of Hugging Face's shape."""


def drawn(config):
    """A checkpoint with random leaves."""
    if config.norm == "batch":
        # Standardized filters enlarge what fixed statistics do not make small again.
        config = dataclasses.replace(config, standardized=None)
    return checkpoint_of(dataclasses.replace(config, classes=3), PREPROCESSING)


def images_of(checkpoint):
    shape = (4, SIZE, SIZE, checkpoint.config.bands)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def train_one_step(torch, network, images):
    """SGD on one batch; running averages of statistics move as well."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=1e-3)
    output = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    labels = torch.arange(len(images)) % 3
    torch.nn.functional.cross_entropy(getattr(output, "logits", output), labels).backward()
    optimizer.step()


def go_there_and_back(torch, near, before, network, write, path):
    """The peer's logits are ours, before and after one step there.

    Args:
        torch: the module.
        near: asserts that logits are equal.
        before: what was exported.
        network: the peer's network with the exported weights.
        write: writes the peer's network as its users do.
        path: where.
    """
    images = images_of(before)
    near(torch_logits(torch, network, images), logits_of(before, images))
    again = load(path)
    own, back = (flatten(each.variables) for each in (before, again))
    other = {
        field for field, value in vars(before.config).items() if value != vars(again.config)[field]
    }
    # What the peer lacks is folded away; a pool behind a ReLU may be padded with anything.
    assert other <= {"stem_bias", "stem_pool"}
    if other <= {"stem_pool"}:
        assert back.keys() == own.keys()
        assert all(np.asarray(own[leaf]).tobytes() == back[leaf].tobytes() for leaf in own)
    train_one_step(torch, network, images)
    write(network)
    trained = load(path)
    kernel = flatten(trained.variables)["params/fc/kernel"]
    assert not np.array_equal(kernel, own["params/fc/kernel"])
    near(torch_logits(torch, network, images), logits_of(trained, images))
    # Hundreds of networks would fill the memory with their programs.
    jax.clear_caches()


@pytest.fixture
def near(record_property):
    """Asserts that logits agree, and keeps the largest difference for the table at the end."""
    found = []

    def near(ours, theirs):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert np.isfinite(theirs).all()
        found.append(float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
        assert found[-1] <= LIMIT

    yield near
    record_property(f"{len(found)} comparisons of logits", float(max(found, default=0.0)))


def in_timm(path):
    """The network of a folder, opened as the note of its export says."""
    import timm

    for code in path.glob("*.py"):
        if code.stem not in sys.modules:
            with pytest.MonkeyPatch.context() as patch:
                patch.syspath_prepend(path)
                importlib.import_module(code.stem)
    return timm.create_model(f"local-dir:{path}", pretrained=True)


def test_timm(torch, torchvision, near, record_property):
    from safetensors.torch import save_file

    taught = []

    @trips(200)
    @given(FOR_TIMM, st.sampled_from([4, 4, 4, 4, 4, 4, 3, 2, 1, 0]))
    def trip(config, stages):
        before = drawn(dataclasses.replace(config, depths=config.depths[:stages]))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net"
            export(before, path, to="timm")
            taught.append(len(list(path.glob("*.py"))))
            network = in_timm(path)

            def write(network):
                save_file(network.state_dict(), path / "model.safetensors")

            go_there_and_back(torch, near, before, network, write, path)
            # Without the file beside it, the name of the network says what no leaf shows.
            trained, bare = load(path), Path(folder) / "bare.safetensors"
            (path / "model.safetensors").rename(bare)
            if stages == 4:
                again = load(bare, model=trained.config.name)
                assert again.config == trained.config
                own, back = (flatten(each.variables) for each in (trained, again))
                assert own.keys() == back.keys()
                assert all(own[leaf].tobytes() == back[leaf].tobytes() for leaf in own)

    trip()
    record_property(f"{len(taught)} networks exported, {sum(taught)} with a file for timm", 0.0)
    assert 0 < sum(taught) < len(taught)


def test_without_the_file_timm_refuses_the_name_and_after_it_saves_and_adapts(
    torch, torchvision, near, tmp_path, monkeypatch
):
    import timm
    from timm.models import _hub, _registry

    config = ft.models.ResNetConfig("bottleneck", (1, 2, 1, 1), width=8, stride_in="1x1")
    before, path = drawn(config), tmp_path / "net"
    export(before, path, to="timm")
    monkeypatch.delitem(_registry._model_entrypoints, "flaxtransfer_resnet", raising=False)
    monkeypatch.delitem(sys.modules, "flaxtransfer_resnet", raising=False)
    with pytest.raises(RuntimeError, match=r"Unknown model .*flaxtransfer_resnet"):
        timm.create_model(f"local-dir:{path}", pretrained=True)
    network, images = in_timm(path), images_of(before)
    _hub.save_for_hf(network, tmp_path / "saved", safe_serialization=True)
    saved = load(tmp_path / "saved")
    assert saved.config == before.config
    near(torch_logits(torch, network, images), logits_of(saved, images))
    # A new head, other bands and features are timm's own doing, and still work.
    source = f"local-dir:{path}"
    other = timm.create_model(source, pretrained=True, num_classes=7, in_chans=1)
    assert other(torch.ones(1, 1, 64, 64)).shape == (1, 7)
    maps = timm.create_model(source, pretrained=True, features_only=True)
    assert [each.shape[1] for each in maps(torch.ones(1, 3, 64, 64))] == [8, 32, 64, 128, 256]


def test_the_built_in_network_in_timm(torch, torchvision, near, tmp_path):
    import timm
    from safetensors.torch import save_file

    before, path = load("builtin"), tmp_path / "net"
    export(before, path, to="timm")
    network = timm.create_model(f"local-dir:{path}", pretrained=True)

    def write(network):
        save_file(network.state_dict(), path / "model.safetensors")

    images = images_of(before)
    near(torch_logits(torch, network, images), logits_of(before, images))
    assert load(path).config == before.config
    train_one_step(torch, network, images)
    write(network)
    trained = load(path)
    assert trained.config == dataclasses.replace(before.config, stem_width=64)
    near(torch_logits(torch, network, images), logits_of(trained, images))


def test_transformers(torch, torchvision, near):
    import transformers

    @trips(30)
    @given(PLAIN, st.booleans())
    def trip(config, first):
        if first and config.block == "bottleneck":
            config = dataclasses.replace(config, stride_in="1x1")
        before = drawn(config)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net"
            export(before, path, to="huggingface")
            network = transformers.AutoModelForImageClassification.from_pretrained(path)
            go_there_and_back(torch, near, before, network, lambda n: n.save_pretrained(path), path)

    trip()


def test_torchvision(torch, torchvision, near):
    from safetensors import torch as safetensors_file
    from torchvision.models import resnet as models

    grouped = st.tuples(st.sampled_from([1, 1, 2, 4]), st.sampled_from([64, 32, 128]))

    @trips(15)
    @given(st.sampled_from([18, 34, 50]), grouped, st.integers(1, 4))
    def trip(depth, grouped, bands):
        block, depths = DEPTHS[depth]
        groups, per_group = grouped if block == "bottleneck" else (1, 64)
        config = ft.models.ResNetConfig(
            block, depths, groups=groups, base_width=per_group, in_channels=bands
        )
        before = drawn(config)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.safetensors"
            export(before, path, to="torchvision")
            kind = models.BasicBlock if block == "basic" else models.Bottleneck
            network = models.ResNet(
                kind, depths, num_classes=3, groups=groups, width_per_group=per_group
            )
            network.conv1 = torch.nn.Conv2d(bands, 64, 7, 2, 3, bias=False)
            network.load_state_dict(safetensors_file.load_file(path), strict=True)

            def write(network):
                torch.save(network.state_dict(), path)

            go_there_and_back(torch, near, before, network, write, path)

    trip()


def test_keras(near):
    """Theirs, trained there, to us, and back to them."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras
    from keras.src.applications import resnet as theirs

    @trips(10)
    @given(st.sampled_from([8, 24, 64]), st.tuples(*[st.integers(1, 2)] * 4), st.booleans())
    def trip(width, depths, second):
        stack = theirs.stack_residual_blocks_v2 if second else theirs.stack_residual_blocks_v1
        # One block of the second version would be named twice.
        depths = tuple(depth + second for depth in depths)

        def stages(x):
            for number, depth in enumerate(depths):
                # The second version lowers resolution in the last block of the first three.
                stride = {"stride1": 1 if number == (3 if second else 0) else 2}
                x = stack(x, width * 2**number, depth, name=f"conv{number + 2}", **stride)
            return x

        network = theirs.ResNet(
            stages,
            second,
            True,
            weights=None,
            classes=3,
            classifier_activation=None,
            input_shape=(SIZE, SIZE, 3),
        )
        network.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (4, SIZE, SIZE, 3)).astype(np.float32)
        images = theirs.preprocess_input(pixels.copy())
        if second:
            images = pixels / 127.5 - 1
        network.train_on_batch(images, np.arange(4) % 3)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.weights.h5"
            network.save_weights(path)
            trained = load(path)
            pre = trained.preprocessing
            prepared = (pixels / 255 - np.float32(pre.mean)) / np.float32(pre.std)
            logits = network(images).detach()
            near(logits, logits_of(trained, prepared.astype(np.float32)))
            export(trained, Path(folder) / "net.h5", to="keras")
            network.layers[-1].set_weights([0 * each for each in network.layers[-1].get_weights()])
            network.load_weights(Path(folder) / "net.h5")
            near(network(images).detach(), logits)
            expected = {"depths": depths, "width": width, "stem_channels": (64,)}
            for field, value in expected.items():
                assert getattr(trained.config, field) == value

    trip()


def test_onnx(near):
    import onnxruntime

    @trips(45)
    @given(SMALL)
    def trip(config):
        before = drawn(config)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.onnx"
            export(before, path, to="onnx")
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            images = images_of(before)
            theirs = session.run(None, {"images": images.transpose(0, 3, 1, 2)})[0]
            near(theirs, logits_of(before, images))

    trip()


def test_stablehlo(near):
    @trips(10)
    @given(networks(most_blocks=1, widths=(8, 16, 32, 64)))
    def trip(config):
        before = drawn(config)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.stablehlo"
            export(before, path, to="stablehlo")
            images = images_of(before)
            function = jax.export.deserialize(bytearray(path.read_bytes()))
            near(function.call(images), logits_of(before, images))

    trip()
