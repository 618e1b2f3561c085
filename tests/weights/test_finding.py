"""The network in a file: under any name, in any container, with any head, or a clear refusal.

Each file is read as the same network stored plainly, bit for bit.
"""

from argparse import Namespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from flaxtransfer.classifier import transfer
from flaxtransfer.cli import run
from flaxtransfer.paths import flatten
from flaxtransfer.weights import load
from tests.support.terminal import only_line
from tests.support.torch_files import save_torch

RANDOM = np.random.default_rng(0)
COUNT = np.array(5, np.int64)


def under(prefix, arrays):
    return {prefix + key: array for key, array in arrays.items()}


def other(arrays):
    """Another network of the same shapes."""
    return {
        key: array * np.float32(0.5) if array.dtype == np.float32 else array
        for key, array in arrays.items()
    }


def inside(names, arrays):
    """The arrays with a wrapper's name after each of some modules."""
    short = {}
    for key, array in arrays.items():
        for module, name in names.items():
            key = key.replace(f"{module}.", f"{module}.{name}.", 1)
        short[key] = array
    return short


def renamed(old, new, arrays):
    return {
        new + key.removeprefix(old) if key.startswith(old) else key: array
        for key, array in arrays.items()
    }


NUMBERS = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}


def numbered(arrays):
    """As nn.Sequential(*network.children()) names layers; without a head."""
    parts = ((key.partition("."), array) for key, array in body(arrays).items())
    return {f"{NUMBERS[first]}.{rest}": array for (first, _, rest), array in parts}


def under_stages(prefix, arrays):
    """The stages counted from 0 under a prefix, and 0 and 1, the stem, with a dot before them."""
    return {
        f"{prefix}{int(key[0]) - 4}{key[1:]}" if key[0] in "4567" else f"{key[0]}.{key}": array
        for key, array in arrays.items()
    }


def body(arrays):
    return {key: array for key, array in arrays.items() if not key.startswith("fc.")}


def optimizer(arrays):
    """As torch saves one: numbered, with a moment per parameter."""
    state = {n: {"step": 3, "exp_avg": array} for n, array in enumerate(arrays.values())}
    return {"state": state, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}


def by_name(arrays):
    """Momenta by the names of parameters, without running statistics."""
    return {key: a for key, a in other(arrays).items() if "running" not in key}


