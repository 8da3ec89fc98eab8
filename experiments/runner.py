"""Runs rows as ordinary training runs, each in a process of its own, and keeps what they end with."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments import processes
from experiments.catalogue import SCORED
from experiments.corpus import PATH, make_corpus
from experiments.derived import DERIVED
from experiments.results import Result, append, find, read_results, result_of
from experiments.rows import Row, base_of, has_branches
from experiments.scores import require_lm_eval, score
from laep_jax.data.command import train_tokenizer
from laep_jax.errors import UserError
from laep_jax.laep.recorded_loads import FOLDER, METRICS_FILE
from laep_jax.launch import FINAL
from laep_jax.sharding import HUGE_PAGES

RESTARTS = 3  # of a row after a crash


class RunFailedError(Exception):
    """A row's run, or lm_eval after it, ended with another exit code than 0; what the run has saved stays."""

    def __init__(self, row: Row, code: int):
        super().__init__(
            f"row {row.name}, seed {row.seed}: its run or its scoring ended with code {code}; started again it goes on"
        )
        self.code = code


class Runner:
    """out: results.jsonl lies there, the runs below `runs`."""

    def __init__(self, out: Path):
        self._out = out
        self._steps, self._seconds = 0, 0.0  # trained since this began

    def missing(self, rows: Sequence[Row]) -> list[Row]:
        """Those without a result, and before each the run it needs where that is not here, in the order to run them."""
        results, ordered = read_results(self._out), list[Row]()
        for row in rows:
            if find(results, row):
                continue
            base = needed(row)
            if base and base not in ordered and not self._is_here(base, results):
                ordered.append(base)
            if row not in ordered:
                ordered.append(row)
        return ordered

    def _is_here(self, base: Row, results: list[Result]) -> bool:
        """Whether a row can branch from this run: a result may have come with the repository, its run does not."""
        return find(results, base) is not None and (self._run_dir(base) / "summary.json").is_file()

    def run(self, rows: Sequence[Row]) -> None:
        """Runs what is missing. `RunFailedError` at the first that does not end well."""
        missing = self.missing(rows)
        if any(row.name in SCORED for row in missing):
            require_lm_eval()
        for index, row in enumerate(missing):
            left = sum(self._length(other) for other in missing[index:])
            about = f", about {left * self._seconds / self._steps / 60:.0f} min left" if self._steps else ""
            print(f"row {index + 1} of {len(missing)}: {row.name}, seed {row.seed}{about}", flush=True)
            start = time.monotonic()
            append(self._out, self._run(row))
            if not has_branches(row):
                shutil.rmtree(self._run_dir(row) / "checkpoints")
            self._steps, self._seconds = self._steps + self._length(row), self._seconds + time.monotonic() - start

    def _length(self, row: Row) -> int:
        """Steps that a row takes of its own."""
        branch = row.prunes and needed(row)
        return row.config.train.num_steps - (branch_step(row) if branch else 0)

    def _run(self, row: Row) -> Result:
        base, run_dir = needed(row), self._run_dir(row)
        _make_corpus(row)
        _make_tokenizer(row)
        if (run_dir / "summary.json").exists() and not (run_dir / "checkpoints").exists():
            shutil.rmtree(run_dir)  # it was complete, and its result is gone
        bindings = row.bindings
        if row.name in DERIVED:
            assert base
            bindings = (*bindings, DERIVED[row.name](row, self._run_dir(base), run_dir.with_suffix(".made")))
        if base and row.prunes and not run_dir.exists():
            branch(self._run_dir(base), run_dir, branch_step(row))
        for restarts_left in reversed(range(RESTARTS + 1)):
            code = _train(row.gin_files, bindings, run_dir, self._out / "runs" / "compiled")
            if code == 0:
                break
            if code in FINAL or not restarts_left:
                raise RunFailedError(row, code)
            print(f"row {row.name}, seed {row.seed}: code {code}; restarts left: {restarts_left}", flush=True)
        return result_of(row, run_dir) | self._scores(row)

    def _scores(self, row: Row) -> Result:
        """What is kept of the scores of a row that has some."""
        if row.name not in SCORED:
            return {}
        try:
            return {"scores": score(self._run_dir(row))}
        except subprocess.CalledProcessError as error:
            raise RunFailedError(row, error.returncode) from error

    def _run_dir(self, row: Row) -> Path:
        return self._out / "runs" / f"{row.name}-{row.seed}-{row.digest}"


def needed(row: Row) -> Row | None:
    """The run whose counts or checkpoint the row needs."""
    return row.named("base") if row.name in DERIVED and not row.prunes else base_of(row)


def branch_step(row: Row) -> int:
    """The last checkpoint of the base run before anything is decided for this row."""
    every, decided = row.config.train.checkpoint_every, row.config.laep.prune_at_step
    assert decided is not None
    return (decided - 1) // every * every


def branch(base_dir: Path, run_dir: Path, step: int) -> None:
    """A run directory that goes on from a checkpoint of another, there as a whole or not at all; empty for step 0."""
    part = run_dir.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    if step:
        if not (base_dir / "checkpoints" / str(step)).is_dir():
            raise UserError(f"{base_dir} has no checkpoint of step {step} to branch from")
        shutil.copytree(base_dir / "checkpoints" / str(step), part / "checkpoints" / str(step))
        shutil.copy2(base_dir / METRICS_FILE, part / METRICS_FILE)
        shutil.copytree(base_dir / FOLDER, part / FOLDER)
    os.replace(part, run_dir)


def _make_corpus(row: Row) -> None:
    """Where a row names it and it is not there."""
    path = Path(PATH)
    if row.config.data.path == PATH and not path.exists():
        part = path.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        make_corpus(part)
        part.rename(path)


def _make_tokenizer(row: Row) -> None:
    """The row's vocabulary, from the training documents of its corpus, where the file is missing."""
    path = Path(row.config.data.tokenizer)
    if row.config.data.tokenizer == "bytes" or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"training the tokenizer {path}", flush=True)
    path.write_text(train_tokenizer(row.config.data, row.config.model.vocab_size).to_str(), encoding="utf-8")


def _train(gin_files: Sequence[Path], bindings: Sequence[str], run_dir: Path, compiled: Path) -> int:
    """The exit code of `python -m laep_jax train`. Programs are kept, since many rows have the same."""
    settings = [f"--gin.{name.strip()}={value.strip()}" for name, value in (b.split("=", 1) for b in bindings)]
    files = [f"--gin_file={file}" for file in gin_files]
    command = [sys.executable, "-m", "laep_jax", "train", *files, *settings, f"--workdir={run_dir}"]
    variables = {"JAX_COMPILATION_CACHE_DIR": str(compiled.absolute())} | HUGE_PAGES
    return processes.run(command, variables)
