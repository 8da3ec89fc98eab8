"""The mesh, and the one table from logical to mesh axes.

Every parameter's name ends in its logical axes, one letter each: `down_NFD` is [experts, ffn,
hidden]. Axes: V vocabulary, D hidden, C half of it (LFA), J heads times head size, E experts of a layer, N experts of
all layers, F ffn, G twice that (gate and up side by side), U hidden size of a shared expert, or twice that. A stack of
layers has one more dimension in front.

Every device holds a slice of every expert: ffn is split over `fsdp` and `expert` together, and no expert has a home. So
placing experts, or pruning them, moves nothing between devices.

XLA:TPU reduce-scatters a gradient well only if each device's part fills whole tiles, 8 rows or 128 columns; otherwise
it all-reduces it, twice the bytes, or pads it and moves the parts afterwards. So attention's matrices have J in front:
of 9,216 rows on 128 devices each has 72, of 4,608 columns 36.
"""

import math
import os
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from laep_jax.config import BATCH_AXES, MeshConfig
from laep_jax.errors import require

THREADS_PER_DEVICE = 4
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # environment in which a process on CPU spends less on memory
SLICES = ("fsdp", "expert")  # fsdp first: the slices that one all-to-all over `expert` brings lie side by side
RULES: dict[str, tuple[str, ...]] = {
    "F": SLICES,
    "G": SLICES,
    "J": ("fsdp",),
    "U": ("fsdp",),
    "V": ("expert",),
    "D": ("fsdp",),
}


def make_cpu_devices(number: int, *, processes: int = 1) -> None:
    """Gives this process `number` devices on a machine without accelerators; before JAX's first computation.

    XLA's emulated devices share a pool of as many threads as there are devices or cores, and a
    collective blocks its thread: with one thread a device all of them can come to wait for each other. (More threads do
    not help where a collective lies free beside a loop with others; `transformer._after` sees to that.) One device of
    one process (of `processes` in the run) waits for nobody and keeps XLA's own number of threads.
    """
    require(number >= 1, "emulated devices", number, "must be at least 1")
    forced = re.search(r"--xla_force_host_platform_device_count=(\S*)", os.environ.get("XLA_FLAGS", ""))
    rule = f"in XLA_FLAGS is not what MeshConfig.cpu_devices makes of it, {number} a process; unset it"
    require(
        not forced or forced[1] == str(number), "--xla_force_host_platform_device_count", forced and forced[1], rule
    )
    wanted = -1 if forced else number
    if jax.config.values["jax_num_cpu_devices"] != wanted:  # JAX 0.7 refuses to set it once more
        jax.config.update("jax_num_cpu_devices", wanted)
    if number * processes > 1:
        os.environ.setdefault("PJRT_NPROC", str(THREADS_PER_DEVICE * number))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of axes ("data", "fsdp", "expert"), all Auto, from a resolved `MeshConfig`.

    devices: by default those of this run; `preflight` gives it chips that are not there. Where they are of
    several TPU slices, `data` goes across the slices, so that only sums over the batch pass the network between them.
    `UserError` where it cannot.
    """
    assert config.fsdp is not None
    assert config.expert is not None
    sizes = (config.data, config.fsdp, config.expert)
    devices = list(devices or jax.devices())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        places = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        require(config.data % slices == 0, "MeshConfig.data", config.data, f"is not divisible by {slices} slices")
        within = (config.data // slices, config.fsdp, config.expert)
        places = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(places, BATCH_AXES, axis_types=(AxisType.Auto,) * 3)


def platform(mesh: Mesh) -> str:
    """The platform of the mesh's devices, for which programs are compiled: "cpu", "tpu", "gpu"."""
    return mesh.devices.flat[0].platform


def leaf_name(path: tuple) -> str:
    """The last string key on a pytree path: the parameter's name, also inside optimizer state."""
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return str(names[-1]) if names else ""


def logical_axes(name: str, ndim: int) -> tuple[str | None, ...]:
    """The axes in `name`'s suffix, with None for a leading layer dimension.

    >>> logical_axes("output_JD", 3)
    (None, 'J', 'D')
    """
    letters = name.rpartition("_")[2]
    if not letters.isupper():
        return (None,) * ndim
    assert ndim - len(letters) in (0, 1), (name, ndim)
    return (None,) * (ndim - len(letters)) + tuple(letters)


def is_of_experts(name: str) -> bool:
    """Whether the first dimension of a leaf counts the experts of all layers. name: may be a dotted path."""
    letters = name.rpartition("_")[2]
    return letters.isupper() and letters[0] == "N"


def is_stacked(name: str, ndim: int) -> bool:
    """Whether the first dimension of a leaf counts layers."""
    return logical_axes(name, ndim)[:1] == (None,)


def leaf_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Where a leaf lives. A dimension that its mesh axes do not divide is not split; a mesh axis splits one dimension.

    Slices of ffn come before those of hidden.
    """
    axes = logical_axes(name, len(shape))
    spec: list[str | tuple[str, ...] | None] = [None] * len(shape)
    used: set[str] = set()
    for dim in sorted(range(len(shape)), key=lambda dim: axes[dim] == "D"):
        mesh_axes = RULES.get(axes[dim] or "", ())
        if mesh_axes and used.isdisjoint(mesh_axes) and shape[dim] % math.prod(mesh.shape[a] for a in mesh_axes) == 0:
            spec[dim] = mesh_axes if len(mesh_axes) > 1 else mesh_axes[0]
            used.update(mesh_axes)
    return PartitionSpec(*spec)


def tree_shardings(tree, mesh: Mesh):
    """A `NamedSharding` for every leaf of a tree of arrays or abstract arrays."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, leaf_spec(leaf_name(path), leaf.shape, mesh)), tree
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch, split over every mesh axis."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Replicated on every device, and so available in every process."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch [rows, ...] as global arrays."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
