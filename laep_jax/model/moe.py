"""The mixture-of-experts layer: router, dispatch, experts, under one `jax.shard_map` (Appendix A.1).

Token counts are outputs, summed over every device, padding left out; nothing is a side effect.
Axes: B rows, S sequence, T = B S tokens of a device, D hidden, E experts, F ffn, G = 2F, K top-k slots.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from laep_jax.config import BATCH_AXES, AuxLossConfig, ModelConfig
from laep_jax.errors import require
from laep_jax.model.dispatch import Experts, Tokens, all_gather_dispatch, bounded_dispatch, gather, ragged_dispatch
from laep_jax.model.experts import experts_by_blocks, experts_by_megablox, experts_by_ragged_dot
from laep_jax.model.router import balance_losses, balance_sums, count_tokens, route
from laep_jax.sharding import leaf_spec, platform


class MoEAux(NamedTuple):
    """`tokens_per_expert_E`: int32, of the global batch. `losses`: float32 by name, unweighted."""

    tokens_per_expert_E: jax.Array
    losses: dict[str, jax.Array]


class MoE(nnx.Module):
    """Dropless top-k mixture of SwiGLU experts; E may differ from layer to layer."""

    def __init__(self, config: ModelConfig, num_experts: int, aux_losses: AuxLossConfig, *, rngs: nnx.Rngs):
        hidden, ffn = config.hidden_size, config.ffn_size
        init = nnx.initializers.normal(0.02)
        residual_init = nnx.initializers.normal(0.02 / (2 * config.num_layers) ** 0.5)
        self.router_DE = nnx.Param(nnx.initializers.normal(config.router_init)(rngs.params(), (hidden, num_experts)))
        self.gate_up_EDG = nnx.Param(init(rngs.params(), (num_experts, hidden, 2 * ffn)))
        self.down_EFD = nnx.Param(residual_init(rngs.params(), (num_experts, ffn, hidden)))
        self.config = config
        self.aux_losses = aux_losses

    def __call__(
        self, x_BSD: jax.Array, valid_BS: jax.Array, bias_E: jax.Array, mesh: Mesh
    ) -> tuple[jax.Array, MoEAux]:
        """Applies the layer.

        Args:
          x_BSD: activations, rows split over every mesh axis. valid_BS: False for padding, which is
            neither routed nor counted. bias_E: added to the logits when experts are chosen.

        Returns:
          y_BSD like x_BSD, zero for padding, and the layer's `MoEAux`.
        """
        gate_up_EDG, down_EFD = self.gate_up_EDG[...], self.down_EFD[...]
        rows, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
        gate_up_spec = leaf_spec("gate_up_EDG", gate_up_EDG.shape, mesh)
        down_spec = leaf_spec("down_EFD", down_EFD.shape, mesh)
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
            in_specs=(rows, rows, whole, whole, _with_idle_axes(gate_up_spec, mesh), _with_idle_axes(down_spec, mesh)),
            out_specs=(rows, rows),
            check_vma=False,  # the loops with custom_vjp inside mix values that vary over different axes
        )(x_BSD, valid_BS, self.router_DE[...], bias_E, gate_up_EDG, down_EFD)
        totals = {name: jnp.sum(part, axis=0) for name, part in sums.items()}
        tokens_per_expert_E = totals.pop("tokens_per_expert_E")
        losses = balance_losses(totals, tokens_per_expert_E, self.config.top_k, self.aux_losses)
        return y_BSD, MoEAux(tokens_per_expert_E, losses)


def _with_idle_axes(spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    """The same sharding with mesh axes of size 1 named in the first dimension.

    shard_map sums gradients over axes that a spec does not name; XLA:CPU copies an array summed over one device.
    """
    idle = tuple(axis for axis, size in mesh.shape.items() if size == 1 and axis not in spec)
    first = (spec[0],) if spec[0] else ()
    return PartitionSpec((*idle, *first), *spec[1:])


def _gather_fsdp(weight: jax.Array, spec: PartitionSpec, dtype) -> jax.Array:
    """This device's experts, gathered along fsdp, in the compute dtype (cast first: fewer bytes travel)."""
    weight = weight.astype(dtype)
    for axis, name in enumerate(spec):
        if name == "fsdp":
            weight = gather(weight, name, axis)
    return weight


def _moe_on_device(
    config: ModelConfig,
    aux_losses: AuxLossConfig,
    gate_up_spec: PartitionSpec,
    down_spec: PartitionSpec,
    on_platform: str,
    x_BSD: jax.Array,
    valid_BS: jax.Array,
    router_DE: jax.Array,
    bias_E: jax.Array,
    gate_up_EDG: jax.Array,
    down_EFD: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One device's rows and its shard of the experts; sums come back with one row for this device."""
    num_experts = router_DE.shape[1]
    with jax.named_scope("router"):
        logits_BSE = jnp.einsum("bsd,de->bse", x_BSD.astype(jnp.float32), router_DE, precision="highest")
        ids_BSK, weights_BSK = route(logits_BSE, bias_E, valid_BS, config.top_k)
        sums = balance_sums(logits_BSE, ids_BSK, valid_BS, aux_losses)
        with jax.named_scope("counts"):
            sums["tokens_per_expert_E"] = count_tokens(ids_BSK, num_experts).sum(0, dtype=jnp.int32)

    grouped = _grouped(config.grouped_matmul, on_platform)
    gate_up_EDG = _gather_fsdp(gate_up_EDG, gate_up_spec, x_BSD.dtype)
    down_EFD = _gather_fsdp(down_EFD, down_spec, x_BSD.dtype)
    tokens = Tokens(*(array.reshape(-1, array.shape[-1]) for array in (x_BSD, ids_BSK, weights_BSK)))
    with jax.named_scope("dispatch"):
        y_TD = _dispatch(config, on_platform == "cpu")(tokens, (gate_up_EDG, down_EFD), grouped, num_experts)
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
