"""What lies beside the weights: configs, labels, and what no leaf shows."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.models.model import leaf_shapes
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.weights import IMAGENET, Pretrained, load, save, sidecar
from flaxtransfer.weights.naming import timm
from flaxtransfer.weights.naming.key_map import to_keys


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
        ({"downsample_in_first_stage": True}, "downsample_in_first_stage must be False, got True"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'relu', got 'gelu'"),
        ({"id2label": {"0": "a", "1": "b"}}, "names 2 classes, but the head .* has 3"),
        (
            {"id2label": {"0": "a", "2": "b", "3": "c"}},
            "id2label in config.json must have the keys 0 to 2, got 3 instead of 1",
        ),
        ({"id2label": {"a": "a"}}, "must have integer keys"),
        ({"id2label": {"0": "a", "00": "b", "1": "c"}}, "name each number once, got 0, 00, 1"),
        ({"id2label": "abc"}, "names by number or a list, got 'abc'"),
        ({"id2label": {"0": "a", "1": ["b"], "2": "c"}}, r"must hold names, got \['b'\]"),
        ({"id2label": None, "label2id": {"a": 0, "b": 0}}, "label2id .* one name for each number"),
    ],
)
def test_a_hugging_face_config_that_contradicts_the_weights(golden, tmp_path, change, text):
    folder = beside(
        golden, tmp_path, "huggingface_bottleneck", lambda config: config.update(change)
    )
    with pytest.raises(ValueError, match=text):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"id2label": {"2": "a", "0": "b", "1": "a"}},
        {"id2label": ["b", "a", "a"]},
        {"id2label": None, "label2id": {"b": 0, "a": "1", "a ": 2}},
    ],
)
def test_class_names_are_in_the_order_of_the_outputs(golden, tmp_path, change):
    # Two classes may share a name: ImageNet has two cranes.
    folder = beside(golden, tmp_path, "huggingface_basic", lambda config: config.update(change))
    assert [name.strip() for name in load(folder).class_names] == ["b", "a", "a"]


def test_a_file_without_the_models_type_says_its_graph_too(golden, tmp_path):
    def change(config):
        config.pop("model_type")
        config["downsample_in_bottleneck"] = True

    folder = beside(golden, tmp_path, "huggingface_bottleneck", change)
    assert load(folder).config.stride_in == "1x1"


def test_a_backbones_graph_is_that_of_its_own_settings(golden, tmp_path):
    def change(config):
        own = {"model_type": "resnet", "downsample_in_bottleneck": True}
        config.update(model_type="detr", backbone_config=own, id2label={"0": "N/A"})

    folder = beside(golden, tmp_path, "huggingface_bottleneck", change)
    arrays = load_file(folder / "model.safetensors")
    body = {f"model.backbone.{k}": a for k, a in arrays.items() if not k.startswith("classifier")}
    save_file(body, folder / "model.safetensors")
    loaded = load(folder)
    assert loaded.config.stride_in == "1x1"
    assert loaded.class_names is None
    (note,) = (note for note in loaded.notes if "detection model" in note)
    assert "states 'detr'), of which the ResNet was taken" in note


@pytest.mark.parametrize("names", ["abc", {"0": "a"}, [["a"]] * 8])
def test_label_names_of_other_forms_are_refused(golden, tmp_path, names):
    folder = beside(golden, tmp_path, "timm", lambda config: config.update(label_names=names))
    with pytest.raises(ValueError, match=r"label_names|names 1 classes"):
        load(folder)


def test_timms_older_form_is_flat(golden, tmp_path):
    def change(config):
        config |= config.pop("pretrained_cfg") | {"labels": list("abcdefgh")}
        for name in ("test_input_size", "test_crop_pct"):
            config.pop(name)

    folder = beside(golden, tmp_path, "timm", change)
    loaded, today = load(folder), load(golden / "timm")
    assert (loaded.config, loaded.preprocessing) == (today.config, today.preprocessing)
    assert loaded.class_names == tuple("abcdefgh")


def test_hugging_faces_wrapper_of_timm_says_the_architecture(golden, tmp_path):
    def change(config):
        config.pop("pretrained_cfg")
        config |= {"model_type": "timm_wrapper", "label_names": [f"LABEL_{n}" for n in range(8)]}
        config["model_args"]["act_layer"] = "silu"

    folder = beside(golden, tmp_path, "timm", change)
    with pytest.raises(ValueError, match="act_layer must be 'relu', got 'silu'"):
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
    with pytest.raises(ValueError, match=r"config\.json names 7 classes, but .* has 8"):
        load(folder)


def test_a_broken_json_beside_the_weights_is_named(basic, write):
    path = write(basic)
    (path.parent / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json, next to the weights, is not valid JSON"):
        load(path)


def test_somebody_elses_config_json_is_left_alone(basic, write):
    path = write(basic)
    (path.parent / "config.json").write_text('{"learning_rate": 0.1}')
    notes = load(path).notes
    assert notes[0] == "preprocessing: not recorded, ImageNet's is assumed"
    assert [note[:7] for note in notes[1:]] == ["assumed"]


class TestWhatNoLeafShows:
    """Anti-aliasing and the place of the stride: from `model`, timm's config.json or our header."""

    @pytest.fixture
    def aliased(self):
        config = ResNetConfig("basic", (2, 2, 2, 2), width=4, classes=3, anti_alias="blur")
        ones = {path: np.ones(shape, np.float32) for path, shape in leaf_shapes(config).items()}
        return Pretrained(unflatten(ones), config, IMAGENET)

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
        text = r"holds resnet18w4 .*, not resnetblur50, as config\.json states"
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
        # 4 channels make no 32 groups.
        ends = ("running_mean", "running_var", "num_batches_tracked")
        bare = {key: array for key, array in basic.items() if not key.endswith(ends)}
        with pytest.raises(
            ValueError,
            match=r"weights\.safetensors holds leaves that do not form.* a multiple of 32 channels",
        ):
            load(write(bare), model="resnet18_gn")


def test_a_config_is_read_once(golden, monkeypatch):
    read, names = sidecar.read_json, []

    def counted(path):
        names.append(path.name)
        return read(path)

    monkeypatch.setattr(sidecar, "read_json", counted)
    load(golden / "huggingface_bottleneck")
    assert sorted(names) == ["config.json", "preprocessor_config.json"]
