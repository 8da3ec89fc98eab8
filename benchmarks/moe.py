"""`python -m benchmarks moe`: the expert block against one dense SwiGLU on as many rows.

Forward and backward pass of the layer as the model runs it (router, dispatch, experts, combine) with all
gradients, under skewed loads; and of a dense SwiGLU in plain JAX on top_k rows a token. Useful FLOPs are those of
the experts' products without recomputation, the same on both sides. One process measures on one device, a
second on a mesh of eight, also with a replica slot a device, for what levelling costs: emulated devices share the
cores, so even loads gain nothing there. In each the forms alternate, and each form's median counts.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.measuring import in_process, parse_repetitions
from laep_jax.config import AuxLossConfig, MeshConfig, ModelConfig
from laep_jax.laep.balance import imbalance
from laep_jax.laep.layout import make_layout
from laep_jax.laep.slots import in_order, place_in_slots
from laep_jax.model.moe import MoE
from laep_jax.sharding import batch_sharding, make_cpu_devices, make_mesh, put_batch, tree_shardings

MODEL = ModelConfig(num_layers=1, hidden_size=256, ffn_size=512, top_k=2)
TOKENS, ROWS = 8192, 16  # ROWS of the batch
EXPERTS = (16, 64, 256)
SIGMA = 1.5  # of the logarithm of the loads
MESH_DEVICES, MESH_EXPERTS = 8, 64
MATMUL, MATMULS = 512, 64  # rows, columns and depth of a product that fits the cache, and how many in a row
REPETITIONS = 9

Form = Callable[[], object]


def run(arguments: Sequence[str]) -> dict:
    """`ratio` of each form's useful FLOP/s to the dense yardstick's, `gflops`, `loads` (largest over mean)."""
    repetitions = parse_repetitions(arguments, "moe", __doc__.splitlines()[0], REPETITIONS)
    alone, mesh = (in_process("benchmarks.moe", devices, repetitions) for devices in (1, MESH_DEVICES))
    gflops = alone["gflops"] | mesh["gflops"]
    ratio = {name: rate / gflops["dense"] for name, rate in gflops.items() if name not in ("dense", "matmul")}
    return {"ratio": ratio, "gflops": gflops, "loads": alone["loads"]}


def table(result: dict) -> str:
    """The figures for people."""
    lines = [
        f"{TOKENS:,} tokens, hidden {MODEL.hidden_size}, ffn {MODEL.ffn_size}, top {MODEL.top_k}; forward and backward",
        "largest over mean load: " + ", ".join(f"{name} {load:.1f}" for name, load in result["loads"].items()),
        f"{'':<24}{'GFLOP/s':>9}{'of dense':>10}",
    ]
    for name, rate in result["gflops"].items():
        ratio = f"{result['ratio'][name]:.2f}" if name in result["ratio"] else ""
        lines.append(f"{name:<24}{rate:>9.1f}{ratio:>10}")
    return "\n".join(lines)


def measure(devices: int, repetitions: int) -> dict:
    """`gflops` of every form on so many devices, and the `loads` of its routing."""
    loads: dict[str, float] = {}
    if devices == 1:
        forms = {"dense": dense_form(), "matmul": matmul_form()}
        forms |= {f"E{experts}": layer_form(experts, devices, "auto", loads) for experts in EXPERTS}
        forms["ragged_dot_E16"] = layer_form(EXPERTS[0], devices, "ragged_dot", loads)
        forms["all_experts_E16"] = all_experts_form(EXPERTS[0])
    else:
        name = f"mesh{devices}_E{MESH_EXPERTS}"
        forms = {name: layer_form(MESH_EXPERTS, devices, "auto", loads)}
        forms[f"{name}_slot"] = layer_form(MESH_EXPERTS, devices, "auto", loads, replica_slots=1)
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repetitions):
        for name, form in forms.items():
            start = time.perf_counter()
            jax.block_until_ready(form())
            seconds[name].append(time.perf_counter() - start)
    useful = 18 * TOKENS * MODEL.top_k * MODEL.hidden_size * MODEL.ffn_size  # a product costs thrice with its gradients
    flops = dict.fromkeys(forms, useful) | {"matmul": 2 * MATMUL**3 * MATMULS}
    return {
        "gflops": {name: flops[name] / float(np.median(times)) / 1e9 for name, times in seconds.items()},
        "loads": loads,
    }


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def layer_form(
    num_experts: int, devices: int, grouped_matmul: str, loads: dict[str, float], replica_slots: int = 0
) -> Form:
    """The layer's gradients with respect to parameters and tokens; adds its routing to `loads`."""
    config = dataclasses.replace(MODEL, num_experts=num_experts, grouped_matmul=grouped_matmul)
    mesh = make_mesh(MeshConfig(fsdp=1, expert=devices), jax.devices()[:devices])
    graph, parameters = nnx.split(MoE(config, num_experts, AuxLossConfig(), rngs=nnx.Rngs(params=0)))
    params = nnx.to_pure_dict(parameters)
    params["router_ED"] = normal(1, config.hidden_size, num_experts).T / config.hidden_size**0.5
    bias_E = SIGMA * normal(2, num_experts)
    about_E = np.asarray(jax.nn.softmax(bias_E))
    slot_map = place_in_slots(about_E, devices, replica_slots) if replica_slots else in_order(num_experts, devices)
    layout = jax.tree.map(lambda leaf_L: leaf_L[0], make_layout([slot_map], [num_experts], replica_slots))
    params = jax.device_put(params, tree_shardings(params, mesh))
    shape = (ROWS, TOKENS // ROWS, config.hidden_size)
    batch = put_batch({"x": np.asarray(normal(3, *shape)), "dy": np.asarray(normal(4, *shape))}, mesh)
    valid_BS = jax.device_put(jnp.ones(shape[:2], bool), batch_sharding(mesh))

    def loss(params, x_BSD):
        if devices > 1:  # as in the model, a matrix for each slot
            slots_R = layout.expert_PS.reshape(-1)
            params = {name: leaf if name == "router_ED" else leaf[slots_R] for name, leaf in params.items()}
        y_BSD, aux = nnx.merge(graph, params)(x_BSD, valid_BS, bias_E, layout, mesh)
        return jnp.sum(y_BSD * batch["dy"]), aux.tokens_per_expert_E

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    counts_E = gradients(params, batch["x"])[1]
    loads[f"E{num_experts}"] = imbalance(np.asarray(counts_E))
    return lambda: gradients(params, batch["x"])


def _swiglu(x_RD: jax.Array, gate_up_DG: jax.Array, down_FD: jax.Array) -> jax.Array:
    gate_RF, up_RF = jnp.split(x_RD @ gate_up_DG, 2, axis=-1)
    return (jax.nn.silu(gate_RF) * up_RF) @ down_FD


def _weights(*leading: int) -> tuple[jax.Array, jax.Array]:
    gate_up = normal(5, *leading, MODEL.hidden_size, 2 * MODEL.ffn_size) / MODEL.hidden_size**0.5
    return gate_up, normal(6, *leading, MODEL.ffn_size, MODEL.hidden_size) / MODEL.ffn_size**0.5


def dense_form() -> Form:
    """The yardstick: one SwiGLU on top_k rows a token."""
    x_RD, dy_RD = (normal(seed, TOKENS * MODEL.top_k, MODEL.hidden_size) for seed in (3, 4))
    weights = _weights()
    gradients = jax.jit(jax.grad(lambda x_RD, *weights: jnp.sum(_swiglu(x_RD, *weights) * dy_RD), argnums=(0, 1, 2)))
    jax.block_until_ready(gradients(x_RD, *weights))
    return lambda: gradients(x_RD, *weights)


def all_experts_form(num_experts: int) -> Form:
    """Every expert on every token, the simplest MoE."""
    x_TD, dy_TD = (normal(seed, TOKENS, MODEL.hidden_size) for seed in (3, 4))
    shares_ET = jax.nn.softmax(normal(7, num_experts, TOKENS), axis=0)
    weights = _weights(num_experts)

    def loss(x_TD, shares_ET, *weights):
        def add(y_TD, expert):
            share_T, *matrices = expert
            return y_TD + share_T[:, None] * _swiglu(x_TD, *matrices), None

        return jnp.sum(jax.lax.scan(add, jnp.zeros_like(x_TD), (shares_ET, *weights))[0] * dy_TD)

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    jax.block_until_ready(gradients(x_TD, shares_ET, *weights))
    return lambda: gradients(x_TD, shares_ET, *weights)


def matmul_form() -> Form:
    """Products whose operands and result stay in the cache: what the cores can do."""
    x, w = normal(8, MATMUL, MATMUL), normal(9, MATMUL, MATMUL) / MATMUL**0.5
    products = jax.jit(lambda x, w: jax.lax.fori_loop(0, MATMULS, lambda _, x: x @ w, x))
    jax.block_until_ready(products(x, w))
    return lambda: products(x, w)


if __name__ == "__main__":
    make_cpu_devices(int(sys.argv[1]))
    print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]))))
