"""Whole runs of a tiny model, with a prune in the middle: resuming, both ways to cut, what is refused."""

import ast
import functools
import gc
import inspect
import json
import re
import shutil
import signal
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest

from laep_jax.checkpoint.checkpointer import Checkpoints, SaveError
from laep_jax.checkpoint.lock import exclusive
from laep_jax.checkpoint.manifest import make_manifest
from laep_jax.checkpoint.saved import Saved
from laep_jax.checkpoint.steps import Steps
from laep_jax.config import Config, MeshConfig
from laep_jax.data.dataset import make_dataset
from laep_jax.data.tokenizer import BYTES
from laep_jax.errors import StoppedError, UserError
from laep_jax.evaluation.decoding import generate
from laep_jax.evaluation.scoring import load_model
from laep_jax.gin_config import load_config
from laep_jax.laep import command as plan_command
from laep_jax.laep.load import LoadHistory
from laep_jax.laep.plan import Plan
from laep_jax.laep.recorded_loads import read_current_counts, read_loads
from laep_jax.preflight import run as preflight_run
from laep_jax.sharding import make_mesh
from laep_jax.state.surgery import pruned_config
from laep_jax.state.tree import abstract_state, initial_layout
from laep_jax.storage import Disk
from laep_jax.training import loop
from laep_jax.training.evaluate import masked_loss, validation_loss
from laep_jax.training.prune.controller import Controller
from laep_jax.training.start import train
from laep_jax.training.step import make_eval_step, make_train_step
from tests.fault_injection.damage import change_stored, damage_file, flip_bit, folder_of
from tests.support.tiny_run import change, complete_steps, differences, records, steps_on_disk, tiny_config
from tests.support.watching import InterruptError, after, before, interrupt, terminate

PLAN_STEP, PRUNE_STEP, NUM_STEPS = 10, 13, 20


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="session")
def config(cache_dir) -> Config:
    return tiny_config(
        cache_dir,
        model={"num_layers": 3, "num_experts": 8},
        laep={"alpha": 0.9, "beta": 0.4, "prune_at_step": PLAN_STEP, "prune_delay": PRUNE_STEP - PLAN_STEP},
        train={"num_steps": NUM_STEPS, "eval_every": 8, "eval_batches": 2, "checkpoint_every": 6, "sample_every": 5},
    )


