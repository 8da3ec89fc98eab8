"""Starting a run, or going on with one: everything that the training loop needs, opened and checked."""

import contextlib
import json
import os
from pathlib import Path

import jax

from laep_jax.chips import peak_flops
from laep_jax.config import Config
from laep_jax.data.dataset import Dataset, make_dataset
from laep_jax.hosts import refused_together
from laep_jax.sharding import make_mesh
from laep_jax.training.checkpoint import Checkpoints
from laep_jax.training.console import RunConsole
from laep_jax.training.executable import load_step
from laep_jax.training.loop import Run
from laep_jax.training.resume import find_progress, require_same_run
from laep_jax.training.runlog import NoLog, RunLog
from laep_jax.training.stops import Stops


def train(
    config: Config, run_dir: str | os.PathLike[str], *, settings: str = "", executable: Path | None = None
) -> dict:
    """Trains to `config.train.num_steps`, from the newest checkpoint in `run_dir` or from the start.

    settings: text for `operative.gin`. executable: a file of `preflight --save`, for the model that the run began
    with. Returns what summary.json holds. `UserError`, before anything
    is compiled or written, where the config does not fit the devices, the corpus or the checkpoint.
    `StoppedError` after SIGTERM or Ctrl-C, when the step in flight is done and saved.
    With several processes (`laep_jax.hosts`) each calls it alike; `run_dir` is one that all see.
    """
    run_dir, first = Path(run_dir), jax.process_index() == 0
    with refused_together():
        resolved = config.resolve(jax.device_count())
        dataset = _open_dataset(config)
    require_same_run(config, dataset.fingerprint)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(run_dir / "checkpoints", keep=config.train.keep_checkpoints))
        latest = checkpoints.latest()
        with refused_together():
            progress = find_progress(resolved, dataset.fingerprint, checkpoints, latest)
            first_step = None
            if executable and progress.num_experts == config.model.experts_per_layer:
                first_step = load_step(executable, resolved, make_mesh(resolved.mesh))
            resolved = progress.current(config).resolve(jax.device_count())
            experts, expert_parallel = config.model.experts_per_layer, resolved.mesh.expert or 1
            log = NoLog()
            if first:
                log = stack.enter_context(
                    RunLog(run_dir, num_experts=experts, expert_parallel=expert_parallel, resume_step=progress.step)
                )
        peak = peak_flops(jax.devices()[0].device_kind)
        console = stack.enter_context(
            RunConsole(
                config.train.num_steps,
                log_every=config.train.log_every,
                peak_gflops=peak and peak * jax.device_count() / 1e9,
                show=first,
            )
        )
        log.write_file("config.json", json.dumps(config.to_dict(), indent=1) + "\n")
        log.write_file("operative.gin", settings)
        console.event(_opening_line(resolved, dataset))
        run = Run(resolved, dataset, checkpoints, log, console, progress, first_step)
        return run.train(stack.enter_context(Stops(config.train.step_timeout)))


def _open_dataset(config: Config) -> Dataset:
    return make_dataset(
        config.data,
        seed=config.train.seed,
        vocab_size=config.model.vocab_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _opening_line(config: Config, dataset: Dataset) -> str:
    hosts = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return (
        f"{dataset.description}; {jax.device_count()} {jax.devices()[0].platform} devices{hosts}: "
        f"data {config.mesh.data}, fsdp {config.mesh.fsdp}, expert {config.mesh.expert}"
    )
