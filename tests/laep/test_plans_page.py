"""docs/plans.md: its blocks run and print what it shows, and it names every field of a plan."""

import re
import shlex
from pathlib import Path

import numpy as np

from laep_jax.laep import command, plan_json

PAGE = (Path(__file__).parents[2] / "docs" / "plans.md").read_text(encoding="utf-8")
PLAN_COMMAND = "python -m laep_jax plan "


def test_the_page_prints_what_it_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names, shown = {}, []
    for kind, block in re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE):
        if kind == "python":
            exec(block, names)
        elif block.startswith(PLAN_COMMAND):
            assert command.main(shlex.split(block.removeprefix(PLAN_COMMAND))) == 0
        elif kind == "text":
            shown.append(block)
            assert capsys.readouterr().out == block
    assert len(shown) == 4
    old_EDF = np.random.default_rng(0).normal(size=(12, 6, 8))  # as on the page
    np.testing.assert_array_equal(names["layers"][0]["up_EDF"], old_EDF[names["plan"]["layers"][0]["kept"]])


def test_the_page_names_every_field():
    fields = plan_json.PLAN | plan_json.LAYER | plan_json.SLOTS | {plan_json.DOMAINS}
    assert {name for name in fields if f"`{name}`" not in PAGE} == set()