@pytest.fixture(scope="session")
def run(config, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("run")
    train(config, run_dir)
    return run_dir


def test_a_run_goes_through_the_whole_cycle(run, config):
    summary = json.loads((run / "summary.json").read_text())
    [prune] = records(run, "prune")
    assert (prune["step"], prune["plan_step"], prune["plan"]) == (PRUNE_STEP, PLAN_STEP, f"plans/{PLAN_STEP}.json")
    assert set(prune["seconds"]) == {"plan", "evaluate", "save", "restore", "compile"}
    assert summary["prune_steps"] == [PRUNE_STEP]
    assert summary["experts_before"] == [8, 8, 8]
    assert 0.25 <= 1 - sum(summary["experts_after"]) / 24 <= 0.5
    assert set(summary["experts_after"]) <= {4, 8}
    assert summary["parameters_after"] < summary["parameters_before"]
    assert summary["steps"] == NUM_STEPS
    assert all(value is not None for value in summary.values())
    losses = [record["loss"] for record in records(run, "train")]
    assert len(losses) == NUM_STEPS
    assert losses[-1] < losses[0] - 0.3
    assert all(2**24 < record["peak_memory_bytes"] < 2**40 for record in records(run, "train"))
    [start] = records(run, "start")
    assert start["step"] == 0
    assert "8 cpu devices" in start["devices"]
    assert "JAX" in start["machine"]
    assert [record["step"] for record in records(run, "train")] == list(range(1, NUM_STEPS + 1))
    assert [(record["step"], record["when"]) for record in records(run, "eval")] == [
        (8, "periodic"),
        (PLAN_STEP, "before_prune"),
        (PLAN_STEP, "after_prune"),
        (16, "periodic"),
        (NUM_STEPS, "end"),
    ]


def test_samples_are_the_greedy_text_of_the_checkpoints_and_change_nothing(run, config, tmp_path, capsys):
    """Of the model after each step, after the prune too. Without them the run is the same, bit for bit."""
    samples = {record["step"]: record for record in records(run, "sample")}
    assert list(samples) == [5, 10, 15, NUM_STEPS]
    often = change(config, train={"checkpoint_every": 5})
    train(often, tmp_path / "often")
    shown = " ".join(capsys.readouterr().out.split())
    for step, sample in samples.items():
        saved = Saved(f"{tmp_path}/often/checkpoints/{step}")
        assert saved.num_experts == ((8, 8, 8) if step < PRUNE_STEP else saved.num_experts)
        model = load_model(saved, saved.config.resolve(8), make_mesh(config.mesh))
        assert len(sample["prompt"]) == 16
        prompt = list(sample["prompt"].encode())
        params, bias_N = model["params"], model["router_bias"]["bias_N"]
        tokens = list(generate(params, bias_N, prompt, saved.config.model, max_tokens=16))
        assert sample["text"] == BYTES.decode(tokens[: tokens.index(256)] if 256 in tokens else tokens)
        assert f"step {step}: after {sample['prompt']!r} the model writes" in shown
    assert len({sample["text"] for sample in samples.values()}) > 1
    train(change(config, train={"sample_every": None}), tmp_path / "without")
    assert differences(tmp_path / "without", run) == ["sample records"]


def test_recorded_loads_are_every_token_and_none_of_the_pruned(run, config):
    [prune] = records(run, "prune")
    tokens_NLE = read_loads(run).tokens_NLE
    assert tokens_NLE.shape == (NUM_STEPS, 3, 8)
    np.testing.assert_array_equal(np.maximum(tokens_NLE, 0).sum(2), 2 * 16 * 32)
    assert (tokens_NLE[:PRUNE_STEP] >= 0).all()
    for layer, ids in enumerate(prune["lineage"]):
        for row_E in tokens_NLE[PRUNE_STEP:, layer]:
            assert sorted(ids) == np.flatnonzero(row_E >= 0).tolist()


def test_counts_of_the_run_directory_are_what_the_run_itself_would_plan_by(run, config):
    counts, told = read_current_counts(run)
    assert told == f"steps {PRUNE_STEP + 1} to {NUM_STEPS} of {run}, after the prune of step {PRUNE_STEP}"
    with Checkpoints(run / "checkpoints", keep=9) as checkpoints:
        history = LoadHistory.from_arrays(checkpoints.read_history(NUM_STEPS), NUM_STEPS)
    for counts_NE, window_NE in zip(counts, history.window(len(history)), strict=True):
        np.testing.assert_array_equal(counts_NE[-len(history) :], window_NE)


def test_a_plan_from_the_run_directory_is_one_for_the_model_as_it_now_is(run, config, tmp_path, capsys):
    options = ["--expert-parallel=2", "--top-k=2", "--alpha=inf", "--beta=0.9", f"--out={tmp_path / 'plan.json'}"]
    plan_command.main([f"--counts={run}", *options])
    assert (
        f"steps {PRUNE_STEP + 1} to {NUM_STEPS} of {run}, after the prune of step {PRUNE_STEP}"
        in capsys.readouterr().out
    )
    [prune] = records(run, "prune")
    current, _, source = preflight_run._read_counts(config, run)
    assert list(current.model.experts_per_layer) == prune["experts_after"]
    assert source.startswith(f"steps {PRUNE_STEP + 1} to {NUM_STEPS}")
    planned = change(current, mesh={"fsdp": 4, "expert": 2}, laep={"plan": str(tmp_path / "plan.json")})
    controller = Controller(planned)
    assert controller.prune_plan({}).num_experts == current.model.experts_per_layer


def test_a_run_interrupted_again_and_again_resumes_as_if_nothing_had_been(run, config, tmp_path, capsys):
    """Before any checkpoint, before the plan, between plan and prune, right after the prune, and later."""
    steps, checkpoints = (3, 9, 13, 15, 19), (0, 6, 12, PRUNE_STEP, 18)
    for step, checkpoint in zip(steps, checkpoints, strict=True):
        with pytest.raises(InterruptError):
            train(config, tmp_path, watch=after("record", step, interrupt))
        assert max([0, *steps_on_disk(tmp_path)]) == checkpoint
    train(config, tmp_path)
    shown = " ".join(capsys.readouterr().out.split())
    for step, checkpoint in zip(steps[1:], checkpoints[1:], strict=True):
        assert f"resuming from step {checkpoint}" in shown
        assert f"; steps {checkpoint + 1} to {step} are done again" in shown
    assert [record["step"] for record in records(tmp_path, "start")] == [*checkpoints]
    assert not differences(tmp_path, run)


def test_a_run_told_to_stop_again_and_again_resumes_as_if_nothing_had_been(run, config, tmp_path):
    found = signal.getsignal(signal.SIGTERM)
    for step in (3, 8, PLAN_STEP, PRUNE_STEP):  # an ordinary one, then boundaries: evaluation, plan, prune
        with pytest.raises(StoppedError, match=f"stopped and saved after step {step}; started again, the run resumes"):
            train(config, tmp_path, watch=after("record", step - 1, terminate))
        assert steps_on_disk(tmp_path)[-1] == step
        assert signal.getsignal(signal.SIGTERM) is found
    train(config, tmp_path, watch=after("record", NUM_STEPS - 1, terminate))  # the last step is done: nothing to stop
    assert not differences(tmp_path, run)


def test_interrupted_in_the_middle_of_the_prune_the_plan_is_applied_from_disk(run, config, tmp_path):
    for _ in range(2):  # the second time while it recovers
        with pytest.raises(InterruptError):
            train(config, tmp_path, watch=before("restore", PRUNE_STEP, interrupt))
    with pytest.raises(InterruptError):
        train(config, tmp_path, watch=after("record", PRUNE_STEP + 1, interrupt))
    assert [record["step"] for record in records(tmp_path, "stability")] == [4, 8, PLAN_STEP]  # no new decision
    train(config, tmp_path)
    assert not differences(tmp_path, run)


def test_pruning_in_memory_gives_the_same_run_and_releases_the_old_step(run, config, tmp_path, monkeypatch):
    steps = []

    def make(*args):
        step = inspect.unwrap(make_train_step)(*args)  # tests/conftest.py keeps what the other makes
        steps.append(weakref.ref(step))
        return step

    def look() -> None:
        gc.collect()
        alive.extend(step() is not None for step in steps)

    def verify(self, state, kept, verify=Checkpoints.verify_pruned):
        verified.append([len(slots) for slots in kept])
        verify(self, state, kept)

    alive: list[bool] = []
    verified: list[list[int]] = []
    monkeypatch.setattr(Checkpoints, "verify_pruned", verify)
    monkeypatch.setattr("laep_jax.training.prune.compile_ahead.make_train_step", make)
    train(change(config, laep={"prune_via": "memory"}), tmp_path, watch=after("record", PRUNE_STEP + 1, look))
    [prune] = records(tmp_path, "prune")
    assert "bytes_read" not in prune
    assert alive == [False, False]  # the old model's, and the smaller one's, of which the compiled step is left
    assert verified == [prune["experts_after"]]
    monkeypatch.undo()
    assert not differences(tmp_path, run)


@pytest.mark.parametrize("ends", ["reported", "killed"])
def test_a_prune_in_memory_does_not_need_its_save(run, config, tmp_path, monkeypatch, capsys, ends):
    """The disk is full until the smaller model trains. Killed there, the run comes to the same prune from before it."""
    complete, begun = Steps.complete, []

    def full_at_the_prune(self, step, *rest):
        begun.append(step)
        if step == PRUNE_STEP:
            raise OSError(28, "No space left on device")
        complete(self, step, *rest)

    monkeypatch.setattr(Steps, "complete", full_at_the_prune)
    in_memory = change(config, laep={"prune_via": "memory"})
    if ends == "killed":
        with pytest.raises(SaveError):  # on the way out; the interrupt is its context
            train(in_memory, tmp_path, watch=after("record", PRUNE_STEP + 1, interrupt))
        assert max(begun) == PRUNE_STEP
        assert max(steps_on_disk(tmp_path)) < PRUNE_STEP
        monkeypatch.undo()
    train(in_memory, tmp_path)
    failed = f"checkpoints/{PRUNE_STEP} could not be saved: OSError: [Errno 28]" in capsys.readouterr().out
    assert failed == (ends == "reported")
    assert not differences(tmp_path, run)


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    (to / "summary.json").unlink()
    return to / "checkpoints"


def test_from_the_newest_checkpoint_that_validates_it_is_the_same_run_though_saves_fail(
    run, config, tmp_path, monkeypatch, capsys
):
    """Damage that the manifest tells, that fingerprints tell, and that a hash tells, back to before the prune."""
    checkpoints = copied(run, tmp_path / "x")
    storage = Disk(checkpoints)
    folders = {step: folder_of(storage, step) for step in (13, 18, 20)}
    storage.remove(f"{folders[20]}/state/manifest.ocdbt")
    change_stored(storage, 18, "params.experts.down_NFD", (1, 2, 3))
    damage_file(storage, f"{folders[13]}/history.npz", flip_bit)
    storage.write("13/manifest.json", make_manifest(storage, *folders[13].split("/")).encode())
    complete, failing = Steps.complete, [13, 18]

    def full_now_and_then(self, step, *rest):
        if step in failing:
            failing.remove(step)
            raise OSError(28, "No space left on device")
        complete(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Steps, "complete", full_now_and_then)
        train(config, tmp_path / "x")
    assert not differences(tmp_path / "x", run)
    lines = [line for line in capsys.readouterr().out.splitlines() if str(checkpoints) in line]
    aside = "is put aside (damaged.json), and the run resumes from an older one"
    assert [line.removeprefix(f"checkpoint {checkpoints}/").removeprefix(f"{checkpoints}/") for line in lines] == [
        f"{folders[20]}/state/manifest.ocdbt is missing; step 20 {aside}",
        f"{folders[18]} is damaged: params.experts.down_NFD of layer 0, expert 1 is not what was saved;"
        f" step 18 {aside}",
        f"{folders[13]}/history.npz is damaged: it does not have the hash it was saved with; step 13 {aside}",
        "13 could not be saved: OSError: [Errno 28] No space left on device",
        "18 could not be saved: OSError: [Errno 28] No space left on device",
    ]
    assert complete_steps(storage) == [6, 12, 13, 20]
    assert all("damaged.json" in storage.entries(str(step)) for step in folders)


def test_without_a_checkpoint_that_validates_nothing_begins_again(run, config, tmp_path):
    checkpoints = copied(run, tmp_path / "x")
    storage = Disk(checkpoints)
    for step in complete_steps(storage):
        damage_file(storage, f"{folder_of(storage, step)}/meta.json", flip_bit)
    metrics = (tmp_path / "x" / "metrics.jsonl").read_bytes()
    for _ in range(2):
        with pytest.raises(UserError, match=r"no checkpoint in .* validates"):
            train(config, tmp_path / "x")
    assert (tmp_path / "x" / "metrics.jsonl").read_bytes() == metrics
    assert complete_steps(storage) == []


def test_two_runs_in_one_directory_or_on_a_small_disk_are_refused(config, tmp_path, monkeypatch):
    with exclusive(Disk(tmp_path)), pytest.raises(UserError, match=r"is in use by process \d+ on "):
        train(config, tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=10**5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"has 0\.00 GB free, and 2 checkpoints"):
        train(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_the_pruned_model_has_the_loss_that_masking_predicts(run, config):
    plan = Plan.from_json((run / "plans" / f"{PLAN_STEP}.json").read_text())
    mesh = make_mesh(config.mesh)
    data = make_dataset(
        config.data,
        eval_batches=config.train.eval_batches,
        seed=0,
        vocab_size=config.model.vocab_size,
        process_index=0,
        process_count=1,
    )
    smaller = pruned_config(config, plan.kept)
    with Checkpoints(run / "checkpoints", keep=9) as checkpoints:
        state = checkpoints.restore(PRUNE_STEP, abstract_state(config, mesh))
        pruned = checkpoints.restore_pruned(PRUNE_STEP, abstract_state(smaller, mesh), plan.kept)
    measured_on = [data.validation_batch(i) for i in range(config.train.eval_batches)], mesh, data.domains
    step, smaller_step = (
        functools.partial(make_eval_step(of, mesh, len(data.domains)), initial_layout(of)) for of in (config, smaller)
    )
    before, after = validation_loss(step, state, *measured_on), validation_loss(smaller_step, pruned, *measured_on)
    predicted = masked_loss(step, state, plan, *measured_on)
    assert after.loss == pytest.approx(predicted.loss, rel=1e-6)  # float32 sums over experts, other order
    assert after.loss_by_domain == pytest.approx(predicted.loss_by_domain, rel=1e-6)
    assert abs(after.loss - before.loss) > 1e-5


def test_the_validation_loss_is_logged_by_domain(run):
    [validation] = records(run, "validation")
    targets = validation["targets_by_domain"]
    assert len(targets) > 3
    for record in records(run, "eval"):
        losses = record["validation_loss_by_domain"]
        assert losses.keys() == targets.keys()
        mean = sum(losses[name] * targets[name] for name in targets) / sum(targets.values())
        assert record["validation_loss"] == pytest.approx(mean, rel=1e-9)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["validation_targets_by_domain"] == targets
    assert summary["validation_loss_by_domain"]["end"] == losses
    assert set(summary["validation_loss_by_domain"]) == {"periodic", "before_prune", "after_prune", "end"}


def test_a_finished_run_only_shows_its_table_again(run, config, capsys):
    """Also with other free settings, which are not those that made it."""
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    summary = train(change(config, train={"log_every": 3}, laep={"alpha": 0.1}), run)
    assert summary == json.loads((run / "summary.json").read_text())
    assert "validation loss" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before


def test_a_run_keeps_its_settings_and_its_model_as_gin(run, config):
    """Also one that was started from Python."""
    assert load_config([str(run / "operative.gin")]) == config
    [prune] = records(run, "prune")
    assert load_config([str(run / "model.gin")]).model.num_experts == tuple(prune["experts_after"])


def test_rebalancing_evens_the_devices_and_changes_no_loss(config, tmp_path):
    laep = {"prune_at_step": None, "max_prunes": 0}
    short = change(config, laep=laep, train={"num_steps": 16, "checkpoint_every": 16})
    train(change(short, laep={"rebalance_every": None, "replica_slots": 0}), tmp_path / "still")
    train(short, tmp_path / "moved")
    moves = records(tmp_path / "moved", "rebalance")
    assert [move["step"] for move in moves] == [3, 6, 9, 12, 15]
    for move in moves[1:]:
        assert max(move["levelled_imbalance"]) < 1.1 < max(move["device_imbalance"])
    still, moved = (records(tmp_path / name, "train") for name in ("still", "moved"))
    losses = [[record["loss"] for record in run] for run in (still, moved)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)  # sums in another order, sixteen steps on
    assert all(max(record["device_imbalance"]) < 1.2 for record in moved[3:])
    assert np.mean([max(record["device_imbalance"]) for record in still]) > 1.3


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(("record", PRUNE_STEP - 1), id="before", marks=pytest.mark.slow),
        pytest.param(("restore", PRUNE_STEP), id="at the prune"),
    ],
)
def test_a_plan_made_on_one_mesh_is_applied_on_another(config, tmp_path, stage):
    often = change(config, train={"checkpoint_every": 1})
    with pytest.raises(InterruptError):
        train(often, tmp_path, watch=before(*stage, interrupt))
    train(change(often, mesh={"fsdp": 4, "expert": 2}), tmp_path)
    [prune] = records(tmp_path, "prune")
    assert prune["step"] == PRUNE_STEP
    assert len(records(tmp_path, "train")) == NUM_STEPS


