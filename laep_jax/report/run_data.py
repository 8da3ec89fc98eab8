"""Reads a run directory back: recorded loads, metrics and cuts, checked once.

The files are those that `laep_jax/training/runlog.py` describes. Experts are named by the ids they
had when the run began, so that one column of the loads is one expert from start to end.

Letters: N recorded steps, L layers, E experts of the original model (of its widest layer).
"""

import dataclasses
import json
import zipfile
from pathlib import Path

import numpy as np

from laep_jax.errors import UserError, require
from laep_jax.laep.pruning import alpha_per_layer


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
    records = _read_records(run_dir / "metrics.jsonl")
    laep = _read_json(run_dir / "config.json").get("laep", {})
    loads = _read_loads(run_dir / "loads.npz")
    num_layers = loads["tokens_per_expert"].shape[1]
    try:
        cuts = _read_cuts(run_dir, [record for record in records if record["kind"] == "prune"], loads["pruned_at"])
        return RunData(
            steps=loads["steps"],
            tokens_NLE=loads["tokens_per_expert"],
            pruned_at_LE=loads["pruned_at"],
            expert_parallel=int(loads["expert_parallel"]),
            window=laep["window"],
            alpha=_alphas(alpha_per_layer(laep["alpha"], num_layers)),
            beta=laep["beta"],
            cuts=cuts,
            train=tuple(record for record in records if record["kind"] == "train"),
            evals=tuple(record for record in records if record["kind"] == "eval"),
            targets=next((r["targets_by_domain"] for r in reversed(records) if r["kind"] == "heldout"), {}),
        )
    except KeyError as error:
        raise UserError(f"{run_dir} is no complete run directory: {error} is missing in its records") from error


def _read_records(path: Path) -> list[dict]:
    """The lines of metrics.jsonl; a last one that is still being written is left out."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: {path.parent} is not the directory of a run")
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            assert {"kind", "step"} <= set(record)
        except (ValueError, TypeError, AssertionError) as error:
            raise UserError(f"{path} line {number} is not a record of a run") from error
        records.append(record)
    return records


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} does not read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object")
    return values


def _read_loads(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: a run writes it with its first checkpoint")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = ("steps", "tokens_per_expert", "pruned_at", "expert_parallel")
            loads = {name: arrays[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} does not read as recorded loads: {error}") from error
    shape = loads["tokens_per_expert"].shape
    require(
        len(shape) == 3 and shape[0] > 0, f"{path} tokens_per_expert shape", shape, "must be [steps, layers, experts]"
    )
    fits = loads["steps"].shape == shape[:1] and loads["pruned_at"].shape == shape[1:]
    require(fits, f"{path} steps, pruned_at", (loads["steps"].shape, loads["pruned_at"].shape), f"do not fit {shape}")
    return loads


def _read_cuts(run_dir: Path, prunes: list[dict], pruned_at_LE: np.ndarray) -> tuple[Cut, ...]:
    """The cuts whose effect the saved loads know of, oldest first."""
    order = tuple(tuple(np.flatnonzero(row != -2).tolist()) for row in pruned_at_LE)
    cuts = []
    for record in prunes:
        if not record["rearrange_only"] and record["step"] not in pruned_at_LE:
            break  # the run goes on and has not saved its loads since
        plan = _read_json(run_dir / record["plan"])
        after = tuple(tuple(ids) for ids in record["lineage"])
        require(len(after) == len(order), f"{run_dir} lineage layers", len(after), f"does not fit {len(order)} layers")
        steps = record["step"], record["plan_step"]
        cuts.append(Cut(*steps, record["rearrange_only"], order, after, _alphas(plan["alpha"]), float(plan["beta"])))
        order = after
    return tuple(cuts)


def _alphas(values) -> tuple[float, ...]:
    """Per layer; JSON writes the unbounded one as text."""
    return tuple(float(value) for value in values)
