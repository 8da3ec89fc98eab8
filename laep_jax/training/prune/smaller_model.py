"""The model that a plan leads to: its steps compiled ahead, its state restored (paper sections 3.2, 3.3)."""

import jax

from laep_jax.checkpoint.arrays import bytes_needed, bytes_read
from laep_jax.checkpoint.checkpointer import Checkpoints
from laep_jax.config import Config
from laep_jax.laep.layout import by_plan
from laep_jax.laep.plan import Plan
from laep_jax.model.accounting import model_size
from laep_jax.sharding import Mesh
from laep_jax.state.fingerprint import compile_fingerprints
from laep_jax.state.surgery import (
    Gathers,
    compile_gathers,
    kept_rows,
    prune_state,
    pruned_config,
    with_receive_buffer,
)
from laep_jax.state.tree import TrainState, abstract_state, fits, initial_maps
from laep_jax.tracking.pause import Pause
from laep_jax.training.prune.compile_ahead import CompiledSteps, ahead, compile_steps
from laep_jax.training.watch import Watch


class SmallerModel:
    """A plan, and the model that it leads to; the steps of that model are being compiled from the start.

    due: the step after which the plan is applied. old: config of the model to be pruned, resolved. num_domains: of the
    validation text. watch: enters the stages `compile` and `restore`. `config`, `maps`: of the smaller model.
    `UserError` where the plan does not fit the model or the mesh.
    """

    def __init__(self, plan: Plan, due: int, old: Config, mesh: Mesh, num_domains: int, watch: Watch):
        self.plan, self.due, self.old, self.mesh = plan, due, old, mesh
        self.num_domains, self.watch = num_domains, watch
        self.config = with_receive_buffer(pruned_config(old, plan.kept), plan.imbalances)
        maps = by_plan(plan.layers)
        self.maps = maps if fits(maps, self.config) else initial_maps(self.config)  # until the next rebalancing
        self._target, self._rows_N = abstract_state(self.config, mesh), kept_rows(plan.num_experts, plan.kept)
        self._programs = ahead(self._compile)
        self._bytes: dict[str, int] = {}

    def restore(
        self, state: TrainState | None, checkpoints: Checkpoints, pause: Pause
    ) -> tuple[TrainState, CompiledSteps]:
        """The state, from the checkpoint or from memory as the config says, and the compiled steps.

        state: the old one, released; None where it is on disk only. Adds `restore` to the pause, and `compile`, the
        remaining compile time; raises what went wrong in the compilation.
        """
        if state is not None and self.old.laep.prune_via == "memory":
            with pause.part("compile"):
                steps, gathers = self._programs.result()
            with pause.part("restore"), self.watch("restore", self.due):
                smaller = prune_state(state, gathers, self._rows_N)
                checkpoints.verify_pruned(smaller, self.plan.kept)
                return smaller, steps
        with pause.part("restore"), self.watch("restore", self.due):
            jax.tree.map(lambda leaf: leaf.delete(), state)
            before = bytes_read()
            smaller = checkpoints.restore_pruned(self.due, self._target, self.plan.kept)
            self._bytes = {"bytes_read": bytes_read() - before, "bytes_needed": bytes_needed(self._target)}
            jax.block_until_ready(smaller)
        with pause.part("compile"):
            return smaller, self._programs.result()[0]

    def _compile(self) -> tuple[CompiledSteps, Gathers]:
        with self.watch("compile", self.due):
            for state in (abstract_state(self.old, self.mesh), self._target):  # the old one's are made by the save
                compile_fingerprints(state)
            return compile_steps(self.config, self.mesh, self._target, self.num_domains), self._gathers()

    def _gathers(self) -> Gathers:
        """The programs that prune in device memory, where that is how it is done."""
        if self.old.laep.prune_via != "memory":
            return {}
        return compile_gathers(abstract_state(self.old, self.mesh), len(self._rows_N))

    def record(self) -> dict:
        """Fields of the `prune` record. Bytes are of this process: what it read of the checkpoint, and had to."""
        return {
            "experts_before": self.plan.num_experts,
            "experts_after": self.plan.num_experts_after,
            "parameters_before": model_size(self.old.model, sequence_length=1).total,
            "parameters_after": model_size(self.config.model, sequence_length=1).total,
            **self._bytes,
        }
