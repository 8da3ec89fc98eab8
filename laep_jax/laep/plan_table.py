"""A plan as text for people, a line a layer."""

from collections.abc import Sequence

from laep_jax.laep.layer_plan import LayerPlan
from laep_jax.laep.rule import PruneRule

MAX_DOMAINS = 8  # that get a column


def table(rule: PruneRule, layers: Sequence[LayerPlan]) -> str:
    """The settings, what the columns mean, a line a layer and a total, which adds up the layers' loads."""
    rounded = "" if rule.rounding == "none" else f"if any are pruned a multiple of {rule.expert_parallel}, "
    lines = [
        f"beta {rule.beta:g}, estimator {rule.estimator}, inequality {rule.inequality}, rounding {rule.rounding}; "
        f"placement {rule.placement} on {rule.expert_parallel} devices, top {rule.top_k}",
        f"eligible: by alpha and beta; kept: {rounded}at least {rule.min_kept}; pruned: the others",
        "imbalance: max / mean load of the devices, before with the kept experts in their old order, after as placed",
        "bound: no placement has a lower imbalance; gap: after over bound",
        "layer     alpha   experts    kept  eligible  pruned  imbalance before    after    bound     gap",
    ]
    if layers[0].slots:
        lines[3] += f"; slots: after, with {layers[0].replica_slots} replica slots a device"
        lines[4] += "    slots"
    for index, (alpha, layer) in enumerate(zip(rule.alpha, layers, strict=True)):
        lines.append(_line(str(index), f"{alpha:g}", [layer]))
    return "\n".join([*lines, _line("total", "", layers), *_domain_lines(rule, layers)])


def _domain_lines(rule: PruneRule, layers: Sequence[LayerPlan]) -> list[str]:
    """For each layer, the share of each domain's tokens that the pruned experts have; of the domains that lose most."""
    names = sorted(layers[0].domain_shares, key=lambda name: -max(layer.domain_shares[name] for layer in layers))
    shown, bound = names[:MAX_DOMAINS], "" if rule.domain_beta is None else f", domain_beta {rule.domain_beta:g}"
    if not shown:
        return []
    some = f" ({len(shown)} of {len(names)} domains)" if len(shown) < len(names) else ""
    widths = [max(len(name), 6) for name in shown]
    lines = [
        f"share of a domain's tokens on the pruned experts{some}{bound}",
        "layer" + "".join(f"  {name:>{width}}" for name, width in zip(shown, widths, strict=True)),
    ]
    for index, layer in enumerate(layers):
        shares = (f"  {layer.domain_shares[name]:>{width}.2%}" for name, width in zip(shown, widths, strict=True))
        lines.append(f"{index:>5}" + "".join(shares))
    return lines


def _line(name: str, alpha: str, layers: Sequence[LayerPlan]) -> str:
    kept, pruned, eligible = (
        sum(len(getattr(layer, ids)) for layer in layers) for ids in ("kept", "pruned", "eligible")
    )
    mean = sum(layer.mean_load for layer in layers)
    largest = sum(max(layer.device_load) for layer in layers)
    bound = sum(layer.lower_bound for layer in layers)
    before = sum(layer.largest_before for layer in layers)
    ratios = [load / mean if mean else 1.0 for load in (before, largest, bound)]
    gap = max(largest / bound - 1, 0.0) if bound else 0.0  # below 0 only by rounding
    slots = ""
    if layers[0].slots:
        slots = f"  {sum(max(layer.slot_load) for layer in layers) / mean if mean else 1.0:>7.4f}"
    return (
        f"{name:>5}  {alpha:>8}  {kept + pruned:>8}  {kept:>6}  {eligible:>8}  {pruned:>6}"
        f"  {ratios[0]:>16.4f}  {ratios[1]:>7.4f}  {ratios[2]:>7.4f}  {gap:>6.2%}{slots}"
    )
