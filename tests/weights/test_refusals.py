"""What a file is, if it is no ResNet of ours; and what no leaf shows, which is said or refused."""

import dataclasses
import json

import numpy as np
import pytest

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.models.model import leaf_shapes
from flaxtransfer.models.registry import ARCHITECTURES
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.weights import IMAGENET, Pretrained, export, load
from flaxtransfer.weights.naming import timm
from flaxtransfer.weights.naming.key_map import to_keys
from flaxtransfer.weights.sidecar import family_text


def refusal(path, **settings):
    with pytest.raises(ValueError, match=r"\S") as caught:
        load(path, **settings)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) <= 600
    return text


# Keys of timm, torchvision and transformers, two or three for each of their networks.
@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ("cls_token pos_embed blocks.0.attn.qkv.weight norm.weight", "a ViT"),
        ("class_token conv_proj.weight encoder.layers.encoder_layer_0.ln_1.weight", "a ViT"),
        ("vit.embeddings.cls_token vit.layers.0.attention.q_proj.weight", "a ViT"),
        ("cls_token pos_embed blocks.0.norm1.weight blocks.0.ls1.gamma norm.weight", "a DINOv2"),
        ("dinov2.embeddings.cls_token dinov2.encoder.layer.0.layer_scale1.lambda1", "a DINOv2"),
        ("cls_token reg_token blocks.0.gamma_1 norm.weight", "a DINOv3"),
        ("embeddings.cls_token model.layer.0.layer_scale1.lambda1", "a DINOv3"),
        ("layers.0.blocks.0.attn.relative_position_bias_table norm.weight", "a Swin"),
        ("swin.embeddings.patch_embeddings.projection.weight", "a Swin"),
        ("stem.0.weight stages.0.blocks.0.conv_dw.weight head.fc.weight", "a ConvNeXt"),
        ("features.0.0.weight features.1.0.layer_scale", "a ConvNeXt"),
        ("conv_stem.weight bn1.weight blocks.0.0.se.conv_reduce.weight", "an EfficientNet"),
        ("features.0.0.weight features.1.0.block.0.0.weight", "an EfficientNet"),
        ("stem.conv.weight s1.b1.conv1.conv.weight", "a RegNet"),
        ("encoder.stages.0.layers.0.layer.2.attention.0.weight", "a RegNet"),
        ("features.conv0.weight features.denseblock1.denselayer1.conv1.weight", "a DenseNet"),
        ("conv_stem.weight bn1.weight blocks.0.0.conv_dw.weight conv_head.bias", "a MobileNet"),
        ("features.0.0.weight features.1.conv.0.0.weight", "a MobileNet"),
        ("conv1.weight bn1.weight layer1.0.conv1.paths.0.conv.weight fc.weight", "an SKResNet"),
        ("conv1.weight bn1.weight layer1.0.convs.0.weight fc.weight", "a Res2Net"),
        ("conv1.0.weight layer1.0.conv2.conv.weight layer1.0.conv2.fc1.weight", "a ResNeSt"),
        ("rpn.head.conv.0.0.weight roi_heads.box_head.fc6.weight", "a detection model"),
        ("features.0.weight classifier.4.weight", "a VGG"),
        ("backbone.0.0.weight classifier.low_classifier.weight", "a segmentation model"),
        ("stages.0.blocks.0.attn.rel_pos.relative_position_bias_table", "a MaxViT, CoAtNet"),
        ("encoder.stages.1.layers.0.grn.bias encoder.stages.1.layers.0.pwconv2.weight", "a ConvNe"),
        ("bit.encoder.stages.0.layers.0.norm1.bias", "a BiT network under Hugging Face's names"),
        (
            "stem.conv.gain stages.0.0.conv1.weight stages.1.0.conv1.weight "
            "stages.2.0.conv1.weight stages.3.0.conv1.weight",
            "an NF-ResNet",
        ),
        ("base_layer.0.weight level2.tree1.conv1.weight", "a DLA"),
        ("backbone.base_layer.0.weight backbone.level2.tree1.conv1.weight head.bias", "a DLA"),
        ("module.model.features.0.weight module.head.weight", "a VGG"),
        ("stem.conv1.weight res2.0.conv1.weight res2.0.conv1.norm.weight", "a ResNet under Detec"),
        ("stages.0.blocks.0.conv_mid.0.conv.weight", "a VoVNet"),
        ("encoder.layers.2.self_attn.q_proj.weight", "a vision transformer or a relative"),
        ("stem.0.conv.weight mixed_5b.branch0.conv.weight", "an Inception or Xception"),
    ],
)
def test_another_family_is_named_by_its_keys(write, keys, name):
    text = refusal(write({key: np.zeros((1, 1, 1, 1), np.float32) for key in keys.split()}))
    assert f"holds {name}" in text
    assert "cannot be loaded" in text


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"architecture": "vit_tiny_patch16_224"}, "a ViT"),
        ({"model_type": "dinov3_vit"}, "a DINOv3"),
        ({"model_type": "dinov2_with_registers"}, "a DINOv2"),
        ({"architecture": "swinv2_tiny_window8_256"}, "a Swin"),
        ({"architecture": "skresnet18"}, "an SKResNet"),
        ({"architecture": "res2net50_26w_4s"}, "a Res2Net"),
        ({"model_type": "segformer"}, "a segmentation model"),
        ({"architecture": "ssd300_vgg16"}, "a detection model"),
        ({"architecture": "inception_v4"}, "an Inception or Xception network"),
        ({"model_type": "poolformer"}, "a vision transformer or a relative of it"),
    ],
)
def test_another_family_is_named_by_the_config_beside_it(write, settings, name):
    path = write({"blocks.weight": np.zeros(3, np.float32)})
    path.with_name("config.json").write_text(json.dumps(settings))
    text = refusal(path)
    assert f"holds {name}" in text
    assert "config.json next to it states" in text


