"""`python -m benchmarks prune`: the pause at a prune, part by part.

Real runs of a model of some 80 million parameters on eight emulated devices, pruned on the way: through the checkpoint
with the next steps compiled beside the training, through the checkpoint without (`prune_delay` of 0), and in memory.
Seconds are those that each run logs of itself; every run is a process of its own. Beside it, the same process reads
the files of the checkpoint with NumPy and restores the pruned state from it again, in turns. Both fill new memory that
is held till the end, and the system's file cache is warm for both; the medians are compared.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks.measuring import in_process
from laep_jax.checkpoint.arrays import bytes_needed
from laep_jax.checkpoint.checkpointer import Checkpoints
from laep_jax.config import Config, DataConfig, LaepConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from laep_jax.laep.plan import Plan
from laep_jax.sharding import make_cpu_devices, make_mesh
from laep_jax.state.surgery import pruned_config
from laep_jax.state.tree import abstract_state
from laep_jax.training.start import train

DEVICES = 8
MODEL = ModelConfig(num_layers=3, hidden_size=256, head_dim=64, ffn_size=512, num_experts=64, router_init=0.3)
PLAN_STEP, PRUNE_DELAY, AFTER = 4, 12, 4  # steps until the plan, until the prune, and after it
CHECKPOINT = 10  # a run has saved before it prunes: the first save in a process takes seconds longer
REPETITIONS = 3  # of a read
VARIANTS = {
    "checkpoint": {"prune_via": "checkpoint", "prune_delay": PRUNE_DELAY},
    "checkpoint, compiled in the pause": {"prune_via": "checkpoint", "prune_delay": 0},
    "memory": {"prune_via": "memory", "prune_delay": PRUNE_DELAY},
}
# What each moment of the pause has; of the first step, what it takes longer than the next ones.
MOMENTS = {"at the plan": ("plan", "evaluate"), "at the prune": ("save", "restore", "compile", "first step")}
COLUMNS = [column for moment, parts in MOMENTS.items() for column in (*parts, moment)]


def run(arguments: Sequence[str]) -> dict:
    """`pause_seconds` by part, `step_seconds`, `bytes_read`, `bytes_needed` of the first variant; all in `variants`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks prune", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.parse_args(arguments)
    variants = {name: in_process("benchmarks.prune", name) for name in VARIANTS}
    return variants["checkpoint"] | {"variants": variants}


def _config(variant: str, cache_dir: Path) -> Config:
    laep = LaepConfig(alpha=0.4, beta=0.1, window=PLAN_STEP, prune_at_step=PLAN_STEP, **VARIANTS[variant])
    num_steps = PLAN_STEP + laep.prune_delay + AFTER
    return Config(
        model=MODEL,
        mesh=MeshConfig(fsdp=2, expert=4),
        data=DataConfig(source="synthetic", batch_size=16, cache_dir=str(cache_dir)),
        laep=laep,
        optimizer=OptimizerConfig(warmup_steps=2),
        train=TrainConfig(
            num_steps=num_steps,
            eval_every=PLAN_STEP - 1,
            eval_batches=1,
            checkpoint_every=CHECKPOINT,
            log_every=num_steps,
        ),
    )


def measure(variant: str) -> dict:
    """One run, and the reads of its checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        config = _config(variant, Path(folder) / "tokens")
        run_dir = Path(folder) / "run"
        with contextlib.redirect_stdout(sys.stderr):
            train(config, run_dir)
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        result = _figures(records, config.laep)
        if variant == "checkpoint":
            [prune] = [record for record in records if record["kind"] == "prune"]
            result |= _reads(run_dir, prune, config.resolve(DEVICES))
    return result


def _figures(records: list[dict], laep: LaepConfig) -> dict:
    """What the run has logged: the pause by part, and steps before it, while compiling, and after it."""
    [prune] = [record for record in records if record["kind"] == "prune"]
    seconds = {record["step"]: record["step_seconds"] for record in records if record["kind"] == "train"}
    first = prune["step"] + 1
    after = float(np.median([seconds[step] for step in range(first + 1, max(seconds) + 1)]))
    pause = prune["seconds"] | {"first step": max(seconds[first] - after, 0.0)}
    beside = [seconds[step] for step in range(prune["plan_step"] + 1, first)]
    return {
        "pause_seconds": pause | {name: sum(pause[part] for part in parts) for name, parts in MOMENTS.items()},
        "step_seconds": {
            "before": float(np.median([seconds[step] for step in range(2, prune["plan_step"] + 1)])),
            "beside the compilation": float(np.mean(beside)) if beside else None,
            "after": after,
        },
        "bytes_read": prune.get("bytes_read"),
        "bytes_needed": prune.get("bytes_needed"),
        "parameters": [prune["parameters_before"], prune["parameters_after"]],
    }


def _reads(run_dir: Path, prune: dict, config: Config) -> dict:
    """`restore_rate` and `numpy_rate`, bytes a second."""
    plan = Plan.from_json((run_dir / prune["plan"]).read_text())
    target = abstract_state(pruned_config(config, plan.kept), make_mesh(config.mesh))
    files = [path for path in (run_dir / "checkpoints" / str(prune["step"])).glob("*/state/**/*") if path.is_file()]
    restoring, reading, held = [], [], []
    with Checkpoints(run_dir / "checkpoints", keep=config.train.keep_checkpoints) as checkpoints:
        for _ in range(REPETITIONS):
            start = time.perf_counter()
            arrays = [np.fromfile(path, np.uint8) for path in files]
            reading.append(sum(array.nbytes for array in arrays) / (time.perf_counter() - start))
            start = time.perf_counter()
            state = checkpoints.restore_pruned(prune["step"], target, plan.kept)
            jax.block_until_ready(state)
            restoring.append(bytes_needed(target) / (time.perf_counter() - start))
            held += [arrays, state]
    return {"restore_rate": float(np.median(restoring)), "numpy_rate": float(np.median(reading))}


def table(result: dict) -> str:
    """The figures for people."""
    variants = result["variants"]
    before, after = result["parameters"]
    lines = [
        f"{before / 1e6:.0f} M parameters, {after / 1e6:.0f} M after the prune; seconds",
        f"{'':<36}" + "".join(f"{part:>13}" for part in (*COLUMNS, "a step")),
    ]
    for name, figures in variants.items():
        values = [*(figures["pause_seconds"][column] for column in COLUMNS), figures["step_seconds"]["before"]]
        lines.append(f"{name:<36}" + "".join(f"{value:>13.3f}" for value in values))
    steps = result["step_seconds"]
    read, needed = result["bytes_read"], result["bytes_needed"]
    lines += [
        f"a step beside the compilation takes {steps['beside the compilation']:.3f} s,"
        f" one after the prune {steps['after']:.3f} s",
        f"bytes read / needed: {read / 1e6:,.1f} / {needed / 1e6:,.1f} MB = {read / needed:.4f}",
        f"restoring {result['restore_rate'] / 1e9:.2f} GB/s, NumPy {result['numpy_rate'] / 1e9:.2f} GB/s:"
        f" {result['restore_rate'] / result['numpy_rate']:.2f}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    make_cpu_devices(DEVICES)
    print(json.dumps(measure(sys.argv[1])))
