import numpy as np
import pytest

from laep_jax.config import Config, LaepConfig, ModelConfig
from laep_jax.gin_config import operative_config
from laep_jax.tracking.run_log import RunLog
from tests.support.event_files import summaries

CONFIG = Config(model=ModelConfig(num_layers=50), laep=LaepConfig(window=3))


def open_log(run_dir, resume_step=0):
    log = RunLog(run_dir, num_experts=(64,) * 50, expert_parallel=1, resume_step=resume_step)
    log.write_settings(CONFIG, "x")
    return log


def test_the_settings_are_a_text_as_it_stands(tmp_path):
    with open_log(tmp_path) as log:
        log.write("train", 1, loss=1.0)
    with open_log(tmp_path, 1) as log:
        log.write("train", 2, loss=1.0)
    texts = [(step, value) for step, value in summaries(tmp_path) if value.tag == "settings/operative.gin"]
    assert [step for step, _ in texts] == [0, 1]
    for _, value in texts:
        assert value.metadata.plugin_data.plugin_name == "text"
        [text] = value.tensor.string_val
        lines = text.decode().splitlines()
        assert all(line.startswith("    ") for line in lines)  # code, in Markdown
        assert [line[4:] for line in lines] == operative_config(CONFIG).splitlines()


def test_each_window_has_histograms_of_the_loads_of_some_layers(tmp_path):
    loads = [np.arange(64, dtype=np.int32) * (layer + 1) for layer in range(50)]
    with open_log(tmp_path) as log:
        for step in range(1, 8):
            log.record_counts(step, loads, [range(64)] * 50)
            log.write("train", step, loss=1.0)
    found = {(step, value.tag): value.histo for step, value in summaries(tmp_path) if value.HasField("histo")}
    assert {step for step, _ in found} == {3, 6}
    layers = sorted(int(tag.removeprefix("tokens_per_expert/layer_")) for step, tag in found if step == 3)
    assert (len(layers), layers[0], layers[-1]) == (20, 0, 49)
    histogram = found[6, "tokens_per_expert/layer_49"]
    assert (histogram.num, histogram.min, histogram.max) == (64, 0, 50 * 63)
    assert histogram.sum == loads[49].sum()
    assert histogram.sum_squares == np.square(loads[49].astype(float)).sum()
    assert sum(histogram.bucket) == 64
    limits = np.array(histogram.bucket_limit)
    below = np.cumsum(histogram.bucket)  # of every bucket but the last, which holds its limit
    assert below[:-1].tolist() == [(loads[49] < limit).sum() for limit in limits[:-1]]
    assert limits[-1] == pytest.approx(50 * 63)
