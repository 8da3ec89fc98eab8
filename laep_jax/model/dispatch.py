"""Bringing tokens to the devices that hold their experts, and the results back (paper 3.3).

Both ways have one interface, run inside `jax.shard_map`, drop no token, and give the same result:

* `all_gather_dispatch`: every device of an expert-parallel group sees all tokens of the group, runs
  its own experts on those routed to it, and a reduce-scatter adds the shares. Runs everywhere.
* `ragged_dispatch`: each row is sent to its expert's device only (`jax.lax.ragged_all_to_all`; XLA
  has none for CPU, where an all-gather and the same index arithmetic stand in for it).
  `bounded_dispatch` is the same in a receive buffer of chosen size.

Axes: T tokens of a device, K top-k slots, E experts, R rows sorted by expert, D hidden, P devices
of the expert axis.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from laep_jax.config import BATCH_AXES

AXIS = "expert"
WITHIN_REPLICA = BATCH_AXES[1:]  # replicas may be on different TPU slices, and have nothing to agree on here
BLOCK = 128  # rows an expert's matrices are applied to at once on CPU
DISPATCH_NAMES = ("moe_routes", "moe_dispatched", "moe_expert_output")


class Routes(NamedTuple):
    """Which row of a buffer sorted by expert holds which (token, slot) pair; integers only.

    `slot_of_row_R`: index into the flattened [T, K] slots. Rows past `sum(group_sizes_E)` belong to
    nobody; there are at least `BLOCK` of them, so that a block of rows never ends past the buffer.
    `row_of_slot_TK`: the inverse, -1 where the slot's expert is not here.
    """

    slot_of_row_R: jax.Array
    row_of_slot_TK: jax.Array
    group_sizes_E: jax.Array


class Tokens(NamedTuple):
    """`x_TD`: this device's tokens. `ids_TK`: their experts, the number of experts for none. `weights_TK`: float32."""

    x_TD: jax.Array
    ids_TK: jax.Array
    weights_TK: jax.Array


Matrices = tuple[jax.Array, ...]  # of this device's experts
Experts = Callable[..., jax.Array]  # (x_TD, weights_TK, routes, *matrices) -> y_TD


def make_routes(ids_TK: jax.Array, num_experts: int) -> Routes:
    """Sorts the slots by expert id, stably; ids outside [0, num_experts) go nowhere.

    A token's K experts differ, so at most min(K, num_experts) of its slots are here.
    """
    num_tokens, top_k = ids_TK.shape
    ids_N = ids_TK.reshape(-1)
    here_N = (ids_N >= 0) & (ids_N < num_experts)
    order_N = jnp.argsort(jnp.where(here_N, ids_N, num_experts), stable=True).astype(jnp.int32)
    rank_N = jnp.zeros_like(order_N).at[order_N].set(jnp.arange(ids_N.size, dtype=jnp.int32), unique_indices=True)
    group_sizes_E = jnp.sum(jax.nn.one_hot(ids_N, num_experts, dtype=jnp.int32), axis=0, dtype=jnp.int32)
    num_rows = num_tokens * min(top_k, num_experts)
    return checkpoint_name(
        Routes(
            jnp.pad(order_N[:num_rows], (0, BLOCK)),
            jnp.where(here_N, rank_N, -1).reshape(num_tokens, top_k),
            group_sizes_E,
        ),
        DISPATCH_NAMES[0],
    )


