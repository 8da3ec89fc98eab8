"""Checkpoints that are damaged, cannot be written, or lose their power."""

import errno
import json
import os
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest

from laep_jax.checkpoint import checkpointer, manifest, steps
from laep_jax.checkpoint.checkpointer import Checkpoints, SaveError
from laep_jax.checkpoint.lock import TakenOverError
from laep_jax.checkpoint.manifest import DamagedError, check_files, sealed
from laep_jax.checkpoint.steps import MANIFEST, Steps
from laep_jax.errors import UserError
from laep_jax.state import fingerprint
from laep_jax.storage import Disk
from tests.fault_injection.damage import DAMAGES, change_stored, damage_file, flip_bit, folder_of
from tests.fault_injection.power import mounted, not_on_disk, recorded_syncs
from tests.support.tiny_run import complete_steps

COUNTS = (16, 16, 8, 8)
SMALL = {"params": {"scale_D": np.arange(8, dtype=np.float32)}}


def small(value: float = 0.0):
    return jax.tree.map(lambda x: jax.numpy.asarray(x + np.float32(value)), SMALL)


def value_at(checkpoints, step: int) -> float:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), SMALL)
    return float(checkpoints.restore(step, abstract)["params"]["scale_D"][0])


@pytest.fixture
def checkpoints(storage):
    with Checkpoints(storage.root, keep=2) as checkpoints:
        yield checkpoints


@pytest.fixture(scope="module")
def saved(states, tmp_path_factory):
    """A checkpoint of a state, and its values; not to be changed."""
    state = states.random(COUNTS, states.mesh())
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(directory, keep=2) as checkpoints:
        checkpoints.save(7, state, {"steps": np.arange(3)}, {"plan": "a plan"}, COUNTS)
    return directory, states.by_layer(state, COUNTS)


@pytest.fixture
def copied(saved, storage):
    copy(saved[0], storage)
    with Checkpoints(storage.root, keep=2) as checkpoints:
        yield checkpoints


