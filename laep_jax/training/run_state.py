"""Where a run stands: everything beside the arrays that a checkpoint keeps, as plain JSON in its `meta`."""

import dataclasses
import typing

from laep_jax.config import Config
from laep_jax.errors import UserError, require, require_type
from laep_jax.fields import tuples
from laep_jax.laep.plan import Lineage, Plan, initial_lineage
from laep_jax.tracking.run_log import plain
from laep_jax.tracking.summary import Summary


@dataclasses.dataclass(frozen=True)
class PendingPrune:
    """A plan that was made after step `made` and is applied after step `due`."""

    plan: Plan
    made: int
    due: int


@dataclasses.dataclass
class RunState:
    """Where a run stands.

    `step`, with the seed in the config, is also the position in the data and the random state.
    config: of the last start, resolved, with the experts that the run began with. num_experts: of the model in this
    checkpoint. fitted_buffer: the receive buffer that the loads of the last prune need, None before one. lineage: per
    layer the original id of each slot. retries: plans that the guard refused. skipped: steps in a row that were not
    finite. recent_losses: of the last steps, see `anomalies`.
    """

    step: int
    config: dict
    fingerprint: str
    num_experts: tuple[int, ...]
    fitted_buffer: float | None
    lineage: Lineage
    prunes: int
    pending: PendingPrune | None
    retries: int
    skipped: int
    recent_losses: tuple[float, ...]
    summary: Summary

    @classmethod
    def fresh(cls, config: Config, fingerprint: str) -> "RunState":
        """Of a run at step 0. config: resolved."""
        experts = config.model.experts_per_layer
        return cls(
            step=0,
            config=config.to_dict(),
            fingerprint=fingerprint,
            num_experts=experts,
            fitted_buffer=None,
            lineage=initial_lineage(experts),
            prunes=0,
            pending=None,
            retries=0,
            skipped=0,
            recent_losses=(),
            summary=Summary(list(experts)),
        )

    @classmethod
    def from_meta(cls, meta: dict, where: str) -> "RunState":
        """What `to_meta` made, back from JSON. `UserError` where a type is wrong or the parts do not fit together."""
        name = f"checkpoint {where}"
        try:
            values = meta | {field: tuples(meta[field]) for field in ("num_experts", "lineage", "recent_losses")}
            values["pending"] = None if meta["pending"] is None else _pending(**meta["pending"])
            state = cls(**values | {"summary": Summary(**meta["summary"])})
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{name} does not fit this version of laep_jax: {error!r}") from error
        for part in (state, state.summary, *([state.pending] if state.pending else [])):
            for field, hint in typing.get_type_hints(type(part)).items():
                require_type(f"{name}: {field}", getattr(part, field), hint)
        for field, fits in state._rules(where).items():
            require(fits, f"{name}: {field}", getattr(state, field), "does not fit the rest of it")
        return state

    def _rules(self, where: str) -> dict[str, bool]:
        """Whether each field fits the others."""
        model, pending = Config.from_dict(self.config).model, self.pending
        layers = list(zip(self.lineage, self.num_experts, model.experts_per_layer, strict=False))
        return {
            "step": self.step == int(where.rpartition("/")[2]) > 0,
            "num_experts": len(self.num_experts) == model.num_layers,
            "lineage": len(self.lineage) == model.num_layers
            and all(len(ids) == len({*ids}) == count for ids, count, _ in layers)
            and all(0 <= slot < most for ids, _, most in layers for slot in ids),
            "prunes": self.prunes >= 0,
            "fitted_buffer": self.fitted_buffer is None or self.fitted_buffer >= 1,
            "pending": pending is None
            or (pending.plan.num_experts == self.num_experts and 0 < pending.made <= self.step <= pending.due),
            "retries": self.retries >= 0,
            "skipped": self.skipped >= 0,
        }

    def current(self, config: Config) -> Config:
        """The config of the model in this checkpoint, for a run that `config` began or resumes."""
        changes: dict = {"num_experts": self.num_experts}
        if self.fitted_buffer is not None and config.model.receive_buffer is not None:
            changes["receive_buffer"] = self.fitted_buffer
        return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))

    def is_complete(self, config: Config) -> bool:
        """Whether nothing is left to do: trained to the end, evaluated and saved."""
        return self.step >= config.train.num_steps and self.summary.steps == self.step

    def to_meta(self) -> dict:
        """Plain JSON, which has no NaN: a loss that is not finite becomes None."""
        pending = self.pending and {
            "plan": self.pending.plan.to_json(),
            "made": self.pending.made,
            "due": self.pending.due,
        }
        return plain(dataclasses.asdict(dataclasses.replace(self, pending=None)) | {"pending": pending})


def _pending(plan: str, **steps: int) -> PendingPrune:
    return PendingPrune(Plan.from_json(plan), **steps)
