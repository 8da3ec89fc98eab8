"""The experts' SwiGLU over rows sorted by expert, and the weighted sum of each token's rows.

A block loop for CPU, JAX's megablox kernels for TPU, `ragged_dot` elsewhere. `jax.lax.ragged_dot` multiplies every row
with every expert on XLA:CPU, and so does its weight gradient on TPU, which has no kernel there: the cost grows with the
number of experts. The block loop and the kernels cost what the tokens cost.
Axes: T tokens, K top-k slots, R rows by expert, D hidden, E experts of this device, F ffn, G = 2F, gate
first, B rows of a block; U hidden size of a shared expert, or twice that.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.pallas.ops.tpu.megablox import gmm

from laep_jax.config import ModelConfig
from laep_jax.model.dispatch import BLOCK, Routes, combine, permute, sum_over_slots
from laep_jax.model.layers import gated

REST_BLOCK = 32  # rows, for what BLOCK leaves over
ROW_TILE, COLUMN_TILE = 512, 512  # of the kernels: a weight that is read serves so many rows; larger ones compile long


class SharedExpert(nnx.Module):
    """[B, S, D] -> [B, S, D]: a SwiGLU of every token, which no router weights (DeepSeekMoE, arXiv 2401.06066)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        hidden, ffn = config.hidden_size, config.shared_ffn_size
        residual_init = nnx.initializers.normal(0.02 / (2 * config.num_layers) ** 0.5)
        self.gate_up_UD = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (2 * ffn, hidden)))
        self.down_UD = nnx.Param(residual_init(rngs.params(), (ffn, hidden)))

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        return gated(jnp.einsum("bsd,ud->bsu", x_BSD, self.gate_up_UD[...])) @ self.down_UD[...]


def _experts_by(
    product: Callable[..., jax.Array],
    x_TD: jax.Array,
    weights_TK: jax.Array,
    routes: Routes,
    gate_up_EDG: jax.Array,
    down_EFD: jax.Array,
) -> jax.Array:
    """[T, D] -> [T, D]: the weighted sum of each token's experts, of those that are here.

    product: (rows, matrices, group sizes) -> rows. Kernels leave rows past the sum of the group sizes uninitialised,
    in gradients too, hence the masks; `permute` looks at no such row.
    """
    sizes_E = routes.group_sizes_E
    in_use_R1 = jnp.arange(routes.slot_of_row_R.size)[:, None] < jnp.sum(sizes_E)
    x_RD = permute(x_TD, routes)
    with jax.named_scope("experts"):
        both_RG = product(x_RD, gate_up_EDG, sizes_E)
        y_RD = product(gated(jnp.where(in_use_R1, both_RG, 0)), down_EFD, sizes_E)
    return combine(jnp.where(in_use_R1, y_RD, 0), weights_TK, routes)


experts_by_ragged_dot = functools.partial(_experts_by, jax.lax.ragged_dot)


def _tiles(rows: int, inner: int, columns: int) -> tuple[int, int, int]:
    """Of a product [rows, inner] x [inner, columns], whichever of the three it is. A dimension may be one tile."""
    return min(ROW_TILE, rows), min(COLUMN_TILE, inner), min(COLUMN_TILE, columns)