def copy(source, storage) -> None:
    """Copies checkpoints from a disk."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            storage.write(path.relative_to(source).as_posix(), path.read_bytes())


def test_damage_to_any_file_is_found_and_the_file_named(saved, tmp_path):
    storage = Disk(tmp_path / "copy")
    copy(saved[0], storage)
    folder = folder_of(storage, 7)
    names = {f"7/{name}" for name in storage.files("7")}
    expected = ("meta.json", "history.npz", "fingerprints.npz", "state/manifest.ocdbt")
    assert {"7/manifest.json", *(f"{folder}/{name}" for name in expected)} < names
    check_files(storage, "7", MANIFEST)
    for name in names:
        for damage in DAMAGES.values():
            damage_file(storage, name, damage)
            with pytest.raises(DamagedError, match=re.escape(storage.path(name))):
                check_files(storage, "7", MANIFEST)
            storage.write(name, (saved[0] / name).read_bytes())
    check_files(storage, "7", MANIFEST)


def test_damage_to_any_file_is_found_at_the_latest_when_it_is_read(states, saved, storage):
    """In a bucket only missing files are found before. It also is that a copied run can be read in a bucket."""
    copy(saved[0], storage)
    folder, abstract = folder_of(storage, 7), states.abstract(COUNTS, states.mesh())
    found = []
    for name in storage.files(folder):
        for kind, damage in DAMAGES.items():
            damage_file(storage, f"{folder}/{name}", damage)
            with Checkpoints(storage.root, keep=2) as checkpoints:
                try:
                    restored = checkpoints.restore(7, abstract)
                    checkpoints.read_history(7)
                except DamagedError as error:
                    found.append((name, kind, error.step))
                else:  # of a file that nothing needs
                    states.assert_equal(states.by_layer(restored, COUNTS), saved[1])
                if kind == "deleted":
                    with pytest.raises(UserError, match=r"no checkpoint in .* validates"):
                        checkpoints.newest_valid()
                    storage.move("7/damaged.json", "7/manifest.json")
            storage.write(f"{folder}/{name}", (saved[0] / folder / name).read_bytes())
    needed = ("meta.json", "history.npz", "fingerprints.npz", "state/manifest.ocdbt")
    assert {(name, kind, 7) for name in needed for kind in DAMAGES} <= {*found}


def test_large_files_are_known_by_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "HASHED_BYTES", 100)
    storage = Disk(tmp_path)
    storage.write("1/01234567/large", bytes(101))
    storage.write("1/manifest.json", manifest.make_manifest(storage, "1", "01234567").encode())
    damage_file(storage, "1/01234567/large", flip_bit)
    check_files(storage, "1", MANIFEST)
    storage.write("1/01234567/large", bytes(100))
    with pytest.raises(DamagedError, match="large has 100 bytes instead of 101"):
        check_files(storage, "1", MANIFEST)


@pytest.mark.parametrize("bit", [None, 1, 8 * 30])
def test_meta_and_history_are_compared_with_their_hashes(storage, copied, bit):
    folder = folder_of(storage, 7)
    for name, read in (("meta.json", copied.read_meta), ("history.npz", copied.read_history)):
        damage_file(storage, f"{folder}/{name}", lambda content: flip_bit(content, bit))
        with pytest.raises(DamagedError, match=rf"{folder}/{name} is damaged") as error:
            read(7)
        assert error.value.step == 7
        damage_file(storage, f"{folder}/{name}", lambda content: flip_bit(content, bit))
    assert copied.read_meta(7) == {"plan": "a plan"}
    np.testing.assert_array_equal(copied.read_history(7)["steps"], [0, 1, 2])


def test_arrays_of_another_version_are_refused_but_not_damaged(checkpoints, monkeypatch):
    monkeypatch.setattr(fingerprint, "to_arrays", lambda of_state: {"leaf": np.array(["step"])})
    checkpoints.save(1, small(), {}, {}, now=True)
    with pytest.raises(
        UserError, match=r"1/\w{8}/fingerprints\.npz does not read as an \.npz file of numbers: .*<U4"
    ) as error:
        value_at(checkpoints, 1)
    assert not isinstance(error.value, DamagedError)


def test_a_flipped_bit_in_the_data_is_never_restored(states, saved, storage, copied):
    """With the manifest aside, which knows large files by their size only. What each process wrote was merged."""
    abstract = states.abstract(COUNTS, states.mesh())
    rng = np.random.default_rng(0)
    [merged] = [name for name in storage.files("7") if "/state/d/" in name]
    size = (saved[0] / "7" / merged).stat().st_size
    for bit in rng.integers(8 * size, size=12).tolist():
        damage_file(storage, f"7/{merged}", lambda content, bit=bit: flip_bit(content, bit))
        with pytest.raises(DamagedError):
            copied.restore(7, abstract)
        damage_file(storage, f"7/{merged}", lambda content, bit=bit: flip_bit(content, bit))
    states.assert_equal(states.by_layer(copied.restore(7, abstract), COUNTS), saved[1])


def test_the_damaged_expert_is_named_and_matters_only_where_it_stays(states, saved, storage, copied):
    change_stored(storage, 7, "opt_state.1.0.mu.experts.down_NFD", (45, 3, 2))
    place = r"opt_state\.1\.0\.mu\.experts\.down_NFD of layer 3, expert 5 is not what was saved"
    mesh = states.mesh()
    with pytest.raises(DamagedError, match=place):
        copied.restore(7, states.abstract(COUNTS, mesh))
    new = states.abstract((8, 8, 8, 4), mesh)
    kept = states.plan(COUNTS, (8, 8, 8, 4))
    kept[3] = [1, 5, 2, 0]
    with pytest.raises(DamagedError, match=place):
        copied.restore_pruned(7, new, kept)
    kept[3] = [1, 4, 2, 0]
    got = copied.restore_pruned(7, new, kept)
    whole = states.random(COUNTS, mesh)
    states.assert_equal(states.by_layer(got, (8, 8, 8, 4)), states.pruned_by_layer(whole, COUNTS, kept))
    copied.verify(7, whole)
    copied.verify(7, got, kept)
    with pytest.raises(DamagedError, match=r"of layer 3, expert 4 .*more places.* is not what was saved"):
        copied.verify(7, got, [*kept[:3], [4, 1, 2, 0]])
    copied.save(8, whole, {}, {}, COUNTS)
    copied.verify_pruned(got, kept)  # wherever the save is
    with pytest.raises(RuntimeError, match=r"the state was not pruned as planned: .* of layer 3, expert 4"):
        copied.verify_pruned(got, [*kept[:3], [4, 1, 2, 0]])


def test_a_run_goes_on_from_the_newest_step_that_validates(storage):
    told = []
    with Checkpoints(storage.root, keep=3, report=told.append) as checkpoints:
        assert checkpoints.newest_valid() is None
        for step in (1, 2, 3):
            checkpoints.save(step, small(step), {}, {}, now=True)
        storage.remove(f"{folder_of(storage, 3)}/meta.json")
        assert checkpoints.newest_valid() == 2
        assert complete_steps(storage) == [1, 2]
        [line] = told
        rule = r"meta\.json is missing; step 3 is put aside \(damaged\.json\), and the run resumes from an older one"
        assert re.search(rule, line)
        checkpoints.save(3, small(3), {}, {}, now=True)
        assert checkpoints.newest_valid() == 3
        for step in (3, 2, 1):
            storage.remove(f"{folder_of(storage, step)}/meta.json")
        for _ in range(2):
            message = r"no checkpoint in .* validates; the manifests of those there were are now damaged\.json"
            with pytest.raises(UserError, match=message):
                checkpoints.newest_valid()
        assert complete_steps(storage) == []
    with Checkpoints(storage.root, keep=3) as again:
        again.settle()  # leaves what a person may want to look at
        assert [len(storage.entries(step)) for step in ("1", "2", "3")] == [2, 2, 2]
        with pytest.raises(UserError, match="no checkpoint in"):
            again.newest_valid()


def test_what_a_run_goes_on_from_is_validated_once(storage, checkpoints, monkeypatch):
    for step in (1, 2, 3):
        checkpoints.save(step, small(step), {}, {}, now=True)
    storage.remove(f"{folder_of(storage, 3)}/meta.json")
    validated = []
    check = steps.check_files
    monkeypatch.setattr(steps, "check_files", lambda *args: (validated.append(args[1]), check(*args)))
    assert checkpoints.newest_valid() == 2
    assert validated == ["3", "2"]


def test_a_save_that_does_not_open_is_a_failed_save(storage, checkpoints, monkeypatch):
    """As where Orbax took the path for a pattern: it had written nothing to find, and only warned."""

    def nothing_there(reader, store, keys):
        raise ValueError("NOT_FOUND: metadata")

    monkeypatch.setattr(checkpointer, "open_leaves", nothing_there)
    with pytest.raises(SaveError, match=r"checkpoint .*/1 could not be saved: ValueError: NOT_FOUND"):
        checkpoints.save(1, small(1), {}, {}, now=True)
    assert storage.entries() == []


def test_a_folder_that_another_start_has_emptied_is_a_failed_save(storage):
    """It took the folder for that of an interrupted save, a moment before the manifest."""
    told, emptied = [], []

    def take_over() -> None:
        if emptied is not None and storage.entries("2") and not emptied:
            [folder] = storage.entries("2")
            emptied.append(folder)
            storage.remove(f"2/{folder}")

    with Checkpoints(storage.root, keep=1, report=told.append, publish=take_over) as checkpoints:
        checkpoints.save(1, small(1), {}, {}, now=True)
        checkpoints.save(2, small(2), {}, {})
        checkpoints.save(3, small(3), {}, {}, now=True)
        assert "checkpoints/2 could not be saved: DamagedError: " in told[0]
        assert emptied
        assert checkpoints.newest_valid() == 3


@pytest.mark.parametrize("calls", [1, 2], ids=["before the manifest", "after it"])
def test_a_run_that_was_taken_over_removes_nothing_of_the_other(storage, calls):
    counted = []

    def publish() -> None:
        if storage.entries("2"):
            counted.append(1)
            if len(counted) >= calls:
                raise TakenOverError("by another")

    with Checkpoints(storage.root, keep=1, publish=publish) as checkpoints:
        checkpoints.save(1, small(1), {}, {}, now=True)
        storage.write("1/0123abcd/x", b"of the other")
        storage.write("2/0123abcd/x", b"of the other")
        checkpoints.save(2, small(2), {}, {})
        with pytest.raises(TakenOverError, match=r"^by another$"):
            checkpoints.wait()
    assert complete_steps(storage) == ([1] if calls == 1 else [1, 2])
    assert {"1/0123abcd/x", "2/0123abcd/x"} < storage.files("").keys()


def full_disk(failing: list[bool], monkeypatch) -> None:
    """The next saves fail, after Orbax has written its part, where it says so."""
    complete = steps.Steps.complete

    def failing_complete(self, step, *rest):
        if failing.pop(0):
            raise OSError(errno.ENOSPC, "No space left on device")
        complete(self, step, *rest)

    monkeypatch.setattr(steps.Steps, "complete", failing_complete)


def test_one_failed_save_is_reported_and_a_second_in_a_row_raises(storage, monkeypatch):
    full_disk([False, True, False, True, True], monkeypatch)
    told = []
    with Checkpoints(storage.root, keep=2, report=told.append) as checkpoints:
        for step in (1, 2, 3, 4, 5):
            checkpoints.save(step, small(step), {}, {})
        message = "5 could not be saved: OSError: [Errno 28] No space left on device"
        with pytest.raises(SaveError, match=re.escape(message)):
            checkpoints.save(6, small(6), {}, {})
        assert [re.search(r"(\d) could not be saved", text)[1] for text in told] == ["2", "4"]
        assert storage.entries() == ["1", "3"]
        assert complete_steps(storage) == [1, 3]
        assert (value_at(checkpoints, 1), value_at(checkpoints, 3)) == (1, 3)


def test_a_save_that_must_succeed_is_tried_twice(storage, checkpoints, monkeypatch):
    full_disk([True, False, True, True], monkeypatch)
    checkpoints.save(1, small(1), {}, {}, now=True)
    assert storage.entries() == ["1"]
    with pytest.raises(SaveError, match="2 could not be saved"):
        checkpoints.save(2, small(2), {}, {}, now=True)
    assert storage.entries() == ["1"]


def test_a_disk_that_is_full_at_once_fails_like_one_that_fills(checkpoints, monkeypatch):
    checkpoints.save(1, small(1), {}, {}, now=True)

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._orbax, "save", refuse)
        checkpoints.save(2, small(2), {}, {})
        with pytest.raises(SaveError, match="No space left"):
            checkpoints.wait()
    checkpoints.save(2, small(2), {}, {}, now=True)
    assert value_at(checkpoints, 2) == 2


def test_everything_of_a_step_is_on_disk_when_wait_returns(tmp_path, states):
    state = states.random(COUNTS, states.mesh())
    root = tmp_path / "checkpoints"
    with recorded_syncs() as syncs, Checkpoints(root, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {}, {}, now=True)
            assert len(list((root / str(step)).rglob("*"))) > 20
            assert not_on_disk(root, syncs) == []
        checkpoints.save(2, state, {}, {}, now=True)
        [folder] = [path for path in (root / "2").iterdir() if path.is_dir()]
        assert not_on_disk(folder, syncs) == []


def test_what_was_not_synced_since_its_last_change_shows(tmp_path):
    with recorded_syncs() as syncs:
        (tmp_path / "file").write_text("all")
        Disk(tmp_path).sync("")
        assert not_on_disk(tmp_path, syncs) == []
        (tmp_path / "file").write_text("more")
        assert not_on_disk(tmp_path, syncs) == [tmp_path / "file"]
        (tmp_path / "file").rename(tmp_path / "other")
        assert not_on_disk(tmp_path, syncs) == [tmp_path, tmp_path / "other"]


@pytest.mark.slow
@pytest.mark.parametrize("synced", [True, False])
def test_a_loss_of_power_after_wait_loses_nothing(tmp_path, monkeypatch, synced):
    if not synced:  # as it would be without
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    image, place = tmp_path / "image", tmp_path / "disk"
    try:
        with mounted(image, place, make=True), Checkpoints(place / "checkpoints", keep=2) as checkpoints:
            for step in (1, 2, 3):
                checkpoints.save(step, small(step), {}, {})
                checkpoints.wait()
                shutil.copy(image, tmp_path / f"at {step}")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    found = []
    for step in (1, 2, 3):
        with mounted(tmp_path / f"at {step}", place), Checkpoints(place / "checkpoints", keep=2) as after:
            try:
                latest = after.newest_valid()
            except UserError:  # all that there are were damaged
                latest = None
            found.append(latest)
            if latest:
                assert value_at(after, latest) == latest
    assert (found == [1, 2, 3]) == synced


def test_sealed_text_has_no_bit_to_spare(tmp_path):
    text, storage = sealed({"a": [1, None, "b"], "c": 0.5}).encode(), Disk(tmp_path)
    for bit in range(0, 8 * len(text), 7):
        (tmp_path / "x").write_bytes(flip_bit(text, bit))
        with pytest.raises(DamagedError):
            manifest.read_sealed(storage, "x")


@pytest.mark.parametrize("storage", ["disk"], indirect=True)
@pytest.mark.parametrize("name", ["meta.json", "manifest.json"])
def test_what_is_no_strict_json_or_no_file_is_damaged_at_once(storage, copied, name):
    nan = float("nan")
    path = storage.root / (f"{folder_of(storage, 7)}/meta.json" if name == "meta.json" else "7/manifest.json")
    of_nan = json.dumps({"sha256": manifest._hash_of(nan), "content": nan})
    twice = sealed(None).replace("{", '{"content":[],')
    for content in ("[" * 100_000, of_nan, twice, None):
        path.unlink()
        path.write_text(content) if content else os.mkfifo(path)
        with pytest.raises(DamagedError, match=f"{name} is damaged" if content else f"{name} does not read: it is not"):
            check_files(storage, "7", MANIFEST) if name == "manifest.json" else copied.read_meta(7)
        assert Steps(storage, keep=1).latest(lambda *_: None) is None
    with pytest.raises(ValueError, match="not JSON compliant"):
        sealed(nan)


def test_files_are_read_up_to_a_limit(storage, monkeypatch):
    storage.write("x", sealed([0] * 50).encode())
    assert manifest.read_sealed(storage, "x") == [0] * 50
    monkeypatch.setattr(manifest, "MAX_JSON", 150)
    with pytest.raises(DamagedError, match=r"x does not read: size of it=\d+ is above 150 bytes"):
        manifest.read_sealed(storage, "x")
