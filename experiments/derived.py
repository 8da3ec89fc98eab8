"""Rows that follow from what another run measured: a plan that the paper's rule did not make, a model's size.

The first three of the baselines, which the paper lacks, are as large as LAEP's model: they take the counts of the
base run at the same step, and the number of experts that the rule would prune there.

Axes: L layers, E experts.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.rows import Row
from laep_jax.laep.plan import Plan, chosen_plan, make_plan
from laep_jax.laep.rule import PruneRule
from laep_jax.report.run_data import read_run

Maker = Callable[[Row, Path, Path], str]


def rule_plan(row: Row, base_dir: Path) -> tuple[Plan, np.ndarray]:
    """LAEP's plan for the base run by the row's rule and step, and the mean loads [L, E] it was made from."""
    run, laep = read_run(base_dir), row.config.laep
    assert laep.prune_at_step is not None
    rows = (run.steps > laep.prune_at_step - laep.window) & (run.steps <= laep.prune_at_step)
    tokens_NLE = run.tokens_NLE[rows]
    rule = PruneRule.from_settings(
        laep, tokens_NLE.shape[1], top_k=row.config.model.top_k, expert_parallel=run.expert_parallel
    )
    return make_plan(tokens_NLE, rule), tokens_NLE.mean(axis=0)


def random_plan(row: Row, base_dir: Path, folder: Path) -> str:
    """As many experts of each layer as the rule prunes, drawn at random."""
    plan, loads_LE = rule_plan(row, base_dir)
    rng = np.random.default_rng(row.seed)
    pruned = [rng.choice(loads_LE.shape[1], len(layer.pruned), replace=False).tolist() for layer in plan.layers]
    return _given(plan, loads_LE, pruned, folder)


def frequency_plan(row: Row, base_dir: Path, folder: Path) -> str:
    """As many experts as the rule prunes, the least used, but as many in each layer."""
    plan, loads_LE = rule_plan(row, base_dir)
    devices = plan.rule.expert_parallel
    number = round(sum(len(layer.pruned) for layer in plan.layers) / len(plan.layers) / devices) * devices
    pruned = [np.argsort(loads_E, kind="stable")[:number].tolist() for loads_E in loads_LE]
    return _given(plan, loads_LE, pruned, folder)


def _given(plan: Plan, loads_LE: np.ndarray, pruned: list[list[int]], folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(chosen_plan([*loads_LE], pruned, plan.rule).to_json())
    return f"LaepConfig.plan = {str(folder / 'plan.json')!r}"


def laep_size(row: Row, base_dir: Path, folder: Path) -> str:
    """The number of experts of each layer that LAEP ends with."""
    plan, _ = rule_plan(row, base_dir)
    return f"ModelConfig.num_experts = {plan.num_experts_after}"


DERIVED: dict[str, Maker] = {"random": random_plan, "frequency": frequency_plan, "from_start": laep_size}
