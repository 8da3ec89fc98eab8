"""Runs small enough to be made again and again: their config, and all that they end with."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from laep_jax.checkpoint.checkpointer import Checkpoints
from laep_jax.config import Config, DataConfig, LaepConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from laep_jax.files import read_records
from laep_jax.laep.recorded_loads import read_loads
from laep_jax.mirror import readable
from laep_jax.sharding import make_mesh
from laep_jax.state.tree import abstract_state
from laep_jax.storage import Storage, open_storage


def tiny_config(cache_dir: str, **parts: dict[str, Any]) -> Config:
    """Two layers of eight experts on eight devices; parts: fields that differ or are added, as for `change`."""
    config = Config(
        model=ModelConfig(
            num_layers=2, hidden_size=16, num_heads=4, head_dim=4, ffn_size=8, num_experts=8, router_init=1.0
        ),
        mesh=MeshConfig(fsdp=2, expert=4),
        data=DataConfig(source="synthetic", sequence_length=32, batch_size=16, cache_dir=cache_dir),
        laep=LaepConfig(alpha=1.2, beta=0.6, window=4, rebalance_every=3),
        optimizer=OptimizerConfig(warmup_steps=2),
        train=TrainConfig(eval_batches=1, keep_checkpoints=9),
    )
    return change(config, **parts)


def change(config: Config, **parts: dict[str, Any]) -> Config:
    """The config with fields of its parts changed: `laep={"window": 3}`."""
    changed = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in parts.items()}
    return dataclasses.replace(config, **changed)


def records(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """What a run has told, or what of that kind, in its order."""
    return [record for record in read_records(run_dir / "metrics.jsonl") if kind in (None, record["kind"])]


def timeless(fields: dict[str, Any]) -> dict[str, Any]:
    """Without what depends on the clock, and on how often the run was interrupted."""
    return {name: value for name, value in fields.items() if "second" not in name and "bytes" not in name}


def end_of_run(run_dir: Path | str) -> dict[str, bytes]:
    """All that a complete run ends with but for times, by name: its last checkpoint, loads and records."""
    with Checkpoints(f"{run_dir}/checkpoints", keep=9) as checkpoints:
        step = steps_on_disk(run_dir)[-1]
        meta = checkpoints.read_meta(step)
        config = Config.from_dict(meta["config"]).with_num_experts(tuple(meta["num_experts"]))
        assert step == config.train.num_steps, step
        state = checkpoints.restore(step, abstract_state(config, make_mesh(config.mesh)))
        leaves = jax.tree_util.tree_flatten_with_path(state)[0]
        arrays = {f"state {jax.tree_util.keystr(path)}": leaf for path, leaf in leaves}
        arrays |= {f"history {name}": array for name, array in checkpoints.read_history(step).items()}
    told: dict[str, Any] = {
        "summary": timeless(meta["summary"]),
        "lineage": meta["lineage"],
        "retries": meta["retries"],
    }
    with readable(run_dir) as folder:
        arrays |= {f"loads {name}": value for name, value in vars(read_loads(folder)).items()}
        for record in map(timeless, [record for record in records(folder) if record["kind"] != "start"]):
            told.setdefault(f"{record['kind']} records", []).append(record)
    return {name: np.asarray(array).tobytes() for name, array in arrays.items()} | {
        name: json.dumps(value, sort_keys=True).encode() for name, value in told.items()
    }


def steps_on_disk(run_dir: Path | str) -> list[int]:
    """Of the checkpoints that are complete, on disk or in a bucket."""
    return complete_steps(open_storage(f"{run_dir}/checkpoints"))


def complete_steps(checkpoints: Storage) -> list[int]:
    """Those with a manifest."""
    return sorted(int(name.partition("/")[0]) for name in checkpoints.files("") if name.endswith("/manifest.json"))


def differences(got: Path | str, want: Path | str) -> list[str]:
    """Names of all that two runs do not end with alike."""
    a, b = end_of_run(got), end_of_run(want)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
