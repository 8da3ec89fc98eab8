"""The whole decoder: causality, document borders, meshes, remat, and the form of the layer loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from laep_jax.config import AuxLossConfig, Config, MeshConfig, ModelConfig
from laep_jax.laep.layout import make_layout, windows
from laep_jax.laep.slots import in_order
from laep_jax.model.layers import rms_norm
from laep_jax.model.transformer import EXPERTS, Block, cross_entropy, init_params, token_losses
from laep_jax.sharding import make_mesh, put_batch, tree_shardings
from laep_jax.state.tree import initial_layout

MODEL = ModelConfig(
    vocab_size=128, num_layers=3, hidden_size=16, num_heads=4, head_dim=4, ffn_size=8, num_experts=(8, 16, 8)
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
    return {"bias_N": jnp.zeros(sum(model.experts_per_layer))}


def _layout(model, mesh):
    return initial_layout(Config(model=model, mesh=MeshConfig(expert=mesh.shape["expert"])))


def _loss(params, batch, model, mesh):
    loss_BS, aux = token_losses(params, _bias(model), _layout(model, mesh), batch, model, AuxLossConfig(), mesh)
    return jnp.sum(loss_BS), (loss_BS, aux.tokens_per_expert_E)


@functools.cache
def _run(sizes=(1, 8), **changes):
    model = MODEL if not changes else ModelConfig(**{**_fields(MODEL), **changes})
    mesh = make_mesh(MeshConfig(fsdp=sizes[0], expert=sizes[1]), jax.devices()[: sizes[0] * sizes[1]])
    params = init_params(model, AuxLossConfig(), jax.random.key(0))
    params = jax.device_put(params, tree_shardings(params, mesh))
    step = jax.jit(jax.value_and_grad(functools.partial(_loss, model=model, mesh=mesh), has_aux=True))
    return jax.tree.map(np.asarray, step(params, put_batch(_batch(), mesh)))


OTHERS = {  # what other models have
    "num_kv_heads": 2,
    "qk_norm": "head",
    "router_score": "sigmoid",
    "shared_ffn_size": 16,
    "tie_embeddings": True,
}


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
    np.testing.assert_array_equal(counts, expected_counts)
    assert [int(c.sum()) for c in counts] == [2 * 8 * 10] * 3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients, expected_gradients)


@pytest.mark.parametrize("qk_norm", ["head", "whole"])
def test_what_other_models_have_is_the_same_on_every_mesh_and_learns(qk_norm):
    others = OTHERS | {"qk_norm": qk_norm}
    (loss, _), gradients = _run((2, 4), **others)
    (expected, _), expected_gradients = _run((1, 1), **others)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients, expected_gradients)
    assert "unembedding_DV" not in gradients
    assert all(np.any(gradient) for gradient in jax.tree.leaves(gradients))


def test_layers_of_unequal_size_are_what_they_are_one_by_one():
    """Each as a block of its own size, without a scan, a window or one array of experts."""
    mesh = make_mesh(MeshConfig(fsdp=2, expert=4))
    params = init_params(MODEL, AuxLossConfig(), jax.random.key(0))
    batch, first_L = _batch(), np.cumsum(MODEL.num_experts) - MODEL.num_experts

    def one_by_one(params):
        x_BSD, counts = params["embedding_VD"][batch["tokens_BS"]], []
        for layer, (first, count) in enumerate(zip(first_L, MODEL.experts_per_layer, strict=True)):
            graph, _ = nnx.split(nnx.eval_shape(lambda n=count: Block(MODEL, n, AuxLossConfig(), rngs=nnx.Rngs(0))))
            own = {name: leaf[first : first + count] for name, leaf in params["experts"].items()}
            moe = {EXPERTS[name]: leaf for name, leaf in own.items()}
            weights = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"]) | {"moe": moe}
            layout = jax.tree.map(lambda leaf: leaf[0], make_layout([in_order(count, 4)], [count]))
            x_BSD, aux = nnx.merge(graph, weights)(x_BSD, batch, jnp.zeros(count), layout, mesh)
            counts.append(aux.tokens_per_expert_E)
        x_BSD = rms_norm(x_BSD, params["final_norm"]["scale_D"], MODEL.norm_eps)
        return jnp.sum(cross_entropy(x_BSD, params["unembedding_DV"], batch["targets_BS"])), counts

    (loss, counts), gradients = jax.jit(jax.value_and_grad(one_by_one, has_aux=True))(params)
    (got, (_, got_counts_LW)), got_gradients = _run((2, 4))
    np.testing.assert_allclose(got, loss, rtol=1e-6)
    own_LW = windows(MODEL.num_experts)[1]
    assert [c[own].tolist() for c, own in zip(got_counts_LW, own_LW, strict=True)] == [c.tolist() for c in counts]
    assert (got_counts_LW[~own_LW] == 0).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got_gradients, gradients)


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
            params | {"embedding_VD": embedding_VD},
            _bias(model),
            _layout(model, mesh),
            batch,
            model,
            AuxLossConfig(),
            mesh,
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
        ModelConfig(**{**_fields(MODEL), "num_experts": (16, 16, 8)}), AuxLossConfig(), jax.random.key(0)
    )
    np.testing.assert_array_equal(wide["experts"]["down_NFD"][8:], narrow["experts"]["down_NFD"][16:])


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
