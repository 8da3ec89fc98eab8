"""What `benchmarks step` says must follow from what it measures, whatever the machine."""

import dataclasses

import pytest

from benchmarks import step
from laep_jax.config import DataConfig


@pytest.fixture
def small(monkeypatch):
    model = dataclasses.replace(step.CONFIG.model, hidden_size=32, head_dim=8, ffn_size=16, num_layers=2, num_experts=4)
    data = DataConfig(sequence_length=32, batch_size=2)
    config = dataclasses.replace(step.CONFIG, model=model, data=data)
    monkeypatch.setattr(step, "CONFIG", config)


@pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning")  # JAX 0.7 dies of it as an error
def test_every_part_of_the_step_is_found_in_the_profile(small):
    result = step.measure(8, 1)
    assert result["ratio"] == pytest.approx(result["gflops"] / result["matmul_gflops"])
    assert result["tokens_per_second"] == pytest.approx(64 / result["step_seconds"])
    parts = result["parts"]
    assert min(part["time"] for part in parts.values()) > 0
    assert sum(part["time"] for part in parts.values()) == pytest.approx(1)
    assert sum(part["flops"] for part in parts.values()) == pytest.approx(1)


def test_the_time_of_what_is_within_counts_once():
    loop = [(0, 100, "while"), (10, 40, "dot"), (15, 20, "copy"), (40, 60, "dot"), (100, 130, "dot")]
    assert step.own_times(loop) == {"while": 50, "dot": 75, "copy": 5}


def test_operations_belong_to_their_innermost_scope():
    scopes = step.operation_scopes(
        '  ROOT %dot.1 = f32[2] dot(a), metadata={op_name="jit(f)/transpose(jvp(dispatch))/experts/dot"}\n'
        '  add.2 = f32[2] add(a, b), metadata={op_name="jit(f)/while/body/add"}\n  copy.3 = f32[2] copy(a)\n'
    )
    assert step.part_of_operation("dot.1", scopes) == "experts"
    assert step.part_of_operation("add.2", scopes) == step.REST
    assert step.part_of_operation("copy.3", scopes) == step.REST


def test_the_table_shows_both_models(small, monkeypatch):
    shares = {part: {"time": 0.1, "flops": 0.2} for part in (*step.PARTS, step.REST)}
    figures = dict.fromkeys(("gflops", "matmul_gflops", "step_seconds", "tokens_per_second"), 2.0)
    monkeypatch.setattr(
        step, "in_process", lambda _, experts, *rest, **more: figures | {"parts": shares, "ratio": experts / 100}
    )
    result = step.run([])
    assert result["ratio"] == {"E16": 0.16, "E64": 0.64}
    text = step.table(result)
    assert "0.16" in text
    assert "10.00% / 20%" in text
