"""Run directories made up from NumPy: loads skew in some 60 steps, then stay, and the weakest experts go."""

import json

import numpy as np
import pytest

DOMAINS = {"books": 9000, "forms": 40, "web": 2960}  # validation targets
START = {
    "kind": "start",
    "step": 0,
    "time": "2030-01-01T00:00:00+00:00",
    "corpus": "text files: 3 documents",
    "devices": "8 cpu devices: data 1, fsdp 2, expert 4",
    "machine": "cpu (Linux x86_64, 2 CPU cores)",
}
TOP_K, TOKENS, WINDOW, ALPHA, BETA, DEVICES = 2, 4096, 25, 0.4, 0.1, 4


def popularity(rng, num_layers, num_experts):
    """[L, E]: each expert's final share of its layer's tokens; over three orders of magnitude."""
    weights = rng.lognormal(sigma=1.3, size=(num_layers, num_experts))
    return weights / weights.sum(1, keepdims=True)


def weakest(loads_E, devices):
    """Ids that fall under both bounds, as many as leave a multiple of the devices."""
    order = np.argsort(loads_E, kind="stable")
    running = np.cumsum(loads_E[order])
    chosen = order[(running <= BETA * loads_E.sum()) & (loads_E[order] <= ALPHA * loads_E.mean())]
    return chosen[: len(chosen) - (len(chosen) - len(loads_E)) % devices]


def placed(loads_E, ids, devices):
    """Ids in slot order: heaviest first to the lightest device that is not full."""
    groups = [[] for _ in range(devices)]
    for expert in sorted(ids, key=lambda e: -loads_E[e]):
        open_groups = [group for group in groups if len(group) < len(ids) // devices]
        min(open_groups, key=lambda group: sum(loads_E[e] for e in group)).append(int(expert))
    return [expert for group in groups for expert in group]


def evaluation(step, when, loss, worse=0.0):
    """An `eval` record; worse: what the prune did to the small domain, beside what it did to all."""
    by_domain = {"books": loss, "forms": loss + 1 + worse, "web": loss - 0.2 - worse / 10}
    return {"kind": "eval", "step": step, "validation_loss": loss, "validation_loss_by_domain": by_domain, "when": when}


def train_record(step, loss, tokens_LE):
    """The fields of it that the report draws."""
    imbalance = [float(tokens_E.max() / tokens_E[tokens_E >= 0].mean()) for tokens_E in tokens_LE]
    speed = None if step == 1 else 4000 + step
    seconds = speed and TOKENS / speed
    numbers = {"tokens_per_second": speed, "step_seconds": seconds, "peak_memory_bytes": 2**30 + step}
    return {"kind": "train", "step": step, "loss": loss, **numbers, "device_imbalance": imbalance}


def make_run(run_dir, *, num_layers=4, num_experts=16, num_steps=300, cut_step=180, devices=DEVICES, seed=0):
    """Writes config.json, metrics.jsonl, loads/ and plans/; cut_step None makes a run without prune."""
    rng = np.random.default_rng(seed)
    final_LE = popularity(rng, num_layers, num_experts)
    drift_LE = rng.normal(scale=0.4, size=final_LE.shape)
    alive_LE = np.ones(final_LE.shape, bool)
    tokens_NLE = np.zeros((num_steps, *final_LE.shape), np.int32)
    records = [
        START,
        {"kind": "validation", "step": 50, "targets_by_domain": DOMAINS},
    ]
    lineage = [list(range(num_experts))] * num_layers
    (run_dir / "plans").mkdir(parents=True)
    for step in range(1, num_steps + 1):
        grown = 1 - np.exp(-step / 40)
        logits_LE = (
            grown * np.log(final_LE) + drift_LE * np.exp(-step / 60) + rng.normal(scale=0.08, size=final_LE.shape)
        )
        weights_LE = np.exp(logits_LE) * alive_LE
        for layer in range(num_layers):
            share_E = weights_LE[layer] / weights_LE[layer].sum()
            tokens_NLE[step - 1, layer] = rng.multinomial(TOP_K * TOKENS, share_E)
            tokens_NLE[step - 1, layer, ~alive_LE[layer]] = -1
        loss = 2.0 + 3.5 * np.exp(-step / 30) + 0.8 * np.exp(-step / 200) + rng.normal(scale=0.06)
        records.append(train_record(step, loss, tokens_NLE[step - 1]))
        if step % 50 == 0:
            records.append(evaluation(step, "periodic", loss + 0.1))
        if step == cut_step:
            mean_LE = tokens_NLE[step - WINDOW : step].mean(0)
            lineage = []
            for layer in range(num_layers):
                pruned = weakest(mean_LE[layer], devices)
                alive_LE[layer, pruned] = False
                lineage.append(placed(mean_LE[layer], np.flatnonzero(alive_LE[layer]), devices))
            records.append(evaluation(step, "before_prune", loss + 0.1))
            shares = {"books": [0.05] * num_layers, "forms": [0.4] * num_layers, "web": [0.1] * num_layers}
            records.append({"kind": "stability", "step": step, "stable": True, "reason": "stable"})
            records.append({"kind": "dry_run", "step": step, "stands": True, "pruned_share_by_domain": shares})
            records.append(
                {
                    "kind": "prune",
                    "step": step,
                    "plan": f"plans/{step}.json",
                    "plan_step": step,
                    "experts_before": [num_experts] * num_layers,
                    "experts_after": [len(ids) for ids in lineage],
                    "lineage": lineage,
                }
            )
            records.append(evaluation(step, "after_prune", loss + 0.16, worse=0.5))
            plan = {"format": "laep-plan", "version": 1, "alpha": [ALPHA] * num_layers, "beta": BETA}
            (run_dir / "plans" / f"{step}.json").write_text(json.dumps(plan))
    records.append(evaluation(num_steps, "end", loss + 0.1))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    laep = {"window": WINDOW, "alpha": ALPHA, "beta": BETA, "max_moved": 0.1}
    config = {"laep": laep, "model": {"top_k": TOP_K}, "train": {"num_steps": num_steps}}
    (run_dir / "config.json").write_text(json.dumps(config))
    (run_dir / "loads").mkdir()
    for first in range(0, num_steps, 256):
        np.save(run_dir / "loads" / f"{first + 1:09}.npy", tokens_NLE[first : first + 256])
    experts = {"num_experts": [num_experts] * num_layers, "expert_parallel": devices}
    (run_dir / "loads" / "experts.json").write_text(json.dumps(experts))
    return run_dir


@pytest.fixture
def make():
    """`make_run`, for tests that need a run of their own."""
    return make_run


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    """4 layers of 16 experts on 4 devices, 300 steps, pruned after step 180; read only."""
    return make_run(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture(scope="session")
def unpruned_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "unpruned", num_steps=60, cut_step=None)
