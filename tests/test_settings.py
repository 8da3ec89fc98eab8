"""The list of settings, its JSON Schema, and that what is installed is what the package imports and ships."""

import ast
import copy
import json
import re
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest

from laep_jax.config import Config, DataConfig
from laep_jax.errors import UserError
from laep_jax.gin_config import CLASSES, load_config
from laep_jax.settings import config_schema, main

ROOT = Path(__file__).parents[1]
MODULES = {
    "orbax": "orbax-checkpoint",
    "gin": "gin-config",
    "absl": "absl-py",
    "array_record": "grain",
}  # where they differ; grain needs array-record
OPTIONAL = {"tokenizers", "gcsfs", "pyarrow", "torch", "transformers"}  # imported where needed, with advice


def test_every_field_is_printed_with_its_default_and_meaning(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    for name, cls in CLASSES.items():
        assert main([name]) == 0
        alone = capsys.readouterr().out
        assert alone in printed + "\n"
        for field, value in vars(cls()).items():
            assert re.search(rf"^  {field}: .* = ", alone, re.MULTILINE), (field, value)
    with pytest.raises(UserError, match="there is no class 'LapConfig'; did you mean LaepConfig"):
        main(["LapConfig"])


def test_the_schema_describes_every_config(capsys):
    assert main(["--json-schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for config in [Config(), *(load_config([str(path)]) for path in sorted((ROOT / "configs").rglob("*.gin")))]:
        validator.validate(json.loads(json.dumps(config.to_dict())))
    mixed = Config(data=DataConfig("jsonl", mixture=(("web", "a", 0.7), ("code", "b", 3))))
    validator.validate(json.loads(json.dumps(mixed.to_dict())))
    for part, field, value in [
        ("model", "num_layers", 0),
        ("model", "rope_base", 1),
        ("model", "dtype", "float16"),
        ("laep", "alpha", "abc"),
        ("train", "sedd", 1),
        ("data", "mixture", [["a", "x"]]),
        ("data", "mixture", [["a", "x", 0.0]]),
        ("data", "mixture", [["a", "x", 1.0, 1]]),
    ]:
        values = copy.deepcopy(json.loads(json.dumps(Config().to_dict())))
        values[part][field] = value
        assert not validator.is_valid(values), (part, field)
    assert config_schema().keys() < schema.keys()


@pytest.mark.parametrize(
    ("files", "requirements"),
    [
        (["laep_jax/**/*.py"], ["requirements.txt"]),
        (["benchmarks/*.py", "experiments/*.py"], ["requirements.txt", "requirements-dev.txt"]),
    ],
    ids=["the package", "beside it"],
)
def test_every_package_that_is_imported_is_required(files, requirements):
    text = "".join((ROOT / name).read_text() for name in requirements)
    required = set(re.findall(r"^([\w-]+)", text, re.MULTILINE))
    imported = set()
    for path in (path for pattern in files for path in ROOT.glob(pattern)):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            imported |= {name.partition(".")[0] for name in names}
    imported -= {*sys.stdlib_module_names, "laep_jax", "benchmarks", "experiments"} | OPTIONAL
    assert {MODULES.get(name, name) for name in imported} <= required


def test_the_wheel_has_every_package_and_the_configs():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "laep_jax").rglob("__init__.py")}
    assert set(listed) == found | {"laep_jax.configs"}
