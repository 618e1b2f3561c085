"""Images in memory: what is remembered, how much, and that nothing else changes."""

import pickle

import numpy as np
import pytest

from flaxtransfer.data import HorizontalFlip, ResizeCrop, Source
from flaxtransfer.data.loader import cached


class Counting:
    """Ten images of 16 bytes that count how often each was read."""

    class_names = ("a", "b")

    def __init__(self):
        self.reads = [0] * 10

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.reads[index] += 1
        return {"image": np.full((4, 4, 1), index, np.uint8), "label": index % 2}

    def labels(self):
        return np.arange(10) % 2


def test_an_image_is_read_once_and_transformed_once():
    source = Counting()
    calls = []

    def transform(image, rng):
        calls.append(rng.random())
        return image + 1

    memory = cached(source, transform)
    assert isinstance(memory, Source)
    for _ in range(3):
        assert [int(memory[i]["image"][0, 0, 0]) for i in range(10)] == list(range(1, 11))
        assert [memory[i]["label"] for i in range(10)] == [0, 1] * 5
    assert source.reads == [1] * 10
    assert len(calls) == 10
    assert len(set(calls)) == 1
    assert len(memory) == 10
    assert memory.class_names == ("a", "b")
    assert memory.labels().tolist() == [0, 1] * 5


def test_the_budget_is_never_exceeded_and_the_rest_still_comes():
    source = Counting()
    memory = cached(source, budget=16 * 3 + 15)
    for _ in range(2):
        assert [int(memory[i]["image"][0, 0, 0]) for i in range(10)] == list(range(10))
    assert memory.nbytes == 48
    assert source.reads == [1] * 3 + [2] * 7
    nothing = cached(source, budget=0)
    assert nothing[0]["image"].shape == (4, 4, 1)
    assert nothing.nbytes == 0


def test_a_small_transformed_image_is_what_counts():
    memory = cached(Counting(), ResizeCrop(2, 2), budget=40)
    for index in range(10):
        memory[index]
    assert memory.nbytes == 40


def test_what_is_remembered_cannot_be_written_on():
    memory = cached(Counting())
    memory[0]
    with pytest.raises(ValueError, match="read-only"):
        memory[0]["image"][:] = 9
    memory[0]["label"] = 5
    assert memory[0]["label"] == 0


def test_a_worker_starts_with_an_empty_memory():
    memory = cached(Counting())
    memory[3]
    again = pickle.loads(pickle.dumps(memory))
    assert (memory.nbytes, again.nbytes) == (16, 0)
    assert again[3]["image"][0, 0, 0] == 3
    assert again.nbytes == 16


def test_positions_outside_and_senseless_settings_are_refused():
    with pytest.raises(IndexError, match="example 10 does not exist; there are 10"):
        cached(Counting())[10]
    with pytest.raises(
        ValueError, match=r"must be deterministic, got HorizontalFlip\(probability=0\.5\)"
    ):
        cached(Counting(), HorizontalFlip())
    with pytest.raises(ValueError, match="budget must be >= 0 bytes, got -1"):
        cached(Counting(), budget=-1)
