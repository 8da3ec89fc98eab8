"""A mixture of experts that laep_jax has trained, for Hugging Face Transformers 5: Mixtral, but for what it lacks.

Each layer has its own number of experts (`experts_per_layer`). With `lfa`, queries and keys are made from inputs that
two causal convolutions of width two have filtered (Yuan 2.0, arXiv 2311.15786). With `router_bias`, a bias is added to
the router's logits when experts are chosen, not when they are weighted.

`python -m laep_jax export` copies this file beside the weights; it needs no laep_jax.
"""

import copy

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, MixtralModel
from transformers.models.mixtral import modeling_mixtral as mixtral


class LaepMixtralConfig(MixtralConfig):
    model_type = "laep_mixtral"

    def __init__(self, experts_per_layer=None, lfa=False, lfa_bias=False, router_bias=False, **kwargs):
        self.experts_per_layer = experts_per_layer
        self.lfa, self.lfa_bias, self.router_bias = lfa, lfa_bias, router_bias
        super().__init__(**kwargs)


class Router(mixtral.MixtralTopKRouter):
    """The weights of the chosen experts add up to one, unless a token has one expert only."""

    def __init__(self, config):
        super().__init__(config)
        if config.router_bias:
            self.bias = nn.Parameter(torch.zeros(self.num_experts))

    def forward(self, hidden_states):
        logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim).float(), self.weight.float())
        choosing = logits + self.bias.float() if hasattr(self, "bias") else logits
        chosen = choosing.topk(self.top_k, dim=-1).indices
        if self.top_k == 1:
            weights = logits.softmax(dim=-1).gather(-1, chosen)
        else:
            weights = logits.gather(-1, chosen).softmax(dim=-1)
        return logits, weights, chosen


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
    """Queries and keys of the filtered input, values of the input itself."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.lfa = LocalFilter(config)

    def forward(self, hidden_states, position_embeddings, attention_mask, cache=None, position_ids=None, **kwargs):
        cache = kwargs.pop("past_key_values", cache)  # as older versions call it
        if cache is not None and not hasattr(cache, "laep_filtered"):
            cache.laep_filtered = Filtered(cache)
        last = {} if cache is None else cache.laep_filtered.last
        is_first = (position_ids == 0)[..., None]
        filtered, last[self.layer_idx] = self.lfa(hidden_states, is_first, last.get(self.layer_idx))

        def heads(projected):
            return projected.view(*hidden_states.shape[:-1], -1, self.head_dim).transpose(1, 2)

        query, key = heads(self.q_proj(filtered)), heads(self.k_proj(filtered))
        value = heads(self.v_proj(hidden_states))
        query, key = mixtral.apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = mixtral.ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, mixtral.eager_attention_forward)
        mixed, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1)), weights


class LaepMixtralModel(MixtralModel):
    config_class = LaepMixtralConfig

    def __init__(self, config):
        super().__init__(config)
        for index, (layer, count) in enumerate(zip(self.layers, config.experts_per_layer, strict=True)):
            of_layer = copy.copy(config)
            of_layer.num_local_experts = count
            layer.mlp = mixtral.MixtralSparseMoeBlock(of_layer)
            layer.mlp.gate = Router(of_layer)
            if config.lfa:
                layer.self_attn = Attention(config, index)
        self.post_init()


class LaepMixtralForCausalLM(MixtralForCausalLM):
    config_class = LaepMixtralConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = LaepMixtralModel(config)
        self.post_init()
