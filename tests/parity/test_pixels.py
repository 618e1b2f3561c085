"""Evaluation pixels of torchvision, timm and transformers, by the record beside the weights."""

import pytest

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

REFUSED = {
    "timm, border": "crop_mode",
    "timm, 224 by 288 px": "input_size",
    "timm, crop_pct 1.2": "crop_pct",
    "transformers, ConvNext, a second crop": "crop_size",
    "transformers, Bit, without a crop": "do_center_crop",
    "transformers, Bit, crop larger than size": "crop_size",
    "transformers, Bit, crop not square": "crop_size",
    "transformers, Bit, longest_edge": "size",
    "transformers, Bit, without resizing": "do_resize",
    "transformers, Bit, padded": "do_pad",
    "transformers, LeViT": "image_processor_type",
    "transformers, EfficientNet": "rescale_offset",
}


def test_twenty_odd_sizes(torchvision, record_property):
    from benchmarks import pixels

    assert len(pixels.SIZES) == 20
    refused = {}
    for name, found in pixels.results():
        if isinstance(found, str):
            refused[name] = found
            continue
        for kind, level in found.items():
            record_property(f"{kind}, {name}", float(level))
            assert level <= 1.001, (name, kind)
    assert refused.keys() == REFUSED.keys()
    for name, text in refused.items():
        assert f"{REFUSED[name]} must be" in text
        assert len(text) <= 600
        assert "\n" not in text
