"""MixUp, CutMix, dropout, stochastic depth, accumulation and gradient checkpointing in a step.

The reference is arithmetic by hand on what the network computes without them.
"""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import flaxtransfer as ft
from flaxtransfer.losses import BinaryCrossEntropy, CrossEntropy, SquaredError
from flaxtransfer.models.resnet import Noise, depth_rates
from flaxtransfer.sharding import batch_rows
from flaxtransfer.task import MULTI_LABEL, REGRESSION, SINGLE_LABEL, Units
from flaxtransfer.training.blend import Blend, cut_out, draw_blend, whole_batch
from flaxtransfer.training.plan import plan_text
from flaxtransfer.training.plan_yaml import plan_from_yaml, plan_to_yaml
from flaxtransfer.training.prefix_cache import Cache, choose
from flaxtransfer.training.selection import check_feed
from flaxtransfer.training.step import _BLEND, start, train_step
from flaxtransfer.weights.preprocessing import normalize
from tests.support.small import PREPROCESSING, SIZE, batch, feed

CONFIG = ft.models.ResNetConfig(depths=(1, 1), width=4, classes=3)
RULES = {"all": ft.everything()}
GROUPS = {"all": ft.Group(optax.sgd, 0.1)}


@functools.cache
def network():
    """Two blocks: what is claimed here does not depend on how many there are."""
    model = ft.resnet(CONFIG)
    return model, jax.tree.map(np.asarray, model.init(jax.random.key(0), (SIZE, SIZE, 3)))


def phase_of(params, rules=RULES, groups=GROUPS, **changes):
    settings = {"steps": 5, "norm": "running", **changes}
    return ft.Phase(rules, groups, **settings).resolve(params)


def stepped(task=SINGLE_LABEL, label=None, seed=0, data=None, **changes):
    """State and metrics after one step on one batch."""
    model, variables = network()
    phase = phase_of(variables["params"], **changes)
    made = dict(data or batch(0))
    if label is not None:
        made["label"] = label
    step = train_step(model, phase, feed(), task)
    return step(start(jax.tree.map(jnp.array, variables), phase, seed), made)


def difference(one, other):
    """The largest difference of two trees."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(jnp.abs(a - b).max()) for a, b in pairs)


def blend_of(mixup=0.0, cutmix=0.0, seed=0):
    """The blend of the first step of a run with this seed."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), _BLEND)
    return draw_blend(key, mixup, cutmix, (SIZE, SIZE))


@pytest.fixture(scope="module")
def by_hand():
    """Logits of the images of the first batch, blended in numpy with a share and a rectangle."""
    model, variables = network()
    images = np.asarray(normalize(batch(0)["image"], PREPROCESSING.mean, PREPROCESSING.std))

    def logits(blend):
        mixed = float(blend.value) * images + (1 - float(blend.value)) * images[::-1]
        mixed = np.where(np.asarray(blend.other), images[::-1], mixed)
        return np.asarray(model.apply(variables, jnp.asarray(mixed))[0], np.float64)

    return logits


BLENDS = [{"mixup": 0.4}, {"cutmix": 1.0}]


@pytest.mark.parametrize("settings", BLENDS, ids=["mixup", "cutmix"])
def test_the_loss_is_that_of_blended_images_and_soft_labels(settings, by_hand):
    """Cross-entropy with the blend of two smoothed one-hot rows, as the papers write it."""
    blend, labels = blend_of(**settings), batch(0)["label"]
    assert 0.05 < float(blend.own) < 0.95
    own = float(blend.own)
    onehot = np.eye(3)[labels] * 0.9 + 0.1 / 3
    soft = own * onehot + (1 - own) * onehot[::-1]
    logits = by_hand(blend)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    _, metrics = stepped(loss=CrossEntropy(label_smoothing=0.1), **settings)
    assert float(metrics["loss"]) == pytest.approx(-(soft * log_probabilities).sum(-1).mean(), 1e-5)
    right = logits.argmax(-1)
    wanted = (own * (right == labels) + (1 - own) * (right == labels[::-1])).mean()
    assert float(metrics["accuracy"]) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("settings", BLENDS, ids=["mixup", "cutmix"])
