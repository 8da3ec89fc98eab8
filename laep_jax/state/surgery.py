"""Prunes and rearranges a training state: one gather along the expert axis of every leaf that has one.

Paper sections 3.2 and 3.3. A plan's `kept[l]` lists the old expert slots of layer l in new device
order, so pruning and rearranging are the same: new[l, e] = old[l, kept[l][e]], for the expert
matrices, the router's columns and bias, and both Adam moments of each. Layers of equal expert count
are stacked into runs, and a prune changes which layers these are; `moved_pieces` is that change as plain
data, used here in device memory and by `partial_read` on the way out of a checkpoint.

Axes: R layers of a piece of a run, E experts kept.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import DictKey, SequenceKey, keystr, tree_flatten_with_path, tree_unflatten

from laep_jax.config import Config, ModelConfig
from laep_jax.errors import require
from laep_jax.sharding import expert_axis, leaf_name

BUFFER_MARGIN = 1.1  # of a receive buffer over the largest mean load of a device, since loads waver
Kept = Sequence[Sequence[int]]  # per layer: old slots in new order
Runs = Sequence[tuple[int, int]]  # per run: layers, experts (ModelConfig.runs)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Layers `start`, `start + 1`, ... of old run `run`; slot e of the r-th takes old slot `kept[r, e]`.

    kept: int32 [R, E].
    """

    run: int
    start: int
    kept: np.ndarray


def moved_pieces(old_runs: Runs, kept: Kept) -> list[list[Piece]]:
    """For every run of the pruned model, the pieces of old runs that its layers come from, in order.

    `UserError` where `kept` does not fit the old model.

    >>> [[(p.run, p.start, p.kept.tolist()) for p in run] for run in moved_pieces([(1, 3), (1, 2)], [[2, 0], [0, 1]])]
    [[(0, 0, [[2, 0]]), (1, 0, [[0, 1]])]]
    """
    layers = [(run, row, experts) for run, (count, experts) in enumerate(old_runs) for row in range(count)]
    require(len(kept) == len(layers), "plan layers", len(kept), f"does not fit a model of {len(layers)} layers")
    for layer, (slots, (_, _, experts)) in enumerate(zip(kept, layers, strict=True)):
        fits = len(set(slots)) == len(slots) > 0 and all(0 <= slot < experts for slot in slots)
        require(fits, f"plan kept[{layer}]", list(slots), f"must name distinct slots from 0 to {experts - 1}")
    pieces = []
    for _, equal in itertools.groupby(range(len(kept)), key=lambda layer: len(kept[layer])):
        run_pieces = []
        for run, group in itertools.groupby(equal, key=lambda layer: layers[layer][0]):
            rows = list(group)
            run_pieces.append(Piece(run, layers[rows[0]][1], np.array([kept[layer] for layer in rows], np.int32)))
        pieces.append(run_pieces)
    return pieces


def run_position(path: tuple) -> int | None:
    """Where on a pytree path the index of the run stands: behind the key "runs"."""
    return next((i + 1 for i, key in enumerate(path) if key == DictKey("runs")), None)


def leaf_key(path: tuple, run: int | None = None) -> str:
    """The dotted path of a leaf, `params.runs.0.moe.down_EFD`; at another run where `run` is given."""
    if run is not None:
        position = run_position(path)
        assert position is not None, path
        path = (*path[:position], SequenceKey(run), *path[position + 1 :])
    return keystr(path, simple=True, separator=".")


@dataclasses.dataclass(frozen=True)
class LeafMove:
    """One leaf of the pruned state: what it shall be, and the old leaves it is made of.

    `target`: shape, dtype, sharding. `sources`: key of each old leaf, in the order of `pieces`; a leaf
    that stays as it is has one source and no pieces. `family`: the same for all runs of one parameter.
    `axis`: its expert dimension, None where it has none.
    """

    target: jax.ShapeDtypeStruct
    sources: tuple[str, ...]
    pieces: tuple[Piece, ...]
    family: str
    axis: int | None

    def old_shape(self, old_runs: Runs, piece: Piece) -> tuple[int, ...]:
        """Shape of the old leaf that `piece` is part of."""
        shape = list(self.target.shape)
        shape[0], experts = old_runs[piece.run]
        if self.axis is not None:
            shape[self.axis] = experts
        return tuple(shape)


def leaf_moves(abstract_new, old_runs: Runs, kept: Kept) -> Iterator[LeafMove]:
    """A `LeafMove` for every leaf of the abstract pruned state, in the order of `jax.tree.leaves`."""
    pieces = moved_pieces(old_runs, kept)
    for path, target in tree_flatten_with_path(abstract_new)[0]:
        position = run_position(path)
        if position is None:
            yield LeafMove(target, (leaf_key(path),), (), leaf_key(path), None)
            continue
        parts = tuple(pieces[path[position].idx])
        sources = tuple(leaf_key(path, piece.run) for piece in parts)
        axis = expert_axis(leaf_name(path), len(target.shape))
        layers = [len(piece.kept) for piece in parts]
        is_moved = axis is not None or layers != [old_runs[parts[0].run][0]]
        yield LeafMove(target, sources, parts if is_moved else (), leaf_key(path, 0), axis)


def pruned_config(config: Config, kept: Kept) -> Config:
    """The config of the pruned model; `UserError` where it does not fit top_k or the resolved mesh."""
    moved_pieces(config.model.runs, kept)
    pruned = config.with_num_experts(tuple(len(slots) for slots in kept))
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


Gathers = list[jax.stages.Compiled | None]  # by leaf of the pruned state; None for one that stays as it is