FILES = {
    "training loop": lambda a: {"epoch": 3, "model_state_dict": a, "optimizer": optimizer(a)},
    "any name": lambda a: {"net_weights": a, "best_acc1": 71.5, "args": Namespace(lr=0.1)},
    "DeepSpeed": lambda a: {"module": a, "global_steps": 3},
    "Lightning": lambda a: {"state_dict": under("model.", a), "pytorch-lightning_version": "2.5"},
    "Lightning, deeper": lambda a: {"state_dict": under("model.net._orig_mod.", a)},
    "Lightning, with a loss": lambda a: {
        "state_dict": under("model.", a) | {"criterion.weight": np.ones(7, np.float32)}
    },
    "FSDP": lambda a: under("_fsdp_wrapped_module.", a),
    "FSDP, by layer": lambda a: under(
        "_fsdp_wrapped_module.",
        inside({"layer1": "_fsdp_wrapped_module", "layer2.0": "_checkpoint_wrapped_module"}, a),
    ),
    "compiled parts": lambda a: inside({"layer1.0": "_orig_mod", "layer3.0.conv1": "module"}, a),
    "a sequence with its head": lambda a: (
        numbered(a) | {"10.weight": a["fc.weight"], "10.bias": a["fc.bias"]}
    ),
    "a list": lambda a: {"nets": [a, {"temperature": COUNT}]},
    "a record": lambda a: {"state": Namespace(weights=a, epoch=3)},
    "average and plain": lambda a: {"model": other(a), "model_ema": a},
    "timm": lambda a: {"state_dict": other(a), "state_dict_ema": a},
    "ema_state_dict": lambda a: {"ema_state_dict": a, "model_state_dict": other(a)},
    "torchvision's reference": lambda a: {
        "model": other(a),
        "model_ema": {"n_averaged": COUNT, **under("module.", a)},
        "args": Namespace(epochs=3),
    },
    "Lightning's average": lambda a: {
        "state_dict": under("model.", other(a)) | under("ema_model.module.", a)
    },
    "twice the same": lambda a: {"state_dict": under("model.", a) | under("backbone.", a)},
    "momenta by name": lambda a: {"model": a, "momentum": by_name(a)},
    "Lightning's WeightAveraging": lambda a: {
        "state_dict": under("model.", a),
        "current_model_state": under("model.", other(a)),
        "averaging_state": {"n_averaged": COUNT},
    },
    "a counted wrapper of an average": lambda a: {
        **under("online_model.", other(a)),
        **under("ema_model.", a),
        "initted": np.array(True),
        "step": COUNT,
    },
    "a stem of its own": lambda a: renamed("bn1.", "layer0.1.", renamed("conv1.", "layer0.0.", a)),
    "two sequences": lambda a: (
        {
            "stem" + key[1:] if key[0] in "01" else key: array
            for key, array in under_stages("layers.", numbered(a)).items()
        }
        | {key: array for key, array in a.items() if key.startswith("fc.")}
    ),
    # Its hook exchanges the two before they are saved.
    "MMEngine's average": lambda a: {
        "meta": {"epoch": 3},
        "state_dict": renamed("backbone.fc.", "head.fc.", under("backbone.", a)),
        "ema_state_dict": {
            "steps": COUNT,
            **under("module.", renamed("backbone.fc.", "head.fc.", under("backbone.", other(a)))),
        },
    },
    "mmcv's average": lambda a: {
        "state_dict": renamed("backbone.fc.", "head.fc.", under("backbone.", a))
        | {f"ema_backbone_{key.replace('.', '_')}": array for key, array in other(a).items()}
    },
    "a copy that follows": lambda a: {
        "state_dict": under("backbone.", body(a))
        | under("momentum_backbone.", other(body(a)))
        | {"projector.0.weight": matrix(8, 32), "momentum_projector.0.weight": matrix(8, 32)}
        | {f"classifier.{name}": a[f"fc.{name}"] for name in ("weight", "bias")}
    },
    "a copy that follows, named after it": lambda a: (
        under("net_momentum.", other(a)) | under("net.", a)
    ),
    "counted average": lambda a: {"n_averaged": COUNT, **under("module.", a)},
    "a plain network beside others": lambda a: {**a, "optimizer": optimizer(a), "epoch": 3},
}


def same(ours, theirs):
    ours, theirs = flatten(ours.variables), flatten(theirs.variables)
    return ours.keys() == theirs.keys() and all(
        np.array_equal(ours[path], theirs[path]) for path in ours
    )


@pytest.fixture
def plain(basic, write):
    return load(write(basic, "plain.safetensors"))


@pytest.mark.parametrize("case", FILES)
def test_a_network_is_found_whatever_is_around_it(basic, plain, tmp_path, case):
    assert same(load(save_torch(FILES[case](basic), tmp_path / "w.pth")), plain)


@pytest.mark.parametrize(
    ("case", "note"),
    [
        ("training loop", "the weights are those under 'model_state_dict'"),
        ("Lightning, deeper", "the network is under 'model.net.'"),
        ("Lightning, deeper", "'_orig_mod.' was removed from the keys"),
        ("average and plain", "the file holds several networks; not those under 'model'"),
        ("training loop", "beside the network, left out: optimizer"),
    ],
)
def test_it_is_said_how_it_was_found(basic, tmp_path, case, note):
    assert note in load(save_torch(FILES[case](basic), tmp_path / "w.pth")).notes


