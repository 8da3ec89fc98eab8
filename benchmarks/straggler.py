"""`python -m benchmarks straggler`: what waiting for the most loaded device costs (paper 3.3, Table 5).

Measurements of forward and backward pass of the experts, with the routing of a skewed model before LAEP
(`base`), after pruning with the survivors in their old order (`pruned`), after rearranging as well
(`rearranged`), and with equal loads (`uniform`). `+ 1` and `+ 2` are replica slots of each device (`laep.slots`), with
the shares of the plan (`planned`) or those that the step makes from its own counts (`levelled`). Plans are made from
loads that have since drifted by a fifth.

* connected: N processes of one core each, joined by `jax.distributed`, replay whole layers at EP = N, dispatch
  and combine included, so that each layer ends when its busiest process is done.
* rank by rank: a single process does each rank's rows by itself; the largest time counts. This reaches more
  ranks than there are cores.

Both are compared with a model of a step's time: the load of the most loaded device, summed over layers. No parameter
is fitted. `sliced` is the rival without expert parallelism: every device has a slice of each expert's ffn and takes all
tokens of the group. It is balanced without a plan, but tokens travel more and products are narrower; `slices` times
only these products, at equal loads. What slots cost in links and memory is not in any of it.

Seconds are CPU time of the busiest process, so that other work on the cores does not count; `elapsed` is wall-clock
time. Of the repetitions, which alternate between the variants, each layer's or rank's fastest counts.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import replay
from benchmarks.replay import Replay, to_base
from laep_jax.errors import require
from laep_jax.laep.counts import read_counts
from laep_jax.launch import launch

EXPERT_PARALLEL = (8, 16, 32, 64)  # rank by rank
EXPERTS_PER_DEVICE = 8  # of connected processes: the paper's 64 experts at EP 8
HIDDEN, FFN = 4608, 16384  # of the 1515B model
PAPER = {"base": 62.14, "pruned": 82.25, "rearranged": 92.60, "uniform": 84.74}  # Table 5, TFLOPS of the whole step


Recorded = tuple[np.ndarray, np.ndarray]  # loads [L, E] of the earlier half of the iterations, and of the later


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is computed. rows_per_expert: in the mean of a step; the last of an expert's blocks of 128 is padded."""

    hidden: int
    ffn: int
    rows_per_expert: int
    num_layers: int
    repetitions: int


CONNECTED = Scale(hidden=128, ffn=2048, rows_per_expert=1024, num_layers=6, repetitions=5)
ALONE = Scale(hidden=64, ffn=256, rows_per_expert=1024, num_layers=12, repetitions=3)
SHORT_CONNECTED = Scale(hidden=128, ffn=2048, rows_per_expert=256, num_layers=4, repetitions=3)
SHORT_ALONE = Scale(hidden=64, ffn=256, rows_per_expert=256, num_layers=6, repetitions=2)
SLICES = Scale(hidden=128, ffn=2048, rows_per_expert=1024, num_layers=1, repetitions=3)
SHORT_SLICES = Scale(hidden=128, ffn=2048, rows_per_expert=128, num_layers=1, repetitions=2)
SLICED = "sliced"
WIDTH = 24  # of the names in tables


def run(arguments: Sequence[str]) -> dict:
    """Both measurements. `UserError` on bad options or counts."""
    args = _parser().parse_args(arguments)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    require(cores >= 2, "cores", cores, "must be at least 2, on a system where processes can be pinned to them")
    num_processes = args.num_processes or min(cores, EXPERTS_PER_DEVICE)
    require(2 <= num_processes <= cores, "--num-processes", num_processes, f"must be 2 to {cores}, one a core")
    recorded = _recorded(args.counts) if args.counts else None
    scales = (SHORT_CONNECTED, SHORT_ALONE, SHORT_SLICES) if args.short else (CONNECTED, ALONE, SLICES)
    connected_scale, alone_scale, slices_scale = scales
    return {
        **connected(recorded, num_processes, connected_scale),
        **rank_by_rank(recorded, alone_scale),
        "slices": slices(64 if recorded is None else recorded[0].shape[1], slices_scale),
    }


