"""`python -m benchmarks step`: a train step against what the cores can multiply, and where its time goes.

The package's own step, optimizer included, of a small model on one device, with 16 and with 64 experts, each in a
process of its own with memory in huge pages (GLIBC_TUNABLES in the caller's environment overrides that). It takes
turns with products that fit the cache; medians count. FLOPs are the model's own (`accounting.flops_by_part`), without
recomputation. The parts are the scopes in the names of XLA's operations, their times those of a profile, over all
threads; so is the cost of the token counts, too small to be seen in the time of a step.
"""

import collections
import functools
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks.measuring import in_process, parse_repetitions, random_batch
from benchmarks.moe import MATMUL, MATMULS, matmul_form
from laep_jax.config import Config, DataConfig, ModelConfig
from laep_jax.laep.layout import Layout
from laep_jax.model.accounting import flops_by_part
from laep_jax.sharding import HUGE_PAGES, make_cpu_devices, make_mesh, put_batch, replicated
from laep_jax.state.tree import TrainState, init_state, initial_layout
from laep_jax.training.step import Batch, make_train_step

CONFIG = Config(
    model=ModelConfig(vocab_size=256, hidden_size=256, head_dim=64, ffn_size=512, lfa=False),
    data=DataConfig(sequence_length=256, batch_size=16),
)
EXPERTS = (16, 64)
PARTS = ("attention", "router", "counts", "dispatch", "experts", "head", "optimizer")
REST = "between the layers"  # what has no scope: slicing and stacking their parameters, gradients, kept activations
PROFILED = 4  # steps
REPETITIONS = 11

Spans = Iterable[tuple[float, float, str]]  # (start, end, name), of one thread


def run(arguments: Sequence[str]) -> dict:
    """`ratio` of the step's FLOP/s to the matmul's by model; `parts` of its time and FLOPs."""
    repetitions = parse_repetitions(arguments, "step", __doc__.splitlines()[0], REPETITIONS)
    models = {
        f"E{experts}": in_process("benchmarks.step", experts, repetitions, environment=HUGE_PAGES)
        for experts in EXPERTS
    }
    return {key: {name: of_model[key] for name, of_model in models.items()} for key in models["E16"]}


def table(result: dict) -> str:
    """The figures for people."""
    names = list(result["ratio"])
    model, data = CONFIG.model, CONFIG.data
    lines = [
        f"{model.num_layers} layers, hidden {model.hidden_size}, ffn {model.ffn_size}, top {model.top_k};"
        f" {data.batch_size} x {data.sequence_length} tokens a step",
        f"{'':<26}" + "".join(f"{name:>18}" for name in names),
    ]
    rows = {
        "step": [f"{result['step_seconds'][name]:.3f} s" for name in names],
        "tokens a second": [f"{result['tokens_per_second'][name]:,.0f}" for name in names],
        "GFLOP/s": [f"{result['gflops'][name]:.0f}" for name in names],
        "GFLOP/s of a matmul": [f"{result['matmul_gflops'][name]:.0f}" for name in names],
        "ratio": [f"{result['ratio'][name]:.2f}" for name in names],
    }
    for part in (*PARTS, REST):
        shares = [result["parts"][name][part] for name in names]
        rows[part] = [f"{share['time']:.2%} / {share['flops']:.0%}" for share in shares]
    lines += [f"{row:<26}" + "".join(f"{text:>18}" for text in texts) for row, texts in rows.items()]
    return "\n".join([*lines, "parts: share of the time / of the FLOPs"])


def measure(experts: int, repetitions: int) -> dict:
    """All figures of one model."""
    config = CONFIG.with_num_experts((experts,) * CONFIG.model.num_layers).resolve(1)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    rows, length = config.data.batch_size, config.data.sequence_length
    batch = put_batch(random_batch(np.random.default_rng(0), config.model.vocab_size, rows, length), mesh)
    state, layout = init_state(config, mesh), jax.device_put(initial_layout(config), replicated(mesh))
    compiled = make_train_step(config, mesh).lower(state, layout, batch).compile()
    products = matmul_form()
    seconds: dict[str, list[float]] = {"step": [], "matmul": []}

    def timed(name: str, function, *args):
        start = time.perf_counter()
        result = jax.block_until_ready(function(*args))
        seconds[name].append(time.perf_counter() - start)
        return result

    for _ in range(repetitions + 1):
        state = timed("step", compiled, state, layout, batch)[0]
        jax.block_until_ready(products())  # the first after a step still has the step's memory in the cache
        timed("matmul", products)
    median = {name: float(np.median(times[1:])) for name, times in seconds.items()}
    tokens, flops = batch["tokens_BS"].size, flops_by_part(config.model, sequence_length=length)
    gflops, matmul = (
        tokens * sum(flops.values()) / median["step"] / 1e9,
        2 * MATMUL**3 * MATMULS / median["matmul"] / 1e9,
    )
    times = _profile(compiled, state, layout, batch)
    return {
        "ratio": gflops / matmul,
        "gflops": gflops,
        "matmul_gflops": matmul,
        "step_seconds": median["step"],
        "tokens_per_second": tokens / median["step"],
        "parts": {
            part: {"time": times[part] / sum(times.values()), "flops": flops.get(part, 0) / sum(flops.values())}
            for part in (*PARTS, REST)
        },
    }


def _profile(compiled: jax.stages.Compiled, state: TrainState, layout: Layout, batch: Batch) -> dict[str, float]:
    """Nanoseconds by part over some steps, all threads together."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(PROFILED):
                state = jax.block_until_ready(compiled(state, layout, batch))[0]
        [file] = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
    part_of = functools.partial(part_of_operation, scopes=operation_scopes(compiled.as_text() or ""))
    times: dict[str, float] = collections.defaultdict(float)
    for plane in profile.planes:
        for line in plane.lines:
            operations = [event for event in line.events if "hlo_op" in dict(event.stats)]
            spans = [(event.start_ns, event.start_ns + event.duration_ns, event.name) for event in operations]
            for name, own in own_times(spans).items():
                times[part_of(name)] += own
    return times


def operation_scopes(hlo: str) -> dict[str, str]:
    """The `op_name` of each operation of a program, by the operation's name."""
    return dict(re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', hlo, re.MULTILINE))


def part_of_operation(name: str, scopes: dict[str, str]) -> str:
    """The innermost of PARTS in an operation's scope: experts are within dispatch."""
    found = re.findall(rf"\b(?:{'|'.join(PARTS)})\b", scopes.get(name, ""))
    return found[-1] if found else REST


def own_times(spans: Spans) -> dict[str, float]:
    """Time by name, without that of the spans within."""
    times: dict[str, float] = collections.defaultdict(float)
    open_spans: list[tuple[float, str]] = []  # (end, name), the innermost last
    for start, end, name in sorted(spans, key=lambda span: (span[0], -span[1])):
        while open_spans and open_spans[-1][0] <= start:
            open_spans.pop()
        if open_spans:
            times[open_spans[-1][1]] -= end - start
        times[name] += end - start
        open_spans.append((end, name))
    return times


if __name__ == "__main__":
    make_cpu_devices(1)
    print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]))))
