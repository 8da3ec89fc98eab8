"""Prunes a training state: one gather of rows from every array of experts (paper section 3.2).

The experts of all layers are in one array a parameter, layer after layer, of which every device holds a slice. So a
prune is new[n] = old[rows[n]], on each device by itself, for the expert matrices, the router, its bias, and both Adam
moments of each. `kept_rows` makes the rows of a plan, whose `kept[l]` lists the old experts of layer l in new order;
`arrays` reads the same rows out of a checkpoint.

Axes: N experts of all layers.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from laep_jax.config import Config
from laep_jax.errors import require
from laep_jax.sharding import is_of_experts, leaf_name

BUFFER_MARGIN = 1.1  # of a receive buffer over the largest mean load of a device, since loads waver
Kept = Sequence[Sequence[int]]  # per layer: old experts in new order


def kept_rows(num_experts: Sequence[int], kept: Kept) -> np.ndarray:
    """The old rows of the new ones, int32 [N]. num_experts: per layer, before. `UserError` where `kept` does not fit.

    >>> kept_rows((3, 2), [[2, 0], [0, 1]]).tolist()
    [2, 0, 3, 4]
    """
    layers = len(num_experts)
    require(len(kept) == layers, "plan layers", len(kept), f"does not fit a model of {layers} layers")
    for layer, (ids, count) in enumerate(zip(kept, num_experts, strict=True)):
        fits = len(set(ids)) == len(ids) > 0 and all(0 <= expert < count for expert in ids)
        require(fits, f"plan kept[{layer}]", list(ids), f"must name distinct slots from 0 to {count - 1}")
    first_L = np.cumsum(num_experts) - num_experts
    return np.concatenate(
        [first + np.array(ids, np.int32) for first, ids in zip(first_L, kept, strict=True)], dtype=np.int32
    )


def leaf_key(path: tuple) -> str:
    """The dotted path of a leaf, `params.experts.down_NFD`."""
    return keystr(path, simple=True, separator=".")


def pruned_config(config: Config, kept: Kept) -> Config:
    """The config of the pruned model; `UserError` where it does not fit top_k or the resolved mesh."""
    kept_rows(config.model.experts_per_layer, kept)
    pruned = config.with_num_experts(tuple(len(ids) for ids in kept))
    sizes = (pruned.mesh.data, pruned.mesh.fsdp, pruned.mesh.expert)
    return pruned if None in sizes else pruned.resolve(math.prod(size or 1 for size in sizes))


def with_receive_buffer(config: Config, imbalances: Sequence[float]) -> Config:
    """The config with room for the most loaded device of the worst layer, where its receive buffer is bounded.

    imbalances: max / mean of the devices, by layer.
    """
    if config.model.receive_buffer is None:
        return config
    room = min(BUFFER_MARGIN * max(imbalances), float(config.mesh.expert or 1))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, receive_buffer=room))


Gathers = dict[tuple, jax.stages.Compiled]  # by shape and dtype of the old leaf


def compile_gathers(abstract_old, num_rows: int) -> Gathers:
    """The programs of `prune_state`, for a state of `jax.ShapeDtypeStruct`s with shardings: one a parameter.

    num_rows: N of the pruned state.
    """
    leaves = [leaf for path, leaf in tree_flatten_with_path(abstract_old)[0] if is_of_experts(leaf_name(path))]
    return {key: lower_gather(leaf, num_rows).compile() for key, leaf in {_key(leaf): leaf for leaf in leaves}.items()}


def lower_gather(leaf: jax.ShapeDtypeStruct, num_rows: int) -> jax.stages.Lowered:
    """The program that prunes one leaf; as its rows are not split, no device needs anything from another."""
    gather = jax.jit(lambda leaf, rows: jnp.take(leaf, rows, axis=0, mode="clip"), out_shardings=leaf.sharding)
    return gather.lower(leaf, jax.ShapeDtypeStruct((num_rows,), np.int32))


def _key(leaf) -> tuple:
    return leaf.shape, leaf.dtype


def prune_state(state, gathers: Gathers, rows_N: np.ndarray):
    """The pruned state, made in device memory on the same devices; consumes `state`.

    gathers: of `compile_gathers`. rows_N: of `kept_rows`. Goes through one leaf after another and frees the old one at
    once, so that memory peaks at the old state and one new leaf.
    """

    def pruned(path: tuple, leaf: jax.Array) -> jax.Array:
        if not is_of_experts(leaf_name(path)):
            return leaf
        new = jax.block_until_ready(gathers[_key(leaf)](leaf, rows_N))
        leaf.delete()
        return new

    return jax.tree_util.tree_map_with_path(pruned, state)
