"""Which models of Hugging Face Transformers are ours, and their config.json as our settings.

A model is one of these where attention is grouped or not, with rotary pairs (i, i + K/2) of one base, every layer has
experts of SwiGLU, and nothing has a bias. What a config.json asks for beside that is refused by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from laep_jax.config import ModelConfig
from laep_jax.errors import require

OWN = "laep_mixtral"  # of the modelling file that `laep-jax export` writes
ERNIE = "ernie4_5_moe"
PLAIN = {  # fields that only these values leave as they are here; absent is fine too
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "use_bias": (False,),
    "clip_qkv": (None,),
    "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1,),
    "rope_scaling": (None,),
    "moe_num_shared_experts": (0,),
    "moe_layer_start_index": (0,),
    "moe_layer_interval": (1,),
    "use_sliding_window": (False,),
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One model_type. num_experts, top_k, ffn_size: what config.json calls them, the first one when it is written.

    router, experts: names of tensors below a layer; of an expert's gate, up and down, {} being its number.
    norm_topk_prob: None where config.json says it. bias: of the router, None where there is none.
    """

    class_name: str
    num_experts: tuple[str, ...]
    top_k: str = "num_experts_per_tok"
    ffn_size: str = "intermediate_size"
    router: str = "mlp.gate.weight"
    experts: tuple[str, ...] = tuple(f"mlp.experts.{{}}.{part}_proj.weight" for part in ("gate", "up", "down"))
    qk_norm: str = "none"
    norm_topk_prob: bool | None = True
    bias: str | None = None


ARCHITECTURES = {
    "mixtral": Architecture(
        "MixtralForCausalLM",
        ("num_local_experts",),
        router="block_sparse_moe.gate.weight",
        experts=tuple(f"block_sparse_moe.experts.{{}}.{part}.weight" for part in ("w1", "w3", "w2")),
    ),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM",
        ("num_experts", "num_local_experts"),
        ffn_size="moe_intermediate_size",
        qk_norm="head",
        norm_topk_prob=None,
    ),
    "olmoe": Architecture(
        "OlmoeForCausalLM", ("num_experts", "num_local_experts"), qk_norm="whole", norm_topk_prob=None
    ),
    ERNIE: Architecture(
        "Ernie4_5_MoeForCausalLM",
        ("moe_num_experts", "num_local_experts"),
        top_k="moe_k",
        ffn_size="moe_intermediate_size",
        bias="mlp.moe_statics.e_score_correction_bias",
    ),
    OWN: Architecture("LaepMixtralForCausalLM", ("num_local_experts",), norm_topk_prob=None, bias="mlp.gate.bias"),
}
OWN_SETTINGS = (
    "lfa",
    "lfa_bias",
    "qk_norm",
    "router_score",
    "shared_ffn_size",
)  # fields of OWN, as they are called here