def test_missing_labels_stay_missing(settings, by_hand):
    """Each of the two losses is the mean over what is known of its own labels."""
    labels = np.random.default_rng(0).integers(0, 2, (8, 3)).astype(np.float32)
    labels[::3, 1] = np.nan
    labels[0] = [np.nan, np.nan, 1]
    blend = blend_of(**settings)
    own, logits = float(blend.own), by_hand(blend)

    def loss(values):
        losses = np.where(values == 1, np.log1p(np.exp(-logits)), np.log1p(np.exp(logits)))
        return np.nanmean(np.where(np.isnan(values), np.nan, losses), axis=1)

    wanted = (own * loss(labels) + (1 - own) * loss(labels[::-1])).mean()
    state, metrics = stepped(MULTI_LABEL, labels, loss=BinaryCrossEntropy(), **settings)
    assert float(metrics["loss"]) == pytest.approx(wanted, 1e-5)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_targets_of_a_regression_are_blended_themselves(by_hand):
    values = np.random.default_rng(0).normal(5, 2, (8, 3)).astype(np.float32)
    values[2, 1] = np.nan
    task = REGRESSION.with_units(Units((5.0,) * 3, (2.0,) * 3))
    blend = blend_of(mixup=0.4)
    own = float(blend.own)
    targets = own * (values - 5) / 2 + (1 - own) * (values[::-1] - 5) / 2
    assert np.isnan(targets).sum() == 2  # the missing one, in both of its images
    wanted = np.nanmean((by_hand(blend) - targets) ** 2 / 2, axis=1).mean()
    _, metrics = stepped(task, values, loss=SquaredError(), mixup=0.4)
    assert float(metrics["loss"]) == pytest.approx(wanted, 1e-5)


def test_blends_follow_their_distributions():
    """Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)); areas are cut off at the edges."""
    keys = jax.random.split(jax.random.key(0), 2000)
    mixed = jax.vmap(lambda key: draw_blend(key, 0.4, 0.0, (8, 8)))(keys)
    assert float(mixed.own.mean()) == pytest.approx(0.5, abs=5 * (0.1389 / 2000) ** 0.5)
    assert float(mixed.own.var()) == pytest.approx(1 / 7.2, rel=0.1)
    assert not mixed.other.any()
    both = jax.vmap(lambda key: draw_blend(key, 0.4, 1.0, (8, 8)))(keys)
    cut = np.asarray(both.other.any((1, 2, 3)))
    # Rectangles of less than a pixel are empty: those of a share below 1/64.
    assert abs(cut.mean() - 0.5 * 63 / 64) < 5 * (0.25 / 2000) ** 0.5
    np.testing.assert_allclose(both.own[cut], 1 - both.other[cut].mean((1, 2, 3)), atol=1e-6)
    assert (np.asarray(both.value)[cut] == 1).all()


@pytest.mark.parametrize(
    ("share", "center", "rows", "columns"),
    [
        (0.25, (4, 6), (2, 6), (3, 9)),
        (0.25, (0, 11), (0, 2), (8, 12)),
        (0.15, (4, 6), (3, 6), (4, 8)),
        (0.0, (4, 6), (0, 0), (0, 0)),
        (1.0, (4, 6), (0, 8), (0, 12)),
    ],
)
def test_the_rectangle_is_around_its_center_and_cut_off(share, center, rows, columns):
    """8 x 12 px, counted by hand; timm's `rand_bbox` is in tests/parity."""
    wanted = np.zeros((8, 12, 1), bool)
    wanted[slice(*rows), slice(*columns)] = True
    np.testing.assert_array_equal(cut_out(jnp.asarray(share), center, (8, 12)), wanted)


def test_blends_are_functions_of_seed_and_step():
    one, same, other = (np.asarray(stepped(mixup=0.4, seed=seed)[1]["loss"]) for seed in (0, 0, 1))
    assert one == same
    assert one != other
    model, variables = network()
    phase = phase_of(variables["params"], mixup=0.4, groups={"all": ft.Group(optax.sgd, 0.0)})
    step = train_step(model, phase, feed())
    first, metrics = step(start(variables, phase, 0), batch(0))
    assert float(step(first, batch(0))[1]["loss"]) != float(metrics["loss"])


