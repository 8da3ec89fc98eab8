"""`--profile-steps`: which ranges are taken, and a run that is traced, interrupted and resumed."""

import contextlib
import gzip
import json
import re

import jax
import pytest

from laep_jax.errors import UserError
from laep_jax.training.profile import parse_steps, profiling
from laep_jax.training.start import train
from laep_jax.training.watch import unwatched
from tests.support.tiny_run import records, tiny_config
from tests.support.watching import InterruptError, before, interrupt

NUM_STEPS = 6


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("5", "must be FIRST:LAST"),
        ("a:b", "must be FIRST:LAST"),
        ("-1:2", "must be FIRST:LAST"),
        ("0:2", "must be FIRST:LAST"),
        ("3:2", "must be FIRST:LAST"),
        ("1:2:3", "must be FIRST:LAST"),
        ("399:401", r"ends after TrainConfig\.num_steps=400$"),
        ("1:101", "must be at most 100 steps$"),
    ],
)
def test_a_range_that_is_none_of_the_run_is_refused(text, rule):
    with pytest.raises(UserError, match=rf"^--profile-steps='{text}' {rule}"):
        parse_steps(text, 400)


def test_a_range_has_both_its_ends():
    assert list(parse_steps("398:400", 400)) == [398, 399, 400]
    assert len(parse_steps("1:100", 400)) == 100


def traced_steps(run_dir):
    """Of each trace, oldest first, the steps that it names."""
    traces = []
    for path in sorted(run_dir.glob("profile/plugins/profile/*/*.trace.json.gz")):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        steps = {int(event["args"]["step_num"]) for event in events if event.get("name") == "train" and "args" in event}
        traces.append(sorted(steps))
    return traces


def test_a_traced_run_trains_as_one_without_and_traces_the_rest_when_it_resumes(tmp_path, capsys):
    config = tiny_config(str(tmp_path / "cache"), train={"num_steps": NUM_STEPS, "checkpoint_every": 3})
    train(config, tmp_path / "plain")
    with pytest.raises(InterruptError):
        train(config, tmp_path / "x", profile_steps=range(3, 6), watch=before("step", 5, interrupt))
    assert f"{tmp_path}/x/profile has a trace of the steps until the run ended" in told(capsys)
    assert traced_steps(tmp_path / "x") == [[3, 4]]
    train(config, tmp_path / "x", profile_steps=range(3, 6))
    text = told(capsys)
    assert "--profile-steps: steps 3 to 3 are done; steps 4 to 5 are traced" in text
    assert f"{tmp_path}/x/profile has a trace of steps 4 to 5" in text
    [_, resumed] = traced_steps(tmp_path / "x")
    assert resumed[0] == 4  # this step compiles, and the file that is read here takes a million events
    losses = [[record["loss"] for record in records(tmp_path / name, "train")] for name in ("plain", "x")]
    assert len(losses[0]) == NUM_STEPS
    assert losses[0] == losses[1]


def told(capsys):
    """The log, whose lines may be wrapped."""
    return re.sub(r"\s+", " ", capsys.readouterr().out)


def test_steps_that_are_done_are_not_traced(tmp_path):
    lines = []
    with profiling(unwatched, range(3, 6), 7, tmp_path, lines.append) as watch:
        assert watch is unwatched
    assert lines == ["--profile-steps: steps 3 to 5 are done; nothing is traced"]
    with profiling(unwatched, range(0), 7, tmp_path, lines.append) as watch:
        assert watch is unwatched
    assert len(lines) == 1


def test_a_trace_that_cannot_be_made_ends_no_run(tmp_path, monkeypatch):
    lines = []
    with profiling(unwatched, range(1, 2), 0, tmp_path, lines.append) as watch:
        monkeypatch.setattr(jax.profiler, "start_trace", fail)
        stages(watch)
    monkeypatch.undo()
    with profiling(unwatched, range(1, 2), 0, tmp_path, lines.append) as watch:
        stages(watch, lambda: monkeypatch.setattr(jax.profiler, "stop_trace", fail))
    monkeypatch.undo()
    jax.profiler.stop_trace()
    assert lines == [f"no trace in {tmp_path}: No space left"] * 2


def fail(*arguments):
    raise RuntimeError("No space left\non device")


def stages(watch, between=contextlib.nullcontext):
    """Those of step 1."""
    with watch("step", 1):
        between()
    with watch("record", 1):
        pass
