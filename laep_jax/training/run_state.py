"""What a checkpoint's `meta` says of a run beside its arrays, and whether a config goes on with the same run."""

import dataclasses
import math
import typing
from pathlib import Path

import jax

from laep_jax.config import Config
from laep_jax.distributed import require_same
from laep_jax.errors import UserError, require, require_type, short
from laep_jax.fields import settings_of
from laep_jax.laep.plan import Lineage, Plan, initial_lineage
from laep_jax.state.optimizer import learning_rate
from laep_jax.tracking.run_log import plain


@dataclasses.dataclass
class Progress:
    """Where a run stands. Everything a resumed run needs that is not an array; plain JSON.

    `step`, with the seed in the config, is also the position in the data and the random state.
    config: of the last start, with the experts that the run began with. num_experts: of the model in this
    checkpoint. fitted_buffer: the receive buffer that the last cut's loads need, None before a cut. lineage: per
    layer the original id of each slot. pending_plan: a plan (JSON text) that is made and not carried out.
    plan_step, cut_step: after which step it was made, and is to be carried out. retries: plans that the
    guard refused. skipped: steps in a row that were not finite. recent_losses: of the last steps, see `anomalies`.
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
    retries: int
    skipped: int
    recent_losses: tuple[float, ...]
    summary: dict

    @classmethod
    def fresh(cls, config: Config, fingerprint: str) -> "Progress":
        """Of a run at step 0."""
        experts = config.model.experts_per_layer
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
            retries=0,
            skipped=0,
            recent_losses=(),
            summary=_fresh_summary(experts),
        )

    @classmethod
    def from_meta(cls, meta: dict, where: Path) -> "Progress":
        """What `to_meta` made, back from JSON. `UserError` where a type is wrong or the parts do not fit together."""
        try:
            progress = cls(**meta)
        except TypeError as error:
            raise UserError(f"checkpoint {where} does not fit this version of laep_jax: {error}") from error
        if isinstance(progress.lineage, list):
            progress.lineage = tuple(tuple(ids) if isinstance(ids, list) else ids for ids in progress.lineage)
        if isinstance(progress.num_experts, list):
            progress.num_experts = tuple(progress.num_experts)
        if isinstance(progress.recent_losses, list):
            progress.recent_losses = tuple(progress.recent_losses)
        for name, hint in typing.get_type_hints(cls).items():
            require_type(f"checkpoint {where}: {name}", getattr(progress, name), hint)
        for name, fits in progress._rules(where).items():
            require(fits, f"checkpoint {where}: {name}", getattr(progress, name), "does not fit the rest of it")
        return progress

    def _rules(self, where: Path) -> dict[str, bool]:
        """Whether each field fits the others."""
        config = Config.from_dict(self.config)
        layers, summary = config.model.num_layers, _fresh_summary(config.model.experts_per_layer)
        lengths = list(zip(self.lineage, self.num_experts, config.model.experts_per_layer, strict=False))
        planned, made, due = self.pending_plan is not None, self.plan_step, self.cut_step
        return {
            "step": self.step == int(where.name) > 0,
            "num_experts": len(self.num_experts) == layers,
            "lineage": len(self.lineage) == layers
            and all(len(ids) == len({*ids}) == count for ids, count, _ in lengths)
            and all(0 <= slot < most for ids, _, most in lengths for slot in ids),
            "prunes": self.prunes >= 0,
            "fitted_buffer": self.fitted_buffer is None or self.fitted_buffer >= 1,
            "pending_plan": not planned or Plan.from_json(self.pending_plan or "").num_experts == self.num_experts,
            "plan_step": (made is not None) == planned and (not planned or 0 < (made or 0) <= self.step),
            "cut_step": (due is not None) == planned and (not planned or self.step <= (due or 0)),
            "retries": self.retries >= 0,
            "skipped": self.skipped >= 0,
            "summary": self.summary.keys() == summary.keys()
            and all(_is_like(value, summary[name]) for name, value in self.summary.items()),
        }

    def current(self, config: Config) -> Config:
        """The config of the model in this checkpoint, for a run that `config` began or goes on with."""
        changes: dict = {"num_experts": self.num_experts}
        if self.fitted_buffer is not None and config.model.receive_buffer is not None:
            changes["receive_buffer"] = self.fitted_buffer
        return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))

    def is_complete(self, config: Config) -> bool:
        """Whether nothing is left to do: trained to the end, evaluated and saved."""
        return self.step >= config.train.num_steps and self.summary["steps"] == self.step

    def announce(self, plan: Plan, cut_step: int) -> None:
        """A plan that is made now, to be carried out after `cut_step`."""
        self.pending_plan, self.plan_step, self.cut_step = plan.to_json(), self.step, cut_step

    def drop_plan(self) -> None:
        """There is no plan to carry out (any more)."""
        self.pending_plan = self.plan_step = self.cut_step = None

    def to_meta(self) -> dict:
        return plain(dataclasses.asdict(self))  # a loss that is not finite becomes None: JSON has no NaN


def _fresh_summary(experts: tuple[int, ...]) -> dict:
    """The rows of the closing table before the first step."""
    sides = ("before", "after")
    summary = {f"{name}_{side}": None for name in ("parameters", "device_imbalance", "step_seconds") for side in sides}
    summary |= {f"heldout_loss_{side}_prune": None for side in sides} | {"heldout_loss_end": None}
    summary |= {"heldout_loss_by_domain": {}, "heldout_targets_by_domain": {}}
    summary |= {"experts_before": list(experts), "experts_after": None, "prune_steps": []}
    return summary | {
        "rearrange_steps": [],
        "not_pruned": "",
        "steps": 0,
        "tokens": 0,
        "skipped_steps": 0,
    }


def _is_like(value: object, fresh: object) -> bool:
    """Whether a value of the summary can stand where a fresh run has `fresh`; None is not known, or not finite."""
    sound = all(type(number) in (int, float) for number in jax.tree.leaves(value))
    return (sound or isinstance(fresh, str)) and (fresh is None or type(value) is type(fresh))


def find_progress(
    config: Config, fingerprint: str, where: Path, meta: dict | None, num_devices: int
) -> tuple[Progress, list[str]]:
    """Where the run stands, and the settings that changed since, as text.

    where, meta: the newest checkpoint and what it says of the run, None without one. `UserError` where `config` does
    not continue it.
    """
    if meta is None:
        return Progress.fresh(config.resolve(num_devices), fingerprint), []
    progress = Progress.from_meta(meta, where)
    resolved = resolve_resumed(config, progress, num_devices)
    changed = check_resumable(progress, resolved, fingerprint, where)
    changed += _changed_rate(Config.from_dict(progress.config), resolved, progress.step)
    resolved.with_num_experts(progress.num_experts).resolve(num_devices)
    progress.config = resolved.to_dict()
    return progress, changed


def _changed_rate(old: Config, new: Config, step: int) -> list[str]:
    """What becomes of the learning rate of the next step, where that jumps."""
    before, after = (learning_rate(config, step) for config in (old, new))
    if math.isclose(before, after, rel_tol=0.05):
        return []
    wsd = "; the cosine is stretched, schedule='wsd' can be extended" if new.optimizer.schedule == "cosine" else ""
    return [f"the learning rate of step {step + 1} {before:.3g} -> {after:.3g}{wsd}"]


def resolve_resumed(config: Config, progress: Progress, num_devices: int) -> Config:
    """`config` with the mesh that a resumed run has on so many devices; `UserError` where there is none.

    The expert axis belongs to the run: resolved anew from the counts of a pruned model it could grow, and the experts
    would no longer be where the plan placed them. Left open, it stays what it was, or becomes the largest divisor of
    that which the devices allow, by which every expert count of the run divides.
    """
    mesh = config.mesh
    if mesh.expert is None:
        expert = Config.from_dict(progress.config).mesh.expert or 1
        free = num_devices // (mesh.data * (mesh.fsdp or 1))
        config = dataclasses.replace(config, mesh=dataclasses.replace(mesh, expert=math.gcd(expert, free)))
    return config.resolve(num_devices)


def check_resumable(progress: Progress, config: Config, fingerprint: str, where: Path) -> list[str]:
    """The settings that changed since the checkpoint, as text. `UserError` naming every one that may not."""
    old = Config.from_dict(progress.config)
    refused, changed = [], []
    for name in typing.get_type_hints(Config):
        then, now = getattr(old, name), getattr(config, name)
        part = type(then).__name__
        for field, setting in settings_of(then).items():
            values = getattr(then, field), getattr(now, field)
            if values[0] != values[1]:
                text = f"{part}.{field} {short(values[0])} -> {short(values[1])}"
                (refused if setting.fixed else changed).append(text)
    if progress.fingerprint != fingerprint:
        files = [text for text in changed if text.startswith("DataConfig.")]
        refused.append("; ".join([f"the corpus {short(progress.fingerprint)} -> {short(fingerprint)}", *files]))
    if refused:
        raise UserError(f"another run than that of checkpoint {where}: {'; '.join(refused)}; use another workdir")
    return changed


def require_same_run(config: Config, fingerprint: str) -> None:
    """Every process was started with the same settings and has the same corpus; files may lie elsewhere."""
    parts = [getattr(config, field.name) for field in dataclasses.fields(config)]
    settings = {
        f"{type(part).__name__}.{name}": getattr(part, name)
        for part in parts
        for name, setting in settings_of(part).items()
        if not setting.path  # what is in the files is compared by hash, a plan when it is made
    }
    require_same(settings | {"the corpus": fingerprint})
