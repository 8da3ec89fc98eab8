import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from laep_jax.checkpoint import manifest
from laep_jax.checkpoint.arrays import bytes_needed, bytes_read
from laep_jax.checkpoint.checkpointer import Checkpoints
from laep_jax.checkpoint.manifest import DamagedError
from laep_jax.errors import UserError
from laep_jax.sharding import leaf_spec
from laep_jax.state import surgery
from tests.fault_injection.damage import folder_of, open_stored
from tests.support.tiny_run import complete_steps

COUNTS = (16, 16, 8, 8)
META = {"config": {"model": {"num_experts": [16, 8], "lfa": True}}, "plan": None, "lineage": [[3, 1], []], "lr": 2e-3}


@pytest.fixture
def checkpoints(storage):
    with Checkpoints(storage.root, keep=3) as checkpoints:
        yield checkpoints


def delete(tree):
    for leaf in jax.tree.leaves(tree):
        leaf.delete()


def small(value: float = 0.0):
    return {"params": {"scale_D": jax.numpy.full(8, value, np.float32)}}


def value_at(checkpoints, step: int) -> float:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), small())
    return float(checkpoints.restore(step, abstract)["params"]["scale_D"][3])


def test_everything_comes_back_though_changed_right_after_save(states, checkpoints):
    mesh = states.mesh()
    state = states.random(COUNTS, mesh)
    want = states.by_layer(state, COUNTS)
    history = {
        "tokens_per_expert": np.arange(24).reshape(2, 3, 4) + 2**40,
        "steps": np.zeros((0, 3), np.int64),
        "stable": np.array([True, False]),
        "correlation": np.array([0.1, np.nan]),
    }
    kept_history = {name: array.copy() for name, array in history.items()}
    meta = {**META, "lineage": [[3, 1], []]}
    checkpoints.save(4, state, history, meta, COUNTS)
    delete(state)
    meta["lineage"][0][0] = 99
    for array in history.values():
        array[...] = 0
    checkpoints.wait()
    states.assert_equal(states.by_layer(checkpoints.restore(4, states.abstract(COUNTS, mesh)), COUNTS), want)
    assert checkpoints.read_meta(4) == META
    read = checkpoints.read_history(4)
    assert read.keys() == kept_history.keys()
    for name, array in kept_history.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def test_orbax_itself_reads_what_was_saved(states, storage, checkpoints):
    state = states.random(COUNTS, states.mesh())
    checkpoints.save(4, state, {}, META)
    checkpoints.wait()
    leaves = {surgery.leaf_key(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}
    as_numpy = dict.fromkeys(leaves, ocp.RestoreArgs(restore_type=np.ndarray))
    with ocp.PyTreeCheckpointer() as orbax:
        stored = orbax.restore(storage.path(f"{folder_of(storage, 4)}/state"), restore_args=as_numpy)
    jax.tree.map(np.testing.assert_array_equal, stored, leaves)


def test_donating_the_state_right_after_save_is_safe(states, checkpoints):
    mesh = states.mesh()
    state = states.random(COUNTS, mesh)
    want = states.by_layer(state, COUNTS)
    wipe = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0, tree), donate_argnums=0)
    checkpoints.save(1, state, {}, META, COUNTS)
    wipe(state)
    checkpoints.wait()
    states.assert_equal(states.by_layer(checkpoints.restore(1, states.abstract(COUNTS, mesh)), COUNTS), want)


@pytest.mark.parametrize("sizes", [(1, 2, 4), (2, 2, 2), (1, 1, 4), (1, 2, 1), (1, 1, 1)])
def test_both_ways_to_prune_agree_with_slicing_on_every_mesh(states, checkpoints, sizes):
    new = (8, 16, 4, 8)
    kept, mesh = states.plan(COUNTS, new), states.mesh(*sizes)
    state = states.random(COUNTS, states.mesh())
    whole, cut = states.by_layer(state, COUNTS), states.pruned_by_layer(state, COUNTS, kept)
    checkpoints.save(7, state, {}, META, COUNTS)
    checkpoints.wait()

    restored = checkpoints.restore(7, states.abstract(COUNTS, mesh))
    states.assert_equal(states.by_layer(restored, COUNTS), whole)
    abstract = states.abstract(new, mesh)
    from_disk = checkpoints.restore_pruned(7, abstract, kept)
    states.assert_equal(states.by_layer(from_disk, new), cut)
    for got, want in zip(jax.tree.leaves(from_disk), jax.tree.leaves(abstract), strict=True):
        assert got.sharding == want.sharding
    if sizes == (1, 2, 4):
        rows_N = surgery.kept_rows(COUNTS, kept)
        gathers = surgery.compile_gathers(states.abstract(COUNTS, mesh), len(rows_N))
        in_memory = surgery.prune_state(restored, gathers, rows_N)
        states.assert_equal(states.by_layer(in_memory, new), cut)


