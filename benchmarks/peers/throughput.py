"""`python -m benchmarks peers`: training throughput beside Hugging Face Transformers and MaxText.

One small model, the same in each: float32, uniformly random bytes, AdamW with clipping by global norm, a decoder
without LFA. Each program runs in a process and, but for laep_jax, in an environment of its own, made by
`benchmarks/peers/install.sh`; they take turns over several rounds. A round's figure is the median of its steps
after the warm-up, a program's figure the median of its rounds. All of them get memory in huge pages, which those
that allocate anew in every step gain from; GLIBC_TUNABLES in the caller's environment overrides that.

A program takes the setting below as JSON, as its only argument, and prints as its last line what it measured:
`seconds` of every step, `parameters` of its model, the `loss` of the last step, its `versions`. The same number
of parameters and a loss that has not left the neighbourhood of ln(vocabulary) say that the same work was done.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks.measuring import random_batch
from laep_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig
from laep_jax.errors import require
from laep_jax.sharding import HUGE_PAGES, make_mesh, put_batch
from laep_jax.state.tree import init_state, initial_layout
from laep_jax.training.step import make_train_step

SCRIPTS = Path(__file__).parent
RESULTS = SCRIPTS.parent / "results"
OWN = [sys.executable, "-m", "benchmarks.peers.throughput"]
MODEL = {
    "vocab_size": 256,
    "num_layers": 4,
    "hidden_size": 256,
    "num_heads": 4,
    "head_dim": 64,
    "ffn_size": 512,
    "num_experts": 16,
    "top_k": 2,
}
BATCH = {"sequence_length": 256, "batch_size": 16}
OPTIMIZER = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0}
WARM_UP = 4  # steps, compilation among them; MaxText's first ones return before they are done
ENVIRONMENT = {"JAX_PLATFORMS": "cpu"} | HUGE_PAGES
NOT_INHERITED = ("XLA_FLAGS", "PJRT_NPROC")  # devices and threads: each has its own default, all cores
LARGEST_LOSS = 2.0  # times that of equal probabilities


@dataclasses.dataclass(frozen=True)
class Program:
    """environment, script: of a peer; options: what its script is told beside the setting.

    steps: of a program so slow that it is measured in the first round only, for so many.
    """

    text: str
    environment: str = ""
    script: str = ""
    options: dict = dataclasses.field(default_factory=dict)
    steps: int | None = None


PROGRAMS = {
    "laep_jax": Program("dropless"),
    "transformers": Program(
        "Mixtral, grouped_mm experts, fused AdamW; dropless", "transformers", "transformers_moe.py"
    ),
    "maxtext": Program("capacity 1.25; drops tokens", "maxtext", "maxtext_moe.py", {"capacity_factor": 1.25}),
    "maxtext_dropless": Program("ragged_dot; dropless", "maxtext", "maxtext_moe.py", {"capacity_factor": None}, 3),
}


def run(arguments: Sequence[str]) -> dict:
    """`tokens_per_second` by program, how they came about, `ratio` of laep_jax to each; `skipped` with reasons."""
    args = _parser().parse_args(arguments)
    require(args.rounds >= 1, "--rounds", args.rounds, "must be at least 1")
    require(args.steps >= 1, "--steps", args.steps, "must be at least 1")
    commands, skipped = _commands(args.environments, args.install)
    measured: dict[str, list[dict]] = {name: [] for name in commands}
    for index in range(args.rounds):
        for name, command in commands.items():
            program = PROGRAMS[name]
            if index == 0 or not program.steps:
                measured[name].append(_measure(name, command, _setting(program.steps or args.steps, program.options)))
                print(f"round {index + 1}, {name}: {_rate(measured[name][-1]):,.0f} tokens/s", file=sys.stderr)
    _require_same_model(measured)
    return _result(measured, skipped)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks peers", description="Training throughput beside Transformers and MaxText."
    )
    parser.add_argument("--install", action="store_true", help="install those peers that are missing; some GB")
    parser.add_argument(
        "--environments",
        type=Path,
        default=SCRIPTS.parent / ".envs",
        metavar="FOLDER",
        help="where the peers are installed (benchmarks/.envs)",
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="in which all take turns (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="measured in a round (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _setting(steps: int, options: dict) -> dict:
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return MODEL | BATCH | OPTIMIZER | {"num_steps": WARM_UP + steps, "threads": threads} | options


def _commands(environments: Path, install: bool) -> tuple[dict[str, list[str]], dict[str, str]]:
    """How each program that is there is started, and why each of the others is skipped, also told at once."""
    commands = {"laep_jax": OWN}
    missing: dict[str, str] = {}  # by environment
    for name in sorted({program.environment for program in PROGRAMS.values() if program.environment}):
        reason = _why_missing(name, environments, install)
        if reason:
            missing[name] = reason
            print(f"{name} is skipped: {reason}", file=sys.stderr)
    for name, program in PROGRAMS.items():
        if program.environment and program.environment not in missing:
            python = environments / program.environment / "bin" / "python"
            commands[name] = [str(python), str(SCRIPTS / program.script)]
    skipped = {name: missing[p.environment] for name, p in PROGRAMS.items() if p.environment in missing}
    return commands, skipped


def _why_missing(peer: str, environments: Path, install: bool) -> str | None:
    """None where `peer` is installed, by now; else the reason in one line."""
    script = SCRIPTS / "install.sh"
    if (environments / peer / "installed.txt").exists():
        return None
    if not install:
        return "not installed; --install does it, and so does benchmarks/peers/install.sh"
    print(f"installing {peer} ...", file=sys.stderr)
    command = ["bash", str(script), peer, str(environments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode == 0:
        return None
    return "could not be installed: " + (done.stdout.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _measure(name: str, command: Sequence[str], setting: dict) -> dict:
    """What one program has measured. `RuntimeError` where it failed or answered something else."""
    environment = {name: value for name, value in (ENVIRONMENT | os.environ).items() if name not in NOT_INHERITED}
    done = subprocess.run([*command, json.dumps(setting)], env=environment, capture_output=True, text=True)
    if done.returncode:
        print(*done.stderr.splitlines()[-20:], sep="\n", file=sys.stderr)
        raise RuntimeError(f"{name} ended with code {done.returncode}; the last it said stands above")
    last = (done.stdout.strip().splitlines() or [""])[-1]
    try:
        report = json.loads(last)
        seconds, loss = report["seconds"], report["loss"]
    except (KeyError, TypeError, ValueError) as error:
        raise RuntimeError(f"{name} has not printed its measurement; its last line: {last!r}") from error
    bound = LARGEST_LOSS * math.log(setting["vocab_size"])
    if len(seconds) != setting["num_steps"] or min(seconds) <= 0 or not 0 < loss < bound:
        raise RuntimeError(f"{name} has not trained as it was told to: loss {loss}, seconds {seconds}")
    return report


def _rate(report: dict) -> float:
    """Tokens per second of a round."""
    return BATCH["sequence_length"] * BATCH["batch_size"] / float(np.median(report["seconds"][WARM_UP:]))


def _require_same_model(measured: dict[str, list[dict]]) -> None:
    parameters = {name: reports[0]["parameters"] for name, reports in measured.items()}
    if len(set(parameters.values())) > 1:
        raise RuntimeError(f"not the same model, by the number of parameters: {parameters}")


def _result(measured: dict[str, list[dict]], skipped: dict[str, str]) -> dict:
    rounds = {name: [_rate(report) for report in reports] for name, reports in measured.items()}
    rates = {name: float(np.median(of_rounds)) for name, of_rounds in rounds.items()}
    return {
        "tokens_per_second": rates,
        "ratio": {name: rates["laep_jax"] / rate for name, rate in rates.items() if name != "laep_jax"},
        "rounds": rounds,
        "seconds": {name: [report["seconds"] for report in reports] for name, reports in measured.items()},
        "parameters": {name: reports[0]["parameters"] for name, reports in measured.items()},
        "loss": {name: reports[0]["loss"] for name, reports in measured.items()},
        "versions": {name: reports[0]["versions"] for name, reports in measured.items()},
        "programs": {name: PROGRAMS[name].text for name in measured},
        "skipped": skipped,
        "setting": MODEL | BATCH | OPTIMIZER | {"warm_up": WARM_UP},
        "machine": {
            "cores": _setting(1, {})["threads"],
            "processor": platform.machine(),
            "system": platform.system(),
            "malloc": (ENVIRONMENT | os.environ)["GLIBC_TUNABLES"],
        },
    }


def table(result: dict) -> str:
    """The figures for people."""
    setting = result["setting"]
    lines = [
        f"{setting['num_layers']} layers, hidden {setting['hidden_size']}, {setting['num_experts']} experts, top "
        f"{setting['top_k']}, ffn {setting['ffn_size']}; {setting['batch_size']} x {setting['sequence_length']} tokens "
        f"a step; {result['parameters']['laep_jax']:,} parameters; {result['machine']['cores']} cores",
        f"{'':<18}{'tokens/s':>9}{'rounds':>17}{'laep_jax is':>14}",
    ]
    for name, rate in result["tokens_per_second"].items():
        of_rounds = result["rounds"][name]
        spread = f"{min(of_rounds):,.0f}-{max(of_rounds):,.0f}" if len(of_rounds) > 1 else "one"
        ratio = f"x {result['ratio'][name]:.2f}" if name in result["ratio"] else ""
        lines.append(f"{name:<18}{rate:>9,.0f}{spread:>17}{ratio:>14}   {result['programs'][name]}")
    return "\n".join([*lines, *(f"{name:<18}skipped: {reason}" for name, reason in result["skipped"].items())])


def train(setting: dict) -> dict:
    """What laep_jax measures of itself, on one device: the package's own train step on batches from the host."""
    config = Config(
        model=ModelConfig(**{name: setting[name] for name in MODEL}, lfa=False),
        mesh=MeshConfig(fsdp=1, expert=1),
        data=DataConfig(**{name: setting[name] for name in BATCH}),
        optimizer=OptimizerConfig(**{name: setting[name] for name in OPTIMIZER}),
    ).resolve(1)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state, step = init_state(config, mesh), make_train_step(config, mesh)
    rng = np.random.default_rng(0)
    seconds, loss = [], 0.0
    for _ in range(setting["num_steps"]):
        start = time.perf_counter()
        batch = random_batch(rng, *(setting[name] for name in ("vocab_size", "batch_size", "sequence_length")))
        state, metrics = jax.block_until_ready(step(state, initial_layout(config), put_batch(batch, mesh)))
        seconds.append(time.perf_counter() - start)
        loss = float(metrics["loss"])
    return {
        "seconds": seconds,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "loss": loss,
        "versions": {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in ("jax", "flax")},
    }


if __name__ == "__main__":
    print(json.dumps(train(json.loads(sys.argv[1]))))
