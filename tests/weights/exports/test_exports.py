"""What can go wrong on the way to another program; the programs themselves are asked in
tests/parity.
"""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import flaxtransfer as ft
from flaxtransfer.cli import run
from flaxtransfer.models.model import leaf_shapes
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.weights import Pretrained, load, pretrained
from flaxtransfer.weights.exports import exporting, hub
from flaxtransfer.weights.naming import published, timm

PREPROCESSING = ft.Preprocessing((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), size=32, resize=37)
TINY = ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=4, classes=2)


def checkpoint_of(config=TINY, **fields):
    variables = jax.tree.map(np.asarray, ft.resnet(config).init(jax.random.key(0)))
    bands = config.bands
    preprocessing = dataclasses.replace(PREPROCESSING, mean=(0.5,) * bands, std=(0.25,) * bands)
    return Pretrained(variables, config, preprocessing, class_names=("no", "yes"), **fields)


@pytest.fixture(scope="module")
def tiny():
    return checkpoint_of()


def entries(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("layout", ["timm", "huggingface"])
def test_a_folder_is_read_again_as_what_it_was(tiny, tmp_path, layout):
    written = exporting.export(tiny, tmp_path / "net", to=layout)
    assert written.difference <= 1e-6
    again = load(tmp_path / "net")
    # Hugging Face's processors round crops in their own way.
    theirs = "huggingface" if layout == "huggingface" else "torchvision"
    assert again.preprocessing == dataclasses.replace(tiny.preprocessing, processor=theirs)
    assert any("rounds crops" in note for note in written.notes) == (layout == "huggingface")
    assert again.config == tiny.config
    assert again.class_names == tiny.class_names
    own, back = flatten(tiny.variables), flatten(again.variables)
    assert all(np.asarray(own[path]).tobytes() == back[path].tobytes() for path in own)
    # An earlier export is replaced, and nothing lies about.
    exporting.export(tiny, tmp_path / "net", to=layout)
    assert entries(tmp_path) == ["net"]


@pytest.mark.parametrize(
    ("changes", "folded"),
    [
        ({"width": 8, "stem_bias": True}, {"stem_bias": False}),
        ({"width": 32, "norm": "group", "epsilon": 1e-3}, {"epsilon": 1e-5}),
        ({"width": 8, "stem": "deep", "stem_width": 8}, {}),
        ({"width": 8, "shortcut": "average"}, {}),
    ],
)
def test_what_timm_lacks_is_folded_and_what_no_key_shows_is_stated(tmp_path, changes, folded):
    before = checkpoint_of(dataclasses.replace(TINY, preactivation=True, **changes))
    if "stem_bias" in changes:
        before.variables["params"]["conv1"]["bias"] = np.linspace(-1, 1, 8, dtype=np.float32)
    assert exporting.export(before, tmp_path / "net", to="timm").difference <= 1e-5
    assert load(tmp_path / "net").config == dataclasses.replace(before.config, **folded)
    # Our own header says what no key shows, too.
    pretrained.save(tmp_path / "net.safetensors", before)
    assert load(tmp_path / "net.safetensors").config == before.config


KERAS = ft.models.ResNetConfig(
    "bottleneck",
    (2, 2, 2, 2),
    width=4,
    stem_width=64,
    stride_in="1x1",
    classes=2,
    epsilon=1.001e-5,
)
KERAS_V2 = dataclasses.replace(
    KERAS,
    stride_in="3x3",
    preactivation=True,
    stem_pool="zero-padded",
    stride_at="last",
    stem_bias=True,
)


@pytest.mark.parametrize("config", [KERAS, KERAS_V2], ids=["first version", "second version"])
def test_a_keras_file_is_read_again_bit_for_bit(tmp_path, config):
    before = checkpoint_of(config)
    written = exporting.export(before, tmp_path / "net.h5")
    assert written.layout == "keras"
    assert written.difference == 0
    # The image is normalized as no preprocess_input does it.
    assert any("(pixels / 255 - mean) / std" in note for note in written.notes)
    again = load(tmp_path / "net.h5")
    assert (again.config, again.class_names) == (config, before.class_names)
    assert again.preprocessing == before.preprocessing
    own, back = flatten(before.variables), flatten(again.variables)
    assert own.keys() == back.keys()
    assert all(np.asarray(own[path]).tobytes() == back[path].tobytes() for path in own)


def test_what_keras_sets_is_absorbed_and_the_rest_refused_by_field(tmp_path):
    # Epsilon goes into variances, even below 1e-8, and a stem without a bias gets zeros.
    config = dataclasses.replace(KERAS_V2, epsilon=1e-5, stem_bias=False)
    before = checkpoint_of(config)
    variances = before.variables["batch_stats"]["layer1"]["0"]["bn2"]["var"]
    before.variables["batch_stats"]["layer1"]["0"]["bn2"]["var"] = variances * [0, 1e-9, 1, 1]
    assert exporting.export(before, tmp_path / "net.h5").difference <= 1e-6
    assert load(tmp_path / "net.h5").config == KERAS_V2
    for changes, text in (
        ({"stride_in": "3x3"}, r"stride_in must be '1x1', got '3x3'; use --to onnx"),
        ({"stem_width": None}, "stem_width must be 64, got None"),
        ({"width": 16}, "width must not be 16"),
        ({"groups": 2, "base_width": 32}, "base_width must be 64, got 32; groups must be 1, got 2"),
        ({"shortcut": "average"}, "shortcut must be 'convolution'"),
    ):
        other = checkpoint_of(dataclasses.replace(KERAS, **changes))
        with pytest.raises(ValueError, match=text):
            exporting.export(other, tmp_path / "other.h5")
    with pytest.raises(ValueError, match=r"must end in .h5 and not in .weights.h5"):
        exporting.export(before, tmp_path / "net.weights.h5")
    assert entries(tmp_path) == ["net.h5"]


def test_stablehlo_and_its_words(tiny, tmp_path):
    written = exporting.export(tiny, tmp_path / "net.stablehlo")
    assert written.difference <= 1e-5
    assert entries(tmp_path) == ["net.stablehlo", "net.stablehlo.json"]
    words = json.loads((tmp_path / "net.stablehlo.json").read_text())
    assert words["class_names"] == ["no", "yes"]
    assert words["preprocessing"] == tiny.preprocessing.to_json()


@pytest.mark.parametrize(
    ("changes", "layout", "text"),
    [
        ({"attention": "se"}, "huggingface", "transformers' ResNet does not support attention se"),
        ({"attention": "se"}, "torchvision", "torchvision has no seresnet10w4; use --to timm"),
        ({"width": 64}, "torchvision", "torchvision has no resnet10"),
        ({"adapter": ft.models.Adapter(2, "curves")}, "timm", "ONNX and StableHLO support curves"),
    ],
)
def test_what_another_program_has_not_is_refused_and_leaves_nothing(
    tmp_path, changes, layout, text
):
    target = tmp_path / ("net.safetensors" if layout == "torchvision" else "net")
    with pytest.raises(ValueError, match=text):
        exporting.export(checkpoint_of(dataclasses.replace(TINY, **changes)), target, to=layout)
    assert entries(tmp_path) == []


def write_for_timm(checkpoint, folder):
    """Writes what an export writes, which also compares logits and takes longer."""
    files, plain = hub.timm_files(checkpoint)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return plain.notes


def drawn(changes):
    """A checkpoint with leaves of 0.5, for what no number matters to."""
    config = dataclasses.replace(TINY, **changes)
    leaves = {path: np.full(s, 0.5, np.float32) for path, s in leaf_shapes(config).items()}
    variables = {"params": {}, "batch_stats": {}, **unflatten(leaves)}
    return Pretrained(variables, config, PREPROCESSING)


V1 = {"block": "bottleneck", "stride_in": "1x1"}
V2 = {"block": "bottleneck", "preactivation": True}


@pytest.mark.parametrize(
    ("changes", "lacking"),
    [
        ({}, ""),
        ({"preactivation": True, "width": 8}, ""),
        (V1, "stride_in='1x1'"),
        ({"width": 96}, "stem_width=96"),
        ({"width": 32, "stem_pool": "convolution"}, "stem_width=32"),
        ({"width": 64, "stem_width": 32}, "stem_width=32"),
        ({"width": 32, "norm": "group"}, "stem_width=32"),
        ({"stem_pool": "ceil"}, "stem_pool='ceil'"),
        ({"attention": "se", "se_ratio": 0.5}, "se_ratio=0.5"),
        ({"anti_alias": "blur", "attention": "se", "se_ratio": 0.25}, "se_ratio=0.25"),
        ({"width": 32, "stem_width": 64, "norm": "group", "standardized": 1e-5}, "standardized="),
        ({"depths": (1, 1)}, r"depths=\(1, 1\)"),
        ({"depths": ()}, r"depths=\(\)"),
        (V2, "stem_width=4, width=4"),
        ({**V2, "width": 16, "base_width": 30}, "base_width=30"),
        ({**V2, "width": 8, "stride_at": "last"}, "stride_at='last'"),
        ({"preactivation": True, "width": 8, "stem_bias": True, "depths": ()}, "stem_bias=True, d"),
        ({"preactivation": True, "width": 8, "stem_bias": True, "depths": (2,)}, "stem_bias=True"),
        ({**V2, "width": 32, "norm": "group", "standardized": 1e-5}, "standardized=1e-05"),
        ({**V2, "width": 32, "norm": "group", "depths": (1, 1)}, "depths="),
    ],
)
def test_what_timm_has_no_argument_for_is_built_by_a_file(tmp_path, changes, lacking):
    """tests/parity asks timm; here, config.json alone gives the same network and leaves."""
    before = drawn(changes)
    notes = write_for_timm(before, tmp_path / "net")
    name = timm.OWN[before.config.preactivation]
    told = [note for note in notes if f"run `import {name}`" in note]
    assert len(told) == bool(lacking)
    assert not lacking or re.search(f"timm has no arguments for {lacking}.*: run", told[0])
    code = [f"{name}.py"] if lacking else []
    assert entries(tmp_path / "net") == ["config.json", *code, "model.safetensors"]
    settings = json.loads((tmp_path / "net" / "config.json").read_text())
    assert (settings["architecture"] == name) == bool(lacking)
    again = load(tmp_path / "net")
    assert again.config == before.config
    own, back = flatten(before.variables), flatten(again.variables)
    assert own.keys() == back.keys()
    assert all(np.asarray(own[path]).tobytes() == back[path].tobytes() for path in own)
    assert not lacking or not any("assumed" in note for note in again.notes)


def test_an_earlier_export_with_such_a_file_is_replaced(tiny, tmp_path):
    before = checkpoint_of(dataclasses.replace(TINY, stem_pool="ceil"))
    assert exporting.export(before, tmp_path / "net", to="timm").difference <= 1e-6
    assert len(entries(tmp_path / "net")) == 3
    exporting.export(tiny, tmp_path / "net", to="timm")
    assert entries(tmp_path / "net") == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            None,
            "must state all fields of flaxtransfer_resnet, got none of block, depths, ",
        ),
        ({"width": None}, r"must describe a flaxtransfer_resnet: .*width must be an integer"),
        ({"depths": 3}, "must describe a flaxtransfer_resnet"),
        ({"depths": [10**12, 1, 1, 1]}, "model_args .* depths must be at most 512, got 10000"),
        ({"base_width": 10**12}, "model_args .* base_width must be at most 16,777,216, got 100"),
        ({"base_width": 10**400}, "it has a number of 401 digits"),
        ({"depths": [2, 1, 1, 1]}, r"does not fit .*missing: layer1\.1\.conv1\.weight"),
        ({"width": 8}, "does not fit"),
        ({"stem_pool": "softmax"}, "stem_pool must be 'max'"),
        ({"preactivation": True}, "preactivation must not be given, as it is not known here"),
        ({"act_layer": "silu"}, "act_layer must be 'relu', got 'silu'"),
        ({"global_pool": "max"}, "global_pool must be 'avg'"),
    ],
)
def test_what_a_file_of_ours_for_timm_says_is_honored_or_refused(tmp_path, arguments, text):
    """Nothing that the folder holds is run, so that the arguments are all that is known."""
    folder = tmp_path / "net"
    write_for_timm(drawn(V1), folder)
    (folder / "flaxtransfer_resnet.py").write_text("raise SystemExit('was run')")
    settings = json.loads((folder / "config.json").read_text())
    # As timm's own save_for_hf adds them.
    settings["model_args"] |= {"in_chans": 3, "num_classes": 2, "global_pool": "avg"}
    (folder / "config.json").write_text(json.dumps(settings))
    assert load(folder).config.stride_in == "1x1"
    if arguments is None:
        del settings["model_args"]
    else:
        settings["model_args"] |= arguments
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=text) as refused:
        load(folder)
    assert len(str(refused.value)) <= 600 + len(str(tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "to", "text"),
    [
        ("net", None, r"must end in .safetensors, .onnx, .stablehlo, .h5"),
        ("net.onx", "onix", "unknown layout 'onix'; did you mean 'onnx'"),
        ("nowhere/net.onnx", None, "the folder .*nowhere for net.onnx does not exist"),
        ("taken", "timm", r"holds other files \(mine.txt\); nothing was written"),
        ("file", "timm", "target must be a folder, got the file"),
        ("taken", "stablehlo", "target must be a file, got the folder"),
    ],
)
def test_targets_that_cannot_be_written(tiny, tmp_path, name, to, text):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        exporting.export(tiny, tmp_path / name, to=to)
    assert entries(tmp_path) == ["file", "taken"]
    assert (tmp_path / "taken" / "mine.txt").read_text() == "mine"


