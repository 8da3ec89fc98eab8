"""What report.html says of one run, section by section: each a list of blocks, which the page puts side by side."""

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from laep_jax.report import facts, page_figures, series, svg
from laep_jax.report.drawing import MAX_DOMAINS, MAX_LAYERS
from laep_jax.report.html import caption, escaped, key, long_table, paragraph, table
from laep_jax.report.run_data import RunData

Blocks = list[str]


def story(run: RunData, name: str) -> Blocks:
    """The run in one figure, in a sentence, and in a table."""
    layer = most_pruned_layer(run)
    masked = (key("vermillion", "with the plan's experts masked", "diamond"),) if run.prunes else ()
    keys = (*_loads(run), key("orange", "validation loss", "dot"), *masked)
    figure = _figure(page_figures.draw_story(run, layer), f"{name}-story", run, _story_text(run, layer), keys)
    head = ("", "before the prune", "after") if run.prunes else ("", "")
    return [figure, _titled(f"{run.name}: {facts.status(run)}", table(head, facts.key_numbers(run)))]


def most_pruned_layer(run: RunData) -> int:
    """The layer that lost most experts, the first of them; 0 where nothing was pruned."""
    return int((run.pruned_at_LE >= 0).sum(1).argmax())


def layers_of(run: RunData) -> list[int]:
    """The layers that have figures of their own."""
    return sorted({*series.chosen_layers(run.num_layers, MAX_LAYERS), most_pruned_layer(run)})


def _story_text(run: RunData, layer: int) -> str:
    if not run.prunes:
        reasons = [record.get("reason") for record in facts.events(run, "stability")]
        why = f": {facts.text(reasons[-1])}" if reasons else ""
        return f"tokens of each expert of layer {layer}, and the loss below. Nothing is pruned{why}."
    last, stable = run.prunes[-1], facts.stable_step(run)
    before, after = (sum(map(len, order)) for order in (last.before, last.after))
    found = f"The loads were stable after step {stable:,}. " if stable else ""
    return (
        f"tokens of each expert of layer {layer}, which lost most. {found}The plan of step {last.plan_step:,} was"
        f" applied after step {last.step:,}: {before:,} to {after:,} experts. Below, the loss in the shaded steps, a"
        " mean of five records that does not reach across the prune."
    )


def _settings(run: RunData, name: str) -> Blocks:
    changed = long_table(("setting", "value", "default"), facts.changed_settings(run), "config.json")
    return [
        _titled(run.name, table(("", ""), facts.surroundings(run))),
        _titled("Settings that differ from the defaults", changed),
    ]


def layers(run: RunData, name: str) -> Blocks:
    """Figures of each layer, of which the page shows the chosen one."""
    pruned = bool(run.prunes)
    keys = (*_loads(run), *_marks(run), key("orange", "bound α"))
    when = f"before the plan of step {run.prunes[0].plan_step:,}" if pruned else "at the end"
    text = f"tokens of each expert over the run; below, sorted, in the window {when}"
    after = (key("orange", "after, experts in their old order"), key("blue", "after, as placed")) if pruned else ()
    device_keys = (key("grey", "before" if pruned else "at the end", "box"), *after, key("ink", "mean", "dashed"))
    device_text = "load of each device" + (" around the last prune" if pruned else "") + ", without replicas"
    blocks = []
    for layer in layers_of(run):
        blocks.append(_figure(page_figures.draw_layer(run, layer), f"{name}-layer{layer}", run, text, keys, layer))
        devices = page_figures.draw_devices(run, layer)
        blocks.append(_figure(devices, f"{name}-devices{layer}", run, device_text, device_keys, layer))
    return blocks


def _plan(run: RunData, name: str) -> Blocks:
    if not run.prunes:
        return [paragraph(f"{run.name}: no plan was applied.")]
    last, chosen = run.prunes[-1], layers_of(run)
    keys = (key("vermillion", "pruned", "box"), key("blue", "kept, the stronger the more tokens", "box"))
    image = _figure(page_figures.draw_experts(run), f"{name}-experts", run, "which experts went, by layer", keys)
    head = ("layer", "experts", "pruned", "tokens", "before", "after")
    some = f" ({len(chosen)} of {run.num_layers} layers)" if len(chosen) < run.num_layers else ""
    meaning = "tokens: the share that the pruned experts had; before, after: imbalance of the devices, no replicas"
    by_layer = table(head, facts.plan_by_layer(run, last, chosen)) + paragraph(meaning)
    return [
        image,
        _titled(f"{run.name}: plan of step {last.plan_step:,}{some}", by_layer),
        *_losing(run),
    ]