def _recorded(path: Path) -> Recorded:
    """Of a file of counts; a single iteration is before and now."""
    counts = read_counts(path)
    widths = sorted({tokens_NE.shape[1] for tokens_NE in counts})
    require(len(widths) == 1, "num_experts", widths, "must be the same in every layer")
    tokens_LNE = np.stack(counts)
    layers, iterations, num_experts = tokens_LNE.shape
    require(num_experts >= EXPERT_PARALLEL[0], "num_experts", num_experts, f"must be at least {EXPERT_PARALLEL[0]}")
    halves = tokens_LNE[:, : (iterations + 1) // 2], tokens_LNE[:, iterations // 2 :]
    before_LE, now_LE = (half_LNE.sum(axis=1) for half_LNE in halves)
    sound = bool(before_LE.any(axis=1).all() and now_LE.any(axis=1).all())
    require(sound, "--counts", str(path), f"has a layer without tokens among its {layers}")
    return before_LE, now_LE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks straggler",
        description="Step time of the experts before LAEP, pruned, and rearranged, against what the plan predicts.",
    )
    parser.add_argument(
        "--num-processes", type=int, metavar="N", help="to connect, one core each (the number of cores, at most 8)"
    )
    parser.add_argument("--counts", type=Path, metavar="FILE", help="recorded counts, as `plan` takes them")
    parser.add_argument("--short", action="store_true", help="less of everything: a look, not a measurement")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _replays(recorded: Recorded | None, num_experts: int, degrees: Sequence[int], scale: Scale) -> list[Replay]:
    """One routing and its plan for every expert-parallel degree, of a sample of the layers."""
    rng = np.random.default_rng(0)
    before_LE, now_LE = recorded or replay.drifted(replay.synthetic_loads(num_experts, rng), rng)
    layers = replay.sample_layers(len(now_LE), scale.num_layers)
    num_tokens = scale.rows_per_expert * num_experts // replay.TOP_K
    before_LTE, now_LTE = (replay.draw_logits(loads_LE[layers], num_tokens, rng) for loads_LE in (before_LE, now_LE))
    alpha = replay.alpha_of_layers(len(now_LE), layers)
    return [replay.make_replay(before_LTE, now_LTE, alpha, degree) for degree in degrees]


def connected(recorded: Recorded | None, num_processes: int, scale: Scale) -> dict:
    """Seconds of a step at EP = `num_processes`: `measured`, `elapsed`, `fixed`; `predicted` and `error`."""
    num_experts = EXPERTS_PER_DEVICE * num_processes if recorded is None else recorded[0].shape[1]
    [routing] = _replays(recorded, num_experts, [num_processes], scale)
    slots, num_slots = replay.routes(routing), num_processes * routing.num_slots
    task = {
        # the last variant routes nobody: what is left does not depend on the routing
        "slots_VLTK": np.stack([*slots.values(), np.full_like(slots["base"], num_slots)]),
        "ids_LTK": routing.ids_LTK.astype(np.int32),
        "num_slots": num_slots,
        "num_experts": num_experts,
        "num_rows": max(sizes_LPS.sum(axis=2).max() for sizes_LPS in replay.group_sizes(routing).values()),
    }
    seconds_PVNL2 = _measure("connected", num_processes, scale, task)
    elapsed_V, cpu_V = seconds_PVNL2.max(axis=0).min(axis=1).sum(axis=1).T.tolist()
    names = [*slots, "fixed", SLICED]
    measured, elapsed = (dict(zip(names, seconds_V, strict=True)) for seconds_V in (cpu_V, elapsed_V))
    fixed, _ = measured.pop("fixed"), elapsed.pop("fixed")
    loads = replay.largest_loads(routing)
    predicted = to_base(loads | {SLICED: loads["uniform"]})
    return {
        "connected": _setting(recorded, routing, scale),
        "measured": measured,
        "elapsed": elapsed,
        "fixed": fixed,
        "predicted": predicted,
        "error": {variant: ratio / predicted[variant] - 1 for variant, ratio in to_base(measured).items()},
    }