@pytest.mark.parametrize("new", [COUNTS, (8, 8, 8, 8)])
def test_restoring_pruned_of_plans_that_keep_all_or_make_layers_equal(states, checkpoints, new):
    mesh = states.mesh()
    state = states.random(COUNTS, mesh)
    kept = [list(range(count)) for count in COUNTS] if new == COUNTS else states.plan(COUNTS, new)
    checkpoints.save(7, state, {}, META, COUNTS)
    checkpoints.wait()
    got = checkpoints.restore_pruned(7, states.abstract(new, mesh), kept)
    states.assert_equal(states.by_layer(got, new), states.pruned_by_layer(state, COUNTS, kept))


def test_restoring_pruned_reads_the_survivors_only(states, checkpoints):
    """Of a bucket what lies less than 1 MB apart is read in one request; an expert has 1 MiB here, on one device."""
    mesh = states.mesh(1, 1, 1)
    shape = (32, 512, 512)
    rng = np.random.default_rng(0)
    sharding = jax.sharding.NamedSharding(mesh, leaf_spec("gate_up_NDG", shape, mesh))
    leaf = jax.device_put(rng.normal(size=shape).astype(np.float32), sharding)
    checkpoints.save(1, {"gate_up_NDG": leaf}, {}, META, (16, 16))
    checkpoints.wait()
    abstract = {"gate_up_NDG": jax.ShapeDtypeStruct((8, 512, 512), np.float32, sharding=sharding)}
    before = bytes_read()
    got = checkpoints.restore_pruned(1, abstract, [[5, 0, 11, 2], [3, 15, 1, 8]])
    read = bytes_read() - before
    assert got["gate_up_NDG"].nbytes == leaf.nbytes // 4 == bytes_needed(abstract)
    assert 1 <= read / bytes_needed(abstract) < 1.1


def test_experts_are_stored_one_a_chunk_and_uncompressed(states, storage, checkpoints):
    mesh = states.mesh()
    checkpoints.save(1, states.random(COUNTS, mesh), {}, META)
    checkpoints.wait()
    keys = [
        "params.experts.gate_up_NDG",
        "opt_state.1.0.mu.experts.down_NFD",
        "params.layers.attention.query_JD",
    ]
    stored = {key: open_stored(storage.path(f"{folder_of(storage, 1)}/state"), key) for key in keys}
    assert [stored[key].chunk_layout.read_chunk.shape for key in keys] == [
        (1, 32, 4),  # fsdp=2 and expert=4 split 2 F=32
        (1, 2, 32),
        (1, 16, 32),  # fsdp=2 splits the rows, which are those of the heads
    ]
    [codec] = stored[keys[0]].spec().to_json()["metadata"]["codecs"]
    assert [inner["name"] for inner in codec["configuration"]["codecs"]] == ["bytes"]


def other_dtype(state):
    leaf = state.params["final_norm"]["scale_D"]
    state.params["final_norm"]["scale_D"] = jax.ShapeDtypeStruct(leaf.shape, jax.numpy.bfloat16, sharding=leaf.sharding)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.params.pop("embedding_VD"),
            r"params\.embedding_VD is stored as float32\[64, 32\], .*nothing",
        ),
        (
            lambda state: state.params.update(new=state.step),
            r"params\.new is stored as nothing, expected int32\[\]",
        ),
        (other_dtype, r"final_norm\.scale_D is stored as float32\[32\], expected bfloat16\[32\]$"),
    ],
)
def test_state_of_another_tree_or_dtype_is_refused(states, checkpoints, change, message):
    mesh = states.mesh()
    checkpoints.save(2, states.random(COUNTS, mesh), {}, META, COUNTS)
    checkpoints.wait()
    abstract = states.abstract(COUNTS, mesh)
    change(abstract)
    with pytest.raises(UserError, match=message):
        checkpoints.restore(2, abstract)
    with pytest.raises(UserError, match=message):
        checkpoints.restore_pruned(2, abstract, [range(count) for count in COUNTS])