SEVERAL = {
    "distillation": (
        lambda a: {"teacher": other(a), "student": a},
        ["teacher", "student"],
        "student",
    ),
    "two backbones": (
        lambda a: {"state_dict": under("left.", other(body(a))) | under("right.", a)},
        ["state_dict/left", "state_dict/right"],
        "state_dict.right",
    ),
    "an average without statistics": (
        lambda a: {"model": a, "model_ema": by_name(a)},
        ["model", "model_ema"],
        "model",
    ),
    "two averages": (
        lambda a: {"ema": other(a), "swa": a, "model": other(a)},
        ["ema", "swa", "model"],
        "swa",
    ),
    "a copy of another network": (
        lambda a: {"momentum_left": other(a), "right": a},
        ["momentum_left", "right"],
        "right",
    ),
    "one at the top": (lambda a: {**a, "last": other(a)}, [".", "last"], "."),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_of_several_networks_one_is_named(basic, plain, tmp_path, case):
    content, places, key = SEVERAL[case]
    path = save_torch(content(basic), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"`key` \(--weights-key\) must name one of") as caught:
        load(path)
    text = str(caught.value)
    assert [place for place in places if repr(place) not in text] == []
    assert len(text.splitlines()) == 1
    assert len(text.removeprefix(str(path))) < 600
    assert same(load(path, key=key), plain)
    with pytest.raises(
        ValueError, match=rf"`key` .* must be a place .*got '{places[-1]}x'; did you"
    ):
        load(path, key=f"{places[-1]}x")


def test_the_command_line_names_one(basic, plain, tmp_path, capsys):
    path = save_torch({"teacher": other(basic), "student": basic}, tmp_path / "w.pth")
    target = tmp_path / "out.safetensors"
    assert run(["convert", str(path), str(target)]) == 2
    assert "'teacher', 'student'" in only_line(capsys)
    assert run(["convert", str(path), str(target), "--weights-key", "student"]) == 0
    assert same(load(target), plain)


def test_the_plain_network_beside_an_average(basic, plain, tmp_path):
    content = {"model": basic, "model_ema": {"n_averaged": COUNT, **under("module.", other(basic))}}
    assert same(load(save_torch(content, tmp_path / "w.pth"), key="model"), plain)


def test_an_encoder_that_is_stored_twice_is_that_of_self_supervised_training(basic, tmp_path):
    """BYOL of lucidrains: the network itself, the online encoder that it is in, and its target."""
    networks = under("net.", basic) | under("online_encoder.net.", basic)
    networks |= under("target_encoder.net.", other(basic))
    found = load(save_torch(networks, tmp_path / "w.pth"))
    kernel = np.transpose(basic["conv1.weight"], (2, 3, 1, 0))
    assert np.array_equal(found.variables["params"]["conv1"]["kernel"], kernel)
    assert "self-supervised" in found.no_head


def test_the_teacher_of_self_supervised_training_is_an_average(basic, tmp_path):
    teacher = under("backbone.", body(basic)) | {"head.mlp.0.weight": np.ones((8, 32), np.float32)}
    student = under("module.", other(teacher))
    path = save_torch({"student": student, "teacher": teacher}, tmp_path / "w.pth")
    kernel = np.transpose(basic["conv1.weight"], (2, 3, 1, 0))
    assert np.array_equal(load(path).variables["params"]["conv1"]["kernel"], kernel)
    assert np.array_equal(
        load(path, key="student").variables["params"]["conv1"]["kernel"], kernel * np.float32(0.5)
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("layer1.0.conv1.weight", "layer1.0.conv1.parametrizations.weight.original0"),
        ("layer2.0.conv1.weight", "layer2.0.conv1.base_layer.weight"),
        ("layer2.0.conv1.weight", "layer2.0.conv1.lora_A.default.weight"),
        ("layer2.0.conv1.weight", "layer2.0.conv1.parametrizations.weight.original1"),
        ("layer2.0.conv1.weight", "layer2.0.conv1.weight_orig"),
        ("bn1.weight", "conv1.weight_fake_quant.scale"),
    ],
)
def test_layers_that_are_not_plain_are_refused_by_name(basic, write, old, new):
    with pytest.raises(ValueError, match=r"layers must be plain, got '.*which a parametrization"):
        load(write(renamed(old, new, basic)))


