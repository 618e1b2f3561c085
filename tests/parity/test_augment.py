"""Augmentation policies against torchvision's on Pillow images; MixUp, CutMix against timm's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flaxtransfer.data.augment import OPERATIONS, RGB, RandomErasing, apply_operation
from flaxtransfer.losses import CrossEntropy
from flaxtransfer.training.blend import Blend, cut_out

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

PHOTO = np.random.default_rng(0).integers(0, 256, (14, 16, 3)).astype(np.uint8)
PHOTO = np.asarray(Image.fromarray(PHOTO).resize((256, 224), Image.Resampling.BICUBIC))
NAMES = {
    "identity": "Identity",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "color": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
}
SHARES = {"translate_x": 256, "translate_y": 224}


def spaces(torchvision):
    """Both spaces for images of 224 x 256 px."""
    policies = torchvision.transforms.autoaugment
    wide = policies.TrivialAugmentWide()._augmentation_space(31)
    return {False: wide, True: policies.RandAugment()._augmentation_space(31, (224, 256))}


@pytest.mark.parametrize("narrow", [False, True])
def test_the_spaces_have_torchvisions_operations_and_magnitudes(torchvision, narrow):
    theirs = spaces(torchvision)[narrow]
    assert set(theirs) == {NAMES[name] for name in RGB}
    for name in RGB:
        magnitudes, signed = theirs[NAMES[name]]
        assert OPERATIONS[name].signed is signed
        ours = [OPERATIONS[name].magnitude(level, narrow=narrow) for level in range(31)]
        if name == "posterize":
            ours = [8 - round(value) for value in ours]
        if name in SHARES:  # Ours is a share of the side; their wide space is of 224 px.
            ours = np.multiply(ours, SHARES[name] if narrow else 224)
        wanted = np.broadcast_to(magnitudes.numpy(), 31)
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mapping", ["nearest", "bilinear"])
@pytest.mark.parametrize("name", RGB)
def test_each_operation_gives_torchvisions_pixels(torchvision, name, mapping, record_property):
    """The same bytes: both let Pillow do it. Shears may differ in places by rounding."""
    how = torchvision.transforms.InterpolationMode(mapping)
    apply = torchvision.transforms.autoaugment._apply_op
    worst, share = 0, 0.0
    for level in (0, 7, 15, 30):
        for negative in (False, True):
            value = OPERATIONS[name].magnitude(level, narrow=False, negative=negative)
            theirs = value * SHARES.get(name, 1)
            if name == "posterize":
                theirs = 8 - round(value)
            fill = [0.0, 0.0, 0.0]
            wanted = np.asarray(apply(Image.fromarray(PHOTO), NAMES[name], theirs, how, fill))
            found = apply_operation(PHOTO, name, value, rgb=True, interpolation=mapping)
            difference = np.abs(found.astype(int) - wanted)
            worst, share = max(worst, difference.max()), max(share, (difference > 0).mean())
    record_property(f"share of other pixels, {name}, {mapping}", float(share))
    assert worst == 0 or (name.startswith("shear") and mapping == "bilinear" and worst <= 1), worst
    assert share <= 1e-3


def test_erased_boxes_are_distributed_like_torchvisions(torch, torchvision):
    """Area, sides and place of 4000 rectangles: means within five standard errors of each other."""
    torch.manual_seed(0)
    image = torch.zeros(1, 64, 48)
    erase = torchvision.transforms.RandomErasing
    theirs = np.array(
        [erase.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(4000)], float
    )
    generator = np.random.default_rng(0)
    ours = np.array([RandomErasing().box(64, 48, generator) for _ in range(4000)], float)

    def features(boxes):
        top, left, height, width = boxes.T
        area = height * width
        return np.stack([top, left, height, width, area, area**2, np.log(height / width)], axis=1)

    a, b = features(ours), features(theirs)
    error = np.sqrt(a.var(0) / 4000 + b.var(0) / 4000)
    assert (np.abs(a.mean(0) - b.mean(0)) < 5 * error).all()


def _fix_draws(monkeypatch, mixup, *centers):
    draws = iter(centers)
    monkeypatch.setattr(mixup.np.random, "randint", lambda *a, **k: next(draws))


def test_cut_out_rectangles_are_timms(torchvision, monkeypatch):
    """`rand_bbox` of timm (its `cutmix_bbox_and_lam`), with the same center and share."""
    from timm.data import mixup

    generator = np.random.default_rng(0)
    for _ in range(200):
        share, row, column = generator.random(), generator.integers(24), generator.integers(32)
        _fix_draws(monkeypatch, mixup, row, column)
        (top, bottom, left, right), own = mixup.cutmix_bbox_and_lam((8, 3, 24, 32), 1 - share)
        wanted = np.zeros((24, 32, 1), bool)
        wanted[top:bottom, left:right] = True
        found = np.asarray(cut_out(np.float32(share), (row, column), (24, 32)))
        np.testing.assert_array_equal(found, wanted)
        assert own == pytest.approx(1 - found.mean(), abs=1e-6)


def test_blended_images_and_their_loss_are_timms(torch, torchvision, monkeypatch):
    """`Mixup` with label smoothing and `SoftTargetCrossEntropy` of timm, to float32's rounding."""
    from timm.data import mixup
    from timm.loss import SoftTargetCrossEntropy

    loss = SoftTargetCrossEntropy()
    generator = np.random.default_rng(0)
    images = generator.normal(size=(6, 3, 8, 8)).astype(np.float32)
    logits = generator.normal(size=(6, 4)).astype(np.float32)
    labels = np.array([0, 1, 2, 3, 0, 1])
    for settings in ({"mixup_alpha": 0.4}, {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}):
        theirs = mixup.Mixup(**settings, label_smoothing=0.1, num_classes=4)
        monkeypatch.setattr(mixup.np.random, "beta", lambda *a, **k: 0.3)
        _fix_draws(monkeypatch, mixup, 2, 5)
        mixed, soft = theirs(torch.tensor(images), torch.tensor(labels))
        cuts = "cutmix_alpha" in settings
        box = cut_out(jnp.float32(0.7 if cuts else 0.0), (2, 5), (8, 8))
        own = 1 - box.mean() if cuts else jnp.float32(0.3)
        blend = Blend(own, jnp.float32(1.0 if cuts else 0.3), box)
        ours = np.moveaxis(images, 1, -1)
        found = np.moveaxis(np.asarray(blend.images(ours, ours[::-1])), -1, 1)
        np.testing.assert_allclose(found, mixed.numpy(), atol=1e-6)
        each = CrossEntropy(label_smoothing=0.1)
        key = jax.random.key(0)
        losses = blend.of(each(logits, labels, key), each(logits, labels[::-1], key))
        wanted = float(loss(torch.tensor(logits), soft))
        assert float(losses.mean()) == pytest.approx(wanted, rel=1e-5)
