import dataclasses
import json
import shutil

import numpy as np
import pytest
from hypothesis import strategies as st

from laep_jax.errors import UserError
from laep_jax.report import facts, loss_figures, series
from laep_jax.report.run_data import read_run


@pytest.fixture
def copied(run_dir, tmp_path):
    return shutil.copytree(run_dir, tmp_path / "run")


def save_loads(run_dir, tokens_NLE):
    """In place of the first 256 steps."""
    np.save(run_dir / "loads" / "000000001.npy", tokens_NLE)


def test_a_run_reads_back(run_dir):
    run = read_run(run_dir)
    assert run.steps.tolist() == list(range(1, 301))
    assert run.tokens_NLE.shape == (300, 4, 16)
    assert (run.expert_parallel, run.window, run.beta) == (4, 25, 0.1)
    assert run.alpha == (0.4,) * 4
    assert len(run.train) == 300
    assert [record["when"] for record in run.evals[-3:]] == ["periodic", "periodic", "end"]
    assert run.targets == {"books": 9000, "forms": 40, "web": 2960}
    (transition,) = run.prunes
    assert (transition.step, transition.beta, transition.alpha) == (180, 0.1, (0.4,) * 4)
    assert transition.before == (tuple(range(16)),) * 4
    for layer, ids in enumerate(transition.after):
        assert sorted(ids) == run.present(layer, 181).tolist()


def test_who_is_present_and_in_what_order(run_dir):
    run = read_run(run_dir)
    assert run.present(0, 180).tolist() == list(range(16))
    assert len(run.present(0, 181)) == len(run.prunes[0].after[0]) < 16
    assert run.order(180) == run.prunes[0].before
    assert run.order(181) == run.prunes[0].after


def test_mean_loads_take_the_window_and_never_two_models(run_dir):
    run = read_run(run_dir)
    np.testing.assert_array_equal(run.mean_loads(180), run.tokens_NLE[155:180].mean(0))
    np.testing.assert_array_equal(run.mean_loads(190), run.tokens_NLE[180:190].mean(0))
    np.testing.assert_array_equal(run.mean_loads(10), run.tokens_NLE[:10].mean(0))


def test_layers_that_began_narrower(make, tmp_path):
    run_dir = make(tmp_path / "run", num_steps=40, cut_step=None)
    path = run_dir / "loads" / "experts.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_experts": [12, 16, 16, 16]}))
    run = read_run(run_dir)
    assert run.present(0, 1).tolist() == list(range(12))
    assert run.order(1)[0] == tuple(range(12))


def test_a_run_in_progress_reads_up_to_what_it_saved(copied):
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 301, "lo')
    (copied / "loads" / "000000257.npy").unlink()
    save_loads(copied, np.ones((100, 4, 16), np.int32))  # saved before the transition
    run = read_run(copied)
    assert len(run.train) == 300
    assert run.prunes == ()