def test_there_is_an_end_to_networks(write):
    arrays = {f"n{n}.layer1.0.conv1.weight": np.zeros(1, np.float32) for n in range(101)}
    with pytest.raises(ValueError, match="must hold at most 100 networks, got 101"):
        load(write(arrays))


def test_keys_that_merge_are_refused(basic, write):
    arrays = basic | {"module.layer1.0.conv1.weight": basic["layer1.0.conv1.weight"]}
    with pytest.raises(ValueError, match=r"places: '\.', 'module'|two keys become"):
        load(write(arrays | {"layer1.module.0.conv1.weight": basic["conv1.weight"]}))


NAMES = tuple("abcdefg")
NAMED = {
    "meta/CLASSES": {"meta": {"CLASSES": NAMES, "epoch": 3}},
    "meta/dataset_meta/classes": {"meta": {"dataset_meta": {"classes": list(NAMES)}}},
    "class_names": {"class_names": list(NAMES)},
    "class_to_idx": {"class_to_idx": {name: n for n, name in reversed(list(enumerate(NAMES)))}},
    "idx_to_class": {"idx_to_class": dict(enumerate(NAMES))},
    "hyper_parameters/id2label": {
        "hyper_parameters": {"id2label": {str(n): name for n, name in enumerate(NAMES)}}
    },
    "args/labels": {"args": Namespace(labels=list(NAMES), classes=7)},
    "vocab": {"vocab": list(NAMES), "classes": NAMES[:3]},
}


@pytest.mark.parametrize("place", NAMED)
def test_class_names_come_along(basic, tmp_path, place):
    found = load(save_torch({"model": basic, **NAMED[place]}, tmp_path / "w.pth"))
    assert found.class_names == NAMES
    assert f"class names: those under {place!r}" in found.notes


def test_class_names_that_do_not_fit_are_left(basic, tmp_path):
    for more, note in (
        ({"classes": NAMES[:5]}, "not those under 'classes', which are 5 for 7 outputs"),
        (
            {"classes": NAMES, "vocab": NAMES[::-1]},
            "those under 'classes', 'vocab' differ, and none are taken",
        ),
    ):
        found = load(save_torch({"model": basic, **more}, tmp_path / "w.pth"))
        assert found.class_names is None
        assert f"class names: {note}" in found.notes
    headless = load(save_torch({"model": body(basic), "classes": NAMES}, tmp_path / "w.pth"))
    assert headless.class_names is None


def test_class_names_in_a_header(basic, write):
    path = write(basic, metadata={"format": "pt", "classes": '["a", "b", "c", "d", "e", "f", "g"]'})
    assert load(path).class_names == NAMES


def test_parts_of_deepspeed_are_said_to_be_parts(basic, tmp_path):
    empty = {key: np.zeros(0, np.float32) for key in basic}
    with pytest.raises(ValueError, match=r"arrays are empty.*DeepSpeed.*zero_to_fp32\.py"):
        load(save_torch({"module": empty}, tmp_path / "w.pt"))


@pytest.mark.parametrize("change", [lambda k: k, lambda k: k.removeprefix("resnet.")])
@pytest.mark.parametrize("prefix", ["", "model.", "state_dict/net._orig_mod."])
def test_hugging_faces_names(golden, tmp_path, change, prefix):
    plain = load(golden / "huggingface_basic")
    arrays = load_file(golden / "huggingface_basic" / "model.safetensors")
    arrays = under(prefix, {change(key): array for key, array in arrays.items()})
    found = load(save_torch(arrays, tmp_path / "w.pth"))
    assert same(found, plain)


