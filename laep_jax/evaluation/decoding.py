"""The decoder token by token, with a cache: for generating text, where each step has one position only.

The same layers as `laep_jax.model.transformer`, whose forward pass it equals, without their batches, buffers and
collectives: what a token needs of its experts is gathered.
Axes: V vocabulary, D hidden, L layers, N experts of all layers, S positions of the cache, H heads, G heads of keys and
values, R heads of queries for each of them, K head size, C half of D, J heads x head size, T chosen experts, F ffn; of
expert matrices G = 2F.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from laep_jax.config import ModelConfig
from laep_jax.errors import require
from laep_jax.model.layers import gated, rms_norm, rotary
from laep_jax.model.router import route


class Cache(NamedTuple):
    """Keys and values of all positions, and of the last one what the localized filters need."""

    key_LSGK: jax.Array
    value_LSGK: jax.Array
    last_x_LD: jax.Array
    last_y_LC: jax.Array


def new_cache(config: ModelConfig, positions: int) -> Cache:
    """Before the first token."""
    layers, hidden, dtype = config.num_layers, config.hidden_size, jnp.dtype(config.dtype)
    keys = jnp.zeros((layers, positions, config.kv_heads, config.head_dim), dtype)
    return Cache(keys, keys, jnp.zeros((layers, hidden), dtype), jnp.zeros((layers, hidden // 2), dtype))


@functools.partial(jax.jit, static_argnames="config")
def decode_step(
    params: dict, bias_N: jax.Array, cache: Cache, token: jax.Array, position: jax.Array, config: ModelConfig
) -> tuple[jax.Array, Cache]:
    """Logits of the token after this one, float32 [V], and the cache with it. token, position: int32 scalars."""
    dtype = jnp.dtype(config.dtype)
    layer_of_N = jnp.asarray(np.repeat(np.arange(config.num_layers), config.experts_per_layer))

    def body(x_D, of_layer):
        layer, weights, cache = of_layer
        weights = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, weights)
        normed_D = _norm(x_D, weights["attention_norm"], config)
        mixed_D, cache = _attention(normed_D, weights["attention"], cache, position, config)
        x_D = x_D + mixed_D
        own_bias_N = jnp.where(layer_of_N == layer, bias_N, -jnp.inf)
        normed_D = _norm(x_D, weights["moe_norm"], config)
        y_D = _moe(normed_D, params["experts"], own_bias_N, config)
        if config.shared_ffn_size:
            y_D += gated(weights["shared"]["gate_up_UD"] @ normed_D) @ weights["shared"]["down_UD"]
        return x_D + y_D, cache

    x_D = params["embedding_VD"][token].astype(dtype)
    x_D, cache = jax.lax.scan(body, x_D, (jnp.arange(config.num_layers), params["layers"], cache))
    x_D = _norm(x_D, params["final_norm"], config)
    unembedding_DV = params["embedding_VD"].T if config.tie_embeddings else params["unembedding_DV"]
    return jnp.matmul(x_D, unembedding_DV.astype(dtype), preferred_element_type=jnp.float32), cache


def _norm(x_D: jax.Array, weights: dict, config: ModelConfig) -> jax.Array:
    return rms_norm(x_D, weights["scale_D"], config.norm_eps)


def _attention(x_D: jax.Array, weights: dict, cache: Cache, position: jax.Array, config: ModelConfig):
    filtered_D = x_D
    if config.lfa:
        filtered_D, last_y_C = _filtered(x_D, weights["lfa"], cache, config)
        cache = cache._replace(last_x_LD=x_D, last_y_LC=last_y_C)
    query_HK, key_GK = (
        _turned(weights[f"{name}_JD"] @ filtered_D, weights.get(f"{name}_norm", {}), position, config)
        for name in ("query", "key")
    )
    keys_SGK = cache.key_LSGK.at[position].set(key_GK)
    values_SGK = cache.value_LSGK.at[position].set((weights["value_JD"] @ x_D).reshape(key_GK.shape))
    query_GRK = query_HK.reshape(config.kv_heads, -1, config.head_dim)
    scores_GRS = jnp.einsum("grk,sgk->grs", query_GRK, keys_SGK, preferred_element_type=jnp.float32)
    seen_S = jnp.arange(len(keys_SGK)) <= position
    shares_GRS = jax.nn.softmax(jnp.where(seen_S[None, None], scores_GRS * config.head_dim**-0.5, -jnp.inf), axis=-1)
    mixed_J = jnp.einsum("grs,sgk->grk", shares_GRS.astype(values_SGK.dtype), values_SGK).reshape(-1)
    return mixed_J @ weights["output_JD"], cache._replace(key_LSGK=keys_SGK, value_LSGK=values_SGK)


def _turned(x_J: jax.Array, norm: dict, position: jax.Array, config: ModelConfig) -> jax.Array:
    """Heads of queries or keys, normalised and with their rotary embedding, [heads, K]."""
    if config.qk_norm == "whole":
        x_J = _norm(x_J, norm, config)
    x_HK = x_J.reshape(-1, config.head_dim)
    if config.qk_norm == "head":
        x_HK = _norm(x_HK, norm, config)
    return rotary(x_HK[None, None], position[None, None], config.rope_base)[0, 0]


def _filtered(x_D: jax.Array, weights: dict, cache: Cache, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """As `model.lfa.LocalFilter`; the second is what the next position needs."""
    y1_C = cache.last_x_LD @ weights["previous_in_DC"] + x_D @ weights["current_in_DC"]
    if config.lfa_bias:
        y1_C += weights["bias_in_C"].astype(x_D.dtype)
    y2_D = cache.last_y_LC @ weights["previous_out_CD"] + y1_C @ weights["current_out_CD"]
    if config.lfa_bias:
        y2_D += weights["bias_out_D"].astype(x_D.dtype)
    return _norm(y2_D + x_D, weights["norm"], config), y1_C


def _moe(x_D: jax.Array, experts: dict, bias_N: jax.Array, config: ModelConfig) -> jax.Array:
    """bias_N: minus infinity at the experts of other layers."""
    logits_N = jnp.matmul(experts["router_ND"], x_D.astype(jnp.float32), precision="highest")
    ids_T, weights_T = route(logits_N, bias_N, jnp.bool_(True), config)
    gate_up_TDG = experts["gate_up_NDG"][ids_T].astype(x_D.dtype)
    down_TFD = experts["down_NFD"][ids_T].astype(x_D.dtype)
    y_TD = jnp.einsum("tf,tfd->td", gated(jnp.einsum("d,tdg->tg", x_D, gate_up_TDG)), down_TFD)
    return jnp.einsum("t,td->d", weights_T.astype(x_D.dtype), y_TD)


def generate(
    params: dict,
    bias_N: jax.Array,
    prompt: Sequence[int],
    config: ModelConfig,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """The tokens after a prompt, one by one. temperature: 0 takes the most probable one.

    top_p: draws from the fewest tokens that have this share together (nucleus sampling, arXiv 1904.09751).
    `UserError` where the prompt is empty or a number is out of range.
    """
    require(len(prompt) > 0, "prompt", prompt, "has no tokens")
    require(temperature >= 0, "temperature", temperature, "must not be negative")
    require(0 < top_p <= 1, "top_p", top_p, "must be above 0 and at most 1")
    require(0 <= seed < 2**32, "seed", seed, "must be in [0, 2**32)")
    cache, logits_V = new_cache(config, len(prompt) + max_tokens), None
    for position, token in enumerate(prompt):
        logits_V, cache = decode_step(params, bias_N, cache, jnp.int32(token), jnp.int32(position), config)
    for position in range(len(prompt), len(prompt) + max_tokens):
        token = _sample(logits_V, jax.random.fold_in(jax.random.key(seed), position), temperature, top_p)
        yield int(token)
        logits_V, cache = decode_step(params, bias_N, cache, token, jnp.int32(position), config)


@functools.partial(jax.jit, static_argnames=("temperature", "top_p"))
def _sample(logits_V: jax.Array, key: jax.Array, temperature: float, top_p: float) -> jax.Array:
    if temperature == 0:
        return jnp.argmax(logits_V).astype(jnp.int32)
    logits_V = logits_V / temperature
    order_V = jnp.argsort(-logits_V)
    shares_V = jax.nn.softmax(logits_V[order_V])
    before_V = jnp.cumsum(shares_V) - shares_V  # the most probable one is always in
    nucleus_V = jnp.where(before_V < top_p, logits_V[order_V], -jnp.inf)
    return order_V[jax.random.categorical(key, nucleus_V)].astype(jnp.int32)
