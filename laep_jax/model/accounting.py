"""Parameters and FLOPs of a model, counted from its config alone: nothing is allocated, no JAX.

Attention has four projections and no biases, LFA two filters; an expert is a SwiGLU of three matrices. A table that
serves input and logits is counted once. A test holds the counts against the shapes of the real parameters, another
against the totals of the paper.
"""

import dataclasses

from laep_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """Parameters of a model, all and those that one token uses, and its training FLOPs.

    `*_without_embeddings` leaves out both tables, that of the inputs and that of the outputs.
    `flops_per_token`: all of `flops_by_part`.
    """

    total: int
    total_without_embeddings: int
    active: int
    active_without_embeddings: int
    experts_per_layer: tuple[int, ...]
    flops_per_token: int


def _attention_matrices(config: ModelConfig) -> int:
    """Weights of a layer's projections and filters."""
    projections = 2 * config.hidden_size * (config.num_heads + config.kv_heads) * config.head_dim
    return projections + (2 * config.hidden_size**2 if config.lfa else 0)


def _ffn_of_token(config: ModelConfig) -> int:
    """Hidden size of all experts of a token together."""
    return config.top_k * config.ffn_size + config.shared_ffn_size


def _norm_scales(config: ModelConfig) -> int:
    """Of a layer: those before attention and experts, of the filter, and of queries and keys."""
    heads = {"none": 0, "head": 2, "whole": config.num_heads + config.kv_heads}[config.qk_norm]
    return config.hidden_size * (3 if config.lfa else 2) + heads * config.head_dim


def flops_by_part(config: ModelConfig, *, sequence_length: int) -> dict[str, int]:
    """Training FLOPs of a token: attention, router, experts (a shared one too), head.

    Forward and backward, without recomputation: six for each weight that the token is multiplied with (all active
    ones but the input table and the norms), and the attention scores of the positions up to its own, on average half
    of the sequence.
    """
    scores = config.num_heads * config.head_dim * (sequence_length + 1)
    return {
        "attention": 6 * config.num_layers * (_attention_matrices(config) + scores),
        "router": 6 * config.hidden_size * sum(config.experts_per_layer),
        "experts": 6 * config.num_layers * 3 * config.hidden_size * _ffn_of_token(config),
        "head": 6 * config.vocab_size * config.hidden_size,
    }


def model_size(config: ModelConfig, *, sequence_length: int) -> ModelSize:
    """Counts `config`; `sequence_length` in tokens enters the attention scores only."""
    hidden, experts = config.hidden_size, config.experts_per_layer
    one_expert = 3 * hidden * config.ffn_size
    vectors = _norm_scales(config)
    if config.lfa and config.lfa_bias:
        vectors += hidden // 2 + hidden

    def layers(experts_of_token: tuple[int, ...]) -> int:
        """Matrices of all layers, with that many experts in each and all columns of every router."""
        dense = _attention_matrices(config) + 3 * hidden * config.shared_ffn_size
        return config.num_layers * dense + hidden * sum(experts) + one_expert * sum(experts_of_token)

    tables = config.vocab_size * hidden * (1 if config.tie_embeddings else 2)
    norms = config.num_layers * vectors + hidden
    active_matrices = layers((config.top_k,) * config.num_layers)
    total, active = layers(experts) + norms, active_matrices + norms
    return ModelSize(
        total=total + tables,
        total_without_embeddings=total,
        active=active + tables,
        active_without_embeddings=active,
        experts_per_layer=experts,
        flops_per_token=sum(flops_by_part(config, sequence_length=sequence_length).values()),
    )
