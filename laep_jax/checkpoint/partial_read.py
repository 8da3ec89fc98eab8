"""Reads a pruned state straight out of a checkpoint: surviving experts only, already in their new places.

Orbax restores whole arrays. This opens its store of arrays (zarr3 in OCDBT, one chunk an expert and
uncompressed) with TensorStore and reads, for each addressable shard of each new leaf, the experts that are
left; `surgery.kept_rows` says which these are (paper section 3.2).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
import tensorstore as ts

ALIGNMENT = 64  # bytes
INDEX_BYTES = 2**26  # of OCDBT's index to be kept
Bounds = tuple[tuple[int, int], ...]  # of a shard, [start, stop) in each dimension


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf to read. target: shape, dtype, sharding. rows: the stored rows that are its own, None for all."""

    key: str
    target: jax.ShapeDtypeStruct
    rows: np.ndarray | None


def open_leaves(store: Path, keys: Iterable[str], *, write: bool = False) -> dict[str, ts.TensorStore]:
    """The stored arrays by leaf key; a missing chunk is an error, never zeros."""

    def spec(key: str) -> dict:
        base = {"driver": "file", "path": f"{store}/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{key}/"}
        return {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}

    context = ts.Context({"cache_pool": {"total_bytes_limit": INDEX_BYTES}})  # or each array would read the index anew
    opening = {key: ts.open(spec(key), open=True, read=True, write=write, context=context) for key in keys}
    return {key: future.result() for key, future in opening.items()}


def bytes_read() -> int:
    """Bytes that TensorStore has read from files since this process began, its indices included."""
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


def _boxes(target: jax.ShapeDtypeStruct) -> dict[jax.Device, Bounds]:
    """What each device of this process holds of a leaf."""
    assert target.sharding is not None
    return {
        device: tuple(part.indices(size)[:2] for part, size in zip(index or (), target.shape, strict=True))
        for device, index in target.sharding.addressable_devices_indices_map(target.shape).items()
    }


def bytes_needed(abstract_state) -> int:
    """Bytes of a state that the devices of this process hold, each part once."""
    leaves = jax.tree.leaves(abstract_state)
    return sum(
        leaf.dtype.itemsize * math.prod(b - a for a, b in box) for leaf in leaves for box in {*_boxes(leaf).values()}
    )


def _empty(bounds: Bounds, dtype: np.dtype) -> np.ndarray:
    """Memory for a shard, from an address on which JAX takes it over as it is on CPU."""
    shape = [stop - start for start, stop in bounds]
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _start_shard(source: ts.TensorStore, leaf: Leaf, bounds: Bounds, shard: np.ndarray) -> ts.Future:
    """Reads into one shard."""
    index: list[slice | np.ndarray] = [slice(*pair) for pair in bounds]
    if leaf.rows is not None:
        index[0] = leaf.rows[index[0]]
    part = source[tuple(index)]
    return ts.array(shard).write(part[ts.d[:].translate_to[0]] if part.rank else part).commit


def _start_leaf(leaf: Leaf, source: ts.TensorStore) -> tuple[dict[Bounds, np.ndarray], list[ts.Future]]:
    """The leaf's shards, still to be filled, and the reads that fill them."""
    shards = {box: _empty(box, np.dtype(leaf.target.dtype)) for box in {*_boxes(leaf.target).values()}}
    return shards, [_start_shard(source, leaf, box, shard) for box, shard in shards.items()]


def read_leaves(leaves: Sequence[Leaf], stored: dict[str, ts.TensorStore]) -> list[jax.Array]:
    """The leaves of the pruned state on their devices; this process reads only what its devices hold.

    While one leaf is waited for and put on its devices, the next is being read.
    """
    arrays, started = [], _start_leaf(leaves[0], stored[leaves[0].key])
    for leaf, following in itertools.zip_longest(leaves, leaves[1:]):
        shards, reads = started
        started = _start_leaf(following, stored[following.key]) if following else started
        for read in reads:
            read.result()
        boxes = _boxes(leaf.target)
        parts = jax.device_put([shards[box] for box in boxes.values()], list(boxes))
        arrays.append(jax.make_array_from_single_device_arrays(leaf.target.shape, leaf.target.sharding, parts))
    return arrays
