"""What a run leaves for people to read: metrics.jsonl, TensorBoard event files and loads.npz.

The loads are those of paper section 3.1 and Figure 1: every recorded count, kept under the expert's
id in the model the run began with, so that a prune changes neither columns nor their meaning. One
process of a run writes. After an interruption the files go on as if there had been none: what lies
behind the step of the checkpoint is dropped, what its own step writes again replaces the first writing.

Letters: N recorded steps, L layers, E experts of the original model (of its widest layer).
"""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from tensorboardX import SummaryWriter

from laep_jax.errors import require
from laep_jax.files import read_arrays, read_records
from laep_jax.laep.load import ABSENT, ALIVE, check_loads

METRICS_FILE = "metrics.jsonl"
LOADS_FILE = "loads.npz"


class RunLog:
    """The readable records of one run; a context manager that closes its files.

    run_dir: made if missing. num_experts: experts of each layer before any prune. resume_step: the
    step of the checkpoint the run goes on from; 0 is a new run and drops what an earlier one left.
    `UserError` where what is there belongs to another model or does not read.

    Written to loads.npz, by original expert id: `steps` int64 [N], `tokens_per_expert` int64
    [N, L, E] (0 where pruned), `pruned_at` int64 [L, E] (the last step before the expert went, -1 if
    it is there, -2 if it never was) and `expert_parallel`.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        num_experts: tuple[int, ...],
        expert_parallel: int,
        resume_step: int = 0,
    ):
        self._dir = Path(run_dir)
        self._dir.mkdir(parents=True, exist_ok=True)
        self._expert_parallel = expert_parallel
        self._resume_step = resume_step
        self._steps: list[int] = []
        self._tokens_LE: list[np.ndarray] = []
        widths = np.array(num_experts)[:, None]
        self._pruned_at_LE = np.where(np.arange(max(num_experts)) < widths, ALIVE, ABSENT).astype(np.int64)
        if not resume_step:
            (self._dir / LOADS_FILE).unlink(missing_ok=True)
        elif (self._dir / LOADS_FILE).exists():
            self._read_loads()
        path = self._dir / METRICS_FILE
        records = read_records(path) if resume_step and path.exists() else []
        records = [record for record in records if record["step"] <= resume_step]
        self._rewritable = {_identity(record) for record in records if record["step"] == resume_step}
        self._metrics = self._start_metrics(records)
        self._tensorboard = self._start_tensorboard(resume_step + 1 if resume_step else 0)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def write(self, kind: str, step: int, **fields: Any) -> None:
        """Appends one record to metrics.jsonl and its numbers to TensorBoard.

        fields: numbers, text, None, and lists, dictionaries and arrays of these. What is not finite
        becomes null. A record that the resumed step had written before the interruption is replaced.
        """
        record = {"kind": kind, "step": int(step)} | {name: plain(value) for name, value in fields.items()}
        if _identity(record) in self._rewritable:
            self._rewritable.remove(_identity(record))
            self._metrics.close()
            records = read_records(self._dir / METRICS_FILE)
            self._metrics = self._start_metrics([r for r in records if _identity(r) != _identity(record)])
        self._metrics.write(_line(record))
        self._metrics.flush()
        for tag, value in _scalars(kind, {name: record[name] for name in fields}):
            self._tensorboard.add_scalar(tag, value, step)

    def write_file(self, name: str, text: str) -> None:
        """Puts a file into the run directory, whole or not at all."""
        path = self._dir / name
        path.parent.mkdir(exist_ok=True)
        _replace(path, lambda file: file.write(text.encode()))

    def record_counts(
        self, step: int, tokens_per_expert: Sequence[np.ndarray], lineage: Sequence[Sequence[int]]
    ) -> None:
        """Keeps one step's tokens per expert, for `save_loads` to write.

        tokens_per_expert: per layer the tokens of each slot, over all devices. lineage: per layer
        the original id of each slot. Steps ascend; the resumed step may come once more.
        """
        row_LE = np.zeros_like(self._pruned_at_LE)
        for layer, (tokens, ids) in enumerate(zip(tokens_per_expert, lineage, strict=True)):
            assert len(tokens) == len(ids), (layer, len(tokens), len(ids))
            row_LE[layer, list(ids)] = np.asarray(tokens)
        if self._steps and self._steps[-1] == step:
            self._tokens_LE[-1] = row_LE
            return
        assert not self._steps or step > self._steps[-1], (step, self._steps[-1])
        self._steps.append(int(step))
        self._tokens_LE.append(row_LE)

    def mark_pruned(self, step: int, layer: int, ids: Sequence[int]) -> None:
        """Notes that the experts with these original ids, and no others of the layer, went after `step`."""
        pruned_at_E = self._pruned_at_LE[layer]
        pruned_at_E[pruned_at_E == step] = ALIVE
        pruned_at_E[list(ids)] = step

    def save_loads(self) -> None:
        """Writes loads.npz, whole or not at all. Due before every checkpoint and at the end."""
        tokens_NLE = np.zeros((len(self._steps), *self._pruned_at_LE.shape), np.int64)
        if self._tokens_LE:
            np.stack(self._tokens_LE, out=tokens_NLE)
        arrays = {
            "steps": np.array(self._steps, np.int64),
            "tokens_per_expert": tokens_NLE,
            "pruned_at": self._pruned_at_LE,
            "expert_parallel": np.int64(self._expert_parallel),
        }
        _replace(self._dir / LOADS_FILE, lambda file: np.savez(file, **arrays))

    def close(self) -> None:
        """Flushes and closes every file; does not save the loads."""
        self._metrics.close()
        self._tensorboard.close()

    def _start_metrics(self, records: list[dict]) -> IO[str]:
        """Puts these records in metrics.jsonl's place and opens it behind them."""
        path = self._dir / METRICS_FILE
        _replace(path, lambda file: file.writelines(_line(record).encode() for record in records))
        return path.open("a", encoding="utf-8")

    def _start_tensorboard(self, purge_step: int) -> SummaryWriter:
        """Event files that hide what earlier ones hold from `purge_step` on."""
        suffix = f".{time.time_ns()}"  # its own name has seconds only, and opens to overwrite
        return SummaryWriter(str(self._dir / "tensorboard"), purge_step=purge_step, filename_suffix=suffix)

    def _read_loads(self) -> None:
        """Takes over the rows and prune marks up to the resumed step."""
        path = self._dir / LOADS_FILE
        keys = ("steps", "tokens_per_expert", "pruned_at")
        steps, tokens_NLE, pruned_at_LE = read_arrays(path, f"{path} (move it away to go on without it)", keys).values()
        check_loads(str(path), steps, tokens_NLE, pruned_at_LE)
        same = np.array_equal(pruned_at_LE == ABSENT, self._pruned_at_LE == ABSENT)
        shape = self._pruned_at_LE.shape
        require(same, f"{path} [layers, experts]", pruned_at_LE.shape, f"does not fit the run's model, {shape}")
        kept = steps <= self._resume_step
        self._steps = steps[kept].tolist()
        self._tokens_LE = list(tokens_NLE[kept])
        self._pruned_at_LE = np.where(pruned_at_LE > self._resume_step, ALIVE, pruned_at_LE)


