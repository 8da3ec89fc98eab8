"""Services behind the protocol: a fake of both for order, resuming and failures; the real ones where installed."""

import dataclasses
import json
import sqlite3
import struct
import sys
import types

import numpy as np
import pytest

from laep_jax.config import Config, TrainConfig
from laep_jax.errors import UserError
from laep_jax.files import refuse_links
from laep_jax.tracking.run_log import RunLog
from laep_jax.training.check import check

BLOCK = 2**15  # bytes, of the records in W&B's file


class FakeService:
    """The package of a service: keeps each run's rows by its id, as a server does, and fails where it is told to."""

    def __init__(self):
        self.rows: dict[str, list[tuple[int, dict]]] = {}
        self.calls: list[dict] = []
        self.finished = 0
        self.failing = ""

    def Settings(self, **settings):
        return settings

    def init(self, **arguments):
        self.fail_if("init")
        self.calls.append(arguments)
        rows = self.rows.setdefault(arguments.get("id", arguments["name"]), [])
        next_step = max((step for step, _ in rows), default=-1) + 1
        return types.SimpleNamespace(
            log=lambda numbers, step: self.fail_if("log") or rows.append((step, numbers)),
            finish=self.finish,
            step=next_step,
            _next_step=next_step,
        )

    def finish(self):
        self.fail_if("finish")
        self.finished += 1

    def fail_if(self, call):
        if self.failing == call:
            raise RuntimeError(f"{call} is not\npossible")


@pytest.fixture
def services(monkeypatch):
    fakes = {name: FakeService() for name in ("wandb", "trackio")}
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    return fakes


def config_with(*names):
    return Config(train=TrainConfig(trackers=names))


def run(run_dir, steps, *names, resume_step=0, told=None):
    """A run of these steps, with a checkpoint after `resume_step`, that ends without warning."""
    report = [].append if told is None else told.append
    with RunLog(run_dir, num_experts=(4,), expert_parallel=1, resume_step=resume_step, report=report) as log:
        log.write_settings(config_with(*names), "my-run")
        for step in steps:
            log.record_counts(step, [np.ones(4, np.int32)], [range(4)])
            log.write("train", step, loss=3 / step, device_imbalance=[1.0, 2.0])
            if step % 2 == 0:
                log.write("eval", step, validation_loss=2 / step, validation_loss_by_domain={"a": 1.0}, when="periodic")
            log.save()


def steps_of(rows, tag):
    return [step for step, numbers in rows if tag in numbers]


def test_every_service_gets_the_numbers_by_tensorboards_tags_in_order_and_the_settings(tmp_path, services):
    run(tmp_path, range(1, 4), "wandb", "trackio")
    for name, fake in services.items():
        [call], [rows] = fake.calls, fake.rows.values()
        assert (call["project"], call["resume"]) == ("laep_jax", "allow")
        assert call["name"].startswith("my-run")
        assert call["config"] == config_with("wandb", "trackio").to_dict()
        imbalance = {f"train/device_imbalance/{of}": value for of, value in (("min", 1), ("mean", 1.5), ("max", 2))}
        assert rows[:3] == [
            (1, {"train/loss": 3.0} | imbalance),
            (2, {"train/loss": 1.5} | imbalance),
            (2, {"eval/validation_loss": 1.0, "eval/validation_loss_by_domain/a": 1.0}),
        ], name
        assert fake.finished == 1


