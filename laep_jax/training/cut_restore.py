"""Reads a cut state straight out of a checkpoint: surviving experts only, already in their new places.

Orbax restores whole arrays. This opens its store of arrays (zarr3 in OCDBT, one chunk an expert and
layer, uncompressed) with TensorStore and reads, for each addressable shard of each new leaf, the
layers and experts that it holds; `surgery.cut_pieces` says which these are (paper sections 3.2, 3.3).
"""

from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
import tensorstore as ts

from laep_jax.training.surgery import LeafCut

Box = tuple[slice, ...]


def open_leaves(store: Path, keys: Iterable[str]) -> dict[str, ts.TensorStore]:
    """The stored arrays by leaf key; a missing chunk is an error, never zeros."""

    def spec(key: str) -> dict:
        base = {"driver": "file", "path": f"{store}/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{key}/"}
        return {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}

    opening = {key: ts.open(spec(key), open=True, read=True) for key in keys}
    return {key: future.result() for key, future in opening.items()}


def _start_reads(cut: LeafCut, sources: list[ts.TensorStore], box: Box) -> list[ts.Future]:
    """Reads of one shard: one a layer, or one in all for a leaf that stays as it is."""
    if not cut.pieces:
        return [sources[0][box].read(order="C")]
    layers = [
        (source, piece.start + row, slots)
        for source, piece in zip(sources, cut.pieces, strict=True)
        for row, slots in enumerate(piece.kept)
    ]
    reads = []
    for source, row, slots in layers[box[0]]:
        index: list[slice | np.ndarray] = list(box[1:])
        if cut.axis is not None:
            index[cut.axis - 1] = slots[box[cut.axis]]
        reads.append(source[row][tuple(index)].read(order="C"))
    return reads


def read_leaf(cut: LeafCut, stored: dict[str, ts.TensorStore]) -> jax.Array:
    """One leaf of the cut state on its devices; this process reads only what its devices hold."""
    shape, sharding = cut.target.shape, cut.target.sharding
    assert sharding is not None
    sources = [stored[key] for key in cut.sources]
    boxes: dict[jax.Device, tuple[tuple[int, int], ...]] = {
        device: tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    reads = {bounds: _start_reads(cut, sources, tuple(slice(*b) for b in bounds)) for bounds in set(boxes.values())}
    shards = {bounds: [read.result() for read in futures] for bounds, futures in reads.items()}
    hosts = {bounds: np.stack(parts) if cut.pieces else parts[0] for bounds, parts in shards.items()}
    arrays = [jax.device_put(hosts[bounds], device) for device, bounds in boxes.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)
