"""What `preflight` measures for a config on a slice, and its report."""

import dataclasses
import operator
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from laep_jax.chips import GIB, Chip
from laep_jax.config import Config
from laep_jax.errors import require
from laep_jax.laep.layout import by_loads
from laep_jax.laep.plan import make_plan
from laep_jax.laep.recorded_loads import read_counts_or_run, read_expert_parallel
from laep_jax.laep.rule import PruneRule
from laep_jax.laep.slots import in_order
from laep_jax.model.attention import attention_kernel
from laep_jax.preflight.compiling import Program, compile_prune, compile_step, topology_devices
from laep_jax.preflight.estimate import WASTEFUL, Estimate, estimate, state_by_leaf
from laep_jax.preflight.hlo import BETWEEN_SLICES
from laep_jax.sharding import make_mesh
from laep_jax.state.surgery import Kept, pruned_config, with_receive_buffer
from laep_jax.training.executable import save_step

LABELS = {BETWEEN_SLICES: "between slices"}


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to compile. imbalances: of the devices (max / mean load), by layer; none where no loads are known."""

    config: Config
    imbalances: tuple[float, ...] = ()

    @property
    def straggler(self) -> float:
        return float(np.mean(self.imbalances)) if self.imbalances else 1.0


@dataclasses.dataclass(frozen=True)
class Preflight:
    """step: as the config has it. after: the same after the prune that the loads ask for, None without loads.

    prune_bytes: what the prune needs at most on one chip, the old state included. state: (name, sharding, bytes) of
    the old state's leaves, the largest first. source: which steps of a run the loads are from, empty where of a file.
    """

    topology: str
    chip: Chip
    config: Config
    attention: str
    step: Estimate
    after: Estimate | None
    prune_bytes: int
    prune: Program
    state: list[tuple[str, str, int]]
    source: str

    @property
    def steps(self) -> list[Estimate]:
        """That of the config and, with loads, that after the prune."""
        return [self.step, *([self.after] if self.after else [])]

    @property
    def fits(self) -> bool:
        """Whether every program fits into a chip's memory."""
        return all(step.fits for step in self.steps) and self.prune_bytes <= self.chip.hbm_bytes

    @property
    def sound(self) -> bool:
        """Whether all fits, and no step multiplies much more than its model asks for."""
        return self.fits and not any(step.wastes_flops for step in self.steps)


def preflight(
    config: Config,
    chip: Chip,
    topology: str,
    *,
    slices: int = 1,
    loads: str | os.PathLike[str] | None = None,
    save: Path | None = None,
) -> Preflight:
    """Compiles the step and the prune of `config` for slices of one kind. `UserError` where they do not fit together.

    loads: a file of counts, or the directory of a run, whose model as it now is takes the place of the one in `config`.
    save: file for the executable of the step.
    """
    devices = topology_devices(topology, slices)
    config, counts, source = _read_counts(config, loads) if loads else (config, [], "")
    config = config.resolve(len(devices))
    if counts:
        before, kept, after = _with_loads(config, counts)
    else:
        before, after = Model(config), None
        kept = [list(reversed(range(count))) for count in before.config.model.experts_per_layer]  # at worst all move
    step = compile_step(before.config, devices)
    if save and step.executable:
        save_step(save, step.executable, before.config, make_mesh(before.config.mesh, devices))
    prune = compile_prune(before.config, devices, kept)
    state = state_by_leaf(before.config, devices)
    return Preflight(
        topology=topology if slices == 1 else f"{slices} slices {topology}",
        chip=chip,
        config=before.config,
        attention=attention_kernel(before.config, devices[0]),
        step=estimate(before.config, step, chip, before.straggler),
        after=estimate(after.config, compile_step(after.config, devices), chip, after.straggler) if after else None,
        prune_bytes=sum(size for _, _, size in state) + prune.temporary_bytes + prune.output_bytes,
        prune=prune,
        state=state,
        source=source,
    )


def _read_counts(config: Config, loads: str | os.PathLike[str]) -> tuple[Config, list[np.ndarray], str]:
    """Config and counts [N, E] of each layer of the same model, and which steps of a run they are from, if of one."""
    had = config.model.experts_per_layer
    counts, source = read_counts_or_run(loads)
    experts = tuple(tokens_NE.shape[1] for tokens_NE in counts)
    pruned = bool(source) and len(experts) == len(had) and all(map(operator.le, experts, had))
    require(pruned or experts == had, "experts of --loads by layer", experts, f"do not fit layers of {had} experts")
    if source and config.mesh.expert is None:  # it belongs to the run, as when that is resumed
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, expert=read_expert_parallel(loads)))
    return config.with_num_experts(experts), counts, source


def _with_loads(config: Config, counts: Sequence[np.ndarray]) -> tuple[Model, Kept, Model]:
    """The model, the prune that these loads ask for, and the model after it; replicas, if any, are in both."""
    expert_parallel = config.mesh.expert or 1
    rule = PruneRule.from_settings(config.laep, len(counts), top_k=config.model.top_k, expert_parallel=expert_parallel)
    most = rule.max_replica_slots(config.model.experts_per_layer)
    slots, target = min(config.laep.replica_slots, most), config.laep.target_experts
    plan = make_plan(counts, rule, replica_slots=slots, target=target)
    loads = [tokens_NE.mean(axis=0) for tokens_NE in counts]
    if config.laep.replica_slots:
        maps = by_loads(loads, expert_parallel, config.laep.replica_slots)
    else:
        maps = [in_order(len(loads_E), expert_parallel) for loads_E in loads]
    old = tuple(slot_map.imbalance(loads_E) for slot_map, loads_E in zip(maps, loads, strict=True))
    new = plan.imbalances
    pruned = pruned_config(config, plan.kept)
    return Model(with_receive_buffer(config, old), old), plan.kept, Model(with_receive_buffer(pruned, new), new)


