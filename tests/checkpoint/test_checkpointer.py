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

from laep_jax.checkpoint.checkpointer import Checkpoints
from laep_jax.checkpoint.manifest import DamagedError
from laep_jax.errors import UserError
from laep_jax.sharding import leaf_spec
from laep_jax.state import surgery
from tests.fault_injection.damage import open_stored

COUNTS = (16, 16, 8, 8)
META = {"config": {"model": {"num_experts": [16, 8], "lfa": True}}, "plan": None, "lineage": [[3, 1], []], "lr": 2e-3}


@pytest.fixture
def checkpoints(tmp_path):
    with Checkpoints(tmp_path / "a run" / "checkpoints", keep=3) as checkpoints:
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


def test_orbax_itself_reads_what_was_saved(states, checkpoints):
    state = states.random(COUNTS, states.mesh())
    checkpoints.save(4, state, {}, META)
    checkpoints.wait()
    leaves = {surgery.leaf_key(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}
    as_numpy = dict.fromkeys(leaves, ocp.RestoreArgs(restore_type=np.ndarray))
    with ocp.PyTreeCheckpointer() as orbax:
        stored = orbax.restore(checkpoints.directory / "4" / "state", restore_args=as_numpy)
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


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes as Linux does")
def test_restoring_pruned_reads_the_survivors_only(states, checkpoints):
    mesh = states.mesh()
    mib = 2**20
    shape = (32, 64, 256)  # 64 KiB an expert
    rng = np.random.default_rng(0)
    sharding = jax.sharding.NamedSharding(mesh, leaf_spec("gate_up_NDG", shape, mesh))
    leaf = jax.device_put(rng.normal(size=shape).astype(np.float32), sharding)
    checkpoints.save(1, {"gate_up_NDG": leaf}, {}, META, (16, 16))
    checkpoints.wait()
    abstract = {"gate_up_NDG": jax.ShapeDtypeStruct((8, 64, 256), np.float32, sharding=sharding)}
    before = bytes_read()
    got = checkpoints.restore_pruned(1, abstract, [[5, 0, 11, 2], [3, 15, 1, 8]])
    read = bytes_read() - before
    assert got["gate_up_NDG"].nbytes == leaf.nbytes // 4 == mib // 2
    assert mib // 2 <= read < mib // 2 * 1.4


def test_experts_are_stored_one_a_chunk_and_uncompressed(states, checkpoints):
    mesh = states.mesh()
    checkpoints.save(1, states.random(COUNTS, mesh), {}, META)
    checkpoints.wait()
    keys = [
        "params.experts.gate_up_NDG",
        "opt_state.1.0.mu.experts.down_NFD",
        "params.layers.attention.query_JD",
    ]
    stored = {key: open_stored(checkpoints.directory / "1" / "state", key) for key in keys}
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


def test_what_is_no_complete_step_is_put_aside_or_left_alone(checkpoints, caplog):
    assert checkpoints.newest_valid() is None
    for step in (3, 5):
        checkpoints.save(step, small(step), {}, META)
    checkpoints.wait()
    (checkpoints.directory / "7").mkdir()
    (checkpoints.directory / "8").write_text("no directory")
    (checkpoints.directory / "notes").mkdir()
    (checkpoints.directory / "9").mkdir()
    (checkpoints.directory / "9" / "manifest.json").write_text('{"half": ')
    assert checkpoints.newest_valid() == 5
    assert re.search(r"9/manifest\.json is damaged.*; it is now 9\.damaged, and the run", caplog.text)
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == [
        "3", "5", "7.damaged", "8", "9.damaged", "notes"
    ]  # fmt: skip
    for step in (9, 10):
        with pytest.raises(DamagedError, match=rf"{step}/meta\.json does not read: No such file"):
            checkpoints.restore(step, small())
    checkpoints.save(6, small(6), {}, META)
    checkpoints.save(7, small(7), {}, META)  # in the place of one that was put aside
    checkpoints.wait()
    assert (value_at(checkpoints, 6), value_at(checkpoints, 7)) == (6, 7)
    assert checkpoints.newest_valid() == 7


def test_orbax_is_quiet_below_warnings(checkpoints, caplog):
    with caplog.at_level(logging.INFO), caplog.at_level(logging.INFO, logger="absl"):
        checkpoints.save(1, small(), {}, META)
        checkpoints.wait()
        absl.logging.info("not of Orbax")
    assert [record.getMessage() for record in caplog.records] == ["not of Orbax"]


def test_the_newest_complete_steps_are_kept(checkpoints):
    (checkpoints.directory / "90").mkdir()
    for step in range(1, 6):
        checkpoints.save(step, small(step), {}, META)
    checkpoints.wait()
    names = sorted(path.name for path in checkpoints.directory.iterdir())
    assert names == ["3", "4", "5", "90"]
    assert value_at(checkpoints, 3) == 3


def test_saving_a_step_again_replaces_it(checkpoints):
    for step, value in ((10, 1), (20, 2), (20, 3), (10, 4)):
        checkpoints.save(step, small(value), {"n": np.array([value])}, {"value": value})
    checkpoints.wait()
    assert [(value_at(checkpoints, step), checkpoints.read_meta(step)["value"]) for step in (10, 20)] == [
        (4, 4),
        (3, 3),
    ]
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["10", "20"]


@pytest.mark.parametrize(("new_one_is_complete", "value"), [(False, 1), (True, 2)])
def test_interrupted_replacement_leaves_one_complete_step(checkpoints, new_one_is_complete, value):
    root = checkpoints.directory
    checkpoints.save(5, small(1), {}, META)
    checkpoints.wait()
    if new_one_is_complete:
        checkpoints.save(5, small(2), {}, META)
        checkpoints._saving[1].result()
        assert (root / "5.replaced").is_dir()
    else:
        os.rename(root / "5", root / "5.replaced")
        (root / "5").mkdir()
    with Checkpoints(root, keep=3) as again:
        assert again.newest_valid() == 5
        assert value_at(again, 5) == value
        assert [path.name for path in root.iterdir()] == ["5"]


def run_script(directory: Path, body: str) -> subprocess.CompletedProcess:
    head = """
        import os, resource, signal, sys
        import jax, numpy as np
        from laep_jax.checkpoint.checkpointer import Checkpoints
        def state(value, size=2**24):
            return {"params": {"scale_D": jax.numpy.full(size, value, np.float32)}}
        """
    script = textwrap.dedent(head) + textwrap.dedent(body)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, "-c", script, directory], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("ending", ["sys.exit(0)", "raise RuntimeError('in the loop')"])
