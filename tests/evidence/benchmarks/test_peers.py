"""laep_jax's own side in a short form; peers by stand-ins that answer, fail, or answer something else."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from benchmarks.__main__ import main
from benchmarks.peers import throughput as peers
from laep_jax.config import ModelConfig
from laep_jax.errors import UserError
from laep_jax.model.accounting import model_size

SMALL = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "head_dim": 16, "ffn_size": 32, "num_experts": 4}
PARAMETERS = 26_364_160
ANSWER = """
import json, sys
setting = json.loads(sys.argv[1])
report = {{"seconds": [9.0] * 4 + [{seconds}] * (setting["num_steps"] - 4), "parameters": {parameters}, "loss": {loss}}}
print("not the last line")
print(json.dumps(report | {{"versions": {{"peer": "1.0"}}}}))
"""


def answer(seconds: float, parameters: int = PARAMETERS, loss: float = 5.5) -> str:
    return ANSWER.format(seconds=seconds, parameters=parameters, loss=loss)


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """Installs programs that run these texts; returns the arguments of the benchmark."""

    def install(laep_jax: str, **texts: str) -> list[str]:
        def script(name: str, text: str) -> str:
            (tmp_path / name).write_text(text)
            return name

        own = [sys.executable, str(tmp_path / script("own.py", laep_jax))]
        programs = {"laep_jax": peers.Program("own")}
        for name, text in texts.items():
            programs[name] = peers.Program(
                "a peer", name, script(f"{name}.py", text), steps=1 if "once" in name else None
            )
            (tmp_path / name / "bin").mkdir(parents=True)
            (tmp_path / name / "bin" / "python").symlink_to(sys.executable)
            (tmp_path / name / "installed.txt").touch()
        script("install.sh", "echo pip says this; echo there is no such package; exit 1\n")
        monkeypatch.setattr(peers, "OWN", own)
        monkeypatch.setattr(peers, "SCRIPTS", tmp_path)
        monkeypatch.setattr(peers, "PROGRAMS", programs)
        return ["--environments", str(tmp_path), "--rounds", "2", "--steps", "3"]

    return install


def test_laep_jax_trains_the_model_it_is_told():
    model = peers.MODEL | SMALL
    setting = model | {"sequence_length": 16, "batch_size": 4} | peers.OPTIMIZER | {"num_steps": 6, "threads": 2}
    report = peers.train(setting)
    assert len(report["seconds"]) == 6
    assert report["seconds"][0] > report["seconds"][-1] > 0  # the first compiles
    assert 4 < report["loss"] < 7
    assert report["parameters"] == model_size(ModelConfig(**model, lfa=False), sequence_length=16).total
    assert report["versions"]["jax"]


def test_the_model_measured_has_the_parameters_of_mixtral():
    assert model_size(ModelConfig(**peers.MODEL, lfa=False), sequence_length=256).total == PARAMETERS


def test_medians_without_the_warm_up_and_ratios(stand_ins):
    result = peers.run(stand_ins(answer(0.5), quick=answer(0.4), once_slow=answer(4.0)))
    rates = {"laep_jax": 8192, "quick": 10240, "once_slow": 1024}
    assert result["tokens_per_second"] == pytest.approx(rates)
    assert result["ratio"] == pytest.approx({"quick": 0.8, "once_slow": 8})
    assert {name: len(rounds) for name, rounds in result["rounds"].items()} == {
        "laep_jax": 2,
        "quick": 2,
        "once_slow": 1,
    }
    assert len(result["seconds"]["once_slow"][0]) == peers.WARM_UP + 1
    assert result["versions"]["quick"] == {"peer": "1.0"}
    assert "x 0.80" in peers.table(result)
    json.dumps(result)


def test_a_peer_that_is_not_installed_is_skipped_with_a_line(stand_ins, tmp_path, capsys):
    arguments = stand_ins(answer(0.5), absent=answer(0.4))
    shutil.rmtree(tmp_path / "absent")
    result = peers.run(arguments)
    assert set(result["tokens_per_second"]) == {"laep_jax"}
    assert "--install" in result["skipped"]["absent"]
    assert "absent is skipped: not installed" in capsys.readouterr().err
    assert "skipped: not installed" in peers.table(result)
    result = peers.run([*arguments, "--install"])
    assert result["skipped"] == {"absent": "could not be installed: there is no such package"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import sys; sys.exit('out of memory')", "ended with code 1"),
        ("print('all is well')", "last line: 'all is well'"),
        ("", "last line: ''"),
        ("print('[]')", "has not printed its measurement"),
        (answer(0.0), "has not trained"),
        (answer(0.4, loss=0.0), "loss 0.0"),
        (answer(0.4, loss=50.0), "loss 50.0"),
        (answer(0.4).replace("* 4 +", "* 3 +"), "has not trained"),
        (answer(0.4, parameters=PARAMETERS - 1), "not the same model"),
    ],
)
def test_a_peer_that_fails_gives_no_number(stand_ins, capsys, text, says):
    with pytest.raises(RuntimeError, match=says):
        peers.run(stand_ins(answer(0.5), broken=text))
    if "exit" in text:
        assert "out of memory" in capsys.readouterr().err


def test_every_program_has_its_script_and_every_environment_its_recipe():
    recipe = (peers.SCRIPTS / "install.sh").read_text()
    for program in peers.PROGRAMS.values():
        if program.environment:
            compile((peers.SCRIPTS / program.script).read_text(), program.script, "exec")
            assert f"\n{program.environment})" in recipe


@pytest.mark.parametrize(("peer", "says"), [("maxtext", "needs Python 3.12 or newer"), ("jaxtext", "no peer jaxtext")])
def test_the_installation_says_what_is_missing(tmp_path, peer, says):
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["bash", str(peers.SCRIPTS / "install.sh"), peer, str(tmp_path)],
        env=os.environ | {"MAXTEXT_PYTHON": str(old)},
        capture_output=True,
        text=True,
    )
    assert done.returncode
    assert says in done.stderr.splitlines()[-1]
    assert not (tmp_path / peer).exists()


def test_bad_numbers_are_refused():
    for option in ("--rounds", "--steps"):
        with pytest.raises(UserError, match=f"{option}=0 must be at least 1"):
            main(["peers", option, "0"])


def test_results_that_are_kept_name_no_folders():
    results = sorted(peers.RESULTS.glob("*-peers*.json"))
    assert results
    for path in results:
        result = json.loads(path.read_text())
        assert set(result["tokens_per_second"]) == set(peers.PROGRAMS)
        assert '"/' not in path.read_text()
        assert "x " in peers.table(result)