def _losing(run: RunData) -> Blocks:
    domains = facts.domains_by_loss(run)
    some = f" ({MAX_DOMAINS} of {len(domains)})" if len(domains) > MAX_DOMAINS else ""
    head = ("domain", "validation targets", "tokens on the pruned experts")
    return [_titled(f"What each domain stood to lose{some}", table(head, domains[:MAX_DOMAINS]))] if domains else []


def _devices(run: RunData, name: str) -> Blocks:
    replicas = bool(facts.rebalances(run))
    with_replicas = (key("vermillion", "with replicas, as rebalanced"),) if replicas else ()
    before = (key("grey", "before the prune"),) if run.prunes else ()
    keys = (*before, key("blue", "after it, without replicas" if before else "without replicas"), *with_replicas)
    text = "imbalance of the devices, max / mean, by layer; 1 is even"
    by_layer = _figure(page_figures.draw_imbalance(run), f"{name}-imbalance", run, text, keys)
    keys = (key("blue", "without replicas" if replicas else "each step"), *with_replicas, *_marks(run))
    text = "imbalance of the devices in the layer where it is worst, over the run"
    over_time = page_figures.draw_imbalance_over_time(run)
    return [by_layer, _figure(over_time, f"{name}-worst", run, text, keys)]


def _domains(run: RunData, name: str) -> Blocks:
    losses = series.domain_losses(run)
    if not losses.names:
        return [paragraph(f"{run.name}: no validation loss by domain yet.")]
    shapes = (("vermillion", "diamond"), ("blue", "dot"))
    keys = [key(color, label, shape) for label, (color, shape) in zip(losses.rows, shapes, strict=False)]
    some = f" ({MAX_DOMAINS} of {len(losses.names)} domains)" if len(losses.names) > MAX_DOMAINS else ""
    what = "change of the validation loss since before the prune" if losses.is_change else "validation loss"
    return [_figure(page_figures.draw_domain_changes(run), f"{name}-domains", run, what + some, keys)]


def _speed(run: RunData, name: str) -> Blocks:
    drawn = (("tokens_per_second", "tokens per second"), ("peak_memory_bytes", "peak memory (GiB)"))
    blocks = []
    for field, title in drawn:
        _, values = facts.train_field(run, field)
        if (values == values).any():
            figure = page_figures.draw_by_step(run, field, title)
            blocks.append(_figure(figure, f"{name}-{field}", run, title, _marks(run)))
        else:
            blocks.append(paragraph(f"{run.name}: {title} is not recorded."))
    return blocks


def _events(run: RunData, name: str) -> Blocks:
    rows = facts.timeline(run)
    if not rows:
        return [paragraph(f"{run.name}: none are recorded.")]
    return [_titled(run.name, long_table(("step", "event"), rows, "metrics.jsonl"))]


def _loads(run: RunData) -> tuple[str, ...]:
    """The legend of the loads of a layer."""
    pruned = (key("vermillion", "pruned expert"),) if run.prunes else ()
    return key("blue", "kept expert"), *pruned, key("ink", "mean of the layer", "dashed")


def _marks(run: RunData) -> tuple[str, ...]:
    """The legend of the lines at plans and prunes."""
    return (key("grey", "plan made", "dashed"), key("ink", "plan applied", "dotted")) if run.prunes else ()


def _titled(title: str, body: str) -> str:
    return f"<div><h3>{escaped(title)}</h3>{body}</div>"


def _figure(figure: Figure, name: str, run: RunData, text: str, keys: Sequence[str], layer: int | None = None) -> str:
    """keys: of the legend. layer: the page shows the figure when this one is chosen."""
    drawing = svg.to_svg(figure, name, f"{run.name}: {text}")
    chosen = "" if layer is None else f' data-layer="{layer}"'
    return f"<figure{chosen}>{drawing}{caption(run.name, text, keys)}</figure>"


SECTIONS: dict[str, Callable[[RunData, str], Blocks]] = {
    "Settings and machine": _settings,
    "Loads by layer": layers,
    "The plan": _plan,
    "Devices": _devices,
    "Loss by domain": _domains,
    "Speed and memory": _speed,
    "Starts, plans and faults": _events,
}
