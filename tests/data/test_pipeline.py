"""Batches are pure functions of seed and step; evaluation sees everything once."""

import hashlib
import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flaxtransfer.data
from flaxtransfer.data import (
    ArraySource,
    ImageError,
    RandomAffine,
    ResizeCrop,
    batches_in_order,
    evaluation_transform,
    train_batches,
    train_dataset,
    training_transform,
)
from flaxtransfer.data.pipeline import Order, _closing, permutation, seeds, training_rows
from flaxtransfer.weights import Preprocessing

PREPROCESSING = Preprocessing((0.5,), (0.25,), size=12, resize=12, interpolation="bilinear")
AUGMENT = training_transform(PREPROCESSING, flip=True, jitter=True)
PLAIN = evaluation_transform(PREPROCESSING)
SOURCE = ArraySource(
    np.random.default_rng(0).integers(0, 256, (23, 8, 8), dtype=np.uint8), np.arange(23) % 5
)


def train(count, **options):
    settings = {"batch_size": 8, "transform": AUGMENT, "seed": 0, "num_threads": 0} | options
    batches = train_batches(SOURCE, settings.pop("indices", range(23)), **settings)
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def digest(batches):
    content = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            content.update(f"{key} {batch[key].dtype} {batch[key].shape}".encode())
            content.update(np.ascontiguousarray(batch[key]).tobytes())
    return content.hexdigest()


def ids(batches):
    return np.concatenate([batch["index"] for batch in batches]).tolist()


def test_a_batch_has_images_labels_and_positions():
    batch = train(1)[0]
    assert {key: (value.dtype.name, value.shape) for key, value in batch.items()} == {
        "image": ("uint8", (8, 12, 12, 3)),
        "label": ("int32", (8,)),
        "index": ("int64", (8,)),
    }
    np.testing.assert_array_equal(batch["label"], SOURCE.labels()[batch["index"]])


def test_images_belong_to_their_positions():
    batch = train(1, transform=PLAIN)[0]
    for image, index in zip(batch["image"], batch["index"], strict=True):
        np.testing.assert_array_equal(image, PLAIN(SOURCE[index]["image"], None))


def test_every_epoch_is_a_permutation_of_its_own_and_batches_cross_its_end():
    seen = ids(train(23))  # 23 batches of 8: exactly 8 epochs of 23
    epochs = [tuple(seen[start : start + 23]) for start in range(0, len(seen), 23)]
    assert len(epochs) == 8
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len(set(epochs)) == 8


def test_only_the_given_positions_are_used_even_if_they_are_fewer_than_a_batch():
    seen = ids(train(3, indices=[4, 11, 20]))
    assert len(seen) == 24
    assert all(sorted(seen[i : i + 3]) == [4, 11, 20] for i in range(0, 24, 3))
    assert ids(train(1, indices=[7])) == [7] * 8
    assert sorted(ids(train(1, indices=[7, 7, 7, 2], batch_size=4))) == [2, 7, 7, 7]


def test_augmentation_differs_between_epochs_and_neighbors():
    batch = train(1, indices=[7])[0]
    assert len({image.tobytes() for image in batch["image"]}) == 8


def test_seeds_give_other_orders_and_other_augmentations():
    epochs = [
        tuple(batch["index"])
        for seed in (0, 1, 2, 2**40)
        for batch in train(2, seed=seed, batch_size=23, transform=PLAIN)
    ]
    # Of each seed and epoch: one seed's second epoch is not the next seed's first either.
    assert len(set(epochs)) == 8
    same_example = [train(1, seed=seed, indices=[3])[0]["image"] for seed in (0, 1)]
    assert (same_example[0] != same_example[1]).any()


def test_every_order_is_as_likely_as_another():
    # 6 orders of 3 examples, 3000 epochs: each about 500 times, standard deviation 20.4.
    orders = [tuple(permutation(seed, epoch, 3)) for seed in range(3) for epoch in range(1000)]
    counts = [orders.count(order) for order in itertools.permutations(range(3))]
    assert sum(counts) == 3000
    assert max(abs(count - 500) for count in counts) < 5 * 20.4


