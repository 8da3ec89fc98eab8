"""The launchers of scripts/ as far as they go without Google Cloud, and that the documentation names what exists."""

import dataclasses
import os
import re
import shlex
import subprocess
import typing
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS
from experiments.catalogue import EXPERIMENTS
from laep_jax.__main__ import COMMANDS, dispatch
from laep_jax.chips import find_chip
from laep_jax.config import Config
from tests.fault_injection.__main__ import FAULTS
from tests.huggingface.vllm_losses import STEPS

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
PAGE = (ROOT / "docs" / "tpu.md").read_text()
PAGES = [path for pattern in ("README.md", "docs/*.md", "[a-z]*/**/README.md") for path in ROOT.glob(pattern)]
PROGRAMS = {
    "laep_jax": COMMANDS,
    "benchmarks": BENCHMARKS,
    "experiments": {*EXPERIMENTS, "tables"},
    "tests.fault_injection": FAULTS,
    "tests.huggingface.vllm_losses": STEPS,
}
NAMED = "\n".join([PAGE, *(script.read_text() for script in SCRIPTS)])
TPU = {"NAME": "laep", "ZONE": "us-west4-a", "TYPE": "v5litepod-16"}
CLUSTER = {"CLUSTER": "c", "ZONE": "us-west4-a", "PROJECT": "p", "WORKLOAD": "laep", "TYPE": "v5litepod-16"}
ARGUMENTS = ("--gin_file=configs/paper/10b.gin", "--gin.ModelConfig.num_experts=(8, 16)", "--workdir=/mnt/a run")
FLAGS = {"LIBTPU_INIT_ARGS": "--xla_a=1 --xla_b=2"}


def run(script: str, *arguments: str, path: str = "", **environment: str) -> subprocess.CompletedProcess:
    """In an environment of its own, so that nothing of this machine's is passed on."""
    environment["PATH"] = path + os.defpath
    return subprocess.run(
        ["bash", f"scripts/{script}", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def printed(script: str, *arguments: str, **environment: str) -> list[list[str]]:
    """The commands that a dry run prints, as words."""
    result = run(script, "--dry-run", *arguments, **environment)
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines()]


def flag(command: list[str], name: str) -> str:
    [value] = [word.removeprefix(f"{name}=") for word in command if word.startswith(f"{name}=")]
    return value


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_parses_and_tells_its_use(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)
    helped = run(script.name, "--help")
    assert helped.returncode == 0, helped.stderr
    assert f"scripts/{script.name} [--dry-run]" in helped.stdout
    assert run(script.name, "-h").stdout == helped.stdout


@pytest.mark.parametrize(("slices", "group"), [("1", "tpu-vm"), ("2", "queued-resources")])
@pytest.mark.parametrize("action", ["create", "install", "train", "log", "stop", "delete"])
def test_every_action_prints_its_commands(action, slices, group):
    commands = [c for c in printed("tpu_vm.sh", action, SLICES=slices, **TPU) if c[0] == "gcloud"]
    assert commands
    for command in commands:
        assert command[:4] == ["gcloud", "compute", "tpus", group]
        assert "--zone=us-west4-a" in command
        if action in ("install", "train", "stop"):
            assert "--worker=all" in command
            assert ("--node=all" in command) == (slices == "2")


def test_settings_and_flags_reach_the_hosts_as_they_were():
    [command] = printed("tpu_vm.sh", "train", *ARGUMENTS, **TPU, **FLAGS)
    words = shlex.split(flag(command, "--command"))
    started = words[words.index("env") : words.index(">")]
    assert started == ["env", "LIBTPU_INIT_ARGS=--xla_a=1 --xla_b=2", "scripts/tpu_host.sh", *ARGUMENTS]
    [command] = printed("xpk.sh", *ARGUMENTS, **CLUSTER, **FLAGS)
    assert shlex.split(flag(command, "--command"))[-5:] == ["python", "train.py", *ARGUMENTS]
    assert flag(command, "--env") == "LIBTPU_INIT_ARGS=--xla_a=1 --xla_b=2"


def test_what_xpk_is_told():
    [command] = printed("xpk.sh", SLICES="2", STORAGE="s", IMAGE="image", XPK_FLAGS="--spot --quiet", **CLUSTER)
    assert command[:3] == ["xpk", "workload", "create"]
    assert flag(command, "--num-slices") == "2"
    assert flag(command, "--storage") == "s"
    assert flag(command, "--base-docker-image") == "image"
    assert flag(command, "--command") == "exec python train.py"
    assert flag(command, "--restart-on-exit-codes") == "1,75"
    assert command[-2:] == ["--spot", "--quiet"]


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["tpu_vm.sh", "start"], TPU, "scripts/tpu_vm.sh [--dry-run] ACTION"),
        (["tpu_vm.sh", "stop"], {"ZONE": "z"}, "NAME: is needed"),
        (["tpu_vm.sh", "--dry-run", "create"], TPU | {"TYPE": "v9-8"}, "VERSION is needed for TYPE=v9-8"),
        (["tpu_vm.sh", "--dry-run", "each", "df", "-h"], TPU, "each takes one command, in quotes"),
        (["xpk.sh", "--dry-run"], {"ZONE": "z"}, "CLUSTER: is needed"),
    ],
)
def test_what_is_missing_is_refused(arguments, environment, said):
    result = run(*arguments, **environment)
    assert result.returncode != 0
    assert said in result.stderr


