"""A run's recorded loads (paper section 3.1): written while it trains, read by `report`, `plan` and `preflight`.

RUN/loads/FIRST.npy holds the tokens of each expert in the steps from FIRST on, int32 [steps, L, E], at most CHUNK of
them. An expert keeps the column of its id in the model that the run began with; where it is not there, because it is
pruned or its layer never had so many, it has NOT_THERE. Only the last file is written again, whole, so that saving does
not take longer in a longer run. RUN/loads/experts.json holds `num_experts` of each layer before any prune, and
`expert_parallel`. NumPy only, since `plan` needs nothing else.

Axes: N recorded steps, L layers, E experts of a layer; in files, of the widest layer that the run began with.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from laep_jax.errors import UserError, require
from laep_jax.files import read_array, read_json, read_records, replace_file
from laep_jax.laep.counts import read_counts
from laep_jax.laep.plan import Lineage, initial_lineage
from laep_jax.mirror import readable
from laep_jax.paths import is_bucket

FOLDER, EXPERTS_FILE, METRICS_FILE = "loads", "experts.json", "metrics.jsonl"
NOT_THERE = -1
CHUNK = 256  # steps a file; 7 MB for 103 layers of 64 experts


class LoadsWriter:
    """Records the loads of a run that has `resume_step` steps; drops what an earlier process recorded after that.

    num_experts: of each layer before any prune. `UserError` where the loads of another model are there.
    """

    def __init__(self, run_dir: Path, num_experts: Sequence[int], expert_parallel: int, resume_step: int):
        self._dir = run_dir / FOLDER
        self._shape = len(num_experts), max(num_experts)
        self._first = resume_step + 1  # step of the first row that is in memory
        self._rows: list[np.ndarray] = []
        self._dir.mkdir(exist_ok=True)
        path = self._dir / EXPERTS_FILE
        experts = {"num_experts": list(num_experts), "expert_parallel": expert_parallel}
        if resume_step and path.exists():
            found = read_json(path, str(path)).get("num_experts")
            require(found == experts["num_experts"], f"{path} num_experts", found, f"is not {list(num_experts)}")
        self.last_saved = self._drop_after(resume_step)  # step of the last row on disk when the run was resumed
        replace_file(path, lambda file: file.write(json.dumps(experts).encode()))

    def record(self, step: int, tokens_per_expert: Sequence[np.ndarray], lineage: Sequence[Sequence[int]]) -> None:
        """Keeps the next step's tokens, of each slot of each layer, until they are saved. lineage: the slots' ids."""
        assert step == self._first + len(self._rows), (step, self._first, len(self._rows))
        row_LE = np.full(self._shape, NOT_THERE, np.int32)
        for layer, (tokens, ids) in enumerate(zip(tokens_per_expert, lineage, strict=True)):
            assert len(tokens) == len(ids), (layer, len(tokens), len(ids))
            row_LE[layer, list(ids)] = tokens
        self._rows.append(row_LE)

    def save(self) -> None:
        """Rewrites the last file with the rows since; frees the rows of a file that is full."""
        while self._rows:
            rows = self._rows[:CHUNK]
            self._write(self._first, np.stack(rows))
            if len(rows) < CHUNK:
                return
            del self._rows[:CHUNK]
            self._first += CHUNK

    def _drop_after(self, step: int) -> int:
        """Removes the rows after `step`, from the last backwards, so that being killed leaves no gap.

        Returns the step of the last row that is left, 0 without one.
        """
        files = _files(self._dir)
        while files and files[-1][0] > step:
            files.pop()[1].unlink()
        if not files:
            return 0
        first, path = files[-1]
        tokens = _read_file(path, self._shape)
        kept = min(len(tokens), step + 1 - first)
        if kept < len(tokens):
            self._write(first, tokens[:kept])
        return first + kept - 1

    def _write(self, first: int, tokens: np.ndarray) -> None:
        replace_file(self._dir / f"{first:09}.npy", lambda file: np.save(file, tokens))


@dataclasses.dataclass(frozen=True)
class RecordedLoads:
    """steps: [N], ascending. tokens_NLE: NOT_THERE where an expert is not. num_experts: before any prune."""

    steps: np.ndarray
    tokens_NLE: np.ndarray
    num_experts: tuple[int, ...]
    expert_parallel: int


def read_loads(run_dir: Path, after: int = 0) -> RecordedLoads:
    """What a run has saved of the steps after `after`; `UserError` naming the file that does not read."""
    folder = run_dir / FOLDER
    num_experts, expert_parallel = _read_experts(folder / EXPERTS_FILE)
    shape = len(num_experts), max(num_experts)
    steps, parts = [np.zeros(0, np.int64)], [np.zeros((0, *shape), np.int32)]
    for (first, path), (following, _) in itertools.pairwise([*_files(folder), (2**62, folder)]):
        if following > after + 1:
            part = _read_file(path, shape)
            require(first + len(part) <= following, f"{path} steps", len(part), f"reach beyond step {following}")
            rows = slice(max(after + 1 - first, 0), None)
            parts.append(part[rows])
            steps.append(np.arange(first, first + len(part))[rows])
    return RecordedLoads(np.concatenate(steps), np.concatenate(parts), num_experts, expert_parallel)


def read_counts_or_run(path: str | os.PathLike[str]) -> tuple[list[np.ndarray], str]:
    """Counts [N, E] of each layer from a file, or from a run by its directory; and of a run, words for which steps."""
    if is_bucket(path) or os.path.isdir(path):  # a name may be too long
        return read_current_counts(path)
    return read_counts(Path(path)), ""


def read_expert_parallel(run_dir: str | os.PathLike[str]) -> int:
    """Devices of the expert axis of a run."""
    with readable(run_dir) as folder:
        return _read_experts(folder / FOLDER / EXPERTS_FILE)[1]


def read_current_counts(run_dir: str | os.PathLike[str]) -> tuple[list[np.ndarray], str]:
    """Counts [N, E] of each layer of a run's model as it now is, and words for where they are from.

    The experts are in the order of their slots, so that a plan by these counts can be applied to the run; the steps are
    those since its last prune. `UserError` where there are none.
    """
    with readable(run_dir) as folder:
        order, pruned_after = initial_lineage(_read_experts(folder / FOLDER / EXPERTS_FILE)[0]), 0
        for record in read_records(folder / METRICS_FILE, '"lineage"'):
            name = f"{run_dir} lineage of step {record['step']}"
            before, order = order, check_lineage(record.get("lineage"), order, name)
            if sum(map(len, order)) < sum(map(len, before)):
                pruned_after = record["step"]
        loads = read_loads(folder, pruned_after)
    since = f"after the prune of step {pruned_after}" if pruned_after else "nothing is pruned yet"
    require(len(loads.steps) > 0, f"{run_dir}: recorded steps", 0, f"({since}): there are no counts to go by")
    counts = [loads.tokens_NLE[:, layer, ids] for layer, ids in enumerate(order)]
    for layer, tokens_NE in enumerate(counts):
        require(bool((tokens_NE >= 0).all()), f"{run_dir} loads of layer {layer}", "", "lack experts that the run has")
    return counts, f"steps {loads.steps[0]} to {loads.steps[-1]} of {run_dir}, {since}"


def check_lineage(value: Any, before: Lineage, name: str) -> Lineage:
    """Per layer the ids of the experts in slot order after a prune, each of them there before it."""
    lists = isinstance(value, list) and len(value) == len(before) and all(isinstance(ids, list) for ids in value)
    require(lists, name, value, f"must be one list for each of {len(before)} layers")
    for ids, old in zip(value, before, strict=True):
        integers = all(type(expert) is int for expert in ids)
        require(integers and 0 < len(ids) == len({*ids} & {*old}), name, ids, "must be experts, each once")
    return tuple(tuple(ids) for ids in value)


def _read_experts(path: Path) -> tuple[tuple[int, ...], int]:
    """The experts of each layer before any prune, and `expert_parallel`."""
    if not path.exists():
        raise UserError(f"{path} does not exist, so {path.parents[1]} is not the directory of a run")
    experts = read_json(path, str(path))
    counts, devices = experts.get("num_experts"), experts.get("expert_parallel", 0)
    counts = tuple(counts) if isinstance(counts, list) else ()
    sound = bool(counts) and all(type(count) is int and 0 < count < 2**20 for count in counts)
    require(sound, f"{path} num_experts", experts.get("num_experts"), "must be the number of experts of each layer")
    sound = type(devices) is int and 0 < devices <= min(counts)
    require(sound, f"{path} expert_parallel", devices, "must be a number of devices of which each has an expert")
    return counts, devices


def _files(folder: Path) -> list[tuple[int, Path]]:
    """The first step of each file, ascending."""
    return sorted((int(path.stem), path) for path in folder.glob("*.npy") if path.stem.isdecimal())


def _read_file(path: Path, shape: tuple[int, int]) -> np.ndarray:
    name = f"{path} (move it away to continue without it)"
    tokens = read_array(path, name, "")
    fits = tokens.dtype == np.int32 and tokens.ndim == 3 and tokens.shape[1:] == shape and len(tokens) > 0
    require(fits, name, f"{tokens.dtype}{list(tokens.shape)}", f"is not int32[steps, {shape[0]}, {shape[1]}]")
    require(bool((tokens >= NOT_THERE).all()), name, int(tokens.min()), "is no number of tokens")
    return tokens
