"""Reads a run directory back: recorded loads, metrics and prunes, checked once.

The files are those that docs/run_directory.md describes. Experts are named by the ids they
had when the run began, so that one column of the loads is one expert from start to end.

Axes: N recorded steps, L layers, E experts of the original model (of its widest layer).
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from laep_jax.errors import UserError, require, require_type
from laep_jax.files import read_json, read_records
from laep_jax.laep.plan import Lineage, initial_lineage
from laep_jax.laep.recorded_loads import METRICS_FILE, RecordedLoads, check_lineage, read_loads
from laep_jax.laep.rule import alpha_per_layer

MAX_VALUE = 1e30  # of a loss or an alpha, so that products are finite


@dataclasses.dataclass(frozen=True)
class Transition:
    """A prune after `step` by a plan made after `plan_step`.

    before, after: per layer the original ids in slot order. alpha: per layer, float('inf') where unbounded.
    """

    step: int
    plan_step: int
    before: Lineage
    after: Lineage
    alpha: tuple[float, ...]
    beta: float


@dataclasses.dataclass(frozen=True)
class RunData:
    """A run as its figures need it.

    name: of its folder. steps: [N], ascending. tokens_NLE: by original id, 0 where an expert is not there. num_experts:
    of each layer before any prune. window: steps that a mean load is taken over. alpha, beta, max_moved: of the config.
    train, evals: records in the order they were written. targets: how many validation targets each domain has, empty
    before the first evaluation. pruned_share: of each domain's tokens, what the experts had that the last prune took,
    mean over the layers. events: the records of the other kinds. config, summary: as they are
    in config.json and summary.json; the latter is empty until the run has ended.
    """

    name: str
    steps: np.ndarray
    tokens_NLE: np.ndarray
    num_experts: tuple[int, ...]
    expert_parallel: int
    window: int
    alpha: tuple[float, ...]
    beta: float
    max_moved: float
    prunes: tuple[Transition, ...]
    train: tuple[dict, ...]
    evals: tuple[dict, ...]
    targets: dict[str, int]
    pruned_share: dict[str, float]
    events: tuple[dict, ...]
    config: dict
    summary: dict

    @property
    def num_layers(self) -> int:
        return self.tokens_NLE.shape[1]

    @property
    def pruned_at_LE(self) -> np.ndarray:
        """The last step before an expert was pruned; -1 where it was not."""
        pruned_at_LE = np.full(self.tokens_NLE.shape[1:], -1)
        for transition in self.prunes:
            for layer, (before, after) in enumerate(zip(transition.before, transition.after, strict=True)):
                pruned_at_LE[layer, list({*before} - {*after})] = transition.step
        return pruned_at_LE

    def present(self, layer: int, step: int) -> np.ndarray:
        """Ids, ascending, of the experts that `layer` had in `step`."""
        return np.sort(self.order(step)[layer])

    def order(self, step: int) -> Lineage:
        """Per layer the original ids in slot order, as they were in `step`."""
        past = [transition.after for transition in self.prunes if transition.step < step]
        return past[-1] if past else initial_lineage(self.num_experts)

    def mean_loads(self, last: int, first: int | None = None) -> np.ndarray:
        """[L, E]: mean tokens a step over the recorded steps first..last.

        Without `first` the window that ends with `last`, shortened where the model changed in it.
        """
        if first is None:
            changes = [transition.step + 1 for transition in self.prunes if transition.step < last]
            first = max(last - self.window + 1, *changes[-1:], self.steps[0])
        rows = (self.steps >= first) & (self.steps <= last)
        assert rows.any(), (first, last)
        return self.tokens_NLE[rows].mean(0)


def read_run(run_dir: Path, name: str = "") -> RunData:
    """Everything the figures show; `UserError` naming the file that is missing or does not fit.

    name: of the run, where it is not that of the folder, as of one that is in a bucket.
    """
    if not run_dir.is_dir():
        raise UserError(f"run directory {run_dir} does not exist")
    require((run_dir / METRICS_FILE).exists(), "RUN", str(run_dir), f"is no run directory: it has no {METRICS_FILE}")
    records = list(read_records(run_dir / METRICS_FILE))
    loads = read_loads(run_dir)
    require(len(loads.steps) > 0, f"{run_dir} recorded steps", 0, "are saved: the first checkpoint brings them")
    num_layers = len(loads.num_experts)
    prunes = [record for record in records if record["kind"] == "prune"]
    try:
        config = read_json(run_dir / "config.json", str(run_dir / "config.json"))
        laep = config["laep"]
        return RunData(
            name=name or run_dir.resolve().name,
            steps=loads.steps,
            tokens_NLE=np.maximum(loads.tokens_NLE, 0),
            num_experts=loads.num_experts,
            expert_parallel=loads.expert_parallel,
            window=_step(laep["window"], f"{run_dir} window"),
            alpha=_alphas(laep["alpha"], num_layers),
            beta=_share(laep["beta"], "beta"),
            max_moved=_share(laep["max_moved"], "max_moved"),
            prunes=_read_prunes(run_dir, prunes, loads),
            train=_losses(records, "train", "loss"),
            evals=_losses(records, "eval", "validation_loss"),
            pruned_share=_pruned_share(records, prunes),
            targets=_targets(records),
            events=_events(records),
            config=config,
            summary=_summary(run_dir / "summary.json"),
        )
    except (KeyError, TypeError) as error:  # a key that is missing, and something else in the place of an object
        raise UserError(f"{run_dir} is no complete run directory: {error} is missing in its records") from error


def _step(value: Any, field: str) -> int:
    require(type(value) is int and 0 < value < 2**31, field, value, "must be a number of steps")
    return value


def _losses(records: list[dict], kind: str, field: str) -> tuple[dict, ...]:
    """The records of a kind. Their losses are numbers, or None where they were not finite."""
    chosen = tuple(record for record in records if record["kind"] == kind)
    for record in chosen:
        step = _step(record["step"], f"step of a {kind} record")
        if kind == "eval":
            require_type(f"when of step {step}", record["when"], str)
            _require_losses(record.get("validation_loss_by_domain", {}), f"validation_loss_by_domain of step {step}")
        require_type(f"{field} of step {step}", record[field], float | None)
        require(
            abs(record[field] or 0) < MAX_VALUE, f"{field} of step {step}", record[field], f"is not below {MAX_VALUE}"
        )
    return chosen


def _summary(path: Path) -> dict:
    summary = read_json(path, str(path)) if path.exists() else {}
    require_type(str(path), summary, dict)
    return summary


def _require_losses(by_domain: Any, field: str) -> None:
    require_type(field, by_domain, dict[str, float | None])
    require(all(abs(loss or 0) < MAX_VALUE for loss in by_domain.values()), field, by_domain, f"reaches {MAX_VALUE}")


def _targets(records: list[dict]) -> dict[str, int]:
    """By domain, of the newest evaluation."""
    targets = next((record["targets_by_domain"] for record in reversed(records) if record["kind"] == "validation"), {})
    require_type("targets_by_domain", targets, dict[str, int])
    require(all(0 < count < 2**62 for count in targets.values()), "targets_by_domain", targets, "must be positive")
    return targets


def _events(records: list[dict]) -> tuple[dict, ...]:
    events = tuple(record for record in records if record["kind"] not in ("train", "eval"))
    for record in events:
        require(record["step"] < 2**31, f"step of a {record['kind']} record", record["step"], "must be a step")
    return events


def _pruned_share(records: list[dict], prunes: list[dict]) -> dict[str, float]:
    """By domain; empty where nothing was pruned."""
    made = prunes[-1]["plan_step"] if prunes else None
    checked = [record for record in records if record["kind"] == "dry_run" and record["step"] == made]
    by_layer = checked[-1]["pruned_share_by_domain"] if checked else {}
    require_type("pruned_share_by_domain", by_layer, dict[str, list[float]])
    require(all(by_layer.values()), "pruned_share_by_domain", by_layer, "lacks the layers of a domain")
    return {
        name: sum(_share(share, f"pruned share of {name}") for share in shares) / len(shares)
        for name, shares in by_layer.items()
    }


def _read_prunes(run_dir: Path, records: list[dict], loads: RecordedLoads) -> tuple[Transition, ...]:
    """The prunes that come after recorded steps, oldest first."""
    recorded = set(loads.steps.tolist())
    order = initial_lineage(loads.num_experts)
    prunes: list[Transition] = []
    for record in records:
        step, plan_step = record["step"], record["plan_step"]
        if step > max(recorded):
            break  # the run is going on and has not saved its loads since
        name = f"{run_dir} plan applied after step {step}"
        known = {step, _step(plan_step, f"{name}: plan_step")} <= recorded and plan_step <= step
        require(known and step > (prunes[-1].step if prunes else 0), name, plan_step, "must follow recorded steps")
        file = str(record["plan"])
        require(
            re.fullmatch(r"plans/\d{1,10}\.json", file) is not None, f"{name}: plan", file, "must be plans/STEP.json"
        )
        plan = read_json(run_dir / file, str(run_dir / file))
        after = check_lineage(record["lineage"], order, f"{name}: lineage")
        alphas = _alphas(plan["alpha"], len(order))
        prunes.append(Transition(step, plan_step, order, after, alphas, _share(plan["beta"], "beta")))
        order = after
    return tuple(prunes)


def _alphas(value: Any, num_layers: int) -> tuple[float, ...]:
    """Per layer; JSON writes the unbounded one as text."""
    values = value if isinstance(value, list) else [value]
    sound = value == "hybrid" or all(
        item == "inf" or (type(item) in (int, float) and item < MAX_VALUE) for item in values
    )
    require(sound, "alpha", value, f"must be numbers below {MAX_VALUE}, inf or hybrid")
    return alpha_per_layer([float(item) for item in value] if isinstance(value, list) else value, num_layers)


def _share(value: Any, name: str) -> float:
    require(type(value) in (int, float) and 0 <= value <= 1, name, value, "must lie between 0 and 1")
    return float(value)
