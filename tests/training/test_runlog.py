import json
import struct

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from laep_jax.errors import UserError
from laep_jax.training.runlog import RunLog

LAYERS = 2
EXPERTS = 4
CUT = 6
LINEAGE = [[0, 1, 2, 3], [0, 1, 2, 3]]
CUT_LINEAGE = [[3, 0], [2, 1]]


def open_log(run_dir, resume_step=0):
    return RunLog(run_dir, num_experts=(EXPERTS,) * LAYERS, expert_parallel=2, resume_step=resume_step)


def tokens_of(step, lineage):
    """Tokens that name their step, layer and original expert: any mix-up shows."""
    return [np.array([1000 * step + 100 * layer + e for e in ids]) for layer, ids in enumerate(lineage)]


def run(log, first, last, *, cut_first=False):
    """What a loop writes in steps first..last, with a cut after step CUT and a save before every second step.

    cut_first: the checkpoint was that of before the cut, which is made once more.
    """
    for step in range(first, last + 1):
        if not (cut_first and step == first):
            log.record_counts(
                step, tokens_of(step, LINEAGE if step <= CUT else CUT_LINEAGE), LINEAGE if step <= CUT else CUT_LINEAGE
            )
            log.write("train", step, loss=np.float32(3 / step), device_imbalance=np.array([1.5, 2.0]) / step)
            log.save_loads()
        if step == CUT:
            log.write("eval", step, heldout_loss=2.0, when="before_prune")
            log.write("prune", step, plan=f"plans/{step}.json", lineage=CUT_LINEAGE)
            for layer, kept in enumerate(CUT_LINEAGE):
                log.mark_pruned(step, layer, sorted(set(range(EXPERTS)) - set(kept)))
            log.write("eval", step, heldout_loss=2.1, when="after_prune")
    log.save_loads()
    log.close()


def contents(run_dir):
    with np.load(run_dir / "loads.npz") as loads:
        return (run_dir / "metrics.jsonl").read_text(), {name: loads[name].tolist() for name in loads.files}


def events(run_dir):
    """(purge step or None, {tag: [(step, value), ...]}) of every TensorBoard file, oldest first."""
    files = []
    for path in sorted((run_dir / "tensorboard").iterdir(), key=lambda path: path.name.split(".")[-1]):
        data, scalars, purge = path.read_bytes(), {}, None
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
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


def test_loads_stand_under_the_original_id_also_after_a_prune(tmp_path):
    run(open_log(tmp_path), 1, CUT + 2)
    _, loads = contents(tmp_path)
    assert loads["steps"] == list(range(1, CUT + 3))
    assert loads["expert_parallel"] == 2
    tokens = np.array(loads["tokens_per_expert"])
    assert tokens.shape == (CUT + 2, LAYERS, EXPERTS)
    np.testing.assert_array_equal(tokens[CUT - 1, 1], 1000 * CUT + 100 + np.arange(4))
    np.testing.assert_array_equal(tokens[CUT, 0], [1000 * (CUT + 1), 0, 0, 1000 * (CUT + 1) + 3])
    np.testing.assert_array_equal(tokens[CUT, 1], [0, 1000 * (CUT + 1) + 101, 1000 * (CUT + 1) + 102, 0])
    assert loads["pruned_at"] == [[-1, CUT, CUT, -1], [CUT, -1, -1, CUT]]


def test_layers_may_begin_with_different_widths(tmp_path):
    with RunLog(tmp_path, num_experts=(2, 4), expert_parallel=1) as log:
        log.record_counts(1, [np.array([5, 6]), np.array([1, 2, 3, 4])], [[0, 1], [0, 1, 2, 3]])
        log.save_loads()
    _, loads = contents(tmp_path)
    assert loads["tokens_per_expert"] == [[[5, 6, 0, 0], [1, 2, 3, 4]]]
    assert loads["pruned_at"] == [[-1, -1, -2, -2], [-1, -1, -1, -1]]


@pytest.mark.parametrize(
    ("reached", "resume_step", "cut_again"),
    [
        (CUT - 1, 2, False),  # before the cut
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
    assert contents(tmp_path / "halves") == contents(tmp_path / "whole")
    left = {path.name for path in (tmp_path / "halves").iterdir()}
    assert left == {"metrics.jsonl", "loads.npz", "tensorboard"}


def test_a_prune_behind_the_resumed_step_is_forgotten(tmp_path):
    run(open_log(tmp_path), 1, CUT + 2)
    with open_log(tmp_path, CUT - 1) as log:
        log.save_loads()
    metrics, loads = contents(tmp_path)
    assert "prune" not in metrics
    assert loads["steps"] == list(range(1, CUT))
    assert loads["pruned_at"] == [[-1] * EXPERTS] * LAYERS


def test_a_prune_made_once_more_replaces_its_marks(tmp_path):
    run(open_log(tmp_path), 1, CUT)
    with open_log(tmp_path, CUT) as log:  # resumed before the cut, with other settings
        log.mark_pruned(CUT, 0, [3])
        log.mark_pruned(CUT, 1, [])
        log.save_loads()
    assert contents(tmp_path)[1]["pruned_at"] == [[-1, -1, -1, CUT], [-1] * EXPERTS]


def test_a_new_run_drops_what_an_earlier_one_left(tmp_path):
    run(open_log(tmp_path), 1, 3)
    open_log(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert not (tmp_path / "loads.npz").exists()
    assert events(tmp_path)[1][0] == 0


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
    with pytest.raises(UserError, match=r"metrics.jsonl line 1 is not JSON"):
        open_log(tmp_path, 1)
    assert path.read_text() == before


def test_loads_of_another_model_are_refused(tmp_path):
    run(open_log(tmp_path), 1, 2)
    with pytest.raises(UserError, match=r"loads.npz \[layers, experts\]=\(2, 4\) does not fit"):
        RunLog(tmp_path, num_experts=(8,) * LAYERS, expert_parallel=2, resume_step=1)


@pytest.mark.parametrize("kept_bytes", [0, 100])
def test_unreadable_loads_are_refused(tmp_path, kept_bytes):
    run(open_log(tmp_path), 1, 2)
    path = tmp_path / "loads.npz"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(UserError, match=r"loads.npz \(move it away .*\) does not read"):
        open_log(tmp_path, 1)
