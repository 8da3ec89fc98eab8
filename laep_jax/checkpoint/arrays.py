"""The arrays of a state, written and read through Orbax's public API.

Stored as zarr3 in OCDBT, uncompressed, one chunk a layer or, of expert matrices, an expert. Orbax's own handler of
arrays restores whole ones; the one here reads, for each addressable shard of each leaf, the stored rows that it is
asked for, in their new order: of a pruned state the surviving experts only. `surgery.kept_rows` says which these are
(paper section 3.2).
"""

import dataclasses
import logging
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.tree_util import tree_flatten_with_path
from orbax.checkpoint import type_handlers

from laep_jax.checkpoint.manifest import DamagedError
from laep_jax.errors import UnavailableError, UserError
from laep_jax.paths import is_bucket
from laep_jax.sharding import is_of_experts, is_stacked, leaf_name
from laep_jax.state.surgery import leaf_key

ALIGNMENT = 64  # bytes
UNAVAILABLE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED")
Bounds = tuple[tuple[int, int], ...]  # of a shard, [start, stop) in each dimension


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf to read. target: shape, dtype, sharding. rows: the stored rows that are its own, None for all."""

    key: str
    target: jax.ShapeDtypeStruct
    rows: np.ndarray | None


def make_writer() -> ocp.AsyncCheckpointer:
    logging.getLogger("absl").addFilter(_not_orbax_chatter)
    return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False))


def _not_orbax_chatter(record: logging.LogRecord) -> bool:
    """Drops the dozens of INFO lines Orbax writes about a save; its warnings and errors stay."""
    return record.levelno >= logging.WARNING or "orbax" not in Path(record.pathname).parts


def items_to_save(state) -> ocp.args.PyTreeSave:
    """Every leaf of a state under its dotted path."""
    leaves = tree_flatten_with_path(state)[0]
    return ocp.args.PyTreeSave(
        {leaf_key(path): leaf for path, leaf in leaves},
        save_args={leaf_key(path): ocp.SaveArgs(shard_axes=_chunked_axes(path, leaf)) for path, leaf in leaves},
    )


def _chunked_axes(path: tuple, leaf: jax.Array) -> tuple[int, ...]:
    """Dimensions stored one index a chunk: layers, and the experts of matrices."""
    name = leaf_name(path)
    return (0,) if is_stacked(name, leaf.ndim) or (is_of_experts(name) and leaf.ndim > 2) else ()


def describe(shape: Sequence[int], dtype: Any) -> str:
    """A leaf for people, and to compare."""
    return f"{np.dtype(dtype)}{list(shape)}"


def describe_leaves(state) -> dict[str, str]:
    """Every leaf by its dotted path."""
    return {leaf_key(path): describe(leaf.shape, leaf.dtype) for path, leaf in tree_flatten_with_path(state)[0]}


def bytes_read() -> int:
    """Bytes that TensorStore has read from files or a bucket since this process began, its indices included."""
    metrics = [
        metric
        for store in ("file", "gcs")
        for metric in ts.experimental_collect_matching_metrics(f"/tensorstore/kvstore/{store}/bytes_read")
    ]
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


@dataclasses.dataclass
class LeafArgs(ocp.ArrayRestoreArgs):
    """What Orbax hands on to the handler. leaf: what to read, None to open the stored array only."""

    leaf: Leaf | None = None


class PartialArrayHandler(type_handlers.ArrayHandler):
    """Orbax's handler of `jax.Array`, which reads of each array what its `LeafArgs` say.

    While one leaf is waited for and put on its devices, the next is being read, so that the host holds two. A chunk
    that is missing is an error, never zeros.
    """

    async def deserialize(self, infos: Sequence[type_handlers.ParamInfo], args: Any = None):
        opening = [_open(info) for info in infos]
        stored = [future.result() for future in opening]
        leaves = [arg.leaf for arg in args]
        return stored if None in leaves else read_opened(leaves, stored)


def make_reader() -> ocp.Checkpointer:
    """Reads for this process alone: in Orbax's barrier the others would wait for one that found damage."""
    registry = type_handlers.create_type_handler_registry((jax.Array, PartialArrayHandler()))
    own = jax.process_index()
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own}),
    )


def read_leaves(reader: ocp.Checkpointer, store: str | os.PathLike[str], leaves: Sequence[Leaf]) -> list[jax.Array]:
    """The leaves on their devices; these are all that `store` has. This process reads only what its devices hold."""
    found = _restore(reader, store, {leaf.key: LeafArgs(leaf=leaf) for leaf in leaves})
    return [found[leaf.key] for leaf in leaves]


def open_leaves(
    reader: ocp.Checkpointer, store: str | os.PathLike[str], keys: Iterable[str]
) -> dict[str, ts.TensorStore]:
    """The stored arrays by leaf key, which are all that `store` has."""
    return _restore(reader, store, {key: LeafArgs() for key in keys})


def _restore(reader: ocp.Checkpointer, store: str | os.PathLike[str], args: dict[str, LeafArgs]) -> dict[str, Any]:
    return reader.restore(store, args=ocp.args.PyTreeRestore(dict.fromkeys(args, 0), args))


def unreadable(where: str, error: Exception) -> Exception:
    """What an error of reading means: `DamagedError`, `UnavailableError`, or itself, where it is of neither kind.

    On a disk all that TensorStore and Orbax raise for files is damage. Of a bucket only what is missing or does not
    parse is; the rest says nothing about what is stored.
    """
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    refused = str(error).startswith(UNAVAILABLE)
    if isinstance(error, UserError) or not (is_bucket(where) or isinstance(error, (ValueError, OSError))):
        return error
    if refused or (is_bucket(where) and not isinstance(error, (ValueError, FileNotFoundError))):
        return UnavailableError(f"checkpoint {where} cannot be read: {reason}")
    return DamagedError(f"checkpoint {where} is damaged: {reason}")


def _open(info: type_handlers.ParamInfo) -> ts.Future:
    spec = type_handlers.get_json_tspec_read(info, bool(info.is_ocdbt_checkpoint))
    return ts.open(spec, open=True, read=True, context=info.ts_context)


def read_opened(leaves: Sequence[Leaf], stored: Sequence[ts.TensorStore]) -> list[jax.Array]:
    """The leaves on their devices, of stored arrays that are open."""
    arrays, started = [], _start_leaf(leaves[0], stored[0])
    for index, leaf in enumerate(leaves, 1):
        shards, reads = started
        if index < len(leaves):
            started = _start_leaf(leaves[index], stored[index])
        for read in reads:
            read.result()
        boxes = _boxes(leaf.target)
        parts = jax.device_put([shards[box] for box in boxes.values()], list(boxes))
        arrays.append(jax.make_array_from_single_device_arrays(leaf.target.shape, leaf.target.sharding, parts))
    return arrays


def _start_leaf(leaf: Leaf, source: ts.TensorStore) -> tuple[dict[Bounds, np.ndarray], list[ts.Future]]:
    """The leaf's shards, still to be filled, and the reads that fill them."""
    shards = {box: _empty(box, np.dtype(leaf.target.dtype)) for box in {*_boxes(leaf.target).values()}}
    return shards, [_start_shard(source, leaf, box, shard) for box, shard in shards.items()]