def test_rows_meet_the_same_rows_on_every_mesh():
    """Devices of two processes in turn: rows come in another order, partners do not change."""
    devices = [SimpleNamespace(process_index=p) for p in (0, 1, 0, 1)]
    mesh = SimpleNamespace(devices=np.array(devices))
    rows = batch_rows(mesh, 8)
    # By hand: process 0 has rows 0 to 3, of which its first device takes two.
    assert rows.tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    part = whole_batch({"image": rows, "label": rows}, rows, blended=True)
    assert (np.asarray(part.image) + np.asarray(part.other_image) == 7).all()
    assert batch_rows(None, 3).tolist() == [0, 1, 2]
    plain = whole_batch({"image": np.arange(5), "label": np.arange(5)}, np.arange(5), blended=True)
    assert plain.other_label.tolist() == [4, 3, 2, 1, 0]


def noise(count, dropout=0.0, depth=None, seed=0):
    return Noise(jax.random.key(seed), jnp.arange(count), count, dropout, depth or {})


def test_dropout_zeroes_a_share_and_keeps_the_mean():
    x = jnp.ones((400, 50))
    found = np.asarray(noise(400, 0.3).features(x))
    assert set(np.unique(found)) == {0.0, np.float32(1 / 0.7)}
    assert abs((found == 0).mean() - 0.3) < 5 * (0.21 / 20000) ** 0.5
    part = noise(400, 0.3)._replace(rows=jnp.array([7, 3]))
    np.testing.assert_array_equal(part.features(x[:2]), found[[7, 3]])


