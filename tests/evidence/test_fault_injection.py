"""Faults injected into a tiny run: the short forms of `python -m tests.fault_injection`, and that they can fail."""

import json

import pytest

from laep_jax.errors import UserError
from laep_jax.state import fingerprint
from tests.fault_injection import damage, kill
from tests.fault_injection.__main__ import main


@pytest.mark.parametrize("trials", [pytest.param(1, id="short"), pytest.param(6, id="long", marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", [(), ("--bucket",)], ids=["disk", "bucket"])
def test_a_run_that_is_killed_ends_as_it_would_have(capsys, trials, place):
    assert main(["kill", f"--trials={trials}", "--json", *place]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["trials"] == trials
    assert counts["kills in a prune"] >= 1
    assert counts["wrong ends"] == counts["lost saves"] == 0


@pytest.mark.slow
def test_a_run_of_two_processes_of_which_one_is_killed_or_frozen_ends_as_it_would_have(capsys):
    assert main(["kill", "--trials=4", "--processes=2", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["kills"] >= 3
    assert counts["gone_seconds"] < 60


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(damage, "DAMAGES", {"one bit flipped": damage.flip_bit})


def told(capsys) -> dict[str, int]:
    """The table at the end of what was printed."""
    lines = [line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[-1:].isdecimal()]
    return {name: int(number) for name, number in lines if number.isdecimal()}


def test_damage_is_found_and_the_step_before_is_there(few, capsys):
    assert main(["damage", "--flips=4"]) == 0
    counts = told(capsys)
    assert counts["one bit flipped"] > 10
    assert counts[damage.RANDOM] == 4
    assert counts["undetected"] == counts["unnamed"] == counts["lost saves"] == 0


def test_damage_that_is_not_found_is_told(few, monkeypatch, capsys):
    monkeypatch.setattr(damage, "DAMAGES", {})
    monkeypatch.setattr(fingerprint, "first_difference", lambda *args: None)
    assert main(["damage", "--flips=12"]) == 1
    assert told(capsys)["undetected"] > 0


def test_a_kill_in_a_prune_is_aimed_at_each_of_its_events():
    whole = kill.Uninterrupted("", {name: [1.0, 2.0] for name in (kill.RUN, *kill.PRUNE)})
    rng = kill.random.Random(0)
    hits = [kill.choose_hit(rng, whole, True, 1) for _ in range(200)]
    assert {hit["event"] for hit in hits} == set(kill.PRUNE)
    assert {hit["occurrence"] for hit in hits} == {1, 2}
    assert all(0 <= hit["delay"] <= hit["occurrence"] for hit in hits)


def test_what_does_not_exist_is_refused(capsys):
    with pytest.raises(UserError, match="there is no fault 'fire'; there are damage, kill"):
        main(["fire"])
    with pytest.raises(UserError, match="--trials=0 must be at least 1"):
        main(["kill", "--trials=0"])
    assert main([]) == 0
    assert "kill" in capsys.readouterr().out
