"""The numbers behind each figure, from a run's recorded loads.

Figures 1 and 2 of the paper and the device loads of its section 3.3. Loads are mean tokens a step.

Axes: L layers, E experts of the original model, P devices of the expert axis, M domains.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from laep_jax.laep import balance
from laep_jax.laep.stability import moved, rank_correlation
from laep_jax.report.run_data import RunData, Transition


@dataclasses.dataclass(frozen=True)
class ExpertLine:
    """Tokens of one expert over the run: means over neighbouring steps, each placed at the last of them.

    pruned: whether it was pruned before the end; its line stops at the prune.
    """

    expert: int
    steps: np.ndarray
    tokens: np.ndarray
    pruned: bool


@dataclasses.dataclass(frozen=True)
class CumulativeLoad:
    """One panel of Figure 2: experts by ascending load.

    experts: original ids. share: [E + 1], of the layer's tokens in the first 0, 1, ... E of them.
    pruned: [E], whether each was taken away. below_alpha, below_mean: how many carry at most alpha
    times the mean, and at most the mean. eligible: how many are under both bounds in this window.
    """

    experts: np.ndarray
    share: np.ndarray
    pruned: np.ndarray
    below_alpha: int
    below_mean: int
    eligible: int
    alpha: float
    beta: float


@dataclasses.dataclass(frozen=True)
class DeviceLoads:
    """Tokens a step on each device, [L, P].

    before: up to the prune. in_order: after it, had the kept experts stayed in order. placed: after it,
    as they were placed. The latter two share out the same tokens; both are None without a prune.
    """

    before: np.ndarray
    in_order: np.ndarray | None
    placed: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Stability:
    """Change of the loads from window to window, by layer, as the stability test measures it.

    steps: [N], the last of each window.
    """

    steps: np.ndarray
    moved_NL: np.ndarray
    rank_correlation_NL: np.ndarray


@dataclasses.dataclass(frozen=True)
class DomainLosses:
    """Validation loss by domain, in nats per token; the largest of the first row comes first.

    targets_M: how many are behind each loss. rows: each [M] with a label, by the last prune alone and in the newest
    evaluation, less the loss before the prune; where there was none the newest alone, as it is.
    """

    names: tuple[str, ...]
    targets_M: np.ndarray
    rows: dict[str, np.ndarray]
    is_change: bool


def chosen_layers(num_layers: int, limit: int) -> list[int]:
    """At most `limit` layers, evenly spaced, the first and the last among them.

    >>> chosen_layers(4, 8), chosen_layers(24, 4)
    ([0, 1, 2, 3], [0, 8, 15, 23])
    """
    return sorted({round(layer) for layer in np.linspace(0, num_layers - 1, min(limit, num_layers))})


def step_bins(run: RunData, limit: int = 150) -> list[slice]:
    """Rows of the recorded loads in at most about `limit` equal groups; none reaches across a prune."""
    size = -(-len(run.steps) // limit)
    borders = [
        0,
        *(int(np.searchsorted(run.steps, transition.step, "right")) for transition in run.prunes),
        len(run.steps),
    ]
    return [
        slice(start, min(start + size, last))
        for first, last in itertools.pairwise(sorted(set(borders)))
        for start in range(first, last, size)
    ]


def expert_lines(run: RunData, layer: int, limit: int = 150) -> list[ExpertLine]:
    """Figure 1, left: a line for each expert of the layer, by ascending id. limit: as of `step_bins`."""
    bins = step_bins(run, limit)
    last_steps = np.array([run.steps[rows.stop - 1] for rows in bins])
    tokens_E = [run.tokens_NLE[rows, layer].mean(0) for rows in bins]
    pruned_at_E = run.pruned_at_LE[layer]
    lines = []
    for expert in run.present(layer, 0):
        pruned_at = pruned_at_E[expert]
        alive = last_steps <= pruned_at if pruned_at >= 0 else last_steps >= 0
        tokens = np.array([mean_E[expert] for mean_E in tokens_E])
        lines.append(ExpertLine(int(expert), last_steps[alive], tokens[alive], bool(pruned_at >= 0)))
    return lines


def mean_line(run: RunData, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Figure 1's red line: (steps, tokens per expert that is there)."""
    bins = step_bins(run)
    steps = np.array([run.steps[rows.stop - 1] for rows in bins])
    totals = np.array([run.tokens_NLE[rows, layer].sum(1).mean() for rows in bins])
    return steps, totals / np.array([len(run.present(layer, step)) for step in steps])


