"""Localized filtering: two causal convolutions of width two before queries and keys (paper 3.4.2).

    y1[t] = A0 x[t-1] + A1 x[t]        D -> D/2
    y2[t] = B0 y1[t-1] + B1 y1[t]      D/2 -> D
    f     = RMSNorm(y2 + x)

Terms before the document's start are zero (y1[-1] too, not A's bias), and nothing stands between the two convolutions,
as in Yuan 2.0 (arXiv 2311.15786).
Axes: B batch rows, S sequence, D hidden, C half of it.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from laep_jax.config import ModelConfig
from laep_jax.model.layers import RMSNorm


def previous(x_BSD: jax.Array, segments_BS: jax.Array) -> jax.Array:
    """x[t-1] where position t-1 belongs to the same document, else zero."""
    shifted_BSD = jnp.pad(x_BSD, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    before_BS = jnp.pad(segments_BS, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return jnp.where((before_BS == segments_BS)[..., None], shifted_BSD, 0)


class LocalFilter(nnx.Module):
    """[B, S, D] -> [B, S, D]; 2 D^2 weights and D for the norm, biases only with `lfa_bias`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        hidden, half = config.hidden_size, config.hidden_size // 2
        init = nnx.initializers.normal(0.02)
        self.previous_in_DC = nnx.Param(init(rngs.params(), (hidden, half)))
        self.current_in_DC = nnx.Param(init(rngs.params(), (hidden, half)))
        self.previous_out_CD = nnx.Param(init(rngs.params(), (half, hidden)))
        self.current_out_CD = nnx.Param(init(rngs.params(), (half, hidden)))
        self.has_bias = config.lfa_bias
        if config.lfa_bias:
            self.bias_in_C = nnx.Param(jnp.zeros((half,)))
            self.bias_out_D = nnx.Param(jnp.zeros((hidden,)))
        self.norm = RMSNorm(hidden, config.norm_eps)

    def __call__(self, x_BSD: jax.Array, segments_BS: jax.Array) -> jax.Array:
        y1_BSC = previous(x_BSD, segments_BS) @ self.previous_in_DC[...] + x_BSD @ self.current_in_DC[...]
        if self.has_bias:
            y1_BSC += self.bias_in_C[...].astype(x_BSD.dtype)[None, None]
        y2_BSD = previous(y1_BSC, segments_BS) @ self.previous_out_CD[...] + y1_BSC @ self.current_out_CD[...]
        if self.has_bias:
            y2_BSD += self.bias_out_D[...].astype(x_BSD.dtype)[None, None]
        return self.norm(y2_BSD + x_BSD)