def compile_gathers(abstract_old, kept: Kept, old_model: ModelConfig, abstract_new) -> Gathers:
    """The programs of `prune_state`, for states of `jax.ShapeDtypeStruct`s with shardings; equal ones once."""
    old = {leaf_key(path): leaf for path, leaf in tree_flatten_with_path(abstract_old)[0]}
    programs = functools.cache(_make_gather)
    compiled: dict[tuple, jax.stages.Compiled] = {}
    gathers: Gathers = []
    for move in leaf_moves(abstract_new, old_model.runs, kept):
        if not move.pieces:
            gathers.append(None)
            continue
        gather, arguments = _gather_call(move, old, programs)
        key = (gather, *((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments)))
        if key not in compiled:
            compiled[key] = gather.lower(*arguments).compile()
        gathers.append(compiled[key])
    return gathers


def prune_state(state, gathers: Gathers, kept: Kept, old_model: ModelConfig, abstract_new):
    """The pruned state, made in device memory on the same devices; consumes `state`.

    gathers: of `compile_gathers` with the same arguments. abstract_new: the pruned model's state as
    `jax.ShapeDtypeStruct` with shardings. Goes through one parameter (of all runs) after another and frees
    its old leaves at once, so that memory peaks at the old state and one new parameter.
    """
    old = {leaf_key(path): leaf for path, leaf in tree_flatten_with_path(state)[0]}
    moves = list(leaf_moves(abstract_new, old_model.runs, kept))
    families: dict[str, list[int]] = {}
    for i, move in enumerate(moves):
        families.setdefault(move.family, []).append(i)
    new: dict[int, jax.Array] = {}
    for members in families.values():
        new |= {i: _gather_leaf(moves[i], old, gathers[i]) for i in members}
        jax.block_until_ready([new[i] for i in members])
        for source in {source for i in members if moves[i].pieces for source in moves[i].sources}:
            old.pop(source).delete()
    return tree_unflatten(jax.tree.structure(abstract_new), [new[i] for i in range(len(moves))])


def _gather_leaf(move: LeafMove, old: dict[str, jax.Array], gather: jax.stages.Compiled | None) -> jax.Array:
    if gather is None:
        return jax.device_put(old[move.sources[0]], move.target.sharding)
    leaf = gather(*_arguments(move, old))
    assert (leaf.shape, leaf.dtype) == (move.target.shape, move.target.dtype), (move.family, leaf.shape, leaf.dtype)
    return leaf


def _gather_call(
    move: LeafMove, old: dict, programs: Callable[..., jax.stages.Wrapped]
) -> tuple[jax.stages.Wrapped, tuple]:
    """The jitted gather of a leaf, and its arguments; `old` may hold abstract leaves."""
    whole = tuple(_whole_experts(old[source], move.axis) for source in move.sources)
    return programs(move.axis, whole, move.target.sharding), _arguments(move, old)


def _arguments(move: LeafMove, old: dict) -> tuple:
    starts = [np.int32(piece.start) for piece in move.pieces]
    return [old[source] for source in move.sources], starts, [piece.kept for piece in move.pieces]


def lower_largest_gather(abstract_old, kept: Kept, old_model: ModelConfig, abstract_new) -> jax.stages.Lowered:
    """The program of `prune_state` that needs most memory, for a state of `jax.ShapeDtypeStruct`s."""
    old = {leaf_key(path): leaf for path, leaf in tree_flatten_with_path(abstract_old)[0]}
    changed = [move for move in leaf_moves(abstract_new, old_model.runs, kept) if move.pieces]
    largest = max(changed, key=lambda move: sum(math.prod(old[source].shape) for source in move.sources))
    gather, arguments = _gather_call(largest, old, _make_gather)
    return gather.lower(*arguments)


def _whole_experts(leaf: jax.Array, axis: int | None) -> NamedSharding:
    """The leaf's sharding with every expert whole on each device, its mesh axis on another dimension.

    A gather along a sharded dimension would build the full array everywhere; two all-to-alls around
    a local gather do not. Four experts of two columns on two devices, of which experts 3, 0 survive:

        stored          all-to-all      gather along E   all-to-all
        0 0 | device 0    0 | 0           3 | 3            3 3 | device 0
        1 1 |             1 | 1           0 | 0            0 0 | device 1
        2 2 | device 1    2 | 2
        3 3 |             3 | 3
    """
    sharding = leaf.sharding
    assert isinstance(sharding, NamedSharding)
    if axis is None:
        return sharding
    spec = [*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec))]
    mesh_axis, spec[axis] = spec[axis], None
    for dim in range(1, leaf.ndim):
        if mesh_axis and dim != axis and spec[dim] is None and leaf.shape[dim] % sharding.mesh.shape[mesh_axis] == 0:
            spec[dim] = mesh_axis
            break
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _make_gather(axis: int | None, whole: tuple[NamedSharding, ...], target: NamedSharding) -> jax.stages.Wrapped:
    """A jitted (old leaves, first layers, kept slots) -> new leaf, from one leaf a piece."""

    def gather(leaves, starts, kept):
        parts = []
        for leaf, start, kept_RE, sharding in zip(leaves, starts, kept, whole, strict=True):
            part = jax.lax.dynamic_slice_in_dim(leaf, start, kept_RE.shape[0])
            if axis is not None:
                part = jax.lax.with_sharding_constraint(part, sharding)
                take = functools.partial(jnp.take, axis=axis - 1, mode="clip")
                part = jax.vmap(take)(part, kept_RE)
            parts.append(part)
        return jnp.concatenate(parts)

    return jax.jit(gather, out_shardings=target)
