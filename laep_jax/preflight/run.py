"""Everything that `preflight` finds out about a config on a slice, and how it tells it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from laep_jax.chips import GIB, Chip
from laep_jax.config import Config
from laep_jax.errors import require
from laep_jax.laep.command import read_counts
from laep_jax.laep.plan import Plan
from laep_jax.preflight.compiling import Program, compile_cut, compile_step, topology_devices
from laep_jax.preflight.estimate import Estimate, estimate, state_by_leaf
from laep_jax.training.controller import configured_plan, imbalance
from laep_jax.training.surgery import cut_config

MARGIN = 1.1  # of a receive buffer over the largest mean load of a device, since loads waver


@dataclasses.dataclass(frozen=True)
class Preflight:
    """step: as the config has it. after: the same after the cut that the loads ask for, None without loads.

    cut_bytes: what the cut needs at most on one chip, the old state included. state: (name, sharding, bytes) of
    the old state's leaves, the largest first.
    """

    topology: str
    chip: Chip
    config: Config
    step: Estimate
    after: Estimate | None
    cut_bytes: int
    cut: Program
    state: list[tuple[str, str, int]]

    @property
    def fits(self) -> bool:
        """Whether every program fits into a chip's memory."""
        steps = [self.step, *([self.after] if self.after else [])]
        return all(step.fits for step in steps) and self.cut_bytes <= self.chip.hbm_bytes


def preflight(config: Config, chip: Chip, topology: str, loads: Path | None) -> Preflight:
    """Compiles the step and the cut of `config` for a slice. `UserError` where config and slice do not fit."""
    devices = topology_devices(topology)
    config = config.resolve(len(devices))
    plan = None if loads is None else _plan(config, loads)
    straggler, after = 1.0, None
    kept = [list(reversed(range(count))) for count in config.model.experts_per_layer]  # the worst case: all move
    if plan and loads:
        kept = plan.kept
        mean_LE = read_counts(loads).mean(0)
        before = [imbalance(tokens_E, config.mesh.expert or 1) for tokens_E in mean_LE]
        cut = cut_config(config, kept)
        imbalances = [layer.imbalance_after for layer in plan.layers]
        cut = _with_buffer(cut, imbalances)
        after = estimate(cut, compile_step(cut, devices), chip, float(np.mean(imbalances)))
        config, straggler = _with_buffer(config, before), float(np.mean(before))
    step = compile_step(config, devices)
    surgery = compile_cut(config, devices, kept)
    state = state_by_leaf(config, devices)
    cut_bytes = sum(size for _, _, size in state) + surgery.temporary_bytes + surgery.output_bytes
    return Preflight(topology, chip, config, estimate(config, step, chip, straggler), after, cut_bytes, surgery, state)


def _plan(config: Config, loads: Path) -> Plan:
    counts, experts = read_counts(loads), config.model.experts_per_layer
    fits = counts.shape[1] == len(experts) and set(experts) == {counts.shape[2]}
    require(fits, "--loads shape", counts.shape, f"does not fit layers of {experts} experts")
    return configured_plan(counts, config.laep, config.model.top_k, config.mesh.expert or 1)


def _with_buffer(config: Config, imbalances: Sequence[float]) -> Config:
    """A receive buffer with room for the fullest device of the worst layer."""
    room = min(MARGIN * max(imbalances), float(config.mesh.expert or 1))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, receive_buffer=room))


def as_json(flight: Preflight) -> dict:
    """The step's estimate, and beside it `topology`, `fits`, `cut_bytes`, `after` and `state`."""
    return {
        **dataclasses.asdict(flight.step),
        "topology": flight.topology,
        "fits": flight.fits,
        "receive_buffer": flight.config.model.receive_buffer,
        "cut_bytes": flight.cut_bytes,
        "cut_compile_seconds": flight.cut.compile_seconds,
        "after": dataclasses.asdict(flight.after) if flight.after else None,
        "state": [{"name": name, "sharding": spec, "bytes": size} for name, spec, size in flight.state],
    }


def table(flight: Preflight) -> str:
    """All of it for people."""
    mesh, data = flight.config.mesh, flight.config.data
    lines = [
        f"{flight.topology}: {flight.step.chips:,} chips {flight.chip.kind}; "
        f"mesh data {mesh.data} x fsdp {mesh.fsdp} x expert {mesh.expert}; "
        f"{data.batch_size:,} sequences of {data.sequence_length:,} tokens",
        "",
        "the state on one chip      GB  sharding",
        *(f"  {name:<20}{size / 1e9:>8.3f}  {spec}" for name, spec, size in flight.state),
        "",
        *_step_lines("the step", flight.step),
    ]
    if flight.after:
        lines += ["", *_step_lines("the step after the cut that the loads ask for", flight.after)]
    verdict = "fits" if flight.cut_bytes <= flight.chip.hbm_bytes else "DOES NOT FIT"
    lines += [
        "",
        f"the cut, beside the old state: {flight.cut_bytes / 1e9:.2f} GB, {verdict}; "
        f"compiled in {flight.cut.compile_seconds:.0f} s",
    ]
    if not flight.fits:
        name, _, size = flight.state[0]
        lines += [
            f"the largest contributors: temporaries {flight.step.temporary_bytes / 1e9:.2f} GB, "
            f"{name} with its moments {size / 1e9:.2f} GB"
        ]
    return "\n".join(lines)


def _step_lines(title: str, step: Estimate) -> list[str]:
    bound = max(step.seconds, key=lambda name: step.seconds[name])
    seconds = ", ".join(f"{name} {value:.3f}" for name, value in step.seconds.items())
    verdict = "fits" if step.fits else "DOES NOT FIT"
    return [
        f"{title}: {step.parameters / 1e9:,.3f} B parameters",
        f"  memory of a chip     {step.total_bytes / 1e9:.2f} of {step.hbm_bytes / 1e9:.2f} GB "
        f"({step.hbm_bytes / GIB:.0f} GiB), {verdict}: "
        f"arguments {step.argument_bytes / 1e9:.2f}, temporaries {step.temporary_bytes / 1e9:.2f}",
        f"  FLOPs                {step.flops_per_chip * step.chips:.4g} a step, {step.flops_per_chip:.4g} a chip",
        f"  device load          largest {step.straggler:.3f} of the mean, mean over layers",
        f"  at least, seconds    {seconds}: bound by {bound}",
        *(
            f"  {kind:<20} {one.count:>6,} a step, {one.num_bytes / 1e9:>8.2f} GB of results, "
            f"{one.link_bytes / 1e9:>8.2f} GB received"
            for kind, one in step.collectives.items()
        ),
        f"  kernels              {', '.join(f'{name} x {count}' for name, count in step.kernels.items())}",
        f"  compiled in          {step.compile_seconds:.0f} s",
    ]
