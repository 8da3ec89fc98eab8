"""The processes of `python -m benchmarks straggler`: forward and backward pass of the experts, timed on one core each.

    python -m benchmarks.straggler_worker connected|alone FOLDER

`connected`: one process of several, one device each, replays whole layers: dispatch, experts and combine
under `shard_map`; and as the last variant, without expert parallelism, slices of the experts. `alone`: one process
times the experts of single ranks. Either reads its task from FOLDER/task.npz and writes FOLDER/seconds_INDEX.npy.

Axes: V variants, L layers, T tokens of all devices, K top-k, E experts, S slots of a device, R rows, D hidden, F ffn,
G = 2F, N repetitions, X ranks.
"""

import functools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from laep_jax import distributed
from laep_jax.model.dispatch import AXIS, Tokens, arrival_routes, gather, make_routes, ragged_dispatch
from laep_jax.model.experts import experts_by_blocks

SPLIT, ALIKE = PartitionSpec(AXIS), PartitionSpec()
SMALLEST = 1024  # rows of a buffer


def main(argv: Sequence[str]) -> None:
    kind, folder = argv
    use_one_core(int(os.environ[distributed.INDEX]))
    with np.load(Path(folder) / "task.npz") as task:
        seconds = {"connected": connected, "alone": alone}[kind](dict(task))
    np.save(Path(folder) / f"seconds_{os.environ[distributed.INDEX]}.npy", seconds)


def use_one_core(index: int) -> None:
    """Pins this process to one core, with one CPU device and one thread in XLA's pool."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[index % len(cores)]})
    os.environ["PJRT_NPROC"] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.pop("XLA_FLAGS", None)  # which may ask for more devices
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)


def connected(task: Mapping[str, np.ndarray]) -> np.ndarray:
    """Wall and CPU seconds [V, N, L, 2] of each layer: it ends when all have their tokens back.

    task: slots_VLTK, slots of all devices, or their number for none; ids_LTK, experts, for the variant in slices, which
    comes last; num_slots of all devices, num_experts, hidden, ffn, num_rows of the receive buffer, repetitions.
    """
    distributed.connect()
    mesh = jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    num_slots, num_experts, hidden, ffn = (int(task[name]) for name in ("num_slots", "num_experts", "hidden", "ffn"))
    x_TD = split(normal(task["ids_LTK"].shape[1], hidden), mesh)
    in_slots = [split(array, mesh) for array in matrices(num_slots, hidden, ffn)]
    slices = matrices(num_experts, hidden, ffn // mesh.size)
    layer, sliced = connected_layer(mesh, num_slots, int(task["num_rows"])), sliced_layer(mesh, num_experts)
    variants = [(layer, slots_LTK, in_slots) for slots_LTK in task["slots_VLTK"]] + [(sliced, task["ids_LTK"], slices)]
    calls_VL = [
        [functools.partial(function, split(ids_TK, mesh), x_TD, *arrays) for ids_TK in ids_LTK]
        for function, ids_LTK, arrays in variants
    ]
    for calls_L in (calls_VL[0], calls_VL[-1]):
        jax.block_until_ready(calls_L[0]())  # compiles
    seconds_VNL2 = np.zeros((len(calls_VL), int(task["repetitions"]), len(calls_VL[0]), 2))
    for repetition in range(seconds_VNL2.shape[1]):
        for variant, calls_L in enumerate(calls_VL):
            seconds_VNL2[variant, repetition] = [*map(seconds_of, calls_L)]
    return seconds_VNL2


def connected_layer(mesh: Mesh, num_slots: int, num_rows: int) -> Callable:
    """Compiled (slots_TK, x_TD, gate_up_EDG, down_EFD) -> the layer's result and all gradients of it."""

    def forward(x_TD, slots_TK, *matrices):
        experts = (matrices, experts_by_blocks, num_slots)
        return ragged_dispatch(
            Tokens(x_TD, slots_TK, equal_weights(slots_TK)), *experts, on_cpu=True, num_rows=num_rows
        )

    return on_devices(mesh, forward, SPLIT)


