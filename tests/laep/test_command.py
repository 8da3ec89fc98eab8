"""The `plan` command: files in, table and JSON out, one line on bad input, and NumPy alone is enough."""

import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

import laep_jax
from laep_jax.config import LaepConfig
from laep_jax.errors import UserError
from laep_jax.laep import command
from laep_jax.laep.counts import describe
from laep_jax.laep.plan import Plan, make_plan
from laep_jax.laep.rule import PruneRule

KEYS = {
    *("format", "version", "num_layers", "num_experts", "expert_parallel", "top_k", "alpha", "beta"),
    *("domain_beta", "min_experts", "max_experts", "estimator", "inequality", "rounding", "placement", "layers"),
}
LAYER_KEYS = {"kept", "pruned", "eligible", "device_load", "imbalance_before", "imbalance_after", "lower_bound"}
TOKENS_NLE = np.random.default_rng(0).integers(1, 500, (3, 6, 8)) ** 2 // 100
ALONE = """
import importlib.abc, sys

class NumPyOnly(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {"numpy", "laep_jax", *sys.stdlib_module_names}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, NumPyOnly())
for name in ("jax", "flax", "gin", "rich", "matplotlib"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise AssertionError(f"{name} is not blocked")

from laep_jax.laep.command import main

assert main(sys.argv[1:]) == 0
others = {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names
assert "jax" not in sys.modules
assert {"numpy", "laep_jax"} <= others
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with good counts in each form."""
    np.save(tmp_path / "counts.npy", TOKENS_NLE)
    np.savez(tmp_path / "counts.npz", tokens_per_expert=TOKENS_NLE, steps=np.arange(3))
    np.savez_compressed(tmp_path / "small.npz", tokens_per_expert=TOKENS_NLE.astype(np.float32))
    np.save(tmp_path / "one.npy", TOKENS_NLE[0])
    return tmp_path


def run(folder, *options, counts="counts.npz", **flags) -> None:
    """`plan` with the output in plan.json, unless the flags say otherwise."""
    flags = {"counts": folder / counts, "expert-parallel": 2, "top-k": 2, "out": folder / "plan.json"} | flags
    arguments = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    assert command.main([*arguments, *options]) == 0


def planned(tokens=TOKENS_NLE, **changes) -> Plan:
    """What the command's defaults should make."""
    devices = {name: changes.pop(name, 2) for name in ("top_k", "expert_parallel")}
    return make_plan(tokens, PruneRule.from_settings(LaepConfig(**changes), 6, **devices))


def printed(folder) -> list[str]:
    """What the command's defaults should print."""
    return [*describe([*TOKENS_NLE.swapaxes(0, 1)], 2), *planned().table().splitlines(), f"wrote {folder}/plan.json"]


