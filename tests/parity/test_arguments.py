"""Every argument of timm's and transformers' ResNets: honored with the peer's logits, or refused.

The peers build the network from the arguments, and the files say the arguments, as
``timm.models.save_for_hf`` and ``save_pretrained`` write them.
"""

import functools
import inspect
import json

import jax
import pytest

from flaxtransfer.models.registry import resnet
from flaxtransfer.weights import load

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

LIMIT = 5e-6

# Several values of each argument; the first is timm's default where it has one.
V1 = {
    "num_classes": [5],
    "in_chans": [3, 1, 5],
    "output_stride": [32, 16, 8],
    "global_pool": ["avg", "max", "avgmax", "catavgmax", "fast"],
    "cardinality": [1, 2],
    "base_width": [64, 32, 48],
    "stem_width": [64, 32],
    "stem_type": ["", "deep", "deep_tiered", "tiered"],
    "replace_stem_pool": [False, True],
    "block_reduce_first": [1, 2],
    "down_kernel_size": [1, 3],
    "avg_down": [False, True],
    "channels": [[64, 128, 256, 512], [32, 64, 128, 256], [64, 96, 160, 224]],
    "layers": [[1, 1, 1, 1], [2, 1, 1, 1], [1, 1, 1]],
    "act_layer": ["relu", "silu", "gelu", "leaky_relu", "hard_swish", "relu6"],
    "norm_layer": ["batchnorm2d", "groupnorm", "groupnorm1", "layernorm2d", "frozenbatchnorm2d"],
    "aa_layer": [None, "avg", "blur", "blurpc"],
    "drop_rate": [0.0, 0.3],
    "drop_path_rate": [0.0, 0.3],
    "drop_block_rate": [0.0, 0.3],
    "zero_init_last": [True, False],
    "block_args": [
        {"attn_layer": "se"},
        {"attn_layer": "eca"},
        {"attn_layer": "ceca"},
        {"attn_layer": "ese"},
        {"attn_layer": "cbam"},
        {"attn_layer": "ge"},
    ],
}
TOGETHER = [
    {"stem_type": "deep", "stem_width": 32, "avg_down": True, "aa_layer": "avg"},
    {"stem_type": "deep_tiered", "stem_width": 48, "replace_stem_pool": True},
    {"replace_stem_pool": True, "aa_layer": "blur"},
    {"output_stride": 16, "act_layer": "silu"},
]
V2 = {
    "layers": [[1, 1, 1, 1]],
    "channels": [[256, 512, 1024, 2048], [128, 256, 512, 1024]],
    "num_classes": [5],
    "in_chans": [3, 2],
    "global_pool": ["avg", "max"],
    "output_stride": [32, 16],
    "width_factor": [1, 2],
    "stem_chs": [64, 32],
    "stem_type": ["", "deep", "tiered", "fixed", "same"],
    "avg_down": [False, True],
    "preact": [True, False],
    "basic": [False, True],
    "bottle_ratio": [0.25, 0.5],
    "act_layer": ["relu", "silu"],
    "norm_layer": ["batchnorm2d", "groupnorm"],
    "conv_layer": [],  # no text in a file makes one
    "drop_rate": [0.0, 0.3],
    "drop_path_rate": [0.0, 0.3],
    "zero_init_last": [False, True],
}
HF = {
    "num_channels": [3, 4],
    "embedding_size": [16, 8],
    "hidden_sizes": [[64, 128, 256, 512], [64, 96, 160, 224]],
    "depths": [[1, 1, 1, 1], [1, 2, 1, 1], [1, 1, 1]],
    "layer_type": ["bottleneck", "basic"],
    "hidden_act": ["relu", "gelu", "silu", "relu6", "leaky_relu"],
    "downsample_in_first_stage": [False, True],
    "downsample_in_bottleneck": [False, True],
}


@functools.cache
def forward(config):
    model = resnet(config)
    return jax.jit(lambda variables, images: model.apply(variables, images)[0])


