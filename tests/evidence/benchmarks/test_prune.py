"""A short form of `benchmarks prune`: real runs of a small model."""

import functools

import pytest

from benchmarks import prune
from laep_jax.config import DataConfig, ModelConfig


@pytest.fixture(scope="module")
def result() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"num_layers": 2, "hidden_size": 64, "num_heads": 2, "ffn_size": 256, "num_experts": 16}
        patch.setattr(prune, "MODEL", ModelConfig(router_init=1.0, **sizes))
        variants = {
            name: fields | {"prune_delay": fields["prune_delay"] // 4} for name, fields in prune.VARIANTS.items()
        }
        patch.setattr(prune, "VARIANTS", variants)
        patch.setattr(prune, "DataConfig", functools.partial(DataConfig, sequence_length=32))
        patch.setattr(prune, "in_process", lambda _, variant: prune.measure(variant))
        return prune.run([])


def test_every_part_of_the_pause_is_there_and_adds_up(result):
    assert set(result["variants"]) == set(prune.VARIANTS)
    for figures in result["variants"].values():
        pause = figures["pause_seconds"]
        assert set(pause) == {*prune.COLUMNS}
        for moment, parts in prune.MOMENTS.items():
            assert pause[moment] == pytest.approx(sum(pause[part] for part in parts))
        assert min(pause.values()) >= 0
        assert figures["parameters"][1] < figures["parameters"][0]
    assert result["pause_seconds"] == result["variants"]["checkpoint"]["pause_seconds"]
    assert result["step_seconds"]["before"] > 0


def test_only_the_survivors_are_read_and_memory_reads_nothing(result):
    assert 1 <= result["bytes_read"] / result["bytes_needed"] < 1.1
    before, after = result["parameters"]
    assert result["bytes_needed"] == pytest.approx(12 * after, rel=0.01)  # float32 and both moments
    assert result["bytes_needed"] < 12 * 0.9 * before
    assert result["variants"]["memory"]["bytes_read"] is None
    assert min(result["restore_rate"], result["numpy_rate"]) > 0


def test_the_table_shows_every_variant(result):
    text = prune.table(result)
    assert all(name in text for name in prune.VARIANTS)
    assert "bytes read / needed" in text
