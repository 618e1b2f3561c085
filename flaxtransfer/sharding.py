"""Sharding: a mesh of devices, batches split over it, everything else replicated.

Where parameters do not fit, large leaves can be split, too (``leaf_shardings``). The same program
runs on one device, on the eight of one machine, and on several machines; only the mesh differs. The
compiler inserts the sums over devices that a mean over the batch needs, so that a batch statistic
is that of the whole batch and not of the part on one device.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flaxtransfer import distributed
from flaxtransfer.paths import PyTree


def make_mesh(devices: Sequence[jax.Device] | None = None, *, axis: str = "data") -> Mesh:
    """A device mesh with one axis, over which batches are split.

    Args:
        devices: to use, in this order; default: all devices of all processes, in the order that
            suits their connections.
        axis: the name of the axis.

    Returns:
        A mesh whose axis has the type ``Auto``: the compiler chooses the shardings inside a
        compiled function. With jax's default, ``Explicit``, ordinary code such as the losses of
        optax does not compile on a sharded batch.

    Raises:
        ValueError: no device, or a device twice.

    >>> mesh = make_mesh(jax.devices()[:1])
    >>> mesh.axis_names, mesh.size
    (('data',), 1)
    """
    if devices is None:
        return jax.make_mesh((jax.device_count(),), (axis,), axis_types=(AxisType.Auto,))
    if not devices or len(set(devices)) != len(devices):
        raise ValueError(f"devices must be at least one, each only once, got {devices}")
    return Mesh(np.asarray(devices), (axis,), axis_types=(AxisType.Auto,))


TPU_MEMORY = {
    "TPU v2": 16,
    "TPU v3": 32,
    "TPU v4": 32,
    "TPU v5": 95,
    "TPU v5 lite": 16,
    "TPU v6 lite": 32,
    "TPU7x": 192,
}
"""GiB of a chip, by ``jax.Device.device_kind`` (Google, "TPU architecture", 2026)."""


def topology_mesh(topology: str) -> Mesh:
    """A mesh of TPUs that need not exist here: programs are compiled for it and cannot run on it.

    Args:
        topology: kind and shape of a slice, such as "v5e:4x4".

    Raises:
        ImportError: without libtpu, which describes the slice and compiles for it.
        ValueError: a slice that does not exist.

    >>> topology_mesh("v5e")
    Traceback (most recent call last):
    ValueError: `topology` must be kind and shape of a slice, such as v5e:4x4, got 'v5e'
    """
    if not re.fullmatch(r"[a-z0-9]+:\d+(x\d+){1,2}", topology):
        raise ValueError(
            f"`topology` must be kind and shape of a slice, such as v5e:4x4, got {topology!r}"
        )
    if find_spec("libtpu") is None:
        raise ImportError("compiling for a TPU needs libtpu: pip install 'flaxtransfer[tpu]'")
    from jax.experimental import topologies

    # It would ask the cloud for the machine that it is on, and log what it does not find.
    for name, value in _NO_TPU_HERE.items():
        os.environ.setdefault(name, value)
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"`topology` must be a slice that libtpu {version('libtpu')} knows, such as v5e:4x4, "
            f"v6e:2x4 or v5p:2x2x2, got {topology!r}: {reason[:200]}"
        ) from None
    return make_mesh(described.devices)


_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    # Programs are compiled and not run: who holds the TPUs of this machine is no matter.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def memory_of(mesh: Mesh) -> int | None:
    """Bytes of memory of each device of a mesh; None where that is not known.

    >>> memory_of(make_mesh(jax.devices("cpu")[:1])) is None
    True
    """
    one: Any = mesh.devices.flat[0]
    if one.device_kind in TPU_MEMORY:
        # A chip of two cores can be two devices, which have one memory between them.
        cores = sum(device.coords == one.coords for device in mesh.devices.flat)
        return int(TPU_MEMORY[one.device_kind] * 2**30 // cores)
    if one.platform == "cpu" or one.process_index != jax.process_index():
        return None
    limit = (one.memory_stats() or {}).get("bytes_limit")
    return None if limit is None else int(limit)


PEAK_TFLOPS = {
    "TPU v2": (45, 45),
    "TPU v3": (123, 123),
    "TPU v4": (275, 275),
    "TPU v5": (459, 459),
    "TPU v5 lite": (197, 197),
    "TPU v6 lite": (918, 918),
    "TPU7x": (2307, 2307),
    "NVIDIA A100": (312, 156),
    "NVIDIA L4": (121, 60),
    "NVIDIA L40S": (362, 183),
    "NVIDIA H100 PCIe": (756, 378),
    "NVIDIA H100 NVL": (835, 417),
    "NVIDIA H100": (989, 494),
    "NVIDIA H200": (989, 494),
    "NVIDIA B200": (2250, 1100),
}
"""10^12 floating-point operations per second and chip, dense, in bfloat16 and in what XLA makes of
float32 by default: one pass of bfloat16 on a TPU, TF32 on a GPU (Google, "TPU architecture", 2026;
NVIDIA's data sheets of the A100, L4, L40S, H100, H200 and HGX B200)."""


def peak_flops(mesh: Mesh, compute: str) -> float | None:
    """Floating-point operations per second of all devices of a mesh; None where they are not known.

    Args:
        mesh: devices.
        compute: number type of the convolutions, float32 or bfloat16.

    >>> peak_flops(make_mesh(jax.devices("cpu")[:1]), "float32") is None
    True
    """
    one: Any = mesh.devices.flat[0]
    # The longest name: "NVIDIA H100 80GB HBM3" is no "NVIDIA H100 PCIe".
    known = [k for k in PEAK_TFLOPS if re.match(rf"{re.escape(k)}(?![\w])", one.device_kind)]
    if one.platform == "tpu":
        known = [kind for kind in known if kind == one.device_kind]
    if not known or compute not in ("bfloat16", "float32"):
        return None
    half, single = PEAK_TFLOPS[max(known, key=len)]
    # A chip of two cores can be two devices.
    chips = len({getattr(d, "coords", None) or d.id for d in mesh.devices.flat})
    return 1e12 * chips * (half if compute == "bfloat16" else single)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds completely.

    >>> replicated(make_mesh()).is_fully_replicated
    True
    """
    return NamedSharding(mesh, PartitionSpec())  # type: ignore[no-untyped-call]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is split evenly over all devices of the mesh.

    >>> tuple(batch_sharding(make_mesh()).spec)
    ('data',)
    """
    names = mesh.axis_names
    axes = names[0] if len(names) == 1 else names
    return NamedSharding(mesh, PartitionSpec(axes))  # type: ignore[no-untyped-call]


def leaf_shardings(tree: PyTree, mesh: Mesh, above: float | None = None) -> PyTree:
    """The sharding of each leaf of a state: replicated, or, where it is large, split.

    A large leaf is split along its longest axis that the devices divide; of equal ones the last.
    So the moments and the average of a parameter are split as the parameter is. Small leaves are
    not worth the message that joins them.

    Args:
        tree: arrays, numbers, or ``jax.ShapeDtypeStruct``.
        mesh: from ``make_mesh``.
        above: bytes from which a leaf is large; None splits nothing.

    >>> mesh = make_mesh(jax.devices()[:1])
    >>> found = leaf_shardings({"w": np.ones((2, 4)), "b": np.ones(4)}, mesh, 32)
    >>> tuple(found["w"].spec), tuple(found["b"].spec)
    ((None, 'data'), ())

    References:
        S. Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter
        Models", 2020.
    """
    return jax.tree.map(lambda leaf: _leaf_sharding(leaf, mesh, above), tree)


def _leaf_sharding(leaf: Any, mesh: Mesh, above: float | None) -> NamedSharding:
    shape = np.shape(leaf)
    is_key = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    if above is None or not shape or is_key:
        return replicated(mesh)
    size = math.prod(shape) * np.dtype(leaf.dtype).itemsize
    axes = [axis for axis, length in enumerate(shape) if length % mesh.size == 0]
    if size <= above or not axes:
        return replicated(mesh)
    longest = max(axes, key=lambda axis: (shape[axis], axis))
    spec = [None] * longest + list(batch_sharding(mesh).spec)
    return NamedSharding(mesh, PartitionSpec(*spec))  # type: ignore[no-untyped-call]


def place_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Places a batch on the devices, split along its first axis.

    It does not pad: padding would count in batch statistics and in means; whoever pads must pass a
    mask through the loss.

    Args:
        batch: arrays ``[batch, ...]``, all with the same first axis. In a run over several
            processes each passes its own rows, as many as every other, and the result has the rows
            of all, in the order of the mesh: the devices of a process need not be neighbors in it.
            Do not write into them afterwards: on the CPU the result can share their memory.
        mesh: from ``make_mesh``.

    Returns:
        The batch as ``jax.Array``, with a first axis of size ``processes * batch``.

    Raises:
        ValueError: the first axes differ, or their size is not a multiple of the number of devices;
            the text names the nearest multiples.

    >>> mesh = make_mesh(jax.devices()[:1])
    >>> place_batch({"label": np.arange(4, dtype=np.int32)}, mesh)["label"].sharding.mesh == mesh
    True
    """
    sharding = batch_sharding(mesh)
    _check_batch(batch, len(mesh.local_devices))
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)
    join: Callable[..., jax.Array] = jax.make_array_from_process_local_data
    return jax.tree.map(lambda leaf: join(sharding, _canonical(leaf)), batch)


def batch_rows(mesh: Mesh | None, count: int) -> np.ndarray:
    """Which row of the batch each row of a placed batch is, int ``[count]``.

    Whoever draws a number per example looks it up by this, so that an example gets the same number
    on every mesh.

    Args:
        mesh: on which the batch was placed; None for the order of the batch.
        count: rows of the whole batch.

    >>> batch_rows(make_mesh(jax.devices()[:1]), 3)
    array([0, 1, 2])
    """
    devices = [] if mesh is None else list(mesh.devices.flat)
    if len({device.process_index for device in devices}) < 2 or count % len(devices):
        return np.arange(count)
    each = count // len(devices)
    processes = [device.process_index for device in devices]
    # A process passes its rows in order, and its devices take them in the order of the mesh.
    by_process = sorted(range(len(devices)), key=lambda number: processes[number])
    starts = np.empty(len(devices), int)
    starts[by_process] = each * np.arange(len(devices))
    return np.asarray((starts[:, None] + np.arange(each)).ravel())


def place_replicated(tree: PyTree, mesh: Mesh, above: float | None = None) -> PyTree:
    """Copies every leaf of a tree to every device of the mesh; large ones are split if asked for.

    The result shares no memory with the input, so that it can be donated to a compiled step while
    the arrays of the caller stay valid.

    Args:
        tree: arrays (typed keys included) and numbers; in a run over several processes the same on
            each of them.
        mesh: from ``make_mesh``.
        above: bytes from which a leaf is split over the devices, see ``leaf_shardings``; None
            splits nothing.

    >>> placed = place_replicated({"w": np.ones(2), "key": jax.random.key(0)}, make_mesh())
    >>> placed["w"].sharding.is_fully_replicated
    True
    """
    return jax.tree.map(_copy_to, tree, leaf_shardings(tree, mesh, above))


def map_batches(
    run: Callable[..., PyTree],
    batches: Iterable[Mapping[str, Any]],
    mesh: Mesh,
    *,
    inputs: Sequence[str] = ("image",),
    per_example: bool = True,
) -> Iterator[tuple[PyTree, dict[str, np.ndarray]]]:
    """Runs a compiled function over batches: places, pads, runs, fetches, and drops padding.

    The one loop over batches outside of training. A batch whose size does not divide by the
    devices is padded with copies of its first example, of weight 0. One batch is computed while
    the one before it is fetched. In a run over several processes each passes its own share of the
    examples, in as many batches as the others, and receives those of all in the order that one
    process would have.

    Args:
        run: takes the placed arrays of ``inputs``, in that order.
        batches: mappings of arrays ``[batch, ...]``; ``weight`` float ``[batch]`` is 0 where an
            example is padding, and may be absent. In several processes ``index`` has to be there,
            which tells examples apart.
        mesh: from :func:`make_mesh`.
        inputs: which entries of a batch ``run`` takes; ``"weight"`` is always there.
        per_example: whether the leaves of the output are ``[batch, ...]``, of which the rows of
            padding are dropped. Otherwise the output, a sum over the batch say, is fetched as it
            is, and ``run`` has to heed the weights.

    Yields:
        The output as numpy arrays, and the batch without padding, its ``weight`` included; in
        several processes without ``image``, which no other process needs.

    Raises:
        ValueError: in several processes, batches without ``index``, or the same rows in two
            processes.

    >>> batches = [{"image": np.arange(3.0), "weight": np.array([1.0, 1.0, 0.0])}]
    >>> [(out.tolist(), kept["image"].tolist()) for out, kept in map_batches(
    ...     lambda x: 2 * x, batches, make_mesh())]
    [([0.0, 2.0], [0.0, 1.0])]
    """
    waiting: tuple[PyTree, dict[str, np.ndarray]] | None = None
    for batch in batches:
        arrays = _padded(batch, len(mesh.local_devices))
        output = run(*place_batch([arrays[name] for name in inputs], mesh))
        if not replicated(mesh).is_fully_addressable:
            # At once: collectives of two programs under way could meet in different orders.
            yield _gathered(output, arrays, mesh, per_example)
            continue
        if waiting is not None:
            yield _fetched(*waiting, per_example)
        waiting = output, arrays
    if waiting is not None:
        yield _fetched(*waiting, per_example)


def guard_cpu_thread_pool() -> int | None:
    """Sets the size of the CPU thread pool, so that forced host devices do not deadlock.

    On the CPU backend of jax 0.10, the part of a program on each device holds a thread of one pool
    while it waits for the other devices in a collective. The pool has one thread per core. With as
    few threads as devices, the parts of several steps in flight can hold all threads and wait for
    each other for ever: a loop that does not fetch a result in every step stops after some tens of
    steps. In trials, as many threads as devices were still too few, twice as many always enough.
    jax 0.12 does not need it, and it does no harm there.

    The pool takes its size from ``NPROC`` when the backend starts: call this before the first
    computation; later it has no effect. A larger ``NPROC`` is left as it is.

    Returns:
        The new value of ``NPROC``; None if there is at most one host device and nothing was done.

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


MOST_COMPILED_BYTES = 1 << 30
"""Of compiled programs that are kept; the longest unused go first. A run has a few megabytes."""


def keep_compiled(folder: Path, chosen: str | None = None) -> Path | None:
    """Keeps compiled programs, so that a second start does not compile them again.

    What jax is told stays: JAX_COMPILATION_CACHE_DIR (another folder, or a bucket),
    JAX_ENABLE_COMPILATION_CACHE=false (none), JAX_COMPILATION_CACHE_MAX_SIZE (bytes). Programs of
    a CPU are for its instructions; each kind of CPU has a folder of its own, for homes that several
    machines share.

    Args:
        folder: for all kinds of CPU; made where it can be.
        chosen: another folder, or an address gs:// (extra ``gcs``), in which nothing is removed to
            keep a limit; it goes before what jax is told.

    Returns:
        Where they are kept; None where that was said otherwise, or nothing can be written.
    """
    update: Any = jax.config.update  # which has no types
    if chosen is not None:
        update("jax_compilation_cache_max_size", -1)
        update("jax_persistent_cache_min_compile_time_secs", 0.1)
        update("jax_compilation_cache_dir", chosen)
        return None
    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return None
    place = folder / _cpu_name()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(place, os.W_OK):
        return None
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        update("jax_compilation_cache_max_size", MOST_COMPILED_BYTES)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        update("jax_persistent_cache_min_compile_time_secs", 0.1)
    update("jax_compilation_cache_dir", str(place))
    return place


def _cpu_name() -> str:
    """A name of this kind of CPU: its architecture, and a digest of its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def _padded(batch: Mapping[str, Any], devices: int) -> dict[str, np.ndarray]:
    """The batch as arrays with weights, its size a multiple of the number of devices."""
    arrays = {name: np.asarray(values) for name, values in batch.items()}
    size = len(next(iter(arrays.values())))
    arrays.setdefault("weight", np.ones(size, np.float32))
    missing = -size % devices
    if missing:
        # Copies of a real example: zeros could be outside of what the network takes.
        arrays = {
            name: np.concatenate([values, np.repeat(values[:1], missing, axis=0)])
            for name, values in arrays.items()
        }
        arrays["weight"][size:] = 0
    return arrays


def _fetched(
    output: PyTree, arrays: dict[str, np.ndarray], per_example: bool
) -> tuple[PyTree, dict[str, np.ndarray]]:
    return _without_padding(jax.device_get(output), arrays, per_example)


def _gathered(
    output: PyTree, arrays: dict[str, np.ndarray], mesh: Mesh, per_example: bool
) -> tuple[PyTree, dict[str, np.ndarray]]:
    """Output and batch of all processes, in the order of processes and rows."""
    if "index" not in arrays:
        raise ValueError(
            "batches must have `index` in a run over several processes, got "
            f"{', '.join(arrays)}; make them with ft.eval_batches or ft.loaders, which also give "
            "each process its share"
        )
    number, count = distributed.share()
    rows = len(arrays["weight"])
    kept = {name: values for name, values in arrays.items() if name != "image"}
    kept["place"] = number * rows + np.arange(rows, dtype=np.int32)
    whole, kept = fetch((output, place_batch(kept, mesh)), mesh)
    # Rows lie in the order of the mesh, which need not be that of the processes.
    order = np.argsort(kept.pop("place"))
    kept = {name: values[order] for name, values in kept.items()}
    given = [tuple(row) for row in kept["index"].reshape(count, rows) if (row >= 0).any()]
    if len(set(given)) < len(given):
        raise ValueError(
            "each process must give its own share of the examples, got the same rows in two of "
            "them; make batches with ft.eval_batches or ft.loaders"
        )
    if per_example:
        whole = jax.tree.map(lambda leaf: leaf[order], whole)
    return _without_padding(whole, kept, per_example)


def fetch(tree: PyTree, mesh: Mesh) -> PyTree:
    """Whole arrays of a mesh as numpy arrays, in every process.

    >>> fetch({"rows": place_batch(np.arange(3), make_mesh(jax.devices()[:1]))}, make_mesh())
    {'rows': array([0, 1, 2], dtype=int32)}
    """
    if replicated(mesh).is_fully_addressable:
        return jax.device_get(tree)
    distributed.arrive()
    return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), _replicate(mesh)(tree))


def gather(tree: PyTree, mesh: Mesh) -> PyTree:
    """The tree with every leaf whole on every device; leaves that are so already are not copied.

    >>> mesh = make_mesh(jax.devices()[:1])
    >>> gather(place_batch({"x": np.arange(2)}, mesh), mesh)["x"].sharding.is_fully_replicated
    True
    """
    split = [leaf for leaf in jax.tree.leaves(tree) if not leaf.sharding.is_fully_replicated]
    if not split:
        return tree
    whole = iter(_replicate(mesh)(split))
    return jax.tree.map(
        lambda leaf: leaf if leaf.sharding.is_fully_replicated else next(whole), tree
    )


@lru_cache(maxsize=8)
def _replicate(mesh: Mesh) -> Callable[[PyTree], PyTree]:
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def _without_padding(
    output: PyTree, arrays: dict[str, np.ndarray], per_example: bool
) -> tuple[PyTree, dict[str, np.ndarray]]:
    keep = arrays["weight"] > 0
    if not keep.all():
        arrays = {name: values[keep] for name, values in arrays.items()}
        if per_example:
            output = jax.tree.map(lambda leaf: leaf[keep], output)
    return output, arrays


def _check_batch(batch: PyTree, devices: int) -> None:
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
    }
    sizes = {shape[0] for shape in shapes.values() if shape}
    if len(sizes) != 1 or () in shapes.values():
        raise ValueError(
            f"the leaves of a batch must have the same first axis, got shapes {shapes}"
        )
    if not devices:
        raise ValueError("the mesh must have a device of this process; it has none")
    size = sizes.pop()
    if size and size % devices == 0:
        return
    below = size - size % devices
    nearest = f"{below} or {below + devices}" if below else f"{devices}"
    raise ValueError(
        f"the batch size must be a multiple of the {devices} devices, got {size}; the nearest is "
        f"{nearest}"
    )


def _copy_to(leaf: Any, sharding: NamedSharding) -> Any:
    if isinstance(leaf, bool | int | float | complex):
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.jit(jnp.copy, out_shardings=sharding)(leaf)
    # Through the host: device_put may reuse the given buffer as the replica on its device, even if
    # asked for a copy, and donating the result would then delete the input.
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        # device_put refuses typed keys on devices of other processes; a compiled function does not.
        impl = jax.random.key_impl(leaf)
        wrap = jax.jit(lambda x: jax.random.wrap_key_data(x, impl=impl), out_shardings=sharding)
        return wrap(np.array(jax.random.key_data(leaf)))
    if not sharding.is_fully_addressable:
        # device_put would compare each array over all processes first.
        array = _canonical(leaf).copy()
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    return jax.device_put(np.array(leaf), sharding)


def _canonical(leaf: Any) -> np.ndarray:
    """A numpy array of the type that jax gives it."""
    array = np.asarray(leaf)
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