def tried(agree, torch, network, folder, config, names, bands=3):
    """Loads a network with its config: with its logits, or refused by name."""
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    try:
        loaded = load(folder)
    except ValueError as error:
        text = str(error)
        assert len(text) <= 600
        assert "\n" not in text
        # A network whose leaves are not ours is refused for its leaves.
        said = [*names, "avg_down", "unexpected", "another shape", "missing", "do not form"]
        assert any(name in text for name in said), text
        return
    images = torch.randn(2, bands, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = network(images)
    theirs = getattr(theirs, "logits", theirs).numpy()
    ours = forward(loaded.config)(loaded.variables, images.permute(0, 2, 3, 1).numpy())
    agree(ours, theirs, LIMIT)


def cases(table):
    return [(name, value) for name, values in table.items() for value in values]


@pytest.mark.parametrize(
    "arguments",
    [*({name: value} for name, value in cases(V1)), *TOGETHER],
    ids=lambda arguments: json.dumps(arguments).replace('"', ""),
)
def test_timms_arguments(agree, torch, torchvision, making, tmp_path, arguments):
    import timm
    from timm.layers import BlurPool2d
    from timm.models.resnet import Bottleneck, ResNet

    torch.manual_seed(0)
    small = {"num_classes": 5, "layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256]} | arguments
    # timm's constructor takes the class of this one, not its name.
    blurs = {"avg": torch.nn.AvgPool2d, "blur": BlurPool2d, "blurpc": functools.partial(BlurPool2d)}
    built = small | {"aa_layer": blurs.get(small.get("aa_layer"))}
    try:
        network = timm.create_model("resnet26", pretrained=False, **built)
    except (TypeError, AssertionError, KeyError) as error:
        pytest.skip(f"timm does not build it: {error}")
    assert isinstance(network, ResNet)
    assert next(iter(network.layer1)).__class__ is Bottleneck
    config = {"architecture": "resnet26", "pretrained_cfg": {}, "model_args": small}
    bands = small.get("in_chans", 3)
    network = making.randomize(network, 1)
    tried(agree, torch, network, tmp_path / "net", config, flat(arguments), bands)


def flat(arguments):
    """The names of arguments, with those of nested groups."""
    inner = [flat(value) for value in arguments.values() if isinstance(value, dict)]
    return [*arguments, *(name for names in inner for name in names)]


@pytest.mark.parametrize(
    "arguments",
    [{name: value} for name, value in cases(V2)],
    ids=lambda arguments: json.dumps(arguments).replace('"', ""),
)
def test_timms_arguments_of_the_second_version(
    agree, torch, torchvision, making, tmp_path, arguments
):
    import timm

    torch.manual_seed(0)
    small = {"num_classes": 5, "layers": [1, 1, 1, 1], "channels": [128, 256, 512, 1024]}
    small |= arguments
    try:
        network = timm.create_model("resnetv2_50", pretrained=False, **small)
    except (TypeError, AssertionError, KeyError) as error:
        pytest.skip(f"timm does not build it: {error}")
    config = {"architecture": "resnetv2_50", "pretrained_cfg": {}, "model_args": small}
    network = making.randomize(network, 1)
    tried(
        agree, torch, network, tmp_path / "net", config, flat(arguments), small.get("in_chans", 3)
    )


@pytest.mark.parametrize("layer_type", ["bottleneck", "basic"])
@pytest.mark.parametrize(
    ("name", "value"), cases(HF), ids=lambda part: json.dumps(part).replace('"', "")
)
def test_transformers_fields(agree, torch, torchvision, making, tmp_path, layer_type, name, value):
    import transformers

    torch.manual_seed(0)
    fields = {
        "embedding_size": 16,
        "hidden_sizes": [64, 128, 256, 512] if layer_type == "bottleneck" else [16, 32, 64, 128],
        "depths": [1, 1, 1, 1],
        "layer_type": layer_type,
        "num_labels": 5,
    } | {name: value}
    if name == "layer_type" and value != layer_type:
        pytest.skip("a case of the other kind of block")
    config = transformers.ResNetConfig(**fields)
    network = making.randomize(transformers.ResNetForImageClassification(config), 2)
    said = json.loads(config.to_json_string(use_diff=False))
    bands = fields.get("num_channels", 3)
    tried(agree, torch, network, tmp_path / "net", said, [name], bands)
    # A file without the model's type says the same.
    without = {key: entry for key, entry in said.items() if key != "model_type"}
    tried(agree, torch, network, tmp_path / "bare", without, [name], bands)


def test_no_argument_is_forgotten(torch, torchvision):
    import transformers
    from timm.models import resnet as v1
    from timm.models import resnetv2 as v2

    def named(function):
        own = {"self", "block", "device", "dtype", "kwargs"}
        return set(inspect.signature(function).parameters) - own

    assert named(v1.ResNet.__init__) == set(V1)
    assert named(v2.ResNetV2.__init__) == set(V2)
    fields = set(transformers.ResNetConfig.__annotations__)
    assert fields - {"model_type", "layer_types"} == set(HF)