def written(folder) -> Plan:
    return Plan.from_json((folder / "plan.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("counts", ["counts.npy", "counts.npz", "small.npz"])
def test_counts_of_iterations_make_the_plan(folder, counts, capsys):
    run(folder, counts=counts)
    assert written(folder) == planned()
    assert max(planned().num_experts_after) < 8
    assert capsys.readouterr().out.splitlines() == printed(folder)


@pytest.mark.parametrize("save", [np.save, lambda path, array: np.savez(path, tokens_per_expert=array)])
def test_counts_without_iterations_are_one(folder, save):
    with (folder / "layers").open("wb") as file:  # the name needs no suffix
        save(file, TOKENS_NLE[0])
    run(folder, counts="layers")
    assert written(folder) == planned(TOKENS_NLE[:1])


def test_json_has_exactly_these_keys(folder):
    run(folder)
    fields = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    assert fields.keys() == KEYS
    assert [layer.keys() for layer in fields["layers"]] == [LAYER_KEYS] * 6
    assert (fields["format"], fields["version"], fields["num_layers"], fields["num_experts"]) == ("laep-plan", 4, 6, 8)


def test_replica_slots_are_written_and_balance(folder, capsys):
    run(folder, "--replica-slots=1")
    plan = written(folder)
    assert "with 1 replica slots a device" in capsys.readouterr().out
    for layer in plan.layers:
        assert max(layer.slot_load) <= max(layer.device_load)
        assert max(layer.slot_load) < 1.05 * layer.mean_load


@pytest.mark.parametrize(
    ("text", "alpha"),
    [
        ("0.3", (0.3,) * 6),
        ("1", (1.0,) * 6),
        ("inf", ("inf",) * 6),
        ("hybrid", (0.2, 0.4, 0.4, 0.4, 0.4, 0.2)),
        ("0.1,0.2,inf,0.4,5e-1,0", (0.1, 0.2, "inf", 0.4, 0.5, 0.0)),
    ],
)
def test_alpha_in_every_form(folder, text, alpha):
    run(folder, alpha=text)
    fields = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    assert fields["alpha"] == list(alpha)
    assert written(folder) == planned(alpha=[float(value) for value in alpha])


def test_every_setting_reaches_the_plan(folder):
    settings = {"beta": 0.3, "estimator": "mean", "inequality": "lt", "rounding": "prune", "placement": "greedy"}
    run(folder, **settings, **{"expert-parallel": 4, "top-k": 3})
    assert written(folder) == planned(**settings, expert_parallel=4, top_k=3)


def test_domains_come_in_one_file_or_several_and_are_spared(folder, capsys):
    by_domain = {"code": TOKENS_NLE, "prose": TOKENS_NLE[::-1, :, ::-1]}
    np.savez(folder / "domains.npz", **by_domain)
    for name, tokens_NLE in by_domain.items():
        np.save(folder / f"{name}.npy", tokens_NLE)
    bounds = {"domain-beta": 0.15, "beta": 0.3, "alpha": "inf"}
    run(folder, counts="domains.npz", **bounds)
    told = capsys.readouterr().out
    assert told.startswith("2 domains, added up: code, prose\n6 layers x 8 experts, 3 iterations of ")
    assert "share of a domain's tokens on the pruned experts, domain_beta 0.15" in told
    plan = written(folder)
    files = [f"--counts={name}={folder / name}.npy" for name in by_domain]
    rest = [f"--{name}={value}" for name, value in bounds.items()]
    assert command.main([*files, *rest, "--expert-parallel=2", "--top-k=2", f"--out={folder / 'plan.json'}"]) == 0
    assert written(folder) == plan
    assert plan.prunes
    for layer, of in enumerate(plan.layers):
        for name, tokens_NLE in by_domain.items():
            tokens_E = tokens_NLE[:, layer].sum(0)
            assert of.domain_shares[name] == tokens_E[list(of.pruned)].sum() / tokens_E.sum() <= 0.15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--counts=a=counts.npz", "--counts=a=one.npy"], "names a domain twice"),
        (["--counts=a=counts.npz", "--counts=one.npy"], "must be NAME=FILE where there are several"),
        (["--counts=a=counts.npz", "--counts=b=wide.npy"], r"experts by layer of the domains=.* are not the same"),
        (["--counts=counts.npz", "--domain-beta=0.1"], r"--domain-beta=0\.1 needs counts of several domains"),
        (["--counts=counts.npz", "--target-experts=0.1"], r"target_experts=0\.1 is below \d+ of 48 experts"),
        (["--counts=counts.npz", "--max-experts=1"], "max_experts=1 contradicts min_experts=None"),
    ],
)
def test_domains_and_bounds_that_do_not_fit_are_refused(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    np.save("wide.npy", np.ones((1, 6, 9), int))
    with pytest.raises(UserError, match=message):
        command.main([*arguments, "--expert-parallel=2", "--top-k=2"])


def test_ids_of_experts_and_counts_of_a_rank_are_no_counts(folder):
    ids_NLE = np.argsort(np.random.default_rng(0).random((20, 3, 64)), axis=-1)[..., :8]
    part_NLE = np.array([[[90, 5, 3, 2], [8, 6, 3, 3]]] * 4)
    for name, array, message in (
        ("ids", ids_NLE, "look like ids of experts"),
        ("part", part_NLE, "layer 1 has 20% of"),
    ):
        np.save(folder / f"{name}.npy", array)
        with pytest.raises(UserError, match=f"{message}.* counts` makes counts"):
            run(folder, counts=f"{name}.npy")


def test_a_target_and_the_width_of_layers_are_options(folder):
    run(folder, **{"target-experts": 0.75, "alpha": "inf"})
    assert sum(written(folder).num_experts_after) <= 0.75 * 48
    run(folder, **{"max-experts": 4})
    assert written(folder).num_experts_after == (4,) * 6
    run(folder, **{"min-experts": 8})
    assert written(folder).num_experts_after == (8,) * 6


def test_without_out_only_the_table_is_printed(folder, capsys):
    before = sorted(folder.iterdir())
    arguments = ["--counts", str(folder / "one.npy"), "--expert-parallel", "2", "--top-k", "2"]
    assert command.main(arguments) == 0
    assert sorted(folder.iterdir()) == before
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-8:]] == ["layer", "0", "1", "2", "3", "4", "5", "total"]


