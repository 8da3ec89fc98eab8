"""gin at the edge: what is bound, what is refused and how, and that the operative config reads back."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from laep_jax.config import Config, LaepConfig, ModelConfig
from laep_jax.errors import UserError
from laep_jax.gin_config import load_config, operative_config, parse_arguments

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "a.gin") -> list[str]:
        (tmp_path / name).write_text(text)
        return [str(tmp_path / name)]

    return write


def test_files_then_bindings_over_defaults(write):
    files = write("ModelConfig.num_layers = 2\nSTEPS = 7\nTrainConfig.num_steps = %STEPS\nLaepConfig.alpha = (0.1, 1)")
    config = load_config(files, ["LaepConfig.beta = 0.2", "TrainConfig.num_steps = 9"])
    assert config.model.num_experts == (16, 16)
    assert (config.laep.alpha, config.laep.beta, config.train.num_steps) == ((0.1, 1), 0.2, 9)
    assert config.optimizer == Config().optimizer


def test_nothing_leaks_into_the_next_load(write):
    load_config(write("ModelConfig.num_layers = 2"))
    assert load_config([]) == Config()
    assert ModelConfig().num_layers == 4


def test_includes_are_beside_the_file(write):
    write("ModelConfig.num_layers = 7\nModelConfig.top_k = 1", "b.gin")
    config = load_config(write("include 'b.gin'\nModelConfig.top_k = 3"))
    assert (config.model.num_layers, config.model.top_k) == (7, 3)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("0.2", 0.2), ("hybrid", "hybrid"), ("inf", "inf"), ("(0.1, 0.2, 0.3, 0.4)", (0.1, 0.2, 0.3, 0.4))],
)
@pytest.mark.parametrize("equals", [True, False])
def test_command_line_values_need_no_quotes(argument, value, equals):
    name = "--gin.LaepConfig.alpha"
    files, bindings, rest = parse_arguments([*([f"{name}={argument}"] if equals else [name, argument]), "--workdir=x"])
    assert (files, rest) == ([], ["--workdir=x"])
    assert load_config(files, bindings).laep == LaepConfig(alpha=value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ModelConfig.num_expert = 2", "ModelConfig has no field 'num_expert'; did you mean num_experts?"),
        ("ModelConfig.zzz = 2", "ModelConfig has no field 'zzz'; its fields are vocab_size, num_layers"),
        ("ModeConfig.num_experts = 2", "there is no class 'ModeConfig'; did you mean ModelConfig?"),
        ("alpha = 0.2", "alpha is set but never used; did you mean LaepConfig.alpha?"),
        ("ModelConfig.num_layers = %L", "%L is used but never set"),
        ("x/ModelConfig.num_layers = 2", "scopes have no meaning here; write ModelConfig.num_layers"),
        ("ModelConfig.dtype = bfloat16", "bfloat16 is no Python literal; text stands in quotes"),
        ("ModelConfig.num_layers = 'two'", "ModelConfig.num_layers='two' must be of type int"),
        ("ModelConfig.num_layers = 2.5", "ModelConfig.num_layers=2.5 must be of type int"),
        ("include 'nothing.gin'", "include 'nothing.gin' cannot be read: No such file or directory"),
        ("ModelConfig.num_layers 3", "config does not parse: Couldn't parse statement"),
        ("LaepConfig.beta = -0.5", "LaepConfig.beta=-0.5 must lie between 0 and 1"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(write, text, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_config(write(text))
    assert "\n" not in str(error.value)


def test_a_missing_file_or_value_is_refused():
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_config(["nowhere.gin"])
    with pytest.raises(UserError, match="alpha needs a value"):
        parse_arguments(["--gin.LaepConfig.alpha"])


@pytest.mark.parametrize("file", sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.gin")))
def test_the_operative_config_of_every_config_reads_back(write, file):
    config = load_config([str(CONFIGS / file)])
    assert load_config(write(operative_config(config))) == config


def test_importing_it_needs_neither_jax_nor_a_patched_importlib():
    load = "g.load_config(['configs/paper/1010b.gin'])"
    code = f"import sys, laep_jax.gin_config as g; {load}; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parent, check=True)
