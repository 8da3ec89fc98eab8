"""What a run leaves for people to read: its records, settings and recorded loads.

Every record goes to each tracker: metrics.jsonl, TensorBoard, and the services that `TrainConfig.trackers` names.

docs/run_directory.md describes them. One process of a run writes. After an interruption the files resume as if there
had been none: what lies behind the step of the checkpoint is dropped, what its own step writes again replaces the first
writing. Where they cannot be written the run continues, and what is missing is tried again.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from laep_jax.config import Config
from laep_jax.files import replace_file
from laep_jax.gin_config import operative_config
from laep_jax.laep.recorded_loads import FOLDER, METRICS_FILE, LoadsWriter
from laep_jax.tracking.growing_file import Attempts
from laep_jax.tracking.metrics_file import MetricsFile
from laep_jax.tracking.services import FILE, new_id, open_service, read_ids
from laep_jax.tracking.tensorboard import EventFile
from laep_jax.tracking.tracker import MAX_ENTRIES, Tracker


class RunLog:
    """The readable records of one run; a context manager that closes its files.

    run_dir: made if missing. num_experts: experts of each layer before any prune. resume_step: the
    step of the checkpoint the run resumes from; 0 is a new run and drops what an earlier one left. report: shows a
    line on what could not be written. last_step: the last one recorded before an interruption. `UserError` where what
    is there belongs to another model or does not read.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        num_experts: tuple[int, ...],
        expert_parallel: int,
        resume_step: int = 0,
        report: Callable[[str], None] = print,
    ):
        self._dir = Path(run_dir)
        self._dir.mkdir(parents=True, exist_ok=True)
        self._report = report
        self._attempt = Attempts(report)
        self._files: dict[Path, bytes] = {}  # that are still to be written
        self._shortened: set[str] = set()  # fields of which TensorBoard does not get everything
        self._resume_step, self._histogram_every = resume_step, 0
        self._ids = read_ids(self._dir / FILE) if resume_step else {}
        self._loads = LoadsWriter(self._dir, num_experts, expert_parallel, resume_step)
        if (last := self._loads.last_saved) < resume_step:
            report(f"{self._dir / FOLDER}: the loads of steps {last + 1} to {resume_step} are missing")
        self._metrics = MetricsFile(self._dir / METRICS_FILE, resume_step, self._attempt)
        if not self._metrics.is_complete:
            report(f"{self._dir / METRICS_FILE}: the records of step {resume_step} are missing, perhaps of others too")
        self.last_step = self._metrics.last_step
        purge_step = resume_step + 1 if resume_step else 0
        self._events = EventFile(self._dir / "tensorboard", purge_step, self._attempt)
        self._trackers: list[Tracker] = [self._metrics, self._events]

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def write(self, kind: str, step: int, **fields: Any) -> None:
        """Appends one record to metrics.jsonl, and its numbers to the other trackers. Steps do not descend.

        fields: numbers, text, None, and lists, dictionaries and arrays of these. What is not finite
        becomes null. A record that the resumed step had written before the interruption is replaced.
        """
        values = {name: plain(value) for name, value in fields.items()}
        for tracker in self._trackers:
            tracker.log(int(step), {"kind": kind} | values)
        for name, value in values.items():
            if isinstance(value, dict) and len(value) > MAX_ENTRIES and name not in self._shortened:
                self._shortened.add(name)
                self._report(f"TensorBoard gets {MAX_ENTRIES} of {len(value):,} {name}; {METRICS_FILE} has them all")

    def write_file(self, name: str, text: str) -> None:
        """Puts a file into the run directory, whole or not at all."""
        self._files[self._dir / name] = text.encode(errors="surrogateescape")
        self._write_files()

    def write_settings(self, config: Config, run_name: str) -> None:
        """Writes config.json and operative.gin, and gives the settings to TensorBoard and to the services.

        From here on the services of `config.train.trackers`, which show `run_name`, get every record that they do not
        have, and TensorBoard a histogram of the loads each `config.laep.window` steps.
        """
        self.write_file("config.json", json.dumps(config.to_dict(), indent=1) + "\n")
        self.write_file("operative.gin", operative_config(config))
        self._events.text(self._resume_step, "settings/operative.gin", operative_config(config))
        self._histogram_every = config.laep.window
        for name in config.train.tracker_names:
            id = self._ids.setdefault(name, new_id())
            self.write_file(FILE, json.dumps(self._ids, indent=1) + "\n")
            self._trackers.append(open_service(name, self._dir, run_name, id, config.to_dict(), self._report))

    def record_counts(
        self, step: int, tokens_per_expert: Sequence[np.ndarray], lineage: Sequence[Sequence[int]]
    ) -> None:
        """Keeps one step's tokens per expert, for `save` to write, and shows TensorBoard those of some steps.

        tokens_per_expert: per layer the tokens of each slot, over all devices. lineage: per layer
        the original id of each slot. No step is left out.
        """
        self._loads.record(step, tokens_per_expert, lineage)
        if self._histogram_every and step % self._histogram_every == 0:
            self._events.histograms(step, tokens_per_expert)

    def save(self) -> None:
        """Brings everything to disk, the recorded loads too. Due before every checkpoint and at the end."""
        self._attempt(self._dir / FOLDER, self._loads.save)
        self._metrics.sync()
        self._write_files()

    def close(self) -> None:
        """Closes every file; does not save the loads."""
        self._write_files()
        for tracker in self._trackers:
            tracker.close()
        self._attempt.report_missing()

    def _write_files(self) -> None:
        for path, content in list(self._files.items()):
            if self._attempt(path, lambda path=path, content=content: _replace(path, content)):
                del self._files[path]


class NoLog:
    """The log of every process but the first: the same methods, and nothing comes of them."""

    last_step = 0

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *exception) -> None: ...

    def write(self, kind: str, step: int, **fields: Any) -> None: ...

    def write_file(self, name: str, text: str) -> None: ...

    def write_settings(self, config: Config, run_name: str) -> None: ...

    def record_counts(self, step: int, tokens_per_expert: Sequence, lineage: Sequence) -> None: ...

    def save(self) -> None: ...


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    replace_file(path, lambda file: file.write(content))


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
