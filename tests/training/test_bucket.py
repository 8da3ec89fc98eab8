"""Whole runs in a bucket of Cloud Storage, as an emulator has it, against the same run on a disk."""

import importlib.util
import json
import re
import shutil
import time

import numpy as np
import pytest

from laep_jax.checkpoint.lock import TakenOverError
from laep_jax.config import Config
from laep_jax.data import bucket as data_bucket
from laep_jax.errors import StoppedError, UnavailableError, UserError
from laep_jax.laep import command as plan_command
from laep_jax.mirror import Mirror
from laep_jax.report import command as report_command
from laep_jax.storage import open_storage
from laep_jax.training.check import check
from laep_jax.training.start import open_inputs, train
from tests.fault_injection.damage import damage_file, flip_bit, folder_of
from tests.support.emulator import new_folder
from tests.support.tiny_run import change, differences, steps_on_disk, tiny_config
from tests.support.watching import InterruptError, after, before, interrupt, terminate

PLAN_STEP, PRUNE_STEP, NUM_STEPS = 8, 10, 16


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return tiny_config(
        str(tmp_path_factory.mktemp("tokens")),
        laep={"prune_at_step": PLAN_STEP, "prune_delay": PRUNE_STEP - PLAN_STEP},
        train={"num_steps": NUM_STEPS, "checkpoint_every": 5, "keep_checkpoints": 2},
    )


