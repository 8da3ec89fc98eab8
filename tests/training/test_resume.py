"""What a checkpoint says of its run is checked, and every setting is either fixed or free on resuming."""

import copy
import dataclasses
import json

import numpy as np
import pytest

from laep_jax.config import Config, DataConfig, LaepConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from laep_jax.errors import UserError
from laep_jax.fields import settings_of
from laep_jax.laep.load import LoadHistory
from laep_jax.laep.plan import identity_plan
from laep_jax.laep.stability import assess, history_capacity
from laep_jax.training.prune.controller import Controller
from laep_jax.training.resume import check_resumable, find_run_state
from laep_jax.training.run_state import PendingPrune, RunState

WHERE = "run/checkpoints/7"
CONFIG = Config(model=ModelConfig(num_layers=2, num_experts=4)).resolve(4)
FIELDS = [
    (name, type(part).__name__, field.name) for name, part in vars(CONFIG).items() for field in dataclasses.fields(part)
]


def run_state(**changes) -> RunState:
    return dataclasses.replace(RunState.fresh(CONFIG, "sha"), step=7, **changes)


def planned() -> RunState:
    return run_state(pending=PendingPrune(identity_plan((4, 4), expert_parallel=4, top_k=2), made=5, due=9))


@pytest.mark.parametrize(("part", "cls", "field"), FIELDS, ids=[f"{cls}.{field}" for _, cls, field in FIELDS])
def test_a_changed_setting_is_refused_or_told(part, cls, field):
    changed = copy.deepcopy(CONFIG)
    object.__setattr__(getattr(changed, part), field, "another")
    difference = f"{cls}.{field} {getattr(getattr(CONFIG, part), field)!r} -> 'another'"
    if settings_of(getattr(CONFIG, part))[field].fixed:
        with pytest.raises(UserError) as error:
            check_resumable(run_state(), changed, "sha", WHERE)
        assert str(error.value) == f"another run than that of checkpoint {WHERE}: {difference}; use another workdir"
    else:
        assert check_resumable(run_state(), changed, "sha", WHERE) == [difference]


@pytest.mark.parametrize(("devices", "expert"), [(8, 4), (16, 4), (2, 2), (6, 2)])
def test_an_open_expert_axis_stays_what_the_run_had(devices, expert):
    """Resolved anew it would be 8 on 8 devices."""
    open_mesh = Config(model=ModelConfig(num_layers=2, num_experts=12), data=DataConfig(batch_size=48))
    pruned = run_state(config=open_mesh.resolve(4).to_dict(), num_experts=(8, 8), lineage=(tuple(range(8)),) * 2)
    meta = json.loads(json.dumps(pruned.to_meta()))
    resumed, _ = find_run_state(open_mesh, "sha", WHERE, meta, devices)
    assert Config.from_dict(resumed.config).mesh == MeshConfig(fsdp=devices // expert, expert=expert)


def test_every_device_of_another_expert_axis_must_have_an_expert():
    config = Config(model=ModelConfig(num_layers=2, num_experts=24), data=DataConfig(batch_size=48))
    pruned = run_state(config=config.resolve(4).to_dict(), num_experts=(6, 6), lineage=(tuple(range(6)),) * 2)
    meta = json.loads(json.dumps(pruned.to_meta()))
    with pytest.raises(UserError, match=r"num_experts\[0\]=6 is below MeshConfig.expert=8"):
        find_run_state(dataclasses.replace(config, mesh=MeshConfig(expert=8)), "sha", WHERE, meta, 8)


def test_a_rate_that_jumps_is_named():
    """Raising num_steps stretches a cosine, but not the constant part of a WSD schedule."""
    for schedule, stretched in (("cosine", True), ("wsd", False)):
        config = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(schedule=schedule, warmup_steps=2))
        old, new = (dataclasses.replace(config, train=TrainConfig(num_steps=steps)) for steps in (10, 40))
        meta = json.loads(json.dumps(run_state(config=old.to_dict()).to_meta()))
        changed = find_run_state(new, "sha", WHERE, meta, 4)[1]
        assert changed[0] == "TrainConfig.num_steps 10 -> 40"
        assert [text.startswith("the learning rate of step 8 ") for text in changed[1:]] == [True] * stretched


def test_every_difference_that_is_refused_is_named_at_once():
    new = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, dtype="bfloat16", ffn_size=8),
        train=TrainConfig(num_steps=500, seed=3),
    )
    differences = [
        "ModelConfig.ffn_size 256 -> 8",
        "ModelConfig.dtype 'float32' -> 'bfloat16'",
        "TrainConfig.seed 0 -> 3",
        "the corpus: other text",
    ]
    with pytest.raises(UserError) as error:
        check_resumable(run_state(), new, "ahs", WHERE)
    assert str(error.value).endswith(f"/7: {'; '.join(differences)}; use another workdir")
    assert check_resumable(run_state(), CONFIG, "sha", WHERE) == []
    with pytest.raises(
        UserError, match=r"the corpus: another tokenizer \(bytes -> 0123456789ab\); use another workdir$"
    ):
        check_resumable(
            dataclasses.replace(run_state(), fingerprint="a/bytes"), CONFIG, f"b/{'0123456789ab' * 4}", WHERE
        )