@settings(max_examples=60)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    batch=st.integers(1, 9),
    step=st.integers(0, 30),
    seed=st.integers(0, 3),
)
def test_balanced_epochs_have_each_class_as_often_as_every_other(labels, batch, step, seed):
    labels = np.array(labels)
    present, members = np.unique(labels, return_counts=True)
    order = Order(len(labels), seed, labels)
    epochs = [order(epoch) for epoch in range(len(present))]
    for rows, _ in epochs:
        assert len(rows) == len(labels)
        counts = [int((labels[rows] == one).sum()) for one in present]
        assert max(counts) - min(counts) <= 1
    rows, seen = (np.concatenate(each) for each in zip(*epochs, strict=True))
    assert {int((labels[rows] == one).sum()) for one in present} == {len(labels)}
    # Within a class all come in turn, and it is known how often each was there before.
    times = np.bincount(rows, minlength=len(labels))
    for one, count in zip(present, members, strict=True):
        own = times[labels == one]
        assert own.max() - own.min() <= 1
        assert own.sum() == len(labels)
        assert seen[labels[rows] == one].max() == -(-len(labels) // count) - 1
    assert len(set(zip(rows.tolist(), seen.tolist(), strict=True))) == len(rows)
    # Any batch can be asked for alone.
    whole = Order(len(labels), seeds(seed)[0], labels)
    found, _ = training_rows(len(labels), batch_size=batch, seed=seed, step=step, order=whole)
    places = step * batch + np.arange(batch)
    expected = [whole(int(n // len(labels)))[0][n % len(labels)] for n in places]
    assert found.tolist() == expected


@pytest.mark.parametrize("classes", [None, np.arange(23) % 2])
def test_an_epoch_is_put_in_order_once_and_not_for_each_example(monkeypatch, classes):
    made = []
    real = Order._made
    monkeypatch.setattr(Order, "_made", lambda self, epoch: made.append(epoch) or real(self, epoch))
    order = Order(23, 0, classes)
    for epoch in (0, 1, 0, 1, 2, 1, 2):  # Threads do not come in turn at the end of an epoch.
        order(epoch)
    assert made == [0, 1, 2]
    assert len(order._kept) <= 4


def test_balanced_batches_are_those_rows_in_any_shards():
    labels = SOURCE.labels() > 3
    options = {"classes": labels.astype(int), "transform": AUGMENT}
    whole = train(6, **options)
    order = Order(23, seeds(0)[0], options["classes"])
    for step, batch in enumerate(whole):
        rows, _ = training_rows(23, batch_size=8, seed=0, step=step, order=order)
        assert batch["index"].tolist() == rows.tolist()
    parts = [train(6, shard=(number, 2), **options) for number in range(2)]
    both = [np.concatenate([one["image"] for one in pair]) for pair in zip(*parts, strict=True)]
    np.testing.assert_array_equal(np.stack(both), np.stack([batch["image"] for batch in whole]))
    assert digest(train(2, start_step=4, **options)) == digest(whole[4:])


def test_the_order_does_not_depend_on_augmentation_or_batch_size():
    wanted = ids(train(6))
    assert ids(train(6, transform=PLAIN)) == wanted
    assert ids(train(12, batch_size=4)) == wanted
    first = np.concatenate([batch["image"] for batch in train(12, batch_size=4)])
    np.testing.assert_array_equal(first, np.concatenate([b["image"] for b in train(6)]))


@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_starting_at_a_step_continues_bit_for_bit(num_threads):
    whole = train(9, num_threads=num_threads)
    assert digest(whole) == digest(train(9))
    for start in (0, 1, 5):
        assert digest(train(4, start_step=start, num_threads=num_threads)) == digest(
            whole[start : start + 4]
        )


def test_any_batch_can_be_asked_for_alone():
    batches = train_dataset(SOURCE, range(23), batch_size=8, transform=AUGMENT, seed=0)
    assert digest([batches[step] for step in (4, 0, 2)]) == digest(
        [train(5)[step] for step in (4, 0, 2)]
    )
    far = 10**9
    assert digest([batches[far]]) == digest(train(1, start_step=far))


KILLED = """
import os, signal, sys
sys.path[:0] = {folders!r}
import test_pipeline as t
if __name__ == "__main__":
    options = {{"batch_size": 8, "transform": t.AUGMENT, "seed": 0, "workers": 2}}
    batches = t.train_batches(t.SOURCE, range(23), **options)
    next(batches)
    own = os.getpid()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if open(f"/proc/{{pid}}/stat").read().rpartition(")")[2].split()[1] == str(own):
            print(pid, flush=True)
    os.kill(own, signal.SIGKILL)
"""


@pytest.mark.once
def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "killed.py"
    here, package = Path(__file__).parent, Path(flaxtransfer.data.__file__).parents[2]
    script.write_text(KILLED.format(folders=[str(here), str(package)]))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == -9
    children = done.stdout.split()
    assert len(children) >= 2
    limit = time.monotonic() + 30
    while any(map(alive, children)) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not list(filter(alive, children))


def alive(pid):
    """Whether a process runs; one that has ended may wait for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


RESUME = """
import sys
sys.path[:0] = {folders!r}
import test_pipeline as t
if __name__ == "__main__":
    print(t.digest(t.train(4, start_step=3, **{options!r})))
"""


def in_a_fresh_process(tmp_path, **options):
    script = tmp_path / "resume.py"
    here = Path(__file__).parent
    package = Path(flaxtransfer.data.__file__).parents[2]
    script.write_text(RESUME.format(folders=[str(here), str(package)], options=options))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()


def test_a_fresh_process_continues_bit_for_bit(tmp_path):
    assert in_a_fresh_process(tmp_path, num_threads=2) == digest(train(7)[3:])


@pytest.mark.slow
def test_worker_processes_make_the_same_batches(tmp_path):
    assert in_a_fresh_process(tmp_path, workers=2) == digest(train(7)[3:])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shards_in_order_are_the_unsharded_batch(count):
    shards = [train(7, shard=(index, count)) for index in range(count)]
    for whole, parts in zip(train(7), zip(*shards, strict=True), strict=True):
        joined = {key: np.concatenate([part[key] for part in parts]) for key in whole}
        assert digest([joined]) == digest([whole])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 23),
    st.sampled_from([1, 2, 3, 4]),
    st.integers(1, 4),
    st.integers(0, 2**62),
    st.integers(0, 40),
)
def test_any_shard_of_any_step_is_its_rows(examples, count, rows, seed, step):
    options = {"batch_size": count * rows, "transform": AUGMENT, "seed": seed}
    whole = train_dataset(SOURCE, range(examples), **options)[step]
    for index in range(count):
        part = train_dataset(SOURCE, range(examples), **options, shard=(index, count))[step]
        mine = slice(index * rows, (index + 1) * rows)
        assert digest([part]) == digest([{key: value[mine] for key, value in whole.items()}])


def test_a_few_small_images_come_faster_than_two_thousand_a_second(digits):
    # Five labels a class: the case in which Grain's own shuffle takes over a millisecond each.
    weights = Preprocessing((0.5,), (0.25,), size=48, resize=48, interpolation="bilinear")
    batches = train_dataset(
        digits, range(50), batch_size=64, transform=training_transform(weights), seed=0
    )
    seconds = []
    for step in range(15):
        start = time.process_time()  # of this process: a busy machine does not count
        batches[step]
        seconds.append(time.process_time() - start)
    assert min(seconds) < 64 / 2000


class Watched:
    """A source that counts reads and fails where it is told to."""

    class_names = ("a", "b")

    def __init__(self, fails=()):
        self.reads = 0
        self.fails = fails

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        self.reads += 1
        if index in self.fails:
            raise ImageError(f"scan{index}.png: the image cannot be decoded")
        return {"image": np.zeros((12, 12, 3), np.uint8), "label": 0}

    def labels(self):
        return np.zeros(1000, np.int64)


def test_no_more_batches_are_made_ahead_than_there_are_threads():
    source = Watched()
    batches = train_batches(
        source, range(1000), batch_size=10, transform=PLAIN, seed=0, num_threads=2
    )
    for _ in range(5):
        next(batches)
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join(0.2)
    # 5 batches taken, at most 2 waiting or under way, and the example that gave the shape.
    assert source.reads <= (5 + 2) * 10 + 1
    batches.close()


def test_closing_ends_the_threads():
    batches = train_batches(
        Watched(), range(1000), batch_size=10, transform=PLAIN, seed=0, num_threads=3
    )
    next(batches)
    batches.close()
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join(5)
            assert not thread.is_alive()


@pytest.mark.parametrize("num_threads", [0, 2])
def test_an_unreadable_image_surfaces_with_its_name(num_threads):
    batches = train_batches(
        Watched(fails={3}),
        [1, 2, 3, 4],
        batch_size=4,
        transform=PLAIN,
        seed=0,
        num_threads=num_threads,
    )
    with pytest.raises(ImageError, match=r"scan3\.png: the image cannot be decoded"):
        next(batches)
    batches.close()


def evaluate(**options):
    settings = {"batch_size": 8, "transform": PLAIN, "num_threads": 0} | options
    return list(batches_in_order(SOURCE, settings.pop("indices", range(23)), **settings))


@pytest.mark.parametrize("num_threads", [0, 3])
def test_evaluation_sees_every_example_once_in_order(num_threads):
    batches = evaluate(num_threads=num_threads)
    assert {key: (v.dtype.name, v.shape) for key, v in batches[-1].items()} == {
        "image": ("uint8", (8, 12, 12, 3)),
        "label": ("int32", (8,)),
        "index": ("int64", (8,)),
        "weight": ("float32", (8,)),
    }
    assert ids(batches) == [*range(23), -1]
    weight = np.concatenate([batch["weight"] for batch in batches])
    assert weight.tolist() == [1.0] * 23 + [0.0]
    assert not batches[-1]["image"][-1].any()
    np.testing.assert_array_equal(batches[1]["image"][2], PLAIN(SOURCE[10]["image"], None))


@given(st.lists(st.integers(0, 22), min_size=1, max_size=30), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_the_weights_count_the_examples(indices, batch_size):
    batches = evaluate(indices=indices, batch_size=batch_size)
    assert sum(batch["weight"].sum() for batch in batches) == len(indices)
    assert [i for i in ids(batches) if i >= 0] == indices
    assert all(len(batch["label"]) == batch_size for batch in batches)


@pytest.mark.parametrize("count", [2, 4])
def test_shards_of_an_evaluation_have_equally_many_batches(count):
    shards = [evaluate(shard=(index, count)) for index in range(count)]
    for whole, parts in zip(evaluate(), zip(*shards, strict=True), strict=True):
        joined = {key: np.concatenate([part[key] for part in parts]) for key in whole}
        assert digest([joined]) == digest([whole])


def test_evaluation_without_a_transform_takes_images_as_they_are():
    batch = evaluate(transform=None)[0]
    np.testing.assert_array_equal(batch["image"][3], SOURCE[3]["image"])


def test_a_callable_that_draws_unasked_still_gives_the_same_evaluation():
    def noisy(image, rng):
        return image ^ rng.integers(0, 256, image.shape, dtype=np.uint8)

    assert digest(evaluate(transform=noisy)) == digest(evaluate(transform=noisy, num_threads=2))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"indices": []}, r"indices must be one or more positions, got shape \(0,\)"),
        ({"indices": [0, 23]}, r"in 0 \.\. 22 \(the source has 23 examples\), got 0 \.\. 23"),
        ({"indices": [-1]}, r"in 0 \.\. 22 \(the source has 23 examples\), got -1 \.\. -1"),
        ({"indices": [0.5]}, "indices must be integers, got float64"),
        (
            {"shard": (2, 2)},
            r"shard must be \(index, count\) with 0 <= index < count, got \(2, 2\)",
        ),
        ({"shard": (0, 0)}, r"shard must be .*, got \(0, 0\)"),
        (
            {"shard": (0, 3)},
            "batch_size must be a multiple of the 3 shards, got 8; the next one is 9",
        ),
        ({"num_threads": -1}, "num_threads must be >= 0, got -1"),
    ],
)
def test_numbers_out_of_range_are_refused_when_asked(options, text):
    with pytest.raises(ValueError, match=text):
        train(0, **options)
    with pytest.raises(ValueError, match=text):
        evaluate(**options)


def test_all_that_is_out_of_range_is_said_at_once():
    text = "batch_size must .* got -2; seed .* got -1; start_step .* got -5; workers .* got -1"
    with pytest.raises(ValueError, match=text):
        train(0, batch_size=-2, seed=-1, start_step=-5, workers=-1)


def test_evaluation_refuses_random_transforms():
    with pytest.raises(ValueError, match=r"must be deterministic, got RandomAffine\("):
        evaluate(transform=RandomAffine(12, 12))


def test_a_transform_that_returns_floats_is_told_where_normalization_happens():
    text = r"must return uint8 .*, got float64 \[8, 8, 1\] from .*normalized on the device"
    for function in (train, evaluate):
        with pytest.raises(TypeError, match=text):
            function(*([0] if function is train else []), transform=lambda image, rng: image / 255)


def test_images_of_different_sizes_are_named():
    class Sizes(Watched):
        def __getitem__(self, index):
            return {"image": np.zeros((12, 12 + index, 3), np.uint8), "label": 0}

    batches = batches_in_order(Sizes(), [0, 5], batch_size=2, num_threads=0)
    text = r"\[12, 17, 3\] for example 5 and \[12, 12, 3\] for the first; give a transform"
    with pytest.raises(ValueError, match=text):
        next(batches)
    batches = batches_in_order(
        Sizes(), [0, 5], batch_size=2, transform=lambda image, rng: image, num_threads=0
    )
    with pytest.raises(ValueError, match=r"example 5 .* keeps different sizes"):
        next(batches)
    assert (
        len(list(batches_in_order(Sizes(), [0, 5], batch_size=2, transform=ResizeCrop(9, 9)))) == 1
    )


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (
            "Worker process was terminated unexpectedly with exit code -9. Search the logs above.",
            ChildProcessError,
            r"a process that decodes images \(--workers\) has ended with code -9.* use fewer",
        ),
        ("another one", RuntimeError, "another one"),
    ],
)
def test_a_worker_that_was_killed_is_said_in_one_line(error, kind, text):
    closed = []

    class Killed:
        def __iter__(self):
            return self

        def __next__(self):
            raise RuntimeError(error)

        def close(self):
            closed.append(True)

    with pytest.raises(kind, match=text):
        next(_closing(Killed()))
    assert closed == [True]