@pytest.fixture(scope="module")
def on_disk(config, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    train(config, run_dir)
    return run_dir


@pytest.fixture
def address(emulator) -> str:
    return f"{new_folder()}/run"


@pytest.fixture
def in_bucket(config, address) -> str:
    train(config, address)
    return address


def records_in(files) -> set[str]:
    return {name for name in files if not name.startswith(("checkpoints/", "tensorboard/", ".", "run.lock"))}


def test_a_run_in_a_bucket_leaves_what_one_on_a_disk_leaves(config, on_disk, in_bucket, capsys):
    assert not differences(in_bucket, on_disk)
    bucket, disk = open_storage(in_bucket), open_storage(on_disk)
    assert records_in(bucket.files("")) == records_in(disk.files(""))
    assert steps_on_disk(in_bucket) == steps_on_disk(on_disk) == [15, NUM_STEPS]
    assert check(config, in_bucket)[-1] == f"{in_bucket}: the run is complete; nothing was trained"
    capsys.readouterr()
    assert train(config, in_bucket) == json.loads((on_disk / "summary.json").read_text()) | {
        name: value for name, value in json.loads(bucket.read("summary.json", 10**6)).items() if "second" in name
    }


def test_programs_read_a_run_in_a_bucket(in_bucket, tmp_path, capsys):
    assert report_command.main([in_bucket]) == 0
    stored = open_storage(in_bucket).files("")
    written = {name for name in stored if name.startswith("figures/") or name == report_command.REPORT}
    assert {f"{in_bucket}/{name}" for name in written} == set(capsys.readouterr().out.split())
    assert len(written) == len(report_command.FIGURES) + 1
    out = tmp_path / "plan.json"
    options = ["--expert-parallel=4", "--top-k=2", "--alpha=0.9", "--beta=0.4", f"--out={out}"]
    assert plan_command.main([f"--counts={in_bucket}", *options]) == 0
    assert f"steps {PRUNE_STEP + 1} to {NUM_STEPS} of {in_bucket}, after the prune" in capsys.readouterr().out
    assert out.exists()


def test_interrupted_and_told_to_stop_it_resumes_as_if_nothing_had_been(config, on_disk, address):
    stages = [
        (after("record", 3, interrupt), InterruptError, 0),
        (after("record", 6, interrupt), InterruptError, 5),
        (before("restore", PRUNE_STEP, interrupt), InterruptError, PRUNE_STEP),
        (after("record", 12, terminate), StoppedError, 13),
    ]
    for watch, error, newest in stages:
        with pytest.raises(error):
            train(config, address, watch=watch)
        assert max([0, *steps_on_disk(address)]) == newest
    train(config, address)
    assert not differences(address, on_disk)


def test_a_step_that_does_not_read_is_put_aside_and_the_run_resumes_from_the_one_before(
    config, on_disk, address, capsys
):
    with pytest.raises(InterruptError):
        train(config, address, watch=after("record", 12, interrupt))
    checkpoints = open_storage(f"{address}/checkpoints")
    damage_file(checkpoints, f"{folder_of(checkpoints, PRUNE_STEP)}/meta.json", lambda json: flip_bit(json, 0))
    train(config, address)
    shown = capsys.readouterr().out
    assert f"meta.json is damaged: it does not read as JSON of laep_jax; step {PRUNE_STEP} is put aside" in shown
    assert "resuming from step 5" in shown
    assert not differences(address, on_disk)


def test_a_run_that_was_taken_over_ends_at_its_next_checkpoint_and_writes_nothing(config, address):
    bucket = open_storage(address)

    def take_over() -> None:
        while steps_on_disk(address) != [5]:  # that save is still going up
            time.sleep(0.1)
        bucket.write("run.lock", b"process 7 on another 0123\n")
        left.update(bucket.files(""))

    left: dict = {}
    with pytest.raises(TakenOverError, match=rf"^{address} was taken over by process 7 on another; this process ends$"):
        train(config, address, watch=before("record", 6, take_over))
    found = bucket.files("").keys()
    assert found >= left.keys()
    assert records_in(found) == records_in(left)
    assert steps_on_disk(address) == [5]
    train(config, address)
    assert steps_on_disk(address) == [15, NUM_STEPS]


def test_a_start_that_is_refused_or_only_looks_does_not_take_a_run_over(config, in_bucket):
    bucket = open_storage(in_bucket)
    bucket.write("run.lock", b"process 7 on another 0123\n")
    before = bucket.files("")
    with pytest.raises(UserError, match=r"another run than that of checkpoint .*seed 0 -> 1; use another workdir"):
        train(change(config, train={"seed": 1}), in_bucket)
    longer = change(config, train={"num_steps": NUM_STEPS + 2})
    with pytest.raises(UserError, match=r"^--init-from='elsewhere' comes too late"):
        train(longer, in_bucket, init_from="elsewhere")
    train(config, in_bucket)  # it is complete
    assert bucket.read("run.lock", 99) == b"process 7 on another 0123\n"
    assert bucket.files("") == before


def test_placeholders_of_folders_and_what_else_lies_there_are_left_alone(config, address):
    bucket = open_storage(address)
    strange = {"tensorboard/": b"", "checkpoints/": b"", "notes.txt": b"mine", "old/loads/x.npy": b"another's"}
    for name, content in strange.items():
        bucket.write(name, content)
    train(config, address)
    assert any(name.startswith("events") for name in bucket.files("tensorboard"))
    assert all(bucket.read(name, 99) == content for name, content in strange.items())


def test_records_that_vanish_here_stay_in_the_bucket_but_for_dropped_loads(emulator, tmp_path):
    """As where a program tidies up temporary folders while a run goes on for weeks."""
    bucket = open_storage(new_folder())
    for name in ("experts.json", "000000001.npy", "000000257.npy", "000000513.npy"):
        bucket.write(f"loads/{name}", b"x")
    bucket.write("config.json", b"{}")
    mirror = Mirror(bucket, tmp_path)
    for name in ("config.json", "loads/000000001.npy", "loads/000000513.npy"):
        (tmp_path / name).unlink()
    mirror.upload()
    left = {"config.json", "loads/experts.json", "loads/000000001.npy", "loads/000000257.npy"}
    assert bucket.files("").keys() == left
    shutil.rmtree(tmp_path / "loads")
    mirror.upload()
    assert bucket.files("").keys() == left


def test_records_without_their_checkpoints_are_not_wiped(config, in_bucket):
    bucket = open_storage(in_bucket)
    before = bucket.read("metrics.jsonl", 10**9)
    bucket.remove("checkpoints")
    with pytest.raises(UserError, match=rf"{in_bucket} holds the records of a run, but its checkpoints are missing"):
        train(config, in_bucket)
    assert bucket.read("metrics.jsonl", 10**9) == before


def test_records_do_not_land_outside_their_folder(config, address):
    bucket = open_storage(address)
    bucket.write("run.lock", b"")
    bucket.write("loads/../../x", b"")
    with pytest.raises(UserError, match=r"^name in a run='loads/\.\./\.\./x' leads out of its folder$"):
        train(config, address)


def test_a_bucket_that_is_not_there_is_refused_in_a_line(config, emulator):
    message = r"^gs://nowhere/run/ cannot be listed: FileNotFoundError: b/nowhere/o$"
    with pytest.raises(UnavailableError, match=message) as error:
        train(config, "gs://nowhere/run")
    assert error.value.exit_code == 1  # started again it may be there


def test_the_extra_that_a_bucket_needs_is_named(config, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = "gs://bucket/run needs gcsfs: pip install 'laep_jax[gcs]', or gcsfs"
    with pytest.raises(UserError, match=rf"^{re.escape(message)}$"):
        train(config, "gs://bucket/run")


def test_text_in_a_bucket_is_read_once_into_the_local_cache(config, address, tmp_path, monkeypatch):
    bucket, on_disk = open_storage(address), open_storage(tmp_path / "text")
    for name in (*(f"{folder}/{number}.txt" for folder in "ab" for number in range(20)), "b/.hidden"):
        for storage, path in ((bucket, f"text/{name}"), (on_disk, name)):
            storage.write(path, f"{name}, ".encode() * 300)
    files = [f"{address}/text", str(on_disk.root), f"{address}/text/*/?.txt"]
    tokens = []
    for path in files:
        data = {"source": "text", "path": path, "cache_dir": str(tmp_path / "cache")}
        settings = change(config, data=data)
        for _ in range(2):
            dataset, _ = open_inputs(settings, on_disk)
            tokens.append(dataset.train_batch(0)["tokens_BS"])
        if path == files[0]:
            bucket.remove("text/b/.hidden")
            monkeypatch.setattr(data_bucket, "_fetched", None)  # read once, though listed at each start
            assert open_inputs(settings, on_disk)[0].fingerprint == dataset.fingerprint
            monkeypatch.undo()
    np.testing.assert_array_equal(tokens[:3], [tokens[0]] * 3)
    assert (tokens[4] != tokens[0]).any()
    with pytest.raises(UserError, match=r"^DataConfig\.path='gs://bucket/nothing' is neither a file, a folder"):
        open_inputs(change(config, data={"source": "text", "path": "gs://bucket/nothing"}), on_disk)
