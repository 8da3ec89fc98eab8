"""Text that the model in training writes, for people who watch a run.

A token is a forward pass of the model that trains, on its mesh and without a cache; all tokens are one program. For
longer texts there is `laep-jax generate`, which reads a checkpoint onto one device.
Axes: B rows, one for each device, of which the first is the text and the others are padding; S positions of the prompt
and of what follows it, P of the prompt, V vocabulary.
"""

import jax
import jax.numpy as jnp

from laep_jax.config import Config
from laep_jax.laep.layout import Layout
from laep_jax.model.transformer import logits
from laep_jax.sharding import Mesh, replicated

MAX_PROMPT, MAX_WRITTEN = 16, 32  # tokens


def lengths(sequence_length: int) -> tuple[int, int]:
    """Tokens of a prompt, at most, and those that the model adds: together no more than it was trained on.

    >>> lengths(128), lengths(20), lengths(2)
    ((16, 32), (10, 10), (1, 1))
    """
    prompt = min(MAX_PROMPT, sequence_length // 2)
    return prompt, min(MAX_WRITTEN, sequence_length - prompt)


def make_sampler(config: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """A jitted (layout, params, router_bias, prompt_P) -> the most probable tokens after the prompt, replicated."""
    written = lengths(config.data.sequence_length)[1]

    def sampler(layout: Layout, params: dict, router_bias: dict, prompt_P: jax.Array) -> jax.Array:
        places_S = jnp.arange(prompt_P.size + written, dtype=jnp.int32)
        shape = (mesh.size, places_S.size)
        is_text_B = jnp.arange(mesh.size) == 0

        def write(position: jax.Array, tokens_S: jax.Array) -> jax.Array:
            batch = {
                "tokens_BS": jnp.broadcast_to(tokens_S[None], shape),
                "segments_BS": (is_text_B[:, None] & (places_S < position)[None]).astype(jnp.int32),
                "positions_BS": jnp.broadcast_to(places_S[None], shape),
            }
            logits_V = logits(params, router_bias, layout, batch, config.model, mesh)[0, position - 1]
            return tokens_S.at[position].set(jnp.argmax(logits_V).astype(jnp.int32))

        tokens_S = jnp.pad(prompt_P, (0, written))
        return jax.lax.fori_loop(prompt_P.size, places_S.size, write, tokens_S)[prompt_P.size :]

    return jax.jit(sampler, out_shardings=replicated(mesh))
