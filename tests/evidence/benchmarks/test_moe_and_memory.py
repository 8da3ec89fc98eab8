"""Short forms of the benchmarks that compile, and what their figures must obey whatever the machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import moe

ROOT = Path(__file__).parents[3]


def test_the_forms_of_moe_run_and_are_rated_by_the_same_flops(monkeypatch):
    monkeypatch.setattr(moe, "TOKENS", 256)
    monkeypatch.setattr(moe, "EXPERTS", (4, 8))
    monkeypatch.setattr(moe, "MESH_EXPERTS", 8)
    alone, mesh = (moe.measure(devices, 1) for devices in (1, 8))
    assert set(mesh["gflops"]) == {"mesh8_E8", "mesh8_E8_slot"}
    assert {"dense", "matmul", "E4", "E8"} < set(alone["gflops"])
    assert min([*alone["gflops"].values(), *mesh["gflops"].values()]) > 0
    assert alone["loads"]["E4"] > 1  # skewed


def test_moe_divides_by_the_dense_form(monkeypatch):
    rates = {1: {"dense": 100.0, "matmul": 300.0, "E16": 150.0}, 8: {"mesh8_E64": 50.0}}
    monkeypatch.setattr(moe, "in_process", lambda _, devices, *rest: {"gflops": rates[devices], "loads": {"E16": 2.0}})
    result = moe.run([])
    assert result["ratio"] == {"E16": pytest.approx(1.5), "mesh8_E64": pytest.approx(0.5)}
    assert "1.50" in moe.table(result)


def test_a_buffer_by_load_takes_less_memory_before_and_after():
    command = [sys.executable, "-m", "benchmarks", "memory", "--json"]
    result = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, timeout=600).stdout)
    size, buffer = result["temporary_bytes"], result["receive_buffer"]
    assert size["by load, before"] < 0.7 * size["worst case, before"]  # both hold a layer's experts, too
    assert size["by load, after"] < size["by load, before"]
    assert 1 < buffer["by load, after"] < buffer["by load, before"]
    assert sum(result["experts"]["by load, after"]) < sum(result["experts"]["by load, before"])