@pytest.mark.parametrize("make", [run_state, planned])
def test_meta_comes_back(make):
    meta = json.loads(json.dumps(make().to_meta()))
    assert RunState.from_meta(meta, WHERE).to_meta() == meta


def test_a_loss_that_is_not_finite_leaves_the_checkpoint_readable():
    state = run_state()
    state.summary.validation_loss_end = float("nan")
    meta = json.loads(json.dumps(state.to_meta(), allow_nan=False))
    assert RunState.from_meta(meta, WHERE).summary.validation_loss_end is None


OTHER_PLAN = identity_plan((8, 8), expert_parallel=4, top_k=2).to_json()
WRONG = {
    "step": [8, "7", -7, 7.0, True, "../7"],
    "config": [None, {"model": {"num_layers": "2"}}, {"model": 1}, {"modell": {}}, {"model": {"layer": 1}}],
    "fingerprint": [None, 1],
    "num_experts": [[4], [4, "4"], 4, [4, 2], [0, 0]],
    "fitted_buffer": ["1", 0.5, True],
    "lineage": [None, [[0, 1, 2, 3]], [[0, 1, 2, 3], [0, 1, 2, 4]], [[0, 1, 2, 2]] * 2, [[0, 1, 2, "3"]] * 2, [1, 2]],
    "prunes": [-1, None],
    "pending": [
        "x",
        {},
        *(planned().to_meta()["pending"] | wrong for wrong in ({"plan": "{}"}, {"plan": OTHER_PLAN}, {"made": 8})),
        *(
            planned().to_meta()["pending"] | wrong
            for wrong in ({"made": "../x"}, {"made": 0}, {"due": 6}, {"due": "9"})
        ),
    ],
    "summary": [
        None,
        {},
        [1],
        *(planned().summary.to_dict() | wrong for wrong in ({"tokens": None}, {"prune_steps": ["x"]}, {"y": 1})),
    ],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_meta_of_wrong_types_or_parts_that_do_not_fit_is_refused(field, value):
    with pytest.raises(UserError):
        RunState.from_meta(json.loads(json.dumps(planned().to_meta())) | {field: value}, WHERE)


def test_experts_that_only_the_config_claims_take_no_memory():
    config = {"model": {"num_layers": 2, "num_experts": 2**31 - 1}}
    assert RunState.from_meta(json.loads(json.dumps(planned().to_meta())) | {"config": config}, WHERE).step == 7


def test_any_meta_is_a_progress_or_refused(fuzz):
    valid = json.loads(json.dumps(planned().to_meta()))

    def check(data):
        meta = fuzz.json(data.draw, valid)
        read = fuzz.reads(lambda: RunState.from_meta(meta, WHERE))
        if read is not None:
            assert RunState.from_meta(json.loads(json.dumps(read.to_meta())), WHERE).to_meta() == read.to_meta()
            fuzz.reads(lambda: read.current(CONFIG).resolve(4))

    fuzz(check)


@pytest.mark.parametrize("window", [2, 4, 6])
@pytest.mark.parametrize("stable_windows", [1, 2, 4])
def test_other_windows_judge_by_what_is_recorded_and_by_all_once_it_is(window, stable_windows):
    """The history of a checkpoint is as long as the old windows needed; new ones wait for what they lack."""
    old = LaepConfig(window=4, stable_windows=2, min_step=1, max_regret=1.0)
    new = dataclasses.replace(old, window=window, stable_windows=stable_windows)
    shares_LE = np.arange(1, 5) * np.ones((2, 1))
    tokens_NLE = np.random.default_rng(0).poisson(100 * shares_LE, (60, 2, 4))
    uninterrupted = [LoadHistory((4, 4), history_capacity(laep)) for laep in (old, new)]
    for history in uninterrupted:
        for step in range(1, 25):
            history.record(step, list(tokens_NLE[step]))
    resumed = LoadHistory.from_arrays(uninterrupted[0].to_arrays(), history_capacity(new))
    at_once = assess(resumed, new)
    assert at_once.consecutive <= assess(uninterrupted[1], new).consecutive
    assert at_once.stable <= assess(uninterrupted[1], new).stable
    for step in range(25, 25 + history_capacity(new)):
        for history in (resumed, uninterrupted[1]):
            history.record(step, list(tokens_NLE[step]))
    assert assess(resumed, new) == assess(uninterrupted[1], new)
    assert assess(resumed, new).stable


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, r"lack \['steps'\]"),
        ({"steps": np.array([1, 1])}, "must ascend"),
        ({"steps": np.array([1.0, 2.0])}, "history=.* is not"),
        ({"tokens": np.zeros((2, 7), np.int64)}, r"history=\(2, 7\) is not \(2, 8\)"),
        (
            {"tokens": np.zeros((2, 12), np.int64), "num_experts": np.array([6, 6])},
            r"history=\(6, 6\) is not of \(4, 4\)",
        ),
    ],
)
def test_a_history_that_is_none_or_of_another_model_is_refused(changes, message):
    arrays = {"num_experts": np.array([4, 4]), "steps": np.array([1, 2]), "tokens": np.zeros((2, 8), np.int64)}
    arrays = {name: array for name, array in (arrays | changes).items() if array is not None}
    with pytest.raises(UserError, match=message):
        Controller(CONFIG, history=LoadHistory.from_arrays(arrays, 9))
