"""Whether a config resumes the run of a checkpoint, and what changed since."""

import dataclasses
import math
import typing

from laep_jax.config import Config
from laep_jax.distributed import require_same
from laep_jax.errors import UserError, short
from laep_jax.fields import settings_of
from laep_jax.state.optimizer import learning_rate
from laep_jax.training.run_state import RunState


def find_run_state(
    config: Config, fingerprint: str, where: str, meta: dict | None, num_devices: int
) -> tuple[RunState, list[str]]:
    """Where the run stands, and the settings that changed since, as text.

    where, meta: the newest checkpoint and what it says of the run, None without one. `UserError` where `config` does
    not continue it.
    """
    if meta is None:
        return RunState.fresh(config.resolve(num_devices), fingerprint), []
    run_state = RunState.from_meta(meta, where)
    resolved = resolve_resumed(config, run_state, num_devices)
    changed = check_resumable(run_state, resolved, fingerprint, where)
    if any(text.startswith("LaepConfig.") for text in changed):
        run_state.retries = 0  # plans were refused by another rule
    if any(text.startswith("LaepConfig.plan ") for text in changed) and run_state.prunes >= config.laep.max_prunes:
        changed.append(f"the plan is not applied: LaepConfig.max_prunes={config.laep.max_prunes} is reached")
    changed += _changed_rate(Config.from_dict(run_state.config), resolved, run_state.step)
    resolved.with_num_experts(run_state.num_experts).resolve(num_devices)
    run_state.config = resolved.to_dict()
    return run_state, changed


def _changed_rate(old: Config, new: Config, step: int) -> list[str]:
    """What becomes of the learning rate of the next step, where that jumps."""
    before, after = (learning_rate(config, step) for config in (old, new))
    if math.isclose(before, after, rel_tol=0.05):
        return []
    stretched = new.optimizer.schedule == "cosine" and old.train.num_steps != new.train.num_steps
    wsd = "; the cosine is stretched, schedule='wsd' can be extended" if stretched else ""
    return [f"the learning rate of step {step + 1} {before:.3g} -> {after:.3g}{wsd}"]


def resolve_resumed(config: Config, run_state: RunState, num_devices: int) -> Config:
    """`config` with the mesh that a resumed run has on so many devices; `UserError` where there is none.

    The expert axis belongs to the run, whose plans and records are made for it. Left open, it stays what it was, or
    becomes the largest divisor of that which the devices allow.
    """
    mesh = config.mesh
    if mesh.expert is None:
        expert = Config.from_dict(run_state.config).mesh.expert or 1
        free = num_devices // (mesh.data * (mesh.fsdp or 1))
        config = dataclasses.replace(config, mesh=dataclasses.replace(mesh, expert=math.gcd(expert, free)))
    return config.resolve(num_devices)


def check_resumable(run_state: RunState, config: Config, fingerprint: str, where: str) -> list[str]:
    """The settings that changed since the checkpoint, as text. `UserError` naming every one that may not."""
    old = Config.from_dict(run_state.config)
    refused, changed = [], []
    for name in typing.get_type_hints(Config):
        then, now = getattr(old, name), getattr(config, name)
        part = type(then).__name__
        for field, setting in settings_of(then).items():
            values = getattr(then, field), getattr(now, field)
            if values[0] != values[1]:
                text = f"{part}.{field} {short(values[0])} -> {short(values[1])}"
                (refused if setting.fixed else changed).append(text)
    (corpus, _, tokenizer), (now, _, tokenizer_now) = (x.partition("/") for x in (run_state.fingerprint, fingerprint))
    if corpus != now:
        what = (
            f"another tokenizer ({tokenizer[:12]} -> {tokenizer_now[:12]})"
            if tokenizer != tokenizer_now
            else "other text"
        )
        files = [text for text in changed if text.startswith("DataConfig.")]
        refused.append("; ".join([f"the corpus: {what}", *files]))
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
