"""Compiles a run's programs, the train step and the prune, for TPU chips without having any.

The compiler is in the `libtpu` wheel; `jax.experimental.topologies` describes the slice to it. Arguments are
shapes with shardings, so nothing is allocated.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time

import jax

from laep_jax.chips import find_slice
from laep_jax.config import Config
from laep_jax.errors import UserError
from laep_jax.sharding import make_mesh
from laep_jax.state.surgery import Kept, kept_rows, lower_gather
from laep_jax.state.tree import abstract_layout, abstract_state
from laep_jax.training.step import abstract_batch, make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program. Bytes are of one chip; `text` is the optimised HLO, None where it does not fit.

    total_bytes: arguments, temporaries and results that do not take an argument's place.
    """

    argument_bytes: int
    temporary_bytes: int
    output_bytes: int
    total_bytes: int
    compile_seconds: float
    text: str | None
    executable: jax.stages.Compiled | None


def topology_devices(topology: str, slices: int = 1) -> list[jax.Device]:
    """The devices of so many slices. `UserError` where the TPU compiler is not installed."""
    name, shape = find_slice(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError('preflight needs the TPU compiler of the package libtpu: pip install "jax[tpu]"')
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor a chip that only one process may hold
    from jax.experimental import topologies

    options: dict = {"chip_config_name": "megacore"} if name == "v4" else {}  # a chip is one device, as in a VM
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)  # instead of the four chips of a whole host
    topology = f"{name}:{'x'.join(map(str, shape))}"
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology, num_slices=slices, **options)
    return list(description.devices)


def compile_step(config: Config, devices: list[jax.Device]) -> Program:
    """The very step that `train.py` runs with this (resolved) config."""
    mesh = make_mesh(config.mesh, devices)
    arguments = abstract_state(config, mesh), abstract_layout(config, mesh), abstract_batch(config, mesh)
    return compile_program(make_train_step(config, mesh).lower(*arguments))


def compile_program(lowered: jax.stages.Lowered) -> Program:
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"total memory required for HLO temporaries \(([\d.]+)G\)", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not needed:
            raise
        temporary = int(float(needed[1]) * 2**30)
        return Program(0, temporary, 0, temporary, time.perf_counter() - start, None, None)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    assert memory is not None
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Program(
        arguments, temporaries, outputs, arguments + temporaries + outputs, seconds, compiled.as_text(), compiled
    )


def compile_prune(config: Config, devices: list[jax.Device], kept: Kept) -> Program:
    """The part of the prune (`surgery.prune_state`) that needs most memory: it runs beside the full old state."""
    rows_N = kept_rows(config.model.experts_per_layer, kept)
    leaves = jax.tree.leaves(abstract_state(config, make_mesh(config.mesh, devices)).params["experts"])
    return compile_program(lower_gather(max(leaves, key=lambda leaf: leaf.size), len(rows_N)))