def branches(module):
    """The first blocks of the branches of an HRNet, with timm's keys and widths."""
    return {
        f"stage4.{module}.branches.{branch}.0.conv{k}.weight": np.ones((w, w, 3, 3), np.float32)
        for branch, w in enumerate((2, 4, 8, 16))
        for k in (1, 2)
    }


@pytest.mark.parametrize("prefix", ["", "backbone.", "model."])
def test_branches_of_an_hrnet_are_no_networks(write, prefix):
    keys = branches(0) | branches(1) | branches(2)
    keys |= {"layer1.0.conv1.weight": np.ones((4, 4, 1, 1)), "conv1.weight": np.ones((4, 3, 3, 3))}
    text = refusal(write({prefix + key: array for key, array in keys.items()}))
    assert "holds an HRNet" in text


def test_a_config_of_an_unknown_network_is_quoted_beside_the_keys(write):
    path = write({"stages.0.blocks.0.conv_dw.weight": np.zeros((1, 1, 3, 3), np.float32)})
    path.with_name("config.json").write_text('{"architecture": "edgenext_base"}')
    text = refusal(path)
    assert "a ConvNeXt network (as its keys are like" in text
    assert "states 'edgenext_base'" in text


@pytest.mark.parametrize(
    ("prefix", "other", "parts"),
    [
        ("backbone.body.", "roi_heads.box_head.fc6.weight", ["a detection model", "was taken"]),
        ("backbone.", "aux_classifier.4.weight", ["a segmentation model", "dilate their last"]),
    ],
)
def test_what_a_backbone_was_taken_from_is_said(basic, write, prefix, other, parts):
    body = {f"{prefix}{key}": a for key, a in basic.items() if not key.startswith("fc.")}
    loaded = load(write(body | {other: np.zeros((3, 5), np.float32)}))
    (note,) = (note for note in loaded.notes if note.startswith("the file holds"))
    assert [part for part in parts if part not in note] == []
    assert loaded.no_head


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"dilation": True}, "dilation must be false, got True"),
        ({"backbone_kwargs": {"output_stride": 16}}, "output_stride must be 32, got 16"),
    ],
)
def test_dilation_that_a_config_states_is_refused(basic, write, said, text):
    path = write(basic)
    path.with_name("config.json").write_text(json.dumps({"model_type": "detr"} | said))
    assert text in refusal(path)


def test_videos_have_kernels_with_five_axes(write):
    kernel = np.zeros((1, 1, 3, 3, 3), np.float32)
    assert "a three-dimensional ResNet" in refusal(write({"layer1.0.conv1.0.weight": kernel}))


def test_the_part_that_can_be_taken_is_named():
    keys = ("backbone.body.layer1.0.conv1.weight", "roi_heads.box_predictor.bbox_pred.weight")
    text = family_text(dict.fromkeys(keys, np.zeros((1, 1, 1, 1))), {})
    assert "holds a detection model" in text
    assert "its part under 'backbone.body.' is a ResNet" in text


