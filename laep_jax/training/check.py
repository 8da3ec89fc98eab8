"""`train.py --check`: everything that a run refuses, without the run."""

import os
from pathlib import Path

import jax

from laep_jax.checkpoint.lock import CHECKPOINTS, require_room
from laep_jax.checkpoint.saved import peek
from laep_jax.checkpoint.steps import require_checkpoints
from laep_jax.config import Config
from laep_jax.distributed import raise_on_all_processes
from laep_jax.laep.recorded_loads import METRICS_FILE
from laep_jax.sharding import make_mesh
from laep_jax.storage import Disk, open_storage
from laep_jax.training.executable import load_step
from laep_jax.training.resume import find_run_state
from laep_jax.training.start import mesh_text, open_inputs, schedule_text, source_of
from laep_jax.training.trainer import make_controller


def check(
    config: Config, run_dir: str | os.PathLike[str], executable: Path | None = None, init_from: str | None = None
) -> list[str]:
    """Lines on the run that `train` would start or resume; nothing is compiled, or written to `run_dir`.

    `UserError` where `train` would refuse the config, the devices, the corpus, the plan, the newest checkpoint or the
    room. Whether the checkpoint's arrays are as they were saved, only restoring tells.
    """
    run = open_storage(run_dir)
    dataset, state_bytes = open_inputs(config, run)
    with raise_on_all_processes():
        require_checkpoints(run, METRICS_FILE in run.entries())
        if isinstance(run, Disk):
            require_room(next(path for path in (run.root, *run.root.parents) if path.exists()), state_bytes)
        newest, meta, damaged = peek(run)
        where = f"{run.path(CHECKPOINTS)}/{newest}"
        run_state, changed = find_run_state(config, dataset.fingerprint, where, meta, jax.device_count())
        current = run_state.current(Config.from_dict(run_state.config))
        make_controller(current, run_state, None)
        source = source_of(init_from, config, run_state)
        if executable:
            load_step(executable, current, make_mesh(current.mesh))
    what = "is complete" if run_state.is_complete(config) else f"resumes from step {newest}" if newest else "starts"
    lines = [f"{dataset.description}; {mesh_text(current)}", schedule_text(current), *damaged]
    origin = source.description if source else run_state.summary.init_from
    lines += [f"parameters from {origin}"] if origin else []
    lines += [f"changed since the checkpoint: {', '.join(changed)}"] if changed else []
    return [*lines, f"{run_dir}: the run {what}; nothing was trained"]
