"""What is tolerated in a file, and said; and every way in which a file is refused."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from flaxtransfer.architectures import ResNetConfig
from flaxtransfer.catalogue import RESNETS
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.weights import (
    IMAGENET,
    Checkpoint,
    load,
    safetensors_file,
    save,
    timm,
    torch_file,
)
from flaxtransfer.weights.architecture import leaf_shapes
from flaxtransfer.weights.companions import companions
from flaxtransfer.weights.rename import to_keys
from flaxtransfer.weights.tensors import Tensors, strip


def same(a, b):
    a, b = flatten(a), flatten(b)
    return list(a) == list(b) and all(np.array_equal(a[path], b[path]) for path in a)


def test_the_result_is_complete_float32_and_of_this_file(golden):
    path = golden / "torchvision_basic" / "model.safetensors"
    checkpoint = load(str(path))
    assert {leaf.dtype for leaf in flatten(checkpoint.variables).values()} == {np.dtype("f4")}
    assert set(checkpoint.variables) == {"params", "batch_stats"}
    assert len(checkpoint.sha256) == 64
    assert checkpoint.source == str(path)


@pytest.mark.parametrize(
    ("prefixes", "notes"),
    [
        (("module.",), {"the prefix 'module.' was removed from the keys"}),
        (("_orig_mod.",), {"the prefix '_orig_mod.' was removed from the keys"}),
        (("module.", "_orig_mod."), {"the prefix 'module.' was removed from the keys",
                                     "the prefix '_orig_mod.' was removed from the keys"}),
    ],
)  # fmt: skip
def test_prefixes_are_removed_and_said(basic, write, prefixes, notes):
    plain = load(write(basic, "plain.safetensors"))
    wrapped = load(write({"".join(prefixes) + key: basic[key] for key in basic}))
    assert same(wrapped.variables, plain.variables)
    assert notes <= set(wrapped.notes)


def test_prefixes_that_merge_keys_are_refused():
    with pytest.raises(ValueError, match=r"two keys name 'fc.bias' once"):
        strip({"module.fc.bias": 0, "fc.bias": 1})


def test_only_the_start_of_a_key_is_a_prefix(basic, write):
    basic["layer1.0.module.conv1.weight"] = basic.pop("layer1.0.conv1.weight")
    with pytest.raises(ValueError, match=r"unexpected: layer1\.0\.module\.conv1\.weight"):
        load(write(basic))


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_other_precisions_become_float32_and_that_is_said(basic, tmp_path, kind):
    dtype = jnp.bfloat16 if kind == "bfloat16" else kind
    stored = {
        key: array.astype(dtype) if array.dtype == np.float32 else array
        for key, array in basic.items()
    }
    path = tmp_path / "other.safetensors"
    path.write_bytes(safetensors_file.write(stored, {}))
    checkpoint = load(path)
    leaves = flatten(checkpoint.variables)
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype("f4")}
    bias = np.asarray(stored["fc.bias"], np.float32)
    np.testing.assert_array_equal(leaves["params/fc/bias"], bias)
    assert f"{len(leaves)} leaves were {kind} and are float32 now" in checkpoint.notes


@pytest.mark.parametrize("form", ["torchvision", "huggingface"])
def test_the_format_may_be_said(golden, form):
    assert load(golden / f"{form}_basic", format=form).format == form


@pytest.mark.parametrize("model", [None, "resnet-basic-1-2-1-1w4", ResNetConfig(
    "basic", (1, 2, 1, 1), 4, classes=999, in_channels=9)])  # fmt: skip
def test_the_model_may_be_said_without_classes_and_channels(golden, model):
    assert load(golden / "torchvision_basic", model=model).config.classes == 7


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("resnet50", ["holds resnet-basic-1-2-1-1w4", "basic blocks (1, 2, 1, 1), width 4",
                      "not resnet50"]),
        (RESNETS["resnet18"], ["holds resnet-basic-1-2-1-1w4", "not resnet18 (basic blocks",
                               "width 64"]),
        ("resnet51", ["no model 'resnet51'", "did you mean", "'resnet50'", "resnet152"]),
    ],
)  # fmt: skip
def test_another_model_than_the_file_is_refused(golden, model, parts):
    with pytest.raises(ValueError, match="resnet") as caught:
        load(golden / "torchvision_basic", model=model)
    assert [part for part in parts if part not in str(caught.value)] == []


# --- keys and numbers --------------------------------------------------------------------------


def without_block(arrays):
    return {key: array for key, array in arrays.items() if not key.startswith("layer1.0.conv2")}


def with_nan(arrays):
    arrays["layer2.0.conv1.weight"][0, 0, 0, 0] = np.nan
    arrays["fc.bias"][:2] = np.inf
    return arrays


def negative_variance(arrays):
    arrays["bn1.running_var"][1] = -1e-3
    return arrays


def too_large(arrays):
    return arrays | {"fc.bias": np.full(7, 1e300)}


def integers(arrays):
    return arrays | {"fc.bias": np.zeros(7, np.int32)}


def deep_stem(arrays):
    arrays["conv1.0.weight"] = arrays.pop("conv1.weight")
    return arrays


def attention(arrays):
    return arrays | {"layer1.0.se.fc1.weight": np.zeros((1, 4, 1, 1), np.float32)}


def half_a_head(arrays):
    return {key: array for key, array in arrays.items() if key != "fc.bias"}


def headless(arrays):
    return {key: array for key, array in arrays.items() if not key.startswith("fc.")}


def other_network(arrays):
    del arrays
    return {"features.0.weight": np.zeros(3, np.float32), "conv1.weight": np.zeros(3, np.float32)}


def pre_activation(arrays):
    del arrays
    return {"stages.0.blocks.0.conv1.weight": np.zeros(3, np.float32)}


DAMAGES = {
    without_block: ["does not fit resnet-basic-1-2-1-1w4 under torchvision's names",
                    "1 missing, 0 unexpected", "missing: layer1.0.conv2.weight [4, 4, 3, 3]"],
    with_nan: ["NaN or infinite (as float32) in 2 leaves", "params/layer2/0/conv1/kernel: 1 of 288",
               "params/fc/bias: 2 of 7"],
    negative_variance: ["running variances below 0: batch_stats/bn1/var"],
    too_large: ["NaN or infinite (as float32) in 1 leaves", "params/fc/bias: 7 of 7"],
    integers: ["no floating-point numbers", "params/fc/bias", "int32"],
    deep_stem: ["under timm's names", "missing: conv1.3.weight", "missing: conv1.6.weight"],
    attention: ["under timm's names", "missing: layer1.0.se.fc2.weight"],
    half_a_head: ["1 missing", "missing: fc.bias"],
    other_network: ["holds no ResNet under the names of torchvision or timm or timm-v2",
                    "features.0.weight"],
    pre_activation: ["under timm-v2's names", "missing: norm.weight"],
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_does_not_fit_is_refused_by_name(basic, write, damage):
    path = write(damage(basic))
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load(path)
    assert [part for part in DAMAGES[damage] if part not in str(caught.value)] == []


def test_a_file_without_a_head_gets_one_that_says_nothing(basic, write):
    checkpoint = load(write(headless(basic)))
    leaves = flatten(checkpoint.variables)
    assert leaves["params/fc/kernel"].shape == (32, 1)
    assert not leaves["params/fc/kernel"].any()
    assert (
        "the file has no head: one output that is always 0 stands in its place" in checkpoint.notes
    )


@pytest.mark.parametrize(
    ("prefix", "others", "said"),
    [
        ("module.encoder_q.", ["module.encoder_k.conv1.weight", "module.queue"],
         "under 'encoder_q.'; left out: encoder_k, queue, encoder_q.fc"),
        ("module.base_encoder.", ["module.predictor.0.weight"],
         "under 'base_encoder.'; left out: predictor"),
        ("backbone.", ["projector.0.weight"],
         "under 'backbone.'; left out: projector, backbone.fc"),
        ("encoder.", [], "under 'encoder.'; left out: encoder.fc"),
    ],
)  # fmt: skip
def test_the_encoder_of_self_supervised_training(basic, write, prefix, others, said):
    arrays = {prefix + key: array for key, array in headless(basic).items()}
    arrays |= {name: np.zeros(2, np.float32) for name in [*others, f"{prefix}fc.0.weight"]}
    checkpoint = load(write(arrays))
    assert any(said in note for note in checkpoint.notes)
    expected = np.transpose(basic["conv1.weight"], (2, 3, 1, 0))
    np.testing.assert_array_equal(checkpoint.variables["params"]["conv1"]["kernel"], expected)


def test_torchxrayvisions_file_knows_its_findings(tmp_path):
    path = tmp_path / "pc-nih-rsna-siim-vin-resnet50-test512-e400-state.pt"
    config = ResNetConfig("bottleneck", (3, 4, 6, 3), classes=18, in_channels=1)
    found = companions(Tensors(path, {}, {}, "", ()), config, "torchvision")
    (mean,), (std,) = found.preprocessing.mean, found.preprocessing.std
    # The darkest and the brightest pixel become -1024 and 1024.
    assert [(pixel - mean) / std for pixel in (0, 1)] == [-1024, 1024]
    assert found.class_names[3] == "Pneumothorax"
    assert "with a sigmoid" in found.notes[0]


def test_a_format_that_does_not_fit_names_the_one_that_does(golden):
    with pytest.raises(ValueError, match="names of huggingface; format='torchvision' fits better"):
        load(golden / "torchvision_basic", format="huggingface")
    with pytest.raises(
        ValueError, match="no format 'caffe'; there are: torchvision, timm, timm-v2"
    ):
        load(golden / "torchvision_basic", format="caffe")


# --- files -------------------------------------------------------------------------------------


def file_of(data, name="weights.safetensors"):
    def make(folder, whole):
        (folder / name).write_bytes(data(whole) if callable(data) else data)
        return folder / name

    return make


FILES = {
    "empty": (file_of(b""), ["the file is empty"]),
    "empty torch file": (file_of(b"", "w.pth"), ["the file is empty"]),
    "half": (file_of(lambda whole: whole[: len(whole) // 2]),
             ["no complete safetensors file", "by its header it has"]),
    "one byte short": (file_of(lambda whole: whole[:-1]), ["no complete safetensors file"]),
    "one byte long": (file_of(lambda whole: whole + b"\0"), ["no complete safetensors file"]),
    "header cut": (file_of(lambda whole: whole[:100]),
                   ["no complete safetensors file", "its header should end at byte"]),
    "header damaged": (file_of(lambda whole: whole[:8] + b"]" + whole[9:]),
                       ["no complete safetensors file", "not the JSON"]),
    "a few letters": (file_of(b"weights"), ["no complete safetensors file"]),
    "no arrays": (file_of(safetensors_file.write({}, {})), ["holds no arrays"]),
    "pointer": (file_of(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
                ["Git LFS pointer", "git lfs pull"]),
    "web page": (file_of(b"<!DOCTYPE html><html>"), ["a web page"]),
    "half an archive": (file_of(b"PK\x03\x04 and more"), ["no complete zip archive"]),
    "text": (file_of(b"hello, this is text", "w.bin"), ["are those of no container of weights"]),
    "another kind": (file_of(b"...", "w.onnx"), ["b'...', are those of no", "(.safetensors)"]),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_damaged_or_foreign_file_is_refused(golden, tmp_path, case):
    make, parts = FILES[case]
    path = make(tmp_path, (golden / "torchvision_basic" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load(path)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_a_missing_file_names_the_nearest(basic, write):
    folder = write(basic, "resnet18_best.safetensors").parent
    with pytest.raises(FileNotFoundError, match=r"did you mean 'resnet18_best\.safe"):
        load(folder / "resnet18_bets.safetensors")
    with pytest.raises(FileNotFoundError, match=r"checkpoints there: resnet18_best\.safetensors"):
        load(folder / "zzz.pth")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load(folder / "no" / "zzz.pth")


def test_a_folder_must_hold_one_checkpoint(basic, write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"with 0 checkpoints in it.*no .safetensors"):
        load(tmp_path)
    write(basic, "first.safetensors")
    assert load(tmp_path).config.width == 4
    write(basic, "second.safetensors")
    with pytest.raises(FileNotFoundError, match=r"first\.safetensors, second\.safetensors"):
        load(tmp_path)
    write(basic, "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert load(tmp_path).config.width == 4


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("s3://bucket/resnet18.pth", "no such kind of address; there are hf://"),
        ("", "the source is empty"),
    ],
)
def test_a_source_that_is_no_path(source, text):
    with pytest.raises(ValueError, match=text):
        load(source)


@pytest.mark.parametrize(
    ("content", "weights", "note"),
    [
        ({"state_dict": {"a": 1}, "epoch": 3}, {"a": 1}, "'state_dict'"),
        ({"model": {"a": 1}}, {"a": 1}, "'model'"),
        ({"model": {"state_dict": {"a": 1}}}, {"a": 1}, "'state_dict'"),
        ({"state_dict": {"a": 1}, "state_dict_ema": {"a": 2}}, {"a": 2},
         "'state_dict_ema' (not those under 'state_dict')"),
        ({"model": {"a": 1}, "model_ema": {"a": 2}}, {"a": 2}, "(not those under 'model')"),
        ({"model": 5, "a": 1}, {"model": 5, "a": 1}, ""),
    ],
)  # fmt: skip
def test_wrappers_of_training_scripts(content, weights, note):
    found, notes = torch_file.unwrap(content)
    assert found == weights
    assert note in " ".join(notes)


def test_a_file_that_is_no_mapping_is_refused():
    with pytest.raises(ValueError, match="holds a list and no tensors by name"):
        torch_file.unwrap([1, 2])


# --- what lies beside ----------------------------------------------------------------------------


def beside(golden, tmp_path, name, change):
    folder = tmp_path / "copy"
    shutil.copytree(golden / name, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"downsample_in_first_stage": True}, "downsample_in_first_stage is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and only 'relu'"),
        ({"id2label": {"0": "a", "1": "b"}}, "names 2 classes and the head .* has 3"),
        ({"id2label": {"0": "a", "2": "b", "3": "c"}}, r"skips numbers: it has \[0, 2, 3\]"),
        ({"id2label": {"a": "a"}}, "keys that are no numbers"),
    ],
)
def test_a_hugging_face_config_that_contradicts_the_weights(golden, tmp_path, change, text):
    folder = beside(
        golden, tmp_path, "huggingface_bottleneck", lambda config: config.update(change)
    )
    with pytest.raises(ValueError, match=text):
        load(folder)


def test_generic_labels_are_no_names(golden, tmp_path):
    labels = {"id2label": {str(n): f"LABEL_{n}" for n in range(3)}}
    folder = beside(golden, tmp_path, "huggingface_basic", lambda config: config.update(labels))
    assert load(folder).class_names is None


def test_timm_label_names(golden, tmp_path):
    names = [f"class {n}" for n in range(8)]
    folder = beside(golden, tmp_path, "timm", lambda config: config.update(label_names=names))
    assert load(folder).class_names == tuple(names)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"label_names": names[1:]}))
    with pytest.raises(ValueError, match=r"config\.json names 7 classes .* has 8"):
        load(folder)


def test_a_broken_json_beside_the_weights_is_named(basic, write):
    path = write(basic)
    (path.parent / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json, beside the weights, is no JSON"):
        load(path)


def test_somebody_elses_config_json_is_left_alone(basic, write):
    path = write(basic)
    (path.parent / "config.json").write_text('{"learning_rate": 0.1}')
    assert load(path).notes == ("preprocessing: none is recorded, ImageNet's is assumed",)


class TestWhatNoLeafShows:
    """Anti-aliasing and the place of the stride: from `model`, timm's config.json or our header."""

    @pytest.fixture
    def aliased(self):
        config = ResNetConfig("basic", (2, 2, 2, 2), width=4, classes=3, anti_alias="blur")
        ones = {path: np.ones(shape, np.float32) for path, shape in leaf_shapes(config).items()}
        return Checkpoint(unflatten(ones), config, IMAGENET)

    @pytest.fixture
    def foreign(self, aliased, write):
        """The same weights as a file that says nothing of itself."""
        leaves = flatten(aliased.variables)
        return write(to_keys(timm.table_for(aliased.config), leaves))

    def test_is_asked_for_by_name(self, foreign):
        assert load(foreign).config.anti_alias is None
        assert load(foreign, model="resnetblur18w4").config.anti_alias == "blur"

    @pytest.mark.parametrize(
        ("architecture", "arguments", "expected"),
        [
            ("resnetblur18", {"channels": [4, 8, 16, 32], "num_classes": 3}, "blur"),
            ("resnet18", {"channels": [4, 8, 16, 32]}, None),
            ("my_own_network", {}, None),
        ],
    )
    def test_stands_in_timms_config(self, foreign, architecture, arguments, expected):
        said = {"architecture": architecture, "pretrained_cfg": {}, "model_args": arguments}
        foreign.with_name("config.json").write_text(json.dumps(said))
        assert load(foreign).config.anti_alias == expected

    def test_another_architecture_in_timms_config_is_refused(self, foreign):
        said = {"architecture": "resnetblur50", "pretrained_cfg": {}}
        foreign.with_name("config.json").write_text(json.dumps(said))
        text = r"holds resnet18w4 .*, not resnetblur50, as config\.json says"
        with pytest.raises(ValueError, match=text):
            load(foreign)

    def test_our_header_outranks_what_lies_beside(self, aliased, tmp_path):
        save(tmp_path / "own.safetensors", aliased)
        said = {"architecture": "resnet50", "pretrained_cfg": {}}
        (tmp_path / "config.json").write_text(json.dumps(said))
        assert load(tmp_path / "own.safetensors").config == aliased.config
        with pytest.raises(ValueError, match="holds resnetblur18w4, not resnet18w4"):
            load(tmp_path / "own.safetensors", model="resnet18w4")

    def test_leaves_that_form_no_network_are_refused_with_the_file(self, basic, write):
        # Without statistics the norms can only be GroupNorms, and 4 channels make no 32 groups.
        bare = {key: array for key, array in basic.items() if "running" not in key}
        with pytest.raises(ValueError, match=r"weights\.safetensors holds leaves.*32 groups"):
            load(write(bare))
