"""What a run's records say in words and tables: settings, key numbers, the plan by layer, what happened on the way.

The records may come from anyone and from older versions: a field that is not there or not what it should be is left
out, and every text is plain, for the page to escape.

Axes: L layers.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from laep_jax.config import Config
from laep_jax.laep.balance import imbalance
from laep_jax.report import series
from laep_jax.report.run_data import MAX_VALUE, RunData, Transition

MAX_TEXT = 300  # characters of a text from a run
UNKNOWN = "–"
Rows = list[tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Rebalance:
    """Imbalance of the devices by layer, without replicas and with them."""

    step: int
    device_L: list[float]
    levelled_L: list[float]


def events(run: RunData, *kinds: str) -> list[dict]:
    """The records of these kinds, in their order."""
    return [record for record in run.events if record["kind"] in kinds]


def rebalances(run: RunData) -> list[Rebalance]:
    """Those that are complete."""
    found = [
        Rebalance(record["step"], numbers(record.get("device_imbalance")), numbers(record.get("levelled_imbalance")))
        for record in events(run, "rebalance")
    ]
    return [r for r in found if len(r.device_L) == len(r.levelled_L) == run.num_layers]


def stable_step(run: RunData) -> int | None:
    """The step after which the loads were first found stable."""
    return next((record["step"] for record in events(run, "stability") if record.get("stable") is True), None)


def train_field(run: RunData, field: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values): NaN where a record has no such number."""
    values = [number(record.get(field)) for record in run.train]
    steps = np.array([record["step"] for record in run.train], int)
    return steps, np.array([math.nan if value is None else value for value in values], float)


