"""The MoE layer against every expert applied to every token, on meshes of one and eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from laep_jax.config import AuxLossConfig, MeshConfig, ModelConfig
from laep_jax.errors import UserError
from laep_jax.laep.layout import make_layout
from laep_jax.laep.slots import in_order, place_in_slots
from laep_jax.model import moe
from laep_jax.model.moe import MoE
from laep_jax.sharding import make_mesh, put_batch, tree_shardings

NUM_EXPERTS, TOP_K, ROWS, LENGTH, HIDDEN = 8, 2, 8, 24, 16
NAMES = ("router_ED", "gate_up_RDG", "down_RFD")
NO_LOSSES = AuxLossConfig()
BIASES = {
    "as the router says": np.zeros(NUM_EXPERTS),
    "one expert has every token, one none": np.array([0, 0, 0, 1e4, 0, -np.inf, 0, 0]),
    "two experts have every token": np.array([1e4, 0, 0, 0, 0, 0, 0, 1e4]),
    "half of the experts masked": np.array([0, -np.inf] * 4),
}


@functools.cache
def _inputs():
    keys = jax.random.split(jax.random.key(0), 6)
    params = {
        "router_ED": jax.random.normal(keys[0], (NUM_EXPERTS, HIDDEN)),
        "gate_up_RDG": jax.random.normal(keys[1], (NUM_EXPERTS, HIDDEN, 24)) * 0.3,
        "down_RFD": jax.random.normal(keys[2], (NUM_EXPERTS, 12, HIDDEN)) * 0.3,
    }
    x_BSD = jax.random.normal(keys[3], (ROWS, LENGTH, HIDDEN))
    direction_BSD = jax.random.normal(keys[4], x_BSD.shape)  # makes a scalar of the output
    valid_BS = np.array(jax.random.bernoulli(keys[5], 0.8, (ROWS, LENGTH)))
    valid_BS[3] = False
    return params, np.asarray(x_BSD), np.asarray(direction_BSD), valid_BS


def _dense(params, x_BSD, valid_BS, bias_E):
    """Every expert on every token; weights are zero for those not chosen."""
    logits_BSE = jnp.einsum("bsd,ed->bse", x_BSD, params["router_ED"], precision="highest")
    ids_BSK = jax.lax.top_k(logits_BSE + bias_E[None, None], TOP_K)[1]
    chosen_BSE = jax.nn.one_hot(ids_BSK, NUM_EXPERTS).sum(2) * valid_BS[..., None]
    weights_BSE = jax.nn.softmax(jnp.where(chosen_BSE > 0, logits_BSE, -1e30), axis=-1) * chosen_BSE
    gate, up = jnp.split(jnp.einsum("bsd,edg->bseg", x_BSD, params["gate_up_RDG"]), 2, axis=-1)
    y_BSED = jnp.einsum("bsef,efd->bsed", jax.nn.silu(gate) * up, params["down_RFD"])
    return jnp.einsum("bsed,bse->bsd", y_BSED, weights_BSE), chosen_BSE.sum((0, 1)).astype(jnp.int32)


def _scalar(apply, params, x_BSD, direction_BSD, valid_BS, bias_E):
    y_BSD, counts_E = apply(params, x_BSD, valid_BS, bias_E)
    return jnp.sum(y_BSD * direction_BSD), (y_BSD, counts_E)


def _value_and_grad(apply):
    return jax.jit(jax.value_and_grad(functools.partial(_scalar, apply), argnums=(0, 1), has_aux=True))


@functools.cache
def _expected(case):
    params, x_BSD, direction_BSD, valid_BS = _inputs()
    outputs = _value_and_grad(_dense)(params, x_BSD, direction_BSD, valid_BS, jnp.float32(BIASES[case]))
    return jax.tree.map(np.asarray, outputs)


def _layer(
    mesh, aux_losses=NO_LOSSES, num_experts=NUM_EXPERTS, top_k=TOP_K, slot_map=None, replica_slots=0, **settings
):
    config = ModelConfig(hidden_size=HIDDEN, ffn_size=12, num_experts=num_experts, top_k=top_k, **settings)
    graph, _ = nnx.split(nnx.eval_shape(lambda: MoE(config, num_experts, aux_losses, rngs=nnx.Rngs(0))))

    slot_map = slot_map or in_order(num_experts, mesh.shape["expert"])
    layout = jax.tree.map(lambda leaf_L: leaf_L[0], make_layout([slot_map], [num_experts], replica_slots))

    def apply(params, x_BSD, valid_BS, bias_E):
        if mesh.shape["expert"] > 1:
            slots_R = layout.expert_PS.reshape(-1)
            params = {name: leaf if name == "router_ED" else leaf[slots_R] for name, leaf in params.items()}
        y_BSD, aux = nnx.merge(graph, params)(x_BSD, valid_BS, bias_E, layout, mesh)
        return y_BSD, aux.tokens_per_expert_E if aux_losses is NO_LOSSES else aux

    return apply


def assert_as_dense(layer, params, batch):
    """Outputs, counts and gradients under each bias."""
    apply = _value_and_grad(layer)
    for case, bias_E in BIASES.items():
        inputs = params, batch["x"], batch["direction"], batch["valid"], jnp.float32(bias_E)
        (_, (y_BSD, counts_E)), gradients = apply(*inputs)
        (_, (dense_BSD, dense_counts_E)), dense_gradients = _expected(case)
        np.testing.assert_array_equal(counts_E, dense_counts_E, err_msg=case)
        # float32 sums of at most a few hundred terms in another order
        np.testing.assert_allclose(y_BSD, dense_BSD, rtol=1e-4, atol=1e-5, err_msg=case)
        for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(dense_gradients), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=case)


MESHES = {"1": (1, 1, 1), "EP2": (2, 2, 2), "EP4": (1, 2, 4), "EP8": (1, 1, 8)}


@pytest.mark.parametrize(
    ("mesh_sizes", "dispatch", "grouped_matmul"),
    [(sizes, dispatch, "blocks") for sizes in MESHES for dispatch in ("all_gather", "ragged_all_to_all")]
    + [("EP4", "all_gather", "ragged_dot"), ("EP2", "ragged_all_to_all", "ragged_dot")]
    + [("EP2", "all_gather", "megablox")]
    + [("1", "bounded", "blocks"), ("EP4", "bounded", "ragged_dot"), ("EP8", "bounded", "blocks")],
)
def test_sharded_equals_dense_in_value_gradient_and_counts(mesh_sizes, dispatch, grouped_matmul):
    bounded = {"dispatch": "ragged_all_to_all", "receive_buffer": 1.0}
    dispatch = bounded if dispatch == "bounded" else {"dispatch": dispatch}
    data, fsdp, expert = MESHES[mesh_sizes]
    if data * fsdp * expert == 1:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "expert"))
    else:
        mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, expert=expert))
    params, x_BSD, direction_BSD, valid_BS = _inputs()
    params = jax.device_put(params, tree_shardings(params, mesh))
    batch = put_batch({"x": x_BSD, "direction": direction_BSD, "valid": valid_BS}, mesh)
    assert_as_dense(_layer(mesh, grouped_matmul=grouped_matmul, **dispatch), params, batch)


def test_counts_leave_padding_out_and_add_up_over_devices():
    params, x_BSD, _, valid_BS = _inputs()
    mesh = make_mesh(MeshConfig(fsdp=2, expert=4))
    _, counts_E = jax.jit(_layer(mesh))(params, x_BSD, valid_BS, jnp.zeros(NUM_EXPERTS))
    assert counts_E.sum() == TOP_K * valid_BS.sum() < TOP_K * valid_BS.size


@pytest.mark.parametrize(
    ("expert_parallel", "router"),
    [
        (1, {}),
        (4, {}),
        (4, {"top_k": 1}),
        (4, {"top_k": 3, "router_score": "sigmoid"}),
        (4, {"top_k": 3, "norm_topk_prob": False}),
    ],
    ids=str,
)
@pytest.mark.parametrize("kept", [[0, 2, 4, 6], [0, 2, 4, 6, 7]], ids=len)
def test_slicing_equals_masking_with_minus_infinity(expert_parallel, router, kept):
    """The small layer gives what the masked one gives, bit for bit in the routing; five do not divide by four."""
    mesh = make_mesh(MeshConfig(fsdp=8 // expert_parallel, expert=expert_parallel))
    params, x_BSD, _, valid_BS = _inputs()
    masked = jax.jit(_layer(mesh, **router))
    bias_E = np.full(NUM_EXPERTS, -np.inf, np.float32)
    bias_E[kept] = np.linspace(-0.2, 0.2, len(kept)) if router else 0
    masked_BSD, masked_counts_E = masked(params, x_BSD, valid_BS, bias_E)
    sliced = {name: leaf[np.array(kept)] for name, leaf in params.items()}
    small = jax.jit(_layer(mesh, num_experts=len(kept), **router))
    y_BSD, counts_E = small(sliced, x_BSD, valid_BS, bias_E[kept])
    np.testing.assert_array_equal(counts_E, masked_counts_E[np.array(kept)])
    np.testing.assert_allclose(y_BSD, masked_BSD, rtol=1e-6, atol=1e-6)


def test_kernels_for_tpu_are_refused_on_gpu():
    with pytest.raises(UserError, match=r"ModelConfig\.grouped_matmul='megablox' has no kernels for gpu"):
        moe._grouped("megablox", "gpu")


def test_auxiliary_losses_are_of_the_global_batch():
    aux_losses = AuxLossConfig(mixtral=1.0, mixtral_hf=1.0, deepseek_v3=1.0, router_z=1.0)
    params, x_BSD, _, valid_BS = _inputs()
    losses = {}
    for expert_parallel in (1, 8):
        mesh = make_mesh(MeshConfig(fsdp=8 // expert_parallel, expert=expert_parallel))
        _, aux = jax.jit(_layer(mesh, aux_losses))(params, x_BSD, valid_BS, jnp.zeros(NUM_EXPERTS))
        losses[expert_parallel] = aux.losses
    logits_BSE = np.asarray(jnp.einsum("bsd,ed->bse", x_BSD, params["router_ED"], precision="highest"))
    z = np.mean(np.asarray(jax.nn.logsumexp(logits_BSE, axis=-1))[valid_BS] ** 2)
    np.testing.assert_allclose(losses[1]["router_z"], z, rtol=1e-5)
    assert losses[1].keys() == {"mixtral", "mixtral_hf", "deepseek_v3", "router_z"}
    for name, value in losses[1].items():
        np.testing.assert_allclose(losses[8][name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("mesh_sizes", "replica_slots", "settings"),
    [
        ("EP4", 1, {}),
        ("EP4", 2, {"dispatch": "ragged_all_to_all"}),
        ("EP8", 1, {"dispatch": "ragged_all_to_all", "receive_buffer": 1.0}),
        ("EP8", 3, {"grouped_matmul": "ragged_dot"}),
        ("EP2", 1, {"dispatch": "ragged_all_to_all"}),
    ],
    ids=str,
)
def test_replicas_change_neither_value_nor_gradient_nor_counts(mesh_sizes, replica_slots, settings):
    """Whatever loads they were placed by. Gradients of replicas add up at the one expert."""
    data, fsdp, expert = MESHES[mesh_sizes]
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, expert=expert))
    params, x_BSD, direction_BSD, valid_BS = _inputs()
    batch = put_batch({"x": x_BSD, "direction": direction_BSD, "valid": valid_BS}, mesh)
    for loads in ([1, 2, 3, 100, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0]):
        slot_map = place_in_slots(np.array(loads), expert, replica_slots)
        assert_as_dense(_layer(mesh, slot_map=slot_map, replica_slots=replica_slots, **settings), params, batch)
