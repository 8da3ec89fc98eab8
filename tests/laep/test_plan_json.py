"""A plan survives JSON, is known by its hash, and what is no sound plan is refused by name."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laep_jax.errors import UserError
from laep_jax.laep.plan import LayerPlan, Plan
from laep_jax.laep.rule import PruneRule

LAYER = LayerPlan(
    kept=(3, 0, 1, 5),
    pruned=(2, 4),
    eligible=(2, 4, 5),
    device_load=(12.5, 12.0),
    imbalance_before=1.5,
    imbalance_after=1.02,
    lower_bound=12.25,
)
RULE = PruneRule(
    expert_parallel=2,
    top_k=2,
    alpha=(0.4, math.inf),
    beta=0.1,
    estimator="vote",
    inequality="le",
    rounding="keep_more",
    placement="refined",
)
GOOD = Plan(num_experts=(6, 6), rule=RULE, layers=(LAYER, LAYER))
LOADS = st.floats(0, 1e18)


@st.composite
def plans(draw):
    """Any plan that can be made, with loads that nothing has measured."""
    devices, rng = draw(st.integers(1, 4)), np.random.default_rng(draw(st.integers(0, 2**32)))
    kept_counts = draw(st.lists(st.integers(1, 3).map(lambda k: k * devices), min_size=1, max_size=3))
    layers = []
    for kept in kept_counts:
        ids = rng.permutation(kept + devices * draw(st.integers(0, 2))).tolist()
        layers.append(
            LayerPlan(
                kept=tuple(ids[:kept]),
                pruned=tuple(sorted(ids[kept:])),
                eligible=tuple(sorted(rng.permutation(ids)[: draw(st.integers(0, len(ids)))].tolist())),
                device_load=tuple(draw(st.lists(LOADS, min_size=devices, max_size=devices))),
                imbalance_before=draw(LOADS),
                imbalance_after=draw(LOADS),
                lower_bound=draw(LOADS),
            )
        )
    rule = PruneRule(
        expert_parallel=devices,
        top_k=draw(st.integers(1, min(kept_counts))),
        alpha=tuple(draw(st.floats(0, allow_nan=False)) for _ in layers),
        beta=draw(st.floats(0, 1)),
        estimator=draw(st.sampled_from(["vote", "mean"])),
        inequality=draw(st.sampled_from(["le", "lt"])),
        rounding=draw(st.sampled_from(["keep_more", "prune", "none"])),
        placement=draw(st.sampled_from(["greedy", "refined"])),
    )
    return Plan(tuple(len(layer.kept + layer.pruned) for layer in layers), rule, tuple(layers))


def changed(**changes) -> Plan:
    """The good plan with other fields, of itself or of its rule."""
    own = {name: changes.pop(name) for name in ("num_experts", "layers") if name in changes}
    return dataclasses.replace(GOOD, rule=dataclasses.replace(RULE, **changes), **own)


def text(**changes) -> str:
    """The good plan as JSON with other values for some keys; None leaves a key out."""
    fields = json.loads(GOOD.to_json()) | changes
    return json.dumps({name: value for name, value in fields.items() if value is not None})


def layer_text(**changes) -> str:
    """The same with changes in its second layer."""
    first, second = json.loads(GOOD.to_json())["layers"]
    return text(layers=[first, {name: value for name, value in (second | changes).items() if value is not None}])


@settings(max_examples=60, deadline=None)
@given(plans())
def test_round_trip_gives_an_equal_plan_and_hash(plan):
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert again.sha256() == plan.sha256()


def test_every_difference_changes_the_hash():
    layer = dataclasses.replace(LAYER, kept=(0, 3, 1, 5))
    others = [
        dataclasses.replace(GOOD, layers=(LAYER, layer)),
        dataclasses.replace(GOOD, layers=(layer, LAYER)),
        changed(beta=0.1 + 2**-56),
        changed(alpha=(0.4, 1e300)),
        changed(placement="greedy"),
        dataclasses.replace(GOOD, layers=(dataclasses.replace(LAYER, lower_bound=12.250000000000002), LAYER)),
    ]
    assert len({plan.sha256() for plan in [GOOD, *others]}) == len(others) + 1
    assert len(GOOD.sha256()) == 64


def test_json_is_strict_and_has_a_line_a_layer():
    def constant(name):
        raise AssertionError(f"{name} is not JSON")

    fields = json.loads(GOOD.to_json(), parse_constant=constant)
    assert fields["alpha"] == [0.4, "inf"]
    assert fields["num_experts"] == 6
    assert (fields["format"], fields["version"], fields["num_layers"]) == ("laep-plan", 4, 2)
    lines = GOOD.to_json().splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines[1:3]] == fields["layers"]
    assert len(lines) == 4


def test_domains_are_kept_and_must_be_shares():
    layers = tuple(dataclasses.replace(layer, domain_shares={"law": 0.25, "code": 0.0}) for layer in GOOD.layers)
    rule = dataclasses.replace(GOOD.rule, domain_beta=0.3, min_experts=2, max_experts=5)
    plan = dataclasses.replace(GOOD, rule=rule, layers=layers)
    assert Plan.from_json(plan.to_json()) == plan
    for wrong in ('{"law": 1.25', '{"law": -0.5', '{"law": "x"', '{"law": [0.25]'):
        with pytest.raises(UserError, match="domain_shares"):
            Plan.from_json(plan.to_json().replace('{"law": 0.25', wrong))


def test_older_versions_are_read():
    assert Plan.from_json(text(version=2)) == Plan.from_json(text(version=1, rounding="restore")) == GOOD


SLOTTED = dataclasses.replace(
    LAYER,
    slots=((0, 3, 5), (5, 1, -1)),
    shares=((1.0, 1.0, 0.25), (0.75, 1.0, 0.0)),
    slot_load=(12.25, 12.25),
)


def test_a_part_of_the_slots_is_refused():
    fields = json.loads(dataclasses.replace(GOOD, layers=(SLOTTED, SLOTTED)).to_json())
    del fields["layers"][1]["shares"]
    with pytest.raises(UserError, match=r"layers\[1\] keys=.* lack \['shares'\]"):
        Plan.from_json(json.dumps(fields))


def test_slots_survive_json_and_are_there_where_there_are_replicas_only():
    plan = dataclasses.replace(GOOD, layers=(SLOTTED, SLOTTED))
    assert Plan.from_json(plan.to_json()) == plan
    layer = json.loads(plan.to_json())["layers"][0]
    assert (layer["slots"], layer["shares"]) == ([[0, 3, 5], [5, 1, -1]], [[1.0, 1.0, 0.25], [0.75, 1.0, 0.0]])
    assert not {"slots", "shares", "slot_load"} & json.loads(GOOD.to_json())["layers"][0].keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": ((0, 3), (5, 1, -1))}, r"layers\[1\] slots and shares=.* must be of one shape, for 2 devices"),
        ({"slot_load": (12.25,)}, r"layers\[1\] slots and shares=.* must be of one shape"),
        ({"shares": ()}, r"layers\[1\] slots and shares=.* must be of one shape"),
        ({"slots": ((0, 3, 3), (5, 1, -1))}, r"layers\[1\].slots=\(0, 3, 3\) has an expert twice on one device"),
        ({"slots": ((0, 3, 2), (5, 1, -1))}, r"layers\[1\].slots=2 is no kept expert, nor -1 with a share of 0"),
        ({"shares": ((1.0, 1.0, 0.25), (0.75, 1.0, 0.5))}, r"layers\[1\].slots=-1 is no kept expert"),
        ({"shares": ((1.0, 1.0, 0.25), (0.25, 1.0, 0.0))}, r"layers\[1\].shares of experts=\[5\] do not add up to 1"),
        ({"slot_load": (1e9, 0.0)}, r"layers\[1\].slot_load=.* must add up to that of \(12.5, 12.0\)"),
        ({"slots": (), "shares": (), "slot_load": ()}, r"replica slots of layers=\[0, 1\] must be the same"),
        ({"shares": ((1.0, 1.0, -0.25), (1.25, 1.0, 0.0))}, r"layers\[1\] loads=.* must be finite and not negative"),
    ],
)
def test_malformed_slots_are_refused(changes, message):
    with pytest.raises(UserError, match=f"^{message}"):
        dataclasses.replace(GOOD, layers=(SLOTTED, dataclasses.replace(SLOTTED, **changes)))


def test_experts_are_listed_where_the_layers_differ():
    small = dataclasses.replace(LAYER, kept=(1, 0), pruned=(), eligible=())
    plan = dataclasses.replace(GOOD, num_experts=(6, 2), layers=(LAYER, small))
    assert json.loads(plan.to_json())["num_experts"] == [6, 2]
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(text(num_experts=[6, 6])) == GOOD


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": ()}, "num_layers=0 must be at least 1"),
        ({"num_experts": (6,)}, "entries of alpha=2 must be num_layers=1"),
        ({"alpha": (0.4,)}, "entries of alpha=1 must be num_layers=2"),
        ({"layers": (LAYER,)}, "entries of layers=1 must be num_layers=2"),
        ({"num_experts": (8, 6)}, r"layers\[0\] kept and pruned=.* must be 0 to 7, each once"),
        ({"num_experts": (6, 10**12)}, r"layers\[1\] kept and pruned=.* must be 0 to 999999999999, each once"),
        ({"expert_parallel": 7}, r"num_experts\[0\]=6 is below expert_parallel=7"),
        ({"expert_parallel": 5}, r"layers\[0\] kept count=4 must be at least expert_parallel=5"),
        ({"expert_parallel": 1}, r"layers\[0\] devices=2 must be expert_parallel=1"),
        ({"top_k": 7}, r"num_experts\[0\]=6 is below top_k=7"),
        ({"top_k": 5}, r"layers\[0\] kept count=4 must be at least top_k=5"),
    ],
)
def test_malformed_plans_are_refused(changes, message):
    with pytest.raises(UserError, match=f"^{message}"):
        changed(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept": (3, 0, 1, 1)}, r"layers\[1\] kept and pruned=\(3, 0, 1, 1, 2, 4\) must be 0 to 5, each once"),
        ({"kept": (3, 0, 1, 6)}, r"layers\[1\] kept and pruned=.* must be 0 to 5, each once"),
        ({"kept": (3, 0, 1)}, r"layers\[1\] kept and pruned=.* must be 0 to 5, each once"),
        ({"pruned": (4, 2)}, r"layers\[1\].pruned=\(4, 2\) must be ascending ids below 6"),
        ({"eligible": (5, 2)}, r"layers\[1\].eligible=\(5, 2\) must be ascending ids below 6"),
        ({"eligible": (2, 2)}, r"layers\[1\].eligible=\(2, 2\) must be ascending"),
        ({"eligible": (2, 6)}, r"layers\[1\].eligible=\(2, 6\) must be ascending ids below 6"),
        ({"eligible": (-1, 2)}, r"layers\[1\].eligible=\(-1, 2\) must be ascending"),
        ({"kept": (), "pruned": tuple(range(6))}, r"layers\[1\] kept count=0 must be at least top_k=2"),
        ({"device_load": (24.5,)}, r"layers\[1\] devices=1 must be expert_parallel=2"),
        ({"device_load": (25.0, -0.5)}, r"layers\[1\] loads=.* must be finite and not negative"),
        ({"lower_bound": math.inf}, r"layers\[1\] loads=.* must be finite and not negative"),
        ({"imbalance_before": math.nan}, r"layers\[1\] loads=.* must be finite and not negative"),
        ({"imbalance_after": -1.0}, r"layers\[1\] loads=.* must be finite and not negative"),
    ],
)
def test_malformed_layers_are_refused(changes, message):
    with pytest.raises(UserError, match=f"^{message}"):
        dataclasses.replace(GOOD, layers=(LAYER, dataclasses.replace(LAYER, **changes)))


OTHER = [
    ("", "plan is not JSON: Expecting value"),
    (GOOD.to_json()[:-3], "plan is not JSON"),
    ("[" * 100_000, "plan is not JSON"),
    ("[1]", "plan='list' must be a JSON object"),
    ("{}", "plan format=None must be 'laep-plan'"),
    (text(format="eplb"), "plan format='eplb' must be 'laep-plan'"),
    (text(version=None), r"plan version=None must be one of \(1, 2, 3, 4\)"),
    (text(version="2"), "plan version='2' must be one of"),
    (text(version=2.0), "plan version=2.0 must be one of"),
    (text(version=3, rounding="restore"), "rounding='restore' must be one of keep_more, prune, none"),
    (text(beta=None), r"plan keys=.* lack \['beta'\]"),
    (text(gamma=1, delta=2), r"plan keys=\['delta', 'gamma'\] are unknown"),
    (text(num_layers=2.0), "num_layers=2.0 must be an integer"),
    (text(num_layers=3), "num_layers=3 does not fit 2 layers"),
    (text(num_experts="6"), "num_experts='6' must be an integer"),
    (text(num_experts=[6, True]), "num_experts=True must be an integer"),
    (text(num_experts=[6]), "entries of alpha=2 must be num_layers=1"),
    (text(expert_parallel=2.0), "expert_parallel=2.0 must be an integer"),
    (text(top_k=True), "top_k=True must be an integer"),
    (text(alpha=0.4), "alpha=0.4 must be a list"),
    (text(alpha=[0.4, "Infinity"]), "alpha='Infinity' must be a finite number"),
    (text(alpha=[0.4, math.inf]), "plan is not JSON: 'Infinity' is not a finite number"),
    (text(beta="0.1"), "beta='0.1' must be a finite number"),
    (text(beta=False), "beta=False must be a finite number"),
    (text(beta=math.nan), "plan is not JSON: 'NaN' is not a finite number"),
    (text(beta=10**400), r"beta=10+\.\.\.0+ must be a finite number"),
    (text(rounding="restore"), "rounding='restore' must be one of keep_more, prune, none"),
    (text(estimator=1), "estimator=1 must be of type str"),
    (text(placement=["greedy"]), r"placement=\['greedy'\] must be of type str"),
    (text(layers={}), "layers={} must be a list"),
    (text(layers=[1, 2]), r"layers\[0\]=1 must be a JSON object"),
    (layer_text(kept=None), r"layers\[1\] keys=.* lack \['kept'\]"),
    (layer_text(keep=[]), r"layers\[1\] keys=\['keep'\] are unknown"),
    (layer_text(kept="3015"), r"layers\[1\].kept='3015' must be a list"),
    (layer_text(kept=[3, 0, 1, 5.0]), r"layers\[1\].kept=5.0 must be an integer"),
    (layer_text(pruned=[2, [4]]), r"layers\[1\].pruned=\[4\] must be an integer"),
    (layer_text(device_load=24.5), r"layers\[1\].device_load=24.5 must be a list"),
    (layer_text(device_load=[12.5, "12"]), r"layers\[1\].device_load='12' must be a finite number"),
    (layer_text(lower_bound=[12]), r"layers\[1\].lower_bound=\[12\] must be a finite number"),
    (layer_text(kept=[3, 0, 1, 1]), r"layers\[1\] kept and pruned=.* must be 0 to 5, each once"),
]


@pytest.mark.parametrize(("plan", "message"), OTHER, ids=[message for _, message in OTHER])
def test_other_json_is_refused(plan, message):
    with pytest.raises(UserError, match=f"^{message}") as error:
        Plan.from_json(plan)
    assert "\n" not in str(error.value)


def test_any_json_is_a_sound_plan_or_refused(fuzz):
    def check(data):
        text = json.dumps(fuzz.json(data.draw, json.loads(GOOD.to_json())))
        plan = fuzz.reads(lambda: Plan.from_json(text))
        assert plan is None or Plan.from_json(plan.to_json()) == plan

    fuzz(check)


def test_any_text_is_a_sound_plan_or_refused(fuzz):
    def check(data):
        text = data.draw(fuzz.bytes(GOOD.to_json().encode())).decode("utf-8", "surrogateescape")
        plan = fuzz.reads(lambda: Plan.from_json(text))
        assert plan is None or Plan.from_json(plan.to_json()) == plan

    fuzz(check)
