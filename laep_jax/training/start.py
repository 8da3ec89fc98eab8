"""Starting a run, or going on with one: everything that the training loop needs, opened and checked."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from laep_jax.chips import peak_flops
from laep_jax.config import Config
from laep_jax.data.dataset import Dataset, make_dataset
from laep_jax.files import refuse_links
from laep_jax.hosts import refused_together
from laep_jax.sharding import make_mesh
from laep_jax.switches import require_switches
from laep_jax.training.checkpoint import Checkpoints
from laep_jax.training.console import RunConsole
from laep_jax.training.controller import Controller
from laep_jax.training.exclusive import exclusive, require_room
from laep_jax.training.executable import load_step
from laep_jax.training.loop import train_to_end
from laep_jax.training.manifest import DamagedError
from laep_jax.training.resume import Progress, find_progress, require_same_run
from laep_jax.training.run import Run
from laep_jax.training.runlog import NoLog, RunLog
from laep_jax.training.state import abstract_state
from laep_jax.training.stops import Stops


def train(
    config: Config,
    run_dir: str | os.PathLike[str],
    *,
    settings: str = "",
    executable: Path | None = None,
    check: bool = False,
) -> dict:
    """Trains to `config.train.num_steps`, from the newest checkpoint in `run_dir` or from the start.

    settings: text for `operative.gin`. executable: a file of `preflight --save`, for the model that the run began
    with. check: ends before anything is written. Returns what summary.json holds. `UserError`, before anything
    is compiled or written, where the config does not fit the devices, the corpus or the checkpoint.
    `StoppedError` after SIGTERM or Ctrl-C, when the step in flight is done and saved.
    With several processes (`laep_jax.hosts`) each calls it alike; `run_dir` is one that all see.
    """
    require_switches()
    run_dir, first = Path(run_dir), jax.process_index() == 0
    with refused_together():
        refuse_links(run_dir)
        resolved = config.resolve(jax.device_count())
        mesh = make_mesh(resolved.mesh)
        dataset = _open_dataset(config)
    require_same_run(config, dataset.fingerprint)
    if check:
        return {}
    peak = peak_flops(jax.devices()[0].device_kind)
    with contextlib.ExitStack() as stack:
        with refused_together():
            if first:
                stack.enter_context(exclusive(run_dir))
                leaves = jax.tree.leaves(abstract_state(resolved, mesh))
                require_room(run_dir, sum(leaf.size * leaf.dtype.itemsize for leaf in leaves))
        console = stack.enter_context(
            RunConsole(
                config.train.num_steps,
                log_every=config.train.log_every,
                peak_gflops=peak and peak * jax.device_count() / 1e9,
                show=first,
            )
        )
        keep = config.train.keep_checkpoints
        checkpoints = stack.enter_context(Checkpoints(run_dir / "checkpoints", keep=keep, report=console.event))
        while True:
            try:
                newest = checkpoints.newest_valid()
                progress, changed = find_progress(resolved, dataset.fingerprint, checkpoints, newest)
                with contextlib.ExitStack() as attempt:
                    with refused_together():
                        first_step = None
                        if executable and progress.num_experts == config.model.experts_per_layer:
                            first_step = load_step(executable, resolved, mesh)
                        current = progress.current(config).resolve(jax.device_count())
                        Controller(current, prunes=progress.prunes)  # refuses a plan that does not fit
                        log = attempt.enter_context(_opened_log(run_dir, config, current, progress))
                    log.write_file("config.json", json.dumps(config.to_dict(), indent=1) + "\n")
                    log.write_file("operative.gin", settings)
                    console.event(_opening_line(current, dataset))
                    if changed:
                        console.event(f"changed since the checkpoint: {', '.join(changed)}")
                    base = dataclasses.replace(config, mesh=current.mesh)
                    run = Run(base, dataset, checkpoints, log, console, progress, first_step)
                    return train_to_end(run, attempt.enter_context(Stops(config.train.step_timeout)))
            except DamagedError as error:
                checkpoints.put_aside(error)


@contextlib.contextmanager
def _opened_log(run_dir: Path, config: Config, current: Config, progress: Progress) -> Iterator[RunLog | NoLog]:
    if jax.process_index() > 0:
        yield NoLog()
        return
    experts, expert_parallel = config.model.experts_per_layer, current.mesh.expert or 1
    with RunLog(run_dir, num_experts=experts, expert_parallel=expert_parallel, resume_step=progress.step) as log:
        yield log


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