def matrix(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


KEPT = {
    "behind dropout": lambda a: renamed("fc.", "fc.1.", a),
    "classifier": lambda a: renamed("fc.", "classifier.", a),
    "head.fc": lambda a: renamed("fc.", "head.fc.", a),
    "any name": lambda a: renamed("fc.", "to_species.", a),
    "beside a backbone": lambda a: (
        under("backbone.", body(a))
        | renamed("fc.", "classifier.", {k: x for k, x in a.items() if k.startswith("fc.")})
    ),
    "beside a backbone, deeper": lambda a: (
        under("net.backbone._orig_mod.", body(a))
        | renamed("fc.", "net.head.fc.", {k: x for k, x in a.items() if k.startswith("fc.")})
    ),
    "of the backbone itself": lambda a: under("backbone.", a),
    "with a loss and a metric": lambda a: (
        a | {"criterion.weight": matrix(7), "val_metrics.confmat": matrix(7, 7), "mean": matrix(3)}
    ),
    "with a projector": lambda a: a | {"projector.0.weight": matrix(8, 32)},
}


@pytest.mark.parametrize("case", KEPT)
def test_a_head_that_is_one_linear_map_is_kept(basic, plain, write, case):
    found = load(write(KEPT[case](basic)))
    assert same(found, plain)
    assert found.no_head == ""
    kept = transfer(found, classes=7, head="keep")
    kernel = np.asarray(kept.params["fc"]["kernel"])
    np.testing.assert_array_equal(kernel, plain.variables["params"]["fc"]["kernel"])


def test_a_head_without_a_bias_has_zeros(basic, plain, write):
    found = load(write({key: a for key, a in basic.items() if key != "fc.bias"}))
    fc = found.variables["params"]["fc"]
    np.testing.assert_array_equal(fc["kernel"], plain.variables["params"]["fc"]["kernel"])
    assert fc["bias"].tolist() == [0] * 7
    assert "the head has no bias: zeros replace it" in found.notes


LEFT = {
    "two layers": (
        lambda: {"fc.0.weight": matrix(8, 32), "fc.0.bias": matrix(8), "fc.3.weight": matrix(7, 8)},
        "the head fc is not one linear map: it has the layers fc.0, fc.3",
    ),
    "two modules": (
        lambda: {"fc1.weight": matrix(8, 32), "fc2.weight": matrix(7, 8)},
        "the head is not one linear map, but has the parts fc1, fc2",
    ),
    "a norm and a layer": (
        lambda: {"head.0.weight": matrix(32), "head.1.weight": matrix(7, 32)},
        "the head head is not one linear map: it has the layers head.0, head.1",
    ),
    "other features": (
        lambda: {"fc.weight": matrix(7, 31), "fc.bias": matrix(7)},
        "the head fc is not one linear map: fc.weight must be [classes, 32], got [7, 31]",
    ),
    "a bias alone": (
        lambda: {"fc.bias": matrix(7)},
        "the head fc is not one linear map: it has fc.bias",
    ),
    "parametrized": (
        lambda: {f"fc.parametrizations.weight.original{n}": matrix(7, n or 32) for n in (0, 1)},
        "the head fc is not one linear map: it has fc.parametrizations.weight.original0, "
        "fc.parametrizations.weight.original1",
    ),
    "quantized": (
        lambda: {"fc.scale": matrix(1), "fc.zero_point": matrix(1)},
        "the head fc is not one linear map: it has fc.scale, fc.zero_point",
    ),
    "weight-normalized": (
        lambda: {"fc.weight_u": matrix(7), "fc.weight": matrix(7, 32)},
        "the head fc is not one linear map: it has fc.weight_u",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_no_other_head_stops_a_load(basic, plain, write, case):
    make, why = LEFT[case]
    found = load(write(body(basic) | make()))
    assert found.no_head == why
    assert f"{why}: one output that is always 0 replaces it" in found.notes
    ours, theirs = flatten(found.variables), flatten(plain.variables)
    assert all(np.array_equal(ours[p], theirs[p]) for p in theirs if "/fc/" not in p)
    assert transfer(found, classes=3).model.config.classes == 3
    with pytest.raises(ValueError, match=r"head must be 'new' for .*, got 'keep': the head"):
        transfer(found, classes=7, head="keep")


def test_a_classifier_beside_a_decoder_is_kept(basic, write):
    other = {"decoder.weight": matrix(1, 32, 1, 1), "aux_head.weight": matrix(2, 32)}
    arrays = under("encoder.", body(basic)) | {"classifier.weight": matrix(7, 32)} | other
    found = load(write(arrays))
    assert found.no_head == ""
    assert found.config.classes == 7
    assert any("left out: aux_head, decoder" in note for note in found.notes)
    # In the network itself, a decoder is left out too.
    assert load(write(body(basic) | other)).no_head == "the file has no head"


@pytest.mark.parametrize(
    ("beside", "why"),
    [
        ({"neck.weight": matrix(32), "classifier.weight": matrix(7, 32)}, "classifier, neck"),
        (
            {"backbone.fc.weight": matrix(9, 32), "classifier.weight": matrix(7, 9)},
            "classifier, fc",
        ),
        ({"classifier.0.weight": matrix(8, 32, 3, 3)}, "must be [classes, 32]"),
        ({"projector.weight": matrix(8, 32)}, "the file has no head"),
        ({"decoder.weight": matrix(1, 32, 1, 1)}, "the file has no head"),
        ({"decoder.0.weight": matrix(8, 32)}, "the file has no head"),
        ({"segmentation_head.0.weight": matrix(3, 32, 1, 1)}, "the file has no head"),
        ({"decode_head.conv_seg.weight": matrix(3, 32, 1, 1)}, "the file has no head"),
        ({"final.weight": matrix(3, 32, 1, 1)}, "no head, and final is called like no classifier"),
        ({"fpn.weight": matrix(8, 32, 1, 1)}, "no head, and fpn is called like no classifier"),
        ({"embedding.weight": matrix(8, 32)}, "no head, and embedding is called like no"),
    ],
)
def test_layers_beside_a_backbone_that_are_no_head(basic, write, beside, why):
    found = load(write(under("backbone.", body(basic)) | beside))
    assert why in found.no_head


@pytest.mark.parametrize(
    "arrays",
    [
        numbered,
        lambda a: under("state_dict.encoder.", numbered(a)),
        # fastai's: a body and a head of several layers.
        lambda a: (
            under("0.", numbered(a))
            | {"1.2.weight": matrix(64), "1.4.weight": matrix(8, 64), "1.8.weight": matrix(7, 8)}
        ),
    ],
)
def test_numbered_layers_are_named_by_their_order(basic, plain, write, arrays):
    found = load(write(arrays(basic)))
    ours, theirs = flatten(found.variables), flatten(plain.variables)
    assert all(np.array_equal(ours[p], theirs[p]) for p in theirs if "/fc/" not in p)
    assert found.no_head
    said = "numbers: 0 as conv1, 1 as bn1, 4 as layer1, 5 as layer2, 6 as layer3, 7 as layer4"
    assert any(said in note for note in found.notes)


def test_a_sequence_that_lacks_a_layer_is_refused(basic, write):
    arrays = {key: a for key, a in numbered(basic).items() if not key.startswith("1.")}
    with pytest.raises(ValueError, match=r"missing: bn1\.weight"):
        load(write(arrays))


def test_layers_that_are_no_head_are_refused(basic, write):
    with pytest.raises(ValueError, match=r"unexpected: layer5\.0\.conv1\.weight"):
        load(write(basic | {"layer5.0.conv1.weight": matrix(4, 4, 3, 3)}))
