"""The tensors of an exported model: their names in Hugging Face's models, their shapes, and where they are read.

The arrays of a checkpoint have the input last where Transformers has it, or first: `query_JD` is a `Linear.weight`,
`unembedding_DV` one turned round. Rotary pairs are (i, i + K/2), as in Mixtral; ERNIE has (2i, 2i + 1).
Axes: V vocabulary, D hidden, J heads x head size, K head size, E experts of a layer, F ffn, G = 2F (gate, then up).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from laep_jax.checkpoint.saved import Saved

NEVER = -1e9  # bias of an expert that is there to fill its layer


class Spec(NamedTuple):
    """A tensor that is still to be read."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def model_specs(saved: Saved, form: str) -> Iterator[Spec]:
    """All tensors of a form, in the order of the layers."""
    model = saved.config.model
    vocab, hidden = model.vocab_size, model.hidden_size
    yield Spec("model.embed_tokens.weight", (vocab, hidden), lambda: saved.read("params.embedding_VD"))
    experts = {"hetero": _together, "uniform": _mixtral, "padded": _ernie}[form]
    for layer in range(model.num_layers):
        name = f"model.layers.{layer}."
        yield _dense(saved, layer, name + "input_layernorm.weight", "attention_norm.scale_D")
        yield _dense(saved, layer, name + "post_attention_layernorm.weight", "moe_norm.scale_D")
        yield from _attention(saved, layer, name + "self_attn.", interleaved=form == "padded")
        yield from experts(saved, layer, name)
    yield Spec("model.norm.weight", (hidden,), lambda: saved.read("params.final_norm.scale_D"))
    yield Spec("lm_head.weight", (vocab, hidden), lambda: saved.read("params.unembedding_DV").T)


def _dense(saved: Saved, layer: int, name: str, leaf: str, turn: Callable = lambda array: array) -> Spec:
    """What every layer has one of; turn: as the other model has it."""
    key = f"params.layers.{leaf}"

    def make() -> np.ndarray:
        return turn(saved.read(key, slice(layer, layer + 1))[0])

    return Spec(name, turn(np.empty(saved.shape(key)[1:], np.bool_)).shape, make)


def _attention(saved: Saved, layer: int, name: str, *, interleaved: bool) -> Iterator[Spec]:
    heads, size = saved.config.model.num_heads, saved.config.model.head_dim

    def pairs(weight_JD: np.ndarray) -> np.ndarray:
        """Each head's rows (i, i + K/2) side by side."""
        return weight_JD.reshape(heads, 2, size // 2, -1).swapaxes(1, 2).reshape(weight_JD.shape)

    turn = pairs if interleaved else np.asarray
    yield _dense(saved, layer, name + "q_proj.weight", "attention.query_JD", turn)
    yield _dense(saved, layer, name + "k_proj.weight", "attention.key_JD", turn)
    yield _dense(saved, layer, name + "v_proj.weight", "attention.value_JD")
    yield _dense(saved, layer, name + "o_proj.weight", "attention.output_JD", np.transpose)
    if saved.config.model.lfa:
        for ours, theirs in FILTERS.items():
            yield _dense(saved, layer, f"{name}lfa.{theirs}", f"attention.lfa.{ours}", np.transpose)
        if saved.config.model.lfa_bias:
            yield _dense(saved, layer, f"{name}lfa.current_in.bias", "attention.lfa.bias_in_C")
            yield _dense(saved, layer, f"{name}lfa.current_out.bias", "attention.lfa.bias_out_D")


FILTERS = {
    "previous_in_DC": "previous_in.weight",
    "current_in_DC": "current_in.weight",
    "previous_out_CD": "previous_out.weight",
    "current_out_CD": "current_out.weight",
    "norm.scale_D": "norm.weight",
}


def _router(saved: Saved, layer: int) -> np.ndarray:
    return saved.read("params.experts.router_ND", saved.rows(layer))


def _together(saved: Saved, layer: int, name: str) -> Iterator[Spec]:
    """The experts of a layer in one tensor, as Transformers 5 has them in memory."""
    model, rows = saved.config.model, saved.rows(layer)
    count, hidden, ffn = saved.num_experts[layer], model.hidden_size, model.ffn_size
    yield Spec(f"{name}mlp.gate.weight", (count, hidden), lambda: _router(saved, layer))
    if saved.has_bias:
        yield Spec(f"{name}mlp.gate.bias", (count,), lambda: saved.read("router_bias.bias_N", rows))
    yield Spec(
        f"{name}mlp.experts.gate_up_proj",
        (count, 2 * ffn, hidden),
        lambda: saved.read("params.experts.gate_up_NDG", rows).swapaxes(1, 2),
    )
    yield Spec(
        f"{name}mlp.experts.down_proj",
        (count, hidden, ffn),
        lambda: saved.read("params.experts.down_NFD", rows).swapaxes(1, 2),
    )


def _numbered(saved: Saved, layer: int, expert: int, names: Sequence[str]) -> Iterator[Spec]:
    """One expert's matrices. names: of gate, up and down."""
    model, first = saved.config.model, saved.rows(layer).start + expert
    hidden, ffn, row = model.hidden_size, model.ffn_size, slice(first, first + 1)

    def half(start: int) -> Callable[[], np.ndarray]:
        return lambda: saved.read("params.experts.gate_up_NDG", row)[0].T[start : start + ffn]

    gate, up, down = names
    yield Spec(gate, (ffn, hidden), half(0))
    yield Spec(up, (ffn, hidden), half(ffn))
    yield Spec(down, (hidden, ffn), lambda: saved.read("params.experts.down_NFD", row)[0].T)


def _mixtral(saved: Saved, layer: int, name: str) -> Iterator[Spec]:
    count = saved.num_experts[layer]
    name += "block_sparse_moe."
    yield Spec(f"{name}gate.weight", (count, saved.config.model.hidden_size), lambda: _router(saved, layer))
    for expert in range(count):
        of_expert = f"{name}experts.{expert}."
        yield from _numbered(saved, layer, expert, [f"{of_expert}{part}.weight" for part in ("w1", "w3", "w2")])


def _ernie(saved: Saved, layer: int, name: str) -> Iterator[Spec]:
    """Filled up to the widest layer with experts of zeros, which a bias keeps from being chosen."""
    model, count, width = saved.config.model, saved.num_experts[layer], max(saved.num_experts)
    hidden, ffn = model.hidden_size, model.ffn_size

    def filled(array: np.ndarray, value: float) -> np.ndarray:
        return np.pad(array, ((0, width - count), *((0, 0),) * (array.ndim - 1)), constant_values=value)

    yield Spec(f"{name}mlp.gate.weight", (width, hidden), lambda: filled(_router(saved, layer), 0))
    bias = f"{name}mlp.moe_statics.e_score_correction_bias"
    yield Spec(bias, (1, width), lambda: filled(np.zeros(count, np.float32), NEVER)[None])
    for expert in range(width):
        names = [f"{name}mlp.experts.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")]
        if expert < count:
            yield from _numbered(saved, layer, expert, names)
        else:
            for part, shape in zip(names, ((ffn, hidden), (ffn, hidden), (hidden, ffn)), strict=True):
                yield Spec(part, shape, lambda shape=shape: np.zeros(shape, np.float32))
