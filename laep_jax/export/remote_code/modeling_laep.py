"""A mixture of experts that laep_jax has trained, for Hugging Face Transformers 5: Mixtral, but for what it lacks.

Each layer has its own number of experts (`experts_per_layer`), whose scores are a softmax or sigmoids (`router_score`).
With `router_bias`, a bias is added to them when experts are chosen, not when they are weighted. With `lfa`, queries and
keys are made from inputs that two causal convolutions of width two have filtered (Yuan 2.0, arXiv 2311.15786); with
`qk_norm` they are normalised, each head or all together. A shared expert of `shared_ffn_size` takes every token.

`python -m laep_jax export` copies this file beside the weights; it needs no laep_jax.
"""

import copy

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, MixtralModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mixtral import modeling_mixtral as mixtral


class LaepMixtralConfig(MixtralConfig):
    model_type = "laep_mixtral"

    def __init__(
        self,
        experts_per_layer=None,
        lfa=False,
        lfa_bias=False,
        qk_norm="none",
        router_score="softmax",
        norm_topk_prob=True,
        router_bias=False,
        shared_ffn_size=0,
        **kwargs,
    ):
        self.experts_per_layer, self.shared_ffn_size = experts_per_layer, shared_ffn_size
        self.lfa, self.lfa_bias, self.qk_norm = lfa, lfa_bias, qk_norm
        self.router_score, self.norm_topk_prob, self.router_bias = router_score, norm_topk_prob, router_bias
        super().__init__(**kwargs)


class Router(mixtral.MixtralTopKRouter):
    """With `norm_topk_prob` the weights of a token's experts add up to one, unless it has one expert only."""

    def __init__(self, config):
        super().__init__(config)
        self.score, self.normalizes = config.router_score, config.norm_topk_prob and self.top_k > 1
        if config.router_bias:
            self.bias = nn.Parameter(torch.zeros(self.num_experts))

    def forward(self, hidden_states):
        logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim).float(), self.weight.float())
        scores = logits.sigmoid() if self.score == "sigmoid" else logits.softmax(dim=-1)
        choosing = scores + self.bias.float() if hasattr(self, "bias") else logits
        chosen = choosing.topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if self.normalizes:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, weights, chosen


