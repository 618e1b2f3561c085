"""Training on cached activations is training on images; a cache of anything else is not used."""

from __future__ import annotations

import resource
from dataclasses import replace

import chex
import jax
import numpy as np
import optax
import pytest

import flaxtransfer as ft
from flaxtransfer.data.transforms import evaluation_transform, training_transform
from flaxtransfer.paths import flatten
from flaxtransfer.sharding import make_mesh
from flaxtransfer.training.cached_loader import cached_feed
from flaxtransfer.training.console import read_metrics
from flaxtransfer.training.prefix_cache import Cache, choose, lowest_moving
from tests.support.small import PREPROCESSING, SIZE, batch, network, two_phases


def source(examples: int = 20) -> ft.ArraySource:
    made = batch(0, examples)
    return ft.ArraySource(made["image"], made["label"], ("dark", "gray", "bright"))


def feed(
    *, images: ft.ArraySource | None = None, augment: bool = False, seed: int = 0, size: int = 8
) -> ft.data.DataLoaders:
    """14 training examples, 6 of validation."""
    transform = (training_transform if augment else evaluation_transform)(PREPROCESSING)
    return ft.loaders(
        images or source(),
        ft.data.Splits.of(np.arange(14), np.arange(14, 20)),
        PREPROCESSING,
        batch_size=size,
        transform=transform,
        seed=seed,
    )


def one_phase(part: str, steps: int = 6, **changes: object) -> ft.Plan:
    adam = ft.Group(optax.adamw, 3e-3, weight_decay=0.1)
    phase = ft.Phase(
        {"moving": ft.masks.parse(part), "still": ft.rest()},
        {"moving": adam, "still": ft.FROZEN},
        steps=steps,
        **changes,
    )
    return ft.Plan([phase])


def chosen(plan: ft.Plan, cache: Cache, data: ft.data.DataLoaders | None = None):
    model, variables = network()
    data = data or feed()
    phase = plan.resolve(variables["params"], data.steps_per_epoch).phases[0]
    return choose(cache, model, variables["params"], phase, data)


@pytest.mark.parametrize(
    ("part", "where"),
    [
        ("head()", "memory"),
        ("head() | stage(4)", "disk"),
        pytest.param("head() | stages(1, 2, 3, 4)", "memory", marks=pytest.mark.slow),
    ],
)
def test_cached_equals_uncached(tmp_path, part, where):
    model, variables = network()
    plan = one_phase(part)
    fitted = [
        ft.fit(
            ft.Classifier(model, variables, PREPROCESSING),
            plan,
            feed(),
            tmp_path / name,
            cache=cache,
        )
        for name, cache in (("plain", None), ("cached", Cache(where)))
    ]
    plain, cached = (flatten(one.variables) for one in fitted)
    for path, leaf in plain.items():
        np.testing.assert_allclose(cached[path], leaf, rtol=2e-4, atol=2e-6, err_msg=path)
    assert fitted[1].validation.loss == pytest.approx(fitted[0].validation.loss, rel=1e-4)
    rows = {row["kind"] for row in read_metrics(tmp_path / "cached")}
    assert "cache" in rows
    assert not (tmp_path / "cached" / "features").exists()