def rank_by_rank(recorded: Recorded | None, scale: Scale) -> dict:
    """By EP and variant: seconds of a step, throughput relative to `base`, and what the loads predict of it."""
    num_experts = 64 if recorded is None else recorded[0].shape[1]
    degrees = [degree for degree in EXPERT_PARALLEL if degree <= num_experts]
    routings = _replays(recorded, num_experts, degrees, scale)
    sizes = [replay.group_sizes(routing) for routing in routings]
    cpu_of_rank = rank_seconds([np.concatenate([*map(np.concatenate, variants.values())]) for variants in sizes], scale)
    figures = {
        str(routing.num_devices): _rank_figures(routing, by_variant, cpu_of_rank)
        for routing, by_variant in zip(routings, sizes, strict=True)
    }
    return {"alone": _setting(recorded, routings[0], scale), "rank_by_rank": figures}


def slices(num_experts: int, scale: Scale) -> dict[str, float]:
    """By EP: time of the rows of a whole group in slices of all experts over that of a device's rows, loads equal."""
    found = {}
    for degree in (degree for degree in EXPERT_PARALLEL if num_experts % degree == 0):
        whole, sliced = (
            rank_seconds([np.full((1, experts), scale.rows_per_expert)], dataclasses.replace(scale, ffn=ffn))
            for experts, ffn in ((num_experts // degree, scale.ffn), (num_experts, scale.ffn // degree))
        )
        found[str(degree)] = sum(sliced.values()) / sum(whole.values())
    return found


def rank_seconds(ranks: Sequence[np.ndarray], scale: Scale) -> dict[tuple[int, ...], float]:
    """CPU seconds of the experts of one device, by the rows of its slots: each rank by itself, equal ones once.

    ranks: [X, S] each.
    """
    unique_XS = [np.unique(ranks_XS, axis=0) for ranks_XS in ranks]
    task = {f"sizes_{index}": sizes_XS.astype(np.int32) for index, sizes_XS in enumerate(unique_XS)}
    cpu_X = _measure("alone", 1, scale, task)[0, :, :, 1].min(axis=0)
    keys = (tuple(sizes_S) for sizes_XS in unique_XS for sizes_S in sizes_XS.tolist())
    return dict(zip(keys, cpu_X.tolist(), strict=True))


def _rank_figures(
    routing: Replay, sizes: Mapping[str, np.ndarray], cpu_of_rank: Mapping[tuple[int, ...], float]
) -> dict[str, dict[str, float]]:
    seconds = {
        variant: sum(max(cpu_of_rank[tuple(sizes_S)] for sizes_S in sizes_GS) for sizes_GS in sizes_LGS)
        for variant, sizes_LGS in sizes.items()
    }
    measured, predicted = to_base(seconds), to_base(replay.largest_loads(routing))
    return {
        variant: {
            "seconds": seconds[variant],
            "throughput": 1 / measured[variant],
            "predicted": 1 / predicted[variant],
            "error": measured[variant] / predicted[variant] - 1,
        }
        for variant in sizes
    }


def _measure(kind: str, num_processes: int, scale: Scale, task: Mapping[str, Any]) -> np.ndarray:
    """What every process of `straggler_worker` has measured, one behind the other."""
    command = [sys.executable, "-m", "benchmarks.straggler_worker", kind]
    with tempfile.TemporaryDirectory() as folder:
        settings = {name: getattr(scale, name) for name in ("hidden", "ffn", "repetitions")}
        np.savez(Path(folder) / "task.npz", allow_pickle=False, **task, **settings)
        code = launch([*command, folder], num_processes)
        if code == 130:
            raise KeyboardInterrupt
        if code:
            raise RuntimeError(f"a process of the benchmark ended with code {code}; its own message stands above")
        return np.stack([np.load(Path(folder) / f"seconds_{index}.npy") for index in range(num_processes)])


def _setting(recorded: Recorded | None, routing: Replay, scale: Scale) -> dict:
    return dataclasses.asdict(scale) | {
        "layers_of_model": replay.NUM_LAYERS if recorded is None else len(recorded[0]),
        "times_smaller_row": HIDDEN * FFN / (scale.hidden * scale.ffn),  # in FLOPs
        "num_tokens": routing.ids_LTK.shape[1],
        "num_layers": len(routing.ids_LTK),
        "num_devices": routing.num_devices,
        "num_experts": routing.num_experts,
        "num_experts_after": routing.plan.num_experts_after,
    }


def _says(setting: Mapping) -> str:
    return (
        f"{setting['num_layers']} of {setting['layers_of_model']} layers, {setting['num_experts']} experts, top "
        f"{replay.TOP_K}, {setting['num_tokens']:,} tokens a step;\nhidden {setting['hidden']}, ffn {setting['ffn']}: "
        f"a row costs 1/{setting['times_smaller_row']:,.0f} of the 1515B model's FLOPs"
    )


def table(result: dict) -> str:
    """The figures for people."""
    return "\n".join([*_connected_lines(result), "", *_rank_lines(result)])


def _connected_lines(result: dict) -> list[str]:
    setting, measured, predicted = result["connected"], result["measured"], result["predicted"]
    kept = sum(setting["num_experts_after"]) / setting["num_layers"]
    lines = [
        f"{setting['num_devices']} connected processes, one core each: {_says(setting)}",
        f"{kept:.1f} experts a layer stay; {result['fixed'] / measured['uniform']:.0%} of the uniform step does not "
        "depend on the routing",
        "CPU time of each layer's busiest process; elapsed is the same only where nothing else runs",
        f"{'':<{WIDTH}}{'CPU time':>10}{'ratio':>8}{'predicted':>11}{'error':>8}{'elapsed':>11}{'ratio':>8}",
    ]
    elapsed_ratio = to_base(result["elapsed"])
    for variant, ratio in to_base(measured).items():
        lines.append(
            f"{variant:<{WIDTH}}{measured[variant]:>8.3f} s{ratio:>8.3f}{predicted[variant]:>11.3f}"
            f"{result['error'][variant]:>8.1%}{result['elapsed'][variant]:>9.3f} s{elapsed_ratio[variant]:>8.3f}"
        )
    return lines


def _rank_lines(result: dict) -> list[str]:
    by_degree, sliced = result["rank_by_rank"], result["slices"]
    variants = [*next(iter(by_degree.values()))]
    columns = [f"{'EP ' + degree:>17}" for degree in by_degree]
    lines = [
        f"rank by rank: {_says(result['alone'])}",
        "throughput over base, and in brackets what the loads predict",
        f"{'':<{WIDTH}}{''.join(columns)}{'Table 5':>10}",
    ]
    for variant in variants:
        cells = (figures[variant] for figures in by_degree.values())
        texts = "".join(f"{cell['throughput']:>9.3f} ({cell['predicted']:.3f})" for cell in cells)
        paper = f"{PAPER[variant] / PAPER['base']:>10.3f}" if variant in PAPER else ""
        lines.append(f"{variant:<{WIDTH}}{texts}{paper}")
    ratios = ", ".join(f"{ratio:.2f} at EP {degree}" for degree, ratio in sliced.items())
    return [
        *lines,
        "Table 5 is of whole steps of 824 chips; the others are of experts alone.",
        f"products in slices of the ffn over those of whole experts, loads equal: {ratios}",
    ]