def test_leaving_right_after_save_waits_for_it(tmp_path, ending):
    result = run_script(
        tmp_path,
        f"""
        with Checkpoints(sys.argv[1], keep=2) as checkpoints:
            checkpoints.save(3, state(3.0, 8), {{}}, {{}})
            {ending}
        """,
    )
    assert result.returncode == (1 if "raise" in ending else 0)
    assert ("in the loop" in result.stderr) == ("raise" in ending)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.newest_valid() == 3
        assert value_at(checkpoints, 3) == 3


def test_kill_in_the_middle_of_a_save_leaves_the_step_before(tmp_path):
    result = run_script(
        tmp_path,
        """
        with Checkpoints(sys.argv[1], keep=1) as checkpoints:
            checkpoints.save(1, state(1.0, 8), {}, {})
            checkpoints.wait()
            checkpoints.save(2, state(2.0), {}, {})
            while not any("saving" in name for name in os.listdir(sys.argv[1])):
                pass
            os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    assert result.returncode == -signal.SIGKILL
    assert any("saving" in path.name for path in tmp_path.iterdir()), "killed too late to show anything"
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.newest_valid() == 1
        assert value_at(checkpoints, 1) == 1
        checkpoints.save(2, small(2), {}, META)
        checkpoints.wait()
        assert checkpoints.newest_valid() == 2
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_failed_save_raises_in_wait_and_leaves_the_step_it_would_replace(tmp_path):
    result = run_script(
        tmp_path,
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
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert (value_at(checkpoints, 1), value_at(checkpoints, 2)) == (1, 2)


def test_what_cannot_be_saved_is_refused_before_anything_is_written(checkpoints):
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(1, small(), {}, {"array": np.zeros(2)})
    with pytest.raises(ValueError, match="Object arrays"):
        checkpoints.save(1, small(), {"text": np.array([{}])}, {})
    assert list(checkpoints.directory.iterdir()) == []