def test_state_of_other_expert_counts_is_refused(states, checkpoints):
    mesh = states.mesh()
    checkpoints.save(2, states.random(COUNTS, mesh), {}, META, COUNTS)
    checkpoints.wait()
    message = (
        r"2 does not fit: params\.experts\.\w+ is stored as .*\[48.*, expected .*\[40.* \(\d+ more leaves differ\)"
    )
    with pytest.raises(UserError, match=message):
        checkpoints.restore(2, states.abstract((12, 12, 8, 8), mesh))
    with pytest.raises(UserError, match=r"plan kept\[2\]=.* must name distinct slots from 0 to 7"):
        checkpoints.restore_pruned(2, states.abstract((12, 12, 12, 8), mesh), [range(12)] * 3 + [range(8)])


def test_what_is_no_complete_step_is_put_aside_or_left_alone(storage, checkpoints, caplog):
    assert checkpoints.newest_valid() is None
    for step in (3, 5):
        checkpoints.save(step, small(step), {}, META)
    checkpoints.wait()
    strange = {
        "8": b"no folder",
        "notes/x": b"",
        "007/manifest.json": b"no step",
        "7/0123abcd/state/x": b"no manifest",
        "9/manifest.json": b'{"half": ',
        "9/0123abcd/x": b"",
    }
    for name, content in strange.items():
        storage.write(name, content)
    assert checkpoints.newest_valid() == 5
    message = r"9/manifest\.json is damaged.*; step 9 is put aside \(damaged\.json\), and the run resumes"
    assert re.search(message, caplog.text)
    assert complete_steps(storage) == [3, 5, 7]
    del strange["9/manifest.json"]
    assert {*strange, "9/damaged.json"} < storage.files("").keys()
    for step in (9, 10):
        with pytest.raises(DamagedError, match=rf"{step}/manifest\.json does not read: No such file"):
            checkpoints.restore(step, small())
    checkpoints.save(9, small(9), {}, META)  # in the place of one that was put aside
    checkpoints.wait()
    assert value_at(checkpoints, 9) == 9
    assert checkpoints.newest_valid() == 9
    with Checkpoints(storage.root, keep=3) as again:
        assert "7/0123abcd/state/x" in storage.files("")
        again.settle()
        assert "7/0123abcd/state/x" not in storage.files("")
        assert again.newest_valid() == 9
    assert {"8", "notes/x", "007/manifest.json", "9/damaged.json", "9/0123abcd/x"} < storage.files("").keys()


def test_orbax_is_quiet_below_warnings(checkpoints, caplog):
    with caplog.at_level(logging.INFO), caplog.at_level(logging.INFO, logger="absl"):
        checkpoints.save(1, small(), {}, META)
        checkpoints.wait()
        absl.logging.info("not of Orbax")
    told = [record.getMessage() for record in caplog.records if not record.name.startswith("fsspec")]
    assert told == ["not of Orbax"]


def test_the_newest_complete_steps_are_kept(storage, checkpoints):
    storage.write("90/x", b"")
    for step in range(1, 6):
        checkpoints.save(step, small(step), {}, META)
    checkpoints.wait()
    assert complete_steps(storage) == [3, 4, 5]
    assert storage.entries() == ["3", "4", "5", "90"]
    assert value_at(checkpoints, 3) == 3


def test_saving_a_step_again_replaces_it(storage, checkpoints):
    for step, value in ((10, 1), (20, 2), (20, 3), (10, 4)):
        checkpoints.save(step, small(value), {"n": np.array([value])}, {"value": value})
    checkpoints.wait()
    assert [(value_at(checkpoints, step), checkpoints.read_meta(step)["value"]) for step in (10, 20)] == [
        (4, 4),
        (3, 3),
    ]
    assert [len(storage.entries(step)) for step in ("10", "20")] == [2, 2]  # a manifest and a folder


def test_an_old_layout_is_refused_with_the_version_that_reads_it(storage, checkpoints):
    storage.write("5/manifest.json", manifest.sealed({"meta.json": [2, None]}).encode())
    with pytest.raises(UserError, match=r"5/manifest\.json is of laep_jax 0\.1, which reads it; this version"):
        checkpoints.newest_valid()


