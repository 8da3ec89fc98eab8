"""What is measured without training: the held-out loss, and the loads a cut model would have.

Letters: L layers, E experts of a layer.
"""

from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from laep_jax.sharding import Mesh, put_batch
from laep_jax.training.state import TrainState

HostBatch = dict[str, np.ndarray]


def by_layer(tokens_per_expert: Sequence[jax.Array]) -> list[np.ndarray]:
    """The step's counts by run, [layers, E] each, as one int64 [E] a layer on the host."""
    return [np.asarray(counts_E, np.int64) for run in jax.device_get(list(tokens_per_expert)) for counts_E in run]


def heldout_loss(eval_step: Callable, state: TrainState, batches: Iterable[HostBatch], mesh: Mesh) -> float:
    """Mean cross-entropy in nats over every target of the batches."""
    total, number = 0.0, 0
    for batch in batches:
        batch_total, batch_number, _ = eval_step(state.params, state.router_bias, put_batch(batch, mesh))
        total, number = total + float(batch_total), number + int(batch_number)
    return total / number


def masked_bias(router_bias: dict, pruned: Sequence[Sequence[int]]) -> dict:
    """The router bias with minus infinity at each layer's pruned experts: exactly the cut model."""
    runs, layer = [], 0
    for run in router_bias["runs"]:
        bias_LE = run["bias_E"]
        mask_LE = np.zeros(bias_LE.shape, np.float32)
        for row_E in mask_LE:
            row_E[list(pruned[layer])] = -np.inf
            layer += 1
        runs.append({"bias_E": jax.device_put(bias_LE + mask_LE, bias_LE.sharding)})
    return {"runs": runs}


def masked_loads(
    eval_step: Callable,
    state: TrainState,
    pruned: Sequence[Sequence[int]],
    batches: Iterable[HostBatch],
    mesh: Mesh,
) -> list[np.ndarray]:
    """Tokens per expert summed over the batches, int64 [E] a layer, with the pruned experts masked.

    Pruning re-routes tokens, so these and not the recorded loads are what has to be balanced
    (notes section 3).
    """
    bias = masked_bias(state.router_bias, pruned)
    totals: list[np.ndarray] = []
    for batch in batches:
        counts = by_layer(eval_step(state.params, bias, put_batch(batch, mesh))[2])
        totals = [total + more for total, more in zip(totals, counts, strict=True)] if totals else counts
    return totals
