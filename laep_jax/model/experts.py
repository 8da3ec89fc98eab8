"""The experts' SwiGLU over rows sorted by expert: a block loop for CPU, `ragged_dot` elsewhere.

`jax.lax.ragged_dot` on XLA:CPU multiplies every row with every expert, so its cost grows with the
number of experts; the block loop costs what the tokens cost.
Letters: T tokens, R rows by expert, D hidden, E experts of this device, F ffn, G = 2F, gate first.
"""

import jax
import jax.numpy as jnp

from laep_jax.model.dispatch import BLOCK, Routes, permute, sum_over_slots


def _swiglu(x_BD: jax.Array, gate_up_DG: jax.Array, down_FD: jax.Array) -> jax.Array:
    gate_BF, up_BF = jnp.split(x_BD @ gate_up_DG, 2, axis=-1)
    return (jax.nn.silu(gate_BF) * up_BF) @ down_FD


def experts_by_ragged_dot(x_TD: jax.Array, routes: Routes, gate_up_EDG: jax.Array, down_EFD: jax.Array) -> jax.Array:
    """[T, D] -> [R, D], every row through its expert; rows past the last expert's are zero.

    TPU kernels leave rows past the sum of the group sizes uninitialised, hence the masks.
    """
    sizes_E = routes.group_sizes_E
    in_use_R1 = jnp.arange(routes.slot_of_row_R.size)[:, None] < jnp.sum(sizes_E)
    both_RG = jax.lax.ragged_dot(permute(x_TD, routes), gate_up_EDG, sizes_E)
    gate_RF, up_RF = jnp.split(jnp.where(in_use_R1, both_RG, 0), 2, axis=-1)
    y_RD = jax.lax.ragged_dot(jax.nn.silu(gate_RF) * up_RF, down_EFD, sizes_E)
    return jnp.where(in_use_R1, y_RD, 0)


def _loop(routes: Routes, body, carry):
    """Calls `carry = body(expert, start, rows in use, carry)` for each block of rows in use.

    Each expert's blocks begin at its own first row. The surplus rows of its last block are computed
    with the wrong expert and written, then written again by the next expert's first block.
    """
    sizes_E = routes.group_sizes_E
    end_E = jnp.cumsum(sizes_E)
    blocks_E = (sizes_E + BLOCK - 1) // BLOCK
    last_E = jnp.cumsum(blocks_E)

    def step(i, carry):
        expert = jnp.searchsorted(last_E, i, side="right")
        start = end_E[expert] - sizes_E[expert] + (i - last_E[expert] + blocks_E[expert]) * BLOCK
        return body(expert, start, end_E[expert] - start, carry)

    return jax.lax.fori_loop(0, last_E[-1], step, carry)


def _block(x_TD: jax.Array, routes: Routes, start: jax.Array) -> jax.Array:
    slots = jax.lax.dynamic_slice(routes.slot_of_row_R, (start,), (BLOCK,))
    return x_TD[slots // routes.row_of_slot_TK.shape[1]]


@jax.custom_vjp
def experts_by_blocks(x_TD: jax.Array, routes: Routes, gate_up_EDG: jax.Array, down_EFD: jax.Array) -> jax.Array:
    """[T, D] -> [R, D] as `experts_by_ragged_dot`, but rows past the last expert's are arbitrary.

    The whole SwiGLU of a block is done while it is in the cache and nothing of its middle is kept:
    the backward pass computes it again, block by block.
    """

    def body(expert, start, _, out_RD):
        y_BD = _swiglu(_block(x_TD, routes, start), gate_up_EDG[expert], down_EFD[expert])
        return jax.lax.dynamic_update_slice(out_RD, y_BD, (start, 0))

    return _loop(routes, body, jnp.zeros((routes.slot_of_row_R.size, x_TD.shape[1]), x_TD.dtype))


def _blocks_backward(residuals, dy_RD: jax.Array):
    x_TD, routes, gate_up_EDG, down_EFD = residuals

    def body(expert, start, rows_in_use, carry):
        dx_RD, dgate_up_EDG, ddown_EFD = carry
        _, backward = jax.vjp(_swiglu, _block(x_TD, routes, start), gate_up_EDG[expert], down_EFD[expert])
        dy_BD = jax.lax.dynamic_slice(dy_RD, (start, 0), (BLOCK, dy_RD.shape[1]))
        dx_BD, dgate_up_DG, ddown_FD = backward(jnp.where(jnp.arange(BLOCK)[:, None] < rows_in_use, dy_BD, 0))
        return (
            jax.lax.dynamic_update_slice(dx_RD, dx_BD, (start, 0)),
            dgate_up_EDG.at[expert].add(dgate_up_DG),
            ddown_EFD.at[expert].add(ddown_FD),
        )

    zeros = (jnp.zeros_like(dy_RD), jnp.zeros(gate_up_EDG.shape, jnp.float32), jnp.zeros(down_EFD.shape, jnp.float32))
    dx_RD, dgate_up_EDG, ddown_EFD = _loop(routes, body, zeros)
    return sum_over_slots(dx_RD, routes), None, dgate_up_EDG.astype(gate_up_EDG.dtype), ddown_EFD.astype(down_EFD.dtype)


experts_by_blocks.defvjp(lambda *args: (experts_by_blocks(*args), args), _blocks_backward)