def test_another_plan_is_overwritten(folder):
    run(folder, beta=0.5)
    run(folder)
    assert written(folder) == planned()


@pytest.fixture
def bad(folder) -> Path:
    """Beside the good counts, files that hold none."""
    arrays = {
        "one_axis": np.ones(8, int),
        "four_axes": np.ones((1, 1, 1, 8), int),
        "negative": TOKENS_NLE - np.where(np.arange(48).reshape(6, 8) == 11, 10_000, 0),
        "half": TOKENS_NLE + np.where(np.arange(8) == 4, 0.5, 0),
        "nan": np.full((1, 2, 8), np.nan),
        "words": np.full((1, 2, 8), "x"),
        "truth": np.full((1, 2, 8), True),
        "no_experts": np.ones((1, 2, 0), int),
        "ten": np.ones((1, 2, 10), int),
        "huge": np.full((1, 2, 8), 2**62),
        "dense": TOKENS_NLE * (np.arange(6) != 4)[:, None],
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "object.npy", np.array([[[1, None]]]), allow_pickle=True)
    np.savez(folder / "other.npz", loads=TOKENS_NLE, steps=np.arange(3))
    (folder / "text.npz").write_text("expert,tokens\n0,12\n")
    (folder / "empty.npz").write_bytes(b"")
    whole = (folder / "counts.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.npy").write_bytes((folder / "counts.npy").read_bytes()[:-8])
    locked = bytearray(whole)
    locked[whole.index(b"PK\x01\x02") + 8] |= 1  # the first array is marked as encrypted
    (folder / "locked.npz").write_bytes(locked)
    with zipfile.ZipFile(folder / "bytes.npz", "w") as archive:
        archive.writestr("tokens_per_expert", "1 2 3")
    return folder


