"""gin at the edge: what is bound, what is refused and how, and that the operative config reads back."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st

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


def test_no_bound_in_one_layer_reads_back(write):
    config = load_config([], ["LaepConfig.alpha = (0.1, 1e999, 'inf', 2)"])
    assert config.laep.alpha == (0.1, "inf", "inf", 2)
    assert load_config(write(operative_config(config))) == config
    assert Config.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config


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
        (
            "ModelConfig.num_expert = 2\nLaepConfig.alpah = 1\nModeConfig.x = 2\nbeta = 1\nTrainConfig.seed = %S",
            "ModelConfig has no field 'num_expert'; did you mean num_experts?; LaepConfig has no field 'alpah'; did you"
            " mean alpha?; there is no class 'ModeConfig'; did you mean ModelConfig?; beta is set but never used; did"
            " you mean LaepConfig.beta?; %S is used but never set",
        ),
        ("LaepConfig = 0.2", "LaepConfig is a class: write LaepConfig.FIELD, FIELD being one of alpha, beta"),
        ("TrainConfig.num_steps = 2e3", "TrainConfig.num_steps=2000.0 must be of type int; write 2000"),
        ("DataConfig.text_field = 1", "DataConfig.text_field=1 must be of type str; write '1', in quotes"),
        ("ModelConfig.lfa = 'true'", "ModelConfig.lfa='true' must be of type bool; write True"),
        (
            "LaepConfig.guard_tolerance = 'none'",
            "LaepConfig.guard_tolerance='none' must be of type float | None; write None",
        ),
        ("\0", "is UTF-16, or no text; save it as UTF-8"),
        ("alpha = 0.2", "alpha is set but never used; did you mean LaepConfig.alpha?"),
        ("ModelConfig.num_layers = %L", "%L is used but never set"),
        ("x/ModelConfig.num_layers = 2", "scopes have no meaning here; write ModelConfig.num_layers"),
        ("ModelConfig.dtype = bfloat16", "bfloat16 is no Python literal; text stands in quotes"),
        ("ModelConfig.num_layers = 'two'", "ModelConfig.num_layers='two' must be of type int"),
        ("ModelConfig.num_layers = 2.5", "ModelConfig.num_layers=2.5 must be of type int"),
        ("include 'nothing.gin'", "include 'nothing.gin' cannot be read: No such file or directory"),
        ("ModelConfig.num_layers 3", "config does not parse: Couldn't parse statement"),
        ("LaepConfig.beta = -0.5", "LaepConfig.beta=-0.5 must lie between 0 and 1"),
        ("ModelConfig.num_layers = @LaepConfig()", "@LaepConfig is a reference; a config holds values only"),
        ("A = @gin.singleton()\nModelConfig.num_layers = %A", "@gin.singleton is a reference"),
        ("import laep_trap", "import laep_trap: a config imports nothing"),
        ("import laep_trap as x", "import laep_trap: a config imports nothing"),
        ("from laep_trap import x", "import laep_trap.x: a config imports nothing"),
        ("from __gin__ import dynamic_registration", "a config imports nothing"),
        ("ModelConfig.num_layers = __import__('laep_trap')", "__import__ is no Python literal"),
        ("ModelConfig.num_layers = %gin.REQUIRED", "%gin.REQUIRED is used but never set"),
        ("A = %A\nModelConfig.num_layers = %A", "A is a macro, and holds another one"),
        ("A = (1, [%B])\nB = 1\nModelConfig.num_layers = %A", "A is a macro, and holds another one"),
        ("include 'a.gin'", "include 'a.gin' includes itself"),
        ("include '/etc/passwd'", "include '/etc/passwd' leads out of the folder of a.gin"),
        ("include '../b.gin'", "include '../b.gin' leads out of the folder of a.gin"),
        ("include 'link.gin'", "include 'link.gin' leads out of the folder of a.gin"),
        ("include '\\0'", "leads out of the folder"),
        ("include '.'", "include '.' is not a regular file"),
        ("ModelConfig.num_layers = " + "(" * 10_000, "config does not parse: "),
        ("ModelConfig.num_layers = (1,", "config does not parse"),
        ("ModelConfig.num_layers = -", "config does not parse"),
        ("ModelConfig.num_layers = {[1]: 2}", "config does not parse"),
        ("ModelConfig.num_layers = 0x" + "f" * 10_000, "ModelConfig.num_layers=<40000 bits> must be below 2**31"),
        ("ModelConfig.num_layers = " + "9" * 10_000, "config does not parse: Exceeds the limit"),
        ("ModelConfig.num_layers = 10001", "ModelConfig.num_layers=10001 must lie between 1 and 10000"),
        ("MeshConfig.cpu_devices = 1_000_000", "MeshConfig.cpu_devices=1000000 must lie between 1 and 1024"),
        ("OptimizerConfig.clip_norm = 1e999", "OptimizerConfig.clip_norm=inf must be a finite number"),
        ("LaepConfig.alpha = (0.1, 'hybrid', 1, 1)", "LaepConfig.alpha='hybrid' must be one of inf"),
        ("#" * 40_000, "size of --gin_file="),
    ],
)
def test_what_is_wrong_is_told_in_one_line(write, tmp_path, monkeypatch, text, message):
    (tmp_path / "link.gin").symlink_to("/dev/zero")
    (tmp_path / "laep_trap.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_config(write(text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_files_of_other_systems_are_read(tmp_path, encoding, end):
    text = f"# größer{end}ModelConfig.num_layers = 2{end}TrainConfig.num_steps = 1_000{end}"
    (tmp_path / "a.gin").write_bytes(text.encode(encoding))
    config = load_config([str(tmp_path / "a.gin")])
    assert (config.model.num_layers, config.train.num_steps) == (2, 1000)
    (tmp_path / "a.gin").write_bytes(text.encode("utf-16"))
    with pytest.raises(UserError, match="is UTF-16, or no text; save it as UTF-8"):
        load_config([str(tmp_path / "a.gin")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gin.LaepConfig", "0.2"], "LaepConfig is a class: write LaepConfig.FIELD"),
        (["--gin.ModelConfig=6"], "ModelConfig is a class: write ModelConfig.FIELD"),
        (["--gin.STEPS=6"], "STEPS is set but never used; a setting is CLASS.FIELD"),
        (["--num_steps=3"], "--num_steps is a setting: --gin.TrainConfig.num_steps=VALUE"),
        (["--config=tiny.gin"], "--config='tiny.gin' does not come with laep_jax; did you mean tiny?"),
        (["--gin_file=file:///a.gin"], "--gin_file='file:///a.gin' must be mounted"),
    ],
)
def test_an_argument_without_effect_is_refused(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(*parse_arguments(arguments)[:2])


def test_numbers_are_text_where_text_is_meant():
    arguments = ["--gin.DataConfig.source=text", "--gin.DataConfig.path=2024", "--gin.DataConfig.text_field=None"]
    data = load_config(*parse_arguments([*arguments, "--gin.DataConfig.tokenizer='bytes'"])[:2]).data
    assert (data.path, data.text_field, data.tokenizer) == ("2024", "None", "bytes")


def test_a_mixture_is_a_literal_whose_paths_are_expanded(write, monkeypatch):
    monkeypatch.setenv("CORPORA", "/corpora")
    text = """
        WEB = 0.7
        DataConfig.source = 'jsonl'
        DataConfig.mixture = (('web', '$CORPORA/web/*.jsonl', %WEB), ('code', 'gs://bucket/code', 0.3))
    """
    want = (("web", "/corpora/web/*.jsonl", 0.7), ("code", "gs://bucket/code", 0.3))
    config = load_config(write(text))
    assert config.data.mixture == want
    assert load_config(write(operative_config(config))) == config
    argument = '--gin.DataConfig.mixture=(("web","$CORPORA/web/*.jsonl",0.7),("code","gs://bucket/code",0.3))'
    assert load_config(*parse_arguments(["--gin.DataConfig.source=jsonl", argument])[:2]) == config


def test_files_and_bindings_have_one_limit(write):
    write("# " * 10_000, "b.gin")
    with pytest.raises(UserError, match=r"b.gin: the config as a whole is above 32768 characters"):
        load_config(write("include 'b.gin'\n" * 9))
    with pytest.raises(UserError, match="the command line: the config as a whole is above"):
        load_config([], ["TrainConfig.num_steps = 9"] * 9_000)
    with pytest.raises(UserError, match="a setting of 40000 characters is above 32768"):
        parse_arguments(["--gin.LaepConfig.alpha=" + "(" * 40_000])


def test_any_text_is_a_config_or_refused(fuzz, tmp_path):
    text = operative_config(Config()) + "STEPS = 3\nTrainConfig.num_steps = %STEPS\nModelConfig:\n  top_k = 1\n"
    path = tmp_path / "a.gin"

    def check(data):
        path.write_bytes(data.draw(fuzz.bytes(text.encode())))
        config = fuzz.reads(lambda: load_config([str(path)]))
        assert config is None or load_config(write_config(path, config)) == config

    fuzz(check)


def test_any_command_line_is_a_config_or_refused(fuzz):
    odd = ["(" * 3000, "-" * 3000, "%A", "@LaepConfig()", "1\nimport os", "0.5"]
    values = st.one_of(st.text(), st.sampled_from(odd))

    def check(data):
        name = data.draw(st.one_of(st.sampled_from(["LaepConfig.alpha", "ModelConfig.num_layers"]), st.text()))
        arguments = [f"--gin.{name}", data.draw(values)]
        fuzz.reads(lambda: load_config(*parse_arguments(arguments)[:2]))

    fuzz(check)


def write_config(path, config) -> list[str]:
    path.write_text(operative_config(config))
    return [str(path)]


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
