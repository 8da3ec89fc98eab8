"""Reads a pruned state straight out of a checkpoint: surviving experts only, already in their new places.

Orbax restores whole arrays. This opens its store of arrays (zarr3 in OCDBT, one chunk an expert and
layer, uncompressed) with TensorStore and reads, for each addressable shard of each new leaf, the
layers and experts that it holds; `surgery.moved_pieces` says which these are (paper sections 3.2, 3.3).
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
import tensorstore as ts

from laep_jax.state.surgery import LeafMove

ALIGNMENT = 64  # bytes
INDEX_BYTES = 2**26  # of OCDBT's index to be kept
Bounds = tuple[tuple[int, int], ...]  # of a shard, [start, stop) in each dimension


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


def _start_read(source: ts.TensorStore, index: tuple, place: np.ndarray) -> ts.Future:
    part = source[index]
    return ts.array(place).write(part[ts.d[:].translate_to[0]] if part.rank else part).commit


def _start_shard(move: LeafMove, sources: list[ts.TensorStore], bounds: Bounds, shard: np.ndarray) -> list[ts.Future]:
    """Reads into one shard: one a layer, or one in all for a leaf that stays as it is."""
    box = tuple(slice(*pair) for pair in bounds)
    if not move.pieces:
        return [_start_read(sources[0], box, shard)]
    layers = [
        (source, piece.start + row, slots)
        for source, piece in zip(sources, move.pieces, strict=True)
        for row, slots in enumerate(piece.kept)
    ]
    reads = []
    for (source, row, slots), place in zip(layers[box[0]], shard, strict=True):
        index: list[int | slice | np.ndarray] = [row, *box[1:]]
        if move.axis is not None:
            index[move.axis] = slots[box[move.axis]]
        reads.append(_start_read(source, tuple(index), place))
    return reads


def _start_leaf(move: LeafMove, stored: dict[str, ts.TensorStore]) -> tuple[dict[Bounds, np.ndarray], list[ts.Future]]:
    """The leaf's shards, still to be filled, and the reads that fill them."""
    sources = [stored[key] for key in move.sources]
    shards = {box: _empty(box, np.dtype(move.target.dtype)) for box in {*_boxes(move.target).values()}}
    return shards, [read for box, shard in shards.items() for read in _start_shard(move, sources, box, shard)]


def read_leaves(moves: Sequence[LeafMove], stored: dict[str, ts.TensorStore]) -> list[jax.Array]:
    """The leaves of the pruned state on their devices; this process reads only what its devices hold.

    While one leaf is waited for and put on its devices, the next is being read.
    """
    leaves, started = [], _start_leaf(moves[0], stored)
    for move, following in itertools.zip_longest(moves, moves[1:]):
        shards, reads = started
        started = _start_leaf(following, stored) if following else started
        for read in reads:
            read.result()
        boxes = _boxes(move.target)
        arrays = jax.device_put([shards[box] for box in boxes.values()], list(boxes))
        leaves.append(jax.make_array_from_single_device_arrays(move.target.shape, move.target.sharding, arrays))
    return leaves
