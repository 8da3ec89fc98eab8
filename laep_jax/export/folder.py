"""A checkpoint as a Hugging Face folder: weights, config, tokenizer, model card, and a modelling file if needed."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import laep_jax
from laep_jax.checkpoint.saved import Saved
from laep_jax.errors import require
from laep_jax.export.card import model_card
from laep_jax.export.tokenizer import tokenizer_files
from laep_jax.files import new_folder
from laep_jax.huggingface.architectures import ERNIE, OWN, config_json, plain_architecture
from laep_jax.huggingface.folder import DTYPES as NUMBERS
from laep_jax.huggingface.places import BIAS, Place, places
from laep_jax.importers.safetensors_file import INDEX, SINGLE, Described, write_one_by_one

FORMS = ("auto", "hetero", "padded", "uniform")
DTYPES = {"float32": "F32", "bfloat16": "BF16"}  # as safetensors calls them
OLMOE_EPS = 1e-5  # of vLLM's class, whatever config.json says
SHARD_BYTES = 5 * 10**9  # of a file of weights, unless a single tensor has more
REMOTE_CODE = Path(__file__).parent / "remote_code" / "modeling_laep.py"


def choose_form(saved: Saved, wanted: str) -> str:
    """The plainest form that is exact, or the wanted one. `UserError` where that one cannot hold the model."""
    if wanted == "auto":
        return "hetero" if _obstacles(saved, "uniform") else "uniform"
    reasons = _obstacles(saved, wanted)
    require(not reasons, "--form", wanted, f"cannot hold {' and '.join(reasons)}; use hetero")
    return wanted


def _obstacles(saved: Saved, form: str) -> list[str]:
    """What of the model a form has no place for."""
    counts, model = saved.num_experts, saved.config.model
    if form == "hetero":
        return []
    normed = f"ModelConfig.qk_norm={model.qk_norm!r} with norm_topk_prob={model.norm_topk_prob}"
    problems = {
        "localized filtering (ModelConfig.lfa)": model.lfa,
        "the router's weights with ModelConfig.top_k=1": model.top_k == 1,
        "the router's sigmoid (ModelConfig.router_score)": model.router_score != "softmax",
        "a shared expert (ModelConfig.shared_ffn_size)": model.shared_ffn_size > 0,
    }
    if form == "padded":
        problems[normed] = model.qk_norm != "none" or not model.norm_topk_prob
        # Experts that only fill a layer have a part in the softmax, beside which a bias would weigh more.
        bias = "a bias of the loss-free balancing in layers of unequal size"
        problems[bias] = saved.has_bias and len({*counts}) > 1
    else:
        problems["a bias of the loss-free balancing"] = saved.has_bias
        problems[f"layers of {min(counts)} to {max(counts)} experts"] = len({*counts}) > 1
        problems[normed] = not any(problems.values()) and plain_architecture(model) is None
    return [name for name, there in problems.items() if there]


def _kind(saved: Saved, form: str) -> str:
    """The model_type of a form."""
    return {"hetero": OWN, "padded": ERNIE}.get(form) or str(plain_architecture(saved.config.model))


def loads_in(saved: Saved, form: str) -> str:
    """Which programs load a form, in words."""
    model, kind = saved.config.model, _kind(saved, form)
    if form == "uniform" and kind == "olmoe" and model.norm_eps != OLMOE_EPS:
        return f"a plain olmoe: Transformers and llama.cpp load it; vLLM takes {OLMOE_EPS:g} for its norm_eps"
    if form == "uniform":
        return f"a plain {kind}: Transformers, vLLM, SGLang and llama.cpp load it"
    if form == "padded":
        return (
            "ERNIE-4.5-MoE with layers filled up: Transformers, and vLLM on GPU, load it; vLLM on CPU ignores the bias"
        )
    stock = "" if model.lfa else " and vLLM with its Transformers backend"
    return f"a modelling file of its own: Transformers 5{stock}, with trust_remote_code=True"


def write_folder(saved: Saved, out: Path, *, form: str, dtype: str, tokenizer: str | None = None) -> None:
    """Writes everything, one tensor after another, so that memory holds a few copies of the largest.

    form: of `choose_form`. dtype: of DTYPES. tokenizer: the file, where it is no longer where the run had it.
    `UserError` where `out` exists.
    """
    model, kind = saved.config.model, _kind(saved, form)
    files = tokenizer_files(saved, tokenizer)
    eod = json.loads(files["generation_config.json"])["eos_token_id"]
    config = config_json(model, kind, saved.config.data.sequence_length, has_bias=saved.has_bias)
    config |= {"laep_jax_version": laep_jax.__version__, "dtype": dtype}
    config |= {"eos_token_id": eod, "bos_token_id": None, "pad_token_id": None}
    files["config.json"] = json.dumps(config, indent=2).encode() + b"\n"
    files["README.md"] = model_card(saved, form, loads_in(saved, form)).encode()
    if form == "hetero":
        files[REMOTE_CODE.name] = REMOTE_CODE.read_bytes()
    with new_folder(out, "--to") as folder:
        _write_weights(saved, list(places(model, kind, has_bias=saved.has_bias)), folder, DTYPES[dtype])
        for name, content in files.items():
            (folder / name).write_bytes(content)


def _tensor(saved: Saved, place: Place) -> np.ndarray:
    if place.leaf is None:
        return np.zeros(place.shape, np.float32)
    rows = place.rows
    array = saved.read(place.leaf, slice(rows, rows + 1) if isinstance(rows, int) else rows)
    array = array[0] if isinstance(rows, int) else array
    return place.out(array if place.columns is None else array[..., place.columns])


def _write_weights(saved: Saved, wanted: Sequence[Place], out: Path, dtype: str) -> None:
    """In one file, or in several with an index."""
    by_name = {place.name: place for place in wanted}
    shards: list[dict[str, Described]] = [{}]
    for name, place in by_name.items():
        of = "F32" if place.leaf == BIAS else dtype
        tensor = Described(of, place.shape, math.prod(place.shape) * NUMBERS[of].itemsize)
        if shards[-1] and sum(of.size for of in shards[-1].values()) + tensor.size > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        dtypes = {tensor: NUMBERS[of.dtype] for tensor, of in shard.items()}
        write_one_by_one(
            out / name, shard, lambda tensor, of=dtypes: _tensor(saved, by_name[tensor]).astype(of[tensor])
        )
    if count > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(of.size for shard in shards for of in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