def test_on_another_mesh_or_with_other_slots_a_resumed_run_places_experts_anew(config, tmp_path):
    short = change(config, laep={"prune_at_step": None, "max_prunes": 0}, train={"num_steps": 7, "checkpoint_every": 7})
    train(short, tmp_path)
    longer = change(short, laep={"replica_slots": 0}, mesh={"fsdp": 4, "expert": 2}, train={"num_steps": 10})
    train(longer, tmp_path)
    assert [record["step"] for record in records(tmp_path, "rebalance")] == [3, 6, 9]
    assert [len(record["device_imbalance"]) for record in records(tmp_path, "train")] == [3] * 10


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"train": {"seed": 1}, "model": {"ffn_size": 16}},
            r"/20: ModelConfig\.ffn_size 8 -> 16; TrainConfig\.seed 0 -> 1;",
        ),
        ({"model": {"num_experts": (8, 8, 4)}}, r"ModelConfig\.num_experts \(8, 8, 8\) -> \(8, 8, 4\); use another"),
        ({"data": {"sequence_length": 64}}, r"DataConfig\.sequence_length 32 -> 64; use another workdir"),
        ({"mesh": {"fsdp": 1, "expert": 8}}, r"num_experts\[\d\]=4 is below MeshConfig\.expert=8"),
        ({"mesh": {"fsdp": 3}}, "does not divide 8 devices"),
        ({"data": {"batch_size": 12}}, r"DataConfig\.batch_size=12 is not divisible by 8 devices"),
        ({"data": {"source": "text", "path": "nowhere"}}, r"DataConfig\.path='nowhere'"),
        ({"model": {"vocab_size": 128}}, r"ModelConfig\.vocab_size=128 is below"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_lost(run, config, parts, message):
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    with pytest.raises(UserError, match=message) as error:
        train(change(config, **parts), run)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before


def test_a_link_in_the_run_directory_is_refused_and_not_written_through(config, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plans").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="plans is a link"):
        train(config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["plans"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def whole(state) -> dict[str, bytes]:
    """Shape, dtype and bytes of every leaf, in host order."""
    leaves = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(state)[0]}
    return {name: repr((x.shape, x.dtype)).encode() + x.tobytes() for name, x in leaves.items()}


@pytest.mark.parametrize("step", [PRUNE_STEP, NUM_STEPS], ids=["before the prune", "after it"])
def test_the_state_is_the_same_from_8_to_4_to_2_to_1_devices_and_back(run, config, tmp_path, step):
    source, seen = run / "checkpoints", []
    for devices, fsdp, expert in ((8, 2, 4), (4, 1, 4), (4, 4, 1), (2, 1, 2), (1, 1, 1), (8, 4, 2)):
        mesh = make_mesh(MeshConfig(1, fsdp, expert), jax.devices()[:devices])
        with Checkpoints(source, keep=9) as checkpoints:
            meta = checkpoints.read_meta(step)
            model = config.with_num_experts(tuple(meta["num_experts"]))
            state = checkpoints.restore(step, abstract_state(model, mesh))
            history = checkpoints.read_history(step)
        seen.append(whole(state) | whole(history))
        source = tmp_path / str(len(seen))
        with Checkpoints(source, keep=1) as checkpoints:
            checkpoints.save(step, state, history, meta)
    different = [name for name in seen[0] for other in seen if other[name] != seen[0][name]]
    assert not different


def test_a_new_run_that_is_refused_leaves_nothing(config, tmp_path):
    with pytest.raises(UserError, match="does not divide"):
        train(change(config, mesh={"fsdp": 3}), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_receive_buffer_follows_the_loads_at_a_prune_and_stays_so_on_resuming(
    config, tmp_path, monkeypatch, capsys
):
    buffers = []

    def recording(config, mesh):
        buffers.append(config.model.receive_buffer)
        return make_train_step(config, mesh)

    monkeypatch.setattr("laep_jax.training.prune.compile_ahead.make_train_step", recording)
    bounded = change(config, model={"dispatch": "ragged_all_to_all", "receive_buffer": 4.0}, train={"num_steps": 14})
    train(bounded, tmp_path)
    plan = Plan.from_json((tmp_path / "plans" / f"{PLAN_STEP}.json").read_text())
    worst = max(layer.imbalance_after for layer in plan.layers)
    assert buffers == [4.0, pytest.approx(min(1.1 * worst, 4))]
    assert buffers[1] < 4.0
    capsys.readouterr()
    train(change(bounded, train={"num_steps": 16}), tmp_path)
    assert buffers[2:] == buffers[1:2]
    assert "changed since the checkpoint: TrainConfig.num_steps 14 -> 16" in " ".join(capsys.readouterr().out.split())


def test_every_field_that_a_run_records_is_documented(run):
    text = (Path(__file__).parents[2] / "docs" / "run_directory.md").read_text()
    sections = dict(part.split("\n", 1) for part in text.replace("\n### ", "\n## ").split("\n## ")[1:])

    def documented(section: str) -> set[str]:
        return set(re.findall(r"`(\w+)`", sections[section]))

    written = {record["kind"]: record.keys() - {"kind", "step"} for record in records(run)}
    for path in Path(loop.__file__).parent.rglob("*.py"):  # kinds that this run has not
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("log.write"):
                kind = ast.literal_eval(call.args[0]) if isinstance(call.args[0], ast.Constant) else "skipped"
                written.setdefault(kind, set()).update({keyword.arg for keyword in call.keywords} - {None})
    assert {"train", "prune", "dry_run", "start", "settings", "skipped"} <= written.keys()
    for kind, fields in written.items():
        assert fields <= documented(kind), kind
    assert json.loads((run / "summary.json").read_text()).keys() <= documented("summary.json")
    for path in run.iterdir():
        assert f"`{path.name}" in text, path
