"""Processes that restore the checkpoints of runs together, hash the state and save it anew.

python -m tests.training.restoring STEPS TASKS, both JSON; a task is [name, source, target].
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from laep_jax.checkpoint.checkpointer import Checkpoints
from laep_jax.config import Config
from laep_jax.distributed import connect, num_processes
from laep_jax.sharding import make_cpu_devices, make_mesh
from laep_jax.state.tree import abstract_state


def restored(steps: Sequence[int], source: str, target: str) -> dict[str, str]:
    """SHA-256 of every leaf of the steps of a run, as all processes hold it together; saves them anew to `target`."""
    found = {}
    for step in steps:
        with Checkpoints(source, keep=9) as checkpoints:
            meta = checkpoints.read_meta(step)
            config = Config.from_dict(meta["config"]).with_num_experts(tuple(meta["num_experts"]))
            state = checkpoints.restore(step, abstract_state(config, make_mesh(config.mesh)))
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
            array = np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
            sha = hashlib.sha256(f"{array.shape} {array.dtype}".encode() + array.tobytes())
            found[f"{step} {jax.tree_util.keystr(path)}"] = sha.hexdigest()
        with Checkpoints(target, keep=9) as checkpoints:
            checkpoints.save(step, state, {}, meta)
    return found


def main(steps: str, tasks: str) -> None:
    make_cpu_devices(8 // num_processes(), processes=num_processes())
    connect()
    assert (jax.device_count(), jax.process_count()) == (8, num_processes())
    for _, source, target in json.loads(tasks):
        found = restored(json.loads(steps), source, target)
        if jax.process_index() == 0:
            Path(target, "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
