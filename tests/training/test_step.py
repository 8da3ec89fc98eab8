"""The optimizer step: micro-batches, rearranged experts, the loss-free bias, and a pinned first step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from laep_jax.config import AuxLossConfig, Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from laep_jax.model.transformer import token_losses
from laep_jax.sharding import is_of_experts, leaf_name, make_mesh, put_batch
from laep_jax.state.surgery import kept_rows
from laep_jax.state.tree import init_state, initial_layout
from laep_jax.training.step import make_eval_step, make_train_step

CONFIG = Config(
    model=ModelConfig(vocab_size=128, num_layers=2, hidden_size=16, num_heads=4, head_dim=4, ffn_size=8, num_experts=8),
    mesh=MeshConfig(fsdp=2, expert=4),
    data=DataConfig(batch_size=16, sequence_length=12),
    optimizer=OptimizerConfig(warmup_steps=0),
)


def _batch(step=0):
    rng = np.random.default_rng(step)
    tokens_BS = rng.integers(0, 128, (16, 12)).astype(np.int32)
    segments_BS = np.where(np.arange(12) < rng.integers(4, 13, (16, 1)), 1, 0).astype(np.int32)
    return {
        "tokens_BS": tokens_BS,
        "targets_BS": np.where(segments_BS > 0, np.roll(tokens_BS, -1, axis=1), -1).astype(np.int32),
        "segments_BS": segments_BS,
        "positions_BS": np.tile(np.arange(12, dtype=np.int32), (16, 1)),
    }


@functools.cache
def _mesh():
    return make_mesh(CONFIG.mesh)


@functools.cache
def _layout():
    return initial_layout(CONFIG)


def _steps(config, number, state=None):
    state = state or init_state(config, _mesh())
    step = make_train_step(config, _mesh())
    all_metrics = []
    for i in range(number):
        state, metrics = step(state, _layout(), put_batch(_batch(i), _mesh()))
        all_metrics.append(jax.tree.map(np.asarray, metrics))
    return state, all_metrics


@functools.cache
def _plain():
    state, metrics = _steps(CONFIG, 2)
    return jax.tree.map(np.asarray, state), metrics


BALANCED = dataclasses.replace(CONFIG, aux_loss=AuxLossConfig(mixtral=0.5, router_z=0.1))


@functools.cache
def _balanced():
    return _steps(BALANCED, 1)[1][0]


def test_gradient_accumulation_adds_the_balancing_losses_of_each_micro_batch():
    """Not those of the whole batch: both are means over tokens, and the z-loss of two halves is their mean."""
    config = dataclasses.replace(BALANCED, train=TrainConfig(grad_accumulation=2))
    (metrics,), batch = _steps(config, 1)[1], _batch()
    halves = []
    for half in (0, 1):  # rows are interleaved
        rows = {name: np.repeat(values[half::2], 2, axis=0) for name, values in batch.items()}
        state = init_state(BALANCED, _mesh())
        halves.append(
            jax.tree.map(np.asarray, make_train_step(BALANCED, _mesh())(state, _layout(), put_batch(rows, _mesh()))[1])
        )
    for name in ("mixtral", "router_z"):
        np.testing.assert_allclose(metrics["aux"][name], np.mean([half["aux"][name] for half in halves]), rtol=1e-5)
    assert metrics["aux"]["mixtral"] != pytest.approx(float(_balanced()["aux"]["mixtral"]), rel=1e-5)
    np.testing.assert_allclose(metrics["loss"], _balanced()["loss"], rtol=1e-6)


def test_gradient_accumulation_changes_neither_loss_nor_counts_nor_step():
    state, metrics = _steps(dataclasses.replace(CONFIG, train=TrainConfig(grad_accumulation=2)), 2)
    expected_state, expected = _plain()
    for got, want in zip(metrics, expected, strict=True):
        np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-6)
        np.testing.assert_allclose(got["grad_norm"], want["grad_norm"], rtol=1e-4)
        np.testing.assert_array_equal(got["tokens_per_expert"], want["tokens_per_expert"])
    embedding_VD = state.params["embedding_VD"]
    # Adam's first steps are sign-like: where a gradient is nearly zero, its rounding is seen
    np.testing.assert_allclose(embedding_VD, expected_state.params["embedding_VD"], atol=1e-4)


def test_counts_of_the_step_are_the_assignments_of_the_batch():
    _, metrics = _plain()
    assert metrics[0]["tokens_per_expert"].sum(-1).tolist() == [2 * int((_batch()["segments_BS"] > 0).sum())] * 2


def test_a_rearranged_state_has_the_same_loss_and_the_same_next_step():
    order = [[3, 0, 7, 1, 2, 6, 5, 4], [6, 5, 4, 0, 1, 2, 3, 7]]

    def rearrange(path, leaf):
        return jax.device_put(leaf[kept_rows((8, 8), order)], leaf.sharding) if is_of_experts(leaf_name(path)) else leaf

    start, _ = _steps(CONFIG, 1)
    rearranged = jax.tree_util.tree_map_with_path(rearrange, start)
    step = make_train_step(CONFIG, _mesh())
    moved, metrics = step(rearranged, _layout(), put_batch(_batch(1), _mesh()))
    expected_state, (_, expected) = _plain()
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=1e-5)
    counts_LE = np.take_along_axis(expected["tokens_per_expert"], np.array(order), axis=1)
    np.testing.assert_array_equal(metrics["tokens_per_expert"], counts_LE)
    expected_rearranged = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.asarray(rearrange(path, jnp.asarray(leaf))), expected_state
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), moved, expected_rearranged)


def test_the_loss_free_bias_follows_the_counts_of_the_step():
    config = dataclasses.replace(CONFIG, aux_loss=AuxLossConfig(loss_free_bias=0.01))
    state, (metrics,) = _steps(config, 1)
    counts_LE = metrics["tokens_per_expert"]
    expected_LE = 0.01 * np.sign(counts_LE.mean(1, keepdims=True) - counts_LE)
    np.testing.assert_allclose(state.router_bias["bias_N"], expected_LE.reshape(-1))
    assert (_plain()[0].router_bias["bias_N"] == 0).all()


def test_auxiliary_losses_are_added_with_their_coefficients():
    """Reported without them; the gradient of the sum is that of the cross-entropy and the weighted losses."""
    metrics = _balanced()
    assert metrics["aux"].keys() == {"mixtral", "router_z"}
    assert metrics["loss"] == pytest.approx(float(_plain()[1][0]["loss"]), rel=1e-6)
    batch, state = put_batch(_batch(), _mesh()), init_state(CONFIG, _mesh())

    def total(params):
        targets = jnp.sum(batch["targets_BS"] >= 0).astype(jnp.float32)
        losses_BS, aux = token_losses(
            params, state.router_bias, _layout(), batch, CONFIG.model, BALANCED.aux_loss, _mesh(), targets
        )
        mean = {name: jnp.mean(value_L) for name, value_L in aux.losses.items()}
        return jnp.sum(losses_BS) / targets + 0.5 * mean["mixtral"] + 0.1 * mean["router_z"]

    norm = optax.tree.norm(jax.jit(jax.grad(total))(state.params))
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert metrics["grad_norm"] != pytest.approx(float(_plain()[1][0]["grad_norm"]), rel=1e-3)


def test_evaluation_sums_the_loss_of_every_target():
    state = init_state(CONFIG, _mesh())
    batch = _batch()
    batch["domains_BS"] = np.where(batch["tokens_BS"] % 2 == 0, 0, 2).astype(np.int32)  # so there are padded ones too
    step = make_eval_step(CONFIG, _mesh(), 3)
    loss_M, targets_M, counts = step(_layout(), state.params, state.router_bias, put_batch(batch, _mesh()))
    is_target_BS = batch["targets_BS"] >= 0
    assert targets_M.tolist() == [(is_target_BS & (batch["domains_BS"] == i)).sum() for i in range(3)]
    _, (metrics, _) = _plain()
    assert float(loss_M.sum() / targets_M.sum()) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    np.testing.assert_array_equal(counts.sum(1), metrics["tokens_per_expert"])
    loss_BS, _ = token_losses(state.params, state.router_bias, _layout(), batch, CONFIG.model, CONFIG.aux_loss, _mesh())
    np.testing.assert_allclose(loss_M, [np.sum(loss_BS[batch["domains_BS"] == i]) for i in range(3)], rtol=1e-5)


LEARNING = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(warmup_steps=0, learning_rate=1e-2))


def _twenty(config):
    """Metrics of twenty steps on the same two batches."""
    state, step, metrics = init_state(config, _mesh()), make_train_step(config, _mesh()), []
    for i in range(20):
        state, found = step(state, _layout(), put_batch(_batch(i % 2), _mesh()))
        metrics.append(jax.tree.map(np.asarray, found))
    return state, metrics


def test_step_twenty_is_what_it_was():
    """Pinned on CPU. Update the numbers only with a change that is meant to alter the arithmetic, and say so."""
    _, metrics = _twenty(LEARNING)
    np.testing.assert_allclose([metrics[i]["loss"] for i in (0, 9, 19)], [4.855572, 4.079672, 3.011102], rtol=1e-4)
    np.testing.assert_allclose([metrics[i]["grad_norm"] for i in (0, 9, 19)], [0.510966, 0.538462, 1.138614], rtol=1e-3)


def test_in_bfloat16_it_learns_the_same_with_parameters_moments_and_loss_in_float32():
    config = dataclasses.replace(LEARNING, model=dataclasses.replace(LEARNING.model, dtype="bfloat16"))
    state, metrics = _twenty(config)
    _, expected = _twenty(LEARNING)
    losses, wanted = (np.array([m["loss"] for m in both]) for both in (metrics, expected))
    assert losses.dtype == np.float32
    assert (losses != wanted).all()
    np.testing.assert_allclose(losses, wanted, rtol=2e-2)  # 8 bits of mantissa: 0.4 % a rounding
    assert wanted[-1] < 0.8 * wanted[0]
    floating = [leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert set(floating) == {jnp.dtype(jnp.float32)}