@pytest.mark.slow
def test_a_lower_cut_is_cached_anew(tmp_path):
    model, variables = network()
    plan = two_phases(variables["params"])
    plain = ft.fit(ft.Classifier(model, variables, PREPROCESSING), plan, feed(), tmp_path / "plain")
    cached = ft.fit(
        ft.Classifier(model, variables, PREPROCESSING),
        plan,
        feed(),
        tmp_path / "cached",
        cache=Cache(),
    )
    chex.assert_trees_all_close(cached.variables, plain.variables, rtol=5e-4, atol=5e-6)
    cuts = [r["cut"] for r in read_metrics(tmp_path / "cached") if r["kind"] == "cache"]
    assert cuts == ["head", "layer1"]


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path):
    """In the middle of a phase the cache is made again, and of the same numbers."""
    model, variables = network()
    plan = one_phase("head() | stage(4)", steps=8)
    settings = {"cache": Cache(views=2), "options": ft.FitOptions(evaluate_every=2)}
    whole = ft.fit(
        ft.Classifier(model, variables, PREPROCESSING),
        plan,
        feed(augment=True),
        tmp_path / "whole",
        **settings,
    )
    with pytest.raises(RuntimeError, match="stop here"):
        ft.fit(
            ft.Classifier(model, variables, PREPROCESSING),
            plan,
            _stopping_feed(5),
            tmp_path / "cut",
            **settings,
        )
    resumed = ft.fit(
        ft.Classifier(model, variables, PREPROCESSING),
        plan,
        feed(augment=True),
        tmp_path / "cut",
        resume=True,
        **settings,
    )
    chex.assert_trees_all_equal(resumed.variables, whole.variables)


def _stopping_feed(step: int) -> ft.data.DataLoaders:
    data = feed(augment=True)

    def rows(k: int):
        if k == step:
            raise RuntimeError("stop here")
        return data.examples.rows(k)

    return replace(data, examples=replace(data.examples, rows=rows))


@pytest.mark.slow
def test_versions_are_those_of_the_augmentation(tmp_path):
    """With as many versions as passes, each pass reads its own; the pixels are the transform's."""
    data = feed(augment=True)
    model, variables = network()
    choice = chosen(one_phase("head()", steps=60), Cache(views=3), data)
    cached = cached_feed(choice, model, variables, data, make_mesh(), tmp_path).feed
    batches = iter(cached.train(0))
    for step in range(6):
        rows, passes = data.examples.rows(step)
        read = next(batches)
        np.testing.assert_array_equal(read["label"], data.examples.labels[rows])
        for k, (row, number) in enumerate(zip(rows, passes % 3, strict=True)):
            images = np.concatenate([b["image"] for b in data.examples.view(int(number))])
            normal = (images[row : row + 1] / 255.0 - 0.5) / 0.25
            wanted, _ = model.apply(
                variables, normal.astype(np.float32), norm="running", stop="head"
            )
            np.testing.assert_allclose(read["image"][k], wanted[0], rtol=1e-4, atol=1e-5)


class TestChoice:
    def test_what_it_says(self):
        choice = chosen(one_phase("head()", steps=14), Cache())
        assert choice.cut == "head"
        # 20 images of 32 float32 numbers, 14 steps of 8 over 14 training images.
        assert choice.nbytes == 20 * 32 * 4
        assert choice.text == (
            "phase 'fine-tune': 1 version of 14 images and 6 of validation before head, 32 numbers "
            "each, are cached in memory as float32 (2.56 kB): breaks even after 1 pass of 8"
        )

    def test_too_short(self):
        choice = chosen(one_phase("head()", steps=7), Cache(views=4), feed(augment=True))
        assert choice.cut is None
        assert "pays after 4 passes, and the phase has 4" in choice.text

    def test_insisting(self):
        assert chosen(one_phase("head()", steps=1), Cache("memory")).cut == "head"

    @pytest.mark.parametrize(
        ("memory", "disk", "place", "dtype"),
        [
            (2560, 0, "memory", "float32"),
            (2559, 2560, "disk", "float32"),
            (1280, 0, "memory", "float16"),
            (0, 1280, "disk", "float16"),
        ],
    )
    def test_budgets(self, memory, disk, place, dtype):
        choice = chosen(one_phase("head()", steps=14), Cache(memory=memory, disk=disk))
        assert (choice.where, choice.dtype) == (place, dtype)

    def test_beyond_the_budgets(self):
        choice = chosen(one_phase("head()", steps=14), Cache(memory=9, disk=8))
        assert choice.cut is None
        assert "1.28 kB are more than the budget of 9 bytes in memory and 8 bytes" in choice.text

    def test_the_stem_moves(self):
        choice = chosen(one_phase("everything()"), Cache())
        assert choice.cut is None
        assert "from its input on" in choice.text

    def test_batch_statistics_below(self):
        """A frozen BatchNorm on batch statistics gives an image other activations in each batch."""
        plan = one_phase("head()", steps=14, norm={ft.stage(3): "batch"})
        assert chosen(plan, Cache()).cut == "layer3"

    def test_a_feed_without_examples(self):
        choice = chosen(one_phase("head()"), Cache(), replace(feed(), examples=None))
        assert choice.cut is None
        assert "Feed.examples" in choice.text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"where": "ram"}, "where must be one of auto, memory, disk, off, got 'ram'"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32, float16, got 'int8'"),
        ({"views": 0}, "views must be 1 or more, got 0"),
        ({"memory": -1}, "memory must be 0 bytes or more, got -1"),
    ],
)
def test_settings_out_of_range(arguments, text):
    with pytest.raises(ValueError, match="cache: ") as error:
        Cache(**arguments)
    assert text in str(error.value)