def experts_by_megablox(
    x_TD: jax.Array,
    weights_TK: jax.Array,
    routes: Routes,
    gate_up_EDG: jax.Array,
    down_EFD: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """As `experts_by_ragged_dot`; a kernel for each of the three products. interpret: where there is no TPU, slowly."""
    tail = -routes.slot_of_row_R.size % ROW_TILE  # rows in whole tiles
    routes = routes._replace(slot_of_row_R=jnp.pad(routes.slot_of_row_R, (0, tail)))

    def product(x_RX, w_EXY, sizes_E):
        return gmm(x_RX, w_EXY, sizes_E, x_RX.dtype, _tiles, None, None, False, interpret)

    return _experts_by(product, x_TD, weights_TK, routes, gate_up_EDG, down_EFD)


@jax.named_scope("experts")
def _loop(routes: Routes, begin, block_of_rows, end, carry):
    """Goes through the experts that have rows, in order, and through the rows of each in blocks.

    Calls `matrices, sums = begin(expert)`, for each block `sums, carry = block_of_rows(block, start, rows in use,
    matrices, sums, carry)`, and `carry = end(expert, sums, carry)`. The rows of an expert are processed
    remainder first, in blocks of REST_BLOCK, then in full blocks of BLOCK. The last block of a remainder may overlap
    rows that follow; it writes wrong values there, which their owner overwrites, since its turn is later.

        rows of one expert   [ REST_BLOCK | REST_BLOCK.. ][   BLOCK   ][   BLOCK   ]
                               size % BLOCK rows    ^^^^ overlap: overwritten by the next block
    """
    sizes_E = routes.group_sizes_E
    first_E = jnp.cumsum(sizes_E) - sizes_E
    in_use_first_E = jnp.argsort(sizes_E == 0, stable=True)

    def one_expert(i, carry):
        expert = in_use_first_E[i]
        first, size = first_E[expert], sizes_E[expert]
        rest = size % BLOCK
        matrices, sums = begin(expert)
        for block, start, rows in ((REST_BLOCK, first, rest), (BLOCK, first + rest, size - rest)):

            def one_block(j, both, block=block, start=start, rows=rows):
                return block_of_rows(block, start + j * block, rows - j * block, matrices, *both)

            sums, carry = jax.lax.fori_loop(0, (rows + block - 1) // block, one_block, (sums, carry))
        return end(expert, sums, carry)

    return jax.lax.fori_loop(0, jnp.sum(sizes_E > 0), one_expert, carry)


def _slots(routes: Routes, start: jax.Array, block: int) -> jax.Array:
    return jax.lax.dynamic_slice(routes.slot_of_row_R, (start,), (block,))


@jax.custom_vjp
def experts_by_blocks(
    x_TD: jax.Array, weights_TK: jax.Array, routes: Routes, gate_up_EDG: jax.Array, down_EFD: jax.Array
) -> jax.Array:
    """As `experts_by_ragged_dot`.

    The SwiGLU of a block is completed while it is in the cache; no intermediate array is kept:
    the backward pass computes it again, block by block, but for the last product.
    """
    top_k = weights_TK.shape[1]

    def begin(expert):
        return (gate_up_EDG[expert], down_EFD[expert]), ()

    def block_of_rows(block, start, _, matrices, sums, rows_RD):
        gate_up_DG, down_FD = matrices
        x_BD = x_TD[_slots(routes, start, block) // top_k]
        y_BD = gated(x_BD @ gate_up_DG) @ down_FD
        return sums, jax.lax.dynamic_update_slice(rows_RD, y_BD, (start, 0))

    no_rows_RD = jnp.zeros((routes.slot_of_row_R.size, x_TD.shape[1]), x_TD.dtype)
    rows_RD = _loop(routes, begin, block_of_rows, lambda expert, sums, rows_RD: rows_RD, no_rows_RD)
    return combine(rows_RD, weights_TK, routes)


def _blocks_backward(residuals, dy_TD: jax.Array):
    x_TD, weights_TK, routes, gate_up_EDG, down_EFD = residuals

    def begin(expert):
        gate_up_DG, down_FD = gate_up_EDG[expert], down_EFD[expert]
        zeros = (jnp.zeros(gate_up_DG.shape, jnp.float32), jnp.zeros(down_FD.shape, jnp.float32))
        return (gate_up_DG, down_FD), zeros

    def block_of_rows(block, start, rows_in_use, matrices, sums, carry):
        (gate_up_DG, down_FD), (dgate_up_DG, ddown_FD) = matrices, sums
        dx_RD, dweights_R, *of_experts = carry
        slots_B = _slots(routes, start, block)
        tokens_B = slots_B // weights_TK.shape[1]
        weights_B1 = weights_TK.reshape(-1)[slots_B][:, None].astype(x_TD.dtype)
        x_BD = x_TD[tokens_B]
        dy_BD = jnp.where(jnp.arange(block)[:, None] < rows_in_use, dy_TD[tokens_B], 0)
        hidden_BF, of_both = jax.vjp(gated, x_BD @ gate_up_DG)
        dhidden_BF = dy_BD @ down_FD.T  # of the row before its weight
        [dboth_BG] = of_both(dhidden_BF * weights_B1)
        dweights_B = jnp.sum(hidden_BF * dhidden_BF, axis=1, dtype=jnp.float32)
        dx_RD = jax.lax.dynamic_update_slice(dx_RD, dboth_BG @ gate_up_DG.T, (start, 0))
        dweights_R = jax.lax.dynamic_update_slice(dweights_R, dweights_B, (start,))
        sums = (dgate_up_DG + x_BD.T @ dboth_BG, ddown_FD + hidden_BF.T @ (dy_BD * weights_B1))
        return sums, (dx_RD, dweights_R, *of_experts)

    def end(expert, sums, carry):
        *of_rows, dgate_up_EDG, ddown_EFD = carry
        dgate_up_DG, ddown_FD = (part.astype(x_TD.dtype) for part in sums)
        return *of_rows, dgate_up_EDG.at[expert].set(dgate_up_DG), ddown_EFD.at[expert].set(ddown_FD)

    num_rows, hidden_size = routes.slot_of_row_R.size, x_TD.shape[1]
    zeros = (
        jnp.zeros((num_rows, hidden_size), x_TD.dtype),
        jnp.zeros((num_rows,), jnp.float32),
        jnp.zeros_like(gate_up_EDG),
        jnp.zeros_like(down_EFD),
    )
    dx_RD, dweights_R, dgate_up_EDG, ddown_EFD = _loop(routes, begin, block_of_rows, end, zeros)
    row_TK = routes.row_of_slot_TK
    dweights_TK = jnp.where(row_TK >= 0, dweights_R[jnp.maximum(row_TK, 0)], 0).astype(weights_TK.dtype)
    return sum_over_slots(dx_RD, routes), dweights_TK, None, dgate_up_EDG, ddown_EFD


experts_by_blocks.defvjp(lambda *args: (experts_by_blocks(*args), args), _blocks_backward)
