"""A checkpoint as a Hugging Face folder: weights, config, tokenizer, model card, and a modelling file if needed."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import laep_jax
from laep_jax.checkpoint.saved import Saved
from laep_jax.errors import UserError, require
from laep_jax.export.card import model_card
from laep_jax.export.tensors import Spec, model_specs
from laep_jax.export.tokenizer import tokenizer_files
from laep_jax.importers.safetensors_file import Described, write_one_by_one

FORMS = ("auto", "hetero", "padded", "uniform")
DTYPES = {"float32": ("F32", np.dtype(np.float32)), "bfloat16": ("BF16", np.dtype(jnp.bfloat16))}
SHARD_BYTES = 5 * 10**9  # of a file of weights, unless a single tensor has more
REMOTE_CODE = Path(__file__).parent / "remote_code" / "modeling_laep.py"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def choose_form(saved: Saved, wanted: str) -> str:
    """The plainest form that is exact, or the wanted one. `UserError` where that one cannot hold the model."""
    counts, model, bias = saved.num_experts, saved.config.model, saved.has_bias
    problems = {
        "localized filtering (ModelConfig.lfa)": model.lfa,
        "a bias of the loss-free balancing, added to logits": bias,
        "the router's weights with ModelConfig.top_k=1": model.top_k == 1,
    }
    found = [name for name, there in problems.items() if there]
    unequal = [f"layers of {min(counts)} to {max(counts)} experts"] if len({*counts}) > 1 else []
    if wanted == "auto":
        return "hetero" if found or unequal else "uniform"
    reasons = {"uniform": found + unequal, "padded": found, "hetero": []}[wanted]
    require(not reasons, "--form", wanted, f"cannot hold {' and '.join(reasons)}; use hetero")
    return wanted


def loads_in(saved: Saved, form: str) -> str:
    """Which programs load a form, in words."""
    if form == "uniform":
        return "a plain Mixtral: Transformers, vLLM, SGLang and llama.cpp load it"
    if form == "padded":
        return (
            "ERNIE-4.5-MoE with layers filled up: Transformers, and vLLM on GPU, load it; vLLM on CPU ignores the bias"
        )
    own = saved.config.model.lfa or saved.config.model.top_k == 1 or saved.has_bias
    stock = "" if own else " and vLLM with its Transformers backend"
    return f"a modelling file of its own: Transformers 5{stock}, with trust_remote_code=True"


def write_folder(saved: Saved, out: Path, *, form: str, dtype: str, tokenizer: str) -> None:
    """Writes everything, one tensor after another, so that memory holds a few copies of the largest.

    form: of `choose_form`. dtype: of DTYPES. tokenizer: of `DataConfig.tokenizer`. `UserError` where `out` exists.
    """
    files = tokenizer_files(saved.config, tokenizer)
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--to={out} cannot be made: {error.strerror}") from error
    _write_weights(list(model_specs(saved, form)), out, *DTYPES[dtype])
    eod = json.loads(files["generation_config.json"])["eos_token_id"]
    config = config_of(saved, form) | {"dtype": dtype, "eos_token_id": eod, "bos_token_id": None, "pad_token_id": None}
    files["config.json"] = json.dumps(config, indent=2).encode() + b"\n"
    files["README.md"] = model_card(saved, form, loads_in(saved, form)).encode()
    for name, content in files.items():
        (out / name).write_bytes(content)
    if form == "hetero":
        shutil.copyfile(REMOTE_CODE, out / REMOTE_CODE.name)


def config_of(saved: Saved, form: str) -> dict[str, Any]:
    """config.json, but for what the tokenizer says."""
    model = saved.config.model
    common = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_heads,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "hidden_act": "silu",
        "max_position_embeddings": saved.config.data.sequence_length,
        "tie_word_embeddings": False,
        "laep_jax_version": laep_jax.__version__,
    }
    if form == "padded":
        return common | {
            "model_type": "ernie4_5_moe",
            "architectures": ["Ernie4_5_MoeForCausalLM"],
            "moe_intermediate_size": model.ffn_size,
            "moe_num_experts": max(saved.num_experts),
            "moe_k": model.top_k,
            "moe_num_shared_experts": 0,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": model.num_layers - 1,
            "moe_layer_interval": 1,
            "use_bias": False,
        }
    mixtral = common | {"num_local_experts": max(saved.num_experts), "num_experts_per_tok": model.top_k}
    if form == "uniform":
        return mixtral | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    return mixtral | {
        "model_type": "laep_mixtral",
        "architectures": ["LaepMixtralForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_laep.LaepMixtralConfig",
            "AutoModel": "modeling_laep.LaepMixtralModel",
            "AutoModelForCausalLM": "modeling_laep.LaepMixtralForCausalLM",
        },
        "experts_per_layer": list(saved.num_experts),
        "lfa": model.lfa,
        "lfa_bias": model.lfa_bias,
        "router_bias": saved.has_bias,
    }


def _write_weights(specs: Sequence[Spec], out: Path, dtype: str, numbers: np.dtype) -> None:
    """In one file, or in several with an index."""
    makers = {spec.name: spec.make for spec in specs}
    shards: list[dict[str, Described]] = [{}]
    dtypes: dict[str, np.dtype] = {}
    for spec in specs:
        of = ("F32", np.dtype(np.float32)) if spec.name.endswith("bias") else (dtype, numbers)  # biases choose experts
        dtypes[spec.name] = of[1]
        tensor = Described(of[0], spec.shape, int(np.prod(spec.shape)) * of[1].itemsize)
        if shards[-1] and sum(of.size for of in shards[-1].values()) + tensor.size > SHARD_BYTES:
            shards.append({})
        shards[-1][spec.name] = tensor
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_one_by_one(out / name, shard, lambda tensor: makers[tensor]().astype(dtypes[tensor]))
    if count > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(of.size for shard in shards for of in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