@pytest.mark.parametrize(
    ("attributes", "address"),
    [
        ({"worker-network-endpoints": "host-0,host-1"}, "host-0:8482"),
        ({"worker-network-endpoints": "unknown:unknown:10.0.0.5,unknown:unknown:10.0.0.6"}, "10.0.0.5:8482"),
        (
            {
                "worker-network-endpoints": "10.0.1.5,10.0.1.6",
                "tpu-env": "TYPE: 'V5'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.5:8080'\nMEGASCALE_NUM_SLICES: '2'",
            },
            "10.0.0.5:8482",
        ),
    ],
)
def test_a_host_finds_the_first_one(tmp_path, attributes, address):
    for name, text in ({"tpu-env": "TYPE: 'V5'"} | attributes).items():
        (tmp_path / name).write_text(text)
    curl = tmp_path / "curl"
    curl.write_text(f'#!/bin/sh\nfor url; do :; done\ncat "{tmp_path}/${{url##*/}}"\n')
    curl.chmod(0o755)
    result = run("tpu_host.sh", "--dry-run", *ARGUMENTS, path=f"{tmp_path}:")
    assert result.returncode == 0, result.stderr
    words = [f"JAX_COORDINATOR_ADDRESS={address}", ".venv/bin/python", "train.py", *ARGUMENTS]
    assert shlex.split(result.stdout) == words


def test_without_a_metadata_server_a_host_does_not_start(tmp_path):
    curl = tmp_path / "curl"
    curl.write_text("#!/bin/sh\nexit 22\n")
    curl.chmod(0o755)
    result = run("tpu_host.sh", "--dry-run", path=f"{tmp_path}:")
    assert result.returncode == 1
    assert "the metadata server names no host" in result.stderr
    given = run("tpu_host.sh", "--dry-run", path=f"{tmp_path}:", JAX_COORDINATOR_ADDRESS="h:1")
    assert given.stdout.startswith("JAX_COORDINATOR_ADDRESS=h:1 ")


def test_settings_that_are_named_exist():
    classes = {part.__name__: part for part in typing.get_type_hints(Config).values()}
    named = set(re.findall(r"--gin\.(\w+)\.(\w+)", NAMED)) | set(re.findall(r"`(\w+Config)\.(\w+)`", NAMED))
    assert ("MeshConfig", "data") in named
    for part, field in sorted(named):
        assert field in {f.name for f in dataclasses.fields(classes[part])}, f"{part}.{field}"


def test_files_commands_and_slices_that_are_named_exist():
    for name in set(re.findall(r"(?<![\w/])(?:configs|scripts|docs|laep_jax|tests)/[\w/]+\.\w+", NAMED)):
        assert (ROOT / name).is_file(), name
    for name in set(re.findall(r"requirements[\w-]*\.txt", NAMED)):
        assert (ROOT / name).is_file(), name
    for topology in set(re.findall(r"--topology=(\S+)", NAMED)):
        find_chip(topology)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_commands_that_a_page_names_exist(page):
    text = page.read_text()
    folders = "benchmarks|configs|docs|experiments|laep_jax|notebooks|scripts|tests"
    for name in re.findall(rf"(?<![\w/.])(?:{folders})/[\w/-]+\.(?:py|md|gin|sh|json|jsonl)\b", text):
        assert (ROOT / name).is_file() or (page.parent / name).is_file(), name
    for program, command in re.findall(r"python -m ([\w.]+) ([a-z][\w-]*)", text):
        assert command in PROGRAMS[program] if program in PROGRAMS else program in ("venv", "pytest", "pip"), command


@pytest.mark.parametrize(
    ("command", "started"),
    [("train", r"scripts/tpu_vm\.sh train|scripts/xpk\.sh|train\.py"), ("preflight", "-m laep_jax preflight")],
)
def test_flags_that_are_named_exist(command, started, capsys):
    with pytest.raises(SystemExit):
        dispatch([command, "--help"])
    known = capsys.readouterr().out
    blocks = "".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
    named = {
        flag for line in re.findall(rf"(?:{started})\b(.*)", blocks) for flag in re.findall(r" (--\w[\w-]*)", line)
    }
    assert named
    for flag in named - {"--gin"}:
        assert re.search(rf"{flag}\b", known), flag


def test_shell_blocks_parse():
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) > 5
    for block in blocks:
        result = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert result.returncode == 0, f"{block}\n{result.stderr}"


def test_actions_and_variables_of_the_page_are_those_of_the_scripts():
    actions = set(re.findall(r"^(?:\w+=\S+ )*scripts/tpu_vm\.sh (\w+)", PAGE, re.MULTILINE))
    usage = run("tpu_vm.sh", "--help").stdout
    assert actions >= {"create", "install", "each", "train", "log", "stop", "delete"}
    for action in actions:
        assert re.search(rf"^    {action}\b", usage, re.MULTILINE), action
    told = usage + run("xpk.sh", "--help").stdout
    for line in re.findall(r"^((?:\w+=\S+ )+)scripts/", PAGE, re.MULTILINE):
        for name in re.findall(r"(\w+)=", line):
            assert re.search(rf"\b{name}\b", told), name