def as_json(flight: Preflight) -> dict:
    """The step's estimate, and beside it `topology`, `fits`, `prune_bytes`, `after` and `state`."""
    return {
        **_step_json(flight.step),
        "topology": flight.topology,
        "attention": flight.attention,
        "fits": flight.fits,
        "receive_buffer": flight.config.model.receive_buffer,
        "loads": flight.source,
        "prune_bytes": flight.prune_bytes,
        "prune_compile_seconds": flight.prune.compile_seconds,
        "after": _step_json(flight.after) if flight.after else None,
        "state": [{"name": name, "sharding": spec, "bytes": size} for name, spec, size in flight.state],
    }


def _step_json(step: Estimate) -> dict:
    return dataclasses.asdict(step) | {"bound": step.bound}


def table(flight: Preflight) -> str:
    """All of it for people."""
    mesh, data = flight.config.mesh, flight.config.data
    lines = [
        f"{flight.topology}: {flight.step.chips:,} devices {flight.chip.kind}; "
        f"mesh data {mesh.data} x fsdp {mesh.fsdp} x expert {mesh.expert}; "
        f"{data.batch_size:,} sequences of {data.sequence_length:,} tokens; attention {flight.attention}",
        *([f"loads of {flight.source}"] if flight.source else []),
        "",
        "the state on one chip      GB  sharding",
        *(f"  {name:<20}{size / 1e9:>8.3f}  {spec}" for name, spec, size in flight.state),
        "",
        *_step_lines("the step", flight.step),
    ]
    if flight.after:
        lines += ["", *_step_lines("the step after the prune that the loads ask for", flight.after)]
    verdict = "fits" if flight.prune_bytes <= flight.chip.hbm_bytes else "DOES NOT FIT"
    lines += [
        "",
        f"the prune, beside the old state: {flight.prune_bytes / 1e9:.2f} GB, {verdict}; "
        f"compiled in {flight.prune.compile_seconds:.0f} s",
    ]
    if not flight.fits:
        name, _, size = flight.state[0]
        lines += [
            f"the largest contributors: temporaries {flight.step.temporary_bytes / 1e9:.2f} GB, "
            f"{name} with its moments {size / 1e9:.2f} GB"
        ]
    return "\n".join(lines)


def _step_lines(title: str, step: Estimate) -> list[str]:
    bound = max(("FLOPs", "HBM", "links"), key=lambda name: step.seconds[name])
    seconds = ", ".join(f"{name} {value:.3f}" for name, value in step.seconds.items())
    verdict = "fits" if step.fits else "DOES NOT FIT"
    return [
        f"{title}: {step.parameters / 1e9:,.3f} B parameters",
        f"  memory of a chip     {step.total_bytes / 1e9:.2f} of {step.hbm_bytes / 1e9:.2f} GB "
        f"({step.hbm_bytes / GIB:.0f} GiB), {verdict}: "
        f"arguments {step.argument_bytes / 1e9:.2f}, temporaries {step.temporary_bytes / 1e9:.2f}",
        f"  FLOPs                {step.flops_per_chip * step.chips:.4g} a step, {step.flops_per_chip:.4g} a chip",
        f"  FLOPs of the program {step.flops_ratio['model']:.2f} times the model's, "
        f"{step.flops_ratio['with recomputation']:.2f} times these with recomputation",
        *_wasteful_lines(step),
        f"  device load          largest {step.straggler:.3f} of the mean, mean over layers",
        f"  at least, seconds    {seconds}: bound by {bound}",
        f"  a step, at least     {step.bound['links hidden']:.3f} s if the links' time hides behind the rest, "
        f"{step.bound['as compiled']:.3f} s if that of asynchronous transfers does, "
        f"{step.bound['links exposed']:.3f} s if none does",
        *(
            f"  {LABELS.get(kind, kind):<20} {one.count:>6,} a step, {one.asynchronous:>5,} of them asynchronous, "
            f"{one.num_bytes / 1e9:>8.2f} GB of results, {one.link_bytes / 1e9:>8.2f} GB received, "
            f"{one.asynchronous_link_bytes / 1e9:.2f} asynchronously"
            for kind, one in step.collectives.items()
        ),
        f"  kernels              {', '.join(f'{name} x {count}' for name, count in step.kernels.items())}",
        f"  operations           {step.operations:,} a step, one by one",
        f"  compiled in          {step.compile_seconds:.0f} s",
    ]


def _wasteful_lines(step: Estimate) -> list[str]:
    """The largest products of a program that has too many."""
    if not step.wastes_flops:
        return []
    lines = [f"    {product.flops:.3g} in {product.name}, {product.result}" for product in step.largest_products]
    return [f"  WASTEFUL: more than {WASTEFUL} times what the model needs; the largest products of a chip:", *lines]
