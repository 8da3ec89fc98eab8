"""Reads a run directory back: recorded loads, metrics and cuts, checked once.

The files are those that `laep_jax/training/runlog.py` describes. Experts are named by the ids they
had when the run began, so that one column of the loads is one expert from start to end.

Letters: N recorded steps, L layers, E experts of the original model (of its widest layer).
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from laep_jax.errors import UserError, require, require_type
from laep_jax.files import read_arrays, read_json, read_records
from laep_jax.laep.load import ABSENT, check_loads
from laep_jax.laep.pruning import alpha_per_layer

MOST = 1e30  # of a loss or an alpha, so that products are finite


@dataclasses.dataclass(frozen=True)
class Cut:
    """One application, after `step`, of a plan made after `plan_step`: a prune, or a rearrangement alone.

    before, after: per layer the original ids in slot order. alpha: per layer, float('inf') where unbounded.
    """

    step: int
    plan_step: int
    rearrange_only: bool
    before: tuple[tuple[int, ...], ...]
    after: tuple[tuple[int, ...], ...]
    alpha: tuple[float, ...]
    beta: float


@dataclasses.dataclass(frozen=True)
class RunData:
    """A run as its figures need it.

    steps: [N], ascending. tokens_NLE: by original id. pruned_at_LE: the last step before the expert
    went, -1 if it is there, -2 if it never was. window: steps that a mean load is taken over.
    alpha, beta: of the config. train, evals: records in the order they were written. targets: how many
    held-out targets each domain has, empty before the first evaluation.
    """

    steps: np.ndarray
    tokens_NLE: np.ndarray
    pruned_at_LE: np.ndarray
    expert_parallel: int
    window: int
    alpha: tuple[float, ...]
    beta: float
    cuts: tuple[Cut, ...]
    train: tuple[dict, ...]
    evals: tuple[dict, ...]
    targets: dict[str, int]

    @property
    def num_layers(self) -> int:
        return self.tokens_NLE.shape[1]

    @property
    def prunes(self) -> tuple[Cut, ...]:
        """The cuts that took experts away."""
        return tuple(cut for cut in self.cuts if not cut.rearrange_only)

    def present(self, layer: int, step: int) -> np.ndarray:
        """Ids, ascending, of the experts that `layer` had in `step`."""
        pruned_at_E = self.pruned_at_LE[layer]
        return np.flatnonzero((pruned_at_E == -1) | (pruned_at_E >= step))

    def order(self, step: int) -> tuple[tuple[int, ...], ...]:
        """Per layer the original ids in slot order, as they were in `step`."""
        past = [cut.after for cut in self.cuts if cut.step < step]
        if past:
            return past[-1]
        return tuple(tuple(np.flatnonzero(pruned_at_E != -2).tolist()) for pruned_at_E in self.pruned_at_LE)

    def mean_loads(self, last: int, first: int | None = None) -> np.ndarray:
        """[L, E]: mean tokens a step over the recorded steps first..last.

        Without `first` the window that ends with `last`, cut short where the model changed in it.
        """
        if first is None:
            changes = [cut.step + 1 for cut in self.cuts if cut.step < last]
            first = max(last - self.window + 1, *changes[-1:], self.steps[0])
        rows = (self.steps >= first) & (self.steps <= last)
        assert rows.any(), (first, last)
        return self.tokens_NLE[rows].mean(0)


def read_run(run_dir: Path) -> RunData:
    """Everything the figures show; `UserError` naming the file that is missing or does not fit."""
    if not run_dir.is_dir():
        raise UserError(f"run directory {run_dir} does not exist")
    records = read_records(run_dir / "metrics.jsonl")
    loads, devices = _read_loads(run_dir / "loads.npz")
    num_layers = loads["tokens_per_expert"].shape[1]
    try:
        laep = read_json(run_dir / "config.json", str(run_dir / "config.json"))["laep"]
        return RunData(
            steps=loads["steps"],
            tokens_NLE=loads["tokens_per_expert"],
            pruned_at_LE=loads["pruned_at"],
            expert_parallel=devices,
            window=_step(laep["window"], f"{run_dir} window"),
            alpha=_alphas(laep["alpha"], num_layers),
            beta=_beta(laep["beta"]),
            cuts=_read_cuts(run_dir, [record for record in records if record["kind"] == "prune"], loads, devices),
            train=_losses(records, "train", "loss"),
            evals=_losses(records, "eval", "heldout_loss"),
            targets=next((r["targets_by_domain"] for r in reversed(records) if r["kind"] == "heldout"), {}),
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
        require_type(f"{field} of step {step}", record[field], float | None)
        require(abs(record[field] or 0) < MOST, f"{field} of step {step}", record[field], f"is not below {MOST}")
    return chosen


def _read_loads(path: Path) -> tuple[dict[str, np.ndarray], int]:
    """The recorded loads and the size of the expert axis."""
    if not path.exists():
        raise UserError(f"{path} does not exist: a run writes it with its first checkpoint")
    loads = read_arrays(path, str(path), ("steps", "tokens_per_expert", "pruned_at", "expert_parallel"))
    devices = loads.pop("expert_parallel")
    check_loads(str(path), **loads)
    require(len(loads["steps"]) > 0, f"{path} steps", 0, "are recorded")
    require(devices.ndim == 0 and devices.dtype.kind == "i", f"{path} expert_parallel", devices, "must be an integer")
    _require_divisible(_first_order(loads["pruned_at"]), int(devices), str(path))
    return loads, int(devices)


def _first_order(pruned_at_LE: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(np.flatnonzero(row != ABSENT).tolist()) for row in pruned_at_LE)


def _require_divisible(order: tuple[tuple[int, ...], ...], devices: int, name: str) -> None:
    counts = [len(ids) for ids in order]
    fits = devices > 0 and all(count and count % devices == 0 for count in counts)
    require(fits, f"{name} experts", counts, f"must divide by expert_parallel={devices}")


def _read_cuts(run_dir: Path, prunes: list[dict], loads: dict[str, np.ndarray], devices: int) -> tuple[Cut, ...]:
    """The cuts whose effect the saved loads know of, oldest first."""
    pruned_at_LE, recorded = loads["pruned_at"], set(loads["steps"].tolist())
    order = _first_order(pruned_at_LE)
    cuts: list[Cut] = []
    for record in prunes:
        step, plan_step, moves = record["step"], record["plan_step"], record["rearrange_only"]
        if step > max(recorded) or (not moves and step not in pruned_at_LE):
            break  # the run goes on and has not saved its loads since
        name = f"{run_dir} cut of step {step}"
        known = {step, _step(plan_step, f"{name}: plan_step")} <= recorded and plan_step <= step
        require(known and step > (cuts[-1].step if cuts else 0), name, plan_step, "must follow recorded steps")
        file = str(record["plan"])
        require(
            re.fullmatch(r"plans/\d{1,10}\.json", file) is not None, f"{name}: plan", file, "must be plans/STEP.json"
        )
        plan = read_json(run_dir / file, str(run_dir / file))
        after = _lineage(record["lineage"], order, name)
        _require_divisible(after, devices, name)
        alphas = _alphas(plan["alpha"], len(order))
        cuts.append(Cut(step, plan_step, bool(moves), order, after, alphas, _beta(plan["beta"])))
        order = after
    return tuple(cuts)


def _lineage(value: Any, order: tuple[tuple[int, ...], ...], name: str) -> tuple[tuple[int, ...], ...]:
    """Per layer the ids that a cut left, each of them there before."""
    lists = isinstance(value, list) and all(isinstance(ids, list) for ids in value)
    require(
        lists and len(value) == len(order),
        f"{name}: lineage",
        value,
        f"must be one list for each of {len(order)} layers",
    )
    for ids, before in zip(value, order, strict=True):
        integers = all(type(expert) is int for expert in ids)
        require(integers and len(ids) == len({*ids} & {*before}), f"{name}: lineage", ids, "must be experts, each once")
    return tuple(tuple(ids) for ids in value)


def _alphas(value: Any, num_layers: int) -> tuple[float, ...]:
    """Per layer; JSON writes the unbounded one as text."""
    values = value if isinstance(value, list) else [value]
    sound = value == "hybrid" or all(item == "inf" or (type(item) in (int, float) and item < MOST) for item in values)
    require(sound, "alpha", value, f"must be numbers below {MOST}, inf or hybrid")
    return alpha_per_layer([float(item) for item in value] if isinstance(value, list) else value, num_layers)


def _beta(value: Any) -> float:
    require(type(value) in (int, float) and 0 <= value <= 1, "beta", value, "must lie between 0 and 1")
    return float(value)
