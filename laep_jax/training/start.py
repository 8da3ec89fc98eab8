"""Starting a run, or resuming one: everything that the training loop needs, opened and checked."""

import contextlib
import datetime
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

import laep_jax
from laep_jax.checkpoint.checkpointer import Checkpoints
from laep_jax.checkpoint.lock import (
    CHECKPOINTS,
    exclusive,
    require_directory,
    require_room,
    require_savable,
    require_writable,
)
from laep_jax.checkpoint.manifest import DamagedError
from laep_jax.checkpoint.saved import peek
from laep_jax.checkpoint.steps import require_checkpoints, require_own
from laep_jax.chips import chip_of
from laep_jax.config import Config
from laep_jax.data.dataset import Dataset, make_dataset
from laep_jax.distributed import raise_on_all_processes
from laep_jax.errors import require
from laep_jax.files import refuse_links, replace_file
from laep_jax.laep.layout import from_arrays
from laep_jax.laep.load import LoadHistory
from laep_jax.laep.recorded_loads import METRICS_FILE
from laep_jax.laep.slots import SlotMap
from laep_jax.laep.stability import history_capacity
from laep_jax.mirror import RECORDS, local_records
from laep_jax.model.attention import attention_kernel
from laep_jax.paths import require_path
from laep_jax.sharding import make_mesh
from laep_jax.state.tree import abstract_state, fits, init_state, initial_maps
from laep_jax.storage import Disk, Storage, open_storage
from laep_jax.switches import require_switches
from laep_jax.tracking.console import RunConsole
from laep_jax.tracking.pause import Pause
from laep_jax.tracking.run_log import NoLog, RunLog
from laep_jax.tracking.services import require_services
from laep_jax.training.executable import load_step
from laep_jax.training.initial import Source, open_source, read_state, require_same_model
from laep_jax.training.loop import train_to_end
from laep_jax.training.preemption import PreemptionGuard
from laep_jax.training.profile import profiling
from laep_jax.training.prune.compile_ahead import make_steps
from laep_jax.training.prune.smaller_model import SmallerModel
from laep_jax.training.prune.transition import finish, restore_survivors, schedule
from laep_jax.training.resume import find_run_state, require_same_run
from laep_jax.training.run_state import RunState
from laep_jax.training.trainer import Model, Trainer, make_controller
from laep_jax.training.watch import Watch, unwatched


def train(
    config: Config,
    run_dir: str | os.PathLike[str],
    *,
    executable: Path | None = None,
    init_from: str | None = None,
    profile_steps: range = range(0),
    watch: Watch = unwatched,
) -> dict:
    """Trains to `config.train.num_steps`, from the newest checkpoint in `run_dir` or from the start.

    init_from: where a new run takes its parameters from (`initial.open_source`). executable: a file of
    `preflight --save`, for the model that the run began with. profile_steps: that process 0 traces into
    `run_dir`/profile, as `laep_jax.training.profile` does. watch: enters the stages of `laep_jax.training.watch`.
    Returns what summary.json holds; a complete run shows its table again and changes no file. `UserError`, before
    anything is compiled or written, where the config does not fit the devices, the corpus, the parameters or the
    checkpoint. `StoppedError` after SIGTERM or Ctrl-C, when the step in flight is done and saved.
    run_dir: a folder that all processes see, or a gs:// address; then records are kept on this machine and go up before
    each checkpoint. With several processes (`laep_jax.distributed`) each calls it alike.
    """
    require_path("run_dir", os.fspath(run_dir), bucket=True)
    run, first = open_storage(run_dir), jax.process_index() == 0
    dataset, state_bytes = open_inputs(config, run)
    records, publish, ended = Path(), _nothing, False
    with contextlib.ExitStack() as stack:
        with raise_on_all_processes():
            if first:
                to_train = _is_to_train(config, run, dataset, init_from)
                require_ours = stack.enter_context(exclusive(run)) if to_train else _nothing
                records, publish = stack.enter_context(local_records(run, require_ours))
                require_checkpoints(run, (records / METRICS_FILE).exists())
                ended = (records / "summary.json").exists()  # perhaps it is only looked at
                if not ended:
                    _require_space(run, state_bytes)
        console = stack.enter_context(_console(config, show=first))
        keep = config.train.keep_checkpoints
        checkpoints = stack.enter_context(
            Checkpoints(run.path(CHECKPOINTS), keep=keep, report=console.event, publish=publish)
        )
        while True:
            try:
                newest = checkpoints.newest_valid()
                saved = checkpoints.read_meta(newest) if newest else None
                where = f"{checkpoints.directory}/{newest}"
                run_state, changed = find_run_state(config, dataset.fingerprint, where, saved, jax.device_count())
                with raise_on_all_processes():
                    source = source_of(init_from, config, run_state)
                if run_state.is_complete(config):
                    return _show_again(records, run_state, console)
                checkpoints.settle()
                base = Config.from_dict(run_state.config)
                with contextlib.ExitStack() as attempt:
                    with raise_on_all_processes():
                        if first and ended:
                            _require_space(run, state_bytes)
                        make_controller(run_state.current(base), run_state, None)  # refuses a plan that does not fit
                        first_step = _first_step(executable, config, base, run_state)
                        log = attempt.enter_context(_open_log(records, base, run_state.step, console))
                    log.write_settings(config, Path(run_dir).absolute().name)
                    _announce(base, run_state, changed, dataset, log, console)
                    preemption = attempt.enter_context(PreemptionGuard(config.train.step_timeout))
                    if source:
                        run_state.summary.init_from = source.description
                        console.event(f"parameters from {source.description}")
                    elif init_from:
                        console.event(f"--init-from is not read: parameters came from {run_state.summary.init_from}")
                    steps, folder = profile_steps if first else range(0), records / "profile"
                    traced = profiling(watch, steps, run_state.step, folder, console.event)
                    rest = (dataset, checkpoints, log, console, attempt.enter_context(traced))
                    trainer = _make_trainer(base, run_state, first_step, source, *rest)
                    return train_to_end(trainer, preemption)
            except DamagedError as error:
                checkpoints.put_aside(error)