UNREADABLE = "^counts '.*{}' does not read as an? .*npz file of numbers: "


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ("missing.npz", r"^counts '.*missing.npz' cannot be read: No such file or directory$"),
        (".", "^.*experts.json does not exist, so .* is not the directory of a run$"),
        ("x" * 300, "^counts '.*x' cannot be read: File name too long$"),
        ("text.npz", UNREADABLE.format("text.npz")),
        ("empty.npz", UNREADABLE.format("empty.npz")),
        ("cut.npz", UNREADABLE.format("cut.npz")),
        ("cut.npy", UNREADABLE.format("cut.npy")),
        ("locked.npz", UNREADABLE.format("locked.npz")),
        ("object.npy", UNREADABLE.format("object.npy")),
        (
            "other.npz",
            r"^arrays in counts '.*other.npz'=\['loads', 'steps'\] must include tokens_per_expert, or be layer_0, ",
        ),
        ("bytes.npz", r"^arrays in .*bytes.npz'=\[\] lack"),
        ("one_axis.npy", r"^tokens_per_expert.shape=\(8,\) must be \[iterations, layers, experts\] or without"),
        ("four_axes.npy", r"^tokens_per_expert.shape=\(1, 1, 1, 8\) must be"),
        ("negative.npy", r"^tokens_per_expert\[0, 1, 3\]=-\d+ must not be negative$"),
        ("half.npy", r"^tokens_per_expert\[0, 0, 4\]=\d+\.5 must be an integer$"),
        ("nan.npy", r"^tokens_per_expert\[0, 0, 0\]=nan must be finite$"),
        ("words.npy", UNREADABLE.format("words.npy")),
        ("truth.npy", "^dtype of tokens_per_expert of layer 0='bool' must be integer$"),
        ("no_experts.npy", r"^shape of tokens_per_expert of layer 0=\(1, 0\) must be"),
        ("huge.npy", r"^sum of tokens_per_expert of layer 0=.* must be below 2\*\*48$"),
        ("dense.npy", r"^layers without tokens=\[4\] cannot be pruned: leave dense layers out of the counts"),
    ],
)
def test_bad_counts_are_refused_in_one_line(bad, counts, message, capsys):
    refused(bad, message, capsys, counts=counts, **{"expert-parallel": 4})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"expert-parallel": 16}, r"^num_experts\[0\]=8 is below expert_parallel=16$"),
        ({"expert-parallel": 0}, "^expert_parallel=0 must be at least 1$"),
        ({"top-k": 9}, r"^num_experts\[0\]=8 is below top_k=9$"),
        ({"top-k": 0}, "^top_k=0 must be at least 1$"),
        ({"beta": -0.1}, "^beta=-0.1 must lie between 0 and 1$"),
        ({"beta": "nan"}, "^beta=nan must be a finite number$"),
        ({"alpha": "much"}, "^--alpha='much' must be a number, inf, hybrid or numbers with commas between$"),
        ({"alpha": "0.2,,0.4"}, "^--alpha='0.2,,0.4' must be a number"),
        ({"alpha": "0.2,0.4"}, r"^alpha=\(0.2, 0.4\) needs one entry for each of 6 layers$"),
        ({"alpha": "-0.1"}, "^alpha=-0.1 must not be negative or NaN$"),
        ({"alpha": "nan"}, "^alpha=nan must not be negative or NaN$"),
    ],
)
def test_bad_settings_are_refused_in_one_line(folder, flags, message, capsys):
    refused(folder, message, capsys, **flags)


def refused(folder, message, capsys, **flags) -> None:
    """One line, no table, no file."""
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=message) as error:
        run(folder, **flags)
    assert "\n" not in str(error.value)
    assert sorted(folder.iterdir()) == before
    assert "eligible" not in capsys.readouterr().out


@pytest.mark.parametrize("out", [".", "missing/plan.json", "counts.npy/plan.json"])
def test_an_out_that_cannot_be_written_is_named(folder, out):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"^--out=.* cannot be written: [A-Z][a-z ]+$"):
        run(folder, out=folder / out)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("option", [["--placement", "random"], ["--top-k", "1.5"], ["--unknown", "1"]])
def test_what_the_parser_knows_to_be_wrong_ends_with_2(folder, option, capsys):
    with pytest.raises(SystemExit) as stop:
        run(folder, *option)
    assert stop.value.code == 2
    assert option[0] in capsys.readouterr().err
    assert not (folder / "plan.json").exists()


def test_numpy_is_enough(folder):
    arguments = ["--counts", folder / "counts.npz", "--expert-parallel", "2", "--top-k", "2"]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, arguments), "--out", str(folder / "plan.json")],
        cwd=Path(laep_jax.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == printed(folder)
    assert written(folder) == planned()


def test_any_counts_make_a_plan_or_are_refused(fuzz, folder):
    whole = (folder / "counts.npz").read_bytes()
    dtypes = st.sampled_from(["<i8", ">i4", "u1", "u8", "f4", "f8", "?"])
    edges = st.sampled_from([0, 1, 7, 255, 2**62])

    def check(data):
        if data.draw(st.booleans()):
            (folder / "any").write_bytes(data.draw(fuzz.bytes(whole)))
        else:
            shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
            values = [data.draw(edges) for _ in range(math.prod(shape))]
            with (folder / "any").open("wb") as file, np.errstate(all="ignore"):
                np.savez(file, tokens_per_expert=np.array(values, np.uint64).astype(data.draw(dtypes)).reshape(shape))
        fuzz.reads(lambda: run(folder, counts="any"))

    fuzz(check)