def arrival_routes(counts_Pe: jax.Array, num_rows: int) -> Routes:
    """Routes of rows that arrived by sender, then by expert: no sort, the counts give the place of each piece.

    counts_Pe: rows by [sender, expert of this device], together at most `num_rows`. Two senders a and b, two experts
    0 and 1, counts [[2, 1], [1, 3]]; a piece is what one sender has for one expert:

        arrived             a0 a0 | a1 | b0 | b1 b1 b1
        sorted by expert    a0 a0 | b0 | a1 | b1 b1 b1
        arrival_of_row_R     0  1    3    2    4  5  6
    """
    piece_start_Pe = _exclusive_cumsum(counts_Pe.reshape(-1), axis=0).reshape(counts_Pe.shape)
    group_start_Pe = _exclusive_cumsum(counts_Pe.T.reshape(-1), axis=0).reshape(counts_Pe.T.shape).T
    total, row_R = jnp.sum(counts_Pe), jnp.arange(num_rows, dtype=jnp.int32)

    def moved(from_N: jax.Array, to_N: jax.Array, counts_N: jax.Array) -> jax.Array:
        """Where each row goes whose piece begins at `from_N` and shall begin at `to_N`."""
        ends_N = from_N + counts_N
        piece_R = jnp.searchsorted(ends_N, row_R, side="right", method="compare_all")
        return row_R + (to_N - from_N)[jnp.minimum(piece_R, ends_N.size - 1)]

    row_of_arrival_R = moved(piece_start_Pe.reshape(-1), group_start_Pe.reshape(-1), counts_Pe.reshape(-1))
    arrival_of_row_R = moved(group_start_Pe.T.reshape(-1), piece_start_Pe.T.reshape(-1), counts_Pe.T.reshape(-1))
    return checkpoint_name(
        Routes(
            jnp.pad(jnp.where(row_R < total, arrival_of_row_R, 0), (0, BLOCK)),
            jnp.where(row_R < total, row_of_arrival_R, -1)[:, None],
            jnp.sum(counts_Pe, axis=0),
        ),
        DISPATCH_NAMES[0],
    )


def _in_use(routes: Routes) -> jax.Array:
    return jnp.arange(routes.slot_of_row_R.size)[:, None] < jnp.sum(routes.group_sizes_E)


def _rows_of_slots(rows_RD: jax.Array, routes: Routes) -> jax.Array:
    """[R, D] -> [T, K, D], zero where the slot's expert is not here."""
    row_TK = routes.row_of_slot_TK
    return jnp.where((row_TK >= 0)[..., None], rows_RD[jnp.maximum(row_TK, 0)], 0)


def sum_over_slots(rows_RD: jax.Array, routes: Routes) -> jax.Array:
    """[R, D] -> [T, D], the transpose of `permute`, as a gather: no scatter-add."""
    return jnp.sum(_rows_of_slots(rows_RD, routes), axis=1, dtype=jnp.float32).astype(rows_RD.dtype)