class TestOnDisk:
    """A folder shared by runs: found again as it is, and made anew when anything has changed."""

    def cache(self, folder, data=None, variables=None, cut="head()", **changes):
        model, known = network()
        data = data or feed(augment=True)
        said: list[str] = []
        choice = chosen(one_phase(cut, steps=99), Cache("disk", views=2, **changes), data)
        cached = cached_feed(
            choice, model, variables or known, data, make_mesh(), folder, said.append
        )
        return cached, "\n".join(said)

    def test_found_again(self, tmp_path):
        first, _ = self.cache(tmp_path)
        again, said = self.cache(tmp_path)
        assert (first.facts["found"], again.facts["found"]) == (0, 2)
        assert said == ""
        assert "found in" in again.text
        assert "34 activations" in again.text  # Two versions of 14, and 6 of validation.
        for one, other in zip(first.feed.validation(), again.feed.validation(), strict=True):
            np.testing.assert_array_equal(one["image"], other["image"])

    def test_a_changed_pixel(self, tmp_path):
        self.cache(tmp_path)
        images = source().images.copy()
        images[3, 0, 0, 0] ^= 1
        changed = ft.ArraySource(images, source().labels(), source().class_names)
        cached, said = self.cache(tmp_path, feed(images=changed, augment=True))
        assert cached.facts["found"] == 1  # Validation is what it was.
        assert "nearest differs in images" in said

    def test_a_changed_weight(self, tmp_path):
        self.cache(tmp_path)
        _, variables = network()
        kernel = variables["params"]["layer2"]["0"]["conv1"]["kernel"]
        variables["params"]["layer2"]["0"]["conv1"]["kernel"] = kernel.at[0, 0, 0, 0].add(1e-6)
        cached, said = self.cache(tmp_path, variables=variables)
        assert cached.facts["found"] == 0
        assert "nearest differs in weights" in said

    def test_changed_statistics(self, tmp_path):
        self.cache(tmp_path)
        _, variables = network()
        mean = variables["batch_stats"]["bn1"]["mean"]
        variables["batch_stats"]["bn1"]["mean"] = mean + 1e-6
        assert "differs in weights" in self.cache(tmp_path, variables=variables)[1]

    def test_a_changed_weight_above_the_cut(self, tmp_path):
        self.cache(tmp_path)
        _, variables = network()
        variables["params"]["fc"]["bias"] = variables["params"]["fc"]["bias"] + 1
        assert self.cache(tmp_path, variables=variables)[0].facts["found"] == 2

    def test_another_seed_of_the_augmentation(self, tmp_path):
        self.cache(tmp_path)
        cached, said = self.cache(tmp_path, feed(augment=True, seed=1))
        assert cached.facts["found"] == 1
        assert "nearest differs in augmentation" in said

    def test_other_storage_and_another_cut(self, tmp_path):
        self.cache(tmp_path)
        assert "differs in storage" in self.cache(tmp_path, dtype="float16")[1]
        assert self.cache(tmp_path, cut="head() | stage(4)")[0].facts["found"] == 0

    def test_damage(self, tmp_path):
        self.cache(tmp_path)
        for file in tmp_path.glob("*/features.npy"):
            file.write_bytes(file.read_bytes()[:-4])
        cached, said = self.cache(tmp_path)
        assert cached.facts["found"] == 0
        assert said.count("is damaged") == 2

    def test_a_disk_that_fills(self, tmp_path):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            cached, said = self.cache(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert cached is None
        assert "File too large" in said
        assert "training goes on without a cache" in said
        assert not list(tmp_path.iterdir())

    def test_no_folder_to_be_had(self, tmp_path):
        model, variables = network()
        (tmp_path / "file").write_text("")
        plan = one_phase("head()", steps=6)
        cache = Cache("disk", folder=tmp_path / "file")
        fitted = ft.fit(
            ft.Classifier(model, variables, PREPROCESSING),
            plan,
            feed(),
            tmp_path / "run",
            cache=cache,
        )
        plain = ft.fit(
            ft.Classifier(model, variables, PREPROCESSING), plan, feed(), tmp_path / "plain"
        )
        for path, leaf in flatten(plain.variables).items():
            np.testing.assert_array_equal(flatten(fitted.variables)[path], leaf)


def test_activations_beyond_float16(tmp_path):
    model, variables = network()
    scale = variables["params"]["layer4"]["0"]["bn2"]["scale"]
    variables["params"]["layer4"]["0"]["bn2"]["scale"] = scale * 1e6
    said: list[str] = []
    choice = chosen(one_phase("head()", steps=14), Cache(dtype="float16"))
    cached = cached_feed(choice, model, variables, feed(), make_mesh(), tmp_path, said.append)
    assert cached.facts["dtype"] == "float32"
    assert "float32 instead" in said[-2]
    narrow = replace(choice, budget=choice.nbytes)
    assert cached_feed(narrow, model, variables, feed(), make_mesh(), tmp_path, said.append) is None
    assert "float32 needs" in said[-1]


def test_activations_that_are_not_finite(tmp_path):
    model, variables = network()
    variables["params"]["conv1"]["kernel"] = variables["params"]["conv1"]["kernel"] * np.nan
    with pytest.raises(ValueError, match="activations hold numbers that are not finite"):
        ft.fit(
            ft.Classifier(model, variables, PREPROCESSING),
            one_phase("head()"),
            feed(),
            tmp_path / "run",
            cache=Cache(),
        )


def test_the_lowest_moving_segment():
    model, variables = network()
    params = variables["params"]
    cases = {
        ("fc/bias",): "head",
        ("layer4/0/conv1/kernel", "fc/bias"): "layer4",
        ("layer1/0/bn1/scale",): "layer1",
        ("conv1/kernel", "fc/bias"): None,
        (): None,
    }
    for moving, wanted in cases.items():
        assert lowest_moving(model.segments, params, moving, "running") == wanted
    assert lowest_moving(model.segments, params, ["fc/bias"], "batch") is None


def test_the_cached_step_has_the_flops_of_the_suffix():
    """Compiled cost of a step on activations before layer4, against one on images."""
    from flaxtransfer.training.step import start, train_step

    model, variables = network()
    data = feed()
    phase = one_phase("head()").resolve(variables["params"], 1).phases[0]
    state = start(variables, phase, 0)
    flops = []
    for entry, shape, dtype in ((None, (8, SIZE, SIZE, 3), np.uint8), ("head", (8, 32), "float32")):
        step = train_step(model, phase, replace(data, start=entry))
        inputs = {"image": np.zeros(shape, dtype), "label": np.zeros(8, np.int32)}
        cost = jax.jit(step).lower(state, inputs).compile().cost_analysis()
        flops.append(cost["flops"])
    assert flops[1] < 0.02 * flops[0]