class NoLog:
    """The log of every process but the first: the same methods, and nothing comes of them."""

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *exception) -> None: ...

    def write(self, kind: str, step: int, **fields: Any) -> None: ...

    def write_file(self, name: str, text: str) -> None: ...

    def record_counts(self, step: int, tokens_per_expert: Sequence, lineage: Sequence) -> None: ...

    def mark_pruned(self, step: int, layer: int, ids: Sequence[int]) -> None: ...

    def save_loads(self) -> None: ...


def _identity(record: dict) -> tuple:
    return record["kind"], record["step"], record.get("when")


def _line(record: dict) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _replace(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file beside `path`, brings it to disk and puts it in its place."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    with part.open("xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def plain(value: Any) -> Any:
    """The value as JSON has it: arrays as lists, NumPy's numbers as Python's, not finite as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return plain(np.asarray(value).tolist())


def _scalars(tag: str, value: Any) -> list[tuple[str, float]]:
    """TensorBoard's view of a field: a number as it is, per-layer numbers as least, mean and largest."""
    if isinstance(value, dict):
        return [scalar for name, item in value.items() for scalar in _scalars(f"{tag}/{name}", item)]
    if isinstance(value, list):
        numbers = [item for item in value if isinstance(item, (int, float))]
        if not numbers:
            return []
        return [(f"{tag}/{name}", float(of(numbers))) for name, of in (("min", min), ("mean", np.mean), ("max", max))]
    if isinstance(value, (int, float)):
        return [(tag, float(value))]
    return []
