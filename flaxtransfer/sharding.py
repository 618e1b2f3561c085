"""Where arrays live: a mesh of devices, the batch cut over it, everything else on all of it.

One program runs on one device, on the eight of one machine, and on several machines: only the
mesh differs. The compiler inserts the sums over devices where a mean over the batch needs them,
so that a batch statistic is that of the whole batch and not of one device's share.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flaxtransfer.types import PyTree


def make_mesh(devices: Sequence[jax.Device] | None = None, *, axis: str = "data") -> Mesh:
    """A mesh with one axis: the devices over which a batch is cut.

    Args:
      devices: those to use, in this order; all devices of all processes when None, in the order
        that suits their connections.
      axis: the name of the axis.

    Returns:
      A mesh whose axis is of the type ``Auto``: shardings inside a compiled function are the
      compiler's to choose. jax's own default has become ``Explicit``, with which ordinary code,
      losses of optax among it, no longer compiles on a batch that is cut.

    Raises:
      ValueError: no device, or one device twice.

    >>> mesh = make_mesh(jax.devices()[:1])
    >>> mesh.axis_names, mesh.size
    (('data',), 1)
    """
    if devices is None:
        return jax.make_mesh((jax.device_count(),), (axis,), axis_types=(AxisType.Auto,))
    if not devices or len(set(devices)) != len(devices):
        raise ValueError(f"a mesh needs at least one device, and each only once; got {devices}")
    return Mesh(np.asarray(devices), (axis,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array of which every device holds the whole.

    >>> replicated(make_mesh()).is_fully_replicated
    True
    """
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is cut evenly over all devices of the mesh.

    >>> tuple(batch_sharding(make_mesh()).spec)
    ('data',)
    """
    names = mesh.axis_names
    return NamedSharding(mesh, PartitionSpec(names[0] if len(names) == 1 else names))


def place_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Puts a batch on the devices, its first axis cut over them.

    It does not pad. An example that was invented to fill a batch would count in batch statistics
    and in means; whoever pads must carry a mask through the loss.

    Args:
      batch: arrays ``[batch, ...]``, all with the same first axis. In a run over several
        processes each passes its own share, and the result is the shares one after another.
        Do not write into them afterwards: on the CPU the result can be the same memory.
      mesh: from :func:`make_mesh`.

    Returns:
      The batch as arrays of jax, the first axis of size ``processes * batch``.

    Raises:
      ValueError: the leaves do not agree in their first axis, or its size does not divide by
        the number of devices; the nearest sizes that do are named.

    >>> mesh = make_mesh(jax.devices()[:1])
    >>> place_batch({"label": np.arange(4, dtype=np.int32)}, mesh)["label"].sharding.mesh == mesh
    True
    """
    sharding = batch_sharding(mesh)
    _check_batch(batch, len(mesh.local_devices))
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch
    )


def place_replicated(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copies every leaf of a tree to every device of the mesh.

    The result shares no memory with what was given, so that it may be donated to a compiled step
    while the caller's arrays stay as they are.

    Args:
      tree: arrays (typed keys included) and numbers; in a run over several processes the same on
        each of them.
      mesh: from :func:`make_mesh`.

    >>> placed = place_replicated({"w": np.ones(2), "key": jax.random.key(0)}, make_mesh())
    >>> placed["w"].sharding.is_fully_replicated
    True
    """
    sharding = replicated(mesh)
    return jax.tree.map(lambda leaf: _copy_everywhere(leaf, sharding), tree)


def guard_cpu_thread_pool() -> int | None:
    """Gives forced host devices enough threads, so that a loop of steps does not hang.

    On the CPU backend of jax 0.10, each device's part of a program takes a thread of one pool and
    keeps it while it waits for the other devices in a sum over them. The pool has a thread a core.
    With no more threads than devices, the parts of several steps in flight can hold all threads
    and wait for each other for ever: a loop that does not fetch a result in every step stops after
    some tens of steps. As many threads as devices were still too few in trials, twice as many
    never were. jax 0.12 does not need it and is not harmed.

    The pool takes its size from ``NPROC`` when the backend starts: call this before the first
    computation; afterwards it has no effect. A larger ``NPROC`` is left as it is.

    Returns:
      The value that ``NPROC`` now has; None when no more than one host device is forced, and
      nothing was done.

    >>> guard_cpu_thread_pool() is None or int(os.environ["NPROC"]) >= 4
    True
    """
    flags = re.findall(
        r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")
    )
    configured = getattr(jax.config, "jax_num_cpu_devices", -1)
    devices = configured if configured > 0 else int(flags[-1]) if flags else 1
    if devices < 2:
        return None
    given = os.environ.get("NPROC", "")
    threads = max(2 * devices, int(given) if given.isdecimal() else 0)
    os.environ["NPROC"] = str(threads)
    return threads


def _check_batch(batch: PyTree, devices: int) -> None:
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
    }
    sizes = {shape[0] for shape in shapes.values() if shape}
    if len(sizes) != 1 or () in shapes.values():
        raise ValueError(
            "the leaves of a batch must have one first axis, of the same size in all of them; "
            f"their shapes are {shapes}"
        )
    if not devices:
        raise ValueError("the mesh has none of this process's devices, so there is no place here")
    size = sizes.pop()
    if size and size % devices == 0:
        return
    below = size - size % devices
    nearest = f"{below} or {below + devices}" if below else f"{devices}"
    raise ValueError(
        f"a batch of {size} examples cannot be cut evenly over {devices} devices; "
        f"the nearest size that can is {nearest}"
    )


def _copy_everywhere(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, bool | int | float | complex):
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.jit(jnp.copy, out_shardings=sharding)(leaf)
    # By way of the host: device_put, also when asked for a copy, may take the given buffer itself
    # for the replica on its device, and donating the result then deletes what was given.
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        # device_put refuses typed keys on devices of other processes; a compiled function does not.
        impl = jax.random.key_impl(leaf)
        wrap = jax.jit(lambda x: jax.random.wrap_key_data(x, impl=impl), out_shardings=sharding)
        return wrap(np.array(jax.random.key_data(leaf)))
    return jax.device_put(np.array(leaf), sharding)
