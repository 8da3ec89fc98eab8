"""What a checkpoint's `meta` says of a run beside its arrays, and whether a config goes on with the same run."""

import dataclasses
import typing
from pathlib import Path

from laep_jax.config import Config
from laep_jax.errors import UserError
from laep_jax.hosts import require_same
from laep_jax.laep.plan import Lineage, Plan, initial_lineage
from laep_jax.training.checkpoint import Checkpoints
from laep_jax.training.guard import Guard

FREE = {  # fields that change neither parameters nor the batches, and so may differ on resuming
    "model": {"layers", "remat", "dispatch", "receive_buffer", "grouped_matmul", "dtype", "router_init"},
    "data": {"cache_dir"},
}
FIXED_PARTS = ("model", "data")


@dataclasses.dataclass
class Progress:
    """Where a run stands. Everything a resumed run needs that is not an array; plain JSON.

    `step`, with the seed in the config, is also the position in the data and the random state.
    config: as the run began. num_experts: of the model in this checkpoint. fitted_buffer: the receive
    buffer that the last cut's loads need, None before a cut. lineage: per layer the original id of each
    slot. pending_plan: a plan (JSON text) that is made and not carried out. plan_step, cut_step: after
    which step it was made, and is to be carried out. guard: of a prune that is not judged yet. retries: prunes
    undone. skipped: steps in a row that were not finite. recent_losses: of the last steps, see `anomalies`.
    summary: the rows of the closing table so far.
    """

    step: int
    config: dict
    fingerprint: str
    num_experts: tuple[int, ...]
    fitted_buffer: float | None
    lineage: Lineage
    prunes: int
    pending_plan: str | None
    plan_step: int | None
    cut_step: int | None
    guard: Guard | None
    retries: int
    skipped: int
    recent_losses: list[float]
    summary: dict

    @classmethod
    def fresh(cls, config: Config, fingerprint: str) -> "Progress":
        """Of a run at step 0."""
        experts = config.model.experts_per_layer
        sides = ("before", "after")
        summary = {
            f"{name}_{side}": None for name in ("parameters", "device_imbalance", "step_seconds") for side in sides
        }
        summary |= {f"heldout_loss_{side}_prune": None for side in sides} | {"heldout_loss_end": None}
        summary |= {"heldout_loss_by_domain": {}, "heldout_targets_by_domain": {}}
        summary |= {"experts_before": list(experts), "experts_after": None, "prune_steps": [], "undone": []}
        summary |= {"steps": 0, "tokens": 0, "skipped_steps": 0}
        return cls(
            step=0,
            config=config.to_dict(),
            fingerprint=fingerprint,
            num_experts=experts,
            fitted_buffer=None,
            lineage=initial_lineage(experts),
            prunes=0,
            pending_plan=None,
            plan_step=None,
            cut_step=None,
            guard=None,
            retries=0,
            skipped=0,
            recent_losses=[],
            summary=summary,
        )

    @classmethod
    def from_meta(cls, meta: dict, where: Path) -> "Progress":
        try:
            progress = cls(**meta)
        except TypeError as error:
            raise UserError(f"checkpoint {where} does not fit this version of laep_jax: {error}") from error
        progress.num_experts = tuple(progress.num_experts)
        progress.lineage = tuple(tuple(ids) for ids in progress.lineage)
        progress.guard = progress.guard and Guard(*progress.guard)
        return progress

    def current(self, config: Config) -> Config:
        """The config of the model in this checkpoint, for a run that `config` began or goes on with."""
        changes: dict = {"num_experts": self.num_experts}
        if self.fitted_buffer is not None and config.model.receive_buffer is not None:
            changes["receive_buffer"] = self.fitted_buffer
        return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))

    def announce(self, plan: Plan, cut_step: int) -> None:
        """A plan that is made now, to be carried out after `cut_step`."""
        self.pending_plan, self.plan_step, self.cut_step = plan.to_json(), self.step, cut_step

    def drop_plan(self) -> None:
        """There is no plan to carry out (any more)."""
        self.pending_plan = self.plan_step = self.cut_step = None

    def to_meta(self) -> dict:
        return dataclasses.asdict(self)


def find_progress(config: Config, fingerprint: str, checkpoints: Checkpoints, step: int | None) -> Progress:
    """Where the run stands, by its newest checkpoint, if there is one and `config` continues it."""
    if step is None:
        return Progress.fresh(config, fingerprint)
    where = checkpoints.directory / str(step)
    progress = Progress.from_meta(checkpoints.read_meta(step), where)
    check_resumable(progress, config, fingerprint, where)
    return progress


def check_resumable(progress: Progress, config: Config, fingerprint: str, where: Path) -> None:
    """Raises `UserError` where going on with `config` would not continue the same run."""
    old, new = Config.from_dict(progress.config), config
    classes = typing.get_type_hints(Config)
    pairs: list[tuple] = [("TrainConfig.seed", old.train.seed, new.train.seed)]
    for part in FIXED_PARTS:
        for field in dataclasses.fields(classes[part]):
            if field.name not in FREE[part]:
                values = (getattr(getattr(side, part), field.name) for side in (old, new))
                pairs.append((f"{classes[part].__name__}.{field.name}", *values))
    pairs.append(("the corpus", progress.fingerprint, fingerprint))
    for name, then, now in pairs:
        if then != now:
            raise UserError(
                f"{name}={now!r} does not fit the checkpoint {where}, made with {then!r}; use another workdir"
            )


def require_same_run(config: Config, fingerprint: str) -> None:
    """Every process was started with the same settings and has the same corpus; the cache may lie elsewhere."""
    parts = [getattr(config, field.name) for field in dataclasses.fields(config)]
    settings = {f"{type(part).__name__}.{name}": value for part in parts for name, value in vars(part).items()}
    del settings["DataConfig.cache_dir"]
    require_same(settings | {"the corpus": fingerprint})