@pytest.mark.parametrize("config", ["resnet", "resnet50", "se_resnext50", ""])
def test_a_resnet_is_no_other_family(basic, config):
    assert family_text(basic, {"architecture": config}) == ""


@pytest.mark.parametrize(
    "keys",
    [
        ["a\x0bb", "c\u2028\nd"],
        ["x\x0b.level2.tree1.conv1", "level2.tree1.\x85conv1"],
        ["a\n\n\nb", "net.level2.tree1.conv1"],
    ],
)
def test_keys_of_any_characters_stay_in_one_line(write, basic, keys):
    odd = {key: np.zeros(3, np.float32) for key in keys}
    for arrays in (odd, basic | odd):
        with pytest.raises(ValueError, match=r"\S") as caught:
            load(write(arrays))
        assert len(str(caught.value).splitlines()) == 1


def test_a_long_list_of_differences_is_cut_and_counted(basic, write):
    text = refusal(write({f"{key}.more": array for key, array in basic.items()} | basic))
    assert "unexpected" in text
    assert text.endswith("more")


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("net.ort", b"\x1c\x00\x00\x00ORTM\x00\x00", "a model of onnxruntime's own format"),
        ("net.gguf", b"GGUF\x03\x00\x00\x00\x00\x00", "a GGUF file"),
        ("net.tflite", b"\x1c\x00\x00\x00TFL3\x14\x00", "a TensorFlow Lite model"),
    ],
)
def test_files_of_programs_are_called_by_their_name(tmp_path, name, data, kind):
    (tmp_path / name).write_bytes(data)
    assert f"the file is {kind}" in refusal(tmp_path / name)


def arrays_of(config):
    ones = {path: np.ones(shape, np.float32) for path, shape in leaf_shapes(config).items()}
    return to_keys(timm.table_for(config), ones)


GROUPED = ResNetConfig("basic", (1, 1, 1, 1), width=32, classes=3, norm="group")
BATCHED = ResNetConfig("basic", (1, 1, 1, 1), width=32, classes=3)
DEEP = ResNetConfig("bottleneck", (2, 2, 2, 2), width=32, classes=3)


class TestNormsWithoutStatistics:
    """BatchNorms that lost their buffers look like GroupNorms."""

    @pytest.fixture
    def bare(self, write):
        return write(arrays_of(GROUPED))

    @pytest.mark.parametrize("model", [None, "resnet10", "resnet10w32", BATCHED])
    def test_are_refused_with_the_way_out(self, bare, model):
        text = refusal(bare, model=model)
        assert "must have the running statistics" in text
        assert "statistics='measure'" in text
        assert "model='resnet50_gn'" in text

    def test_are_batch_norms_where_their_batches_were_counted(self, write):
        counted = {"bn1.num_batches_tracked": np.zeros((), np.int64)}
        assert "resnet50_gn" not in refusal(write(arrays_of(GROUPED) | counted))

    @pytest.mark.parametrize("model", ["resnet10_gnw32", GROUPED])
    def test_are_group_norms_for_one_who_says_so(self, bare, model):
        loaded = load(bare, model=model)
        assert loaded.config.norm == "group"
        assert any("32 groups in each GroupNorm" in note for note in loaded.notes)

    def test_are_group_norms_where_timms_config_says_so(self, bare):
        arguments = {"norm_layer": "groupnorm", "layers": [1, 1, 1, 1], "channels": [32]}
        said = {"architecture": "resnet18", "pretrained_cfg": {}, "model_args": arguments}
        bare.with_name("config.json").write_text(json.dumps(said))
        assert load(bare).config.norm == "group"

    def test_are_filled_for_one_who_will_measure_them(self, bare):
        loaded = load(bare, statistics="measure")
        assert loaded.config.norm == "batch"
        leaves = flatten(loaded.variables["batch_stats"])
        assert {float(a.sum()) for path, a in leaves.items() if path.endswith("mean")} == {0.0}
        assert "12 norms have no running statistics" in " ".join(loaded.notes)

    def test_measuring_leaves_a_whole_file_alone(self, basic, write):
        path = write(basic)
        assert load(path, statistics="measure").notes == load(path).notes

    def test_are_not_filled_in_other_ways(self, bare):
        assert "`statistics` must be None or 'measure'" in refusal(bare, statistics="zero")


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (BATCHED, ["no dilation", "no anti-aliasing", "ReLU", "model="]),
        (DEEP, ["strides in the 3x3 convolutions", "'resnet26w32_v1'", "no dilation"]),
    ],
)
def test_what_is_assumed_is_said(write, config, parts):
    path = write(arrays_of(config))
    (note,) = (note for note in load(path).notes if note.startswith("assumed"))
    assert [part for part in parts if part not in note] == []
    assert len(note) <= 600