def test_what_computes_something_else_does_not_appear(tiny, tmp_path, monkeypatch):
    def other(data, images):
        del data
        return np.ones((len(images), 2), np.float32)

    monkeypatch.setattr(exporting, "stablehlo_logits", other)
    monkeypatch.setattr(exporting, "stablehlo_bytes", lambda checkpoint: b"other")
    with pytest.raises(ValueError, match="logits of the export must be within 5e-05"):
        exporting.export(tiny, tmp_path / "net.stablehlo")
    assert entries(tmp_path) == []


def test_a_disk_that_fills_leaves_the_earlier_export(tiny, tmp_path, monkeypatch):
    exporting.export(tiny, tmp_path / "net", to="timm")
    before = (tmp_path / "net" / "model.safetensors").read_bytes()

    def full(path, data):
        path.write_bytes(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write_file", full)
    with pytest.raises(OSError, match="No space left"):
        exporting.export(checkpoint_of(), tmp_path / "net", to="timm")
    assert entries(tmp_path) == ["net"]
    assert (tmp_path / "net" / "model.safetensors").read_bytes() == before


def test_a_folder_that_cannot_be_renamed_gives_the_earlier_one_back(tiny, tmp_path, monkeypatch):
    exporting.export(tiny, tmp_path / "net", to="timm")

    def fail(self, target):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        exporting.export(tiny, tmp_path / "net", to="timm")
    assert entries(tmp_path) == ["net"]
    assert entries(tmp_path / "net") == ["config.json", "model.safetensors"]


def test_half_precision_is_measured(tiny, tmp_path):
    written = exporting.export(tiny, tmp_path / "net.safetensors", dtype=np.float16)
    assert 1e-6 < written.difference < 1e-2


def test_another_epsilon_becomes_variance(tmp_path):
    odd = checkpoint_of(dataclasses.replace(TINY, epsilon=1e-3))
    written = exporting.export(odd, tmp_path / "net", to="huggingface")
    assert written.difference <= 1e-5
    again = load(tmp_path / "net")
    assert again.config.epsilon == 1e-5
    # 1, as in every fresh network, and what the epsilons differ by.
    np.testing.assert_allclose(again.variables["batch_stats"]["bn1"]["var"], 1 + 1e-3 - 1e-5)


def test_channels_that_only_seem_silent_stay():
    arrays = {
        "conv1.weight": np.zeros((64, 3, 7, 7), np.float32),
        "bn1.weight": np.zeros(64, np.float32),
        "bn1.bias": np.zeros(64, np.float32),
        "layer1.0.conv1.weight": np.zeros((64, 64, 1, 1), np.float32),
        "layer1.0.conv2.weight": np.zeros((64, 64, 3, 3), np.float32),
    }
    # As wide as its stages: these are the network's own.
    assert timm.narrowed(arrays) == (arrays, [])
    narrow = {
        **arrays,
        "layer1.0.conv2.weight": np.zeros((8, 8, 3, 3), np.float32),
        "layer1.0.conv1.weight": np.zeros((8, 64, 3, 3), np.float32),
    }
    assert timm.narrowed(narrow)[0]["conv1.weight"].shape == (8, 3, 7, 7)
    heard = {**narrow, "bn1.bias": np.eye(64, dtype=np.float32)[63]}
    assert timm.narrowed(heard)[0]["conv1.weight"].shape == (64, 3, 7, 7)


def test_what_timm_trained_comes_back_with_a_stem_of_its_width(tiny, tmp_path):
    """One forward pass there changes the statistics of the added channels."""
    exporting.export(tiny, tmp_path / "net", to="timm")
    arrays = load_file(tmp_path / "net" / "model.safetensors")
    arrays["bn1.running_var"] = arrays["bn1.running_var"] * np.float32(0.9)
    arrays["layer1.0.downsample.1.bias"] = np.full(4, 0.5, np.float32)
    save_file(arrays, tmp_path / "net" / "model.safetensors")
    back = load(tmp_path / "net")
    assert back.config == dataclasses.replace(TINY, stem_width=64)
    params = flatten(back.variables["params"])
    assert params["conv1/kernel"].tobytes() == (
        np.ascontiguousarray(arrays["conv1.weight"].transpose(2, 3, 1, 0)).tobytes()
    )
    assert params["layer1/0/downsample/1/bias"].tolist() == [0.5] * 4
    # It needs no silent channels now.
    written = exporting.export(back, tmp_path / "again", to="timm")
    assert not any("silent" in note for note in written.notes)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(again[key].tobytes() == arrays[key].tobytes() for key in arrays)


@pytest.mark.parametrize("stem", [1, 12, 64])
def test_stems_of_another_width_than_the_stages_come_back(tmp_path, stem):
    before = checkpoint_of(dataclasses.replace(TINY, stem_width=stem))
    for layout in ("timm", "huggingface"):
        exporting.export(before, tmp_path / layout, to=layout)
        again = load(tmp_path / layout)
        assert again.config == before.config
        own, back = flatten(before.variables), flatten(again.variables)
        assert all(np.asarray(own[path]).tobytes() == back[path].tobytes() for path in own)


def test_convert_takes_what_no_file_says(tmp_path, capsys):
    config = dataclasses.replace(TINY, block="bottleneck", stem_width=8)
    net, out = tmp_path / "net.safetensors", tmp_path / "out.safetensors"
    pretrained.save(net, checkpoint_of(config))
    arrays = load_file(net)
    save_file(arrays, net)  # without our header
    name = "resnet14w4s8_v1_ceilpool"
    said = ["--model", name, "--mean", "123/255", "117/255", "104/255", "--std", "1/255"]
    assert run(["convert", str(net), str(out), *said]) == 0
    assert name in capsys.readouterr().out
    assert load(out).config.name == name
    assert load(out).preprocessing.mean == (123 / 255, 117 / 255, 104 / 255)
    assert load(out).preprocessing.std == (1 / 255,) * 3
    assert run(["convert", str(net), str(out), "--mean", "1/0"]) == 2
    assert "--mean must be numbers such as 0.485 or 123/255" in capsys.readouterr().err
    assert run(["convert", str(net), str(out), "--std", "1", "1"]) == 2
    assert "--std must have 1 or 3 numbers" in capsys.readouterr().err
    assert run(["convert", str(net), str(out), "--model", "resnet14w4s8_v3"]) == 2
    assert "--model must be the name of a network" in capsys.readouterr().err


def test_convert_says_what_it_wrote(tmp_path, capsys):
    assert run(["convert", "builtin", str(tmp_path / "net"), "--to", "huggingface"]) == 0
    shown = capsys.readouterr().out
    assert "(huggingface): read again, logits within" in shown
    assert run(["convert", "builtin", str(tmp_path / "net.bin")]) == 2
    assert "target must end in" in capsys.readouterr().err


def test_bands_that_another_program_has_no_place_for_are_said(tmp_path):
    plain = checkpoint_of(dataclasses.replace(TINY, in_channels=2))
    radar = dataclasses.replace(plain, preprocessing=published.SENSORS["sentinel1_all"])
    written = exporting.export(radar, tmp_path / "net", to="timm")
    assert written.notes[-1].startswith(
        "timm cannot store the description of the bands: bands ['VV', 'VH']; black [-50.0, -50.0]"
    )


@pytest.mark.parametrize("depths", [(1, 1), (1, 1, 1)])
def test_a_network_that_ends_earlier_is_exported(tmp_path, depths):
    short = checkpoint_of(dataclasses.replace(TINY, depths=depths))
    for name in ("net.onnx", "net.stablehlo", "net.safetensors"):
        assert exporting.export(short, tmp_path / name).difference <= 1e-6
    for name in ("net.onnx", "net.safetensors"):
        assert load(tmp_path / name).config == short.config


def test_a_head_that_reads_several_depths_is_exported_where_files_can_say_so(tmp_path):
    several = checkpoint_of(TINY.ending_at(["stem", "layer2"]))
    for name in ("net.stablehlo", "net.safetensors"):
        assert exporting.export(several, tmp_path / name).difference <= 1e-6
    again = load(tmp_path / "net.safetensors")
    assert again.config == several.config
    # All four stages, too.
    whole = checkpoint_of(dataclasses.replace(TINY, head_reads=("layer1",)))
    assert exporting.export(whole, tmp_path / "whole.safetensors").difference == 0
    assert load(tmp_path / "whole.safetensors").config == whole.config
    there = entries(tmp_path)
    names = {"onnx": "other.onnx", "keras": "other.h5", "torchvision": "other.safetensors"}
    for layout in ("torchvision", "timm", "huggingface", "keras", "onnx"):
        with pytest.raises(ValueError, match=f"{layout} files are .*; use --to safetensors or st"):
            exporting.export(several, tmp_path / names.get(layout, "other"), to=layout)
    assert entries(tmp_path) == there


@pytest.mark.parametrize(
    ("name", "to", "text"),
    [
        ("net", "huggingface", "transformers' ResNet has 4 stages, and .* 2; use --to"),
        ("net.safetensors", "torchvision", "torchvision has no resnet-basic-1-1w4"),
    ],
)
def test_where_a_network_cannot_end_earlier_it_is_said(tmp_path, name, to, text):
    short = checkpoint_of(dataclasses.replace(TINY, depths=(1, 1)))
    with pytest.raises(ValueError, match=text):
        exporting.export(short, tmp_path / name, to=to)
    stem = checkpoint_of(dataclasses.replace(TINY, depths=()))
    with pytest.raises(ValueError, match="cannot hold a stem alone"):
        exporting.export(stem, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []
