"""What is measured once the rows of an experiment are there, by seed, and kept among the results."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from experiments import placements, throughput
from experiments.catalogue import Experiment
from experiments.results import Result, append, read_results
from experiments.tables import by_row

DEVICES = 8  # expert parallelism, as in base.gin
MEASURES: dict[str, Callable[[dict[str, Result], int], dict]] = {
    "table5": throughput.measure,
    "open": placements.measure,
}


def row_name(experiment: str) -> str:
    """Under which the results keep what was measured."""
    return f"{experiment} measured"


def measure(name: str, experiment: Experiment, out: Path) -> None:
    """Measures for each seed whose rows are all there, unless it was done for the very same results."""
    if name not in MEASURES:
        return
    table = by_row(read_results(out))
    done = table.get(row_name(name), {})
    rows = {entry.row: table.get(entry.row, {}) for entry in experiment.entries}
    for seed in sorted(set.intersection(*(set(by_seed) for by_seed in rows.values()))):
        results = {row: by_seed[seed] for row, by_seed in rows.items()}
        digest = hashlib.sha256("".join(r["digest"] for r in results.values()).encode()).hexdigest()[:8]
        if seed not in done or done[seed]["digest"] != digest:
            print(f"{row_name(name)}, seed {seed}", flush=True)
            append(out, {"row": row_name(name), "seed": seed, "digest": digest, **MEASURES[name](results, DEVICES)})
