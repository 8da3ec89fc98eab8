"""What is measured without training: the validation loss, and the loss and loads a pruned model would have.

eval_step: (params, router_bias, batch) -> what `training.step.make_eval_step` returns.

Axes: L layers, E experts of a layer, W of its window, N of all layers, M domains.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from laep_jax.laep.layout import windows
from laep_jax.laep.plan import Plan
from laep_jax.sharding import Mesh, put_batch
from laep_jax.state.tree import TrainState

HostBatch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ValidationLoss:
    """Mean cross-entropy in nats, over all targets and over those of each domain that has any, with their number.

    tokens_by_domain: of each expert of each layer's window, int64 [L, W].
    """

    loss: float
    loss_by_domain: dict[str, float]
    targets_by_domain: dict[str, int]
    tokens_by_domain: dict[str, np.ndarray] = dataclasses.field(compare=False)


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """nats: of the targets of a text, or a mean over them; num_bytes: of that text, or per target."""
    return nats / math.log(2) / num_bytes


def by_layer(tokens_per_expert_LW: jax.Array | np.ndarray, num_experts: Sequence[int]) -> list[np.ndarray]:
    """The step's counts as one int64 [E] a layer on the host."""
    counts_LW = np.asarray(tokens_per_expert_LW, np.int64)
    return [counts_W[own_W] for counts_W, own_W in zip(counts_LW, windows(num_experts)[1], strict=True)]


def validation_loss(
    eval_step: Callable, state: TrainState, batches: Iterable[HostBatch], mesh: Mesh, domains: Sequence[str]
) -> ValidationLoss:
    """The loss over every target of the batches. domains: the names that domains_BS counts."""
    total_M, number_M, tokens_LMW = np.zeros(len(domains)), np.zeros(len(domains), np.int64), np.zeros((), np.int64)
    for batch in batches:
        loss_M, targets_M, counts_LMW = eval_step(state.params, state.router_bias, put_batch(batch, mesh))
        total_M, number_M = total_M + np.asarray(loss_M, np.float64), number_M + np.asarray(targets_M)
        tokens_LMW = tokens_LMW + np.asarray(counts_LMW)
    targets = {name: int(number) for name, number in zip(domains, number_M, strict=True) if number}
    losses = {
        name: float(total / targets[name]) for name, total in zip(domains, total_M, strict=True) if name in targets
    }
    tokens = {name: tokens_LMW[:, i] for i, name in enumerate(domains) if name in targets}
    return ValidationLoss(float(total_M.sum() / number_M.sum()), losses, targets, tokens)


def masked_bias(router_bias: dict, plan: Plan) -> dict:
    """The router bias with minus infinity at each layer's pruned experts: exactly the pruned model."""
    bias_N = router_bias["bias_N"]
    first_L = np.cumsum(plan.num_experts) - plan.num_experts
    mask_N = np.zeros(bias_N.shape, np.float32)
    for first, layer in zip(first_L, plan.layers, strict=True):
        mask_N[first + np.array(layer.pruned, int)] = -np.inf
    return {"bias_N": jax.device_put(bias_N + mask_N, bias_N.sharding)}


def masked_loss(
    eval_step: Callable,
    state: TrainState,
    plan: Plan,
    batches: Iterable[HostBatch],
    mesh: Mesh,
    domains: Sequence[str],
) -> ValidationLoss:
    """`validation_loss` of the model that a plan would make of this state, with the pruned experts masked.

    The same but for the order of sums: those of the router, whose product may be computed in another way for another
    number of experts, and with the all-gather dispatch those over a token's experts, which the prune moves to other
    devices. Where neither is another it is the same bit for bit.
    """
    masked = dataclasses.replace(state, router_bias=masked_bias(state.router_bias, plan))
    return validation_loss(eval_step, masked, batches, mesh, domains)


def masked_loads(
    eval_step: Callable, state: TrainState, plan: Plan, batches: Iterable[HostBatch], mesh: Mesh
) -> list[np.ndarray]:
    """Tokens per expert summed over the training batches, int64 [E] a layer, with the pruned experts masked.

    Pruning re-routes tokens, so these and not the recorded loads are what has to be balanced.
    """
    bias = masked_bias(state.router_bias, plan)
    totals: list[np.ndarray] = []
    for batch in batches:
        batch = batch | {"domains_BS": np.zeros_like(batch["tokens_BS"])}  # the eval step wants some
        counts_LMW = eval_step(state.params, bias, put_batch(batch, mesh))[2]
        counts = by_layer(np.asarray(counts_LMW).sum(axis=1), plan.num_experts)
        totals = [total + more for total, more in zip(totals, counts, strict=True)] if totals else counts
    return totals
