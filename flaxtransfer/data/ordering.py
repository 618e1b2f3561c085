"""Which element stands where: the order of an epoch, and the rows of a shard."""

from __future__ import annotations

import functools

import grain
import numpy as np


class Shuffled(grain.MapDataset):
    """Each epoch in an order of its own, a pure function of seed and epoch.

    Grain's own shuffle computes every position alone, by walking a cycle of 65536 until it meets
    one that exists: for forty examples, a millisecond each. A whole permutation costs nothing for
    small sets, and for a million examples a tenth of a second an epoch.
    """

    def __init__(self, parent: grain.MapDataset, seed: int) -> None:
        super().__init__(parent)
        self._seed = seed

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index):  # the signature is grain's
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, len(self))
        return self._parent[int(permutation(self._seed, epoch, len(self))[place])]


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of an epoch, int64 ``[count]``.

    >>> sorted(permutation(0, 1, 5).tolist())
    [0, 1, 2, 3, 4]
    """
    # Raw generator output, unlike ``permutation``, is the same in every release of NumPy.
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False  # shared by all who ask again
    return order


def seeds(seed: int) -> tuple[int, int]:
    """Of the order and of the draws: hashed, so that both, and neighbouring seeds, are independent.

    >>> len(set(seeds(0)) | set(seeds(1)))
    4
    """
    order, draws = np.random.SeedSequence(seed).generate_state(2).tolist()
    return order, draws


def training_rows(
    count: int, *, batch_size: int, seed: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which examples batch ``step`` of ``train_batches`` is made of, without making it.

    Returns:
      For each row its example, as a place in the indices that training was given, and the number
      of the pass over them; both int64 ``[batch_size]``.

    >>> rows, passes = training_rows(3, batch_size=4, seed=0, step=0)
    >>> sorted(rows[:3].tolist()), passes.tolist()
    ([0, 1, 2], [0, 0, 0, 1])
    """
    passes, places = np.divmod(step * batch_size + np.arange(batch_size), count)
    order, _ = seeds(seed)
    rows = [permutation(order, int(n), count)[places[passes == n]] for n in np.unique(passes)]
    return np.concatenate(rows), passes


class Rows(grain.MapDataset):
    """Of every ``batch_size`` elements those that belong to one shard, in order."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, shard: tuple[int, int]) -> None:
        super().__init__(parent)
        self._whole = batch_size
        self._part = batch_size // shard[1]
        self._first = shard[0] * self._part

    def __len__(self) -> int:
        return len(self._parent) // self._whole * self._part

    def __getitem__(self, index):  # the signature is grain's
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self._part)
        return self._parent[batch * self._whole + self._first + row]
