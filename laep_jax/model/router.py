"""The router: the experts of each token, their weights, and the losses and bias that balance them.

All arithmetic is float32. Experts are chosen by score + bias and weighted by the score alone. A bias of minus infinity
masks an expert exactly as pruning it would.
Axes: B rows, S sequence, T tokens, E experts (of a layer, or of its window of W), K top-k slots, L layers, N experts
of all layers, M domains.
"""

import jax
import jax.numpy as jnp
import numpy as np

from laep_jax.config import AuxLossConfig, ModelConfig

TINY = 1e-20  # of a sum of sigmoids, which may all be zero
_SCORES = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}


def route(logits_E: jax.Array, bias_E: jax.Array, valid: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Top-k on score + bias; the weights are the scores of those k, divided by their sum with `norm_topk_prob`.

    The score is the softmax over all experts, or the sigmoid of each (DeepSeek-V3, arXiv 2412.19437, eq. 12 to 16).
    With k = 1 nothing is divided (Switch, arXiv 2101.03961, eq. 2): the weight would be 1, and the router would have no
    gradient.

    Args:
      logits_E: float32 [..., E]. bias_E: [E]. valid: bool [...], False for padding.

    Returns:
      ids int32 [..., K] (E, one past the last expert, for padding) and weights float32 [..., K].
    """
    num_experts, top_k = logits_E.shape[-1], config.top_k
    bias_1E = bias_E.reshape((1,) * (logits_E.ndim - 1) + (-1,))
    masked_E = jnp.where(jnp.isneginf(bias_1E), -jnp.inf, logits_E)
    score_E = _SCORES[config.router_score](masked_E)
    # Without a bias the logits have the same order, and rounding makes no two of them equal.
    is_moved = jnp.any(jnp.isfinite(bias_E) & (bias_E != 0))
    ids_K = jax.lax.top_k(jax.lax.stop_gradient(jnp.where(is_moved, score_E + bias_1E, masked_E)), top_k)[1]
    if config.norm_topk_prob and top_k > 1 and config.router_score == "softmax":  # the sum over all experts drops out
        weights_K = jax.nn.softmax(jnp.take_along_axis(logits_E, ids_K, axis=-1), axis=-1)
    else:
        weights_K = jnp.take_along_axis(score_E, ids_K, axis=-1)
        if config.norm_topk_prob and top_k > 1:
            weights_K /= jnp.sum(weights_K, axis=-1, keepdims=True) + TINY
    return jnp.where(valid[..., None], ids_K, num_experts), jnp.where(valid[..., None], weights_K, 0.0)


def count_tokens(ids_TK: jax.Array, num_experts: int) -> jax.Array:
    """Tokens per expert, int32 [..., E], from ids [..., T, K]; padding's id E counts nowhere."""
    return jnp.sum(jax.nn.one_hot(ids_TK, num_experts, dtype=jnp.int32), axis=(-3, -2), dtype=jnp.int32)


def count_by_domain(ids_BSK: jax.Array, num_experts: int, domains_BSM: jax.Array) -> jax.Array:
    """Tokens per expert of each domain, int32 [M, E]: a product of zeros and ones, exact up to 2**24."""
    chosen_BSE = jnp.sum(jax.nn.one_hot(ids_BSK, num_experts, dtype=jnp.float32), axis=-2)
    return jnp.einsum("bsm,bse->me", domains_BSM.astype(jnp.float32), chosen_BSE).astype(jnp.int32)


def balance_sums(
    logits_BSE: jax.Array,
    is_own_E: jax.Array | np.ndarray,
    ids_BSK: jax.Array,
    valid_BS: jax.Array,
    router_score: str,
    aux_losses: AuxLossConfig,
) -> dict[str, jax.Array]:
    """Sums over this batch from which `balance_losses` makes the losses that are switched on.

    Sums over parts of a batch add up, but for `deepseek_v3`, which is a mean within each row. is_own_E: the layer's
    experts, of those that there are logits of. A token's probabilities are its scores, divided by their sum.
    """
    num_experts, top_k = jnp.sum(is_own_E), ids_BSK.shape[-1]
    logits_BSE = jnp.where(is_own_E[None, None], logits_BSE, -jnp.inf)
    valid_BS1 = valid_BS[..., None]
    tokens_B = jnp.sum(valid_BS, axis=1)
    sums = {"tokens": jnp.sum(tokens_B)}
    probabilities_BSE = _SCORES[router_score](logits_BSE)
    if router_score == "sigmoid":
        probabilities_BSE /= jnp.sum(probabilities_BSE, axis=-1, keepdims=True) + TINY
    if aux_losses.mixtral or aux_losses.mixtral_hf:
        sums["probability_E"] = jnp.sum(probabilities_BSE * valid_BS1, axis=(0, 1))
    if aux_losses.deepseek_v3:
        count_BE = count_tokens(ids_BSK, is_own_E.size)
        at_least_one_B1 = jnp.maximum(tokens_B, 1)[:, None]
        share_BE = num_experts * count_BE / (top_k * at_least_one_B1)
        mean_BE = jnp.sum(probabilities_BSE * valid_BS1, axis=1) / at_least_one_B1
        sums["deepseek_v3"] = jnp.sum(share_BE * mean_BE)
        sums["rows"] = jnp.sum(tokens_B > 0)
    if aux_losses.router_z:
        sums["squared_logsumexp"] = jnp.sum(jax.nn.logsumexp(logits_BSE, axis=-1) ** 2 * valid_BS)
    return sums


def balance_losses(
    sums: dict[str, jax.Array],
    tokens_per_expert_E: jax.Array,
    num_experts: jax.Array,
    top_k: int,
    aux_losses: AuxLossConfig,
) -> dict[str, jax.Array]:
    """The losses of one layer by name, unweighted: only those with a coefficient.

    mixtral:     E sum_i c_i / (k T) mean_t p_i(t), balanced value 1 (Switch, arXiv 2101.03961, eq. 4)
    mixtral_hf:  the same without 1/k, balanced value k (Hugging Face transformers)
    deepseek_v3: sum_i E c_i / (k T) mean_t p_i(t) within each sequence (arXiv 2412.19437, eq. 17-20)
    router_z:    mean_t logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5)
    """
    tokens = jnp.maximum(sums["tokens"], 1)
    losses = {}
    if aux_losses.mixtral or aux_losses.mixtral_hf:
        switch = num_experts * jnp.sum(tokens_per_expert_E / tokens * sums["probability_E"] / tokens)
        if aux_losses.mixtral:
            losses["mixtral"] = switch / top_k
        if aux_losses.mixtral_hf:
            losses["mixtral_hf"] = switch
    if aux_losses.deepseek_v3:
        losses["deepseek_v3"] = sums["deepseek_v3"] / jnp.maximum(sums["rows"], 1)
    if aux_losses.router_z:
        losses["router_z"] = sums["squared_logsumexp"] / tokens
    return losses


def update_bias(
    bias_N: jax.Array, tokens_per_expert_LW: jax.Array, is_own_LW: jax.Array | np.ndarray, step_size: float
) -> jax.Array:
    """Loss-free balancing, after each global batch: b_i += u sign(mean(c) - c_i) (arXiv 2408.15664, Algorithm 1).

    tokens_per_expert_LW: of each layer's window, in which is_own_LW marks its experts; bias_N has them side by side.
    """
    mean_L1 = jnp.mean(tokens_per_expert_LW, axis=1, keepdims=True, where=is_own_LW)
    sign_LW = jnp.sign(mean_L1 - tokens_per_expert_LW)
    own_N = jnp.nonzero(is_own_LW.reshape(-1), size=bias_N.size)[0]
    return bias_N + step_size * sign_LW.reshape(-1)[own_N]
