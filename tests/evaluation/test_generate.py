"""Decoding token by token against the forward pass, and what `laep-jax generate` prints."""

import collections
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laep_jax.checkpoint.checkpointer import Checkpoints
from laep_jax.config import AuxLossConfig, ModelConfig
from laep_jax.errors import UserError
from laep_jax.evaluation.decoding import decode_step, generate, new_cache
from laep_jax.evaluation.generate_command import _show, main
from laep_jax.model.transformer import init_params, logits
from laep_jax.sharding import make_mesh
from laep_jax.state.tree import init_state, initial_layout
from laep_jax.training.run_state import RunState
from tests.support.tiny_run import change, tiny_config

TOKENS = np.random.default_rng(0).integers(0, 257, 20)
KINDS = {
    "lfa": {"num_experts": (8, 4, 6), "lfa": True, "lfa_bias": True},
    "plain": {"num_experts": 8, "lfa": False},
    "top 1": {"num_experts": 8, "top_k": 1},
    "qwen3": {"num_experts": 8, "lfa": False, "num_kv_heads": 2, "qk_norm": "head", "top_k": 4},
    "olmoe": {"num_experts": 8, "lfa": False, "qk_norm": "whole", "top_k": 4, "norm_topk_prob": False},
    "deepseek": {
        "num_experts": (8, 4, 6),
        "num_kv_heads": 1,
        "router_score": "sigmoid",
        "shared_ffn_size": 12,
        "tie_embeddings": True,
    },
    "bfloat16": {"num_experts": (8, 4, 6), "dtype": "bfloat16"},
}


def model(kind: str) -> tuple[ModelConfig, dict, jax.Array]:
    """A config, noisy parameters and a bias."""
    config = change(tiny_config("x"), model={"num_layers": 3, "router_init": 0.7, **KINDS[kind]}).model
    params = init_params(config, AuxLossConfig(), jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 99))
    noisy = jax.tree.map(lambda x: x + 0.15 * jax.random.normal(next(keys), x.shape), params)
    bias_N = 0.3 * jax.random.normal(next(keys), (sum(config.experts_per_layer),))
    return config, noisy, bias_N


def forward(config: ModelConfig, params: dict, bias_N: jax.Array, tokens) -> np.ndarray:
    """[S, V] of the whole model, on eight devices."""
    whole = change(tiny_config("x"), mesh={"fsdp": 4, "expert": 2})
    whole = dataclasses.replace(whole, model=config)
    mesh, shape = make_mesh(whole.mesh), (8, len(tokens))
    batch = {
        "tokens_BS": jnp.broadcast_to(jnp.asarray(tokens, jnp.int32), shape),
        "segments_BS": jnp.ones(shape, jnp.int32),
        "positions_BS": jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape),
    }
    run = jax.jit(functools.partial(logits, config=config, mesh=mesh))
    return np.asarray(run(params, {"bias_N": bias_N}, initial_layout(whole), batch)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step_the_logits_are_those_of_the_forward_pass(kind):
    config, params, bias_N = model(kind)
    cache = new_cache(config, len(TOKENS))
    rows = []
    for position, token in enumerate(TOKENS):
        row, cache = decode_step(params, bias_N, cache, jnp.int32(token), jnp.int32(position), config)
        rows.append(np.asarray(row))
    want = forward(config, params, bias_N, TOKENS)
    assert want.std() > 0.3
    if kind == "bfloat16":  # rounds in another order; where a router's choice is close it may be another
        assert np.median(np.abs(np.stack(rows) - want)) < 0.02
    else:
        np.testing.assert_allclose(np.stack(rows), want, rtol=0, atol=2e-5)


def test_greedy_tokens_are_those_of_the_forward_pass():
    config, params, bias_N = model("lfa")
    prompt = TOKENS[:5].tolist()
    found = list(generate(params, bias_N, prompt, config, max_tokens=8))
    assert found == forward(config, params, bias_N, prompt + found)[4:-1].argmax(axis=-1).tolist()


def test_draws_are_by_temperature_from_the_nucleus_and_by_the_seed():
    config, params, bias_N = model("plain")
    prompt = TOKENS[:5].tolist()
    shares = np.asarray(jax.nn.softmax(forward(config, params, bias_N, prompt)[-1] / 0.5))
    order = np.argsort(-shares)
    nucleus = set(order[: np.searchsorted(np.cumsum(shares[order]), 0.3) + 1].tolist())
    assert 2 < len(nucleus) < 60
    options = {"max_tokens": 1, "temperature": 0.5}
    drawn = collections.Counter(
        next(generate(params, bias_N, prompt, config, **options, top_p=0.3, seed=seed)) for seed in range(60)
    )
    assert drawn.keys() <= nucleus
    assert len(drawn) > 2
    twice = [list(generate(params, bias_N, prompt, config, max_tokens=4, temperature=1.0, seed=3)) for _ in range(2)]
    assert twice[0] == twice[1]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, r"^prompt=\[\] has no tokens$"),
        ([1], {"temperature": -1.0}, "^temperature=-1.0 must not be negative$"),
        ([1], {"top_p": 0.0}, "^top_p=0.0 must be above 0 and at most 1$"),
        ([1], {"seed": 2**32}, r"^seed=4294967296 must be in \[0, 2\*\*32\)$"),
    ],
)
def test_what_makes_no_sense_is_refused(prompt, options, message):
    with pytest.raises(UserError, match=message):
        next(generate({}, jnp.zeros(1), prompt, tiny_config("x").model, max_tokens=1, **options))


def test_the_command_prints_the_prompt_and_the_text_until_the_document_ends(tmp_path, capsys):
    """A model that has learned to write "äb" and then to end: each byte follows from the one before."""
    shape = {"num_layers": 1, "num_experts": 8, "hidden_size": 384}
    config = tiny_config(str(tmp_path / "tokens"), model=shape)
    state = init_state(config, make_mesh(config.mesh))
    following = np.zeros((384, 384), np.float32)
    text = [*"xäb".encode(), 256]
    for before, after in itertools.pairwise(text):
        following[before, after] = 9
    zeros = jax.tree.map(lambda leaf: leaf * 0, state.params["experts"])
    layers = jax.tree.map(lambda leaf: leaf * 0 if leaf.ndim > 2 else leaf, state.params["layers"])
    params = state.params | {
        "embedding_VD": jnp.asarray(np.eye(384, dtype=np.float32)) + state.params["embedding_VD"] * 0,
        "unembedding_DV": jnp.asarray(following) + state.params["unembedding_DV"] * 0,
        "experts": zeros,
        "layers": layers,
    }
    run_state = RunState.fresh(config.resolve(8), "sha")
    run_state.step = 2
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=1) as checkpoints:
        new = dataclasses.replace(state, params=params)
        checkpoints.save(2, new, {}, run_state.to_meta(), config.model.experts_per_layer, now=True)
    assert main([str(tmp_path / "run"), "--prompt=x", "--cpu-devices=8"]) == 0
    assert capsys.readouterr().out == "xäb\n"
    assert main([str(tmp_path / "run"), "--prompt=x", "--max-tokens=1", "--cpu-devices=8"]) == 0
    assert capsys.readouterr().out == "x\ufffd\n"


def test_what_a_tokenizer_changes_afterwards_is_printed_again(capsys):
    shown = ""
    for text in ("it", "it '", "it's", "it's r\ufffd", "it's raining"):
        shown = _show(text, shown)
    assert capsys.readouterr().out == "it '\nit's raining"
