"""Where each tensor of a Hugging Face model is among our parameters, and how its elements are turned. Both ways.

Our arrays have the input last, as a `Linear.weight` has it, or first: `query_JD` is a `Linear.weight`, `unembedding_DV`
is one transposed. Rotary pairs are (i, i + K/2), as in Mixtral; ERNIE has (2i, 2i + 1).
Axes: V vocabulary, D hidden, J heads x head size, K head size, C half of D, E experts of a layer, F ffn, G = 2F (gate,
then up).
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from laep_jax.config import ModelConfig
from laep_jax.huggingface.architectures import ARCHITECTURES, ERNIE, OWN
from laep_jax.importers.families import NEVER

BIAS = "router_bias.bias_N"  # the leaf that experts are chosen with
Turn = Callable[[np.ndarray], np.ndarray]
FILTERS = {
    "previous_in_DC": "previous_in.weight",
    "current_in_DC": "current_in.weight",
    "previous_out_CD": "previous_out.weight",
    "current_out_CD": "current_out.weight",
}


class Place(NamedTuple):
    """A tensor called `name`, of `shape`, is `out(leaf[rows][..., columns])`, which is `back(tensor)`.

    leaf: the dotted path of a parameter or bias, None of zeros that only fill a layer. rows: a layer or an expert, the
    experts of a layer, or None for all. columns: of the last dimension, None for all.
    """

    name: str
    shape: tuple[int, ...]
    leaf: str | None
    rows: int | slice | None = None
    columns: slice | None = None
    out: Turn = np.asarray
    back: Turn = np.asarray


def _interleaved(weight_JD: np.ndarray, heads: int) -> np.ndarray:
    """Each head's rows (i, i + K/2) side by side."""
    return weight_JD.reshape(heads, 2, -1, weight_JD.shape[-1]).swapaxes(1, 2).reshape(weight_JD.shape)