def sliced_layer(mesh: Mesh, num_experts: int) -> Callable:
    """The same without expert parallelism: every device has a slice of each expert's ffn, and all tokens pass it."""

    def forward(x_TD, ids_TK, *matrices):
        tokens = [gather(array, AXIS) for array in (x_TD, ids_TK, equal_weights(ids_TK))]
        y_TD = experts_by_blocks(tokens[0], tokens[2], make_routes(tokens[1], num_experts), *matrices)
        return jax.lax.psum_scatter(y_TD, AXIS, scatter_dimension=0, tiled=True)

    return on_devices(mesh, forward, ALIKE)


def equal_weights(ids_TK: jax.Array) -> jax.Array:
    return jnp.full(ids_TK.shape, 1 / ids_TK.shape[1], jnp.float32)


def on_devices(mesh: Mesh, forward: Callable, of_matrices: PartitionSpec) -> Callable:
    """Compiled (ids_TK, x_TD, *matrices) -> the result of `forward` and all its gradients."""

    def on_device(ids_TK, x_TD, *matrices):
        return with_gradients(lambda x_TD, *matrices: forward(x_TD, ids_TK, *matrices), x_TD, *matrices)

    specs = (SPLIT, SPLIT, of_matrices, of_matrices)
    results = (SPLIT, (SPLIT, of_matrices, of_matrices))
    return jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=results, check_vma=False))


def alone(task: Mapping[str, np.ndarray]) -> np.ndarray:
    """Wall and CPU seconds [N, X, 2] of the experts of each rank, by themselves.

    task: hidden, ffn, repetitions, and any number of sizes_XS, rows by expert of some ranks, whose S differ. A rank's
    buffer holds its rows, rounded up to a power of two, at least SMALLEST, so that few programs are compiled.
    """
    hidden, ffn = int(task["hidden"]), int(task["ffn"])
    rank = jax.jit(rank_alone)
    arguments_X, programs = [], {}
    for sizes_XS in (array for name, array in task.items() if name.startswith("sizes")):
        experts = jax.device_put(matrices(sizes_XS.shape[1], hidden, ffn))
        for sizes_S in sizes_XS:
            shape = (sizes_S.size, max(SMALLEST, 1 << int(sizes_S.sum()).bit_length()))
            if shape not in programs:
                programs[shape] = (jax.device_put(normal(shape[1], hidden)), *experts)
                jax.block_until_ready(rank(sizes_S, *programs[shape]))  # compiles
            arguments_X.append((sizes_S, *programs[shape]))
    seconds = [seconds_of(rank, *arguments) for _ in range(int(task["repetitions"])) for arguments in arguments_X]
    return np.array(seconds).reshape(-1, len(arguments_X), 2)


def rank_alone(sizes_S: jax.Array, x_RD: jax.Array, gate_up_SDG: jax.Array, down_SFD: jax.Array):
    """The experts' result and all gradients of it, for rows that lie by expert."""
    routes, weights_R1 = arrival_routes(sizes_S[None], x_RD.shape[0]), jnp.ones((x_RD.shape[0], 1))
    return with_gradients(
        lambda x_RD, *matrices: experts_by_blocks(x_RD, weights_R1, routes, *matrices), x_RD, gate_up_SDG, down_SFD
    )


def with_gradients(forward: Callable, *arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The result of `forward` and the gradients of its sum."""
    y_TD, backward = jax.vjp(forward, *arrays)
    return y_TD, backward(jnp.ones_like(y_TD))


def seconds_of(function: Callable, *arguments) -> tuple[float, float]:
    """Wall time of a call until its results are there, and CPU time of this process meanwhile."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - wall, time.process_time() - cpu


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def matrices(num_experts: int, hidden: int, ffn: int) -> tuple[np.ndarray, np.ndarray]:
    """gate_up_EDG and down_EFD that keep the size of what they are applied to."""
    return normal(num_experts, hidden, 2 * ffn) / hidden**0.5, normal(num_experts, ffn, hidden) / ffn**0.5


def split(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Every process has the whole array and keeps its part of the first axis."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, SPLIT), lambda index: array[index])


if __name__ == "__main__":
    main(sys.argv[1:])
