"""Multi-head causal attention within documents, optionally with localized filtering (notes section 1).

Letters: B batch rows, S sequence, D hidden, H heads, K head size.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from laep_jax.config import ModelConfig
from laep_jax.model.layers import rotary
from laep_jax.model.lfa import LocalFilter


class Attention(nnx.Module):
    """[B, S, D] -> [B, S, D]. Queries and keys are made from the filtered input, values from x."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        hidden, heads, size = config.hidden_size, config.num_heads, config.head_dim
        init = nnx.initializers.normal(0.02)
        residual_init = nnx.initializers.normal(0.02 / (2 * config.num_layers) ** 0.5)
        self.query_DHK = nnx.Param(init(rngs.params(), (hidden, heads, size)))
        self.key_DHK = nnx.Param(init(rngs.params(), (hidden, heads, size)))
        self.value_DHK = nnx.Param(init(rngs.params(), (hidden, heads, size)))
        self.output_HKD = nnx.Param(residual_init(rngs.params(), (heads, size, hidden)))
        self.rope_base = config.rope_base
        self.has_lfa = config.lfa
        if config.lfa:
            self.lfa = LocalFilter(config, rngs=rngs)

    def __call__(self, x_BSD: jax.Array, segments_BS: jax.Array, positions_BS: jax.Array) -> jax.Array:
        filtered_BSD = self.lfa(x_BSD, segments_BS) if self.has_lfa else x_BSD
        query_BSHK = jnp.einsum("bsd,dhk->bshk", filtered_BSD, self.query_DHK[...])
        key_BSHK = jnp.einsum("bsd,dhk->bshk", filtered_BSD, self.key_DHK[...])
        value_BSHK = jnp.einsum("bsd,dhk->bshk", x_BSD, self.value_DHK[...])
        same_document_B1SS = (segments_BS[:, :, None] == segments_BS[:, None, :])[:, None]
        mixed_BSHK = jax.nn.dot_product_attention(
            rotary(query_BSHK, positions_BS, self.rope_base),
            rotary(key_BSHK, positions_BS, self.rope_base),
            value_BSHK,
            mask=same_document_B1SS,
            is_causal=True,  # the scale is 1/sqrt(K) by default
        )
        return jnp.einsum("bshk,hkd->bsd", mixed_BSHK, self.output_HKD[...])