def test_a_dropped_block_is_its_shortcut():
    model, variables = network()
    images = jax.random.normal(jax.random.key(1), (16, SIZE, SIZE, 3))
    before = model.apply(variables, images, stop="layer2")[0]
    drops = noise(16, depth={"layer2/0": 0.5, "layer1/0": 0.5})
    kept = np.asarray(drops.factor("layer2/0", jnp.float32)).ravel() > 0
    assert 0 < kept.sum() < 16
    assert (np.asarray(drops.factor("layer1/0", jnp.float32)).ravel() > 0).tolist() != kept.tolist()
    found = model.apply(variables, before, start="layer2", stop="pool", noise=drops)[0]
    # With a last BatchNorm of zeros, a block is its shortcut; with one of twice the size it has
    # twice the output.
    layer = variables["params"]["layer2"]["0"]

    def scaled(factor):
        last = {name: factor * leaf for name, leaf in layer["bn2"].items()}
        changed = {**variables["params"], "layer2": {"0": {**layer, "bn2": last}}}
        inner = {**variables, "params": changed}
        return model.apply(inner, before, start="layer2", stop="pool")[0]

    np.testing.assert_allclose(found[~kept], scaled(0.0)[~kept], atol=1e-6)
    np.testing.assert_allclose(found[kept], scaled(2.0)[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [{}, {"preactivation": True, "stride_at": "first"}])
def test_every_kind_of_block_can_be_dropped(kind):
    config = dataclasses.replace(CONFIG, block="bottleneck", **kind)
    model = ft.resnet(config)
    variables = model.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    one = noise(4, depth={"layer2/0": 0.999999})
    whole = model.apply(variables, x, stop="pool")[0]
    dropped = model.apply(variables, x, stop="pool", noise=one)[0]
    assert bool((whole != dropped).any())
    # Nothing of the last block but its shortcut: its last kernel has no part in it.
    params = variables["params"]
    block = params["layer2"]["0"]
    other = {**block, "conv3": jax.tree.map(lambda leaf: leaf + 1, block["conv3"])}
    changed = {**params, "layer2": {**params["layer2"], "0": other}}
    again = model.apply({**variables, "params": changed}, x, stop="pool", noise=one)[0]
    np.testing.assert_array_equal(dropped, again)


def test_blocks_are_dropped_in_proportion_to_their_depth_and_frozen_ones_never():
    config = ft.models.ResNetConfig(depths=(1, 2, 1, 1))
    every = [
        f"layer{stage}/{index}/conv1/kernel"
        for stage, index in [(1, 0), (2, 0), (2, 1), (3, 0), (4, 0)]
    ]
    found = depth_rates(config, 0.5, every)
    assert list(found) == ["layer1/0", "layer2/0", "layer2/1", "layer3/0", "layer4/0"]
    np.testing.assert_allclose(list(found.values()), [0.1, 0.2, 0.3, 0.4, 0.5])
    assert depth_rates(config, 0.5, every[4:]) == {"layer4/0": 0.5}
    assert depth_rates(config, 0.0, every) == {}


def test_dropout_and_depth_change_the_step_and_not_the_evaluation():
    plain, dropped = stepped(), stepped(dropout=0.5, stochastic_depth=0.5)
    assert float(plain[1]["loss"]) != float(dropped[1]["loss"])
    model, variables = network()
    images = normalize(batch(0)["image"], PREPROCESSING.mean, PREPROCESSING.std)
    with_none = model.apply(variables, images, noise=noise(8))[0]
    np.testing.assert_array_equal(with_none, model.apply(variables, images)[0])


EVERYTHING = {"mixup": 0.4, "cutmix": 1.0, "dropout": 0.3, "stochastic_depth": 0.3}


@pytest.mark.parametrize(
    ("parts", "changes"),
    [
        (4, EVERYTHING | {"clip": 0.5, "ema": 0.5}),
        pytest.param(2, {}, marks=pytest.mark.slow),
        pytest.param(8, {"mixup": 0.4}, marks=pytest.mark.slow),
    ],
)
def test_parts_of_a_batch_are_the_batch(parts, changes):
    """With running BatchNorm statistics: parameters, average, norm, loss and score, to 1e-6."""
    whole, metrics = stepped(**changes)
    found, others = stepped(accumulate=parts, **changes)
    assert difference(whole.params, found.params) < 1e-6
    assert int(found.step) == 1
    for name, value in metrics.items():
        assert float(others[name]) == pytest.approx(float(value), rel=1e-6, abs=1e-6)
    if "ema" in changes:
        assert difference(whole.ema, found.ema) < 1e-6
    # The control: another batch is much further away.
    assert difference(whole.params, stepped(data=batch(1), **changes)[0].params) > 1e-3


@pytest.mark.slow
def test_parts_in_a_loop_are_those_written_out(monkeypatch):
    """What accelerators run; the CPU writes the parts out."""
    changes = EVERYTHING | {"clip": 0.5, "ema": 0.5}
    written = stepped(accumulate=4, **changes)[0]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    rolled = stepped(accumulate=4, **changes, loss=CrossEntropy())[0]  # the loss: another program
    assert difference(written.params, rolled.params) < 1e-6
    assert difference(written.params, network()[1]["params"]) > 1e-3


@pytest.mark.slow
def test_parts_take_less_memory():
    """Temporary memory of the compiled step. Measured: 0.54 and 0.31 of the whole batch's."""
    config = dataclasses.replace(CONFIG, depths=(4, 1), width=16)
    model = ft.resnet(config)
    variables = model.init(jax.random.key(0))
    images = np.zeros((16, 64, 64, 3), np.uint8)
    made = {"image": images, "label": np.zeros(16, np.int32)}

    def size(parts):
        phase = phase_of(variables["params"], accumulate=parts)
        state = start(variables, phase, 0)
        compiled = train_step(model, phase, feed()).lower(state, made).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = size(1)
    assert size(2) < 0.65 * whole
    assert size(4) < 0.4 * whole


def test_batch_norm_takes_the_statistics_of_each_part():
    """Running statistics are updated once for each part: by hand, for the stem's first norm."""
    model, variables = network()
    images = normalize(batch(0)["image"], PREPROCESSING.mean, PREPROCESSING.std)
    state, _ = stepped(norm="batch", accumulate=2)
    stats = variables
    for part in (images[0::2], images[1::2]):
        stats = {**variables, "batch_stats": model.apply(stats, part, norm="batch")[1]}
    for one, other in zip(
        *map(jax.tree.leaves, (state.batch_stats, stats["batch_stats"])), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    phase = phase_of(variables["params"], norm="batch", accumulate=2)
    assert "takes the statistics of each part" in text_of(phase)
    assert "statistics of each" not in text_of(phase_of(variables["params"], accumulate=2))
    assert "drops no block" not in text_of(phase_of(variables["params"], stochastic_depth=0.1))
    head = {"new": ft.head(), "frozen": ft.rest()}, {"new": GROUPS["all"], "frozen": ft.FROZEN}
    assert "drops no block" in text_of(phase_of(variables["params"], *head, stochastic_depth=0.1))


def text_of(phase):
    return " ".join(plan_text(ft.Plan([phase]), network()[1]["params"]).split())


def test_recomputed_blocks_have_the_same_gradient():
    changes = {"norm": "batch", "stochastic_depth": 0.3}
    plain, again = stepped(**changes), stepped(remat=True, **changes)
    assert difference(plain[0].params, again[0].params) < 1e-6
    assert difference(plain[0].batch_stats, again[0].batch_stats) < 1e-6
    assert difference(plain[0].params, network()[1]["params"]) > 1e-3


def test_recomputed_blocks_keep_less_for_the_backward_pass():
    """Bytes that differentiation keeps, by jax itself: inputs of blocks and parameters.

    Measured: 0.11. Eight blocks of 32 and 64 channels on 16 maps of 112 px, compiled for a TPU v5e
    by libtpu, take 624 MB of temporary memory instead of 1,731, and 218 GFLOP instead of 169.
    Compiled for the CPU they take no less memory, as the help says.
    """
    model = ft.resnet(dataclasses.replace(CONFIG, depths=(8, 8), width=16))
    variables = model.abstract()
    maps = jax.ShapeDtypeStruct((16, 64, 64, 16), jnp.float32)

    def kept(remat):
        def residuals(variables, maps):
            def output(params):
                whole = {**variables, "params": params}
                return model.apply(whole, maps, start="layer1", stop="pool", remat=remat)[0]

            return jax.vjp(output, variables["params"])[1]

        leaves = jax.tree.leaves(jax.eval_shape(residuals, variables, maps))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    ratio = kept(True) / kept(False)
    assert 0.02 < ratio < 0.2, ratio


def test_the_settings_are_part_of_a_plan_file():
    phase = ft.Phase(RULES, GROUPS, steps=3, accumulate=2, remat=True, **EVERYTHING)
    text = plan_to_yaml(ft.Plan([phase]))
    for line in ("mixup: 0.4", "cutmix: 1.0", "dropout: 0.3", "accumulate: 2", "remat: true"):
        assert line in text
    assert plan_from_yaml(text).phases == (phase,)
    assert "stochastic_depth 0.3" in str(ft.Plan([phase]))


def test_images_are_made_smaller_in_the_step():
    """As Pillow does it, to one level in 255, which is a hundredth of the loss here."""
    model, variables = network()
    pictures = [Image.fromarray(image) for image in batch(0)["image"]]
    small = [np.asarray(p.resize((8, 8), Image.Resampling.BILINEAR)) for p in pictures]
    images = normalize(np.stack(small), PREPROCESSING.mean, PREPROCESSING.std)
    logits = model.apply(variables, images)[0]
    wanted = float(SINGLE_LABEL.loss(logits, batch(0)["label"], None).mean())
    whole, found = stepped(), stepped(image_size=8)
    assert float(found[1]["loss"]) == pytest.approx(wanted, rel=1e-3)
    assert float(whole[1]["loss"]) != pytest.approx(wanted, rel=1e-2)
    blended = stepped(image_size=8, **EVERYTHING)[1]
    assert np.isfinite(blended["loss"])


def test_blended_images_are_not_cached():
    model, variables = network()
    rules = {"new": ft.head(), "frozen": ft.rest()}
    groups = {"new": ft.Group(optax.sgd, 0.1), "frozen": ft.FROZEN}
    source = ft.ArraySource(np.zeros((6, SIZE, SIZE, 3), np.uint8), [0, 1, 2, 0, 1, 2])
    data = ft.loaders(source, ft.data.Splits.of(range(6)), PREPROCESSING, batch_size=2)

    def chosen(**changes):
        phase = phase_of(variables["params"], rules, groups, steps=99, **changes)
        return choose(Cache("memory"), model, variables["params"], phase, data)

    # Dropout comes after the cut, and frozen blocks are never dropped.
    assert chosen(dropout=0.5, stochastic_depth=0.5).cut == "head"
    found = chosen(mixup=0.2, cutmix=1.0)
    assert found.cut is None
    assert "nothing is cached, for mixup and cutmix blend images" in found.text
    assert "nothing is cached, for images are made smaller" in chosen(image_size=8).text
    phase = phase_of(variables["params"], cutmix=1.0)
    with pytest.raises(ValueError, match=r"does to them \(cutmix 1.0\), got activations before he"):
        train_step(model, phase, dataclasses.replace(feed(), start="head"))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mixup": -1}, "mixup must be >= 0, got -1"),
        ({"cutmix": float("inf")}, "cutmix must be >= 0, got inf"),
        ({"dropout": 1.0}, r"dropout must be >= 0 and < 1, got 1\.0"),
        ({"stochastic_depth": -0.1}, r"stochastic_depth must be >= 0 and < 1, got -0\.1"),
        ({"image_size": 0}, "image_size must be positive, got 0"),
        ({"accumulate": 0}, "accumulate must be a whole number >= 1, got 0"),
        ({"accumulate": 2.0}, r"accumulate must be a whole number >= 1, got 2\.0"),
        (
            {"steps": 0, "probe": "ridge", "mixup": 0.2, "dropout": 0.1},
            "mixup, dropout must be 0 in a phase that only solves the head",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        ft.Phase(RULES, GROUPS, **{"steps": 5, **changes})


def test_what_does_not_fit_the_task_or_the_batch_is_refused():
    plan = ft.Plan([ft.Phase(RULES, GROUPS, steps=3, cutmix=1.0, accumulate=3)])
    with pytest.raises(ValueError, match="cutmix must be 0 for the task regression, got 1"):
        plan.bind("regression", ("x",), None)
    with pytest.raises(ValueError, match="accumulate must divide the batch size 8, got 3"):
        stepped(accumulate=3)
    source = ft.ArraySource(np.zeros((6, SIZE, SIZE, 3), np.uint8), [0, 1, 2, 0, 1, 2])
    data = ft.loaders(source, ft.data.Splits.of(range(6)), PREPROCESSING, batch_size=2)
    with pytest.raises(ValueError, match="accumulate of phase 'fine-tune' must divide the batch s"):
        check_feed(plan, data)
    larger = ft.Plan([ft.Phase(RULES, GROUPS, steps=3, image_size=SIZE + 1)])
    with pytest.raises(ValueError, match="must be at most that of the batches, 16 px, got 17"):
        check_feed(larger, data)


def test_an_interrupted_run_draws_what_it_would_have_drawn(tmp_path):
    """Cut off at the third batch and resumed: the same bits as never stopped."""
    model, variables = network()
    classifier = ft.Classifier(model, variables, PREPROCESSING, ("dark", "gray", "bright"))
    phase = ft.Phase(RULES, GROUPS, steps=4, accumulate=2, **EVERYTHING)
    plain, whole = feed(validation=False), feed(validation=False).train

    def cut(begin):
        for number, made in enumerate(whole(begin), begin):
            if number == 3:
                raise OSError("power cut")
            yield made

    def fitted(folder, data):
        options = ft.FitOptions(evaluate_every=2)
        plan = ft.Plan([phase])
        return ft.fit(classifier, plan, data, folder, seed=3, resume=True, options=options)

    never = fitted(tmp_path / "never", plain)
    with pytest.raises(OSError, match="power cut"):
        fitted(tmp_path / "cut", dataclasses.replace(plain, train=cut))
    resumed = fitted(tmp_path / "cut", plain)
    for one, other in zip(*map(jax.tree.leaves, (never.variables, resumed.variables)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_blend_is_a_plain_value():
    blend = Blend(jnp.asarray(0.25), jnp.asarray(0.25), jnp.zeros((2, 2, 1), bool))
    images = jnp.ones((1, 2, 2, 1))
    np.testing.assert_allclose(blend.images(images, 5 * images), 4.0)
