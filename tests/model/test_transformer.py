"""The whole decoder: causality, document borders, meshes, remat, and the form of the layer loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laep_jax.config import AuxLossConfig, MeshConfig, ModelConfig
from laep_jax.model.transformer import cross_entropy, init_params, token_losses
from laep_jax.sharding import make_mesh, put_batch, tree_shardings

MODEL = ModelConfig(
    vocab_size=128, num_layers=3, hidden_size=16, num_heads=4, head_dim=4, ffn_size=8, num_experts=(8, 8, 16)
)
LENGTH = 12


def _batch():
    tokens_BS = np.random.default_rng(0).integers(0, 128, (8, LENGTH)).astype(np.int32)
    segments_BS = np.tile(np.int32([1] * 5 + [2] * 5 + [0] * 2), (8, 1))
    positions_BS = np.tile(np.int32([*range(5), *range(5), 0, 0]), (8, 1))
    targets_BS = np.where(segments_BS > 0, np.roll(tokens_BS, -1, axis=1), -1)
    targets_BS[:, [4, 9]] = -1
    return {"tokens_BS": tokens_BS, "targets_BS": targets_BS, "segments_BS": segments_BS, "positions_BS": positions_BS}


def _bias(model):
    return {"runs": [{"bias_E": jnp.zeros((layers, experts))} for layers, experts in model.runs]}


def _loss(params, batch, model, mesh):
    loss_BS, aux = token_losses(params, _bias(model), batch, model, AuxLossConfig(), mesh)
    counts = [counts_E for part in aux for counts_E in part.tokens_per_expert_E]
    return jnp.sum(loss_BS), (loss_BS, counts)


@functools.cache
def _run(sizes=(1, 8), **changes):
    model = MODEL if not changes else ModelConfig(**{**_fields(MODEL), **changes})
    mesh = make_mesh(MeshConfig(fsdp=sizes[0], expert=sizes[1]))
    params = init_params(model, AuxLossConfig(), jax.random.key(0))
    params = jax.device_put(params, tree_shardings(params, mesh))
    step = jax.jit(jax.value_and_grad(functools.partial(_loss, model=model, mesh=mesh), has_aux=True))
    return jax.tree.map(np.asarray, step(params, put_batch(_batch(), mesh)))


def _fields(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


@pytest.mark.parametrize(
    "changes",
    [{"sizes": (8, 1)}, {"sizes": (2, 4)}, {"layers": "unrolled"}, {"remat": "full"}, {"remat": "save_dispatch"}],
    ids=str,
)
def test_mesh_remat_and_unrolling_change_nothing(changes):
    (loss, (_, counts)), gradients = _run(**changes)
    (expected, (_, expected_counts)), expected_gradients = _run()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for got, want in zip(counts, expected_counts, strict=True):
        np.testing.assert_array_equal(got, want)
    assert [int(c.sum()) for c in counts] == [2 * 8 * 10] * 3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients, expected_gradients)


def test_padding_and_positions_without_target_cost_nothing():
    (_, (loss_BS, _)), _ = _run()
    assert (loss_BS[:, [4, 9, 10, 11]] == 0).all()
    assert (loss_BS[:, :4] > 0).all()


@pytest.mark.parametrize("lfa", [True, False])
def test_no_position_sees_the_future_or_another_document(lfa):
    model = ModelConfig(**{**_fields(MODEL), "lfa": lfa})
    mesh = make_mesh(MeshConfig(fsdp=8, expert=1))
    params = init_params(model, AuxLossConfig(), jax.random.key(0))
    batch = _batch()
    batch["tokens_BS"] = np.tile(np.arange(LENGTH, dtype=np.int32), (8, 1))  # each position its own embedding row

    def losses_of_row(embedding_VD):
        loss_BS, _ = token_losses(
            params | {"embedding_VD": embedding_VD}, _bias(model), batch, model, AuxLossConfig(), mesh
        )
        return loss_BS[0]

    jacobian = jax.jit(jax.jacrev(losses_of_row))(params["embedding_VD"])  # [S, V, D]
    seen_SS = np.abs(np.asarray(jacobian))[:, :LENGTH].max(-1) > 0
    expected_SS = np.zeros((LENGTH, LENGTH), bool)
    for first in (0, 5):  # the last position of each document has no target
        expected_SS[first : first + 4, first : first + 4] = np.tril(np.ones((4, 4), bool))
    np.testing.assert_array_equal(seen_SS, expected_SS)


def test_a_layers_first_weights_depend_on_its_own_shape_only():
    wide = init_params(MODEL, AuxLossConfig(), jax.random.key(0))
    narrow = init_params(
        ModelConfig(**{**_fields(MODEL), "num_experts": (8, 16, 16)}), AuxLossConfig(), jax.random.key(0)
    )
    np.testing.assert_array_equal(wide["runs"][1]["moe"]["down_EFD"][0], narrow["runs"][1]["moe"]["down_EFD"][1])


@pytest.mark.parametrize("logits_chunk", [12 * 40, 100])
def test_logits_of_bfloat16_activations_are_not_rounded(logits_chunk):
    keys = jax.random.split(jax.random.key(0), 2)
    x_BSD, unembedding_DV = (
        jax.random.normal(key, shape) for key, shape in zip(keys, [(2, 12, 64), (64, 40)], strict=True)
    )
    x_BSD, unembedding_DV = x_BSD.astype(jnp.bfloat16), unembedding_DV.astype(jnp.bfloat16)
    targets_BS = np.random.default_rng(0).integers(0, 40, (2, 12))
    logits_BSV = np.asarray(x_BSD, np.float64) @ np.asarray(unembedding_DV, np.float64)
    chosen_BS = np.take_along_axis(logits_BSV, targets_BS[..., None], axis=-1)[..., 0]
    expected_BS = np.log(np.sum(np.exp(logits_BSV), axis=-1)) - chosen_BS
    loss_BS = cross_entropy(x_BSD, unembedding_DV, targets_BS, logits_chunk)
    assert loss_BS.dtype == jnp.float32
    np.testing.assert_allclose(loss_BS, expected_BS, atol=1e-4)  # logits of 20: bfloat16 would be 0.06 off


def test_the_loss_in_parts_is_the_loss():
    keys = jax.random.split(jax.random.key(0), 2)
    x_BSD, unembedding_DV = jax.random.normal(keys[0], (2, 12, 8)), jax.random.normal(keys[1], (8, 40))
    targets_BS = np.random.default_rng(0).integers(-1, 40, (2, 12))

    def of(logits_chunk):
        def total(x_BSD, unembedding_DV):
            return jnp.sum(cross_entropy(x_BSD, unembedding_DV, targets_BS, logits_chunk))

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(x_BSD, unembedding_DV)

    for logits_chunk in (1, 100, 12 * 40 - 1):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), of(logits_chunk), of(12 * 40))