def _halved(weight_JD: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `_interleaved`."""
    return weight_JD.reshape(heads, -1, 2, weight_JD.shape[-1]).swapaxes(1, 2).reshape(weight_JD.shape)


def _transposed(array: np.ndarray) -> np.ndarray:
    return array.swapaxes(-1, -2)


def places(model: ModelConfig, kind: str, *, has_bias: bool) -> Iterator[Place]:
    """All tensors of a model as `kind` of ARCHITECTURES, in the order of the layers. has_bias: of OWN."""
    vocab, hidden = model.vocab_size, model.hidden_size
    yield Place("model.embed_tokens.weight", (vocab, hidden), "params.embedding_VD")
    first = 0
    for layer, count in enumerate(model.experts_per_layer):
        yield from _dense(model, kind, layer)
        if kind == OWN:
            yield from _together(model, layer, slice(first, first + count), has_bias=has_bias)
        else:
            yield from _numbered(model, kind, layer, slice(first, first + count))
        first += count
    yield Place("model.norm.weight", (hidden,), "params.final_norm.scale_D")
    if not model.tie_embeddings:
        turned = {"out": _transposed, "back": _transposed}
        yield Place("lm_head.weight", (vocab, hidden), "params.unembedding_DV", **turned)


def _dense(model: ModelConfig, kind: str, layer: int) -> Iterator[Place]:
    """What every layer has one of."""
    hidden, heads, kv_heads, size = model.hidden_size, model.num_heads, model.kv_heads, model.head_dim

    def place(theirs: str, ours: str, *shape: int, out: Turn = np.asarray, back: Turn = np.asarray) -> Place:
        name, leaf = f"model.layers.{layer}.{theirs}", f"params.layers.{ours}"
        return Place(name, shape, leaf, layer, out=out, back=back)

    def heads_first(theirs: str, ours: str, number: int) -> Place:
        turns = [functools.partial(turn, heads=number) for turn in (_interleaved, _halved)]
        out, back = turns if kind == ERNIE else (np.asarray, np.asarray)
        return place(theirs, ours, number * size, hidden, out=out, back=back)

    def linear(theirs: str, ours: str, outputs: int, inputs: int) -> Place:
        return place(theirs, ours, outputs, inputs, out=_transposed, back=_transposed)

    yield place("input_layernorm.weight", "attention_norm.scale_D", hidden)
    yield place("post_attention_layernorm.weight", "moe_norm.scale_D", hidden)
    yield heads_first("self_attn.q_proj.weight", "attention.query_JD", heads)
    yield heads_first("self_attn.k_proj.weight", "attention.key_JD", kv_heads)
    yield place("self_attn.v_proj.weight", "attention.value_JD", kv_heads * size, hidden)
    yield linear("self_attn.o_proj.weight", "attention.output_JD", hidden, heads * size)
    if model.qk_norm != "none":
        sizes = (size, size) if model.qk_norm == "head" else (heads * size, kv_heads * size)
        yield place("self_attn.q_norm.weight", "attention.query_norm.scale_D", sizes[0])
        yield place("self_attn.k_norm.weight", "attention.key_norm.scale_D", sizes[1])
    if model.lfa:
        for ours, theirs in FILTERS.items():
            sizes = (hidden // 2, hidden) if ours.endswith("DC") else (hidden, hidden // 2)
            yield linear(f"self_attn.lfa.{theirs}", f"attention.lfa.{ours}", *sizes)
        yield place("self_attn.lfa.norm.weight", "attention.lfa.norm.scale_D", hidden)
        if model.lfa_bias:
            yield place("self_attn.lfa.current_in.bias", "attention.lfa.bias_in_C", hidden // 2)
            yield place("self_attn.lfa.current_out.bias", "attention.lfa.bias_out_D", hidden)
    if shared := model.shared_ffn_size:
        yield place("mlp.shared_expert.gate_up_proj.weight", "shared.gate_up_UD", 2 * shared, hidden)
        yield linear("mlp.shared_expert.down_proj.weight", "shared.down_UD", hidden, shared)


def _together(model: ModelConfig, layer: int, rows: slice, *, has_bias: bool) -> Iterator[Place]:
    """The experts of a layer in one tensor, as Transformers 5 has them in memory."""
    count, hidden, ffn, name = rows.stop - rows.start, model.hidden_size, model.ffn_size, f"model.layers.{layer}.mlp."
    turned = {"rows": rows, "out": _transposed, "back": _transposed}
    yield Place(f"{name}gate.weight", (count, hidden), "params.experts.router_ND", rows)
    if has_bias:
        yield Place(f"model.layers.{layer}.{ARCHITECTURES[OWN].bias}", (count,), BIAS, rows)
    yield Place(f"{name}experts.gate_up_proj", (count, 2 * ffn, hidden), "params.experts.gate_up_NDG", **turned)
    yield Place(f"{name}experts.down_proj", (count, hidden, ffn), "params.experts.down_NFD", **turned)


def _numbered(model: ModelConfig, kind: str, layer: int, rows: slice) -> Iterator[Place]:
    """Expert by expert; ERNIE's padded to the widest layer with experts of zeros that a bias keeps from being chosen.

    They have the last expert's router row: a row of zeros can score so far above the others that the softmax leaves
    them nothing to renormalise.
    """
    of, name = ARCHITECTURES[kind], f"model.layers.{layer}."
    count, hidden, ffn = rows.stop - rows.start, model.hidden_size, model.ffn_size
    width = max(model.experts_per_layer) if kind == ERNIE else count
    more = (0, width - count)

    def kept(array: np.ndarray) -> np.ndarray:
        return array[:count]

    router = (f"{name}{of.router}", (width, hidden), "params.experts.router_ND", rows)
    yield Place(*router, out=lambda router_ED: np.pad(router_ED, (more, (0, 0)), "edge"), back=kept)
    if of.bias:
        bias = (f"{name}{of.bias}", (1, width), BIAS, rows)
        turns = {"out": lambda bias_E: np.pad(bias_E, more, constant_values=NEVER)[None], "back": lambda b: kept(b[0])}
        yield Place(*bias, **turns)
    up = {"gate": slice(0, ffn), "up": slice(ffn, 2 * ffn)}
    turned = {"out": _transposed, "back": _transposed}
    for expert in range(width):
        names = dict(zip(("gate", "up", "down"), (name + part.format(expert) for part in of.experts), strict=True))
        row = rows.start + expert
        gate_up, down = ("params.experts.gate_up_NDG", "params.experts.down_NFD") if expert < count else (None, None)
        for part, columns in up.items():
            yield Place(names[part], (ffn, hidden), gate_up, row, columns=columns, **turned)
        yield Place(names["down"], (hidden, ffn), down, row, **turned)