def test_a_resumed_run_continues_at_the_service_and_a_new_one_does_not(tmp_path, services):
    run(tmp_path, range(1, 6), "wandb", "trackio")
    run(tmp_path, range(3, 9), "wandb", "trackio", resume_step=2)  # 3 to 5 again
    wandb, trackio = services.values()
    assert json.loads((tmp_path / "trackers.json").read_text()).keys() == {"wandb", "trackio"}
    [rows] = wandb.rows.values()
    assert steps_of(rows, "train/loss") == [1, 2, 3, 4, 5, 6, 7, 8]
    assert steps_of(rows, "eval/validation_loss") == [2, 4, 6, 8]
    [rows] = trackio.rows.values()
    assert steps_of(rows, "train/loss") == [1, 2, 3, 4, 5, 5, 6, 7, 8]  # a record of its last step may be missing
    run(tmp_path, range(1, 3), "wandb", "trackio")
    assert [len(rows) for rows in wandb.rows.values()] == [12, 3]
    assert len(trackio.rows) == 2


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_service_that_fails_is_reported_once_and_the_run_continues(tmp_path, services, call):
    services["wandb"].failing, told = call, []
    run(tmp_path, range(1, 5), "wandb", "trackio", told=told)
    assert told == [f"wandb fails: {call} is not; the run continues without it"]
    [rows] = services["trackio"].rows.values()
    assert steps_of(rows, "train/loss") == [1, 2, 3, 4]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_missing_package_is_reported_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"^TrainConfig\.trackers='wandb' needs the package wandb: pip install 'laep_j"):
        check(config_with("wandb"), tmp_path / "run")  # which opens what `train` opens
    (tmp_path / "trackio.py").write_text("raise TypeError('another protobuf')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(UserError, match=r"trackers='trackio' does not import: TypeError: another protobuf$"):
        check(config_with("trackio"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("names", [("mlflow",), ("wandb", "wandb")])
def test_names_of_trackers_are_checked(names):
    with pytest.raises(UserError, match=r"^TrainConfig\.trackers="):
        TrainConfig(trackers=names)


@pytest.mark.parametrize("id", ["../../x", 7])
def test_an_id_that_is_none_is_refused(tmp_path, services, id):
    run(tmp_path, range(1, 4), "wandb")
    (tmp_path / "trackers.json").write_text(json.dumps({"wandb": id}))
    with pytest.raises(UserError, match=r"^wandb in .*trackers\.json=.* must be 8 hexadecimal digits$"):
        run(tmp_path, range(3, 4), "wandb", resume_step=2)


def wandb_histories(path):
    """The step and the numbers of every row in a .wandb file, whose records are framed as in LevelDB's log."""
    internal = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, place, record, rows = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if (left := BLOCK - place % BLOCK) < 7:
            place += left
            continue
        _, length, part = struct.unpack("<IHB", data[place : place + 7])
        record, place = record + data[place + 7 : place + 7 + length], place + 7 + length
        if part in (1, 4):  # the whole of a record, or its end
            message, record = internal.Record.FromString(record), b""
            if message.HasField("history"):
                items = {item.key or "/".join(item.nested_key): item.value_json for item in message.history.item}
                rows.append((message.history.step.num, items))
    return rows


def test_wandb_offline_writes_into_the_run_directory_which_still_resumes(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    told = []
    run(tmp_path, range(1, 5), "wandb", told=told)
    run(tmp_path, range(3, 7), "wandb", resume_step=2, told=told)
    assert told == []
    [first, second] = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    id = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    assert first.name == second.name == f"run-{id}.wandb"
    assert [step for step, _ in wandb_histories(first)] == [1, 2, 3, 4]
    rows = dict(wandb_histories(second))  # of which W&B takes the steps that it does not have
    assert list(rows) == [3, 4, 5, 6]
    assert (float(rows[4]["train/loss"]), float(rows[4]["eval/validation_loss"])) == (0.75, 0.5)
    refuse_links(tmp_path)


def test_trackio_has_one_run_with_every_step(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio", reason="the extra trackio is not installed")
    for module in (trackio.utils, trackio.sqlite_storage, trackio):  # which read the variable TRACKIO_DIR when imported
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    told = []
    run(tmp_path / "run", range(1, 5), "trackio", told=told)
    run(tmp_path / "run", range(3, 7), "trackio", resume_step=2, told=told)
    assert told == []
    id = json.loads((tmp_path / "run" / "trackers.json").read_text())["trackio"]
    with sqlite3.connect(tmp_path / "trackio" / "laep_jax.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        [[config]] = database.execute("SELECT config FROM configs").fetchall()
    database.close()
    assert {name for name, _, _ in rows} == {f"my-run-{id}"}
    numbers = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert steps_of(numbers, "train/loss") == [1, 2, 3, 4, 4, 5, 6]
    assert json.loads(config)["train"] == json.loads(json.dumps(dataclasses.asdict(config_with("trackio").train)))
