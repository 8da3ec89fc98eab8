"""`python -m benchmarks memory`: temporaries of the compiled step by the size of its receive buffer.

The train step of a small model on eight emulated devices, all expert-parallel, with the ragged all-to-all: with
room for every row of the group, with room for the most loaded device of skewed loads and 10 % (more goes in parts,
dropping nothing), and both again after the prune that these loads ask for. Bytes are of one device, from XLA's
`memory_analysis`; nothing is executed.
"""

import argparse
import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from laep_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from laep_jax.laep.balance import device_loads, imbalance
from laep_jax.laep.plan import make_plan
from laep_jax.laep.rule import PruneRule
from laep_jax.preflight.compiling import compile_step
from laep_jax.sharding import make_cpu_devices
from laep_jax.state.surgery import pruned_config, with_receive_buffer

DEVICES = 8
CONFIG = Config(
    model=ModelConfig(
        hidden_size=256,
        head_dim=64,
        ffn_size=512,
        num_experts=64,
        remat="full",
        dispatch="ragged_all_to_all",
        receive_buffer=1.0,  # fitted below
    ),
    mesh=MeshConfig(fsdp=1, expert=DEVICES),
    data=DataConfig(sequence_length=256, batch_size=64),
)
SIGMA = 1.0  # of the logarithm of the loads
TOKENS = 100_000  # of the layers' loads, to have whole numbers


def run(arguments: Sequence[str]) -> dict:
    """`temporary_bytes` and `receive_buffer` by variant."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.parse_args(arguments)
    make_cpu_devices(DEVICES)
    variants = _variants()
    return {
        "temporary_bytes": {name: compile_step(c, jax.devices()).temporary_bytes for name, c in variants.items()},
        "receive_buffer": {name: c.model.receive_buffer for name, c in variants.items()},
        "experts": {name: c.model.num_experts for name, c in variants.items()},
    }


def _variants() -> dict[str, Config]:
    config = CONFIG.resolve(DEVICES)
    rng = np.random.default_rng(0)
    shares_LE = np.exp(SIGMA * rng.standard_normal((4, 64)))
    counts_NLE = np.rint(TOKENS * shares_LE / shares_LE.sum(axis=1, keepdims=True)).astype(np.int64)[None]
    layers, top_k = counts_NLE.shape[1], config.model.top_k
    plan = make_plan(counts_NLE, PruneRule.from_settings(config.laep, layers, top_k=top_k, expert_parallel=DEVICES))
    before = with_receive_buffer(config, [imbalance(device_loads(tokens_E, DEVICES)) for tokens_E in counts_NLE[0]])
    after = with_receive_buffer(pruned_config(config, plan.kept), [layer.imbalance_after for layer in plan.layers])
    return {
        "worst case, before": _with_room_for_all(before),
        "by load, before": before,
        "worst case, after": _with_room_for_all(after),
        "by load, after": after,
    }


def _with_room_for_all(config: Config) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, receive_buffer=None))


def table(result: dict) -> str:
    """The figures for people."""
    lines = [f"{'':<22}{'receive buffer':>15}{'temporaries':>14}"]
    for name, size in result["temporary_bytes"].items():
        buffer = result["receive_buffer"][name]
        lines.append(f"{name:<22}{f'{buffer:.2f}' if buffer else 'all':>15}{size / 1e6:>11.1f} MB")
    return "\n".join(lines)
