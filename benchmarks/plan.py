"""`python -m benchmarks plan`: how long a plan takes, and how even its devices are.

The time is that of `make_plan` with refined placement for a model of the size that pods train. The placement
is held against the packing of DeepSeek's EPLB (github.com/deepseek-ai/EPLB: heaviest expert first, each to the
lightest device with room, which is `greedy`; no replicas, which a trained model cannot have) and against the
lower bound.
"""

import argparse
import time
from collections.abc import Sequence

import numpy as np

from laep_jax.config import LaepConfig
from laep_jax.laep.balance import device_loads, lower_bound
from laep_jax.laep.placement import place
from laep_jax.laep.plan import make_plan
from laep_jax.laep.rule import PruneRule

LAYERS, EXPERTS, ITERATIONS = 103, 256, 1000
PLACED_EXPERTS, DEVICES, DISTRIBUTIONS = 64, 8, 200
SIGMAS = (0.3, 1.5)  # of lognormal loads, drawn evenly between
TOP_K = 2
REPETITIONS = 5


def run(arguments: Sequence[str]) -> dict:
    """`plan_seconds` (fastest and median), and over all distributions the `gap` to the bound and to `eplb`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks plan", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    return {"plan_seconds": _plan_seconds(rng), **_placements(rng)}


def _plan_seconds(rng: np.random.Generator) -> dict[str, float]:
    loads_LE = 100 * np.exp(rng.standard_normal((LAYERS, EXPERTS)))
    counts_NLE = rng.poisson(loads_LE, (ITERATIONS, LAYERS, EXPERTS))
    laep = LaepConfig(placement="refined")
    rule = PruneRule.from_settings(laep, LAYERS, top_k=TOP_K, expert_parallel=DEVICES)
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        make_plan(counts_NLE, rule)
        seconds.append(time.perf_counter() - start)
    return {"fastest": min(seconds), "median": float(np.median(seconds))}


def _placements(rng: np.random.Generator) -> dict[str, float | int]:
    largest = []
    for _ in range(DISTRIBUTIONS):
        loads_E = np.exp(rng.uniform(*SIGMAS) * rng.standard_normal(PLACED_EXPERTS))
        orders = [place(loads_E, DEVICES, method) for method in ("refined", "greedy")]
        largest.append(
            [*(device_loads(loads_E[order], DEVICES).max() for order in orders), lower_bound(loads_E, DEVICES)]
        )
    refined, eplb, bound = np.array(largest).T
    return {
        "mean_gap": float(np.mean(refined / bound - 1)),
        "worst_gap": float(np.max(refined / bound - 1)),
        "mean_gap_eplb": float(np.mean(eplb / bound - 1)),
        "worse_than_eplb": int(np.sum(refined > eplb * (1 + 1e-12))),
    }


def table(result: dict) -> str:
    """The figures for people."""
    seconds = result["plan_seconds"]
    return "\n".join(
        [
            f"a plan for {LAYERS} layers x {EXPERTS} experts x {ITERATIONS:,} iterations: "
            f"{seconds['fastest']:.2f} s, median {seconds['median']:.2f} s",
            f"{PLACED_EXPERTS} experts on {DEVICES} devices, {DISTRIBUTIONS} load distributions; "
            "largest device load above the lower bound:",
            f"  refined   mean {result['mean_gap']:.3%}, worst {result['worst_gap']:.2%}",
            f"  EPLB      mean {result['mean_gap_eplb']:.3%}",
            f"  refined is worse than EPLB in {result['worse_than_eplb']}",
        ]
    )