@pytest.mark.parametrize("architecture", ["resnet18", "resnetaa50"])
def test_nothing_is_assumed_where_a_file_says_it(write, architecture):
    path = write(arrays_of(BATCHED))
    arguments = {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256]}
    said = {"architecture": architecture, "pretrained_cfg": {}, "model_args": arguments}
    path.with_name("config.json").write_text(json.dumps(said))
    assert [note for note in load(path).notes if note.startswith("assumed")] == []


def test_the_place_of_the_stride_is_said_by_name(write):
    path = write(arrays_of(DEEP))
    assert load(path, model="resnet26_v1w32").config.stride_in == "1x1"
    assert load(path).config.stride_in == "3x3"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"act_layer": "silu"}, "act_layer must be 'relu', got 'silu'"),
        ({"output_stride": 8}, "output_stride must be 32, got 8"),
        ({"global_pool": "max"}, "global_pool must be 'avg' or .*, got 'max'"),
        ({"norm_layer": "groupnorm1"}, "norm_layer must be .*, got 'groupnorm1'"),
        ({"aa_layer": "blurpc"}, "aa_layer must be .*, got 'blurpc'"),
        ({"block_args": {"attn_layer": "ceca"}}, "attn_layer must be 'se' or 'eca', got 'ceca'"),
        ({"block_args": {"act": "x"}}, "act must not be given, as it is not known here, got 'x'"),
        ({"my_own": [1]}, r"my_own must not be given, as it is not known here, got \[1\]"),
        ({"act_layer": "gelu", "output_stride": 16}, "got 'gelu'; output_stride must"),
    ],
)
def test_arguments_that_ask_for_another_graph_are_refused(write, arguments, text):
    path = write(arrays_of(BATCHED))
    said = {"architecture": "resnet18", "pretrained_cfg": {}, "model_args": arguments}
    path.with_name("config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=rf"config\.json describes another network: .*{text}"):
        load(path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"act_layer": "ReLU", "output_stride": 32, "global_pool": "avg"}, None),
        ({"aa_layer": "blur", "drop_rate": 0.1, "block_args": {"attn_layer": None}}, "blur"),
        ({"aa_layer": "avg_pool", "norm_layer": "BatchNorm2d"}, "average"),
    ],
)
def test_arguments_that_are_supported_are_honored(write, arguments, expected):
    path = write(arrays_of(BATCHED))
    shape = {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256]}
    said = {"architecture": "resnet18", "pretrained_cfg": {}, "model_args": shape | arguments}
    path.with_name("config.json").write_text(json.dumps(said))
    assert load(path).config.anti_alias == expected


def test_the_pooling_that_timm_records_of_a_network_counts(write):
    path = write(arrays_of(BATCHED))
    said = {"architecture": "mine", "pretrained_cfg": {}, "global_pool": "catavgmax"}
    path.with_name("config.json").write_text(json.dumps(said))
    assert "global_pool must be" in refusal(path)


@pytest.mark.parametrize(
    "name", ["resnet50d", "resnet18t", "resnetaa50", "resnet50_gn", "resnetv2_50", "resnetv2_50d"]
)
def test_what_is_exported_to_timm_is_not_refused(tmp_path, name):
    known = ARCHITECTURES.get(name, ARCHITECTURES["resnet26t"])
    config = dataclasses.replace(known, depths=(1, 1, 1, 1), width=64, classes=2)
    leaves = {
        path: np.full(shape, path.endswith("/var"), np.float32)
        for path, shape in leaf_shapes(config).items()
    }
    variables = {"batch_stats": {}, **unflatten(leaves)}
    export(Pretrained(variables, config, IMAGENET), tmp_path / "net", to="timm")
    assert load(tmp_path / "net").config == config


def test_a_pre_activation_network_with_another_graph_is_refused():
    arguments = {"stem_type": "same"}
    said = {"architecture": "resnetv2_50", "pretrained_cfg": {}, "model_args": arguments}
    (problem,) = timm.other_graph(said, ARCHITECTURES["resnetv2_50"])
    assert "stem_type must be" in problem
