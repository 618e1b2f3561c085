"""What lies beside the weights: configs, labels, and what no leaf shows."""

import json
import shutil

import numpy as np
import pytest

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.models.model import leaf_shapes
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.weights import IMAGENET, Pretrained, load, save
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
            r"must have the keys 0 to 2, got \[0, 2, 3\]",
        ),
        ({"id2label": {"a": "a"}}, "must have integer keys"),
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
