import errno
import json
import os
import shutil

import numpy as np
import pytest

from laep_jax.errors import UserError
from laep_jax.files import parse_record, read_records, replace_file
from laep_jax.laep import recorded_loads
from laep_jax.laep.recorded_loads import read_loads
from laep_jax.tracking import metrics_file, run_log
from laep_jax.tracking.run_log import RunLog
from tests.support.event_files import event_files, read_events

LAYERS = 2
EXPERTS = 4
CUT = 6
LINEAGE = [[0, 1, 2, 3], [0, 1, 2, 3]]
PRUNED_LINEAGE = [[3, 0], [2, 1]]


def open_log(run_dir, resume_step=0):
    return RunLog(run_dir, num_experts=(EXPERTS,) * LAYERS, expert_parallel=2, resume_step=resume_step)


def tokens_of(step, lineage):
    """Tokens that name their step, layer and original expert: any mix-up shows."""
    return [np.array([1000 * step + 100 * layer + e for e in ids]) for layer, ids in enumerate(lineage)]


def run(log, first, last, *, cut_first=False):
    """What a loop writes in steps first..last, with a prune after step CUT and a save before every second step.

    cut_first: the checkpoint was that of before the prune, which is made once more.
    """
    for step in range(first, last + 1):
        if not (cut_first and step == first):
            log.record_counts(
                step,
                tokens_of(step, LINEAGE if step <= CUT else PRUNED_LINEAGE),
                LINEAGE if step <= CUT else PRUNED_LINEAGE,
            )
            log.write("train", step, loss=np.float32(3 / step), device_imbalance=np.array([1.5, 2.0]) / step)
            log.save()
        if step == CUT:
            log.write("eval", step, validation_loss=2.0, when="before_prune")
            log.write("prune", step, plan=f"plans/{step}.json", lineage=PRUNED_LINEAGE)
            log.write("eval", step, validation_loss=2.1, when="after_prune")
    log.save()
    log.close()


def contents(run_dir):
    return (run_dir / "metrics.jsonl").read_text(), read_loads(run_dir)


def events(run_dir):
    """(purge step or None, {tag: [(step, value), ...]}) of every TensorBoard file, oldest first."""
    files = []
    for path in event_files(run_dir):
        scalars, purge = {}, None
        for event in read_events(path):
            if event.HasField("session_log"):
                purge = event.step
            for value in event.summary.value:
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
        files.append((purge, scalars))
    return files


def test_metrics_are_one_json_object_a_line_without_nan(tmp_path):
    with open_log(tmp_path) as log:
        log.write("train", 1, loss=np.float32(0.1), step_seconds=float("nan"), aux_z=np.inf, count=np.int64(3))
        log.write(
            "stability", 1, rank_correlation=[0.5, np.nan], overlap=np.array([np.nan, 1.0]), stable=np.bool_(True)
        )
        log.write("prune", 1, lineage=((3, 0), (2,)), seconds={"save": np.float64(0.5)}, reason="because")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    train, stability, prune = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    loss = float(np.float32(0.1))  # to the last bit, so that runs can be compared by their logs
    assert train == {"kind": "train", "step": 1, "loss": loss, "step_seconds": None, "aux_z": None, "count": 3}
    assert stability["rank_correlation"] == [0.5, None]
    assert stability["overlap"] == [None, 1.0]
    assert stability["stable"] is True
    assert (prune["lineage"], prune["seconds"], prune["reason"]) == ([[3, 0], [2]], {"save": 0.5}, "because")


def test_a_record_is_on_disk_at_once(tmp_path):
    with open_log(tmp_path) as log:
        log.write("train", 1, loss=1.0)
        assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 1.0