def final_loads(run: RunData, layer: int) -> np.ndarray:
    """Figure 1, right: loads of the experts left, ascending, over the last window."""
    last = int(run.steps[-1])
    return np.sort(run.mean_loads(last)[layer, run.present(layer, last)])


def cumulative_load(run: RunData, layer: int) -> CumulativeLoad:
    """Figure 2: the window that the first prune was planned by, or the last window with the config's bounds."""
    transition = run.prunes[0] if run.prunes else None
    last = transition.plan_step if transition else int(run.steps[-1])
    alpha, beta = (transition.alpha[layer], transition.beta) if transition else (run.alpha[layer], run.beta)
    ids = run.present(layer, last)
    loads = run.mean_loads(last)[layer, ids]
    order = np.lexsort((ids, loads))
    total = loads.sum()
    running = np.concatenate([[0.0], np.cumsum(loads[order])])
    below_alpha = len(ids) if np.isinf(alpha) else int((loads <= alpha * loads.mean()).sum())
    return CumulativeLoad(
        experts=ids[order],
        share=running / total if total else running,
        pruned=run.pruned_at_LE[layer, ids[order]] == transition.step if transition else np.zeros(len(ids), bool),
        below_alpha=below_alpha,
        below_mean=int((loads <= loads.mean()).sum()),
        eligible=min(below_alpha, int((running[1:] <= beta * total).sum())),
        alpha=alpha,
        beta=beta,
    )


def device_sums(loads_LE: np.ndarray, order: Sequence[Sequence[int]], num_devices: int) -> np.ndarray:
    """[L, P]: loads of the experts in slot order, in neighbouring groups.

    >>> device_sums(np.array([[1, 2, 3, 4]]), [[3, 0, 1, 2]], 2)
    array([[5, 5]])
    """
    return np.stack(
        [balance.device_loads(loads_E[list(ids)], num_devices) for loads_E, ids in zip(loads_LE, order, strict=True)]
    )


def device_loads(run: RunData) -> DeviceLoads:
    """Loads around the last prune, in the windows that end and begin there; of the last window without one."""
    if not run.prunes:
        last = int(run.steps[-1])
        return DeviceLoads(device_sums(run.mean_loads(last), run.order(last), run.expert_parallel), None, None)
    transition = run.prunes[-1]
    before_LE = run.mean_loads(transition.step)
    after_LE = loads_after(run, transition)
    return DeviceLoads(
        before=device_sums(before_LE, transition.before, run.expert_parallel),
        in_order=device_sums(after_LE, survivors_in_order(transition), run.expert_parallel),
        placed=device_sums(after_LE, transition.after, run.expert_parallel),
    )


def loads_after(run: RunData, transition: Transition) -> np.ndarray:
    """[L, E]: mean loads of the window that begins with the prune, or ends there where nothing follows."""
    later = run.steps[run.steps > transition.step]
    if not len(later):
        return run.mean_loads(transition.step)
    ends = [
        int(later[-1]),
        int(later[0]) + run.window - 1,
        *(c.step for c in run.prunes if c.step > transition.step),
    ]
    return run.mean_loads(min(ends), first=transition.step + 1)


def survivors_in_order(transition: Transition) -> list[list[int]]:
    """Per layer the experts a prune left, in the slot order they had before it."""
    return [
        [expert for expert in before if expert in set(after)]
        for before, after in zip(transition.before, transition.after, strict=True)
    ]


