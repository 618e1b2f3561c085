"""Layouts: the names of a family's parts, written down once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import jax
import optax
import pytest

import flaxtransfer as ft
from flaxtransfer.masks import resolve, select, selected
from flaxtransfer.models.layout import LAYOUTS, RESNET, Layout, layout_of, segment_of
from flaxtransfer.paths import flatten, unflatten

PRODUCT = Path(ft.__file__).parent

CONVNET = Layout(
    family="ConvNet",
    segments=("stem", "stage1", "stage2", "pool", "head"),
    prefixes=(
        ("patchify", "stem"),
        (r"stages/([0-9]+)", r"stage\1"),
        ("norm_pre|classifier", "head"),
    ),
    stage="stage{}",
    block="stages/[0-9]+/blocks/[0-9]+",
    head="classifier",
    first_kernels=("patchify/kernel",),
)
"""A second family, as a stranger would add it."""

THEIRS = unflatten(
    {
        path: jax.ShapeDtypeStruct((2, 2), "float32")
        for path in (
            "patchify/kernel",
            "stages/1/blocks/0/kernel",
            "stages/2/downsample/kernel",
            "stages/2/blocks/2/kernel",
            "stages/2/blocks/10/kernel",
            "norm_pre/scale",
            "classifier/kernel",
        )
    }
)


def test_no_other_room_knows_a_familys_leaf_names():
    """Names in code, docstrings and comments: a second family would have to change them all."""
    words = re.compile(r"\blayer[0-9]|\b(?:conv|bn|gn)[0-9]\b|\bfc\b")
    found = [
        f"{path.relative_to(PRODUCT)}:{number}: {line.strip()}"
        for path in PRODUCT.rglob("*.py")
        if path.relative_to(PRODUCT).parts[0] not in ("models", "weights")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if words.search(line)
    ]
    assert found == []


def test_the_layout_imports_no_network_library():
    program = (
        "import sys, flaxtransfer.models.layout; "
        "print(*{'jax', 'flax', 'numpy', 'optax'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == ""


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet50d", "resnetv2_50x1_bit"])
def test_every_leaf_of_a_resnet_has_a_segment(name):
    model = ft.resnet(name)
    assert model.layout is RESNET
    for tree in model.abstract().values():
        paths = flatten(tree)
        assert all(RESNET.segment(path) in model.segments for path in paths)
        assert [s for s in model.segments if s in RESNET.present(paths)] == RESNET.present(paths)
    params = flatten(model.abstract()["params"])
    assert RESNET.first_kernel(params) == model.config.first_kernel
    assert {f"{RESNET.head}/kernel", f"{RESNET.head}/bias"} == set(selected(ft.head(), params))


@pytest.mark.parametrize(
    ("path", "segment"),
    [
        ("conv1/kernel", "stem"),
        ("conv1/0/kernel", "stem"),
        ("bn1/mean", "stem"),
        ("layer1/0/conv1/kernel", "layer1"),
        ("layer4/2/downsample/1/scale", "layer4"),
        ("layer10/0/a", "layer10"),
        ("fc/bias", "head"),
        ("fc", "head"),
        ("adapter/kernel", "adapter"),
        ("overhead/kernel", ""),
        ("layer0/x", ""),
        ("layer/x", ""),
        ("layer1x/y", ""),
        ("decoder/fc", ""),
        ("fc2/bias", ""),
        ("fc\n", ""),
    ],
)
def test_the_segment_of_a_path(path, segment):
    assert RESNET.segment(path) == segment
    if segment:
        assert segment_of(path) == segment
    else:
        with pytest.raises(ValueError, match=r"belongs to no segment of a known family \(ResNet\)"):
            segment_of(path)


def test_an_unknown_path_has_a_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'layer2'"):
        segment_of("layr2/0/conv1/kernel")


def test_parts_come_in_the_order_of_the_network():
    paths = ["fc/bias", "layer10/0/a", "layer2/10/a", "adapter/kernel", "bn1/scale", "layer2/9/b"]
    assert RESNET.present(paths) == ["adapter", "stem", "layer2", "layer10", "head"]
    blocks = ["adapter", "stem", "layer2/9", "layer2/10", "layer10/0", "head"]
    assert RESNET.parts(paths, "block") == blocks
    assert RESNET.parts(paths) == RESNET.present(paths)


def test_a_tree_is_of_the_family_that_knows_most_of_its_paths():
    both = (*LAYOUTS, CONVNET)
    assert layout_of(flatten(THEIRS)) is None
    assert layout_of(flatten(THEIRS), both) is CONVNET
    assert layout_of(["fc/kernel", "norm_pre/scale", "classifier/kernel"], both) is CONVNET
    assert layout_of(["fc/kernel", "classifier/kernel"], both) is RESNET
    assert layout_of([], both) is None


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (ft.stem(), {"patchify/kernel"}),
        (ft.stage(1), {"stages/1/blocks/0/kernel"}),
        (
            ft.stages(1, 2) - ft.glob("**/blocks/**"),
            {"stages/2/downsample/kernel"},
        ),
        (ft.head(), {"norm_pre/scale", "classifier/kernel"}),
        (ft.up_to("stem"), {"patchify/kernel"}),
        (ft.up_to("pool"), set(flatten(THEIRS)) - {"norm_pre/scale", "classifier/kernel"}),
    ],
    ids=lambda value: str(value) if isinstance(value, ft.Mask) else "",
)
def test_masks_mean_the_parts_of_another_family(mask, expected):
    assert selected(mask, THEIRS, layout=CONVNET) == expected
    booleans = flatten(resolve(mask, THEIRS, layout=CONVNET))
    assert {path for path, taken in booleans.items() if taken} == expected
    labels = flatten(ft.label(THEIRS, {"new": mask, "rest": ft.rest()}, layout=CONVNET))
    assert {path for path, label in labels.items() if label == "new"} == expected


def test_errors_speak_of_the_family():
    with pytest.raises(ValueError, match=r"there is no stage9. The tree has segments stem, stage1"):
        selected(ft.stage(9), THEIRS, layout=CONVNET)
    with pytest.raises(ValueError, match=r"up_to\('layer1'\): a ConvNet has no 'layer1'; there"):
        selected(ft.up_to("layer1"), THEIRS, layout=CONVNET)
    for mask in (ft.head(), ft.stage(1)):
        with pytest.raises(ValueError, match=r"no segment of a ResNet.*use ft\.glob or ft\.where"):
            select(mask, flatten(THEIRS))


def test_layerwise_decay_follows_another_familys_parts():
    group = ft.Group(optax.sgd, 8.0)
    labels, groups = ft.layerwise_decay(THEIRS, group, decay=0.5, layout=CONVNET)
    rates = {name: group.learning_rate for name, group in groups.items()}
    assert rates == {"stem": 1.0, "stage1": 2.0, "stage2": 4.0, "head": 8.0}
    assert flatten(labels)["stages/2/downsample/kernel"] == "stage2"

    labels, groups = ft.layerwise_decay(THEIRS, group, decay=0.5, by="block", layout=CONVNET)
    blocks = [f"stages/{number}" for number in ("1/blocks/0", "2/blocks/2", "2/blocks/10")]
    assert list(groups) == ["stem", blocks[0], "stage2", *blocks[1:], "head"]
    assert flatten(labels)["stages/2/blocks/10/kernel"] == "stages/2/blocks/10"
    with pytest.raises(ValueError, match=r"a ResNet has these leaves: patchify/kernel"):
        ft.layerwise_decay(THEIRS, group)
    with pytest.raises(ValueError, match=r"no segment of a ConvNet has these leaves: fc/kernel"):
        ft.layerwise_decay({"fc": {"kernel": 0}}, group, layout=CONVNET)


def test_labels_and_groups_of_another_family_are_bound():
    rules = {"new": "head()", "old": ft.rest()}
    groups = {"new": ft.Group(optax.adam, 0.1), "old": ft.FROZEN}
    parts = ft.ParamGroups.of(THEIRS, rules, groups, layout=CONVNET)
    assert set(flatten(parts.trainable(THEIRS))) == {"norm_pre/scale", "classifier/kernel"}