@pytest.mark.parametrize(
    ("reached", "resume_step", "cut_again"),
    [
        (CUT - 1, 2, False),  # before the prune
        (CUT, CUT - 1, False),
        (CUT, CUT, False),  # from the checkpoint after it
        (CUT, CUT, True),  # from the one before it
        (CUT + 2, CUT - 1, False),
        (CUT + 2, CUT, False),
        (CUT + 2, CUT, True),
        (CUT + 2, CUT + 1, False),
    ],
)
def test_an_interrupted_run_leaves_the_files_of_an_uninterrupted_one(tmp_path, reached, resume_step, cut_again):
    run(open_log(tmp_path / "whole"), 1, CUT + 3)
    run(open_log(tmp_path / "halves"), 1, reached)
    with (tmp_path / "halves" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 7, "lo')
    first = resume_step if cut_again else resume_step + 1
    run(open_log(tmp_path / "halves", resume_step), first, CUT + 3, cut_first=cut_again)
    (metrics, loads), (whole_metrics, whole_loads) = (contents(tmp_path / name) for name in ("halves", "whole"))
    assert metrics == whole_metrics
    np.testing.assert_array_equal(loads.tokens_NLE, whole_loads.tokens_NLE)
    assert loads.steps.tolist() == whole_loads.steps.tolist() == list(range(1, CUT + 4))
    left = {path.name for path in (tmp_path / "halves").iterdir()}
    assert left == {"metrics.jsonl", "loads", "tensorboard"}


def test_a_new_run_drops_what_an_earlier_one_left(tmp_path):
    run(open_log(tmp_path), 1, 3)
    with open_log(tmp_path) as log:
        log.write("train", 1, loss=1.0)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    assert list((tmp_path / "loads").glob("*.npy")) == []
    assert events(tmp_path)[1][0] == 0


def test_records_of_the_resumed_step_that_are_new_stay_when_others_are_replaced(tmp_path):
    run(open_log(tmp_path), 1, CUT)
    with open_log(tmp_path, CUT) as log:  # resumed before the prune, with more validation batches
        log.write("validation", CUT, targets_by_domain={"a": 1})
        log.write("eval", CUT, validation_loss=3.0, when="after_prune")
        log.write("prune", CUT, plan="new", lineage=PRUNED_LINEAGE)
    at_prune = [record for record in read_records(tmp_path / "metrics.jsonl") if record["step"] == CUT]
    assert [record["kind"] for record in at_prune] == ["train", "eval", "validation", "eval", "prune"]
    assert [record["when"] for record in at_prune if record["kind"] == "eval"] == ["before_prune", "after_prune"]
    assert (at_prune[3]["validation_loss"], at_prune[4]["plan"]) == (3.0, "new")


def test_resuming_reads_the_end_of_the_metrics_only(tmp_path, monkeypatch):
    run(open_log(tmp_path), 1, 9)
    parsed = []
    monkeypatch.setattr(metrics_file, "parse_record", lambda *line: parsed.append(line) or parse_record(*line))
    open_log(tmp_path, 8).close()
    assert len(parsed) == 3  # steps 9, 8 and 7


@pytest.fixture
def full(monkeypatch):
    """A disk that takes half of the first write and then nothing, as long as the list has something in it."""
    full, write = [], os.write

    def write_half(descriptor, data):
        if not full:
            return write(descriptor, data)
        if full.pop() == "half":
            full.append("nothing")
            return write(descriptor, data[: len(data) // 2])
        full.append("nothing")
        raise OSError(errno.ENOSPC, "No space left on device")

    def no_file(*args):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace_file(*args)

    monkeypatch.setattr(os, "write", write_half)
    monkeypatch.setattr(recorded_loads, "replace_file", no_file)
    monkeypatch.setattr(run_log, "replace_file", no_file)
    return full


def test_on_a_full_disk_logs_wait_and_are_complete_when_there_is_room(tmp_path, full):
    run(open_log(tmp_path / "whole"), 1, 4)
    told = []
    log = RunLog(tmp_path / "x", num_experts=(EXPERTS,) * LAYERS, expert_parallel=2, report=told.append)
    for step in range(1, 5):
        if step == 2:
            full.append("half")
        log.record_counts(step, tokens_of(step, LINEAGE), LINEAGE)
        log.write("train", step, loss=np.float32(3 / step), device_imbalance=np.array([1.5, 2.0]) / step)
        log.write_file(f"plans/{step}.json", "plan")
        log.save()
    assert [text.split(str(tmp_path))[-1] for text in told] == [
        "/x/metrics.jsonl cannot be written: No space left on device; logs wait in memory and are tried again"
    ]
    assert read_loads(tmp_path / "x").steps.tolist() == [1]
    full.clear()
    log.save()
    log.close()
    assert told[1:] == ["the logs that waited are written"]
    (metrics, loads), (whole_metrics, whole_loads) = (contents(tmp_path / name) for name in ("x", "whole"))
    assert metrics == whole_metrics
    np.testing.assert_array_equal(loads.tokens_NLE, whole_loads.tokens_NLE)
    assert [step for step, _ in events(tmp_path / "x")[0][1]["train/loss"]] == [1, 2, 3, 4]
    assert sorted(path.name for path in (tmp_path / "x" / "plans").iterdir()) == [f"{i}.json" for i in range(1, 5)]


def test_a_run_that_ends_on_a_full_disk_names_what_is_not_complete(tmp_path, full):
    told = []
    with RunLog(tmp_path, num_experts=(2,), expert_parallel=1, report=told.append) as log:
        full.append("nothing")
        log.write("train", 1, loss=1.0)
        log.write_file("summary.json", "{}")
    assert len(told) == 2
    assert told[1].startswith("not complete, since it could not be written: ")
    assert all(name in told[1] for name in ("metrics.jsonl", "tensorboard", "summary.json"))


def test_a_run_that_is_only_looked_at_leaves_no_tensorboard_file(tmp_path):
    run(open_log(tmp_path), 1, 2)
    before = list((tmp_path / "tensorboard").iterdir())
    with open_log(tmp_path, 2) as log:
        log.write_file("summary.json", "{}")
    assert list((tmp_path / "tensorboard").iterdir()) == before


def test_tensorboard_gets_a_few_domains_of_any_name(tmp_path):
    told = []
    losses = {f"domain \udce9 {i}": float(i) for i in range(1024)}
    with RunLog(tmp_path, num_experts=(2,), expert_parallel=1, report=told.append) as log:
        for step in (1, 2):
            log.write("eval", step, validation_loss=1.0, validation_loss_by_domain=losses)
    [(_, scalars)] = events(tmp_path)
    assert len(scalars) == 21
    assert "eval/validation_loss_by_domain/domain \\udce9 19" in scalars
    assert told == ["TensorBoard gets 20 of 1,024 validation_loss_by_domain; metrics.jsonl has them all"]
    assert len(list(read_records(tmp_path / "metrics.jsonl"))[1]["validation_loss_by_domain"]) == 1024


def test_tensorboard_gets_every_number_and_a_purge_on_resume(tmp_path):
    run(open_log(tmp_path), 1, 4)
    run(open_log(tmp_path, 2), 3, 4)
    (_, first), (purge, second) = events(tmp_path)
    assert first["train/loss"] == [(step, pytest.approx(3 / step)) for step in (1, 2, 3, 4)]
    assert first["train/device_imbalance/max"][1] == (2, 1.0)
    assert first["train/device_imbalance/mean"][1] == (2, 0.875)
    assert purge == 3
    assert [step for step, _ in second["train/loss"]] == [3, 4]


def test_a_damaged_line_is_refused(tmp_path):
    run(open_log(tmp_path), 1, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_text("not json\n" + path.read_text())
    before = path.read_text()
    with pytest.raises(UserError, match=r"metrics.jsonl at byte 0 is not JSON"):
        open_log(tmp_path, 1)
    assert path.read_text() == before


def test_what_is_lost_is_named_and_the_run_resumes(tmp_path, capsys):
    run(open_log(tmp_path), 1, 2)
    shutil.rmtree(tmp_path / "loads")
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    run(open_log(tmp_path, 2), 3, 4)
    told = capsys.readouterr().out
    assert "loads: the loads of steps 1 to 2 are missing" in told
    assert "metrics.jsonl: the records of step 2 are missing" in told
    assert read_loads(tmp_path).steps.tolist() == [3, 4]


def test_unreadable_loads_are_refused(tmp_path):
    run(open_log(tmp_path), 1, 2)
    with pytest.raises(UserError, match=r"experts.json num_experts=\[4, 4\] is not \[8, 8\]"):
        RunLog(tmp_path, num_experts=(8,) * LAYERS, expert_parallel=2, resume_step=1)
    os.truncate(tmp_path / "loads" / "000000001.npy", 100)
    with pytest.raises(UserError, match=r"000000001.npy \(move it away .*\) does not read"):
        open_log(tmp_path, 1)
