import json

import numpy as np
import pytest

from laep_jax.errors import UserError
from laep_jax.laep import recorded_loads
from laep_jax.laep.recorded_loads import NOT_THERE, LoadsWriter, read_current_counts, read_loads

WIDTHS = (4, 3)
# the slots' ids after each prune: a prune of layer 0 after step 3, a rearrangement after 5
ORDERS = {
    0: [[0, 1, 2, 3], [0, 1, 2]],
    3: [[3, 0], [0, 1, 2]],
    5: [[0, 3], [1, 2, 0]],
}


def order_in(step):
    return ORDERS[max(cut for cut in ORDERS if cut < step)]


def tokens_in(step, layer, expert):
    return 1000 * step + 100 * layer + expert


def record(writer, first, last):
    for step in range(first, last + 1):
        order = order_in(step)
        tokens = [np.array([tokens_in(step, layer, e) for e in ids]) for layer, ids in enumerate(order)]
        writer.record(step, tokens, order)
    writer.save()


@pytest.fixture(params=[2, 256], ids=["many files", "one file"])
def run_dir(request, tmp_path, monkeypatch):
    """Seven recorded steps."""
    monkeypatch.setattr(recorded_loads, "CHUNK", request.param)
    record(LoadsWriter(tmp_path, WIDTHS, 1, 0), 1, 7)
    lines = [{"kind": "train", "step": 1}]
    lines += [{"kind": "prune", "step": cut, "lineage": ORDERS[cut]} for cut in (3, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_loads_stand_under_the_original_id_also_after_a_prune(run_dir):
    loads = read_loads(run_dir)
    assert loads.steps.tolist() == list(range(1, 8))
    assert (loads.num_experts, loads.expert_parallel) == (WIDTHS, 1)
    assert loads.tokens_NLE.dtype == np.int32
    for step, row_LE in zip(loads.steps.tolist(), loads.tokens_NLE, strict=True):
        want_LE = np.full((2, 4), NOT_THERE)
        for layer, ids in enumerate(order_in(step)):
            want_LE[layer, ids] = [tokens_in(step, layer, expert) for expert in ids]
        np.testing.assert_array_equal(row_LE, want_LE)
    assert read_loads(run_dir, 4).steps.tolist() == [5, 6, 7]


@pytest.mark.parametrize("step", [0, 1, 2, 4, 6, 7])
def test_resumed_at_any_step_the_loads_are_the_same(run_dir, step):
    whole = read_loads(run_dir).tokens_NLE
    writer = LoadsWriter(run_dir, WIDTHS, 1, step)
    assert read_loads(run_dir).steps.tolist() == list(range(1, step + 1))
    record(writer, step + 1, 7)
    np.testing.assert_array_equal(read_loads(run_dir).tokens_NLE, whole)


def test_a_save_writes_the_last_file_only_and_keeps_no_more_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded_loads, "CHUNK", 2)
    writer = LoadsWriter(tmp_path, WIDTHS, 1, 0)
    record(writer, 1, 3)
    full = tmp_path / "loads" / "000000001.npy"
    written = full.stat().st_mtime_ns, full.stat().st_ino
    record(writer, 4, 6)
    assert (full.stat().st_mtime_ns, full.stat().st_ino) == written
    assert sorted(path.stem for path in full.parent.glob("*.npy")) == ["000000001", "000000003", "000000005"]
    assert writer._rows == []


def test_counts_of_the_model_as_it_now_is_are_by_slot_and_since_the_last_prune(run_dir):
    counts, told = read_current_counts(run_dir)
    assert told == f"steps 4 to 7 of {run_dir}, after the prune of step 3"
    for layer, (counts_NE, ids) in enumerate(zip(counts, ORDERS[5], strict=True)):
        want = [[tokens_in(step, layer, expert) for expert in ids] for step in (4, 5, 6, 7)]
        np.testing.assert_array_equal(counts_NE, want)


def test_counts_of_a_run_without_a_prune_are_all_steps(run_dir):
    (run_dir / "metrics.jsonl").write_text("")
    record(LoadsWriter(run_dir, WIDTHS, 1, 0), 1, 3)
    counts, told = read_current_counts(run_dir)
    assert told == f"steps 1 to 3 of {run_dir}, nothing is pruned yet"
    assert [counts_NE.shape for counts_NE in counts] == [(3, 4), (3, 3)]


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "loads" / "experts.json").unlink(), "experts.json does not exist, so .* is not the dir"),
        (lambda run: edit(run / "loads" / "experts.json", num_experts=[]), r"num_experts=\[\] must be the number"),
        (lambda run: edit(run / "loads" / "experts.json", expert_parallel=4), "expert_parallel=4 must be a num"),
        (lambda run: edit(run / "loads" / "experts.json", num_experts=[6, 3]), r"is not int32\[steps, 2, 6\]"),
        (lambda run: LoadsWriter(run, WIDTHS, 1, 3), r"recorded steps=0 \(after the prune of step 3\): there are no"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "loads of layer 0='' lack experts that the run has"),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"kind": "prune", "step": 3, "lineage": [[4], [0]]}\n'),
            r"lineage of step 3=\[4\] must be experts, each once",
        ),
    ],
)
def test_what_is_no_run_or_does_not_fit_is_refused(run_dir, spoil, message):
    spoil(run_dir)
    with pytest.raises(UserError, match=message):
        read_current_counts(run_dir)