def shares(run: RunData, last: int) -> np.ndarray:
    """[L, E]: each expert's share of its layer's tokens in the window ending with `last`; NaN where it is not there."""
    loads_LE = run.mean_loads(last)
    totals_L = loads_LE.sum(1, keepdims=True)
    shares_LE = np.divide(loads_LE, totals_L, out=np.zeros_like(loads_LE), where=totals_L > 0)
    for layer, shares_E in enumerate(shares_LE):
        gone = np.setdiff1d(np.arange(len(shares_E)), run.present(layer, last))
        shares_E[gone] = np.nan
    return shares_LE


def stability(run: RunData) -> Stability:
    """Of every two neighbouring windows of steps between which nothing was pruned."""
    window = run.window
    ends = [step for step in run.steps.tolist() if step % window == 0 and step > window]
    ends = [step for step in ends if not any(step - 2 * window < prune.step < step for prune in run.prunes)]
    moved_NL, ranks_NL = np.zeros((2, len(ends), run.num_layers))
    for row, end in enumerate(ends):
        first, middle, stop = np.searchsorted(run.steps, (end - 2 * window + 1, end - window + 1, end + 1))
        for layer in range(run.num_layers):
            tokens_NE = run.tokens_NLE[:, layer, run.present(layer, end)]
            old_NE, new_NE = tokens_NE[first:middle], tokens_NE[middle:stop]
            moved_NL[row, layer] = moved(new_NE, old_NE)
            ranks_NL[row, layer] = rank_correlation(new_NE.sum(0), old_NE.sum(0))
    return Stability(np.array(ends), moved_NL, ranks_NL)


def domain_losses(run: RunData) -> DomainLosses:
    """What the last prune did to each domain; nothing before the first evaluation."""
    evals = [record for record in run.evals if "validation_loss_by_domain" in record]
    at_prune = {record["when"]: record for record in evals if run.prunes and record["step"] == run.prunes[-1].plan_step}
    around = [at_prune[when] for when in ("before_prune", "after_prune") if when in at_prune]
    chosen = [*around, *evals[-1:]]
    names = [name for name in run.targets if all(name in record["validation_loss_by_domain"] for record in chosen)]
    if not chosen:
        return DomainLosses((), np.zeros(0), {}, False)
    loss_NM = np.array([[record["validation_loss_by_domain"][name] for name in names] for record in chosen], float)
    if around:
        chosen, loss_NM = chosen[1:], loss_NM[1:] - loss_NM[0]
    order = np.argsort(-loss_NM[0], kind="stable")
    labels = ["by the prune alone" if record in around else f"step {record['step']}" for record in chosen]
    return DomainLosses(
        names=tuple(names[i] for i in order),
        targets_M=np.array([run.targets[names[i]] for i in order]),
        rows={label: loss_M[order] for label, loss_M in zip(labels, loss_NM, strict=True)},
        is_change=bool(around),
    )


def training_loss(run: RunData, width: int) -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """(steps, losses, the smoothed line as steps and losses of each model that the run had: none across a prune)."""
    steps = np.array([record["step"] for record in run.train], int)
    loss = np.array([np.nan if record["loss"] is None else record["loss"] for record in run.train], float)
    borders = np.searchsorted(steps, [transition.step for transition in run.prunes], "right")
    parts = [part for part in np.split(np.arange(len(steps)), borders) if len(part)]
    return steps, loss, [(steps[part], smoothed(loss[part], width)) for part in parts]


def steps_around_prune(run: RunData) -> tuple[int, int] | None:
    """The first and the last step to show of the last prune: two windows more than from the plan to the prune."""
    if not run.prunes:
        return None
    prune, margin = run.prunes[-1], 2 * run.window
    return max(prune.plan_step - margin, 0), min(prune.step + margin, int(run.steps[-1]))


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Each value's mean with its neighbours, `width` in all and fewer at the ends; leaves NaN out.

    >>> smoothed(np.array([1.0, 2.0, 6.0]), 3)
    array([1.5, 3. , 4. ])
    """
    width = min(width, len(values))
    known = np.isfinite(values)
    ones = np.ones(width)
    sums = np.convolve(np.where(known, values, 0.0), ones, "same")
    counts = np.convolve(known.astype(float), ones, "same")
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