class SharedExpert(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.shared_ffn_size, bias=False)
        self.down_proj = nn.Linear(config.shared_ffn_size, config.hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(nn.functional.silu(gate) * up)


class SparseMoeBlock(mixtral.MixtralSparseMoeBlock):
    def __init__(self, config):
        super().__init__(config)
        self.gate = Router(config)
        if config.shared_ffn_size:
            self.shared_expert = SharedExpert(config)

    def forward(self, hidden_states):
        shared = self.shared_expert(hidden_states) if hasattr(self, "shared_expert") else 0
        return super().forward(hidden_states) + shared


class LocalFilter(nn.Module):
    """y1[t] = A0 x[t-1] + A1 x[t]; y2[t] = B0 y1[t-1] + B1 y1[t]; RMSNorm(y2 + x). Zero before a text begins."""

    def __init__(self, config):
        super().__init__()
        hidden, half = config.hidden_size, config.hidden_size // 2
        self.previous_in = nn.Linear(hidden, half, bias=False)
        self.current_in = nn.Linear(hidden, half, bias=config.lfa_bias)
        self.previous_out = nn.Linear(half, hidden, bias=False)
        self.current_out = nn.Linear(half, hidden, bias=config.lfa_bias)
        self.norm = mixtral.MixtralRMSNorm(hidden, eps=config.rms_norm_eps)

    def forward(self, x, is_first, last):
        """is_first: [B, S, 1], where a text begins. last: what this returned for the positions before, or None."""
        x_before, y_before = last or (None, None)
        y1 = self.previous_in(_previous(x, is_first, x_before)) + self.current_in(x)
        y2 = self.previous_out(_previous(y1, is_first, y_before)) + self.current_out(y1)
        return self.norm(y2 + x), (x[:, -1:], y1[:, -1:])


def _previous(x, is_first, before):
    before = torch.zeros_like(x[:, :1]) if before is None else before
    return torch.cat([before, x[:, :-1]], dim=1).masked_fill(is_first, 0)


class Filtered:
    """What the filters of a text's layers need of its last position; kept with the cache of keys and values."""

    def __init__(self, cache):
        self.last = {}
        self._reorder = cache.reorder_cache
        cache.reorder_cache, cache.crop = self._reorder_all, self._crop

    def _reorder_all(self, beams):
        self._reorder(beams)
        self.last = {layer: tuple(part[beams] for part in parts) for layer, parts in self.last.items()}

    @staticmethod
    def _crop(length):
        raise NotImplementedError("localized filtering keeps the last position only, so that none can be taken back")


class Attention(mixtral.MixtralAttention):
    """Queries and keys normalised, each head or all together."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        if config.qk_norm != "none":
            by_head = config.qk_norm == "head"
            sizes = [1, 1] if by_head else [config.num_attention_heads, config.num_key_value_heads]
            self.q_norm, self.k_norm = (
                mixtral.MixtralRMSNorm(size * self.head_dim, eps=config.rms_norm_eps) for size in sizes
            )

    def forward(self, hidden_states, position_embeddings, attention_mask, cache=None, filtered=None, **kwargs):
        """filtered: what queries and keys are made from in the place of hidden_states."""
        cache = kwargs.pop("past_key_values", cache)  # as older versions call it
        filtered = hidden_states if filtered is None else filtered
        query, key = self.q_proj(filtered), self.k_proj(filtered)
        if self.config.qk_norm == "whole":
            query, key = self.q_norm(query), self.k_norm(key)

        def heads(projected):
            return projected.view(*hidden_states.shape[:-1], -1, self.head_dim).transpose(1, 2)

        query, key = heads(query), heads(key)
        if self.config.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        value = heads(self.v_proj(hidden_states))
        query, key = mixtral.apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        # vLLM recognises attention by this lookup and call
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, mixtral.eager_attention_forward
        )
        mixed, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1)), weights


class FilteredAttention(Attention):
    """Queries and keys of the filtered input, values of the input itself. vLLM, which has no such state, refuses it."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.lfa = LocalFilter(config)

    def forward(self, hidden_states, position_embeddings, attention_mask, cache=None, position_ids=None, **kwargs):
        cache = kwargs.pop("past_key_values", cache)
        if cache is not None and not hasattr(cache, "laep_filtered"):
            cache.laep_filtered = Filtered(cache)
        last = {} if cache is None else cache.laep_filtered.last
        is_first = (position_ids == 0)[..., None]
        filtered, last[self.layer_idx] = self.lfa(hidden_states, is_first, last.get(self.layer_idx))
        return super().forward(hidden_states, position_embeddings, attention_mask, cache, filtered, **kwargs)


class LaepMixtralModel(MixtralModel):
    config_class = LaepMixtralConfig
    _keep_in_fp32_modules_strict = ("gate.bias",)  # what chooses experts

    def __init__(self, config):
        super().__init__(config)
        for index, (layer, count) in enumerate(zip(self.layers, config.experts_per_layer, strict=True)):
            of_layer = copy.copy(config)
            of_layer.num_local_experts = count
            layer.mlp = SparseMoeBlock(of_layer)
            if config.lfa or config.qk_norm != "none":
                layer.self_attn = (FilteredAttention if config.lfa else Attention)(config, index)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, *, inputs_embeds=None, **kwargs):
        """Positions count from where a text begins, after left padding."""
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            new = (inputs_embeds if input_ids is None else input_ids).shape[1]
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
        return super().forward(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)


class LaepMixtralForCausalLM(MixtralForCausalLM):
    config_class = LaepMixtralConfig

    def __init__(self, config):
        if config.output_router_logits and len({*config.experts_per_layer}) > 1:
            raise ValueError("output_router_logits: the balancing loss of Transformers needs layers of equal size")
        super().__init__(config)
        self.model = LaepMixtralModel(config)
        self.post_init()