def run_script(directory: str, body: str) -> subprocess.CompletedProcess:
    head = """
        import os, resource, signal, sys, time
        import jax, numpy as np
        from laep_jax.checkpoint.checkpointer import Checkpoints
        from laep_jax.storage import open_storage
        storage = open_storage(sys.argv[1])
        def state(value, size=2**22):
            return {"params": {"scale_D": jax.numpy.full(size, value, np.float32)}}
        """
    script = textwrap.dedent(head) + textwrap.dedent(body)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, "-c", script, directory], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("ending", ["sys.exit(0)", "raise RuntimeError('in the loop')"])
def test_leaving_right_after_save_waits_for_it(storage, ending):
    result = run_script(
        storage.root,
        f"""
        with Checkpoints(sys.argv[1], keep=2) as checkpoints:
            checkpoints.save(3, state(3.0, 8), {{}}, {{}})
            {ending}
        """,
    )
    assert result.returncode == (1 if "raise" in ending else 0)
    assert ("in the loop" in result.stderr) == ("raise" in ending)
    with Checkpoints(storage.root, keep=2) as checkpoints:
        assert checkpoints.newest_valid() == 3
        assert value_at(checkpoints, 3) == 3


KILL = "os.kill(os.getpid(), signal.SIGKILL)"
MOMENTS = {  # of a save at which the process is killed, and whether the new one counts then
    "the state is being written": (f"while len(storage.entries('STEP')) < OLD + 1: pass\n{KILL}", False),
    "before the manifest": (f"Steps.complete = lambda *_: {KILL}", False),
    "after the manifest": (f"Steps._remove_unnamed = lambda *_: {KILL}", True),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("again", [False, True], ids=["new", "again"])
def test_a_kill_in_a_save_leaves_the_step_before_or_the_new_one(storage, moment, again):
    strike, counts = MOMENTS[moment]
    step = 1 if again else 2
    strike = strike.replace("STEP", str(step)).replace("OLD", "2" if again else "0")
    before, after = (strike, "") if "Steps" in strike else ("", strike)
    result = run_script(
        storage.root,
        f"""
        from laep_jax.checkpoint.steps import Steps
        with Checkpoints(sys.argv[1], keep=2) as checkpoints:
            checkpoints.save(1, state(1.0, 8), {{}}, {{}}, now=True)
            {before or "pass"}
            checkpoints.save({step}, state(2.0, 8), {{}}, {{}})
{textwrap.indent(after, " " * 12)}
            checkpoints.wait()
        """,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    left = [folder for folder in storage.entries(str(step)) if len(folder) == 8]
    assert len(left) == 1 + again, "killed too late to show anything"
    with Checkpoints(storage.root, keep=2) as checkpoints:
        checkpoints.settle()
        newest = checkpoints.newest_valid()
        assert newest == (step if counts else 1)
        assert value_at(checkpoints, newest) == (2 if counts else 1)
        assert sum(len(storage.entries(str(name))) for name in (1, 2)) == 2 * len(complete_steps(storage))
        checkpoints.save(2, small(3), {}, META)
        checkpoints.wait()
        assert checkpoints.newest_valid() == 2
        assert value_at(checkpoints, 2) == 3


@pytest.mark.parametrize("storage", ["disk"], indirect=True)
def test_failed_save_raises_in_wait_and_leaves_the_step_it_would_replace(storage):
    result = run_script(
        storage.root,
        """
        with Checkpoints(sys.argv[1], keep=2) as checkpoints:
            checkpoints.save(1, state(1.0, 8), {}, {})
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))  # a full disk
            checkpoints.save(1, state(5.0), {}, {})
            try:
                checkpoints.wait()
            except Exception as error:
                print("raised", type(error).__name__)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            print("latest", checkpoints.newest_valid())
            checkpoints.save(2, state(2.0, 8), {}, {})
        """,
    )
    assert result.returncode == 0, result.stderr
    assert "raised" in result.stdout
    assert "latest 1" in result.stdout
    with Checkpoints(storage.root, keep=2) as checkpoints:
        assert (value_at(checkpoints, 1), value_at(checkpoints, 2)) == (1, 2)
    assert [len(storage.entries(step)) for step in ("1", "2")] == [2, 2]


def test_what_cannot_be_saved_is_refused_before_anything_is_written(storage, checkpoints):
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(1, small(), {}, {"array": np.zeros(2)})
    with pytest.raises(ValueError, match="Object arrays"):
        checkpoints.save(1, small(), {"text": np.array([{}])}, {})
    assert storage.entries() == []