def test_an_unbounded_alpha_of_a_plan(copied):
    path = copied / "plans" / "180.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha": ["inf", 0.4, 0.4, 0.2]}))
    assert read_run(copied).prunes[0].alpha == (float("inf"), 0.4, 0.4, 0.2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "run directory .*run does not exist"),
        (lambda run: (run / "metrics.jsonl").unlink(), "is no run directory: it has no metrics.jsonl"),
        (lambda run: (run / "metrics.jsonl").write_text('{"kind": "train"}\n'), "metrics.jsonl line 1 is not a record"),
        (lambda run: (run / "metrics.jsonl").write_text("3\n"), "metrics.jsonl line 1 is not a record"),
        (lambda run: (run / "config.json").unlink(), "config.json cannot be read: No such file"),
        (lambda run: (run / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda run: (run / "config.json").write_text("{}"), "'laep' is missing"),
        (lambda run: (run / "config.json").write_text('{"laep": {}}'), "'window' is missing"),
        (lambda run: shutil.rmtree(run / "loads"), "experts.json does not exist"),
        (lambda run: [path.unlink() for path in (run / "loads").glob("*.npy")], "recorded steps=0 are saved"),
        (lambda run: (run / "loads" / "000000001.npy").write_bytes(b"PK\x03\x04"), "000000001.npy .* does not read"),
        (lambda run: save_loads(run, np.zeros((300, 4, 16), np.int32)), "steps=300 reach beyond step 257"),
        (lambda run: save_loads(run, np.zeros((9, 64), np.int32)), r"is not int32\[steps, 4, 16\]"),
        (lambda run: save_loads(run, np.full((9, 4, 16), -2, np.int32)), "=-2 is no number of tokens"),
        (
            lambda run: save_loads(run, np.ones((9, 4, 16), np.int32)),
            "plan applied after step 180=180 must follow recorded steps",
        ),
        (lambda run: (run / "plans" / "180.json").unlink(), "180.json cannot be read"),
    ],
)
def test_bad_input_is_one_line_naming_the_file(copied, spoil, message):
    spoil(copied)
    with pytest.raises(UserError, match=message) as caught:
        read_run(copied)
    assert "\n" not in str(caught.value)


def test_any_damage_is_a_run_or_refused_and_what_is_read_draws(fuzz, make, tmp_path):
    whole = make(tmp_path / "whole", num_layers=2, num_experts=8, num_steps=40, cut_step=30)
    files = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}

    def check(data):
        for path, valid in files.items():
            path.write_bytes(valid)
        path = data.draw(st.sampled_from(sorted(files)))
        if path.suffix == ".npy" or not data.draw(st.integers(0, 3)):
            path.write_bytes(data.draw(fuzz.bytes(files[path])))
        else:
            lines = files[path].decode().splitlines()
            prunes = [i for i, line in enumerate(lines) if '"prune"' in line] or [0]
            line = data.draw(st.one_of(st.sampled_from(prunes), st.integers(0, len(lines) - 1)))
            lines[line] = json.dumps(fuzz.json(data.draw, json.loads(lines[line])))
            path.write_text("\n".join(lines) + "\n")
        run = fuzz.reads(lambda: read_run(whole))
        if run is not None:
            for layer in range(run.num_layers):
                series.expert_lines(run, layer)
                series.cumulative_load(run, layer)
                series.mean_line(run, layer)
            series.device_loads(run)
            loss_figures.draw_loss(run)
            series.domain_losses(run)
            for tell in (facts.surroundings, facts.changed_settings, facts.key_numbers, facts.status, facts.timeline):
                tell(run)
            facts.domains_by_loss(run)
            facts.differing_settings(run, run)
            for transition in run.prunes:
                facts.plan_by_layer(run, transition, [0])

    fuzz(check)


def test_settings_that_differ_far_in_or_only_by_kind_of_list(make, tmp_path):
    long, other = ([0.25, *[0.4] * 99, last] for last in (0.5, 0.75))
    run = read_run(make(tmp_path / "run"))
    configs = [{"laep": {"alpha": alpha}, "train": {"trackers": []}} for alpha in (long, other)]
    runs = [dataclasses.replace(run, config=config) for config in configs]
    assert [name for name, *_ in facts.differing_settings(*runs)] == ["LaepConfig.alpha"]
    assert [name for name, *_ in facts.changed_settings(runs[0])] == ["LaepConfig.alpha"]


@pytest.mark.parametrize("plan", ["/etc/passwd", "plans/../../x.json", "plans/180.json\n", "config.json"])
def test_a_plan_is_read_from_plans_only(copied, plan):
    path = copied / "metrics.jsonl"
    path.write_text(path.read_text().replace('"plans/180.json"', json.dumps(plan)))
    with pytest.raises(UserError, match=r"plan applied after step 180: plan=.* must be plans/STEP.json"):
        read_run(copied)