def worst_imbalance(run: RunData, field: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, imbalance of the layer where it is worst)."""
    worst = [max(numbers(record.get(field)), default=math.nan) for record in run.train]
    return np.array([record["step"] for record in run.train], int), np.array(worst, float)


def number(value: Any) -> float | None:
    """A number that can be drawn, or None."""
    sound = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MAX_VALUE
    return float(value) if sound else None


def numbers(value: Any) -> list[float]:
    """Those of a list; none where it is none."""
    return [item for item in map(number, value) if item is not None] if isinstance(value, list) else []


def text(value: Any) -> str:
    """As a person reads it, cut where it is long."""
    if isinstance(value, list):
        value = "; ".join(map(str, value))
    shown = "yes" if value is True else "no" if value is False else "none" if value is None else str(value)
    return shown if len(shown) <= MAX_TEXT else shown[: MAX_TEXT - 1] + "…"


def settings(run: RunData) -> dict[str, Any]:
    """Every setting by the name that gin gives it."""
    parts = {name: type(part).__name__ for name, part in vars(Config()).items()}
    return {
        f"{parts.get(part, part)}.{name}": value
        for part, fields in run.config.items()
        if isinstance(fields, dict)
        for name, value in fields.items()
    }


def is_complete(run: RunData) -> bool:
    """Whether the run has all the steps that it was last started for."""
    planned = number(settings(run).get("TrainConfig.num_steps"))
    return bool(run.summary) and planned is not None and run.steps[-1] >= planned


def status(run: RunData) -> str:
    """How far the run is."""
    if is_complete(run):
        return f"{run.steps[-1]:,} steps, complete"
    planned = number(settings(run).get("TrainConfig.num_steps"))
    return f"{run.steps[-1]:,}" + (f" of {planned:,.0f}" if planned else "") + " steps saved"


def changed_settings(run: RunData) -> Rows:
    """(setting, value, default) of those that differ from their defaults."""
    defaults = {
        f"{type(part).__name__}.{name}": value for part in vars(Config()).values() for name, value in vars(part).items()
    }
    return [
        (name, _setting(value), _setting(defaults[name]) if name in defaults else UNKNOWN)
        for name, value in settings(run).items()
        if name not in defaults or _plain(value) != _plain(defaults[name])
    ]


def differing_settings(first: RunData, second: RunData) -> Rows:
    """(setting, value of the one, value of the other)."""
    a, b = settings(first), settings(second)
    shown = [{name: _setting(value) for name, value in of.items()} for of in (a, b)]
    names = [name for name in a | b if name not in a or name not in b or _plain(a[name]) != _plain(b[name])]
    return [(name, *(of.get(name, UNKNOWN) for of in shown)) for name in names]


def _plain(value: Any) -> Any:
    """As JSON has it; a list whose entries are all the same is one of them, as num_experts of each layer."""
    if not isinstance(value, (list, tuple)):
        return value
    items = [_plain(item) for item in value]
    return items[0] if items and all(item == items[0] for item in items) else items


def _setting(value: Any) -> str:
    plain = _plain(value)
    return text(", ".join(map(str, plain)) if isinstance(plain, list) else plain)


def surroundings(run: RunData) -> Rows:
    """(what, where it is known): corpus, devices, machine, of the newest start."""
    starts = events(run, "start")
    newest = starts[-1] if starts else {}
    names = (("corpus", "corpus"), ("devices", "devices"), ("machine", "machine"), ("time", "last start (UTC)"))
    rows: Rows = [(label, text(newest[name])) for name, label in names if isinstance(newest.get(name), str)]
    if run.summary.get("init_from"):
        rows.append(("first parameters", text(run.summary["init_from"])))
    return rows or [("corpus, machine", "not recorded by the version that made this run")]


def key_numbers(run: RunData) -> Rows:
    """(quantity, before, after) of the last prune; the first two of a run that pruned none."""
    before, after = _device_imbalance(run)
    rows = [
        ("parameters", *_of_prunes(run, "parameters")),
        ("experts", *_experts(run)),
        ("device imbalance, mean over layers", _mean(before), _mean(after)),
        ("device imbalance, worst layer", _worst(before), _worst(after)),
        *_levelled(run),
        ("validation loss at the prune", *_loss_at_prune(run)),
        ("validation loss, newest", "", _shown(_newest(run.evals, "validation_loss"), ".4f")),
        ("validation bits per byte, newest", "", _shown(_newest(run.evals, "validation_bits_per_byte"), ".4f")),
        ("epochs of the training text", "", _shown(_newest(run.train, "epochs"), ".2f")),
        ("step time, median", *_step_time(run)),
    ]
    if run.prunes:
        return [row for row in rows if row[1:] not in (("", UNKNOWN), (UNKNOWN, UNKNOWN))]
    return [(name, first or second) for name, first, second in rows if (first or second) != UNKNOWN]


def _experts(run: RunData) -> tuple[str, str]:
    total = f"{sum(run.num_experts):,}"
    return total, f"{sum(map(len, run.prunes[-1].after)):,}" if run.prunes else ""


def _of_prunes(run: RunData, name: str) -> tuple[str, str]:
    prunes = events(run, "prune")
    first, last = (
        number(prunes[i].get(f"{name}_{end}")) if prunes else None for i, end in ((0, "before"), (-1, "after"))
    )
    return _shown(first, ",.0f"), _shown(last, ",.0f")


def _device_imbalance(run: RunData) -> tuple[list[float], list[float] | None]:
    """By layer, without replicas, of a window before the last prune and at the end, as in the closing table."""
    last = int(run.steps[-1])
    before = series.device_loads(run).before
    after = series.device_sums(run.mean_loads(last), run.order(last), run.expert_parallel) if run.prunes else None
    return [imbalance(load_P) for load_P in before], None if after is None else [imbalance(load_P) for load_P in after]


def _levelled(run: RunData) -> Rows:
    """With replicas: those of the summary, or of the last rebalancings before and after the last prune."""
    found = rebalances(run)
    past = [r.levelled_L for r in found if not run.prunes or r.step <= run.prunes[-1].step]
    newest = [r.levelled_L for r in found if run.prunes and r.step > run.prunes[-1].step]
    first = numbers(run.summary.get("levelled_imbalance_before")) or (past[-1] if past else None)
    last = numbers(run.summary.get("levelled_imbalance_after")) or (newest[-1] if newest else None)
    if not first and not last:
        return []
    return [
        ("device imbalance as rebalanced, mean", _mean(first), _mean(last)),
        ("device imbalance as rebalanced, worst", _worst(first), _worst(last)),
    ]


def _loss_at_prune(run: RunData) -> tuple[str, str]:
    step = run.prunes[-1].plan_step if run.prunes else None
    found = {record["when"]: record["validation_loss"] for record in run.evals if record["step"] == step}
    return _shown(found.get("before_prune"), ".4f"), _shown(found.get("after_prune"), ".4f")


def _newest(records: Sequence[dict], field: str) -> float | None:
    """Of the model as it is, not of a plan that is only measured."""
    values = [number(record.get(field)) for record in records if record.get("when") in (None, "periodic", "end")]
    return values[-1] if values else None


def _step_time(run: RunData) -> tuple[str, str]:
    steps, seconds = train_field(run, "step_seconds")
    first, last = (run.prunes[0].step, run.prunes[-1].step) if run.prunes else (2**31, 2**31)
    parts = (seconds[steps <= first], seconds[steps > last])
    before, after = (_median_seconds(part[np.isfinite(part)]) for part in parts)
    return before, after


def _median_seconds(seconds: np.ndarray) -> str:
    return f"{np.median(seconds):.3f} s" if len(seconds) else UNKNOWN


def _mean(values: list[float] | None) -> str:
    return _shown(sum(values) / len(values) if values else None, ".3f")


def _worst(values: list[float] | None) -> str:
    return _shown(max(values) if values else None, ".3f")


def _shown(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else f"{value:{form}}"


def plan_by_layer(run: RunData, transition: Transition, layers: list[int]) -> Rows:
    """(layer, experts before, pruned, their share of the tokens, imbalance of the devices before and after)."""
    share_LE = series.shares(run, transition.plan_step)
    loads = series.device_loads(run)
    rows: Rows = []
    for layer in layers:
        before, after = transition.before[layer], transition.after[layer]
        gone = sorted({*before} - {*after})
        ends = [_shown(imbalance(part[layer]), ".3f") for part in (loads.before, loads.placed) if part is not None]
        rows.append((str(layer), str(len(before)), str(len(gone)), f"{np.nansum(share_LE[layer, gone]):.1%}", *ends))
    return rows


def domains_by_loss(run: RunData) -> Rows:
    """(domain, targets, share of its tokens on the pruned experts): mean over layers, the largest first."""
    names = sorted(run.pruned_share, key=lambda name: -run.pruned_share[name])
    return [(name, f"{run.targets.get(name, 0):,}", f"{run.pruned_share[name]:.1%}") for name in names]


def timeline(run: RunData) -> Rows:
    """(step, what happened): starts, changed settings, stability, plans, prunes, steps that went wrong."""
    rows, stable = [], False
    for record in run.events:
        if record["kind"] == "stability":
            was, stable = stable, record.get("stable") is True
            happened = "loads stable" if stable and not was else ""
        else:
            happened = _happened(record)
        if happened:
            rows.append((f"{record['step']:,}", text(happened)))
    return rows


def _happened(record: dict) -> str:
    kind, step = record["kind"], record["step"]
    if kind == "start":
        since = f"resumed from the checkpoint of step {step}" if step else "started"
        return f"{since} on {text(record.get('devices', UNKNOWN))}"
    if kind == "settings":
        return f"settings changed: {text(record.get('changed'))}"
    if kind == "dry_run":
        before, after = (_shown(number(record.get(f"validation_loss{end}")), ".4f") for end in ("_before", ""))
        verdict = "a plan made" if record.get("stands") is True else "a plan refused"
        return f"{verdict}: validation loss {before}, {after} with the experts to prune masked"
    if kind == "prune":
        parts = record.get("seconds")
        seconds = {name: number(value) for name, value in parts.items()} if isinstance(parts, dict) else {}
        pause = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items() if value is not None)
        return f"plan of step {text(record.get('plan_step'))} applied" + (f" ({pause})" if pause else "")
    if kind in ("skipped", "spike"):
        what = "step skipped, not finite" if kind == "skipped" else "spike of the loss"
        loss, norm = (_shown(number(record.get(name)), ".4g") for name in ("loss", "grad_norm"))
        return f"{what}: loss {loss}, gradient norm {norm}"
    return ""
