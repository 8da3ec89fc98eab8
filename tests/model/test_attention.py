"""The TPU kernel, interpreted, against plain attention."""

import jax
import jax.numpy as jnp
import numpy as np

from laep_jax.config import MeshConfig
from laep_jax.model.attention import attend, splash
from laep_jax.sharding import make_mesh

SHAPE = (1, 256, 2, 128)  # B, S, H, K


def test_the_splash_kernel_is_plain_attention_within_documents():
    query, key, value = (jax.random.normal(k, SHAPE) for k in jax.random.split(jax.random.key(0), 3))
    segments_BS = jnp.asarray(np.repeat([1, 2, 0], [100, 120, 36])[None], jnp.int32)
    mesh = make_mesh(MeshConfig(fsdp=8, expert=1))

    def of(attention):
        return jax.value_and_grad(lambda q: jnp.sum(jnp.cos(attention(q))), has_aux=False)(query)

    plain = of(lambda q: attend(q, key, value, segments_BS, mesh))
    kernel = of(lambda q: splash(q, key, value, segments_BS, interpret=True))
    np.testing.assert_allclose(kernel[0], plain[0], rtol=1e-5)
    np.testing.assert_allclose(kernel[1], plain[1], atol=2e-5)  # float32 sums of 256 terms in another order
