"""Estimates from a compiled step: its memory against the chip's, and lower bounds of its time.

There are three bounds, each from the chip's published peak as if nothing else took time: the model's FLOPs
without recomputation, the bytes that must pass HBM, and the bytes between chips. What a program computes beyond the
model, `flops_ratio` shows.
"""

import dataclasses
import math

import jax

from laep_jax.chips import Chip
from laep_jax.config import Config
from laep_jax.model.accounting import model_size
from laep_jax.preflight.compiling import Program
from laep_jax.preflight.flops import Product, products
from laep_jax.preflight.hlo import Collective, collectives, kernels, num_operations
from laep_jax.sharding import leaf_name, make_mesh
from laep_jax.state.tree import abstract_state

WASTEFUL = 1.5  # times the model's FLOPs, recomputed ones included: what makes them is no recomputation
RECOMPUTED = {"none": 1.0, "full": 4 / 3, "save_dispatch": 4 / 3}  # by `ModelConfig.remat`; the forward pass twice


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One step on one chip. Bytes and seconds are of a chip; `seconds` are lower bounds by what limits.

    chips: devices as JAX counts them, on tpu7x two of each chip. straggler: device imbalance (max / mean), mean over
    layers; 1.0 where no loads are given. The bound from FLOPs has it on the experts' part. flops_ratio: FLOPs of the
    program's products over the model's own, and over these with what is recomputed. largest_products: five. operations:
    that the chip is given one by one in a step.
    """

    chips: int
    parameters: int
    fits: bool
    hbm_bytes: int
    argument_bytes: int
    temporary_bytes: int
    total_bytes: int
    flops_per_chip: float
    flops_ratio: dict[str, float]
    largest_products: list[Product]
    straggler: float
    seconds: dict[str, float]
    collectives: dict[str, Collective]
    kernels: dict[str, int]
    operations: int
    compile_seconds: float

    @property
    def bound(self) -> dict[str, float]:
        """Seconds that a step takes at least: if all links are used beside the rest, those that can be, or none."""
        on_chip, links = max(self.seconds["FLOPs"], self.seconds["HBM"]), self.seconds["links"]
        beside = self.seconds["asynchronous links"]
        return {
            "links hidden": max(on_chip, links),
            "as compiled": max(on_chip, beside) + links - beside,
            "links exposed": on_chip + links,
        }

    @property
    def wastes_flops(self) -> bool:
        """Whether the program multiplies much more than the model asks for."""
        return self.flops_ratio["with recomputation"] > WASTEFUL


def estimate(config: Config, program: Program, chip: Chip, straggler: float = 1.0) -> Estimate:
    """Of the step compiled from a resolved config."""
    size = model_size(config.model, sequence_length=config.data.sequence_length)
    mesh = config.mesh
    assert mesh.fsdp is not None
    assert mesh.expert is not None
    chips = mesh.data * mesh.fsdp * mesh.expert
    tokens = config.data.batch_size * config.data.sequence_length / chips
    model = config.model
    experts = 6 * 3 * model.hidden_size * model.ffn_size * model.top_k * model.num_layers * tokens
    flops = size.flops_per_token * tokens
    between = collectives(program.text) if program.text else {}
    multiplied = products(program.text, tokens * model.top_k) if program.text else []
    ratio = sum(product.flops for product in multiplied) / flops
    moved = sum(collective.num_bytes for collective in between.values())
    return Estimate(
        chips=chips,
        parameters=size.total,
        fits=program.text is not None and program.total_bytes <= chip.hbm_bytes,
        hbm_bytes=chip.hbm_bytes,
        argument_bytes=program.argument_bytes,
        temporary_bytes=program.temporary_bytes,
        total_bytes=program.total_bytes,
        flops_per_chip=flops,
        flops_ratio={"model": ratio, "with recomputation": ratio / RECOMPUTED[model.remat]},
        largest_products=multiplied[:5],
        straggler=straggler,
        seconds={
            "FLOPs": (flops + (straggler - 1) * experts) / chip.flops,
            # the state read and written once, every result of a collective written and read once
            "HBM": (2 * program.argument_bytes + 2 * moved) / chip.hbm_bandwidth,
            "links": sum(one.link_bytes for one in between.values()) / chip.link_bandwidth,
            "asynchronous links": sum(one.asynchronous_link_bytes for one in between.values()) / chip.link_bandwidth,
        },
        collectives=between,
        kernels=kernels(program.text) if program.text else {},
        operations=num_operations(program.text) if program.text else 0,
        compile_seconds=program.compile_seconds,
    )


def state_by_leaf(config: Config, devices: list[jax.Device]) -> list[tuple[str, str, int]]:
    """(name, how it is sharded, bytes on one chip) of all leaves of one name, the largest first."""
    sizes: dict[str, list] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract_state(config, make_mesh(config.mesh, devices)))[0]:
        name = leaf_name(path) or "counters"
        spec = leaf.sharding.spec
        entry = sizes.setdefault(name, [str(tuple(spec)), 0])
        entry[1] += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sorted(((name, spec, size) for name, (spec, size) in sizes.items()), key=lambda row: -row[2])