def model_settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The `ModelConfig` fields of a config.json; experts that only fill a layer of ERNIE's are counted too.

    where: of messages. `UserError` where the model is none of ours.
    """
    kind = config.get("model_type")
    require(kind in ARCHITECTURES, f"{where}: model_type", kind, f"is unknown; there are {', '.join(ARCHITECTURES)}")
    of = ARCHITECTURES[str(kind)]
    for name, values in PLAIN.items():
        require(config.get(name, values[0]) in values, f"{where}: {name}", config.get(name), "is not supported")
    sliding = config.get("sliding_window") if config.get("use_sliding_window") is None else None
    require(sliding is None, f"{where}: sliding_window", sliding, "is not supported")

    def number(*names: str) -> Any:
        value = next((config[name] for name in names if config.get(name) is not None), None)
        require(type(value) is int and value > 0, f"{where}: {names[0]}", value, "is no positive number")
        return value

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    settings: dict[str, Any] = {
        "vocab_size": number("vocab_size"),
        "num_layers": number("num_hidden_layers"),
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": number("num_key_value_heads", "num_attention_heads"),
        "head_dim": hidden // heads if config.get("head_dim") is None else number("head_dim"),
        "ffn_size": number(of.ffn_size),
        "num_experts": number(*of.num_experts),
        "top_k": number(of.top_k),
        "norm_topk_prob": of.norm_topk_prob,
        "qk_norm": of.qk_norm,
        "router_score": "softmax",
        "shared_ffn_size": 0,
        "lfa": False,
        "lfa_bias": False,
        "rope_base": _real(_rope(config, where), "rope_theta", where),
        "norm_eps": _real(config, "rms_norm_eps", where),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }
    if of.norm_topk_prob is None:
        settings["norm_topk_prob"] = bool(config.get("norm_topk_prob", kind == OWN))
    if kind == OWN:
        settings |= {name: config[name] for name in OWN_SETTINGS if name in config}
    if kind == OWN or "experts_per_layer" in config:  # as `apply` prunes, too
        counts = config.get("experts_per_layer")
        fits = isinstance(counts, list) and all(type(count) is int for count in counts)
        require(fits, f"{where}: experts_per_layer", counts, "is not a number for each layer")
        settings["num_experts"] = tuple(counts or ())
    learns = kind == OWN or settings["top_k"] > 1 or not settings["norm_topk_prob"]
    require(learns, f"{where}: {of.top_k}", 1, "with weights of 1 leaves the router without a gradient")
    return settings


def _real(config: Mapping[str, Any], name: str, where: str) -> float:
    value = config.get(name)
    require(type(value) in (int, float), f"{where}: {name}", value, "is no number")
    return float(value or 0)


def _rope(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """What says the base of the rotary embedding: `rope_parameters` of Transformers 5, or else config.json itself."""
    rope, rule = config.get("rope_parameters") or {}, "is not supported"
    require(isinstance(rope, dict), f"{where}: rope_parameters", rope, rule)
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind == "default", f"{where}: rope_type", kind, rule)
    require(rope.get("partial_rotary_factor", 1) == 1, f"{where}: partial_rotary_factor", rope, rule)
    return rope if "rope_theta" in rope else config


def plain_architecture(model: ModelConfig) -> str | None:
    """The model_type of Transformers that a model without localized filtering, bias or unequal layers is; or None."""
    if model.lfa or model.router_score != "softmax" or model.shared_ffn_size or model.top_k == 1:
        return None
    if model.qk_norm == "whole":
        return "olmoe" if model.hidden_size == model.num_heads * model.head_dim else None
    if model.qk_norm == "head":
        return "qwen3_moe"
    return "mixtral" if model.norm_topk_prob else None


def config_json(model: ModelConfig, kind: str, max_length: int, *, has_bias: bool) -> dict[str, Any]:
    """config.json of a model as one of ARCHITECTURES. max_length: tokens."""
    of, widest = ARCHITECTURES[kind], max(model.experts_per_layer)
    config = {
        "model_type": kind,
        "architectures": [of.class_name],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "hidden_act": "silu",
        "max_position_embeddings": max_length,
        "tie_word_embeddings": model.tie_embeddings,
        of.ffn_size: model.ffn_size,
        of.num_experts[0]: widest,
        of.top_k: model.top_k,
    }
    if of.norm_topk_prob is None:
        config["norm_topk_prob"] = model.norm_topk_prob
    if kind == "qwen3_moe":
        config |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False}
    if kind == ERNIE:
        config |= {
            "moe_num_shared_experts": 0,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": model.num_layers - 1,
            "moe_layer_interval": 1,
            "use_bias": False,
        }
    if kind == OWN:
        config |= {name: getattr(model, name) for name in OWN_SETTINGS}
        config |= {"experts_per_layer": list(model.experts_per_layer), "router_bias": has_bias}
        config["auto_map"] = {
            "AutoConfig": "modeling_laep.LaepMixtralConfig",
            "AutoModel": "modeling_laep.LaepMixtralModel",
            "AutoModelForCausalLM": "modeling_laep.LaepMixtralForCausalLM",
        }
    return config
