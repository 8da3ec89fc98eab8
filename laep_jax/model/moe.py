"""The mixture-of-experts layer: router, dispatch, experts, under one `jax.shard_map` (Appendix A.1).

Token counts are outputs, summed over every device, padding left out; nothing is a side effect.
Axes: B rows, S sequence, T = B S tokens of a device, D hidden, E experts, F ffn, G = 2F, K top-k slots, M domains.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout as ArrayLayout
from jax.experimental.layout import with_layout_constraint
from jax.sharding import Mesh, PartitionSpec

from laep_jax.config import BATCH_AXES, AuxLossConfig, ModelConfig
from laep_jax.errors import require
from laep_jax.laep.layout import Layout
from laep_jax.model.dispatch import (
    AXIS,
    Experts,
    Tokens,
    all_gather_dispatch,
    bounded_dispatch,
    gather,
    ragged_dispatch,
)
from laep_jax.model.experts import experts_by_blocks, experts_by_megablox, experts_by_ragged_dot
from laep_jax.model.router import balance_losses, balance_sums, count_by_domain, count_tokens, route
from laep_jax.model.slots import to_slots
from laep_jax.sharding import SLICES, leaf_spec, platform


class MoEAux(NamedTuple):
    """`tokens_per_expert_E`, `tokens_per_device_P`: int32, of the global batch. `losses`: float32 by name, unweighted.

    A device's tokens are those of its place on the expert axis, added over the groups. `tokens_per_domain_ME`: of each
    domain by itself; None where none are given.
    """

    tokens_per_expert_E: jax.Array
    tokens_per_device_P: jax.Array
    losses: dict[str, jax.Array]
    tokens_per_domain_ME: jax.Array | None


class MoE(nnx.Module):
    """Dropless top-k mixture of SwiGLU experts. E: experts that the router knows; R: experts in slots.

    A layer of its own has E = R experts. In a model the router's are those of the layer's window, and a matrix is there
    for each slot of each device (`laep.layout`).
    """

    def __init__(self, config: ModelConfig, num_experts: int, aux_losses: AuxLossConfig, *, rngs: nnx.Rngs):
        hidden, ffn = config.hidden_size, config.ffn_size
        init = nnx.initializers.normal(0.02)
        residual_init = nnx.initializers.normal(0.02 / (2 * config.num_layers) ** 0.5)
        router_DE = nnx.initializers.normal(config.router_init)(rngs.params(), (hidden, num_experts))
        self.router_ED = nnx.Param(router_DE.T)
        self.gate_up_RDG = nnx.Param(init(rngs.params(), (num_experts, hidden, 2 * ffn)))
        self.down_RFD = nnx.Param(residual_init(rngs.params(), (num_experts, ffn, hidden)))
        self.config = config
        self.aux_losses = aux_losses

    def __call__(
        self,
        x_BSD: jax.Array,
        valid_BS: jax.Array,
        bias_E: jax.Array,
        layout: Layout,
        mesh: Mesh,
        domains_BSM: jax.Array | None = None,
    ) -> tuple[jax.Array, MoEAux]:
        """Applies the layer.

        Args:
          x_BSD: activations, rows split over every mesh axis. valid_BS: False for padding, which is
            neither routed nor counted. bias_E: added to the scores when experts are chosen. layout: of this layer.
            domains_BSM: bool, which domain each token belongs to.

        Returns:
          y_BSD like x_BSD, zero for padding, and the layer's `MoEAux`.
        """
        gate_up_RDG, down_RFD = self.gate_up_RDG[...], self.down_RFD[...]
        rows, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
        gate_up_spec = leaf_spec("gate_up_RDG", gate_up_RDG.shape, mesh)
        down_spec = leaf_spec("down_RFD", down_RFD.shape, mesh)
        on_device = functools.partial(
            _moe_on_device,
            self.config,
            self.aux_losses,
            gate_up_spec,
            down_spec,
            platform(mesh),
        )
        y_BSD, sums = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(
                *(rows, rows, rows, whole, whole, whole),
                *(_with_idle_axes(spec, mesh) for spec in (gate_up_spec, down_spec)),
            ),
            out_specs=(rows, rows),
            check_vma=False,  # the loops with custom_vjp inside mix values that vary over different axes
        )(x_BSD, valid_BS, domains_BSM, self.router_ED[...], bias_E, layout, gate_up_RDG, down_RFD)
        totals = {name: jnp.sum(part, axis=0) for name, part in sums.items()}
        tokens_per_expert_E, tokens_per_device_P = (
            totals.pop(f"tokens_per_{name}") for name in ("expert_E", "device_P")
        )
        tokens_per_domain_ME = totals.pop("tokens_per_domain_ME", None)
        num_experts = jnp.sum(layout.is_own_W)
        losses = balance_losses(totals, tokens_per_expert_E, num_experts, self.config.top_k, self.aux_losses)
        return y_BSD, MoEAux(tokens_per_expert_E, tokens_per_device_P, losses, tokens_per_domain_ME)


def _with_idle_axes(spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    """The same sharding with mesh axes of size 1 named in the first dimension, which is not split.

    shard_map sums gradients over axes that a spec does not name; XLA:CPU copies an array summed over one device.
    """
    named = {axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)}
    idle = tuple(axis for axis, size in mesh.shape.items() if size == 1 and axis not in named)
    return PartitionSpec(idle or None, *spec[1:])


def _fetch(weight_RXY: jax.Array, spec: PartitionSpec, dtype, on_platform: str) -> jax.Array:
    """The experts in this device's slots, whole and in the compute dtype (cast first: fewer bytes travel).

    weight_RXY: this device's slices of those in every slot, device by device.
    """
    devices, weight_RXY = jax.lax.axis_size(AXIS), weight_RXY.astype(dtype)
    if SLICES not in spec:
        slots = weight_RXY.shape[0] // devices
        mine = jax.lax.dynamic_slice_in_dim(weight_RXY, jax.lax.axis_index(AXIS) * slots, slots)
        return gather(mine, "fsdp", spec.index("fsdp")) if "fsdp" in spec else mine
    dim = spec.index(SLICES)
    if devices > 1:
        weight_RXY = jax.lax.all_to_all(weight_RXY, AXIS, 0, dim, tiled=True)
    if on_platform == "tpu" and jax.lax.axis_size("fsdp") > 1:
        return _gather_row_major(weight_RXY, dim)
    return gather(weight_RXY, "fsdp", dim)


def _row_major(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, ArrayLayout(tuple(range(x.ndim))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_row_major(slices: jax.Array, dim: int) -> jax.Array:
    """`gather` over fsdp of what an all-to-all brought, and the reduce-scatter of its gradient.

    The all-to-all wants its narrow slices in another order. XLA would turn the gathered matrices instead of them, and
    all-reduce their gradients instead of reduce-scattering them.
    """
    return jax.lax.all_gather(_row_major(slices), "fsdp", axis=dim, tiled=True)


def _gather_row_major_backward(dim: int, _, d_whole: jax.Array) -> tuple[jax.Array]:
    return (_row_major(jax.lax.psum_scatter(_row_major(d_whole), "fsdp", scatter_dimension=dim, tiled=True)),)


_gather_row_major.defvjp(lambda slices, dim: (_gather_row_major(slices, dim), None), _gather_row_major_backward)


def _moe_on_device(
    config: ModelConfig,
    aux_losses: AuxLossConfig,
    gate_up_spec: PartitionSpec,
    down_spec: PartitionSpec,
    on_platform: str,
    x_BSD: jax.Array,
    valid_BS: jax.Array,
    domains_BSM: jax.Array | None,
    router_ED: jax.Array,
    bias_E: jax.Array,
    layout: Layout,
    gate_up_RDG: jax.Array,
    down_RFD: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One device's rows and its slices of the experts; sums come back with one row for this device."""
    num_slots = gate_up_RDG.shape[0]
    with jax.named_scope("router"):
        logits_BSE = jnp.einsum("bsd,ed->bse", x_BSD.astype(jnp.float32), router_ED, precision="highest")
        bias_E = jnp.where(layout.is_own_W, bias_E, -jnp.inf)
        ids_BSK, weights_BSK = route(logits_BSE, bias_E, valid_BS, config)
        sums = balance_sums(logits_BSE, layout.is_own_W, ids_BSK, valid_BS, config.router_score, aux_losses)
        with jax.named_scope("counts"):
            sums["tokens_per_expert_E"] = count_tokens(ids_BSK, bias_E.size).sum(0, dtype=jnp.int32)
            if domains_BSM is not None:
                sums["tokens_per_domain_ME"] = count_by_domain(ids_BSK, bias_E.size, domains_BSM)

    grouped = _grouped(config.grouped_matmul, on_platform)
    gate_up_RDG = _fetch(gate_up_RDG, gate_up_spec, x_BSD.dtype, on_platform)
    down_RFD = _fetch(down_RFD, down_spec, x_BSD.dtype, on_platform)
    x_TD, ids_TK, weights_TK = (array.reshape(-1, array.shape[-1]) for array in (x_BSD, ids_BSK, weights_BSK))
    with jax.named_scope("dispatch"):
        ids_TK, received = to_slots(ids_TK, sums["tokens_per_expert_E"], layout)
        is_me_P = jax.nn.one_hot(jax.lax.axis_index(AXIS), jax.lax.axis_size(AXIS), dtype=jnp.int32)
        sums["tokens_per_device_P"] = received * is_me_P
        tokens = Tokens(x_TD, ids_TK, weights_TK)
        y_TD = _dispatch(config, on_platform == "cpu")(tokens, (gate_up_RDG, down_RFD), grouped, num_slots)
    return y_TD.reshape(x_BSD.shape), {name: total[None] for name, total in sums.items()}


def _grouped(grouped_matmul: str, on_platform: str) -> Experts:
    """What computes the experts' products."""
    if grouped_matmul == "auto":
        grouped_matmul = {"cpu": "blocks", "tpu": "megablox"}.get(on_platform, "ragged_dot")
    if grouped_matmul == "megablox":
        setting = "ModelConfig.grouped_matmul"
        require(on_platform in ("tpu", "cpu"), setting, grouped_matmul, f"has no kernels for {on_platform}")
        return functools.partial(experts_by_megablox, interpret=on_platform == "cpu")
    return experts_by_blocks if grouped_matmul == "blocks" else experts_by_ragged_dot


def _dispatch(config: ModelConfig, on_cpu: bool):
    if config.dispatch == "all_gather":
        return all_gather_dispatch
    if config.receive_buffer is None:
        return functools.partial(ragged_dispatch, on_cpu=on_cpu)
    return functools.partial(bounded_dispatch, on_cpu=on_cpu, receive_buffer=config.receive_buffer)
