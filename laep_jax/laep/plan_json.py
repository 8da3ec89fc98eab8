"""The JSON form of a plan, "laep-plan", as plain data: `dump` writes it, `parse` checks types.

`plan.Plan` checks that the numbers make a sound plan. JSON has no infinity, so an
unbounded alpha is written as "inf"; `num_experts` is one number if all layers have the same.
"""

import dataclasses
import json
import math
import sys
from typing import Any

from laep_jax.errors import require
from laep_jax.files import MAX_JSON, parse_json
from laep_jax.laep.rule import PruneRule

FORMAT, VERSIONS = "laep-plan", (1, 2, 3, 4)  # 1 called the rounding keep_more "restore"; 3 may have slots, 4 domains
RULE = tuple(field.name for field in dataclasses.fields(PruneRule))
BOUNDS = ("domain_beta", "min_experts", "max_experts")  # of the rule, since version 4
IDS = ("kept", "pruned", "eligible")
LOADS = ("imbalance_before", "imbalance_after", "lower_bound")
LAYER = {*IDS, "device_load", *LOADS}
SLOTS = {"slots", "shares", "slot_load"}  # in all layers or in none
DOMAINS = "domain_shares"  # likewise
PLAN = {"format", "version", "num_layers", "num_experts", *RULE, "layers"}


def dump(plan: dict[str, Any]) -> str:
    """JSON text of a plan given as `dataclasses.asdict` makes it, a line a layer."""
    counts, rule = plan["num_experts"], plan["rule"]
    head = {
        "format": FORMAT,
        "version": VERSIONS[-1],
        "num_layers": len(counts),
        "num_experts": counts[0] if len(set(counts)) == 1 else counts,
        **rule | {"alpha": ["inf" if math.isinf(alpha) else alpha for alpha in rule["alpha"]]},
    }
    given = [
        {name: value for name, value in layer.items() if name not in {*SLOTS, DOMAINS} or value}
        for layer in plan["layers"]
    ]
    layers = ",\n".join(json.dumps(layer, allow_nan=False) for layer in given)
    return f'{json.dumps(head, allow_nan=False)[:-1]}, "layers": [\n{layers}\n]}}\n'


def parse(text: str) -> dict[str, Any]:
    """The fields of a plan from JSON text. `UserError` on another format, version, key or type."""
    require(len(text) <= MAX_JSON, "length of plan", len(text), f"is above {MAX_JSON}")
    plan = parse_json(text, "plan")
    require(isinstance(plan, dict), "plan", type(plan).__name__, "must be a JSON object")
    require(plan.get("format") == FORMAT, "plan format", plan.get("format"), f"must be {FORMAT!r}")
    version = plan.get("version")
    require(type(version) is int and version in VERSIONS, "plan version", version, f"must be one of {VERSIONS}")
    plan = dict.fromkeys(BOUNDS) | plan
    _check_keys(plan, PLAN, "plan")
    if version == 1 and plan["rounding"] == "restore":
        plan["rounding"] = "keep_more"
    num_layers, counts = _integer(plan["num_layers"], "num_layers"), plan["num_experts"]
    layers = _list(plan["layers"], "layers")
    require(len(layers) == num_layers, "num_layers", num_layers, f"does not fit {len(layers)} layers")
    return {
        "num_experts": _integers(counts if isinstance(counts, list) else [counts] * num_layers, "num_experts"),
        "rule": _rule(plan),
        "layers": [_layer(layer, f"layers[{index}]") for index, layer in enumerate(layers)],
    }


def _rule(plan: dict[str, Any]) -> dict[str, Any]:
    """The fields of the rule; which texts are allowed is for `PruneRule` to say."""
    alphas = _list(plan["alpha"], "alpha")
    return {
        **{name: plan[name] for name in RULE},
        **{name: _integer(plan[name], name) for name in ("expert_parallel", "top_k")},
        "alpha": tuple(math.inf if alpha == "inf" else _number(alpha, "alpha") for alpha in alphas),
        "beta": _number(plan["beta"], "beta"),
        "domain_beta": None if plan["domain_beta"] is None else _number(plan["domain_beta"], "domain_beta"),
    }


def _layer(layer: Any, field: str) -> dict[str, Any]:
    require(isinstance(layer, dict), field, layer, "must be a JSON object")
    optional = {DOMAINS} & set(layer) | (SLOTS if SLOTS & set(layer) else set())
    _check_keys(layer, LAYER | optional, field)
    given = {"slots": [], "shares": [], "slot_load": [], DOMAINS: {}} | layer
    require(isinstance(given[DOMAINS], dict), f"{field}.{DOMAINS}", given[DOMAINS], "must be a JSON object")
    rows = {name: _list(given[name], f"{field}.{name}") for name in ("slots", "shares")}
    return {
        **{name: _integers(layer[name], f"{field}.{name}") for name in IDS},
        **{name: _numbers(given[name], f"{field}.{name}") for name in ("device_load", "slot_load")},
        **{name: _number(layer[name], f"{field}.{name}") for name in LOADS},
        "slots": tuple(_integers(row, f"{field}.slots") for row in rows["slots"]),
        "shares": tuple(_numbers(row, f"{field}.shares") for row in rows["shares"]),
        DOMAINS: {name: _number(share, f"{field}.{DOMAINS}") for name, share in given[DOMAINS].items()},
    }


def _check_keys(values: dict, expected: set[str], field: str) -> None:
    require(set(values) >= expected, f"{field} keys", sorted(values), f"lack {sorted(expected - set(values))}")
    require(set(values) <= expected, f"{field} keys", sorted(set(values) - expected), "are unknown")


def _list(value: Any, field: str) -> list:
    require(isinstance(value, list), field, value, "must be a list")
    return value


def _integers(value: Any, field: str) -> tuple[int, ...]:
    return tuple(_integer(item, field) for item in _list(value, field))


def _numbers(value: Any, field: str) -> tuple[float, ...]:
    return tuple(_number(item, field) for item in _list(value, field))


def _integer(value: Any, field: str) -> int:
    require(isinstance(value, int) and not isinstance(value, bool), field, value, "must be an integer")
    return value


def _number(value: Any, field: str) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(number and abs(value) <= sys.float_info.max, field, value, "must be a finite number")
    return float(value)
