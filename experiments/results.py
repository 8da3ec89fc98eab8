"""What is kept of a finished run: one line of results.jsonl, enough to draw every table and figure from.

Loads are mean tokens a step, rounded, by original expert: of every window of a run that does not prune, else of the
window before the first prune, of the one after the last, and of the last window. Axes: L layers, E experts.
"""

import datetime
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.rows import Row
from laep_jax.errors import UserError
from laep_jax.files import MAX_JSON, parse_json, read_bytes, read_json
from laep_jax.report.run_data import RunData, read_run

FOLDER = Path(__file__).parent / "results"
FILE = "results.jsonl"
WINDOW = 50  # steps of a mean load here
PRUNED_SHARE = "pruned_share_by_domain"  # mean over the layers
Result = dict[str, Any]


def read_results(folder: Path) -> list[Result]:
    """Every result kept in a folder, oldest first; none where there is no file. `UserError` where it does not read."""
    path = folder / FILE
    if not path.exists():
        return []
    lines = read_bytes(path, str(path), MAX_JSON).splitlines()
    results = [parse_json(line, f"{path} line {number}") for number, line in enumerate(lines, 1)]
    for number, result in enumerate(results, 1):
        if not isinstance(result, dict) or not {"row", "seed", "digest"} <= result.keys():
            raise UserError(f"{path} line {number} is no result; remove it to continue")
    return results


def find(results: list[Result], row: Row) -> Result | None:
    """The result of this row with these settings."""
    key = row.name, row.seed, row.digest
    return next((r for r in reversed(results) if (r["row"], r["seed"], r["digest"]) == key), None)


def append(folder: Path, result: Result) -> None:
    """Adds a line, on disk when this returns."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(result, separators=(",", ":")) + "\n")
        file.flush()
        os.fsync(file.fileno())


def result_of(row: Row, run_dir: Path) -> Result:
    """What is kept of a run directory whose run is complete."""
    run, summary = read_run(run_dir), read_json(run_dir / "summary.json", str(run_dir / "summary.json"))
    last_prune = run.prunes[-1].step if run.prunes else 0
    speeds = [r for r in run.train if r["step"] > last_prune and r["tokens_per_second"] is not None]
    end = int(run.steps[-1])
    return {
        "row": row.name,
        "seed": row.seed,
        "digest": row.digest,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": _machine(),
        "tokens": summary["tokens"],
        "parameters": summary["parameters_after"] or summary["parameters_before"],
        "num_experts": summary["experts_after"] or summary["experts_before"],
        "validation_loss": summary["validation_loss_end"],
        "validation_loss_by_domain": summary["validation_loss_by_domain"]["end"],
        "validation_targets_by_domain": summary["validation_targets_by_domain"],
        "validation_loss_before_prune": summary["validation_loss_before_prune"],
        "validation_loss_after_prune": summary["validation_loss_after_prune"],
        **({PRUNED_SHARE: _means(summary[PRUNED_SHARE])} if run.prunes else {}),
        "cuts": [transition.step for transition in run.prunes],
        "order": run.order(end + 1),
        "tokens_per_second": float(np.median([r["tokens_per_second"] for r in speeds])),
        "gflops_per_second": float(np.median([r["gflops_per_second"] for r in speeds])),
        "loads": {str(step): _window(run, step) for step in _window_ends(run)},
    }


def _means(by_layer: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.fmean(shares) for name, shares in by_layer.items()}


def _window_ends(run: RunData) -> list[int]:
    end = int(run.steps[-1])
    if not run.prunes:
        return list(range(WINDOW, end + 1, WINDOW))
    return sorted({run.prunes[0].step, min(run.prunes[-1].step + WINDOW, end), end})


def _window(run: RunData, last: int) -> list[list[int]]:
    """Mean loads [L, E] of the window that ends with step `last`."""
    return np.rint(run.mean_loads(last, max(last - WINDOW + 1, int(run.steps[0])))).astype(int).tolist()


def _machine() -> dict[str, str | int]:
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