@jax.custom_vjp
def permute(x_TD: jax.Array, routes: Routes) -> jax.Array:
    """[T, D] -> [R, D]: each token once for each of its experts here, sorted by expert, then zeros."""
    top_k = routes.row_of_slot_TK.shape[1]
    return jnp.where(_in_use(routes), x_TD[routes.slot_of_row_R // top_k], 0)


permute.defvjp(
    lambda x_TD, routes: (permute(x_TD, routes), routes),
    lambda routes, dy_RD: (sum_over_slots(dy_RD, routes), None),
)


@jax.custom_vjp
def combine(rows_RD: jax.Array, weights_TK: jax.Array, routes: Routes) -> jax.Array:
    """[R, D] -> [T, D]: the weighted sum of each token's rows, added in float32."""
    weighted_TKD = _rows_of_slots(rows_RD, routes) * weights_TK[..., None]
    return jnp.sum(weighted_TKD, axis=1).astype(rows_RD.dtype)


def _combine_backward(residuals, dy_TD: jax.Array):
    rows_RD, weights_TK, routes = residuals
    slot_R = routes.slot_of_row_R
    drows_RD = dy_TD[slot_R // weights_TK.shape[1]] * weights_TK.reshape(-1)[slot_R][:, None]
    of_slots_TKD = _rows_of_slots(rows_RD, routes).astype(weights_TK.dtype)
    dweights_TK = jnp.sum(of_slots_TKD * dy_TD[:, None, :], axis=-1)
    return jnp.where(_in_use(routes), drows_RD, 0).astype(rows_RD.dtype), dweights_TK, None


combine.defvjp(
    lambda rows, weights, routes: (combine(rows, weights, routes), (rows, weights, routes)), _combine_backward
)


def gather(x: jax.Array, axis_name: str, axis: int = 0) -> jax.Array:
    """`jax.lax.all_gather`, tiled; XLA:CPU would copy an array gathered from one device."""
    return x if jax.lax.axis_size(axis_name) == 1 else jax.lax.all_gather(x, axis_name, axis=axis, tiled=True)


def _local_experts(num_experts: int) -> int:
    """Experts of one device of the expert axis."""
    devices = jax.lax.axis_size(AXIS)
    assert num_experts % devices == 0, f"{num_experts} experts on {devices} devices of the expert axis"
    return num_experts // devices


def all_gather_dispatch(tokens: Tokens, matrices: Matrices, experts: Experts, num_experts: int) -> jax.Array:
    """Applies each token's experts.

    Args:
      experts: adds up, for each token of a buffer, this device's experts, given as `matrices`.
      num_experts: of the layer, over all devices of the expert axis.

    Returns:
      y_TD, the weighted sum over each token's experts.
    """
    devices, local_experts = jax.lax.axis_size(AXIS), _local_experts(num_experts)
    first = jax.lax.axis_index(AXIS) * local_experts
    x_TD, ids_TK, weights_TK = (gather(array, AXIS) for array in tokens)
    routes = make_routes(ids_TK - first, local_experts)
    y_TD = experts(checkpoint_name(x_TD, DISPATCH_NAMES[1]), weights_TK, routes, *matrices)
    return y_TD if devices == 1 else jax.lax.psum_scatter(y_TD, AXIS, scatter_dimension=0, tiled=True)


def ragged_dispatch(
    tokens: Tokens, matrices: Matrices, experts: Experts, num_experts: int, *, on_cpu: bool, num_rows: int | None = None
) -> jax.Array:
    """As `all_gather_dispatch`.

    on_cpu: whether XLA compiles for CPU. num_rows: of the receive buffer, at least what any device of the
    group receives; by default the worst case, all rows of the group that can come here.
    """
    x_TD, ids_TK, weights_TK = tokens
    devices, local_experts = jax.lax.axis_size(AXIS), _local_experts(num_experts)
    num_tokens, top_k = ids_TK.shape
    num_rows = num_rows or devices * num_tokens * min(top_k, local_experts)
    routes = make_routes(ids_TK, num_experts)  # by expert is by device
    counts_PPe = jax.lax.all_gather(routes.group_sizes_E, AXIS).reshape(devices, devices, local_experts)
    sizes_PP = jnp.sum(counts_PPe, axis=2)  # [sender, receiver]
    received_RD = exchange(permute(x_TD, routes), sizes_PP, num_rows, on_cpu)
    received_RD = checkpoint_name(received_RD, DISPATCH_NAMES[1])

    local_routes = arrival_routes(counts_PPe[:, jax.lax.axis_index(AXIS)], num_rows)
    rows_RD = experts(received_RD, jnp.ones((num_rows, 1), weights_TK.dtype), local_routes, *matrices)
    returned_RD = exchange(rows_RD, sizes_PP.T, routes.slot_of_row_R.size, on_cpu)
    return combine(checkpoint_name(returned_RD, DISPATCH_NAMES[2]), weights_TK, routes)


def bounded_dispatch(
    tokens: Tokens, matrices: Matrices, experts: Experts, num_experts: int, *, on_cpu: bool, receive_buffer: float
) -> jax.Array:
    """`ragged_dispatch` with room for `receive_buffer` times the rows that equal loads would bring.

    Where any device of a data-parallel replica would receive more, all devices of the replica send their tokens in
    parts so small that even the worst case of one fits. Nothing is dropped and nothing larger is allocated; the
    backward pass takes the same way and computes it again.
    """
    x_TD, ids_TK, weights_TK = tokens
    num_tokens, top_k = ids_TK.shape
    devices, local_experts = jax.lax.axis_size(AXIS), _local_experts(num_experts)
    sizes_E = jnp.sum(jax.nn.one_hot(ids_TK.reshape(-1), num_experts, dtype=jnp.int32), axis=0, dtype=jnp.int32)
    received_P = jnp.sum(jax.lax.psum(sizes_E, AXIS).reshape(devices, local_experts), axis=1)
    num_rows = -(-int(receive_buffer * num_tokens * top_k) // BLOCK) * BLOCK
    fits = jax.lax.pmax(jnp.max(received_P), WITHIN_REPLICA) <= num_rows
    send = functools.partial(ragged_dispatch, experts=experts, num_experts=num_experts, on_cpu=on_cpu)

    def at_once(ids_TK, x_TD, weights_TK, matrices):
        return send(Tokens(x_TD, ids_TK, weights_TK), matrices, num_rows=num_rows)

    def in_parts(ids_TK, x_TD, weights_TK, matrices):
        parts = next(n for n in range(devices, num_tokens + 1) if num_tokens % n == 0)
        split = Tokens(*(x.reshape(parts, -1, x.shape[-1]) for x in (x_TD, ids_TK, weights_TK)))
        part = jax.checkpoint(lambda tokens: send(tokens, matrices))
        return jax.lax.map(part, split).reshape(x_TD.shape)

    return _either(at_once, in_parts, fits, ids_TK, x_TD, weights_TK, matrices)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _either(one: Callable, other: Callable, first: jax.Array, ids: jax.Array, *operands):
    """`one(ids, *operands)` where `first` holds, else `other`; keeps neither's intermediates.

    `lax.cond` alone would keep those of both for the backward pass.
    """
    return jax.lax.cond(first, one, other, ids, *operands)


def _either_backward(one, other, residuals, dy):
    first, ids, operands = residuals

    def gradients(function):
        return lambda dy, ids, *operands: jax.vjp(functools.partial(function, ids), *operands)[1](dy)

    return None, None, *jax.lax.cond(first, gradients(one), gradients(other), dy, ids, *operands)


_either.defvjp(
    lambda one, other, first, ids, *operands: (_either(one, other, first, ids, *operands), (first, ids, operands)),
    _either_backward,
)


def _exclusive_cumsum(sizes: jax.Array, axis: int) -> jax.Array:
    return jnp.cumsum(sizes, axis=axis) - sizes


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def exchange(x_ND: jax.Array, sizes_PP: jax.Array, num_rows: int, on_cpu: bool) -> jax.Array:
    """Sends consecutive pieces of rows to the devices of the expert axis.

    Args:
      x_ND: rows in the order of their receivers. sizes_PP: rows by [sender, receiver].
      num_rows: of the result, at least what any device receives. on_cpu: use the stand-in.

    Returns:
      [num_rows, D], the received rows in the order of their senders, then zeros. The backward pass
      is the way back: the same exchange with the transposed sizes.
    """
    if on_cpu:
        return _exchange_by_all_gather(x_ND, sizes_PP, num_rows)
    me = jax.lax.axis_index(AXIS)
    return jax.lax.ragged_all_to_all(
        x_ND,
        jnp.zeros((num_rows, x_ND.shape[1]), x_ND.dtype),
        input_offsets=_exclusive_cumsum(sizes_PP, axis=1)[me],
        send_sizes=sizes_PP[me],
        output_offsets=_exclusive_cumsum(sizes_PP, axis=0)[me],
        recv_sizes=sizes_PP[:, me],
        axis_name=AXIS,
    )


def _exchange_by_all_gather(x_ND: jax.Array, sizes_PP: jax.Array, num_rows: int) -> jax.Array:
    me = jax.lax.axis_index(AXIS)
    x_PND = jax.lax.all_gather(x_ND, AXIS)
    ends_P = jnp.cumsum(sizes_PP[:, me])
    row_R = jnp.arange(num_rows)
    sender_R = jnp.searchsorted(ends_P, row_R, side="right", method="compare_all")
    sender_R = jnp.minimum(sender_R, ends_P.size - 1)
    piece_R = row_R - (ends_P - sizes_PP[:, me])[sender_R]
    source_R = _exclusive_cumsum(sizes_PP, axis=1)[sender_R, me] + piece_R
    return jnp.where((row_R < ends_P[-1])[:, None], x_PND[sender_R, source_R], 0)


def _exchange_forward(x_ND, sizes_PP, num_rows, on_cpu):
    return exchange(x_ND, sizes_PP, num_rows, on_cpu), (sizes_PP, np.zeros(x_ND.shape[0]))


def _exchange_backward(num_rows, on_cpu, residuals, dy_RD):
    sizes_PP, rows_N = residuals
    return exchange(dy_RD, sizes_PP.T, rows_N.shape[0], on_cpu), None


exchange.defvjp(_exchange_forward, _exchange_backward)