def open_inputs(config: Config, run: Storage) -> tuple[Dataset, int]:
    """The corpus, and the bytes of a training state, of a run whose settings fit this machine; else `UserError`."""
    require_switches()
    with raise_on_all_processes():
        if isinstance(run, Disk):
            require_directory(run.root)
            refuse_links(run.root)
        require_savable(run)
        if jax.process_index() == 0:
            require_own(run, (*RECORDS, "loads"))
            require_services(config.train.tracker_names)
        resolved = config.resolve(jax.device_count())
        leaves = jax.tree.leaves(abstract_state(resolved, make_mesh(resolved.mesh)))
        dataset = make_dataset(
            config.data,
            eval_batches=config.train.eval_batches,
            seed=config.train.seed,
            vocab_size=config.model.vocab_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
    require_same_run(config, dataset.fingerprint)
    return dataset, sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def source_of(init_from: str | None, config: Config, run_state: RunState) -> Source | None:
    """What a new run begins with. `UserError` where it does not fit the model; a run that is resumed needs none."""
    if init_from is None:
        return None
    if run_state.step:
        rule = f"comes too late: the run has random parameters, and is at step {run_state.step}; use another workdir"
        require(bool(run_state.summary.init_from), "--init-from", init_from, rule)
        return None
    source = open_source(init_from)
    require_same_model(source, config)
    return source


def _nothing() -> None: ...


def _is_to_train(config: Config, run: Storage, dataset: Dataset, init_from: str | None) -> bool:
    """Whether a start has anything to do in a bucket, where it takes the run over; always on a disk.

    `UserError` where the config does not continue the run, so that a slip does not end the one that trains.
    """
    if isinstance(run, Disk):
        return True
    try:
        newest, meta, _ = peek(run)
    except DamagedError:  # which only the run's owner puts aside
        return True
    where = f"{run.path(CHECKPOINTS)}/{newest}"
    run_state, _ = find_run_state(config, dataset.fingerprint, where, meta, jax.device_count())
    source_of(init_from, config, run_state)
    return not run_state.is_complete(config)


def _require_space(run: Storage, state_bytes: int) -> None:
    require_writable(run)
    if isinstance(run, Disk):
        require_room(run.root, state_bytes)


def _show_again(records: Path, run_state: RunState, console: RunConsole) -> dict:
    """The table of a complete run. Writes summary.json where the run was killed before it could."""
    summary, path = run_state.summary.to_dict(), records / "summary.json"
    if jax.process_index() == 0 and not path.exists():
        replace_file(path, lambda file: file.write(json.dumps(summary, indent=1).encode() + b"\n"))
    console.closing_table(run_state.summary)
    return summary


def _console(config: Config, *, show: bool) -> RunConsole:
    chip = chip_of(jax.devices()[0].device_kind)
    gflops = chip.flops * jax.device_count() / 1e9 if chip else None
    return RunConsole(config.train.num_steps, log_every=config.train.log_every, peak_gflops=gflops, show=show)


def _first_step(
    executable: Path | None, config: Config, base: Config, run_state: RunState
) -> jax.stages.Compiled | None:
    """The step from a file, for the model that the file is made for."""
    if executable is None or run_state.num_experts != config.model.experts_per_layer:
        return None
    return load_step(executable, base, make_mesh(base.mesh))


def _make_trainer(
    base: Config,
    run_state: RunState,
    first_step: jax.stages.Compiled | None,
    source: Source | None,
    dataset: Dataset,
    checkpoints: Checkpoints,
    log: RunLog | NoLog,
    console: RunConsole,
    watch: Watch,
) -> Trainer:
    """With a new model, that of the checkpoint, or the smaller one that the checkpoint's plan leads to."""
    config, step, pending = run_state.current(base), run_state.step, run_state.pending
    mesh = make_mesh(config.mesh)
    rest = (dataset, checkpoints, log, console, run_state, watch)
    if not step:
        steps = make_steps(config, mesh, len(dataset.domains), first_step)
        state = read_state(source, config, mesh) if source else init_state(config, mesh)
        model = Model(config, mesh, state, initial_maps(config), steps)
        run_state.summary.parameters_before = model.size.total
        return Trainer(model, None, *rest)
    again = f"; steps {step + 1} to {log.last_step} are done again" if log.last_step > step else ""
    console.event(f"resuming from step {step}" + (", with a plan to apply" if pending else "") + again)
    history = checkpoints.read_history(step)  # also where the smaller model has no use for it: damage is damage
    if pending and pending.due == step < config.train.num_steps:
        smaller = SmallerModel(pending.plan, step, config, mesh, len(dataset.domains), watch)
        pause = Pause()
        model = restore_survivors(smaller, None, checkpoints, run_state, pause)
        trainer = Trainer(model, None, *rest)
        trainer.pause = pause
        finish(trainer, smaller, model)
        return trainer
    loads = LoadHistory.from_arrays(history, history_capacity(config.laep))
    state = checkpoints.restore(step, abstract_state(config, mesh))
    steps = make_steps(config, mesh, len(dataset.domains), first_step)
    trainer = Trainer(Model(config, mesh, state, initial_maps(config), steps), loads, *rest)
    trainer.model.place(_saved_maps(history, trainer))
    if pending:
        schedule(trainer, pending.plan, pending.made, pending.due)
    return trainer


def _saved_maps(history: Mapping[str, np.ndarray], trainer: Trainer) -> tuple[SlotMap, ...]:
    """Those of the checkpoint; made anew from its loads on another mesh, or with other replica slots."""
    maps = from_arrays(history)
    if fits(maps, trainer.config):
        return maps
    return trainer.controller.new_maps() if len(trainer.controller.history) else initial_maps(trainer.config)


def _open_log(records: Path, base: Config, resume_step: int, console: RunConsole) -> RunLog | NoLog:
    if jax.process_index() > 0:
        return NoLog()
    return RunLog(
        records,
        num_experts=base.model.experts_per_layer,
        expert_parallel=base.mesh.expert or 1,
        resume_step=resume_step,
        report=console.event,
    )


def _announce(
    base: Config,
    run_state: RunState,
    changed: Sequence[str],
    dataset: Dataset,
    log: RunLog | NoLog,
    console: RunConsole,
) -> None:
    """What a person should know before the first step."""
    for line in (f"{dataset.description}; {mesh_text(base)}", schedule_text(base), *dataset.notes):
        console.event(line)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    texts = {"corpus": dataset.description, "devices": mesh_text(base), "machine": machine_text()}
    log.write("start", run_state.step, time=now, **texts)
    if changed:
        console.event(f"changed since the checkpoint: {', '.join(changed)}")
        log.write("settings", run_state.step, changed=changed)


def mesh_text(config: Config) -> str:
    """The devices of a resolved config and what computes its attention, for people."""
    hosts = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    mesh = config.mesh
    return (
        f"{jax.device_count()} {jax.devices()[0].platform} devices{hosts}: "
        f"data {mesh.data}, fsdp {mesh.fsdp}, expert {mesh.expert}; "
        f"attention {attention_kernel(config, jax.devices()[0])}"
    )


def machine_text() -> str:
    """What computes and with which versions, for people."""
    kind = jax.devices()[0].device_kind
    versions = f"Python {platform.python_version()}, JAX {jax.__version__}, laep_jax {laep_jax.__version__}"
    return f"{kind} ({platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores); {versions}"


def schedule_text(config: Config) -> str:
    """How often a run saves and measures, for people."""
    settings, laep = config.train, config.laep
    return (
        f"every {settings.checkpoint_every} steps a checkpoint, every {settings.eval_every} the validation loss, "
        f"every {laep.window} the stability test"
    )
