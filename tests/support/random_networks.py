"""Random configurations with every field of ``ResNetConfig``, as a hypothesis strategy."""

import dataclasses

from hypothesis import strategies as st

from flaxtransfer.models.config import GROUPS, ResNetConfig
from flaxtransfer.models.layout import DEPTHS


@st.composite
def networks(draw, most_blocks=3, widths=(32, 64, 96), most_groups=4):
    """Networks that ``ResNetConfig`` takes.

    Args:
        most_blocks: of a stage.
        widths: planes of layer1, and channels of plain stems.
        most_groups: of ResNeXts, over a GroupNorm 2.
    """

    def one_of(*values):
        return draw(st.sampled_from(values))

    depths = st.integers(1, most_blocks)
    norm = one_of("batch", "batch", "group")
    if norm == "group":
        widths = [width for width in widths if width % GROUPS == 0]
    fields = {
        "block": one_of("basic", "bottleneck"),
        "depths": draw(st.tuples(depths, depths, depths, depths)),
        "width": one_of(*widths),
        "norm": norm,
        "stem": one_of("plain", "plain", "deep", "tiered"),
        "shortcut": one_of("convolution", "convolution", "average"),
        "preactivation": one_of(False, False, True),
        "standardized": one_of(None, None, None, 1e-10),
        "classes": draw(st.integers(1, 9)),
        "in_channels": draw(st.integers(1, 4)),
    }
    if fields["stem"] == "plain":
        fields["stem_width"] = one_of(None, *widths, 64, 160)
    else:
        fields["stem_width"] = 128 if norm == "group" else one_of(16, 32, 64)
    if fields["block"] == "bottleneck":
        fields["groups"] = one_of(1, 1, *range(2, most_groups + 1))
        fields["base_width"] = one_of(64, 64, 128, 96, 32)
        if norm == "group":
            fields |= {"groups": one_of(1, 2), "base_width": 64}
        fields["stride_in"] = one_of("3x3", "3x3", "1x1")
    if fields["preactivation"]:
        fields |= {"stride_in": "3x3", "groups": 1}
        keras = {"block": "bottleneck", "stem": "plain", "shortcut": "convolution", "norm": "batch"}
        if fields.items() >= keras.items() and fields["standardized"] is None:
            fields["stride_at"] = one_of("first", "last")
        pools = ["max"] if fields["stem"] == "tiered" else ["max", "zero-padded"]
        fields["stem_pool"] = one_of(*pools)
        if fields["stem"] == "plain" and norm == "batch":
            keras = fields["stem_pool"] == "max" or fields.get("stride_at") == "last"
            fields["stem_bias"] = keras and one_of(False, True)
        return ResNetConfig(**fields)
    fields["attention"] = one_of(None, None, "se", "eca")
    if fields["attention"] == "se":
        fields["se_ratio"] = one_of(1 / 16, 1 / 4, 1 / 3, 0.5)
    fields["anti_alias"] = one_of(None, None, "average", "blur")
    if fields["anti_alias"] is None:
        fields["stem_pool"] = one_of("max", "max", "zero-padded", "ceil", "convolution")
    else:
        fields.pop("stride_in", None)
    if fields["shortcut"] == "convolution":
        fields["shortcut_kernel"] = one_of(1, 1, 3)
    config = ResNetConfig(**fields)
    # Halves of the inner channels must still be multiples of the groups, of either kind.
    even = config.inner(1) % (2 * config.groups * (GROUPS if norm == "group" else 1)) == 0
    return dataclasses.replace(config, reduce_first=one_of(1, 2) if even else 1)


known_depths = st.sampled_from([depths for _, depths in DEPTHS.values()])
